//! Disks that this host serves to its machines: made when a machine is first run, and a process each, which outlives the
//! agent and is started again if it dies.
//!
//! ```text
//! vm run ──► made, if it isn't there ──► server ──► QEMU connects
//!                                          │ ▲
//!                                     dies ▼ │ while the machine runs; QEMU waits and asks again
//!                                        started again
//! machine ended ──► server told to end: everything synced, the disk closed
//! ```

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use godwit_block::{
    AdoptedFile, Directory, Disk as ServedDisk, DiskError, DiskId, Identity, ImageFormat, Map, Origin, Place,
    disk, look,
    repository::{ImageName, Repository, RepositoryError},
};
use godwit_qemu::machine::{Disk, DiskFormat, Spec};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    net::UnixStream,
    runtime::Handle,
    task::spawn_blocking,
    time::{Instant, interval, sleep},
};

use super::{
    Agent,
    error::{AgentError, Refusal},
    machines::running,
    process::{self, Privilege, Process},
    state::{MachineDir, make_private_dir},
};
use crate::{
    api::{DiskView, Places, Removed},
    output::one_line,
};

/// How long a server may take until it can be asked: it may have to find out what its host's crash left.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server may take to close its disk before it is killed, which loses nothing either.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether servers are up, or have ended.
const POLL: Duration = Duration::from_millis(100);
/// Parts of which a picture is made.
const PARTS: usize = 1024;
/// The most disks of a machine, as its specification allows.
const DISKS_MAX: usize = 16;

/// The servers that are to be up, by machine and disk.
#[derive(Debug, Default)]
pub(super) struct Servers(Mutex<BTreeMap<(String, usize), Process>>);

impl Servers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, usize), Process>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process that serves the disk of this name.
    fn pid_of(&self, disk: &str) -> Option<i32> {
        let servers = self.lock();
        let server = servers.iter().find(|((machine, index), _)| format!("{machine}.{index}") == disk);
        server.map(|(_, process)| process).filter(|process| process.is_alive()).map(|process| process.pid)
    }

    fn dead(&self) -> Vec<(String, usize)> {
        self.lock().iter().filter(|(_, process)| !process.is_alive()).map(|(of, _)| of.clone()).collect()
    }
}

impl Agent {
    /// Makes those disks of a machine that aren't there and starts a server for each. They can be asked when this returns.
    pub(super) async fn serve_disks(&self, spec: &Spec, directory: &MachineDir) -> Result<(), AgentError> {
        for (index, disk) in served(spec) {
            self.make_disk(&spec.name, index, disk).await?;
            self.start_server(&spec.name, index, disk, directory).await?;
        }
        Ok(())
    }

    /// Starts servers again that have died, for as long as the agent lives.
    pub(super) async fn keep_disks_served(self: Arc<Self>) {
        self.find_servers().await;
        let mut ticks = interval(POLL);
        loop {
            ticks.tick().await;
            for (machine, index) in self.servers.dead() {
                self.replace_server(&machine, index).await;
            }
        }
    }

    /// After the agent's start: the servers of the machines that run.
    async fn find_servers(&self) {
        for (name, directory) in self.state.machines().unwrap_or_default() {
            let (Ok(Some(_)), Ok(spec)) = (running(&directory), directory.spec()) else { continue };
            for (index, disk) in served(&spec) {
                match process::with_argument(&directory.files().disk(index)).first() {
                    Some(server) => _ = self.servers.lock().insert((name.clone(), index), *server),
                    None => self.start_server_again(&name, index, disk, &directory).await,
                }
            }
        }
    }

    async fn replace_server(&self, machine: &str, index: usize) {
        let directory = self.state.machine(machine);
        let wanted = directory.starting().is_some() || matches!(running(&directory), Ok(Some(_)));
        let spec = directory.spec().ok().filter(|_| wanted);
        match spec.as_ref().and_then(|spec| spec.disk.get(index)) {
            Some(disk) => self.start_server_again(machine, index, disk, &directory).await,
            None => _ = self.servers.lock().remove(&(machine.to_owned(), index)),
        }
    }

    async fn start_server_again(&self, machine: &str, index: usize, disk: &Disk, directory: &MachineDir) {
        match self.start_server(machine, index, disk, directory).await {
            Ok(()) => tracing::warn!(machine, disk = index, "its server had died; started again"),
            Err(error) => tracing::error!(machine, disk = index, "no server: {}", one_line(&error)),
        }
    }

    async fn make_disk(&self, machine: &str, index: usize, disk: &Disk) -> Result<(), AgentError> {
        let path = self.state.disk(machine, index);
        if path.exists() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            make_private_dir(parent)?;
        }
        let failed = |error: &dyn std::error::Error| AgentError::Disk(one_line(error));
        let origin = self.origin(disk).await?;
        let size_bytes = disk.size.map(|size| size.bytes());
        let id = DiskId(fastrand::u128(..).to_le_bytes());
        let made = spawn_blocking(move || ServedDisk::create(&path, id, size_bytes, &origin)).await;
        match made {
            Ok(made) => made.map_err(|it| failed(&it)),
            Err(panicked) => Err(failed(&panicked)),
        }
    }

    /// What a new disk begins as.
    async fn origin(&self, disk: &Disk) -> Result<Origin, AgentError> {
        let failed = |error: &dyn std::error::Error| AgentError::Disk(one_line(error));
        if let Some(file) = &disk.adopt {
            let format = match disk.format {
                DiskFormat::Raw => ImageFormat::Raw,
                DiskFormat::Qcow2 => ImageFormat::Qcow2,
            };
            let (file, runtime) = (file.clone(), Handle::current());
            // What reads the image can't change threads while it waits.
            let adopted = spawn_blocking(move || runtime.block_on(AdoptedFile::adopt(&file, format))).await;
            let adopted = adopted.map_err(|panicked| failed(&panicked))?;
            return Ok(Origin::File(adopted.map_err(|it| failed(&it))?));
        }
        let Some(name) = &disk.image else { return Ok(Origin::Nothing) };
        let repository = Repository::open(&self.config.repository, std::env::vars());
        let repository = repository.map_err(|it| failed(&it))?;
        let name: ImageName = name.clone().try_into().map_err(|it: RepositoryError| failed(&it))?;
        Ok(Origin::Image(repository.manifest_called(&name).await.map_err(|it| failed(&it))?))
    }

    async fn start_server(
        &self,
        machine: &str,
        index: usize,
        disk: &Disk,
        directory: &MachineDir,
    ) -> Result<(), AgentError> {
        let (path, socket) = (self.state.disk(machine, index), directory.files().disk(index));
        let failed = |error: std::io::Error| AgentError::Disk(error.to_string());
        let log_path = path.join("server.log");
        let log =
            OpenOptions::new().create(true).write(true).truncate(true).open(&log_path).map_err(failed)?;
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.arg("disk-server").arg(&path).arg("--listen").arg(&socket);
        command.arg("--repository").arg(&self.config.repository);
        if disk.read_only {
            command.arg("--read-only");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let mut child = process::spawn(command, Privilege::NoTrace).map_err(failed)?;
        let server = Process::of(child.id().cast_signed());
        // Whoever is told of its end may forget it.
        std::thread::spawn(move || child.wait());
        let Some(server) = server else { return Err(AgentError::Disk(last_line(&log_path))) };
        wait_until_up(server, &socket, &log_path).await?;
        self.servers.lock().insert((machine.to_owned(), index), server);
        Ok(())
    }
}

impl Agent {
    /// All disks that are served here, or were.
    pub(super) async fn list_disks(&self) -> Result<Vec<DiskView>, AgentError> {
        let mut disks = Vec::new();
        for name in self.state.disks()? {
            let looked = self.look_at(&name, 0).await;
            disks.push(looked.unwrap_or_else(|error| DiskView::unreadable(name, error.to_string())));
        }
        Ok(disks)
    }

    /// One disk, with what its parts have.
    pub(super) async fn show_disk(&self, name: &str) -> Result<DiskView, AgentError> {
        self.look_at(name, PARTS).await
    }

    /// Removes a disk that no machine uses, with all that it has.
    pub(super) async fn remove_disk(&self, name: &str) -> Result<Removed, AgentError> {
        let path = self.disk_path(name)?;
        let removed = spawn_blocking(move || disk::remove(&path)).await;
        match removed {
            Ok(Ok(())) => Ok(Removed { name: name.to_owned() }),
            Ok(Err(error @ DiskError::Locked { .. })) => Err(Refusal::DiskInUse(error.to_string()).into()),
            Ok(Err(error)) => Err(AgentError::Disk(one_line(&error))),
            Err(panicked) => Err(AgentError::Disk(panicked.to_string())),
        }
    }

    async fn look_at(&self, name: &str, parts: usize) -> Result<DiskView, AgentError> {
        let directory = self.disk_path(name)?;
        let path = directory.clone();
        let looked = spawn_blocking(move || {
            let (identity, map) = look(&Directory::new(path.clone())).map_err(|error| one_line(&error))?;
            let beneath = disk::beneath(&path).map_err(|error| one_line(&error))?;
            Ok((Part::of_all(&identity, &map), identity, beneath.map(|adopted| adopted.path)))
        });
        let looked = looked.await.map_err(|panicked| panicked.to_string()).flatten();
        let (places, identity, beneath) =
            looked.map_err(|problem: String| AgentError::Disk(format!("{name}: {problem}")))?;
        Ok(DiskView {
            name: name.to_owned(),
            problem: None,
            size_bytes: identity.geometry.size_bytes(),
            image: identity.base.to_hex().filter(|_| beneath.is_none()),
            beneath,
            server_pid: self.servers.pid_of(name),
            directory,
            repository: self.config.repository.clone(),
            total: places.iter().fold(Places::default(), |sum, part| part.add_to(sum)),
            parts: Part::together(&places, parts),
        })
    }

    /// A name that can't be a disk's never becomes a path.
    fn disk_path(&self, name: &str) -> Result<PathBuf, AgentError> {
        let known = self.state.disks()?.iter().any(|known| known == name);
        let unknown = || AgentError::NotFound { what: "disk", name: name.to_owned() };
        known.then(|| self.state.disk_called(name)).ok_or_else(unknown)
    }
}

/// What a chunk has.
#[derive(Debug, Clone, Copy)]
struct Part(Places);

impl Part {
    fn of_all(identity: &Identity, map: &Map) -> Vec<Self> {
        let geometry = identity.geometry;
        let chunks = geometry.chunks().zip(map.iter());
        chunks
            .map(|(chunk, state)| {
                let bytes = |place| {
                    let blocks = state.at(place) & geometry.blocks(chunk);
                    blocks.runs().map(|run| geometry.span(chunk, run).length() as u64).sum()
                };
                Self(Places {
                    base_bytes: bytes(Place::Base),
                    fetched_bytes: bytes(Place::Fetched),
                    written_bytes: bytes(Place::Written),
                    zero_bytes: bytes(Place::Zero),
                })
            })
            .collect()
    }

    fn add_to(self, sum: Places) -> Places {
        Places {
            base_bytes: sum.base_bytes + self.0.base_bytes,
            fetched_bytes: sum.fetched_bytes + self.0.fetched_bytes,
            written_bytes: sum.written_bytes + self.0.written_bytes,
            zero_bytes: sum.zero_bytes + self.0.zero_bytes,
        }
    }

    /// At most so many parts, of equal size but for the last.
    fn together(parts: &[Self], count: usize) -> Vec<Places> {
        if count == 0 {
            return Vec::new();
        }
        let each = parts.len().div_ceil(count).max(1);
        parts
            .chunks(each)
            .map(|some| some.iter().fold(Places::default(), |sum, part| part.add_to(sum)))
            .collect()
    }
}

/// Tells the servers of a machine's disks to end, now that its QEMU has.
pub(super) async fn end_servers(directory: &MachineDir) {
    for index in 0..DISKS_MAX {
        let socket = directory.files().disk(index);
        if !socket.exists() {
            continue;
        }
        for server in process::with_argument(&socket) {
            let _ = kill(Pid::from_raw(server.pid), Signal::SIGTERM);
            let until = Instant::now() + END_TIMEOUT;
            while server.is_alive() && Instant::now() < until {
                sleep(POLL).await;
            }
            server.kill();
        }
        let _ = std::fs::remove_file(&socket);
    }
}

/// The disks that are served, by their numbers.
fn served(spec: &Spec) -> impl Iterator<Item = (usize, &Disk)> {
    spec.disk.iter().enumerate().filter(|(_, disk)| disk.path.is_none())
}

async fn wait_until_up(server: Process, socket: &Path, log: &Path) -> Result<(), AgentError> {
    let until = Instant::now() + START_TIMEOUT;
    while UnixStream::connect(socket).await.is_err() {
        if !server.is_alive() {
            return Err(AgentError::Disk(last_line(log)));
        }
        if Instant::now() > until {
            server.kill();
            return Err(AgentError::Disk(format!("its server isn't up after {} s", START_TIMEOUT.as_secs())));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// The last thing that a server said.
fn last_line(log: &Path) -> String {
    let said = std::fs::read_to_string(log).unwrap_or_default();
    let line = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it ended without a word");
    line.trim_start_matches("godwit: ").chars().take(400).collect()
}
