//! Synthetic traces: the real mover and predictor over a guest that writes at random, in virtual time.
//!
//! A guest of 512 MB has a working set after which come 20,000 blocks that hold something and are never written;
//! the rest is zero. It writes `writes_per_second` times to a block of the working set drawn at random, each time
//! changing `write_bytes` of it; what a resent block takes is the bytes changed since it was last sent, times
//! `compressed`, plus a header, at most a whole block. With `bursts` it writes five times as often or not at all, by
//! turns, each for a random time between 0.2 and 1.5 s.
//!
//! Every 10 ms the link carries its share of bytes; every 100 ms dirty blocks are named and a sample is taken. Nothing
//! stops the guest: a trace shows what a policy would have seen, and policies only look.

use godwit_migration::{
    BlockId,
    mover::{Mover, Settings},
    predict::{Backlog, Learned, Predictor},
    stop::Sample,
};

const BLOCKS: u64 = 131_072;
const IDLE_BLOCKS: u64 = 20_000;
const BLOCK_BYTES: u64 = 4_096;
const TICK_MS: u64 = 10;
const PASS_MS: u64 = 100;
const ROUND_TRIP_MS: f64 = 20.0;

/// A guest and a link, after the workloads that QEMU was measured with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) working_set_blocks: u64,
    pub(crate) writes_per_second: u64,
    pub(crate) write_bytes: u64,
    /// What compression leaves of changed bytes.
    pub(crate) compressed: f64,
    pub(crate) bursts: bool,
    pub(crate) rate_bytes_per_second: u64,
    pub(crate) duration_ms: u64,
}

const LIGHT: Workload = Workload {
    name: "light",
    working_set_blocks: 16_384,
    writes_per_second: 500,
    write_bytes: 64,
    compressed: 1.0,
    bursts: false,
    rate_bytes_per_second: 12_500_000,
    duration_ms: 30_000,
};

pub(crate) const WORKLOADS: [Workload; 5] = [
    LIGHT,
    Workload {
        name: "medium",
        working_set_blocks: 32_768,
        writes_per_second: 3_000,
        write_bytes: 128,
        ..LIGHT
    },
    Workload {
        name: "heavy",
        working_set_blocks: 32_768,
        writes_per_second: 8_000,
        write_bytes: 512,
        compressed: 0.8,
        ..LIGHT
    },
    Workload {
        name: "harsh",
        working_set_blocks: 65_536,
        writes_per_second: 20_000,
        write_bytes: 1_024,
        ..LIGHT
    },
    Workload {
        name: "bursts",
        working_set_blocks: 32_768,
        writes_per_second: 8_000,
        write_bytes: 512,
        compressed: 0.8,
        bursts: true,
        ..LIGHT
    },
];

/// The samples of one migration that is never stopped.
pub(crate) fn generate(workload: &Workload, seed: u64) -> Vec<Sample> {
    drive(workload, seed, |_| Some(100))
}

/// The samples of a migration whose guest runs at the share of its speed, in percent, that each sample leads to, until
/// one leads to its end.
pub(crate) fn drive(
    workload: &Workload,
    seed: u64,
    mut decide: impl FnMut(&Sample) -> Option<u64>,
) -> Vec<Sample> {
    let mut run = Run::new(workload, seed);
    let mut samples = Vec::new();
    for tick in 1..=workload.duration_ms / TICK_MS {
        let now_ms = tick * TICK_MS;
        run.guest_writes(now_ms);
        if now_ms.is_multiple_of(PASS_MS) {
            run.pass(now_ms);
        }
        run.link_carries();
        if now_ms.is_multiple_of(PASS_MS) {
            samples.push(run.sample(now_ms));
            match decide(&run.sample(now_ms)) {
                Some(share_percent) => run.share_percent = share_percent,
                None => break,
            }
        }
    }
    samples
}

struct Run {
    workload: Workload,
    random: u64,
    mover: Mover,
    predictor: Predictor,
    writes_since_sent: Vec<u16>,
    dirty: Vec<u64>,
    is_dirty: Vec<bool>,
    passes: u64,
    factor: u64,
    share_percent: u64,
    phase_ends_ms: u64,
    /// Bytes that the link may still carry; below zero while a batch is longer than a tick.
    credit_bytes: i64,
}

impl Run {
    fn new(workload: &Workload, seed: u64) -> Self {
        let mut mover = Mover::new(BLOCKS, Settings::default());
        mover.owe_many((0..BLOCKS).map(BlockId)).expect("these blocks exist");
        let mut predictor = Predictor::new(Learned::default());
        predictor.observe_link(workload.rate_bytes_per_second as f64, ROUND_TRIP_MS);
        Self {
            workload: *workload,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            mover,
            predictor,
            writes_since_sent: vec![0; BLOCKS as usize],
            dirty: Vec::new(),
            is_dirty: vec![false; BLOCKS as usize],
            passes: 0,
            factor: if workload.bursts { 5 } else { 1 },
            share_percent: 100,
            phase_ends_ms: 0,
            credit_bytes: 0,
        }
    }

    /// xorshift64: the trace depends on the seed and on nothing else.
    fn random_below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    fn guest_writes(&mut self, now_ms: u64) {
        if self.workload.bursts && now_ms >= self.phase_ends_ms {
            self.phase_ends_ms = now_ms + 200 + self.random_below(1_300);
            self.factor = 5 - self.factor;
        }
        let writes_per_second = self.workload.writes_per_second * self.factor * self.share_percent / 100;
        for _ in 0..writes_per_second * TICK_MS / 1_000 {
            let block = self.random_below(self.workload.working_set_blocks);
            let writes = &mut self.writes_since_sent[block as usize];
            *writes = writes.saturating_add(1);
            if !std::mem::replace(&mut self.is_dirty[block as usize], true) {
                self.dirty.push(block);
            }
        }
    }

    fn pass(&mut self, now_ms: u64) {
        for block in std::mem::take(&mut self.dirty) {
            self.is_dirty[block as usize] = false;
            self.mover.owe(BlockId(block)).expect("the working set is part of the guest");
        }
        self.mover.next_pass();
        self.passes += 1;
        self.predictor.observe_dirtying(now_ms, self.mover.statistics().rewritten);
    }

    fn link_carries(&mut self) {
        self.credit_bytes += (self.workload.rate_bytes_per_second * TICK_MS / 1_000) as i64;
        let mut batch = Vec::new();
        while self.credit_bytes > 0 {
            batch.clear();
            let taken = self.mover.take(64, &mut batch);
            if batch.is_empty() {
                // What the link didn't carry is lost.
                self.credit_bytes = 0;
                return;
            }
            let again = taken.first_time == 0;
            let bytes: u64 = batch.iter().map(|version| self.encoded_bytes(version.id.0, again)).sum();
            self.predictor.observe_batch(taken.first_time, taken.again, bytes);
            self.credit_bytes -= bytes as i64;
        }
    }

    /// What a block takes; batches of both kinds are so rare that their blocks count as new.
    fn encoded_bytes(&mut self, block: u64, again: bool) -> u64 {
        let writes = std::mem::take(&mut self.writes_since_sent[block as usize]);
        if block >= self.workload.working_set_blocks + IDLE_BLOCKS {
            return 2;
        }
        if !again {
            return 1_200 + self.random_below(1_000);
        }
        let changed = (u64::from(writes) * self.workload.write_bytes).min(BLOCK_BYTES);
        16 + (changed as f64 * self.workload.compressed) as u64
    }

    fn sample(&self, now_ms: u64) -> Sample {
        let (owed, never_sent) = (self.mover.owed_blocks(), self.mover.never_sent_blocks());
        let statistics = self.mover.statistics();
        let backlog =
            Backlog { first_time_blocks: never_sent, again_blocks: owed - never_sent, ..Backlog::default() };
        Sample {
            now_ms,
            pass: self.passes,
            owed_blocks: owed,
            never_sent_blocks: never_sent,
            owed_encoded_bytes: self.predictor.owed_bytes(&backlog) as u64,
            in_flight_bytes: 0,
            sent_blocks: statistics.sent,
            dirtied_blocks: statistics.rewritten - statistics.coalesced,
            rate_bytes_per_second: self.predictor.rate_bytes_per_second() as u64,
            dirty_bytes_per_second: self.predictor.dirty_bytes_per_second() as u64,
            predicted_pause_ms: self.predictor.pause(&backlog).total_ms(),
        }
    }
}
