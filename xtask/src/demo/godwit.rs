//! godwit moves the guest: two agents, one at each host, driven by their command line as a user would.

use std::{process::Stdio, time::SystemTime};

use anyhow::{Result, bail};
use godwit_sim::{guest_image::GuestImage, lab::Place, observer::BeatListener};
use serde_json::Value;

use super::{
    DOWNTIME_TARGET, Stage,
    hosts::{Host, Hosts, MACHINE},
    outcome::Outcome,
    watch::{GUEST_ADDRESS, Span, Watch},
};

pub(super) const NAME: &str = "godwit";

/// Boots the guest at host a, has godwit move it to host b, and, no longer timed, back with both memories compared.
pub(super) fn run(stage: &Stage) -> Result<Outcome> {
    let hosts = Hosts::start(stage)?;
    let beat = BeatListener::start(&stage.lab.namespace(Place::Lan))?;
    let command_line = GuestImage::command_line(stage.workload, GUEST_ADDRESS, Some(beat.address()));
    hosts.boot(stage.image, &command_line)?;
    let watch = Watch::start(stage.lab, beat)?;
    let before = watch.wire_bytes()?;
    let started = SystemTime::now();
    let report = migrate(&hosts, &hosts.a, &hosts.b, "digest");
    let ended = SystemTime::now();
    let mut outcome = watch.outcome(NAME, Span { started, ended }, before)?;
    let report = report?;
    outcome.converged = true;
    outcome.downtime_ms = report["downtime_ms"].as_f64();
    let inside = report["total_ms"].as_u64().unwrap_or(0);
    println!("  by its own account {:.1} s", inside as f64 / 1e3);
    println!("  {}\n  and back, comparing both memories", watch.check()?);
    let back = migrate(&hosts, &hosts.b, &hosts.a, "full")?;
    // The side that compares is the target.
    let compared = hosts.ask(&hosts.a, &["status", back["id"].as_str().unwrap_or(MACHINE)])?;
    let pages = compared["report"]["pages_verified"].as_u64();
    println!("  {} pages compared and equal; {}", pages.unwrap_or(0), watch.check()?);
    outcome.memory_digest_equal = Some(pages.is_some_and(|pages| pages > 0));
    Ok(outcome)
}

/// Migrates the machine and returns the report. The command draws its progress bar itself.
fn migrate(hosts: &Hosts, from: &Host, to: &Host, verify: &str) -> Result<Value> {
    let target = format!("{}ms", DOWNTIME_TARGET.as_millis());
    let status = hosts
        .command(from)
        .args(["migrate", MACHINE, "--to", to.place.name(), "--downtime-target", &target, "--verify", verify])
        .args(&hosts.options)
        .stdout(Stdio::null())
        .status()?;
    let migration = hosts.ask(from, &["status", MACHINE])?;
    let report = &migration["report"];
    if !status.success() || report["outcome"] != "completed" {
        bail!("the migration ended as {}: {}", report["outcome"], report["detail"]);
    }
    Ok(report.clone())
}
