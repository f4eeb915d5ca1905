//! A guest on a disk that its host serves, from an image in a repository: it boots before the image is copied, and goes
//! on while the agent and the disk's server are killed. In the end its power is cut, and tools that know nothing of godwit
//! look at what is there.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use godwit_sim::{guest_image::GuestImage, lab::Place, observer::Progress};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    Request,
    claims::Claims,
    screen::{Screen, duration, grouped, megabytes},
};
use crate::contest::{
    GUEST_MEMORY_MB, Stage,
    hosts::{Hosts, MACHINE},
    watch::GUEST_ADDRESS,
};

mod remains;
mod root_image;

const IMAGE: &str = "root";
const DISK: &str = "web1.0";
/// The disk is larger than the image.
const DISK_SIZE: &str = "1G";
/// The guest's command: everything else is on the disk.
const COMMAND: &str = "mkdir -p /disk && mount -t ext4 /dev/vda /disk && mount -o bind /dev /disk/dev; \
    exec chroot /disk /work.sh";
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const WRITE_LIMIT: Duration = Duration::from_secs(60);
const SERVER_LIMIT: Duration = Duration::from_secs(20);
/// How often each is killed.
const ROUNDS: usize = 3;
/// How long the guest works between two kills, and how long a host has no agent.
const BETWEEN: Duration = Duration::from_secs(2);
const WITHOUT_AGENT: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// More than that isn't "hardly anything copied".
const COPIED_SHARE_MAX: f64 = 0.25;

/// Shows what a disk does that is served.
///
/// # Errors
/// When something is missing, or a claim doesn't hold.
pub(super) fn run(stage: &Stage, request: &Request) -> Result<()> {
    let mut show = Show::begin(stage)?;
    let played = show.play();
    show.claims.conclude(played, &show.screen, request.json.as_deref())
}

struct Show<'a> {
    stage: &'a Stage<'a>,
    screen: Screen,
    claims: Claims,
    hosts: Hosts,
    directory: PathBuf,
}

/// The guest's acknowledged writes, and the longest time between two of them.
struct Pace<'a> {
    progress: &'a Progress,
    writes: u64,
    since: Instant,
    longest: Duration,
}

impl Pace<'_> {
    fn look(&mut self) {
        let writes = self.progress.writes();
        self.longest = self.longest.max(self.since.elapsed());
        if writes > self.writes {
            (self.writes, self.since) = (writes, Instant::now());
        }
    }

    fn watch(&mut self, time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {
            self.look();
            sleep(LOOK_EVERY);
        }
    }
}

impl<'a> Show<'a> {
    fn begin(stage: &'a Stage) -> Result<Show<'a>> {
        let screen = Screen::begin();
        let hosts = Hosts::start(stage)?;
        let directory = stage.lab.directory().join("disk-local");
        std::fs::create_dir_all(&directory)?;
        Ok(Show { stage, screen, claims: Claims::default(), hosts, directory })
    }

    fn play(&mut self) -> Result<()> {
        let content_bytes = self.import()?;
        let progress = self.boot(content_bytes)?;
        let writes = self.kill_what_serves(&progress)?;
        self.look_at_what_is_left(writes, content_bytes)
    }

    /// Brings the image in; returns how much content it has.
    fn import(&mut self) -> Result<u64> {
        let image = root_image::make(&self.directory)?;
        let file_bytes = image.metadata()?.len();
        let command = format!("godwit image import {} --name {IMAGE}", name(&image));
        self.screen.demo(&format!("{command}  # {}", megabytes(file_bytes)));
        let repository = self.hosts.a.repository();
        let began = Instant::now();
        let answer = self.hosts.ask(
            &self.hosts.a,
            &["image", "--repository", &repository, "import", &image.to_string_lossy(), "--name", IMAGE],
        )?;
        let content_bytes = answer["content_bytes"].as_u64().context("the import tells no size")?;
        self.screen.godwit(&format!(
            "in {}: {} of content take {} in the repository",
            duration(began.elapsed()),
            megabytes(content_bytes),
            megabytes(answer["new_bytes"].as_u64().unwrap_or(0)),
        ));
        Ok(content_bytes)
    }

    /// Boots the guest and waits until it has written its first file.
    fn boot(&mut self, content_bytes: u64) -> Result<Progress> {
        self.screen.demo(&format!(
            "godwit vm run {MACHINE}.toml  # {GUEST_MEMORY_MB} MB, image = \"{IMAGE}\", size = \"{DISK_SIZE}\""
        ));
        let line = GuestImage::command_line("idle", GUEST_ADDRESS, None) + &GuestImage::command_word(COMMAND);
        let disk = format!("\n[[disk]]\nimage = \"{IMAGE}\"\nsize = \"{DISK_SIZE}\"\n");
        let began = Instant::now();
        self.hosts.boot_with(self.stage, &line, &disk)?;
        self.screen.godwit(&format!("its QEMU runs after {}", duration(began.elapsed())));
        let lan = self.stage.lab.namespace(Place::Lan);
        let progress =
            Progress::connect(&lan, GUEST_ADDRESS, BOOT_LIMIT).context("the guest has not booted")?;
        while progress.writes() == 0 && began.elapsed() < WRITE_LIMIT {
            sleep(LOOK_EVERY);
        }
        let time = duration(began.elapsed());
        let fetched = self.disk()?["total"]["fetched_bytes"].as_u64().unwrap_or(0);
        let copied = format!("{} of {} copied", megabytes(fetched), megabytes(content_bytes));
        self.screen.guest(&format!("booted; its first file is written and synced, {copied}"));
        self.claims.add(
            "the guest works before its image is copied",
            progress.writes() > 0,
            format!("after {time}, {copied}"),
        );
        Ok(progress)
    }

    /// Kills the agent and the disk's server while the guest writes; returns how many files it says it has written.
    fn kill_what_serves(&mut self, progress: &Progress) -> Result<u64> {
        let mut pace = Pace { progress, writes: 0, since: Instant::now(), longest: Duration::ZERO };
        pace.watch(BETWEEN);
        let undisturbed = pace.longest;
        let mut without_agent = Vec::new();
        for _ in 0..ROUNDS {
            without_agent.push(self.kill_agent(&mut pace)?);
            self.kill_server(&mut pace)?;
            pace.watch(BETWEEN);
            let told = format!("{} files; longest wait {}", grouped(pace.writes), duration(pace.longest));
            self.screen.guest(&told);
        }
        let writes = without_agent.iter().all(|files| *files > 0);
        let value = format!("{without_agent:?} files");
        self.claims.add("the guest writes while there is no agent", writes, value);
        let value = format!(
            "{} files; longest time between two {} ({} when nothing happened)",
            grouped(pace.writes),
            duration(pace.longest),
            duration(undisturbed)
        );
        let goes_on = pace.since.elapsed() < BETWEEN;
        self.claims.add("the guest goes on and sees no error", goes_on, value);
        Ok(pace.writes)
    }

    /// Kills the agent and starts it again; returns how many files the guest wrote meanwhile.
    fn kill_agent(&mut self, pace: &mut Pace) -> Result<u64> {
        let agent = self.hosts.a.kill_agent()?;
        self.screen.demo(&format!(
            "kill -9 the agent (process {agent}); for {} there is none",
            duration(WITHOUT_AGENT)
        ));
        let before = pace.writes;
        pace.watch(WITHOUT_AGENT);
        let files = pace.writes - before;
        self.hosts.a.start_agent(self.stage.lab, &self.hosts.program)?;
        self.hosts.await_agent(&self.hosts.a)?;
        Ok(files)
    }

    fn kill_server(&mut self, pace: &mut Pace) -> Result<()> {
        let server = self.server()?.context("nobody serves the disk")?;
        kill(Pid::from_raw(server), Signal::SIGKILL).context("cannot kill the disk's server")?;
        let killed = Instant::now();
        self.screen.demo(&format!("kill -9 the disk's server (process {server})"));
        loop {
            pace.watch(Duration::from_millis(20));
            match self.server()? {
                Some(now) if now != server => break,
                _ if killed.elapsed() > SERVER_LIMIT => anyhow::bail!("there is no new server"),
                _ => {}
            }
        }
        self.screen.godwit(&format!("another serves it after {}", duration(killed.elapsed())));
        Ok(())
    }

    /// Cuts the guest's power and looks at its disk.
    fn look_at_what_is_left(&mut self, writes: u64, content_bytes: u64) -> Result<()> {
        self.screen.demo(&format!("godwit vm kill {MACHINE}  # as if its power were cut"));
        self.hosts.ask(&self.hosts.a, &["vm", "kill", MACHINE])?;
        println!();
        self.print(&["disk", "show", DISK])?;
        println!();
        let fetched = self.disk()?["total"]["fetched_bytes"].as_u64().unwrap_or(u64::MAX);
        let share = fetched as f64 / content_bytes as f64;
        self.claims.add(
            "hardly anything was copied",
            share < COPIED_SHARE_MAX,
            format!("{} of {}: {:.0} %", megabytes(fetched), megabytes(content_bytes), 100.0 * share),
        );
        let checked = self.hosts.ask(&self.hosts.a, &["disk", "check", DISK]);
        let checked = checked.map(|checked| format!("{} chunks, by their digests", checked["good_chunks"]));
        self.claims.add_shown(
            "what was copied is what the image has",
            checked.map_err(|error| format!("{error:#}")),
        );
        let file = self.directory.join("web1.raw");
        self.screen.demo(&format!("godwit disk export {DISK} --to {}", name(&file)));
        self.hosts.ask(&self.hosts.a, &["disk", "export", DISK, "--to", &file.to_string_lossy()])?;
        let checked = remains::check(&file).map_err(|error| format!("{error:#}"));
        self.claims.add_shown("the guest's file system is whole", checked);
        let found = remains::count(&file, &self.directory.join("found"));
        let (holds, value) = match found {
            Ok(found) => (
                found >= writes,
                format!("{} told of, {} there, each what its name says", grouped(writes), grouped(found)),
            ),
            Err(error) => (false, format!("{error:#}")),
        };
        self.claims.add("every file that the guest told of is there", holds, value);
        Ok(())
    }

    fn disk(&self) -> Result<Value> {
        self.hosts.ask(&self.hosts.a, &["disk", "show", DISK])
    }

    /// The process that serves the disk.
    fn server(&self) -> Result<Option<i32>> {
        let pid = self.disk()?["server_pid"].as_i64();
        Ok(pid.and_then(|pid| pid.try_into().ok()))
    }

    /// Shows what an operator sees.
    fn print(&self, arguments: &[&str]) -> Result<()> {
        println!("# godwit {}", arguments.join(" "));
        let mut command: Command = self.hosts.command(&self.hosts.a);
        let said = command.args(arguments).output()?;
        print!("{}", String::from_utf8_lossy(&[said.stdout, said.stderr].concat()));
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
