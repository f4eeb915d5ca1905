//! Two hosts, their disks, QEMUs and workers, and the network between them. The workers' decisions are the product's
//! own [`Source`] and [`Target`]; everything else is what the real surroundings can do to them.

use std::collections::{BTreeSet, VecDeque};

use godwit_migration::handover::{
    Action, Epoch, Message, Permission, QemuState, Record, RecordState, RunState, Source, SourceEvent,
    SourceSettings, Sync, Target, TargetEvent,
};

use crate::{Settling, mutant::Mutant};

/// What is checked.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    /// Crashes of workers, QEMUs and hosts, all together.
    pub(crate) faults: u8,
    /// Attempts to move the machine.
    pub(crate) attempts: u8,
    /// What the guest does before the stop.
    pub(crate) run_state: RunState,
    /// The operator's wish.
    pub(crate) leave_paused: bool,
    /// A guard that is taken away.
    pub(crate) mutant: Option<Mutant>,
    /// What the check has found out so far.
    pub(crate) settling: Settling,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Source,
    Target,
}

/// Something on the network. It stays there for ever, so it can arrive late, twice, in any order, or never.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Packet {
    ToSource(Message),
    ToTarget(Message),
    Token(Epoch),
}

/// A file that survives the host only in the version that was synced.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Disk {
    pub(crate) written: Option<Record>,
    pub(crate) synced: Option<Record>,
    /// The host has booted since `written` was written.
    pub(crate) rebooted: bool,
}

impl Disk {
    fn new(record: Option<Record>) -> Self {
        Self { written: record.clone(), synced: record, rebooted: false }
    }

    fn lose_what_was_not_synced(&mut self) {
        self.written = self.synced.clone();
        self.rebooted = true;
    }

    pub(crate) fn may_run(&self) -> bool {
        self.written.as_ref().is_some_and(|record| record.may_run(self.rebooted) == Permission::Granted)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SourceQemu {
    /// The guest does what its operator wants.
    Live,
    /// Stopped for the switch-over, the stream not completely written.
    Stopped {
        shut: bool,
    },
    PostMigrate,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum TargetQemu {
    Incoming {
        complete: bool,
    },
    /// Loaded and paused.
    Loaded {
        complete: bool,
    },
    Running {
        complete: bool,
    },
    Dead,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Option<Source>,
    pub(crate) source_pending: VecDeque<Action>,
    pub(crate) source_disk: Disk,
    pub(crate) source_qemu: SourceQemu,
    pub(crate) gate_open: bool,
    pub(crate) target: Option<Target>,
    pub(crate) target_pending: VecDeque<Action>,
    pub(crate) target_disk: Disk,
    pub(crate) target_qemu: TargetQemu,
    pub(crate) loading: bool,
    /// `cont` failed, and the worker will hear of it.
    pub(crate) cont_failed: bool,
    pub(crate) network: BTreeSet<Packet>,
    pub(crate) faults_left: u8,
    pub(crate) attempts_left: u8,
    pub(crate) history: History,
}

/// What the properties have to remember.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct History {
    /// The guest has run at the target.
    pub(crate) target_ran: bool,
    /// The target's QEMU died by a fault after its host had claimed the machine.
    pub(crate) died_with_target: bool,
    /// The source's QEMU died by a fault.
    pub(crate) died_with_source: bool,
    /// godwit killed the last complete copy.
    pub(crate) destroyed: bool,
    /// A guest was continued that hadn't run before.
    pub(crate) woken: bool,
}

/// One thing that happens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Execute { side: Side, cont_works: bool },
    Deliver(Packet),
    Source(SourceEvent),
    Target(TargetEvent),
    Sync(Side),
    QemuStops,
    QemuCompletes,
    MemoryArrives,
    QemuLoads,
    CrashWorker { side: Side, migration_completes: bool },
    CrashHost(Side),
    KillQemu(Side),
    Restart(Side),
    BootMachine(Side),
    NextAttempt,
}

impl World {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        let mut world = Self {
            source: None,
            source_pending: VecDeque::new(),
            source_disk: Disk::new(Some(Record::created())),
            source_qemu: SourceQemu::Live,
            gate_open: false,
            target: Some(Target::new(None, "source")),
            target_pending: VecDeque::new(),
            target_disk: Disk::new(None),
            target_qemu: TargetQemu::Incoming { complete: false },
            loading: false,
            cont_failed: false,
            network: BTreeSet::new(),
            faults_left: scenario.faults,
            attempts_left: scenario.attempts,
            history: History::default(),
        };
        world.next_attempt(scenario);
        world
    }

    pub(crate) fn source_runs(&self, scenario: &Scenario) -> bool {
        self.source_qemu == SourceQemu::Live && scenario.run_state.is_live()
    }

    pub(crate) fn target_runs(&self) -> bool {
        matches!(self.target_qemu, TargetQemu::Running { .. })
    }

    /// Everything that could happen; some of it may turn out to change nothing.
    pub(crate) fn steps(&self, scenario: &Scenario, steps: &mut Vec<Step>) {
        self.progress(scenario, steps);
        self.patience(steps);
        // A lost link does to either side what one of these does.
        if self.source_is_free() {
            steps.push(Step::Source(SourceEvent::Abort { reason: String::new() }));
        }
        if self.target_is_free() {
            if self.loading {
                steps.push(Step::Target(TargetEvent::LoadFailed { reason: String::new() }));
            }
            steps.push(Step::Target(TargetEvent::VerifyFailed { reason: String::new() }));
        }
        if matches!(self.target_pending.front(), Some(Action::ContinueGuest)) {
            steps.push(Step::Execute { side: Side::Target, cont_works: false });
        }
        if self.faults_left > 0 {
            self.faults(steps);
        }
    }

    /// What happens sooner or later when nothing fails.
    pub(crate) fn progress(&self, scenario: &Scenario, steps: &mut Vec<Step>) {
        for side in [Side::Source, Side::Target] {
            steps.push(Step::Execute { side, cont_works: true });
            steps.push(Step::Restart(side));
            steps.push(Step::Sync(side));
            steps.push(Step::BootMachine(side));
        }
        steps.extend([Step::QemuStops, Step::QemuCompletes, Step::MemoryArrives, Step::QemuLoads]);
        if self.source_is_free() {
            steps.extend([Step::Source(SourceEvent::TargetReady), Step::Source(SourceEvent::Decided)]);
            match self.source_qemu {
                SourceQemu::Live => {}
                SourceQemu::Stopped { .. } => {
                    steps.push(Step::Source(SourceEvent::Stopped { run_state: scenario.run_state }));
                    if scenario.mutant == Some(Mutant::SourceLeavesShutUnanswered) {
                        steps.push(Step::Source(SourceEvent::StateFlushed));
                    }
                }
                SourceQemu::PostMigrate => steps.push(Step::Source(SourceEvent::StateFlushed)),
                SourceQemu::Dead => steps.push(Step::Source(SourceEvent::QemuDied)),
            }
        }
        if self.target_is_free() {
            self.target_progress(scenario, steps);
        }
        steps.extend(self.network.iter().cloned().map(Step::Deliver));
        steps.push(Step::NextAttempt);
    }

    fn target_progress(&self, scenario: &Scenario, steps: &mut Vec<Step>) {
        if self.target_disk.synced == self.target_disk.written {
            steps.push(Step::Target(TargetEvent::Synced));
        }
        if self.cont_failed {
            steps.push(Step::Target(TargetEvent::ContFailed { reason: String::new() }));
            return;
        }
        let unchecked = scenario.mutant == Some(Mutant::TargetSkipsVerification);
        match self.target_qemu {
            TargetQemu::Incoming { complete } if complete || unchecked => {
                steps.push(Step::Target(TargetEvent::Verified));
            }
            TargetQemu::Incoming { .. } => {}
            TargetQemu::Loaded { .. } => steps.push(Step::Target(TargetEvent::Loaded)),
            TargetQemu::Running { .. } => {
                steps.push(Step::Target(TargetEvent::GuestRunning { resumed_unix_us: None }));
            }
            TargetQemu::Dead => steps.push(Step::Target(TargetEvent::QemuDied)),
        }
    }

    /// What happens when everybody has waited long enough.
    pub(crate) fn patience(&self, steps: &mut Vec<Step>) {
        if self.source_is_free() {
            steps.push(Step::Source(SourceEvent::Timeout));
            steps.push(Step::Source(SourceEvent::LinkRestored));
        }
        if self.target_is_free() {
            steps.push(Step::Target(TargetEvent::Timeout));
        }
    }

    fn faults(&self, steps: &mut Vec<Step>) {
        for side in [Side::Source, Side::Target] {
            steps.push(Step::CrashHost(side));
            steps.push(Step::KillQemu(side));
            steps.push(Step::CrashWorker { side, migration_completes: false });
        }
        if self.source_qemu == (SourceQemu::Stopped { shut: true }) {
            steps.push(Step::CrashWorker { side: Side::Source, migration_completes: true });
        }
    }

    fn source_is_free(&self) -> bool {
        self.source.is_some() && self.source_pending.is_empty()
    }

    fn target_is_free(&self) -> bool {
        self.target.is_some() && self.target_pending.is_empty()
    }

    /// Takes a step in place.
    pub(crate) fn take(&mut self, step: &Step, scenario: &Scenario) {
        self.take_one(step, scenario);
        if self.faults_left == 0 {
            // Without crashes to come, what is synced makes no difference.
            self.source_disk.synced = self.source_disk.written.clone();
            self.target_disk.synced = self.target_disk.written.clone();
        }
    }

    /// Takes a step and then does what it led to.
    pub(crate) fn take_completely(&mut self, step: &Step, scenario: &Scenario) {
        self.take(step, scenario);
        for side in [Side::Source, Side::Target] {
            while !self.pending(side).is_empty() {
                self.take(&Step::Execute { side, cont_works: true }, scenario);
            }
        }
    }

    fn pending(&self, side: Side) -> &VecDeque<Action> {
        match side {
            Side::Source => &self.source_pending,
            Side::Target => &self.target_pending,
        }
    }

    fn take_one(&mut self, step: &Step, scenario: &Scenario) {
        match step {
            Step::Execute { side: Side::Source, .. } => {
                if let Some(action) = self.source_pending.pop_front() {
                    self.execute_at_source(action, scenario);
                }
            }
            Step::Execute { side: Side::Target, cont_works } => {
                if let Some(action) = self.target_pending.pop_front() {
                    self.execute_at_target(action, *cont_works, scenario);
                }
            }
            Step::Deliver(packet) => self.deliver(packet, scenario),
            Step::Source(event) => self.tell_source(event.clone(), scenario),
            Step::Target(event) => self.tell_target(event.clone(), scenario),
            Step::Sync(Side::Source) => self.source_disk.synced = self.source_disk.written.clone(),
            Step::Sync(Side::Target) => self.target_disk.synced = self.target_disk.written.clone(),
            Step::QemuStops | Step::QemuCompletes | Step::MemoryArrives | Step::QemuLoads => {
                self.qemu_goes_on(step, scenario);
            }
            Step::CrashWorker { .. } | Step::CrashHost(_) | Step::KillQemu(_) => {
                self.faults_left -= 1;
                self.fail(step);
            }
            Step::Restart(Side::Source) if self.source.is_none() => self.restart_source(scenario),
            Step::Restart(Side::Target) if self.target.is_none() => self.restart_target(scenario),
            Step::Restart(_) => {}
            Step::BootMachine(side) => self.boot_machine(*side),
            Step::NextAttempt => self.next_attempt(scenario),
        }
    }

    fn tell_source(&mut self, event: SourceEvent, scenario: &Scenario) {
        if self.source_is_free()
            && let Some(source) = &mut self.source
        {
            let actions = source.apply(event);
            self.source_pending.extend(Mutant::alter(scenario.mutant, Side::Source, actions));
        }
    }

    fn tell_target(&mut self, event: TargetEvent, scenario: &Scenario) {
        if self.target_is_free()
            && let Some(target) = &mut self.target
        {
            let actions = target.apply(event);
            self.target_pending.extend(Mutant::alter(scenario.mutant, Side::Target, actions));
        }
    }

    fn deliver(&mut self, packet: &Packet, scenario: &Scenario) {
        match packet {
            Packet::ToSource(message) => {
                let message = match &self.source {
                    Some(source) if scenario.mutant == Some(Mutant::SourceIgnoresEpochs) => {
                        with_epoch(message, source.epoch())
                    }
                    _ => message.clone(),
                };
                self.tell_source(SourceEvent::PeerSays(message), scenario);
            }
            Packet::ToTarget(message) => self.tell_target(TargetEvent::PeerSays(message.clone()), scenario),
            Packet::Token(epoch) => {
                let (run_state, leave_paused) = (scenario.run_state, scenario.leave_paused);
                self.tell_target(
                    TargetEvent::TokenReceived { epoch: *epoch, run_state, leave_paused },
                    scenario,
                );
            }
        }
    }

    fn execute_at_source(&mut self, action: Action, scenario: &Scenario) {
        match action {
            Action::Persist { record, sync } => persist(&mut self.source_disk, record, sync),
            Action::Send(message) => {
                self.network.insert(Packet::ToTarget(without_reason(message)));
            }
            Action::SendToken { epoch, .. } => {
                self.network.insert(Packet::Token(epoch));
            }
            Action::OpenGate => self.gate_open = self.source_qemu == SourceQemu::Live,
            Action::AnswerShut => {
                if let SourceQemu::Stopped { shut } = &mut self.source_qemu {
                    *shut = true;
                }
            }
            Action::AbortMigration => {
                self.gate_open = false;
                if matches!(self.source_qemu, SourceQemu::Stopped { .. }) {
                    self.source_qemu = SourceQemu::Live;
                }
            }
            Action::ContinueGuest => {
                self.history.woken |= !scenario.run_state.is_live();
                if self.source_qemu == SourceQemu::PostMigrate {
                    self.source_qemu = SourceQemu::Live;
                }
            }
            Action::KillQemu => {
                let safe = self.history.died_with_target
                    || matches!(self.target_qemu, TargetQemu::Loaded { .. } | TargetQemu::Running { .. });
                self.history.destroyed |= !safe && self.source_qemu != SourceQemu::Dead;
                self.source_qemu = SourceQemu::Dead;
            }
            Action::Verify | Action::Load | Action::Report(_) => {}
        }
    }

    fn execute_at_target(&mut self, action: Action, cont_works: bool, scenario: &Scenario) {
        match action {
            Action::Persist { record, sync } => persist(&mut self.target_disk, record, sync),
            Action::Send(message) => {
                if matches!(message, Message::HandoverOpened { .. }) && self.target_qemu == TargetQemu::Dead {
                    self.target_qemu = TargetQemu::Incoming { complete: false };
                }
                self.network.insert(Packet::ToSource(without_reason(message)));
            }
            Action::Load => self.loading = true,
            Action::ContinueGuest => {
                self.history.woken |= !scenario.run_state.is_live() || scenario.leave_paused;
                match self.target_qemu {
                    TargetQemu::Loaded { complete } if cont_works => {
                        self.history.target_ran = true;
                        self.target_qemu = TargetQemu::Running { complete };
                    }
                    TargetQemu::Running { .. } => {}
                    _ => self.cont_failed = true,
                }
            }
            Action::KillQemu => {
                let was_last = self.source_qemu == SourceQemu::Dead && !self.history.died_with_source;
                let is_copy =
                    matches!(self.target_qemu, TargetQemu::Loaded { .. } | TargetQemu::Running { .. });
                self.history.destroyed |= is_copy && (was_last || self.target_runs());
                self.target_qemu = TargetQemu::Dead;
                self.loading = false;
                self.cont_failed = false;
            }
            _ => {}
        }
    }

    fn qemu_goes_on(&mut self, step: &Step, scenario: &Scenario) {
        match (step, self.source_qemu, self.target_qemu) {
            (Step::QemuStops, SourceQemu::Live, _) if self.gate_open => {
                self.gate_open = false;
                self.source_qemu = SourceQemu::Stopped { shut: false };
            }
            (Step::QemuCompletes, SourceQemu::Stopped { shut: true }, _) => {
                self.source_qemu = SourceQemu::PostMigrate;
            }
            // Everything was sent before the token; a worker that still waits may get all of it, even late or again.
            (Step::MemoryArrives, _, TargetQemu::Incoming { .. })
                if self.target.is_some()
                    && self.network.iter().any(|packet| matches!(packet, Packet::Token(_))) =>
            {
                self.target_qemu = TargetQemu::Incoming { complete: true };
            }
            (Step::QemuLoads, _, TargetQemu::Incoming { complete }) if self.loading => {
                self.loading = false;
                self.target_qemu = if scenario.mutant == Some(Mutant::TargetStartsByItself) {
                    self.history.target_ran = true;
                    TargetQemu::Running { complete }
                } else {
                    TargetQemu::Loaded { complete }
                };
            }
            _ => {}
        }
    }

    fn fail(&mut self, step: &Step) {
        match step {
            Step::CrashWorker { side: Side::Source, migration_completes } => {
                self.stop_source_worker();
                self.source_qemu = match self.source_qemu {
                    SourceQemu::Stopped { shut: true } if *migration_completes => SourceQemu::PostMigrate,
                    // QEMU sees its return path or its stream end, and runs the guest again by itself.
                    SourceQemu::Stopped { .. } => SourceQemu::Live,
                    unchanged => unchanged,
                };
            }
            Step::CrashWorker { side: Side::Target, .. } => {
                self.stop_target_worker();
                if matches!(self.target_qemu, TargetQemu::Incoming { .. }) {
                    self.target_qemu = TargetQemu::Dead;
                }
            }
            Step::CrashHost(Side::Source) => {
                self.stop_source_worker();
                self.source_disk.lose_what_was_not_synced();
                self.kill_source_qemu();
            }
            Step::CrashHost(Side::Target) => {
                self.stop_target_worker();
                self.history.died_with_target |= self.target_claims();
                self.target_disk.lose_what_was_not_synced();
                self.history.died_with_target |= self.target_disk.may_run();
                self.target_qemu = TargetQemu::Dead;
            }
            Step::KillQemu(Side::Source) => self.kill_source_qemu(),
            Step::KillQemu(Side::Target) => self.kill_target_qemu(),
            _ => {}
        }
    }

    fn stop_source_worker(&mut self) {
        self.source = None;
        self.source_pending.clear();
        self.gate_open = false;
    }

    fn stop_target_worker(&mut self) {
        self.target = None;
        self.target_pending.clear();
        self.loading = false;
        self.cont_failed = false;
    }

    fn kill_source_qemu(&mut self) {
        self.history.died_with_source |= self.source_qemu != SourceQemu::Dead;
        self.source_qemu = SourceQemu::Dead;
        self.gate_open = false;
    }

    fn kill_target_qemu(&mut self) {
        self.history.died_with_target |= self.target_claims();
        self.target_qemu = TargetQemu::Dead;
        self.loading = false;
    }

    /// The target's QEMU has a complete copy, and its host has a record that it has.
    fn target_claims(&self) -> bool {
        matches!(self.target_qemu, TargetQemu::Loaded { .. } | TargetQemu::Running { .. })
            && self.target_disk.written.as_ref().is_some_and(|record| {
                matches!(
                    record.state,
                    RecordState::Taking { .. } | RecordState::Mine { .. } | RecordState::Owner { .. }
                )
            })
    }

    fn restart_source(&mut self, scenario: &Scenario) {
        let Some(record) = &self.source_disk.written else { return };
        let qemu = match self.source_qemu {
            SourceQemu::Live if scenario.run_state.is_live() => QemuState::Running,
            SourceQemu::Live | SourceQemu::Stopped { .. } | SourceQemu::PostMigrate => QemuState::Paused,
            SourceQemu::Dead => QemuState::Dead,
        };
        let settings = source_settings(scenario);
        if let Some((source, actions)) = Source::restarted(record, qemu, self.source_disk.rebooted, settings)
        {
            self.source = Some(source);
            self.source_pending.extend(Mutant::alter(scenario.mutant, Side::Source, actions));
        }
    }

    fn restart_target(&mut self, scenario: &Scenario) {
        let qemu = match self.target_qemu {
            TargetQemu::Incoming { .. } => QemuState::Incoming,
            TargetQemu::Loaded { .. } => QemuState::Paused,
            TargetQemu::Running { .. } => QemuState::Running,
            TargetQemu::Dead => QemuState::Dead,
        };
        let disk = &self.target_disk;
        let (target, actions) = Target::restarted(disk.written.clone(), qemu, disk.rebooted, "source");
        self.target = Some(target);
        self.target_pending.extend(Mutant::alter(scenario.mutant, Side::Target, actions));
    }

    /// An agent starts a machine whose QEMU is dead, if the record lets it.
    fn boot_machine(&mut self, side: Side) {
        match side {
            Side::Source => {
                let idle =
                    self.source.as_ref().is_none_or(Source::is_settled) && self.source_pending.is_empty();
                if idle && self.source_qemu == SourceQemu::Dead && self.source_disk.may_run() {
                    self.source_qemu = SourceQemu::Live;
                }
            }
            Side::Target => {
                let idle =
                    self.target.as_ref().is_none_or(Target::is_settled) && self.target_pending.is_empty();
                if idle && self.target_qemu == TargetQemu::Dead && self.target_disk.may_run() {
                    self.history.target_ran = true;
                    self.target_qemu = TargetQemu::Running { complete: true };
                }
            }
        }
    }

    fn next_attempt(&mut self, scenario: &Scenario) {
        let idle = self.source.as_ref().is_none_or(Source::is_settled) && self.source_pending.is_empty();
        let Some(record) = &self.source_disk.written else { return };
        if self.attempts_left > 0
            && idle
            && matches!(record.state, RecordState::Owner { .. })
            && self.source_qemu == SourceQemu::Live
        {
            self.attempts_left -= 1;
            self.source = Some(Source::new(record.epoch.next(), source_settings(scenario)));
        }
    }
}

fn source_settings(scenario: &Scenario) -> SourceSettings {
    SourceSettings { leave_paused: scenario.leave_paused, asks: 1, ..SourceSettings::new("target") }
}

fn persist(disk: &mut Disk, record: Record, sync: Sync) {
    if sync == Sync::Before {
        disk.synced = Some(record.clone());
    }
    disk.written = Some(record);
    disk.rebooted = false;
}

/// Reasons are for people; without them the checker has fewer states to visit.
fn without_reason(message: Message) -> Message {
    match message {
        Message::Cancel { epoch, .. } => Message::Cancel { epoch, reason: String::new() },
        Message::Refused { epoch, .. } => Message::Refused { epoch, reason: String::new() },
        other => other,
    }
}

fn with_epoch(message: &Message, epoch: Epoch) -> Message {
    let mut message = message.clone();
    match &mut message {
        Message::OpenHandover { epoch: old }
        | Message::HandoverOpened { epoch: old }
        | Message::Cancel { epoch: old, .. }
        | Message::Query { epoch: old }
        | Message::Taken { epoch: old, .. }
        | Message::Refused { epoch: old, .. }
        | Message::StandDown { epoch: old }
        | Message::StoodDown { epoch: old } => *old = epoch,
    }
    message
}
