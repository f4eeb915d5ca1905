//! What a specification may say, whoever wrote it.

use std::path::{Component, Path};

use super::{Adopted, ByteSize, DirectBoot, Disk, DiskCache, DiskFormat, Net, Spec};
use crate::commandline::RESERVED_OPTIONS;

/// PCI slots are few; so many cards and disks always fit.
const NETS_MAX: usize = 8;
const DISKS_MAX: usize = 16;
const VCPUS_MAX: u32 = 1024;
const QUEUES_MAX: u16 = 256;
const ARGUMENTS_MAX: usize = 512;
const MEMORY_MIN: ByteSize = ByteSize::from_bytes(1 << 20);
const MEMORY_MAX: ByteSize = ByteSize::from_bytes(1 << 44);
const INTERFACE_NAME_BYTES_MAX: usize = 15;
const PATH_BYTES_MAX: usize = 4095;
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// One thing in a specification that can't be; one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct SpecError {
    /// Where: `memory`, `disk[1].path`.
    pub key: String,
    /// What is wrong and what to do.
    pub problem: String,
}

impl SpecError {
    pub(crate) fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into() }
    }
}

impl Spec {
    /// Whether the specification can be built at all. What this host permits is the policy's business
    /// ([`crate::commandline::localise`]); whether files exist is the agent's.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), SpecError> {
        check_name(&self.name)?;
        check_word("machine", &self.machine, "._-")?;
        check_family(&self.machine)?;
        check_word("cpu", &self.cpu, "._-+=,:")?;
        check_numbers(self)?;
        for (index, net) in self.net.iter().enumerate() {
            check_net(&format!("net[{index}]"), net)?;
        }
        for (index, disk) in self.disk.iter().enumerate() {
            check_disk(&format!("disk[{index}]"), disk)?;
        }
        if let Some(boot) = &self.boot {
            check_boot(boot)?;
        }
        if let Some(firmware) = &self.firmware {
            check_path("firmware", firmware)?;
        }
        check_extra(&self.extra)?;
        self.adopted.as_ref().map_or(Ok(()), |adopted| check_adopted(self, adopted))
    }
}

fn check_name(name: &str) -> Result<(), SpecError> {
    let letters = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if letters && (1..=63).contains(&name.len()) && !name.starts_with('-') {
        return Ok(());
    }
    let shown = shown(name);
    Err(SpecError::new("name", format!("\"{shown}\" isn't 1 to 63 of a-z, 0-9 and - (the first not -)")))
}

/// A value that can't end its option, start another one, or ask QEMU for help.
fn check_word(key: &str, word: &str, punctuation: &str) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || punctuation.contains(c);
    let starts_well = word.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !starts_well || word.len() > 1024 || !word.chars().all(plain) {
        let shown = shown(word);
        return Err(SpecError::new(key, format!("\"{shown}\" isn't one of QEMU's names; try `-{key} help`")));
    }
    if word == "help" || word.split(',').any(|part| part == "help") {
        return Err(SpecError::new(key, "\"help\" isn't a choice; write one of the names that it lists"));
    }
    Ok(())
}

fn check_family(machine: &str) -> Result<(), SpecError> {
    let known = matches!(machine, "pc" | "q35")
        || machine.starts_with("pc-i440fx-")
        || machine.starts_with("pc-q35-");
    if known {
        return Ok(());
    }
    Err(SpecError::new(
        "machine",
        format!("{machine} isn't supported; use q35, pc or one of their versioned types"),
    ))
}

fn check_numbers(spec: &Spec) -> Result<(), SpecError> {
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) {
        return Err(SpecError::new("vcpus", format!("{} isn't between 1 and {VCPUS_MAX}", spec.vcpus)));
    }
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&spec.memory) {
        return Err(SpecError::new("memory", format!("{} isn't between 1M and 16T", spec.memory)));
    }
    if !spec.memory.bytes().is_multiple_of(8192) {
        return Err(SpecError::new("memory", format!("{} isn't a whole number of 8K", spec.memory)));
    }
    if spec.net.len() > NETS_MAX {
        return Err(SpecError::new("net", format!("{} cards; up to {NETS_MAX} fit", spec.net.len())));
    }
    if spec.disk.len() > DISKS_MAX {
        return Err(SpecError::new("disk", format!("{} disks; up to {DISKS_MAX} fit", spec.disk.len())));
    }
    Ok(())
}

fn check_net(key: &str, net: &Net) -> Result<(), SpecError> {
    match (&net.bridge, &net.tap) {
        (Some(bridge), None) => check_interface(&format!("{key}.bridge"), bridge)?,
        (None, Some(tap)) => check_interface(&format!("{key}.tap"), tap)?,
        _ => return Err(SpecError::new(key, "needs either bridge or tap: where the card is plugged in")),
    }
    if !(1..=QUEUES_MAX).contains(&net.queues) {
        let problem = format!("{} isn't between 1 and {QUEUES_MAX}", net.queues);
        return Err(SpecError::new(format!("{key}.queues"), problem));
    }
    Ok(())
}

/// A Linux interface name that also survives in QEMU's comma lists.
pub(crate) fn check_interface(key: &str, name: &str) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= INTERFACE_NAME_BYTES_MAX && name.chars().all(plain) {
        return Ok(());
    }
    let shown = shown(name);
    Err(SpecError::new(
        key,
        format!("\"{shown}\" isn't the name of a network interface (up to 15 characters)"),
    ))
}

fn check_disk(key: &str, disk: &Disk) -> Result<(), SpecError> {
    match &disk.path {
        Some(path) if disk.image.is_none() && disk.size.is_none() && disk.adopt.is_none() => {
            check_path(&format!("{key}.path"), path)?
        }
        Some(_) => {
            let problem =
                "stands beside image, size or adopt; either QEMU opens a file, or godwit serves a disk";
            return Err(SpecError::new(format!("{key}.path"), problem));
        }
        None => check_served(key, disk)?,
    }
    let Some(serial) = &disk.serial else { return Ok(()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=20).contains(&serial.len()) && serial.chars().all(plain) {
        return Ok(());
    }
    let problem = format!("\"{}\" isn't 1 to 20 letters, digits, '.', '_' or '-'", shown(serial));
    Err(SpecError::new(format!("{key}.serial"), problem))
}

/// A disk that godwit serves.
fn check_served(key: &str, disk: &Disk) -> Result<(), SpecError> {
    if disk.image.is_none() && disk.size.is_none() && disk.adopt.is_none() {
        return Err(SpecError::new(
            key,
            "needs a path that QEMU opens, or an image, a size or a file to adopt for a disk that godwit serves",
        ));
    }
    if let Some(file) = &disk.adopt {
        check_path(&format!("{key}.adopt"), file)?;
        if disk.image.is_some() {
            let problem = "stands beside image; a disk begins as one of the two";
            return Err(SpecError::new(format!("{key}.adopt"), problem));
        }
    }
    if let Some(image) = &disk.image {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        let starts_well = image.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts_well || image.len() > 63 || !image.chars().all(plain) {
            let problem = format!("\"{}\" isn't an image's name; see `godwit image ls`", shown(image));
            return Err(SpecError::new(format!("{key}.image"), problem));
        }
    }
    if disk.size.is_some_and(|size| size.bytes() == 0) {
        return Err(SpecError::new(format!("{key}.size"), "0 isn't the size of a disk"));
    }
    let is_read = disk.format == DiskFormat::default() || disk.adopt.is_some();
    if !is_read || disk.cache != DiskCache::default() {
        return Err(SpecError::new(
            key,
            "has a format or cache, which are for files that QEMU opens; leave them out",
        ));
    }
    Ok(())
}

fn check_boot(boot: &DirectBoot) -> Result<(), SpecError> {
    check_path("boot.kernel", &boot.kernel)?;
    if let Some(initrd) = &boot.initrd {
        check_path("boot.initrd", initrd)?;
        if initrd.to_string_lossy().contains(',') {
            let problem = "has a comma, behind which QEMU may expect another file; use a name without one";
            return Err(SpecError::new("boot.initrd", problem));
        }
    }
    check_text("boot.append", &boot.append)
}

/// A path that means one file only, whoever looks at it: absolute, no `.`, `..` or `//`, no control characters.
pub(crate) fn check_path(key: &str, path: &Path) -> Result<(), SpecError> {
    let error = |problem: &str| {
        let shown = shown(&path.to_string_lossy());
        Err(SpecError::new(key, format!("{shown} {problem}")))
    };
    let Some(text) = path.to_str() else { return error("isn't UTF-8") };
    if !path.is_absolute() {
        return error("isn't absolute; write the whole path");
    }
    if text.len() > PATH_BYTES_MAX || text.chars().any(char::is_control) {
        return error("is too long or has control characters");
    }
    let normal = |component| matches!(component, Component::RootDir | Component::Normal(_));
    let rebuilt: std::path::PathBuf = path.components().collect();
    if !path.components().all(normal) || rebuilt.as_os_str() != path.as_os_str() || text == "/" {
        return error("has '.', '..', '//' or a '/' at its end; write the plain path");
    }
    Ok(())
}

fn check_text(key: &str, text: &str) -> Result<(), SpecError> {
    if text.len() > TEXT_BYTES_MAX || text.chars().any(char::is_control) {
        return Err(SpecError::new(key, "is too long or has control characters"));
    }
    Ok(())
}

fn check_extra(extra: &[String]) -> Result<(), SpecError> {
    if extra.len() > ARGUMENTS_MAX {
        return Err(SpecError::new("extra", format!("more than {ARGUMENTS_MAX} arguments")));
    }
    for (index, argument) in extra.iter().enumerate() {
        let key = format!("extra[{index}]");
        check_text(&key, argument)?;
        let option = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
        if let Some(option) = option.filter(|option| RESERVED_OPTIONS.contains(option)) {
            return Err(SpecError::new(key, format!("-{option} is godwit's own to set; leave it out")));
        }
    }
    if extra.first().is_some_and(|first| !first.starts_with('-')) {
        return Err(SpecError::new("extra[0]", "isn't an option; QEMU would take it for a disk image"));
    }
    Ok(())
}

fn check_adopted(spec: &Spec, adopted: &Adopted) -> Result<(), SpecError> {
    let described = !spec.disk.is_empty()
        || spec.boot.is_some()
        || spec.firmware.is_some()
        || !spec.extra.is_empty()
        || spec.rng
        || spec.balloon;
    if described {
        let problem = "stands beside disk, boot, firmware, extra, rng or balloon; an adopted machine has all that in \
                       its arguments";
        return Err(SpecError::new("adopted", problem));
    }
    if adopted.arguments.len() > ARGUMENTS_MAX {
        return Err(SpecError::new("adopted.arguments", format!("more than {ARGUMENTS_MAX} arguments")));
    }
    for (index, argument) in adopted.arguments.iter().enumerate() {
        let key = format!("adopted.arguments[{index}]");
        check_text(&key, &argument.option)?;
        check_text(&key, argument.value.as_deref().unwrap_or_default())?;
    }
    Ok(())
}

/// A value as it may stand in one line of text.
pub(crate) fn shown(value: &str) -> String {
    let short: String = value.chars().take(120).collect();
    short.escape_debug().to_string()
}
