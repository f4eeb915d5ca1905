//! What an adopted machine's arguments may be: what describes a guest, and nothing that reaches into its host.
//!
//! The same rules hold where the machine is adopted and, because a peer may say anything, where it is to be started.
//! Everything is a list of what is permitted; what isn't listed is refused. Files are named only in values that
//! [`map_paths`] knows, so that a host's policy sees every one of them.

use std::path::{Path, PathBuf};

use super::{
    Argument,
    properties::{Properties, PropertiesError},
};

/// How the value of an option is to be read.
enum Rule {
    /// The option stands alone.
    Switch,
    /// Anything; QEMU only hands it to the guest.
    Text,
    /// One of QEMU's names and numbers, which never have a slash.
    Word,
    /// `-global`: a property of every device of a kind.
    Global,
    /// `-k`: a keyboard layout, which QEMU reads from a file of that name.
    Layout,
    /// One of these.
    OneOf(&'static [&'static str]),
    /// A path.
    Path,
    /// A list with these keys, the first of which needn't be written out.
    Keys { implied: &'static str, words: &'static [&'static str] },
    /// `-smbios`: texts for the guest.
    Smbios,
    /// `-fw_cfg`: texts and files for the guest.
    FirmwareConfiguration,
    /// `-chardev`, whose end in the host is godwit's to choose.
    CharacterDevice,
    /// `-device`.
    Device,
    /// `-object`.
    Object,
    /// `-netdev` and `-nic`.
    Network,
    /// `-blockdev` and `-drive`.
    Block,
}

const fn keys(implied: &'static str, words: &'static [&'static str]) -> Rule {
    Rule::Keys { implied, words }
}

fn rule(option: &str) -> Option<Rule> {
    Some(match option {
        "mem-prealloc" | "no-acpi" | "no-fd-bootchk" | "no-hpet" | "no-reboot" | "no-shutdown"
        | "nodefaults" | "only-migratable" | "usb" => Rule::Switch,
        "append" => Rule::Text,
        "action" | "cpu" | "numa" | "uuid" | "vga" | "watchdog-action" => Rule::Word,
        "sandbox" => keys("enable", &["enable", "obsolete", "elevateprivileges", "spawn", "resourcecontrol"]),
        "global" => Rule::Global,
        "k" => Rule::Layout,
        "serial" => Rule::OneOf(&["chardev:console", "null", "none"]),
        "parallel" => Rule::OneOf(&["null", "none"]),
        "usbdevice" => Rule::OneOf(&["tablet", "mouse", "keyboard"]),
        "net" => Rule::OneOf(&["none", "nic", "user"]),
        "bios" | "initrd" | "kernel" | "mem-path" => Rule::Path,
        "accel" => {
            keys("accel", &["accel", "thread", "tb-size", "kernel-irqchip", "split-wx", "dirty-ring-size"])
        }
        "boot" => keys("order", &["order", "once", "menu", "splash-time", "reboot-timeout", "strict"]),
        "chardev" => Rule::CharacterDevice,
        "fw_cfg" => Rule::FirmwareConfiguration,
        "m" => keys("size", &["size", "slots", "maxmem"]),
        "machine" => keys("type", MACHINE_KEYS),
        "overcommit" => keys("", &["mem-lock", "cpu-pm"]),
        "rtc" => keys("", &["base", "clock", "driftfix"]),
        "smbios" => Rule::Smbios,
        "smp" => {
            keys("cpus", &["cpus", "maxcpus", "sockets", "dies", "clusters", "modules", "cores", "threads"])
        }
        "device" => Rule::Device,
        "object" => Rule::Object,
        "netdev" | "nic" => Rule::Network,
        "blockdev" | "drive" => Rule::Block,
        _ => return None,
    })
}

#[rustfmt::skip]
const MACHINE_KEYS: &[&str] = &[
    "type", "acpi", "dump-guest-core", "fd-bootchk", "graphics", "hmat", "hpet", "i8042", "kernel-irqchip",
    "max-ram-below-4g", "mem-merge", "memory-backend", "nvdimm", "pflash0", "pflash1", "pic", "pit", "sata",
    "smbus", "smbios-entry-point-type", "smm", "suppress-vmdesc", "usb", "vmport",
    "default-bus-bypass-iommu",
];

#[rustfmt::skip]
const SMBIOS_KEYS: &[&str] = &[
    "type", "vendor", "version", "date", "release", "uefi", "manufacturer", "product", "serial", "uuid",
    "sku", "family", "asset", "location", "sock_pfx", "part", "loc_pfx", "bank", "speed", "max-speed",
    "current-speed", "processor-family", "processor-id", "value", "external_reference",
    "internal_reference", "connector_type", "port_type", "designation", "kind", "instance", "pcidev",
];

/// Devices that migrate, have no back-end of their own in the host and read no file.
#[rustfmt::skip]
const DEVICES: &[&str] = &[
    "ahci", "bochs-display", "cirrus-vga", "e1000", "e1000-82540em", "e1000e", "floppy", "i6300esb",
    "i82801b11-bridge", "ich9-ahci", "ich9-usb-ehci1", "ich9-usb-uhci1", "ich9-usb-uhci2", "ich9-usb-uhci3",
    "ide-cd", "ide-hd", "igb", "ioh3420", "isa-debugcon", "isa-serial", "lsi", "lsi53c895a", "megasas",
    "mptsas1068", "nec-usb-xhci", "pci-bridge", "pci-serial", "pcie-pci-bridge", "pcie-root-port",
    "piix3-usb-uhci", "piix4-usb-uhci", "pvpanic", "pvpanic-pci", "pvscsi", "qemu-xhci", "rtl8139",
    "scsi-cd", "scsi-hd", "usb-ehci", "usb-hub", "usb-kbd", "usb-mouse", "usb-tablet", "VGA", "virtconsole",
    "virtio-balloon", "virtio-balloon-pci", "virtio-blk", "virtio-blk-pci", "virtio-gpu-pci",
    "virtio-keyboard-pci", "virtio-mouse-pci", "virtio-net", "virtio-net-pci", "virtio-rng",
    "virtio-rng-pci", "virtio-scsi", "virtio-scsi-pci", "virtio-serial", "virtio-serial-pci",
    "virtio-tablet-pci", "virtio-vga", "virtserialport", "vmcoreinfo", "vmgenid", "vmware-svga", "vmxnet3",
];

#[rustfmt::skip]
const OBJECTS: &[(&str, &[&str], &[&str])] = &[
    (
        "iothread",
        &["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max"],
        &[],
    ),
    ("memory-backend-file", MEMORY_KEYS, &["mem-path"]),
    ("memory-backend-memfd", MEMORY_KEYS, &[]),
    ("memory-backend-ram", MEMORY_KEYS, &[]),
    ("rng-builtin", &[], &[]),
    ("rng-random", &[], &["filename"]),
    (
        "throttle-group",
        &[
            "limits.bps-total",
            "limits.bps-read",
            "limits.bps-write",
            "limits.iops-total",
            "limits.iops-read",
            "limits.iops-write",
            "x-bps-total",
            "x-iops-total",
        ],
        &[],
    ),
];

#[rustfmt::skip]
const MEMORY_KEYS: &[&str] = &[
    "size", "share", "prealloc", "prealloc-threads", "merge", "dump", "reserve", "host-nodes", "policy",
    "align", "discard-data", "hugetlb", "hugetlbsize", "seal",
];

const TAP_KEYS: &[&str] = &["queues", "vhost", "sndbuf", "vnet_hdr", "poll-us"];
#[rustfmt::skip]
const USER_KEYS: &[&str] = &[
    "net", "host", "hostname", "dns", "dhcpstart", "domainname", "restrict", "ipv4", "ipv6", "ipv6-net",
    "ipv6-prefix", "ipv6-prefixlen", "ipv6-host", "ipv6-dns",
];
const NIC_KEYS: &[&str] = &["model", "mac", "macaddr", "addr", "vectors", "name"];

/// The options whose value QEMU takes for JSON when it begins with a brace. For any other the brace is a letter, and what
/// is quoted here would be keys there.
const JSON_OPTIONS: &[&str] = &["blockdev", "device", "netdev", "object"];

/// What `-global` may set beside [`DEVICES`]: chips of the boards, which no option makes.
const CHIPS: &[&str] = &[
    "ICH9-LPC",
    "PIIX4_PM",
    "cfi.pflash01",
    "fw_cfg_io",
    "hpet",
    "ide-device",
    "isa-fdc",
    "kvm-pit",
    "mc146818rtc",
    "mch",
    "pci-device",
    "q35-pcihost",
    "i440FX-pcihost",
    "scsi-disk-base",
    "usb-device",
    "virtio-device",
    "virtio-pci",
];

/// Properties that tie a device to something of its host: `-global` sets none of them.
const TIES: &[&str] = &["chardev", "drive", "netdev", "romfile"];

/// The character devices that QEMU makes for its own monitors.
const MONITOR_PREFIX: &str = "compat_monitor";

const BLOCK_DRIVERS: &[&str] = &["file", "host_device", "null-co", "qcow2", "raw"];
/// Keys of `-drive` and `-blockdev` that say nothing about files, also below `file.` and `backing.`.
#[rustfmt::skip]
const BLOCK_KEYS: &[&str] = &[
    "aio", "auto-read-only", "backing", "bps", "bps_rd", "bps_wr", "bus", "cache", "cache.direct",
    "cache.no-flush", "cache-size", "copy-on-read", "detect-zeroes", "discard", "file", "force-share", "id",
    "if", "index", "iops", "iops_rd", "iops_wr", "l2-cache-size", "lazy-refcounts", "locking", "media",
    "node-name", "offset", "pass-discard-request", "pr-manager", "read-only", "readonly", "rerror", "size",
    "unit", "werror", "drop-cache",
];

/// Whether an argument is one that an adopted machine may have.
///
/// # Errors
/// What is wrong with it, one line.
pub(crate) fn check(argument: &Argument) -> Result<(), String> {
    let rule = rule(&argument.option).ok_or_else(|| format!("{argument} isn't supported"))?;
    let Some(value) = argument.value.as_deref() else {
        return if matches!(rule, Rule::Switch) { Ok(()) } else { Err(format!("{argument} has no value")) };
    };
    if value.starts_with('{') && !JSON_OPTIONS.contains(&argument.option.as_str()) {
        return Err(format!("{argument}: QEMU doesn't read JSON there"));
    }
    if argument.option == "initrd" && value.contains(',') {
        return Err(format!("{argument}: has a comma, behind which QEMU expects another file"));
    }
    let refused = match rule {
        Rule::Switch => Some("takes no value".to_owned()),
        Rule::Text => None,
        Rule::Path => not_a_path(value),
        Rule::Word => has_slash(value),
        Rule::Global => global_refused(value),
        Rule::Layout => {
            let letters = value.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
            (!letters || value.len() > 5).then(|| "isn't a keyboard layout".to_owned())
        }
        Rule::OneOf(words) => (!words.contains(&value)).then(|| "isn't supported".to_owned()),
        Rule::Keys { implied, words } => checked(value, implied, |list| {
            list.iter().find_map(|(key, value)| word_refused(key, value, words))
        }),
        Rule::Smbios => checked(value, "", |list| list.iter().find_map(|(key, _)| unknown(key, SMBIOS_KEYS))),
        Rule::FirmwareConfiguration => checked(value, "name", firmware_configuration_refused),
        Rule::CharacterDevice => checked(value, "backend", character_device_refused),
        Rule::Device => checked(value, "driver", device_refused),
        Rule::Object => checked(value, "qom-type", object_refused),
        Rule::Network => checked(value, "type", |list| network_refused(list, argument.option == "nic")),
        Rule::Block => {
            let drive = argument.option == "drive";
            checked(value, if drive { "" } else { "driver" }, |list| block_refused(list, drive))
        }
    };
    refused.map_or(Ok(()), |problem| Err(format!("{argument}: {problem}")))
}

fn checked(
    value: &str,
    implied: &str,
    refused: impl FnOnce(&Properties) -> Option<String>,
) -> Option<String> {
    match Properties::parse(value, implied) {
        // Which of two values counts differs between options.
        Ok(list) => list
            .repeated()
            .map(|key| format!("{key} is given twice"))
            .or_else(|| list.iter().find_map(|(key, value)| no_name(key).or_else(|| no_id(key, value))))
            .or_else(|| refused(&list)),
        Err(error) => Some(error.to_string()),
    }
}

/// The names of properties are plain; what isn't one may mean something else to whoever cuts the value again.
fn no_name(key: &str) -> Option<String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (!key.bytes().all(plain)).then(|| format!("\"{}\" isn't the name of a property", key.escape_debug()))
}

/// QEMU's own rule for ids: a letter, then letters, digits, `-`, `.` and `_`.
fn no_id(key: &str, value: &str) -> Option<String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let well_formed = value.starts_with(|c: char| c.is_ascii_alphabetic()) && value.bytes().all(plain);
    (key == "id" && !well_formed).then(|| format!("\"{}\" isn't an id", value.escape_debug()))
}

fn unknown(key: &str, known: &[&str]) -> Option<String> {
    (!known.contains(&key)).then(|| format!("{key} isn't supported"))
}

/// A key that is permitted and a value that can't name a file.
fn word_refused(key: &str, value: &str, known: &[&str]) -> Option<String> {
    unknown(key, known).or_else(|| has_slash(value))
}

fn has_slash(value: &str) -> Option<String> {
    value.contains('/').then(|| "names a file where none is expected".to_owned())
}

fn not_a_path(value: &str) -> Option<String> {
    crate::machine::check_path("", Path::new(value)).err().map(|error| error.problem)
}

fn device_refused(list: &Properties) -> Option<String> {
    let driver = list.get("driver").unwrap_or_default();
    if !DEVICES.contains(&driver) {
        return Some(format!("{driver} isn't among the devices that can be moved"));
    }
    list.iter().find_map(|(key, value)| match key {
        // QEMU finds a file without a directory as well: in its own, and in its working directory.
        "romfile" => (!value.is_empty()).then(|| "romfile names a file".to_owned()),
        "chardev" if value.starts_with(MONITOR_PREFIX) => Some(format!("{value} is QEMU's monitor")),
        _ => descriptor(key).or_else(|| has_slash(value)),
    })
}

fn descriptor(key: &str) -> Option<String> {
    let descriptor = key.ends_with("fd") || key.ends_with("fds");
    descriptor.then(|| format!("{key} is a file descriptor of its process"))
}

/// `-global driver.property=value` or `driver=…,property=…,value=…`; QEMU tells them by the first key.
fn global_refused(value: &str) -> Option<String> {
    let (driver, property) = match value.split_once('=') {
        Some(("driver", _)) => match Properties::parse(value, "") {
            Ok(list) if list.repeated().is_none() => (
                list.get("driver").unwrap_or_default().to_owned(),
                list.get("property").unwrap_or_default().to_owned(),
            ),
            _ => return Some("is neither a property nor a list".to_owned()),
        },
        Some((name, _)) => match name.rsplit_once('.') {
            Some((driver, property)) => (driver.to_owned(), property.to_owned()),
            None => return Some("names no property".to_owned()),
        },
        None => return Some("has no value".to_owned()),
    };
    let processor = driver.ends_with("-x86_64-cpu") || driver == "x86_64-cpu";
    if !processor && !DEVICES.contains(&driver.as_str()) && !CHIPS.contains(&driver.as_str()) {
        return Some(format!("{driver} isn't among the devices that can be moved"));
    }
    if TIES.contains(&property.as_str()) {
        return Some(format!("{property} ties devices to this host"));
    }
    descriptor(&property).or_else(|| has_slash(value))
}

fn firmware_configuration_refused(list: &Properties) -> Option<String> {
    list.iter().find_map(|(key, value)| match key {
        "name" | "string" => None,
        "file" => not_a_path(value),
        _ => Some(format!("{key} isn't supported")),
    })
}

fn character_device_refused(list: &Properties) -> Option<String> {
    list.iter().find_map(|(key, value)| match key {
        "backend" => unknown(value, &["null", "socket"]),
        "id" => has_slash(value),
        _ => Some(format!("{key} isn't supported")),
    })
}

fn object_refused(list: &Properties) -> Option<String> {
    let kind = list.get("qom-type").unwrap_or_default();
    let Some((_, known, paths)) = OBJECTS.iter().find(|(name, ..)| *name == kind) else {
        return Some(format!("{kind} isn't among the objects that can be moved"));
    };
    list.iter().filter(|(key, _)| !matches!(*key, "qom-type" | "id")).find_map(|(key, value)| {
        if paths.contains(&key) { not_a_path(value) } else { word_refused(key, value, known) }
    })
}

fn network_refused(list: &Properties, has_card: bool) -> Option<String> {
    let kind = list.get("type").unwrap_or_default();
    let known = match kind {
        "tap" => TAP_KEYS,
        "user" => USER_KEYS,
        "none" if has_card => &[],
        _ => return Some(format!("{kind} isn't among the networks that can be moved")),
    };
    let card = |key: &str| has_card && NIC_KEYS.contains(&key);
    list.iter().filter(|(key, _)| !matches!(*key, "type" | "id") && !card(key)).find_map(|(key, value)| {
        // 10.0.2.0/24 is no file.
        let address = matches!(key, "net" | "ipv6-net");
        if address { unknown(key, known) } else { word_refused(key, value, known) }
    })
}

fn block_refused(list: &Properties, drive: bool) -> Option<String> {
    list.iter().find_map(|(key, value)| {
        if is_block_path(key, drive) {
            return not_a_path(value);
        }
        let last = block_key(key);
        if matches!(last, "driver" | "format") {
            let known = BLOCK_DRIVERS.contains(&value);
            return (!known).then(|| format!("{value} isn't among the image formats that can be moved"));
        }
        if key.starts_with("throttling.") { has_slash(value) } else { word_refused(last, value, BLOCK_KEYS) }
    })
}

/// Whether QEMU would choose the format of an image by its first bytes, which the guest writes: those of a qcow2 image
/// name further files.
pub(crate) fn guesses_format(argument: &Argument) -> bool {
    let Some(value) = argument.value.as_deref().filter(|_| argument.option == "drive") else { return false };
    Properties::parse(value, "").is_ok_and(|list| {
        let image = list.iter().any(|(key, _)| key == "file" || key.starts_with("file."));
        image && list.get("format").or_else(|| list.get("driver")).is_none()
    })
}

/// Every file that an argument names.
pub(crate) fn paths(argument: &Argument) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let collected = map_paths(argument, |_, path| {
        found.push(path.to_owned());
        Ok::<_, std::convert::Infallible>(path.to_owned())
    });
    let Ok(_) = collected;
    found
}

/// The bytes of guest memory that an argument asks for: `-m`, or an object that is memory. `None` for one that can't be
/// read.
pub(crate) fn memory_bytes(argument: &Argument) -> Option<u64> {
    let value = argument.value.as_deref().unwrap_or_default();
    let (implied, unit) = match argument.option.as_str() {
        "m" => ("size", 20),
        "object" => ("qom-type", 0),
        _ => return Some(0),
    };
    let list = Properties::parse(value, implied).ok()?;
    let is_memory = argument.option == "m" || list.get("qom-type")?.starts_with("memory-backend-");
    match list.get("size").filter(|_| is_memory) {
        Some(size) => size_bytes(size, unit),
        None => Some(0),
    }
}

/// A size as QEMU reads it: a number, perhaps with a fraction, and a unit, by default 2 to the power of `unit`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, and a number has no sign here"
)]
fn size_bytes(text: &str, unit: u32) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let plain = digits.starts_with(|c: char| c.is_ascii_digit())
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.');
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => unit,
        "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    let number: f64 = digits.parse().ok().filter(|_| plain)?;
    Some((number * (1_u64 << unit) as f64) as u64)
}

/// The key without the nodes that it goes through: `file.backing.driver` is a `driver`.
fn block_key(key: &str) -> &str {
    let mut rest = key;
    while let Some(inner) = rest.strip_prefix("file.").or_else(|| rest.strip_prefix("backing.")) {
        rest = inner;
    }
    rest
}

/// `filename` always; `file` is one for `-drive`, and another node's name for `-blockdev`.
fn is_block_path(key: &str, drive: bool) -> bool {
    block_key(key) == "filename" || (drive && key == "file")
}

/// The argument with every path in it replaced by what `map` makes of it; `map` gets the key (empty if the whole value
/// is the path) and the path.
///
/// # Errors
/// The first one of `map`; values that can't be read are left as they are, [`check`] refuses them.
pub(crate) fn map_paths<E>(
    argument: &Argument,
    mut map: impl FnMut(&str, &Path) -> Result<PathBuf, E>,
) -> Result<Argument, E> {
    let (Some(value), Some(rule)) = (&argument.value, rule(&argument.option)) else {
        return Ok(argument.clone());
    };
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let drive = argument.option == "drive";
    let (list, paths): (Result<Properties, PropertiesError>, &[&str]) = match rule {
        Rule::Path => return Ok(Argument::new(&argument.option, text(map("", Path::new(value))?))),
        Rule::FirmwareConfiguration => (Properties::parse(value, "name"), &["file"]),
        Rule::Object => (Properties::parse(value, "qom-type"), &["mem-path", "filename"]),
        Rule::Block => (Properties::parse(value, if drive { "" } else { "driver" }), &[]),
        _ => return Ok(argument.clone()),
    };
    let Ok(mut list) = list else { return Ok(argument.clone()) };
    let block = matches!(rule, Rule::Block);
    for (key, value) in list.iter_mut() {
        if (block && is_block_path(key, drive)) || paths.contains(&key) {
            *value = text(map(key, Path::new(value.as_str()))?);
        }
    }
    Ok(Argument::new(&argument.option, list.to_string()))
}
