//! The worker at the host that has the machine.
//!
//! ```text
//!   prepare ─► greet ─► open QEMU's stream ─► pre-copy ─► stop ─► hand over ─► settled
//!      │          │             │                 │          │          │
//!      └──────────┴─────────────┴── any failure ──┴──────────┘          └── from here on only the target's answer
//!                     the guest goes on here, as it was                     decides; see `migration::handover`
//! ```
//!
//! One task awaits everything that can happen (`Control::next`) and applies it (`Control::apply`); the pump and the
//! sender are threads of their own.

mod contents;
mod control;
mod guest;
mod learned;
mod pilot;
mod pump;
mod room;
mod sender;
mod sharing;
mod stage;
mod throttle;

pub(crate) use self::guest::{GATE, GuestError, look};
use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use godwit_content::{BLOCK_BYTES, BlockId, Encoder, EncoderLimits, Held, open_bytes};
use godwit_migration::{
    handover::{Epoch, RunState, Source, SourceSettings},
    wire::{self, Hello, Message, RamBlock, TransferOptions, Welcome},
};
use godwit_qemu::{memory::ProcessMemory, qmp};
use godwit_transport::{
    identity::HostIdentity,
    route::Route,
    session::{ConnectConfig, Lane, Limits, Session, Timeouts},
};
use tokio::{sync::mpsc, task::JoinSet};

use self::{
    contents::{Contents, Direct, INLINE_PAGES_MAX, Inline, UNGATED_PAGES_MAX},
    control::{Control, Happened, Parts, Threads},
    guest::Guest,
    pump::{Pace, PageNumbers, Pump},
    sender::{Account, Link, LinkClosed, Outbox, StreamCourier},
    sharing::{Answers, Sharing},
    stage::SharedStage,
    throttle::Brake,
};
use super::{
    MONITOR_TIMEOUT, STREAM_PIECE_BYTES_MAX, WorkerError, account::ReportDraft, journal::Journal,
    memory_map::MemoryMap, start_thread,
};
use crate::{
    job::{Command, Happening, Job, Phase, Report, Verify},
    token::Store,
};

/// How long the target may take to say welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a page is left alone after QEMU named it where QEMU emulates the processor; see `stage::Embargo`. Several
/// time slices of a busy host.
const TCG_EMBARGO: Duration = Duration::from_millis(10);
/// What the operator of a QEMU without `switchover-ack` is told.
const UNGATED: &str = "this QEMU (before 8.1) decides by itself when the guest stops; its pages are taken from its stream, \
                       which is held back to what the link carries";
/// What the pump and the sender say in all: a handful of things.
const THREAD_EVENTS: usize = 8;

/// Carries the migration at the source; whatever happens, the report says it.
pub(super) async fn run(job: Job, journal: &Journal, commands: mpsc::Receiver<Command>) -> Report {
    let mut draft = ReportDraft::new(&job);
    match migrate(&job, journal, commands, &mut draft).await {
        Ok(()) => draft.finish(),
        Err(error) => draft.fail(&error),
    }
}

async fn migrate(
    job: &Job,
    journal: &Journal,
    commands: mpsc::Receiver<Command>,
    draft: &mut ReportDraft,
) -> Result<(), WorkerError> {
    journal.say(Happening::Phase { phase: Phase::Preparing });
    // Round trips to QEMU's monitor while those to the target are under way.
    let (Looked { guest, map, memory }, session) =
        tokio::try_join!(look_at_guest(job, journal), connect(job))?;
    let welcome = greet(&session, &hello(job, &guest, &map).await?).await?;
    let held = receive_held(&session, welcome.held_pages, map.page_count()).await?;
    if welcome.held_pages > 0 {
        journal.warn(format!(
            "{} kept what arrived of an earlier migration; only what changed is sent",
            job.peer
        ));
    }

    let brake = Brake::new(job, &guest.monitor.query_cpus_fast().await?);
    let store = Store::open(&job.machine_dir);
    let settings =
        SourceSettings { leave_paused: job.options.leave_paused, ..SourceSettings::new(&job.peer) };
    let handover = Source::new(Epoch(job.epoch), settings);

    let place = job.shared_place().zip(welcome.shared_pages.as_deref());
    let sharing = place.and_then(|(place, name)| Sharing::open(place, &job.id, name));
    let known = Known { held, sharing };
    let threads = start_threads(job, &guest, &map, memory, known, &session).await;
    let threads = match threads {
        Ok(threads) => threads,
        Err(error) => {
            guest.give_up().await?;
            guest.put_back().await?;
            return Err(error);
        }
    };
    journal.say(Happening::Phase { phase: Phase::PreCopy });
    let parts = Parts { guest, brake, session, store, handover, threads };
    Control::new(job, journal, parts, map.page_count(), draft).run(commands).await
}

/// The machine, before anything is changed.
struct Looked {
    guest: Guest,
    map: MemoryMap,
    /// `None`: its pages are taken from QEMU's stream.
    memory: Option<ProcessMemory>,
}

async fn look_at_guest(job: &Job, journal: &Journal) -> Result<Looked, WorkerError> {
    let monitor = qmp::Client::connect(&job.qmp, MONITOR_TIMEOUT).await?;
    let guest = Guest::inspect(monitor, &job.machine_dir).await?;
    let map = MemoryMap::of(&guest.monitor).await?;
    let memory = if guest.is_gated { readable_memory(job, &map, journal)? } else { None };
    if !guest.is_gated {
        journal.warn(UNGATED.to_owned());
    }
    if memory.is_none() && job.options.verify == Verify::Full {
        return Err(WorkerError::CannotVerify);
    }
    Ok(Looked { guest, map, memory })
}

/// The guest's memory, if it may be read; otherwise its pages are taken from QEMU's stream.
fn readable_memory(
    job: &Job,
    map: &MemoryMap,
    journal: &Journal,
) -> Result<Option<ProcessMemory>, WorkerError> {
    if job.options.inline {
        return Ok(None);
    }
    let memory = ProcessMemory::open(job.pid.unsigned_abs(), &map.ranges()?)?;
    match memory.probe() {
        Ok(()) => Ok(Some(memory)),
        Err(error) => {
            journal.warn(format!("{error}; the guest's pages are taken from QEMU's stream instead"));
            Ok(None)
        }
    }
}

async fn connect(job: &Job) -> Result<Session, WorkerError> {
    let identity = HostIdentity::open(&job.identity_dir, std::time::SystemTime::now())?;
    let config = ConnectConfig {
        address: job.peer_address.ok_or(WorkerError::NoAddress)?,
        route: Route::Migration(job.id.clone()),
        peer: job.peer.parse()?,
        identity: Arc::new(identity),
        bulk_connections: job.options.connections,
        limits: Limits {
            bandwidth_bytes_per_second: job.options.bandwidth_bytes_per_second,
            ..Limits::default()
        },
        timeouts: Timeouts { reconnect: job.options.reconnect_timeout(), ..Timeouts::default() },
    };
    Ok(Session::connect(config).await?)
}

async fn hello(job: &Job, guest: &Guest, map: &MemoryMap) -> Result<Message, WorkerError> {
    let block = |(name, bytes): (&str, u64)| RamBlock { name: name.to_owned(), bytes, direct: true };
    Ok(Message::Hello(Box::new(Hello {
        version_min: wire::VERSION_MIN,
        version_max: wire::VERSION_MAX,
        migration_id: job.id.clone(),
        machine: job.spec.name.clone(),
        epoch: Epoch(job.epoch),
        ram_blocks: map.sizes().map(block).collect(),
        options: TransferOptions {
            leave_paused: job.options.leave_paused,
            early_announce: job.options.early_announce,
        },
        qemu_version: guest.monitor.query_version().await?.to_string(),
        machine_type: guest.monitor.machine_type().await?,
    })))
}

/// Says hello; returns when the target has said welcome.
async fn greet(session: &Session, hello: &Message) -> Result<Welcome, WorkerError> {
    let (kind, body) = wire::encode(hello)?;
    session.send(Lane::Urgent, kind, body).await?;
    let answer = tokio::time::timeout(WELCOME_TIMEOUT, session.recv(Lane::Urgent)).await;
    let answer = answer.map_err(|_| WorkerError::NoWelcome)??.ok_or(WorkerError::NoWelcome)?;
    match wire::decode(answer.kind, &answer.payload)? {
        Message::Welcome(welcome) => Ok(welcome),
        Message::Refuse(refuse) => Err(WorkerError::Refused(refuse.reason)),
        _ => Err(WorkerError::NoWelcome),
    }
}

/// Takes the digests of what the target kept of an earlier migration.
async fn receive_held(session: &Session, pages: u64, pages_max: u64) -> Result<Held, WorkerError> {
    if pages > pages_max {
        return Err(WorkerError::Held);
    }
    let mut digests = Vec::new();
    while (digests.len() as u64) < pages {
        let frame = tokio::time::timeout(WELCOME_TIMEOUT, session.recv(Lane::Bulk)).await;
        let frame = frame.map_err(|_| WorkerError::NoWelcome)??.ok_or(WorkerError::NoWelcome)?;
        let bytes = open_bytes(&frame.payload, STREAM_PIECE_BYTES_MAX).map_err(|_| WorkerError::Held)?;
        let (words, rest) = bytes.as_chunks();
        if frame.kind != wire::HELD || words.is_empty() || !rest.is_empty() {
            return Err(WorkerError::Held);
        }
        let (blocks, rest) = words.as_chunks();
        if !rest.is_empty() {
            return Err(WorkerError::Held);
        }
        digests.extend(blocks.iter().map(|block| block.map(u64::from_le_bytes)));
    }
    if digests.len() as u64 == pages { Ok(Held::new(digests)) } else { Err(WorkerError::Held) }
}

/// What the target has before anything is sent.
struct Known {
    /// Of this guest.
    held: Held,
    /// Of all guests from this host, if both hosts share pages.
    sharing: Option<(Sharing, Answers)>,
}

/// Opens QEMU's stream and starts the pump and the sender.
async fn start_threads(
    job: &Job,
    guest: &Guest,
    map: &MemoryMap,
    memory: Option<ProcessMemory>,
    known: Known,
    session: &Session,
) -> Result<Threads, WorkerError> {
    let verify = match job.options.verify {
        Verify::Full => Some(ProcessMemory::open(job.pid.unsigned_abs(), &map.ranges()?)?),
        Verify::Digest => None,
    };
    let pages = map.page_count();
    let turn = job.shared.as_ref().filter(|_| known.sharing.is_some()).map_or(0, |place| place.turn);
    let first_page = BlockId(sharing::first_page(turn, pages));
    let (contents, embargo) = contents_of(guest, memory).await?;
    let stage = Arc::new(SharedStage::new(pages, first_page, contents, embargo));
    let stream = guest.open_stream().await?;
    let return_path = stream.try_clone().map_err(WorkerError::ReturnPath)?;

    let account = Arc::new(Account::default());
    let level = pilot::first_level(job).level();
    account.set_level(level);
    let compressors = thread::available_parallelism().map_or(1, usize::from).min(4);
    let outbox = Outbox::start(SessionLink(session.clone()), wire::BATCH, compressors, account.clone());
    let pace = Arc::new(Pace::default());
    let pump = Pump {
        stream,
        pages: PageNumbers::new(map.first_pages()),
        stage: stage.clone(),
        pace: pace.clone(),
        courier: StreamCourier::new(outbox.clone()),
        heat_since: Instant::now(),
    };
    let (tell, events) = mpsc::channel(THREAD_EVENTS);
    let told = tell.clone();
    start_thread("pump", move || pump.run(|event| drop(told.blocking_send(Happened::Pump(event)))));

    let mut encoder = encoder(job, pages, level, known.held);
    let (mut sharing, answers) = known.sharing.unzip();
    let mut hearing = JoinSet::new();
    answers.map(|answers| hearing.spawn(answers.hear(session.clone())));
    let (sending, sent_through) = (stage.clone(), outbox.clone());
    start_thread("draft", move || {
        let sent = sender::send_all(&sending, &mut encoder, sharing.as_mut(), &sent_through);
        drop(tell.blocking_send(Happened::Sent(sent)));
    });
    Ok(Threads { stage, pace, outbox, account, return_path, events, _hearing: hearing, verify })
}

/// Where the contents of pages come from, and how long a page is left alone after it was named.
async fn contents_of(
    guest: &Guest,
    memory: Option<ProcessMemory>,
) -> Result<(Box<dyn Contents>, Duration), WorkerError> {
    let is_emulated = !guest.monitor.query_kvm().await?;
    Ok(match memory {
        Some(memory) if is_emulated => (Box::new(Direct::new(memory)), TCG_EMBARGO),
        Some(memory) => (Box::new(Direct::new(memory)), Duration::ZERO),
        None => (Box::new(Inline::new(inline_pages_max(guest))), Duration::ZERO),
    })
}

fn encoder(job: &Job, pages: u64, level: i32, held: Held) -> Encoder {
    let limit = job.options.base_limit_bytes.unwrap_or(pages * BLOCK_BYTES as u64 / 4);
    let limits = EncoderLimits { base_bytes: usize::try_from(limit).unwrap_or(usize::MAX), level };
    let mut encoder = Encoder::new(limits);
    encoder.set_techniques(job.options.techniques());
    encoder.assume_held(held);
    encoder
}

/// What the inline stage may hold: where QEMU stops the guest by itself, all of it is part of the pause.
fn inline_pages_max(guest: &Guest) -> usize {
    if guest.is_gated { INLINE_PAGES_MAX } else { UNGATED_PAGES_MAX }
}

/// The bulk lane of a session.
struct SessionLink(Session);

impl Link for SessionLink {
    fn send(&mut self, kind: u8, payload: bytes::Bytes) -> Result<(), LinkClosed> {
        self.0.blocking_send(Lane::Bulk, kind, payload).map_err(|_| LinkClosed)
    }
}

/// QEMU's words for what a guest does, in the hand-over's.
fn run_state(state: qmp::RunState) -> RunState {
    match state {
        qmp::RunState::Running => RunState::Running,
        qmp::RunState::Suspended => RunState::Suspended,
        qmp::RunState::IoError => RunState::IoError,
        qmp::RunState::GuestPanicked => RunState::Panicked,
        _ => RunState::Paused,
    }
}
