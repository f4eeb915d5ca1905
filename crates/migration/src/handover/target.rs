//! The side that is to get the machine. See the [module documentation](super) for the diagram.

use super::{Action, Epoch, Message, Outcome, QemuState, Record, RecordState, RunState, Sync};

/// What a target is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// The source says something.
    PeerSays(Message),
    /// The token arrived.
    TokenReceived {
        /// The attempt.
        epoch: Epoch,
        /// What the guest did before the stop.
        run_state: RunState,
        /// Don't run it, whatever it did.
        leave_paused: bool,
    },
    /// Everything that the token promises is here and its digests are right.
    Verified,
    /// It isn't, or they aren't.
    VerifyFailed {
        /// One line.
        reason: String,
    },
    /// QEMU has loaded everything and waits for `cont`.
    Loaded,
    /// It couldn't.
    LoadFailed {
        /// One line.
        reason: String,
    },
    /// The newest record is synced.
    Synced,
    /// The guest runs.
    GuestRunning {
        /// Since when, microseconds since the Unix epoch.
        resumed_unix_us: Option<u64>,
    },
    /// `cont` was refused, or QEMU was gone before it was said: the guest has not run for an instant.
    ContFailed {
        /// One line.
        reason: String,
    },
    /// QEMU's process ended.
    QemuDied,
    /// The session is lost for good: its reconnect timeout has passed.
    LinkLost,
    /// Nothing happened for the shell's patience in this state.
    Timeout,
    /// The operator cancelled, or something failed at this side.
    Abort {
        /// One line.
        reason: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    /// No hand-over is open here.
    Idle,
    Awaiting,
    Verifying {
        start: bool,
    },
    Loading {
        start: bool,
        loaded: bool,
        synced: bool,
    },
    Starting,
    Taken {
        resumed_unix_us: Option<u64>,
    },
    Refused,
}

/// The target's half of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    peer: String,
    /// What the host knew of the machine before: nothing, or an older hand-over.
    before: Option<Record>,
    epoch: Epoch,
    state: State,
}

impl Target {
    /// A target that is ready for a machine from `peer`; `record` is what this host has about the machine, if it has.
    pub fn new(record: Option<Record>, peer: impl Into<String>) -> Self {
        let epoch = record.as_ref().map_or(Epoch::default(), |record| record.epoch);
        let state = match &record {
            Some(Record { state: RecordState::Owner { .. } | RecordState::Offered { .. }, .. }) => {
                State::Taken { resumed_unix_us: None }
            }
            _ => State::Idle,
        };
        Self { peer: peer.into(), before: record, epoch, state }
    }

    /// Goes on after a crash of the worker, or of the host if `rebooted`, from the record and what QEMU does.
    pub fn restarted(
        record: Option<Record>,
        qemu: QemuState,
        rebooted: bool,
        peer: impl Into<String>,
    ) -> (Self, Vec<Action>) {
        let mut target = Self::new(record.clone(), peer);
        let actions = match record.map(|record| record.state) {
            Some(RecordState::Awaited { .. }) => target.refuse("the target's worker died".into()),
            // In the same boot the record is exact: "mine" would have been written before the guest could run.
            Some(RecordState::Taking { .. }) if !rebooted => target.refuse("the target's worker died".into()),
            Some(RecordState::Taking { .. }) => target.died("the target's host crashed".into()),
            Some(RecordState::Mine { .. }) => match qemu {
                QemuState::Running => target.guest_running(None),
                QemuState::Paused => {
                    target.state = State::Starting;
                    vec![Action::ContinueGuest]
                }
                QemuState::Dead | QemuState::Incoming => target.died("QEMU ended".into()),
            },
            Some(RecordState::Refused { .. }) => {
                target.state = State::Refused;
                vec![Action::KillQemu, target.say_refused(target.epoch, "refused before the restart".into())]
            }
            Some(RecordState::Owner { .. } | RecordState::Offered { .. } | RecordState::GivenAway { .. })
            | None => {
                vec![]
            }
        };
        (target, actions)
    }

    /// Takes one event; returns what to do about it. Events that mean nothing in this state do nothing.
    pub fn apply(&mut self, event: TargetEvent) -> Vec<Action> {
        match event {
            TargetEvent::PeerSays(message) => self.peer_says(message),
            TargetEvent::TokenReceived { epoch, run_state, leave_paused } => {
                self.token_received(epoch, run_state.is_live() && !leave_paused)
            }
            TargetEvent::Verified => self.verified(),
            TargetEvent::Loaded => self.proceed(|loaded, _| *loaded = true),
            TargetEvent::Synced => self.proceed(|_, synced| *synced = true),
            TargetEvent::VerifyFailed { reason } | TargetEvent::LoadFailed { reason } => self.give_up(reason),
            TargetEvent::GuestRunning { resumed_unix_us } => self.guest_running(resumed_unix_us),
            TargetEvent::ContFailed { reason } => match self.state {
                State::Starting => self.refuse(reason),
                _ => vec![],
            },
            TargetEvent::QemuDied => self.qemu_died(),
            TargetEvent::LinkLost => match self.state {
                State::Awaiting => self.refuse("the link was lost".into()),
                _ => vec![],
            },
            TargetEvent::Timeout => self.give_up("the target waited too long".into()),
            TargetEvent::Abort { reason } => self.give_up(reason),
        }
    }

    /// The newest attempt that this side knows of.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether a refusal would still be legal, so that cancelling works.
    pub fn may_refuse(&self) -> bool {
        matches!(self.state, State::Awaiting | State::Verifying { .. } | State::Loading { .. })
    }

    /// Whether no hand-over was ever offered.
    pub fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// Whether nothing is left to be done but answering.
    pub fn is_settled(&self) -> bool {
        matches!(self.state, State::Taken { .. } | State::Refused)
    }

    fn peer_says(&mut self, message: Message) -> Vec<Action> {
        let epoch = message.epoch();
        match message {
            Message::OpenHandover { .. } if epoch > self.epoch && self.may_accept() => self.accept(epoch),
            Message::OpenHandover { .. } if epoch == self.epoch && self.state == State::Awaiting => {
                vec![Action::Send(Message::HandoverOpened { epoch })]
            }
            Message::OpenHandover { .. } | Message::Query { .. } => self.answer(epoch),
            Message::Cancel { reason, .. } if epoch == self.epoch => self.give_up(reason),
            Message::StandDown { .. } => self.stand_down(epoch),
            _ => vec![],
        }
    }

    /// Whether this host neither has the machine nor is about to get it.
    fn may_accept(&self) -> bool {
        match (&self.state, &self.before) {
            (State::Refused, _) | (State::Idle, None) => true,
            (State::Idle, Some(record)) => {
                matches!(record.state, RecordState::GivenAway { .. } | RecordState::Refused { .. })
            }
            _ => false,
        }
    }

    fn accept(&mut self, epoch: Epoch) -> Vec<Action> {
        self.epoch = epoch;
        self.state = State::Awaiting;
        vec![
            self.persist(RecordState::Awaited { peer: self.peer.clone() }, Sync::Before),
            Action::Send(Message::HandoverOpened { epoch }),
        ]
    }

    /// Answers whether `epoch` was taken; unless that is still being decided, it is decided now.
    fn answer(&mut self, epoch: Epoch) -> Vec<Action> {
        let taken = |resumed_unix_us| vec![Action::Send(Message::Taken { epoch, resumed_unix_us })];
        match self.state {
            State::Taken { resumed_unix_us } if epoch <= self.epoch => taken(resumed_unix_us),
            // A machine of this name lives here; its record is not to be touched.
            State::Taken { .. } => vec![self.say_refused(epoch, "the machine is here already".into())],
            State::Refused if epoch == self.epoch => vec![self.say_refused(epoch, "it was refused".into())],
            State::Awaiting if epoch == self.epoch => self.refuse("the token didn't arrive".into()),
            State::Idle if epoch <= self.epoch && self.gave_away() => taken(None),
            // An attempt that this side never heard of, refused lest it come true later.
            State::Idle | State::Refused if epoch > self.epoch => {
                self.epoch = epoch;
                self.refuse("the target doesn't know this hand-over".into())
            }
            _ => vec![],
        }
    }

    fn token_received(&mut self, epoch: Epoch, start: bool) -> Vec<Action> {
        match self.state {
            State::Awaiting if epoch == self.epoch => {
                self.state = State::Verifying { start };
                vec![Action::Verify]
            }
            State::Refused | State::Taken { .. } if epoch == self.epoch => self.answer(epoch),
            _ => vec![],
        }
    }

    fn verified(&mut self) -> Vec<Action> {
        let State::Verifying { start } = self.state else {
            return vec![];
        };
        self.state = State::Loading { start, loaded: false, synced: false };
        vec![self.persist(RecordState::Taking { peer: self.peer.clone(), start }, Sync::Behind), Action::Load]
    }

    fn proceed(&mut self, note: impl FnOnce(&mut bool, &mut bool)) -> Vec<Action> {
        let State::Loading { start, loaded, synced } = &mut self.state else {
            return vec![];
        };
        note(loaded, synced);
        match (*loaded && *synced, *start) {
            (false, _) => vec![],
            (true, false) => self.guest_running(None),
            (true, true) => {
                self.state = State::Starting;
                let mine = RecordState::Mine { peer: self.peer.clone() };
                vec![self.persist(mine, Sync::Behind), Action::ContinueGuest]
            }
        }
    }

    /// The machine is here for good.
    fn guest_running(&mut self, resumed_unix_us: Option<u64>) -> Vec<Action> {
        if self.is_settled() {
            return vec![];
        }
        self.state = State::Taken { resumed_unix_us };
        vec![
            self.persist(self.owner(), Sync::Behind),
            Action::Send(Message::Taken { epoch: self.epoch, resumed_unix_us }),
            Action::Report(Outcome::Taken),
        ]
    }

    fn qemu_died(&mut self) -> Vec<Action> {
        match self.state {
            // It may have run.
            State::Starting => self.died("QEMU ended when it was continued".into()),
            _ => self.give_up("the target's QEMU ended".into()),
        }
    }

    /// The machine came here, may have run, and is dead: as it would be without a migration.
    fn died(&mut self, reason: String) -> Vec<Action> {
        self.state = State::Taken { resumed_unix_us: None };
        vec![
            self.persist(self.owner(), Sync::Before),
            Action::Send(Message::Taken { epoch: self.epoch, resumed_unix_us: None }),
            Action::Report(Outcome::Died { reason }),
        ]
    }

    /// Refuses if that is still legal.
    fn give_up(&mut self, reason: String) -> Vec<Action> {
        if self.may_refuse() { self.refuse(reason) } else { vec![] }
    }

    fn refuse(&mut self, reason: String) -> Vec<Action> {
        self.state = State::Refused;
        vec![
            self.persist(RecordState::Refused { peer: self.peer.clone() }, Sync::Before),
            Action::KillQemu,
            self.say_refused(self.epoch, reason.clone()),
            Action::Report(Outcome::Refused { reason }),
        ]
    }

    /// Ends whatever this host has of the machine; an order that isn't newer than what it knows means nothing to it.
    fn stand_down(&mut self, epoch: Epoch) -> Vec<Action> {
        let stands_down = matches!(&self.before, Some(Record { state: RecordState::Refused { .. }, .. }));
        if epoch < self.epoch || epoch == self.epoch && !stands_down {
            return vec![];
        }
        self.epoch = epoch;
        self.state = State::Refused;
        vec![
            self.persist(RecordState::Refused { peer: self.peer.clone() }, Sync::Before),
            Action::KillQemu,
            Action::Send(Message::StoodDown { epoch }),
            Action::Report(Outcome::Refused { reason: format!("{} took the machine over", self.peer) }),
        ]
    }

    fn say_refused(&self, epoch: Epoch, reason: String) -> Action {
        Action::Send(Message::Refused { epoch, reason })
    }

    /// The machine was here, and went on.
    fn gave_away(&self) -> bool {
        matches!(&self.before, Some(Record { state: RecordState::GivenAway { .. }, .. }))
    }

    fn owner(&self) -> RecordState {
        RecordState::Owner { peer: Some(self.peer.clone()) }
    }

    fn persist(&self, state: RecordState, sync: Sync) -> Action {
        Action::Persist { record: Record { epoch: self.epoch, state }, sync }
    }
}
