//! What turns gave, in a file that grows with each of them, so that a bench that was ended goes on where it was.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::plan::{Field, Link, Turn};
use crate::contest::{Outcome, Range, Responses, cores::Busy};

/// One migration, as `--json` has it. What wasn't measured or forecast is null.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) contender: String,
    pub(super) workload: String,
    pub(super) guest_command: Option<String>,
    /// Null: unlimited.
    pub(super) link_mbit: Option<u64>,
    pub(super) rtt_ms: u64,
    #[serde(default)]
    pub(super) loss_per_mille: u16,
    /// How many were moved at once.
    #[serde(default = "one")]
    pub(super) guests: u8,
    /// Memory of each.
    pub(super) guest_mb: u64,
    pub(super) round: u32,
    /// The guest runs at the target, with all its memory, within the time allowed.
    pub(super) converged: bool,
    /// Both directions, Ethernet headers included.
    pub(super) wire_bytes: u64,
    /// From the request until the guest runs at the target with all its memory, or until the time was over.
    pub(super) total_ms: f64,
    /// STOP at the source to RESUME at the target; the median of several guests.
    pub(super) downtime_ms: Option<f64>,
    /// The worst of several guests.
    #[serde(default)]
    pub(super) worst_downtime_ms: Option<f64>,
    /// The guest's pace during all of that as a share of that before.
    pub(super) guest_progress_ratio: Option<f64>,
    /// The longest silence in the guest's beat of 10 ms.
    pub(super) beat_gap_ms: f64,
    /// What the guest's memory took at least when it had been moved: godwit's runs only.
    #[serde(default)]
    pub(super) floor_bytes: Option<u64>,
    /// What the guest's web server's clients saw.
    #[serde(default)]
    pub(super) responses: Option<Responses>,
    pub(super) predicted_total_ms: Option<u64>,
    pub(super) predicted_wire_bytes: Option<u64>,
    /// The same with what nine of ten outcomes are to be between.
    #[serde(default)]
    pub(super) predicted_total_range_ms: Option<Range>,
    #[serde(default)]
    pub(super) predicted_wire_range_bytes: Option<Range>,
    /// What godwit counted of the same when it was over: from the worker's start, and payload only.
    #[serde(default)]
    pub(super) reported_total_ms: Option<u64>,
    #[serde(default)]
    pub(super) reported_wire_bytes: Option<u64>,
    /// What the emulated link used of a core.
    pub(super) emulator_cpu_share: Option<f64>,
    /// What it and the contender used of the cores that aren't the guest's.
    pub(super) busy_share: Option<f64>,
    /// What had nothing to do with the bench used of the whole machine.
    pub(super) foreign_cpu_share: Option<f64>,
    /// What was checked out when it ran.
    pub(super) commit: String,
}

impl Run {
    /// What came of a turn.
    pub(super) fn of(turn: &Turn, outcome: &Outcome, busy: Option<Busy>, commit: &str) -> Run {
        Run {
            contender: turn.contender.name.to_owned(),
            workload: turn.workload.clone(),
            guest_command: turn.guest_command.clone(),
            link_mbit: turn.field.link.rate.megabits_per_second(),
            rtt_ms: turn.field.link.round_trip_ms,
            loss_per_mille: turn.field.link.loss_per_mille,
            guests: turn.field.guests,
            guest_mb: turn.field.guest_mb,
            round: turn.round,
            converged: outcome.converged,
            wire_bytes: outcome.wire_bytes,
            total_ms: outcome.total_ms,
            downtime_ms: outcome.downtime_ms,
            worst_downtime_ms: outcome.worst_downtime_ms,
            guest_progress_ratio: outcome.guest_progress_ratio,
            beat_gap_ms: outcome.largest_beat_gap.as_secs_f64() * 1e3,
            floor_bytes: outcome.floor_bytes,
            responses: outcome.responses,
            predicted_total_ms: outcome.predicted.total_ms.map(|range| range.likely),
            predicted_wire_bytes: outcome.predicted.wire_bytes.map(|range| range.likely),
            predicted_total_range_ms: outcome.predicted.total_ms,
            predicted_wire_range_bytes: outcome.predicted.wire_bytes,
            reported_total_ms: outcome.reported.total_ms,
            reported_wire_bytes: outcome.reported.wire_bytes,
            emulator_cpu_share: busy.map(|busy| busy.emulator),
            busy_share: busy.map(|busy| busy.all),
            foreign_cpu_share: busy.map(|busy| busy.foreign),
            commit: commit.to_owned(),
        }
    }

    pub(super) fn field(&self) -> Field {
        let rate = self.link_mbit.into();
        let link = Link { rate, round_trip_ms: self.rtt_ms, loss_per_mille: self.loss_per_mille };
        Field { link, guests: self.guests, guest_mb: self.guest_mb }
    }

    fn is_of(&self, turn: &Turn) -> bool {
        self.is_beside(turn) && self.contender == turn.contender.name && self.round == turn.round
    }

    /// Whether it did the same as a turn, by whichever contender and in whichever round.
    fn is_beside(&self, turn: &Turn) -> bool {
        self.workload == turn.workload
            && self.guest_command == turn.guest_command
            && self.field() == turn.field
    }
}

fn one() -> u8 {
    1
}

impl fmt::Display for Run {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let downtime = self.downtime_ms.map_or("no end".to_owned(), |downtime| format!("{downtime:.1} ms"));
        let progress = self.guest_progress_ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.3}"));
        let (megabytes, seconds) = (self.wire_bytes as f64 / 1e6, self.total_ms / 1e3);
        write!(formatter, "{megabytes:.1} MB, {seconds:.1} s, {downtime}, progress {progress}")
    }
}

/// All turns that were taken.
#[derive(Debug)]
pub(super) struct Ledger {
    path: Option<PathBuf>,
    runs: Vec<Run>,
}

impl Ledger {
    /// Reads the ledger that there is, or begins one.
    ///
    /// # Errors
    /// When there is a file that isn't a ledger.
    pub(super) fn open(path: Option<&Path>) -> Result<Ledger> {
        let runs = match path.filter(|path| path.exists()) {
            None => Vec::new(),
            Some(path) => {
                let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                serde_json::from_slice(&text).with_context(|| format!("{} isn't a ledger", path.display()))?
            }
        };
        Ok(Ledger { path: path.map(Path::to_owned), runs })
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Whether a turn was taken.
    pub(super) fn has(&self, turn: &Turn) -> bool {
        self.runs.iter().any(|run| run.is_of(turn))
    }

    /// Why a turn says nothing new: its contender didn't get the guest to the target before, which no later round mends, or
    /// stands in for one that does. `None`: it is worth taking.
    pub(super) fn needless(&self, turn: &Turn) -> Option<String> {
        let runs_of = |name| self.runs.iter().filter(move |run| run.contender == name && run.is_beside(turn));
        if let Some(lost) = runs_of(turn.contender.name).find(|run| !run.converged) {
            return Some(format!("not taken: given up in round {}", lost.round));
        }
        let first = turn.contender.stands_in_for()?;
        runs_of(first).any(|run| run.converged).then(|| format!("not taken: {first} converges"))
    }

    /// Enters a run; the file is replaced as a whole, so that it is never half a ledger.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn enter(&mut self, run: Run) -> Result<()> {
        self.runs.push(run);
        let Some(path) = &self.path else { return Ok(()) };
        let unfinished = path.with_extension("unfinished");
        std::fs::write(&unfinished, serde_json::to_string_pretty(&self.runs)? + "\n")
            .and_then(|()| std::fs::rename(&unfinished, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::contest::{Contender, GUEST_MEMORY_MB};

    /// A run over 100 Mbit/s and 20 ms.
    pub(crate) fn run(contender: &str, workload: &str, round: u32, megabytes: u64) -> Run {
        Run {
            contender: contender.into(),
            workload: workload.into(),
            guest_command: None,
            link_mbit: Some(100),
            rtt_ms: 20,
            loss_per_mille: 0,
            guests: 1,
            guest_mb: GUEST_MEMORY_MB,
            round,
            converged: true,
            wire_bytes: megabytes * 1_000_000,
            total_ms: megabytes as f64 * 80.0,
            downtime_ms: Some(megabytes as f64),
            worst_downtime_ms: None,
            guest_progress_ratio: Some(0.99),
            beat_gap_ms: 12.0,
            floor_bytes: Some(90_000_000),
            responses: None,
            predicted_total_ms: None,
            predicted_wire_bytes: None,
            predicted_total_range_ms: None,
            predicted_wire_range_bytes: None,
            reported_total_ms: None,
            reported_wire_bytes: None,
            emulator_cpu_share: Some(0.2),
            busy_share: Some(0.5),
            foreign_cpu_share: Some(0.01),
            commit: "abc".into(),
        }
    }

    #[test]
    fn a_ledger_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bench.json");
        let field = run("qemu-xbzrle", "medium", 1, 300).field();
        let contender = Contender::named("qemu-xbzrle").unwrap();
        let workload = || "medium".to_owned();
        let turn = |round| Turn { field, workload: workload(), guest_command: None, contender, round };
        let mut ledger = Ledger::open(Some(&path)).unwrap();
        ledger.enter(run("qemu-xbzrle", "medium", 1, 300)).unwrap();
        let mut ledger = Ledger::open(Some(&path)).unwrap();
        assert!(ledger.has(&turn(1)) && !ledger.has(&turn(2)));
        let lossy = Link { loss_per_mille: 1, ..field.link };
        let others =
            [Field { link: lossy, ..field }, Field { guests: 2, ..field }, Field { guest_mb: 256, ..field }];
        assert!(others.iter().all(|other| !ledger.has(&Turn { field: *other, ..turn(1) })));
        ledger.enter(run("qemu-xbzrle", "medium", 2, 310)).unwrap();
        assert_eq!(Ledger::open(Some(&path)).unwrap().runs(), ledger.runs());
        std::fs::write(&path, "{}").unwrap();
        assert!(Ledger::open(Some(&path)).is_err());
    }

    #[test]
    fn who_was_given_up_and_who_is_not_needed_has_no_further_turn() {
        let mut ledger = Ledger::open(None).unwrap();
        let turn = |name, workload: &str, round| Turn {
            field: run(name, workload, round, 0).field(),
            workload: workload.to_owned(),
            guest_command: None,
            contender: Contender::named(name).unwrap(),
            round,
        };
        ledger.enter(run("qemu-precopy", "idle", 1, 100)).unwrap();
        ledger.enter(Run { converged: false, ..run("qemu-precopy", "heavy", 1, 700) }).unwrap();
        let needless = |name, workload, round| ledger.needless(&turn(name, workload, round));
        let told = Some("not taken: given up in round 1".to_owned());
        assert_eq!(needless("qemu-precopy", "heavy", 2), told);
        assert_eq!(needless("qemu-precopy", "idle", 2), None);
        assert_eq!(needless("qemu-auto-converge", "heavy", 1), None);
        let told = Some("not taken: qemu-precopy converges".to_owned());
        assert_eq!(needless("qemu-auto-converge", "idle", 1), told);
    }

    #[test]
    fn runs_of_before_there_were_later_figures_are_read() {
        let mut written = serde_json::to_value(run("godwit", "medium", 1, 160)).unwrap();
        let newer = [
            "floor_bytes",
            "responses",
            "reported_total_ms",
            "reported_wire_bytes",
            "predicted_total_range_ms",
            "predicted_wire_range_bytes",
            "guests",
            "loss_per_mille",
            "worst_downtime_ms",
        ];
        for newer in newer {
            assert!(written.as_object_mut().unwrap().remove(newer).is_some());
        }
        let read: Run = serde_json::from_value(written).unwrap();
        assert_eq!((read.wire_bytes, read.floor_bytes, read.responses), (160_000_000, None, None));
        assert_eq!(read.guests, 1);
    }

    #[test]
    fn a_run_has_all_that_was_promised() {
        let written = serde_json::to_value(run("godwit", "medium", 1, 160)).unwrap();
        let promised = [
            "contender",
            "workload",
            "link_mbit",
            "rtt_ms",
            "guest_mb",
            "wire_bytes",
            "total_ms",
            "downtime_ms",
            "converged",
            "guest_progress_ratio",
            "predicted_total_ms",
            "predicted_wire_bytes",
            "round",
        ];
        for name in promised {
            assert!(written.get(name).is_some(), "{name}");
        }
        assert!(written["predicted_total_ms"].is_null());
    }
}
