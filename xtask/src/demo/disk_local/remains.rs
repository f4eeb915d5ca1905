//! What is on the disk in the end, as tools see it that know nothing of godwit.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use super::root_image::run;

/// e2fsck's exit status when it had something to put in order: here, the journal of a machine whose power was cut.
const CORRECTED: i32 = 1;

/// Plays the journal back, as the next mount would, and checks the file system.
pub(super) fn check(file: &Path) -> Result<String> {
    let mended = Command::new("e2fsck").arg("-p").arg(file).output().context("cannot run e2fsck")?;
    if mended.status.code().is_none_or(|code| code > CORRECTED) {
        bail!("{}", String::from_utf8_lossy(&mended.stdout).trim());
    }
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(file))?;
    Ok("e2fsck finds nothing wrong".to_owned())
}

/// How many of the guest's files are what their names say.
pub(super) fn count(file: &Path, directory: &Path) -> Result<u64> {
    fs::create_dir_all(directory)?;
    let dump = format!("rdump /files {}", directory.display());
    run(Command::new("debugfs").arg("-R").arg(dump).arg(file))?;
    let listed = run(Command::new("find").arg(directory).args(["-type", "f", "-exec", "md5sum", "{}", "+"]))?;
    let mut right = 0;
    for line in listed.lines() {
        let (digest, path) = line.split_once("  ").context("md5sum says something else")?;
        let name = Path::new(path).file_name().unwrap_or_default();
        // The one that was being written.
        if name == "new" {
            continue;
        }
        if name != digest {
            bail!("{} has the digest {digest}", name.display());
        }
        right += 1;
    }
    Ok(right)
}
