//! What to do when the target can't be met.
//!
//! ```text
//!                         ┌─ wait ────► goes on; only the target stops the guest
//!   policy says: stalled  ├─ switch ──► goes on; the policy's shortest pause stops the guest
//!   for 5 s, or stop  ────┤
//!   above the target      ├─ throttle ► slowed ──► target met, or nothing more to be had: stop
//!                         └─ cancel ──► given up; the guest was never touched
//! ```
//!
//! The operator may choose anew at any time. A guest is slowed only while the link carries: in an outage it gets its full
//! speed back, and a throttle begins afresh after it.

use crate::{
    stop::{Sample, StopReason, Verdict},
    throttle::{self, CpuShare, Throttle, first_share},
};

/// How long the guest has to be ahead of the link for the stall to be certain. Longer than the gate's patience and than a
/// burst: what is over by itself is no stall.
const CERTAIN_MS: u64 = 5_000;

/// What the operator wants done when the target can't be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStall {
    /// Go on until the target can be met.
    Wait,
    /// Slow the guest until it can.
    Throttle,
    /// Stop the guest at about the shortest pause to be had.
    Switch,
    /// Give up.
    Cancel,
}

/// What follows from a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ruling {
    /// The guest runs on, at this share of its speed.
    Run(CpuShare),
    /// Stop the guest.
    Stop(StopReason),
    /// Give the migration up.
    GiveUp,
}

/// Applies the operator's choice to what the stop policy says.
#[derive(Debug, Clone)]
pub struct Stall {
    choice: OnStall,
    target_ms: f64,
    ahead_since_ms: Option<u64>,
    is_told: bool,
    throttle: Option<Throttle>,
}

impl Stall {
    /// Nothing has stalled yet.
    pub fn new(choice: OnStall, target_ms: f64) -> Self {
        Self { choice, target_ms, ahead_since_ms: None, is_told: false, throttle: None }
    }

    /// Takes a new choice; a guest that was slowed gets its full speed back, unless it is to be slowed again.
    pub fn choose(&mut self, choice: OnStall) {
        self.choice = choice;
        self.throttle = None;
    }

    /// What is done when the target can't be met.
    pub fn choice(&self) -> OnStall {
        self.choice
    }

    /// The share of its speed that the guest has now.
    pub fn share(&self) -> CpuShare {
        self.throttle.as_ref().map_or(CpuShare::FULL, Throttle::share)
    }

    /// The link carries nothing: a guest isn't slowed for that, and what it does meanwhile says nothing.
    pub fn link_is_silent(&mut self) {
        self.throttle = None;
        self.ahead_since_ms = None;
    }

    /// Looks at a sample and at what the policy says to it. The prices come with the first sample at which the stall is
    /// certain, and never again.
    pub fn observe(&mut self, sample: &Sample, verdict: Verdict) -> (Ruling, Option<Prices>) {
        // Smart Stop's reasons know of no target: it stops where CloudNet does.
        if let Verdict::Stop { reason } = verdict
            && reason != StopReason::LocalMinimum
        {
            return (Ruling::Stop(reason), None);
        }
        let is_certain = self.is_certain(sample, verdict);
        let prices = (is_certain && !self.is_told).then(|| Prices::of(sample, self.target_ms));
        self.is_told |= is_certain;
        (self.rule(sample, verdict, is_certain), prices)
    }

    fn rule(&mut self, sample: &Sample, verdict: Verdict, is_certain: bool) -> Ruling {
        match (self.choice, verdict) {
            (OnStall::Switch, Verdict::Stop { reason }) => Ruling::Stop(reason),
            (OnStall::Cancel, _) if is_certain => Ruling::GiveUp,
            (OnStall::Throttle, verdict) => self.slow(sample, verdict, is_certain),
            _ => Ruling::Run(CpuShare::FULL),
        }
    }

    fn slow(&mut self, sample: &Sample, verdict: Verdict, is_certain: bool) -> Ruling {
        if is_certain && self.throttle.is_none() {
            self.throttle = Some(Throttle::new(sample));
        }
        let Some(throttle) = &mut self.throttle else { return Ruling::Run(CpuShare::FULL) };
        let share = throttle.observe(sample);
        match verdict {
            Verdict::Stop { reason } if throttle.is_exhausted() => Ruling::Stop(reason),
            _ => Ruling::Run(share),
        }
    }

    /// Whether the target is out of reach beyond doubt. Before the target has everything once, nothing is.
    fn is_certain(&mut self, sample: &Sample, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Stop { .. } => true,
            Verdict::Stalled { .. } if sample.never_sent_blocks == 0 => {
                let since_ms = *self.ahead_since_ms.get_or_insert(sample.now_ms);
                sample.now_ms >= since_ms + CERTAIN_MS
            }
            Verdict::Stalled { .. } | Verdict::Continue => {
                self.ahead_since_ms = None;
                false
            }
        }
    }
}

/// What each choice would cost, predicted at the moment at which one has to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prices {
    /// What the guest writes, as deltas.
    pub dirty_bytes_per_second: u64,
    /// What the link carries.
    pub rate_bytes_per_second: u64,
    /// The pause that is wanted.
    pub target_ms: f64,
    /// The pause of switching now.
    pub switch_pause_ms: f64,
    /// What slowing the guest would take; `None` if not even the slowest guest that may be would do.
    pub throttle: Option<ThrottlePrice>,
}

/// What it would take to slow a guest until the target is met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ThrottlePrice {
    /// To this share of its speed, at first.
    pub share: CpuShare,
    /// For about this long.
    pub time_ms: f64,
}

impl Prices {
    /// The prices at this sample.
    ///
    /// ```
    /// use godwit_migration::{stall::Prices, stop::Sample};
    ///
    /// let sample = Sample {
    ///     dirty_bytes_per_second: 50_000_000,
    ///     rate_bytes_per_second: 12_500_000,
    ///     predicted_pause_ms: 2_050.0,
    ///     ..Sample::default()
    /// };
    /// let throttle = Prices::of(&sample, 50.0).throttle.unwrap();
    /// assert_eq!(throttle.share.percent(), 12);
    /// assert_eq!(throttle.time_ms.round(), 4_846.0);
    /// ```
    pub fn of(sample: &Sample, target_ms: f64) -> Self {
        Self {
            dirty_bytes_per_second: sample.dirty_bytes_per_second,
            rate_bytes_per_second: sample.rate_bytes_per_second,
            target_ms,
            switch_pause_ms: sample.predicted_pause_ms,
            throttle: throttle_price(sample, target_ms),
        }
    }

    /// Whether time alone could help: the guest writes less than the link carries.
    pub fn waiting_may_end(&self) -> bool {
        self.dirty_bytes_per_second < self.rate_bytes_per_second
    }
}

/// A guest slowed to a share writes in proportion; what the link carries beyond that shortens the pause.
fn throttle_price(sample: &Sample, target_ms: f64) -> Option<ThrottlePrice> {
    let share = first_share(sample);
    let written = f64::from(share.percent()) / 100.0 * sample.dirty_bytes_per_second as f64;
    let gain = 1.0 - written / sample.rate_bytes_per_second as f64;
    let drain_ms = (sample.predicted_pause_ms - target_ms).max(0.0) / gain;
    let is_possible = gain > 0.0 && drain_ms.is_finite();
    is_possible.then_some(ThrottlePrice { share, time_ms: drain_ms + throttle::STEP_MS as f64 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STALLED: Verdict = Verdict::Stalled { predicted_pause_ms: 1_000.0 };
    const MINIMUM: Verdict = Verdict::Stop { reason: StopReason::LocalMinimum };
    const MET: Verdict = Verdict::Stop { reason: StopReason::TargetMet };
    const FULL: Ruling = Ruling::Run(CpuShare::FULL);

    fn at(now_ms: u64) -> Sample {
        Sample {
            now_ms,
            rate_bytes_per_second: 1_000_000,
            dirty_bytes_per_second: 2_000_000,
            predicted_pause_ms: 1_000.0,
            ..Sample::default()
        }
    }

    fn rulings(choice: OnStall, verdicts: &[(u64, Verdict)]) -> Vec<Ruling> {
        let mut stall = Stall::new(choice, 50.0);
        verdicts.iter().map(|(now_ms, verdict)| stall.observe(&at(*now_ms), *verdict).0).collect()
    }

    #[test]
    fn a_met_target_stops_whatever_was_chosen() {
        for choice in [OnStall::Wait, OnStall::Throttle, OnStall::Switch, OnStall::Cancel] {
            assert_eq!(rulings(choice, &[(0, MET)]), [Ruling::Stop(StopReason::TargetMet)]);
        }
    }

    #[test]
    fn waiting_never_stops_above_the_target() {
        assert_eq!(rulings(OnStall::Wait, &[(0, STALLED), (9_000, STALLED), (90_000, MINIMUM)]), [FULL; 3]);
    }

    #[test]
    fn switching_is_left_to_the_policy() {
        let expected = [FULL, FULL, Ruling::Stop(StopReason::LocalMinimum)];
        assert_eq!(rulings(OnStall::Switch, &[(0, STALLED), (9_000, STALLED), (9_100, MINIMUM)]), expected);
    }

    #[test]
    fn giving_up_waits_until_the_stall_is_certain() {
        let verdicts =
            [(0, STALLED), (4_000, Verdict::Continue), (4_100, STALLED), (9_000, STALLED), (9_100, STALLED)];
        assert_eq!(rulings(OnStall::Cancel, &verdicts), [FULL, FULL, FULL, FULL, Ruling::GiveUp]);
        assert_eq!(rulings(OnStall::Cancel, &[(0, MINIMUM)]), [Ruling::GiveUp]);
    }

    #[test]
    fn nothing_is_certain_before_the_target_has_everything_once() {
        let mut stall = Stall::new(OnStall::Cancel, 50.0);
        for now_ms in [0, 60_000] {
            let early = Sample { never_sent_blocks: 1, ..at(now_ms) };
            assert_eq!(stall.observe(&early, STALLED), (FULL, None));
        }
    }

    #[test]
    fn a_throttled_guest_is_stopped_when_nothing_more_is_to_be_had() {
        let mut stall = Stall::new(OnStall::Throttle, 50.0);
        let ruling = |now_ms, stall: &mut Stall| stall.observe(&at(now_ms), MINIMUM).0;
        assert!(matches!(ruling(0, &mut stall), Ruling::Run(share) if share < CpuShare::FULL));
        let last = (1..60)
            .map(|second| ruling(second * 1_000, &mut stall))
            .find(|it| *it == Ruling::Stop(StopReason::LocalMinimum));
        assert!(last.is_some());
    }

    #[test]
    fn a_guest_is_not_slowed_while_the_link_is_silent_or_after_another_choice() {
        let mut stall = Stall::new(OnStall::Throttle, 50.0);
        stall.observe(&at(0), MINIMUM);
        assert!(stall.share() < CpuShare::FULL);
        stall.link_is_silent();
        assert_eq!(stall.share(), CpuShare::FULL);
        stall.observe(&at(1_000), MINIMUM);
        assert!(stall.share() < CpuShare::FULL);
        stall.choose(OnStall::Wait);
        assert_eq!((stall.share(), stall.observe(&at(2_000), MINIMUM).0), (CpuShare::FULL, FULL));
    }

    #[test]
    fn prices_are_told_once_and_when_the_stall_is_certain() {
        let mut stall = Stall::new(OnStall::Wait, 50.0);
        assert_eq!(stall.observe(&at(0), STALLED).1, None);
        let prices = stall.observe(&at(5_000), STALLED).1.unwrap();
        assert_eq!(prices.switch_pause_ms, 1_000.0);
        assert!(!prices.waiting_may_end());
        assert_eq!(stall.observe(&at(6_000), MINIMUM).1, None);
    }

    #[test]
    fn what_not_even_the_slowest_guest_would_do_has_no_price() {
        let harsh = Sample { dirty_bytes_per_second: 30_000_000, ..at(0) };
        assert_eq!(Prices::of(&harsh, 50.0).throttle, None);
        let unknown = Sample { predicted_pause_ms: f64::INFINITY, ..at(0) };
        assert_eq!(Prices::of(&unknown, 50.0).throttle, None);
    }

    proptest! {
        /// Only who chose it is slowed or given up, and a pause above the target comes of two choices only.
        #[test]
        fn nothing_happens_that_was_not_chosen(
            verdicts in prop::collection::vec((0_u64..3_000, prop::sample::select(vec![STALLED, MINIMUM, MET, Verdict::Continue])), 1..100),
            choice in prop::sample::select(vec![OnStall::Wait, OnStall::Throttle, OnStall::Switch, OnStall::Cancel]),
        ) {
            let (mut stall, mut now_ms) = (Stall::new(choice, 50.0), 0);
            for (elapsed_ms, verdict) in verdicts {
                now_ms += elapsed_ms;
                match stall.observe(&at(now_ms), verdict).0 {
                    Ruling::Run(share) => prop_assert!(share == CpuShare::FULL || choice == OnStall::Throttle),
                    Ruling::Stop(StopReason::TargetMet) => prop_assert_eq!(verdict, MET),
                    Ruling::Stop(_) => prop_assert!(matches!(choice, OnStall::Switch | OnStall::Throttle)),
                    Ruling::GiveUp => prop_assert_eq!(choice, OnStall::Cancel),
                }
            }
        }
    }
}
