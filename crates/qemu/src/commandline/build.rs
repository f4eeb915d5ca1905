//! The command line of a machine at one host.

use std::path::{Path, PathBuf};

use crate::machine::{Accel, Spec, SpecError};

/// Options that [`build`] sets itself.
pub const RESERVED_OPTIONS: &[&str] = &[
    "incoming",
    "S",
    "daemonize",
    "pidfile",
    "qmp",
    "qmp-pretty",
    "name",
    "D",
    "nodefaults",
    "no-user-config",
    "display",
    "nographic",
    "accel",
    "enable-kvm",
    "M",
    "help",
    "h",
    "version",
    "preconfig",
    "add-fd",
    "loadvm",
    "readconfig",
    "dump-vmstate",
];

/// The directory that an agent gives a machine; QEMU's sockets and files have fixed names in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineDir(PathBuf);

impl MachineDir {
    /// `directory` is absolute and short: a socket's path has at most 107 bytes.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self(directory.into())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The agent's QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.0.join("qmp.sock")
    }

    /// The QMP socket that a migration's worker has for itself.
    pub fn migration_qmp(&self) -> PathBuf {
        self.0.join("qmp-migration.sock")
    }

    /// QEMU's process id; there once QEMU is up.
    pub fn pid_file(&self) -> PathBuf {
        self.0.join("qemu.pid")
    }

    /// What QEMU says after it is up.
    pub fn log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }

    /// The other end of the guest's first serial port.
    pub fn console(&self) -> PathBuf {
        self.0.join("console.sock")
    }
}

/// How a machine is started at this host.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Absolute path of `qemu-system-x86_64`.
    pub emulator: PathBuf,
    /// What executes the guest; the agent has resolved [`Accel::Auto`].
    pub accel: Accel,
    /// Where QEMU's sockets and files go; exists.
    pub directory: MachineDir,
    /// Names of the TAP devices, one for each of [`Spec::net`]; they exist.
    pub taps: Vec<String>,
    /// Waits for a migration instead of running.
    pub incoming: bool,
}

/// Why no command line can be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The specification is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// `auto` was left.
    #[error("what executes the guest hasn't been decided")]
    AccelUndecided,
    /// The launch doesn't fit the specification.
    #[error("the machine has {nets} network cards but {taps} TAP devices were made")]
    Taps {
        /// Cards.
        nets: usize,
        /// Devices.
        taps: usize,
    },
}

/// The arguments of QEMU, the program first.
///
/// # Errors
/// See [`BuildError`].
pub fn build(spec: &Spec, launch: &Launch) -> Result<Vec<String>, BuildError> {
    spec.validate()?;
    if launch.accel == Accel::Auto {
        return Err(BuildError::AccelUndecided);
    }
    if launch.taps.len() != spec.net.len() {
        return Err(BuildError::Taps { nets: spec.net.len(), taps: launch.taps.len() });
    }
    Ok(vec![launch.emulator.to_string_lossy().into_owned()])
}
