//! Machines of QEMU 7.2, which has no switch-over acknowledgement, tells fewer addresses, and whose emulator loses what a
//! running guest writes.
//!
//! The version is fetched by `cargo xtask test --long`, where the distribution still has it; elsewhere these tests are
//! passed over.

use godwit_sim::{guest_image::accelerator, older_qemu};
use serde_json::json;

use crate::{
    adopted::{ByHand, Start},
    guest::{Plan, migrate},
    hosts::{Hosts, MACHINE},
    memory,
    moves::goes_there_and_back,
};

/// A 7.2 under somebody's hand goes to an agent that has 7.2, and on to one that has a newer QEMU. Paused, so that memory
/// is what it was.
#[test]
#[ignore = "wants QEMU 7.2"]
fn a_paused_machine_of_qemu_7_2_goes_to_another_and_on_to_a_newer() {
    let Some((hosts, own)) = boot() else { return };
    let [before, after] = ["before", "after"].map(|name| hosts.lab.directory().join(name));
    hosts.a.monitor().execute("stop", json!({})).unwrap();
    memory::save(&mut hosts.a.monitor(), own.guest.memory_bytes(), &before);
    for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
        migrate(from, to, &[]);
        assert_eq!(to.machine()["state"], "paused");
        memory::save(&mut to.monitor(), own.guest.memory_bytes(), &after);
        assert!(memory::differing_pages(&before, &after).is_empty());
    }
    // Its type is the older one's, and it stays what it is.
    let machine = hosts.a.machine();
    assert_eq!(machine["spec"]["machine"], "pc-i440fx-7.2", "{machine}");
    hosts.a.monitor().execute("cont", json!({})).unwrap();
    own.guest.goes_on();
    hosts.only_at(&hosts.a);
}

/// Under TCG it would arrive with stale pages; under KVM it runs all the way.
#[test]
#[ignore = "wants QEMU 7.2"]
fn a_running_machine_of_qemu_7_2_is_moved_only_if_nothing_is_lost() {
    let Some((hosts, own)) = boot() else { return };
    if accelerator() == "kvm" {
        return goes_there_and_back(&hosts, &own.guest, &[]);
    }
    for verb in ["check", "migrate"] {
        let answer = hosts.a.godwit(&[verb, MACHINE, "--to", "b"]).fails(3);
        let reason =
            "loses what a running guest writes; pause the machine first (`stop`), or run it under KVM";
        assert!(answer.message.contains(reason) && answer.message.trim().lines().count() == 1, "{answer:?}");
    }
    own.guest.goes_on();
    hosts.only_at(&hosts.a);
}

/// A machine of QEMU 7.2 at host a, started by hand, and a host b whose agent has 7.2; `None`: it isn't there.
fn boot() -> Option<(Hosts, ByHand)> {
    let emulator = older_qemu::emulator()?;
    let hosts = Hosts::new();
    hosts.b.emulate_with(&emulator);
    let start = Start { emulator: Some(emulator), ..Start::default() };
    let own = ByHand::boot(&hosts, Plan::LIGHT, &start);
    Some((hosts, own))
}
