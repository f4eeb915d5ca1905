//! The report of a migration while it is being filled in.

use std::time::Instant;

use godwit_content::Tally;
use nix::sys::resource::{UsageWho, getrusage};

use super::WorkerError;
use crate::{
    job::{Job, Outcome, Report, Techniques},
    output::one_line,
};

/// A report in the making; it becomes one when the worker ends.
pub(super) struct ReportDraft {
    began: Instant,
    pub(super) report: Report,
}

impl ReportDraft {
    /// Begins the account of a migration, now.
    pub(super) fn new(job: &Job) -> Self {
        let mut report = job.report(Outcome::Failed);
        report.machine_is_at = Some(report.source.clone());
        Self { began: Instant::now(), report }
    }

    /// Milliseconds since the worker began.
    pub(super) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The machine runs, or is to run, at the target from now on.
    pub(super) fn completed(&mut self) {
        self.report.total_ms = self.elapsed_ms();
        self.report.outcome = Outcome::Completed;
        self.report.machine_is_at = Some(self.report.target.clone());
    }

    /// The machine stays where it was.
    pub(super) fn taken_back(&mut self, outcome: Outcome, detail: String) {
        self.report.outcome = outcome;
        self.report.detail = Some(detail);
    }

    /// Only the target knows.
    pub(super) fn unsettled(&mut self, detail: String) {
        self.report.outcome = Outcome::Unsettled;
        self.report.machine_is_at = None;
        self.report.detail = Some(detail);
    }

    /// Takes over what was sent.
    pub(super) fn techniques(&mut self, tally: &Tally) {
        self.report.techniques = Techniques {
            zero_pages: tally.zero_blocks,
            reference_pages: tally.reference_blocks,
            shared_pages: tally.shared_blocks,
            partial_reference_pages: tally.partial_reference_blocks,
            delta_pages: tally.delta_blocks,
            delta_bytes: tally.delta_bytes,
            literal_pages: tally.literal_blocks,
            literal_bytes: tally.literal_bytes,
            batch_bytes: tally.encoded_bytes,
        };
    }

    /// The report of a migration that ended as the draft says.
    pub(super) fn finish(mut self) -> Report {
        if self.report.total_ms == 0 {
            self.report.total_ms = self.elapsed_ms();
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
            self.report.cpu_seconds = seconds(usage.user_time()) + seconds(usage.system_time());
            self.report.peak_memory_bytes = usage.max_rss().unsigned_abs() * 1024;
        }
        self.report
    }

    /// The report of a migration that `error` ended.
    pub(super) fn fail(mut self, error: &WorkerError) -> Report {
        self.report.outcome = Outcome::Failed;
        self.report.detail = Some(one_line(error));
        self.finish()
    }
}

/// STOP to RESUME by the clocks of both hosts, in milliseconds, as far as these agree: a pause isn't negative, nor longer
/// than `at_most_ms`, by one clock.
pub(super) fn pause_by_both_clocks(
    stopped_unix_us: u64,
    resumed_unix_us: u64,
    at_most_ms: f64,
) -> Option<f64> {
    let pause_ms = (resumed_unix_us as f64 - stopped_unix_us as f64) / 1e3;
    (0.0..=at_most_ms).contains(&pause_ms).then_some(pause_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_contradict_the_pause_do_not_tell_it() {
        assert_eq!(pause_by_both_clocks(1_000_000, 1_025_000, 40.0), Some(25.0));
        for resumed in [999_000, 1_041_000, 34_560_000_000_000] {
            assert_eq!(pause_by_both_clocks(1_000_000, resumed, 40.0), None, "{resumed}");
        }
    }
}
