//! A machine as a peer might offer it: read, judged, built into a command line. Whatever comes out, QEMU opens nothing
//! outside of what the policy accepts and of the machine's own directory.
//!
//! An input is a specification as JSON, or else a line for each argument of an adopted machine, `option value`.

#![no_main]

use godwit_qemu::{
    commandline::{Launch, MachineDir, Policy, build, files, localise},
    machine::{Accel, Spec},
};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// Options whose value QEMU only hands to the guest.
const TEXTS: [&str; 3] = ["-append", "-fw_cfg", "-smbios"];
/// Options whose value is one path, commas and all.
const PATHS: [&str; 4] = ["-bios", "-initrd", "-kernel", "-mem-path"];

fuzz_target!(|bytes: &[u8]| {
    let Some(spec) = read(bytes) else { return };
    let Ok(local) = localise(&spec, &policy()) else { return };
    assert!(files(&local).iter().all(|file| file.starts_with("/mnt/vm")), "{local:?}");
    let taps = (0..local.net.len()).map(|index| format!("gw{index}")).collect();
    let launch = Launch {
        emulator: "/usr/bin/qemu-system-x86_64".into(),
        accel: Accel::Tcg,
        directory: MachineDir::new("/run/godwit/web1"),
        taps,
        incoming: true,
    };
    let Ok(line) = build(&local, &launch) else { return };
    let end = &line[line.len() - 3..];
    assert_eq!(end, ["-incoming", "defer", "-S"], "{line:?}");
    for pair in line[1..].windows(2).filter(|pair| !TEXTS.contains(&pair[0].as_str())) {
        let path = PATHS.contains(&pair[0].as_str());
        assert!(if path { is_own(&pair[1]) } else { reaches_nothing(&pair[1]) }, "{pair:?}");
    }
});

fn read(bytes: &[u8]) -> Option<Spec> {
    if bytes.first() == Some(&b'{') {
        return serde_json::from_slice(bytes).ok();
    }
    let text = std::str::from_utf8(bytes).ok()?;
    let argument = |line: &str| match line.split_once(' ') {
        Some((option, value)) => json!({ "option": option, "value": value }),
        None => json!({ "option": line }),
    };
    let arguments: Vec<Value> = text.lines().map(argument).collect();
    let spec = json!({
        "name": "web1",
        "machine": "pc-q35-10.0",
        "memory": "512M",
        "net": [{ "bridge": "br0" }],
        "adopted": { "arguments": arguments },
    });
    serde_json::from_value(spec).ok()
}

fn policy() -> Policy {
    Policy {
        paths: [("/srv/vm".into(), "/mnt/vm".into())].into(),
        bridges: [("br0".into(), "lan".into())].into(),
        taps: [("tap0".into(), "tap9".into())].into(),
        extra: vec!["-rtc base=*".into(), "-no-reboot".into()],
        user_networks: false,
    }
}

/// Whether every file in a value is one that the host chose. JSON is left only where no file may be named at all.
fn reaches_nothing(value: &str) -> bool {
    if value.starts_with('{') {
        return !value.contains('/');
    }
    let unescaped = value.replace(",,", "\u{1}");
    unescaped.split(',').all(|part| {
        let part = part.strip_prefix("unix:").unwrap_or(part);
        let named =
            if part.starts_with('/') { part } else { part.split_once('=').map_or("", |(_, named)| named) };
        !named.starts_with('/') || is_own(named)
    })
}

fn is_own(path: &str) -> bool {
    ["/mnt/vm/", "/run/godwit/web1/"].iter().any(|own| path.starts_with(own))
}
