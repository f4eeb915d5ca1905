//! The stop policies on traces of migrations that were never stopped.
//!
//! `traces/*-recorded.csv` come from real migrations (`docs/stopping.md`), the others from [`generator`]; `cargo test -p godwit-migration --test stop_traces -- --ignored` writes them
//! anew and prints the table of windows in `docs/stopping.md`.

mod generator;
mod stalls;

use std::{fmt::Write, fs, path::PathBuf};

use godwit_migration::stop::{
    Gate, GateSettings, Sample, SmartStop, SmartStopSettings, StopPolicy, StopReason, Verdict,
};

use generator::{WORKLOADS, Workload, generate};

const HEADER: &str = "now_ms,pass,owed_blocks,never_sent_blocks,owed_encoded_bytes,in_flight_bytes,sent_blocks,\
                      dirtied_blocks,rate_bytes_per_second,dirty_bytes_per_second,predicted_pause_ms";

/// Where and how a policy stopped.
#[derive(Debug, Clone, Copy)]
struct Stop {
    at_ms: u64,
    pause_ms: f64,
    reason: StopReason,
    /// Samples before the stop at which the policy said that the migration is stalled.
    stalled: usize,
}

fn replay(policy: &mut dyn StopPolicy, trace: &[Sample]) -> Option<Stop> {
    let mut stalled = 0;
    for sample in trace {
        match policy.observe(sample) {
            Verdict::Continue => {}
            Verdict::Stalled { .. } => stalled += 1,
            Verdict::Stop { reason } => {
                return Some(Stop {
                    at_ms: sample.now_ms,
                    pause_ms: sample.predicted_pause_ms,
                    reason,
                    stalled,
                });
            }
        }
    }
    None
}

fn gate(target_ms: f64) -> Gate {
    Gate::new(GateSettings::new(target_ms))
}

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "traces", &format!("{name}.csv")].iter().collect()
}

fn recorded(name: &str) -> Vec<Sample> {
    let text = fs::read_to_string(path(name)).expect("the traces are in the repository");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(HEADER));
    lines.map(parse).collect()
}

fn parse(line: &str) -> Sample {
    let fields: Vec<&str> = line.split(',').collect();
    let number = |index: usize| fields[index].parse().expect("a whole number");
    Sample {
        now_ms: number(0),
        pass: number(1),
        owed_blocks: number(2),
        never_sent_blocks: number(3),
        owed_encoded_bytes: number(4),
        in_flight_bytes: number(5),
        sent_blocks: number(6),
        dirtied_blocks: number(7),
        rate_bytes_per_second: number(8),
        dirty_bytes_per_second: number(9),
        predicted_pause_ms: fields[10].parse().expect("a number"),
    }
}

fn csv(trace: &[Sample]) -> String {
    let mut text = format!("{HEADER}\n");
    for sample in trace {
        writeln!(
            text,
            "{},{},{},{},{},{},{},{},{},{},{:.1}",
            sample.now_ms,
            sample.pass,
            sample.owed_blocks,
            sample.never_sent_blocks,
            sample.owed_encoded_bytes,
            sample.in_flight_bytes,
            sample.sent_blocks,
            sample.dirtied_blocks,
            sample.rate_bytes_per_second,
            sample.dirty_bytes_per_second,
            sample.predicted_pause_ms
        )
        .expect("a string takes everything");
    }
    text
}

/// The shortest pause of a trace once everything was sent at least once.
fn shortest_pause_ms(trace: &[Sample]) -> f64 {
    let complete = trace.iter().filter(|sample| sample.never_sent_blocks == 0);
    complete.map(|sample| sample.predicted_pause_ms).fold(f64::INFINITY, f64::min)
}

#[test]
#[ignore = "writes the traces"]
fn write_traces() {
    for workload in WORKLOADS {
        fs::write(path(workload.name), csv(&generate(&workload, 1))).unwrap();
    }
}

#[test]
#[ignore = "prints the tables in docs/stopping.md"]
fn compare_constants() {
    const SEEDS: u64 = 10;
    for workload in WORKLOADS {
        let workload = Workload { duration_ms: 120_000, ..workload };
        let traces: Vec<_> = (1..=SEEDS).map(|seed| generate(&workload, seed)).collect();
        let best = traces.iter().map(|trace| shortest_pause_ms(trace)).sum::<f64>() / traces.len() as f64;
        println!("{}: best {best:.0} ms", workload.name);
        for window in [1, 2, 4, 5, 6, 8, 12] {
            let settings = SmartStopSettings { window, ..SmartStopSettings::default() };
            let policy = || Box::new(SmartStop::new(settings)) as Box<dyn StopPolicy>;
            summarise(&format!("smart stop, window {window}"), &traces, policy);
        }
        for patience_ms in [500, 1_000, 2_000, 3_000, 5_000] {
            let settings = GateSettings { patience_ms, ..GateSettings::new(50.0) };
            let policy = || Box::new(Gate::new(settings)) as Box<dyn StopPolicy>;
            summarise(&format!("gate, patience {patience_ms} ms"), &traces, policy);
        }
    }
}

fn summarise(what: &str, traces: &[Vec<Sample>], policy: impl Fn() -> Box<dyn StopPolicy>) {
    let stops: Vec<Stop> = traces.iter().filter_map(|trace| replay(&mut *policy(), trace)).collect();
    let mean = |of: fn(&Stop) -> f64| stops.iter().map(of).sum::<f64>() / stops.len() as f64;
    let worst = stops.iter().map(|stop| stop.pause_ms).fold(0.0, f64::max);
    println!(
        "  {what}: pause {:8.1} ms (worst {worst:8.1}), stop at {:5.1} s, {} of {} stopped",
        mean(|stop| stop.pause_ms),
        mean(|stop| stop.at_ms as f64 / 1e3),
        stops.len(),
        traces.len(),
    );
}

#[test]
fn the_gate_meets_its_target_where_the_link_can_follow() {
    for name in ["light", "medium", "heavy", "bursts"] {
        let stop = replay(&mut gate(50.0), &recorded(name)).expect(name);
        assert_eq!(stop.reason, StopReason::TargetMet, "{name}: {stop:?}");
        assert!(stop.pause_ms <= 50.0, "{name}: {stop:?}");
    }
}

#[test]
fn the_gate_waits_only_a_moment_for_better_than_its_target() {
    for name in ["light", "medium", "heavy"] {
        let trace = recorded(name);
        let met = |sample: &&Sample| sample.never_sent_blocks == 0 && sample.predicted_pause_ms <= 50.0;
        let first_ms = trace.iter().find(met).expect(name).now_ms;
        let stop = replay(&mut gate(50.0), &trace).expect(name);
        assert!(stop.at_ms - first_ms <= 500, "{name}: {stop:?}, met at {first_ms}");
    }
}

#[test]
fn the_gate_takes_about_the_shortest_pause_when_the_target_is_out_of_reach() {
    for name in ["light", "medium", "heavy", "harsh"] {
        let trace = recorded(name);
        let stop = replay(&mut gate(1.0), &trace).expect(name);
        assert_eq!(stop.reason, StopReason::LocalMinimum, "{name}: {stop:?}");
        let seen: Vec<_> = trace.iter().copied().filter(|sample| sample.now_ms <= stop.at_ms).collect();
        assert!(stop.pause_ms <= 1.25 * shortest_pause_ms(&seen), "{name}: {stop:?}");
    }
}

#[test]
fn the_gate_says_when_the_guest_is_faster_than_the_link() {
    let stop = replay(&mut gate(50.0), &recorded("harsh")).unwrap();
    assert!(stop.stalled > 10, "{stop:?}");
    for name in ["light", "medium", "heavy"] {
        assert_eq!(replay(&mut gate(50.0), &recorded(name)).unwrap().stalled, 0, "{name}");
    }
}

#[test]
fn the_gate_stops_about_when_it_says_that_its_patience_ends() {
    for name in ["harsh", "pattern-recorded"] {
        let trace = recorded(name);
        let mut policy = gate(50.0);
        let stop = replay(&mut policy, &trace).expect(name);
        let ends_ms = policy.patience_ends_ms().expect("it had something to decide");
        assert!(stop.at_ms <= ends_ms + 3_000, "{name}: {stop:?}, patience until {ends_ms}");
    }
}

#[test]
fn the_gate_never_stops_on_blocks_that_the_target_never_had() {
    for name in ["light", "medium", "heavy", "harsh", "bursts"] {
        let trace = recorded(name);
        let stop = replay(&mut gate(1e9), &trace).expect(name);
        let at = trace.iter().find(|sample| sample.now_ms == stop.at_ms).unwrap();
        assert_eq!(at.never_sent_blocks, 0, "{name}");
    }
}

#[test]
fn smart_stop_stops_near_the_minimum_where_the_link_can_follow() {
    for name in ["light", "medium", "heavy", "bursts"] {
        let trace = recorded(name);
        let mut policy = SmartStop::new(SmartStopSettings::default());
        let stop = replay(&mut policy, &trace).expect(name);
        assert_eq!(stop.reason, StopReason::WindowMinimum, "{name}: {stop:?}");
        assert!(stop.pause_ms <= 3.0 * shortest_pause_ms(&trace), "{name}: {stop:?}");
    }
}

/// Recorded with a target of 1 ms, so that nothing was stopped for as long as the gate's patience lasts.
#[test]
fn real_migrations_are_stopped_near_the_best_that_they_offer() {
    for name in ["medium-recorded", "heavy-recorded"] {
        let trace = recorded(name);
        let best = shortest_pause_ms(&trace);
        let gate = replay(&mut gate(50.0), &trace).expect(name);
        assert_eq!(gate.reason, StopReason::TargetMet, "{name}: {gate:?}");
        assert!(gate.pause_ms <= 50.0 && gate.pause_ms <= 2.0 * best, "{name}: {gate:?}, best {best}");
        let mut policy = SmartStop::new(SmartStopSettings::default());
        let smart = replay(&mut policy, &trace).expect(name);
        assert!(smart.pause_ms <= 3.0 * best, "{name}: {smart:?}, best {best}");
    }
}

/// A guest that outruns its link, and one prediction far below all that followed: what the first deltas took was taken
/// for what all of them take. The predictor doesn't do that any more; the gate stands it.
#[test]
fn one_prediction_that_was_too_good_does_not_keep_a_guest_from_being_stopped() {
    let trace = recorded("pattern-recorded");
    let too_good = trace.iter().position(|sample| sample.predicted_pause_ms < 60.0).unwrap();
    let (began_ms, best) = (trace[too_good].now_ms, shortest_pause_ms(&trace[too_good + 1..]));
    let stop = replay(&mut gate(50.0), &trace).expect("stopped");
    assert_eq!(stop.reason, StopReason::LocalMinimum, "{stop:?}");
    assert!(stop.at_ms - began_ms <= 18_000 && stop.pause_ms <= 2.0 * best, "{stop:?}, best {best}");
}

#[test]
fn smart_stop_ends_after_its_last_iteration_at_the_latest() {
    let mut policy = SmartStop::new(SmartStopSettings { iteration_limit: 2, ..SmartStopSettings::default() });
    let rising = (0..100).map(|index| Sample {
        now_ms: index * 300,
        owed_blocks: 1_000 + index,
        sent_blocks: index * 1_100,
        dirtied_blocks: index * 1_100,
        ..Sample::default()
    });
    let stop = replay(&mut policy, &rising.collect::<Vec<_>>()).unwrap();
    assert_eq!((stop.reason, stop.at_ms), (StopReason::IterationLimit, 600));
}
