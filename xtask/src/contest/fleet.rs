//! godwit moves several guests at once.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
    time::{Instant, SystemTime},
};

use anyhow::{Result, bail};
use godwit_sim::{lab::Place, observer::BeatListener};
use serde_json::Value;

use super::{
    DOWNTIME_TARGET, Outcome, Span, Stage,
    godwit::{LIMIT, await_end, resumed},
    hosts::Hosts,
    watch::Watch,
};

/// Boots the guests at host a and has godwit move all of them to host b, as somebody would who types as many commands.
pub(super) fn run(stage: &Stage, name: &'static str, options: &[&str]) -> Result<Outcome> {
    let mut hosts = Hosts::start(stage)?;
    hosts.options.extend(options.iter().map(|option| (*option).to_owned()));
    let beat = BeatListener::start(&stage.lab.namespace(Place::Lan))?;
    let command_lines = stage.command_lines(beat.address());
    let machines: Vec<String> = (0..stage.load.guests()).map(|guest| format!("build{guest}")).collect();
    for (machine, command_line) in machines.iter().zip(&command_lines) {
        hosts.boot_machine(machine, stage.memory_mb, stage.image, command_line)?;
    }
    let mut watch = Watch::start(stage, beat)?;
    let before = watch.wire_bytes()?;
    let started = SystemTime::now();
    let commands: Vec<Child> =
        machines.iter().map(|machine| begin(stage, &hosts, machine)).collect::<Result<_>>()?;
    let reports = await_reports(stage, &hosts, &machines, commands);
    let arrivals = reports.iter().flatten().flatten().map(resumed).collect::<Option<Vec<_>>>();
    let last = arrivals.and_then(|arrivals| arrivals.into_iter().max());
    let mut outcome =
        watch.outcome(name, Span { started, ended: last.unwrap_or_else(SystemTime::now) }, before)?;
    if let Some(reports) = reports? {
        outcome.converge(reports.iter().filter_map(|report| report["downtime_ms"].as_f64()).collect());
        if stage.finds_floor {
            let machines: Vec<&str> = machines.iter().map(String::as_str).collect();
            outcome.floor_bytes = Some(hosts.b.memory_floor(&machines, stage.memory_mb)?);
        }
        println!("  {}", watch.check()?);
    }
    Ok(outcome)
}

fn begin(stage: &Stage, hosts: &Hosts, machine: &str) -> Result<Child> {
    let target = format!("{}ms", DOWNTIME_TARGET.as_millis());
    let mut command = hosts.command(&hosts.a);
    command.args(["migrate", machine, "--to", hosts.b.place.name(), "--downtime-target", &target]);
    // On a terminal their progress bars would be drawn over each other.
    let complaints = File::create(complaints(stage, machine)?)?;
    Ok(command.args(&hosts.options).stdout(Stdio::null()).stderr(complaints).spawn()?)
}

/// Where the command for a machine complains.
fn complaints(stage: &Stage, machine: &str) -> Result<PathBuf> {
    Ok(stage.lab.directory_of(Place::A)?.join(format!("migrate-{machine}.log")))
}

/// The reports of all machines; `None`: not all were moved within the time.
fn await_reports(
    stage: &Stage,
    hosts: &Hosts,
    machines: &[String],
    commands: Vec<Child>,
) -> Result<Option<Vec<Value>>> {
    let deadline = Instant::now() + stage.patience.of(LIMIT);
    let mut reports = Vec::new();
    let mut all_came = true;
    for (machine, command) in machines.iter().zip(commands) {
        let succeeded = await_end(command, deadline.saturating_duration_since(Instant::now()))?;
        if succeeded == Some(false) {
            bail!("{machine}: {}", fs::read_to_string(complaints(stage, machine)?)?.trim());
        }
        all_came &= succeeded.is_some();
        if all_came {
            reports.push(report_of(hosts, machine)?);
        }
    }
    Ok(all_came.then_some(reports))
}

fn report_of(hosts: &Hosts, machine: &str) -> Result<Value> {
    let migration = hosts.ask(&hosts.a, &["status", machine])?;
    let report = &migration["report"];
    if report["outcome"] != "completed" {
        bail!("the migration of {machine} ended as {}: {}", report["outcome"], report["detail"]);
    }
    Ok(report.clone())
}
