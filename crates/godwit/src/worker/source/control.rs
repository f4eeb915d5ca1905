//! The loop of the source's worker: one place that awaits, one that decides, one that acts.

use std::{io::Write, os::unix::net::UnixStream, sync::Arc, time::Duration};

use godwit_migration::{
    handover::{self, Action, Outcome, RunState, Source, SourceEvent, Sync},
    mover::Mode,
    predict,
    stop::Verdict,
    wire::{self, Digest, Message, Token},
};
use godwit_qemu::{memory::ProcessMemory, qmp::Event, return_path};
use godwit_transport::session::{Lane, Session, SessionError};
use tokio::{
    sync::{broadcast, mpsc},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    guest::Guest,
    learned,
    pilot::{LinkObservation, Pilot, StageObservation},
    pump::{Pace, PumpEvent},
    run_state,
    sender::{Account, Outbox, SendError, Sent, StreamSum},
    stage::SharedStage,
};
use crate::{
    job::{self, Command, Happening, Job, Phase},
    output::one_line,
    token::{Durability, Store},
    worker::{WorkerError, account::ReportDraft, end_qemu, journal::Journal, verify},
};

/// How often the pilot looks.
const TICK: Duration = Duration::from_millis(10);
/// How often progress is told.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);
/// How long the guest has to be ahead of the link before the operator hears of it.
const STALL: Duration = Duration::from_secs(5);
/// How long a step of the hand-over may go without any sign of life.
const PATIENCE: Duration = Duration::from_secs(10);

/// What runs beside the control loop, and how to reach it.
pub(super) struct Threads {
    pub(super) stage: Arc<SharedStage>,
    pub(super) pace: Arc<Pace>,
    pub(super) outbox: Outbox,
    pub(super) account: Arc<Account>,
    /// QEMU's stream, the way back.
    pub(super) return_path: UnixStream,
    pub(super) events: mpsc::Receiver<Happened>,
    /// The guest's memory once more, where it is to be verified.
    pub(super) verify: Option<ProcessMemory>,
}

/// Everything that can happen to a source.
#[derive(Debug)]
pub(super) enum Happened {
    /// The pump says something.
    Pump(PumpEvent),
    /// The sender is through.
    Sent(Result<Sent, SendError>),
    /// A message of the target.
    Peer(Result<Message, wire::DecodeError>),
    /// The session ended.
    SessionOver(Option<SessionError>),
    /// QEMU says something.
    Monitor(Event),
    /// QEMU's monitor ended: so did QEMU.
    QemuGone,
    /// The operator says something.
    Command(Command),
    /// Time to look.
    Tick,
}

/// A migration under way at its source.
pub(super) struct Control<'a> {
    job: &'a Job,
    journal: &'a Journal,
    guest: Guest,
    session: Session,
    store: Store,
    handover: Source,
    threads: Threads,
    pilot: Pilot,
    draft: &'a mut ReportDraft,
    clock: Clock,
    qemu_events: broadcast::Receiver<Event>,
    session_over: bool,
    bandwidth: Option<u64>,
    stop: Stop,
    cancelled: bool,
    outcome: Option<Outcome>,
}

/// When things were last done.
struct Clock {
    began: Instant,
    last_pass: Instant,
    last_progress: Instant,
    last_sign_of_life: Instant,
    acked_bytes: u64,
    stalled_since: Option<Instant>,
    warned_of_stall: bool,
}

impl Clock {
    /// Whether the guest has been ahead of the link for long enough to be worth a word, the first time.
    fn stall_is_news(&mut self) -> bool {
        let since = *self.stalled_since.get_or_insert_with(Instant::now);
        let is_news = !self.warned_of_stall && since.elapsed() >= STALL;
        self.warned_of_stall |= is_news;
        is_news
    }
}

/// The stop and what has to be complete before the token may leave.
#[derive(Default)]
struct Stop {
    is_wanted: bool,
    gate_opened: Option<Instant>,
    guest_did: Option<RunState>,
    stopped_unix_us: Option<u64>,
    stopped_at: Option<Instant>,
    sent_before: u64,
    /// What the link and QEMU's stream had carried when the guest stopped.
    carried_before: (u64, u64),
    /// QEMU's migration is: it won't run the guest by itself any more.
    is_completed: bool,
    sent: Option<Sent>,
    stream: Option<StreamSum>,
}

impl<'a> Control<'a> {
    #[expect(clippy::too_many_arguments, reason = "everything that was prepared comes together here, once")]
    pub(super) fn new(
        job: &'a Job,
        journal: &'a Journal,
        guest: Guest,
        session: Session,
        store: Store,
        handover: Source,
        threads: Threads,
        pages_total: u64,
        draft: &'a mut ReportDraft,
    ) -> Self {
        let now = Instant::now();
        let clock = Clock {
            began: now,
            last_pass: now,
            last_progress: now,
            last_sign_of_life: now,
            acked_bytes: 0,
            stalled_since: None,
            warned_of_stall: false,
        };
        Self {
            qemu_events: guest.monitor.events(),
            pilot: Pilot::new(&job.options, learned::load(job.learned.as_deref()), pages_total),
            job,
            journal,
            guest,
            session,
            store,
            handover,
            threads,
            draft,
            clock,
            session_over: false,
            bandwidth: job.options.bandwidth_bytes_per_second,
            stop: Stop::default(),
            cancelled: false,
            outcome: None,
        }
    }

    /// Carries the migration to its end.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Result<(), WorkerError> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        while self.outcome.is_none() {
            let happened = self.next(&mut commands, &mut ticks).await;
            let actions = self.apply(happened);
            if let Err(error) = self.carry_out_or_abort(actions).await {
                return self.break_off(error).await;
            }
        }
        self.end().await
    }

    /// Nothing goes any more: leaves the guest to run here if it still may, and otherwise says that only the target knows.
    async fn break_off(self, error: WorkerError) -> Result<(), WorkerError> {
        self.threads.pace.close();
        self.threads.stage.close();
        if self.handover.has_given_away() {
            self.draft.unsettled(one_line(&error));
            return Ok(());
        }
        self.guest.give_up().await?;
        self.guest.put_back().await?;
        Err(error)
    }

    async fn next(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        ticks: &mut tokio::time::Interval,
    ) -> Happened {
        loop {
            tokio::select! {
                Some(event) = self.threads.events.recv() => return event,
                message = self.session.recv(Lane::Urgent), if !self.session_over => return match message {
                    Ok(Some(message)) => Happened::Peer(wire::decode(message.kind, &message.payload)),
                    Ok(None) => Happened::SessionOver(None),
                    Err(error) => Happened::SessionOver(Some(error)),
                },
                event = self.qemu_events.recv() => match event {
                    Ok(event) => return Happened::Monitor(event),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Happened::QemuGone,
                },
                Some(command) = commands.recv() => return Happened::Command(command),
                _ = ticks.tick() => return Happened::Tick,
            }
        }
    }

    /// What follows from what happened.
    fn apply(&mut self, happened: Happened) -> Vec<Action> {
        if !matches!(happened, Happened::Tick) {
            self.clock.last_sign_of_life = Instant::now();
            tracing::debug!(?happened);
        }
        match happened {
            Happened::Pump(PumpEvent::MemoryNamed) => self.guest_stopped(None),
            Happened::Pump(PumpEvent::Ended(sum)) => {
                self.stop.stream = Some(sum);
                self.flushed()
            }
            Happened::Pump(PumpEvent::Failed(error)) => self.abort(one_line(&error)),
            Happened::Sent(Ok(sent)) => {
                self.stop.sent = Some(sent);
                self.flushed()
            }
            Happened::Sent(Err(error)) => self.abort(one_line(&error)),
            Happened::Peer(Ok(Message::Handover(message))) => {
                self.handover.apply(SourceEvent::PeerSays(message))
            }
            Happened::Peer(Ok(_)) => self.abort("the target sent a message that has no place here".into()),
            Happened::Peer(Err(error)) => self.abort(one_line(&error)),
            Happened::SessionOver(error) => {
                self.session_over = true;
                if let Some(error) = error {
                    self.journal.warn(one_line(&error));
                }
                self.handover.apply(SourceEvent::LinkLost)
            }
            Happened::Monitor(event) => self.qemu_says(&event),
            Happened::QemuGone => self.handover.apply(SourceEvent::QemuDied),
            Happened::Command(Command::Cancel) => {
                self.cancelled = true;
                self.abort("cancelled by the operator".into())
            }
            Happened::Command(Command::SetBandwidth { bytes_per_second }) => {
                self.bandwidth = bytes_per_second;
                self.session.set_bandwidth(bytes_per_second);
                vec![]
            }
            Happened::Tick => self.look(),
        }
    }

    fn abort(&mut self, reason: String) -> Vec<Action> {
        self.handover.apply(SourceEvent::Abort { reason })
    }

    fn qemu_says(&mut self, event: &Event) -> Vec<Action> {
        match event.name.as_str() {
            "MIGRATION" => match event.data.get("status").and_then(|status| status.as_str()) {
                Some("completed") => {
                    self.stop.is_completed = true;
                    self.flushed()
                }
                Some("failed") => self.abort("QEMU's migration failed; its log says why".into()),
                _ => vec![],
            },
            "STOP" if self.stop.gate_opened.is_some() => self.guest_stopped(Some(event.timestamp.unix_us())),
            // A guest that powers off in the middle of a migration ends as it would have without one.
            "SHUTDOWN" if self.stop.gate_opened.is_none() => self.abort("the guest shut down".into()),
            _ => vec![],
        }
    }

    /// The guest doesn't run any more; QEMU says so only of one that ran.
    fn guest_stopped(&mut self, stopped_unix_us: Option<u64>) -> Vec<Action> {
        let Some(run_state) = self.stop.guest_did else {
            return self.abort("QEMU stopped the guest before it was let".into());
        };
        // The stream may tell it before the event does; only the event has the time.
        self.stop.stopped_unix_us = self.stop.stopped_unix_us.or(stopped_unix_us);
        if self.stop.stopped_at.is_none() {
            self.stop.stopped_at = Some(Instant::now());
            let mut stage = self.threads.stage.lock();
            stage.mover.set_mode(Mode::Final);
            self.stop.sent_before = stage.mover.statistics().sent;
            self.stop.carried_before =
                (self.session.stats().acked_bytes, self.threads.account.stream_bytes());
        }
        self.threads.stage.wake();
        self.handover.apply(SourceEvent::Stopped { run_state })
    }

    /// Whether everything but the token is on its way.
    fn flushed(&mut self) -> Vec<Action> {
        let complete = self.stop.is_completed && self.stop.sent.is_some() && self.stop.stream.is_some();
        if complete { self.handover.apply(SourceEvent::StateFlushed) } else { vec![] }
    }

    fn look(&mut self) -> Vec<Action> {
        let link = self.observe_link();
        if link.acked_bytes != self.clock.acked_bytes {
            self.clock.acked_bytes = link.acked_bytes;
            self.clock.last_sign_of_life = Instant::now();
        }
        if self.clock.last_sign_of_life.elapsed() > PATIENCE {
            self.clock.last_sign_of_life = Instant::now();
            return self.handover.apply(SourceEvent::Timeout);
        }
        for (taken, encoded_bytes) in self.threads.account.news() {
            self.pilot.batch_left(taken, encoded_bytes);
        }
        let stage = StageObservation::of(&self.threads.stage.lock());
        let passes = self.threads.pace.passes();
        let now_ms = self.clock.began.elapsed().as_millis() as u64;
        let course = self.pilot.look(now_ms, passes, &stage, &link);
        self.threads.account.set_level(course.level);
        self.tell(&course.progress);
        if self.stop.gate_opened.is_some() {
            return vec![];
        }
        if self.clock.last_pass.elapsed() >= Duration::from_millis(course.pass_period_ms) {
            self.clock.last_pass = Instant::now();
            self.threads.pace.allow_pass();
        }
        self.heed(course.verdict, passes > 0 && stage.never_sent_blocks == 0)
    }

    /// Follows the policy. The hand-over is opened on both disks as soon as the stop may be near, so that the policy's
    /// word finds everything ready.
    fn heed(&mut self, verdict: Verdict, may_be_near: bool) -> Vec<Action> {
        match verdict {
            Verdict::Stop { .. } => self.stop.is_wanted = true,
            Verdict::Stalled { predicted_pause_ms } if self.clock.stall_is_news() => {
                self.journal.warn(format!(
                    "the guest writes faster than the link carries; stopping it now would take {predicted_pause_ms:.0} ms"
                ));
            }
            Verdict::Stalled { .. } => {}
            Verdict::Continue => self.clock.stalled_since = None,
        }
        if self.stop.is_wanted && self.handover.is_ready() {
            return self.handover.apply(SourceEvent::Decided);
        }
        if self.stop.is_wanted || may_be_near {
            self.handover.apply(SourceEvent::TargetReady)
        } else {
            vec![]
        }
    }

    fn observe_link(&self) -> LinkObservation {
        let stats = self.session.stats();
        LinkObservation {
            wire_bytes: stats.wire_bytes,
            acked_bytes: stats.acked_bytes,
            in_flight_bytes: stats.in_flight_bytes + self.threads.account.waiting_bytes(),
            limit_bytes_per_second: self.bandwidth,
            rate_bytes_per_second: stats.delivery_rate_bytes_per_second,
            efforts: self.threads.account.efforts(),
            round_trip_ms: stats.min_rtt.map(|time| time.as_secs_f64() * 1e3),
        }
    }

    fn tell(&mut self, progress: &job::Progress) {
        if self.stop.gate_opened.is_none() {
            self.draft.report.predicted_downtime_ms = progress.predicted_downtime_ms;
        }
        if self.clock.last_progress.elapsed() >= PROGRESS_PERIOD {
            self.clock.last_progress = Instant::now();
            self.journal.say(Happening::Progress(progress.clone()));
        }
    }
}

/// Acting.
impl Control<'_> {
    /// Carries out `actions`; where one fails, the migration is aborted as far as it still can be.
    async fn carry_out_or_abort(&mut self, actions: Vec<Action>) -> Result<(), WorkerError> {
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
        self.stop.guest_did = Some(run_state(self.guest.monitor.query_status().await?.state));
        self.stop.gate_opened = Some(Instant::now());
        self.answer(&return_path::Message::SwitchoverAck)?;
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

/// Ending.
impl Control<'_> {
    async fn end(mut self) -> Result<(), WorkerError> {
        self.fill_in();
        match self.outcome.take() {
            Some(Outcome::HandedOver { resumed_unix_us }) => self.handed_over(resumed_unix_us),
            Some(Outcome::Unsettled) => {
                self.draft
                    .unsettled(format!("the token left for {} and no answer came; ask there", self.job.peer));
            }
            Some(Outcome::TakenBack { reason } | Outcome::Died { reason } | Outcome::Refused { reason }) => {
                self.guest.put_back().await?;
                let outcome = if self.cancelled { job::Outcome::Cancelled } else { job::Outcome::Failed };
                self.draft.taken_back(outcome, reason);
            }
            Some(Outcome::Taken) | None => {}
        }
        self.threads.pace.close();
        self.threads.stage.close();
        // What the target still has to know is on its way; whether it arrives doesn't change how this ended.
        let _ = tokio::time::timeout(Duration::from_secs(2), self.session.close()).await;
        self.journal.say(Happening::Phase { phase: Phase::Done });
        Ok(())
    }

    fn fill_in(&mut self) {
        let stats = self.session.stats();
        let mover = StageObservation::of(&self.threads.stage.lock());
        self.draft.techniques(&self.threads.account.tally());
        let report = &mut self.draft.report;
        report.wire_bytes = stats.wire_bytes;
        report.round_trip_ms = stats.min_rtt.map(|time| time.as_secs_f64() * 1e3);
        report.device_state_bytes = self.threads.account.stream_bytes();
        report.passes = self.threads.pace.passes();
        report.versions_named = mover.named;
        report.versions_coalesced = mover.coalesced;
        if self.stop.stopped_at.is_some() {
            report.pages_in_pause = mover.sent - self.stop.sent_before;
        }
    }

    fn handed_over(&mut self, resumed_unix_us: Option<u64>) {
        self.draft.completed();
        let report = &mut self.draft.report;
        if let (Some(stopped), Some(resumed)) = (self.stop.stopped_unix_us, resumed_unix_us) {
            report.downtime_ms = Some((resumed as f64 - stopped as f64) / 1e3);
        }
        if let Some(stopped_at) = self.stop.stopped_at {
            let travel_ms = report.round_trip_ms.unwrap_or_default() / 2.0;
            report.pages_verified = self.threads.verify.as_ref().map(ProcessMemory::pages);
            report.downtime_source_ms = Some(stopped_at.elapsed().as_secs_f64() * 1e3 - travel_ms);
        }
        self.learn();
    }
    /// Keeps what this pause taught for the next migration to this peer.
    fn learn(&mut self) {
        let (Some(pause_ms), Some(opened), Some(stopped)) =
            (self.draft.report.downtime_ms, self.stop.gate_opened, self.stop.stopped_at)
        else {
            return;
        };
        let (acked_before, stream_before) = self.stop.carried_before;
        let device_state_bytes = self.threads.account.stream_bytes() - stream_before;
        let carried = self.session.stats().acked_bytes - acked_before;
        let learned = self.pilot.pause_was(&predict::Outcome {
            pause_ms,
            memory_bytes: carried.saturating_sub(device_state_bytes),
            device_state_bytes,
            decision_to_stop_ms: (stopped - opened).as_secs_f64() * 1e3,
        });
        learned::save(self.job.learned.as_deref(), &learned);
    }
}
