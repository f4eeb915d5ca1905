//! The durable record of who may run a machine: one small file beside the machine's spec.
//!
//! A record is replaced by writing a new file and renaming it, so that a crash leaves the old one or the new one, never
//! a torn one. What survives what: [`Durability::Written`] survives the death of this process (the kernel has it);
//! [`Durability::Synced`] survives the death of the host. The kernel's boot id stands beside the record, so that "has
//! this host booted since?" has an answer that no clock can make wrong.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use godwit_migration::handover::Record;
use serde::{Deserialize, Serialize};

/// The file's name in a machine's directory.
pub(crate) const TOKEN_FILE: &str = "token.json";
/// No record is larger; a larger file isn't one.
const RECORD_BYTES_MAX: u64 = 4096;
/// A new random id at every boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What a saved record must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The death of the process.
    Written,
    /// The death of the host.
    Synced,
}

/// Why a record can't be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    /// The file system refused.
    #[error("can't access {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// There is a file, but it isn't a record. The machine must not be started from it.
    #[error("{path} isn't a token record; restore it, or remove it if this machine surely runs nowhere else")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
}

/// A record as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// The record.
    pub(crate) record: Record,
    /// The host has booted since it was written; in doubt it has.
    pub(crate) rebooted: bool,
}

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    #[serde(flatten)]
    record: Record,
    #[serde(default)]
    boot_id: Option<String>,
}

/// The record's place on this host.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    directory: PathBuf,
}

impl Store {
    /// The store of the machine whose directory this is.
    pub(crate) fn open(machine_dir: impl Into<PathBuf>) -> Self {
        Self { directory: machine_dir.into() }
    }

    /// The record, or `None` if the machine never took part in a hand-over here.
    pub(crate) fn load(&self) -> Result<Option<Record>, TokenError> {
        Ok(self.find()?.map(|found| found.record))
    }

    /// [`Store::load`], and whether the host has booted since the record was written.
    pub(crate) fn find(&self) -> Result<Option<Found>, TokenError> {
        let path = self.path();
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(meta) if meta.len() > RECORD_BYTES_MAX => {
                let source = serde::de::Error::custom(format!("{} bytes is too long", meta.len()));
                return Err(TokenError::Damaged { path, source });
            }
            _ => {}
        }
        let bytes = fs::read(&path).map_err(|source| TokenError::Io { path: path.clone(), source })?;
        let saved: Saved =
            serde_json::from_slice(&bytes).map_err(|source| TokenError::Damaged { path, source })?;
        let rebooted = saved.boot_id.is_none() || saved.boot_id != boot_id();
        Ok(Some(Found { record: saved.record, rebooted }))
    }

    /// Replaces the record; when this returns, the new one survives what `durability` says.
    pub(crate) fn save(&self, record: &Record, durability: Durability) -> Result<(), TokenError> {
        let path = self.path();
        let scratch = path.with_extension("new");
        let saved = Saved { record: record.clone(), boot_id: boot_id() };
        let bytes = serde_json::to_vec(&saved).expect("records are plain data");
        write_new(&scratch, &bytes, durability)
            .and_then(|()| fs::rename(&scratch, &path))
            .and_then(|()| sync_directory(&self.directory, durability))
            .map_err(|source| TokenError::Io { path, source })
    }

    /// Makes a record that was only [`Durability::Written`] survive the host.
    pub(crate) fn sync(&self) -> Result<(), TokenError> {
        let path = self.path();
        File::open(&path)
            .and_then(|file| file.sync_all())
            .and_then(|()| sync_directory(&self.directory, Durability::Synced))
            .map_err(|source| TokenError::Io { path, source })
    }

    fn path(&self) -> PathBuf {
        self.directory.join(TOKEN_FILE)
    }
}

fn boot_id() -> Option<String> {
    fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned())
}

fn write_new(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    match durability {
        Durability::Written => Ok(()),
        Durability::Synced => file.sync_all(),
    }
}

fn sync_directory(directory: &Path, durability: Durability) -> io::Result<()> {
    match durability {
        Durability::Written => Ok(()),
        Durability::Synced => File::open(directory)?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_this_boot_is_known_from_one_of_another() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(scratch.path());
        assert_eq!(store.find().unwrap(), None);
        store.save(&Record::created(), Durability::Written).unwrap();
        assert_eq!(store.find().unwrap(), Some(Found { record: Record::created(), rebooted: false }));

        let text = fs::read_to_string(store.path()).unwrap();
        let other_boot = text.replace(&boot_id().unwrap(), "00000000-0000-4000-8000-000000000000");
        fs::write(store.path(), other_boot).unwrap();
        assert!(store.find().unwrap().unwrap().rebooted);
    }

    #[test]
    fn a_record_without_a_boot_is_in_doubt() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(scratch.path());
        fs::write(store.path(), serde_json::to_vec(&Record::created()).unwrap()).unwrap();
        assert_eq!(store.find().unwrap(), Some(Found { record: Record::created(), rebooted: true }));
    }
}
