//! How slow a guest has to be for its link to catch up with it.
//!
//! ```text
//!   full speed ── the target is out of reach ──► first share ──┬─► half ─► … ─► floor ─► exhausted
//!        ▲                                                     │     (a step of one second each,
//!        └──────────── the throttle is dropped ◄───────────────┘      while the pause doesn't shrink)
//! ```
//!
//! The share only falls, and never below [`CpuShare::FLOOR`]: the guest is to be slow for a short time and not for ever.
//! Whoever drops a [`Throttle`] has to give the guest its full speed back; one that failed on the way leaves a slow guest
//! behind, which is why the shell writes down what it does before it does it.
//!
//! CloudNet has no such thing; QEMU's auto-converge, which does the same by sleeping in the virtual CPUs, compares what the
//! guest writes with what QEMU's own stream carried, which here is drained at memory speed.

use crate::stop::Sample;

/// The share of their full speed at which the guest's virtual CPUs may run, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuShare(u8);

impl CpuShare {
    /// Not slowed.
    pub const FULL: Self = Self(100);
    /// No guest is slowed further: it still answers, and its timers still run.
    pub const FLOOR: Self = Self(5);

    /// The share as a number from 5 to 100.
    pub fn percent(self) -> u8 {
        self.0
    }

    /// A part of this share, at least the floor and at most the share itself.
    fn part(self, part: f64) -> Self {
        // Whatever the product is, also when it isn't a number, the cast and the bounds make a share of it.
        Self((f64::from(self.0) * part) as u8).max(Self::FLOOR).min(self)
    }
}

/// How long a share is given to show what it does.
pub(crate) const STEP_MS: u64 = 1_000;
/// A share stays as it is if the pause shrinks to this part of itself in a step,
const SHRINKS: f64 = 0.9;
/// or by this part of the time, which of a long pause is less: the target is then met within two and a half pauses.
const DRAINS: f64 = 0.4;
/// The same at the floor, where the choice is between slowly and not at all.
const DRAINS_AT_FLOOR: f64 = 0.05;
/// The part of the link's rate that the guest may write: the rest drains what is owed.
pub(crate) const WRITTEN_PART: f64 = 0.5;
/// Steps at the floor without effect after which nothing more is to be had. Fewer owed blocks than ever at the floor are an
/// effect too: the predicted pause grows for a while when a long backlog begins to drain, since what waited longest was
/// written most and takes more than blocks took until then.
const FUTILE_STEPS: u32 = 10;
/// No guest is slowed for longer than this.
const LONGEST_MS: u64 = 120_000;

/// The share at which the guest would write half of what the link carries, if it writes less in proportion.
///
/// A guest that rewrites the same blocks writes less than in proportion when it is slowed, so this is the most that can
/// do; the steps after it find out.
///
/// ```
/// use godwit_migration::{stop::Sample, throttle::first_share};
///
/// let sample = Sample { dirty_bytes_per_second: 50_000_000, rate_bytes_per_second: 12_500_000, ..Sample::default() };
/// assert_eq!(first_share(&sample).percent(), 12);
/// ```
pub fn first_share(sample: &Sample) -> CpuShare {
    let (dirty, rate) = (sample.dirty_bytes_per_second as f64, sample.rate_bytes_per_second as f64);
    // Where the guest is slower than its link and the target isn't met all the same, half is a beginning.
    CpuShare::FULL.part((WRITTEN_PART * rate / dirty.max(1.0)).min(0.5))
}

/// Slows a guest step by step, until its predicted pause shrinks.
#[derive(Debug, Clone)]
pub struct Throttle {
    share: CpuShare,
    began_ms: u64,
    step_began_ms: u64,
    /// When the step began.
    pause_ms: f64,
    futile_steps: u32,
    least_owed_blocks: u64,
    is_too_long: bool,
}

impl Throttle {
    /// Begins to slow a guest.
    pub fn new(sample: &Sample) -> Self {
        Self {
            share: first_share(sample),
            began_ms: sample.now_ms,
            step_began_ms: sample.now_ms,
            pause_ms: sample.predicted_pause_ms,
            futile_steps: 0,
            least_owed_blocks: u64::MAX,
            is_too_long: false,
        }
    }

    /// Looks at the newest sample; returns the share from now on.
    pub fn observe(&mut self, sample: &Sample) -> CpuShare {
        self.is_too_long = sample.now_ms >= self.began_ms + LONGEST_MS;
        if sample.now_ms >= self.step_began_ms + STEP_MS {
            self.end_step(sample);
        }
        self.share
    }

    fn end_step(&mut self, sample: &Sample) {
        let elapsed_ms = (sample.now_ms - self.step_began_ms) as f64;
        // Pause and time are both in milliseconds: a link that had nothing else to carry would drain one for one.
        let drained = (self.pause_ms - sample.predicted_pause_ms) / elapsed_ms;
        let shrinks = sample.predicted_pause_ms <= self.pause_ms * SHRINKS;
        if self.share > CpuShare::FLOOR {
            if !shrinks && drained < DRAINS {
                self.share = self.share.part(0.5);
            }
        } else if shrinks || drained >= DRAINS_AT_FLOOR || sample.owed_blocks < self.least_owed_blocks {
            self.futile_steps = 0;
            self.least_owed_blocks = self.least_owed_blocks.min(sample.owed_blocks);
        } else {
            self.futile_steps += 1;
        }
        self.step_began_ms = sample.now_ms;
        self.pause_ms = sample.predicted_pause_ms;
    }

    /// The share of now.
    pub fn share(&self) -> CpuShare {
        self.share
    }

    /// Whether slowing the guest has done what it can: it is as slow as may be and the pause doesn't shrink any more, or
    /// it was slow for long enough.
    pub fn is_exhausted(&self) -> bool {
        self.is_too_long || self.futile_steps >= FUTILE_STEPS
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(now_ms: u64, predicted_pause_ms: f64) -> Sample {
        Sample {
            now_ms,
            predicted_pause_ms,
            rate_bytes_per_second: 1_000_000,
            dirty_bytes_per_second: 2_000_000,
            ..Sample::default()
        }
    }

    #[test]
    fn a_guest_is_slowed_until_its_pause_shrinks() {
        let mut throttle = Throttle::new(&sample(0, 1_000.0));
        assert_eq!(throttle.share().percent(), 25);
        assert_eq!(throttle.observe(&sample(999, 1_000.0)).percent(), 25);
        assert_eq!(throttle.observe(&sample(1_000, 1_000.0)).percent(), 12);
        assert_eq!(throttle.observe(&sample(2_000, 700.0)).percent(), 12);
        assert_eq!(throttle.observe(&sample(3_000, 650.0)).percent(), 6);
        assert!(!throttle.is_exhausted());
    }

    #[test]
    fn a_long_pause_may_take_its_time() {
        let mut throttle = Throttle::new(&sample(0, 20_000.0));
        for step in 1..=20 {
            let share = throttle.observe(&sample(step * STEP_MS, 20_000.0 - step as f64 * 450.0));
            assert_eq!(share.percent(), 25);
        }
    }

    #[test]
    fn what_has_no_effect_at_the_floor_ends() {
        let mut throttle = Throttle::new(&sample(0, 1_000.0));
        let steps = (1..20).take_while(|step| {
            throttle.observe(&sample(step * STEP_MS, 1_000.0));
            !throttle.is_exhausted()
        });
        assert_eq!(steps.count(), 13);
        assert_eq!(throttle.share(), CpuShare::FLOOR);
    }

    #[test]
    fn a_guest_that_is_slower_than_its_link_is_halved() {
        let slow = Sample { dirty_bytes_per_second: 10, ..sample(0, 100.0) };
        assert_eq!(first_share(&slow).percent(), 50);
        let unknown = Sample { rate_bytes_per_second: 0, dirty_bytes_per_second: 0, ..slow };
        assert_eq!(first_share(&unknown), CpuShare::FLOOR);
    }

    proptest! {
        /// Whatever is predicted, the share stays in its bounds, only falls, and the throttle comes to an end.
        #[test]
        fn the_share_only_falls_and_never_below_the_floor(
            pauses in prop::collection::vec(prop_oneof![Just(f64::INFINITY), 0.0..1e6_f64], 1..400),
            rate in any::<u32>(),
            dirty in any::<u32>(),
            period_ms in 1_u64..3_000,
        ) {
            let at = |index: usize, pause_ms| Sample {
                rate_bytes_per_second: u64::from(rate),
                dirty_bytes_per_second: u64::from(dirty),
                ..sample(index as u64 * period_ms, pause_ms)
            };
            let mut throttle = Throttle::new(&at(0, pauses[0]));
            let mut before = CpuShare::FULL;
            for (index, pause_ms) in pauses.iter().enumerate() {
                let share = throttle.observe(&at(index, *pause_ms));
                prop_assert!(CpuShare::FLOOR <= share && share <= before, "{share:?} after {before:?}");
                before = share;
                prop_assert!(throttle.is_exhausted() || (index as u64) * period_ms < LONGEST_MS);
            }
        }
    }
}
