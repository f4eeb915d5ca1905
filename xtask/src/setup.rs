//! Brings what is missing on a machine that has only Rust and apt.
//!
//! QEMU 10 comes from the release itself or its backports, the guest's kernel is downloaded and unpacked but not
//! installed, and so are the programs that benches run in guests. Lists of packages are kept apart from the machine's own, whose configuration stays as it is.

use std::{
    fs::File,
    io::Read,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    guest_image::{self, Program},
    older_qemu,
};

mod apt;
mod programs;
mod sources;

use apt::Apt;

/// QEMU before this has no `switchover-ack`, or not with all that it needs.
const LEAST_QEMU_VERSION: u32 = 10;
const QEMU: &str = "qemu-system-x86_64";
/// The package whose dependency is the newest kernel for guests.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// Something the demo, the tests or the benches need, and the package it is in.
struct Need {
    package: &'static str,
    present: fn() -> bool,
}

/// What asks disks for something.
const DISK_CLIENTS: [Need; 1] = [Need { package: "fio", present: || on_path("fio") }];

/// What makes file systems and looks at them.
const DISK_TOOLS: [Need; 1] =
    [Need { package: "e2fsprogs", present: || ["mke2fs", "e2fsck", "debugfs"].into_iter().all(on_path) }];

const NEEDS: [Need; 8] = [
    Need { package: "qemu-system-x86", present: has_qemu },
    Need {
        package: "qemu-utils",
        present: || ["qemu-img", "qemu-io", "qemu-storage-daemon"].into_iter().all(on_path),
    },
    Need { package: "busybox-static", present: has_static_busybox },
    Need { package: "iproute2", present: || on_path("ip") },
    Need { package: "gcc", present: || on_path("cc") },
    Need { package: "libc6-dev", present: || Path::new("/usr/lib/x86_64-linux-gnu/libc.a").exists() },
    Need { package: "xz-utils", present: || on_path("xz") },
    Need {
        package: "libfaketime",
        present: || Path::new("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1").exists(),
    },
];

/// Installs or fetches what is missing; returns at once when nothing is.
///
/// # Errors
/// Names the missing packages when not run as root; else whatever apt says.
pub(crate) fn run() -> Result<()> {
    install(&NEEDS)?;
    if guest_image::kernel().is_err() {
        fetch_kernel(&Apt::new()?)?;
    }
    Ok(())
}

/// Installs what benches of disks need besides; returns at once when it is there.
///
/// # Errors
/// As for [`run`].
pub(crate) fn install_disk_clients() -> Result<()> {
    install(&DISK_CLIENTS)
}

/// Installs what makes file systems on disks and looks at them; returns at once when it is there.
///
/// # Errors
/// As for [`run`].
pub(crate) fn install_disk_tools() -> Result<()> {
    install(&DISK_TOOLS)
}

fn install(needs: &[Need]) -> Result<()> {
    let missing: Vec<&str> = needs.iter().filter(|need| !(need.present)()).map(|need| need.package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("install {} (QEMU {LEAST_QEMU_VERSION} or newer), or run this as root", missing.join(" "));
    }
    eprintln!("installing {}", missing.join(" "));
    Apt::new()?.install(&missing)?;
    match needs.iter().find(|need| !(need.present)()) {
        Some(need) => bail!("package {} is installed but is not what is needed", need.package),
        None => Ok(()),
    }
}

fn fetch_kernel(apt: &Apt) -> Result<()> {
    let package = apt.dependency_of(KERNEL_PACKAGE)?;
    eprintln!("fetching the guests' kernel, {package}");
    apt.unpack(&[&package], &guest_image::kernel_directory())
}

/// Fetches the programs that guests run as their load, with their libraries; returns at once when they are there.
///
/// # Errors
/// Whatever apt says.
pub(crate) fn fetch_programs() -> Result<()> {
    if Program::all().all(Program::is_unpacked) {
        return Ok(());
    }
    let directory = guest_image::packages_directory();
    if directory.exists() {
        std::fs::remove_dir_all(&directory).context("cannot remove an older set of programs")?;
    }
    let apt = Apt::new()?;
    let programs: Vec<&str> = Program::all().flat_map(|program| program.packages).copied().collect();
    let packages = apt.with_libraries(&programs)?;
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    eprintln!("fetching programs for guests: {}", packages.join(" "));
    apt.unpack(&packages, &directory)
}

/// Fetches QEMU 7.2, which some long tests move machines of; returns at once when it is there. Its libraries are those
/// of the QEMU that is installed, which comes from the same distribution.
///
/// # Errors
/// Whatever apt says; that the distribution hasn't got it is none.
pub(crate) fn fetch_older_qemu() -> Result<()> {
    if older_qemu::emulator().is_some() {
        return Ok(());
    }
    let apt = Apt::new()?;
    let mut packages = vec!["seabios".to_owned(), "ipxe-qemu".to_owned()];
    for package in ["qemu-system-x86", "qemu-system-common", "qemu-system-data"] {
        let Some(version) = apt.version_of(package, &format!("1:{}+", older_qemu::VERSION))? else {
            eprintln!(
                "this distribution has no QEMU {}; tests that want it are passed over",
                older_qemu::VERSION
            );
            return Ok(());
        };
        packages.push(format!("{package}={version}"));
    }
    eprintln!("fetching {}", packages.join(" "));
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    apt.unpack(&packages, &older_qemu::directory())
}

fn has_qemu() -> bool {
    let version = Command::new(QEMU).arg("--version").stderr(Stdio::null()).output();
    version.is_ok_and(|output| major_version(&String::from_utf8_lossy(&output.stdout)) >= LEAST_QEMU_VERSION)
}

/// Reads `QEMU emulator version 10.0.2 (Debian ...)`; 0: it isn't that.
fn major_version(banner: &str) -> u32 {
    let version = banner.split_whitespace().skip_while(|word| *word != "version").nth(1);
    version.and_then(|version| version.split('.').next()?.parse().ok()).unwrap_or(0)
}

/// The guests have no libraries, so a busybox that needs some doesn't do. A program that needs them names its loader
/// right after its program headers.
fn has_static_busybox() -> bool {
    let mut head = Vec::new();
    let read = File::open("/bin/busybox").and_then(|file| file.take(4096).read_to_end(&mut head));
    read.is_ok() && !head.windows(8).any(|window| window == b"ld-linux")
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|at| at.join(program).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_its_banner() {
        assert_eq!(major_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), 10);
        assert_eq!(major_version("QEMU emulator version 7.2.19 (Debian)"), 7);
        assert_eq!(major_version(""), 0);
    }
}
