//! How a migration ends at its source: what is reported, learned and put back.

use std::time::Duration;

use godwit_migration::{handover::Outcome, predict};
use godwit_qemu::memory::ProcessMemory;

use super::{Control, StageObservation, learned};
use crate::{
    job::{self, Happening, Phase},
    worker::{WorkerError, account::pause_by_both_clocks},
};

/// How long saying goodbye to the target may take.
const GOODBYE: Duration = Duration::from_secs(2);

impl Control<'_> {
    pub(super) async fn end(mut self) -> Result<(), WorkerError> {
        self.brake.release();
        self.fill_in();
        match self.outcome.take() {
            Some(Outcome::HandedOver { resumed_unix_us }) => self.handed_over(resumed_unix_us),
            Some(Outcome::Unsettled) => {
                self.draft
                    .unsettled(format!("the token left for {} and no answer came; ask there", self.job.peer));
            }
            Some(Outcome::TakenBack { reason } | Outcome::Died { reason } | Outcome::Refused { reason }) => {
                self.guest.put_back().await?;
                let outcome = if self.cancelled { job::Outcome::Cancelled } else { job::Outcome::Failed };
                self.draft.taken_back(outcome, reason);
            }
            Some(Outcome::Taken) | None => {}
        }
        self.threads.pace.close();
        self.threads.stage.close();
        // What the target still has to know is on its way; whether it arrives doesn't change how this ended.
        if !self.target_is_gone && !self.session_over {
            let _ = tokio::time::timeout(GOODBYE, self.session.close()).await;
        }
        self.journal.say(Happening::Phase { phase: Phase::Done });
        Ok(())
    }

    fn fill_in(&mut self) {
        let stats = self.session.stats();
        let mover = StageObservation::of(&self.threads.stage.lock());
        self.draft.techniques(&self.threads.account.tally());
        let report = &mut self.draft.report;
        report.wire_bytes = stats.wire_bytes;
        report.reconnections = stats.reconnections;
        report.repeated_bytes = stats.repeated_bytes;
        report.round_trip_ms = stats.min_rtt.map(|time| time.as_secs_f64() * 1e3);
        report.device_state_bytes = self.threads.account.stream_bytes();
        report.throttled_ms = self.brake.slowed_ms();
        report.passes = self.threads.pace.passes();
        report.versions_named = mover.named;
        report.versions_coalesced = mover.coalesced;
        if self.stop.stopped_at.is_some() {
            report.pages_in_pause = mover.sent - self.stop.sent_before;
        }
    }

    fn handed_over(&mut self, resumed_unix_us: Option<u64>) {
        self.draft.completed();
        let report = &mut self.draft.report;
        report.resumed_unix_ms = resumed_unix_us.map(|resumed| resumed / 1_000);
        if let Some(stopped_at) = self.stop.stopped_at {
            let heard_ms = stopped_at.elapsed().as_secs_f64() * 1e3;
            let travel_ms = report.round_trip_ms.unwrap_or_default() / 2.0;
            report.pages_verified = self.threads.verify.as_ref().map(ProcessMemory::pages);
            report.downtime_source_ms = Some(heard_ms - travel_ms);
            if let (Some(stopped), Some(resumed)) = (self.stop.stopped_unix_us, resumed_unix_us) {
                report.downtime_ms = pause_by_both_clocks(stopped, resumed, heard_ms);
                if report.downtime_ms.is_none() {
                    self.journal.warn(format!(
                        "the clocks of {} and {} differ; the pause is told by this one alone",
                        self.job.host, self.job.peer
                    ));
                }
            }
        }
        self.learn();
    }

    /// Keeps what this pause taught for the next migration to this peer.
    fn learn(&mut self) {
        let (Some(pause_ms), Some(opened), Some(stopped)) =
            (self.draft.report.downtime_source_ms, self.stop.gate_opened, self.stop.stopped_at)
        else {
            return;
        };
        let (acked_before, stream_before) = self.stop.carried_before;
        let device_state_bytes = self.threads.account.stream_bytes() - stream_before;
        let carried = self.session.stats().acked_bytes - acked_before;
        let learned = self.pilot.pause_was(&predict::Outcome {
            pause_ms,
            memory_bytes: carried.saturating_sub(device_state_bytes),
            device_state_bytes,
            decision_to_stop_ms: (stopped - opened).as_secs_f64() * 1e3,
        });
        learned::save(self.job.learned.as_deref(), &learned);
    }
}
