//! Which level of zstd pays: by what waits for what.
//!
//! A slow link with time to spare wants a higher level; a fast one, or a busy host, a lower one. Compressing takes
//! processor time from the guests of the host, so a higher level is only taken while it takes little of it, and only where
//! it pays: much of what guests have in memory is no smaller at level 9 than at 3, and takes four times as long.

use std::time::Duration;

/// Levels, each about half as fast as the one before.
const LEVELS: [i32; 6] = [-5, -1, 1, 3, 6, 9];
/// Where it begins: [`LEVELS`]\[3\].
const FIRST: usize = 3;
/// What level [`LEVELS`]\[[`FIRST`]\] compresses in a second on one core, roughly.
const FIRST_BYTES_PER_SECOND: f64 = 250e6;
/// A level is begun with where it compresses so many times what the link carries: a core has more to do than that.
const HEADROOM: f64 = 4.0;
/// The link is what limits while sending waits for it for this share of the time.
const LINK_LIMITS: f64 = 0.5;
/// The link idles while sending waits for it for no more than this share.
const LINK_IDLES: f64 = 0.1;
/// Share of one core that compressing may take if a higher level, which takes twice as much, is to be tried.
const ROOM: f64 = 0.2;
/// The share of the bytes that the next higher level has to save.
const WORTH: f64 = 0.01;
/// Share of one core beyond which it takes too much from the guests while the link is what limits.
const TOO_MUCH: f64 = 0.6;

/// What happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    /// How long it was.
    pub elapsed: Duration,
    /// Processor time spent compressing, over all threads.
    pub compressing: Duration,
    /// Time in which sending waited for the link.
    pub waiting_for_link: Duration,
    /// Some batches, sealed at both levels.
    pub tried: Tried,
}

/// What the same batches take at the level in use and at the next higher one, in bytes; zeros if none was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tried {
    /// At the level in use.
    pub bytes: u64,
    /// At [`LevelGovernor::above`] it.
    pub bytes_above: u64,
}

impl Tried {
    fn is_worth_it(self) -> bool {
        (self.bytes_above as f64) < self.bytes as f64 * (1.0 - WORTH)
    }
}

/// Chooses the level of zstd for batches that are still to come.
///
/// ```
/// use std::time::Duration;
/// use godwit_content::{Interval, LevelGovernor, Tried};
///
/// let mut governor = LevelGovernor::default();
/// let before = governor.level();
/// let slow_link = Interval {
///     elapsed: Duration::from_secs(1),
///     compressing: Duration::from_millis(50),
///     waiting_for_link: Duration::from_millis(950),
///     tried: Tried { bytes: 100_000, bytes_above: 95_000 },
/// };
/// assert!(governor.observe(&slow_link) > before);
/// ```
#[derive(Clone, Debug)]
pub struct LevelGovernor {
    step: usize,
}

impl Default for LevelGovernor {
    fn default() -> Self {
        Self { step: FIRST }
    }
}

impl LevelGovernor {
    /// One that begins with a level for a link of this rate: the usual one, or a lower one where that would make the link
    /// wait. All of a small machine may have left before the first look.
    pub fn for_link(bytes_per_second: u64) -> Self {
        let too_slow = bytes_per_second as f64 * HEADROOM / FIRST_BYTES_PER_SECOND;
        let steps = too_slow.log2().ceil().clamp(0.0, FIRST as f64);
        Self { step: FIRST - steps as usize }
    }

    /// The level now.
    pub fn level(&self) -> i32 {
        LEVELS[self.step]
    }

    /// The level above this one, if there is any.
    pub fn above(level: i32) -> Option<i32> {
        LEVELS.into_iter().find(|known| *known > level)
    }

    /// Takes what happened in an interval during which there was always something to send; returns the level from now
    /// on. Half a second is a good interval.
    pub fn observe(&mut self, interval: &Interval) -> i32 {
        let elapsed = interval.elapsed.as_secs_f64();
        if elapsed > 0.0 {
            let waiting = interval.waiting_for_link.as_secs_f64() / elapsed;
            let compressing = interval.compressing.as_secs_f64() / elapsed;
            if waiting >= LINK_LIMITS && compressing <= ROOM {
                self.step = (self.step + usize::from(interval.tried.is_worth_it())).min(LEVELS.len() - 1);
            } else if waiting <= LINK_IDLES || compressing >= TOO_MUCH {
                self.step = self.step.saturating_sub(1);
            }
        }
        self.level()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYS: Tried = Tried { bytes: 1_000, bytes_above: 980 };

    /// A second on a link and a processor, at the level that the governor chose.
    fn second(level: i32, link_bytes_per_second: f64, compressor_bytes_per_second: f64) -> Interval {
        let slower =
            2f64.powi(LEVELS.iter().position(|known| *known == level).unwrap() as i32 - FIRST as i32);
        let compress_rate = compressor_bytes_per_second / slower;
        let rate = link_bytes_per_second.min(compress_rate);
        Interval {
            elapsed: Duration::from_secs(1),
            compressing: Duration::from_secs_f64(rate / compress_rate),
            waiting_for_link: Duration::from_secs_f64(1.0 - rate / compress_rate),
            tried: PAYS,
        }
    }

    fn settle(link: f64, compressor: f64) -> (i32, i32) {
        let mut governor = LevelGovernor::default();
        let mut levels: Vec<i32> = Vec::new();
        for _ in 0..20 {
            levels.push(governor.observe(&second(governor.level(), link, compressor)));
        }
        (levels[18], levels[19])
    }

    #[test]
    fn a_fast_link_begins_lower() {
        let begins = [0, 12_500_000, 62_500_000, 125_000_000, 300_000_000, u64::MAX];
        let levels = begins.map(|rate| LevelGovernor::for_link(rate).level());
        assert_eq!(levels, [3, 3, 3, 1, -5, -5]);
    }

    #[test]
    fn a_slow_link_gets_the_highest_level() {
        assert_eq!(settle(1e6, 100e6), (9, 9));
    }

    #[test]
    fn a_level_that_saves_nothing_is_not_taken() {
        let mut governor = LevelGovernor::default();
        let before = governor.level();
        for tried in [Tried::default(), Tried { bytes: 1_000, bytes_above: 995 }] {
            let slow_link = Interval { tried, ..second(before, 1e6, 100e6) };
            assert_eq!(governor.observe(&slow_link), before, "{tried:?}");
        }
        assert!(governor.observe(&second(before, 1e6, 100e6)) > before);
        assert_eq!((LevelGovernor::above(3), LevelGovernor::above(9)), (Some(6), None));
    }

    #[test]
    fn a_fast_link_gets_the_lowest_level() {
        assert_eq!(settle(10e9, 100e6), (-5, -5));
    }

    #[test]
    fn in_between_it_stays_where_it_is() {
        assert_eq!(settle(30e6, 100e6), (3, 3));
    }

    #[test]
    fn a_level_that_fits_is_not_left_again() {
        for link in [1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 1e10] {
            let (before, last) = settle(link, 100e6);
            assert_eq!(before, last, "link of {link} bytes/s");
        }
    }
}
