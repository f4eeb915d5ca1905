//! The agent's state directory: who lives where, and that only one agent lives in it.
//!
//! ```text
//! <state_dir>/lock                        held by the running agent
//!            /accelerator.json            what the probe found (see `accelerator`)
//!            /machines/<name>/spec.json   the machine
//!                            /process.json  QEMU's process, its TAPs; absent while the machine is off
//!                            /starting.json  while a start or an arrival isn't over
//!                            /token.json token-written.json  who may run it (see `crate::token`)
//!                            /qemu.pid qmp.sock qmp-migration.sock console.sock qemu.log
//!                            disk<n>.sock  where a disk is served
//!            /disks/<machine>.<n>/        a disk that is served (see `godwit_block::Disk`), and what its server says
//!            /migrations/<id>/…           see `crate::job`
//!            /partial/<name>.memory       what arrived of a migration that broke (`--keep-partial`)
//!            /stand-down/<machine>@<host>.json  what a host that was declared lost is told when it answers
//!            /learned/<peer>.json         what pauses towards a peer taught
//!            /history.ndjson              what migrations were thought to take, and took (see `history`)
//! ```
//!
//! Files are replaced by renaming, so that a crash leaves the old or the new one. Everything an agent knows about
//! machines is here and in `/proc`: a restarted agent reads it and goes on.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use godwit_qemu::{commandline, machine::Spec};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::process::Process;
use crate::{
    borrowed, job,
    token::{Durability, is_record_file},
    whole_file,
};

/// The directory of orders to hosts that were declared lost.
const STAND_DOWN: &str = "stand-down";
/// The note of a start that isn't over.
const STARTING_FILE: &str = "starting.json";
/// No file of the state directory is read beyond this.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why the state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// Another agent has it.
    #[error("another agent uses {}", .0.display())]
    Locked(PathBuf),
    /// The file system refused.
    #[error("can't use {}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file doesn't hold what it should.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
}

/// The state directory, locked.
#[derive(Debug)]
pub(crate) struct StateDir {
    root: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Opens the directory, makes what is missing, and locks it for this process.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another agent has it, or what the file system says.
    pub(crate) fn open(root: &Path) -> Result<Self, StateError> {
        let inner = ["machines", "migrations", "learned", "disks"].map(|name| root.join(name));
        for directory in [root.to_owned()].into_iter().chain(inner) {
            make_private_dir(&directory)?;
        }
        let root = root.canonicalize().map_err(at(root))?;
        let path = root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(at(&path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StateError::Locked(root.clone()))?;
        // Workers write to the other directories, and outlive their agent.
        ["", STAND_DOWN].iter().for_each(|inner| whole_file::sweep(&root.join(inner)));
        Ok(Self { root, _lock: lock })
    }

    /// The directory itself.
    #[must_use]
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The directory for orders to hosts that were declared lost.
    #[must_use]
    pub(crate) fn stand_down(&self) -> PathBuf {
        self.root.join(STAND_DOWN)
    }

    /// The file for what pauses towards a peer taught.
    #[must_use]
    pub(crate) fn learned(&self, peer: &str) -> PathBuf {
        self.root.join("learned").join(format!("{peer}.json"))
    }

    /// The file in which finished migrations are remembered.
    #[must_use]
    pub(crate) fn history(&self) -> PathBuf {
        self.root.join("history.ndjson")
    }

    /// The file for the memory of a machine that didn't arrive completely.
    #[must_use]
    pub(crate) fn partial(&self, machine: &str) -> PathBuf {
        self.root.join("partial").join(format!("{machine}.memory"))
    }

    /// The directory of a disk that is served to a machine. It stays when the machine is forgotten.
    #[must_use]
    pub(crate) fn disk(&self, machine: &str, index: usize) -> PathBuf {
        self.disk_called(&format!("{machine}.{index}"))
    }

    /// The same, by its name.
    #[must_use]
    pub(crate) fn disk_called(&self, name: &str) -> PathBuf {
        self.root.join("disks").join(name)
    }

    /// The names of all disks.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub(crate) fn disks(&self) -> Result<Vec<String>, StateError> {
        let mut names = list(&self.root.join("disks"))?;
        // One that is being made or removed.
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        Ok(names)
    }

    /// A machine's place, whether there is one or not.
    #[must_use]
    pub(crate) fn machine(&self, name: &str) -> MachineDir {
        MachineDir { files: commandline::MachineDir::new(self.root.join("machines").join(name)) }
    }

    /// All machines, by name.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub(crate) fn machines(&self) -> Result<Vec<(String, MachineDir)>, StateError> {
        let mut machines: Vec<_> = list(&self.root.join("machines"))?
            .into_iter()
            .map(|name| (name.clone(), self.machine(&name)))
            .filter(|(_, directory)| directory.exists())
            .collect();
        machines.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(machines)
    }

    /// The names of all machines of which anything is known here, if only who has them.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub(crate) fn known_machines(&self) -> Result<Vec<(String, MachineDir)>, StateError> {
        let mut names = list(&self.root.join("machines"))?;
        names.sort();
        Ok(names.into_iter().map(|name| (name.clone(), self.machine(&name))).collect())
    }

    /// A migration's directory, whether there is one or not.
    #[must_use]
    pub(crate) fn migration(&self, id: &str) -> PathBuf {
        self.root.join("migrations").join(id)
    }

    /// All migrations, in no order.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub(crate) fn migrations(&self) -> Result<Vec<String>, StateError> {
        list(&self.root.join("migrations"))
    }
}

/// A machine's directory.
#[derive(Debug, Clone)]
pub(crate) struct MachineDir {
    files: commandline::MachineDir,
}

/// What is written down while a machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Running {
    /// QEMU.
    pub process: Process,
    /// The TAPs that were made for it.
    pub taps: Vec<String>,
    /// For an adopted machine the one QMP socket that it has.
    pub adopted_qmp: Option<PathBuf>,
}

/// What is written down before a machine is started, and stays until it runs here for good: what an agent that dies
/// leaves of an unfinished start can then be found and undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Starting {
    /// The TAPs that are to be made for it.
    pub taps: Vec<String>,
    /// It comes from another host, and isn't this host's before its record says so.
    pub incoming: bool,
}

impl MachineDir {
    /// The directory.
    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        self.files.path()
    }

    /// Where QEMU's sockets and files are in it.
    #[must_use]
    pub(crate) fn files(&self) -> &commandline::MachineDir {
        &self.files
    }

    /// Whether the machine is known.
    #[must_use]
    pub(crate) fn exists(&self) -> bool {
        self.path().join("spec.json").exists()
    }

    /// Makes the directory and writes the spec.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn create(&self, spec: &Spec) -> Result<(), StateError> {
        make_private_dir(self.path())?;
        write_json(&self.path().join("spec.json"), spec)
    }

    /// The machine's spec.
    ///
    /// # Errors
    /// If it can't be read or isn't one.
    pub(crate) fn spec(&self) -> Result<Spec, StateError> {
        read_json(&self.path().join("spec.json"))
    }

    /// Writes down that the machine is about to be started.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn set_starting(&self, starting: &Starting) -> Result<(), StateError> {
        make_private_dir(self.path())?;
        write_json(&self.path().join(STARTING_FILE), starting)
    }

    /// A start that isn't over; a damaged note is one.
    #[must_use]
    pub(crate) fn starting(&self) -> Option<Starting> {
        let path = self.path().join(STARTING_FILE);
        let unknown = Starting { taps: Vec::new(), incoming: false };
        path.exists().then(|| read_json(&path).unwrap_or(unknown))
    }

    /// The start is over: the machine runs here.
    pub(crate) fn set_started(&self) {
        let _ = fs::remove_file(self.path().join(STARTING_FILE));
    }

    /// Its process, if it was started and hasn't been cleared away.
    ///
    /// # Errors
    /// If the file is there but can't be used.
    pub(crate) fn running(&self) -> Result<Option<Running>, StateError> {
        let path = self.path().join("process.json");
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Writes down that the machine runs.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn set_running(&self, running: &Running) -> Result<(), StateError> {
        write_json(&self.path().join("process.json"), running)
    }

    /// Forgets the process; sockets and the pidfile go too.
    pub(crate) fn clear_running(&self) {
        let files = &self.files;
        for file in [files.pid_file(), files.qmp(), files.migration_qmp(), files.console()] {
            let _ = fs::remove_file(file);
        }
        let _ = fs::remove_file(self.path().join("process.json"));
        borrowed::forget(self.path());
    }

    /// Removes everything but the record of who may run the machine, which outlives a refused hand-over.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn remove_all_but_token(&self) -> Result<(), StateError> {
        let entries: Vec<_> = match fs::read_dir(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(at(self.path()))?.flatten().collect(),
        };
        if !entries.iter().any(|entry| is_record_file(&entry.file_name())) {
            return self.remove();
        }
        for entry in entries {
            if !is_record_file(&entry.file_name()) {
                fs::remove_file(entry.path()).map_err(at(self.path()))?;
            }
        }
        Ok(())
    }

    /// Removes everything.
    ///
    /// # Errors
    /// What the file system says; that it isn't there is no error.
    pub(crate) fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(self.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(self.path())(error)),
            _ => Ok(()),
        }
    }
}

/// Writes a job for a worker into a new directory.
///
/// # Errors
/// What the file system says.
pub(crate) fn write_job(directory: &Path, job: &job::Job) -> Result<(), StateError> {
    make_private_dir(directory)?;
    write_json(&directory.join(job::JOB_FILE), job)
}

/// Reads a bounded JSON file.
///
/// # Errors
/// If it can't be read, is too long, or holds something else.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, StateError> {
    let length = fs::metadata(path).map_err(at(path))?.len();
    if length > FILE_BYTES_MAX {
        return Err(at(path)(io::Error::new(io::ErrorKind::FileTooLarge, format!("{length} bytes"))));
    }
    let bytes = fs::read(path).map_err(at(path))?;
    serde_json::from_slice(&bytes).map_err(|source| StateError::Damaged { path: path.to_owned(), source })
}

/// Replaces a JSON file, and sees that it survives the host.
///
/// # Errors
/// What the file system says.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StateError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|source| StateError::Damaged { path: path.to_owned(), source })?;
    whole_file::replace(path, &bytes, Durability::Synced).map_err(at(path))
}

/// Makes a directory (and those above it) that only this user can read.
///
/// # Errors
/// What the file system says.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), StateError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at(path))?;
    path.parent().map_or(Ok(()), whole_file::sync_directory).map_err(at(path))
}

fn list(path: &Path) -> Result<Vec<String>, StateError> {
    let entries = fs::read_dir(path).map_err(at(path))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn two_agents_cannot_share_a_state_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let first = StateDir::open(scratch.path()).unwrap();
        assert!(matches!(StateDir::open(scratch.path()), Err(StateError::Locked(_))));
        drop(first);
        StateDir::open(scratch.path()).unwrap();
    }

    #[test]
    fn nobody_else_may_look_in() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("state");
        let _state = StateDir::open(&root).unwrap();
        let mode = fs::metadata(root.join("machines")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_torn_file_is_an_error_and_not_a_panic() {
        let scratch = tempfile::tempdir().unwrap();
        let state = StateDir::open(scratch.path()).unwrap();
        let machine = state.machine("web1");
        make_private_dir(machine.path()).unwrap();
        fs::write(machine.path().join("process.json"), b"{\"process\":").unwrap();
        assert!(matches!(machine.running(), Err(StateError::Damaged { .. })));
    }
}
