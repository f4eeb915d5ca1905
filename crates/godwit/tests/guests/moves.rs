//! There and back, and both memories equal while both are paused.

use godwit_sim::qmp::Qmp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    guest::{Guest, Migration, Plan, migrate},
    hosts::{Host, Hosts, eventually, signal},
    memory,
};

#[test]
fn an_idle_guest_goes_there_and_back_unchanged() {
    there_and_back(Plan::IDLE, &[]);
}

#[test]
fn a_light_guest_goes_there_and_back_unchanged() {
    there_and_back(Plan { all_devices: true, ..Plan::LIGHT }, &[]);
}

#[test]
fn a_medium_guest_goes_there_and_back_unchanged() {
    there_and_back(Plan::MEDIUM, &[]);
}

#[test]
fn a_guest_is_unchanged_by_a_move_through_qemus_own_stream() {
    there_and_back(Plan::LIGHT, &["--inline"]);
}

/// A page that is written while it is read is caught by a later pass: this guest does nothing else.
#[test]
fn a_guest_that_does_nothing_but_write_arrives_unchanged() {
    there_and_back(Plan::PATTERN, &[]);
}

#[test]
fn full_verification_compares_every_page() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::MEDIUM);
    let report = migrate(&hosts.a, &hosts.b, &["--verify", "full"]);
    let at_target = hosts.b.godwit(&["status", report["id"].as_str().unwrap()]).succeeds();
    assert_eq!(at_target["report"]["pages_verified"], guest.memory_bytes() / 4096);
    guest.goes_on();
}

/// The processors write at the same time, each in a thread of QEMU's.
#[test]
fn a_guest_of_four_processors_goes_there_and_back_unchanged() {
    there_and_back(Plan { vcpus: 4, command: BUSY, ..Plan::PATTERN }, &[]);
}

/// Most of its memory is zero, or becomes so after it was something else.
#[test]
fn a_guest_that_writes_zeros_arrives_unchanged() {
    const ZEROING: &str =
        "for from in urandom zero; do dd if=/dev/$from of=/tmp/f bs=64k count=256; done; echo";
    there_and_back(Plan { memory_mb: 768, command: ZEROING, ..Plan::LIGHT }, &[]);
}

/// What it writes is random, and everywhere: no delta is small, nothing compresses, and no cache of older pages helps.
#[test]
#[ignore = "sends a gigabyte over a slow link"]
fn a_guest_that_no_technique_helps_arrives_unchanged() {
    there_and_back(Plan { memory_mb: 512, workload: "harsh", ..Plan::LIGHT }, &[]);
}

/// What keeps further processors busy: files that are written anew all the time.
pub(crate) const BUSY: &str =
    "for f in 1 2 3; do dd if=/dev/urandom of=/tmp/$f bs=64k count=64 & done; wait; echo";

fn there_and_back(plan: Plan, options: &[&str]) {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, plan);
    goes_there_and_back(&hosts, &guest, options);
}

/// From host a to b and back, with both memories compared each time.
pub(crate) fn goes_there_and_back(hosts: &Hosts, guest: &Guest, options: &[&str]) {
    for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
        move_and_compare(hosts, guest, from, to, options);
        hosts.only_at(to);
        guest.goes_on();
    }
}

/// Moves the machine and returns the source's report.
///
/// The target's QEMU is held from the opening of the gate on (earlier, the worker couldn't pass on what belongs to small
/// RAM blocks), so that it can't load, the hand-over can't be settled and the source's QEMU stays, paused, for as long
/// as it takes to save its memory. The target is left paused and saved before it runs.
pub(crate) fn move_and_compare(
    hosts: &Hosts,
    guest: &Guest,
    from: &Host,
    to: &Host,
    options: &[&str],
) -> Value {
    let mut source = from.monitor();
    let [before, after] = ["before", "after"].map(|name| hosts.lab.directory().join(name));
    let migration = Migration::begin(from, to, &[&["--leave-paused"], options].concat());
    migration.reaches("switchover");
    signal(to.qemu(), Signal::SIGSTOP);
    eventually("the source is paused for good", || run_state(&mut source) == "postmigrate");
    memory::save(&mut source, guest.memory_bytes(), &before);
    signal(to.qemu(), Signal::SIGCONT);
    let (code, report) = migration.ends();
    assert_eq!((code, &report["outcome"]), (0, &Value::from("completed")), "{report}");

    let mut target = to.monitor();
    assert_eq!(run_state(&mut target), "paused");
    memory::save(&mut target, guest.memory_bytes(), &after);
    let differing = memory::differing_pages(&before, &after);
    assert!(differing.is_empty(), "{} pages differ: {differing:#x?}", differing.len());
    target.execute("cont", json!({})).unwrap();
    report
}

/// What QEMU says that its guest does.
pub(crate) fn run_state(monitor: &mut Qmp) -> String {
    let status = monitor.execute("query-status", json!({})).unwrap();
    status["status"].as_str().unwrap().to_owned()
}
