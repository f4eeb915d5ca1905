//! Sampling a guest's memory (see [`crate::sample`]) in a process of its own, since the agent laid aside the right to read
//! other processes' memory.

use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use godwit_migration::forecast::MemorySample;
use godwit_qemu::memory::MemoryRange;
use tokio::{sync::watch, time::timeout};

use super::{
    process::{self, Privilege, Process},
    workers::OWN_IMAGE,
};
use crate::sample::Request;

/// How long a sampler may take to its first sample, from when it is waited for.
const PATIENCE: Duration = Duration::from_secs(4);
/// A sample is shorter.
const LINE_BYTES_MAX: u64 = 4096;
/// All samples together are.
const ANSWER_BYTES_MAX: u64 = 16 * LINE_BYTES_MAX;

/// A look at a guest's memory that is under way; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Sampling {
    newest: watch::Receiver<Option<MemorySample>>,
    process: Option<Process>,
}

impl Sampling {
    /// Begins to look at these ranges of a process.
    ///
    /// # Errors
    /// If the process that looks can't be started.
    pub(super) fn begin(pid: i32, ranges: &[MemoryRange], seed: u64) -> io::Result<Self> {
        let ranges = ranges.iter().map(|range| (range.host_address, range.bytes)).collect();
        let request = Request { pid: pid.unsigned_abs(), ranges, seed };
        let mut command = Command::new(OWN_IMAGE);
        command.arg0("godwit").arg(OsStr::new("sample"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = process::spawn(command, Privilege::Trace)?;
        let process = Process::of(child.id().cast_signed());
        let (tell, newest) = watch::channel(None);
        thread::Builder::new().name("sample".into()).spawn(move || {
            if let Err(error) = listen(child, &request, &tell) {
                tracing::info!(%error, "no sample of the guest's memory");
            }
        })?;
        Ok(Self { newest, process })
    }

    /// The best sample so far; waits for the first, and no longer.
    pub(super) async fn newest(mut self) -> Option<MemorySample> {
        let waited = timeout(PATIENCE, self.newest.wait_for(Option::is_some)).await;
        waited.ok()?.ok().and_then(|sample| *sample)
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        self.process.inspect(|process| process.kill());
    }
}

/// Gives the request and takes samples until there are no more; reaps the process.
fn listen(mut child: Child, request: &Request, tell: &watch::Sender<Option<MemorySample>>) -> io::Result<()> {
    let taken = take_samples(&mut child, request, tell);
    let mut complaint = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(LINE_BYTES_MAX).read_to_string(&mut complaint);
    }
    child.wait()?;
    match complaint.trim() {
        "" => taken,
        complaint => Err(io::Error::other(complaint.to_owned())),
    }
}

fn take_samples(
    child: &mut Child,
    request: &Request,
    tell: &watch::Sender<Option<MemorySample>>,
) -> io::Result<()> {
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    serde_json::to_writer(stdin.ok_or(io::ErrorKind::BrokenPipe)?, request)?;
    let answer = stdout.ok_or(io::ErrorKind::BrokenPipe)?.take(ANSWER_BYTES_MAX);
    for line in BufReader::new(answer).lines() {
        tell.send_replace(Some(serde_json::from_str(&line?)?));
    }
    Ok(())
}
