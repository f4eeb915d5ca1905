//! A guest seen from outside while a contender moves it.

use std::{
    net::Ipv4Addr,
    thread::sleep,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use godwit_sim::{
    lab::{FIRST_GUEST_ADDRESS, Lab, Place, WireBytes},
    observer::{BeatListener, Progress},
};

use super::{Load, Outcome, Prediction, Stage};

/// Where the guest is.
pub(crate) const GUEST_ADDRESS: Ipv4Addr = FIRST_GUEST_ADDRESS;
/// How long the guest's pace is watched before anything happens to it.
const BEFORE: Duration = Duration::from_secs(5);
/// How long it is watched afterwards, so that its silence is seen to end and the last acknowledgements are counted.
const AFTER: Duration = Duration::from_millis(1_000);
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// A guest that is being followed over a connection held throughout.
pub(super) struct Watch<'a> {
    lab: &'a Lab,
    beat: BeatListener,
    progress: Progress,
    /// The guest's program writes nothing, so that its pace is that of its beat.
    paced_by_beat: bool,
}

/// The time from the request to the guest running at the target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) started: SystemTime,
    pub(crate) ended: SystemTime,
}

impl<'a> Watch<'a> {
    /// Waits until the guest has booted and its pace is known.
    pub(super) fn start(stage: &Stage<'a>, beat: BeatListener) -> Result<Watch<'a>> {
        let progress = Progress::connect(&stage.lab.namespace(Place::Lan), GUEST_ADDRESS, BOOT_LIMIT)
            .context("the guest has not booted")?;
        let paced_by_beat = matches!(stage.load, Load::Command(_) | Load::Workload("idle"));
        let watch = Watch { lab: stage.lab, beat, progress, paced_by_beat };
        sleep(BEFORE + AFTER);
        Ok(watch)
    }

    /// What the link has carried so far.
    pub(super) fn wire_bytes(&self) -> Result<WireBytes> {
        Ok(self.lab.wire_bytes()?)
    }

    /// Draws up the account of a contender.
    pub(super) fn outcome(&self, contender: &'static str, span: Span, before: WireBytes) -> Result<Outcome> {
        sleep(AFTER);
        let usual = self.pace(span.started - BEFORE, span.started);
        let during = self.pace(span.started, span.ended);
        Ok(Outcome {
            contender,
            converged: false,
            wire_bytes: self.wire_bytes()?.since(before).total(),
            total_ms: milliseconds(span.started, span.ended),
            downtime_ms: None,
            guest_progress_ratio: usual
                .zip(during)
                .map(|(usual, during)| during / usual)
                .filter(|ratio| ratio.is_finite()),
            memory_digest_equal: None,
            largest_beat_gap: self.beat.largest_gap(span.started, span.ended + AFTER / 2),
            span,
            floor_bytes: None,
            predicted: Prediction::default(),
        })
    }

    /// Writes, or beats, a second.
    fn pace(&self, from: SystemTime, to: SystemTime) -> Option<f64> {
        if self.paced_by_beat { self.beat.rate(from, to) } else { self.progress.rate(from, to) }
    }

    /// Has the guest check its memory against all it ever wrote.
    pub(super) fn check(&self) -> Result<String> {
        Ok(self.progress.check(CHECK_LIMIT)?)
    }
}

/// Milliseconds from one moment to a later one.
pub(super) fn milliseconds(earlier: SystemTime, later: SystemTime) -> f64 {
    later.duration_since(earlier).unwrap_or_default().as_secs_f64() * 1000.0
}
