//! The agent as a service: what it tells its manager, its certificate while it runs, and life without root.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::{fs::lchown, net::UnixDatagram},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use godwit_transport::identity::{Authority, HostIdentity, Validity};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use serde_json::{Value, json};

use crate::{
    host::{Host, Site, eventually, free_port},
    peer,
};

const GODWIT: &str = env!("CARGO_BIN_EXE_godwit");
/// The user that owns nothing.
const NOBODY: u32 = 65_534;
const DAY: Duration = Duration::from_secs(86_400);

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

fn said(manager: &UnixDatagram) -> String {
    let mut message = [0; 256];
    let length = manager.recv(&mut message).unwrap();
    String::from_utf8(message[..length].to_vec()).unwrap().trim().to_owned()
}

#[test]
fn the_service_manager_hears_that_it_is_ready_alive_and_stopping() {
    let site = Site::new();
    let mut host = site.host("hosta", 0, "");
    host.crash();
    let socket = site.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut agent = Command::new(GODWIT)
        .args(["agent", "--config"])
        .arg(&host.config)
        .env("NOTIFY_SOCKET", &socket)
        .env("WATCHDOG_USEC", "300000")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(said(&manager), "READY=1");
    assert_eq!(host.http("GET", "/v1/health", "").0, 200, "ready means that it answers");
    for _ in 0..3 {
        assert_eq!(said(&manager), "WATCHDOG=1");
    }
    // What it starts doesn't speak in its name.
    let machine = host.godwit(&["vm", "run", &host.spec("web1", "")]).succeeds();
    let environment = fs::read(format!("/proc/{}/environ", machine["pid"])).unwrap();
    assert!(!environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"NOTIFY_SOCKET")));
    signal(&agent, Signal::SIGTERM);
    let last = std::iter::repeat_with(|| said(&manager)).find(|said| said != "WATCHDOG=1");
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
    assert!(agent.wait().unwrap().success());
}

/// Puts a certificate in the place of a host's, as an operator does.
fn renew(site: &Site, name: &str, lifetime: Duration) {
    let now = SystemTime::now();
    let authority = Authority::open(&site.path("ca")).unwrap();
    let bundle = authority.issue(&name.parse().unwrap(), Validity::starting(now, lifetime)).unwrap();
    let [fresh, old] = ["fresh.id", &format!("{name}.id")].map(|directory| site.path(directory));
    HostIdentity::join(&fresh, &bundle, now).unwrap();
    fs::remove_dir_all(&old).unwrap();
    fs::rename(fresh, old).unwrap();
}

fn expires_in(host: &Host) -> Duration {
    let health = host.http("GET", "/v1/health", "").1;
    let expires = Duration::from_secs(health["certificate_expires_unix_s"].as_u64().unwrap());
    expires.saturating_sub(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap())
}

fn log(site: &Site, name: &str) -> String {
    fs::read_to_string(site.path(&format!("{name}.log"))).unwrap()
}

#[test]
fn a_certificate_is_renewed_while_the_agent_runs() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    renew(&site, "hosta", 10 * DAY);
    eventually("the new certificate is used", || expires_in(&host) < 11 * DAY);
    eventually("its end is near", || log(&site, "hosta").contains("certificate expires in 9 days"));
    fs::write(site.path("hosta.id/host.pem"), "damaged").unwrap();
    eventually("it is refused", || log(&site, "hosta").contains("the new identity isn't used"));
    assert!(expires_in(&host) > 9 * DAY, "the old one is in use");
    renew(&site, "hosta", 90 * DAY);
    eventually("the next one is used", || expires_in(&host) > 80 * DAY);
    assert!(!log(&site, "hosta").contains("PRIVATE KEY"));
}

/// Gives everything below a directory to somebody.
fn give(path: &Path, user: u32) {
    lchown(path, Some(user), Some(user)).unwrap();
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        give(&entry.path(), user);
    }
}

fn capabilities(pid: &Value) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap()
}

/// As the unit starts it: another user, two capabilities, none more to be had.
#[test]
fn two_capabilities_do_where_root_did() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can become somebody else");
        return;
    }
    let site = Site::new();
    let ports = [free_port(), free_port()];
    let mut a = site.host("hosta", ports[0], &peer("hostb", ports[1], "may_receive = true"));
    let b = site.host("hostb", ports[1], &peer("hosta", ports[0], "may_send = true"));
    let spec = a.spec("web1", "");
    a.crash();
    give(a.socket().parent().unwrap(), NOBODY);
    let mut agent = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"])
        .args(["--bounding-set=-all,+net_admin,+sys_ptrace", "--inh-caps=-all,+net_admin,+sys_ptrace"])
        .args(["--ambient-caps=-all,+net_admin,+sys_ptrace", GODWIT, "agent", "--config"])
        .arg(&a.config)
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    eventually("the agent answers", || std::os::unix::net::UnixStream::connect(a.socket()).is_ok());
    let machine = a.godwit(&["vm", "run", &spec]).succeeds();
    assert_eq!(capabilities(&machine["pid"]), 0, "a machine has none");
    let report = a.godwit(&["migrate", "web1", "--to", "hostb", "--verify", "full"]).succeeds();
    // Without the capability there would be nothing to compare with.
    assert_eq!(report["outcome"], "completed");
    assert!(report["pages_verified"].as_u64().is_some_and(|pages| pages > 0), "{report}");
    assert_eq!(b.machine("web1", "state"), json!("running"));
    signal(&agent, Signal::SIGTERM);
    assert!(agent.wait().unwrap().success());
}
