//! What must hold, whatever happens.

use godwit_content::{BlockId, VecMemory};
use godwit_migration::handover::{Permission, Record, RecordState};

use super::{
    Account,
    qemu::{Phase, Qemu},
    site::Site,
    world::World,
};

/// What the judge has to remember.
#[derive(Debug, Default)]
pub(super) struct History {
    pub(super) violation: Option<String>,
    /// The newest step that any copy of the guest has done.
    steps: u64,
    /// The memory at the last stop for a switch-over.
    stopped: Option<VecMemory>,
    pub(super) device_state: Vec<u8>,
    /// The copy that held the machine died with its QEMU or its host.
    pub(super) died: bool,
    /// By its operator.
    pub(super) is_paused: bool,
    leave_paused: bool,
    /// The source of the newest attempt, and whether its end has been counted.
    source: Option<Site>,
    is_counted: bool,
    /// Changes of the two disks when they were last looked at.
    looked_at: [u64; 2],
    pub(super) account: Account,
}

impl History {
    /// The first violation counts.
    pub(super) fn violate(&mut self, violation: String) {
        self.violation.get_or_insert(violation);
    }

    pub(super) fn begin_attempt(&mut self, source: Site, is_paused: bool, leave_paused: bool) {
        self.source = Some(source);
        self.is_counted = false;
        self.is_paused = is_paused;
        self.leave_paused = leave_paused;
    }

    pub(super) fn guest_stepped(&mut self, before: u64, after: u64) {
        if before != self.steps {
            self.violate(format!("a guest that had done {} steps goes on from {before}", self.steps));
        }
        self.steps = after;
    }

    pub(super) fn guest_stopped(&mut self, memory: VecMemory) {
        self.stopped = Some(memory);
    }

    /// Compares what arrived with what there was at the stop, page for page.
    fn compare(&mut self, arrived: &Qemu) {
        let Some(stopped) = &self.stopped else {
            return self.violate("a guest arrived that never left".into());
        };
        let pages = (0..arrived.dirty.len() as u64).map(BlockId);
        let wrong: Vec<u64> = pages
            .filter(|page| stopped.block(*page) != arrived.memory.block(*page))
            .map(|page| page.0)
            .collect();
        if !wrong.is_empty() {
            self.violate(format!("an incomplete copy: pages {wrong:?} aren't as they were at the stop"));
        }
        if arrived.device_state != self.device_state {
            self.violate("an incomplete copy: the device state isn't what the source saved".into());
        }
    }
}

impl World {
    /// Looks at everything after each step.
    pub(super) fn judge(&mut self) {
        let phases = Site::BOTH.map(|site| self.host(site).qemu.as_ref().map(|qemu| qemu.phase));
        match phases {
            [Some(Phase::Running), Some(Phase::Running)] => self.history.violate("two copies run".into()),
            [Some(Phase::Running), Some(Phase::Loaded)] | [Some(Phase::Loaded), Some(Phase::Running)] => {
                self.history.violate("a copy could be let run beside the running one".into());
            }
            _ => {}
        }
        let changes = Site::BOTH.map(|site| self.host(site).disk.changes());
        if changes != self.history.looked_at {
            self.history.looked_at = changes;
            if Site::BOTH.into_iter().all(|site| self.may_run(site)) {
                self.history.violate("two hosts may start the machine".into());
            }
        }
    }

    fn may_run(&mut self, site: Site) -> bool {
        self.find(site).is_some_and(|found| found.record.may_run(found.rebooted) == Permission::Granted)
    }

    /// A guest is let run; it `was` something else.
    pub(super) fn guest_continued(&mut self, site: Site, was: Phase) {
        if self.history.is_paused || self.history.leave_paused && was == Phase::Loaded {
            self.history.violate("a guest that was to stay paused was continued".into());
        }
        if was == Phase::Loaded {
            self.compare_arrived(site);
        }
    }

    fn compare_arrived(&mut self, site: Site) {
        if let Some(qemu) = self.host_mut(site).qemu.take() {
            self.history.compare(&qemu);
            self.host_mut(site).qemu = Some(qemu);
        }
    }

    /// Whether this host has a copy of the machine as it is now.
    fn has_newest(&self, site: Site) -> bool {
        let qemu = self.host(site).qemu.as_ref();
        qemu.is_some_and(|qemu| qemu.is_complete() && qemu.steps() == self.history.steps)
    }

    /// godwit ends a QEMU.
    pub(super) fn end_qemu(&mut self, site: Site) {
        let is_last = self.has_newest(site) && !self.has_newest(site.other());
        if is_last && !self.history.died {
            self.history.violate(format!("{site} ends the last complete copy"));
        }
        self.host_mut(site).qemu = None;
    }

    /// Whether a fault that ends this host's QEMU takes the machine with it. A target may still refuse a copy that it
    /// has, so the source's is the machine as long as it doesn't know better.
    pub(super) fn dies_with(&mut self, site: Site) -> bool {
        self.has_newest(site)
            && (!self.has_newest(site.other()) || self.dies_by_record(site) || self.is_open(site))
    }

    /// Whether this host has, by its record, received the machine.
    pub(super) fn dies_by_record(&mut self, site: Site) -> bool {
        self.find(site).is_some_and(|found| {
            matches!(
                found.record.state,
                RecordState::Taking { .. } | RecordState::Mine { .. } | RecordState::Owner { .. }
            )
        })
    }

    /// Where the machine is, once both hosts know it and it does there what it should.
    pub(super) fn settled(&mut self) -> Option<Site> {
        for site in Site::BOTH {
            let host = self.host(site);
            if !host.is_up || !host.agent_is_up || host.worker.is_some() || self.is_open(site) {
                return None;
            }
        }
        let records = Site::BOTH.map(|site| self.find(site).map(|found| found.record));
        let is_owner =
            |record: &Option<Record>| matches!(record, Some(Record { state: RecordState::Owner { .. }, .. }));
        let site = match records.each_ref().map(is_owner) {
            [true, false] => Site::A,
            [false, true] => Site::B,
            _ => return None,
        };
        if self.host(site.other()).qemu.is_some() || !self.is_as_wished(site) {
            return None;
        }
        self.count(site);
        Some(site)
    }

    /// Whether the guest does what it should; one that died is switched on again.
    fn is_as_wished(&mut self, site: Site) -> bool {
        let leave_paused = self.history.leave_paused && self.history.source != Some(site);
        let should_run = !self.history.is_paused && !leave_paused;
        match self.host(site).qemu.as_ref().map(|qemu| qemu.phase) {
            Some(Phase::Running) => should_run,
            Some(Phase::Loaded) if !should_run => {
                self.compare_arrived(site);
                true
            }
            Some(Phase::Paused | Phase::PostMigrate) => !should_run,
            Some(_) => false,
            None => {
                self.switch_on(site);
                false
            }
        }
    }

    /// Starts a machine whose QEMU is gone.
    fn switch_on(&mut self, site: Site) {
        if !self.history.died {
            return self.history.violate(format!("{site} has the machine, but lost it"));
        }
        if !self.may_run(site) {
            return;
        }
        let (pid, pages) = (self.next_number(), self.plan.pages);
        let mut random = self.random.fork();
        self.note(Some(site), || "the machine is switched on".into());
        self.host_mut(site).qemu = Some(Qemu::booted(pid, pages, &mut random));
        self.history.account.died_with_owner += 1;
        self.history.is_paused = false;
        self.history.leave_paused = false;
        self.history.died = false;
        self.history.steps = 0;
    }

    fn count(&mut self, site: Site) {
        self.history.died = false;
        if let Some(source) = self.history.source
            && !std::mem::replace(&mut self.history.is_counted, true)
        {
            let account = &mut self.history.account;
            account.migrations += 1;
            if site == source { account.rolled_back += 1 } else { account.completed += 1 }
        }
    }

    /// Both hosts, in a line.
    pub(super) fn describe(&mut self) -> String {
        let hosts = Site::BOTH.map(|site| {
            let record = self.find(site).map(|found| found.record);
            let host = self.host(site);
            let phase = host.qemu.as_ref().map(|qemu| qemu.phase);
            let (up, agent) = (host.is_up, host.agent_is_up);
            let half = host.worker.as_ref().map(|worker| &worker.half);
            format!("{site}: up {up}, agent {agent}, record {record:?}, QEMU {phase:?}, worker {half:?}")
        });
        hosts.join("; ")
    }
}
