//! Specifications that a peer might send.

use serde_json::{Value, json};

use super::*;
use crate::machine::Spec;

fn policy() -> Policy {
    Policy {
        paths: [("/srv/vm".into(), "/mnt/vm".into()), ("/srv/vm/iso".into(), "/iso".into())].into(),
        bridges: [("br0".into(), "lan".into())].into(),
        taps: [("tap0".into(), "tap9".into())].into(),
        extra: vec!["-rtc base=*".into(), "-no-reboot".into(), "-device virtio-gpu-pci*".into()],
        user_networks: false,
    }
}

fn honest() -> Value {
    json!({
        "name": "web1",
        "machine": "pc-q35-10.0",
        "memory": "512M",
        "net": [{ "bridge": "br0" }, { "tap": "tap0" }],
        "disk": [{ "path": "/srv/vm/web1/a,b.img" }, { "path": "/srv/vm/iso/c.iso", "read_only": true }],
        "boot": { "kernel": "/srv/vm/vmlinuz", "initrd": "/srv/vm/initrd" },
        "firmware": "/srv/vm/fw.bin",
        "extra": ["-rtc", "base=utc", "--no-reboot"],
    })
}

fn adopted(arguments: &[(&str, &str)]) -> Value {
    let argument = |(option, value): &(&str, &str)| match *value {
        "" => json!({ "option": option }),
        value => json!({ "option": option, "value": value }),
    };
    let mut arguments: Vec<Value> = arguments.iter().map(argument).collect();
    arguments.insert(0, json!({ "option": "nodefaults" }));
    json!({
        "name": "web1",
        "machine": "pc-q35-10.0",
        "memory": "512M",
        "adopted": { "arguments": arguments },
    })
}

/// As it arrives: JSON first, then the policy.
fn accept(spec: &Value) -> Result<Spec, String> {
    let spec: Spec = serde_json::from_value(spec.clone()).map_err(|error| error.to_string())?;
    localise(&spec, &policy()).map_err(|error| error.to_string())
}

fn refusal(spec: &Value) -> String {
    let refusal = accept(spec).expect_err(&spec.to_string());
    assert_eq!(refusal.lines().count(), 1, "{refusal}");
    refusal
}

#[test]
fn an_honest_machine_is_substituted() {
    let spec = accept(&honest()).unwrap();
    assert_eq!(spec.net[0].bridge.as_deref(), Some("lan"));
    assert_eq!(spec.net[1].tap.as_deref(), Some("tap9"));
    let disks: Vec<_> = spec.disk.iter().map(|disk| disk.path.to_str().unwrap()).collect();
    assert_eq!(disks, ["/mnt/vm/web1/a,b.img", "/iso/c.iso"]);
    let boot = spec.boot.unwrap();
    assert_eq!(
        (boot.kernel.to_str(), boot.initrd.unwrap().to_str()),
        (Some("/mnt/vm/vmlinuz"), Some("/mnt/vm/initrd"))
    );
    assert_eq!(spec.firmware.unwrap().to_str(), Some("/mnt/vm/fw.bin"));
}

#[test]
fn fields_that_reach_into_the_host_are_refused() {
    let cases: &[(&str, Value)] = &[
        ("/name", json!("web1,process=x")),
        ("/name", json!("../web1")),
        ("/name", json!("-S")),
        ("/name", json!("web1\nweb2")),
        ("/name", json!("")),
        ("/machine", json!("pc-q35-10.0,kernel=/etc/shadow")),
        ("/machine", json!("none")),
        ("/machine", json!("-device")),
        ("/firmware", json!("/etc/shadow")),
        ("/firmware", json!("/srv/vm/../../etc/shadow")),
        ("/firmware", json!("/srv/vmx/fw.bin")),
        ("/firmware", json!("/srv/vm")),
        ("/disk/0/path", json!("/etc/passwd")),
        ("/disk/0/path", json!("web1.img")),
        ("/disk/0/path", json!("json:{\"driver\":\"file\"}")),
        ("/disk/0/path", json!("nbd://10.0.0.1/x")),
        ("/disk/0/path", json!("/srv/vm/./a.img")),
        ("/disk/0/path", json!("/srv/vm//a.img")),
        ("/disk/0/path", json!("/srv/vm/a\n.img")),
        ("/boot/initrd", json!("/srv/vm/initrd,/etc/shadow")),
        ("/boot/kernel", json!("/proc/kcore")),
        ("/net/0/bridge", json!("br1")),
        ("/net/0/bridge", json!("br0,script=/tmp/x")),
        ("/net/1/tap", json!("tap0,script=/tmp/x")),
        ("/net/1/tap", json!("../tap0")),
    ];
    for (pointer, value) in cases {
        let mut spec = honest();
        *spec.pointer_mut(pointer).unwrap() = value.clone();
        refusal(&spec);
    }
}

#[test]
fn extra_arguments_are_refused_unless_a_pattern_shows_them() {
    let cases: &[&[&str]] = &[
        &["-chardev", "file,id=x,path=/etc/cron.d/x"],
        &["-rtc", "base=utc,clock=vm"],
        &["-rtc", "base=/etc"],
        &["-device", "virtio-gpu-pci,romfile=/etc/shadow"],
        &["-incoming", "exec:sh"],
        &["--incoming", "exec:sh"],
        &["-no-reboot", "/etc/shadow"],
        &["/etc/shadow"],
        &["-plugin", "/tmp/x.so"],
        &["-netdev", "tap,id=x,script=/tmp/x"],
        &["-rtc"],
        &["-unknown-option"],
        &["-no-reboot", "-monitor", "unix:/tmp/x,server"],
        &["-no-reboot\n-S"],
        &["-"],
    ];
    for extra in cases {
        let mut spec = honest();
        spec["extra"] = json!(extra);
        refusal(&spec);
    }
}

#[test]
fn a_refusal_names_the_key_that_would_allow_it() {
    let cases = [
        ("/disk/0/path", json!("/etc/passwd"), "disk[0].path: /etc/passwd isn't accepted here; accept.paths"),
        ("/net/0/bridge", json!("br1"), "net[0]: bridge br1 isn't accepted here; accept.bridges"),
        ("/extra", json!(["-usb"]), "extra: -usb isn't accepted here; accept.extra"),
    ];
    for (pointer, value, expected) in cases {
        let mut spec = honest();
        *spec.pointer_mut(pointer).unwrap() = value;
        let refusal = refusal(&spec);
        assert!(refusal.starts_with(expected), "{refusal}");
    }
}

#[test]
fn an_adopted_machine_may_only_describe_a_guest() {
    let cases: &[(&str, &str)] = &[
        ("device", "vfio-pci,host=0000:01:00.0"),
        ("device", "loader,file=/etc/shadow,addr=0"),
        ("device", "virtio-net-pci,romfile=/etc/shadow"),
        ("device", "driver=e1000,driver=vfio-pci"),
        ("device", "{\"driver\":\"usb-host\"}"),
        ("object", "filter-dump,id=f,netdev=n,file=/tmp/x"),
        ("object", "memory-backend-file,id=m,size=1M,mem-path=/etc/shadow"),
        ("object", "secret,id=s,file=/etc/shadow"),
        ("object", "rng-random,id=r,filename=/dev/sda"),
        ("chardev", "file,id=c,path=/etc/cron.d/x"),
        ("chardev", "socket,id=c,path=/run/docker.sock"),
        ("chardev", "socket,id=../c"),
        ("drive", "file=/etc/shadow,format=raw"),
        ("drive", "file=shadow,format=raw"),
        ("drive", "file=nbd:10.0.0.1:1,format=raw"),
        ("drive", "file=/srv/vm/a.img,backing.file.filename=/etc/shadow"),
        ("drive", "file.driver=ssh,file.host=h"),
        ("drive", "file=json:{}"),
        ("drive", "file=fat:rw:/etc"),
        ("drive", "file=/srv/vm/a.img,snapshot=on"),
        ("blockdev", "driver=file,node-name=a,filename=/etc/shadow"),
        ("blockdev", "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}}"),
        ("blockdev", "driver=nbd,server.type=unix,server.path=/x"),
        ("netdev", "tap,id=n,script=/tmp/x"),
        ("netdev", "bridge,id=n,helper=/tmp/x"),
        ("netdev", "user,id=n"),
        ("netdev", "user,id=n,guestfwd=tcp:10.0.2.1:1-cmd:sh"),
        ("netdev", "user,id=n,smb=/etc"),
        ("nic", "user,model=e1000"),
        ("net", "user"),
        ("net", "tap,script=/tmp/x"),
        ("machine", "pc-q35-10.0,dumpdtb=x"),
        ("machine", "pc-q35-10.0,kernel=x"),
        ("machine", "pc-q35-10.0,memory-backend=/x"),
        ("global", "virtio-net-pci.romfile=/etc/shadow"),
        ("serial", "file:/etc/cron.d/x"),
        ("serial", "chardev:qmp"),
        ("parallel", "/dev/parport0"),
        ("smbios", "file=/etc/shadow"),
        ("smbios", "type=11,path=/etc/shadow"),
        ("fw_cfg", "name=opt/x,file=/etc/shadow"),
        ("acpitable", "file=/etc/shadow"),
        ("boot", "splash=/etc/shadow"),
        ("k", "../../etc/shadow"),
        ("initrd", "/srv/vm/a,/etc/shadow"),
        ("kernel", "/etc/shadow"),
        ("mem-path", "/etc"),
        ("plugin", "/tmp/x.so"),
        ("trace", "file=/etc/cron.d/x"),
        ("D", "/etc/cron.d/x"),
        ("incoming", "exec:sh"),
        ("monitor", "unix:/tmp/x,server"),
        ("qmp", "unix:/tmp/x,server"),
        ("runas", "root"),
        ("add-fd", "fd=0,set=1"),
        ("readconfig", "/etc/shadow"),
        ("nodefaults", "/etc/shadow"),
        ("kernel", ""),
        ("M", "pc-q35-10.0"),
        ("-device", "e1000"),
        ("append", "quiet\nx"),
        ("", ""),
    ];
    for (option, value) in cases {
        refusal(&adopted(&[("net", "none"), (option, value)]));
    }
    assert!(refusal(&adopted(&[("net", "user")])).contains("accept.user_networks"));
    let path = refusal(&adopted(&[("drive", "file=/etc/shadow")]));
    assert!(path.starts_with("-drive file: /etc/shadow isn't accepted here; accept.paths"), "{path}");
}

#[test]
fn qemus_default_network_is_seen() {
    let mut spec = adopted(&[]);
    spec["adopted"]["arguments"] = json!([]);
    assert!(refusal(&spec).contains("accept.user_networks"));
}

#[test]
fn an_adopted_machine_gets_this_hosts_paths() {
    let spec = accept(&adopted(&[
        ("drive", "file=/srv/vm/a,,b.img,if=virtio"),
        ("kernel", "/srv/vm/vmlinuz"),
        ("append", "root=/dev/vda console=ttyS0"),
        ("object", "memory-backend-file,id=m,size=1M,mem-path=/srv/vm/huge"),
    ]))
    .unwrap();
    let arguments: Vec<String> = spec
        .adopted
        .unwrap()
        .arguments
        .iter()
        .map(|argument| argument.value.clone().unwrap_or_default())
        .collect();
    assert_eq!(arguments[1], "file=/mnt/vm/a,,b.img,if=virtio");
    assert_eq!(arguments[2], "/mnt/vm/vmlinuz");
    assert_eq!(arguments[3], "root=/dev/vda console=ttyS0");
    assert_eq!(arguments[4], "qom-type=memory-backend-file,id=m,size=1M,mem-path=/mnt/vm/huge");
}

#[test]
fn as_many_networks_as_taps() {
    let mut spec = adopted(&[("netdev", "tap,id=n")]);
    refusal(&spec);
    spec["net"] = json!([{ "bridge": "br0" }]);
    assert_eq!(accept(&spec).unwrap().net[0].bridge.as_deref(), Some("lan"));
}
