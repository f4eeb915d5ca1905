//! `godwit check`: whether a migration would be refused, and what it would take.

use std::{
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use godwit_qemu::processor::list_features;

use super::{arguments::Migrate, client::Client, exit::Failure, history::between};
use crate::{
    api::{Check, CheckedHost, MigrateRequest},
    job::Forecast,
    output::Output,
    quantity::{rate, size, time_ms},
};

/// Seconds in a day.
const DAY_S: u64 = 86_400;

/// Checks a migration; what would refuse it is the answer then.
pub(super) async fn run(client: &Client, migrate: Box<Migrate>, output: Output) -> Result<ExitCode, Failure> {
    let options = migrate.options();
    let request = MigrateRequest { machine: migrate.machine, to: migrate.to, options };
    let check: Check = client.post("/v1/checks", &request).await?;
    let now_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    output.answer(&check, |check| show(check, now_unix_s));
    Ok(ExitCode::SUCCESS)
}

fn show(check: &Check, now_unix_s: u64) -> String {
    let Check { machine, from, to, .. } = check;
    let mut text = format!("{machine} can be moved from {from} to {to}\n");
    let mut line = |label: &str, value: String| text.push_str(&format!("  {label:<14}{value}\n"));
    line("machine", format!("{}, {}", check.machine_type, size(check.memory_bytes)));
    line(from, host(&check.source, now_unix_s));
    line(to, host(&check.target, now_unix_s));
    line("processor", processors(check));
    let Some(forecast) = &check.forecast else {
        line("forecast", "none: the guest's memory can't be read, or the link can't be measured".to_owned());
        return text;
    };
    let Forecast { total_ms, wire_bytes, downtime_ms, rate_bytes_per_second, round_trip_ms, .. } = forecast;
    let time = |ms: u64| time_ms(ms as f64);
    line("link", format!("{}, round trip {}", rate(*rate_bytes_per_second), time_ms(*round_trip_ms)));
    line("total", between(*total_ms, time));
    line("on the wire", between(*wire_bytes, size));
    line("pause", between(*downtime_ms, time));
    for (choice, price) in choices(forecast, check.downtime_target_ms) {
        line(choice, price);
    }
    text
}

fn host(host: &CheckedHost, now_unix_s: u64) -> String {
    let days = host.certificate_expires_unix_s.saturating_sub(now_unix_s) / DAY_S;
    format!(
        "QEMU {} ({}), {} of memory available, certificate valid for {days} days",
        host.qemu_version,
        if host.kvm { "KVM" } else { "TCG" },
        size(host.available_memory_bytes),
    )
}

/// What the guest has of its processor, against what it would get.
fn processors(check: &Check) -> String {
    let Check { from, to, source, target, .. } = check;
    let (here, there) = match (&source.processor, &target.processor) {
        (Some(here), Some(there)) => (here, there),
        (None, _) => return format!("not compared: {from} can't say what the guest has"),
        (_, None) => return format!("not compared: {to} doesn't say what it gives; is its godwit older?"),
    };
    let (count, added) = (here.features.len(), there.beyond(here));
    if added.is_empty() {
        return format!("{count} features, the same at {to}");
    }
    format!("{count} features; {to} adds {}, with which the guest can't come back", list_features(&added))
}

/// What each choice of `--on-stall` would come to; nothing where it doesn't come to a choice.
fn choices(forecast: &Forecast, target_ms: u64) -> Vec<(&'static str, String)> {
    let target = time_ms(target_ms as f64);
    if forecast.meets_target {
        return vec![("target", format!("{target} is likely to be met"))];
    }
    let pause = time_ms(forecast.downtime_ms.likely as f64);
    let throttle = match forecast.uncorrected.share_to_meet {
        Some(share) => format!("slows the guest to about {:.0} % of its speed", share * 100.0),
        None => "wouldn't help: even a guest that stands still pauses longer".to_owned(),
    };
    vec![
        ("target", format!("{target} is hardly to be met; --on-stall")),
        ("  switch", format!("pauses the guest for about {pause}")),
        ("  throttle", throttle),
        ("  wait", "goes on until the guest writes less".to_owned()),
        ("  cancel", "gives the migration up; the guest goes on where it is".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use godwit_migration::forecast::Course;
    use godwit_qemu::processor::Processor;

    use super::*;
    use crate::job::Range;

    fn checked(downtime_ms: u64, share_to_meet: Option<f64>) -> Check {
        let range = |likely| Range { low: likely / 2, likely, high: likely * 2 };
        let uncorrected = Course { total_ms: 1.0, wire_bytes: 1.0, downtime_ms: 1.0, share_to_meet };
        let host = CheckedHost {
            qemu_version: "10.0.2".into(),
            kvm: true,
            available_memory_bytes: 4 << 30,
            certificate_expires_unix_s: 100 * DAY_S,
            processor: Some(processor(&["aes", "fpu"])),
        };
        Check {
            machine: "web1".into(),
            machine_type: "pc-q35-10.0".into(),
            memory_bytes: 512 << 20,
            from: "hosta".into(),
            to: "hostb".into(),
            source: host.clone(),
            target: host,
            downtime_target_ms: 50,
            forecast: Some(Forecast {
                total_ms: range(12_000),
                wire_bytes: range(140 << 20),
                downtime_ms: range(downtime_ms),
                meets_target: downtime_ms <= 50,
                rate_bytes_per_second: 12_500_000,
                round_trip_ms: 20.0,
                uncorrected,
            }),
        }
    }

    fn shown(downtime_ms: u64, share_to_meet: Option<f64>) -> String {
        show(&checked(downtime_ms, share_to_meet), 10 * DAY_S)
    }

    fn processor(features: &[&str]) -> Processor {
        Processor {
            kvm: true,
            vendor: "GenuineIntel".into(),
            physical_address_bits: 40,
            features: features.iter().map(|name| (*name).into()).collect(),
        }
    }

    #[test]
    fn what_can_be_met_needs_no_choice() {
        let text = shown(24, Some(1.0));
        assert!(
            text.contains("certificate valid for 90 days") && text.contains("100 Mbit/s, round trip 20 ms"),
            "{text}"
        );
        assert!(text.contains("50 ms is likely to be met") && !text.contains("switch"), "{text}");
    }

    #[test]
    fn what_cannot_be_met_has_four_prices() {
        let text = shown(600, Some(0.4));
        for price in ["for about 600 ms", "about 40 % of its speed", "  wait", "  cancel"] {
            assert!(text.contains(price), "{price}: {text}");
        }
        assert!(shown(600, None).contains("wouldn't help"));
    }

    #[test]
    fn processors_are_compared_as_far_as_they_are_known() {
        let mut check = checked(24, None);
        assert_eq!(processors(&check), "2 features, the same at hostb");
        check.target.processor = Some(processor(&["aes", "avx2", "fpu"]));
        assert!(processors(&check).contains("hostb adds avx2, with which"), "{}", processors(&check));
        // As an agent of an earlier version answers.
        let old = r#"{"qemu_version":"9.2.0","kvm":true,"available_memory_bytes":1,"certificate_expires_unix_s":1}"#;
        check.target = serde_json::from_str(old).unwrap();
        assert!(processors(&check).starts_with("not compared: hostb"), "{}", processors(&check));
        check.source.processor = None;
        assert!(processors(&check).starts_with("not compared: hosta"), "{}", processors(&check));
    }
}
