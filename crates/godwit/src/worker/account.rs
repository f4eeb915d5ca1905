//! The report of a migration while it is being filled in.

use std::{error::Error, time::Instant};

use godwit_content::Tally;
use nix::sys::resource::{UsageWho, getrusage};

use super::WorkerError;
use crate::job::{Job, Outcome, Report, Role, Techniques};

/// A report in the making; it becomes one when the worker ends.
pub(super) struct ReportDraft {
    began: Instant,
    pub(super) report: Report,
}

impl ReportDraft {
    /// Begins the account of a migration, now.
    pub(super) fn new(job: &Job) -> Self {
        let (source, target) = match job.role {
            Role::Source => (&job.host, &job.peer),
            Role::Target => (&job.peer, &job.host),
        };
        let report = Report {
            id: job.id.clone(),
            machine: job.spec.name.clone(),
            role: job.role,
            source: source.clone(),
            target: target.clone(),
            outcome: Outcome::Failed,
            detail: None,
            machine_is_at: Some(source.clone()),
            total_ms: 0,
            downtime_ms: None,
            downtime_source_ms: None,
            round_trip_ms: None,
            predicted_downtime_ms: None,
            wire_bytes: 0,
            techniques: Techniques::default(),
            device_state_bytes: 0,
            passes: 0,
            versions_named: 0,
            versions_coalesced: 0,
            pages_in_pause: 0,
            peak_memory_bytes: 0,
            cpu_seconds: 0.0,
            pages_verified: None,
        };
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

    /// Takes over what was sent.
    pub(super) fn techniques(&mut self, tally: &Tally) {
        self.report.techniques = Techniques {
            zero_pages: tally.zero_blocks,
            reference_pages: tally.reference_blocks,
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

/// An error and its causes in one line.
pub(super) fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.ends_with(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}
