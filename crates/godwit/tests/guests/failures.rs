//! What dies on the way takes no guest with it: exactly one copy runs on, and what was left behind is put in order by the
//! agents, or by the next ones.

use std::{
    fs::{self, File},
    path::Path,
    thread,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
    sys::signal::Signal,
};
use serde_json::{Value, json};

use crate::{
    cancelling::settings,
    guest::{Guest, Migration, Plan, migrate},
    hosts::{Host, Hosts, MACHINE, eventually, signal},
};

/// Slow enough for a phase to be met, fast enough for a test.
const SLOWLY: [&str; 2] = ["--bandwidth", "60Mbit"];

/// Gives a process another clock; of the package `libfaketime`.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Source,
    Target,
}

#[test]
fn a_worker_that_dies_at_any_phase_leaves_one_running_copy() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let before = settings(&hosts.a);
    for phase in ["pre_copy", "switchover", "handed_over"] {
        for side in [Side::Source, Side::Target] {
            let (from, to) = from_and_to(&hosts);
            let migration = Migration::begin(from, to, &SLOWLY);
            migration.reaches(phase);
            let victim = if side == Side::Source { from } else { to };
            victim.kill_worker(&migration.id);
            is_settled(&hosts, &guest, &before, &format!("{side:?} in {phase}"));
        }
    }
    let (from, to) = from_and_to(&hosts);
    migrate(from, to, &[]);
    guest.goes_on();
}

#[test]
fn a_target_worker_that_dies_is_reported_at_once() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "20Mbit"]);
    migration.reaches("pre_copy");
    hosts.b.kill_worker(&migration.id);
    let (code, report) = migration.ends();
    assert_eq!(code, 1, "{report}");
    assert_eq!(report["detail"], "the target's worker died", "{report}");
    hosts.only_at(&hosts.a);
    guest.goes_on();
    eventually("the target has forgotten the machine", || hosts.b.godwit(&["vm", "show", MACHINE]).code == 4);
}

/// The link, both agents and the source's worker: the guest stands still until an agent is back, and no longer.
#[test]
fn agents_that_come_back_finish_what_was_open() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let before = settings(&hosts.a);
    for phase in ["switchover", "handed_over"] {
        let from_a = hosts.a.machine()["state"] == "running";
        let id = {
            let (from, to) = from_and_to(&hosts);
            let migration = Migration::begin(from, to, &SLOWLY);
            migration.reaches(phase);
            migration.id
        };
        hosts.a.crash();
        hosts.b.crash();
        let source = if from_a { &hosts.a } else { &hosts.b };
        source.kill_worker(&id);
        hosts.a.start(&hosts.lab);
        hosts.b.start(&hosts.lab);
        is_settled(&hosts, &guest, &before, phase);
    }
}

#[test]
fn a_restarted_agent_takes_its_migration_up_again() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let id = {
        let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "30Mbit"]);
        migration.reaches("pre_copy");
        migration.id
    };
    hosts.b.crash();
    hosts.a.crash();
    hosts.b.start(&hosts.lab);
    hosts.a.start(&hosts.lab);
    assert_eq!(hosts.a.godwit(&["set-bandwidth", &id, "none"]).code, 0);
    assert_eq!(hosts.a.godwit(&["status", &id, "--watch"]).code, 0);
    hosts.only_at(&hosts.b);
    guest.goes_on();
}

#[test]
fn a_link_that_is_cut_is_waited_for() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let migration = Migration::begin(&hosts.a, &hosts.b, &SLOWLY);
    migration.reaches("pre_copy");
    thread::sleep(Duration::from_secs(2));
    hosts.lab.cut();
    let wire_bytes = || hosts.a.godwit(&["status", &migration.id]).json["progress"]["wire_bytes"].as_u64();
    eventually("the operator hears of it", || migration.events().contains("nothing is heard of b"));
    thread::sleep(Duration::from_secs(13));
    guest.goes_on();
    let sent = wire_bytes();
    hosts.lab.restore();
    let (code, report) = migration.ends();
    assert_eq!(code, 0, "{report}");
    assert!(migration.events().contains("b is back after"), "{}", migration.events());
    assert_eq!(report["reconnections"], 1, "{report}");
    let (again, sent) = (report["repeated_bytes"].as_u64().unwrap(), sent.unwrap());
    assert!(again < sent / 4, "{again} of {sent} bytes were sent again");
    hosts.only_at(&hosts.b);
    guest.goes_on();
}

#[test]
fn a_link_that_stays_away_leaves_the_machine_where_it_was() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let before = settings(&hosts.a);
    let impatient = [&SLOWLY[..], &["--reconnect-timeout", "2s"]].concat();
    let migration = Migration::begin(&hosts.a, &hosts.b, &impatient);
    migration.reaches("pre_copy");
    hosts.lab.cut();
    let (code, report) = migration.ends();
    assert_eq!(code, 1, "{report}");
    assert_eq!(report["machine_is_at"], "a", "{report}");
    hosts.lab.restore();
    is_settled(&hosts, &guest, &before, "after a lost link");
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}

#[test]
fn what_arrived_before_a_lost_link_is_not_sent_again() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let keeping = [&SLOWLY[..], &["--reconnect-timeout", "2s", "--keep-partial"]].concat();
    let migration = Migration::begin(&hosts.a, &hosts.b, &keeping);
    migration.reaches("pre_copy");
    thread::sleep(Duration::from_secs(7));
    hosts.lab.cut();
    let (code, first) = migration.ends();
    assert_eq!(code, 1, "{first}");
    hosts.lab.restore();
    let kept = hosts.b.path("state/partial").join(format!("{MACHINE}.memory"));
    eventually("the target keeps what it has", || kept.exists());
    eventually("the target has forgotten the machine", || hosts.b.godwit(&["vm", "show", MACHINE]).code == 4);
    let again = Migration::begin(&hosts.a, &hosts.b, &["--verify", "full"]);
    let (code, second) = again.ends();
    assert_eq!(code, 0, "{second}");
    assert!(again.events().contains("b kept what arrived"), "{}", again.events());
    let bytes = |report: &Value| report["wire_bytes"].as_u64().unwrap();
    assert!(bytes(&second) < bytes(&first), "{} bytes after {}", bytes(&second), bytes(&first));
    assert!(!kept.exists());
    hosts.only_at(&hosts.b);
    guest.goes_on();
}

/// An image that somebody else has locked can't be opened by the target, which finds out when it has loaded everything
/// and says `cont`; nor by the source, which gets the machine back and can go on only once the lock is gone.
#[test]
fn a_refusal_after_the_load_gives_the_machine_back() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { all_devices: true, ..Plan::LIGHT });
    let before = settings(&hosts.a);
    for image in ["disk.raw", "disk.qcow2"] {
        let lock = ImageLock::take(&hosts.shared().join(image));
        let migration = Migration::begin(&hosts.a, &hosts.b, &[]);
        migration.reaches("handed_over");
        eventually("the target refuses", || hosts.b.record()["state"] == "refused");
        eventually("the target has forgotten the machine", || !hosts.b.machine_file("spec.json").exists());
        drop(lock);
        is_settled(&hosts, &guest, &before, image);
        hosts.only_at(&hosts.a);
    }
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}

#[test]
fn a_host_that_never_comes_back_is_declared_lost_and_stands_down_when_it_does() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let impatient = [&SLOWLY[..], &["--reconnect-timeout", "3s"]].concat();
    let migration = Migration::begin(&hosts.a, &hosts.b, &impatient);
    migration.reaches("handed_over");
    hosts.lab.cut();
    let id = migration.id;
    hosts.b.crash();
    eventually("the source says that it doesn't know", || {
        let answer = hosts.a.godwit(&["recover", MACHINE]);
        answer.code == 6 && answer.json["machines"][0]["found"].as_str().unwrap().contains("had left for b")
    });
    hosts.a.godwit(&["recover", MACHINE, "--assume-lost", "b"]).fails(3);
    hosts.a.godwit(&["recover", MACHINE, "--assume-lost", "b", "--confirm", "a"]).fails(2);
    let lost = hosts.b.qemu_if_any();
    let taken = hosts.a.godwit(&["recover", MACHINE, "--assume-lost", "b", "--confirm", "b"]).succeeds();
    assert_eq!(taken["machines"][0]["at"], "a", "{taken}");
    assert_eq!(hosts.a.machine()["state"], "running", "{id}: {taken}");
    hosts.lab.restore();
    hosts.b.start(&hosts.lab);
    eventually("the lost host stands down", || {
        lost.is_none_or(|it| !Path::new(&format!("/proc/{it}")).exists())
    });
    hosts.only_at(&hosts.a);
    eventually("the order is forgotten", || {
        fs::read_dir(hosts.a.path("state/stand-down")).is_ok_and(|it| it.count() == 0)
    });
    guest.goes_on();
}

/// The host's QEMU and workers have the agent's clock; the monotonic one goes on, as on a host whose clock is set.
#[test]
fn a_clock_that_jumps_changes_nothing() {
    let mut hosts = Hosts::new();
    let clock = hosts.b.path("clock");
    let jump = |by: &str| fs::write(&clock, by).unwrap();
    jump("+0");
    hosts.b.crash();
    let environment = [
        ("LD_PRELOAD", FAKETIME),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    hosts.b.start_with(&hosts.lab, &environment);
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    for (from, to, by) in [(&hosts.a, &hosts.b, "+400d"), (&hosts.b, &hosts.a, "-50m")] {
        let migration = Migration::begin(from, to, &SLOWLY);
        migration.reaches("pre_copy");
        jump(by);
        let (code, report) = migration.ends();
        assert_eq!((code, &report["outcome"]), (0, &json!("completed")), "{report}");
        // The pause by both clocks would be 400 days, or less than nothing.
        assert_eq!(report["downtime_ms"], json!(null), "{report}");
        assert!(report["downtime_source_ms"].as_f64().unwrap() > 0.0, "{report}");
        hosts.only_at(to);
        guest.goes_on();
    }
}

fn from_and_to(hosts: &Hosts) -> (&Host, &Host) {
    let at_a = hosts.a.machine()["state"] == "running";
    if at_a { (&hosts.a, &hosts.b) } else { (&hosts.b, &hosts.a) }
}

/// Exactly one copy runs, as it was, nothing is left at the other host, and both agents know it.
fn is_settled(hosts: &Hosts, guest: &Guest, before: &[Value; 2], what: &str) {
    let runs = |host: &Host| host.machine()["state"] == "running";
    eventually(&format!("one copy runs ({what})"), || {
        let settled = |host: &Host| host.godwit(&["recover"]).code == 0;
        settled(&hosts.a) && settled(&hosts.b) && (runs(&hosts.a) != runs(&hosts.b))
    });
    let (here, there) = from_and_to(hosts);
    hosts.only_at(here);
    let known = there.machine();
    assert!(known["state"].is_null() || known["at"] == json!(here.name()), "{what}: {known}");
    eventually(&format!("QEMU is as it was ({what})"), || settings(here) == *before);
    assert!(!here.machine_file("qemu-settings.json").exists());
    guest.goes_on();
}

/// A lock on an image that says: nobody else may write (QEMU's file-posix: byte 200 plus the number of a permission that
/// isn't shared; the second is "write").
#[derive(Debug)]
struct ImageLock {
    _file: File,
}

impl ImageLock {
    fn take(image: &Path) -> Self {
        let file = File::options().read(true).write(true).open(image).unwrap();
        let not_shared = libc::flock {
            l_type: libc::F_RDLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 201,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&not_shared)).unwrap();
        Self { _file: file }
    }
}

impl Migration<'_> {
    /// What its source's worker said so far.
    pub(crate) fn events(&self) -> String {
        fs::read_to_string(self.from.migration_file(&self.id, "events.ndjson")).unwrap()
    }
}

impl Host {
    /// Kills a worker that may have ended already.
    fn kill_worker(&self, migration: &str) {
        if !self.migration_file(migration, "report.json").exists() {
            signal(self.worker(migration), Signal::SIGKILL);
        }
    }

    /// The record of who may run the machine.
    fn record(&self) -> Value {
        let text = fs::read_to_string(self.machine_file("token.json")).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    fn qemu_if_any(&self) -> Option<i32> {
        self.machine_file("process.json").exists().then(|| self.qemu().as_raw())
    }
}
