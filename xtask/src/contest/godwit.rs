//! godwit moves the guest: two agents, one at each host, driven by their command line as a user would.

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{lab::Place, observer::BeatListener};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Account, DOWNTIME_TARGET, Forecast, Outcome, Range, Span, Stage,
    hosts::{Host, Hosts, MACHINE},
    watch::Watch,
};

/// When to give up.
pub(super) const LIMIT: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Boots the guest at host a and has godwit move it to host b; where the stage wants that, no longer timed, back with
/// both memories compared.
pub(super) fn run(stage: &Stage, name: &'static str, options: &[&str]) -> Result<Outcome> {
    let mut hosts = Hosts::start(stage)?;
    hosts.options.extend(options.iter().map(|option| (*option).to_owned()));
    let beat = BeatListener::start(&stage.lab.namespace(Place::Lan))?;
    hosts.boot(stage, &stage.command_line(beat.address()))?;
    let mut watch = Watch::start(stage, beat)?;
    let before = watch.wire_bytes()?;
    let started = SystemTime::now();
    let report = migrate(stage, &hosts, &hosts.a, &hosts.b, "digest");
    let ended = report.as_ref().ok().and_then(|report| resumed(report.as_ref()?));
    let span = Span { started, ended: ended.unwrap_or_else(SystemTime::now) };
    let mut outcome = watch.outcome(name, span, before)?;
    let Some(report) = report? else { return Ok(outcome) };
    outcome.converged = true;
    outcome.downtime_ms = report["downtime_ms"].as_f64();
    outcome.predicted = prediction(&report);
    outcome.reported = reported(&report);
    outcome.report = Some(report);
    if stage.finds_floor {
        outcome.floor_bytes = Some(hosts.b.memory_floor(&[MACHINE], stage.memory_mb)?);
    }
    println!("  {}", watch.check()?);
    if stage.compares_memories {
        outcome.memory_digest_equal = Some(compare_memories(stage, &hosts, &watch)?);
    }
    Ok(outcome)
}

/// Moves the guest back and has both memories compared; whether there was something to compare.
fn compare_memories(stage: &Stage, hosts: &Hosts, watch: &Watch) -> Result<bool> {
    println!("  and back, comparing both memories");
    let back = migrate(stage, hosts, &hosts.b, &hosts.a, "full")?.context("the way back took too long")?;
    // The side that compares is the target.
    let compared = hosts.ask(&hosts.a, &["status", back["id"].as_str().unwrap_or(MACHINE)])?;
    let pages = compared["report"]["pages_verified"].as_u64();
    println!("  {} pages compared and equal; {}", pages.unwrap_or(0), watch.check()?);
    Ok(pages.is_some_and(|pages| pages > 0))
}

/// Migrates the machine and returns the report; `None`: not within [`LIMIT`]. The command draws its progress bar itself.
fn migrate(stage: &Stage, hosts: &Hosts, from: &Host, to: &Host, verify: &str) -> Result<Option<Value>> {
    let target = format!("{}ms", DOWNTIME_TARGET.as_millis());
    let command = hosts
        .command(from)
        .args(["migrate", MACHINE, "--to", to.place.name(), "--downtime-target", &target, "--verify", verify])
        .args(&hosts.options)
        .stdout(Stdio::null())
        .spawn()?;
    let Some(succeeded) = await_end(command, stage.patience.of(LIMIT))? else { return Ok(None) };
    let migration = hosts.ask(from, &["status", MACHINE])?;
    let report = &migration["report"];
    if !succeeded || report["outcome"] != "completed" {
        bail!("the migration ended as {}: {}", report["outcome"], report["detail"]);
    }
    Ok(Some(report.clone()))
}

/// Whether a command succeeded; one that takes too long is ended, and with it what it watches: `migrate` leaves it alone.
pub(super) fn await_end(mut command: Child, limit: Duration) -> Result<Option<bool>> {
    let started = Instant::now();
    loop {
        if let Some(status) = command.try_wait()? {
            return Ok(Some(status.success()));
        }
        if started.elapsed() >= limit {
            command.kill()?;
            command.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// When the guest ran at the target, as for QEMU's contenders: by the event of the target's QEMU.
pub(super) fn resumed(report: &Value) -> Option<SystemTime> {
    report["resumed_unix_ms"].as_u64().map(|ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms))
}

/// What the report says was forecast before the first byte.
fn prediction(report: &Value) -> Forecast {
    let range = |figure: &str| Range::deserialize(&report["forecast"][figure]).ok();
    Forecast { total_ms: range("total_ms"), wire_bytes: range("wire_bytes") }
}

/// What the report says of itself.
fn reported(report: &Value) -> Account {
    Account { total_ms: report["total_ms"].as_u64(), wire_bytes: report["wire_bytes"].as_u64() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_guest_s_arrival_is_read_where_it_is_told() {
        let told = json!({ "resumed_unix_ms": 1_500 });
        assert_eq!(resumed(&told), Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_500)));
        assert_eq!(resumed(&json!({ "resumed_unix_ms": null })), None);
    }

    #[test]
    fn a_forecast_is_read_where_there_is_one() {
        let range = json!({ "low": 1, "likely": 2, "high": 3 });
        let report = json!({ "forecast": { "total_ms": range, "downtime_ms": range } });
        let total_ms = Some(Range { low: 1, likely: 2, high: 3 });
        assert_eq!(prediction(&report), Forecast { total_ms, wire_bytes: None });
        assert_eq!(prediction(&json!({ "forecast": null })), Forecast::default());
        let report = json!({ "total_ms": 3, "wire_bytes": 4, "forecast": null });
        assert_eq!(reported(&report), Account { total_ms: Some(3), wire_bytes: Some(4) });
    }
}
