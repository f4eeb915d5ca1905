//! What rounds found, in a file that grows with each of them, so that a run that was ended goes on where it was.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::fault::Fault;

/// How a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// The machine is at the target.
    Completed,
    /// It is at the source.
    RolledBack,
    /// The QEMU that had it was killed by the fault.
    DiedWithOwner,
    /// It is nowhere, or nobody says where.
    Lost,
}

/// One round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Round {
    pub(super) round: u64,
    pub(super) fault: Fault,
    /// From and to.
    pub(super) direction: String,
    /// What struck, and when.
    pub(super) strikes: Vec<String>,
    /// Whether the fault found its victim while the migration was under way.
    pub(super) in_flight: bool,
    pub(super) outcome: Outcome,
    pub(super) doubled: bool,
    pub(super) corrupted: bool,
    pub(super) leftovers: bool,
    pub(super) recover_failed: bool,
    /// `godwit recover` was needed, once.
    pub(super) recovered: bool,
    pub(super) settled_ms: u64,
    pub(super) seconds: f64,
    /// What was wrong, a line each.
    pub(super) findings: Vec<String>,
}

impl Round {
    /// Whether anything is wrong.
    pub(super) fn has_failed(&self) -> bool {
        self.outcome == Outcome::Lost
            || self.doubled
            || self.corrupted
            || self.leftovers
            || self.recover_failed
            || !self.findings.is_empty()
    }
}

/// Counts over some rounds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) rounds: u64,
    /// Rounds in which the fault struck while the migration was under way.
    pub(super) in_flight: u64,
    pub(super) completed: u64,
    pub(super) rolled_back: u64,
    pub(super) died_with_owner: u64,
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) corrupted: u64,
    pub(super) leftovers: u64,
    pub(super) recover_failed: u64,
    /// Time to a settled state.
    pub(super) p50_ms: u64,
    pub(super) p99_ms: u64,
}

/// All rounds of a seed.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ledger {
    pub(super) seed: u64,
    #[serde(flatten)]
    pub(super) counts: Counts,
    pub(super) faults: BTreeMap<Fault, Counts>,
    pub(super) details: Vec<Round>,
}

impl Counts {
    fn of<'a>(rounds: impl Iterator<Item = &'a Round> + Clone) -> Counts {
        let count = |wanted: fn(&Round) -> bool| rounds.clone().filter(|round| wanted(round)).count() as u64;
        let mut times: Vec<u64> = rounds.clone().map(|round| round.settled_ms).collect();
        times.sort_unstable();
        Counts {
            rounds: count(|_| true),
            in_flight: count(|round| round.in_flight),
            completed: count(|round| round.outcome == Outcome::Completed),
            rolled_back: count(|round| round.outcome == Outcome::RolledBack),
            died_with_owner: count(|round| round.outcome == Outcome::DiedWithOwner),
            lost: count(|round| round.outcome == Outcome::Lost),
            doubled: count(|round| round.doubled),
            corrupted: count(|round| round.corrupted),
            leftovers: count(|round| round.leftovers),
            recover_failed: count(|round| round.recover_failed),
            p50_ms: percentile(&times, 50),
            p99_ms: percentile(&times, 99),
        }
    }
}

impl Ledger {
    /// Reads the ledger that there is, or begins one.
    pub(super) fn open(path: Option<&Path>, seed: u64) -> Result<Ledger> {
        let existing = path.filter(|path| path.exists());
        let Some(path) = existing else {
            let (counts, faults) = (Counts::default(), BTreeMap::new());
            return Ok(Ledger { seed, counts, faults, details: Vec::new() });
        };
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut ledger: Ledger =
            serde_json::from_slice(&text).with_context(|| format!("{} isn't a ledger", path.display()))?;
        if ledger.seed != seed {
            bail!("{} is of seed {}, not {seed}", path.display(), ledger.seed);
        }
        // Several ranges of rounds may have been joined.
        ledger.count();
        Ok(ledger)
    }

    /// Whether a round is done.
    pub(super) fn has(&self, round: u64) -> bool {
        self.details.iter().any(|done| done.round == round)
    }

    /// Enters a round.
    pub(super) fn enter(&mut self, round: Round) {
        self.details.push(round);
        self.count();
    }

    fn count(&mut self) {
        self.counts = Counts::of(self.details.iter());
        let of = |fault: &Fault| Counts::of(self.details.iter().filter(|round| round.fault == *fault));
        let present =
            Fault::ALL.iter().filter(|fault| self.details.iter().any(|round| round.fault == **fault));
        self.faults = present.map(|fault| (*fault, of(fault))).collect();
    }

    /// Writes the ledger; a crash leaves the old one or the new one.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let unfinished = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            std::fs::write(&unfinished, serde_json::to_vec_pretty(self)?)?;
            std::fs::rename(&unfinished, path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// The result for people.
    pub(super) fn markdown(&self, machine: &str, commit: &str) -> String {
        let took: f64 = self.details.iter().map(|round| round.seconds).sum();
        let mut text = format!(
            "# Chaos on real guests\n\nWritten by `cargo xtask chaos --rounds {} --seed {} --markdown`.\n\n\
             {machine}; commit {commit}; {} rounds, {:.0} s each on average. What a round does and checks is said \
             in `xtask/src/chaos/mod.rs`. *In flight*: the fault found its victim while the migration was under way; \
             otherwise it came too early or too late. Times are from the end of the last fault to a settled state: both agents agree, nothing is under \
             way, and one copy runs.\n\n\
             | fault | rounds | in flight | completed | rolled back | died with owner | lost | doubled | corrupted | leftovers | \
             recover failed | p50 ms | p99 ms |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
            self.counts.rounds,
            self.seed,
            self.counts.rounds,
            took / self.counts.rounds.max(1) as f64
        );
        for (fault, counts) in &self.faults {
            text.push_str(&row(&fault.to_string(), counts));
        }
        text + &row("**all**", &self.counts)
    }
}

fn row(name: &str, counts: &Counts) -> String {
    let figures = [
        counts.rounds,
        counts.in_flight,
        counts.completed,
        counts.rolled_back,
        counts.died_with_owner,
        counts.lost,
        counts.doubled,
        counts.corrupted,
        counts.leftovers,
        counts.recover_failed,
        counts.p50_ms,
        counts.p99_ms,
    ];
    let mut row = format!("| {name} |");
    for figure in figures {
        // Writing to a string doesn't fail.
        let _ = write!(row, " {figure} |");
    }
    row + "\n"
}

/// The value below which this share of the sorted values lies, by the nearest rank.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// Milliseconds, as far as 64 bits go.
pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(round: u64, outcome: Outcome) -> Round {
        Round {
            round,
            fault: Fault::Cancel,
            direction: "a to b".into(),
            strikes: vec![],
            in_flight: true,
            outcome,
            doubled: false,
            corrupted: false,
            leftovers: false,
            recover_failed: false,
            recovered: false,
            settled_ms: round * 100,
            seconds: 1.0,
            findings: vec![],
        }
    }

    #[test]
    fn a_ledger_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("chaos.json");
        let mut ledger = Ledger::open(Some(&path), 1).unwrap();
        ledger.enter(round(0, Outcome::Completed));
        ledger.save(&path).unwrap();
        let mut ledger = Ledger::open(Some(&path), 1).unwrap();
        assert!(ledger.has(0) && !ledger.has(1));
        ledger.enter(round(1, Outcome::Lost));
        assert_eq!((ledger.counts.rounds, ledger.counts.lost, ledger.counts.p99_ms), (2, 1, 100));
        assert_eq!(ledger.faults[&Fault::Cancel].completed, 1);
        assert!(Ledger::open(Some(&path), 2).is_err());
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u64> = (1..=200).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (100, 198));
        assert_eq!((percentile(&[7], 99), percentile(&[], 50)), (7, 0));
    }
}
