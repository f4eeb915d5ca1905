//! The shell around a half of a hand-over: the loop that is told what happens and carries out what follows, one action
//! after the other, each taking its time.
//!
//! A worker that was started for a migration has its *data path*; one that goes on from a record after a crash, as an
//! agent does, has none.

use std::collections::VecDeque;

use bytes::Bytes;
use godwit_migration::{
    handover::{
        self, Action, Outcome, Record, RecordState, Source, SourceEvent, Sync, Target, TargetEvent,
        store::Durability,
    },
    wire,
};
use godwit_transport::session::frame::Lane;

use super::{
    sabotage::Sabotage,
    site::Site,
    source::SourceData,
    target::TargetData,
    world::{Event, World},
};

/// An action takes at most this long; most take much less.
const ACTION_US: u64 = 20_000;

#[derive(Debug)]
pub(super) struct Worker {
    /// Tells one from the next.
    pub(super) id: u64,
    pub(super) half: Half,
    pub(super) inbox: VecDeque<Told>,
    pub(super) pending: VecDeque<Action>,
    /// The next action is under way.
    pub(super) acting: bool,
    pub(super) outcome: Option<Outcome>,
    pub(super) last_sign_us: u64,
    pub(super) source: Option<SourceData>,
    pub(super) target: Option<TargetData>,
}

#[derive(Debug)]
pub(super) enum Half {
    Source(Source),
    Target(Target),
}

#[derive(Debug, Clone)]
pub(super) enum Told {
    Source(SourceEvent),
    Target(TargetEvent),
}

impl Worker {
    pub(super) fn new(id: u64, half: Half) -> Self {
        Self {
            id,
            half,
            inbox: VecDeque::new(),
            pending: VecDeque::new(),
            acting: false,
            outcome: None,
            last_sign_us: 0,
            source: None,
            target: None,
        }
    }

    pub(super) fn is_source(&self) -> bool {
        matches!(self.half, Half::Source(_))
    }

    pub(super) fn has_data_path(&self) -> bool {
        self.source.is_some() || self.target.is_some()
    }

    fn is_free(&self) -> bool {
        self.pending.is_empty() && !self.acting && self.inbox.is_empty()
    }

    fn apply(&mut self, told: Told) -> Vec<Action> {
        match (&mut self.half, told) {
            (Half::Source(source), Told::Source(event)) => source.apply(event),
            (Half::Target(target), Told::Target(event)) => target.apply(event),
            _ => vec![],
        }
    }

    fn abort(&mut self, reason: &str) -> Vec<Action> {
        let reason = reason.to_owned();
        match &mut self.half {
            Half::Source(source) => source.apply(SourceEvent::Abort { reason }),
            Half::Target(target) => target.apply(TargetEvent::Abort { reason }),
        }
    }
}

impl World {
    /// Tells a worker what happened; it hears it when it has done what it is doing.
    pub(super) fn tell(&mut self, site: Site, worker: u64, told: Told) {
        let now_us = self.now_us;
        let Some(alive) = self.worker_mut(site, worker) else { return };
        alive.last_sign_us = now_us;
        alive.inbox.push_back(told);
        self.proceed(site, worker);
    }

    pub(super) fn tell_source(&mut self, site: Site, worker: u64, event: SourceEvent) {
        self.tell(site, worker, Told::Source(event));
    }

    pub(super) fn tell_target(&mut self, site: Site, worker: u64, event: TargetEvent) {
        self.tell(site, worker, Told::Target(event));
    }

    /// The next action begins, or else the next thing that happened is looked at.
    pub(super) fn proceed(&mut self, site: Site, worker: u64) {
        let sabotage = self.sabotage;
        while let Some(alive) = self.worker_mut(site, worker) {
            if alive.acting {
                return;
            }
            if !alive.pending.is_empty() {
                alive.acting = true;
                return self.soon(ACTION_US, Event::Act { site, worker });
            }
            let Some(told) = alive.inbox.pop_front() else { break };
            let described = told.clone();
            let actions = alive.apply(told);
            if !actions.is_empty() {
                alive.pending.extend(altered(sabotage, actions));
                self.note(Some(site), || format!("{described:?}"));
            }
        }
        self.end_if_done(site, worker);
    }

    /// Carries out the next action.
    pub(super) fn act(&mut self, site: Site, worker: u64) {
        let Some(action) = self.worker_mut(site, worker).and_then(|alive| alive.pending.pop_front()) else {
            return;
        };
        self.note(Some(site), || format!("  {action:?}"));
        let refusal = matches!(&action, Action::Persist { record, .. }
            if matches!(record.state, RecordState::Refused { .. }));
        let failed = self.execute(site, worker, action).err();
        if let Some(alive) = self.worker_mut(site, worker) {
            alive.acting = false;
        }
        if let Some(reason) = failed {
            self.note(Some(site), || format!("  that failed: {reason}"));
            self.action_failed(site, worker, refusal, &reason);
        }
        self.proceed(site, worker);
        self.count_action();
    }

    /// A record couldn't be saved: the hand-over is given up as far as it still can be.
    fn action_failed(&mut self, site: Site, worker: u64, refusal: bool, reason: &str) {
        if self.dies_in_save(site) {
            return;
        }
        let sabotage = self.sabotage;
        let Some(alive) = self.worker_mut(site, worker) else { return };
        let recovers = !alive.has_data_path();
        let may_refuse = matches!(&alive.half, Half::Target(target) if target.may_refuse());
        let instead = match &mut alive.half {
            _ if recovers || refusal => vec![],
            Half::Source(_) => alive.abort(reason),
            Half::Target(_) if may_refuse => alive.abort(reason),
            Half::Target(target) => target.apply(TargetEvent::ContFailed { reason: reason.to_owned() }),
        };
        if !instead.is_empty() {
            alive.pending = altered(sabotage, instead).collect();
        } else if sabotage != Some(Sabotage::SaidUnrecorded) {
            // What follows would say what isn't on record.
            self.end_worker(site, worker);
        }
    }

    fn execute(&mut self, site: Site, worker: u64, action: Action) -> Result<(), String> {
        match action {
            Action::Persist { record, sync } => self.persist(site, worker, &record, sync)?,
            Action::Send(message) => self.send(site, worker, message),
            Action::OpenGate => self.open_gate(site),
            Action::AnswerShut => self.answer_shut(site),
            Action::SendToken { epoch, run_state, leave_paused } => {
                self.send_token(site, worker, epoch, run_state, leave_paused);
            }
            Action::AbortMigration => {
                if let Some(qemu) = &mut self.host_mut(site).qemu {
                    qemu.resume_by_itself();
                }
            }
            Action::ContinueGuest => self.continue_guest(site, worker),
            Action::KillQemu => self.end_qemu(site),
            Action::Verify => self.soon(20_000, Event::Verify { site, worker }),
            Action::Load => self.load(site, worker),
            Action::Report(outcome) => self.report(site, worker, outcome),
        }
        Ok(())
    }

    fn persist(&mut self, site: Site, worker: u64, record: &Record, sync: Sync) -> Result<(), String> {
        let recovers = self.worker_mut(site, worker).is_some_and(|alive| !alive.has_data_path());
        let weakened = self.sabotage.map_or(Some(sync), |sabotage| sabotage.weaken(&record.state, sync));
        let durability = match weakened {
            Some(Sync::Before) => Some(Durability::Synced),
            // No pause waits for an agent.
            Some(Sync::Behind) if recovers => Some(Durability::Synced),
            Some(Sync::Behind) => Some(Durability::Written),
            None => None,
        };
        if let Some(durability) = durability {
            self.store(site).save(record, durability).map_err(|error| error.to_string())?;
        }
        if sync == Sync::Behind && !recovers {
            let most_us = self.plan.sync_us;
            self.soon(most_us, Event::Sync { site, worker });
        }
        Ok(())
    }

    /// What was written is synced; a target waits for it.
    pub(super) fn sync(&mut self, site: Site, worker: u64) {
        if self.worker_mut(site, worker).is_none() {
            return;
        }
        let synced = self.store(site).sync();
        if synced.is_err() && self.dies_in_save(site) {
            return;
        }
        self.note(Some(site), || format!("synced: {}", synced.is_ok()));
        if self.worker_mut(site, worker).is_some_and(|alive| !alive.is_source()) {
            self.tell_target(
                site,
                worker,
                match synced {
                    Ok(()) => TargetEvent::Synced,
                    Err(error) => TargetEvent::Abort { reason: error.to_string() },
                },
            );
        }
    }

    fn send(&mut self, site: Site, worker: u64, message: handover::Message) {
        if self.worker_mut(site, worker).is_some_and(|alive| !alive.has_data_path()) {
            return self.say(site, message);
        }
        let encoded = wire::encode(&wire::Message::Handover(message));
        let (kind, body): (u8, Bytes) = encoded.expect("messages of the hand-over are short");
        self.submit(worker, Lane::Urgent, kind, body);
    }

    fn report(&mut self, site: Site, worker: u64, outcome: Outcome) {
        const LINGER_US: u64 = 3_000_000;
        let Some(alive) = self.worker_mut(site, worker) else { return };
        let lingers = !alive.is_source() && alive.has_data_path();
        alive.outcome = Some(outcome);
        if lingers {
            self.after(LINGER_US, Event::Leave { site, worker });
        }
    }

    /// A worker that has said how it ended goes, a target only after it has lingered.
    fn end_if_done(&mut self, site: Site, worker: u64) {
        let has_session = self.has_session(worker);
        let Some(alive) = self.worker_mut(site, worker).filter(|alive| alive.is_free()) else { return };
        let done = match &alive.half {
            Half::Source(_) => alive.outcome.is_some(),
            Half::Target(_) if !alive.has_data_path() => true,
            Half::Target(target) => !has_session && (target.is_settled() || target.is_idle()),
        };
        if done {
            self.end_worker(site, worker);
        }
    }

    /// A target has lingered.
    pub(super) fn leave(&mut self, site: Site, worker: u64) {
        if self.worker_mut(site, worker).is_some_and(|alive| alive.is_free()) {
            self.end_worker(site, worker);
        }
    }

    /// A worker ends by itself; the agent looks after what it leaves.
    fn end_worker(&mut self, site: Site, worker: u64) {
        self.leave_wire(worker, true);
        self.worker_is_gone(site);
    }

    /// A session has ended for good.
    pub(super) fn session_is_over(&mut self, site: Site, worker: u64) {
        let Some(alive) = self.worker_mut(site, worker) else { return };
        if alive.is_source() {
            self.tell_source(site, worker, SourceEvent::LinkLost);
        } else {
            self.tell_target(site, worker, TargetEvent::LinkLost);
        }
        if let Some(alive) = self.worker_mut(site, worker)
            && alive.source.is_some()
            && matches!(&alive.half, Half::Source(source) if source.is_settled())
        {
            self.proceed(site, worker);
        }
    }
}

fn altered(sabotage: Option<Sabotage>, actions: Vec<Action>) -> impl Iterator<Item = Action> {
    actions.into_iter().flat_map(move |action| match sabotage {
        Some(sabotage) => sabotage.alter(action),
        None => vec![action],
    })
}
