use super::*;
use crate::{memory_layout::MemoryLayout, qmp::Version};

fn process(line: &str) -> Process {
    Process {
        pid: 7,
        argv: format!("qemu-system-x86_64 {line}").split_whitespace().map(str::to_owned).collect(),
        working_directory: Some("/home/vm".into()),
    }
}

fn live() -> LiveFacts {
    LiveFacts {
        version: Version { major: 10, minor: 0, micro: 2 },
        name: None,
        machine_type: "pc-q35-10.0".into(),
        kvm: false,
        vcpus: 1,
        memory_bytes: 128 << 20,
        memory_layout: MemoryLayout { emulated: true, ..MemoryLayout::default() },
        devices: Vec::new(),
        anonymous_devices: Vec::new(),
        objects: vec!["pc.ram".into()],
        block_nodes: Vec::new(),
        netdevs: Vec::new(),
        blocked_reasons: Vec::new(),
    }
}

fn tap(id: &str, interface: &str, bridge: Option<&str>) -> LiveNetdev {
    LiveNetdev {
        id: id.into(),
        kind: "tap".into(),
        interface: Some(interface.into()),
        bridge: bridge.map(Into::into),
    }
}

fn arguments(spec: &Spec) -> Vec<String> {
    spec.adopted.as_ref().unwrap().arguments.iter().map(ToString::to_string).collect()
}

#[test]
fn what_belongs_to_the_host_is_replaced() {
    let line = "-nodefaults -M q35,accel=kvm:tcg -name guest=Web.1,debug-threads=on -monitor stdio -qmp \
                unix:/tmp/q,server -daemonize -pidfile /tmp/p -D /tmp/l -display gtk -vnc :1 -S -incoming defer \
                -netdev tap,id=a,ifname=t0,script=/etc/up,vhost=on -netdev bridge,id=b,br=br7 -nic tap,model=e1000";
    let mut live = live();
    live.name = Some("Web.1".into());
    live.netdevs = vec![tap("a", "t0", Some("br0")), tap("b", "t1", Some("br7")), tap("#net042", "t2", None)];
    let spec = classify(&process(line), &live).unwrap();
    assert_eq!((spec.name.as_str(), spec.accel, spec.serial), ("web-1", Accel::Tcg, false));
    let expected = [
        "-machine type=pc-q35-10.0",
        "-accel accel=tcg",
        "-nodefaults",
        "-netdev type=tap,id=a,vhost=on",
        "-netdev type=tap,id=b",
        "-nic type=tap,model=e1000",
    ];
    assert_eq!(arguments(&spec), expected);
    let places: Vec<_> = spec.net.iter().map(|net| (net.bridge.as_deref(), net.tap.as_deref())).collect();
    assert_eq!(places, [(Some("br0"), None), (Some("br7"), None), (None, Some("t2"))]);
    assert_eq!(spec.adopted.unwrap().left_behind, ["-display gtk", "-vnc :1"]);
}

#[test]
fn relative_paths_begin_where_the_process_is() {
    let mut live = live();
    live.block_nodes = vec![
        BlockNode { driver: "qcow2".into(), file: "top.qcow2".into(), backing_file: Some("base.raw".into()) },
        BlockNode { driver: "file".into(), file: "top.qcow2".into(), backing_file: None },
        BlockNode { driver: "file".into(), file: "/home/vm/base.raw".into(), backing_file: None },
    ];
    let line = "-nodefaults -hda top.qcow2 -kernel ./k -chardev pty,id=c";
    let spec = classify(&process(line), &live).unwrap();
    assert_eq!(arguments(&spec)[3], "-drive index=0,media=disk,file=/home/vm/top.qcow2,format=qcow2");
    assert_eq!(arguments(&spec)[4], "-kernel /home/vm/k");
    let daemon = process(&format!("{line} -daemonize"));
    let stranger = Process { working_directory: None, ..process(line) };
    for astray in [daemon, stranger] {
        let refusal = classify(&astray, &live).unwrap_err();
        assert!(refusal.to_string().contains("where it begins isn't known"), "{refusal}");
    }
    let absolute = Process { working_directory: None, ..process("-nodefaults -kernel /boot/k") };
    live.block_nodes.clear();
    assert_eq!(arguments(&classify(&absolute, &live).unwrap())[3], "-kernel /boot/k");
}

#[test]
fn what_cant_be_started_again_is_refused_in_one_line() {
    let cases = [
        ("-frobnicate", "-frobnicate isn't an option that godwit knows"),
        ("disk.img", "stands where an option should be"),
        ("-icount 1", "-icount 1 isn't supported"),
        ("-netdev tap,id=n,fd=3", "a file descriptor was passed"),
        ("-netdev tap,id=n,fds=3:4", "a file descriptor was passed"),
        ("-netdev tap,id=n,vhost=on,vhostfd=9", "a file descriptor was passed"),
        ("-add-fd fd=3,set=1", "a file descriptor was passed"),
        ("-drive file=/dev/fdset/1", "a file descriptor was passed"),
        ("-chardev socket,id=c,fd=5", "a file descriptor was passed"),
        ("-snapshot", "-snapshot: what the guest wrote"),
        ("-drive file=/a.img,snapshot=on", "snapshot=on"),
        ("-loadvm s1", "-loadvm"),
        ("-readconfig /a", "write its options on the command line"),
        ("-drive file=nbd:localhost:1", "only files and devices of the host"),
        ("-device vfio-pci,host=01:00.0", "vfio-pci isn't among the devices"),
        ("-object {\"qom-type\":\"secret\",\"id\":\"masterKey0\"}", "libvirt holds this machine"),
        ("-chardev socket,id=charmonitor,fd=22,server=on,wait=off", "libvirt holds this machine"),
        ("-smp 2", "has 1 CPUs now and was started with 2"),
        ("-smp sockets=2,cores=2", "was started with 4"),
        ("-device e1000,id=n0", "device n0 (e1000) was unplugged"),
        ("-device e1000", "a e1000 was unplugged"),
        ("-drive file=/a.img,if=none", "image /a.img was closed"),
        ("-netdev user,id=u", "network u was removed"),
        ("-object rng-builtin,id=r", "object r was deleted"),
        ("-chardev spicevmc,id=c,name=vdagent", "spicevmc isn't among"),
        ("-device e1000,foo,nowait", "nowait"),
    ];
    for (line, expected) in cases {
        let refusal = classify(&process(&format!("-nodefaults {line}")), &live()).unwrap_err().to_string();
        assert!(refusal.contains(expected), "{line}: {refusal}");
        assert_eq!(refusal.lines().count(), 1);
    }
}

#[test]
fn what_was_added_since_the_start_is_refused() {
    let check = |change: fn(&mut LiveFacts), expected: &str| {
        let mut live = live();
        change(&mut live);
        let refusal = classify(&process("-nodefaults"), &live).unwrap_err().to_string();
        assert!(refusal.contains(expected), "{refusal}");
    };
    check(|live| live.vcpus = 2, "has 2 CPUs now and was started with 1");
    check(|live| live.memory_layout.devices.push("d1".into()), "memory devices (d1)");
    check(|live| live.memory_layout.backends = 2, "2 memory back-ends");
    check(|live| live.objects.push("m1".into()), "object m1 was made");
    check(|live| live.netdevs.push(tap("n", "t", None)), "network n (tap) was added");
    check(|live| live.anonymous_devices.push("e1000".into()), "a e1000 was plugged in");
    check(
        |live| live.devices.push(LiveDevice { id: "d".into(), driver: "e1000".into() }),
        "device d (e1000)",
    );
    check(|live| live.blocked_reasons.push("because".into()), "because");
    check(
        |live| {
            let node = BlockNode { driver: "file".into(), file: "/b.img".into(), backing_file: None };
            live.block_nodes.push(node);
        },
        "image /b.img was opened",
    );
}
