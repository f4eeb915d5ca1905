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
    /// qemu-storage-daemon as it comes: a pool of threads.
    Daemon,
    /// The same with io_uring.
    DaemonUring,
    Raw,
}

impl Contender {
    pub(super) const ALL: [Self; 4] = [Self::Godwit, Self::Daemon, Self::DaemonUring, Self::Raw];
    /// Those that godwit is held against.
    pub(super) const RIVALS: [Self; 2] = [Self::Daemon, Self::DaemonUring];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Godwit => "godwit",
            Self::Daemon => "qsd",
            Self::DaemonUring => "qsd-uring",
            Self::Raw => "raw",
        }
    }
}

/// How disks are made and served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served<'a> {
    pub(super) godwit: &'a Path,
    /// Where their files are.
    pub(super) directory: &'a Path,
    pub(super) size_mb: u64,
    /// Whether the disk was written before.
    pub(super) filled: bool,
}

impl Served<'_> {
    /// Makes a disk and serves it.
    pub(super) fn start(&self, contender: Contender) -> Result<Disk> {
        let size = format!("{}M", self.size_mb);
        let disk = if contender == Contender::Godwit {
            self.serve(self.disk_server("disk").args(["--create", &size]))?
        } else {
            let file = self.directory.join("disk.img");
            // Where a disk is written for the first time, a raw file has nothing to keep account of.
            let is_raw = self.filled || contender == Contender::Raw;
            let format = if is_raw { "raw" } else { "qcow2" };
            create(&file, format, &size)?;
            self.open(contender, &file, format)?
        };
        if self.filled {
            disk.fill(self.size_mb)?;
        }
        Ok(disk)
    }

    /// Serves a new disk that begins as an image in a repository.
    pub(super) fn of_image(&self, repository: &Path, name: &str) -> Result<Disk> {
        let disk = format!("disk-{name}");
        self.serve(self.disk_server(&disk).args(["--image", name]).arg("--repository").arg(repository))
    }

    /// Serves a raw file that is there.
    pub(super) fn of_file(&self, contender: Contender, file: &Path) -> Result<Disk> {
        self.open(contender, file, "raw")
    }

    fn open(&self, contender: Contender, file: &Path, format: &str) -> Result<Disk> {
        let aio = match contender {
            Contender::DaemonUring => "io_uring",
            Contender::Daemon => "threads",
            Contender::Godwit | Contender::Raw => {
                return Ok(Disk { child: None, target: Target::File(file.to_owned()) });
            }
        };
        self.serve(&mut daemon(file, format, aio, &self.socket()))
    }

    fn disk_server(&self, name: &str) -> Command {
        let mut command = Command::new(self.godwit);
        command.arg("disk-server").arg(self.directory.join(name)).arg("--listen").arg(self.socket());
        command
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }

    fn serve(&self, command: &mut Command) -> Result<Disk> {
        // QEMU's daemon doesn't take the place of the one before.
        let _ = std::fs::remove_file(self.socket());
        let log = std::fs::File::create(self.directory.join("log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let child = child.with_context(|| format!("cannot start {command:?}"))?;
        let mut disk = Disk { child: Some(child), target: Target::Socket(self.socket()) };
        disk.wait_until_up(self.directory)?;
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

fn daemon(file: &Path, format: &str, aio: &str, socket: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    command.args([
        "--blockdev",
        &format!("driver=file,node-name=file,filename={},discard=unmap,aio={aio}", file.display()),
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
        self.ask(&["-c", &format!("write -q -P 0x5a 0 {}M", size_mb.min(1024)), "-c", "flush"])
    }

    /// Reads the disk's first block.
    pub(super) fn read_first(&self) -> Result<()> {
        self.ask(&["-r", "-c", "read -q 0 4k"])
    }

    fn ask(&self, commands: &[&str]) -> Result<()> {
        let target = match &self.target {
            Target::Socket(socket) => format!("nbd+unix:///disk?socket={}", socket.display()),
            Target::File(file) => file.display().to_string(),
        };
        let output = Command::new("qemu-io").args(["-f", "raw"]).args(commands).arg(&target).output();
        let output = output.context("cannot run qemu-io")?;
        if !output.status.success() {
            bail!("qemu-io {commands:?} failed: {}", String::from_utf8_lossy(&output.stderr));
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
