//! What must hold after a round, whatever happened in it.
//!
//! | finding | because |
//! |---|---|
//! | `lost` | nobody runs the machine, though its owner wasn't killed and its guest didn't power off |
//! | `doubled` | both QEMUs ran at once; or a beat came from both hosts, or from the source after one from the target |
//! | `corrupted` | the guest's memory isn't what it wrote, its counter or its beat went back, its connection broke |
//! | `leftovers` | processes, files, sockets, TAPs, control groups, or changed settings of QEMU |

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{beats::Beat, lab::Place};
use nix::unistd::Pid;
use serde_json::json;

use super::{
    fault::Fault,
    hosts::{Host, names_in},
    ledger::Outcome,
    plan::Plan,
    settle::{Agreement, Settled},
    stage::Stage,
    strike::Struck,
    watch::overlap,
};

/// How long what is left behind may take to go.
const TIDY_LIMIT: Duration = Duration::from_secs(8);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What may lie in the directory of a machine that runs, of one that doesn't, and of a migration that is over.
const RUNNING_FILES: [&str; 9] = [
    "spec.json",
    "process.json",
    "token.json",
    "token-written.json",
    "qemu.pid",
    "qemu.log",
    "qmp.sock",
    "qmp-migration.sock",
    "console.sock",
];
const OFF_FILES: [&str; 4] = ["spec.json", "token.json", "token-written.json", "qemu.log"];
const MIGRATION_FILES: [&str; 5] = ["job.json", "events.ndjson", "report.json", "worker.json", "worker.log"];

/// What was found.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    pub(super) doubled: bool,
    pub(super) corrupted: bool,
    pub(super) leftovers: bool,
    /// A line for each thing that is wrong.
    pub(super) findings: Vec<String>,
}

/// Judges a round by what everybody says now. A guest that is gone is forgotten.
pub(super) fn judge(stage: &mut Stage, plan: &Plan, struck: &[Struck], settled: &Settled) -> Verdict {
    let mut findings = Vec::new();
    if !settled.obstacle.is_empty() {
        findings.push(format!("not settled: {}", settled.obstacle));
    }
    let outcome = outcome(stage, plan, struck, settled.agreement.as_ref());
    if outcome == Outcome::Lost {
        findings.push(format!("the machine is lost; agreed on is {:?}", settled.agreement));
    }
    let lives = settled.agreement.as_ref().filter(|agreement| agreement.state != "off");
    let corrupted = lives.map(|agreement| is_whole(stage, struck, agreement));
    let corrupted = note(&mut findings, corrupted.and_then(Result::err).map(|error| format!("{error:#}")));
    let doubled = doubled(stage, plan, &mut findings);
    let leftovers = match &settled.agreement {
        Some(agreement) => note(&mut findings, leftovers(stage, agreement)),
        None => false,
    };
    let holder = lives.map(|agreement| agreement.holder);
    let unlike = holder.filter(|_| !leftovers).and_then(|holder| stage.changed_settings(holder).transpose());
    let unlike = note(&mut findings, unlike.map(|changed| changed.unwrap_or_else(|error| error.to_string())));
    if lives.is_none() {
        stage.guest = None;
    }
    Verdict { outcome, doubled, corrupted, leftovers: leftovers || unlike, findings }
}

fn note<T: ToString>(findings: &mut Vec<String>, finding: Option<T>) -> bool {
    let found = finding.map(|finding| finding.to_string());
    let is_found = found.is_some();
    findings.extend(found);
    is_found
}

/// Where the machine is, and if nowhere, whether that is right.
fn outcome(stage: &Stage, plan: &Plan, struck: &[Struck], agreement: Option<&Agreement>) -> Outcome {
    let Some(Agreement { holder, state }) = agreement else {
        let runs = [plan.from, plan.to()].into_iter().find(|place| stage.watcher(*place).is_running());
        return match runs {
            Some(place) if place == plan.from => Outcome::RolledBack,
            Some(_) => Outcome::Completed,
            None => Outcome::Lost,
        };
    };
    let powered_off = struck.iter().any(|struck| struck.fault == Fault::PowerOff && struck.hit);
    match (*holder == plan.from, state == "off") {
        (_, true) if owner_was_killed(stage, plan, struck) => Outcome::DiedWithOwner,
        (_, true) if !powered_off => Outcome::Lost,
        (true, _) => Outcome::RolledBack,
        (false, _) => Outcome::Completed,
    }
}

/// Whether a fault killed the QEMU that had the machine: the source's, unless the target had it by then; the target's
/// only once the guest had run there, or might have.
fn owner_was_killed(stage: &Stage, plan: &Plan, struck: &[Struck]) -> bool {
    struck.iter().filter(|struck| struck.hit).any(|struck| {
        let target_had_it =
            struck.records[1].as_deref().is_some_and(|record| ["mine", "owner"].contains(&record));
        match struck.fault {
            Fault::KillSourceQemu => !target_had_it,
            Fault::KillTargetQemu => target_had_it || !stage.watcher(plan.to()).seen().intervals.is_empty(),
            _ => false,
        }
    })
}

/// The guest works, and its memory is what it wrote. One that its operator paused is paused, and is continued first.
fn is_whole(stage: &mut Stage, struck: &[Struck], agreement: &Agreement) -> Result<()> {
    let was_paused = struck.iter().any(|struck| struck.fault == Fault::OperatorStop && struck.hit);
    if was_paused && agreement.state == "running" {
        bail!("its operator paused the guest, and it runs");
    }
    if agreement.state != "running" {
        stage.operate(agreement.holder)?.execute("cont", json!({}))?;
    }
    if struck.iter().any(|struck| struck.fault.reboots()) {
        stage.reconnect()?;
    }
    stage.check_guest().context("the guest isn't whole")
}

/// Whether the guest ran twice.
fn doubled(stage: &Stage, plan: &Plan, findings: &mut Vec<String>) -> bool {
    let [source, target] = [plan.from, plan.to()].map(|place| stage.watcher(place).seen());
    let before = findings.len();
    findings.extend(source.violations.iter().chain(&target.violations).cloned());
    let both = overlap(&source.intervals, &target.intervals);
    if !both.is_zero() {
        findings.push(format!("both QEMUs ran for {both:?}"));
    }
    findings.extend(judge_beats(&stage.beats.take(), plan.to()));
    findings.len() > before
}

/// What is wrong with the beats of a round, if anything is.
fn judge_beats(beats: &[Beat], target: Place) -> Option<String> {
    let mut last: BTreeMap<u64, Beat> = BTreeMap::new();
    for beat in beats {
        let Some(before) = last.insert(beat.boot, *beat) else { continue };
        let what = if beat.number == before.number && beat.from != before.from {
            "came from both hosts"
        } else if beat.number <= before.number {
            "came after a later one"
        } else if before.from == target && beat.from != target {
            "came from the source after one from the target"
        } else {
            continue;
        };
        return Some(format!("beat {} {what} ({} before)", beat.number, before.number));
    }
    None
}

/// What is left behind that doesn't go within a while.
fn leftovers(stage: &Stage, agreement: &Agreement) -> Option<String> {
    let started = Instant::now();
    loop {
        let left: Vec<String> =
            stage.hosts().iter().flat_map(|host| left_at(stage, host, agreement)).collect();
        if left.is_empty() {
            return None;
        }
        if started.elapsed() > TIDY_LIMIT {
            return Some(format!("left behind: {}", left.join(", ")));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn left_at(stage: &Stage, host: &Host, agreement: &Agreement) -> Vec<String> {
    let runs = agreement.holder == host.place && agreement.state != "off";
    let expected = [host.agent_process(), host.qemu().filter(|_| runs)];
    let processes = stage.lab.processes(host.place).into_iter().filter(|pid| !expected.contains(&Some(*pid)));
    let mut left: Vec<String> = processes.filter_map(describe).collect();
    let allowed: &[&str] = if runs { &RUNNING_FILES } else { &OFF_FILES };
    left.extend(strangers(&host.machine_directory(), allowed));
    for id in host.migration_ids() {
        left.extend(strangers(&host.migrations().join(&id), &MIGRATION_FILES));
        left.extend(control_groups(&id));
    }
    let taps = stage.lab.guest_taps(host.place).unwrap_or_default();
    if taps.len() != usize::from(runs) {
        left.push(format!("TAPs {taps:?}"));
    }
    left.iter().map(|what| format!("{what} at {}", host.name())).collect()
}

/// A process in words; `None`: it has ended.
fn describe(process: Pid) -> Option<String> {
    let line = std::fs::read(format!("/proc/{process}/cmdline")).ok().filter(|line| !line.is_empty())?;
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).take(3).collect();
    Some(format!("process {process} ({})", String::from_utf8_lossy(&words.join(&b' '))))
}

/// Files that have no business in a directory.
fn strangers(directory: &Path, allowed: &[&str]) -> Vec<String> {
    let strangers = names_in(directory).into_iter().filter(|name| !allowed.contains(&name.as_str()));
    strangers.map(|name| directory.join(name).display().to_string()).collect()
}

/// Control groups of a migration's workers.
fn control_groups(id: &str) -> Vec<String> {
    let mut left = Vec::new();
    let mut directories = vec![(std::path::PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((directory, depth)) = directories.pop() {
        let own = directory.join(format!("godwit-{id}"));
        if own.exists() {
            left.push(own.display().to_string());
        }
        if depth < 2 {
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            let inner = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            directories.extend(inner.map(|entry| (entry.path(), depth + 1)));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn beat(number: u64, from: Place) -> Beat {
        Beat { number, boot: 1, from, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn a_move_is_no_doubling() {
        let beats = [beat(1, Place::A), beat(2, Place::A), beat(3, Place::B), beat(5, Place::B)];
        assert_eq!(judge_beats(&beats, Place::B), None);
    }

    #[test]
    fn doubled_beats_are_found() {
        let twice = [beat(1, Place::A), beat(2, Place::A), beat(2, Place::B)];
        assert!(judge_beats(&twice, Place::B).unwrap().contains("both hosts"));
        let back = [beat(1, Place::A), beat(2, Place::B), beat(3, Place::A)];
        assert!(judge_beats(&back, Place::B).unwrap().contains("after one from the target"));
        let earlier = [beat(4, Place::A), beat(3, Place::A)];
        assert!(judge_beats(&earlier, Place::B).unwrap().contains("after a later one"));
    }

    #[test]
    fn a_guest_that_boots_anew_begins_anew() {
        let beats = [beat(9, Place::A), Beat { boot: 2, ..beat(0, Place::A) }];
        assert_eq!(judge_beats(&beats, Place::B), None);
    }
}
