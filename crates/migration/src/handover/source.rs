//! The side that has the machine. See the [module documentation](super) for the diagram.

use super::{Action, Epoch, Message, Outcome, QemuState, Record, RecordState, RunState, Sync};

/// What a source is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The target accepted the migration and its QEMU waits for the stream.
    TargetReady,
    /// The stop policy says that now is the time.
    Decided,
    /// QEMU stopped the guest for the switch-over. Said again when it is known better what the guest did.
    Stopped {
        /// What it did before.
        run_state: RunState,
    },
    /// The last byte of the stream was handed to the transport, and QEMU's migration is `completed`.
    StateFlushed,
    /// The target says something.
    PeerSays(Message),
    /// QEMU's process ended.
    QemuDied,
    /// The session is lost for good: its reconnect timeout has passed.
    LinkLost,
    /// There is a session again, or an operator says `recover`.
    LinkRestored,
    /// Nothing happened for the shell's patience in this state.
    Timeout,
    /// The operator cancelled, or something failed at this side.
    Abort {
        /// One line.
        reason: String,
    },
}

/// What can be chosen about a source.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceSettings {
    /// The target's name.
    pub peer: String,
    /// Don't run the guest at the target, whatever it did before.
    pub leave_paused: bool,
    /// How often the target is asked before silence is reported.
    pub asks: u8,
}

impl SourceSettings {
    /// Settings for this target: runs there what ran here, asks five times.
    pub fn new(peer: impl Into<String>) -> Self {
        Self { peer: peer.into(), leave_paused: false, asks: 5 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Preparing,
    Opening { asked: u8 },
    Ready,
    Stopping,
    Flushing { run_state: RunState },
    Given { run_state: RunState, asked: u8 },
    Settled { taken_back: bool },
}

/// The source's half of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    settings: SourceSettings,
    epoch: Epoch,
    state: State,
    qemu_is_dead: bool,
}

impl Source {
    /// A new hand-over of a machine that is here. Its epoch must never have been used: newer than the record's, or
    /// recorded before anybody else heard of it.
    pub fn new(epoch: Epoch, settings: SourceSettings) -> Self {
        Self { settings, epoch, state: State::Preparing, qemu_is_dead: false }
    }

    /// Goes on after a crash of the worker, or of the host if `rebooted`, from the record and what QEMU does.
    /// `None` if the record isn't one of a source.
    pub fn restarted(
        record: &Record,
        qemu: QemuState,
        rebooted: bool,
        settings: SourceSettings,
    ) -> Option<(Self, Vec<Action>)> {
        let qemu_is_dead = qemu == QemuState::Dead;
        let state = match record.state {
            RecordState::Offered { stopped: Some(run_state), .. } => State::Flushing { run_state },
            RecordState::Offered { stopped: None, .. } => State::Ready,
            RecordState::GivenAway { run_state, settled: false, .. } => State::Given { run_state, asked: 0 },
            RecordState::GivenAway { settled: true, .. } => State::Settled { taken_back: false },
            _ => return None,
        };
        let mut source = Self { settings, epoch: record.epoch, state, qemu_is_dead };
        let actions = match state {
            State::Given { run_state, .. } => source.ask(run_state, 0),
            State::Settled { .. } => {
                vec![Action::KillQemu, Action::Report(Outcome::HandedOver { resumed_unix_us: None })]
            }
            // A newer record may have been lost with the host, and with it the knowledge that the token left.
            State::Flushing { run_state } if rebooted => source.ask(run_state, 0),
            _ if rebooted => source.ask(RunState::Running, 0),
            _ => source.take_back("the source's worker died".into()),
        };
        Some((source, actions))
    }

    /// Takes one event; returns what to do about it. Events that mean nothing in this state do nothing.
    pub fn apply(&mut self, event: SourceEvent) -> Vec<Action> {
        match event {
            SourceEvent::PeerSays(message) if message.epoch() != self.epoch => vec![],
            SourceEvent::PeerSays(message) => self.peer_says(message),
            SourceEvent::TargetReady => self.target_ready(),
            SourceEvent::Decided => self.decided(),
            SourceEvent::Stopped { run_state } => self.stopped(run_state),
            SourceEvent::StateFlushed => self.state_flushed(),
            SourceEvent::QemuDied => self.qemu_died(),
            SourceEvent::LinkLost => self.link_lost(),
            SourceEvent::LinkRestored => match self.state {
                State::Given { run_state, .. } => self.ask(run_state, 0),
                _ => vec![],
            },
            SourceEvent::Timeout => self.timeout(),
            SourceEvent::Abort { reason } => self.abort(reason),
        }
    }

    /// The attempt's number.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether both sides have the hand-over on disk, so that [`SourceEvent::Decided`] opens the gate.
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Whether the token has left, so that cancelling is only a request.
    pub fn has_given_away(&self) -> bool {
        matches!(self.state, State::Given { .. } | State::Settled { taken_back: false })
    }

    /// Whether nothing is left to be done.
    pub fn is_settled(&self) -> bool {
        matches!(self.state, State::Settled { .. })
    }

    fn target_ready(&mut self) -> Vec<Action> {
        if self.state != State::Preparing {
            return vec![];
        }
        self.state = State::Opening { asked: 1 };
        vec![self.persist_offered(None, Sync::Before), self.open()]
    }

    fn decided(&mut self) -> Vec<Action> {
        if self.state != State::Ready {
            return vec![];
        }
        self.state = State::Stopping;
        vec![Action::OpenGate]
    }

    fn stopped(&mut self, run_state: RunState) -> Vec<Action> {
        let before = std::mem::replace(&mut self.state, State::Flushing { run_state });
        match before {
            State::Stopping => vec![self.persist_offered(Some(run_state), Sync::Behind), Action::AnswerShut],
            // What the guest did is known better now.
            State::Flushing { run_state: known } if known != run_state => {
                vec![self.persist_offered(Some(run_state), Sync::Behind)]
            }
            _ => {
                self.state = before;
                vec![]
            }
        }
    }

    fn state_flushed(&mut self) -> Vec<Action> {
        let State::Flushing { run_state } = self.state else {
            return vec![];
        };
        self.state = State::Given { run_state, asked: 0 };
        let leave_paused = self.settings.leave_paused;
        vec![
            self.persist_given_away(run_state, false),
            Action::SendToken { epoch: self.epoch, run_state, leave_paused },
        ]
    }

    fn peer_says(&mut self, message: Message) -> Vec<Action> {
        match (message, self.state) {
            (Message::HandoverOpened { .. }, State::Opening { .. }) => {
                self.state = State::Ready;
                vec![]
            }
            (Message::HandoverOpened { .. }, State::Settled { taken_back: true }) => {
                vec![self.cancel("the migration is over".into())]
            }
            (Message::Taken { resumed_unix_us, .. }, State::Given { run_state, .. }) => {
                self.state = State::Settled { taken_back: false };
                vec![
                    self.persist_given_away(run_state, true),
                    Action::KillQemu,
                    Action::Report(Outcome::HandedOver { resumed_unix_us }),
                ]
            }
            (Message::Refused { reason, .. }, state) if !matches!(state, State::Settled { .. }) => {
                self.take_back(reason)
            }
            _ => vec![],
        }
    }

    fn qemu_died(&mut self) -> Vec<Action> {
        self.qemu_is_dead = true;
        match self.state {
            State::Given { .. } | State::Settled { .. } => vec![],
            _ => self.take_back("QEMU ended".into()),
        }
    }

    fn link_lost(&mut self) -> Vec<Action> {
        match self.state {
            State::Given { run_state, .. } => {
                self.state = State::Given { run_state, asked: self.settings.asks.saturating_add(1) };
                vec![Action::Report(Outcome::Unsettled)]
            }
            State::Settled { .. } => vec![],
            _ => self.take_back("the link was lost".into()),
        }
    }

    fn timeout(&mut self) -> Vec<Action> {
        match self.state {
            State::Opening { asked } if asked < self.settings.asks => {
                self.state = State::Opening { asked: asked + 1 };
                vec![self.open()]
            }
            State::Opening { .. } => self.take_back("the target doesn't answer".into()),
            State::Stopping => self.take_back("QEMU didn't stop the guest".into()),
            State::Flushing { .. } => self.take_back("QEMU didn't complete its migration".into()),
            State::Given { run_state, asked } if asked < self.settings.asks => self.ask(run_state, asked),
            State::Given { asked, run_state } if asked == self.settings.asks => {
                self.state = State::Given { run_state, asked: asked.saturating_add(1) };
                vec![Action::Report(Outcome::Unsettled)]
            }
            State::Preparing | State::Ready | State::Given { .. } | State::Settled { .. } => vec![],
        }
    }

    fn abort(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Given { .. } => vec![self.cancel(reason)],
            State::Settled { .. } => vec![],
            _ => self.take_back(reason),
        }
    }

    /// The machine stays here. Legal before the token left, and after the target refused it. The record says so last:
    /// a restart in the middle goes this way again.
    fn take_back(&mut self, reason: String) -> Vec<Action> {
        let before = std::mem::replace(&mut self.state, State::Settled { taken_back: true });
        let mut actions = Vec::new();
        if !matches!(before, State::Given { .. }) {
            actions.extend([Action::AbortMigration, self.cancel(reason.clone())]);
        }
        if let State::Flushing { run_state } | State::Given { run_state, .. } = before
            && run_state.is_live()
        {
            actions.push(Action::ContinueGuest);
        }
        if before != State::Preparing {
            let state = RecordState::Owner { peer: Some(self.settings.peer.clone()) };
            let record = Record { epoch: self.epoch, state };
            actions.push(Action::Persist { record, sync: Sync::Behind });
        }
        if !self.qemu_is_dead {
            actions.push(Action::Report(Outcome::TakenBack { reason }));
            return actions;
        }
        actions.retain(|action| !matches!(action, Action::AbortMigration | Action::ContinueGuest));
        actions.push(Action::Report(Outcome::Died { reason }));
        actions
    }

    fn ask(&mut self, run_state: RunState, asked: u8) -> Vec<Action> {
        self.state = State::Given { run_state, asked: asked.saturating_add(1) };
        vec![Action::Send(Message::Query { epoch: self.epoch })]
    }

    fn open(&self) -> Action {
        Action::Send(Message::OpenHandover { epoch: self.epoch })
    }

    fn cancel(&self, reason: String) -> Action {
        Action::Send(Message::Cancel { epoch: self.epoch, reason })
    }

    fn persist_offered(&self, stopped: Option<RunState>, sync: Sync) -> Action {
        let state = RecordState::Offered { peer: self.settings.peer.clone(), stopped };
        Action::Persist { record: Record { epoch: self.epoch, state }, sync }
    }

    fn persist_given_away(&self, run_state: RunState, settled: bool) -> Action {
        let state = RecordState::GivenAway { peer: self.settings.peer.clone(), run_state, settled };
        Action::Persist { record: Record { epoch: self.epoch, state }, sync: Sync::Behind }
    }
}
