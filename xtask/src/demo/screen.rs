//! What appears on screen: a line, the seconds since the beginning, and who says it.

use std::time::{Duration, Instant};

/// The time since which everything is told.
pub(super) struct Screen {
    began: Instant,
}

impl Screen {
    pub(super) fn begin() -> Screen {
        Screen { began: Instant::now() }
    }

    /// What is done to the hosts.
    pub(super) fn demo(&self, text: &str) {
        self.say(">>>", text);
    }

    /// What godwit says.
    pub(super) fn godwit(&self, text: &str) {
        self.say("godwit", text);
    }

    /// What the guest says of itself.
    pub(super) fn guest(&self, text: &str) {
        self.say("guest", text);
    }

    /// What that means.
    pub(super) fn note(&self, text: &str) {
        println!("{:8}  {:<7} ({text})", "", "");
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn say(&self, who: &str, text: &str) {
        println!("{:>6.1} s  {who:<7} {text}", self.elapsed().as_secs_f64());
    }
}

/// A number with its thousands apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes as megabytes.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A short time in milliseconds, a long one in seconds.
pub(super) fn duration(time: Duration) -> String {
    if time < Duration::from_secs(2) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([7, 999, 1_000, 1_234_567].map(grouped), ["7", "999", "1,000", "1,234,567"]);
    }
}
