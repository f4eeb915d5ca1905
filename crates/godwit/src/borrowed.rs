//! QEMU's migration settings while a migration has changed them: what they were lies beside the machine's spec, so that
//! whoever comes after a worker that died can put them back. Who puts them back also gives a slowed guest its speed back
//! (`throttle`), whose note never lies there alone.

use std::{fs, io, path::Path};

use godwit_qemu::qmp::{Client, MigrationSettings, QmpError};

use crate::{output::one_line, throttle, token::Durability, whole_file};

/// The file's name in a machine's directory.
pub(crate) const BORROWED_FILE: &str = "qemu-settings.json";
/// QEMU has some sixty settings; a longer file isn't ours.
const FILE_BYTES_MAX: u64 = 1 << 16;

/// Writes down what QEMU has set, before anything is changed. A note that is there already is older and stays: what
/// QEMU has now is what an earlier migration left.
pub(crate) fn note(machine_dir: &Path, settings: &MigrationSettings) -> io::Result<()> {
    if noted(machine_dir).is_some() {
        return Ok(());
    }
    whole_file::replace(&machine_dir.join(BORROWED_FILE), &serde_json::to_vec(settings)?, Durability::Written)
}

/// What was written down, if anything was.
pub(crate) fn noted(machine_dir: &Path) -> Option<MigrationSettings> {
    let path = machine_dir.join(BORROWED_FILE);
    let length = fs::metadata(&path).ok()?.len();
    (length <= FILE_BYTES_MAX).then(|| serde_json::from_slice(&fs::read(path).ok()?).ok()).flatten()
}

/// Puts everything back that was written down, and forgets it. A QEMU that is gone needs nothing.
///
/// # Errors
/// What QEMU says; it refuses while a migration is under way. The note then stays.
pub(crate) async fn give_back(machine_dir: &Path, monitor: &Client) -> Result<(), QmpError> {
    if let Some(settings) = noted(machine_dir)
        && !monitor.is_closed()
    {
        monitor.restore_migration_settings(&settings).await?;
    }
    forget(machine_dir);
    Ok(())
}

/// Forgets the note; for a QEMU that has ended. What slowed it goes with it.
pub(crate) fn forget(machine_dir: &Path) {
    if let Err(error) = throttle::lift(machine_dir) {
        tracing::warn!(error = one_line(&error), "a machine may still be slowed");
    }
    let _ = fs::remove_file(machine_dir.join(BORROWED_FILE));
}
