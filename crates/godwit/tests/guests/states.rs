//! A machine that its operator paused.

use serde_json::json;

use crate::{
    guest::{Guest, Plan, migrate},
    hosts::Hosts,
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
