//! Machines that are described by a specification.

use std::{fs, path::Path};

use godwit_qemu::{
    machine::Spec,
    qmp::{Client, RunState},
};
use serde_json::{Value, json};

use crate::qemu::{Qemu, directory, launch};

fn spec(machine: &str, disk: &Path) -> Spec {
    let text = format!(
        r#"
        name = "twin"
        machine = "{machine}"
        memory = "64M"
        vcpus = 2
        rng = true
        balloon = true
        extra = ["-rtc", "base=utc"]
        [[disk]]
        path = "{}"
        serial = "D1"
        cache = "writeback"
        "#,
        disk.display()
    );
    Spec::from_toml(&text, "twin.toml").unwrap()
}

async fn topology(client: &Client) -> Value {
    client.execute("query-pci", Value::Null).await.unwrap()
}

async fn both_ends_are_alike(machine: &str, versioned: &str) {
    let place = directory();
    let disk = place.path().join("a,b.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut spec = spec(machine, &disk);
    let (here, there) = (place.path().join("here"), place.path().join("there"));
    fs::create_dir(&here).unwrap();
    fs::create_dir(&there).unwrap();

    let source = Qemu::launch(&spec, &launch(&here, false)).unwrap();
    let source_client = source.client().await;
    assert_eq!(source_client.query_status().await.unwrap().state, RunState::Running);
    spec.machine = source_client.machine_type().await.unwrap();
    assert!(spec.machine.starts_with(versioned), "{}", spec.machine);
    assert_eq!(source_client.query_cpus_fast().await.unwrap().len(), 2);
    assert_eq!(source_client.query_memory_size().await.unwrap().base_bytes, 64 << 20);

    let target = Qemu::launch(&spec, &launch(&there, true)).unwrap();
    let target_client = target.client().await;
    assert_eq!(target_client.query_status().await.unwrap().state, RunState::Inmigrate);
    migrate(&source_client, &target_client, &there.join("stream")).await;
    assert_eq!(topology(&source_client).await, topology(&target_client).await);
}

/// By QEMU alone: the best judge of whether two machines are alike.
pub(crate) async fn migrate(source: &Client, target: &Client, socket: &Path) {
    let uri = format!("unix:{}", socket.display());
    target.migrate_incoming(&uri).await.unwrap();
    source.migrate(&uri).await.unwrap();
    let mut state = source.query_migrate().await.unwrap();
    while !state.status.is_final() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        state = source.query_migrate().await.unwrap();
    }
    assert_eq!(state.error, None);
    while target.query_status().await.unwrap().state == RunState::Inmigrate {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    target.cont().await.unwrap();
    assert_eq!(target.query_status().await.unwrap().state, RunState::Running);
}

#[tokio::test]
async fn a_q35_machine_and_its_twin_are_alike() {
    both_ends_are_alike("q35", "pc-q35-").await;
}

#[tokio::test]
async fn a_pc_machine_and_its_twin_are_alike() {
    both_ends_are_alike("pc", "pc-i440fx-").await;
}

#[tokio::test]
async fn what_keeps_qemu_from_starting_is_in_its_log() {
    let place = directory();
    let spec = spec("q35", &place.path().join("missing.img"));
    let error = Qemu::launch(&spec, &launch(place.path(), false)).err().unwrap();
    assert!(error.contains("missing.img"), "{error}");
}

#[tokio::test]
async fn both_monitors_and_the_console_are_there() {
    let place = directory();
    let disk = place.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let launch = launch(place.path(), false);
    let qemu = Qemu::launch(&spec("q35", &disk), &launch).unwrap();
    let first = qemu.client().await;
    let second = Client::connect(launch.directory.migration_qmp(), crate::qemu::PATIENCE).await.unwrap();
    assert_eq!(first.query_name().await.unwrap(), second.query_name().await.unwrap());
    assert_eq!(first.query_name().await.unwrap().as_deref(), Some("twin"));
    let devices = first.execute("query-chardev", json!({})).await.unwrap();
    assert!(devices.to_string().contains("console.sock"), "{devices}");
    std::os::unix::net::UnixStream::connect(launch.directory.console()).unwrap();
}
