//! The harness's own connection to the QEMU of a host: when its guest ran, whoever made it.

use std::{
    fs::OpenOptions,
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use godwit_sim::qmp::{Event, Qmp};
use serde_json::json;

use super::hosts::record_in;

/// How often a QEMU is looked for, and how long events are waited for at once.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// In these states of its token record no host may run the machine.
const MAY_NOT_RUN: [&str; 3] = ["awaited", "taking", "refused"];

/// Follows whatever QEMU a host has.
pub(super) struct Watcher {
    seen: Arc<Mutex<Seen>>,
}

/// What was seen of a host's QEMUs.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// When a guest ran.
    pub(super) intervals: Vec<Interval>,
    /// There is a QEMU.
    pub(super) is_there: bool,
    /// What its QEMUs said, a line each.
    pub(super) said: Vec<String>,
    /// What may never be, in words.
    pub(super) violations: Vec<String>,
}

/// A time in which a guest ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interval {
    pub(super) from: SystemTime,
    /// `None`: it still runs.
    pub(super) to: Option<SystemTime>,
}

impl Watcher {
    /// Watches the QEMUs that serve `socket`; `machine` is the machine's directory at that host.
    pub(super) fn start(socket: PathBuf, machine: PathBuf) -> Watcher {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let wanted = Arc::downgrade(&seen);
        std::thread::spawn(move || {
            while wanted.strong_count() > 0 {
                if let Ok(monitor) = Qmp::connect(&socket, LOOK_EVERY) {
                    keep_console(&machine, &socket.with_file_name("console.log"));
                    follow(monitor, &machine, &wanted);
                }
                std::thread::sleep(LOOK_EVERY);
            }
        });
        Watcher { seen }
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Whether a guest runs now.
    pub(super) fn is_running(&self) -> bool {
        lock(&self.seen).intervals.last().is_some_and(|interval| interval.to.is_none())
    }

    /// Whether a guest booted anew.
    pub(super) fn saw_reboot(&self) -> bool {
        let is_reboot = |line: &String| line.contains(" RESET ") && line.contains("\"guest\":true");
        lock(&self.seen).said.iter().any(is_reboot)
    }

    /// Forgets what is over.
    pub(super) fn forget(&self) {
        let mut seen = lock(&self.seen);
        seen.intervals.retain(|interval| interval.to.is_none());
        seen.violations.clear();
        seen.said.clear();
    }
}

/// The longest time in which both hosts ran the guest.
pub(super) fn overlap(a: &[Interval], b: &[Interval]) -> Duration {
    let now = SystemTime::now();
    let both = |one: &Interval, other: &Interval| {
        let (from, to) = (one.from.max(other.from), one.to.unwrap_or(now).min(other.to.unwrap_or(now)));
        to.duration_since(from).unwrap_or_default()
    };
    a.iter().flat_map(|one| b.iter().map(move |other| both(one, other))).max().unwrap_or_default()
}

/// Keeps what a guest prints until its QEMU ends.
fn keep_console(machine: &Path, log: &Path) {
    let log = OpenOptions::new().create(true).append(true).open(log);
    if let (Ok(mut console), Ok(mut log)) = (UnixStream::connect(machine.join("console.sock")), log) {
        std::thread::spawn(move || io::copy(&mut console, &mut log));
    }
}

/// Follows one QEMU to its end.
fn follow(mut monitor: Qmp, machine: &Path, wanted: &Weak<Mutex<Seen>>) {
    let Ok(status) = monitor.execute("query-status", json!({})) else { return };
    if let Some(seen) = wanted.upgrade() {
        let mut seen = lock(&seen);
        seen.is_there = true;
        seen.say(SystemTime::now(), &format!("found, {}", status["status"]));
        monitor.events().iter().for_each(|event| seen.note(event, machine));
        // Events tell only of a guest that began to run since.
        if status["running"] == true {
            seen.begin(SystemTime::now());
        }
    }
    monitor.forget_events();
    loop {
        let alive = monitor.wait_for(LOOK_EVERY, |_| true).is_ok();
        let Some(seen) = wanted.upgrade() else { return };
        let events = monitor.events().to_vec();
        monitor.forget_events();
        events.iter().for_each(|event| lock(&seen).note(event, machine));
        if !alive {
            let mut seen = lock(&seen);
            seen.end(SystemTime::now());
            seen.say(SystemTime::now(), "gone");
            seen.is_there = false;
            return;
        }
    }
}

impl Seen {
    fn say(&mut self, at: SystemTime, what: &str) {
        let unix_ms = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as f64 / 1e3;
        self.said.push(format!("{unix_ms:.3} {what}"));
    }

    fn note(&mut self, event: &Event, machine: &Path) {
        // A QEMU that waits for its gate tells of hundreds of passes a second.
        if event.name != "MIGRATION_PASS" {
            self.say(event.at, &format!("{} {}", event.name, event.data));
        }
        match event.name.as_str() {
            "RESUME" => {
                self.begin(event.at);
                // Read after the guest ran: the record can only be newer than it was then.
                let state = record_in(machine).unwrap_or_default();
                if MAY_NOT_RUN.contains(&state.as_str()) {
                    self.violations.push(format!("the guest ran while its record was `{state}`"));
                }
            }
            "STOP" | "SHUTDOWN" if event.data["reason"] != "guest-reset" => self.end(event.at),
            _ => {}
        }
    }

    fn begin(&mut self, from: SystemTime) {
        if self.intervals.last().is_none_or(|last| last.to.is_some()) {
            self.intervals.push(Interval { from, to: None });
        }
    }

    fn end(&mut self, to: SystemTime) {
        if let Some(last) = self.intervals.last_mut().filter(|last| last.to.is_none()) {
            last.to = Some(to);
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(from: u64, to: Option<u64>) -> Interval {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        Interval { from: at(from), to: to.map(at) }
    }

    #[test]
    fn only_what_both_ran_overlaps() {
        let a = [interval(0, Some(10)), interval(30, Some(40))];
        assert_eq!(overlap(&a, &[interval(10, Some(30))]), Duration::ZERO);
        assert_eq!(overlap(&a, &[interval(38, None)]), Duration::from_millis(2));
        assert_eq!(overlap(&a, &[]), Duration::ZERO);
    }
}
