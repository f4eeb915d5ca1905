//! Sizes, rates and times as people write and read them.
//!
//! | written | means |
//! |---|---|
//! | `4096`, `256K`, `256M`, `2G`, `256MiB` | bytes, powers of 1,024, as QEMU counts memory |
//! | `256kB`, `256MB`, `2GB` | bytes, powers of 1,000 |
//! | `80Mbit`, `80Mbit/s`, `1Gbit` | bits a second, powers of 1,000, as networks are sold |
//! | `10MB/s`, `10MiB/s`, `10M/s` | bytes a second |
//! | `50ms`, `2s` | time |

use std::time::Duration;

/// Why a quantity can't be read; one line that shows how to write it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuantityError {
    /// Not a size.
    #[error("`{0}` is not a size; write it like 256M, 2G or 256MB")]
    Size(String),
    /// Not a rate.
    #[error("`{0}` is not a rate; write it like 80Mbit or 10MB/s")]
    Rate(String),
    /// Not a time.
    #[error("`{0}` is not a time; write it like 50ms or 2s")]
    Time(String),
}

/// Reads a size in bytes.
///
/// # Errors
/// [`QuantityError::Size`] for anything that isn't a non-negative number with a known unit, or doesn't fit.
pub(crate) fn parse_size(text: &str) -> Result<u64, QuantityError> {
    let fail = || QuantityError::Size(text.to_owned());
    let (number, unit) = split(text).ok_or_else(fail)?;
    scale(number, byte_unit(unit).ok_or_else(fail)?).ok_or_else(fail)
}

/// Reads a rate; the result is bytes per second.
///
/// # Errors
/// [`QuantityError::Rate`] for anything else, and for zero: a migration at no rate never ends.
pub(crate) fn parse_rate(text: &str) -> Result<u64, QuantityError> {
    let fail = || QuantityError::Rate(text.to_owned());
    let (number, unit) = split(text).ok_or_else(fail)?;
    let bytes = match bit_unit(unit) {
        Some(bits) => scale(number, bits).map(|bits| bits / 8),
        None => unit.strip_suffix("/s").and_then(byte_unit).and_then(|unit| scale(number, unit)),
    };
    bytes.filter(|bytes| *bytes > 0).ok_or_else(fail)
}

/// Reads a rate, or `none` / `unlimited` for no limit.
///
/// # Errors
/// As [`parse_rate`].
pub(crate) fn parse_rate_limit(text: &str) -> Result<RateLimit, QuantityError> {
    match text {
        "none" | "unlimited" => Ok(RateLimit(None)),
        rate => parse_rate(rate).map(|bytes| RateLimit(Some(bytes))),
    }
}

/// A limit in bytes per second, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RateLimit(pub Option<u64>);

/// Reads a time.
///
/// # Errors
/// [`QuantityError::Time`] for anything that isn't a whole number of milliseconds or seconds.
pub(crate) fn parse_time(text: &str) -> Result<Duration, QuantityError> {
    let fail = || QuantityError::Time(text.to_owned());
    let (number, unit) = split(text).ok_or_else(fail)?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        _ => return Err(fail()),
    };
    scale(number, unit_ms).map(Duration::from_millis).ok_or_else(fail)
}

/// The number and the unit behind it.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim_start()))
}

fn byte_unit(unit: &str) -> Option<u64> {
    Some(match unit {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    })
}

fn bit_unit(unit: &str) -> Option<u64> {
    Some(match unit.strip_suffix("/s").unwrap_or(unit) {
        "bit" => 1,
        "kbit" | "Kbit" => 1_000,
        "Mbit" => 1_000_000,
        "Gbit" => 1_000_000_000,
        _ => return None,
    })
}

/// `None` when the product doesn't fit or would lose its fraction of a whole unit's precision.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just before")]
fn scale(number: f64, unit: u64) -> Option<u64> {
    let product = (number * unit as f64).round();
    (product.is_finite() && (0.0..9.0e18).contains(&product)).then_some(product as u64)
}

/// `268435456` → `256 MiB`.
#[must_use]
pub(crate) fn size(bytes: u64) -> String {
    let (value, unit) = reduce(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"]);
    format!("{} {unit}", short(value))
}

/// Bytes per second as networks are sold: `10000000` → `80 Mbit/s`.
#[must_use]
pub(crate) fn rate(bytes_per_second: u64) -> String {
    let (value, unit) =
        reduce(bytes_per_second as f64 * 8.0, 1000.0, &["bit/s", "kbit/s", "Mbit/s", "Gbit/s"]);
    format!("{} {unit}", short(value))
}

/// `1500` → `1.50 s`.
#[must_use]
pub(crate) fn time_ms(ms: f64) -> String {
    match ms {
        ms if ms < 1_000.0 => format!("{} ms", short(ms)),
        ms if ms < 120_000.0 => format!("{} s", short(ms / 1_000.0)),
        ms => format!("{} min", short(ms / 60_000.0)),
    }
}

/// `1234567` → `1,234,567`.
#[must_use]
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn reduce<'a>(mut value: f64, step: f64, units: &[&'a str]) -> (f64, &'a str) {
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    (value, units[unit])
}

/// Three significant digits, no trailing zeros behind the point of a whole number.
fn short(value: f64) -> String {
    let decimals = match value {
        v if v.fract() == 0.0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("10MB"), Ok(10_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
    }

    #[test]
    fn rates_are_bytes_per_second() {
        assert_eq!(parse_rate("80Mbit"), Ok(10_000_000));
        assert_eq!(parse_rate("80Mbit/s"), Ok(10_000_000));
        assert_eq!(parse_rate("10MB/s"), Ok(10_000_000));
        assert_eq!(parse_rate("1M/s"), Ok(1 << 20));
        assert_eq!(parse_rate_limit("none"), Ok(RateLimit(None)));
    }

    #[test]
    fn times() {
        assert_eq!(parse_time("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_time("2s"), Ok(Duration::from_secs(2)));
    }

    #[test]
    fn nonsense_is_refused_in_one_line() {
        for text in ["", "M", "-1M", "12X", "1..2M", "99999999999999T", "1e400"] {
            let error = parse_size(text).expect_err(text);
            assert_eq!(error.to_string().lines().count(), 1);
        }
        for text in ["80", "80M", "80mbit", "0Mbit", "80 parsecs", "-5Mbit"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
        assert!(parse_time("50").is_err());
    }

    #[test]
    fn people_read_them() {
        assert_eq!(size(256 << 20), "256 MiB");
        assert_eq!(size(1_600_000), "1.53 MiB");
        assert_eq!(rate(10_000_000), "80 Mbit/s");
        assert_eq!(time_ms(9.5), "9.50 ms");
        assert_eq!(time_ms(14_200.0), "14.2 s");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(12), "12");
    }
}
