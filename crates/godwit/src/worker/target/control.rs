//! The loop of the target's worker: one place that awaits, one that decides, one that acts.

use std::{
    sync::{Arc, mpsc as std_mpsc},
    time::Duration,
};

use godwit_migration::{
    handover::{self, Action, Outcome, RecordState, Sync, Target, TargetEvent},
    wire::{self, Message, Refuse, Token, TransferOptions},
};
use godwit_qemu::{
    qmp::{Client, Event, QmpError},
    return_path,
};
use godwit_transport::session::{Lane, Session};
use tokio::{
    sync::{broadcast, mpsc},
    time::{Instant, sleep_until},
};

use super::{
    Keep,
    intake::{Arrived, IntakeError},
};
use crate::{
    borrowed,
    job::{self, Command, Happening, Job, Phase},
    output::one_line,
    token::{Durability, Store, TokenError},
    worker::{
        WorkerError,
        account::{ReportDraft, pause_by_both_clocks},
        end_qemu,
        journal::Journal,
    },
};

/// How long the target goes without a sign of life, beyond the session's own reconnect timeout, before it asks the
/// hand-over what that means: this is for a peer that is there and silent in the pause.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a settled target stays to answer the source.
const LINGER: Duration = Duration::from_secs(10);
/// How long saying goodbye to the source may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// The guest's announcements after it runs (CloudNet, 6.4.1.4): at once, then spread over half a second.
const ANNOUNCE_ROUNDS: u32 = 5;
const ANNOUNCE_STEP: Duration = Duration::from_millis(50);

/// What the intake is told once the token has come.
#[derive(Debug)]
pub(super) enum Order {
    /// Compare everything with what the token promises.
    Verify(Token),
    /// Give QEMU the device state.
    Load,
}

/// Everything that can happen to a target.
#[derive(Debug)]
pub(super) enum Happened {
    /// Something in the bulk lane that matters here.
    Arrived(Arrived),
    /// Everything that the token promises is here and right.
    Verified,
    /// What arrived can't be used.
    IntakeFailed(IntakeError),
    /// QEMU says something on its return path.
    ReturnPath(return_path::Message),
    /// The newest record is on disk, or can't get there.
    Synced(Result<(), TokenError>),
    /// A message of the source.
    Peer(Result<Message, wire::DecodeError>),
    /// The session ended.
    SessionOver,
    /// QEMU says something.
    Monitor(Event),
    /// QEMU's monitor ended: so did QEMU.
    QemuGone,
    /// The operator says something.
    Command(Command),
    /// Nothing happened for long.
    Silence,
}

/// What the loop works with.
pub(super) struct Parts {
    pub(super) monitor: Client,
    pub(super) session: Session,
    pub(super) store: Store,
    pub(super) handover: Target,
    pub(super) orders: std_mpsc::Sender<Order>,
    pub(super) tell: mpsc::Sender<Happened>,
    pub(super) events: mpsc::Receiver<Happened>,
    pub(super) keep: Arc<Keep>,
}

/// A migration under way at its target.
pub(super) struct Control<'a> {
    job: &'a Job,
    journal: &'a Journal,
    parts: Parts,
    options: TransferOptions,
    draft: &'a mut ReportDraft,
    qemu_events: broadcast::Receiver<Event>,
    token: Option<Token>,
    session_over: bool,
    /// Why this side ended the migration before a hand-over was offered.
    gave_up: Option<String>,
    outcome: Option<Outcome>,
    deadline: Instant,
    /// What had come through the session when the deadline was set.
    received_bytes: u64,
}

impl<'a> Control<'a> {
    pub(super) fn new(
        job: &'a Job,
        journal: &'a Journal,
        parts: Parts,
        options: TransferOptions,
        draft: &'a mut ReportDraft,
    ) -> Self {
        Self {
            qemu_events: parts.monitor.events(),
            job,
            journal,
            parts,
            options,
            draft,
            token: None,
            session_over: false,
            gave_up: None,
            outcome: None,
            deadline: Instant::now() + job.options.reconnect_timeout() + PATIENCE,
            received_bytes: 0,
        }
    }

    /// Takes the machine, or refuses it.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Result<(), WorkerError> {
        while !self.is_over() {
            let happened = self.next(&mut commands).await;
            let actions = self.apply(happened);
            self.carry_out(actions).await?;
        }
        if self.parts.handover.is_idle() {
            self.say_why().await;
            self.keep_partial().await;
            end_qemu(&self.parts.monitor, self.job.pid).await?;
        }
        if matches!(self.outcome, Some(Outcome::Taken))
            && let Err(error) = borrowed::give_back(&self.job.machine_dir, &self.parts.monitor).await
        {
            self.journal.warn(one_line(&error));
        }
        // The source waits for the acknowledgement of its last word.
        let _ = tokio::time::timeout(GOODBYE, self.parts.session.close()).await;
        self.journal.say(Happening::Phase { phase: Phase::Done });
        Ok(())
    }

    /// A settled target stays until the source has left, so that it gets its answer; one to which no hand-over was ever
    /// offered has nothing to answer.
    fn is_over(&self) -> bool {
        let settled = self.outcome.is_some() && Instant::now() >= self.deadline;
        settled || self.session_over && (self.outcome.is_some() || self.parts.handover.is_idle())
    }

    async fn next(&mut self, commands: &mut mpsc::Receiver<Command>) -> Happened {
        let deadline = self.deadline;
        loop {
            tokio::select! {
                Some(event) = self.parts.events.recv() => return event,
                message = self.parts.session.recv(Lane::Urgent), if !self.session_over => return match message {
                    Ok(Some(message)) => Happened::Peer(wire::decode(message.kind, &message.payload)),
                    Ok(None) => Happened::SessionOver,
                    Err(error) => {
                        tracing::info!(%error, "the session ended");
                        Happened::SessionOver
                    }
                },
                event = self.qemu_events.recv(), if !self.parts.monitor.is_closed() => match event {
                    Ok(event) => return Happened::Monitor(event),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Happened::QemuGone,
                },
                Some(command) = commands.recv() => return Happened::Command(command),
                () = sleep_until(deadline) => return Happened::Silence,
            }
        }
    }

    /// What follows from what happened.
    fn apply(&mut self, happened: Happened) -> Vec<Action> {
        let heard = self.wait_anew();
        match happened {
            Happened::Arrived(Arrived::Token(token)) => self.token_received(token),
            Happened::Arrived(Arrived::Verified { pages }) => {
                self.draft.report.pages_verified = Some(pages);
                vec![]
            }
            // The source hears of it, and nobody else.
            Happened::Arrived(Arrived::Kept(_)) => vec![],
            Happened::Verified => self.parts.handover.apply(TargetEvent::Verified),
            Happened::IntakeFailed(error) => self.intake_failed(one_line(&error)),
            Happened::ReturnPath(message) => {
                tracing::debug!(?message, "return path");
                vec![]
            }
            Happened::Synced(Ok(())) => self.parts.handover.apply(TargetEvent::Synced),
            Happened::Synced(Err(error)) => self.abort(one_line(&error)),
            Happened::Peer(Ok(Message::Handover(message))) => {
                self.parts.handover.apply(TargetEvent::PeerSays(message))
            }
            Happened::Peer(Ok(_)) => self.abort("the source sent a message that has no place here".into()),
            Happened::Peer(Err(error)) => self.abort(one_line(&error)),
            Happened::SessionOver => {
                self.session_over = true;
                self.parts.handover.apply(TargetEvent::LinkLost)
            }
            Happened::Monitor(event) => self.qemu_says(&event),
            Happened::QemuGone if self.parts.handover.is_idle() => {
                self.abort("this host's QEMU ended".into())
            }
            Happened::QemuGone => self.parts.handover.apply(TargetEvent::QemuDied),
            Happened::Command(Command::Cancel) => self.abort("cancelled at the target".into()),
            Happened::Command(Command::PeerSays { message }) => {
                self.parts.handover.apply(TargetEvent::PeerSays(message))
            }
            Happened::Command(Command::SetBandwidth { .. } | Command::SetOnStall { .. }) => vec![],
            // The pause of a guest that outran its link is long, and nothing but its memory comes.
            Happened::Silence if heard => vec![],
            Happened::Silence => self.parts.handover.apply(TargetEvent::Timeout),
        }
    }

    /// Moves the deadline of a target that isn't settled; says whether anything came since it was last moved.
    fn wait_anew(&mut self) -> bool {
        if self.outcome.is_none() {
            self.deadline = Instant::now() + self.job.options.reconnect_timeout() + PATIENCE;
        }
        let received_bytes = self.parts.session.stats().received_bytes;
        std::mem::replace(&mut self.received_bytes, received_bytes) != received_bytes
    }

    /// Gives up, if that is still possible; before a hand-over was offered there is nothing but the session to end.
    fn abort(&mut self, reason: String) -> Vec<Action> {
        if self.parts.handover.is_idle() {
            self.journal.warn(reason.clone());
            self.session_over = true;
            self.gave_up.get_or_insert(reason);
            return vec![];
        }
        self.parts.handover.apply(TargetEvent::Abort { reason })
    }

    fn token_received(&mut self, token: Token) -> Vec<Action> {
        self.journal.say(Happening::Phase { phase: Phase::HandedOver });
        let (epoch, run_state, leave_paused) = (token.epoch, token.run_state, token.leave_paused);
        self.token = Some(token);
        self.parts.handover.apply(TargetEvent::TokenReceived { epoch, run_state, leave_paused })
    }

    fn intake_failed(&mut self, reason: String) -> Vec<Action> {
        match self.token {
            Some(_) => self.parts.handover.apply(TargetEvent::VerifyFailed { reason }),
            None => self.abort(reason),
        }
    }

    fn qemu_says(&mut self, event: &Event) -> Vec<Action> {
        match (event.name.as_str(), event.data.get("status").and_then(|status| status.as_str())) {
            ("MIGRATION", Some("completed")) => self.parts.handover.apply(TargetEvent::Loaded),
            ("MIGRATION", Some("failed")) => {
                let reason = "this host's QEMU can't load the machine; its log says why".to_owned();
                self.parts.handover.apply(TargetEvent::LoadFailed { reason })
            }
            ("RESUME", _) => {
                let resumed_unix_us = event.timestamp.unix_us();
                self.note_downtime(resumed_unix_us);
                self.parts
                    .handover
                    .apply(TargetEvent::GuestRunning { resumed_unix_us: Some(resumed_unix_us) })
            }
            _ => vec![],
        }
    }

    fn note_downtime(&mut self, resumed_unix_us: u64) {
        self.draft.report.resumed_unix_ms = Some(resumed_unix_us / 1_000);
        let stopped_unix_us = self.token.as_ref().map_or(0, |token| token.stopped_unix_us);
        if stopped_unix_us > 0 {
            let at_most_ms = self.draft.elapsed_ms() as f64;
            self.draft.report.downtime_ms =
                pause_by_both_clocks(stopped_unix_us, resumed_unix_us, at_most_ms);
        }
    }
}

/// What it means that an action failed.
#[derive(Debug, Clone, Copy)]
enum Failing {
    /// The refusal isn't on disk, so it can't be said.
    Refusal,
    /// A record isn't on disk.
    Record,
    Other,
}

impl Failing {
    fn of(action: &Action) -> Self {
        match action {
            Action::Persist { record, .. } if matches!(record.state, RecordState::Refused { .. }) => {
                Self::Refusal
            }
            Action::Persist { .. } => Self::Record,
            _ => Self::Other,
        }
    }
}

/// Acting.
impl Control<'_> {
    /// Carries out `actions`. Where one fails, the hand-over is refused if it still can be; once it can't, the machine is
    /// here, and no failure of ours may cost it.
    async fn carry_out(&mut self, actions: Vec<Action>) -> Result<(), WorkerError> {
        for action in actions {
            tracing::debug!(?action, "hand-over");
            let failing = Failing::of(&action);
            let Err(error) = self.act(action).await else { continue };
            let reason = one_line(&error);
            let instead = match failing {
                Failing::Refusal => return Err(error),
                _ if self.parts.handover.may_refuse() => self.abort(reason.clone()),
                // The guest isn't continued without its record; see `Action`.
                Failing::Record => {
                    self.parts.handover.apply(TargetEvent::ContFailed { reason: reason.clone() })
                }
                Failing::Other => vec![],
            };
            if !instead.is_empty() {
                return Box::pin(self.carry_out(instead)).await;
            }
            if matches!(failing, Failing::Record) {
                // Nothing may be said that isn't on disk. The agent goes on from the record that is there.
                return Err(error);
            }
            self.journal.warn(reason);
        }
        Ok(())
    }

    async fn act(&mut self, action: Action) -> Result<(), WorkerError> {
        match action {
            Action::Persist { record, sync } => self.persist(&record, sync)?,
            Action::Send(message) => self.send(message).await?,
            Action::Verify => self.verify().await,
            // An intake that is gone has said why.
            Action::Load => drop(self.parts.orders.send(Order::Load)),
            Action::ContinueGuest => self.continue_guest().await,
            Action::KillQemu => {
                self.keep_partial().await;
                end_qemu(&self.parts.monitor, self.job.pid).await?;
            }
            Action::Report(outcome) => self.report(outcome).await,
            // These are the source's.
            Action::OpenGate | Action::AnswerShut | Action::SendToken { .. } | Action::AbortMigration => {}
        }
        Ok(())
    }

    fn persist(&self, record: &handover::Record, sync: Sync) -> Result<(), WorkerError> {
        match sync {
            Sync::Before => self.parts.store.save(record, Durability::Synced)?,
            Sync::Behind => {
                self.parts.store.save(record, Durability::Written)?;
                let (store, tell) = (self.parts.store.clone(), self.parts.tell.clone());
                tokio::task::spawn_blocking(move || {
                    drop(tell.blocking_send(Happened::Synced(store.sync())));
                });
            }
        }
        Ok(())
    }

    /// Before a hand-over was offered: what ended the migration, to the source too if it was this side.
    async fn say_why(&mut self) {
        let Some(reason) = self.gave_up.clone() else {
            return self.draft.taken_back(job::Outcome::Failed, "the source ended the migration".into());
        };
        self.draft.taken_back(job::Outcome::Failed, reason.clone());
        if let Ok((kind, body)) = wire::encode(&Message::Refuse(Refuse { reason })) {
            // A link that is lost tells the source as much.
            let _ = self.parts.session.send(Lane::Urgent, kind, body).await;
        }
    }

    async fn send(&self, message: handover::Message) -> Result<(), WorkerError> {
        if self.session_over {
            return Ok(());
        }
        let (kind, body) = wire::encode(&Message::Handover(message))?;
        // A link that is lost is told by the session itself.
        let _ = self.parts.session.send(Lane::Urgent, kind, body).await;
        Ok(())
    }

    /// A link that was lost for good may be back for the next try. Once the token has come, there is nothing to keep:
    /// the machine is either taken or its state is stale.
    async fn keep_partial(&self) {
        if self.session_over && self.token.is_none() {
            self.parts.keep.clone().keep(self.job, self.journal).await;
        }
    }

    async fn verify(&mut self) {
        if self.options.early_announce {
            self.announce().await;
        }
        if let Some(token) = self.token.clone() {
            // An intake that is gone has said why.
            drop(self.parts.orders.send(Order::Verify(token)));
        }
    }

    /// Lets the guest run. Only QEMU's own *no* proves that it hasn't run for an instant; after any other failure it may
    /// have, and then it is this host's: RESUME, or the end of QEMU, will tell.
    async fn continue_guest(&mut self) {
        let Err(error) = self.parts.monitor.cont().await else { return };
        let reason = one_line(&error);
        self.journal.warn(reason.clone());
        let is_paused = self.parts.monitor.query_status().await.is_ok_and(|status| !status.running);
        if is_paused && matches!(error, QmpError::Refused { .. }) {
            let failed = self.parts.handover.apply(TargetEvent::ContFailed { reason });
            if let Err(error) = Box::pin(self.carry_out(failed)).await {
                self.journal.warn(one_line(&error));
            }
        }
    }

    async fn report(&mut self, outcome: Outcome) {
        match &outcome {
            Outcome::Taken => {
                self.draft.completed();
                self.announce().await;
            }
            Outcome::Refused { reason } => self.draft.taken_back(job::Outcome::Failed, reason.clone()),
            Outcome::Died { reason } => {
                self.draft.completed();
                self.draft.report.detail = Some(reason.clone());
            }
            Outcome::HandedOver { .. } | Outcome::TakenBack { .. } | Outcome::Unsettled => {}
        }
        self.deadline = Instant::now() + LINGER;
        self.outcome = Some(outcome);
    }

    /// Makes the guest's cards tell the network where they are now.
    async fn announce(&self) {
        let announced = self.parts.monitor.announce_self(
            ANNOUNCE_STEP,
            ANNOUNCE_STEP * 4,
            ANNOUNCE_ROUNDS,
            ANNOUNCE_STEP,
        );
        if let Err(error) = announced.await {
            self.journal.warn(format!("the guest's addresses couldn't be announced: {}", one_line(&error)));
        }
    }
}
