//! Whether KVM works here: found out by booting something, not by a file's existence.
//!
//! There are hosts (nested ones above all) where `/dev/kvm` opens and QEMU starts, but a guest hangs or crawls. The
//! probe boots a sector of nine bytes of code that writes to `isa-debug-exit`; working KVM does this in a fifth of a
//! second. The answer is kept in the state directory for this kernel and this QEMU.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use godwit_qemu::machine::Accel;
use serde::{Deserialize, Serialize};

use super::state;

/// How long a working KVM may take to boot the probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long QEMU may take to say its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// `mov dx, 0xf4; mov al, 0x10; out dx, al; hlt; jmp $-1`
const PROBE_CODE: [u8; 9] = [0xba, 0xf4, 0x00, 0xb0, 0x10, 0xee, 0xf4, 0xeb, 0xfd];
/// `isa-debug-exit` ends QEMU with the value written × 2 + 1.
const PROBE_EXIT: i32 = 0x21;

/// What the probe found, and for which kernel and QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    kernel: String,
    emulator: PathBuf,
    version: String,
    kvm: bool,
}

/// The accelerator that `auto` means on this host: KVM if the probe boots, else TCG.
pub(crate) async fn detect(emulator: &Path, state_dir: &Path) -> Accel {
    let kept = state_dir.join("accelerator.json");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let version = emulator_version(emulator).await.unwrap_or_default();
    let known: Option<Finding> = state::read_json(&kept).ok();
    let finding = match known {
        Some(known) if known.kernel == kernel && known.version == version && known.emulator == emulator => {
            known
        }
        _ => {
            let kvm = boots_under_kvm(emulator, state_dir).await;
            tracing::info!(kvm, %kernel, %version, "probed KVM");
            let finding = Finding { kernel, emulator: emulator.to_owned(), version, kvm };
            if let Err(error) = state::write_json(&kept, &finding) {
                tracing::warn!(%error, "can't keep the result of the probe");
            }
            finding
        }
    };
    if finding.kvm { Accel::Kvm } else { Accel::Tcg }
}

/// The first line that QEMU prints for `-version`.
///
/// # Errors
/// If it can't be started or says nothing in time.
pub(crate) async fn emulator_version(emulator: &Path) -> io::Result<String> {
    let output = tokio::process::Command::new(emulator)
        .arg("-version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(VERSION_TIMEOUT, output).await??;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .next()
        .map(|line| line.trim().to_owned())
        .ok_or_else(|| io::Error::other("it printed no version"))
}

async fn boots_under_kvm(emulator: &Path, state_dir: &Path) -> bool {
    if !Path::new("/dev/kvm").exists() {
        return false;
    }
    let image = state_dir.join("probe.img");
    let mut sector = [0_u8; 512];
    sector[..PROBE_CODE.len()].copy_from_slice(&PROBE_CODE);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    if fs::write(&image, sector).is_err() {
        return false;
    }
    let mut command = Command::new(emulator);
    command
        .args(["-accel", "kvm", "-cpu", "host", "-m", "16", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive"])
        .arg(format!("file={},format=raw,snapshot=on", image.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut command = tokio::process::Command::from(command);
    let status = command.kill_on_drop(true).status();
    let booted = tokio::time::timeout(PROBE_TIMEOUT, status).await;
    let _ = fs::remove_file(&image);
    matches!(booted, Ok(Ok(status)) if status.code() == Some(PROBE_EXIT))
}
