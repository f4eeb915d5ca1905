//! QEMU's command line, cut where QEMU cuts it.

use serde::{Deserialize, Serialize};

/// One option of QEMU with its value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Argument {
    /// Without the dash, aliases resolved (`M` is `machine`).
    pub option: String,
    /// Absent for switches such as `-S`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

impl Argument {
    /// An option with a value.
    pub fn new(option: &str, value: impl Into<String>) -> Self {
        Self { option: option.to_owned(), value: Some(value.into()) }
    }

    /// A switch.
    pub fn switch(option: &str) -> Self {
        Self { option: option.to_owned(), value: None }
    }
}

impl std::fmt::Display for Argument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "-{}", self.option)?;
        self.value.as_ref().map_or(Ok(()), |value| write!(f, " {}", value.escape_debug()))
    }
}

/// Why a command line can't be cut into options.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// Whether the option takes a value isn't known, so neither is what follows.
    #[error("-{0} isn't an option that godwit knows")]
    Unknown(String),
    /// The option stands last and needs a value.
    #[error("-{0} needs a value")]
    NoValue(String),
    /// QEMU takes a word without a dash for a disk image.
    #[error("\"{0}\" stands where an option should be; QEMU takes it for a disk image")]
    Positional(String),
}

/// Cuts arguments (without the program's name) as QEMU does: an option that takes a value takes the next argument,
/// whatever it looks like.
///
/// # Errors
/// An option that isn't known, because then nothing behind it is certain.
///
/// ```
/// use godwit_qemu::commandline::{Argument, parse};
/// let arguments = parse(&["-M", "q35", "--enable-kvm", "-rtc", "-S"]).unwrap();
/// assert_eq!(arguments[0], Argument::new("machine", "q35"));
/// assert_eq!(arguments[2], Argument::new("rtc", "-S"));
/// ```
pub fn parse<S: AsRef<str>>(argv: &[S]) -> Result<Vec<Argument>, ArgumentError> {
    let mut words = argv.iter().map(AsRef::as_ref);
    let mut arguments = Vec::new();
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
        let name = name.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| ArgumentError::Positional(word.escape_debug().to_string()))?;
        let unknown = || ArgumentError::Unknown(name.escape_debug().to_string());
        let (option, takes_value) = lookup(name).ok_or_else(unknown)?;
        let value = if takes_value {
            Some(words.next().ok_or_else(|| ArgumentError::NoValue(option.to_owned()))?.to_owned())
        } else {
            None
        };
        arguments.push(Argument { option: option.to_owned(), value });
    }
    Ok(arguments)
}

fn lookup(name: &str) -> Option<(&'static str, bool)> {
    let name = match name {
        "M" => "machine",
        "h" => "help",
        other => other,
    };
    let find = |options: &[&'static str]| options.iter().copied().find(|option| *option == name);
    find(WITH_VALUE).map(|option| (option, true)).or_else(|| find(SWITCHES).map(|option| (option, false)))
}

/// The options of QEMU 7.2 to 10.0 that take a value.
#[rustfmt::skip]
const WITH_VALUE: &[&str] = &[
    "accel", "acpitable", "action", "add-fd", "append", "audio", "audiodev", "bios", "blockdev", "boot",
    "cdrom", "chardev", "chroot", "compat", "cpu", "D", "d", "debugcon", "device", "dfilter", "display",
    "drive", "dtb", "dump-vmstate", "echr", "fda", "fdb", "fsdev", "fw_cfg", "g", "gdb", "global", "hda",
    "hdb", "hdc", "hdd", "icount", "incoming", "initrd", "iscsi", "k", "kernel", "L", "loadvm", "m",
    "machine", "mem-path", "mon", "monitor", "msg", "mtdblock", "name", "net", "netdev", "nic", "numa",
    "object", "option-rom", "overcommit", "parallel", "pflash", "pidfile", "plugin", "prom-env", "qmp",
    "qmp-pretty", "qtest", "qtest-log", "readconfig", "rtc", "run-with", "runas", "sandbox", "sd", "seed",
    "semihosting-config", "serial", "set", "shim", "smbios", "smp", "spice", "tb-size", "tpmdev", "trace",
    "usbdevice", "uuid", "vga", "virtfs", "vnc", "watchdog", "watchdog-action", "writeconfig", "xen-domid",
];

/// The options of QEMU 7.2 to 10.0 that stand alone.
#[rustfmt::skip]
const SWITCHES: &[&str] = &[
    "daemonize", "enable-kvm", "enable-sync-profile", "full-screen", "help", "jitdump", "mem-prealloc",
    "no-acpi", "no-fd-bootchk", "no-hpet", "no-reboot", "no-shutdown", "no-user-config", "nodefaults",
    "nographic", "old-param", "only-migratable", "perfmap", "preconfig", "S", "s", "semihosting",
    "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_as_qemu_cuts_them() {
        let line = ["-no-reboot", "--rtc", "-S", "-usb", "-append", "a -b"];
        let expected = [
            Argument::switch("no-reboot"),
            Argument::new("rtc", "-S"),
            Argument::switch("usb"),
            Argument::new("append", "a -b"),
        ];
        assert_eq!(parse(&line).unwrap(), expected);
        assert_eq!(parse(&["-usb", "/a.img"]), Err(ArgumentError::Positional("/a.img".into())));
        assert_eq!(parse(&["-rtc"]), Err(ArgumentError::NoValue("rtc".into())));
        assert_eq!(parse(&["-frob", "x"]), Err(ArgumentError::Unknown("frob".into())));
    }
}
