//! Medians and spreads, what was to be reached, and what QEMU does better.

use std::fmt;

use super::{
    foresight::{self, FORECAST_ERROR, share_off},
    ledger::Run,
    plan::{Field, Link, Plan, Rate},
};
use crate::contest::{Contender, GODWIT, Means, NO_SHARED, Responses, Target};

/// The workloads on which godwit is held against shares of QEMU's figures.
const JUDGED_BY_SHARE: [&str; 2] = ["medium", "heavy"];
/// What godwit's figures may be on them, as shares of the best pre-copy contender's, metric by metric.
const WIRE_SHARE: f64 = 0.5;
const TOTAL_SHARE: f64 = 0.5;
const DOWNTIME_SHARE: f64 = 0.2;
/// So many guests at once are held against shares of their own: of QEMU's best (CloudNet's is 0.31, section 6.5.8), and of
/// godwit without its cache across guests.
const JUDGED_GUESTS: u8 = 4;
const GUESTS_WIRE_SHARE: f64 = 0.3;
const GUESTS_WIRE_SHARE_OF_APART: f64 = 0.75;
/// The round trip for which the pause has a limit of its own, and what it may be above one round trip.
const PAUSE_ROUND_TRIP_MS: u64 = 20;
const PAUSE_OVER_ROUND_TRIP_MS: u64 = 30;
const LEAST_PROGRESS: f64 = 0.95;
/// What a web server's answers may take at the 99th percentile while godwit moves it, outside the pause: as a share of what
/// they take under QEMU's best, and of what they took before.
const RESPONSE_SHARE: f64 = 1.0;
const RESPONSE_SHARE_OF_UNDISTURBED: f64 = 1.25;
/// What godwit's bytes may be of the least that the guest's memory takes, compressed at rest.
const FLOOR_SHARE: f64 = 1.1;
/// The share from which on the machine limits, and not the link.
const BUSY: f64 = 0.8;
/// What others may use of the machine before figures say more about them.
const DISTURBANCE: f64 = 0.05;
/// What they may use before nothing is judged any more.
const DISTURBANCE_MAX: f64 = 0.25;

/// Values of several rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// All runs of one contender, workload and link.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) contender: &'static Contender,
    pub(super) rounds: usize,
    pub(super) converged: usize,
    pub(super) wire_mb: Option<Spread>,
    /// What the guest's memory took at least.
    pub(super) floor_mb: Option<Spread>,
    pub(super) responses: Option<RowResponses>,
    pub(super) total_s: Option<Spread>,
    /// The median of several guests.
    pub(super) downtime_ms: Option<Spread>,
    /// The worst of several guests.
    pub(super) worst_downtime_ms: Option<Spread>,
    pub(super) progress: Option<Spread>,
    pub(super) beat_gap_ms: Option<Spread>,
    /// Errors of the forecasts, shares of what came.
    pub(super) total_error: Option<Spread>,
    pub(super) wire_error: Option<Spread>,
    pub(super) emulator: Option<Spread>,
    pub(super) busy: Option<Spread>,
    pub(super) foreign: Option<Spread>,
    /// Nothing but the machine limits, so that its being busy is no excuse.
    is_unlimited: bool,
}

/// What a web server's clients saw, milliseconds; see [`Responses`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RowResponses {
    pub(super) undisturbed_p50_ms: Spread,
    pub(super) undisturbed_p99_ms: Spread,
    pub(super) moving_p99_ms: Spread,
    pub(super) longest_gap_ms: Spread,
    /// Averages before, during and after the move.
    pub(super) means_ms: Option<[Spread; 3]>,
    /// The 99th percentiles, that during the move as a share of that before, run by run.
    pub(super) moving_share: Spread,
}

/// Contenders that did the same.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) field: Field,
    pub(super) workload: String,
    pub(super) rows: Vec<Row>,
}

/// A target, and whether the machine was fast enough for it to be judged.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) target: Target,
    pub(super) limited: bool,
}

/// All that a plan asked for, as far as it was run.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) groups: Vec<Group>,
    /// Of all runs of godwit as it comes.
    pub(super) foresight: Vec<Verdict>,
}

impl Spread {
    /// `None`: there are no values.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Spread { median, low, high })
    }

    /// As people read it, with so many decimals; the spread only where there is one.
    pub(super) fn shown(self, decimals: usize) -> String {
        let [median, low, high] =
            [self.median, self.low, self.high].map(|value| format!("{value:.decimals$}"));
        if low == high { median } else { format!("{median} ({low}–{high})") }
    }
}

impl Row {
    fn of(contender: &'static Contender, link: Link, runs: &[&Run]) -> Row {
        let spread = |figure: fn(&Run) -> Option<f64>| Spread::of(runs.iter().filter_map(|run| figure(run)));
        Row {
            contender,
            rounds: runs.len(),
            converged: runs.iter().filter(|run| run.converged).count(),
            wire_mb: spread(|run| Some(run.wire_bytes as f64 / 1e6)),
            floor_mb: spread(|run| Some(run.floor_bytes? as f64 / 1e6)),
            responses: RowResponses::of(runs.iter().filter_map(|run| run.responses)),
            total_s: spread(|run| Some(run.total_ms / 1e3)),
            downtime_ms: spread(|run| run.downtime_ms),
            worst_downtime_ms: spread(|run| run.worst_downtime_ms),
            progress: spread(|run| run.guest_progress_ratio),
            beat_gap_ms: spread(|run| Some(run.beat_gap_ms)),
            total_error: spread(|run| share_off(run.predicted_total_ms?, run.reported_total_ms?)),
            wire_error: spread(|run| share_off(run.predicted_wire_bytes?, run.reported_wire_bytes?)),
            emulator: spread(|run| run.emulator_cpu_share),
            busy: spread(|run| run.busy_share),
            foreign: spread(|run| run.foreign_cpu_share),
            is_unlimited: link.rate == Rate::Unlimited,
        }
    }

    /// Whether it got the guest to the target in every round.
    pub(super) fn always_converged(&self) -> bool {
        self.rounds > 0 && self.converged == self.rounds
    }

    /// Whether the machine, or the emulated link, had too little left to say how fast the contender is.
    pub(super) fn is_limited(&self) -> bool {
        let busy = if self.is_unlimited { f64::INFINITY } else { BUSY };
        let limits = [(self.emulator, busy), (self.busy, busy), (self.foreign, DISTURBANCE_MAX)];
        limits.iter().any(|(share, limit)| share.is_some_and(|share| share.median >= *limit))
    }

    fn is_rival(&self) -> bool {
        !self.contender.is_godwit() && !self.contender.is_postcopy() && self.always_converged()
    }
}

impl RowResponses {
    /// `None`: no run had any.
    fn of(responses: impl Iterator<Item = Responses>) -> Option<RowResponses> {
        let all: Vec<Responses> = responses.collect();
        let spread = |figure: fn(&Responses) -> f64| Spread::of(all.iter().map(figure));
        Some(RowResponses {
            undisturbed_p50_ms: spread(|seen| seen.undisturbed_p50_ms)?,
            undisturbed_p99_ms: spread(|seen| seen.undisturbed_p99_ms)?,
            moving_p99_ms: spread(|seen| seen.moving_p99_ms)?,
            longest_gap_ms: spread(|seen| seen.longest_gap_ms)?,
            means_ms: means_of(&all),
            moving_share: spread(|seen| seen.moving_p99_ms / seen.undisturbed_p99_ms)?,
        })
    }
}

/// `None`: runs of before they were kept.
fn means_of(all: &[Responses]) -> Option<[Spread; 3]> {
    let spread = |figure: fn(&Means) -> f64| {
        Spread::of(all.iter().filter_map(|seen| seen.means).map(|it| figure(&it)))
    };
    Some([
        spread(|means| means.undisturbed_ms)?,
        spread(|means| means.moving_ms)?,
        spread(|means| means.afterwards_ms)?,
    ])
}

impl fmt::Display for RowResponses {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "responses in ms: before, p50 {} and p99 {}; while moved, outside the pause, p99 {}; longest gap {}",
            self.undisturbed_p50_ms.shown(1),
            self.undisturbed_p99_ms.shown(1),
            self.moving_p99_ms.shown(1),
            self.longest_gap_ms.shown(0),
        )?;
        let Some(means) = self.means_ms else { return Ok(()) };
        let [before, moving, afterwards] = means.map(|mean| mean.shown(1));
        write!(formatter, "; on average {before} before, {moving} while moved, {afterwards} afterwards")
    }
}

/// A figure, by name, with its unit and whether less is better.
struct Metric {
    name: &'static str,
    unit: &'static str,
    decimals: usize,
    less_is_better: bool,
    of: fn(&Row) -> Option<Spread>,
}

const WIRE: Metric = Metric {
    name: "bytes on the wire",
    unit: " MB",
    decimals: 1,
    less_is_better: true,
    of: |row| row.wire_mb,
};
const TOTAL: Metric =
    Metric { name: "total time", unit: " s", decimals: 1, less_is_better: true, of: |row| row.total_s };
const DOWNTIME: Metric =
    Metric { name: "downtime", unit: " ms", decimals: 1, less_is_better: true, of: |row| row.downtime_ms };
const PROGRESS: Metric =
    Metric { name: "guest progress", unit: "", decimals: 3, less_is_better: false, of: |row| row.progress };

const RESPONSE: Metric = Metric {
    name: "response at p99 outside the pause",
    unit: " ms",
    decimals: 1,
    less_is_better: true,
    of: |row| row.responses.map(|responses| responses.moving_p99_ms),
};

impl Metric {
    fn median(&self, row: &Row) -> Option<f64> {
        (self.of)(row).map(|spread| spread.median)
    }

    fn shown(&self, value: f64) -> String {
        format!("{value:.0$}{1}", self.decimals, self.unit)
    }
}

impl Group {
    fn godwit(&self) -> Option<&Row> {
        self.rows.iter().find(|row| row.contender.name == GODWIT && row.always_converged())
    }

    /// What godwit was to reach here, and whether it did.
    pub(super) fn verdicts(&self) -> Vec<Verdict> {
        let Some(godwit) = self.godwit() else { return self.not_there().into_iter().collect() };
        let mut verdicts: Vec<Verdict> = self
            .shares()
            .iter()
            .filter_map(|(metric, share)| self.against_best(godwit, metric, *share))
            .collect();
        verdicts.extend(self.against_apart(godwit));
        let alone = |target| Verdict { target, limited: godwit.is_limited() };
        if let Some(floor) = godwit.floor_mb.filter(|_| self.is_judged_by_share()) {
            let text =
                format!("bytes on the wire: at most {FLOOR_SHARE} of the floor, {:.1} MB", floor.median);
            let value = WIRE.median(godwit).map(|own| own / floor.median);
            verdicts.push(alone(Target::at_most(FLOOR_SHARE, value, text)));
        }
        if self.field.link.round_trip_ms == PAUSE_ROUND_TRIP_MS {
            let limit = (PAUSE_ROUND_TRIP_MS + PAUSE_OVER_ROUND_TRIP_MS) as f64;
            let text = format!("downtime, ms: at most one round trip + {PAUSE_OVER_ROUND_TRIP_MS}");
            verdicts.push(alone(Target::at_most(limit, DOWNTIME.median(godwit), text)));
        }
        for (error, figure) in [(godwit.total_error, "time"), (godwit.wire_error, "bytes")] {
            let text = format!("forecast of {figure}: off by at most {FORECAST_ERROR} of what came");
            verdicts
                .extend(error.map(|error| alone(Target::at_most(FORECAST_ERROR, Some(error.median), text))));
        }
        verdicts.extend(self.against_best(godwit, &RESPONSE, RESPONSE_SHARE));
        if let Some(responses) = godwit.responses {
            let text = format!("{}: at most {RESPONSE_SHARE_OF_UNDISTURBED} of before", RESPONSE.name);
            let value = Some(responses.moving_share.median);
            verdicts.push(alone(Target::at_most(RESPONSE_SHARE_OF_UNDISTURBED, value, text)));
        }
        let text = format!("guest progress: at least {LEAST_PROGRESS}");
        verdicts.push(alone(Target::at_least(LEAST_PROGRESS, PROGRESS.median(godwit), text)));
        verdicts
    }

    /// What is told where godwit was given up; `None`: it had no turn.
    fn not_there(&self) -> Option<Verdict> {
        let godwit = self.rows.iter().find(|row| row.contender.name == GODWIT)?;
        let share = godwit.converged as f64 / godwit.rounds as f64;
        let target = Target::at_least(1.0, Some(share), "the guest gets to the target".into());
        Some(Verdict { target, limited: false })
    }

    /// The shares of QEMU's best that godwit's figures may be.
    fn shares(&self) -> Vec<(Metric, f64)> {
        if self.field.guests > 1 {
            if self.field.guests == JUDGED_GUESTS { vec![(WIRE, GUESTS_WIRE_SHARE)] } else { Vec::new() }
        } else if self.field.link.rate == Rate::Unlimited {
            vec![(TOTAL, 1.0)]
        } else if self.field.link.is_fast() {
            vec![(TOTAL, 1.0), (DOWNTIME, 1.0)]
        } else if self.is_judged_by_share() {
            vec![(WIRE, WIRE_SHARE), (TOTAL, TOTAL_SHARE), (DOWNTIME, DOWNTIME_SHARE)]
        } else {
            Vec::new()
        }
    }

    fn is_judged_by_share(&self) -> bool {
        JUDGED_BY_SHARE.contains(&self.workload.as_str())
    }

    /// `None`: there is nobody to be held against.
    fn against_best(&self, godwit: &Row, metric: &Metric, share: f64) -> Option<Verdict> {
        // godwit encrypts; where nothing but the machine limits, that is what others are to do too.
        let is_like = |row: &&Row| !row.is_unlimited || row.contender.is_qemu_with_tls();
        let rivals = self.rows.iter().filter(|row| row.is_rival()).filter(is_like);
        let (rival, best) = rivals
            .filter_map(|row| Some((row, metric.median(row)?)))
            .min_by(|(_, one), (_, other)| one.total_cmp(other))?;
        let text = format!("{}: at most {share} of {}'s", metric.name, rival.contender.name);
        let value = metric.median(godwit).map(|own| own / best);
        Some(Verdict {
            target: Target::at_most(share, value, text),
            limited: godwit.is_limited() || rival.is_limited(),
        })
    }

    /// `None`: nobody did without the cache across guests, or there are too few of them.
    fn against_apart(&self, godwit: &Row) -> Option<Verdict> {
        let is_apart = |row: &&Row| row.contender.name == NO_SHARED && row.always_converged();
        let apart = self.rows.iter().filter(|_| self.field.guests == JUDGED_GUESTS).find(is_apart)?;
        let text = format!("{}: at most {GUESTS_WIRE_SHARE_OF_APART} of {NO_SHARED}'s", WIRE.name);
        let value = WIRE.median(godwit).zip(WIRE.median(apart)).map(|(own, apart)| own / apart);
        Some(Verdict {
            target: Target::at_most(GUESTS_WIRE_SHARE_OF_APART, value, text),
            limited: godwit.is_limited() || apart.is_limited(),
        })
    }

    /// What they were and did.
    pub(super) fn title(&self) -> String {
        format!("{}, {}", self.workload, self.field)
    }

    /// Says so if something else ran on the machine.
    pub(super) fn disturbance(&self) -> Option<String> {
        let used = Spread::of(self.rows.iter().filter_map(|row| Some(row.foreign?.median)))?;
        (used.high >= DISTURBANCE).then(|| {
            let [low, high] = [used.low, used.high].map(|share| share * 100.0);
            format!("the machine wasn't quiet: what isn't of the bench used {low:.0} to {high:.0} % of it")
        })
    }

    /// How little several guests' memories take together, where godwit has moved them.
    pub(super) fn floor(&self) -> Option<String> {
        let row = self.godwit().filter(|_| self.field.guests > 1)?;
        let (floor, wire) = (row.floor_mb?.median, row.wire_mb?.median);
        let times = wire / floor;
        Some(format!(
            "the different pages of all guests' memories at their arrival, compressed, take {floor:.1} MB; {times:.2} times that \
             crossed the link"
        ))
    }

    /// What web servers' clients saw, a line for each contender that had some.
    pub(super) fn responses(&self) -> Vec<String> {
        let told = |row: &Row| Some(format!("{}: {}", row.contender.name, row.responses?));
        self.rows.iter().filter_map(told).collect()
    }

    /// Whatever a QEMU alone does better, a line each.
    pub(super) fn better(&self) -> Vec<String> {
        let Some(godwit) = self.godwit() else { return Vec::new() };
        let rivals = self.rows.iter().filter(|row| !row.contender.is_godwit() && row.always_converged());
        let pairs =
            rivals.flat_map(|row| [WIRE, TOTAL, DOWNTIME, RESPONSE, PROGRESS].map(|metric| (row, metric)));
        let better = pairs.filter_map(|(row, metric)| {
            let (theirs, own) = (metric.median(row)?, metric.median(godwit)?);
            let is_better = if metric.less_is_better { theirs < own } else { theirs > own };
            let shown = |value| metric.shown(value);
            is_better.then(|| {
                format!("{}: {} {}, godwit {}", row.contender.name, metric.name, shown(theirs), shown(own))
            })
        });
        better.collect()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match (self.limited, self.target.met()) {
            (true, _) => "not judged: the machine was too busy",
            (false, true) => "met",
            (false, false) => "NOT MET",
        })
    }
}

impl Summary {
    /// Sums up the runs that the plan asks for.
    pub(super) fn of(plan: &Plan, runs: &[Run]) -> Summary {
        let mut groups = Vec::new();
        for &field in &plan.fields {
            for workload in &plan.workloads {
                let row = |contender: &'static Contender| {
                    let of_row: Vec<&Run> = runs
                        .iter()
                        .filter(|run| run.field() == field && run.workload == *workload)
                        .filter(|run| run.guest_command == plan.guest_command)
                        .filter(|run| run.contender == contender.name && run.round <= plan.rounds)
                        .collect();
                    (!of_row.is_empty()).then(|| Row::of(contender, field.link, &of_row))
                };
                let rows: Vec<Row> = plan.contenders(field.link).into_iter().filter_map(row).collect();
                groups.push(Group { field, workload: workload.clone(), rows });
            }
        }
        groups.retain(|group| !group.rows.is_empty());
        let asked_for =
            |run: &&Run| plan.workloads.contains(&run.workload) && plan.fields.contains(&run.field());
        Summary { groups, foresight: foresight::verdicts(runs.iter().filter(asked_for)) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::{
        super::{Request, ledger::tests::run},
        *,
    };

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        request: Request,
    }

    pub(crate) fn summary(runs: &[Run]) -> Summary {
        summary_of(&["bench", "--workloads", "medium"], runs)
    }

    fn summary_of(command: &[&str], runs: &[Run]) -> Summary {
        let line = Line::parse_from(command);
        Summary::of(&Plan::of(&line.request).unwrap(), runs)
    }

    pub(crate) fn three(contender: &str, megabytes: [u64; 3]) -> Vec<Run> {
        (1..).zip(megabytes).map(|(round, megabytes)| run(contender, "medium", round, megabytes)).collect()
    }

    #[test]
    fn medians_and_spreads() {
        assert_eq!(Spread::of([].into_iter()), None);
        assert_eq!(
            Spread::of([3.0, 1.0, 8.0].into_iter()),
            Some(Spread { median: 3.0, low: 1.0, high: 8.0 })
        );
        let even = Spread::of([4.0, 1.0, 2.0, 8.0].into_iter()).unwrap();
        assert_eq!((even.median, even.shown(1)), (3.0, "3.0 (1.0–8.0)".to_owned()));
        assert_eq!(Spread::of([2.04, 2.0].into_iter()).unwrap().shown(1), "2.0");
    }

    #[test]
    fn each_metric_is_held_against_the_best_that_always_converged() {
        let mut runs = three("godwit", [160, 150, 170]);
        runs.extend(three("qemu-xbzrle", [390, 400, 410]));
        runs.extend(three("qemu-multifd-zstd", [310, 300, 290]));
        runs.extend(three("qemu-postcopy", [10, 10, 10]));
        // One that converged sometimes is nobody to be held against.
        runs.extend(three("qemu-precopy", [100, 100, 100]));
        runs.last_mut().unwrap().converged = false;
        let summary = summary(&runs);
        let verdicts = summary.groups[0].verdicts();
        let values: Vec<f64> = verdicts.iter().map(|verdict| verdict.target.value.unwrap()).collect();
        assert_eq!(values, [160.0 / 300.0, 160.0 / 300.0, 160.0 / 300.0, 160.0 / 90.0, 160.0, 0.99]);
        assert_eq!(verdicts[5].to_string(), "met");
        assert!(verdicts[..5].iter().all(|verdict| verdict.to_string() == "NOT MET"));
        let better = summary.groups[0].better();
        assert_eq!(better[0], "qemu-postcopy: bytes on the wire 10.0 MB, godwit 160.0 MB");
        assert_eq!(better.len(), 3);
    }

    #[test]
    fn responses_are_held_against_the_best_and_against_before() {
        let seen = |moving_p99_ms| Responses {
            undisturbed_p50_ms: 2.0,
            undisturbed_p99_ms: 4.0,
            moving_p99_ms,
            longest_gap_ms: 130.0,
            means: Some(Means { undisturbed_ms: 2.5, moving_ms: 3.0, afterwards_ms: 1.5 }),
        };
        let mut runs = three("godwit", [100, 100, 100]);
        runs.extend(three("qemu-xbzrle", [300, 300, 300]));
        for (run, moving_p99_ms) in runs.iter_mut().zip([6.0, 5.0, 5.2, 5.0, 4.5, 4.0]) {
            run.responses = Some(seen(moving_p99_ms));
        }
        let summary = summary(&runs);
        let verdicts = summary.groups[0].verdicts();
        let judged: Vec<&Verdict> =
            verdicts.iter().filter(|verdict| verdict.target.text.starts_with("response")).collect();
        let values: Vec<f64> = judged.iter().filter_map(|verdict| verdict.target.value).collect();
        assert_eq!(values, [5.2 / 4.5, 1.3]);
        assert!(judged.iter().all(|verdict| verdict.to_string() == "NOT MET"));
        assert!(judged[0].target.text.ends_with("at most 1 of qemu-xbzrle's"));
        let told = &summary.groups[0].responses()[0];
        let expected =
            "p99 5.2 (5.0–6.0); longest gap 130; on average 2.5 before, 3.0 while moved, 1.5 afterwards";
        assert!(told.ends_with(expected), "{told}");
    }

    #[test]
    fn where_the_machine_was_busy_nothing_is_judged() {
        let mut runs = three("godwit", [100, 100, 100]);
        runs.extend(three("qemu-xbzrle", [300, 300, 300]));
        runs.iter_mut()
            .filter(|run| run.contender == "qemu-xbzrle")
            .for_each(|run| run.busy_share = Some(0.8));
        let verdicts = summary(&runs).groups[0].verdicts();
        let judged: Vec<bool> = verdicts.iter().map(|verdict| !verdict.limited).collect();
        assert_eq!(judged, [false, false, false, true, true, true]);
    }

    #[test]
    fn four_guests_are_held_against_qemu_and_against_a_cache_for_each() {
        let built = |contender: &str, megabytes| Run {
            guests: 4,
            guest_mb: 256,
            worst_downtime_ms: Some(90.0),
            ..run(contender, "build", 1, megabytes)
        };
        let runs = [built(GODWIT, 90), built(NO_SHARED, 120), built("qemu-xbzrle", 310)];
        let summary = summary_of(&["bench", "--guests", "2,4"], &runs);
        let group = &summary.groups[0];
        assert_eq!((summary.groups.len(), group.title()), (1, "build, 4 guests, 100 Mbit/s, 20 ms".into()));
        let verdicts = group.verdicts();
        let shares: Vec<f64> = verdicts[..2].iter().filter_map(|verdict| verdict.target.value).collect();
        assert_eq!(shares, [90.0 / 310.0, 0.75]);
        assert!(verdicts[..2].iter().all(|verdict| verdict.target.met()));
        assert!(group.floor().unwrap().ends_with("take 90.0 MB; 1.00 times that crossed the link"));
        let two = runs.map(|run| Run { guests: 2, ..run });
        let verdicts = summary_of(&["bench", "--guests", "2,4"], &two).groups[0].verdicts();
        assert!(!verdicts.iter().any(|verdict| verdict.target.text.starts_with("bytes")));
    }

    #[test]
    fn an_unlimited_link_is_judged_among_those_that_encrypt_and_however_busy_the_machine() {
        let unlimited = |contender: &str, megabytes| Run {
            link_mbit: None,
            rtt_ms: 0,
            busy_share: Some(1.0),
            ..run(contender, "medium", 1, megabytes)
        };
        let runs = [unlimited(GODWIT, 50), unlimited("qemu-multifd-tls", 100), unlimited("qemu-multifd", 20)];
        let summary = summary_of(&["bench", "--rate", "unlimited", "--workloads", "medium"], &runs);
        let group = &summary.groups[0];
        let verdict = &group.verdicts()[0];
        assert_eq!((verdict.target.value, verdict.to_string()), (Some(0.5), "met".into()));
        assert!(group.better().iter().any(|line| line.starts_with("qemu-multifd: total time")));
    }

    #[test]
    fn a_machine_that_was_not_quiet_is_told() {
        let mut runs = three("godwit", [100, 100, 100]);
        assert_eq!(summary(&runs).groups[0].disturbance(), None);
        runs.iter_mut().for_each(|run| run.foreign_cpu_share = Some(0.4));
        assert!(summary(&runs).groups[0].disturbance().unwrap().ends_with("40 to 40 % of it"));
    }

    #[test]
    fn runs_of_other_benches_in_the_ledger_are_left_out() {
        let mut runs = three("godwit", [100, 110, 120]);
        runs.push(run("godwit", "medium", 4, 900));
        runs.push(run("godwit", "heavy", 1, 900));
        runs.push(Run { guest_command: Some("ls".into()), ..run("godwit", "medium", 1, 900) });
        let summary = summary(&runs);
        assert_eq!((summary.groups.len(), summary.groups[0].rows[0].rounds), (1, 3));
    }

    #[test]
    fn forecasts_are_scored_where_there_are_any() {
        let mut runs = three("godwit", [100, 100, 100]);
        assert_eq!(summary(&runs).groups[0].rows[0].wire_error, None);
        (runs[1].predicted_wire_bytes, runs[1].reported_wire_bytes) = (Some(90_000_000), Some(100_000_000));
        let error = summary(&runs).groups[0].rows[0].wire_error.unwrap();
        assert!((error.median - 0.1).abs() < 1e-9);
        runs[2].predicted_wire_bytes = Some(10);
        assert_eq!(summary(&runs).groups[0].rows[0].wire_error, Some(error));
    }
}
