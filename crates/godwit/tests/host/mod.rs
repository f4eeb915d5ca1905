//! Hosts for tests: identities, configurations and agents in a directory that goes away, with their processes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

const GODWIT: &str = env!("CARGO_BIN_EXE_godwit");
/// Polls of 50 ms before something that must happen hasn't.
const POLLS_MAX: usize = 600;

/// Some hosts with a common authority.
pub(crate) struct Site {
    directory: TempDir,
}

impl Site {
    pub(crate) fn new() -> Self {
        // Short: sockets live in it.
        let directory = tempfile::Builder::new().prefix("gw").tempdir_in("/tmp").unwrap();
        let site = Self { directory };
        succeed(Command::new(GODWIT).args(["ca", "init"]).arg(site.path("ca")));
        site
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A host with an identity and a running agent; `more` is appended to its configuration.
    pub(crate) fn host(&self, name: &str, port: u16, more: &str) -> Host {
        let bundle = self.path(&format!("{name}.bundle"));
        let identity = self.path(&format!("{name}.id"));
        let ca = self.path("ca");
        succeed(Command::new(GODWIT).args(["ca", "issue"]).arg(ca).arg(name).arg("--out").arg(&bundle));
        succeed(
            Command::new(GODWIT).arg("join").arg("--bundle").arg(bundle).arg("--identity").arg(&identity),
        );
        let host =
            Host { directory: self.path(name), config: self.path(&format!("{name}.toml")), agent: None };
        let [state, identity] = [&host.directory, &identity].map(|path| path.display().to_string());
        let socket = host.socket().display().to_string();
        let config = format!(
            "name = \"{name}\"\nstate_dir = \"{state}\"\nsocket = \"{socket}\"\nlisten = \"127.0.0.1:{port}\"\n\
             identity_dir = \"{identity}\"\nmemory_reserve = \"1M\"\n{more}\n"
        );
        fs::write(&host.config, config).unwrap();
        host.started()
    }
}

/// A host; its agent and machines are killed when it is dropped.
pub(crate) struct Host {
    directory: PathBuf,
    pub config: PathBuf,
    agent: Option<Child>,
}

impl Host {
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.with_extension("sock")
    }

    pub(crate) fn state(&self) -> &Path {
        &self.directory
    }

    fn started(mut self) -> Self {
        self.start();
        self
    }

    /// Starts the agent and waits until it answers.
    pub(crate) fn start(&mut self) {
        let log = fs::File::create(self.directory.with_extension("log")).unwrap();
        let agent = Command::new(GODWIT)
            .args(["agent", "--config"])
            .arg(&self.config)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(agent);
        eventually("the agent answers", || UnixStream::connect(self.socket()).is_ok());
    }

    /// Kills the agent as a crash would.
    pub(crate) fn crash(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Runs the command line.
    pub(crate) fn godwit(&self, arguments: &[&str]) -> Answer {
        let mut command = Command::new(GODWIT);
        command.arg("--socket").arg(self.socket()).arg("--json").args(arguments);
        Answer::of(command.stdin(Stdio::null()).output().unwrap())
    }

    /// Sends a request as curl would; the status and the body.
    pub(crate) fn http(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        let length = body.len();
        let request = format!("{method} {path} HTTP/1.0\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// Writes a specification and returns its path.
    pub(crate) fn spec(&self, name: &str, more: &str) -> String {
        self.spec_of(name, "16M", more)
    }

    /// The same with so much memory.
    pub(crate) fn spec_of(&self, name: &str, memory: &str, more: &str) -> String {
        let path = self.directory.with_extension(format!("{name}.toml"));
        let text =
            format!("name = \"{name}\"\nmachine = \"pc\"\nmemory = \"{memory}\"\naccel = \"tcg\"\n{more}\n");
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// What the API says of a machine's field.
    pub(crate) fn machine(&self, name: &str, field: &str) -> Value {
        self.http("GET", &format!("/v1/machines/{name}"), "").1[field].clone()
    }

    /// Kills QEMU processes and workers, by the ids that the agent wrote down.
    fn kill_what_outlives_the_agent(&self) {
        for (directory, file, process) in
            [("machines", "process.json", "/process/pid"), ("migrations", "worker.json", "/pid")]
        {
            for entry in fs::read_dir(self.directory.join(directory)).into_iter().flatten().flatten() {
                let Ok(text) = fs::read_to_string(entry.path().join(file)) else { continue };
                let written: Value = serde_json::from_str(&text).unwrap_or_default();
                // A migration that is over has a report; its worker's id may be another's by now.
                let over = entry.path().join("report.json").exists();
                if let Some(pid) = written.pointer(process).and_then(Value::as_i64).filter(|_| !over) {
                    kill_pid(pid);
                }
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        self.kill_what_outlives_the_agent();
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.directory.with_extension("log")).unwrap_or_default());
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
    fn of(output: Output) -> Self {
        let error = String::from_utf8(output.stderr).unwrap();
        let problem: Value = serde_json::from_str(error.trim()).unwrap_or_default();
        let message = problem["message"].as_str().map_or(error, str::to_owned);
        let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Self { code: output.status.code().unwrap(), json, message }
    }

    /// It must have failed with this code, in one line that contains `text`.
    pub(crate) fn fails(&self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.message.contains(text), "{:?} doesn't contain {text:?}", self.message);
        assert_eq!(self.message.trim().lines().count(), 1, "{self:?}");
    }

    /// It must have succeeded.
    pub(crate) fn succeeds(self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        self.json
    }
}

pub(crate) fn kill_pid(pid: i64) {
    let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for something that must happen.
pub(crate) fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    for _ in 0..POLLS_MAX {
        if happened() {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("didn't happen: {what}");
}

pub(crate) fn run(arguments: &[&str]) -> Answer {
    Answer::of(Command::new(GODWIT).args(arguments).stdin(Stdio::null()).output().unwrap())
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
