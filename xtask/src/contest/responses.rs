//! How long a web server's clients wait: before a move, and during it but outside the pause.
//!
//! The pause here is what a client takes for it, whoever moves the guest: from the last beat through the one host to the
//! first through the other. Requests that were under way at any time of it are left out, as are those of that time that
//! were never answered; how long they waited shows in the longest gap between two answers.

use std::time::SystemTime;

use godwit_sim::web_client::{Exchange, PATIENCE};
use serde::{Deserialize, Serialize};

use super::{Span, watch::milliseconds};

/// What a web server's clients saw, milliseconds. Percentiles are the nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Responses {
    /// Half of the answers came within this before the guest was moved.
    pub(crate) undisturbed_p50_ms: f64,
    pub(crate) undisturbed_p99_ms: f64,
    /// While it was moved, outside the pause.
    pub(crate) moving_p99_ms: f64,
    /// The longest time without any answer.
    pub(crate) longest_gap_ms: f64,
    /// Averages, as CloudNet has them.
    #[serde(default)]
    pub(crate) means: Option<Means>,
}

/// What answers took on average, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Means {
    /// Before the move.
    pub(crate) undisturbed_ms: f64,
    /// While the guest was moved, the pause included.
    pub(crate) moving_ms: f64,
    /// From then on.
    pub(crate) afterwards_ms: f64,
}

impl Responses {
    /// Sums up the requests since `before`. `None`: there were none before the move, or none outside the pause.
    pub(crate) fn of(
        exchanges: &[Exchange],
        before: SystemTime,
        moving: Span,
        pause: Span,
    ) -> Option<Responses> {
        let asked_in = |from: SystemTime, to: SystemTime| {
            exchanges.iter().filter(move |exchange| (from..to).contains(&exchange.asked))
        };
        let outside = |exchange: &&Exchange| {
            exchange.asked >= pause.ended || exchange.answered.unwrap_or(exchange.asked) <= pause.started
        };
        let undisturbed = waits_ms(asked_in(before, moving.started));
        Some(Responses {
            undisturbed_p50_ms: percentile(&undisturbed, 50)?,
            undisturbed_p99_ms: percentile(&undisturbed, 99)?,
            moving_p99_ms: percentile(&waits_ms(asked_in(moving.started, moving.ended).filter(outside)), 99)?,
            longest_gap_ms: longest_gap_ms(exchanges, moving),
            means: Means::of(exchanges, before, moving),
        })
    }
}

impl Means {
    /// `None`: nothing was asked before, during or after the move.
    fn of(exchanges: &[Exchange], before: SystemTime, moving: Span) -> Option<Means> {
        let asked_in = |from: SystemTime, to: SystemTime| {
            waits_ms(exchanges.iter().filter(|exchange| (from..to).contains(&exchange.asked)))
        };
        // Afterwards the watching ends, and with it what is under way.
        let answered = exchanges.iter().filter(|exchange| exchange.answered.is_some());
        let afterwards = waits_ms(answered.filter(|exchange| exchange.asked >= moving.ended));
        Some(Means {
            undisturbed_ms: mean(&asked_in(before, moving.started))?,
            moving_ms: mean(&asked_in(moving.started, moving.ended))?,
            afterwards_ms: mean(&afterwards)?,
        })
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// One that wasn't answered counts as if it had been when the client's patience was over.
fn end(exchange: &Exchange) -> SystemTime {
    exchange.answered.unwrap_or(exchange.asked + PATIENCE)
}

/// How long each waited, the shortest first.
fn waits_ms<'a>(exchanges: impl Iterator<Item = &'a Exchange>) -> Vec<f64> {
    let mut waits: Vec<f64> = exchanges.map(|exchange| milliseconds(exchange.asked, end(exchange))).collect();
    waits.sort_by(f64::total_cmp);
    waits
}

/// The smallest value that so many percent don't exceed; `None`: there are none.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

/// The longest time without an answer from the beginning of a move to the first answer after it.
fn longest_gap_ms(exchanges: &[Exchange], moving: Span) -> f64 {
    let answers = exchanges.iter().filter_map(|exchange| exchange.answered);
    let mut answers: Vec<SystemTime> = answers.filter(|at| *at >= moving.started).collect();
    answers.sort();
    let after = answers.partition_point(|at| *at < moving.ended);
    let last = answers.get(after).copied().unwrap_or(moving.ended);
    let marks: Vec<SystemTime> =
        [moving.started].into_iter().chain(answers[..after].iter().copied()).chain([last]).collect();
    marks.windows(2).map(|pair| milliseconds(pair[0], pair[1])).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(milliseconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds)
    }

    fn span(started: u64, ended: u64) -> Span {
        Span { started: at(started), ended: at(ended) }
    }

    fn exchange(asked: u64, wait: u64) -> Exchange {
        Exchange { asked: at(asked), answered: Some(at(asked + wait)) }
    }

    /// A request every 10 ms, from 0 to 2 s; moved from 1 s on.
    fn steady() -> Vec<Exchange> {
        (0..200).map(|number| exchange(number * 10, if number % 10 == 0 { 6 } else { 2 })).collect()
    }

    #[test]
    fn requests_that_met_the_pause_show_in_the_gap_only() {
        let mut exchanges = steady();
        // Stopped from 1,500 to 1,600: what was asked then waits until 1,610, and one of before as well.
        for exchange in &mut exchanges[149..160] {
            exchange.answered = Some(at(1_610));
        }
        let seen = Responses::of(&exchanges, at(0), span(1_000, 2_000), span(1_495, 1_600)).unwrap();
        assert_eq!(seen.means, None, "nothing was asked afterwards");
        let quiet = Responses { undisturbed_p50_ms: 2.0, undisturbed_p99_ms: 6.0, ..seen };
        assert_eq!(seen, Responses { moving_p99_ms: 6.0, longest_gap_ms: 124.0, ..quiet });
        let pause_elsewhere = Responses::of(&exchanges, at(0), span(1_000, 2_000), span(1_800, 1_801));
        assert_eq!(pause_elsewhere.unwrap().moving_p99_ms, 120.0);
    }

    #[test]
    fn afterwards_begins_when_the_guest_has_arrived() {
        let mut exchanges = steady();
        exchanges[199].answered = None;
        let means = Means::of(&exchanges, at(0), span(500, 1_000)).unwrap();
        assert_eq!((means.undisturbed_ms, means.moving_ms), (2.4, 2.4));
        assert!((means.afterwards_ms - 2.4).abs() < 0.01);
        assert_eq!(Means::of(&exchanges, at(0), span(1_000, 2_000)), None);
    }

    #[test]
    fn no_answer_is_the_slowest_answer() {
        let mut exchanges = steady();
        exchanges[110].answered = None;
        exchanges[111].answered = None;
        let seen = Responses::of(&exchanges, at(0), span(1_000, 2_000), span(1_500, 1_500)).unwrap();
        assert_eq!(seen.moving_p99_ms, PATIENCE.as_secs_f64() * 1e3);
    }

    #[test]
    fn a_gap_reaches_to_the_first_answer_after_the_move() {
        let exchanges = [exchange(90, 30), exchange(140, 20), exchange(190, 70), exchange(270, 500)];
        assert_eq!(longest_gap_ms(&exchanges, span(100, 200)), 100.0);
        assert_eq!(longest_gap_ms(&exchanges[..2], span(100, 200)), 40.0);
    }

    #[test]
    fn percentiles_are_the_nearest_rank() {
        assert_eq!(percentile(&[], 99), None);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 50), Some(2.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&hundred, 99), percentile(&hundred[..99], 99)), (Some(99.0), Some(99.0)));
    }
}
