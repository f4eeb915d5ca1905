//! Options, machine types and devices that change how a machine travels.

use std::{thread, time::Duration};

use crate::{
    guest::{Guest, Migration, Plan, migrate},
    hosts::Hosts,
};

/// Each move goes on where the one before ended.
fn travels(plan: Plan, moves: &[&[&str]]) {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, plan);
    let (mut from, mut to) = (&hosts.a, &hosts.b);
    for options in moves {
        migrate(from, to, options);
        hosts.only_at(to);
        guest.goes_on();
        (from, to) = (to, from);
    }
}

#[test]
fn a_pc_with_all_devices_travels_in_every_way() {
    travels(
        Plan { all_devices: true, ..Plan::LIGHT },
        &[
            &["--inline"],
            &["--connections", "4"],
            &["--stop-policy", "smart-stop"],
            &["--early-announce", "--base-limit", "1M"],
        ],
    );
}

#[test]
fn a_q35_with_all_devices_travels_in_every_way() {
    travels(
        Plan { machine: "q35", all_devices: true, ..Plan::LIGHT },
        &[&[], &["--inline", "--connections", "4"], &["--stop-policy", "smart-stop", "--verify", "full"]],
    );
}

#[test]
fn what_is_left_out_is_not_done_and_teaches_nothing() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let report = migrate(&hosts.a, &hosts.b, &["--without", "zero,reference,sub-block,delta,compress"]);
    let sent = &report["techniques"];
    for technique in ["zero_pages", "reference_pages", "partial_reference_pages", "delta_pages"] {
        assert_eq!(sent[technique], 0, "{technique}: {report}");
    }
    assert!(sent["batch_bytes"].as_u64() >= sent["literal_bytes"].as_u64(), "{report}");
    assert!(report["forecast"].is_null(), "{report}");
    assert_eq!(hosts.a.godwit(&["history"]).succeeds()["entries"], serde_json::json!([]));
    hosts.only_at(&hosts.b);
    guest.goes_on();
}

/// The hosts' interfaces tell the rate. The factor of the limits is 8; what is asked of the rates leaves room for a
/// machine that does other things too.
#[test]
fn the_bandwidth_limit_can_be_changed_while_a_machine_travels() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::MEDIUM);
    let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "10Mbit"]);
    migration.reaches("pre_copy");
    let slow = bytes_of_two_seconds(&hosts);
    hosts.a.godwit(&["set-bandwidth", &migration.id, "80Mbit"]).succeeds();
    let fast = bytes_of_two_seconds(&hosts);
    assert!(fast > 3 * slow, "{slow} bytes, then {fast}");
    hosts.a.godwit(&["set-bandwidth", &migration.id, "none"]).succeeds();
    let (code, report) = migration.ends();
    assert_eq!(code, 0, "{report}");
    guest.goes_on();
}

fn bytes_of_two_seconds(hosts: &Hosts) -> u64 {
    let before = hosts.lab.wire_bytes().unwrap();
    thread::sleep(Duration::from_secs(2));
    hosts.lab.wire_bytes().unwrap().since(before).a_to_b
}
