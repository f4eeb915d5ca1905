//! The shell around a hand-over whose worker is gone: what the state machines say is carried out through QEMU's monitor,
//! the record and the other host's agent.

use std::time::{Duration, Instant};

use godwit_migration::handover::{
    Action, Epoch, Message, Outcome, QemuState, Record, RecordState, Source, SourceEvent, SourceSettings,
    Target, TargetEvent,
};
use godwit_qemu::qmp::{self, QmpError, RunState};
use tokio::time::sleep;

use super::{
    super::{
        Agent,
        error::AgentError,
        launch, machines,
        state::{self, MachineDir},
    },
    Job,
};
use crate::{
    borrowed,
    output::one_line,
    throttle,
    token::{Durability, Store},
};

/// How long QEMU may take to give a migration up.
const SETTLE: Duration = Duration::from_secs(10);
/// Questions and answers in one go; a hand-over needs one.
const ROUNDS_MAX: usize = 4;
/// The guest's announcements once it runs: at once, then spread over half a second.
const ANNOUNCE_ROUNDS: u32 = 5;
const ANNOUNCE_STEP: Duration = Duration::from_millis(50);

/// A machine whose hand-over is settled without a worker.
pub(super) struct Shell<'a> {
    agent: &'a Agent,
    name: &'a str,
    directory: MachineDir,
    /// What was done, in words.
    pub(super) did: Vec<String>,
}

impl<'a> Shell<'a> {
    pub(super) fn new(agent: &'a Agent, name: &'a str) -> Self {
        Self { agent, name, directory: agent.state.machine(name), did: Vec::new() }
    }

    /// What was done, in one line.
    pub(super) fn account(&self) -> String {
        if self.did.is_empty() { "nothing".to_owned() } else { self.did.join("; ") }
    }

    /// Goes on as the source of a record.
    pub(super) async fn settle_source(&mut self, record: Option<Record>) -> Result<(), AgentError> {
        let Some((record, peer)) = with_peer(record) else { return Ok(()) };
        let qemu = self.qemu_state().await?;
        let rebooted = self.rebooted()?;
        let settings = SourceSettings::new(&peer);
        let Some((mut source, mut actions)) = Source::restarted(&record, qemu, rebooted, settings) else {
            return Ok(());
        };
        for _ in 0..ROUNDS_MAX {
            let mut answers = Vec::new();
            for message in self.carry_out(actions).await? {
                answers.extend(self.converse(&peer, message).await?);
            }
            actions =
                answers.into_iter().flat_map(|answer| source.apply(SourceEvent::PeerSays(answer))).collect();
            if actions.is_empty() {
                break;
            }
        }
        if source.is_settled() { self.give_settings_back().await } else { Ok(()) }
    }

    /// Goes on as the target of a record, and tells the source.
    pub(super) async fn settle_target(&mut self, record: Option<Record>) -> Result<(), AgentError> {
        let Some((record, peer)) = with_peer(record) else { return Ok(()) };
        let (_, said) = self.restart_target(Some(record), &peer).await?;
        self.tell_result(&peer, said).await;
        Ok(())
    }

    /// Refuses an attempt of which this host has nothing on record, and tells the source.
    pub(super) async fn refuse_unknown(
        &mut self,
        record: Option<Record>,
        job: &Job,
    ) -> Result<(), AgentError> {
        let mut target = Target::new(record, &job.peer);
        let query = Message::Query { epoch: Epoch(job.epoch) };
        let mut said = self.advance_target(&mut target, TargetEvent::PeerSays(query)).await?;
        for message in &mut said {
            if let Message::Refused { reason, .. } = message {
                *reason = "the target's worker died".to_owned();
            }
        }
        self.tell_result(&job.peer, said).await;
        Ok(())
    }

    /// A target that goes on from its record, with what it says to the source.
    pub(super) async fn restart_target(
        &mut self,
        record: Option<Record>,
        peer: &str,
    ) -> Result<(Target, Vec<Message>), AgentError> {
        let was_refused = record.as_ref().is_some_and(|it| matches!(it.state, RecordState::Refused { .. }));
        let qemu = self.qemu_state().await?;
        let rebooted = self.rebooted()?;
        let (mut target, actions) = Target::restarted(record, qemu, rebooted, peer);
        let continues = actions.contains(&Action::ContinueGuest);
        let mut said = match self.carry_out(actions).await {
            Err(AgentError::Qmp(QmpError::Refused { description, .. })) if continues => {
                let failed = TargetEvent::ContFailed { reason: description };
                return self.advance_target(&mut target, failed).await.map(|said| (target, said));
            }
            carried_out => carried_out?,
        };
        if was_refused {
            self.agent.abandon(self.name).await;
        }
        if continues {
            let running = TargetEvent::GuestRunning { resumed_unix_us: None };
            said.extend(self.advance_target(&mut target, running).await?);
        }
        Ok((target, said))
    }

    /// Applies an event to a target; returns what it says.
    pub(super) async fn advance_target(
        &mut self,
        target: &mut Target,
        event: TargetEvent,
    ) -> Result<Vec<Message>, AgentError> {
        let actions = target.apply(event);
        self.carry_out(actions).await
    }

    /// Takes the machine that this host still has a copy of: it goes on where it was stopped, if it ran then.
    pub(super) async fn take_over(&mut self, ran: bool) -> Result<(), AgentError> {
        match self.qemu_state().await? {
            QemuState::Dead => {
                self.did
                    .push(format!("the machine may be started here: godwit vm run, {} is off", self.name));
                return Ok(());
            }
            QemuState::Incoming => {
                self.agent.abandon(self.name).await;
                return Ok(());
            }
            QemuState::Paused | QemuState::Running => {}
        }
        self.abort_migration().await?;
        if ran {
            self.continue_guest().await?;
        }
        self.give_settings_back().await
    }

    /// Lets a guest that a worker had slowed run as fast as before.
    pub(super) fn give_speed_back(&mut self) {
        match throttle::lift(self.directory.path()) {
            Ok(true) => self.did.push("gave the guest its full speed back".to_owned()),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(machine = self.name, error = one_line(&error), "may still be slowed")
            }
        }
    }

    /// Puts back what a worker changed of QEMU's settings.
    pub(super) async fn give_settings_back(&mut self) -> Result<(), AgentError> {
        if borrowed::noted(self.directory.path()).is_none() {
            return Ok(());
        }
        let Some(monitor) = self.monitor().await? else {
            borrowed::forget(self.directory.path());
            return Ok(());
        };
        give_up(&monitor).await?;
        borrowed::give_back(self.directory.path(), &monitor).await?;
        self.did.push("put QEMU's settings back".to_owned());
        Ok(())
    }

    /// Carries out `actions` in order; returns the messages among them, which are for the caller to deliver.
    async fn carry_out(&mut self, actions: Vec<Action>) -> Result<Vec<Message>, AgentError> {
        let mut said = Vec::new();
        for action in actions {
            tracing::debug!(machine = self.name, ?action, "recovery");
            match action {
                Action::Persist { record, .. } => self.persist(&record)?,
                Action::Send(message) => said.push(message),
                Action::AbortMigration => self.abort_migration().await?,
                Action::ContinueGuest => self.continue_guest().await?,
                Action::KillQemu => self.end_qemu().await,
                Action::Report(outcome) => self.report(outcome).await,
                // A hand-over that goes on from its record never gets here.
                Action::OpenGate
                | Action::AnswerShut
                | Action::SendToken { .. }
                | Action::Verify
                | Action::Load => {}
            }
        }
        Ok(said)
    }

    /// No pause waits for the disk here.
    fn persist(&self, record: &Record) -> Result<(), AgentError> {
        state::make_private_dir(self.directory.path())?;
        Ok(Store::open(self.directory.path()).save(record, Durability::Synced)?)
    }

    async fn abort_migration(&mut self) -> Result<(), AgentError> {
        let Some(monitor) = self.monitor().await? else { return Ok(()) };
        if !monitor.query_migrate().await?.status.is_final() {
            self.did.push("gave QEMU's migration up".to_owned());
        }
        give_up(&monitor).await
    }

    async fn continue_guest(&mut self) -> Result<(), AgentError> {
        let Some(monitor) = self.monitor().await? else { return Ok(()) };
        if !monitor.query_status().await?.running {
            monitor.cont().await?;
            self.did.push("let the guest go on".to_owned());
        }
        Ok(())
    }

    async fn end_qemu(&mut self) {
        if let Ok(Some(running)) = machines::running(&self.directory) {
            machines::end(&self.directory, &running).await;
            self.did.push("ended the copy that was here".to_owned());
        }
        launch::clear(&self.directory).await;
    }

    async fn report(&mut self, outcome: Outcome) {
        let done = match outcome {
            Outcome::HandedOver { .. } => "the other host has the machine".to_owned(),
            Outcome::TakenBack { reason } => format!("the machine stays here: {reason}"),
            Outcome::Unsettled => "only the other host knows where the machine is".to_owned(),
            Outcome::Taken => {
                self.machine_came().await;
                "the machine is here".to_owned()
            }
            Outcome::Refused { reason } => {
                self.agent.abandon(self.name).await;
                format!("refused the machine: {reason}")
            }
            Outcome::Died { reason } => format!("the machine belongs here, and is dead: {reason}"),
        };
        self.did.push(done);
    }

    /// The guest's addresses are announced and QEMU's settings put back; neither decides anything.
    async fn machine_came(&mut self) {
        let came = async {
            if let Some(monitor) = self.monitor().await? {
                monitor
                    .announce_self(ANNOUNCE_STEP, ANNOUNCE_STEP * 4, ANNOUNCE_ROUNDS, ANNOUNCE_STEP)
                    .await?;
            }
            self.give_settings_back().await
        };
        if let Err(error) = came.await {
            tracing::warn!(machine = self.name, error = one_line(&error), "the arrived machine");
        }
    }

    /// Says something to the source or the target and returns its answer. What only informs the other side may get
    /// lost: it asks by itself.
    async fn converse(&mut self, peer: &str, message: Message) -> Result<Option<Message>, AgentError> {
        let is_question = matches!(message, Message::Query { .. });
        match self.agent.say(peer, self.name, message).await {
            Ok(answer) => {
                if is_question {
                    self.did.push(format!("asked {peer}"));
                }
                Ok(answer)
            }
            Err(error) if is_question => Err(error),
            Err(error) => {
                tracing::info!(peer, error = one_line(&error), "not told");
                Ok(None)
            }
        }
    }

    async fn tell_result(&mut self, peer: &str, said: Vec<Message>) {
        for message in said {
            let _ = self.converse(peer, message).await;
        }
    }

    /// Whether the host has booted since the record was written.
    fn rebooted(&self) -> Result<bool, AgentError> {
        Ok(Store::open(self.directory.path()).find()?.is_some_and(|found| found.rebooted))
    }

    async fn qemu_state(&self) -> Result<QemuState, AgentError> {
        let Some(monitor) = self.monitor().await? else { return Ok(QemuState::Dead) };
        let status = monitor.query_status().await?;
        Ok(match status.state {
            _ if status.running => QemuState::Running,
            RunState::Inmigrate => QemuState::Incoming,
            _ => QemuState::Paused,
        })
    }

    /// The monitor of the machine's QEMU, if that lives.
    async fn monitor(&self) -> Result<Option<qmp::Client>, AgentError> {
        let Some(running) = machines::running(&self.directory)? else { return Ok(None) };
        match machines::monitor(&self.directory, &running).await {
            Ok(monitor) => Ok(Some(monitor)),
            // It may have ended just now.
            Err(_) if !running.process.is_alive() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The record together with the other side that it names.
fn with_peer(record: Option<Record>) -> Option<(Record, String)> {
    let record = record?;
    let peer = record.peer()?.to_owned();
    Some((record, peer))
}

/// Ends QEMU's migration, if one is under way, and waits until it is over.
async fn give_up(monitor: &qmp::Client) -> Result<(), AgentError> {
    if monitor.query_migrate().await?.status.is_final() {
        return Ok(());
    }
    monitor.migrate_cancel().await?;
    let give_up_at = Instant::now() + SETTLE;
    while !monitor.query_migrate().await?.status.is_final() {
        if Instant::now() > give_up_at {
            return Err(AgentError::Stuck(format!(
                "doesn't give its migration up within {} s",
                SETTLE.as_secs()
            )));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
