//! Processor time of all threads of both hosts, by when it had been used.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use godwit_sim::lab::{Lab, Place};
use nix::unistd::Pid;

use crate::contest::Span;

/// Workers stay for 50 ms when they have written their report, so that none is missed at its end.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often processes that have come are looked for, in looks: it costs as much as many threads.
const LOOKS_FOR_PROCESSES: u32 = 10;
/// What threads do for so long after the guest's arrival still is the migration's.
const AFTERWARDS: Duration = Duration::from_millis(500);

/// What a process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Program {
    Worker,
    Agent,
    /// The look at the guest's memory beforehand.
    Sample,
    Qemu,
}

/// Processor time that a thread used, or several of the same name.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Used {
    pub(super) host: Place,
    pub(super) program: Program,
    /// Its name; the first thread of a process has that of the process.
    pub(super) thread: String,
    pub(super) cpu: Duration,
}

/// All that was seen.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    processes: BTreeMap<Pid, (Place, Option<Program>)>,
    threads: BTreeMap<Pid, Thread>,
}

#[derive(Debug)]
struct Thread {
    host: Place,
    program: Program,
    name: String,
    /// Totals from when on they were such.
    totals: Vec<(SystemTime, Duration)>,
}

impl Sampler {
    /// Runs `work` and watches meanwhile.
    pub(super) fn during<T>(lab: &Lab, work: impl FnOnce() -> T) -> (T, Sampler) {
        let (ended, sampler) = (AtomicBool::new(false), Mutex::new(Sampler::default()));
        let done = thread::scope(|scope| {
            scope.spawn(|| {
                let mut sampler = sampler.lock().unwrap_or_else(PoisonError::into_inner);
                for look in 0u32.. {
                    if ended.load(Ordering::Relaxed) {
                        return;
                    }
                    if look.is_multiple_of(LOOKS_FOR_PROCESSES) {
                        sampler.find_processes(lab);
                    }
                    sampler.look();
                    thread::sleep(LOOK_EVERY);
                }
            });
            let _ends = EndsOnDrop(&ended);
            work()
        });
        (done, sampler.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// What each thread used from the beginning of a migration until shortly after the guest's arrival.
    pub(super) fn used(&self, span: Span) -> Vec<Used> {
        let used = |thread: &Thread| Used {
            host: thread.host,
            program: thread.program,
            thread: thread.name.clone(),
            cpu: thread.total_at(span.ended + AFTERWARDS).saturating_sub(thread.total_at(span.started)),
        };
        self.threads.values().map(used).collect()
    }

    fn find_processes(&mut self, lab: &Lab) {
        for host in [Place::A, Place::B] {
            for process in lab.processes(host) {
                self.processes.entry(process).or_insert((host, None));
            }
        }
    }

    fn look(&mut self) {
        let now = SystemTime::now();
        for (process, (host, program)) in &mut self.processes {
            // One that is just being started is its starter yet.
            *program = program.or_else(|| program_of(&fs::read(format!("/proc/{process}/cmdline")).ok()?));
            let Some(program) = *program else { continue };
            for (id, name, total) in threads_of(*process) {
                let thread = self.threads.entry(id).or_insert_with(|| Thread {
                    host: *host,
                    program,
                    name: String::new(),
                    totals: Vec::new(),
                });
                // Threads are named when they have begun.
                thread.name = name;
                if thread.totals.last().is_none_or(|(_, last)| *last != total) {
                    thread.totals.push((now, total));
                }
            }
        }
    }
}

impl Thread {
    fn total_at(&self, at: SystemTime) -> Duration {
        let later = self.totals.partition_point(|(since, _)| *since <= at);
        later.checked_sub(1).map_or(Duration::ZERO, |last| self.totals[last].1)
    }
}

/// Ends the watching also when what is watched panics.
struct EndsOnDrop<'a>(&'a AtomicBool);

impl Drop for EndsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads what a process is for from its arguments (proc(5)). `None`: something else, or not started yet.
fn program_of(command_line: &[u8]) -> Option<Program> {
    let mut words = command_line.split(|byte| *byte == 0);
    let name = words.next()?.rsplit(|byte| *byte == b'/').next()?;
    match (name, words.next()) {
        (name, _) if name.starts_with(b"qemu-system") => Some(Program::Qemu),
        (_, Some(b"worker")) => Some(Program::Worker),
        (_, Some(b"agent")) => Some(Program::Agent),
        (_, Some(b"sample")) => Some(Program::Sample),
        _ => None,
    }
}

/// Threads by id, their names, and the time they have used; none if the process has ended.
fn threads_of(process: Pid) -> impl Iterator<Item = (Pid, String, Duration)> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let directory = entry.path();
        let id = directory.file_name()?.to_str()?.parse().ok()?;
        let name = fs::read_to_string(directory.join("comm")).ok()?;
        let total = run_time(&fs::read_to_string(directory.join("schedstat")).ok()?)?;
        Some((Pid::from_raw(id), name.trim().to_owned(), total))
    })
}

/// Reads the time spent running, the first figure of `schedstat` (Documentation/scheduler/sched-stats).
fn run_time(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds)
    }

    #[test]
    fn only_what_was_used_during_the_migration_counts() {
        let ms = Duration::from_millis;
        let thread = |totals: &[(u64, u64)]| Thread {
            host: Place::A,
            program: Program::Agent,
            name: "godwit".into(),
            totals: totals.iter().map(|(since, total)| (at(*since), ms(*total))).collect(),
        };
        let old = thread(&[(100, 40), (1_100, 90), (3_000, 400)]);
        let new = thread(&[(1_200, 10), (1_400, 70)]);
        let threads =
            [old, new].into_iter().zip(1..).map(|(thread, id)| (Pid::from_raw(id), thread)).collect();
        let sampler = Sampler { threads, ..Sampler::default() };
        let used = sampler.used(Span { started: at(1_000), ended: at(1_500) });
        assert_eq!(used.iter().map(|used| used.cpu).collect::<Vec<_>>(), [ms(50), ms(70)]);
    }

    #[test]
    fn programs_are_told_by_their_arguments() {
        assert_eq!(program_of(b"/usr/bin/qemu-system-x86_64\0-m\x00512\0"), Some(Program::Qemu));
        assert_eq!(program_of(b"godwit\0worker\0/state/m-1\0"), Some(Program::Worker));
        assert_eq!(program_of(b"/tmp/godwit-rel\0agent\0--config\0"), Some(Program::Agent));
        assert_eq!(program_of(b"/bin/sh\0/tmp/a/qemu\0-m\0"), None);
        assert_eq!(program_of(b""), None);
    }

    #[test]
    fn a_thread_s_time_is_read() {
        assert_eq!(run_time("1164042 602967 10\n"), Some(Duration::from_nanos(1_164_042)));
        assert_eq!(run_time(""), None);
        let own = threads_of(Pid::this());
        assert!(own.into_iter().any(|(id, ..)| id == Pid::this()));
    }
}
