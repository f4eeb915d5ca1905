//! What a round does: all of it follows from the seed and the round's number alone.

use std::{fmt, time::Duration};

use fastrand::Rng;
use godwit_sim::lab::Place;

use super::fault::{Fault, Side};

/// How long a link may be gone before a migration gives it up.
pub(super) const RECONNECT_TIMEOUT_S: u64 = 5;
/// Moments of a migration that are aimed at, by what says that they have come.
const MOMENTS: [(Side, Sign); 11] = [
    (Side::Source, Sign::Phase("preparing")),
    (Side::Target, Sign::Phase("preparing")),
    (Side::Source, Sign::Phase("pre_copy")),
    (Side::Source, Sign::Record("offered")),
    (Side::Target, Sign::Record("awaited")),
    (Side::Source, Sign::Phase("switchover")),
    (Side::Source, Sign::Phase("handed_over")),
    (Side::Target, Sign::Phase("handed_over")),
    (Side::Target, Sign::Record("taking")),
    (Side::Target, Sign::Record("mine")),
    (Side::Target, Sign::Record("owner")),
];

/// One round.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub(super) round: u64,
    /// The fault that gives the round its row.
    pub(super) fault: Fault,
    /// Where the machine is when it begins.
    pub(super) from: Place,
    /// Options of `godwit migrate`.
    pub(super) options: Vec<String>,
    /// What strikes; the first is [`Plan::fault`].
    pub(super) strikes: Vec<Strike>,
}

/// A fault at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Strike {
    pub(super) fault: Fault,
    pub(super) moment: Moment,
    /// How long what it did lasts; of an agent that is killed, until it is started again.
    pub(super) lasts: Duration,
}

/// When a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Moment {
    /// So long after `godwit migrate` was called.
    Elapsed(Duration),
    /// So long after a sign.
    After(Side, Sign, Duration),
}

/// What says that a migration has come so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Sign {
    /// The worker says that this phase began.
    Phase(&'static str),
    /// The machine's token record is in this state.
    Record(&'static str),
}

impl Plan {
    /// The plan of a round; `only` is the fault that every round has. Otherwise, every kind comes once in as many
    /// rounds as there are kinds.
    pub(super) fn of(seed: u64, round: u64, only: Option<Fault>) -> Plan {
        let mut random = Rng::with_seed(mix(seed) ^ round);
        let fault = only.unwrap_or_else(|| fault_of(seed, round));
        let from = if random.bool() { Place::A } else { Place::B };
        let options = options(&mut random);
        let mut strikes = strikes_of(fault, &mut random);
        if random.u8(..10) < 3 {
            let besides = random.choice(Fault::BESIDES).filter(|besides| !overlap(*besides, fault));
            strikes.extend(besides.map(|besides| strike(besides, &mut random)));
        }
        Plan { round, fault, from, options, strikes }
    }

    /// Where the machine is to go.
    pub(super) fn to(&self) -> Place {
        if self.from == Place::A { Place::B } else { Place::A }
    }

    /// Whether one of the strikes is of this kind.
    pub(super) fn has(&self, fault: Fault) -> bool {
        self.strikes.iter().any(|strike| strike.fault == fault)
    }
}

impl fmt::Display for Strike {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lasts = self.lasts.as_millis();
        match self.moment {
            Moment::Elapsed(at) => write!(formatter, "{} {lasts} ms at {} ms", self.fault, at.as_millis()),
            Moment::After(side, sign, then) => {
                let (Sign::Phase(name) | Sign::Record(name)) = sign;
                write!(formatter, "{} {lasts} ms, {then:?} after {side:?} {name}", self.fault)
            }
        }
    }
}

/// Shuffles all kinds for each block of rounds.
fn fault_of(seed: u64, round: u64) -> Fault {
    let kinds = Fault::ALL.len() as u64;
    let mut all = Fault::ALL;
    Rng::with_seed(mix(seed ^ (1 << 63)) ^ (round / kinds)).shuffle(&mut all);
    all[(round % kinds) as usize]
}

/// A slow link makes the pause, in which most can go wrong, long enough to be hit.
fn options(random: &mut Rng) -> Vec<String> {
    let mut options = vec!["--reconnect-timeout".to_owned(), format!("{RECONNECT_TIMEOUT_S}s")];
    if let Some(bandwidth) = [None, Some("100Mbit"), Some("50Mbit")][random.usize(..3)] {
        options.extend(["--bandwidth", bandwidth].map(str::to_owned));
    }
    if random.u8(..4) == 0 {
        options.extend(["--connections", "2"].map(str::to_owned));
    }
    options
}

fn strikes_of(fault: Fault, random: &mut Rng) -> Vec<Strike> {
    let times = if fault == Fault::LinkCut { random.usize(1..=3) } else { 1 };
    (0..times).map(|_| strike(fault, random)).collect()
}

fn strike(fault: Fault, random: &mut Rng) -> Strike {
    Strike { fault, moment: moment(random), lasts: lasts(fault, random) }
}

fn moment(random: &mut Rng) -> Moment {
    if random.u8(..10) < 3 {
        return Moment::Elapsed(Duration::from_millis(random.u64(..4_000)));
    }
    let (side, sign) = MOMENTS[random.usize(..MOMENTS.len())];
    let then = match random.u8(..3) {
        0 => Duration::ZERO,
        1 => Duration::from_micros(random.u64(..20_000)),
        _ => Duration::from_millis(random.u64(..400)),
    };
    Moment::After(side, sign, then)
}

fn lasts(fault: Fault, random: &mut Rng) -> Duration {
    let mut between = |from: u64, to: u64| Duration::from_millis(random.u64(from..to));
    let reconnect_ms = RECONNECT_TIMEOUT_S * 1_000;
    match fault {
        Fault::LinkCut => between(500, reconnect_ms * 4 / 5),
        Fault::LinkCutLong => between(reconnect_ms + 1_000, reconnect_ms + 5_000),
        Fault::KillSourceAgent | Fault::KillTargetAgent => between(0, 2_000),
        Fault::OperatorStopCont => between(100, 3_000),
        Fault::FullDiskSource | Fault::FullDiskTarget => between(500, 6_000),
        _ if fault.victim().is_some() && !fault.kills() => match random.u8(..7) {
            0 => Duration::from_millis(random.u64(5_000..30_000)),
            _ => Duration::from_millis(random.u64(1_000..5_000)),
        },
        _ => Duration::ZERO,
    }
}

/// Whether two faults would be after the same thing.
fn overlap(one: Fault, other: Fault) -> bool {
    let is_cut = |fault| matches!(fault, Fault::LinkCut | Fault::LinkCutLong);
    one == other || is_cut(one) && is_cut(other) || one.victim().is_some() && one.victim() == other.victim()
}

/// SplitMix64's finaliser: neighbouring seeds become distant ones.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_and_round_say_everything() {
        for round in 0..100 {
            assert_eq!(Plan::of(1, round, None), Plan::of(1, round, None));
        }
        assert_ne!(Plan::of(1, 3, None), Plan::of(2, 3, None));
    }

    #[test]
    fn every_kind_comes_once_in_each_block() {
        let kinds = Fault::ALL.len() as u64;
        for block in 0..4 {
            let mut faults: Vec<Fault> =
                (block * kinds..(block + 1) * kinds).map(|round| Plan::of(7, round, None).fault).collect();
            faults.sort();
            assert_eq!(faults, Fault::ALL);
        }
    }

    #[test]
    fn no_two_faults_are_after_the_same_thing() {
        for round in 0..2_000 {
            let plan = Plan::of(1, round, None);
            let others = plan.strikes.iter().filter(|strike| strike.fault != plan.fault);
            assert!(others.clone().count() <= 1);
            others.for_each(|strike| assert!(!overlap(strike.fault, plan.fault)));
        }
    }
}
