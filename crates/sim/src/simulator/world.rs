//! Two hosts, the link between them, one machine, and the order in which things happen to them.

use std::{collections::BTreeMap, time::Instant};

use fastrand::Rng;
use godwit_migration::handover::{
    Message, Record,
    store::{BootId, Durability, Found, RecordStore},
};

use super::{
    disk::Disk,
    faults::{Fault, Plan},
    judge::History,
    qemu::{Phase, Qemu},
    sabotage::Sabotage,
    site::Site,
    wire::{Delivery, Wire},
    worker::{Told, Worker},
};

/// How often the world is looked at as a whole.
const LOOK_US: u64 = 200_000;
/// Everything has to be settled so long after the last fault has healed.
const SETTLE_US: u64 = 200_000_000;
/// A guest's steps follow each other this fast during a migration, and without one.
const STEP_US: u64 = 5_000;
const LAZY_STEP_US: u64 = 500_000;

/// Something that is to happen.
#[derive(Debug)]
pub(super) enum Event {
    /// A worker carries out its next action.
    Act {
        site: Site,
        worker: u64,
    },
    /// A source looks what there is to do.
    Tick {
        site: Site,
        worker: u64,
    },
    /// A worker is told something.
    Tell {
        site: Site,
        worker: u64,
        told: Told,
    },
    /// A target compares what arrived with what the token promised.
    Verify {
        site: Site,
        worker: u64,
    },
    /// What was only written is synced.
    Sync {
        site: Site,
        worker: u64,
    },
    /// A settled target has lingered for long enough.
    Leave {
        site: Site,
        worker: u64,
    },
    QemuStops {
        site: Site,
        pid: u64,
    },
    QemuCompletes {
        site: Site,
        pid: u64,
    },
    QemuLoads {
        site: Site,
        pid: u64,
    },
    GuestSteps,
    /// Of the session.
    Wire(Delivery),
    Reconnected {
        wire: u64,
        generation: u64,
        in_time: bool,
    },
    Farewell {
        wire: u64,
        worker: u64,
    },
    /// An agent looks whether something is to be settled.
    Recover {
        site: Site,
    },
    /// An agent hears another one.
    Hear {
        site: Site,
        message: Message,
    },
    /// An agent looks once more whether a live worker's record has the answer.
    AnswerBeside {
        site: Site,
        message: Message,
        tries: u32,
    },
    Strike(Fault),
    BootHost {
        site: Site,
    },
    StartAgent {
        site: Site,
    },
    MakeRoom {
        site: Site,
    },
    LookAround,
}

/// A host.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) disk: Disk,
    pub(super) boots: u32,
    pub(super) is_up: bool,
    pub(super) agent_is_up: bool,
    pub(super) qemu: Option<Qemu>,
    pub(super) worker: Option<Worker>,
    /// How often recovery was tried in vain.
    pub(super) tries: u32,
    /// What happens when the next save is stopped.
    pub(super) doom: Option<Fault>,
}

/// Everything.
pub(super) struct World {
    pub(super) now_us: u64,
    queue: BTreeMap<(u64, u64), Event>,
    numbers: u64,
    pub(super) random: Rng,
    pub(super) plan: Plan,
    pub(super) sabotage: Option<Sabotage>,
    hosts: [Host; 2],
    pub(super) wire: Option<Wire>,
    /// From when on the link carries anything, and agents reach each other.
    pub(super) link_up_us: u64,
    pub(super) agents_meet_us: u64,
    pub(super) history: History,
    pub(super) attempts: u32,
    pub(super) actions: u32,
    pub(super) last_fault_us: u64,
    pub(super) trace: Option<Vec<String>>,
    pub(super) is_done: bool,
    began: Instant,
}

impl World {
    pub(super) fn new(seed: u64, sabotage: Option<Sabotage>, traced: bool) -> Self {
        let mut random = Rng::with_seed(seed);
        let plan = Plan::draw(&mut random, sabotage.is_some());
        let mut numbers = 0;
        let hosts = Site::BOTH.map(|_| Host {
            disk: Disk::new(random.fork()),
            boots: 0,
            is_up: true,
            agent_is_up: true,
            qemu: None,
            worker: None,
            tries: 0,
            doom: None,
        });
        numbers += 1;
        let qemu = Qemu::booted(numbers, plan.pages, &mut random);
        let mut world = Self {
            now_us: 0,
            queue: BTreeMap::new(),
            numbers,
            random,
            plan,
            sabotage,
            hosts,
            wire: None,
            link_up_us: 0,
            agents_meet_us: 0,
            history: History::default(),
            attempts: 0,
            actions: 0,
            last_fault_us: 0,
            trace: traced.then(Vec::new),
            is_done: false,
            // Only differences count; the transport wants a moment of the clock's type.
            began: Instant::now(),
        };
        world.host_mut(Site::A).qemu = Some(qemu);
        world.store(Site::A).save(&Record::created(), Durability::Synced).expect("the disk is fine yet");
        world.after(0, Event::LookAround);
        world.after(0, Event::GuestSteps);
        world.schedule_faults();
        world
    }

    /// Lets things happen until all is settled or something is wrong.
    pub(super) fn run(&mut self) -> Result<(), String> {
        while !self.is_done {
            let Some(((at_us, _), event)) = self.queue.pop_first() else {
                return Err("nothing happens any more".into());
            };
            self.now_us = at_us;
            self.happen(event);
            self.judge();
            if let Some(violation) = self.history.violation.take() {
                return Err(violation);
            }
        }
        Ok(())
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Act { site, worker } => self.act(site, worker),
            Event::Tick { site, worker } => self.tick(site, worker),
            Event::Tell { site, worker, told } => self.tell(site, worker, told),
            Event::Verify { site, worker } => self.verify(site, worker),
            Event::Sync { site, worker } => self.sync(site, worker),
            Event::Leave { site, worker } => self.leave(site, worker),
            Event::QemuStops { site, pid } => self.qemu_stops(site, pid),
            Event::QemuCompletes { site, pid } => self.qemu_completes(site, pid),
            Event::QemuLoads { site, pid } => self.qemu_loads(site, pid),
            Event::GuestSteps => self.guest_steps(),
            Event::Wire(delivery) => self.deliver(delivery),
            Event::Reconnected { wire, generation, in_time } => self.reconnected(wire, generation, in_time),
            Event::Farewell { wire, worker } => self.farewell(wire, worker),
            Event::Recover { site } => self.recover(site),
            Event::Hear { site, message } => self.hear(site, message),
            Event::AnswerBeside { site, message, tries } => self.answer_beside(site, message, tries),
            Event::Strike(fault) => self.strike(fault),
            Event::BootHost { site } => self.boot_host(site),
            Event::StartAgent { site } => self.start_agent(site),
            Event::MakeRoom { site } => self.host(site).disk.go_on(),
            Event::LookAround => self.look_around(),
        }
    }

    pub(super) fn host(&self, site: Site) -> &Host {
        &self.hosts[site as usize]
    }

    pub(super) fn host_mut(&mut self, site: Site) -> &mut Host {
        &mut self.hosts[site as usize]
    }

    /// A worker, if it is this one.
    pub(super) fn worker_mut(&mut self, site: Site, worker: u64) -> Option<&mut Worker> {
        self.host_mut(site).worker.as_mut().filter(|alive| alive.id == worker)
    }

    /// A QEMU, if it is this one.
    pub(super) fn qemu_mut(&mut self, site: Site, pid: u64) -> Option<&mut Qemu> {
        self.host_mut(site).qemu.as_mut().filter(|qemu| qemu.pid == pid)
    }

    pub(super) fn store(&self, site: Site) -> RecordStore<Disk> {
        let host = self.host(site);
        // A host that is down is asked what it will find when it is up again.
        let boot = host.boots + u32::from(!host.is_up);
        RecordStore::new(host.disk.clone(), Some(BootId(format!("boot-{boot}"))))
    }

    pub(super) fn find(&mut self, site: Site) -> Option<Found> {
        let found = self.store(site).find();
        found.unwrap_or_else(|error| {
            self.history.violate(format!("{site}'s record: {error}"));
            None
        })
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        let number = self.next_number();
        self.queue.insert((at_us.max(self.now_us), number), event);
    }

    pub(super) fn after(&mut self, delay_us: u64, event: Event) {
        self.at(self.now_us + delay_us, event);
    }

    /// Within `most_us`, mostly soon.
    pub(super) fn soon(&mut self, most_us: u64, event: Event) {
        let within_us = most_us >> self.random.u32(..6);
        let delay_us = self.random.u64(..=within_us);
        self.after(delay_us, event);
    }

    /// Writes a line of the trace.
    pub(super) fn note(&mut self, site: Option<Site>, line: impl FnOnce() -> String) {
        let now_ms = self.now_us as f64 / 1e3;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now_ms:11.3} ms  {:5}  {}", site.map_or("", Site::name), line()));
        }
    }

    /// The guest goes on, wherever it runs.
    fn guest_steps(&mut self) {
        let mut random = self.random.fork();
        let site = Site::BOTH.into_iter().find(|site| self.host(*site).qemu.as_ref().is_some_and(Qemu::runs));
        if let Some(qemu) = site.and_then(|site| self.host_mut(site).qemu.as_mut()) {
            let before = qemu.steps();
            qemu.step(&mut random);
            let after = qemu.steps();
            self.history.guest_stepped(before, after);
        }
        let busy = Site::BOTH.into_iter().any(|site| self.host(site).worker.is_some());
        self.after(if busy { STEP_US } else { LAZY_STEP_US }, Event::GuestSteps);
    }

    /// Begins the next attempt, or ends, when all is settled.
    fn look_around(&mut self) {
        let settled = self.settled();
        if settled.is_none() && self.now_us > self.last_fault_us + SETTLE_US {
            let state = self.describe();
            self.history.violate(format!("it doesn't settle: {state}"));
        }
        match settled {
            Some(site) if self.attempts < self.plan.attempts => self.begin_attempt(site),
            Some(_) if self.now_us > self.last_fault_us => self.is_done = true,
            _ => {}
        }
        self.after(LOOK_US, Event::LookAround);
    }

    fn begin_attempt(&mut self, site: Site) {
        let (pid, pages, is_paused) = (self.next_number(), self.plan.pages, self.plan.guest_is_paused);
        let Some(epoch) = self.number_attempt(site) else { return };
        let Some(qemu) = &mut self.host_mut(site).qemu else { return };
        // As its operator wants it now.
        qemu.phase = if is_paused { Phase::Paused } else { Phase::Running };
        self.attempts += 1;
        self.history.begin_attempt(site, self.plan.guest_is_paused, self.plan.leave_paused);
        self.note(Some(site), || "a migration begins".into());
        self.host_mut(site.other()).qemu = Some(Qemu::incoming(pid, pages));
        let source = self.start_source(site, epoch);
        let target = self.start_target(site.other(), epoch);
        let id = self.next_number();
        self.wire = Some(Wire::new(id, (site, source), (site.other(), target), self.began));
        self.try_to_connect(id, 0);
        let patience_us = self.plan.reconnect_us;
        self.after(
            patience_us.max(5_000_000),
            Event::Reconnected { wire: id, generation: 0, in_time: false },
        );
    }
}
