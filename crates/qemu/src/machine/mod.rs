//! A machine's specification: what a user writes in TOML, what an agent keeps, and what travels with a machine.
//!
//! A machine is either *described* (by the fields of [`Spec`]) or *adopted*: somebody else started it, and
//! [`Spec::adopted`] holds the arguments of its QEMU. `crate::commandline` turns both into a command line; a spec that
//! came from a peer goes through [`crate::commandline::localise`] first.
//!
//! ```
//! use godwit_qemu::machine::Spec;
//! let spec = Spec::from_toml(
//!     r#"
//!     name = "web1"
//!     memory = "512M"
//!     [[net]]
//!     bridge = "br0"
//!     [[disk]]
//!     path = "/srv/vm/web1.qcow2"
//!     format = "qcow2"
//!     "#,
//!     "web1.toml",
//! )
//! .unwrap();
//! assert_eq!(spec.vcpus, 1);
//! ```

mod mac;
mod size;
mod toml_file;
mod validate;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use self::validate::{check_interface, check_path, shown};
pub use self::{
    mac::{MacAddress, MacAddressError},
    size::{ByteSize, ByteSizeError},
    toml_file::SpecFileError,
    validate::SpecError,
};
use crate::commandline::Argument;

/// QEMU's `q35`: PCI Express, AHCI; what new guests expect.
const DEFAULT_MACHINE: &str = "q35";

/// The x86-64-v2 level with AES: every x86 server since 2011 has these features and TCG emulates them, so any two
/// hosts can exchange the machine, under KVM as long as their processors are by the same maker. `host` and `max` are
/// faster for some programs, but then the target must have all that the source has: [`crate::processor`] compares.
const DEFAULT_CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes";

/// A machine. Every field but `name` and `memory` has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Unique among the hosts that exchange machines: 1 to 63 of `a-z`, `0-9` and `-`, the first not `-`.
    pub name: String,
    /// QEMU's machine type. An alias such as `q35` means another type in another version of QEMU, so whoever started a
    /// machine asks it ([`crate::qmp::Client::machine_type`]) and writes the versioned type here.
    #[serde(default = "default_machine")]
    pub machine: String,
    /// QEMU's CPU model with its features. It decides which hosts the machine can go to.
    #[serde(default = "default_cpu")]
    pub cpu: String,
    /// What executes the guest.
    #[serde(default)]
    pub accel: Accel,
    /// Virtual CPUs.
    #[serde(default = "default_vcpus")]
    pub vcpus: u32,
    /// The guest's memory.
    pub memory: ByteSize,
    /// Network cards, in the order of their PCI addresses. Of an adopted machine: its `-netdev tap` and `bridge`
    /// options, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<Net>,
    /// Disks, in the order of their PCI addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<Disk>,
    /// A serial port whose other end is a socket in the machine's directory.
    #[serde(default = "enabled")]
    pub serial: bool,
    /// Boots a kernel directly instead of firmware and a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<DirectBoot>,
    /// A source of random numbers for the guest.
    #[serde(default)]
    pub rng: bool,
    /// A memory balloon.
    #[serde(default)]
    pub balloon: bool,
    /// A firmware image instead of QEMU's SeaBIOS; absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Further arguments for QEMU, one string each, as on its command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra: Vec<String>,
    /// Present if somebody else started the machine; then these arguments define it, and `machine`, `cpu`, `accel`,
    /// `vcpus` and `memory` only say what was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<Adopted>,
}

/// What executes a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where the agent found that it can run a guest, else TCG.
    #[default]
    Auto,
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// A network card. Exactly one of `bridge` and `tap` is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The bridge that a TAP device made by the agent joins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// A TAP device that exists already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The card's address; derived from the machine's name and the card's number where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The card that the guest sees.
    #[serde(default)]
    pub model: NetModel,
    /// Pairs of queues; more than one needs a TAP device with `multi_queue`.
    #[serde(default = "one_queue")]
    pub queues: u16,
}

/// Models of network cards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetModel {
    /// Paravirtual.
    #[default]
    VirtioNetPci,
    /// Intel 82540EM, for guests without virtio drivers.
    E1000,
}

/// A disk: a file or device that QEMU opens itself (`path`), or one that godwit serves (`image`, `size`, `adopt`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Absolute path of the image or device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What a disk that is served begins as: the name of an image in the repository; nothing if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// A raw or qcow2 file that lies beneath a disk that is served; absolute path. It is read and never written; what the
    /// machine writes is kept apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt: Option<PathBuf>,
    /// How large a disk is that is served; as its image or file if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// How the image is to be read; never guessed, because a guest can write a header into a raw image.
    #[serde(default)]
    pub format: DiskFormat,
    /// What the guest sees.
    #[serde(default)]
    pub interface: DiskInterface,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// The serial number that the guest sees: up to 20 of `A-Z`, `a-z`, `0-9`, `_`, `.` and `-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// What the host's page cache does.
    #[serde(default)]
    pub cache: DiskCache,
}

/// Formats of disk images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, with backing files.
    Qcow2,
}

/// Where a disk is plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskInterface {
    /// Paravirtual.
    #[default]
    VirtioBlk,
}

/// What the host's page cache does for a disk; QEMU's `cache=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// The page cache is passed by, so that two hosts with shared storage never see different bytes.
    #[default]
    None,
    /// The host caches; a flush of the guest reaches the disk.
    Writeback,
    /// The host caches reads; every write reaches the disk.
    Writethrough,
}

/// A kernel that QEMU loads itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectBoot {
    /// Absolute path of the kernel.
    pub kernel: PathBuf,
    /// Absolute path of the initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
}

/// The command line of a machine that somebody else started, without what belongs to its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adopted {
    /// What defines the machine, in QEMU's order.
    pub arguments: Vec<Argument>,
    /// What doesn't move with it, for people to read: displays, logs, debuggers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_behind: Vec<String>,
}

impl Spec {
    /// The address of the card number `index`, given or derived. Meaningful for described machines.
    pub fn mac(&self, index: usize) -> MacAddress {
        let given = self.net.get(index).and_then(|net| net.mac);
        given.unwrap_or_else(|| MacAddress::derived(&self.name, index))
    }
}

fn default_machine() -> String {
    DEFAULT_MACHINE.to_owned()
}

fn default_cpu() -> String {
    DEFAULT_CPU.to_owned()
}

const fn default_vcpus() -> u32 {
    1
}

const fn one_queue() -> u16 {
    1
}

const fn enabled() -> bool {
    true
}

#[cfg(test)]
mod tests;
