//! Where rounds take place: two hosts, a link, a guest, and whoever watches them. It lives through many rounds.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    beats::BeatRecorder,
    guest_image::GuestImage,
    lab::{FIRST_GUEST_ADDRESS, GUEST_BRIDGE, Lab, Place},
    link::Shape,
    observer::Progress,
    qmp::Qmp,
};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::{
    hosts::{self, Host, MACHINE, names_in},
    watch::Watcher,
};

const MEGABITS_PER_SECOND: u64 = 300;
const ROUND_TRIP: Duration = Duration::from_millis(4);
const MEMORY_MB: u64 = 128;
const WORKLOAD: &str = "steady";
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const CHECK_LIMIT: Duration = Duration::from_secs(30);
const MONITOR_LIMIT: Duration = Duration::from_secs(5);
const MOVE_LIMIT: Duration = Duration::from_secs(90);
/// A guest that has lived for so long is replaced by a new one: its check replays all that it wrote.
const GUEST_AGE_MAX: Duration = Duration::from_secs(1_800);

/// The lab and all that is in it.
pub(super) struct Stage {
    // Dropped in this order: the lab last, since it ends whatever still runs.
    watchers: [Watcher; 2],
    pub(super) beats: BeatRecorder,
    pub(super) guest: Option<Guest>,
    image: GuestImage,
    hosts: [Host; 2],
    pub(super) lab: Lab,
}

/// A guest that runs.
pub(super) struct Guest {
    pub(super) progress: Progress,
    /// The migration settings that its QEMU had when it was new.
    settings: Value,
    /// What it said when it was last asked: its boot, and how often it had written.
    last: Option<(String, u64)>,
    began: Instant,
}

impl Stage {
    /// Makes two hosts that run a copy of `program`, which others may replace meanwhile.
    pub(super) fn new(program: &Path, sabotage: Option<&'static str>) -> Result<Stage> {
        let lab = Lab::new(Shape::symmetric(MEGABITS_PER_SECOND, ROUND_TRIP))?;
        let image = GuestImage::ensure()?;
        let (copy, authority) = (lab.directory().join("godwit"), lab.directory().join("ca"));
        std::fs::copy(program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
        hosts::run(&copy, &["ca".as_ref(), "init".as_ref(), &authority])?;
        let images = image.kernel.ancestors().nth(3).unwrap_or(&image.kernel);
        let host = |place| Host::new(&lab, place, &copy, &authority, images, sabotage);
        let hosts = [host(Place::A)?, host(Place::B)?];
        let watchers =
            hosts.each_ref().map(|host| Watcher::start(host.watched_socket(), host.machine_directory()));
        let beats = BeatRecorder::start(&lab)?;
        let stage = Stage { watchers, beats, guest: None, image, hosts, lab };
        stage.start_agents()?;
        Ok(stage)
    }

    pub(super) fn host(&self, place: Place) -> &Host {
        &self.hosts[index(place)]
    }

    pub(super) fn hosts(&self) -> &[Host; 2] {
        &self.hosts
    }

    pub(super) fn watcher(&self, place: Place) -> &Watcher {
        &self.watchers[index(place)]
    }

    /// Has a healthy guest run at `place`: the one that is there, moved undisturbed if need be, or a new one.
    pub(super) fn prepare(&mut self, place: Place) -> Result<()> {
        self.start_agents()?;
        let is_old = self.guest.as_ref().is_some_and(|guest| guest.began.elapsed() > GUEST_AGE_MAX);
        if is_old || self.guest.is_none() {
            self.boot(place)?;
        }
        let other = if place == Place::A { Place::B } else { Place::A };
        if self.watcher(other).is_running() {
            self.move_undisturbed(other, place)?;
        }
        if !self.watcher(place).is_running() {
            bail!("the guest doesn't run at {}", place.name());
        }
        self.check_guest()?;
        self.watchers.iter().for_each(Watcher::forget);
        self.beats.take();
        Ok(())
    }

    /// Ends the guest that there is and boots a new one.
    fn boot(&mut self, place: Place) -> Result<()> {
        self.guest = None;
        self.hosts.iter().for_each(forget_machine);
        let file = self.host(place).path("web1.toml");
        std::fs::write(&file, self.specification())?;
        let ran = self.host(place).godwit(&["vm", "run", &file.to_string_lossy()]);
        if ran.code != Some(0) {
            bail!("the guest doesn't start: {}", ran.error.trim());
        }
        let clients = self.lab.namespace(Place::Lan);
        let progress = Progress::connect(&clients, FIRST_GUEST_ADDRESS, BOOT_LIMIT)
            .context("the guest has not booted")?;
        let settings = self.settings(place)?;
        self.guest = Some(Guest { progress, settings, last: None, began: Instant::now() });
        Ok(())
    }

    /// Moves the machine without any fault: that works after whatever happened before.
    fn move_undisturbed(&self, from: Place, to: Place) -> Result<()> {
        let migrate = self.host(from).begin(&["migrate", MACHINE, "--to", to.name()])?;
        let answer = hosts::Answer::of(migrate, MOVE_LIMIT);
        if answer.code != Some(0) {
            let (detail, error) = (&answer.json["detail"], answer.error.trim());
            bail!("an undisturbed move ends with {:?}: {detail} {error}", answer.code);
        }
        let started = Instant::now();
        while !self.watcher(to).is_running() {
            if started.elapsed() > MONITOR_LIMIT {
                bail!("after an undisturbed move the guest doesn't run at {}", to.name());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Connects to the guest anew, after it booted anew. A guest that has its order to reboot still before it would take
    /// the connection, and then it along.
    pub(super) fn reconnect(&mut self) -> Result<()> {
        let told = Instant::now();
        while !self.watchers.iter().any(Watcher::saw_reboot) && told.elapsed() < BOOT_LIMIT {
            std::thread::sleep(Duration::from_millis(20));
        }
        let clients = self.lab.namespace(Place::Lan);
        let guest = self.guest.as_mut().context("there is no guest")?;
        guest.progress = Progress::connect(&clients, FIRST_GUEST_ADDRESS, BOOT_LIMIT)
            .context("the guest has not booted again")?;
        guest.last = None;
        Ok(())
    }

    /// Has the guest check its memory, and compares with what it said before.
    pub(super) fn check_guest(&mut self) -> Result<()> {
        let guest = self.guest.as_mut().context("there is no guest")?;
        let answer = guest.progress.check(CHECK_LIMIT)?;
        let words: Vec<&str> = answer.split(' ').collect();
        let [_, _, _, _, writes, _, boot, ..] = words[..] else { bail!("the guest says {answer:?}") };
        let writes: u64 = writes.parse().with_context(|| format!("the guest says {answer:?}"))?;
        if let Some((boot_before, writes_before)) = &guest.last
            && (boot_before != boot || *writes_before > writes)
        {
            bail!(
                "the guest went back: {writes} writes in boot {boot}, before {writes_before} in {boot_before}"
            );
        }
        guest.last = Some((boot.to_owned(), writes));
        Ok(())
    }

    /// What of QEMU's migration settings at `place` isn't as it was when the machine was new.
    pub(super) fn changed_settings(&self, place: Place) -> Result<Option<String>> {
        let Some(guest) = &self.guest else { return Ok(None) };
        let now = self.settings(place)?;
        Ok((now != guest.settings).then(|| format!("QEMU's settings are {now}, were {}", guest.settings)))
    }

    /// The operator's monitor of a host's QEMU.
    pub(super) fn operate(&self, place: Place) -> Result<Qmp> {
        Ok(Qmp::connect(&self.host(place).operated_socket(), MONITOR_LIMIT)?)
    }

    fn settings(&self, place: Place) -> Result<Value> {
        let mut monitor = self.operate(place)?;
        let capabilities = monitor.execute("query-migrate-capabilities", json!({}))?;
        let parameters = monitor.execute("query-migrate-parameters", json!({}))?;
        Ok(json!([capabilities, parameters]))
    }

    pub(super) fn start_agents(&self) -> Result<()> {
        self.hosts.iter().try_for_each(|host| host.keep_agent(&self.lab))?;
        self.hosts.iter().try_for_each(Host::await_agent)
    }

    /// Starts again from nothing, after a round that failed.
    pub(super) fn renew(&mut self) -> Result<()> {
        self.guest = None;
        self.lab.restore();
        for host in &self.hosts {
            host.take_memory(false);
            host.kill_agent();
            for process in self.lab.processes(host.place) {
                let _ = kill(process, Signal::SIGKILL);
            }
        }
        std::thread::sleep(Duration::from_millis(300));
        for host in &self.hosts {
            for name in names_in(&host.state()) {
                let path = host.state().join(name);
                let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
            }
            for tap in self.lab.guest_taps(host.place)? {
                self.lab.remove_guest_tap(host.place, &tap)?;
            }
        }
        self.start_agents()
    }

    /// Copies what a failed round left into a directory that stays.
    pub(super) fn keep_logs(&self, directory: &Path) -> Result<()> {
        std::fs::create_dir_all(directory)?;
        for host in &self.hosts {
            copy_small_files(&host.path(""), &directory.join(host.name()))?;
            let said = self.watcher(host.place).seen().said.join("\n");
            std::fs::write(directory.join(host.name()).join("qemu-events.log"), said)?;
        }
        Ok(())
    }

    /// The migrations that both hosts know.
    pub(super) fn migration_ids(&self) -> BTreeSet<String> {
        self.hosts.iter().flat_map(Host::migration_ids).collect()
    }

    fn specification(&self) -> String {
        let (kernel, initrd) = (self.image.kernel.display(), self.image.initrd.display());
        let append = GuestImage::command_line(WORKLOAD, FIRST_GUEST_ADDRESS, Some(self.beats.address()));
        format!(
            "name = \"{MACHINE}\"\nmachine = \"pc\"\naccel = \"tcg\"\nmemory = \"{MEMORY_MB}M\"\n\n\
             [boot]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\nappend = \"{append} loglevel=5\"\n\n\
             [[net]]\nbridge = \"{GUEST_BRIDGE}\"\n"
        )
    }
}

fn index(place: Place) -> usize {
    usize::from(place == Place::B)
}

/// Has a host end the machine, if it has it, and forget it.
fn forget_machine(host: &Host) {
    // At most one host has it, and after some faults none.
    host.godwit(&["vm", "kill", MACHINE]);
    host.godwit(&["vm", "rm", MACHINE]);
}

/// Copies plain files below a directory, sockets and large files left out.
fn copy_small_files(from: &Path, to: &Path) -> Result<()> {
    const BYTES_MAX: u64 = 4 << 20;
    for name in names_in(from) {
        let (source, target): (PathBuf, PathBuf) = (from.join(&name), to.join(&name));
        let metadata = std::fs::symlink_metadata(&source)?;
        if metadata.is_dir() {
            copy_small_files(&source, &target)?;
        } else if metadata.is_file() && metadata.len() <= BYTES_MAX {
            std::fs::create_dir_all(to)?;
            std::fs::copy(&source, &target)?;
        }
    }
    Ok(())
}
