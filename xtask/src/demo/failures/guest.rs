//! The guest's own account: a counter over one TCP connection, and a numbered beat every 10 ms.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    beats::{Beat, BeatRecorder},
    lab::{Lab, Place},
    observer::Progress,
};

use super::super::screen::{duration, grouped};
use crate::contest::watch::GUEST_ADDRESS;

const BOOT_LIMIT: Duration = Duration::from_secs(60);
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// A guest that a client outside both hosts follows all the while.
pub(super) struct Guest {
    progress: Progress,
    recorder: BeatRecorder,
    history: History,
    /// When it was last told of, and how often it had written.
    told: (SystemTime, u64),
}

/// All that was heard of a guest, and what of it may not be.
#[derive(Debug, Default)]
pub(super) struct History {
    beats: Vec<Beat>,
    /// Writes when the guest was first heard, and last.
    writes: Option<(u64, u64)>,
    counter_fault: Option<String>,
    beat_fault: Option<String>,
}

impl Guest {
    /// Waits until the guest has booted.
    pub(super) fn meet(lab: &Lab, recorder: BeatRecorder) -> Result<Guest> {
        let progress = Progress::connect(&lab.namespace(Place::Lan), GUEST_ADDRESS, BOOT_LIMIT)
            .context("the guest has not booted")?;
        let told = (SystemTime::now(), progress.writes());
        Ok(Guest { progress, recorder, history: History::default(), told })
    }

    /// Takes what was heard since the last look.
    pub(super) fn look(&mut self) {
        self.history.take_beats(self.recorder.take());
        self.history.take_writes(self.progress.writes());
    }

    /// How it fared since it was last told of.
    pub(super) fn account(&mut self) -> String {
        self.look();
        let (since, before) = self.told;
        let now = SystemTime::now();
        let writes = self.progress.writes();
        self.told = (now, writes);
        let seconds = now.duration_since(since).unwrap_or_default().as_secs_f64();
        let pace = (writes.saturating_sub(before)) as f64 / seconds.max(f64::MIN_POSITIVE);
        format!(
            "counter {}, {:.0} writes/s; longest silence {}",
            grouped(writes),
            pace,
            duration(self.history.longest_silence(since, now))
        )
    }

    /// Writes so far.
    pub(super) fn writes(&self) -> u64 {
        self.progress.writes()
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }

    /// Has it compare its memory with all that it ever wrote; the result in words.
    pub(super) fn check(&self) -> Result<String> {
        let answer = self.progress.check(CHECK_LIMIT)?;
        let numbers: Vec<u64> = answer.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [pages, writes] = numbers[..] else { bail!("the guest says {answer:?}") };
        Ok(format!("{} pages hold what {} writes left in them", grouped(pages), grouped(writes)))
    }
}

impl History {
    fn take_beats(&mut self, beats: Vec<Beat>) {
        for beat in beats {
            if let Some(last) = self.beats.last()
                && self.beat_fault.is_none()
            {
                self.beat_fault = fault_between(last, &beat);
            }
            self.beats.push(beat);
        }
    }

    fn take_writes(&mut self, writes: u64) {
        let (first, last) = self.writes.unwrap_or((writes, writes));
        if writes < last {
            self.counter_fault = Some(format!("the counter went back from {last} to {writes}"));
        }
        self.writes = Some((first, writes));
    }

    /// The counter when it was first heard, and when it was last; or what was wrong with it.
    pub(super) fn counter(&self) -> Result<(u64, u64), String> {
        match &self.counter_fault {
            None => self.writes.ok_or_else(|| "never heard".to_owned()),
            Some(fault) => Err(fault.clone()),
        }
    }

    /// How many beats came, and how often from another host than the one before; or what was wrong with them.
    pub(super) fn beats(&self) -> Result<(usize, usize), String> {
        let moves = self.beats.windows(2).filter(|pair| pair[0].from != pair[1].from).count();
        self.beat_fault.clone().map_or(Ok((self.beats.len(), moves)), Err)
    }

    /// The longest time without a beat between two moments.
    pub(super) fn longest_silence(&self, from: SystemTime, to: SystemTime) -> Duration {
        let within = self.beats.iter().map(|beat| beat.at).filter(|at| (from..to).contains(at));
        let marks: Vec<SystemTime> = std::iter::once(from).chain(within).chain([to]).collect();
        let gaps = marks.windows(2).map(|pair| pair[1].duration_since(pair[0]).unwrap_or_default());
        gaps.max().unwrap_or_default()
    }
}

/// What can't be between a beat and the next if only one copy runs, in its first boot.
fn fault_between(last: &Beat, beat: &Beat) -> Option<String> {
    if beat.boot != last.boot {
        Some(format!("the guest booted anew after beat {}", last.number))
    } else if beat.number <= last.number {
        let (from, before) = (beat.from.name(), last.from.name());
        Some(format!("beat {} of {from} came after beat {} of {before}", beat.number, last.number))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(number: u64, from: Place, ms: u64) -> Beat {
        Beat { number, boot: 1, from, at: SystemTime::UNIX_EPOCH + Duration::from_millis(ms) }
    }

    #[test]
    fn one_copy_that_moves_is_no_fault() {
        let mut history = History::default();
        history.take_beats(vec![beat(1, Place::A, 10), beat(2, Place::A, 20), beat(4, Place::B, 60)]);
        assert_eq!(history.beats(), Ok((3, 1)));
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        assert_eq!(history.longest_silence(at(10), at(70)), Duration::from_millis(40));
        assert_eq!(history.longest_silence(at(10), at(160)), Duration::from_millis(100));
    }

    #[test]
    fn a_second_copy_an_older_one_and_a_new_boot_are_faults() {
        let newer = Beat { boot: 2, ..beat(3, Place::A, 30) };
        for second in [beat(2, Place::B, 30), beat(1, Place::A, 30), newer] {
            let mut history = History::default();
            history.take_beats(vec![beat(2, Place::A, 20), second]);
            history.take_beats(vec![beat(9, Place::A, 90)]);
            assert!(history.beats().is_err(), "{second:?}");
        }
    }

    #[test]
    fn a_counter_that_went_back_stays_a_fault() {
        let mut history = History::default();
        assert!(history.counter().is_err());
        [10, 10, 30].into_iter().for_each(|writes| history.take_writes(writes));
        assert_eq!(history.counter(), Ok((10, 30)));
        [29, 40].into_iter().for_each(|writes| history.take_writes(writes));
        assert!(history.counter().is_err());
    }
}
