//! A host: its agent, restarted when it ends, and what lies in its directories.

use std::{
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use godwit_sim::lab::{GUEST_BRIDGE, Lab, Place, Process};
use nix::unistd::Pid;
use serde_json::Value;

/// The one machine.
pub(super) const MACHINE: &str = "web1";
/// The variable that tells a sabotaged build what to do wrong.
pub(super) const SABOTAGE: &str = "GODWIT_SABOTAGE";
/// The monitor that [`super::watch`] listens to.
const WATCHED: &str = "watched.sock";
/// The operator's monitor.
const OPERATED: &str = "operated.sock";
/// While it is there, the emulator gets too little memory to start.
const NO_MEMORY: &str = "no-memory";
/// Takes all room of the state directory.
const FILLER: &str = "filler";
const STATE_BYTES: u64 = 16 << 20;
const AGENT_PORT: u16 = 4577;
const START_LIMIT: Duration = Duration::from_secs(20);
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A host with its agent.
pub(super) struct Host {
    pub(super) place: Place,
    directory: PathBuf,
    program: PathBuf,
    sabotage: Option<&'static str>,
    agent: Mutex<Option<Process>>,
}

/// What a command said.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// `None`: it was killed, since it didn't end.
    pub(super) code: Option<i32>,
    pub(super) json: Value,
    pub(super) error: String,
}

impl Host {
    /// A host that knows the other, with an identity of `authority`; its state directory is small.
    pub(super) fn new(
        lab: &Lab,
        place: Place,
        program: &Path,
        authority: &Path,
        images: &Path,
        sabotage: Option<&'static str>,
    ) -> Result<Host> {
        let directory = lab.directory_of(place)?;
        lab.make_small_directory(place, "state", STATE_BYTES)?;
        let host = Host { place, directory, program: program.to_owned(), sabotage, agent: Mutex::new(None) };
        let (bundle, identity) = (host.path("bundle"), host.path("identity"));
        let name = place.name().as_ref();
        run(program, &["ca".as_ref(), "issue".as_ref(), authority, name, "--out".as_ref(), &bundle])?;
        run(program, &["join".as_ref(), "--bundle".as_ref(), &bundle, "--identity".as_ref(), &identity])?;
        host.write_emulator()?;
        std::fs::write(host.path("agent.toml"), host.config(images))?;
        Ok(host)
    }

    pub(super) fn name(&self) -> &'static str {
        self.place.name()
    }

    /// Starts the agent, if it doesn't run.
    pub(super) fn keep_agent(&self, lab: &Lab) -> Result<()> {
        let mut agent = self.agent();
        let ended = match agent.as_mut() {
            Some(agent) => agent.wait_for(Duration::ZERO)?.is_some(),
            None => true,
        };
        if ended {
            let mut command = self.command();
            command.arg("agent").arg("--config").arg(self.path("agent.toml"));
            *agent = Some(lab.spawn(self.place, "agent", &mut command, true)?);
        }
        Ok(())
    }

    /// Waits until the agent answers.
    pub(super) fn await_agent(&self) -> Result<()> {
        let started = Instant::now();
        while self.godwit(&["vm", "ls"]).code != Some(0) {
            if started.elapsed() >= START_LIMIT {
                let log = std::fs::read_to_string(self.path("agent.log")).unwrap_or_default();
                bail!("the agent of {} doesn't answer:\n{log}", self.name());
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// The agent's process.
    pub(super) fn agent_process(&self) -> Option<Pid> {
        self.agent().as_ref().map(|agent| Pid::from_raw(agent.id().cast_signed()))
    }

    /// Kills the agent; it stays away until [`Host::keep_agent`].
    pub(super) fn kill_agent(&self) {
        // A process that has ended already is none to kill.
        drop(self.agent().take());
    }

    /// Runs a verb of this host's agent.
    pub(super) fn godwit(&self, arguments: &[&str]) -> Answer {
        match self.begin(arguments) {
            Ok(child) => Answer::of(child, ANSWER_LIMIT),
            Err(error) => Answer { code: None, json: Value::Null, error: format!("{error:#}") },
        }
    }

    /// Begins a verb of this host's agent.
    pub(super) fn begin(&self, arguments: &[&str]) -> Result<Child> {
        let mut command = self.command();
        command.arg("--socket").arg(self.path("agent.sock")).arg("--json").args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().context("cannot run godwit")
    }

    /// The process of the machine's QEMU, an incoming one included.
    pub(super) fn qemu(&self) -> Option<Pid> {
        let written = std::fs::read_to_string(self.machine_directory().join("qemu.pid")).ok()?;
        written.trim().parse().ok().map(Pid::from_raw)
    }

    /// The process of a migration's worker.
    pub(super) fn worker(&self, migration: &str) -> Option<Pid> {
        let written = read_json(&self.migrations().join(migration).join("worker.json"))?;
        written["pid"].as_i64()?.try_into().ok().map(Pid::from_raw)
    }

    /// The state of the machine's token record.
    pub(super) fn record(&self) -> Option<String> {
        record_in(&self.machine_directory())
    }

    /// The migrations that are remembered.
    pub(super) fn migration_ids(&self) -> Vec<String> {
        names_in(&self.migrations())
    }

    pub(super) fn migrations(&self) -> PathBuf {
        self.state().join("migrations")
    }

    /// What the agent keeps of the machine.
    pub(super) fn machine_directory(&self) -> PathBuf {
        self.state().join("machines").join(MACHINE)
    }

    /// The agent's state directory.
    pub(super) fn state(&self) -> PathBuf {
        self.path("state")
    }

    pub(super) fn watched_socket(&self) -> PathBuf {
        self.path(WATCHED)
    }

    pub(super) fn operated_socket(&self) -> PathBuf {
        self.path(OPERATED)
    }

    /// A file of this host.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Takes all room of the state directory, or gives it back.
    pub(super) fn fill_disk(&self, full: bool) {
        let filler = self.state().join(FILLER);
        if full {
            // Ends, as it is to, in an error.
            let _ = std::fs::write(filler, vec![0xa5; STATE_BYTES as usize]);
        } else {
            let _ = std::fs::remove_file(filler);
        }
    }

    /// Leaves the emulator no memory to start, or enough.
    pub(super) fn take_memory(&self, take: bool) {
        let _ = if take {
            std::fs::write(self.path(NO_MEMORY), "")
        } else {
            std::fs::remove_file(self.path(NO_MEMORY))
        };
    }

    fn agent(&self) -> MutexGuard<'_, Option<Process>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.sabotage.map(|kind| (SABOTAGE, kind)));
        command
    }

    /// The emulator is QEMU with two more monitors.
    fn write_emulator(&self) -> Result<()> {
        let emulator = self.path("qemu");
        let [watched, operated, no_memory] =
            [WATCHED, OPERATED, NO_MEMORY].map(|name| self.path(name).display().to_string());
        let script = format!(
            "#!/bin/sh\n[ -e {no_memory} ] && ulimit -v 200000\n\
             exec qemu-system-x86_64 \"$@\" -qmp unix:{watched},server=on,wait=off \
             -qmp unix:{operated},server=on,wait=off\n"
        );
        std::fs::write(&emulator, script)?;
        Ok(std::fs::set_permissions(&emulator, std::fs::Permissions::from_mode(0o755))?)
    }

    fn config(&self, images: &Path) -> String {
        let other = if self.place == Place::A { Place::B } else { Place::A };
        let (name, address) = (self.name(), self.place.address());
        let (directory, images) = (self.directory.display(), images.display());
        let (peer, peer_address) = (other.name(), other.address());
        format!(
            "name = \"{name}\"\nstate_dir = \"{directory}/state\"\nsocket = \"{directory}/agent.sock\"\n\
             listen = \"{address}:{AGENT_PORT}\"\nidentity_dir = \"{directory}/identity\"\n\
             emulator = \"{directory}/qemu\"\nmemory_reserve = \"1M\"\n\n\
             [accept]\npaths = {{ \"{images}\" = \"{images}\" }}\n\
             bridges = {{ \"{GUEST_BRIDGE}\" = \"{GUEST_BRIDGE}\" }}\n\n\
             [peers.{peer}]\naddress = \"{peer_address}:{AGENT_PORT}\"\n\
             may_send = true\nmay_receive = true\n"
        )
    }
}

impl Answer {
    /// Waits for a command; one that doesn't end within `limit` is killed.
    pub(super) fn of(mut child: Child, limit: Duration) -> Answer {
        let [said, complained] = [take_output(child.stdout.take()), take_output(child.stderr.take())];
        let started = Instant::now();
        let code = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status.code(),
                Ok(None) if started.elapsed() < limit => std::thread::sleep(LOOK_EVERY),
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
            }
        };
        let [said, error] = [said, complained].map(|reader| reader.join().unwrap_or_default());
        Answer { code, json: serde_json::from_str(&said).unwrap_or_default(), error }
    }
}

/// Runs a verb that needs no agent.
pub(super) fn run(program: &Path, arguments: &[&Path]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().context("cannot run godwit")?;
    if !output.status.success() {
        bail!("godwit {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The state of the token record in a machine's directory: of the newer of its two files.
pub(super) fn record_in(directory: &Path) -> Option<String> {
    let newest =
        ["token-written.json", "token.json"].iter().find_map(|name| read_json(&directory.join(name)))?;
    let state = newest["state"].as_str().or_else(|| newest["record"]["state"].as_str())?;
    Some(state.to_owned())
}

fn read_json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// The names of what is in a directory, in order.
pub(super) fn names_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn take_output(output: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = output.map(|mut output| output.read_to_string(&mut text));
        drop(read);
        text
    })
}
