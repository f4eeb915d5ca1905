//! A guest that outruns its link, and what can be done about it. What judges reads the control groups as the kernel has
//! them.

use std::{fs, path::PathBuf, thread, time::Duration};

use serde_json::Value;

use crate::{
    cancelling::settings,
    guest::{Guest, Migration, Plan},
    hosts::{Host, Hosts, eventually, signal},
};
use nix::sys::signal::Signal;

/// Far less than the guest writes.
const SLOW_LINK: [&str; 2] = ["--bandwidth", "100Mbit"];

#[test]
fn a_stall_ends_as_was_chosen() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::PATTERN);
    let before = settings(&hosts.a);

    let given_up = begin(&hosts, &["--on-stall", "cancel"]);
    let (code, report) = given_up.ends();
    assert_eq!((code, &report["outcome"]), (7, &Value::from("cancelled")), "{report}");
    assert_eq!(settings(&hosts.a), before);
    guest.goes_on();

    let waiting = begin(&hosts, &["--on-stall", "wait", "--downtime-target", "400ms"]);
    eventually("the prices are told", || waiting.events().contains("switching now would pause"));
    assert!(slowed_threads(&hosts.a).is_empty());
    hosts.a.godwit(&["set-on-stall", &waiting.id, "throttle"]).succeeds();
    let slowed = eventually_slowed(&hosts.a);
    let (code, report) = waiting.ends();
    assert_eq!((code, &report["outcome"]), (0, &Value::from("completed")), "{report}");
    assert!(report["throttled_ms"].as_u64().unwrap() > 0, "{report}");
    // The prediction may have grown again between the word to stop and the stop; unslowed it is of seconds.
    assert!(report["predicted_downtime_ms"].as_u64().unwrap() <= 800, "{report}");
    assert!(!slowed.exists());
    hosts.only_at(&hosts.b);
    guest.goes_on();
}

/// What the policy said was of a link that carried; a guest that is stopped while it doesn't stands still until it does.
#[test]
fn no_guest_is_stopped_while_nothing_is_heard_of_the_target() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::PATTERN);
    let migration = begin(&hosts, &["--on-stall", "wait"]);
    eventually("the prices are told", || migration.events().contains("switching now would pause"));
    hosts.lab.cut();
    eventually("the operator hears of it", || migration.events().contains("nothing is heard of b"));
    hosts.a.godwit(&["set-on-stall", &migration.id, "switch"]).succeeds();
    // Longer than the policy is patient in all.
    thread::sleep(Duration::from_secs(15));
    guest.goes_on();
    hosts.lab.restore();
    let (code, report) = migration.ends();
    assert_eq!(code, 0, "{report}");
    hosts.only_at(&hosts.b);
    guest.goes_on();
}

/// With nobody left who could, the next agent lifts the limit.
#[test]
fn a_slowed_guest_gets_its_speed_back_when_agent_and_worker_have_died() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::PATTERN);
    let id = begin(&hosts, &["--on-stall", "throttle", "--downtime-target", "20ms"]).id;
    let slowed = eventually_slowed(&hosts.a);
    hosts.a.crash();
    signal(hosts.a.worker(&id), Signal::SIGKILL);
    assert!(slowed.exists());
    hosts.a.start(&hosts.lab);
    eventually("the guest has its speed back", || !slowed.exists() && slowed_threads(&hosts.a).is_empty());
    assert!(!hosts.a.machine_file("throttle.json").exists());
    let migration = Migration { id, from: &hosts.a };
    assert_eq!(migration.ends().0, 1);
    guest.goes_on();
}

fn begin<'a>(hosts: &'a Hosts, options: &[&str]) -> Migration<'a> {
    Migration::begin(&hosts.a, &hosts.b, &[&SLOW_LINK, options].concat())
}

/// Waits until a limit holds a thread of the machine; the control group that does it.
fn eventually_slowed(host: &Host) -> PathBuf {
    eventually("the guest is slowed", || !slowed_threads(host).is_empty());
    slowed_threads(host).remove(0)
}

/// The control groups of the machine's threads that are limited to less than a processor's whole time.
fn slowed_threads(host: &Host) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{}/task", host.qemu())).unwrap();
    let memberships =
        tasks.flatten().map(|task| fs::read_to_string(task.path().join("cgroup")).unwrap_or_default());
    let groups = memberships.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    groups.filter_map(|line| limited(&line)).collect()
}

/// The group of a line of `/proc/…/cgroup`, if it has a limit of processor time.
fn limited(line: &str) -> Option<PathBuf> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    let mount = if controllers.is_empty() { "" } else { controllers };
    let group = PathBuf::from(format!("/sys/fs/cgroup/{mount}{path}"));
    let old = fs::read_to_string(group.join("cpu.cfs_quota_us")).is_ok_and(|quota| !quota.starts_with('-'));
    let new = fs::read_to_string(group.join("cpu.max")).is_ok_and(|quota| !quota.starts_with("max"));
    // The tests' own processes may be limited by a group above.
    let is_its_own = path.rsplit('/').next()?.starts_with("godwit-throttle-");
    ((old || new) && is_its_own).then_some(group)
}
