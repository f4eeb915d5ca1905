//! A worker's account of itself: every event goes to `events.ndjson` and to whoever is connected to `worker.sock`,
//! and commands come back through the same socket.
//!
//! A client that connects late gets all earlier events first. Progress is written to the file once a second at most,
//! so that the file of a migration of a day stays below 20 MB.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, unix::OwnedReadHalf},
    sync::{broadcast, mpsc},
};

use crate::{
    job::{Command, EVENTS_FILE, Event, Happening, REPORT_FILE, Report, WORKER_SOCKET},
    token::Durability,
    whole_file,
};

/// Live events a slow client may be behind by; then it misses progress, never the end, which is in the file.
const CLIENT_BACKLOG_EVENTS: usize = 256;
/// Longest command line taken from a client.
const COMMAND_BYTES_MAX: u64 = 4096;
/// Clients served at once.
const CLIENTS_MAX: usize = 32;
const PROGRESS_IN_FILE_EVERY: Duration = Duration::from_secs(1);

/// Where a worker writes what happens; cheap to clone, usable from any thread.
#[derive(Clone)]
pub(super) struct Journal {
    shared: Arc<Shared>,
}

struct Shared {
    directory: PathBuf,
    file: Mutex<Log>,
    live: broadcast::Sender<Arc<str>>,
}

struct Log {
    file: File,
    progress_written: Option<Instant>,
}

impl Journal {
    /// Opens the event file in `directory` and serves `worker.sock` there on the current runtime.
    ///
    /// Returns the journal and the commands that clients send.
    pub(super) fn open(directory: &Path) -> io::Result<(Self, mpsc::Receiver<Command>)> {
        let file =
            OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join(EVENTS_FILE))?;
        let (live, _) = broadcast::channel(CLIENT_BACKLOG_EVENTS);
        let shared = Shared {
            directory: directory.to_owned(),
            file: Mutex::new(Log { file, progress_written: None }),
            live,
        };
        let journal = Self { shared: Arc::new(shared) };
        let listener = UnixListener::bind(directory.join(WORKER_SOCKET))?;
        let (commands, received) = mpsc::channel(8);
        tokio::spawn(serve(journal.clone(), listener, commands));
        Ok((journal, received))
    }

    /// Records that something happened, now.
    pub(super) fn say(&self, what: Happening) {
        let is_progress = matches!(what, Happening::Progress(_));
        let event = Event { at_unix_ms: unix_ms(), what };
        let mut line = serde_json::to_string(&event).expect("events are plain data");
        line.push('\n');
        let mut log = self.log();
        if !is_progress || log.progress_is_due() {
            // A full disk must not end a migration; the live clients still see the event.
            if let Err(error) = log.file.write_all(line.as_bytes()) {
                tracing::warn!(%error, "event not written to {EVENTS_FILE}");
            }
        }
        // No client is no error.
        let _ = self.shared.live.send(line.into());
    }

    /// Records something that the operator should know.
    pub(super) fn warn(&self, message: impl Into<String>) {
        let message = message.into();
        tracing::warn!("{message}");
        self.say(Happening::Warning { message });
    }

    /// Writes the final report, to its file first, then as the last event.
    pub(super) fn finish(&self, report: Report) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&report).expect("reports are plain data");
        whole_file::replace(&self.shared.directory.join(REPORT_FILE), &text, Durability::Written)?;
        self.say(Happening::Finished(Box::new(report)));
        Ok(())
    }

    /// All events so far, and those to come.
    fn follow(&self) -> io::Result<(Vec<u8>, broadcast::Receiver<Arc<str>>)> {
        // Under the lock no event can fall between the two.
        let _log = self.log();
        let past = std::fs::read(self.shared.directory.join(EVENTS_FILE))?;
        Ok((past, self.shared.live.subscribe()))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.shared.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Log {
    fn progress_is_due(&mut self) -> bool {
        let due = self.progress_written.is_none_or(|at| at.elapsed() >= PROGRESS_IN_FILE_EVERY);
        if due {
            self.progress_written = Some(Instant::now());
        }
        due
    }
}

/// Milliseconds since the Unix epoch.
pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

async fn serve(journal: Journal, listener: UnixListener, commands: mpsc::Sender<Command>) {
    let places = Arc::new(tokio::sync::Semaphore::new(CLIENTS_MAX));
    while let Ok((stream, _)) = listener.accept().await {
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let (journal, commands) = (journal.clone(), commands.clone());
        tokio::spawn(async move {
            let (receive, mut send) = stream.into_split();
            tokio::select! {
                // A client that left must not keep its place until there is something to tell it.
                () = take_commands(receive, commands) => {}
                told = tell(&journal, &mut send) => tracing::debug!(?told, "a client of the worker left"),
            }
            drop(place);
        });
    }
}

async fn tell(journal: &Journal, client: &mut (impl AsyncWriteExt + Unpin)) -> io::Result<()> {
    let (past, mut live) = journal.follow()?;
    client.write_all(&past).await?;
    loop {
        match live.recv().await {
            Ok(line) => client.write_all(line.as_bytes()).await?,
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return Ok(()),
        }
    }
}

async fn take_commands(client: OwnedReadHalf, commands: mpsc::Sender<Command>) {
    let mut lines = BufReader::new(client);
    loop {
        let mut line = Vec::new();
        match (&mut lines).take(COMMAND_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(read) if read > 0 && line.ends_with(b"\n") => {}
            _ => return,
        }
        match serde_json::from_slice(&line) {
            Ok(command) => drop(commands.send(command).await),
            Err(error) => tracing::warn!(%error, "command not understood"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    use crate::job::Phase;

    #[tokio::test]
    async fn a_late_client_gets_everything_once_and_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let (journal, mut commands) = Journal::open(directory.path()).unwrap();
        journal.say(Happening::Ready);
        journal.say(Happening::Phase { phase: Phase::PreCopy });
        let client = UnixStream::connect(directory.path().join(WORKER_SOCKET)).await.unwrap();
        let (receive, mut send) = client.into_split();
        let mut lines = BufReader::new(receive).lines();
        let mut next =
            async || -> Event { serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap() };
        assert_eq!(next().await.what, Happening::Ready);
        assert_eq!(next().await.what, Happening::Phase { phase: Phase::PreCopy });
        journal.warn("the link is slow");
        assert_eq!(next().await.what, Happening::Warning { message: "the link is slow".into() });
        send.write_all(b"not json\n{\"command\":\"cancel\"}\n").await.unwrap();
        assert_eq!(commands.recv().await, Some(Command::Cancel));
    }
}
