//! What migrations were thought to take, and what they took: `<state_dir>/history.ndjson`, one entry a line.
//!
//! The newest correct the next forecast and say how wide its intervals have to be; all of them are there to be looked at
//! (`godwit history`).

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use godwit_migration::forecast::{Correction, Course, Score};

use super::probe::Measured;
use crate::{
    api::{HistoryEntry, HistoryScore},
    job::{Forecast, Range},
    token::Durability,
    whole_file,
};

/// Entries that are kept.
const ENTRIES_MAX: usize = 1000;
/// The file is put in order when it has so many more.
const SURPLUS_MAX: usize = 100;
/// The file is never longer, or somebody else wrote it.
const BYTES_MAX: u64 = 8 << 20;
/// Newest entries from which the next forecast is corrected.
const RECENT: usize = 20;
/// So many moves of the same machine say more than any number of other machines' moves.
const ENOUGH_OF_ONE: usize = 3;
/// How far off outcomes are believed to be while few are known, as logarithms.
const SPREAD_TOTAL: f64 = 0.19;
const SPREAD_BYTES: f64 = 0.15;
const SPREAD_DOWNTIME: f64 = 0.7;

/// The history of this host's outgoing migrations.
#[derive(Debug)]
pub(super) struct History {
    file: PathBuf,
    writing: Mutex<()>,
}

/// One correction for each figure.
pub(super) struct Corrections {
    total_ms: Correction,
    wire_bytes: Correction,
    downtime_ms: Correction,
}

impl History {
    /// The history in this file, which need not be there yet.
    pub(super) fn new(file: PathBuf) -> Self {
        Self { file, writing: Mutex::new(()) }
    }

    /// All entries, the oldest first; lines that make no sense are left out.
    pub(super) fn entries(&self) -> Vec<HistoryEntry> {
        self.text().lines().filter_map(parse).collect()
    }

    fn text(&self) -> String {
        let is_sane = fs::metadata(&self.file).is_ok_and(|file| file.len() <= BYTES_MAX);
        let bytes = if is_sane { fs::read(&self.file).unwrap_or_default() } else { Vec::new() };
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Adds an entry, and forgets the oldest if there are too many.
    ///
    /// # Errors
    /// What the file system says; the history is as it was then, or lacks its newest entry.
    pub(super) fn add(&self, entry: &HistoryEntry) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let text = self.text();
        let mut lines: Vec<&str> = text.lines().filter(|line| parse(line).is_some()).collect();
        let newest = serde_json::to_string(entry)?;
        if lines.len() < ENTRIES_MAX + SURPLUS_MAX {
            // A line that a crash cut off must not spoil the next one.
            let break_first = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
            let mut options = OpenOptions::new();
            let mut file = options.create(true).append(true).mode(0o600).open(&self.file)?;
            return file.write_all(format!("{break_first}{newest}\n").as_bytes());
        }
        lines.push(&newest);
        let kept = &lines[lines.len() - ENTRIES_MAX..];
        whole_file::replace(&self.file, (kept.join("\n") + "\n").as_bytes(), Durability::Written)
    }

    /// What the newest outcomes teach for a move of `machine` to `peer`.
    pub(super) fn corrections(&self, machine: &str, peer: &str) -> Corrections {
        let entries = self.entries();
        let to_peer: Vec<&HistoryEntry> =
            entries.iter().filter(|entry| entry.peer == peer && entry.forecast.is_some()).collect();
        let of_machine: Vec<&HistoryEntry> =
            to_peer.iter().filter(|entry| entry.machine == machine).copied().collect();
        let telling = if of_machine.len() >= ENOUGH_OF_ONE { of_machine } else { to_peer };
        Corrections::of(&telling[telling.len().saturating_sub(RECENT)..])
    }

    /// What the newest migration to a peer measured of the way there, unless it ended before `since_unix_s`.
    pub(super) fn link(&self, peer: &str, since_unix_s: u64) -> Option<Measured> {
        let measured = |entry: &HistoryEntry| {
            Some(Measured {
                rate_bytes_per_second: entry.rate_bytes_per_second?,
                round_trip_ms: entry.round_trip_ms?,
            })
        };
        let entries = self.entries();
        let to_peer = entries.iter().rev().filter(|entry| entry.peer == peer);
        to_peer.take_while(|entry| entry.ended_unix_s >= since_unix_s).find_map(measured)
    }
}

impl Corrections {
    fn of(entries: &[&HistoryEntry]) -> Self {
        let learn = |foreseen: fn(&Course) -> f64, came: fn(&HistoryEntry) -> Option<f64>, spread| {
            let pair =
                |entry: &&HistoryEntry| Some((foreseen(&entry.forecast.as_ref()?.uncorrected), came(entry)?));
            Correction::learn(entries.iter().filter_map(pair), spread)
        };
        Self {
            total_ms: learn(|course| course.total_ms, |entry| Some(entry.total_ms as f64), SPREAD_TOTAL),
            wire_bytes: learn(
                |course| course.wire_bytes,
                |entry| Some(entry.wire_bytes as f64),
                SPREAD_BYTES,
            ),
            downtime_ms: learn(|course| course.downtime_ms, |entry| entry.downtime_ms, SPREAD_DOWNTIME),
        }
    }

    /// A forecast of this course over a link of this rate and round trip.
    pub(super) fn apply(
        &self,
        course: Course,
        target_ms: u64,
        (rate, round_trip_ms): (u64, f64),
    ) -> Forecast {
        let downtime_ms = Range::from(self.downtime_ms.apply(course.downtime_ms));
        Forecast {
            total_ms: self.total_ms.apply(course.total_ms).into(),
            wire_bytes: self.wire_bytes.apply(course.wire_bytes).into(),
            downtime_ms,
            meets_target: downtime_ms.likely <= target_ms,
            rate_bytes_per_second: rate,
            round_trip_ms,
            uncorrected: course,
        }
    }
}

/// How good the forecasts of these entries were.
pub(super) fn score(entries: &[HistoryEntry]) -> HistoryScore {
    let of = |foreseen: fn(&Forecast) -> Range, came: fn(&HistoryEntry) -> Option<f64>| {
        let pair = |entry: &HistoryEntry| Some((foreseen(entry.forecast.as_ref()?).into(), came(entry)?));
        Score::of(&entries.iter().filter_map(pair).collect::<Vec<_>>())
    };
    HistoryScore {
        total: of(|forecast| forecast.total_ms, |entry| Some(entry.total_ms as f64)),
        bytes: of(|forecast| forecast.wire_bytes, |entry| Some(entry.wire_bytes as f64)),
        downtime: of(|forecast| forecast.downtime_ms, |entry| entry.downtime_ms),
    }
}

fn parse(line: &str) -> Option<HistoryEntry> {
    serde_json::from_str(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COURSE: Course =
        Course { total_ms: 10_000.0, wire_bytes: 1e8, downtime_ms: 20.0, share_to_meet: Some(1.0) };

    fn line(entry: &HistoryEntry) -> String {
        serde_json::to_string(entry).unwrap()
    }

    fn entry(number: u64, machine: &str, factor: u64) -> HistoryEntry {
        let forecast = Corrections::of(&[]).apply(COURSE, 50, (12_000_000, 20.0));
        HistoryEntry {
            id: format!("{number:016x}"),
            machine: machine.into(),
            peer: "hostb".into(),
            ended_unix_s: number,
            forecast: Some(forecast),
            total_ms: 10_000 * factor,
            wire_bytes: 100_000_000 * factor,
            downtime_ms: Some(20.0),
            rate_bytes_per_second: Some(number),
            round_trip_ms: Some(20.0),
        }
    }

    #[test]
    fn the_newest_thousand_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::new(directory.path().join("history.ndjson"));
        let lines: Vec<String> = (0..1_100).map(|number| line(&entry(number, "web1", 1))).collect();
        fs::write(directory.path().join("history.ndjson"), lines.join("\n") + "\n").unwrap();
        history.add(&entry(1_100, "web1", 1)).unwrap();
        let entries = history.entries();
        assert_eq!((entries.len(), entries[0].ended_unix_s, entries[999].ended_unix_s), (1_000, 101, 1_100));
        assert_eq!(history.link("hostb", 0).unwrap().rate_bytes_per_second, 1_100);
        assert_eq!(history.link("hostb", 1_101), None);
        assert_eq!(history.link("hostc", 0), None);
    }

    #[test]
    fn a_line_that_was_cut_off_costs_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::new(directory.path().join("history.ndjson"));
        history.add(&entry(1, "web1", 1)).unwrap();
        let half = &line(&entry(2, "web1", 1))[..40];
        let mut file = OpenOptions::new().append(true).open(directory.path().join("history.ndjson")).unwrap();
        file.write_all(half.as_bytes()).unwrap();
        history.add(&entry(3, "web1", 1)).unwrap();
        assert_eq!(history.entries().iter().map(|entry| entry.ended_unix_s).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn a_machine_s_own_moves_count_first() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::new(directory.path().join("history.ndjson"));
        let likely =
            |machine| history.corrections(machine, "hostb").apply(COURSE, 50, (1, 1.0)).total_ms.likely;
        assert_eq!(likely("web1"), 10_000);
        (0..3).for_each(|number| history.add(&entry(number, "db1", 4)).unwrap());
        assert!(likely("web1") > 20_000);
        (3..6).for_each(|number| history.add(&entry(number, "web1", 1)).unwrap());
        assert_eq!(likely("web1"), 10_000);
        assert_eq!(score(&history.entries()).total.count, 6);
    }
}
