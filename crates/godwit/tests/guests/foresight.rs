//! What a migration will take is known before it begins, and kept beside what it took.

use std::{fs, time::Duration};

use serde_json::{Value, json};

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

/// No test but a measurement: docs/foresight.md has what it printed.
#[test]
#[ignore = "takes minutes and judges nothing"]
fn forecasts_of_several_guests_are_scored() {
    for workload in ["idle", "light", "medium", "heavy"] {
        let hosts = Hosts::joined_by(100, Duration::from_millis(20));
        let guest = Guest::boot(&hosts, Plan { workload, memory_mb: 512, ..Plan::IDLE });
        let (a, b) = (&hosts.a, &hosts.b);
        for (from, to) in [(a, b), (b, a), (a, b), (b, a)] {
            migrate(from, to, &[]);
        }
        guest.goes_on();
        [a, b].into_iter().for_each(|host| print_history(workload, host));
    }
}

fn print_history(workload: &str, host: &Host) {
    let history = host.godwit(&["history"]).succeeds();
    for entry in history["entries"].as_array().unwrap() {
        for figure in ["total_ms", "wire_bytes", "downtime_ms"] {
            let Value::Object(foreseen) = &entry["forecast"][figure] else { continue };
            let uncorrected = &entry["forecast"]["uncorrected"][figure];
            eprintln!(
                "{workload} {figure}: {}, foreseen {foreseen:?}, uncorrected {uncorrected}",
                entry[figure]
            );
        }
    }
    let log = fs::read_to_string(host.path("agent.log")).unwrap();
    log.lines().filter(|line| line.contains("waited_ms")).for_each(|line| eprintln!("  {line}"));
}

#[test]
fn a_check_refuses_what_a_migration_would_and_leaves_nothing() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::IDLE);
    hosts.a.godwit(&["check", MACHINE, "--to", "nowhere"]).fails(4);
    hosts.a.godwit(&["check", "nobody", "--to", "b"]).fails(4);
    let file = hosts.a.machine_file("spec.json");
    let right = fs::read_to_string(&file).unwrap();
    for (key, value, reason) in [
        ("machine", json!("pc-i440fx-99.0"), "unsupported machine type"),
        ("memory", json!("900G"), "are needed"),
        ("disk", json!([{ "path": "/etc/passwd" }]), "isn't accepted here"),
    ] {
        let mut spec: Value = serde_json::from_str(&right).unwrap();
        spec[key] = value;
        hosts.a.crash();
        fs::write(&file, spec.to_string()).unwrap();
        hosts.a.start(&hosts.lab);
        let answer = hosts.a.godwit(&["check", MACHINE, "--to", "b"]).fails(3);
        assert!(answer.message.contains(reason), "{answer:?}");
        assert_eq!(answer.message.trim().lines().count(), 1, "{answer:?}");
        assert!(machines(&hosts.b).is_empty());
    }
    guest.goes_on();
}
