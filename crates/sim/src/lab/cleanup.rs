//! What a lab leaves on the machine, and how it goes: at drop, at Ctrl-C, or when the next lab finds it.
//!
//! Everything carries the id of the process that made it, and every process of a lab is in one of its namespaces,
//! those included that agents started and let outlive them. So what is to be removed can be read off the machine.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Place, ip};
use crate::namespace::Namespace;

/// How often killed processes are looked for again, and how long in between.
const ROUNDS: u32 = 200;
const BETWEEN_ROUNDS: Duration = Duration::from_millis(10);

static LIVE: Mutex<Vec<Name>> = Mutex::new(Vec::new());

/// The removal of everything one lab left; happens when this is dropped.
#[derive(Debug)]
pub(super) struct Remains {
    name: Name,
    directory: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Name {
    process: u32,
    number: u32,
}

impl Remains {
    /// Names a lab and promises its removal, Ctrl-C included.
    pub(super) fn register(process: u32, number: u32) -> io::Result<Remains> {
        static WATCH: OnceLock<Result<(), String>> = OnceLock::new();
        let watch = WATCH.get_or_init(|| {
            ctrlc::set_handler(|| {
                live().iter().for_each(|name| name.remove());
                std::process::exit(130);
            })
            .map_err(|error| error.to_string())
        });
        watch.clone().map_err(io::Error::other)?;
        let name = Name { process, number };
        live().push(name);
        Ok(Remains { name, directory: name.directory() })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn namespace(&self, place: Place) -> Namespace {
        self.name.namespace(place)
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        self.name.remove();
        live().retain(|name| *name != self.name);
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<Name>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the labs of processes that are no more.
pub(super) fn remove_stale() {
    let named = |directory: &Path, prefix: &str| -> Vec<Name> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| Name::parse(entry.file_name().to_str()?.strip_prefix(prefix)?)).collect()
    };
    let mut found = named(Path::new("/run/netns"), "gw");
    found.extend(named(&std::env::temp_dir(), "godwit-lab-"));
    for name in found {
        if !Path::new(&format!("/proc/{}", name.process)).exists() {
            name.remove();
        }
    }
}

impl Name {
    /// Reads `<process>-<number>`, with anything after another `-`.
    fn parse(text: &str) -> Option<Name> {
        let mut parts = text.split('-');
        Some(Name { process: parts.next()?.parse().ok()?, number: parts.next()?.parse().ok()? })
    }

    fn namespace(self, place: Place) -> Namespace {
        Namespace::new(format!("gw{}-{}-{}", self.process, self.number, place.name()))
    }

    fn directory(self) -> PathBuf {
        std::env::temp_dir().join(format!("godwit-lab-{}-{}", self.process, self.number))
    }

    /// Kills what runs in the namespaces, then removes them and the directory. What can't be removed now will be when
    /// the next lab is made.
    fn remove(self) {
        for place in Place::ALL {
            let namespace = self.namespace(place);
            if namespace.path().exists() {
                end_processes(&namespace);
                let _ = ip::run(&["netns", "del", namespace.name()]);
            }
        }
        unmount_below(&self.directory());
        let _ = std::fs::remove_dir_all(self.directory());
    }
}

/// Unmounts the small file systems of a lab; what can't be will be when the next lab is made.
fn unmount_below(directory: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for point in points.filter(|point| point.starts_with(directory)) {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}

fn end_processes(namespace: &Namespace) {
    for _ in 0..ROUNDS {
        let pids = processes_in(namespace);
        if pids.is_empty() {
            return;
        }
        for pid in pids {
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(BETWEEN_ROUNDS);
    }
}

/// The processes in a namespace that still run; ended ones wait for their parent and hold nothing.
pub(super) fn processes_in(namespace: &Namespace) -> Vec<Pid> {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|of| (of.dev(), of.ino()));
    let Some(own) = identity(&namespace.path()) else { return Vec::new() };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter(|entry| identity(&entry.path().join("ns/net")) == Some(own));
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != std::process::id() as i32).map(Pid::from_raw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_labs_are_read_back_and_others_are_not() {
        let name = Name { process: 4711, number: 2 };
        let namespace = name.namespace(Place::Lan);
        assert_eq!(Name::parse(namespace.name().strip_prefix("gw").unwrap()), Some(name));
        for other in ["", "4711", "x-1", "1-x-a", "-1-2"] {
            assert_eq!(Name::parse(other), None);
        }
    }
}
