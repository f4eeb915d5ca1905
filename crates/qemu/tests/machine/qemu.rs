//! Starts daemonised QEMUs and ends them by their process ids.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use godwit_qemu::{
    commandline::{self, Launch, MachineDir},
    machine::{Accel, Spec},
    qmp::Client,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A daemonised QEMU; ends with this value.
pub(crate) struct Qemu {
    pub(crate) pid: i32,
    pub(crate) monitor: PathBuf,
}

impl Qemu {
    /// `argv` must contain `-daemonize` and write the process id to `pid_file`.
    pub(crate) fn start(argv: &[String], pid_file: &Path, monitor: PathBuf) -> Result<Self, String> {
        let output = Command::new(&argv[0]).args(&argv[1..]).output().unwrap();
        if !output.status.success() {
            let log = fs::read_to_string(pid_file.with_file_name("qemu.log")).unwrap_or_default();
            return Err(log + &String::from_utf8_lossy(&output.stderr));
        }
        let pid = fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        Ok(Self { pid, monitor })
    }

    /// As an agent starts it.
    pub(crate) fn launch(spec: &Spec, launch: &Launch) -> Result<Self, String> {
        let argv = commandline::build(spec, launch).map_err(|error| error.to_string())?;
        Self::start(&argv, &launch.directory.pid_file(), launch.directory.qmp())
    }

    /// As a person starts it.
    pub(crate) fn by_hand(directory: &Path, line: &str) -> Self {
        let (pid_file, monitor) = (directory.join("hand.pid"), directory.join("hand.sock"));
        let own = format!(
            "qemu-system-x86_64 {line} -daemonize -pidfile {} -qmp unix:{},server,wait=off",
            pid_file.display(),
            monitor.display()
        );
        let argv: Vec<String> = own.split_whitespace().map(str::to_owned).collect();
        Self::start(&argv, &pid_file, monitor).unwrap()
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.monitor, PATIENCE).await.unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Fails if it ended by itself, which is fine.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
    }
}

/// A directory short enough for sockets.
pub(crate) fn directory() -> TempDir {
    tempfile::Builder::new().prefix("godwit").tempdir_in("/tmp").unwrap()
}

pub(crate) fn launch(directory: &Path, incoming: bool) -> Launch {
    Launch {
        emulator: emulator(),
        accel: Accel::Tcg,
        directory: MachineDir::new(directory),
        taps: Vec::new(),
        incoming,
    }
}

fn emulator() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|place| place.join("qemu-system-x86_64"));
    places.find(|place| place.exists()).unwrap_or_else(|| panic!("qemu-system-x86_64 isn't installed"))
}
