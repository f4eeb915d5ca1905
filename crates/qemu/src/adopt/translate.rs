//! From the command line of a running machine to the arguments of its twin.

use std::{collections::BTreeSet, path::Path};

use super::{AdoptRefusal, BlockNode, LiveFacts, LiveNetdev, Process, absolute, refuse};
use crate::{
    commandline::{Argument, properties::Properties, rules},
    machine::{Net, NetModel},
};

/// QEMU's CPU model where none is given.
const DEFAULT_CPU: &str = "qemu64";

/// What godwit writes itself for the twin.
#[rustfmt::skip]
const HOST: [&str; 16] = [
    "D", "S", "accel", "d", "daemonize", "enable-kvm", "incoming", "machine", "mon", "monitor", "msg", "name",
    "no-user-config", "pidfile", "qmp", "qmp-pretty",
];

/// What belongs to the host and that the twin lacks; people should know.
#[rustfmt::skip]
const LEFT_BEHIND: [&str; 14] = [
    "L", "chroot", "dfilter", "display", "echr", "full-screen", "gdb", "nographic", "runas", "run-with", "s",
    "spice", "trace", "vnc",
];

/// The arguments of the twin, and what was found on the way.
#[derive(Default)]
pub(super) struct Translated {
    pub(super) arguments: Vec<Argument>,
    pub(super) net: Vec<Net>,
    pub(super) left_behind: Vec<String>,
    pub(super) cpu: String,
    /// Whether a serial port ends at the machine's console.
    pub(super) console: bool,
}

struct Translator<'a> {
    process: &'a Process,
    live: &'a LiveFacts,
    /// Where relative paths begin isn't known: a daemon has left that directory.
    astray: bool,
    /// Character devices that monitors and ports use, whose ends are replaced.
    consumed: BTreeSet<String>,
    /// TAP networks that were made without an id, in their order.
    unnamed_taps: Box<dyn Iterator<Item = &'a LiveNetdev> + 'a>,
    out: Translated,
}

pub(super) fn translate(
    arguments: &[Argument],
    process: &Process,
    live: &LiveFacts,
) -> Result<Translated, AdoptRefusal> {
    let unnamed = |netdev: &&LiveNetdev| netdev.id.starts_with('#') && is_tap(&netdev.kind);
    let mut translator = Translator {
        process,
        live,
        astray: process.working_directory.is_none()
            || arguments.iter().any(|argument| argument.option == "daemonize"),
        consumed: arguments.iter().filter_map(consumed_character_device).collect(),
        unnamed_taps: Box::new(live.netdevs.iter().filter(unnamed)),
        out: Translated { cpu: DEFAULT_CPU.to_owned(), ..Translated::default() },
    };
    translator.machine(arguments)?;
    for argument in arguments {
        translator.argument(argument)?;
    }
    translator.defaults(arguments);
    Ok(translator.out)
}

/// The id of a character device that a monitor or a port uses.
fn consumed_character_device(argument: &Argument) -> Option<String> {
    let value = argument.value.as_deref()?;
    let id = match argument.option.as_str() {
        "serial" | "parallel" | "monitor" | "qmp" | "qmp-pretty" => {
            value.strip_prefix("chardev:")?.to_owned()
        }
        "mon" => Properties::parse(value, "chardev").ok()?.get("chardev")?.to_owned(),
        _ => return None,
    };
    Some(id)
}

fn is_tap(kind: &str) -> bool {
    matches!(kind, "tap" | "bridge")
}

fn list(argument: &Argument, implied: &str) -> Result<Properties, AdoptRefusal> {
    let value = argument.value.as_deref().unwrap_or_default();
    Properties::parse(value, implied).map_err(|error| AdoptRefusal(format!("{argument}: {error}")))
}

impl Translator<'_> {
    fn keep(&mut self, option: &str, value: impl Into<String>) {
        self.out.arguments.push(Argument::new(option, value));
    }

    /// The machine and what executes it, with the versioned type and the accelerator that were found.
    fn machine(&mut self, arguments: &[Argument]) -> Result<(), AdoptRefusal> {
        let mut machine: Properties = [("type", self.live.machine_type.as_str())].into_iter().collect();
        for argument in arguments.iter().filter(|argument| argument.option == "machine") {
            for (key, value) in list(argument, "type")?.iter() {
                // Underscores are the old spelling.
                let key = key.replace('_', "-");
                if !matches!(key.as_str(), "type" | "accel") {
                    machine.set(&key, value);
                }
            }
        }
        self.keep("machine", machine.to_string());
        let name = if self.live.kvm { "kvm" } else { "tcg" };
        let mut accelerator: Properties = [("accel", name)].into_iter().collect();
        for argument in arguments.iter().filter(|argument| argument.option == "accel") {
            let given = list(argument, "accel")?;
            if given.get("accel") == Some(name) {
                accelerator = given;
            }
        }
        self.keep("accel", accelerator.to_string());
        Ok(())
    }

    fn argument(&mut self, argument: &Argument) -> Result<(), AdoptRefusal> {
        let option = argument.option.as_str();
        let value = argument.value.as_deref().unwrap_or_default();
        match option {
            _ if HOST.contains(&option) => {}
            _ if LEFT_BEHIND.contains(&option) => self.out.left_behind.push(argument.to_string()),
            "snapshot" => {
                return refuse("-snapshot: what the guest wrote is in a file that only this QEMU has");
            }
            "loadvm" => return refuse("-loadvm: the machine began from a snapshot, and a twin would too"),
            "readconfig" | "set" => {
                return refuse(format!("{argument}: write its options on the command line instead"));
            }
            "cpu" => {
                self.out.cpu = value.to_owned();
                self.keep("cpu", value);
            }
            "serial" => self.serial(value),
            "parallel" => self.keep("parallel", if value == "none" { "none" } else { "null" }),
            "chardev" => self.character_device(argument)?,
            "netdev" | "nic" => self.network(argument)?,
            "hda" | "hdb" | "hdc" | "hdd" | "cdrom" | "fda" | "fdb" | "pflash" => {
                self.short_drive(option, value)?;
            }
            "drive" => self.drive(list(argument, "")?)?,
            "blockdev" | "object" | "device" | "fw_cfg" => self.normalised(argument)?,
            _ => self.keep_with_absolute_paths(argument)?,
        }
        Ok(())
    }

    fn keep_with_absolute_paths(&mut self, argument: &Argument) -> Result<(), AdoptRefusal> {
        let kept = rules::map_paths(argument, |_, path| {
            if path.is_relative() && self.astray {
                return refuse(format!(
                    "{argument}: has a relative path, and where it begins isn't known: QEMU is a daemon, or another \
                     user's and the agent has no CAP_SYS_PTRACE"
                ));
            }
            Ok(absolute(self.process, path))
        })?;
        self.out.arguments.push(kept);
        Ok(())
    }

    /// Written as a plain list, JSON or not.
    fn normalised(&mut self, argument: &Argument) -> Result<(), AdoptRefusal> {
        let implied = match argument.option.as_str() {
            "object" => "qom-type",
            "fw_cfg" => "name",
            _ => "driver",
        };
        let plain = Argument::new(&argument.option, list(argument, implied)?.to_string());
        self.keep_with_absolute_paths(&plain)
    }

    /// The first port ends at the machine's console, others nowhere.
    fn serial(&mut self, value: &str) {
        let value = match value {
            "none" => "none",
            _ if self.out.console => "null",
            _ => {
                self.out.console = true;
                "chardev:console"
            }
        };
        self.keep("serial", value);
    }

    /// One that a device uses ends at a socket in the machine's directory.
    fn character_device(&mut self, argument: &Argument) -> Result<(), AdoptRefusal> {
        let given = list(argument, "backend")?;
        let Some(id) = given.get("id") else { return refuse(format!("{argument}: has no id")) };
        if self.consumed.contains(id) {
            return Ok(());
        }
        let backend = match given.get("backend").unwrap_or_default() {
            "null" => "null",
            "socket" | "pty" | "file" | "stdio" | "pipe" | "vc" | "ringbuf" => "socket",
            other => {
                return refuse(format!(
                    "{argument}: {other} isn't among the character devices that can be moved"
                ));
            }
        };
        let twin: Properties = [("backend", backend), ("id", id)].into_iter().collect();
        self.keep("chardev", twin.to_string());
        Ok(())
    }

    fn network(&mut self, argument: &Argument) -> Result<(), AdoptRefusal> {
        let mut network = list(argument, "type")?;
        let kind = network.get("type").unwrap_or_default().to_owned();
        if is_tap(&kind) {
            self.tap(argument, &network)?;
            network.set("type", "tap");
            for key in ["ifname", "script", "downscript", "br", "helper"] {
                network.remove(key);
            }
        } else if kind == "user" {
            let forwarded = network.iter().filter(|(key, _)| *key == "hostfwd");
            self.out.left_behind.extend(forwarded.map(|(_, forward)| format!("hostfwd={forward}")));
            network.remove("hostfwd");
        }
        self.keep(&argument.option, network.to_string());
        Ok(())
    }

    fn tap(&mut self, argument: &Argument, network: &Properties) -> Result<(), AdoptRefusal> {
        let found = match network.get("id") {
            Some(id) => self.live.netdevs.iter().find(|netdev| netdev.id == id),
            None => self.unnamed_taps.next(),
        };
        let (interface, bridge) = match found {
            Some(found) => (found.interface.clone(), found.bridge.clone()),
            None => (network.get("ifname").map(str::to_owned), network.get("br").map(str::to_owned)),
        };
        let queues = network.get("queues").map_or(Ok(1), str::parse);
        let queues = queues.map_err(|_| AdoptRefusal(format!("{argument}: queues isn't a number")))?;
        // Where the bridge is known, the target makes a TAP device of its own.
        let tap = if bridge.is_some() { None } else { interface };
        if bridge.is_none() && tap.is_none() {
            return refuse(format!("{argument}: neither its TAP device nor a bridge can be found"));
        }
        self.out.net.push(Net { bridge, tap, mac: None, model: NetModel::default(), queues });
        Ok(())
    }

    /// What the short options mean in QEMU.
    fn short_drive(&mut self, option: &str, value: &str) -> Result<(), AdoptRefusal> {
        let place: &[(&str, &str)] = match option {
            "hda" => &[("index", "0"), ("media", "disk")],
            "hdb" => &[("index", "1"), ("media", "disk")],
            "hdc" => &[("index", "2"), ("media", "disk")],
            "hdd" => &[("index", "3"), ("media", "disk")],
            "cdrom" => &[("index", "2"), ("media", "cdrom")],
            "fda" => &[("if", "floppy"), ("index", "0")],
            "fdb" => &[("if", "floppy"), ("index", "1")],
            _ => &[("if", "pflash")],
        };
        let mut drive: Properties = place.iter().copied().collect();
        drive.set("file", value);
        self.image(drive)
    }

    fn drive(&mut self, mut drive: Properties) -> Result<(), AdoptRefusal> {
        if drive.remove("snapshot").is_some_and(|snapshot| snapshot != "off") {
            return refuse(format!(
                "-drive {drive}: snapshot=on: what the guest wrote is in a file only this QEMU has"
            ));
        }
        self.image(drive)
    }

    /// With the whole path, and the format that was found instead of guessing again: the guest may have written
    /// another header meanwhile.
    fn image(&mut self, mut drive: Properties) -> Result<(), AdoptRefusal> {
        let format = ["format", "driver"].iter().any(|key| drive.get(key).is_some());
        if let Some(file) = drive.get("file") {
            if file.split('/').next().is_some_and(|start| start.contains(':')) {
                return refuse(format!("-drive {drive}: only files and devices of the host can be moved"));
            }
            let path = absolute(self.process, Path::new(file));
            let at_path = |node: &&BlockNode| absolute(self.process, Path::new(&node.file)) == path;
            let formats = self.live.block_nodes.iter().filter(at_path);
            let found =
                formats.map(|node| node.driver.as_str()).find(|driver| matches!(*driver, "raw" | "qcow2"));
            if let Some(found) = found.filter(|_| !format) {
                drive.set("format", found);
            }
        }
        self.keep_with_absolute_paths(&Argument::new("drive", drive.to_string()))
    }

    /// What QEMU adds by itself where `-nodefaults` is absent, written out: the ends of its ports belong to the host,
    /// and its network must be visible to the target's policy.
    fn defaults(&mut self, arguments: &[Argument]) {
        let has =
            |options: &[&str]| arguments.iter().any(|argument| options.contains(&argument.option.as_str()));
        if has(&["nodefaults"]) {
            return;
        }
        let isa_serial = |argument: &Argument| {
            argument.option == "device"
                && argument.value.as_deref().is_some_and(|value| value.contains("isa-serial"))
        };
        if !has(&["serial"]) && !arguments.iter().any(isa_serial) {
            self.serial("stdio");
        }
        if !has(&["parallel"]) {
            self.keep("parallel", "null");
        }
        if !has(&["net", "nic", "netdev"]) {
            self.keep("net", "nic");
            self.keep("net", "user");
        }
    }
}
