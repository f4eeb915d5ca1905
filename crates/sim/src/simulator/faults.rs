//! What a seed chooses: the machine, the link, the operator's wishes, and what fails when.

use fastrand::Rng;
use godwit_migration::handover::{RecordState, SourceEvent, TargetEvent};

use super::{
    disk::Stop,
    qemu::Phase,
    site::Site,
    source::SourceData,
    worker::{Half, Told},
    world::{Event, World},
};

/// Something that fails, or that an operator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The link carries nothing; what was on it is lost.
    CutLink {
        for_us: u64,
    },
    /// Agents don't reach each other, though workers do.
    PartAgents {
        for_us: u64,
    },
    KillWorker(Site),
    KillQemu(Site),
    KillAgent {
        site: Site,
        for_us: u64,
    },
    CrashHost {
        site: Site,
        for_us: u64,
    },
    /// The worker, or the host, dies in the middle of a save.
    DieInSave {
        site: Site,
        operations: u32,
        host: bool,
    },
    FillDisk {
        site: Site,
        operations: u32,
        for_us: u64,
    },
    /// The next one fails.
    Fail(Failing),
    /// The operator cancels at this host.
    Cancel(Site),
    /// The operator stops the guest.
    StopGuest,
}

/// A step of the target that fails once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failing {
    Verify,
    Load,
    Continue,
}

/// When a fault strikes.
#[derive(Debug, Clone, Copy)]
enum Trigger {
    AtUs(u64),
    /// With the so-many-th action of a worker.
    OnAction(u32),
}

/// What a seed chooses.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) pages: usize,
    pub(super) attempts: u32,
    pub(super) delay_us: u64,
    pub(super) bytes_per_second: u64,
    pub(super) reconnect_us: u64,
    /// How long a sync beside other things may take.
    pub(super) sync_us: u64,
    pub(super) pass_us: u64,
    pub(super) passes_max: u32,
    pub(super) stop_at_pages: u64,
    pub(super) guest_is_paused: bool,
    pub(super) leave_paused: bool,
    faults: Vec<(Trigger, Fault)>,
    failing: Vec<Failing>,
}

impl Plan {
    /// With `focus` there is one attempt, and all that fails does so around the pause.
    pub(super) fn draw(random: &mut Rng, focus: bool) -> Self {
        let attempts = if focus { 1 } else { random.u32(1..=3) };
        let faults = (0..random.u32(..=2 * attempts)).map(|_| {
            let trigger =
                if focus { Trigger::OnAction(random.u32(4..24)) } else { trigger(random, attempts) };
            (trigger, fault(random))
        });
        let faults = faults.collect();
        Self {
            pages: random.usize(64..=256),
            attempts,
            delay_us: random.u64(200..60_000),
            bytes_per_second: random.u64(500_000..20_000_000),
            reconnect_us: random.u64(1_000_000..20_000_000),
            sync_us: 20_000 << random.u32(..8),
            pass_us: random.u64(20_000..200_000),
            passes_max: random.u32(3..20),
            stop_at_pages: random.u64(..8),
            guest_is_paused: random.u8(..10) == 0,
            leave_paused: random.u8(..10) == 0,
            faults,
            failing: Vec::new(),
        }
    }
}

/// Half of the faults strike with an action: most actions happen around the pause.
fn trigger(random: &mut Rng, attempts: u32) -> Trigger {
    if random.bool() {
        Trigger::AtUs(random.u64(..u64::from(attempts) * 2_000_000))
    } else {
        Trigger::OnAction(random.u32(1..=attempts * 16))
    }
}

fn fault(random: &mut Rng) -> Fault {
    let site = if random.bool() { Site::A } else { Site::B };
    // From 10 ms to 40 s.
    let for_us = 10_000 << random.u32(..12);
    let operations = random.u32(..10);
    match random.u8(..18) {
        0..3 => Fault::CutLink { for_us },
        3 => Fault::PartAgents { for_us },
        4..6 => Fault::KillWorker(site),
        6..8 => Fault::KillQemu(site),
        8 => Fault::KillAgent { site, for_us },
        9..11 => Fault::CrashHost { site, for_us },
        11 | 12 => Fault::DieInSave { site, operations, host: random.bool() },
        13 => Fault::FillDisk { site, operations, for_us },
        14 | 15 => {
            Fault::Fail(random.choice([Failing::Verify, Failing::Load, Failing::Continue]).expect("three"))
        }
        16 => Fault::Cancel(site),
        _ => Fault::StopGuest,
    }
}

/// An agent that dies while it recovers is back after this.
const AGENT_DOWN_US: u64 = 100_000;

impl World {
    pub(super) fn schedule_faults(&mut self) {
        for (trigger, fault) in self.plan.faults.clone() {
            if let Trigger::AtUs(at_us) = trigger {
                self.at(at_us, Event::Strike(fault));
                self.last_fault_us = self.last_fault_us.max(at_us);
            }
        }
    }

    /// An action was carried out; faults that wait for it strike right now or a little later.
    pub(super) fn count_action(&mut self) {
        self.actions += 1;
        let now = self.actions;
        let due = self
            .plan
            .faults
            .iter()
            .filter(|(trigger, _)| matches!(trigger, Trigger::OnAction(n) if *n == now));
        let due: Vec<Fault> = due.map(|(_, fault)| *fault).collect();
        for fault in due {
            if self.random.bool() {
                self.strike(fault);
            } else {
                self.soon(30_000, Event::Strike(fault));
            }
        }
    }

    pub(super) fn fails(&mut self, step: Failing) -> bool {
        let before = self.plan.failing.len();
        self.plan.failing.retain(|failing| *failing != step);
        self.plan.failing.len() < before
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        self.note(None, || format!("*** {fault:?}"));
        self.last_fault_us = self.last_fault_us.max(self.now_us);
        match fault {
            Fault::CutLink { for_us } => {
                self.link_up_us = self.link_up_us.max(self.lasting(for_us));
                self.detach();
            }
            Fault::PartAgents { for_us } => {
                self.agents_meet_us = self.agents_meet_us.max(self.lasting(for_us))
            }
            Fault::KillWorker(site) => self.kill_worker(site),
            Fault::KillQemu(site) => self.kill_qemu(site),
            Fault::KillAgent { site, for_us } => self.kill_agent(site, for_us),
            Fault::CrashHost { site, for_us } => self.crash_host(site, for_us),
            Fault::DieInSave { site, operations, host } => {
                let doom =
                    if host { Fault::CrashHost { site, for_us: 100_000 } } else { Fault::KillWorker(site) };
                if self.host(site).is_up {
                    self.host(site).disk.stop_after(operations, Stop::Dead);
                    self.host_mut(site).doom = Some(doom);
                }
            }
            Fault::FillDisk { site, operations, for_us } => {
                let at_us = self.lasting(for_us);
                if self.host(site).doom.is_none() {
                    self.host(site).disk.stop_after(operations, Stop::Full);
                    self.at(at_us, Event::MakeRoom { site });
                }
            }
            Fault::Fail(step) => self.plan.failing.push(step),
            Fault::Cancel(site) => self.cancel(site),
            Fault::StopGuest => self.stop_guest(),
        }
    }

    /// Until when a fault lasts.
    fn lasting(&mut self, for_us: u64) -> u64 {
        let until_us = self.now_us + for_us;
        self.last_fault_us = self.last_fault_us.max(until_us);
        until_us
    }

    /// Whether whoever failed to save is dead; then it dies now.
    pub(super) fn dies_in_save(&mut self, site: Site) -> bool {
        let Some(doom) = self.host_mut(site).doom.take() else { return false };
        self.host(site).disk.go_on();
        match doom {
            Fault::KillWorker(_) if self.host(site).worker.is_none() => self.kill_agent(site, AGENT_DOWN_US),
            doom => self.strike(doom),
        }
        true
    }

    fn kill_worker(&mut self, site: Site) {
        let Some(worker) = &self.host(site).worker else { return };
        let (worker, has_data_path) = (worker.id, worker.has_data_path());
        if !has_data_path {
            return self.kill_agent(site, AGENT_DOWN_US);
        }
        self.leave_wire(worker, false);
        self.worker_is_gone(site);
    }

    /// Recovery dies with the agent; workers and QEMUs don't.
    fn kill_agent(&mut self, site: Site, for_us: u64) {
        let at_us = self.lasting(for_us);
        let host = self.host_mut(site);
        if !host.is_up {
            return;
        }
        host.agent_is_up = false;
        host.worker.take_if(|worker| !worker.has_data_path());
        self.at(at_us, Event::StartAgent { site });
    }

    pub(super) fn start_agent(&mut self, site: Site) {
        if self.host(site).is_up {
            self.host_mut(site).agent_is_up = true;
            self.soon(10_000, Event::Recover { site });
        }
    }

    fn crash_host(&mut self, site: Site, for_us: u64) {
        let at_us = self.lasting(for_us);
        if !self.host(site).is_up {
            return;
        }
        if let Some(worker) = self.host_mut(site).worker.take() {
            self.leave_wire(worker.id, false);
        }
        let died = self.dies_with(site);
        let host = self.host_mut(site);
        host.disk.crash();
        host.doom = None;
        host.qemu = None;
        host.is_up = false;
        host.agent_is_up = false;
        self.history.died |= died || self.dies_by_record(site);
        self.at(at_us, Event::BootHost { site });
    }

    pub(super) fn boot_host(&mut self, site: Site) {
        let host = self.host_mut(site);
        host.is_up = true;
        host.boots += 1;
        self.note(Some(site), || "the host is up again".into());
        self.start_agent(site);
    }

    fn kill_qemu(&mut self, site: Site) {
        self.history.died |= self.dies_with(site);
        if self.host_mut(site).qemu.take().is_none() {
            return;
        }
        let Some(worker) = &self.host(site).worker else { return };
        let told = match &worker.half {
            Half::Source(_) => Told::Source(SourceEvent::QemuDied),
            Half::Target(target) if target.is_idle() => {
                Told::Target(TargetEvent::Abort { reason: "QEMU ended".into() })
            }
            Half::Target(_) => Told::Target(TargetEvent::QemuDied),
        };
        let worker = worker.id;
        self.soon(5_000, Event::Tell { site, worker, told });
    }

    fn cancel(&mut self, site: Site) {
        let reason = "the operator cancels".to_owned();
        match self.host(site).worker.as_ref().map(|worker| (worker.id, worker.is_source())) {
            Some((worker, true)) => self.tell_source(site, worker, SourceEvent::Abort { reason }),
            Some((worker, false)) => self.tell_target(site, worker, TargetEvent::Abort { reason }),
            None => {}
        }
    }

    /// An operator who stops a guest between its stop for the switch-over and the record of its going on may see it
    /// continued once more; that is known (docs/hand-over.md), and not done here.
    fn stop_guest(&mut self) {
        for site in Site::BOTH {
            let between = self.find(site).is_some_and(|found| {
                matches!(
                    found.record.state,
                    RecordState::Offered { stopped: Some(_), .. }
                        | RecordState::GivenAway { settled: false, .. }
                        | RecordState::Mine { .. }
                )
            });
            let host = self.host_mut(site);
            let source = host.worker.as_ref().and_then(|worker| worker.source.as_ref());
            let between = between || source.is_some_and(SourceData::has_stopped);
            if let Some(qemu) = host.qemu.as_mut().filter(|qemu| qemu.runs() && !qemu.gate_open && !between) {
                qemu.phase = Phase::Paused;
                self.history.is_paused = true;
            }
        }
    }
}
