//! A guest that is moved while things fail: the link is cut, an agent is killed, then a worker, and what comes of it is
//! told as it happens.
//!
//! 1. From a to b: in pre-copy the link is cut for 20 s; in the final phase the target's agent is killed (SIGKILL), and
//!    started again a second later, as systemd would.
//! 2. Back to a: in the final phase, when the right to run the guest has just left, the target's worker is killed. The
//!    agents finish the migration or roll it back.
//!
//! At the end exactly one copy runs, its counter never went back, and its memory is what it wrote.

use std::{
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{beats::BeatRecorder, lab::Place};
use serde_json::Value;

use self::{
    guest::Guest,
    migration::{Migration, unix_ms},
};
use super::{
    Request,
    claims::Claims,
    screen::{Screen, duration, grouped, megabytes},
};
use crate::contest::{
    GUEST_MEMORY_MB, Stage,
    hosts::{Host, Hosts, MACHINE},
};

mod guest;
mod migration;

/// In a report: what follows is the agent's doing.
const BY_AGENT: &str = "; the agent: ";
/// How long the guest's pace is watched before anything happens to it.
const BEFORE: Duration = Duration::from_secs(3);
/// How long after the beginning of pre-copy the link is cut.
const CUT_AFTER: Duration = Duration::from_secs(4);
const CUT_FOR: Duration = Duration::from_secs(20);
/// systemd's `RestartSec` in the unit that godwit comes with.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// How often everybody gives account of themselves.
const ACCOUNT_EVERY: Duration = Duration::from_secs(5);
/// The final phase lasts some tens of milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(1);
const PHASE_LIMIT: Duration = Duration::from_secs(90);
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// The longest silence in the guest's beat while it runs.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// What may be sent again after a cut: what was on its way, not what had arrived.
const REPEATED_SHARE_MAX: f64 = 0.05;

/// Shows what happens when things fail.
///
/// # Errors
/// When something is missing, or a claim doesn't hold.
pub(super) fn run(stage: &Stage, request: &Request) -> Result<()> {
    let mut show = Show::begin(stage)?;
    let played = show.play();
    let concluded = show.claims.conclude(played, &show.screen, request.json.as_deref());
    show.print_recovery()?;
    concluded
}

struct Show<'a> {
    stage: &'a Stage<'a>,
    screen: Screen,
    claims: Claims,
    hosts: Hosts,
    guest: Guest,
    told: Instant,
    /// Migrations that completed.
    completed: usize,
}

/// A process that was killed, and when.
struct Struck {
    before_ms: u64,
    after_ms: u64,
}

impl<'a> Show<'a> {
    /// Boots the guest at host a and watches it for a while.
    fn begin(stage: &'a Stage) -> Result<Show<'a>> {
        let screen = Screen::begin();
        screen.demo(&format!(
            "two hosts, a and b, each with an agent; a guest of {GUEST_MEMORY_MB} MB boots at a"
        ));
        let hosts = Hosts::start(stage)?;
        let recorder = BeatRecorder::start(stage.lab)?;
        hosts.boot(stage, &stage.command_line(recorder.address()))?;
        let guest = Guest::meet(stage.lab, recorder)?;
        screen.demo("it has booted; a client outside both hosts follows its counter and its beat of 10 ms");
        sleep(BEFORE);
        let (claims, told) = (Claims::default(), Instant::now());
        let mut show = Show { stage, screen, claims, hosts, guest, told, completed: 0 };
        show.account(None);
        Ok(show)
    }

    fn play(&mut self) -> Result<()> {
        self.cut_link_and_killed_agent()?;
        self.killed_worker()?;
        self.ending()
    }

    /// The first migration.
    fn cut_link_and_killed_agent(&mut self) -> Result<()> {
        let mut migration = self.migrate(Place::A, Place::B)?;
        self.await_phase(&mut migration, "pre_copy")?;
        self.follow(&mut migration, CUT_AFTER, |_| false)?;
        self.cut_link(&mut migration)?;
        self.await_phase(&mut migration, "switchover")?;
        let before = self.now_ms();
        let agent = self.hosts.b.kill_agent()?;
        let struck = Struck { before_ms: before, after_ms: self.now_ms() };
        let killed = Instant::now();
        self.screen.demo(&format!("kill -9 the agent of b, the target (process {agent})"));
        self.follow(&mut migration, RESTART_AFTER, |migration| migration.is_over)?;
        self.screen.note("a worker at each host carries the migration; agents start workers and follow them");
        sleep(RESTART_AFTER.saturating_sub(killed.elapsed()));
        self.hosts.b.start_agent(self.stage.lab, &self.hosts.program)?;
        self.screen.demo("the agent of b is started again, as systemd would");
        let report = self.await_report(&mut migration, Place::A)?;
        self.hosts.await_agent(&self.hosts.b)?;
        self.tell_what_agent_finds(&migration)?;
        self.claim_struck("the agent died in the final phase", &migration, &struck);
        self.claim_first(&report);
        self.completed += usize::from(report["outcome"] == "completed");
        self.account(None);
        Ok(())
    }

    fn cut_link(&mut self, migration: &mut Migration) -> Result<()> {
        self.account(Some(migration));
        self.stage.lab.cut();
        let (cut_at, before) = (SystemTime::now(), self.guest.writes());
        self.screen.demo(&format!("the link between a and b is cut, for {}", duration(CUT_FOR)));
        self.follow(migration, CUT_FOR, |_| false)?;
        self.stage.lab.restore();
        self.screen.demo("the link is whole again");
        self.guest.look();
        let silence = self.guest.history().longest_silence(cut_at, SystemTime::now());
        let writes = self.guest.writes().saturating_sub(before);
        let value = format!("{} writes; longest silence {}", grouped(writes), duration(silence));
        self.claims.add(
            "the guest ran on while the link was cut",
            writes > 0 && silence < SILENCE_MAX,
            value,
        );
        Ok(())
    }

    /// The second migration.
    fn killed_worker(&mut self) -> Result<()> {
        let mut migration = self.migrate(Place::B, Place::A)?;
        self.await_phase(&mut migration, "handed_over")?;
        let (before, from) = (self.now_ms(), SystemTime::now());
        let worker = self.hosts.a.kill_worker(&migration.id)?;
        let struck = Struck { before_ms: before, after_ms: self.now_ms() };
        self.screen.demo(&format!("kill -9 the worker at a, the target (process {worker})"));
        self.await_report(&mut migration, Place::B)?;
        let holder = self.await_one_copy();
        self.tell_what_agent_did(&migration)?;
        match holder {
            Ok(Place::A) => self.screen.note("all of the guest had arrived, so it runs at a"),
            Ok(_) => self.screen.note("the guest hadn't run at a, so it went on at b at once"),
            Err(_) => {}
        }
        self.account(None);
        self.claim_struck("the worker died in the final phase", &migration, &struck);
        let silence = duration(self.guest.history().longest_silence(from, SystemTime::now()));
        let value = holder.map(|holder| {
            let came = if holder == Place::A { "finished" } else { "rolled back" };
            self.completed += usize::from(holder == Place::A);
            format!("{came}: it runs at {}; longest silence {silence}", holder.name())
        });
        self.claims
            .add_shown("the agents settled it by themselves", value.map_err(|error| format!("{error:#}")));
        Ok(())
    }

    /// What holds at the end.
    fn ending(&mut self) -> Result<()> {
        self.watch(BEFORE);
        self.screen.demo("the guest compares its memory with all that it ever wrote");
        let checked = self.guest.check().map_err(|error| format!("{error:#}"));
        if let Ok(checked) = &checked {
            self.screen.guest(checked);
        }
        self.guest.look();
        let holder = self.await_one_copy().map(|holder| format!("at {}", holder.name()));
        self.claims.add_shown("exactly one copy runs", holder.map_err(|error| format!("{error:#}")));
        self.claim_counter();
        self.claim_beats();
        self.claims.add_shown("its memory is what it wrote", checked);
        let open = [self.left_open(&self.hosts.a), self.left_open(&self.hosts.b)];
        let [at_a, at_b] = open.map(|found| found.unwrap_or_else(|error| Err(format!("{error:#}"))));
        self.claims.add_shown("nothing was left open at a", at_a);
        self.claims.add_shown("nothing was left open at b", at_b);
        Ok(())
    }

    /// Has a host's agent look; what it had to do, if it wasn't nothing.
    fn left_open(&self, host: &Host) -> Result<Result<String, String>> {
        let answer = self.hosts.ask(host, &["recover"])?;
        let machines = answer["machines"].as_array().context("recover tells of no machines")?;
        let is_open = |it: &&Value| it["state"] != "settled" || it["did"] != "nothing";
        Ok(match machines.iter().find(is_open) {
            None => Ok("settled; nothing was to be done".to_owned()),
            Some(open) => {
                Err(format!("{}: {}; {}", text(&open["state"]), text(&open["found"]), text(&open["did"])))
            }
        })
    }

    fn claim_counter(&mut self) {
        let counter = self.guest.history().counter().map(|(before, after)| {
            format!("{} before, {} after, over one TCP connection", grouped(before), grouped(after))
        });
        self.claims.add_shown("its counter never went back", counter);
    }

    /// Beats come in order, and from another host only after a migration that completed.
    fn claim_beats(&mut self) {
        let beats = self.guest.history().beats().and_then(|(beats, moves)| {
            let value = format!("{} beats; changes of host: {moves}", grouped(beats as u64));
            if moves == self.completed { Ok(value) } else { Err(value) }
        });
        self.claims.add_shown("no beat came twice, late, or from two hosts", beats);
    }

    /// What an operator sees who asks.
    fn print_recovery(&self) -> Result<()> {
        for host in [&self.hosts.a, &self.hosts.b] {
            println!("\n{}# godwit recover", host.place.name());
            let said = self.hosts.command(host).arg("recover").output()?;
            print!("{}", String::from_utf8_lossy(&[said.stdout, said.stderr].concat()));
        }
        Ok(())
    }

    fn claim_first(&mut self, report: &Value) {
        let total = Duration::from_millis(report["total_ms"].as_u64().unwrap_or(0));
        let pause = report["downtime_ms"].as_f64();
        let value = match pause {
            Some(pause) => format!("after {}, with a pause of {pause:.1} ms", duration(total)),
            None => format!("{}: {}", text(&report["outcome"]), text(&report["detail"])),
        };
        self.claims.add(
            "the first migration completed all the same",
            report["outcome"] == "completed",
            value,
        );
        let [repeated, sent] = ["repeated_bytes", "wire_bytes"].map(|key| report[key].as_u64());
        let (holds, value) = match (repeated, sent) {
            (Some(repeated), Some(sent)) => (
                (repeated as f64) < REPEATED_SHARE_MAX * sent as f64,
                format!("{} of {}", megabytes(repeated), megabytes(sent)),
            ),
            _ => (false, "unknown".to_owned()),
        };
        self.claims.add("what had arrived wasn't sent again", holds, value);
    }

    /// The kill came after the guest was stopped, and before the migration was over.
    fn claim_struck(&mut self, claim: &'static str, migration: &Migration, struck: &Struck) {
        let stopped = migration.began("switchover").unwrap_or(u64::MAX);
        let over = migration.began("done").unwrap_or(u64::MAX);
        let holds = stopped <= struck.before_ms && struck.after_ms < over;
        let after = struck.after_ms.saturating_sub(stopped);
        let value = match over {
            u64::MAX => format!("{after} ms after the stop"),
            over => {
                let before = over.saturating_sub(struck.after_ms);
                format!("{after} ms after the stop, {before} ms before the end")
            }
        };
        self.claims.add(claim, holds, value);
    }

    fn tell_what_agent_finds(&self, migration: &Migration) -> Result<()> {
        let machine = self.hosts.ask(&self.hosts.b, &["vm", "show", MACHINE])?;
        let report = self.hosts.ask(&self.hosts.b, &["status", &migration.id])?["report"].clone();
        let (state, outcome) = (text(&machine["state"]), text(&report["outcome"]));
        self.screen.godwit(&format!(
            "agent of b, back: {MACHINE} is {state}, at {}; the migration is {outcome}",
            text(&machine["at"])
        ));
        Ok(())
    }

    /// What the target's agent says that it did in its dead worker's stead.
    fn tell_what_agent_did(&self, migration: &Migration) -> Result<()> {
        let report = self.hosts.ask(&self.hosts.a, &["status", &migration.id])?["report"].clone();
        let detail = text(&report["detail"]);
        let did = detail.split_once(BY_AGENT).map_or(detail, |(_, did)| did);
        self.screen.godwit(&format!("agent of a, in its dead worker's stead: {did}"));
        Ok(())
    }

    fn migrate(&mut self, from: Place, to: Place) -> Result<Migration> {
        self.screen.demo(&format!("godwit migrate {MACHINE} --to {}, at {}", to.name(), from.name()));
        let host = host(&self.hosts, from);
        let mut arguments = vec!["migrate", MACHINE, "--detach", "--to", to.name()];
        arguments.extend(self.hosts.options.iter().map(String::as_str));
        let answer = self.hosts.ask(host, &arguments)?;
        let id = answer["id"].as_str().context("the migration has no id")?.to_owned();
        let directory = host.migration(&id);
        Ok(Migration::new(id, directory))
    }

    fn await_phase(&mut self, migration: &mut Migration, phase: &str) -> Result<()> {
        self.follow(migration, PHASE_LIMIT, |migration| {
            migration.began(phase).is_some() || migration.is_over
        })?;
        if migration.began(phase).is_none() {
            bail!("the migration didn't come to its phase {phase}");
        }
        Ok(())
    }

    /// Tells what happens until something is reached or the time is over.
    fn follow(
        &mut self,
        migration: &mut Migration,
        limit: Duration,
        reached: impl Fn(&Migration) -> bool,
    ) -> Result<()> {
        let began = Instant::now();
        loop {
            for said in migration.look()? {
                self.screen.godwit(&said);
            }
            if reached(migration) || began.elapsed() >= limit {
                return Ok(());
            }
            self.guest.look();
            if self.told.elapsed() >= ACCOUNT_EVERY {
                self.account(Some(migration));
            }
            sleep(LOOK_EVERY);
        }
    }

    /// Waits until the agent of the source has put everything in order and shows the report.
    fn await_report(&mut self, migration: &mut Migration, source: Place) -> Result<Value> {
        let began = Instant::now();
        loop {
            self.follow(migration, ACCOUNT_EVERY / 50, |_| false)?;
            let status = self.hosts.ask(host(&self.hosts, source), &["status", &migration.id])?;
            if status["report"]["outcome"].is_string() {
                return Ok(status["report"].clone());
            }
            if began.elapsed() >= PHASE_LIMIT {
                bail!("the migration doesn't end");
            }
        }
    }

    /// Waits until one host runs the machine and nothing of it is left at the other; says which.
    fn await_one_copy(&mut self) -> Result<Place> {
        let began = Instant::now();
        loop {
            self.guest.look();
            let mut running = Vec::new();
            for host in [&self.hosts.a, &self.hosts.b] {
                // A host that doesn't know the machine any more says so by an error.
                let machine = self.hosts.ask(host, &["vm", "show", MACHINE]).unwrap_or_default();
                running.extend((machine["state"] == "running").then_some(host.place));
            }
            let emulators = self.emulators();
            match running[..] {
                [holder] if emulators == [holder] => return Ok(holder),
                _ if began.elapsed() < SETTLE_LIMIT => sleep(ACCOUNT_EVERY / 50),
                _ => bail!("it runs at {running:?}, and there are QEMUs at {emulators:?}"),
            }
        }
    }

    /// The host of each QEMU that there is.
    fn emulators(&self) -> Vec<Place> {
        let is_emulator = |pid: &nix::unistd::Pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.starts_with("qemu-system"))
        };
        let at = |place| {
            self.stage
                .lab
                .processes(place)
                .into_iter()
                .filter(is_emulator)
                .map(move |_| place)
                .collect::<Vec<_>>()
        };
        [at(Place::A), at(Place::B)].concat()
    }

    /// Follows the guest alone, then has it give account of itself.
    fn watch(&mut self, time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {
            self.guest.look();
            sleep(LOOK_EVERY);
        }
        self.account(None);
    }

    fn account(&mut self, migration: Option<&Migration>) {
        if let Some(account) = migration.and_then(Migration::account) {
            self.screen.godwit(&account);
        }
        self.screen.guest(&self.guest.account());
        self.told = Instant::now();
    }

    fn now_ms(&self) -> u64 {
        unix_ms(SystemTime::now())
    }
}

fn host(hosts: &Hosts, place: Place) -> &Host {
    if place == Place::A { &hosts.a } else { &hosts.b }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
