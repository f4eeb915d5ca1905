//! What dies on the way takes no guest with it.

use nix::sys::signal::Signal;

use crate::{
    guest::{Guest, Migration, Plan, migrate},
    hosts::{Hosts, MACHINE, eventually, signal},
};

/// It takes a minute: the source gives the link that long to come back.
#[test]
fn a_target_worker_that_dies_leaves_the_guest_at_the_source() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "20Mbit"]);
    migration.reaches("pre_copy");
    signal(hosts.b.worker(&migration.id), Signal::SIGKILL);
    let (code, report) = migration.ends();
    assert_eq!(code, 1, "{report}");
    hosts.only_at(&hosts.a);
    guest.goes_on();
    eventually("the target has forgotten the machine", || hosts.b.godwit(&["vm", "show", MACHINE]).code == 4);
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}
