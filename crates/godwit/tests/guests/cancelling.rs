//! Giving up, in every phase: the guest goes on where it was, its QEMU is as it was, and it can be moved again.

use std::{thread, time::Duration};

use serde_json::{Value, json};

use crate::{
    guest::{Guest, Migration, Plan, migrate},
    hosts::{Host, Hosts, MACHINE, eventually},
};

#[test]
fn a_migration_can_be_given_up_before_the_stop() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let before = settings(&hosts.a);
    for delay_ms in [0, 30, 100, 300, 1_000] {
        let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "50Mbit"]);
        thread::sleep(Duration::from_millis(delay_ms));
        migration.cancel().succeeds();
        is_as_before(&hosts, &guest, &migration, &before);
    }
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}

/// A low rate makes the pause long enough for the word to come within it. Where it comes too late, the machine has
/// moved, whole.
#[test]
fn a_migration_can_be_given_up_in_the_pause() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let before = settings(&hosts.a);
    for delay_ms in [0, 100] {
        let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "60Mbit"]);
        migration.reaches("switchover");
        thread::sleep(Duration::from_millis(delay_ms));
        migration.cancel();
        if migration.ends().0 == 0 {
            hosts.only_at(&hosts.b);
            migrate(&hosts.b, &hosts.a, &[]);
            guest.goes_on();
        } else {
            is_as_before(&hosts, &guest, &migration, &before);
        }
    }
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}

fn is_as_before(hosts: &Hosts, guest: &Guest, migration: &Migration, before: &[Value; 2]) {
    let (code, report) = migration.ends();
    assert_eq!((code, &report["outcome"]), (7, &json!("cancelled")), "{report}");
    assert_eq!(report["machine_is_at"], "a");
    guest.goes_on();
    assert_eq!(&settings(&hosts.a), before);
    hosts.only_at(&hosts.a);
    eventually("the target has forgotten the machine", || hosts.b.godwit(&["vm", "show", MACHINE]).code == 4);
}

/// The migration settings of the machine's QEMU.
pub(crate) fn settings(host: &Host) -> [Value; 2] {
    let mut monitor = host.monitor();
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|query| monitor.execute(query, json!({})).unwrap())
}
