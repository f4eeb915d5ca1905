//! Two hosts, each with an agent, driven by the command line as a user would.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    guest_image::GuestImage,
    lab::{GUEST_BRIDGE, Lab, Place, Process},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{Stage, floor};

/// The one machine.
pub(crate) const MACHINE: &str = "web1";
const AGENT_PORT: u16 = 4577;
/// In a host's directory.
const EMULATOR: &str = "qemu";
const REPOSITORY: &str = "repository";
const START_LIMIT: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One host with its agent.
pub(crate) struct Host {
    pub(crate) place: Place,
    directory: PathBuf,
    agent: Option<Process>,
}

impl Host {
    /// Starts its agent; [`Hosts::await_agent`] waits for it.
    pub(crate) fn start_agent(&mut self, lab: &Lab, program: &Path) -> Result<()> {
        let mut agent = Command::new(program);
        agent.arg("agent").arg("--config").arg(self.directory.join("agent.toml"));
        self.agent = Some(lab.spawn(self.place, "agent", &mut agent, true)?);
        Ok(())
    }

    /// Kills its agent (SIGKILL); machines and workers go on. Returns the process id that it had.
    pub(crate) fn kill_agent(&mut self) -> Result<u32> {
        let mut agent = self.agent.take().context("there is no agent")?;
        agent.kill().context("cannot kill the agent")?;
        Ok(agent.id())
    }

    /// Kills the worker of a migration (SIGKILL). Returns the process id that it had.
    pub(crate) fn kill_worker(&self, migration: &str) -> Result<i32> {
        let written = std::fs::read(self.migration(migration).join("worker.json"))?;
        let written: Value = serde_json::from_slice(&written)?;
        let worker = written["pid"].as_i64().and_then(|pid| pid.try_into().ok()).context("no worker")?;
        kill(Pid::from_raw(worker), Signal::SIGKILL).context("cannot kill the worker")?;
        Ok(worker)
    }

    /// What the memories of machines here take at least, together.
    pub(super) fn memory_floor(&self, machines: &[&str], memory_mb: u64) -> Result<u64> {
        // Agent and workers have the other monitor, and are through with this one.
        let monitor =
            |machine| self.directory.join("state/machines").join(machine).join("qmp-migration.sock");
        floor::of_guests(machines.iter().map(monitor), memory_mb, &self.directory)
    }

    /// Where its machines' images are.
    pub(crate) fn repository(&self) -> String {
        self.directory.join(REPOSITORY).to_string_lossy().into_owned()
    }

    /// What the host keeps of a migration.
    pub(crate) fn migration(&self, id: &str) -> PathBuf {
        self.directory.join("state/migrations").join(id)
    }
}

/// Both hosts.
pub(crate) struct Hosts {
    pub(crate) program: PathBuf,
    pub(crate) a: Host,
    pub(crate) b: Host,
    /// Options for `migrate`.
    pub(crate) options: Vec<String>,
}

impl Hosts {
    /// Makes an authority, gives both hosts their identity, and starts their agents.
    pub(crate) fn start(stage: &Stage) -> Result<Hosts> {
        let host = |place| -> Result<Host> {
            let directory = stage.lab.directory_of(place)?;
            Ok(Host { place, directory, agent: None })
        };
        let (program, options) = (stage.godwit.to_owned(), stage.migrate.to_owned());
        let mut hosts = Hosts { program, a: host(Place::A)?, b: host(Place::B)?, options };
        let authority = stage.lab.directory().join("ca");
        hosts.say(&["ca".as_ref(), "init".as_ref(), authority.as_ref()])?;
        for host in [&hosts.a, &hosts.b] {
            hosts.join(&authority, host)?;
        }
        for host in [&mut hosts.a, &mut hosts.b] {
            let other = if host.place == Place::A { Place::B } else { Place::A };
            let config = host.directory.join("agent.toml");
            std::fs::write(&config, agent_config(host, other, &stage.image.kernel))?;
            write_emulator(host)?;
            host.start_agent(stage.lab, stage.godwit)?;
        }
        hosts.await_agent(&hosts.a)?;
        hosts.await_agent(&hosts.b)?;
        Ok(hosts)
    }

    fn join(&self, authority: &Path, host: &Host) -> Result<()> {
        let (bundle, identity) = (host.directory.join("bundle"), host.directory.join("identity"));
        let name = host.place.name().as_ref();
        self.say(&["ca".as_ref(), "issue".as_ref(), authority, name, "--out".as_ref(), &bundle])?;
        self.say(&["join".as_ref(), "--bundle".as_ref(), &bundle, "--identity".as_ref(), &identity])?;
        Ok(())
    }

    /// Waits until a host's agent answers.
    pub(crate) fn await_agent(&self, host: &Host) -> Result<()> {
        let started = Instant::now();
        loop {
            match self.ask(host, &["vm", "ls"]) {
                Ok(_) => return Ok(()),
                Err(error) if started.elapsed() >= START_LIMIT => {
                    let log = std::fs::read_to_string(host.directory.join("agent.log")).unwrap_or_default();
                    return Err(error.context(format!("the agent has not started:\n{log}")));
                }
                Err(_) => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    /// Boots the one machine at host a.
    pub(crate) fn boot(&self, stage: &Stage, command_line: &str) -> Result<()> {
        self.boot_with(stage, command_line, "")
    }

    /// Boots the one machine at host a, with more in its file.
    pub(crate) fn boot_with(&self, stage: &Stage, command_line: &str, more: &str) -> Result<()> {
        self.run_machine(MACHINE, stage.memory_mb, stage.image, command_line, more)
    }

    /// Boots a machine at host a.
    pub(super) fn boot_machine(
        &self,
        name: &str,
        memory_mb: u64,
        image: &GuestImage,
        command_line: &str,
    ) -> Result<()> {
        self.run_machine(name, memory_mb, image, command_line, "")
    }

    fn run_machine(
        &self,
        name: &str,
        memory_mb: u64,
        image: &GuestImage,
        command_line: &str,
        more: &str,
    ) -> Result<()> {
        let file = self.a.directory.join(format!("{name}.toml"));
        let (kernel, initrd) = (image.kernel.display(), image.initrd.display());
        let spec = format!(
            "name = \"{name}\"\nmachine = \"pc\"\naccel = \"tcg\"\nmemory = \"{memory_mb}M\"\n\n\
             [boot]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\nappend = \"{command_line}\"\n\n\
             [[net]]\nbridge = \"{GUEST_BRIDGE}\"\n{more}"
        );
        std::fs::write(&file, spec)?;
        self.ask(&self.a, &["vm", "run", &file.to_string_lossy()]).map(|_| ())
    }

    /// Runs a verb of a host's agent and returns what it answers.
    pub(crate) fn ask(&self, host: &Host, arguments: &[&str]) -> Result<Value> {
        let output =
            self.command(host).arg("--json").args(arguments).output().context("cannot run godwit")?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            bail!("godwit {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&said).trim());
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// A command for a host's agent.
    pub(crate) fn command(&self, host: &Host) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(host.directory.join("agent.sock")).stdin(Stdio::null());
        command
    }

    /// Runs a verb that needs no agent.
    fn say(&self, arguments: &[&Path]) -> Result<()> {
        let output = Command::new(&self.program).args(arguments).output().context("cannot run godwit")?;
        if !output.status.success() {
            bail!("godwit {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Hosts {
    /// Ends the machine, which would outlive its agent and answer in the next contender's stead.
    fn drop(&mut self) {
        for host in [&self.a, &self.b] {
            // At one of the hosts there is none.
            let _ = self.ask(host, &["vm", "kill", MACHINE]);
        }
    }
}

/// The emulator is QEMU that names the thread of the guest's processor, so that it can be told from the others.
fn write_emulator(host: &Host) -> Result<()> {
    let path = host.directory.join(EMULATOR);
    std::fs::write(&path, "#!/bin/sh\nexec qemu-system-x86_64 \"$@\" -name debug-threads=on\n")?;
    Ok(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?)
}

/// A host's `agent.toml`: it trusts the other host, with the guests' bridge and image.
fn agent_config(host: &Host, other: Place, kernel: &Path) -> String {
    let (name, address) = (host.place.name(), host.place.address());
    let (directory, images) = (host.directory.display(), images(kernel).display());
    let (peer, peer_address) = (other.name(), other.address());
    format!(
        "name = \"{name}\"\nstate_dir = \"{directory}/state\"\nsocket = \"{directory}/agent.sock\"\n\
         listen = \"{address}:{AGENT_PORT}\"\nidentity_dir = \"{directory}/identity\"\n\
         emulator = \"{directory}/{EMULATOR}\"\nrepository = \"{directory}/{REPOSITORY}\"\n\n\
         [accept]\npaths = {{ \"{images}\" = \"{images}\" }}\n\
         bridges = {{ \"{GUEST_BRIDGE}\" = \"{GUEST_BRIDGE}\" }}\n\n\
         [peers.{peer}]\naddress = \"{peer_address}:{AGENT_PORT}\"\nmay_send = true\nmay_receive = true\n"
    )
}

/// The directory that holds the guests' kernel and their initial RAM disks.
fn images(kernel: &Path) -> &Path {
    kernel.ancestors().nth(3).unwrap_or(kernel)
}
