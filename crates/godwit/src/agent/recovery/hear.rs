//! What agents say to each other about a hand-over when a worker can't: questions get the answer that the record gives.
//!
//! Whom to believe: a message counts only if its sender is the other side of the hand-over that is on record here. A
//! peer can't touch a machine that it never was given or never gave.

use std::{sync::Arc, time::Duration};

use godwit_migration::handover::{Message, Record, RecordState, TargetEvent};
use godwit_transport::identity::HostName;
use tokio::time::{Instant, sleep, timeout};

use super::{Agent, AgentError, lost, open, shell::Shell, synced};
use crate::{
    agent::{error::Refusal, machines, peers::HANDOVER_PATH, workers},
    api::{HandoverAnswer, HandoverRequest},
    job::{Command, Job, Role},
    output::one_line,
    token::Store,
};

/// How long a worker that was asked may take until the record has the answer.
const DECIDING: Duration = Duration::from_secs(3);
/// How long the other host's agent may take to answer; it may have to ask its worker, and end a QEMU.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Machines that are known only by a refusal; a peer must not fill the disk with names.
const STRANGERS_MAX: usize = 1024;

impl Agent {
    /// Says something about a hand-over to the agent of another host, and returns what it answers.
    pub(super) async fn say(
        &self,
        peer: &str,
        machine: &str,
        message: Message,
    ) -> Result<Option<Message>, AgentError> {
        let request = HandoverRequest { machine: machine.to_owned(), message };
        let say = async {
            let peer = self.find_peer(peer).await?;
            self.post::<HandoverAnswer>(&peer, HANDOVER_PATH, &request).await
        };
        let late = |_| AgentError::Unreachable {
            peer: peer.to_owned(),
            reason: format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
        };
        Ok(timeout(ANSWER_TIMEOUT, say).await.map_err(late)??.message)
    }

    /// Takes what another host's agent says, and answers it; `None`: nothing to say, or not yet.
    pub(in crate::agent) async fn hear(
        self: &Arc<Self>,
        peer: &HostName,
        request: HandoverRequest,
    ) -> Result<HandoverAnswer, AgentError> {
        let HandoverRequest { machine, message } = request;
        let directory = self.directory(&machine)?;
        let record = Store::open(directory.path()).load()?;
        self.admit(peer, &machine, record.as_ref(), &message)?;
        tracing::info!(%peer, machine, ?message, "the other host says");
        let message = match message {
            Message::Taken { .. } | Message::Refused { .. } | Message::HandoverOpened { .. } => {
                self.source_hears(&machine, message).await;
                None
            }
            Message::StoodDown { epoch } => {
                lost::forget_order(self, &machine, peer.as_str(), epoch);
                None
            }
            message => self.target_hears(peer, &machine, message).await?,
        };
        Ok(HandoverAnswer { message })
    }

    /// Whether the peer has a say in this machine.
    fn admit(
        &self,
        peer: &HostName,
        machine: &str,
        record: Option<&Record>,
        message: &Message,
    ) -> Result<(), AgentError> {
        let stranger = || AgentError::NotFound { what: "machine of yours", name: machine.to_owned() };
        let job = self.migrations.of_machine(machine);
        let other = job.as_ref().map(|job| job.peer.as_str()).or(record.and_then(Record::peer));
        match (other, message) {
            (Some(other), _) if other == peer.as_str() => Ok(()),
            // It asks about an attempt of which nothing is known here; the answer is a durable no.
            (None, Message::Query { .. })
                if self.config.peer(peer.as_str()).is_some_and(|it| it.may_send) =>
            {
                let known = self.state.known_machines()?.len();
                let full = record.is_none() && known >= STRANGERS_MAX;
                if full { Err(Refusal::MayNotSend(peer.to_string()).into()) } else { Ok(()) }
            }
            _ => Err(stranger()),
        }
    }

    /// The worker hears it, or, where there is none, the machine is settled now rather than later.
    async fn source_hears(self: &Arc<Self>, machine: &str, message: Message) {
        if let Some(job) = self.migrations.of_machine(machine) {
            if let Err(error) = self.command(&job.id, &Command::PeerSays { message }).await {
                tracing::info!(machine, error = one_line(&error), "the worker doesn't hear it");
            }
            return;
        }
        let (agent, machine) = (self.clone(), machine.to_owned());
        tokio::spawn(async move { agent.recover(Some(&machine)).await });
    }

    /// Takes an order of a peer that this host fetched itself.
    pub(super) async fn obey(
        self: &Arc<Self>,
        peer: &HostName,
        machine: &str,
        order: Message,
    ) -> Result<Option<Message>, AgentError> {
        let record = Store::open(self.directory(machine)?.path()).load()?;
        self.admit(peer, machine, record.as_ref(), &order)?;
        self.target_hears(peer, machine, order).await
    }

    async fn target_hears(
        self: &Arc<Self>,
        peer: &HostName,
        machine: &str,
        message: Message,
    ) -> Result<Option<Message>, AgentError> {
        let deadline = Instant::now() + DECIDING;
        if let Some(job) = self.migrations.of_machine(machine) {
            self.worker_hears(&job, &message).await;
        }
        loop {
            if let Ok(_claim) = self.busy.claim(machine, "the other host asks about it") {
                return self.answer(peer, machine, message).await;
            }
            if let Some(answer) = self.answer_beside_worker(machine, &message)? {
                return Ok(Some(answer));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// A worker that is to stand down, or whose peer's worker is gone, has to know.
    async fn worker_hears(&self, job: &Job, message: &Message) {
        if matches!(message, Message::StandDown { .. }) {
            workers::kill(&self.state.migration(&job.id));
        } else if job.role == Role::Target
            && let Err(error) = self.command(&job.id, &Command::PeerSays { message: message.clone() }).await
        {
            tracing::info!(machine = job.spec.name, error = one_line(&error), "the worker doesn't hear it");
        }
    }

    /// The answer while a worker lives: only what its record says for good.
    fn answer_beside_worker(&self, machine: &str, asked: &Message) -> Result<Option<Message>, AgentError> {
        let directory = self.state.machine(machine);
        let Some(record) = Store::open(directory.path()).load()? else { return Ok(None) };
        let epoch = asked.epoch();
        let has_qemu = machines::running(&directory)?.is_some();
        Ok(match record.state {
            RecordState::Owner { .. } if record.epoch == epoch => {
                Some(Message::Taken { epoch, resumed_unix_us: None })
            }
            RecordState::Refused { .. } if record.epoch == epoch && !has_qemu => {
                Some(Message::Refused { epoch, reason: "it was refused".to_owned() })
            }
            _ => None,
        })
    }

    /// The answer of a host whose machine is claimed for it: what is open is settled first.
    async fn answer(
        &self,
        peer: &HostName,
        machine: &str,
        message: Message,
    ) -> Result<Option<Message>, AgentError> {
        let directory = self.state.machine(machine);
        let record = synced(&Store::open(directory.path()))?;
        // A machine that was never handed over is this host's.
        let record = record.or_else(|| directory.exists().then(Record::created));
        let mut shell = Shell::new(self, machine);
        let (mut target, mut said) = shell.restart_target(record, peer.as_str()).await?;
        said.extend(shell.advance_target(&mut target, TargetEvent::PeerSays(message)).await?);
        tracing::info!(machine, did = shell.account(), open = ?open(&directory), "answered");
        let is_answer = |said: &Message| {
            matches!(said, Message::Taken { .. } | Message::Refused { .. } | Message::StoodDown { .. })
        };
        Ok(said.into_iter().rfind(is_answer))
    }
}
