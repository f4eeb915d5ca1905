//! How good godwit's forecasts were, over all workloads: each was made before the first byte, by an agent without a history,
//! so that no run was fitted to.

use super::{
    ledger::Run,
    summary::{Spread, Verdict},
};
use crate::contest::{GODWIT, Range, Target};

/// By how much of what comes a forecast may be wrong, in the median.
pub(super) const FORECAST_ERROR: f64 = 0.1;
/// How many outcomes are to be within their forecast's interval.
const COVERAGE: f64 = 0.9;
/// How wide that may be, of what comes, in the median.
const WIDTH: f64 = 0.4;

/// The forecasts of one figure.
struct Score {
    figure: &'static str,
    runs: usize,
    covered: usize,
    error: Spread,
    width: Spread,
}

/// What was to be reached with both figures; those that weren't forecast are left out.
pub(super) fn verdicts<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> Vec<Verdict> {
    let own = || runs.clone().filter(|run| run.contender == GODWIT && run.converged);
    let times = own().filter_map(|run| Some((run.predicted_total_range_ms?, run.reported_total_ms?)));
    let bytes = own().filter_map(|run| Some((run.predicted_wire_range_bytes?, run.reported_wire_bytes?)));
    let scores =
        [Score::of("time", &times.collect::<Vec<_>>()), Score::of("bytes", &bytes.collect::<Vec<_>>())];
    scores.iter().flatten().flat_map(Score::verdicts).collect()
}

/// By which share of what came a forecast was wrong.
pub(super) fn share_off(predicted: u64, came: u64) -> Option<f64> {
    (came > 0).then(|| (predicted as f64 / came as f64 - 1.0).abs())
}

impl Score {
    /// From forecasts and what came; `None`: there are none.
    fn of(figure: &'static str, pairs: &[(Range, u64)]) -> Option<Score> {
        let width = |(range, came): &(Range, u64)| range.high.saturating_sub(range.low) as f64 / *came as f64;
        Some(Score {
            figure,
            runs: pairs.len(),
            covered: pairs.iter().filter(|(range, came)| (range.low..=range.high).contains(came)).count(),
            error: Spread::of(pairs.iter().filter_map(|(range, came)| share_off(range.likely, *came)))?,
            width: Spread::of(pairs.iter().filter(|(_, came)| *came > 0).map(width))?,
        })
    }

    fn verdicts(&self) -> [Verdict; 3] {
        let Score { figure, runs, .. } = self;
        let covered = self.covered as f64 / *runs as f64;
        let of = |what: &str| format!("forecast of {figure}, {runs} runs: {what}");
        let targets = [
            Target::at_most(
                FORECAST_ERROR,
                Some(self.error.median),
                of("median error at most 0.1 of what came"),
            ),
            Target::at_least(COVERAGE, Some(covered), of("outcomes within the interval, at least 0.9")),
            Target::at_most(
                WIDTH,
                Some(self.width.median),
                of("median width of the interval at most 0.4 of what came"),
            ),
        ];
        // Where the machine limits, that is to be foreseen too.
        targets.map(|target| Verdict { target, limited: false })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ledger::tests::run, *};

    #[test]
    fn forecasts_are_scored_over_all_workloads() {
        let forecast = |workload, range: (u64, u64, u64), came| Run {
            predicted_total_range_ms: Some(Range { low: range.0, likely: range.1, high: range.2 }),
            reported_total_ms: Some(came),
            ..run("godwit", workload, 1, 100)
        };
        let runs = [
            forecast("medium", (90, 100, 110), 100),
            forecast("web", (90, 100, 110), 200),
            forecast("idle", (80, 90, 120), 100),
            Run { contender: "godwit-smart-stop".into(), ..forecast("idle", (0, 0, 0), 100) },
            run("godwit", "heavy", 1, 100),
        ];
        let verdicts = verdicts(runs.iter());
        let told: Vec<_> = verdicts.iter().map(|it| (it.target.shown(), it.to_string())).collect();
        let expected = [("0.10", "met"), ("0.67", "NOT MET"), ("0.20", "met")];
        assert_eq!(told, expected.map(|(value, verdict)| (value.to_owned(), verdict.to_owned())));
        assert!(verdicts[0].target.text.starts_with("forecast of time, 3 runs"));
    }
}
