//! The worker processes: starting them, finding them again, handing them connections.

use std::{
    ffi::OsStr,
    fs,
    io::{self, IoSlice, Read, Seek, SeekFrom},
    net::TcpStream,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

use tokio::time::{Instant, sleep};

use super::{
    error::AgentError,
    process::{self, Privilege, Process},
    state,
};
use crate::{
    job::{ACCEPT_SOCKET, WORKER_SOCKET},
    whole_file,
};

/// The program that this process runs, even if its file was replaced by a newer version since: a worker is of its
/// agent's version.
pub(super) const OWN_IMAGE: &str = "/proc/self/exe";
/// How long a worker that has written its report may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// What the worker prints.
const LOG_FILE: &str = "worker.log";
/// How much of its end is looked at.
const LAST_WORDS_BYTES_MAX: u64 = 1024;
/// Which process it is.
const PROCESS_FILE: &str = "worker.json";

/// Starts the worker of the job that lies in `directory`; it outlives the agent.
pub(super) fn spawn(directory: &Path, id: &str) -> Result<(), AgentError> {
    let failed = |error: io::Error| AgentError::Worker(format!("doesn't start: {error}"));
    let log =
        fs::OpenOptions::new().create(true).append(true).open(directory.join(LOG_FILE)).map_err(failed)?;
    let mut command = Command::new(OWN_IMAGE);
    command
        .arg0("godwit")
        .arg("worker")
        .arg(directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    let mut child = process::spawn(command, Privilege::Trace).map_err(failed)?;
    process::own_control_group(child.id(), id);
    if let Some(process) = Process::of(child.id().cast_signed()) {
        state::write_json(&directory.join(PROCESS_FILE), &process)?;
    }
    thread::Builder::new().name("reap".into()).spawn(move || child.wait()).map_err(failed)?;
    Ok(())
}

/// Removes what a worker that has ended leaves besides its account: its sockets, its control group, and what it, or the
/// agent that started it, was just writing.
pub(super) async fn clear(directory: &Path) {
    let give_up_at = Instant::now() + END_TIMEOUT;
    let id = directory.file_name().and_then(OsStr::to_str).unwrap_or_default();
    while (is_alive(directory) || !process::remove_control_group(id)) && Instant::now() < give_up_at {
        sleep(LOOK_EVERY).await;
    }
    for socket in [WORKER_SOCKET, ACCEPT_SOCKET] {
        let _ = fs::remove_file(directory.join(socket));
    }
    whole_file::sweep(directory);
}

/// Whether the worker of the job in `directory` lives.
pub(super) fn is_alive(directory: &Path) -> bool {
    state::read_json::<Process>(&directory.join(PROCESS_FILE)).is_ok_and(Process::is_alive)
}

/// Kills the worker, if it lives.
pub(super) fn kill(directory: &Path) {
    if let Ok(process) = state::read_json::<Process>(&directory.join(PROCESS_FILE)) {
        process.kill();
    }
}

/// The last line in which the worker complained, if it did.
pub(super) fn last_words(directory: &Path) -> Option<String> {
    let read = || -> io::Result<String> {
        let mut log = fs::File::open(directory.join(LOG_FILE))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS_BYTES_MAX)))?;
        let mut tail = Vec::new();
        log.take(LAST_WORDS_BYTES_MAX).read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).into_owned())
    };
    let tail = read().unwrap_or_default();
    let complains = |line: &&str| ["WARN", "ERROR", "panicked"].iter().any(|word| line.contains(word));
    tail.lines().map(str::trim).rfind(complains).map(str::to_owned)
}

/// Hands a connection of which nothing has been read to a worker: one message of one byte with the descriptor.
///
/// # Errors
/// If no worker listens there, or its queue is full.
pub(super) fn hand_over(directory: &Path, connection: &TcpStream) -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let channel = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(channel.as_raw_fd(), &UnixAddr::new(&directory.join(ACCEPT_SOCKET))?)?;
    let descriptors = [connection.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}
