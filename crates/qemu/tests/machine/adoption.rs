//! Machines that somebody started by hand.

use std::{fs, path::Path, process::Command};

use godwit_qemu::{
    adopt::{AdoptRefusal, classify, inspect, process_of},
    commandline::{Policy, localise},
    machine::Spec,
    qmp::{Client, RunState},
};
use serde_json::json;

use crate::qemu::{Qemu, directory, launch};

async fn adopt(qemu: &Qemu, client: &Client) -> Result<Spec, AdoptRefusal> {
    let process = godwit_qemu::adopt::Process::read(qemu.pid).unwrap();
    classify(&process, &inspect(client).await.unwrap())
}

/// Starts `line`, adopts it, starts its twin and lets QEMU migrate the one into the other.
async fn a_twin_loads(line: &str, place: &Path) {
    let source = Qemu::by_hand(place, line);
    assert_eq!(process_of(&source.monitor).unwrap().pid, source.pid);
    let client = source.client().await;
    let spec = adopt(&source, &client).await.unwrap();

    let wire = serde_json::to_string(&spec).unwrap();
    let policy = Policy {
        paths: [(place.to_owned(), place.to_owned())].into(),
        user_networks: true,
        ..Policy::default()
    };
    let spec = localise(&serde_json::from_str(&wire).unwrap(), &policy).unwrap();
    let there = place.join("there");
    fs::create_dir(&there).unwrap();
    let target = Qemu::launch(&spec, &launch(&there, true)).unwrap();
    let target_client = target.client().await;
    crate::described::migrate(&client, &target_client, &there.join("stream")).await;
    assert_eq!(client.query_status().await.unwrap().state, RunState::Postmigrate);
    drop(source);
    // The twin's command line describes the same machine as the one that it came from.
    let again = adopt(&target, &target_client).await.unwrap();
    assert_eq!(again.adopted.unwrap().arguments, spec.adopted.unwrap().arguments);
}

fn image(path: &Path) {
    fs::write(path, vec![0; 1 << 20]).unwrap();
}

#[tokio::test]
async fn a_machine_with_qemus_defaults() {
    let place = directory();
    a_twin_loads("-m 32 -display none", place.path()).await;
}

#[tokio::test]
async fn a_machine_with_short_options() {
    let place = directory();
    image(&place.path().join("a.img"));
    image(&place.path().join("b.img"));
    let line = format!(
        "-M pc,usb=on,accel=tcg -name Web.1 -m 32 -smp 2 -hda {0}/a.img -drive file={0}/b.img,if=virtio,format=raw \
         -vga std -usbdevice tablet -serial null -serial pty -parallel none -vnc none -boot d -k en-us",
        place.path().display()
    );
    a_twin_loads(&line, place.path()).await;
}

#[tokio::test]
async fn a_machine_in_long_and_json_options() {
    let place = directory();
    image(&place.path().join("c.img"));
    let line = format!(
        "-nodefaults -machine q35,memory-backend=pc.ram -object memory-backend-memfd,id=pc.ram,size=32M,share=on -m \
         32M -cpu qemu64,+ssse3 -accel tcg,thread=single -smp cpus=1,maxcpus=2 -uuid \
         00000000-0000-4000-8000-000000000001 -smbios type=1,manufacturer=a/b -rtc base=utc,driftfix=slew -device \
         pcie-root-port,id=rp1,slot=1 -blockdev \
         {{\"driver\":\"raw\",\"node-name\":\"d\",\"file\":{{\"driver\":\"file\",\"filename\":\"{0}/c.img\"}}}} \
         -device {{\"driver\":\"virtio-blk-pci\",\"drive\":\"d\",\"bus\":\"rp1\",\"id\":\"blk\"}} -netdev \
         user,id=n,hostfwd=tcp:127.0.0.1:0-:22 -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:01 -device \
         virtio-serial-pci -chardev socket,id=ga,path={0}/ga.sock,server=on,wait=off -device \
         virtserialport,chardev=ga,name=org.qemu.guest_agent.0 -chardev null,mux=on,id=mux -mon mux -serial \
         chardev:mux -object rng-builtin,id=r -device virtio-rng-pci,rng=r -display none",
        place.path().display()
    );
    a_twin_loads(&line, place.path()).await;
}

#[tokio::test]
async fn an_overlay_and_its_backing_file() {
    let place = directory();
    let run = |arguments: &[&str]| {
        assert!(
            Command::new("qemu-img")
                .args(arguments)
                .current_dir(place.path())
                .output()
                .unwrap()
                .status
                .success()
        );
    };
    run(&["create", "-f", "qcow2", "base.qcow2", "4M"]);
    run(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    let line =
        format!("-nodefaults -m 32 -display none -drive if=virtio,file={}/top.qcow2", place.path().display());
    a_twin_loads(&line, place.path()).await;
}

#[tokio::test]
async fn hot_plugged_differences_are_refused() {
    let place = directory();
    let extra = place.path().join("extra.img");
    image(&extra);
    let qemu = Qemu::by_hand(
        place.path(),
        "-nodefaults -M q35 -m 32,slots=2,maxmem=64M -display none -device pcie-root-port,id=rp,slot=1 -smp 1,maxcpus=2",
    );
    let client = qemu.client().await;
    adopt(&qemu, &client).await.unwrap();
    let refused = async |what: &str| {
        let refusal = adopt(&qemu, &client).await.unwrap_err().to_string();
        assert!(refusal.contains(what), "{refusal}");
        assert_eq!(refusal.lines().count(), 1);
    };

    let node = json!({ "driver": "file", "node-name": "x", "filename": extra });
    client.execute("blockdev-add", node).await.unwrap();
    refused("extra.img was opened after the start").await;
    client.execute("blockdev-del", json!({ "node-name": "x" })).await.unwrap();

    client.execute("netdev_add", json!({ "type": "user", "id": "late" })).await.unwrap();
    refused("network late").await;
    client.execute("netdev_del", json!({ "id": "late" })).await.unwrap();

    client.execute("object-add", json!({ "qom-type": "rng-builtin", "id": "r" })).await.unwrap();
    refused("object r was made").await;
    client.execute("object-del", json!({ "id": "r" })).await.unwrap();
    adopt(&qemu, &client).await.unwrap();

    let cpu =
        json!({ "driver": "qemu64-x86_64-cpu", "id": "c1", "socket-id": 0, "core-id": 1, "thread-id": 0 });
    client.execute("device_add", cpu).await.unwrap();
    refused("c1").await;
}

#[tokio::test]
async fn an_image_that_was_swapped_is_refused() {
    let place = directory();
    let (first, second) = (place.path().join("first.iso"), place.path().join("second.iso"));
    image(&first);
    image(&second);
    let line = format!("-nodefaults -m 32 -display none -cdrom {}", first.display());
    let qemu = Qemu::by_hand(place.path(), &line);
    let client = qemu.client().await;
    adopt(&qemu, &client).await.unwrap();
    client.hmp(&format!("change ide1-cd0 {} raw", second.display())).await.unwrap();
    let refusal = adopt(&qemu, &client).await.unwrap_err().to_string();
    assert!(refusal.contains("second.iso was opened after the start"), "{refusal}");
}
