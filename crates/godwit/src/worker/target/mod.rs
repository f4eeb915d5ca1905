//! The worker at the host that is to get the machine.
//!
//! ```text
//!   prepare QEMU ─► Ready ─► greet ─► take what comes ─► token: verify ─► load ─► run ─► settled
//!        │                     │             │                 │            │      │
//!        └─────────────────────┴── failure ──┴─────────────────┴────────────┘      └── the machine is here
//!               QEMU is killed, the hand-over refused; the guest goes on at the source
//! ```

mod control;
mod door;
mod intake;
mod partial;
mod proof;
mod slots;

pub(crate) use self::proof::ProofError;

use std::{
    collections::BTreeMap,
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, mpsc as std_mpsc},
    time::Duration,
};

use godwit_content::{Compressor, HeldDigests, seal_bytes};
use godwit_migration::{
    handover::Target,
    wire::{self, Hello, Message, Refuse, Welcome},
};
use godwit_qemu::{memory::ProcessMemory, qmp, return_path};
use godwit_transport::{
    identity::HostIdentity,
    session::{AcceptConfig, Lane, Limits, Session, Timeouts},
};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_128;

use self::{
    control::{Control, Happened, Order},
    intake::{Arrived, Intake, IntakeError},
    proof::prove_addresses,
    slots::Slots,
};
use super::{
    MONITOR_TIMEOUT, STREAM_PIECE_BYTES_MAX, WorkerError, account::ReportDraft, journal::Journal,
    memory_map::MemoryMap, start_thread,
};
use crate::{
    borrowed,
    job::{Command, Happening, Job, Phase, Report},
    output::one_line,
    token::Store,
};

/// How long the source may take to connect and to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);
/// What the destination needs; those that this QEMU doesn't know are left out.
const CAPABILITIES: [&str; 4] = ["events", "return-path", "switchover-ack", "late-block-activate"];
/// Digests hardly compress; long runs of unknown pages do.
const HELD_LEVEL: i32 = 1;
/// What the threads say in all before they are listened to.
const THREAD_EVENTS: usize = 8;

/// Carries the migration at the target; whatever happens, the report says it.
pub(super) async fn run(
    job: Job,
    directory: &Path,
    journal: &Journal,
    commands: mpsc::Receiver<Command>,
) -> Report {
    let mut draft = ReportDraft::new(&job);
    match receive(&job, directory, journal, commands, &mut draft).await {
        Ok(()) => draft.finish(),
        Err(error) => draft.fail(&error),
    }
}

async fn receive(
    job: &Job,
    directory: &Path,
    journal: &Journal,
    mut commands: mpsc::Receiver<Command>,
    draft: &mut ReportDraft,
) -> Result<(), WorkerError> {
    journal.say(Happening::Phase { phase: Phase::Preparing });
    let door = directory.join(crate::job::ACCEPT_SOCKET);
    let streams = door::open(&door).map_err(|source| WorkerError::Socket { what: "accept.sock", source })?;
    let monitor = qmp::Client::connect(&job.qmp, MONITOR_TIMEOUT).await?;
    let settings = monitor.migration_settings().await?;
    borrowed::note(&job.machine_dir, &settings)
        .map_err(|source| WorkerError::Socket { what: "the note of what QEMU had set", source })?;
    let stream = open_stream(&monitor, &super::stream_socket(&job.machine_dir)).await?;
    let map = MemoryMap::of(&monitor).await?;
    let ranges = map.ranges()?;
    let memory = ProcessMemory::open(job.pid.unsigned_abs(), &ranges)?;
    memory.probe()?;
    prove_addresses(&monitor, job.pid.unsigned_abs(), &ranges, word_of(&job.id)).await?;
    let memory = Arc::new(memory);
    let held = restore_partial(job, &map, &memory, journal).await;
    journal.say(Happening::Ready);

    let slots = job.shared_place().and_then(|place| Slots::open(place, &job.id));
    let welcome = Welcome {
        version: wire::VERSION_MAX,
        qemu_version: monitor.query_version().await?.to_string(),
        held_pages: held.len() as u64,
        shared_pages: slots.as_ref().and_then(Slots::name),
    };
    let (session, hello) = tokio::select! {
        met = meet(job, streams, &map, welcome) => met?,
        // It won't come; nobody need wait for it.
        () = cancelled(&mut commands) => return Err(WorkerError::Withdrawn),
    };
    send_held(&session, &held).await?;
    let store = Store::open(&job.machine_dir);
    let handover = Target::new(store.load()?, &job.peer);
    let (tell, events) = mpsc::channel(THREAD_EVENTS);
    let orders = start_intake(
        &session,
        Intake::new(memory.clone(), stream.try_clone().map_err(WorkerError::ReturnPath)?, slots),
        &tell,
    );
    listen_to_qemu(stream, tell.clone());
    journal.say(Happening::Phase { phase: Phase::PreCopy });
    let keep = Arc::new(Keep { map, memory });
    let parts = control::Parts { monitor, session, store, handover, orders, tell, events, keep };
    Control::new(job, journal, parts, hello.options, draft).run(commands).await
}

/// What is needed to keep the memory of a QEMU that is about to be ended.
struct Keep {
    map: MemoryMap,
    memory: Arc<ProcessMemory>,
}

impl Keep {
    /// Keeps it, if it may be kept; a failure costs only the next migration's time.
    async fn keep(self: Arc<Self>, job: &Job, journal: &Journal) {
        let Some(place) = job.partial.clone().filter(|_| job.options.keep_partial) else { return };
        let peer = job.peer.clone();
        let kept = tokio::task::spawn_blocking(move || {
            partial::keep(&place.file, place.limit_bytes, &peer, &self.map, &self.memory)
        });
        match kept.await {
            Ok(Ok(())) => tracing::info!("what arrived is kept for the next try"),
            Ok(Err(error)) => journal.warn(format!("what arrived isn't kept: {}", one_line(&error))),
            Err(error) => tracing::warn!(%error, "keeping what arrived"),
        }
    }
}

/// Fills the memory with what was kept of an earlier migration, and says what that is.
async fn restore_partial(
    job: &Job,
    map: &MemoryMap,
    memory: &Arc<ProcessMemory>,
    journal: &Journal,
) -> Vec<HeldDigests> {
    let Some(place) = job.partial.clone() else { return Vec::new() };
    let (peer, map, memory) = (job.peer.clone(), map.clone(), memory.clone());
    let restored =
        tokio::task::spawn_blocking(move || partial::restore(&place.file, &peer, &map, &memory)).await;
    match restored {
        Ok(Ok(held)) => held.unwrap_or_default(),
        Ok(Err(error)) => {
            journal.warn(format!("what was kept isn't used: {}", one_line(&error)));
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

/// Tells the source what is here already.
async fn send_held(session: &Session, held: &[HeldDigests]) -> Result<(), WorkerError> {
    let mut compressor = Compressor::new();
    for piece in held.chunks(STREAM_PIECE_BYTES_MAX / size_of::<HeldDigests>()) {
        let bytes: Vec<u8> = piece.as_flattened().iter().flat_map(|digest| digest.to_le_bytes()).collect();
        let sealed = seal_bytes(&mut compressor, HELD_LEVEL, &bytes);
        session.send(Lane::Bulk, wire::HELD, sealed.into()).await?;
    }
    Ok(())
}

/// Sixteen bytes that the paused machine's memory surely doesn't hold yet.
fn word_of(id: &str) -> [u8; 16] {
    xxh3_128(id.as_bytes()).to_le_bytes()
}

/// Makes QEMU listen for its stream and connects to it.
async fn open_stream(monitor: &qmp::Client, path: &Path) -> Result<UnixStream, WorkerError> {
    let known = monitor.migrate_capabilities().await?;
    let wanted = CAPABILITIES.iter().filter(|name| known.contains_key(**name));
    let wanted: BTreeMap<_, _> = wanted.map(|name| ((*name).to_owned(), true)).collect();
    monitor.set_migrate_capabilities(&wanted).await?;
    monitor.migrate_incoming(&format!("unix:{}", path.display())).await?;
    let stream = UnixStream::connect(path);
    // Nobody else needs to find it.
    let _ = std::fs::remove_file(path);
    stream.map_err(|source| WorkerError::Socket { what: "the stream of the incoming QEMU", source })
}

/// Waits for the source and its hello.
async fn meet(
    job: &Job,
    streams: mpsc::Receiver<tokio::net::TcpStream>,
    map: &MemoryMap,
    welcome: Welcome,
) -> Result<(Session, Hello), WorkerError> {
    let session = accept(job, streams).await?;
    let hello = greet(&session, job, map, welcome).await?;
    Ok((session, hello))
}

/// Returns when the migration is cancelled before its source has come.
async fn cancelled(commands: &mut mpsc::Receiver<Command>) {
    loop {
        match commands.recv().await {
            Some(Command::Cancel) => return,
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

async fn accept(job: &Job, streams: mpsc::Receiver<tokio::net::TcpStream>) -> Result<Session, WorkerError> {
    let identity = HostIdentity::open(&job.identity_dir, std::time::SystemTime::now())?;
    let config = AcceptConfig {
        peer: job.peer.parse()?,
        identity: Arc::new(identity),
        limits: Limits::default(),
        timeouts: Timeouts {
            connect: HELLO_TIMEOUT,
            reconnect: job.options.reconnect_timeout(),
            ..Timeouts::default()
        },
    };
    Ok(Session::accept(config, streams).await?)
}

/// Takes the source's hello and says welcome, or why not.
async fn greet(
    session: &Session,
    job: &Job,
    map: &MemoryMap,
    welcome: Welcome,
) -> Result<Hello, WorkerError> {
    let message = tokio::time::timeout(HELLO_TIMEOUT, session.recv(Lane::Urgent)).await;
    let message = message.map_err(|_| WorkerError::NoWelcome)??.ok_or(WorkerError::NoWelcome)?;
    let Message::Hello(hello) = wire::decode(message.kind, &message.payload)? else {
        return Err(WorkerError::NoWelcome);
    };
    let answer = match judge(&hello, job, map) {
        Ok(version) => Message::Welcome(Welcome { version, ..welcome }),
        Err(reason) => Message::Refuse(Refuse { reason }),
    };
    let (kind, body) = wire::encode(&answer)?;
    session.send(Lane::Urgent, kind, body).await?;
    match answer {
        Message::Refuse(refuse) => {
            session.flush().await?;
            Err(WorkerError::Refused(refuse.reason))
        }
        _ => Ok(*hello),
    }
}

/// The protocol's version, or one line about what doesn't fit.
fn judge(hello: &Hello, job: &Job, map: &MemoryMap) -> Result<u16, String> {
    let version = wire::negotiate(hello).ok_or_else(|| {
        let (ours, theirs) = ((wire::VERSION_MIN, wire::VERSION_MAX), (hello.version_min, hello.version_max));
        format!(
            "the source speaks versions {} to {} of the protocol, this host {} to {}",
            theirs.0, theirs.1, ours.0, ours.1
        )
    })?;
    if hello.migration_id != job.id || hello.machine != job.spec.name {
        return Err(format!("this worker waits for {}, not for {}", job.spec.name, hello.machine));
    }
    let theirs: Vec<_> = hello.ram_blocks.iter().map(|block| (block.name.as_str(), block.bytes)).collect();
    let ours: Vec<_> = map.sizes().collect();
    if theirs == ours {
        return Ok(version);
    }
    Err(format!("the machine's RAM is {} there but {} here", list(&theirs), list(&ours)))
}

fn list(blocks: &[(&str, u64)]) -> String {
    let texts: Vec<_> = blocks.iter().map(|(name, bytes)| format!("{name} {} MiB", bytes >> 20)).collect();
    texts.join(" + ")
}

/// Starts the thread that takes the bulk lane; the sender gives it orders once the token has come.
fn start_intake(
    session: &Session,
    mut intake: Intake,
    tell: &mpsc::Sender<Happened>,
) -> std_mpsc::Sender<Order> {
    let (orders, ordered) = std_mpsc::channel();
    let (session, tell) = (session.clone(), tell.clone());
    start_thread("intake", move || {
        let ended = take_all(&session, &mut intake, &tell).and_then(|()| obey(&ordered, &mut intake, &tell));
        if let Err(error) = ended {
            drop(tell.blocking_send(Happened::IntakeFailed(error)));
        }
    });
    orders
}

/// Takes frames up to the token.
fn take_all(
    session: &Session,
    intake: &mut Intake,
    tell: &mpsc::Sender<Happened>,
) -> Result<(), IntakeError> {
    // The end of the session is told by its urgent lane.
    while let Ok(Some(message)) = session.blocking_recv(Lane::Bulk) {
        let arrived = intake.take(message.kind, &message.payload)?;
        if let Some(Arrived::Kept(kept)) = &arrived {
            // So is that of a session that takes no answer any more.
            let body = kept.to_bytes().to_vec();
            drop(session.blocking_send(Lane::Bulk, wire::KEPT, body.into()));
            continue;
        }
        let is_token = matches!(arrived, Some(Arrived::Token(_)));
        if let Some(arrived) = arrived {
            drop(tell.blocking_send(Happened::Arrived(arrived)));
        }
        if is_token {
            break;
        }
    }
    Ok(())
}

fn obey(
    orders: &std_mpsc::Receiver<Order>,
    intake: &mut Intake,
    tell: &mpsc::Sender<Happened>,
) -> Result<(), IntakeError> {
    while let Ok(order) = orders.recv() {
        match order {
            Order::Verify(token) => {
                intake.check(&token)?;
                drop(tell.blocking_send(Happened::Verified));
            }
            Order::Load => intake.load()?,
        }
    }
    Ok(())
}

/// Reads what QEMU says on its return path.
fn listen_to_qemu(stream: UnixStream, tell: mpsc::Sender<Happened>) {
    start_thread("return-path", move || {
        let mut stream = stream;
        let mut decoder = return_path::Decoder::new();
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = std::io::Read::read(&mut stream, &mut buffer) {
            decoder.push(&buffer[..read]);
            while let Ok(Some(message)) = decoder.next_message() {
                drop(tell.blocking_send(Happened::ReturnPath(message)));
            }
        }
    });
}
