//! The process that carries one migration, at either end.
//!
//! It owns the machine's monitor, its stream, the session and all caches, so that neither an agent's restart nor
//! another migration's trouble touches it. It asks its agent nothing: everything it needs is in its
//! [`Job`](crate::job::Job).

mod account;
mod journal;
mod memory_map;
mod shared_file;
mod source;
mod target;
mod verify;

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use godwit_qemu::qmp::Client;
use godwit_transport::{identity, session::SessionError};

use self::journal::Journal;
pub(crate) use self::{
    memory_map::MemoryMap,
    source::{GATE, GuestError, look},
};
use crate::{
    agent::process::Process,
    job::{JOB_FILE, Job, Role},
    log,
    token::TokenError,
};

/// How long a monitor may take to answer.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(10);
/// How long QEMU may take to quit before it is killed, and to die after that.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest piece of QEMU's stream in one frame, before it is sealed.
const STREAM_PIECE_BYTES_MAX: usize = 512 * 1024;

/// Carries the migration whose job lies in `directory`, to its end. How it ended is in the report there; an error is
/// only returned where not even that could be written.
pub(crate) fn run(directory: PathBuf) -> anyhow::Result<()> {
    let path = directory.join(JOB_FILE);
    let bytes = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
    let job: Job =
        serde_json::from_slice(&bytes).with_context(|| format!("{} isn't a job", path.display()))?;
    log::of_worker(&job);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("session")
        .enable_all()
        .build()?;
    runtime.block_on(carry(job, &directory))
}

async fn carry(job: Job, directory: &Path) -> anyhow::Result<()> {
    let (journal, commands) = Journal::open(directory).context("can't open the journal")?;
    tracing::info!(peer = job.peer, "begins");
    let report = match job.role {
        Role::Source => source::run(job, &journal, commands).await,
        Role::Target => target::run(job, directory, &journal, commands).await,
    };
    tracing::info!(outcome = ?report.outcome, detail = report.detail, "ends");
    journal.finish(report).context("can't write the report")?;
    // Whoever watches gets the last line before the socket goes.
    tokio::time::sleep(Duration::from_millis(50)).await;
    Ok(())
}

/// Starts a thread that profiles and `ps` tell by its name, of at most 15 bytes. Like [`thread::spawn`] it panics when the
/// system has none to give.
fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    thread::Builder::new().name(name.to_owned()).spawn(work).expect("a worker has a handful of threads");
}

/// Ends QEMU, and returns when its process is gone.
async fn end_qemu(monitor: &Client, pid: i32) -> Result<(), WorkerError> {
    let Some(process) = Process::of(pid) else { return Ok(()) };
    if let Err(error) = monitor.quit().await {
        tracing::info!(%error, "QEMU doesn't quit; it is killed");
        process.kill();
    }
    let give_up_at = Instant::now() + QUIT_TIMEOUT;
    while process.is_alive() {
        if Instant::now() >= give_up_at {
            process.kill();
        }
        if Instant::now() >= give_up_at + QUIT_TIMEOUT {
            return Err(WorkerError::Undead(pid));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// The socket at which an incoming QEMU waits for its worker.
fn stream_socket(machine_dir: &Path) -> PathBuf {
    machine_dir.join("stream.sock")
}

/// Why a worker couldn't do its part. The guest is where it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkerError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] godwit_qemu::qmp::QmpError),
    /// The machine can't be moved.
    #[error(transparent)]
    Guest(#[from] source::GuestError),
    /// Its RAM blocks aren't known.
    #[error(transparent)]
    Map(#[from] memory_map::MemoryMapError),
    /// Its memory can't be reached.
    #[error(transparent)]
    Memory(#[from] godwit_qemu::memory::ProcessMemoryError),
    /// Its memory isn't where it should be.
    #[error(transparent)]
    Proof(#[from] target::ProofError),
    /// `--verify full` without access to memory.
    #[error("--verify full needs to read the guest's memory, which isn't permitted here")]
    CannotVerify,
    /// Its memory can't be compared.
    #[error(transparent)]
    Verify(#[from] verify::VerifyError),
    /// The job lacks the peer's address.
    #[error("the job names no address for its target")]
    NoAddress,
    /// A name isn't one.
    #[error(transparent)]
    Name(#[from] identity::InvalidHostName),
    /// The identity can't be used.
    #[error(transparent)]
    Identity(#[from] identity::IdentityError),
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The other worker didn't greet.
    #[error("the other host's worker doesn't greet")]
    NoWelcome,
    /// The source won't come.
    #[error("the source withdrew the migration")]
    Withdrawn,
    /// The target's list of what it holds is wrong.
    #[error("the target says wrongly what it holds of an earlier migration")]
    Held,
    /// The target doesn't take the machine.
    #[error("the target refuses: {0}")]
    Refused(String),
    /// A message can't be sent.
    #[error(transparent)]
    Encode(#[from] godwit_migration::wire::EncodeError),
    /// A message isn't understood.
    #[error(transparent)]
    Decode(#[from] godwit_migration::wire::DecodeError),
    /// The token record can't be kept.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// QEMU's return path can't be written.
    #[error("can't answer QEMU on its return path")]
    ReturnPath(#[source] std::io::Error),
    /// A socket of the worker can't be used.
    #[error("can't use {what}")]
    Socket {
        /// Which.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// QEMU's process doesn't end.
    #[error("QEMU (process {0}) doesn't end")]
    Undead(i32),
}
