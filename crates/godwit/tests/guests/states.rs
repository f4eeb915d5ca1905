//! A machine that its operator paused, and one that fell asleep.

use serde_json::json;

use crate::{
    guest::{Guest, Migration, Plan, migrate},
    hosts::{Hosts, eventually},
    moves::run_state,
};

#[test]
fn a_paused_machine_stays_paused_until_its_operator_says_otherwise() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    hosts.a.monitor().execute("stop", json!({})).unwrap();
    for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
        migrate(from, to, &[]);
        assert_eq!(to.machine()["state"], "paused");
    }
    hosts.a.monitor().execute("cont", json!({})).unwrap();
    hosts.only_at(&hosts.a);
    guest.goes_on();
}

#[test]
fn a_guest_that_falls_asleep_on_the_way_arrives_asleep() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let mut source = hosts.a.monitor();
    let migration = Migration::begin(&hosts.a, &hosts.b, &["--bandwidth", "80Mbit"]);
    migration.reaches("pre_copy");
    guest.is_told("suspend");
    eventually("the guest sleeps", || run_state(&mut source) == "suspended");
    let (code, report) = migration.ends();
    assert_eq!(code, 0, "{report}");
    let mut target = hosts.b.monitor();
    assert_eq!(
        (run_state(&mut target).as_str(), &hosts.b.machine()["state"]),
        ("suspended", &json!("suspended"))
    );
    target.execute("system_wakeup", json!({})).unwrap();
    guest.goes_on();
    hosts.only_at(&hosts.b);
}
