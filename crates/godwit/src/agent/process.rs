//! Processes that outlive the agent, and how much privilege each of them gets.
//!
//! CAP_SYS_PTRACE opens every process of the host. The agent lays it aside when it starts; only a migration's worker
//! gets it. Capabilities belong to a thread, so a child is started from a thread of its own that first takes or drops
//! what the child is to inherit; no code runs between fork and exec.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
};

use caps::{CapSet, Capability};
use nix::{sys::signal, unistd::Pid};
use serde::{Deserialize, Serialize};

/// A process by its id and its time of start, so that a reused id isn't mistaken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its id.
    pub pid: i32,
    /// When it started, in the kernel's ticks since boot.
    pub started_ticks: u64,
}

impl Process {
    /// The process that has this id now; `None` if there is none or it is a zombie.
    #[must_use]
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the name in parentheses and may contain anything.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let started_ticks = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, started_ticks })
    }

    /// Whether it still runs.
    #[must_use]
    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Kills it at once, if it is still the same process.
    pub(crate) fn kill(self) {
        if self.is_alive() {
            let _ = signal::kill(Pid::from_raw(self.pid), signal::Signal::SIGKILL);
        }
    }
}

/// The processes that were started with this path as an argument; a machine's files tell its QEMU from all others.
pub(crate) fn with_argument(argument: &Path) -> Vec<Process> {
    let argument = argument.as_os_str().as_encoded_bytes();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).any(|other| other == argument)
    })
    .filter_map(Process::of)
    .collect()
}

/// What a child may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// What the agent may, but it can never reach into other processes: QEMU.
    NoTrace,
    /// Also reach into other processes: a worker, which reads and writes a machine's memory.
    Trace,
}

/// Lays CAP_SYS_PTRACE aside. To be called before the process has other threads.
pub(crate) fn lay_privilege_aside() {
    for set in [CapSet::Ambient, CapSet::Effective] {
        if let Err(error) = caps::drop(None, set, Capability::CAP_SYS_PTRACE) {
            tracing::debug!(?set, %error, "can't drop CAP_SYS_PTRACE");
        }
    }
}

/// Starts a child with the given privilege.
///
/// # Errors
/// What the kernel says to the start; what it says to the privileges is only logged, since an agent without
/// capabilities works too (a worker then reads pages from QEMU's stream).
pub(crate) fn spawn(mut command: Command, privilege: Privilege) -> io::Result<Child> {
    // The service manager hears of the agent from nobody else.
    command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC").env_remove("WATCHDOG_PID");
    let start = move || {
        let result = match privilege {
            Privilege::NoTrace => forbid_trace(),
            Privilege::Trace => permit_trace(),
        };
        if let Err(error) = result {
            tracing::debug!(?privilege, %error, "can't set the child's capabilities");
        }
        command.spawn()
    };
    thread::Builder::new()
        .name("spawn".into())
        .spawn(start)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the starting thread panicked")))
}

/// Does something on a thread that may look into other processes, with the capability that the agent laid aside.
///
/// # Errors
/// If no thread can be started, or `look` panics.
pub(crate) fn with_trace<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let work = move || {
        // Without the capability what is allowed without it still works.
        let _ = caps::raise(None, CapSet::Effective, Capability::CAP_SYS_PTRACE);
        look()
    };
    let thread = thread::Builder::new().name("look".into()).spawn(work)?;
    thread.join().map_err(|_| io::Error::other("looking into a process panicked"))
}

fn forbid_trace() -> Result<(), caps::errors::CapsError> {
    // An agent that isn't root hands on what it has by this set alone: then QEMU gets nothing at all.
    caps::clear(None, CapSet::Ambient)?;
    caps::drop(None, CapSet::Inheritable, Capability::CAP_SYS_PTRACE)?;
    caps::drop(None, CapSet::Bounding, Capability::CAP_SYS_PTRACE)
}

fn permit_trace() -> Result<(), caps::errors::CapsError> {
    caps::raise(None, CapSet::Inheritable, Capability::CAP_SYS_PTRACE)?;
    caps::raise(None, CapSet::Ambient, Capability::CAP_SYS_PTRACE)
}

/// Puts a process into a control group of its own, where that is permitted.
pub(crate) fn own_control_group(pid: u32, name: &str) {
    for group in control_groups() {
        let own = group.join(format!("godwit-{name}"));
        if fs::create_dir(&own).is_err() {
            continue;
        }
        // On cgroup v2, where this file is: a group beside it that holds the virtual CPUs of a machine (`throttle`) can
        // only be made if all groups here are threaded.
        let _ = OpenOptions::new()
            .write(true)
            .open(own.join("cgroup.type"))
            .and_then(|mut it| it.write_all(b"threaded"));
        if fs::write(own.join("cgroup.procs"), pid.to_string()).is_ok() {
            return;
        }
        let _ = fs::remove_dir(&own);
    }
}

/// Removes the control group that a process had to itself, and returns whether it is gone: the last threads of a killed
/// process leave it a little later than the process ends.
pub(crate) fn remove_control_group(name: &str) -> bool {
    control_groups().map(|group| group.join(format!("godwit-{name}"))).fold(true, |gone, own| {
        let removed = fs::remove_dir(&own).is_ok() || !own.exists();
        gone && removed
    })
}

/// The control groups of this process in which memory or processor time is accounted.
fn control_groups() -> impl Iterator<Item = PathBuf> {
    let memberships = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let candidates: Vec<PathBuf> = memberships
        .lines()
        .flat_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or("/"));
            let mounts: &[&str] = match controllers {
                "" => &["", "unified"],
                "memory" => &["memory"],
                "cpu" | "cpu,cpuacct" => &["cpu"],
                _ => &[],
            };
            let path = path.trim_start_matches('/');
            mounts.iter().map(|mount| Path::new("/sys/fs/cgroup").join(mount).join(path)).collect::<Vec<_>>()
        })
        .collect();
    candidates.into_iter().filter(|group| group.join("cgroup.procs").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_one_that_reuses_its_id() {
        let me = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(me.is_alive());
        assert!(!Process { started_ticks: me.started_ticks + 1, ..me }.is_alive());
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = spawn(Command::new("true"), Privilege::NoTrace).unwrap();
        let pid = child.id().cast_signed();
        let mut polls = 0;
        while Process::of(pid).is_some() && polls < 500 {
            thread::sleep(std::time::Duration::from_millis(10));
            polls += 1;
        }
        assert_eq!(Process::of(pid), None);
        child.wait().unwrap();
    }

    #[test]
    fn a_machine_never_gets_the_tracing_capability() {
        let mut command = Command::new("cat");
        command.arg("/proc/self/status").stdout(std::process::Stdio::piped());
        let output = spawn(command, Privilege::NoTrace).unwrap().wait_with_output().unwrap();
        let status = String::from_utf8(output.stdout).unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
        assert_eq!(effective & Capability::CAP_SYS_PTRACE.bitmask(), 0);
    }
}
