//! The loop of the source's worker: one place that awaits, one that decides, one that acts.

mod acting;
mod ending;
mod link_watch;
mod stalling;

use std::{os::unix::net::UnixStream, sync::Arc, time::Duration};

use godwit_migration::{
    handover::{Action, Outcome, RunState, Source, SourceEvent},
    mover::Mode,
    wire::{self, Message},
};
use godwit_qemu::{
    memory::ProcessMemory,
    qmp::{self, Event, MigrationState},
};
use godwit_transport::session::{Lane, Session, SessionError, Stats};
use serde::Deserialize;
use tokio::{
    sync::{broadcast, mpsc},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};

use self::link_watch::LinkWatch;
use super::{
    guest::Guest,
    learned,
    pilot::{self, Course, LinkObservation, Pilot, StageObservation},
    pump::{Pace, PumpEvent},
    run_state,
    sender::{Account, Outbox, SendError, Sent, StreamSum},
    stage::SharedStage,
    throttle::Brake,
};
use crate::{
    job::{self, Command, Happening, Job},
    output::one_line,
    token::Store,
    worker::{WorkerError, account::ReportDraft, journal::Journal},
};

/// How often the pilot looks.
const TICK: Duration = Duration::from_millis(10);
/// How often progress is told.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);
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
    /// Listens to what the target says of pages that guests share; ends with this.
    pub(super) _hearing: JoinSet<()>,
    /// The guest's memory once more, where it is to be verified.
    pub(super) verify: Option<ProcessMemory>,
}

/// What was prepared for the loop.
pub(super) struct Parts<'a> {
    pub(super) guest: Guest,
    pub(super) brake: Brake<'a>,
    pub(super) session: Session,
    pub(super) store: Store,
    pub(super) handover: Source,
    pub(super) threads: Threads,
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
    /// Some of QEMU's events were missed.
    Missed {
        /// What its migration is now.
        migration: MigrationState,
        /// What the guest does now.
        does: Option<qmp::RunState>,
    },
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
    brake: Brake<'a>,
    session: Session,
    store: Store,
    handover: Source,
    threads: Threads,
    pilot: Pilot,
    draft: &'a mut ReportDraft,
    clock: Clock,
    link_watch: LinkWatch,
    /// What the guest does, as far as QEMU tells before it stops it for us.
    guest_does: RunState,
    session_over: bool,
    target_is_gone: bool,
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
}

/// The stop and what has to be complete before the token may leave.
#[derive(Default)]
struct Stop {
    is_wanted: bool,
    /// QEMU went to the end of its stream before the gate was open: it doesn't wait for a guest that doesn't run.
    came_by_itself: bool,
    gate_opened: Option<Instant>,
    guest_did: Option<RunState>,
    stopped_unix_us: Option<u64>,
    stopped_at: Option<Instant>,
    sent_before: u64,
    /// What the link and QEMU's stream had carried when the guest stopped.
    carried_before: (u64, u64),
    /// All of QEMU's stream has come, as far as can be told.
    is_described: bool,
    /// QEMU wants SHUT, but not before that.
    owes_shut: bool,
    /// QEMU's migration is: it won't run the guest by itself any more.
    is_completed: bool,
    sent: Option<Sent>,
    stream: Option<StreamSum>,
}

impl<'a> Control<'a> {
    pub(super) fn new(
        job: &'a Job,
        journal: &'a Journal,
        parts: Parts<'a>,
        pages_total: u64,
        draft: &'a mut ReportDraft,
    ) -> Self {
        let Parts { guest, brake, session, store, handover, threads } = parts;
        let now = Instant::now();
        let clock =
            Clock { began: now, last_pass: now, last_progress: now, last_sign_of_life: now, acked_bytes: 0 };
        Self {
            guest_does: run_state(guest.run_state),
            pilot: Pilot::new(
                &job.options,
                learned::load(job.learned.as_deref()),
                pages_total,
                pilot::first_level(job),
            ),
            job,
            journal,
            guest,
            brake,
            session,
            store,
            handover,
            threads,
            draft,
            clock,
            link_watch: LinkWatch::new(now.into_std()),
            session_over: false,
            target_is_gone: false,
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
    async fn break_off(mut self, error: WorkerError) -> Result<(), WorkerError> {
        self.brake.release();
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
                event = self.guest.events.recv() => match event {
                    Ok(event) => return Happened::Monitor(event),
                    // A QEMU that spins tells of thousands of passes a second.
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        if let Ok(migration) = self.guest.monitor.query_migrate().await {
                            let does = self.guest.monitor.query_status().await.ok().map(|status| status.state);
                            return Happened::Missed { migration: migration.status, does };
                        }
                    }
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
            Happened::Pump(event) => self.stream_brought(event),
            Happened::Sent(Ok(sent)) => {
                self.stop.sent = Some(sent);
                self.flushed()
            }
            Happened::Sent(Err(error)) => self.abort(one_line(&error)),
            Happened::Peer(Ok(Message::Handover(message))) => {
                self.handover.apply(SourceEvent::PeerSays(message))
            }
            Happened::Peer(Ok(Message::Refuse(refuse))) => self.abort(refuse.reason),
            Happened::Peer(Ok(_)) => self.abort("the target sent a message that has no place here".into()),
            Happened::Peer(Err(error)) => self.abort(one_line(&error)),
            Happened::SessionOver(error) => self.link_lost(error),
            Happened::Monitor(event) => self.qemu_says(&event),
            Happened::Missed { migration, does } => {
                // Any other state is QEMU's own, of the switch-over.
                if let Some(does @ (qmp::RunState::Running | qmp::RunState::Paused)) = does {
                    self.guest_now(run_state(does));
                }
                self.migration_is(migration)
            }
            Happened::QemuGone => self.handover.apply(SourceEvent::QemuDied),
            Happened::Command(command) => self.obey(command),
            Happened::Tick => self.look(),
        }
    }

    fn stream_brought(&mut self, event: PumpEvent) -> Vec<Action> {
        match event {
            PumpEvent::MemoryNamed => self.guest_stopped(None),
            PumpEvent::Described => {
                self.stop.is_described = true;
                if self.stop.owes_shut { vec![Action::AnswerShut] } else { vec![] }
            }
            PumpEvent::Ended { sum, guest_did } => {
                self.stop.stream = Some(sum);
                let mut actions = guest_did.map_or_else(Vec::new, |did| self.guest_had_been(run_state(did)));
                actions.extend(self.flushed());
                actions
            }
            PumpEvent::Failed(error) => self.abort(one_line(&error)),
        }
    }

    fn link_lost(&mut self, error: Option<SessionError>) -> Vec<Action> {
        self.session_over = true;
        if let Some(error) = error {
            self.journal.warn(one_line(&error));
        }
        self.handover.apply(SourceEvent::LinkLost)
    }

    fn obey(&mut self, command: Command) -> Vec<Action> {
        match command {
            Command::Cancel => {
                self.cancelled = true;
                self.abort("cancelled by the operator".into())
            }
            Command::PeerSays { message } => {
                // Its agent speaks for it, so its worker doesn't.
                self.target_is_gone = true;
                self.handover.apply(SourceEvent::PeerSays(message))
            }
            Command::SetBandwidth { bytes_per_second } => {
                self.bandwidth = bytes_per_second;
                self.session.set_bandwidth(bytes_per_second);
                vec![]
            }
            Command::SetOnStall { on_stall } => {
                self.choose(on_stall);
                vec![]
            }
        }
    }

    fn abort(&mut self, reason: String) -> Vec<Action> {
        self.handover.apply(SourceEvent::Abort { reason })
    }

    fn qemu_says(&mut self, event: &Event) -> Vec<Action> {
        match event.name.as_str() {
            "MIGRATION" => event
                .data
                .get("status")
                .and_then(|status| MigrationState::deserialize(status).ok())
                .map_or_else(Vec::new, |state| self.migration_is(state)),
            "STOP" if self.stop.gate_opened.is_some() => self.guest_stopped(Some(event.timestamp.unix_us())),
            // QEMU's own stop, as far as one knows; the stream says later what the guest had been doing.
            "STOP" if !self.guest.is_gated => {
                self.stop.stopped_unix_us = Some(event.timestamp.unix_us());
                vec![]
            }
            // QEMU says why before it says STOP.
            "STOP" if self.guest_does == RunState::Running => self.guest_now(RunState::Paused),
            "GUEST_PANICKED" => self.guest_now(RunState::Panicked),
            "BLOCK_IO_ERROR" if event.data.get("action").is_some_and(|action| action == "stop") => {
                self.guest_now(RunState::IoError)
            }
            "SUSPEND" => self.guest_now(RunState::Suspended),
            "RESUME" | "WAKEUP" if self.guest.loses_writes && self.stop.gate_opened.is_none() => {
                self.abort("the machine was let go on, and its QEMU would lose what it writes".into())
            }
            "RESUME" | "WAKEUP" => self.guest_now(RunState::Running),
            // A guest that powers off in the middle of a migration ends as it would have without one.
            "SHUTDOWN" if self.stop.gate_opened.is_none() => self.abort("the guest shut down".into()),
            _ => vec![],
        }
    }

    fn guest_now(&mut self, does: RunState) -> Vec<Action> {
        if self.stop.gate_opened.is_none() {
            self.guest_does = does;
        }
        vec![]
    }

    fn migration_is(&mut self, state: MigrationState) -> Vec<Action> {
        match state {
            MigrationState::Completed => {
                self.stop.is_completed = true;
                self.flushed()
            }
            MigrationState::Failed => self.abort("QEMU's migration failed; its log says why".into()),
            _ => vec![],
        }
    }

    /// The guest doesn't run any more; QEMU says so only of one that ran.
    fn guest_stopped(&mut self, stopped_unix_us: Option<u64>) -> Vec<Action> {
        let Some(run_state) = self.stop.guest_did else {
            self.stop.came_by_itself = true;
            self.stop.is_wanted = true;
            return vec![];
        };
        // The stream may tell it before the event does; only the event has the time.
        self.stop.stopped_unix_us = self.stop.stopped_unix_us.or(stopped_unix_us);
        if self.stop.stopped_at.is_none() {
            self.stop.stopped_at = Some(Instant::now());
            self.brake.guest_stopped();
            let mut stage = self.threads.stage.lock();
            stage.mover.set_mode(Mode::Final);
            self.stop.sent_before = stage.mover.statistics().sent;
            self.stop.carried_before =
                (self.session.stats().acked_bytes, self.threads.account.stream_bytes());
        }
        self.threads.stage.wake();
        self.handover.apply(SourceEvent::Stopped { run_state })
    }

    /// QEMU's own word on what the guest did: its operator's may have come between our question and the stop.
    fn guest_had_been(&mut self, run_state: RunState) -> Vec<Action> {
        self.guest_does = run_state;
        if self.stop.guest_did.is_none() {
            return vec![];
        }
        self.stop.guest_did = Some(run_state);
        self.handover.apply(SourceEvent::Stopped { run_state })
    }

    /// Whether everything but the token is on its way.
    fn flushed(&mut self) -> Vec<Action> {
        let complete = self.stop.is_completed && self.stop.sent.is_some() && self.stop.stream.is_some();
        if complete { self.handover.apply(SourceEvent::StateFlushed) } else { vec![] }
    }

    fn look(&mut self) -> Vec<Action> {
        let (now, stats) = (std::time::Instant::now(), self.session.stats());
        if let Some(news) = self.link_watch.observe(&self.job.peer, &stats, now) {
            self.journal.warn(news);
        }
        if self.stop.gate_opened.is_none()
            && self.link_watch.stalled(now) > self.job.options.reconnect_timeout()
        {
            return self.abort(format!("{} takes nothing any more", self.job.peer));
        }
        let is_there = self.link_watch.silent_ms(now).is_none();
        if self.stop.gate_opened.is_none() && !is_there {
            self.clock.last_sign_of_life = Instant::now();
        }
        let link = self.observe_link(&stats, is_there);
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
        let mut course = self.pilot.look(now_ms, passes, &stage, &link);
        course.progress.link_silent_ms = self.link_watch.silent_ms(now);
        course.progress.guest_share_percent = self.brake.percent();
        self.threads.account.set_level(course.level);
        self.tell(&course.progress);
        if self.stop.gate_opened.is_some() {
            let told = !self.stop.came_by_itself || self.stop.stopped_at.is_some();
            return if told { vec![] } else { self.guest_stopped(None) };
        }
        if self.clock.last_pass.elapsed() >= Duration::from_millis(course.pass_period_ms) {
            self.clock.last_pass = Instant::now();
            self.threads.pace.allow_pass();
        }
        self.heed(&course, is_there, passes > 0 && stage.never_sent_blocks == 0)
    }

    /// Follows the course. The hand-over is opened on both disks as soon as the stop may be near, so that the policy's
    /// word finds everything ready.
    fn heed(&mut self, course: &Course, is_there: bool, may_be_near: bool) -> Vec<Action> {
        if let Some(prices) = &course.prices {
            self.tell_prices(prices);
        }
        let given_up = self.follow(course.ruling);
        if !given_up.is_empty() {
            return given_up;
        }
        if !is_there {
            // What the policy said was of a link that carries.
            self.stop.is_wanted = self.stop.came_by_itself;
            return vec![];
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

    fn observe_link(&self, stats: &Stats, is_there: bool) -> LinkObservation {
        LinkObservation {
            is_there,
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
