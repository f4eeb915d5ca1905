//! Puts what the parts measured together for the stop policy, and what it says into words for the operator.
//!
//! No clock and no I/O: times and counts come in, a [`Course`] comes out.

use std::time::Duration;

use godwit_content::{Interval, LevelGovernor, Tried};
use godwit_migration::{
    mover::Taken,
    predict::{Backlog, Learned, Outcome, Predictor},
    stall::{OnStall, Prices, Ruling, Stall},
    stop::{Gate, GateSettings, Sample, SmartStop, SmartStopSettings, StopPolicy, Verdict},
};

use super::{sender::Efforts, stage::Stage};
use crate::job::{self, Job, Options, Progress, StopPolicyName};

/// While the pause would be longer than this many targets, passes are rare; below, they are frequent, so that little is
/// unseen when the guest stops.
const NEAR_TARGETS: f64 = 4.0;
/// Between passes while the target lacks pages that it never had, so that nothing can be decided. Each time it is read from, a QEMU with little to say makes some hundreds of
/// passes before the socket is full again: at ten times a second that took a seventh of a core from an idle guest's host.
const FAR_PASS_PERIOD_MS: u64 = 300;
/// Between passes from then on. What was written since the last pass is part of the predicted pause, so longer periods
/// would make the prediction swing, and a policy that looks for a minimum wait for the bottom of the swing.
const PASS_PERIOD_MS: u64 = 100;
/// Between passes when the stop is near.
const NEAR_PASS_PERIOD_MS: u64 = 25;

/// How often the level of compression is thought over.
const LEVEL_PERIOD_MS: u64 = 500;

/// What the link did so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LinkObservation {
    /// Whether anything is heard of the target.
    pub(super) is_there: bool,
    pub(super) wire_bytes: u64,
    pub(super) acked_bytes: u64,
    /// Sent and not acknowledged, and drafted and not sent.
    pub(super) in_flight_bytes: u64,
    pub(super) rate_bytes_per_second: Option<u64>,
    /// What the operator allows.
    pub(super) limit_bytes_per_second: Option<u64>,
    pub(super) round_trip_ms: Option<f64>,
    /// What sending has cost so far.
    pub(super) efforts: Efforts,
}

/// What the mover says, copied while its lock was held.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StageObservation {
    pub(super) owed_blocks: u64,
    pub(super) never_sent_blocks: u64,
    /// Of these, blocks that were zero when QEMU named them; they cost nearly nothing.
    pub(super) zero_blocks: u64,
    pub(super) rewritten: u64,
    pub(super) coalesced: u64,
    pub(super) named: u64,
    pub(super) sent: u64,
}

impl StageObservation {
    pub(super) fn of(stage: &Stage) -> Self {
        let (mover, statistics) = (&stage.mover, stage.mover.statistics());
        Self {
            owed_blocks: mover.owed_blocks() + stage.embargoed(),
            never_sent_blocks: mover.never_sent_blocks(),
            zero_blocks: stage.zero_blocks(),
            rewritten: statistics.rewritten,
            coalesced: statistics.coalesced,
            named: statistics.named,
            sent: statistics.sent,
        }
    }
}

/// What to do until the next look.
#[derive(Debug, Clone)]
pub(super) struct Course {
    pub(super) ruling: Ruling,
    /// What each way out of a stall would cost, when that is news.
    pub(super) prices: Option<Prices>,
    pub(super) pass_period_ms: u64,
    /// zstd's, for batches to come.
    pub(super) level: i32,
    pub(super) progress: Progress,
}

/// Decides how the pre-copy goes on.
pub(super) struct Pilot {
    policy: Box<dyn StopPolicy>,
    stall: Stall,
    predictor: Predictor,
    effort_watch: EffortWatch,
    target_ms: f64,
    pages_total: u64,
    passes: u64,
    last_pass_ms: u64,
}

impl Pilot {
    /// A pilot that has seen nothing.
    pub(super) fn new(options: &Options, learned: Learned, pages_total: u64, level: LevelGovernor) -> Self {
        let target_ms = options.downtime_target_ms as f64;
        let policy: Box<dyn StopPolicy> = match options.stop_policy {
            StopPolicyName::Gate => Box::new(Gate::new(GateSettings::new(target_ms))),
            StopPolicyName::SmartStop => Box::new(SmartStop::new(SmartStopSettings::default())),
        };
        Self {
            policy,
            stall: Stall::new(options.on_stall.into(), target_ms),
            predictor: Predictor::new(learned),
            effort_watch: EffortWatch { governor: level, ..EffortWatch::default() },
            target_ms,
            pages_total,
            passes: 0,
            last_pass_ms: 0,
        }
    }

    /// Takes the operator's choice for a target that can't be met.
    pub(super) fn choose(&mut self, choice: OnStall) {
        self.stall.choose(choice);
    }

    /// What is done when the target can't be met.
    pub(super) fn on_stall(&self) -> OnStall {
        self.stall.choice()
    }

    /// Learns what blocks of a batch took.
    pub(super) fn batch_left(&mut self, taken: Taken, encoded_bytes: u64) {
        self.predictor.observe_batch(taken.first_time, taken.again, encoded_bytes);
    }

    /// Learns from the pause that has happened; returns what is known now.
    pub(super) fn pause_was(&mut self, outcome: &Outcome) -> Learned {
        self.predictor.observe_outcome(outcome);
        self.predictor.learned()
    }

    /// Looks at the state of things `now_ms` after the beginning, when QEMU has made `passes` passes.
    pub(super) fn look(
        &mut self,
        now_ms: u64,
        passes: u64,
        stage: &StageObservation,
        link: &LinkObservation,
    ) -> Course {
        if passes != self.passes {
            self.passes = passes;
            self.last_pass_ms = now_ms;
            self.predictor.observe_dirtying(now_ms, stage.rewritten);
        }
        // Before the link was ever full, what it delivered is the least that it can.
        let delivered = link.acked_bytes as f64 * 1e3 / now_ms.max(1) as f64;
        let measured = link.rate_bytes_per_second.map_or(delivered, |rate| rate as f64);
        let rate = link.limit_bytes_per_second.map_or(measured, |limit| measured.min(limit as f64));
        self.predictor.observe_link(rate, link.round_trip_ms.unwrap_or_default());
        let backlog = Backlog {
            first_time_blocks: stage.never_sent_blocks.saturating_sub(stage.zero_blocks),
            again_blocks: stage.owed_blocks - stage.never_sent_blocks,
            in_flight_bytes: link.in_flight_bytes,
            unseen_ms: now_ms - self.last_pass_ms,
        };
        let sample = self.sample(now_ms, stage, link, &backlog);
        tracing::trace!(?sample);
        // Until QEMU has named everything once, what is owed says nothing.
        let verdict = if passes == 0 { Verdict::Continue } else { self.policy.observe(&sample) };
        let (ruling, prices) = if link.is_there {
            self.stall.observe(&sample, verdict)
        } else {
            // What the policy said was of a link that carries.
            self.stall.link_is_silent();
            (Ruling::Run(self.stall.share()), None)
        };
        Course {
            ruling,
            prices,
            pass_period_ms: self.pass_period_ms(&sample),
            level: self.effort_watch.level(now_ms, stage.owed_blocks > 0, link.efforts),
            progress: self.progress(&sample, stage, link, &backlog),
        }
    }

    fn pass_period_ms(&self, sample: &Sample) -> u64 {
        if sample.never_sent_blocks > 0 {
            FAR_PASS_PERIOD_MS
        } else if sample.predicted_pause_ms > self.target_ms * NEAR_TARGETS {
            PASS_PERIOD_MS
        } else {
            NEAR_PASS_PERIOD_MS
        }
    }

    fn sample(
        &self,
        now_ms: u64,
        stage: &StageObservation,
        link: &LinkObservation,
        backlog: &Backlog,
    ) -> Sample {
        Sample {
            now_ms,
            pass: self.passes,
            owed_blocks: stage.owed_blocks,
            never_sent_blocks: stage.never_sent_blocks,
            owed_encoded_bytes: self.predictor.owed_bytes(backlog) as u64,
            in_flight_bytes: link.in_flight_bytes,
            sent_blocks: stage.sent,
            dirtied_blocks: stage.rewritten - stage.coalesced.min(stage.rewritten),
            rate_bytes_per_second: self.predictor.rate_bytes_per_second() as u64,
            dirty_bytes_per_second: self.predictor.dirty_bytes_per_second() as u64,
            predicted_pause_ms: self.predictor.pause(backlog).total_ms(),
        }
    }

    fn progress(
        &self,
        sample: &Sample,
        stage: &StageObservation,
        link: &LinkObservation,
        backlog: &Backlog,
    ) -> Progress {
        let whole = |ms: f64| ms.is_finite().then_some(ms as u64);
        Progress {
            pages_settled: self.pages_total.saturating_sub(stage.owed_blocks),
            pages_total: self.pages_total,
            pages_owed: stage.owed_blocks,
            wire_bytes: link.wire_bytes,
            rate_bytes_per_second: sample.rate_bytes_per_second,
            dirty_pages_per_second: self.predictor.dirty_blocks_per_second() as u64,
            guest_share_percent: None,
            link_silent_ms: None,
            predicted_downtime_ms: whole(sample.predicted_pause_ms),
            predicted_remaining_ms: self.remaining_ms(sample, backlog).and_then(whole),
        }
    }

    /// Until the target is met or, where the guest is to be stopped above it, the policy's patience ends.
    fn remaining_ms(&self, sample: &Sample, backlog: &Backlog) -> Option<f64> {
        let until_met = self.predictor.remaining_ms(backlog, self.target_ms);
        let patience_ends_ms = self.policy.patience_ends_ms().filter(|_| self.on_stall() == OnStall::Switch);
        let until_stopped = patience_ends_ms
            .map(|ends_ms| ends_ms.saturating_sub(sample.now_ms) as f64 + sample.predicted_pause_ms);
        [until_met, until_stopped].into_iter().flatten().min_by(f64::total_cmp)
    }
}

/// Where the level of compression begins: at what the link calls for, if that was measured.
pub(super) fn first_level(job: &Job) -> LevelGovernor {
    let rate = job.forecast.as_ref().map(|forecast| forecast.rate_bytes_per_second);
    rate.map_or_else(LevelGovernor::default, LevelGovernor::for_link)
}

/// What sending has cost, in intervals in which there was always something to send.
#[derive(Default)]
struct EffortWatch {
    governor: LevelGovernor,
    since_ms: u64,
    before: Efforts,
}

impl EffortWatch {
    fn level(&mut self, now_ms: u64, is_busy: bool, now: Efforts) -> i32 {
        let elapsed_ms = now_ms - self.since_ms;
        if is_busy && elapsed_ms >= LEVEL_PERIOD_MS {
            self.governor.observe(&Interval {
                elapsed: Duration::from_millis(elapsed_ms),
                compressing: now.compressing.saturating_sub(self.before.compressing),
                waiting_for_link: now.waiting_for_link.saturating_sub(self.before.waiting_for_link),
                tried: Tried {
                    bytes: now.tried.bytes - self.before.tried.bytes,
                    bytes_above: now.tried.bytes_above - self.before.tried.bytes_above,
                },
            });
        }
        if !is_busy || elapsed_ms >= LEVEL_PERIOD_MS {
            self.since_ms = now_ms;
            self.before = now;
        }
        self.governor.level()
    }
}

impl From<job::OnStall> for OnStall {
    fn from(choice: job::OnStall) -> Self {
        match choice {
            job::OnStall::Wait => Self::Wait,
            job::OnStall::Throttle => Self::Throttle,
            job::OnStall::Switch => Self::Switch,
            job::OnStall::Cancel => Self::Cancel,
        }
    }
}
