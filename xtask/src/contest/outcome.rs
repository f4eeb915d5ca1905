//! What a contender achieved.

use std::time::Duration;

use serde::Serialize;

use super::{Responses, Span};

/// The figures of one contender, as the demo's `--json` writes them.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    pub(crate) contender: &'static str,
    /// The guest runs at the target, with all its memory, within the time allowed.
    pub(crate) converged: bool,
    /// Both directions, by the counters of the hosts' interfaces.
    pub(crate) wire_bytes: u64,
    /// From the request to the guest running at the target with all its memory, or until the time allowed was over.
    pub(crate) total_ms: f64,
    /// STOP at the source to RESUME at the target, by the events of both QEMUs.
    pub(crate) downtime_ms: Option<f64>,
    /// The guest's pace during all of that, the pause included, as a share of that before.
    pub(crate) guest_progress_ratio: Option<f64>,
    /// godwit only: everything was verified, by its digests, by reading both memories again, and by the guest.
    pub(crate) memory_digest_equal: Option<bool>,
    /// The longest silence in the guest's beat of 10 ms, as the client heard it.
    #[serde(skip)]
    pub(crate) largest_beat_gap: Duration,
    /// When it was under way.
    #[serde(skip)]
    pub(crate) span: Span,
    /// What the guest's memory takes at least, see [`super::floor`].
    #[serde(skip)]
    pub(crate) floor_bytes: Option<u64>,
    /// What the clients of the guest's web server saw, where it has one.
    #[serde(skip)]
    pub(crate) responses: Option<Responses>,
    /// What it said it would be, before it sent anything.
    #[serde(skip)]
    pub(crate) predicted: Account,
    /// What it said of the same figures when it was over: payload, and the time from the worker's start.
    #[serde(skip)]
    pub(crate) reported: Account,
}

/// What godwit says of a migration, before or after it, as far as it says something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) total_ms: Option<u64>,
    pub(crate) wire_bytes: Option<u64>,
}
