//! Faults: waiting for their moment, doing them, undoing them.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{lab::Place, qmp::Qmp};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use super::{
    fault::{Fault, Side, Victim},
    hosts::MACHINE,
    plan::{Moment, Plan, Sign, Strike},
    stage::Stage,
};

/// How often a moment is looked for.
const LOOK_EVERY: Duration = Duration::from_micros(300);
/// A moment that hasn't come by then doesn't come.
const MOMENT_LIMIT: Duration = Duration::from_secs(25);

/// A victim that isn't there by then isn't coming.
const VICTIM_LIMIT: Duration = Duration::from_secs(2);
/// Where a machine's record is in one of these states, its operator may continue it.
const CONTINUABLE: [&str; 3] = ["owner", "mine", "offered"];

/// A migration that faults strike.
pub(super) struct Flight<'a> {
    pub(super) stage: &'a Stage,
    pub(super) plan: &'a Plan,
    /// Migrations that are older.
    pub(super) known: BTreeSet<String>,
    pub(super) command_line: Pid,
    pub(super) began: Instant,
    /// The command line has ended by itself.
    pub(super) is_over: AtomicBool,
    pub(super) struck: Mutex<Vec<Struck>>,
}

/// What a fault did.
#[derive(Debug, Clone)]
pub(super) struct Struck {
    pub(super) fault: Fault,
    /// One line.
    pub(super) what: String,
    /// Whether there was something to strike.
    pub(super) hit: bool,
    /// Whether its moment came, while the migration was under way.
    pub(super) in_flight: bool,
    /// When it was over.
    pub(super) over: Instant,
    /// The records of source and target just before.
    pub(super) records: [Option<String>; 2],
}

impl Flight<'_> {
    /// Waits for the moment, strikes, and undoes what can be undone.
    pub(super) fn strike(&self, strike: Strike) {
        let met = self.await_moment(strike.moment);
        let at = self.began.elapsed();
        let records = [Side::Source, Side::Target].map(|side| self.stage.host(self.place(side)).record());
        let result = self.carry_out(strike);
        let said = match &result {
            Ok(()) => String::new(),
            Err(error) => format!(" ({error:#})"),
        };
        let late = if met { "" } else { ", late" };
        let [source, target] = records.each_ref().map(|record| record.as_deref().unwrap_or("none"));
        let what = format!("{strike}: at {} ms{late}, records {source}/{target}{said}", at.as_millis());
        let struck = Struck {
            fault: strike.fault,
            what,
            hit: result.is_ok(),
            in_flight: met,
            over: Instant::now(),
            records,
        };
        self.struck.lock().unwrap_or_else(PoisonError::into_inner).push(struck);
    }

    /// The migration's id, as soon as a host knows it.
    pub(super) fn id(&self, side: Side) -> Option<String> {
        let ids = self.stage.host(self.place(side)).migration_ids();
        ids.into_iter().find(|id| !self.known.contains(id))
    }

    fn place(&self, side: Side) -> Place {
        match side {
            Side::Source => self.plan.from,
            Side::Target => self.plan.to(),
        }
    }

    /// Waits; false if the moment didn't come.
    fn await_moment(&self, moment: Moment) -> bool {
        let (side, sign, then) = match moment {
            Moment::Elapsed(at) => {
                std::thread::sleep(at.saturating_sub(self.began.elapsed()));
                return !self.is_over.load(Ordering::Relaxed);
            }
            Moment::After(side, sign, then) => (side, sign, then),
        };
        let record_before = self.stage.host(self.place(side)).record();
        while !self.has_come(side, sign, record_before.as_deref()) {
            if self.is_over.load(Ordering::Relaxed) || self.began.elapsed() > MOMENT_LIMIT {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        std::thread::sleep(then);
        true
    }

    fn has_come(&self, side: Side, sign: Sign, before: Option<&str>) -> bool {
        let host = self.stage.host(self.place(side));
        match sign {
            Sign::Record(state) => {
                let record = host.record();
                record.as_deref() == Some(state) && before != Some(state)
            }
            Sign::Phase(phase) => {
                let Some(id) = self.id(side) else { return false };
                let events = host.migrations().join(id).join("events.ndjson");
                let events = std::fs::read_to_string(events).unwrap_or_default();
                events.contains(&format!("\"phase\":\"{phase}\""))
            }
        }
    }

    fn carry_out(&self, strike: Strike) -> Result<()> {
        let lab = &self.stage.lab;
        let [source, target] = [Side::Source, Side::Target].map(|side| self.stage.host(self.place(side)));
        let rest = || std::thread::sleep(strike.lasts);
        match strike.fault {
            Fault::LinkCut | Fault::LinkCutLong => {
                lab.cut();
                rest();
                lab.restore();
            }
            Fault::FullDiskSource | Fault::FullDiskTarget => {
                let host = if strike.fault == Fault::FullDiskSource { source } else { target };
                host.fill_disk(true);
                rest();
                host.fill_disk(false);
            }
            // It was taken before the migration began, and is given back when that is over.
            Fault::NoMemoryTarget => {}
            Fault::Cancel => drop(source.godwit(&["cancel", MACHINE])),
            Fault::PowerOff => self.tell_guest("power off")?,
            Fault::Panic => self.tell_guest("panic")?,
            Fault::Reset => drop(self.operator()?.execute("system_reset", json!({}))?),
            Fault::OperatorStop => self.pause()?,
            Fault::OperatorStopCont => {
                self.pause()?;
                rest();
                self.continue_paused()?;
            }
            _ => self.signal(strike)?,
        }
        Ok(())
    }

    fn tell_guest(&self, order: &str) -> Result<()> {
        let guest = self.stage.guest.as_ref().context("there is no guest")?;
        Ok(guest.progress.tell(order)?)
    }

    /// The operator's monitor of the source's QEMU, or of the target's if the machine has left.
    fn operator(&self) -> Result<Qmp> {
        let is_at_target = self.stage.watcher(self.plan.to()).is_running();
        self.stage.operate(if is_at_target { self.plan.to() } else { self.plan.from })
    }

    /// Pauses the guest, unless it is stopped for the switch-over already: then the operator's word means nothing to QEMU.
    fn pause(&self) -> Result<()> {
        let mut monitor = self.operator()?;
        monitor.execute("stop", json!({}))?;
        let status = monitor.execute("query-status", json!({}))?;
        if status["status"] != "paused" {
            bail!("the guest is {} already", status["status"]);
        }
        Ok(())
    }

    /// Lets a guest go on that its operator paused. At neither host may he do so while the machine is between them, when
    /// QEMU would obey and nobody could prevent it.
    fn continue_paused(&self) -> Result<()> {
        for place in [self.plan.from, self.plan.to()] {
            if !self.stage.watcher(place).seen().is_there {
                continue;
            }
            let mut monitor = self.stage.operate(place)?;
            if monitor.execute("query-status", json!({}))?["status"] == "paused"
                && self.stage.host(place).record().is_none_or(|record| CONTINUABLE.contains(&record.as_str()))
            {
                monitor.execute("cont", json!({}))?;
            }
        }
        Ok(())
    }

    /// Kills or stops a process, and starts or continues it.
    fn signal(&self, strike: Strike) -> Result<()> {
        let victim = strike.fault.victim().context("this fault has no victim")?;
        let process = self.await_process(victim).context("there is no such process")?;
        if strike.fault.kills() {
            match victim {
                Victim::Agent(side) => {
                    let host = self.stage.host(self.place(side));
                    host.kill_agent();
                    std::thread::sleep(strike.lasts);
                    host.keep_agent(&self.stage.lab)?;
                }
                _ => kill(process, Signal::SIGKILL)?,
            }
            return Ok(());
        }
        kill(process, Signal::SIGSTOP)?;
        std::thread::sleep(strike.lasts);
        // It may have been killed meanwhile, and then there is nothing to continue.
        let _ = kill(process, Signal::SIGCONT);
        Ok(())
    }

    /// The victim; one that is about to be started is waited for.
    fn await_process(&self, victim: Victim) -> Option<Pid> {
        let began = Instant::now();
        loop {
            let process = self.process_of(victim);
            let is_late = self.is_over.load(Ordering::Relaxed) || began.elapsed() > VICTIM_LIMIT;
            if process.is_some() || is_late {
                return process;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn process_of(&self, victim: Victim) -> Option<Pid> {
        match victim {
            Victim::CommandLine if self.is_over.load(Ordering::Relaxed) => None,
            Victim::CommandLine => Some(self.command_line),
            Victim::Agent(side) => self.stage.host(self.place(side)).agent_process(),
            Victim::Worker(side) => {
                let process = self.stage.host(self.place(side)).worker(&self.id(side)?);
                process.filter(|process| self.is_at(*process, side))
            }
            Victim::Qemu(side) => {
                self.stage.host(self.place(side)).qemu().filter(|process| self.is_at(*process, side))
            }
        }
    }

    /// Whether a process is one of this host: an id that was written down may be another's by now.
    fn is_at(&self, process: Pid, side: Side) -> bool {
        let inode = |path: PathBuf| std::fs::metadata(path).map(|metadata| metadata.ino()).ok();
        let namespace = inode(self.stage.lab.namespace(self.place(side)).path());
        namespace.is_some() && namespace == inode(format!("/proc/{process}/ns/net").into())
    }
}
