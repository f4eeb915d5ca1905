//! A core for the guest alone, what everybody else used of the others, and what had nothing to do with it.
//!
//! Contenders differ in how much they compute. So that this doesn't show as a guest that has become slow, the threads
//! that make up the guest have the last core to themselves, at both hosts, and all else shares the others: whatever a
//! contender runs, the emulated link, and the clients. Where those are busy, the contender was limited by them and not by
//! the link. The guest is QEMU's threads of its processors and the first one, in which its timers and devices live.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use godwit_sim::lab::{Lab, Place};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use super::Span;

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// In which Linux tells processes' times, on every machine that godwit runs on.
const TICKS_PER_SECOND: u64 = 100;
/// How QEMU's `debug-threads` names those of the guest's processors.
const GUEST_THREAD: &str = "CPU ";

/// Which core is whose.
#[derive(Debug)]
pub(crate) struct Cores {
    guest: CpuSet,
    others: CpuSet,
    others_count: usize,
}

/// What a contender and the link used of the cores that aren't the guest's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Busy {
    /// The emulated link, share of one core.
    pub(crate) emulator: f64,
    /// Everything together, share of all those cores.
    pub(crate) all: f64,
    /// Whatever has nothing to do with the bench, share of all cores, the guest's included.
    pub(crate) foreign: f64,
}

impl Cores {
    /// Leaves the last core to guests: what this process starts from now on keeps to the others. `None`: there is one only.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn reserve() -> Result<Option<Cores>> {
        let allowed = sched_getaffinity(Pid::this()).context("cannot ask for the cores")?;
        let numbers: Vec<usize> =
            (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false)).collect();
        let Some((last, rest)) = numbers.split_last().filter(|(_, rest)| !rest.is_empty()) else {
            return Ok(None);
        };
        let (guest, others) = (set_of(&[*last])?, set_of(rest)?);
        sched_setaffinity(Pid::this(), &others).context("cannot leave a core to the guest")?;
        Ok(Some(Cores { guest, others, others_count: rest.len() }))
    }

    /// Runs `work` while guests are kept on their core; afterwards tells what was used during a span of it.
    pub(crate) fn during<T: Send>(&self, lab: &Lab, work: impl FnOnce() -> T) -> (T, Usage) {
        let (ended, usage) = (AtomicBool::new(false), Mutex::new(Usage::default()));
        let done = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    self.look(lab, &mut usage.lock().unwrap_or_else(PoisonError::into_inner));
                    std::thread::sleep(LOOK_EVERY);
                }
            });
            let _ends = EndsOnDrop(&ended);
            work()
        });
        (done, usage.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Share of the cores that aren't the guest's.
    pub(crate) fn busy(&self, usage: &Usage, span: Span) -> Option<Busy> {
        usage.busy(span, self.others_count)
    }

    fn look(&self, lab: &Lab, usage: &mut Usage) {
        let processes = [Place::A, Place::B].into_iter().flat_map(|place| lab.processes(place));
        for process in processes.chain([Pid::this()]) {
            let threads = threads_of(process);
            let runs_guest = threads.iter().any(Thread::is_processor);
            for thread in threads {
                let is_guest = thread.is_processor() || runs_guest && thread.id == process;
                // It may have ended meanwhile. Threads inherit their core from the one that starts them.
                let _ = sched_setaffinity(thread.id, if is_guest { &self.guest } else { &self.others });
                let threads = if is_guest { &mut usage.guests } else { &mut usage.others };
                threads.insert(thread.id, thread.ticks);
            }
        }
        let [guests, others] = [&usage.guests, &usage.others].map(|threads| ticks(threads.values().sum()));
        let machine = std::fs::read_to_string("/proc/stat").ok().and_then(|stat| parse_machine_stat(&stat));
        usage.samples.push(Sample {
            at: SystemTime::now(),
            guests,
            others,
            emulator: lab.relay_statistics().cpu,
            machine: ticks(machine.unwrap_or(0)),
        });
    }
}

/// Ends the watching also when what is watched panics.
struct EndsOnDrop<'a>(&'a AtomicBool);

impl Drop for EndsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// CPU time by when it had been used.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// Ticks by thread, as last seen: some end.
    guests: HashMap<Pid, u64>,
    others: HashMap<Pid, u64>,
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: SystemTime,
    guests: Duration,
    /// The emulated link included.
    others: Duration,
    emulator: Duration,
    /// Everything that ran on the machine.
    machine: Duration,
}

impl Usage {
    fn busy(&self, span: Span, cores: usize) -> Option<Busy> {
        let within = |sample: &&Sample| (span.started..=span.ended).contains(&sample.at);
        let first = self.samples.iter().find(within)?;
        let last = self.samples.iter().rfind(within)?;
        let elapsed = last.at.duration_since(first.at).unwrap_or_default().as_secs_f64();
        let share =
            |used: fn(&Sample) -> Duration| used(last).saturating_sub(used(first)).as_secs_f64() / elapsed;
        let (emulator, others) = (share(|sample| sample.emulator), share(|sample| sample.others));
        let foreign = share(|sample| sample.machine) - share(|sample| sample.guests) - others;
        // Clocks of different grain may disagree by a little.
        let foreign = foreign.max(0.0) / (cores + 1) as f64;
        (elapsed > 0.0).then(|| Busy { emulator, all: others / cores as f64, foreign })
    }
}

struct Thread {
    id: Pid,
    name: String,
    ticks: u64,
}

impl Thread {
    /// Whether it runs one of the guest's processors.
    fn is_processor(&self) -> bool {
        self.name.starts_with(GUEST_THREAD)
    }
}

/// The threads of a process; none if it has ended.
fn threads_of(process: Pid) -> Vec<Thread> {
    let entries = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| thread(entry.path())).collect()
}

fn thread(directory: PathBuf) -> Option<Thread> {
    let id = directory.file_name()?.to_str()?.parse().ok()?;
    let (name, ticks) = parse_stat(&std::fs::read_to_string(directory.join("stat")).ok()?)?;
    Some(Thread { id: Pid::from_raw(id), name, ticks })
}

/// Reads a thread's name and its ticks in user and system mode from `/proc/PID/task/TID/stat` (proc(5)).
fn parse_stat(stat: &str) -> Option<(String, u64)> {
    let (_, named) = stat.split_once('(')?;
    let (name, figures) = named.rsplit_once(") ")?;
    let mut times = figures.split(' ').skip(11).map_while(|figure| figure.parse::<u64>().ok());
    Some((name.to_owned(), times.next()? + times.next()?))
}

/// Reads the ticks that all cores together were busy from `/proc/stat` (proc(5)): all but idle and waiting for disks.
fn parse_machine_stat(stat: &str) -> Option<u64> {
    let figures = stat.strip_prefix("cpu ")?.lines().next()?.split_whitespace();
    let figures: Vec<u64> = figures.map_while(|figure| figure.parse().ok()).collect();
    let [user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen, ..] = figures[..] else {
        return None;
    };
    Some(user + nice + system + interrupts + soft_interrupts + stolen)
}

fn ticks(count: u64) -> Duration {
    Duration::from_millis(count * 1000 / TICKS_PER_SECOND)
}

fn set_of(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    cores.iter().try_for_each(|core| set.set(*core)).context("a core has too high a number")?;
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_read_whatever_its_name() {
        let stat = "71 (CPU 0/TCG) S 1 71 71 0 -1 4194560 9 0 0 0 250 31 0 0 20 0 4 0 81 1 2";
        assert_eq!(parse_stat(stat), Some(("CPU 0/TCG".into(), 281)));
        assert_eq!(parse_stat(&stat.replace("CPU 0", "a) b (")).unwrap().0, "a) b (/TCG");
        assert_eq!(parse_stat("71 (a) S 1"), None);
    }

    #[test]
    fn a_machine_that_waits_is_not_busy() {
        let stat = "cpu  100 20 30 9000 900 4 5 6 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(parse_machine_stat(stat), Some(165));
        assert_eq!(parse_machine_stat("cpu  1 2 3\n"), None);
    }

    #[test]
    fn only_what_was_used_during_the_span_counts() {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let sample = |ms, others, emulator, machine| Sample {
            at: at(ms),
            guests: Duration::from_millis(ms / 10),
            others: Duration::from_millis(others),
            emulator: Duration::from_millis(emulator),
            machine: Duration::from_millis(machine),
        };
        let samples = vec![
            sample(0, 0, 0, 0),
            sample(1000, 1000, 100, 1000),
            sample(2000, 1800, 300, 2200),
            sample(9000, 9900, 900, 9900),
        ];
        let usage = Usage { samples, ..Usage::default() };
        let busy = usage.busy(Span { started: at(900), ended: at(2100) }, 2).unwrap();
        let shares = [busy.emulator, busy.all, busy.foreign];
        assert!(
            shares.iter().zip([0.2, 0.4, 0.1]).all(|(is, should)| (is - should).abs() < 1e-9),
            "{busy:?}"
        );
        assert_eq!(usage.busy(Span { started: at(3000), ended: at(4000) }, 2), None);
    }
}
