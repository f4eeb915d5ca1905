//! Agents: they look after what workers leave behind, from the records alone, and tell and ask each other.
//!
//! ```text
//!   a worker is gone ─┐                         ┌─ nothing open ───► done
//!   the agent starts ─┼─► sync, find the record ┼─ a source's ─────► Source::restarted ─┐
//!   it is asked ──────┘      ▲                  └─ a target's ─────► Target::restarted ─┤
//!                            └─────────────── later, if it wasn't settled ──────────────┘
//! ```

use godwit_migration::handover::{
    Epoch, Message, Record, RecordState, Source, SourceEvent, SourceSettings, Target, TargetEvent,
};

use super::{
    qemu::{Phase, Qemu},
    site::Site,
    worker::{Half, Told, Worker},
    world::{Event, World},
};

/// A worker's end is noticed within this time.
const NOTICE_US: u64 = 100_000;
/// What couldn't be settled is tried again after this, and then ever later.
const RETRY_US: u64 = 500_000;
const RETRIES_DOUBLE: u32 = 5;
/// While a worker lives, its record is looked at so often for an answer.
const BESIDE_US: u64 = 100_000;
const BESIDE_TRIES: u32 = 30;

impl World {
    /// A worker has ended or was killed; what depended on it goes too.
    pub(super) fn worker_is_gone(&mut self, site: Site) {
        let Some(gone) = self.host_mut(site).worker.take() else { return };
        self.note(Some(site), || format!("the worker is gone, {:?}", gone.outcome));
        let saved_its_stream = self.random.bool();
        match &mut self.host_mut(site).qemu {
            Some(Qemu { phase: phase @ Phase::Stopped { shut: true, .. }, .. }) if saved_its_stream => {
                *phase = Phase::PostMigrate;
            }
            Some(qemu) if gone.is_source() => qemu.resume_by_itself(),
            Some(Qemu { phase: Phase::Incoming, .. }) => self.host_mut(site).qemu = None,
            _ => {}
        }
        if let Some(data) = gone.target.filter(|_| self.host(site).agent_is_up) {
            self.refuse_unknown(site, data.epoch);
        }
        self.soon(NOTICE_US, Event::Recover { site });
    }

    /// An attempt of which nothing is on record is refused, lest it come true later.
    fn refuse_unknown(&mut self, site: Site, epoch: Epoch) {
        let known = self.find(site).map_or(Epoch::default(), |found| found.record.epoch);
        if epoch > known {
            self.hear(site, Message::Query { epoch });
        }
    }

    /// Finishes or rolls back what is open on a host that has no worker.
    pub(super) fn recover(&mut self, site: Site) {
        let host = self.host(site);
        if !host.is_up || !host.agent_is_up || host.worker.is_some() {
            return;
        }
        if !self.is_open(site) {
            self.host_mut(site).tries = 0;
            return;
        }
        if let Some(worker) = self.restarted(site) {
            let id = worker.id;
            self.note(Some(site), || format!("the agent goes on: {:?}", worker.pending));
            let asks = worker.is_source();
            self.host_mut(site).worker = Some(worker);
            self.proceed(site, id);
            if asks {
                self.after(1_000, Event::Tick { site, worker: id });
            }
        }
        let tries = self.host(site).tries;
        self.host_mut(site).tries += 1;
        let delay_us = RETRY_US << tries.min(RETRIES_DOUBLE);
        self.after(delay_us, Event::Recover { site });
    }

    /// Whether something is left to be settled.
    pub(super) fn is_open(&mut self, site: Site) -> bool {
        let has_qemu = self.host(site).qemu.is_some();
        self.find(site).is_some_and(|found| match found.record.state {
            RecordState::Offered { .. }
            | RecordState::GivenAway { settled: false, .. }
            | RecordState::Awaited { .. }
            | RecordState::Taking { .. }
            | RecordState::Mine { .. } => true,
            RecordState::GivenAway { settled: true, .. } | RecordState::Refused { .. } => has_qemu,
            RecordState::Owner { .. } => false,
        })
    }

    /// The half that the record is of, going on from it. What is found is synced first.
    fn restarted(&mut self, site: Site) -> Option<Worker> {
        if self.store(site).sync().is_err() {
            self.dies_in_save(site);
            return None;
        }
        let found = self.find(site)?;
        let state =
            self.host(site).qemu.as_ref().map_or(godwit_migration::handover::QemuState::Dead, Qemu::state);
        let peer = site.other().name();
        let settings = SourceSettings { leave_paused: self.plan.leave_paused, ..SourceSettings::new(peer) };
        let id = self.next_number();
        let (half, actions) = match Source::restarted(&found.record, state, found.rebooted, settings) {
            Some((source, actions)) => (Half::Source(source), actions),
            None => {
                let (target, actions) = Target::restarted(Some(found.record), state, found.rebooted, peer);
                (Half::Target(target), actions)
            }
        };
        Some(self.recovering(id, half, actions))
    }

    fn recovering(&self, id: u64, half: Half, actions: Vec<godwit_migration::handover::Action>) -> Worker {
        let mut worker = Worker::new(id, half);
        worker.last_sign_us = self.now_us;
        worker.pending = match self.sabotage {
            Some(sabotage) => actions.into_iter().flat_map(|action| sabotage.alter(action)).collect(),
            None => actions.into(),
        };
        worker
    }

    /// Says something to the other agent; it may come late, twice or never.
    pub(super) fn say(&mut self, site: Site, message: Message) {
        let up_us = self.link_up_us.max(self.agents_meet_us);
        if up_us > self.now_us || self.random.u8(..20) == 0 {
            return self.note(Some(site), || "  nobody hears it".into());
        }
        let copies = if self.random.u8(..10) == 0 { 2 } else { 1 };
        for _ in 0..copies {
            let delay_us = self.plan.delay_us;
            let late_us = self.random.u64(..=10 * delay_us);
            let hear = Event::Hear { site: site.other(), message: message.clone() };
            self.after(delay_us + late_us, hear);
        }
    }

    /// An agent hears the other one.
    pub(super) fn hear(&mut self, site: Site, message: Message) {
        if !self.host(site).is_up || !self.host(site).agent_is_up {
            return;
        }
        self.note(Some(site), || format!("the agent hears {message:?}"));
        let for_source = matches!(
            message,
            Message::Taken { .. } | Message::Refused { .. } | Message::HandoverOpened { .. }
        );
        let busy = self.host(site).worker.as_ref().map(|worker| (worker.id, worker.is_source()));
        match busy {
            Some((worker, true)) if for_source => {
                self.tell_source(site, worker, SourceEvent::PeerSays(message));
            }
            None if for_source => self.recover_now(site, Told::Source(SourceEvent::PeerSays(message))),
            Some(_) if for_source => {}
            Some((worker, is_source)) => {
                if !is_source {
                    self.tell_target(site, worker, TargetEvent::PeerSays(message.clone()));
                }
                self.after(BESIDE_US, Event::AnswerBeside { site, message, tries: 0 });
            }
            None => self.answer(site, message),
        }
    }

    /// Goes on from the record at once, with something that was heard.
    fn recover_now(&mut self, site: Site, told: Told) {
        self.recover(site);
        if let Some(worker) = self.host(site).worker.as_ref().map(|worker| worker.id) {
            self.tell(site, worker, told);
        }
    }

    /// The answer beside a live worker: only what its record says for good.
    pub(super) fn answer_beside(&mut self, site: Site, message: Message, tries: u32) {
        if !self.host(site).is_up || !self.host(site).agent_is_up {
            return;
        }
        if self.host(site).worker.is_none() {
            return self.answer(site, message);
        }
        let (epoch, has_qemu) = (message.epoch(), self.host(site).qemu.is_some());
        match self.find(site).map(|found| found.record).filter(|record| record.epoch == epoch) {
            Some(Record { state: RecordState::Owner { .. }, .. }) => {
                self.say(site, Message::Taken { epoch, resumed_unix_us: None });
            }
            Some(Record { state: RecordState::Refused { .. }, .. }) if !has_qemu => {
                self.say(site, Message::Refused { epoch, reason: "it was refused".into() });
            }
            _ if tries < BESIDE_TRIES => {
                self.after(BESIDE_US, Event::AnswerBeside { site, message, tries: tries + 1 });
            }
            _ => {}
        }
    }

    /// The answer of a host without a worker: what is open is settled first, then the question is heard.
    fn answer(&mut self, site: Site, message: Message) {
        if self.store(site).sync().is_err() {
            self.dies_in_save(site);
            return;
        }
        let found = self.find(site);
        let rebooted = found.as_ref().is_some_and(|found| found.rebooted);
        let state =
            self.host(site).qemu.as_ref().map_or(godwit_migration::handover::QemuState::Dead, Qemu::state);
        let record = found.map(|found| found.record);
        let (target, actions) = Target::restarted(record, state, rebooted, site.other().name());
        let id = self.next_number();
        let mut worker = self.recovering(id, Half::Target(target), actions);
        worker.inbox.push_back(Told::Target(TargetEvent::PeerSays(message)));
        self.host_mut(site).worker = Some(worker);
        self.proceed(site, id);
    }
}
