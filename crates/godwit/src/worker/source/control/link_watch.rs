//! What the operator is told of the link, and whether now is a time to stop a guest.
//!
//! A peer that is there says something at least once a second. A cut isn't noticed by TCP for long; it is by this.

use std::time::{Duration, Instant};

use godwit_transport::session::Stats;

use crate::quantity::{size, time_ms};

/// Nothing heard for so long is worth a word.
const SILENCE: Duration = Duration::from_secs(2);
/// A target that is heard but takes nothing is worth a word after this.
const STALL: Duration = Duration::from_secs(5);

/// Watches a session's figures.
#[derive(Debug)]
pub(super) struct LinkWatch {
    silent_since: Option<Instant>,
    repeated_bytes: u64,
    acked_bytes: u64,
    acked_at: Instant,
    told_of_stall: bool,
}

impl LinkWatch {
    pub(super) fn new(now: Instant) -> Self {
        Self { silent_since: None, repeated_bytes: 0, acked_bytes: 0, acked_at: now, told_of_stall: false }
    }

    /// Takes the newest figures; returns a line for the operator when something has changed.
    pub(super) fn observe(&mut self, peer: &str, stats: &Stats, now: Instant) -> Option<String> {
        let silence = stats.heard_at.map_or(Duration::ZERO, |heard_at| now.duration_since(heard_at));
        if stats.acked_bytes != self.acked_bytes || stats.in_flight_bytes == 0 || silence >= SILENCE {
            self.acked_bytes = stats.acked_bytes;
            self.acked_at = now;
            self.told_of_stall = false;
        }
        match self.silent_since {
            None if silence >= SILENCE => {
                self.silent_since = stats.heard_at;
                self.repeated_bytes = stats.repeated_bytes;
                Some(format!("nothing is heard of {peer}; the guest runs on, and what was sent isn't lost"))
            }
            Some(since) if silence < SILENCE => {
                self.silent_since = None;
                let away = time_ms(now.duration_since(since).as_secs_f64() * 1e3);
                let again = size(stats.repeated_bytes - self.repeated_bytes);
                Some(format!("{peer} is back after {away}; {again} are sent again"))
            }
            _ if !self.told_of_stall && self.stalled(now) >= STALL => {
                self.told_of_stall = true;
                Some(format!("{peer} answers, but takes nothing; its QEMU may hang"))
            }
            _ => None,
        }
    }

    /// For how long the target, though it is heard, has taken nothing of what it was sent.
    pub(super) fn stalled(&self, now: Instant) -> Duration {
        now.duration_since(self.acked_at)
    }

    /// Since when nothing is heard, if that is long.
    pub(super) fn silent_ms(&self, now: Instant) -> Option<u64> {
        self.silent_since
            .map(|since| u64::try_from(now.duration_since(since).as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn stats(heard_at: Instant, in_flight_bytes: u64, acked_bytes: u64) -> Stats {
        Stats { heard_at: Some(heard_at), in_flight_bytes, acked_bytes, ..Stats::default() }
    }

    #[test]
    fn silence_and_return_are_told_once_each() {
        let start = Instant::now();
        let mut watch = LinkWatch::new(start);
        assert_eq!(watch.observe("hostb", &stats(start, 0, 0), start + SECOND), None);
        let told = watch.observe("hostb", &stats(start, 0, 0), start + 2 * SECOND).unwrap();
        assert!(told.starts_with("nothing is heard of hostb"), "{told}");
        assert_eq!(watch.observe("hostb", &stats(start, 0, 0), start + 9 * SECOND), None);
        assert_eq!(watch.silent_ms(start + 9 * SECOND), Some(9_000));
        let back = Stats { repeated_bytes: 2048, ..stats(start + 20 * SECOND, 0, 0) };
        let told = watch.observe("hostb", &back, start + 20 * SECOND).unwrap();
        assert_eq!(told, "hostb is back after 20 s; 2 KiB are sent again");
        assert_eq!(watch.silent_ms(start + 20 * SECOND), None);
    }

    #[test]
    fn a_target_that_takes_nothing_is_told_from_one_that_is_gone() {
        let start = Instant::now();
        let mut watch = LinkWatch::new(start);
        assert_eq!(watch.observe("hostb", &stats(start, 9, 1), start), None);
        let at = start + 6 * SECOND;
        let told = watch.observe("hostb", &stats(at, 9, 1), at).unwrap();
        assert!(told.contains("takes nothing"), "{told}");
        assert_eq!(watch.stalled(at), 6 * SECOND);
        assert_eq!(watch.observe("hostb", &stats(at, 9, 2), at + SECOND / 2), None);
        assert_eq!(watch.stalled(at + SECOND / 2), Duration::ZERO);
    }
}
