//! What a migration will take, said before its first byte.
//!
//! ```text
//!  readings of memory ─► Dirtying::fit ─┐
//!  zero, whole, delta sizes ────────────┴─► MemorySample ─┐
//!  rate, round trip ────────────────────────────── Link ──┼─► course ─► Course ─► Correction ─► Range
//!  what pauses taught ─────────────────────────── Learned ┘                ▲
//!                                    earlier courses and what became of them
//! ```
//!
//! The course follows what [`crate::mover`] and [`crate::stop::Gate`] do: every page once; then what was written
//! meanwhile, as deltas, until what is owed no longer falls; then the gate's patience; then the pause. It is a sketch of
//! averages and not a simulation: what it gets wrong alike every time is what [`Correction`] takes out again.
//!
//! How the working set is written is that of the dissertation's models of pre-copy, as far as it goes (Wood, 6.4.2.1): what
//! counts is how many *different* pages are written in a time, and that number saturates.

mod correction;
mod dirtying;

use godwit_content::BLOCK_BYTES;
use serde::{Deserialize, Serialize};

pub use self::{
    correction::{Correction, Range, Score},
    dirtying::{Changes, Dirtying},
};
use crate::{
    predict::Learned,
    stop::{Gate, GateSettings},
};

/// What a zero page takes: its share of a batch's header and control section.
const ZERO_PAGE_BYTES: f64 = 1.0;
/// Connecting, comparing and opening QEMU's stream: this, and some round trips.
const PREPARING_MS: f64 = 150.0;
const PREPARING_ROUND_TRIPS: f64 = 6.0;
/// What a session carries on average of what the link does while it is full: it takes a while to be full, and where passes end
/// little is ready. Of two runs each of medium, heavy and web.
const USED_OF_RATE: f64 = 0.95;
/// Between two looks for dirty pages when the stop is near.
const NEAR_PASS_MS: f64 = 25.0;
/// What a page takes that is kept compressed on its own, as a share of what it takes in a batch.
const PACKED_ALONE: f64 = 1.15;
/// Where the guest is as fast as the link, coalescing still lets what is owed fall by about this share of the link.
const LEAST_GAIN: f64 = 0.1;

/// A guest's memory as a look from outside found it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MemorySample {
    /// Pages that travel.
    pub pages: u64,
    /// Share of the pages that are zero, 0 to 1.
    pub zero_share: f64,
    /// Encoded bytes of a page that isn't zero and goes for the first time.
    pub whole_bytes: f64,
    /// Encoded bytes of a page that changed, as a delta against what it was `delta_age_ms` before.
    pub delta_bytes: f64,
    /// See `delta_bytes`.
    pub delta_age_ms: f64,
    /// How the guest writes.
    pub dirtying: Dirtying,
}

/// The way to the target.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// What it carries, the operator's limit included, bytes per second; more than 0.
    pub rate_bytes_per_second: f64,
    /// There and back.
    pub round_trip_ms: f64,
}

/// How the source goes about it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// When to stop the guest.
    pub gate: GateSettings,
    /// Memory for bases of deltas.
    pub base_bytes: u64,
}

/// What a migration will come to, most likely.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// From the worker's start to the machine running at the target.
    pub total_ms: f64,
    /// Payload on the wire.
    pub wire_bytes: f64,
    /// STOP to RESUME, if the gate waits for the best pause to be had.
    pub downtime_ms: f64,
    /// The share of its speed to which the guest has to be slowed for the pause to meet the target; 1 where it does
    /// anyway, `None` where no throttle helps.
    pub share_to_meet: Option<f64>,
}

impl MemorySample {
    /// The same guest at a share of its speed.
    fn slowed(&self, share: f64) -> Self {
        let warm_pages_per_second = self.dirtying.warm_pages_per_second * share;
        Self { dirtying: Dirtying { warm_pages_per_second, ..self.dirtying }, ..*self }
    }

    /// Encoded bytes of everything, once.
    fn first_bytes(&self) -> f64 {
        let pages = self.pages as f64;
        let zero_pages = pages * self.zero_share.clamp(0.0, 1.0);
        (pages - zero_pages) * self.whole_bytes + zero_pages * ZERO_PAGE_BYTES
    }

    /// The share of the pages sent in the first pass of which the source still has what it sent when it is over, so that a
    /// delta can be made.
    fn kept_share(&self, base_bytes: u64) -> f64 {
        let kept_bytes = (self.whole_bytes * PACKED_ALONE).min(BLOCK_BYTES as f64);
        let full_bytes = self.pages as f64 * (1.0 - self.zero_share) * kept_bytes;
        if full_bytes > 0.0 { (base_bytes as f64 / full_bytes).min(1.0) } else { 1.0 }
    }

    /// Encoded bytes of what a time of `ms` leaves dirty. Of a page that is written again the delta grows, since writes
    /// seldom hit the same bytes, up to what the whole page takes.
    fn dirty_bytes(&self, ms: f64) -> f64 {
        let sampled_hits = self.dirtying.writes_a_page(self.delta_age_ms);
        let growth = self.dirtying.writes_a_page(ms) / sampled_hits.max(1.0);
        self.dirtying.distinct_pages(ms)
            * (self.delta_bytes * growth).min(self.whole_bytes.max(self.delta_bytes))
    }
}

/// Foresees a migration of this memory over this link.
///
/// ```
/// use godwit_migration::{forecast::{Dirtying, Link, MemorySample, Plan, course}, predict::Learned, stop::GateSettings};
///
/// let memory = MemorySample {
///     pages: 131_072,
///     zero_share: 0.6,
///     whole_bytes: 2_000.0,
///     delta_bytes: 150.0,
///     delta_age_ms: 1_000.0,
///     dirtying: Dirtying { hot_pages: 100.0, warm_pages: 32_768.0, warm_pages_per_second: 3_000.0 },
/// };
/// let link = Link { rate_bytes_per_second: 12_000_000.0, round_trip_ms: 20.0 };
/// let plan = Plan { gate: GateSettings::new(50.0), base_bytes: 128 << 20 };
/// let course = course(&memory, &link, &plan, &Learned::default());
/// assert!((8_000.0..12_000.0).contains(&course.total_ms));
/// assert!(course.downtime_ms < 50.0);
/// ```
pub fn course(memory: &MemorySample, link: &Link, plan: &Plan, learned: &Learned) -> Course {
    let gate = &plan.gate;
    let rate = (link.rate_bytes_per_second / 1e3).max(f64::MIN_POSITIVE);
    let first_bytes = memory.first_bytes();
    let first_ms = first_bytes / (rate * USED_OF_RATE);
    // A page is sent at any time of the first pass, so it had half of it to be written again, on average.
    let kept = memory.kept_share(plan.base_bytes);
    let whole = memory.dirtying.distinct_pages(first_ms / 2.0) * memory.whole_bytes.max(memory.delta_bytes);
    let owed_bytes = kept * memory.dirty_bytes(first_ms / 2.0) + (1.0 - kept) * whole;
    let pause_ms = |memory_bytes: f64| {
        (memory_bytes + learned.device_state_bytes) / rate + learned.fixed_ms + link.round_trip_ms / 2.0
    };

    let least_owed = |memory: &MemorySample| least_owed_bytes(memory, rate, learned.decision_to_stop_ms);
    let least_owed_bytes = least_owed(memory);
    let downtime_ms = pause_ms(least_owed_bytes);
    let meets = |share: f64| pause_ms(least_owed(&memory.slowed(share))) <= gate.target_ms;
    let dirtied = memory.dirtying.warm_pages_per_second / 1e3 * memory.delta_bytes;
    let gain = (rate * USED_OF_RATE - dirtied).max(rate * LEAST_GAIN);
    let patience_ms = gate.patience_ms as f64;
    let drain_ms = (owed_bytes / gain).min(patience_ms * Gate::PATIENCES as f64);
    let wait_ms = if downtime_ms <= gate.target_ms { gate.settle_ms as f64 } else { patience_ms };
    let meanwhile_bytes = (owed_bytes + dirtied * (drain_ms + wait_ms)).min(rate * (drain_ms + wait_ms));

    let preparing_ms = PREPARING_MS + PREPARING_ROUND_TRIPS * link.round_trip_ms;
    Course {
        total_ms: preparing_ms + first_ms + drain_ms + wait_ms + downtime_ms,
        wire_bytes: first_bytes + meanwhile_bytes + least_owed_bytes + learned.device_state_bytes,
        downtime_ms,
        share_to_meet: greatest_share(meets),
    }
}

/// The greatest share, to a hundredth, at which it holds what holds at all smaller ones too.
fn greatest_share(holds: impl Fn(f64) -> bool) -> Option<f64> {
    let mut shares = (0..=100).rev().map(|hundredths| f64::from(hundredths) / 100.0);
    shares.find(|share| holds(*share))
}

/// The least that is ever owed when the guest stops: what it writes between the last look and the stop, or, where it is
/// faster than the link, what it writes in the time that sending just that takes.
fn least_owed_bytes(memory: &MemorySample, rate: f64, decision_to_stop_ms: f64) -> f64 {
    let (mut enough_ms, mut too_long_ms) = (0.0, memory.dirty_bytes(f64::MAX.sqrt()) / rate);
    for _ in 0..60 {
        let middle_ms = f64::midpoint(enough_ms, too_long_ms);
        // The longer the time, the fewer new pages it brings: once sending takes less, it always does.
        if memory.dirty_bytes(middle_ms) > middle_ms * rate {
            enough_ms = middle_ms
        } else {
            too_long_ms = middle_ms
        }
    }
    (enough_ms * rate).max(memory.dirty_bytes(NEAR_PASS_MS / 2.0 + decision_to_stop_ms))
}

#[cfg(test)]
mod tests;
