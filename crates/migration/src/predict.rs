//! How long the pause would be if the guest were stopped now.
//!
//! ```text
//! pause = (encoded bytes owed + in flight + dirtied but not yet seen + device state) / rate
//!       + fixed cost (stop, drain, load, cont)
//!       + half a round trip
//! ```
//!
//! Encoded bytes owed are the owed blocks of each kind times what a block of that kind took lately: a block that the
//! target never had goes whole, one that it had goes as a delta, and the two differ by an order of magnitude. Fixed
//! cost and device state can't be known before the first pause; they start from defaults and are learned from every
//! outcome ([`Learned`], which whoever owns the machine may keep for its next migration).

use serde::{Deserialize, Serialize};

/// Blocks over which a mean encoded size forgets: about a second of a 100 Mbit/s link.
const SIZE_MEMORY_BLOCKS: f64 = 4096.0;
/// What a block is thought to take until one was seen. A delta is thought to be no better, so that a guest isn't
/// stopped on a guess.
const UNSEEN_BLOCK_BYTES: f64 = 2048.0;
/// How many seen blocks that guess outweighs. The first deltas of a guest are no sample of it: they are of the few pages
/// that it wrote while everything else went for the first time.
const GUESS_WEIGHT_BLOCKS: f64 = 64.0;
/// Weight of the newest of the dirty rates that are averaged.
const RATE_WEIGHT: f64 = 0.3;
/// Weight of the newest outcome in what is learned.
const LEARNING_WEIGHT: f64 = 0.5;
/// An interval too short to compute a rate from, in milliseconds.
const SHORTEST_INTERVAL_MS: u64 = 20;

/// Owed blocks, by whether the target has a version to apply a delta to, and what is already on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Owed blocks that the target never had.
    pub first_time_blocks: u64,
    /// Owed blocks of which it has an older version.
    pub again_blocks: u64,
    /// Encoded bytes handed to the transport and not yet acknowledged.
    pub in_flight_bytes: u64,
    /// Milliseconds since dirty blocks were last looked for: what was written since then isn't owed yet.
    pub unseen_ms: u64,
}

/// Parts of the pause that only a pause can teach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Stop, drain, load and `cont`, in milliseconds. By default 12: what QEMU 10.0 took with 256 MB on one host,
    /// rounded up.
    pub fixed_ms: f64,
    /// Compressed bytes of everything that isn't memory. By default 64 KiB: a small machine's sections.
    pub device_state_bytes: f64,
    /// From the decision to the stop, in milliseconds; the guest still writes. By default 5.
    pub decision_to_stop_ms: f64,
}

impl Default for Learned {
    fn default() -> Self {
        Self { fixed_ms: 12.0, device_state_bytes: 65_536.0, decision_to_stop_ms: 5.0 }
    }
}

/// What a pause turned out to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// STOP to RESUME, in milliseconds.
    pub pause_ms: f64,
    /// Encoded bytes of memory that went, or were still in flight, after STOP.
    pub memory_bytes: u64,
    /// Compressed bytes of everything else.
    pub device_state_bytes: u64,
    /// From the decision to STOP, in milliseconds.
    pub decision_to_stop_ms: f64,
}

/// A predicted pause, part by part, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pause {
    /// Memory that is owed or in flight.
    pub memory_ms: f64,
    /// Memory that will be written before the guest has stopped.
    pub unseen_ms: f64,
    /// Device state.
    pub device_state_ms: f64,
    /// Stop, drain, load, `cont`.
    pub fixed_ms: f64,
    /// Half a round trip.
    pub travel_ms: f64,
}

impl Pause {
    /// The whole pause.
    pub fn total_ms(&self) -> f64 {
        self.memory_ms + self.unseen_ms + self.device_state_ms + self.fixed_ms + self.travel_ms
    }
}

/// Predicts the pause from what has been observed so far.
#[derive(Debug, Clone)]
pub struct Predictor {
    first_time: MeanSize,
    again: MeanSize,
    rate_bytes_per_second: f64,
    round_trip_ms: f64,
    dirty: RateMeter,
    learned: Learned,
}

impl Predictor {
    /// A predictor that has seen nothing yet of this migration. Until a rate has been observed every pause is
    /// infinite.
    pub fn new(learned: Learned) -> Self {
        Self {
            first_time: MeanSize::default(),
            again: MeanSize::default(),
            rate_bytes_per_second: 0.0,
            round_trip_ms: 0.0,
            dirty: RateMeter::default(),
            learned,
        }
    }

    /// Learns what blocks take from an encoded batch. Where a batch mixes both kinds, the difference between what it
    /// took and what was expected is shared in proportion to the expectation.
    pub fn observe_batch(&mut self, first_time: u64, again: u64, encoded_bytes: u64) {
        let (first_time, again) = (first_time as f64, again as f64);
        let expected = first_time * self.first_time.bytes + again * self.again.bytes;
        if expected > 0.0 {
            let ratio = encoded_bytes as f64 / expected;
            self.first_time.scale(ratio, first_time);
            self.again.scale(ratio, again);
        }
    }

    /// Takes the transport's newest delivery rate and its smallest round trip.
    pub fn observe_link(&mut self, rate_bytes_per_second: f64, round_trip_ms: f64) {
        self.rate_bytes_per_second = rate_bytes_per_second.max(0.0);
        self.round_trip_ms = round_trip_ms.max(0.0);
    }

    /// Takes the running total of rewritten versions ([`crate::mover::Statistics::rewritten`]) at a time.
    pub fn observe_dirtying(&mut self, now_ms: u64, rewritten: u64) {
        self.dirty.observe(now_ms, rewritten);
    }

    /// Learns from a pause that has happened.
    pub fn observe_outcome(&mut self, outcome: &Outcome) {
        let bytes = (outcome.memory_bytes + outcome.device_state_bytes) as f64;
        let fixed_ms = outcome.pause_ms - self.transfer_ms(bytes) - self.round_trip_ms / 2.0;
        let learn = |old: &mut f64, new: f64| *old += LEARNING_WEIGHT * (new.max(0.0) - *old);
        if fixed_ms.is_finite() {
            learn(&mut self.learned.fixed_ms, fixed_ms);
        }
        learn(&mut self.learned.device_state_bytes, outcome.device_state_bytes as f64);
        learn(&mut self.learned.decision_to_stop_ms, outcome.decision_to_stop_ms);
    }

    /// What has been learned, to be kept for the machine's next migration.
    pub fn learned(&self) -> Learned {
        self.learned
    }

    /// The pause if the guest were stopped now.
    pub fn pause(&self, backlog: &Backlog) -> Pause {
        let unseen_ms = backlog.unseen_ms as f64 + self.learned.decision_to_stop_ms;
        // However long nobody looked, a guest that rewrites the same blocks has only so many of them to show: two steps'
        // worth, since a step may have begun in the middle of its writing.
        let unseen_blocks = (self.dirty.per_second * unseen_ms / 1e3).min(2.0 * self.dirty.largest_step);
        Pause {
            memory_ms: self.transfer_ms(self.owed_bytes(backlog) + backlog.in_flight_bytes as f64),
            unseen_ms: self.transfer_ms(unseen_blocks * self.delta_bytes()),
            device_state_ms: self.transfer_ms(self.learned.device_state_bytes),
            fixed_ms: self.learned.fixed_ms,
            travel_ms: self.round_trip_ms / 2.0,
        }
    }

    /// Time until the pause meets `target_ms` and is over, if the guest goes on as it does; `None` if it dirties
    /// memory faster than the link carries it.
    pub fn remaining_ms(&self, backlog: &Backlog, target_ms: f64) -> Option<f64> {
        let pause_ms = self.pause(backlog).total_ms();
        if !pause_ms.is_finite() {
            return None;
        }
        if pause_ms <= target_ms {
            return Some(pause_ms);
        }
        let gain = 1.0 - self.dirty_bytes_per_second() / self.rate_bytes_per_second;
        (gain > 0.0).then(|| (pause_ms - target_ms) / gain + target_ms)
    }

    /// Encoded bytes of what is owed.
    pub fn owed_bytes(&self, backlog: &Backlog) -> f64 {
        backlog.first_time_blocks as f64 * self.first_time.bytes
            + backlog.again_blocks as f64 * self.again.bytes
    }

    /// Rate of the link as last observed, bytes per second.
    pub fn rate_bytes_per_second(&self) -> f64 {
        self.rate_bytes_per_second
    }

    /// Blocks that the guest rewrites a second, as far as they are seen.
    pub fn dirty_blocks_per_second(&self) -> f64 {
        self.dirty.per_second
    }

    /// What the link would have to carry a second to keep up with the guest: its writes, as deltas. 0 until a delta was
    /// seen.
    pub fn dirty_bytes_per_second(&self) -> f64 {
        self.dirty.per_second * self.delta_bytes()
    }

    /// What a written block takes, as a delta; nothing as long as none was seen.
    fn delta_bytes(&self) -> f64 {
        if self.again.seen_blocks > 0.0 { self.again.bytes } else { 0.0 }
    }

    fn transfer_ms(&self, bytes: f64) -> f64 {
        if bytes <= 0.0 { 0.0 } else { bytes / self.rate_bytes_per_second * 1e3 }
    }
}

/// What a block of one kind takes: the mean of all, then of the newest [`SIZE_MEMORY_BLOCKS`].
#[derive(Debug, Clone)]
struct MeanSize {
    bytes: f64,
    seen_blocks: f64,
}

impl Default for MeanSize {
    fn default() -> Self {
        Self { bytes: UNSEEN_BLOCK_BYTES, seen_blocks: 0.0 }
    }
}

impl MeanSize {
    /// `blocks` more took `ratio` times what was expected.
    fn scale(&mut self, ratio: f64, blocks: f64) {
        if blocks > 0.0 {
            let weight = blocks / (GUESS_WEIGHT_BLOCKS + self.seen_blocks + blocks);
            // A run of blocks that cost nothing must not make all later ones free.
            self.bytes = (self.bytes * (1.0 + weight * (ratio - 1.0))).max(1.0);
            self.seen_blocks = (self.seen_blocks + blocks).min(SIZE_MEMORY_BLOCKS);
        }
    }
}

/// The smoothed slope of a running total.
#[derive(Debug, Clone, Default)]
struct RateMeter {
    last: Option<(u64, u64)>,
    per_second: f64,
    /// The largest growth between two observations, less a tenth for each since then.
    largest_step: f64,
    observed: bool,
}

impl RateMeter {
    fn observe(&mut self, now_ms: u64, total: u64) {
        let Some((then_ms, before)) = self.last else {
            self.last = Some((now_ms, total));
            return;
        };
        let elapsed_ms = now_ms.saturating_sub(then_ms);
        if elapsed_ms < SHORTEST_INTERVAL_MS {
            return;
        }
        let step = total.saturating_sub(before) as f64;
        self.largest_step = (self.largest_step * 0.9).max(step);
        let newest = step * 1e3 / elapsed_ms as f64;
        let weight = if self.observed { RATE_WEIGHT } else { 1.0 };
        self.per_second += weight * (newest - self.per_second);
        self.observed = true;
        self.last = Some((now_ms, total));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictor() -> Predictor {
        let mut predictor = Predictor::new(Learned {
            fixed_ms: 10.0,
            device_state_bytes: 12_500.0,
            decision_to_stop_ms: 0.0,
        });
        predictor.observe_link(12_500_000.0, 20.0);
        predictor
    }

    #[test]
    fn pause_is_the_sum_of_its_parts() {
        let mut predictor = predictor();
        for _ in 0..2_000 {
            predictor.observe_batch(64, 0, 64 * 2_000);
            predictor.observe_batch(0, 64, 64 * 100);
        }
        let backlog =
            Backlog { first_time_blocks: 10, again_blocks: 1_000, in_flight_bytes: 5_000, unseen_ms: 0 };
        let pause = predictor.pause(&backlog);
        assert!((pause.memory_ms - 10.0).abs() < 0.1, "{pause:?}");
        assert!((pause.total_ms() - (10.0 + 1.0 + 10.0 + 10.0)).abs() < 0.1, "{pause:?}");
    }

    #[test]
    fn without_a_rate_no_pause_is_promised() {
        let predictor = Predictor::new(Learned::default());
        assert!(predictor.pause(&Backlog::default()).total_ms().is_infinite());
        assert_eq!(predictor.remaining_ms(&Backlog::default(), 50.0), None);
    }

    #[test]
    fn mixed_batches_still_tell_the_kinds_apart() {
        let mut predictor = predictor();
        for round in 0..4_000_u64 {
            let first_time = round * 37 % 65;
            let again = 64 - first_time;
            predictor.observe_batch(first_time, again, first_time * 1_800 + again * 160);
        }
        assert!((predictor.first_time.bytes / 1_800.0 - 1.0).abs() < 0.15, "{}", predictor.first_time.bytes);
        assert!((predictor.again.bytes / 160.0 - 1.0).abs() < 0.5, "{}", predictor.again.bytes);
    }

    #[test]
    fn a_first_batch_that_cost_nearly_nothing_promises_nothing() {
        let mut predictor = predictor();
        let backlog = Backlog { again_blocks: 7_700, ..Backlog::default() };
        let guessed = predictor.pause(&backlog).memory_ms;
        predictor.observe_batch(0, 64, 64 * 43);
        assert!(predictor.pause(&backlog).memory_ms > guessed / 3.0);
    }

    #[test]
    fn writes_that_nobody_has_seen_yet_are_counted() {
        let mut predictor = predictor();
        for _ in 0..2_000 {
            predictor.observe_batch(0, 64, 64 * 100);
        }
        for now in 0..50 {
            predictor.observe_dirtying(now * 100, now * 1_000);
        }
        let pause = predictor.pause(&Backlog { unseen_ms: 125, ..Backlog::default() });
        assert!((pause.unseen_ms - 10.0).abs() < 0.1, "{pause:?}");
    }

    #[test]
    fn an_outcome_moves_what_is_learned_half_way() {
        let mut predictor = predictor();
        predictor.observe_outcome(&Outcome {
            pause_ms: 50.0,
            memory_bytes: 112_500,
            device_state_bytes: 12_500,
            decision_to_stop_ms: 8.0,
        });
        let learned = predictor.learned();
        assert!((learned.fixed_ms - 20.0).abs() < 1e-6, "{learned:?}");
        assert!((learned.decision_to_stop_ms - 4.0).abs() < 1e-6, "{learned:?}");
    }

    #[test]
    fn remaining_time_grows_with_the_dirty_rate_and_has_no_end_beyond_the_link() {
        let mut predictor = predictor();
        for _ in 0..2_000 {
            predictor.observe_batch(0, 64, 64 * 500);
        }
        let backlog = Backlog { first_time_blocks: 10_000, ..Backlog::default() };
        let idle = predictor.remaining_ms(&backlog, 50.0).unwrap();
        predictor.observe_dirtying(0, 0);
        predictor.observe_dirtying(1_000, 10_000);
        let busy = predictor.remaining_ms(&backlog, 50.0).unwrap();
        assert!(busy > idle * 1.5, "{busy} {idle}");
        predictor.observe_dirtying(2_000, 1_000_000);
        assert_eq!(predictor.remaining_ms(&backlog, 50.0), None);
    }
}
