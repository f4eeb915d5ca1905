//! godwit moves the guest: two agents, one at each host, driven by their command line as a user would.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    guest_image::{GuestImage, workspace},
    lab::{GUEST_BRIDGE, Place, Process},
    observer::BeatListener,
};
use serde_json::Value;

use super::{
    DOWNTIME_TARGET, GUEST_MEMORY_MB, Stage,
    outcome::Outcome,
    watch::{GUEST_ADDRESS, Span, Watch},
};

pub(super) const NAME: &str = "godwit";
const MACHINE: &str = "web1";
const AGENT_PORT: u16 = 4577;
const START_LIMIT: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Boots the guest at host a, has godwit move it to host b, and, no longer timed, back with both memories compared.
pub(super) fn run(stage: &Stage) -> Result<Outcome> {
    let hosts = Hosts::start(stage, stage.godwit)?;
    let beat = BeatListener::start(&stage.lab.namespace(Place::Lan))?;
    let command_line = GuestImage::command_line(stage.workload, GUEST_ADDRESS, Some(beat.address()));
    hosts.boot(stage, &command_line)?;
    let watch = Watch::start(stage.lab, beat)?;
    let before = watch.wire_bytes()?;
    let started = SystemTime::now();
    let report = hosts.migrate(&hosts.a, &hosts.b, "digest");
    let ended = SystemTime::now();
    let mut outcome = watch.outcome(NAME, Span { started, ended }, before)?;
    let report = report?;
    outcome.converged = true;
    outcome.downtime_ms = report["downtime_ms"].as_f64();
    let inside = report["total_ms"].as_u64().unwrap_or(0);
    println!("  by its own account {:.1} s", inside as f64 / 1e3);
    println!("  {}\n  and back, comparing both memories", watch.check()?);
    let back = hosts.migrate(&hosts.b, &hosts.a, "full")?;
    // The side that compares is the target.
    let compared = hosts.ask(&hosts.a, &["status", back["id"].as_str().unwrap_or(MACHINE)])?;
    let pages = compared["report"]["pages_verified"].as_u64();
    println!("  {} pages compared and equal; {}", pages.unwrap_or(0), watch.check()?);
    outcome.memory_digest_equal = Some(pages.is_some_and(|pages| pages > 0));
    Ok(outcome)
}

/// Builds the program as it is shipped.
pub(super) fn build() -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let built = cargo
        .current_dir(workspace())
        .args(["build", "--release", "--package", "godwit", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    let messages = String::from_utf8_lossy(&built.stdout);
    let mut messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = messages.find_map(|message| {
        let path = message["executable"].as_str()?;
        (message["target"]["name"] == "godwit").then(|| PathBuf::from(path))
    });
    match program {
        Some(program) if built.status.success() => Ok(program),
        _ => bail!("godwit does not build"),
    }
}

/// One host with its agent.
struct Host {
    place: Place,
    directory: PathBuf,
    agent: Option<Process>,
}

struct Hosts {
    program: PathBuf,
    a: Host,
    b: Host,
    /// Options for `migrate`.
    options: Vec<String>,
}

impl Hosts {
    /// Makes an authority, gives both hosts their identity, and starts their agents.
    fn start(stage: &Stage, program: &Path) -> Result<Hosts> {
        let host = |place| -> Result<Host> {
            let directory = stage.lab.directory_of(place)?;
            Ok(Host { place, directory, agent: None })
        };
        let options = stage.migrate.to_owned();
        let mut hosts =
            Hosts { program: program.to_owned(), a: host(Place::A)?, b: host(Place::B)?, options };
        let authority = stage.lab.directory().join("ca");
        hosts.say(&["ca".as_ref(), "init".as_ref(), authority.as_ref()])?;
        for host in [&hosts.a, &hosts.b] {
            hosts.join(&authority, host)?;
        }
        for host in [&mut hosts.a, &mut hosts.b] {
            let other = if host.place == Place::A { Place::B } else { Place::A };
            let config = host.directory.join("agent.toml");
            std::fs::write(&config, agent_config(host, other, &stage.image.kernel))?;
            let mut agent = Command::new(program);
            agent.arg("agent").arg("--config").arg(&config);
            host.agent = Some(stage.lab.spawn(host.place, "agent", &mut agent, true)?);
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

    fn await_agent(&self, host: &Host) -> Result<()> {
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

    fn boot(&self, stage: &Stage, command_line: &str) -> Result<()> {
        let file = self.a.directory.join("web1.toml");
        let (kernel, initrd) = (stage.image.kernel.display(), stage.image.initrd.display());
        let spec = format!(
            "name = \"{MACHINE}\"\nmachine = \"pc\"\naccel = \"tcg\"\nmemory = \"{GUEST_MEMORY_MB}M\"\n\n\
             [boot]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\nappend = \"{command_line}\"\n\n\
             [[net]]\nbridge = \"{GUEST_BRIDGE}\"\n"
        );
        std::fs::write(&file, spec)?;
        self.ask(&self.a, &["vm", "run", &file.to_string_lossy()]).map(|_| ())
    }

    /// Migrates the machine and returns the report. The command draws its progress bar itself.
    fn migrate(&self, from: &Host, to: &Host, verify: &str) -> Result<Value> {
        let target = format!("{}ms", DOWNTIME_TARGET.as_millis());
        let status = self
            .command(from)
            .args([
                "migrate",
                MACHINE,
                "--to",
                to.place.name(),
                "--downtime-target",
                &target,
                "--verify",
                verify,
            ])
            .args(&self.options)
            .stdout(Stdio::null())
            .status()?;
        let migration = self.ask(from, &["status", MACHINE])?;
        let report = &migration["report"];
        if !status.success() || report["outcome"] != "completed" {
            bail!("the migration ended as {}: {}", report["outcome"], report["detail"]);
        }
        Ok(report.clone())
    }

    /// Runs a verb of a host's agent and returns what it answers.
    fn ask(&self, host: &Host, arguments: &[&str]) -> Result<Value> {
        let output =
            self.command(host).arg("--json").args(arguments).output().context("cannot run godwit")?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            bail!("godwit {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&said).trim());
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    fn command(&self, host: &Host) -> Command {
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

/// A host's `agent.toml`: it trusts the other host, with the guests' bridge and image.
fn agent_config(host: &Host, other: Place, kernel: &Path) -> String {
    let (name, address) = (host.place.name(), host.place.address());
    let (directory, images) = (host.directory.display(), images(kernel).display());
    let (peer, peer_address) = (other.name(), other.address());
    format!(
        "name = \"{name}\"\nstate_dir = \"{directory}/state\"\nsocket = \"{directory}/agent.sock\"\n\
         listen = \"{address}:{AGENT_PORT}\"\nidentity_dir = \"{directory}/identity\"\n\n\
         [accept]\npaths = {{ \"{images}\" = \"{images}\" }}\n\
         bridges = {{ \"{GUEST_BRIDGE}\" = \"{GUEST_BRIDGE}\" }}\n\n\
         [peers.{peer}]\naddress = \"{peer_address}:{AGENT_PORT}\"\nmay_send = true\nmay_receive = true\n"
    )
}

/// The directory that holds the guests' kernel and their initial RAM disks.
fn images(kernel: &Path) -> &Path {
    kernel.ancestors().nth(3).unwrap_or(kernel)
}
