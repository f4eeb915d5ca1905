//! What the control loop does: the hand-over's actions, carried out in order.

use std::io::Write;

use godwit_migration::{
    handover::{self, Action, RunState, Sync},
    wire::{self, Digest, Message, Token},
};
use godwit_qemu::return_path;
use godwit_transport::session::Lane;
use tokio::time::Instant;

use super::Control;
use crate::{
    job::{Happening, Phase},
    output::one_line,
    token::Durability,
    worker::{WorkerError, end_qemu, source::run_state, verify},
};

impl Control<'_> {
    /// Carries out `actions`; where one fails, the migration is aborted as far as it still can be.
    pub(super) async fn carry_out_or_abort(&mut self, actions: Vec<Action>) -> Result<(), WorkerError> {
        let Err(error) = self.carry_out(actions).await else { return Ok(()) };
        let actions = self.abort(one_line(&error));
        if actions.is_empty() { Err(error) } else { self.carry_out(actions).await }
    }

    async fn carry_out(&mut self, actions: Vec<Action>) -> Result<(), WorkerError> {
        for action in actions {
            tracing::debug!(?action, "hand-over");
            self.act(action).await?;
        }
        Ok(())
    }

    async fn act(&mut self, action: Action) -> Result<(), WorkerError> {
        match action {
            Action::Persist { record, sync } => self.persist(&record, sync)?,
            Action::Send(message) => self.send(message).await?,
            Action::OpenGate => self.open_gate().await?,
            #[cfg(feature = "sabotage")]
            Action::AnswerShut if crate::sabotage::leaves_shut_unanswered() => {}
            // QEMU 7.2 closes its whole connection with the return path; without a gate it is that old.
            Action::AnswerShut if !self.guest.is_gated && !self.stop.is_described => {
                self.stop.owes_shut = true
            }
            Action::AnswerShut => self.answer(&return_path::Message::Shut(0))?,
            Action::SendToken { epoch, run_state, leave_paused } => {
                self.send_token(epoch, run_state, leave_paused).await?;
            }
            Action::AbortMigration => self.abort_migration().await?,
            Action::ContinueGuest => self.guest.resume().await?,
            Action::KillQemu => self.end_qemu().await,
            Action::Report(outcome) => self.outcome = Some(outcome),
            // These are the target's.
            Action::Verify | Action::Load => {}
        }
        Ok(())
    }

    fn persist(&self, record: &handover::Record, sync: Sync) -> Result<(), WorkerError> {
        #[cfg(feature = "sabotage")]
        if crate::sabotage::forgets(record) {
            return Ok(());
        }
        match sync {
            Sync::Before => self.store.save(record, Durability::Synced)?,
            Sync::Behind => {
                self.store.save(record, Durability::Written)?;
                let store = self.store.clone();
                tokio::task::spawn_blocking(move || store.sync());
            }
        }
        Ok(())
    }

    async fn send(&self, message: handover::Message) -> Result<(), WorkerError> {
        if self.session_over {
            return Ok(());
        }
        let (kind, body) = wire::encode(&Message::Handover(message))?;
        // A link that is lost is told by the session itself.
        let _ = self.session.send(Lane::Urgent, kind, body).await;
        Ok(())
    }

    async fn open_gate(&mut self) -> Result<(), WorkerError> {
        // QEMU's own answer is the surest, until it is about to end its stream.
        self.stop.guest_did = Some(match self.stop.came_by_itself {
            true => self.guest_does,
            false => run_state(self.guest.monitor.query_status().await?.state),
        });
        self.stop.gate_opened = Some(Instant::now());
        if self.guest.is_gated {
            self.answer(&return_path::Message::SwitchoverAck)?;
        }
        self.threads.pace.free();
        self.guest.allow_stop().await?;
        self.journal.say(Happening::Phase { phase: Phase::Switchover });
        Ok(())
    }

    fn answer(&mut self, message: &return_path::Message) -> Result<(), WorkerError> {
        self.threads.return_path.write_all(&return_path::encode(message)).map_err(WorkerError::ReturnPath)
    }

    async fn send_token(
        &mut self,
        epoch: handover::Epoch,
        run_state: RunState,
        leave_paused: bool,
    ) -> Result<(), WorkerError> {
        let (Some(sent), Some(stream)) = (&self.stop.sent, &self.stop.stream) else { return Ok(()) };
        let token = Token {
            epoch,
            run_state,
            leave_paused,
            batches: sent.batches,
            chain: Digest(sent.chain.to_bytes()),
            stream_bytes: stream.bytes,
            stream_digest: Digest(stream.digest),
            stopped_unix_us: self.stop.stopped_unix_us.unwrap_or_default(),
        };
        let (kind, body) = wire::encode(&Message::Token(token))?;
        let threads = &self.threads;
        tokio::task::block_in_place(|| {
            if let Some(memory) = &threads.verify {
                let _ = threads.outbox.put(wire::VERIFY, verify::digests(memory)?.into());
            }
            // Behind everything else; a link that is lost is told by the session itself.
            let _ = threads.outbox.put(kind, body);
            Ok::<_, WorkerError>(())
        })?;
        self.journal.say(Happening::Phase { phase: Phase::HandedOver });
        Ok(())
    }

    /// The machine runs at the target; what is left of it here harms nobody, even if it doesn't go.
    async fn end_qemu(&self) {
        if let Err(error) = end_qemu(&self.guest.monitor, self.job.pid).await {
            self.journal.warn(one_line(&error));
        }
    }

    async fn abort_migration(&mut self) -> Result<(), WorkerError> {
        self.threads.pace.close();
        self.threads.stage.close();
        Ok(self.guest.give_up().await?)
    }
}
