//! What a migration will take is known before it begins, and kept beside what it took.

use std::fs;

use serde_json::Value;

use crate::{
    guest::{Guest, Plan, migrate},
    hosts::{Host, Hosts, MACHINE},
};

/// What a host has of machines and rehearsals.
fn machines(host: &Host) -> Vec<String> {
    let entries = fs::read_dir(host.path("state/machines")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn is_a_range(range: &Value) -> bool {
    let part = |name: &str| range[name].as_u64().unwrap();
    0 < part("low") && part("low") <= part("likely") && part("likely") <= part("high")
}

#[test]
fn a_migration_is_foreseen_before_its_first_byte_and_remembered() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::MEDIUM);
    let check = hosts.a.godwit(&["check", MACHINE, "--to", "b"]).succeeds();
    assert!(is_a_range(&check["forecast"]["wire_bytes"]), "{check}");
    assert!(machines(&hosts.b).is_empty());
    guest.goes_on();

    let report = migrate(&hosts.a, &hosts.b, &[]);
    for figure in ["total_ms", "wire_bytes", "downtime_ms"] {
        assert!(is_a_range(&report["forecast"][figure]), "{figure}: {report}");
    }
    // The worker, which sends the first byte, was started with it.
    let id = report["id"].as_str().unwrap();
    let job: Value =
        serde_json::from_slice(&fs::read(hosts.a.migration_file(id, "job.json")).unwrap()).unwrap();
    assert_eq!(job["forecast"], report["forecast"]);
    assert_eq!(hosts.b.godwit(&["status", id]).succeeds()["forecast"], Value::Null);

    let history = hosts.a.godwit(&["history"]).succeeds();
    assert_eq!(history["entries"].as_array().unwrap().len(), 1, "{history}");
    let entry = &history["entries"][0];
    assert_eq!((&entry["id"], &entry["forecast"]), (&report["id"], &report["forecast"]));
    assert_eq!(entry["wire_bytes"], report["wire_bytes"]);
    assert_eq!(history["score"]["total"]["count"], 1);
}
