//! Several guests of one image: what the target has of one, the others only name; and what becomes of them when it is
//! damaged.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::fs::FileExt,
};

use godwit_sim::lab::FIRST_GUEST_ADDRESS;
use serde_json::Value;

use crate::{
    guest::{Guest, Migration, Plan},
    hosts::{Host, Hosts, eventually},
};

const MACHINES: [&str; 2] = ["web1", "web2"];
const VERIFIED: [&str; 2] = ["--verify", "full"];
const ALONE: [&str; 4] = ["--verify", "full", "--without", "shared"];
/// A page's place in the file is behind a header of this size.
const HEADER_BYTES: u64 = 4096;

#[test]
fn guests_that_move_one_after_the_other_send_what_they_have_in_common_once() {
    let (hosts, guests) = two_guests();
    let [first, second] = MACHINES.map(|machine| moves(machine, &hosts.a, &hosts.b, &VERIFIED));
    assert!(is_alone(&first) && !is_alone(&second), "{first} {second}");
    assert!(bytes(&second) < bytes(&first) / 2, "{} after {} bytes", bytes(&second), bytes(&first));
    let [first, second] = MACHINES.map(|machine| moves(machine, &hosts.b, &hosts.a, &ALONE));
    assert_eq!(second["techniques"]["shared_pages"], 0, "{second}");
    assert!(bytes(&second) > bytes(&first) / 2, "{} after {} bytes", bytes(&second), bytes(&first));
    guests.iter().for_each(Guest::goes_on);
}

#[test]
fn guests_that_move_at_once_send_what_they_have_in_common_about_once() {
    let (hosts, guests) = two_guests();
    let together = |from, to, options| -> u64 {
        let under_way = MACHINES.map(|machine| Migration::begin_with(machine, from, to, options));
        under_way.iter().map(|migration| bytes(&completed(migration))).sum()
    };
    let sharing = together(&hosts.a, &hosts.b, &["--bandwidth", "50Mbit"]);
    let alone = together(&hosts.b, &hosts.a, &ALONE);
    assert!(sharing < alone * 3 / 4, "{sharing} bytes, {alone} with nothing shared");
    guests.iter().for_each(Guest::goes_on);
}

#[test]
fn damaged_pages_end_the_migration_that_needs_them_and_not_the_next() {
    let (hosts, guests) = two_guests();
    let pages = hosts.b.path("agent.shared/from-a.pages");
    let cut = |file: &File| file.set_len(HEADER_BYTES).unwrap();
    let overwrite = |file: &File| {
        let bytes = file.metadata().unwrap().len() - HEADER_BYTES;
        file.write_all_at(&vec![7; bytes as usize], HEADER_BYTES).unwrap();
    };
    for damage in [&cut as &dyn Fn(&File), &overwrite] {
        moves("web1", &hosts.a, &hosts.b, &[]);
        damage(&File::options().write(true).open(&pages).unwrap());
        let (code, report) = Migration::begin_with("web2", &hosts.a, &hosts.b, &[]).ends();
        assert_eq!((code, &report["machine_is_at"]), (1, &Value::from("a")), "{report}");
        assert!(report["detail"].as_str().unwrap().contains("pages that guests share"), "{report}");
        assert!(!pages.exists(), "they are given up");
        guests[1].goes_on();
        eventually("the target has forgotten the machine", || {
            hosts.b.godwit(&["vm", "show", "web2"]).code == 4
        });
        let again = moves("web2", &hosts.a, &hosts.b, &VERIFIED);
        assert!(is_alone(&again), "{again}");
        for machine in MACHINES {
            moves(machine, &hosts.b, &hosts.a, &ALONE);
        }
    }
    guests.iter().for_each(Guest::goes_on);
}

#[test]
fn nothing_that_was_shared_outlives_its_agents() {
    let (mut hosts, _guests) = two_guests();
    moves("web1", &hosts.a, &hosts.b, &[]);
    let (lab, left) = (&hosts.lab, |host: &Host| fs::read_dir(host.path("agent.shared")).unwrap().count());
    for host in [&mut hosts.a, &mut hosts.b] {
        assert_eq!(left(host), 1);
        host.crash();
        host.start(lab);
        eventually("the next agent removes it", || left(host) == 0);
    }
}

fn two_guests() -> (Hosts, [Guest; 2]) {
    let hosts = Hosts::new();
    let second = Ipv4Addr::from_bits(FIRST_GUEST_ADDRESS.to_bits() + 1);
    let guests = [(MACHINES[0], FIRST_GUEST_ADDRESS), (MACHINES[1], second)]
        .map(|(name, address)| Guest::boot_as(&hosts, Plan::IDLE, name, address));
    (hosts, guests)
}

fn moves(machine: &str, from: &Host, to: &Host, options: &[&str]) -> Value {
    completed(&Migration::begin_with(machine, from, to, options))
}

fn completed(migration: &Migration<'_>) -> Value {
    let (code, report) = migration.ends();
    assert_eq!((code, &report["outcome"]), (0, &Value::from("completed")), "{report}");
    report
}

/// What batches took.
fn bytes(report: &Value) -> u64 {
    report["techniques"]["batch_bytes"].as_u64().unwrap()
}

/// Whether the target had hardly anything of other guests; a guest shares a few pages with itself.
fn is_alone(report: &Value) -> bool {
    let pages = |form| report["techniques"][form].as_u64().unwrap();
    pages("shared_pages") < pages("literal_pages") / 50
}
