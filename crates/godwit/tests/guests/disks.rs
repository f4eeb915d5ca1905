//! Disks that godwit serves, below guests that read what they wrote.

use std::{fs, thread::sleep, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    guest::{Guest, Plan},
    hosts::{Host, Hosts, MACHINE, eventually},
};

/// Writes half a megabyte of random bytes somewhere on the disk, reads it past the guest's cache, and prints a line if it is
/// the same. If it once isn't, nothing is printed any more.
const WRITE_AND_READ: &str = "I=0; while true; do I=$((I+1)); AT=$((I*37%120)); \
    dd if=/dev/urandom of=/tmp/a bs=64k count=8 2>/dev/null; \
    dd if=/tmp/a of=/dev/vda bs=64k seek=$AT conv=notrunc,fsync 2>/dev/null; \
    echo 3 > /proc/sys/vm/drop_caches; \
    dd if=/dev/vda of=/tmp/b bs=64k skip=$AT count=8 2>/dev/null; \
    cmp /tmp/a /tmp/b || sleep 99999; echo same; done";

const DISKS: &str = "[[disk]]\nsize = \"16M\"\n";

#[test]
fn a_guest_does_not_notice_that_the_server_of_its_disk_or_the_agent_dies() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, command: WRITE_AND_READ, ..Plan::IDLE });
    guest.works_on();
    for round in 0..5 {
        kill_server(&hosts.a);
        if round == 2 {
            hosts.a.crash();
            hosts.a.start(&hosts.lab);
        }
        guest.works_on();
        sleep(Duration::from_millis(150));
    }
    assert_eq!(hosts.a.machine()["state"], "running");
}

#[test]
fn a_disk_is_closed_with_its_machine_and_is_there_when_that_runs_again() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, command: WRITE_AND_READ, ..Plan::IDLE });
    guest.works_on();
    hosts.a.godwit(&["vm", "kill", MACHINE]).succeeds();
    assert_eq!(servers(&hosts.a), []);
    let content = || fs::read(hosts.a.path(&format!("state/disks/{MACHINE}.0/data"))).unwrap();
    let before = content();
    assert!(before.iter().any(|byte| *byte != 0));

    let idle = Guest::boot(&hosts, Plan { disks: DISKS, ..Plan::IDLE });
    idle.goes_on();
    assert!(content() == before);
    let log = fs::read_to_string(hosts.a.path(&format!("state/disks/{MACHINE}.0/server.log"))).unwrap();
    assert!(log.contains("ending=Closed"), "{log}");
}

#[test]
fn a_machine_with_a_served_disk_is_not_sent_away_yet() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, ..Plan::IDLE });
    let refused = hosts.a.godwit(&["migrate", MACHINE, "--to", hosts.b.name()]).fails(3);
    assert!(refused.message.contains("served by its host"), "{refused:?}");
    guest.goes_on();
}

/// Kills the server of the machine's disk, and waits for the next.
fn kill_server(host: &Host) {
    let before = servers(host);
    assert_eq!(before.len(), 1);
    kill(before[0], Signal::SIGKILL).unwrap();
    eventually("another server is up", || servers(host).first().is_some_and(|server| *server != before[0]));
}

/// The servers of a host's disks.
fn servers(host: &Host) -> Vec<Pid> {
    let own = host.path("state/disks");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments);
        arguments.contains("disk-server") && arguments.contains(own.to_str().unwrap())
    })
    .map(Pid::from_raw)
    .collect()
}
