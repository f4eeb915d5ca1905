//! Slows a machine's virtual CPUs by control groups, and gives them their full speed back.
//!
//! ```text
//!   note written ─► groups made, without a limit ─► threads moved in ─► limit set, again and again
//!        └──── any failure, every end, whoever finds the note of a worker that died:
//!                  limit lifted ─► threads moved back ─► groups removed ─► note removed
//! ```
//!
//! A guest that is left slow is damaged, so the note lies in the machine's directory before anything is made, and every
//! step of lifting may be repeated. Only the threads of virtual CPUs are moved: QEMU's own, which migrate the guest and serve
//! its disks, stay as fast as they were.
//!
//! A group is made below the one that the threads are in: on cgroup v2 a threaded one, on v1 one of the `cpu` hierarchy.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{token::Durability, whole_file};

/// The note's name in a machine's directory.
const NOTE_FILE: &str = "throttle.json";
/// A machine has at most 1,024 virtual CPUs, nearly always in one group; a longer note isn't ours.
const NOTE_BYTES_MAX: u64 = 1 << 18;
/// How our groups' names begin, followed by QEMU's process id.
const GROUP_PREFIX: &str = "godwit-throttle-";
/// Where control groups are.
const ROOT: &str = "/sys/fs/cgroup";
/// The span over which the limit holds. A virtual CPU that is out of time may hold QEMU's global lock, so what waits for it,
/// the stop of the guest included, waits up to a span; shorter ones would fall below the scheduler's tick.
const PERIOD_US: u64 = 20_000;
/// The kernel takes no smaller limit.
const QUOTA_US_MIN: u64 = 1_000;
/// Threads that a moved one starts meanwhile are born in its group, so moving back is repeated.
const MOVES_MAX: u32 = 4;

/// Why a machine can't be slowed, or given back its speed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ThrottleError {
    /// The monitor named something else than a thread of the process.
    #[error("process {pid} has no thread {thread}")]
    NoThread {
        /// QEMU's process.
        pid: i32,
        /// What its monitor called the thread of a virtual CPU.
        thread: i32,
    },
    /// There is nothing to slow it by.
    #[error("process {0} is in no control group with the cpu controller")]
    NoController(i32),
    /// The kernel, or who owns the group, forbids it.
    #[error("can't write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A thread is still in a group that is to go.
    #[error("{0} doesn't become empty")]
    NotEmpty(PathBuf),
}

/// A slowed machine. Dropping it gives the machine its speed back.
#[derive(Debug)]
pub(crate) struct Throttle {
    machine_dir: PathBuf,
    groups: Vec<Group>,
}

impl Throttle {
    /// Puts the threads of a machine's virtual CPUs into groups of their own, not slowed yet.
    ///
    /// # Errors
    /// If a thread is in no group with the cpu controller, or the system refuses; nothing is left behind then.
    pub(crate) fn begin(machine_dir: &Path, pid: i32, threads: &[i32]) -> Result<Self, ThrottleError> {
        let mut homes: Vec<(Hierarchy, PathBuf, Vec<i32>)> = Vec::new();
        for &thread in threads {
            let (hierarchy, home) = home_of(pid, thread)?;
            match homes.iter_mut().find(|(_, known, _)| *known == home) {
                Some((_, _, together)) => together.push(thread),
                None => homes.push((hierarchy, home, vec![thread])),
            }
        }
        let group = |(hierarchy, home, threads): (Hierarchy, PathBuf, Vec<i32>)| {
            (Group { hierarchy, path: home.join(format!("{GROUP_PREFIX}{pid}")) }, threads)
        };
        let groups: Vec<_> = homes.into_iter().map(group).collect();
        // What an earlier throttle left has to go first: its note is about to be replaced.
        lift(machine_dir)?;
        write_note(machine_dir, &groups.iter().map(|(group, _)| group).collect::<Vec<_>>())?;
        // From here on the drop clears away.
        let throttle = Self { machine_dir: machine_dir.to_owned(), groups: Vec::new() };
        groups.into_iter().try_fold(throttle, |mut throttle, (group, threads)| {
            group.fill(&threads)?;
            throttle.groups.push(group);
            Ok(throttle)
        })
    }

    /// Lets the virtual CPUs run at this share of their full speed, in percent; 100 is no limit.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn set(&self, percent: u8) -> Result<(), ThrottleError> {
        self.groups.iter().try_for_each(|group| group.limit(percent))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Err(error) = lift(&self.machine_dir) {
            tracing::warn!(error = crate::output::one_line(&error), "the machine may still be slowed");
        }
    }
}

/// Whether the virtual CPUs of this process could be slowed. Leaves nothing behind.
///
/// # Errors
/// Why not.
pub(crate) fn probe(pid: i32) -> Result<(), ThrottleError> {
    let (hierarchy, home) = home_of(pid, pid)?;
    let group = Group { hierarchy, path: home.join(format!("{GROUP_PREFIX}probe-{pid}")) };
    let possible = group.make().and_then(|()| group.limit(50));
    let _ = fs::remove_dir(&group.path);
    possible
}

/// Gives a machine its full speed back, if it was slowed; whether it was.
///
/// # Errors
/// What the system says; the note then stays.
pub(crate) fn lift(machine_dir: &Path) -> Result<bool, ThrottleError> {
    let path = machine_dir.join(NOTE_FILE);
    if !path.exists() {
        return Ok(false);
    }
    for group in noted(&path) {
        group.remove()?;
    }
    write_result(&path, fs::remove_file(&path))?;
    Ok(true)
}

/// A control group that holds slowed threads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Group {
    hierarchy: Hierarchy,
    path: PathBuf,
}

/// Which kind of control group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Hierarchy {
    /// One hierarchy a controller; threads are moved as they like.
    V1,
    /// The one hierarchy of today, where a group has to be declared `threaded`.
    V2,
}

impl Hierarchy {
    /// The file that holds a group's threads, one a line; what is written to it is moved there.
    fn threads_file(self) -> &'static str {
        match self {
            Self::V1 => "tasks",
            Self::V2 => "cgroup.threads",
        }
    }
}

impl Group {
    fn make(&self) -> Result<(), ThrottleError> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => write_result(&self.path, made)?,
        }
        if let (Hierarchy::V2, Some(home)) = (self.hierarchy, self.path.parent()) {
            write(&self.path.join("cgroup.type"), "threaded")?;
            // Stays: others may have come to use it.
            write(&home.join("cgroup.subtree_control"), "+cpu")?;
        }
        Ok(())
    }

    fn fill(&self, threads: &[i32]) -> Result<(), ThrottleError> {
        self.make()?;
        let file = self.path.join(self.hierarchy.threads_file());
        threads.iter().try_for_each(|thread| write(&file, &thread.to_string()))
    }

    /// Limits all threads together, which is what the kernel can do; with several that is their mean share.
    fn limit(&self, percent: u8) -> Result<(), ThrottleError> {
        let threads = self.threads().len().max(1) as u64;
        let quota_us = (u64::from(percent) * threads * PERIOD_US / 100).max(QUOTA_US_MIN);
        let is_limited = percent < 100;
        match self.hierarchy {
            Hierarchy::V1 => {
                write(&self.path.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                let quota = if is_limited { quota_us.to_string() } else { "-1".to_owned() };
                write(&self.path.join("cpu.cfs_quota_us"), &quota)
            }
            Hierarchy::V2 => {
                let quota = if is_limited { quota_us.to_string() } else { "max".to_owned() };
                write(&self.path.join("cpu.max"), &format!("{quota} {PERIOD_US}"))
            }
        }
    }

    fn threads(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path.join(self.hierarchy.threads_file())).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn remove(&self) -> Result<(), ThrottleError> {
        let Some(home) = self.path.parent().filter(|_| self.path.exists()) else { return Ok(()) };
        // Should something keep the threads here, they are fast at least.
        let lifted = self.limit(100);
        for _ in 0..MOVES_MAX {
            let file = home.join(self.hierarchy.threads_file());
            // A thread that has ended meanwhile needs no move.
            self.threads().iter().for_each(|thread| drop(write(&file, thread)));
            if fs::remove_dir(&self.path).is_ok() {
                return Ok(());
            }
        }
        lifted.and_then(|()| Err(ThrottleError::NotEmpty(self.path.clone())))
    }
}

/// The control group, with the cpu controller, that a thread is in.
fn home_of(pid: i32, thread: i32) -> Result<(Hierarchy, PathBuf), ThrottleError> {
    let memberships = fs::read_to_string(format!("/proc/{pid}/task/{thread}/cgroup"))
        .map_err(|_| ThrottleError::NoThread { pid, thread })?;
    let candidates = candidates(&memberships).into_iter();
    let mut homes = candidates.filter(|(hierarchy, home)| match hierarchy {
        Hierarchy::V1 => home.join("cpu.cfs_quota_us").exists(),
        Hierarchy::V2 => has_cpu_controller(home),
    });
    homes.next().ok_or(ThrottleError::NoController(pid))
}

/// The places at which a thread's group with the cpu controller may be mounted, by `/proc/…/cgroup`.
fn candidates(memberships: &str) -> Vec<(Hierarchy, PathBuf)> {
    let place = |hierarchy, mount: &str, path: &str| {
        (hierarchy, Path::new(ROOT).join(mount).join(path.trim_start_matches('/')))
    };
    let of_line = |line: &str| -> Vec<(Hierarchy, PathBuf)> {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or("/"));
        match controllers {
            "" => ["", "unified"].map(|mount| place(Hierarchy::V2, mount, path)).to_vec(),
            _ if controllers.split(',').any(|controller| controller == "cpu") => {
                [controllers, "cpu"].map(|mount| place(Hierarchy::V1, mount, path)).to_vec()
            }
            _ => Vec::new(),
        }
    };
    memberships.lines().flat_map(of_line).collect()
}

fn has_cpu_controller(group: &Path) -> bool {
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    controllers.split_whitespace().any(|controller| controller == "cpu")
}

fn write_note(machine_dir: &Path, groups: &[&Group]) -> Result<(), ThrottleError> {
    let path = machine_dir.join(NOTE_FILE);
    let written = serde_json::to_vec(groups)
        .map_err(io::Error::from)
        .and_then(|bytes| whole_file::replace(&path, &bytes, Durability::Written));
    write_result(&path, written)
}

/// The groups of a note; only what can be ours, whatever the file says.
fn noted(path: &Path) -> Vec<Group> {
    let is_short = fs::metadata(path).is_ok_and(|it| it.len() <= NOTE_BYTES_MAX);
    let bytes = if is_short { fs::read(path).unwrap_or_default() } else { Vec::new() };
    let groups: Vec<Group> = serde_json::from_slice(&bytes).unwrap_or_default();
    let is_ours = |group: &Group| {
        let name = group.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let goes_up = group.path.components().any(|part| part == Component::ParentDir);
        group.path.starts_with(ROOT) && !goes_up && name.starts_with(GROUP_PREFIX)
    };
    groups.into_iter().filter(is_ours).collect()
}

fn write(path: &Path, text: &str) -> Result<(), ThrottleError> {
    // Control files can't be created, only written.
    let written = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    write_result(path, written)
}

fn write_result(path: &Path, result: io::Result<()>) -> Result<(), ThrottleError> {
    result.map_err(|source| ThrottleError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group whose control files are ordinary ones.
    fn pretended(hierarchy: Hierarchy, files: &[&str]) -> (tempfile::TempDir, Group) {
        let home = tempfile::tempdir().unwrap();
        let group = Group { hierarchy, path: home.path().join("godwit-throttle-7") };
        fs::create_dir(&group.path).unwrap();
        for file in files {
            fs::write(group.path.join(file), "").unwrap();
        }
        fs::write(home.path().join("cgroup.subtree_control"), "").unwrap();
        fs::write(home.path().join(hierarchy.threads_file()), "").unwrap();
        (home, group)
    }

    fn content(group: &Group, file: &str) -> String {
        fs::read_to_string(group.path.join(file)).unwrap()
    }

    #[test]
    fn on_v2_a_threaded_group_is_limited() {
        let (home, group) = pretended(Hierarchy::V2, &["cgroup.type", "cgroup.threads", "cpu.max"]);
        group.fill(&[1234]).unwrap();
        assert_eq!(content(&group, "cgroup.type"), "threaded");
        assert_eq!(fs::read_to_string(home.path().join("cgroup.subtree_control")).unwrap(), "+cpu");
        assert_eq!(content(&group, "cgroup.threads"), "1234");
        group.limit(25).unwrap();
        assert_eq!(content(&group, "cpu.max"), "5000 20000");
    }

    #[test]
    fn several_virtual_cpus_share_their_sum() {
        let (_home, group) = pretended(Hierarchy::V1, &["cpu.cfs_period_us", "cpu.cfs_quota_us", "tasks"]);
        fs::write(group.path.join("tasks"), "1\n2\n3\n4\n").unwrap();
        group.limit(5).unwrap();
        assert_eq!(content(&group, "cpu.cfs_quota_us"), "4000");
    }

    /// Ordinary files keep the directory from being removed, as a thread would that doesn't go.
    #[test]
    fn a_group_that_stays_is_not_limited_any_more() {
        let (home, group) = pretended(Hierarchy::V2, &["cgroup.threads", "cpu.max"]);
        fs::write(group.path.join("cgroup.threads"), "1234\n").unwrap();
        assert!(matches!(group.remove(), Err(ThrottleError::NotEmpty(_))));
        assert_eq!(content(&group, "cpu.max"), "max 20000");
        assert_eq!(fs::read_to_string(home.path().join("cgroup.threads")).unwrap(), "1234");
    }

    #[test]
    fn the_cpu_controller_is_found_in_every_layout() {
        let places = |memberships| -> Vec<_> {
            candidates(memberships).into_iter().map(|(_, path)| path.display().to_string()).collect()
        };
        assert_eq!(places("0::/a.slice/b"), ["/sys/fs/cgroup/a.slice/b", "/sys/fs/cgroup/unified/a.slice/b"]);
        let old = places("4:memory:/m\n3:cpu,cpuacct:/c\n2:cpuset:/s");
        assert_eq!(old, ["/sys/fs/cgroup/cpu,cpuacct/c", "/sys/fs/cgroup/cpu/c"]);
    }

    #[test]
    fn a_note_names_nothing_but_our_groups() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NOTE_FILE);
        let group = |path: &str| Group { hierarchy: Hierarchy::V2, path: path.into() };
        let ours = group("/sys/fs/cgroup/a/godwit-throttle-7");
        let others = [
            group("/sys/fs/cgroup/a"),
            group("/etc/godwit-throttle-7"),
            group("/sys/fs/cgroup/../../etc/godwit-throttle-7"),
        ];
        write_note(directory.path(), &[&ours, &others[0], &others[1], &others[2]]).unwrap();
        assert_eq!(noted(&path), [ours]);
        fs::write(&path, "no note").unwrap();
        assert_eq!(noted(&path), []);
        assert!(lift(directory.path()).unwrap() && !lift(directory.path()).unwrap());
    }

    #[test]
    fn what_is_no_thread_of_the_process_is_not_moved() {
        let pid = std::process::id().cast_signed();
        let directory = tempfile::tempdir().unwrap();
        let error = Throttle::begin(directory.path(), pid, &[1]).unwrap_err();
        assert!(matches!(error, ThrottleError::NoThread { thread: 1, .. }), "{error}");
        assert!(!directory.path().join(NOTE_FILE).exists());
    }
}
