//! Doing something inside a network namespace.
//!
//! A thread of its own enters the namespace, works, and ends there; the rest of the process stays where it is. What it
//! leaves (a socket, a TAP, a child process) belongs to the namespace for as long as it lives. Unlike `ip netns exec`
//! this leaves the mounts alone, so that a child sees the machine's own `/sys` and control groups.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};
use thiserror::Error;

/// A network namespace under `/run/netns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

/// A namespace couldn't be entered.
#[derive(Debug, Error)]
#[error("cannot enter the network namespace {name}")]
pub struct EnterError {
    name: String,
    source: io::Error,
}

impl Namespace {
    /// Names a namespace; it needn't exist yet.
    pub fn new(name: impl Into<String>) -> Namespace {
        Namespace { name: name.into() }
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `work` inside the namespace and waits for its result. A panic in `work` goes on here.
    ///
    /// # Errors
    /// When there is no such namespace, or for lack of CAP_SYS_ADMIN.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, EnterError> {
        let thread = || {
            self.enter()?;
            Ok(work())
        };
        std::thread::scope(|scope| scope.spawn(thread).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn enter(&self) -> Result<(), EnterError> {
        File::open(self.path())
            .and_then(|file| setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from))
            .map_err(|source| EnterError { name: self.name.clone(), source })
    }
}
