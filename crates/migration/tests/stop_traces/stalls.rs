//! What each choice for a target that can't be met comes to, on guests that react to it.

use godwit_migration::{
    stall::{OnStall, Ruling, Stall},
    stop::{Sample, StopPolicy, StopReason},
};

use crate::{
    gate,
    generator::{WORKLOADS, Workload, drive},
};

const TARGET_MS: f64 = 50.0;

/// How a migration ended.
#[derive(Debug, Clone, Copy)]
struct End {
    at_ms: u64,
    /// Why the guest was stopped, and the pause; `None` if it wasn't.
    stop: Option<(StopReason, f64)>,
    given_up: bool,
    /// How much later the guest is with its work because it was slowed.
    slowed_ms: f64,
    slowest_percent: u8,
}

impl End {
    /// How much later it is in all.
    fn late_ms(&self) -> f64 {
        self.slowed_ms + self.stop.map_or(0.0, |(_, pause_ms)| pause_ms)
    }
}

fn end(workload: &Workload, seed: u64, choice: OnStall) -> End {
    let (mut gate, mut stall) = (gate(TARGET_MS), Stall::new(choice, TARGET_MS));
    let mut end = End { at_ms: 0, stop: None, given_up: false, slowed_ms: 0.0, slowest_percent: 100 };
    drive(workload, seed, |sample: &Sample| {
        let elapsed_ms = (sample.now_ms - end.at_ms) as f64;
        end.slowed_ms += elapsed_ms * (1.0 - f64::from(stall.share().percent()) / 100.0);
        end.at_ms = sample.now_ms;
        match stall.observe(sample, gate.observe(sample)).0 {
            Ruling::Run(share) => {
                end.slowest_percent = end.slowest_percent.min(share.percent());
                return Some(share.percent().into());
            }
            Ruling::Stop(reason) => end.stop = Some((reason, sample.predicted_pause_ms)),
            Ruling::GiveUp => end.given_up = true,
        }
        None
    });
    end
}

fn workload(name: &str) -> Workload {
    let found = WORKLOADS.into_iter().find(|workload| workload.name == name).expect("a workload");
    Workload { duration_ms: 120_000, ..found }
}

/// Guests that write up to ten times what their link carries.
fn stalling() -> Vec<(&'static str, Workload)> {
    let (heavy, harsh) = (workload("heavy"), workload("harsh"));
    vec![
        ("heavy, 40 Mbit/s", Workload { rate_bytes_per_second: 5_000_000, ..heavy }),
        ("heavy, 20 Mbit/s", Workload { rate_bytes_per_second: 2_500_000, duration_ms: 300_000, ..heavy }),
        ("harsh, 100 Mbit/s", harsh),
        ("harsh, 40 Mbit/s", Workload { rate_bytes_per_second: 5_000_000, duration_ms: 300_000, ..harsh }),
    ]
}

#[test]
#[ignore = "prints a table in docs/stopping.md"]
fn compare_choices() {
    for (name, workload) in stalling().into_iter().chain([("bursts", workload("bursts"))]) {
        println!("{name}");
        for choice in [OnStall::Switch, OnStall::Throttle, OnStall::Wait, OnStall::Cancel] {
            for seed in 1..=3 {
                let end = end(&workload, seed, choice);
                println!("  {choice:?} {seed}: {end:?}, late by {:.0} ms", end.late_ms());
            }
        }
    }
}

#[test]
fn a_throttled_guest_meets_its_target() {
    for (name, workload) in stalling() {
        let end = end(&workload, 1, OnStall::Throttle);
        assert!(matches!(end.stop, Some((StopReason::TargetMet, _))), "{name}: {end:?}");
    }
}

#[test]
fn a_guest_that_keeps_up_is_neither_slowed_nor_given_up() {
    for name in ["light", "medium", "heavy", "bursts"] {
        for choice in [OnStall::Throttle, OnStall::Cancel, OnStall::Wait] {
            let end = end(&workload(name), 1, choice);
            assert!(matches!(end.stop, Some((StopReason::TargetMet, _))), "{name}, {choice:?}: {end:?}");
            assert_eq!(end.slowest_percent, 100, "{name}: {end:?}");
        }
    }
}

#[test]
fn who_waits_waits_and_who_gives_up_gives_up() {
    let harsh = workload("harsh");
    let (waits, gives_up) = (end(&harsh, 1, OnStall::Wait), end(&harsh, 1, OnStall::Cancel));
    assert!(waits.stop.is_none() && !waits.given_up && waits.at_ms == harsh.duration_ms, "{waits:?}");
    assert!(gives_up.given_up && gives_up.slowed_ms == 0.0, "{gives_up:?}");
}
