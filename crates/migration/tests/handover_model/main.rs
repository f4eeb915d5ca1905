//! Every order of messages, crashes and cancellations, tried on the hand-over's real state machines.
//!
//! The network loses, duplicates, delays and reorders. Workers, QEMUs and whole hosts crash between any two actions;
//! a worker restarts from its record, a host that crashed has lost what wasn't synced. QEMU keeps its own habits: a
//! source whose return path ends before SHUT was answered runs the guest again by itself. Operators cancel whenever
//! they like, and anything may time out.
//!
//! A model check that can't fail proves nothing, so every guard is also taken away in turn ([`mutant`]), and the
//! check must then fail.

mod mutant;
mod world;

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex},
    time::Instant,
};

use godwit_migration::handover::{Permission, RecordState, RunState};
use stateright::{Checker, HasDiscoveries, Model, Property};

use mutant::Mutant;
use world::{Scenario, SourceQemu, Step, TargetQemu, World};

const TWO_RUNNING: &str = "never two running copies";
const BACK_IN_TIME: &str = "never back to before the target ran";
const RUNNABLE_BESIDE_RUNNING: &str = "no runnable copy beside a running one";
const DESTROYED: &str = "the last complete copy is never destroyed";
const INCOMPLETE: &str = "only a complete copy runs";
const WOKEN: &str = "a paused guest stays paused";
const UNSETTLED: &str = "it settles once nothing fails any more";

impl Model for Scenario {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(self, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(&step, self);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(TWO_RUNNING, |scenario: &Self, world: &World| {
                !(world.source_runs(scenario) && world.target_runs())
            }),
            Property::always(BACK_IN_TIME, |scenario: &Self, world: &World| {
                !(world.source_runs(scenario) && world.history.target_ran)
            }),
            Property::always(RUNNABLE_BESIDE_RUNNING, |scenario: &Self, world: &World| {
                !(world.source_runs(scenario) && matches!(world.target_qemu, TargetQemu::Loaded { .. }))
            }),
            Property::always("never two hosts that may start it", |_, world: &World| {
                !(world.source_disk.may_run() && world.target_disk.may_run())
            }),
            Property::always(DESTROYED, |_, world: &World| !world.history.destroyed),
            Property::always(INCOMPLETE, |_, world: &World| {
                !matches!(world.target_qemu, TargetQemu::Running { complete: false })
            }),
            Property::always(WOKEN, |_, world: &World| !world.history.woken),
            Property::always(UNSETTLED, |scenario: &Self, world: &World| settles(scenario, world.clone())),
            Property::sometimes("the machine can arrive", |scenario: &Self, world: &World| {
                world.source_qemu == SourceQemu::Dead
                    && matches!(world.target_qemu, TargetQemu::Running { .. } | TargetQemu::Loaded { .. })
                    && world.faults_left == scenario.faults
            }),
            Property::sometimes("the machine can come back after the token left", |_, world: &World| {
                world.source_qemu == SourceQemu::Live
                    && world.network.iter().any(|packet| matches!(packet, world::Packet::Token(_)))
            }),
        ]
    }
}

/// Lets everything go well from here on: whoever is down comes back, everything that was sent arrives, and only when
/// nothing is left to do does anybody's patience end. Worlds from which it is known to end well are remembered.
fn settles(scenario: &Scenario, mut world: World) -> bool {
    world.attempts_left = 0;
    let mut passed = Vec::new();
    let mut steps = Vec::new();
    for _ in 0..ROUNDS {
        let before = fingerprint(&world);
        if is_settled(scenario, &world) || scenario.settling.knows(before) {
            scenario.settling.remember(&passed);
            return true;
        }
        passed.push(before);
        steps.clear();
        world.progress(scenario, &mut steps);
        steps.iter().for_each(|step| world.take_completely(step, scenario));
        if fingerprint(&world) == before {
            steps.clear();
            world.patience(&mut steps);
            steps.iter().for_each(|step| world.take_completely(step, scenario));
        }
    }
    false
}

/// More rounds than any way to a settled state takes.
const ROUNDS: usize = 64;

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// Worlds that are known to settle.
#[derive(Debug, Clone, Default)]
struct Settling(Arc<Mutex<HashSet<u64>>>);

impl Settling {
    fn knows(&self, world: u64) -> bool {
        self.0.lock().expect("no check panics while it holds the lock").contains(&world)
    }

    fn remember(&self, worlds: &[u64]) {
        self.0.lock().expect("no check panics while it holds the lock").extend(worlds);
    }
}

/// One host has the machine, both know it, and it does there what its operator wants, unless it died there.
fn is_settled(scenario: &Scenario, world: &World) -> bool {
    let (Some(here), there) = (&world.source_disk.written, &world.target_disk.written) else {
        return false;
    };
    let at_source = matches!(here.state, RecordState::Owner { .. })
        && (world.source_qemu == SourceQemu::Live
            || world.source_qemu == SourceQemu::PostMigrate && !scenario.run_state.is_live())
        && !world.target_disk.may_run()
        && !matches!(world.target_qemu, TargetQemu::Loaded { .. } | TargetQemu::Running { .. });
    let continues = scenario.run_state.is_live() && !scenario.leave_paused;
    let at_target = matches!(here.state, RecordState::GivenAway { settled: true, .. })
        && world.source_qemu == SourceQemu::Dead
        && there.as_ref().is_some_and(|record| record.may_run(false) == Permission::Granted)
        && match world.target_qemu {
            TargetQemu::Running { .. } => true,
            TargetQemu::Loaded { .. } => !continues,
            TargetQemu::Incoming { .. } | TargetQemu::Dead => false,
        };
    at_source || at_target
}

fn plain(faults: u8) -> Scenario {
    Scenario {
        faults,
        attempts: 1,
        run_state: RunState::Running,
        leave_paused: false,
        mutant: None,
        settling: Settling::default(),
    }
}

fn check(scenario: Scenario) {
    let began = Instant::now();
    let Scenario { faults, attempts, run_state, leave_paused, .. } = scenario;
    let checker = scenario.checker().spawn_bfs().join();
    println!(
        "{attempts} attempts, {faults} faults, {run_state:?}, leave paused {leave_paused}: \
         {} states, {} of them distinct, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64()
    );
    checker.assert_properties();
}

#[test]
fn one_attempt_survives_three_faults() {
    check(plain(3));
}

#[test]
fn two_attempts_survive_a_fault() {
    check(Scenario { attempts: 2, ..plain(1) });
}

/// 5.5 million states, three minutes, 0.8 GB.
#[test]
#[ignore = "takes minutes: cargo xtask test --long"]
fn two_attempts_survive_three_faults() {
    check(Scenario { attempts: 2, ..plain(3) });
}

#[test]
fn a_paused_guest_arrives_paused() {
    check(Scenario { run_state: RunState::Paused, ..plain(1) });
}

#[test]
fn a_guest_can_be_left_paused() {
    check(Scenario { leave_paused: true, ..plain(1) });
}

#[test]
fn every_mutant_is_caught_by_the_property_that_its_guard_is_for() {
    for mutant in Mutant::ALL {
        let expected = mutant.violates();
        let (attempts, faults) = if mutant == Mutant::SourceIgnoresEpochs { (2, 0) } else { (1, 2) };
        let run_state =
            if mutant == Mutant::SourceWakesPaused { RunState::Paused } else { RunState::Running };
        let scenario = Scenario { attempts, run_state, mutant: Some(mutant), ..plain(faults) };
        let finish = HasDiscoveries::AnyOf([expected].into());
        let checker = scenario.checker().finish_when(finish).spawn_bfs().join();
        let found = checker.discovery(expected).map(|path| path.into_actions().len());
        println!("{mutant:?}: {expected:?} fails after {found:?} steps");
        assert!(found.is_some(), "{mutant:?} goes unnoticed in {} states", checker.unique_state_count());
    }
}
