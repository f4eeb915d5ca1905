//! When to stop the guest.
//!
//! A policy sees one [`Sample`] after another and answers with a [`Verdict`]. It decides nothing twice: after
//! [`Verdict::Stop`] it isn't asked again. `docs/stopping.md` argues both policies and their constants from traces.

use std::collections::VecDeque;

/// One observation of a running migration.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// Time since the migration began.
    pub now_ms: u64,
    /// Passes over the guest's memory so far.
    pub pass: u64,
    /// Blocks owed.
    pub owed_blocks: u64,
    /// Of these, blocks that the target never had in any version.
    pub never_sent_blocks: u64,
    /// What the owed blocks would take when encoded.
    pub owed_encoded_bytes: u64,
    /// Encoded bytes handed to the transport and not yet acknowledged.
    pub in_flight_bytes: u64,
    /// Versions sent so far.
    pub sent_blocks: u64,
    /// Versions of blocks that became owed again so far; a version that only replaced another one that was still
    /// owed doesn't count.
    pub dirtied_blocks: u64,
    /// Measured rate of the link.
    pub rate_bytes_per_second: u64,
    /// Rate at which the guest writes, as deltas.
    pub dirty_bytes_per_second: u64,
    /// The pause if the guest were stopped now.
    pub predicted_pause_ms: f64,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// Let the guest run.
    Continue,
    /// Let the guest run, but say that time alone won't help.
    Stalled {
        /// The pause if the guest were stopped now.
        predicted_pause_ms: f64,
    },
    /// Stop the guest.
    Stop {
        /// Why now.
        reason: StopReason,
    },
}

/// Why the guest is stopped now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The predicted pause meets the target.
    TargetMet,
    /// The target can't be met; this is about the best pause to be had.
    LocalMinimum,
    /// Fewer blocks are owed at the start of this iteration than at any in the window (CloudNet, 6.4.2.1).
    WindowMinimum,
    /// The limit of iterations is reached.
    IterationLimit,
}

/// Decides when to stop the guest.
pub trait StopPolicy: Send {
    /// Looks at the newest sample. Samples come in the order of their times, several a second.
    fn observe(&mut self, sample: &Sample) -> Verdict;

    /// The time after which even a guest that outruns its link is as good as stopped; `None` if the policy knows none yet.
    fn patience_ends_ms(&self) -> Option<u64> {
        None
    }
}

/// What the [`Gate`] aims at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateSettings {
    /// The longest pause that is wanted.
    pub target_ms: f64,
    /// How long to wait for a shorter pause after the shortest so far, while the target isn't met.
    pub patience_ms: u64,
    /// The same when it is. What is owed drains at the rate of the link, so that a moment of total time buys as much
    /// downtime; the pauses of a guest that goes on alike differ little after a few passes.
    pub settle_ms: u64,
}

impl GateSettings {
    /// A gate for this target with the default patience of 3 s, or 150 ms when it is met.
    pub fn new(target_ms: f64) -> Self {
        Self { target_ms, patience_ms: 3_000, settle_ms: 150 }
    }
}

/// Stops at about the shortest pause to be had: soon, if it meets the target; after some patience, if not.
///
/// Nothing is decided while the target lacks blocks that it never had: what such a block takes is a guess, so a
/// prediction with many of them isn't to be relied on. Their number only falls, and the mover sends them first.
///
/// After that, the gate remembers the shortest pause predicted lately (in the last four patiences) and when it was. As
/// long as shorter ones (by 5 % at least) keep coming within its patience of each other, there is something to wait for;
/// its patience is `settle_ms` where the target is met, and `patience_ms` where it isn't. Then the gate takes what it can
/// get: a pause no longer than `shortest × (1 + overdue / patience)`, where `overdue` is the time since patience ended.
/// The price that it is ready to pay begins at the minimum and rises without limit, so that a stop is certain; with a
/// guest that has a fixed working set it comes within a patience or two. What is older than four patiences is forgotten,
/// because a guest that has changed since then won't be had at that price again.
#[derive(Debug, Clone)]
pub struct Gate {
    settings: GateSettings,
    /// The shortest lately, and behind it what will be once it is forgotten: longer and longer, later and later.
    shortest: VecDeque<Pause>,
    /// When there was first something to decide.
    began_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Pause {
    predicted_ms: f64,
    at_ms: u64,
}

impl Gate {
    /// How much shorter a pause has to be for patience to begin again.
    const WORTH_WAITING: f64 = 0.95;
    /// After so many patiences in all, even a new shortest pause doesn't make it wait anew. One is remembered for as long.
    pub(crate) const PATIENCES: u64 = 4;

    /// A gate that has seen nothing.
    pub fn new(settings: GateSettings) -> Self {
        Self { settings, shortest: VecDeque::new(), began_ms: None }
    }

    /// Takes note of a pause; returns the shortest lately, unless it is this one.
    fn shorter_than(&mut self, newest: Pause) -> Option<Pause> {
        let memory_ms = self.settings.patience_ms * Self::PATIENCES;
        while self.shortest.front().is_some_and(|pause| pause.at_ms + memory_ms < newest.at_ms) {
            self.shortest.pop_front();
        }
        let first = self.shortest.front().copied();
        let shortest = first.filter(|first| newest.predicted_ms >= first.predicted_ms * Self::WORTH_WAITING);
        // The first may be a little longer than this one.
        let kept = usize::from(shortest.is_some());
        while self.shortest.len() > kept
            && self.shortest.back().is_some_and(|pause| pause.predicted_ms >= newest.predicted_ms)
        {
            self.shortest.pop_back();
        }
        self.shortest.push_back(newest);
        shortest
    }

    fn accepts(&mut self, newest: Pause, shortest: Pause, patience_ms: u64) -> bool {
        let began_ms = *self.began_ms.get_or_insert(newest.at_ms);
        let overdue_since = (shortest.at_ms + patience_ms).min(began_ms + patience_ms * Self::PATIENCES);
        let Some(overdue_ms) = newest.at_ms.checked_sub(overdue_since) else {
            return false;
        };
        let premium = overdue_ms as f64 / patience_ms.max(1) as f64;
        newest.predicted_ms <= shortest.predicted_ms * (1.0 + premium)
    }
}

impl StopPolicy for Gate {
    fn observe(&mut self, sample: &Sample) -> Verdict {
        if sample.never_sent_blocks == 0 {
            let (patience_ms, reason) = if sample.predicted_pause_ms <= self.settings.target_ms {
                (self.settings.settle_ms, StopReason::TargetMet)
            } else {
                (self.settings.patience_ms, StopReason::LocalMinimum)
            };
            let newest = Pause { predicted_ms: sample.predicted_pause_ms, at_ms: sample.now_ms };
            if let Some(shortest) = self.shorter_than(newest)
                && self.accepts(newest, shortest, patience_ms)
            {
                return Verdict::Stop { reason };
            }
        }
        if sample.rate_bytes_per_second > 0 && sample.dirty_bytes_per_second > sample.rate_bytes_per_second {
            return Verdict::Stalled { predicted_pause_ms: sample.predicted_pause_ms };
        }
        Verdict::Continue
    }

    fn patience_ends_ms(&self) -> Option<u64> {
        self.began_ms.map(|began_ms| began_ms + self.settings.patience_ms * Self::PATIENCES)
    }
}

/// Constants of [`SmartStop`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmartStopSettings {
    /// Iterations in which the number of owed blocks has to be a minimum.
    pub window: usize,
    /// Iterations after which the guest is stopped in any case; Xen's limit, which the dissertation names, is 30.
    pub iteration_limit: u32,
    /// The shortest iteration. A migration that keeps up would otherwise begin one with every sample.
    pub shortest_iteration_ms: u64,
}

impl Default for SmartStopSettings {
    fn default() -> Self {
        Self { window: 8, iteration_limit: 30, shortest_iteration_ms: 200 }
    }
}

/// CloudNet's Smart Stop and Copy (Wood, 6.4.2.1).
///
/// An *iteration* begins with a number of owed blocks and ends when that many have been sent. The first stage waits
/// until an iteration dirties as many blocks as it sends: up to there another iteration is a clear gain. The second
/// stage stops at the first iteration that begins with fewer owed blocks than any of the `window` before it, or with
/// none.
#[derive(Debug, Clone)]
pub struct SmartStop {
    settings: SmartStopSettings,
    iteration: Option<Iteration>,
    iterations: u32,
    crossed: bool,
    /// Blocks owed at the start of the newest iterations.
    window: VecDeque<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Iteration {
    began_ms: u64,
    owed_blocks: u64,
    sent_blocks: u64,
    dirtied_blocks: u64,
}

impl Iteration {
    fn begin(sample: &Sample) -> Self {
        Self {
            began_ms: sample.now_ms,
            owed_blocks: sample.owed_blocks,
            sent_blocks: sample.sent_blocks,
            dirtied_blocks: sample.dirtied_blocks,
        }
    }
}

impl SmartStop {
    /// A policy that has seen nothing.
    pub fn new(settings: SmartStopSettings) -> Self {
        Self { settings, iteration: None, iterations: 0, crossed: false, window: VecDeque::new() }
    }

    /// Judges the iteration that ends with `sample`.
    fn end_iteration(&mut self, ended: Iteration, sample: &Sample) -> Verdict {
        self.iterations += 1;
        let sent = sample.sent_blocks - ended.sent_blocks;
        let dirtied = sample.dirtied_blocks - ended.dirtied_blocks;
        self.crossed |= dirtied >= sent;
        if self.window.len() >= self.settings.window {
            self.window.pop_front();
        }
        self.window.push_back(ended.owed_blocks);
        let is_full = self.window.len() >= self.settings.window;
        let is_minimum = is_full && self.window.iter().all(|&owed| sample.owed_blocks < owed);
        if self.crossed && (is_minimum || sample.owed_blocks == 0) {
            return Verdict::Stop { reason: StopReason::WindowMinimum };
        }
        if self.iterations >= self.settings.iteration_limit {
            return Verdict::Stop { reason: StopReason::IterationLimit };
        }
        Verdict::Continue
    }
}

impl StopPolicy for SmartStop {
    fn observe(&mut self, sample: &Sample) -> Verdict {
        let iteration = *self.iteration.get_or_insert(Iteration::begin(sample));
        let all_sent = sample.sent_blocks - iteration.sent_blocks >= iteration.owed_blocks;
        let lasted_ms = sample.now_ms.saturating_sub(iteration.began_ms);
        if !all_sent || lasted_ms < self.settings.shortest_iteration_ms {
            return Verdict::Continue;
        }
        self.iteration = Some(Iteration::begin(sample));
        self.end_iteration(iteration, sample)
    }
}
