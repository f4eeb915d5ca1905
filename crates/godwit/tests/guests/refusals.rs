//! Targets that can't be what the source is: refused in one line, the guest untouched.

use std::fs;

use serde_json::{Value, json};

use crate::{
    guest::{Guest, Plan, migrate},
    hosts::{Hosts, MACHINE, eventually},
};

/// The spec that travels is changed by hand, so that the target starts another machine than the one that runs.
#[test]
fn a_target_with_other_memory_or_without_the_machine_type_is_refused() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let file = hosts.a.machine_file("spec.json");
    let right = fs::read_to_string(&file).unwrap();
    for (key, value, code, reason) in [
        ("memory", "160M", 1, "256 MiB there but pc.ram 160 MiB here"),
        ("machine", "pc-i440fx-99.0", 3, "unsupported machine type"),
    ] {
        let mut spec: Value = serde_json::from_str(&right).unwrap();
        spec[key] = json!(value);
        replace_spec(&mut hosts, &spec.to_string());
        let answer = hosts.a.godwit(&["migrate", MACHINE, "--to", "b"]).fails(code);
        let said = answer.json["detail"].as_str().unwrap_or(&answer.message);
        assert!(said.contains(reason) && said.trim().lines().count() == 1, "{said:?}");
        guest.goes_on();
        hosts.only_at(&hosts.a);
        eventually("the target has forgotten the machine", || {
            hosts.b.godwit(&["vm", "show", MACHINE]).code == 4
        });
    }
    replace_spec(&mut hosts, &right);
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}

/// The guest knows instructions that the target's QEMU doesn't give; without a comparison it would arrive and then die of one.
#[test]
fn a_target_that_gives_a_lesser_processor_is_refused() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan::LIGHT);
    let emulator = hosts.b.path("qemu");
    let right = fs::read_to_string(&emulator).unwrap();
    // The same file, so that it stays executable.
    let lesser = "for word do shift; case $word in qemu64,*) word=$word,-sse4.2 ;; esac; set -- \"$@\" \"$word\"; done";
    fs::write(&emulator, right.replace("\nexec", &format!("\n{lesser}\nexec"))).unwrap();
    for verb in ["check", "migrate"] {
        let answer = hosts.a.godwit(&[verb, MACHINE, "--to", "b"]).fails(3);
        let reason = "web1 can't go on at b: its processor would lack sse4.2; start it with";
        assert!(answer.message.contains(reason), "{answer:?}");
        guest.goes_on();
        hosts.only_at(&hosts.a);
        eventually("the target has forgotten the machine", || {
            hosts.b.godwit(&["vm", "show", MACHINE]).code == 4
        });
    }
    fs::write(&emulator, right).unwrap();
    migrate(&hosts.a, &hosts.b, &[]);
    guest.goes_on();
}

fn replace_spec(hosts: &mut Hosts, spec: &str) {
    hosts.a.crash();
    fs::write(hosts.a.machine_file("spec.json"), spec).unwrap();
    hosts.a.start(&hosts.lab);
}
