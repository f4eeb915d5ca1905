//! Two hosts in the lab, each with an agent that the command line drives.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use godwit_sim::{
    guest_image::GuestImage,
    lab::{GUEST_BRIDGE, Lab, Place, Process},
    link::Shape,
    qmp::Qmp,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

const GODWIT: &str = env!("CARGO_BIN_EXE_godwit");
/// The QEMU that is installed.
pub(crate) const EMULATOR: &str = "qemu-system-x86_64";
const AGENT_PORT: u16 = 4577;
const MEGABITS_PER_SECOND: u64 = 300;
const ROUND_TRIP: Duration = Duration::from_millis(4);
/// How long something that must happen may take.
const LIMIT: Duration = Duration::from_secs(40);
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The name of the one machine that tests have.
pub(crate) const MACHINE: &str = "web1";

/// The TAP device of a machine that somebody started by hand; both hosts accept it.
pub(crate) const OWN_TAP: &str = "own0";

/// Two hosts that trust each other, the link between them, and the image that guests boot.
pub(crate) struct Hosts {
    pub a: Host,
    pub b: Host,
    pub image: GuestImage,
    // Last: it ends whatever the hosts left running.
    pub lab: Lab,
}

impl Hosts {
    pub(crate) fn new() -> Self {
        let lab = Lab::new(Shape::symmetric(MEGABITS_PER_SECOND, ROUND_TRIP)).unwrap();
        let image = GuestImage::ensure().unwrap();
        let authority = lab.directory().join("ca");
        succeed(Command::new(GODWIT).args(["ca", "init"]).arg(&authority));
        let mut hosts = Self { a: Host::new(&lab, Place::A), b: Host::new(&lab, Place::B), image, lab };
        for (host, peer) in [(&hosts.a, Place::B), (&hosts.b, Place::A)] {
            host.join(&authority);
            host.configure(peer, &[images(&hosts.image.kernel), &hosts.shared()]);
        }
        fs::create_dir(hosts.shared()).unwrap();
        hosts.a.start(&hosts.lab);
        hosts.b.start(&hosts.lab);
        hosts
    }

    /// A directory that both hosts reach, for disks.
    pub(crate) fn shared(&self) -> PathBuf {
        self.lab.directory().join("disks")
    }

    /// The machine runs at exactly one of the two hosts, and nothing of it is left at the other.
    pub(crate) fn only_at(&self, here: &Host) {
        let other = if here.place == Place::A { &self.b } else { &self.a };
        assert_eq!(here.machine()["state"], "running");
        eventually("nothing runs at the other host", || {
            other.machine()["state"] != "running" && !other.machine_file("qmp.sock").exists()
        });
    }
}

/// A host and its agent.
pub(crate) struct Host {
    place: Place,
    directory: PathBuf,
    agent: Option<Process>,
}

impl Host {
    fn new(lab: &Lab, place: Place) -> Self {
        Self { place, directory: lab.directory_of(place).unwrap(), agent: None }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.place.name()
    }

    fn join(&self, authority: &Path) {
        let (bundle, identity) = (self.path("bundle"), self.path("identity"));
        let mut issue = Command::new(GODWIT);
        succeed(issue.args(["ca", "issue"]).arg(authority).arg(self.name()).arg("--out").arg(&bundle));
        let mut join = Command::new(GODWIT);
        succeed(join.arg("join").arg("--bundle").arg(bundle).arg("--identity").arg(identity));
    }

    /// Writes the configuration. The emulator is QEMU with a monitor for the test, besides those that godwit has.
    fn configure(&self, peer: Place, paths: &[&Path]) {
        self.emulate_with(Path::new(EMULATOR));
        let emulator = self.path("qemu");
        let (name, directory, address) = (self.name(), self.directory.display(), self.place.address());
        let paths: String = paths.iter().map(|path| format!("{path:?} = {path:?}\n")).collect();
        let (peer, peer_address) = (peer.name(), peer.address());
        let config = format!(
            "name = \"{name}\"\nstate_dir = \"{directory}/state\"\nsocket = \"{directory}/agent.sock\"\n\
             listen = \"{address}:{AGENT_PORT}\"\nidentity_dir = \"{directory}/identity\"\n\
             emulator = {emulator:?}\nmemory_reserve = \"1M\"\nrepository = \"{directory}/repository\"\n\n\
             [accept.paths]\n{paths}\n[accept.bridges]\n\"{GUEST_BRIDGE}\" = \"{GUEST_BRIDGE}\"\n\n\
             [accept.taps]\n{OWN_TAP} = \"{OWN_TAP}\"\n\n\
             [peers.{peer}]\naddress = \"{peer_address}:{AGENT_PORT}\"\nmay_send = true\nmay_receive = true\n"
        );
        fs::write(self.path("agent.toml"), config).unwrap();
    }

    /// Machines that start here from now on are this QEMU's.
    pub(crate) fn emulate_with(&self, program: &Path) {
        let (emulator, monitor) = (self.path("qemu"), self.path("test.sock"));
        let (program, monitor) = (program.display(), monitor.display());
        let script = format!("#!/bin/sh\nexec {program} \"$@\" -qmp unix:{monitor},server=on,wait=off\n");
        fs::write(&emulator, script).unwrap();
        fs::set_permissions(&emulator, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Starts the agent and waits until it answers.
    pub(crate) fn start(&mut self, lab: &Lab) {
        self.start_with(lab, &[]);
    }

    /// The same, with more in its environment.
    pub(crate) fn start_with(&mut self, lab: &Lab, environment: &[(&str, &str)]) {
        let mut agent = Command::new(GODWIT);
        agent.envs(environment.iter().copied());
        self.start_by(lab, agent);
    }

    /// The same, of an agent that can't have its workers reach into other users' processes.
    pub(crate) fn start_confined(&mut self, lab: &Lab) {
        let mut agent = Command::new("setpriv");
        agent.args(["--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace", GODWIT]);
        self.start_by(lab, agent);
    }

    fn start_by(&mut self, lab: &Lab, mut agent: Command) {
        agent.arg("agent").arg("--config").arg(self.path("agent.toml"));
        self.agent = Some(lab.spawn(self.place, "agent", &mut agent, true).unwrap());
        eventually("the agent answers", || self.godwit(&["vm", "ls"]).code == 0);
    }

    /// Kills the agent as a crash would; machines go on.
    pub(crate) fn crash(&mut self) {
        self.agent.take().unwrap().kill().unwrap();
    }

    /// Runs the command line against this host's agent.
    pub(crate) fn godwit(&self, arguments: &[&str]) -> Answer {
        let mut command = Command::new(GODWIT);
        command.arg("--socket").arg(self.path("agent.sock")).arg("--json").args(arguments);
        Answer::of(&command.stdin(Stdio::null()).output().unwrap())
    }

    /// What the agent says of the machine; null when it knows none.
    pub(crate) fn machine(&self) -> Value {
        self.godwit(&["vm", "show", MACHINE]).json
    }

    /// The test's own monitor of the machine's QEMU.
    pub(crate) fn monitor(&self) -> Qmp {
        Qmp::connect(&self.path("test.sock"), LIMIT).unwrap()
    }

    /// The process of the machine's QEMU, an incoming one included.
    pub(crate) fn qemu(&self) -> Pid {
        let written: Value = read_json(&self.machine_file("process.json"));
        pid(&written["process"]["pid"])
    }

    /// The process of a migration's worker.
    pub(crate) fn worker(&self, migration: &str) -> Pid {
        pid(&read_json(&self.migration_file(migration, "worker.json"))["pid"])
    }

    /// A file in the machine's directory.
    pub(crate) fn machine_file(&self, name: &str) -> PathBuf {
        self.path("state/machines").join(MACHINE).join(name)
    }

    /// A file in a migration's directory.
    pub(crate) fn migration_file(&self, migration: &str, name: &str) -> PathBuf {
        self.path("state/migrations").join(migration).join(name)
    }

    /// A file of this host.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = fs::read_to_string(self.path("agent.log")).unwrap_or_default();
            eprintln!("agent of {}:\n{log}", self.name());
        }
    }
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Answer {
    pub code: i32,
    pub json: Value,
    /// The `message` of the error.
    pub message: String,
}

impl Answer {
    fn of(output: &Output) -> Self {
        let error = String::from_utf8_lossy(&output.stderr);
        let problem: Value = serde_json::from_str(error.trim()).unwrap_or_default();
        let message = problem["message"].as_str().unwrap_or(&error).to_owned();
        let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Self { code: output.status.code().unwrap(), json, message }
    }

    /// It must have succeeded.
    pub(crate) fn succeeds(self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        self.json
    }

    /// It must have failed with this code.
    pub(crate) fn fails(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }
}

/// Waits for something that must happen.
pub(crate) fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let started = Instant::now();
    while !happened() {
        assert!(started.elapsed() < LIMIT, "didn't happen: {what}");
        thread::sleep(LOOK_EVERY);
    }
}

/// Sends a signal to a process of the test's own hosts.
pub(crate) fn signal(process: Pid, signal: Signal) {
    kill(process, signal).unwrap();
}

/// The directory that holds the guests' kernel and their initial RAM disks.
fn images(kernel: &Path) -> &Path {
    kernel.ancestors().nth(3).unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn pid(written: &Value) -> Pid {
    Pid::from_raw(written.as_i64().unwrap().try_into().unwrap())
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
