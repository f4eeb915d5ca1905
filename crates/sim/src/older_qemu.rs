//! QEMU 7.2 as Debian 12 has it, unpacked beside the one that is installed.
//!
//! `cargo xtask test --long` fetches it, where the machine's sources of packages have it; tests that want it are passed
//! over elsewhere. QEMU finds its firmware by where its program lies.

use std::path::PathBuf;

use crate::guest_image::workspace;

/// The version, up to where distributions patch it.
pub const VERSION: &str = "7.2";

/// Where its packages are to be unpacked.
pub fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| workspace().join("target")).join(format!("qemu-{VERSION}"))
}

/// The program, if it is there.
pub fn emulator() -> Option<PathBuf> {
    let emulator = directory().join("usr/bin/qemu-system-x86_64");
    emulator.exists().then_some(emulator)
}
