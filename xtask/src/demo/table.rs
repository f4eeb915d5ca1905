//! The contenders side by side, and the targets against the best of QEMU's own, metric by metric.

use std::{fmt::Write, time::Duration};

use crate::contest::{GODWIT, Outcome, Target};

/// What godwit's figures may be, as a share of the best converged contender's.
const WIRE_BYTES_SHARE: f64 = 0.5;
const TOTAL_SHARE: f64 = 0.55;
const DOWNTIME_SHARE: f64 = 0.3;
/// What the pause may be above one round trip.
const DOWNTIME_OVER_ROUND_TRIP: Duration = Duration::from_millis(30);
const LEAST_PROGRESS: f64 = 0.95;

/// The table, and below it the targets where godwit is among the contenders.
pub(super) fn render(outcomes: &[Outcome], round_trip: Duration) -> String {
    let mut text = format!(
        "{:<22}{:>10}{:>10}{:>9}{:>13}{:>14}{:>15}\n",
        "contender", "converged", "wire MB", "total s", "downtime ms", "beat gap ms", "guest progress"
    );
    for outcome in outcomes {
        let downtime = outcome.downtime_ms.map_or("–".into(), |downtime| format!("{downtime:.1}"));
        let progress = outcome.guest_progress_ratio.map_or("–".into(), |progress| format!("{progress:.3}"));
        let _ = writeln!(
            text,
            "{:<22}{:>10}{:>10.1}{:>9.1}{:>13}{:>14.0}{:>15}",
            outcome.contender,
            if outcome.converged { "yes" } else { "no" },
            outcome.wire_bytes as f64 / 1e6,
            outcome.total_ms / 1e3,
            downtime,
            outcome.largest_beat_gap.as_secs_f64() * 1e3,
            progress,
        );
    }
    for target in targets(outcomes, round_trip) {
        let verdict = if target.met() { "met" } else { "NOT MET" };
        let _ = writeln!(text, "{:<52}{:>10}  {verdict}", target.text, target.shown());
    }
    text
}

/// A figure to be compared, with the share of the best QEMU's that it may be.
type Metric = (&'static str, f64, fn(&Outcome) -> Option<f64>);

/// What godwit is to achieve.
fn targets(outcomes: &[Outcome], round_trip: Duration) -> Vec<Target> {
    let Some(godwit) = outcomes.iter().find(|outcome| outcome.contender == GODWIT && outcome.converged)
    else {
        return Vec::new();
    };
    let mut targets = Vec::new();
    let metrics: [Metric; 3] = [
        ("bytes on the wire", WIRE_BYTES_SHARE, |outcome| Some(outcome.wire_bytes as f64)),
        ("total time", TOTAL_SHARE, |outcome| Some(outcome.total_ms)),
        ("downtime", DOWNTIME_SHARE, |outcome| outcome.downtime_ms),
    ];
    for (name, limit, metric) in metrics {
        let rivals = outcomes.iter().filter(|outcome| outcome.contender != GODWIT && outcome.converged);
        let best = rivals.filter_map(metric).min_by(f64::total_cmp);
        if let Some(best) = best {
            let text = format!("{name}, share of the best QEMU: at most {limit}");
            targets.push(Target::at_most(limit, metric(godwit).map(|own| own / best), text));
        }
    }
    let limit = (round_trip + DOWNTIME_OVER_ROUND_TRIP).as_secs_f64() * 1e3;
    let text = format!("downtime, ms: at most {limit}");
    targets.push(Target::at_most(limit, godwit.downtime_ms, text));
    let text = format!("guest progress, share of before: at least {LEAST_PROGRESS}");
    targets.push(Target::at_least(LEAST_PROGRESS, godwit.guest_progress_ratio, text));
    targets
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::contest::{Account, Forecast, Span};

    fn outcome(contender: &'static str, converged: bool, wire_bytes: u64, downtime_ms: f64) -> Outcome {
        Outcome {
            contender,
            converged,
            wire_bytes,
            total_ms: wire_bytes as f64 / 12_500.0,
            downtime_ms: converged.then_some(downtime_ms),
            worst_downtime_ms: None,
            guest_progress_ratio: Some(0.9),
            memory_digest_equal: None,
            largest_beat_gap: Duration::from_millis(12),
            span: Span { started: SystemTime::UNIX_EPOCH, ended: SystemTime::UNIX_EPOCH },
            floor_bytes: None,
            responses: None,
            predicted: Forecast::default(),
            reported: Account::default(),
            report: None,
        }
    }

    #[test]
    fn each_metric_is_held_against_the_best_that_converged() {
        let outcomes = [
            outcome("godwit", true, 160_000_000, 20.0),
            outcome("qemu-precopy", false, 100_000_000, 1.0),
            outcome("qemu-xbzrle", true, 400_000_000, 100.0),
            outcome("qemu-xbzrle-downtime", true, 300_000_000, 80.0),
        ];
        let targets = targets(&outcomes, Duration::from_millis(20));
        let met: Vec<(Option<f64>, bool)> =
            targets.iter().map(|target| (target.value, target.met())).collect();
        let share = Some(160.0 / 300.0);
        let expected =
            [(share, false), (share, true), (Some(0.25), true), (Some(20.0), true), (Some(0.9), false)];
        assert_eq!(met, expected);
    }

    #[test]
    fn a_figure_that_was_not_measured_is_a_missed_target() {
        let godwit = Outcome { downtime_ms: None, ..outcome("godwit", true, 1, 0.0) };
        let outcomes = [godwit, outcome("qemu-xbzrle", true, 400, 100.0)];
        let targets = targets(&outcomes, Duration::from_millis(20));
        let downtime = targets.iter().filter(|target| target.text.starts_with("downtime"));
        assert_eq!(downtime.map(Target::met).collect::<Vec<_>>(), [false, false]);
    }

    #[test]
    fn without_rivals_only_absolute_targets_are_judged() {
        let outcomes = [outcome("godwit", true, 1, 51.0), outcome("qemu-precopy", false, 1, 1.0)];
        let targets = targets(&outcomes, Duration::from_millis(20));
        assert_eq!(targets.iter().map(Target::met).collect::<Vec<_>>(), [false, false]);
    }
}
