//! A migration as its source tells of it, event by event.

use std::{
    fs::File,
    io::Read,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use serde_json::Value;

use super::super::screen::{duration, megabytes};

/// A migration that is being followed.
pub(super) struct Migration {
    pub(super) id: String,
    events: PathBuf,
    file: Option<File>,
    /// What of the file makes no whole line yet.
    rest: String,
    /// When each phase began, milliseconds since the Unix epoch.
    phases: Vec<(String, u64)>,
    progress: Option<Value>,
    pub(super) is_over: bool,
}

impl Migration {
    /// Follows `events.ndjson` in the directory that the source keeps of the migration.
    pub(super) fn new(id: String, directory: PathBuf) -> Migration {
        let events = directory.join("events.ndjson");
        Migration {
            id,
            events,
            file: None,
            rest: String::new(),
            phases: Vec::new(),
            progress: None,
            is_over: false,
        }
    }

    /// Takes the events since the last look; returns what is worth a line on screen.
    pub(super) fn look(&mut self) -> Result<Vec<String>> {
        if self.file.is_none() {
            // Its worker has yet to begin.
            self.file = File::open(&self.events).ok();
        }
        let Some(file) = &mut self.file else { return Ok(Vec::new()) };
        file.read_to_string(&mut self.rest)?;
        let mut said = Vec::new();
        while let Some((line, rest)) = self.rest.split_once('\n') {
            let (event, rest) = (serde_json::from_str(line)?, rest.to_owned());
            self.rest = rest;
            said.extend(self.take(event));
        }
        Ok(said)
    }

    fn take(&mut self, event: Value) -> Option<String> {
        match event["event"].as_str()? {
            "phase" => {
                let phase = event["phase"].as_str()?.to_owned();
                let said = words(&phase).map(str::to_owned);
                self.phases.push((phase, event["at_unix_ms"].as_u64()?));
                said
            }
            "warning" => Some(event["message"].as_str()?.to_owned()),
            "progress" => {
                self.progress = Some(event);
                None
            }
            "finished" => {
                self.is_over = true;
                Some(end(&event))
            }
            _ => None,
        }
    }

    /// When a phase began.
    pub(super) fn began(&self, phase: &str) -> Option<u64> {
        self.phases.iter().find(|(name, _)| name == phase).map(|(_, at)| *at)
    }

    /// How far it is, in words, while the guest runs.
    pub(super) fn account(&self) -> Option<String> {
        let progress = self.progress.as_ref().filter(|_| self.began("switchover").is_none())?;
        let time = |key: &str| progress[key].as_u64().map(|ms| duration(Duration::from_millis(ms)));
        let sent = format!("{} sent", megabytes(progress["wire_bytes"].as_u64()?));
        let left = time("predicted_remaining_ms");
        let words = match (time("link_silent_ms"), left) {
            (Some(silent), Some(left)) => {
                format!("{sent}; nothing heard for {silent}; predicted once it's back: {left} more")
            }
            (None, Some(left)) => format!("{sent}; predicted: {left} more"),
            (_, None) => sent,
        };
        Some(words)
    }
}

/// The moment in the unit of events.
pub(super) fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How a migration ended, in words.
fn end(report: &Value) -> String {
    let word = |key: &str| report[key].as_str().unwrap_or("unknown").to_owned();
    match report["downtime_ms"].as_f64() {
        Some(pause) => {
            format!("{}: the guest runs at {}; pause {pause:.1} ms", word("outcome"), word("target"))
        }
        None => format!("{}: {}", word("outcome"), word("detail")),
    }
}

fn words(phase: &str) -> Option<&'static str> {
    match phase {
        "preparing" => Some("connects and compares both hosts"),
        "pre_copy" => Some("the guest runs on while its memory is sent"),
        "switchover" => Some("the final phase: the guest is stopped, its last pages are on their way"),
        "handed_over" => Some("the right to run the guest has left the source"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn events_are_taken_once_they_are_whole() {
        let directory = tempfile::tempdir().unwrap();
        let mut migration = Migration::new("1".into(), directory.path().to_owned());
        assert!(migration.look().unwrap().is_empty());
        let mut file = File::create(directory.path().join("events.ndjson")).unwrap();
        let half = "{\"event\":\"warning\",\"message\":\"the link is slow\"}\n{\"event\":\"pha";
        file.write_all(half.as_bytes()).unwrap();
        assert_eq!(migration.look().unwrap(), ["the link is slow"]);
        file.write_all(b"se\",\"phase\":\"done\",\"at_unix_ms\":7}\n").unwrap();
        assert!(migration.look().unwrap().is_empty());
        assert_eq!((migration.began("done"), migration.began("switchover")), (Some(7), None));
    }
}
