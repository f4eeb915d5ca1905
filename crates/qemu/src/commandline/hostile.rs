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
    let disks: Vec<_> = spec.disk.iter().map(|disk| disk.path.as_ref().unwrap().to_str().unwrap()).collect();
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

/// What a peer might try through an adopted machine's arguments: the way, the option, its value.
#[rustfmt::skip]
const WAYS: &[(&str, &str, &str)] = &[
    // Devices of the host, and files as devices.
    ("a device of the host", "device", "vfio-pci,host=0000:01:00.0"),
    ("a device of the host by its sysfs path", "device", "vfio-pci,sysfsdev=/sys/bus/x"),
    ("a usb device of the host", "device", "{\"driver\":\"usb-host\"}"),
    ("a parallel port of the host", "parallel", "/dev/parport0"),
    ("a scsi device of the host", "device", "scsi-generic,drive=d"),
    ("any file into guest memory", "device", "loader,file=/etc/shadow,addr=0"),
    ("a rom file", "device", "virtio-net-pci,romfile=/etc/shadow"),
    ("a rom file in the working directory", "device", "virtio-net-pci,romfile=vmlinuz"),
    ("a rom file for every device", "global", "virtio-net-pci.romfile=vmlinuz"),
    ("the same in the long form", "global", "driver=virtio-net-pci,property=romfile,value=vmlinuz"),
    ("a rom file by a path", "global", "virtio-net-pci.romfile=/etc/shadow"),
    ("two drivers, of which one is looked at", "device", "driver=e1000,driver=vfio-pci"),
    ("a directory of the host", "device", "virtio-9p-pci,fsdev=f,mount_tag=x"),
    ("a directory of the host, its back end", "fsdev", "local,id=f,path=/etc,security_model=none"),
    ("a directory of the host, both at once", "virtfs", "local,path=/etc,mount_tag=x,security_model=none"),
    ("shared memory with the host", "device", "ivshmem-plain,memdev=m"),
    ("a descriptor of the process", "device", "virtio-net-pci,vhostfd=3"),
    ("a descriptor for every device", "global", "virtio-net-pci.vhostfd=3"),
    ("a device process of the peer's", "device", "x-pci-proxy-dev,fd=3"),
    ("a vhost-user device", "device", "vhost-user-blk-pci,chardev=c"),
    ("vhost of the kernel", "device", "vhost-vsock-pci,guest-cid=3"),
    ("a smartcard", "device", "ccid-card-emulated,backend=nss-emulated"),
    // Objects.
    ("a dump of network traffic", "object", "filter-dump,id=f,netdev=n,file=/tmp/x"),
    ("a file as guest memory", "object", "memory-backend-file,id=m,size=1M,mem-path=/etc/shadow"),
    ("persistent memory in a file", "object", "memory-backend-file,id=m,size=1M,mem-path=/srv/vm/m,pmem=on"),
    ("a secret from a file", "object", "secret,id=s,file=/etc/shadow"),
    ("keys of the host", "object", "tls-creds-x509,id=t,dir=/etc/pki,endpoint=server"),
    ("a file as random numbers", "object", "rng-random,id=r,filename=/dev/sda"),
    ("a daemon for random numbers", "object", "rng-egd,id=r,chardev=c"),
    ("a helper for reservations", "object", "pr-manager-helper,id=p,path=/run/x"),
    ("a scripted authorisation", "object", "authz-list-file,id=a,filename=/etc/shadow"),
    ("an encrypted guest's device", "object", "sev-guest,id=s,sev-device=/dev/sev"),
    ("more memory than the specification says", "object", "memory-backend-ram,id=m,size=64G,prealloc=on"),
    ("more memory by -m", "m", "65536"),
    // Character devices and the monitor.
    ("writing to a file", "chardev", "file,id=c,path=/etc/cron.d/x"),
    ("a socket of the host", "chardev", "socket,id=c,path=/run/docker.sock"),
    ("a socket outside of the machine's directory", "chardev", "socket,id=../c"),
    ("a connection to anywhere", "chardev", "socket,id=c,host=10.0.0.1,port=22"),
    ("a pseudo terminal", "chardev", "pty,id=c"),
    ("a log of a character device", "chardev", "null,id=c,logfile=/etc/cron.d/x"),
    ("a serial port as a file", "serial", "file:/etc/cron.d/x"),
    ("a serial port at the monitor", "serial", "chardev:qmp"),
    ("a serial port as the monitor", "serial", "mon:stdio"),
    ("a device at the monitor", "device", "isa-serial,chardev=compat_monitor0"),
    ("every console at the monitor", "global", "virtconsole.chardev=compat_monitor0"),
    ("a monitor", "monitor", "unix:/tmp/x,server"),
    ("a machine monitor", "qmp", "unix:/tmp/x,server"),
    ("a monitor on a character device", "mon", "chardev=c,mode=control"),
    ("a debugger", "gdb", "tcp::1234"),
    ("the test protocol", "qtest", "unix:/tmp/x"),
    // Disks.
    ("a file that isn't accepted", "drive", "file=/etc/shadow,format=raw"),
    ("a relative file", "drive", "file=shadow,format=raw"),
    ("a network block device", "drive", "file=nbd:10.0.0.1:1,format=raw"),
    ("a url", "drive", "file=https://10.0.0.1/x,format=raw"),
    ("a pseudo name in json", "drive", "file=json:{},format=raw"),
    ("a directory as a disk", "drive", "file=fat:rw:/etc,format=raw"),
    ("a format that the guest's own bytes choose", "drive", "file=/srv/vm/a.img,if=virtio"),
    ("a backing file", "drive", "file=/srv/vm/a.img,format=qcow2,backing.file.filename=/etc/shadow"),
    ("a protocol driver", "drive", "file.driver=ssh,file.host=h,format=raw"),
    ("temporary files", "drive", "file=/srv/vm/a.img,format=raw,snapshot=on"),
    ("up and out of an accepted directory", "drive", "file=/srv/vm/../../etc/shadow,format=raw"),
    ("the file of a node", "blockdev", "driver=file,node-name=a,filename=/etc/shadow"),
    ("the file of a nested node", "blockdev", "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}}"),
    ("a data file", "blockdev", "driver=qcow2,file.driver=file,file.filename=/srv/vm/a,data-file.filename=/etc/shadow"),
    ("a node over the network", "blockdev", "driver=nbd,server.type=unix,server.path=/x"),
    ("a node over http", "blockdev", "driver=curl,url=http://10.0.0.1/"),
    ("a key from a secret", "blockdev", "driver=luks,key-secret=s,file.driver=file,file.filename=/srv/vm/a"),
    ("a disk in a flash option", "pflash", "/etc/shadow"),
    ("a disk in a short option", "hda", "/etc/shadow"),
    ("a floppy", "fda", "fat:/etc"),
    ("a memory technology device", "mtdblock", "/etc/shadow"),
    ("a card", "sd", "/etc/shadow"),
    // Networks.
    ("a script", "netdev", "tap,id=n,script=/tmp/x"),
    ("a script at the end", "netdev", "tap,id=n,downscript=/tmp/x"),
    ("an interface of the host", "netdev", "tap,id=n,ifname=eth0"),
    ("a helper", "netdev", "bridge,id=n,helper=/tmp/x"),
    ("the loopback interface", "netdev", "user,id=n"),
    ("a command for every connection", "netdev", "user,id=n,guestfwd=tcp:10.0.2.1:1-cmd:sh"),
    ("a port of the host", "netdev", "user,id=n,hostfwd=tcp::22-:22"),
    ("a shared directory", "netdev", "user,id=n,smb=/etc"),
    ("files to boot from", "netdev", "user,id=n,tftp=/etc"),
    ("a socket network", "netdev", "socket,id=n,listen=:1234"),
    ("a vhost-user network", "netdev", "vhost-user,id=n,chardev=c"),
    ("a stream network", "netdev", "stream,id=n,addr.type=unix,addr.path=/run/x"),
    ("a card at the loopback interface", "nic", "user,model=e1000"),
    ("the old option's loopback", "net", "user"),
    ("the old option's script", "net", "tap,script=/tmp/x"),
    // Boards, firmware and tables.
    ("a dump of the board", "machine", "pc-q35-10.0,dumpdtb=x"),
    ("a kernel of the board", "machine", "pc-q35-10.0,kernel=x"),
    ("a memory back end by its path", "machine", "pc-q35-10.0,memory-backend=/x"),
    ("another option in json", "machine", "{\"type\":\"pc-q35-10.0\"}"),
    ("keys in what looks like json", "smbios", "{\"value\":\"x,file=/etc/shadow,y\"}"),
    ("firmware", "bios", "/etc/shadow"),
    ("a directory of firmware", "L", "/tmp"),
    ("a rom", "option-rom", "/etc/shadow"),
    ("a table of strings", "smbios", "file=/etc/shadow"),
    ("a string from a file", "smbios", "type=11,path=/etc/shadow"),
    ("a file for the firmware", "fw_cfg", "name=opt/x,file=/etc/shadow"),
    ("a generated file for the firmware", "fw_cfg", "name=opt/x,gen_id=s"),
    ("an acpi table", "acpitable", "file=/etc/shadow"),
    ("a device tree", "dtb", "/etc/shadow"),
    ("a picture", "boot", "splash=/etc/shadow"),
    ("a keyboard layout elsewhere", "k", "../../etc/shadow"),
    ("a keyboard layout in the working directory", "k", "initrd.img"),
    ("a second initial disk", "initrd", "/srv/vm/a,/etc/shadow"),
    ("a kernel", "kernel", "/etc/shadow"),
    ("a directory for memory", "mem-path", "/etc"),
    ("a trusted platform module", "tpmdev", "passthrough,id=t,path=/dev/tpm0"),
    ("an emulated one at a socket", "tpmdev", "emulator,id=t,chardev=c"),
    // Screens and sound.
    ("a screen on the network", "vnc", "0.0.0.0:0"),
    ("a screen with keys", "spice", "port=1,x509-dir=/etc/pki"),
    ("a window", "display", "gtk"),
    ("sound into a file", "audiodev", "wav,id=a,path=/etc/cron.d/x"),
    ("sound of the host", "audio", "driver=alsa"),
    // QEMU itself.
    ("a plugin", "plugin", "/tmp/x.so"),
    ("a trace", "trace", "file=/etc/cron.d/x"),
    ("a log", "D", "/etc/cron.d/x"),
    ("a process id", "pidfile", "/etc/cron.d/x"),
    ("a command for the stream", "incoming", "exec:sh"),
    ("a snapshot", "loadvm", "x"),
    ("a saved description", "dump-vmstate", "/etc/cron.d/x"),
    ("another user", "runas", "root"),
    ("another user in the new option", "run-with", "user=root"),
    ("another root", "chroot", "/tmp"),
    ("a descriptor", "add-fd", "fd=0,set=1"),
    ("a file of options", "readconfig", "/etc/shadow"),
    ("an option for anything", "set", "device.x.romfile=/etc/shadow"),
    ("parameters of migrations", "global", "migration.x-ignore-shared=on"),
    ("parameters in the long form", "global", "driver=migration,property=tls-creds,value=t"),
    ("a property of QEMU's own devices", "global", "fw_cfg_mem.x-file-slots=1"),
    ("a property without a device", "global", "romfile=x"),
    ("a sandbox with a path", "sandbox", "on,spawn=/x"),
    ("semihosting", "semihosting-config", "enable=on,target=native"),
    ("an iscsi initiator", "iscsi", "initiator-name=x"),
    ("a domain of xen", "xen-domid", "1"),
    ("an instruction counter's log", "icount", "shift=1,rr=record,rrfile=/etc/cron.d/x"),
    ("a guest's own exit code", "debugcon", "file:/etc/cron.d/x"),
    // What is no option.
    ("a path where an id belongs", "netdev", "tap,id=n=/etc/shadow"),
    ("a path as the id of a device", "device", "{\"driver\":\"e1000\",\"id\":\"/objects\"}"),
    ("a path where a property's name belongs", "device", "virtio-net-pci,\": \"/etc/shadow\"=on"),
    ("a value where none belongs", "nodefaults", "/etc/shadow"),
    ("no value where one belongs", "kernel", ""),
    ("another name of an option", "M", "pc-q35-10.0"),
    ("a dash in an option", "-device", "e1000"),
    ("a line break", "append", "quiet\nx"),
    ("a nul", "append", "quiet\0x"),
    ("an option without a name", "", ""),
];

#[test]
fn an_adopted_machine_may_only_describe_a_guest() {
    let distinct: std::collections::HashSet<_> = WAYS.iter().map(|(way, ..)| way).collect();
    assert_eq!(distinct.len(), WAYS.len());
    for (way, option, value) in WAYS {
        let accepted = accept(&adopted(&[("net", "none"), (option, value)]));
        let refusal = accepted.expect_err(&format!("{way}: -{option} {value}"));
        assert_eq!(refusal.lines().count(), 1, "{refusal}");
    }
    assert!(refusal(&adopted(&[("net", "user")])).contains("accept.user_networks"));
    let path = refusal(&adopted(&[("drive", "file=/etc/shadow,format=raw")]));
    assert!(path.starts_with("-drive file: /etc/shadow isn't accepted here; accept.paths"), "{path}");
}

/// What machines that people run have, and what must therefore get through.
#[test]
fn what_describes_a_guest_is_accepted() {
    let ordinary: &[(&str, &str)] = &[
        ("net", "none"),
        ("m", "size=512M,slots=4,maxmem=2G"),
        ("object", "memory-backend-ram,id=m,size=512M"),
        ("global", "ICH9-LPC.disable_s3=1"),
        ("global", "driver=cfi.pflash01,property=secure,value=on"),
        ("global", "kvm-pit.lost_tick_policy=delay"),
        ("k", "en-us"),
        ("device", "virtio-net-pci,romfile="),
        ("device", "{\"driver\":\"virtio-rng-pci\",\"id\":\"r\"}"),
        ("sandbox", "on,obsolete=deny,spawn=deny"),
        ("smbios", "type=1,product=a/b"),
    ];
    accept(&adopted(ordinary)).unwrap();
    accept(&adopted(&[("net", "none"), ("m", "0.5G")])).unwrap();
}

#[test]
fn every_file_of_a_machine_is_listed() {
    let spec = accept(&honest()).unwrap();
    let listed: Vec<_> = files(&spec).iter().map(|path| path.display().to_string()).collect();
    assert_eq!(
        listed,
        ["/mnt/vm/web1/a,b.img", "/iso/c.iso", "/mnt/vm/vmlinuz", "/mnt/vm/initrd", "/mnt/vm/fw.bin"]
    );
    let arguments = [
        ("net", "none"),
        ("drive", "file=/srv/vm/a.img,format=raw"),
        ("blockdev", "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/srv/vm/b\"}}"),
        ("fw_cfg", "name=opt/x,file=/srv/vm/c"),
        ("kernel", "/srv/vm/d"),
        ("object", "rng-random,id=r,filename=/srv/vm/e"),
    ];
    let listed = files(&accept(&adopted(&arguments)).unwrap());
    let expected = ["a.img", "b", "c", "d", "e"].map(|name| std::path::Path::new("/mnt/vm").join(name));
    assert_eq!(listed, expected);
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
        ("drive", "file=/srv/vm/a,,b.img,format=raw,if=virtio"),
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
    assert_eq!(arguments[1], "file=/mnt/vm/a,,b.img,format=raw,if=virtio");
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
