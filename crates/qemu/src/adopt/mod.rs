//! Machines that somebody else started: what they are, and whether an equal one can be started elsewhere.
//!
//! [`process_of`] finds the process behind a QMP socket, [`inspect`] asks its QEMU what it consists of, and
//! [`classify`] (no I/O) makes a [`Spec`] of both, or says in one line why not:
//!
//! ```text
//! argv ── parse ── translate ──► arguments that describe the guest ── rules ──► Spec
//!                      │                        │
//!                      └► left behind           └ compared with what runs: devices, objects, images, CPUs
//! ```
//!
//! What belongs to the host (monitors, logs, displays, the host's end of serial ports and TAP devices) is left behind
//! or replaced; what isn't known is refused, because a twin that differs in one device can't load the guest's state.

mod compare;
mod live;
mod process;
mod translate;

use std::path::{Path, PathBuf};

pub use self::{
    live::{BlockNode, LiveDevice, LiveFacts, LiveNetdev, inspect},
    process::{Process, ProcessError, process_of},
};
use crate::{
    commandline::{Argument, parse, rules},
    machine::{Accel, Adopted, ByteSize, Spec, SpecError},
};

/// What helps against a device, or its back-end, that QEMU can't migrate.
pub const UNBLOCK: &str = "unplug that device (`device_del`), or start the machine without it";

/// Why a machine isn't adopted; one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AdoptRefusal(String);

impl From<SpecError> for AdoptRefusal {
    fn from(error: SpecError) -> Self {
        Self(error.to_string())
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T, AdoptRefusal> {
    Err(AdoptRefusal(why.into()))
}

/// The specification of a running machine, from its process and what its monitor says. Its name is QEMU's as far as
/// ours permits it; the caller may give it another.
///
/// # Errors
/// The first thing that an equal machine couldn't be started with.
pub fn classify(process: &Process, live: &LiveFacts) -> Result<Spec, AdoptRefusal> {
    let words = process.argv.get(1..).unwrap_or_default();
    refuse_libvirt(words)?;
    if let Some(reason) = live.blocked_reasons.first() {
        return refuse(format!("QEMU can't migrate this machine: {reason}; {UNBLOCK}"));
    }
    let arguments = parse(words).map_err(|error| AdoptRefusal(error.to_string()))?;
    refuse_descriptors(&arguments)?;
    let translated = translate::translate(&arguments, process, live)?;
    for argument in &translated.arguments {
        rules::check(argument).map_err(AdoptRefusal)?;
    }
    compare::compare(&translated.arguments, process, live)?;
    let spec = Spec {
        name: permitted_name(live.name.as_deref(), process.pid),
        machine: live.machine_type.clone(),
        cpu: translated.cpu,
        accel: if live.kvm { Accel::Kvm } else { Accel::Tcg },
        vcpus: live.vcpus,
        memory: ByteSize::from_bytes(live.memory_bytes),
        net: translated.net,
        disk: Vec::new(),
        serial: translated.console,
        boot: None,
        rng: false,
        balloon: false,
        firmware: None,
        extra: Vec::new(),
        adopted: Some(Adopted { arguments: translated.arguments, left_behind: translated.left_behind }),
    };
    spec.validate()?;
    Ok(spec)
}

/// libvirt's own marks: its monitor, its secret, its directories. `-name guest=` alone is also written by people.
fn refuse_libvirt(words: &[String]) -> Result<(), AdoptRefusal> {
    const MARKS: [&str; 4] = ["charmonitor", "masterKey0", "/var/lib/libvirt/qemu/", "/run/libvirt/qemu/"];
    let mark = words.iter().find_map(|word| MARKS.into_iter().find(|mark| word.contains(mark)));
    mark.map_or(Ok(()), |mark| {
        refuse(format!("libvirt holds this machine ({mark} is on its command line); migrate it with virsh"))
    })
}

/// File descriptors that somebody passed to QEMU can't be had again.
fn refuse_descriptors(arguments: &[Argument]) -> Result<(), AdoptRefusal> {
    const KEYS: [&str; 4] = ["fd=", "fds=", "vhostfd=", "vhostfds="];
    const PLACES: [&str; 4] = ["/dev/fdset/", "/dev/fd/", "/proc/self/fd/", "\"fd\""];
    for argument in arguments {
        let value = argument.value.as_deref().unwrap_or_default();
        let keyed = value.split([',', '.']).any(|part| KEYS.iter().any(|key| part.starts_with(key)));
        let placed = PLACES.iter().any(|place| value.contains(place)) || value.starts_with("fd:");
        if argument.option == "add-fd" || ((keyed || placed) && argument.option != "append") {
            return refuse(format!(
                "{argument}: a file descriptor was passed to this QEMU; it can't be opened again"
            ));
        }
    }
    Ok(())
}

fn permitted_name(name: Option<&str>, pid: i32) -> String {
    let permitted = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.unwrap_or_default().chars().map(permitted).take(63).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { format!("qemu-{pid}") } else { name.to_owned() }
}

/// A path as QEMU's process understands it; as it is, if its directory isn't known.
fn absolute(process: &Process, path: &Path) -> PathBuf {
    let directory = process.working_directory.as_deref().unwrap_or(Path::new(""));
    directory.join(path).components().collect()
}

#[cfg(test)]
mod tests;
