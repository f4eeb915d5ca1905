//! A root file system as people bring them: ext4 in a qcow2, made with the distribution's own tools.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use godwit_sim::guest_image;

const BUSYBOX: &str = "/bin/busybox";
const SIZE: &str = "512M";
/// What the guest reads of the distribution's files before it begins to write.
const CHECKED: &str = "lib/modules";
const CHECKED_FILES_MAX: usize = 5;

/// Makes the image in `directory`: busybox, the kernel's package as it comes, and the guest's work.
pub(super) fn make(directory: &Path) -> Result<PathBuf> {
    let root = directory.join("root");
    for name in ["bin", "dev", "proc", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    run(Command::new("cp").arg("-a").arg(guest_image::kernel_directory().join(".")).arg(&root))?;
    fs::copy(BUSYBOX, root.join("bin/busybox")).context("cannot copy busybox")?;
    for applet in run(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let work = root.join("work.sh");
    fs::write(&work, include_str!("work.sh"))?;
    fs::set_permissions(&work, fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("checked.md5"), digests(&root)?)?;
    let (raw, image) = (directory.join("root.raw"), directory.join("root.qcow2"));
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&root, &raw]).arg(SIZE))?;
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &image]))?;
    fs::remove_dir_all(&root)?;
    fs::remove_file(&raw)?;
    Ok(image)
}

/// Some of the distribution's files with their digests, as `md5sum -c` takes them.
fn digests(root: &Path) -> Result<String> {
    let list = run(Command::new("find").arg(CHECKED).args(["-name", "*.ko*"]).current_dir(root))?;
    let mut files: Vec<&str> = list.lines().collect();
    files.sort_unstable();
    let step = (files.len() / CHECKED_FILES_MAX).max(1);
    run(Command::new("md5sum").args(files.into_iter().step_by(step)).current_dir(root))
}

/// Runs a program of the host's and returns what it prints.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
