//! Machines that couldn't go on at the target, or can't leave: `check` and `migrate` say so in the same words, before
//! anything of the guest is touched.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Child, Command},
    time::Duration,
};

use godwit_sim::qmp::Qmp;
use serde_json::json;

use crate::{
    host::{Host, Site, eventually, free_port},
    peer,
};

/// QEMU as it would be on a host whose processor has no AES.
const LESSER_EMULATOR: &str = "#!/bin/sh
for word do
    shift
    case $word in qemu64,*) word=$word,-aes ;; esac
    set -- \"$@\" \"$word\"
done
exec qemu-system-x86_64 \"$@\"
";

/// Two hosts, of which the second has the lesser emulator.
fn unlike_hosts(site: &Site) -> (Host, Host) {
    let emulator = site.path("lesser-qemu");
    fs::write(&emulator, LESSER_EMULATOR).unwrap();
    fs::set_permissions(&emulator, fs::Permissions::from_mode(0o755)).unwrap();
    let ports = [free_port(), free_port()];
    let may_send = peer("hosta", ports[0], "may_send = true");
    let a = site.host("hosta", ports[0], &peer("hostb", ports[1], "may_receive = true"));
    let b = site.host("hostb", ports[1], &format!("emulator = {emulator:?}\n{may_send}"));
    (a, b)
}

/// Neither verb lets web1 go, and nothing comes of it anywhere.
fn neither_is_let(a: &Host, b: &Host, machine: &str, reason: &str) {
    let before = a.machine(machine, "pid");
    for verb in ["check", "migrate"] {
        a.godwit(&[verb, machine, "--to", "hostb"]).fails(3, reason);
        assert_eq!(
            (a.machine(machine, "pid"), a.machine(machine, "state")),
            (before.clone(), json!("running"))
        );
        eventually("nothing is left at the target", || b.http("GET", "/v1/machines", "").1 == json!([]));
    }
    assert_eq!(a.http("GET", "/v1/migrations", "").1, json!([]));
}

#[test]
fn a_processor_that_the_target_cannot_give_is_refused() {
    let site = Site::new();
    let (a, b) = unlike_hosts(&site);
    a.godwit(&["vm", "run", &a.spec("web1", "")]).succeeds();
    let reason =
        "web1 can't go on at hostb: its processor would lack aes; start it with a `cpu` that both hosts have";
    neither_is_let(&a, &b, "web1", reason);

    // The remedy is one.
    a.godwit(&["vm", "kill", "web1"]).succeeds();
    a.godwit(&["vm", "run", &a.spec("web1", "cpu = \"qemu64\"")]).succeeds();
    let check = a.godwit(&["check", "web1", "--to", "hostb"]).succeeds();
    let processor = |host: &str| check[host]["processor"].clone();
    assert!(processor("source")["features"].as_array().unwrap().contains(&json!("sse2")), "{check}");
    assert_eq!(processor("source"), processor("target"));
    a.godwit(&["migrate", "web1", "--to", "hostb"]).succeeds();
    assert_eq!(b.machine("web1", "state"), "running");
}

#[test]
fn a_device_that_cannot_migrate_is_refused() {
    let site = Site::new();
    let (a, b) = unlike_hosts(&site);
    a.godwit(&["vm", "run", &a.spec("web1", "extra = [\"-device\", \"nvme,serial=n1\"]")]).succeeds();
    let reason = "QEMU can't migrate this machine: non-migratable device: ";
    neither_is_let(&a, &b, "web1", reason);
    let remedy = "nvme; unplug that device (`device_del`), or start the machine without it";
    neither_is_let(&a, &b, "web1", remedy);

    let (mut qemu, mut plug) = by_hand(&site);
    let own = site.path("own.qmp").display().to_string();
    a.godwit(&["vm", "adopt", "--qmp", &own]).succeeds();
    plug.execute("device_add", json!({ "driver": "virtio-rng-pci", "id": "late" })).unwrap();
    neither_is_let(&a, &b, "own", "device late (virtio-rng-pci) was plugged in after the start");
    plug.execute("device_add", json!({ "driver": "nvme", "serial": "n1", "id": "later" })).unwrap();
    neither_is_let(&a, &b, "own", reason);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
}

/// A machine that somebody started, and a monitor for who plugs devices into it.
fn by_hand(site: &Site) -> (Child, Qmp) {
    let monitor = |name: &str| format!("unix:{},server=on,wait=off", site.path(name).display());
    let line = "-name own -machine pc -accel tcg -m 16 -nodefaults -display none";
    let qemu = Command::new("qemu-system-x86_64")
        .args(line.split(' '))
        .args(["-qmp", &monitor("own.qmp"), "-qmp", &monitor("plug.qmp")])
        .spawn()
        .unwrap();
    let plug = Qmp::connect(&site.path("plug.qmp"), Duration::from_secs(30)).unwrap();
    (qemu, plug)
}

/// Of a machine that was started by the agent, too, when somebody plugs into it.
#[test]
fn memory_in_several_pieces_is_refused() {
    let site = Site::new();
    let (a, b) = unlike_hosts(&site);
    let nodes = "extra = [\"-object\", \"memory-backend-ram,id=m0,size=8M\", \"-numa\", \"node,memdev=m0\", \
                 \"-object\", \"memory-backend-ram,id=m1,size=8M\", \"-numa\", \"node,memdev=m1\"]";
    a.godwit(&["vm", "run", &a.spec("nodes", nodes)]).succeeds();
    neither_is_let(&a, &b, "nodes", "2 memory back-ends, and QEMU's emulator (TCG) loses what is written");
}
