//! Those who serve a disk.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// How long a server may take until it can be asked.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Who serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    Godwit,
    DaemonRaw,
    DaemonQcow2,
    Raw,
}

impl Contender {
    pub(super) const ALL: [Self; 4] = [Self::Godwit, Self::DaemonRaw, Self::DaemonQcow2, Self::Raw];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Godwit => "godwit",
            Self::DaemonRaw => "qsd-raw",
            Self::DaemonQcow2 => "qsd-qcow2",
            Self::Raw => "raw",
        }
    }

    /// Makes a disk below `directory` and serves it.
    pub(super) fn start(self, godwit: &Path, directory: &Path, size_mb: u64, filled: bool) -> Result<Disk> {
        let file = directory.join("disk.img");
        let socket = directory.join("nbd.sock");
        let size = format!("{size_mb}M");
        let mut command = match self {
            Self::Godwit => {
                let mut command = Command::new(godwit);
                command.arg("disk-server").arg(directory.join("disk")).args(["--create", &size]);
                command.arg("--listen").arg(&socket);
                command
            }
            Self::DaemonRaw | Self::DaemonQcow2 => {
                let format = if self == Self::DaemonRaw { "raw" } else { "qcow2" };
                create(&file, format, &size)?;
                daemon(&file, format, &socket)
            }
            Self::Raw => {
                create(&file, "raw", &size)?;
                return Disk::of_file(file, filled, size_mb);
            }
        };
        let log = std::fs::File::create(directory.join("log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let child = child.with_context(|| format!("cannot start {}", self.name()))?;
        let mut disk = Disk { child: Some(child), target: Target::Socket(socket) };
        disk.wait_until_up(directory)?;
        if filled {
            disk.fill(size_mb)?;
        }
        Ok(disk)
    }
}

fn create(file: &Path, format: &str, size: &str) -> Result<()> {
    let status = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(file).arg(size).status();
    if !status.context("cannot run qemu-img")?.success() {
        bail!("qemu-img can't make {}", file.display());
    }
    Ok(())
}

fn daemon(file: &Path, format: &str, socket: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    command.args([
        "--blockdev",
        &format!("driver=file,node-name=file,filename={},discard=unmap", file.display()),
    ]);
    command.args(["--blockdev", &format!("driver={format},node-name=disk,file=file,discard=unmap")]);
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    command.args(["--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"]);
    command
}

/// Where a disk is reached.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Socket(PathBuf),
    File(PathBuf),
}

/// A disk that is served until it is dropped.
#[derive(Debug)]
pub(super) struct Disk {
    child: Option<Child>,
    target: Target,
}

impl Disk {
    fn of_file(file: PathBuf, filled: bool, size_mb: u64) -> Result<Self> {
        let disk = Self { child: None, target: Target::File(file) };
        if filled {
            disk.fill(size_mb)?;
        }
        Ok(disk)
    }

    pub(super) fn target(&self) -> Target {
        self.target.clone()
    }

    fn wait_until_up(&mut self, directory: &Path) -> Result<()> {
        let (Target::Socket(socket), Some(child)) = (&self.target, &mut self.child) else { return Ok(()) };
        let until = Instant::now() + START_LIMIT;
        while UnixStream::connect(socket).is_err() {
            if child.try_wait()?.is_some() || Instant::now() > until {
                let log = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
                bail!("the server doesn't come up: {log}");
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Writes the whole disk once, and has it on the medium.
    fn fill(&self, size_mb: u64) -> Result<()> {
        let target = match &self.target {
            Target::Socket(socket) => format!("nbd+unix:///disk?socket={}", socket.display()),
            Target::File(file) => file.display().to_string(),
        };
        let write = format!("write -q -P 0x5a 0 {}M", size_mb.min(1024));
        let output =
            Command::new("qemu-io").args(["-f", "raw", &target, "-c", &write, "-c", "flush"]).output();
        let output = output.context("cannot run qemu-io")?;
        if !output.status.success() {
            bail!("can't fill the disk: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It has nothing that anyone will miss.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
