//! What a contender achieved.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    /// STOP at the source to RESUME at the target, by the events of both QEMUs; the median of several guests.
    pub(crate) downtime_ms: Option<f64>,
    /// The worst of several guests.
    #[serde(skip)]
    pub(crate) worst_downtime_ms: Option<f64>,
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
    pub(crate) predicted: Forecast,
    /// What it said of the same figures when it was over: payload, and the time from the worker's start.
    #[serde(skip)]
    pub(crate) reported: Account,
    /// godwit's whole report.
    #[serde(skip)]
    pub(crate) report: Option<Value>,
}

/// What godwit says of a migration before it, as far as it says something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Forecast {
    pub(crate) total_ms: Option<Range>,
    pub(crate) wire_bytes: Option<Range>,
}

/// A figure that isn't known yet: nine of ten outcomes are to be between the outer two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Range {
    pub(crate) low: u64,
    pub(crate) likely: u64,
    pub(crate) high: u64,
}

/// The same figures when it is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) total_ms: Option<u64>,
    pub(crate) wire_bytes: Option<u64>,
}

impl Outcome {
    /// All guests have arrived, after pauses of so many milliseconds.
    pub(super) fn converge(&mut self, mut downtimes_ms: Vec<f64>) {
        downtimes_ms.sort_by(f64::total_cmp);
        let (low, high) = (downtimes_ms.len().saturating_sub(1) / 2, downtimes_ms.len() / 2);
        let middle = downtimes_ms.get(low).zip(downtimes_ms.get(high));
        self.converged = true;
        self.downtime_ms = middle.map(|(low, high)| (low + high) / 2.0);
        self.worst_downtime_ms = downtimes_ms.last().copied().filter(|_| downtimes_ms.len() > 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn converged(downtimes_ms: &[f64]) -> Outcome {
        let now = SystemTime::UNIX_EPOCH;
        let mut outcome = Outcome {
            contender: "godwit",
            converged: false,
            wire_bytes: 0,
            total_ms: 0.0,
            downtime_ms: None,
            worst_downtime_ms: None,
            guest_progress_ratio: None,
            memory_digest_equal: None,
            largest_beat_gap: Duration::ZERO,
            span: Span { started: now, ended: now },
            floor_bytes: None,
            responses: None,
            predicted: Forecast::default(),
            reported: Account::default(),
            report: None,
        };
        outcome.converge(downtimes_ms.to_vec());
        outcome
    }

    #[test]
    fn several_guests_have_a_median_and_a_worst_and_one_has_its_own() {
        let several = converged(&[80.0, 20.0, 30.0, 40.0]);
        assert_eq!((several.downtime_ms, several.worst_downtime_ms), (Some(35.0), Some(80.0)));
        let one = converged(&[20.0]);
        assert_eq!((one.downtime_ms, one.worst_downtime_ms, one.converged), (Some(20.0), None, true));
    }
}
