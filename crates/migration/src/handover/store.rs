//! How a record is kept, so that a crash leaves the newest one that has to survive it.
//!
//! ```text
//!   token.json           the newest record that survives the host; only ever replaced by a file that was synced
//!   token-written.json   the newest record, if it is newer; a crash of the host may tear it, a crash of a process can't
//!
//!   save, Written        write a scratch file ─► rename it to token-written.json
//!   save, Synced         write a scratch file ─► sync it ─► rename it to token.json ─► remove token-written.json
//!                                                                                    ─► sync the directory
//!   sync                 the same with the content of token-written.json, which stays
//!   find                 token-written.json, or token.json if there is none or the host's crash has torn it
//! ```
//!
//! One file wouldn't do: renaming a file that wasn't synced over the last one that was can leave a torn file in its
//! place, and then neither is left. A file's sync doesn't keep its name, so the directory is synced too; and before
//! the first record, the directory's own name, by its parent.
//!
//! Saves come one after the other; [`RecordStore::sync`] may run beside them, in another thread. Whatever fails before
//! a rename leaves the record as it was. Who goes on from a record after a crash calls `sync` first, since a record may
//! be seen before it is sure to survive.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Record;

/// The newest record that survives the host.
pub const SYNCED_FILE: &str = "token.json";
/// The newest record, if it is newer than [`SYNCED_FILE`].
pub const WRITTEN_FILE: &str = "token-written.json";
const SYNCED_SCRATCH: &str = "token.json.new";
const WRITTEN_SCRATCH: &str = "token-written.json.new";
/// No record is larger; a larger file isn't one.
pub const RECORD_BYTES_MAX: usize = 4096;

/// A machine's directory, as far as a record needs one.
pub trait Storage {
    /// A file's content, at most `limit` bytes of it; `None` if there is no such file.
    ///
    /// # Errors
    /// What the file system says; so for all operations.
    fn read(&self, name: &str, limit: usize) -> io::Result<Option<Vec<u8>>>;
    /// Creates a file or replaces its content, not atomically. It survives the process when this returns.
    ///
    /// # Errors
    /// As above; then the file holds anything.
    fn write(&self, name: &str, content: &[u8]) -> io::Result<()>;
    /// Makes a file's content, not its name, survive the host.
    ///
    /// # Errors
    /// As above.
    fn sync_file(&self, name: &str) -> io::Result<()>;
    /// Gives a file another name, atomically; whatever had that name is gone.
    ///
    /// # Errors
    /// As above; then nothing has changed.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// As above.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the names in the directory survive the host.
    ///
    /// # Errors
    /// As above.
    fn sync_directory(&self) -> io::Result<()>;
    /// Makes the directory's own name survive the host.
    ///
    /// # Errors
    /// As above.
    fn sync_parent(&self) -> io::Result<()>;
}

/// One run of a host's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(pub String);

/// What a saved record must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The death of the process.
    Written,
    /// The death of the host.
    Synced,
}

/// A record as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The record.
    pub record: Record,
    /// The host has booted since it was written; in doubt it has.
    pub rebooted: bool,
}

/// Why a record can't be read or replaced.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The file system refused; before a rename nothing has changed.
    #[error("can't {operation} {file}")]
    Storage {
        /// A verb.
        operation: &'static str,
        /// The file's name in the machine's directory.
        file: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// There is a file, but it isn't a record, and no crash of the host explains it.
    #[error("{file} isn't a record")]
    Damaged {
        /// The file's name in the machine's directory.
        file: &'static str,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
}

/// What a file holds.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    #[serde(flatten)]
    record: Record,
    #[serde(default)]
    boot_id: Option<BootId>,
}

/// The record of one machine at one host. Clones are the same store.
#[derive(Debug, Clone)]
pub struct RecordStore<S> {
    storage: S,
    boot_id: Option<BootId>,
    /// Held while [`SYNCED_FILE`] is replaced.
    syncing: Arc<Mutex<()>>,
}

impl<S: Storage> RecordStore<S> {
    /// The record in this directory. Without a boot id every record is taken for one of another boot.
    pub fn new(storage: S, boot_id: Option<BootId>) -> Self {
        Self { storage, boot_id, syncing: Arc::default() }
    }

    /// The record, or `None` if there never was one.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if there is something else.
    pub fn find(&self) -> Result<Option<Found>, StoreError> {
        let written = self.read(WRITTEN_FILE)?;
        if let Some(Ok(saved)) = written {
            return Ok(Some(self.judge(saved)));
        }
        let synced = self.read(SYNCED_FILE)?.transpose().map_err(damaged(SYNCED_FILE))?;
        let synced = synced.map(|saved| self.judge(saved));
        match written {
            Some(Err(source)) if synced.as_ref().is_none_or(|found| !found.rebooted) => {
                Err(damaged(WRITTEN_FILE)(source))
            }
            _ => Ok(synced),
        }
    }

    /// Replaces the record; when this returns, the new one survives what `durability` says.
    ///
    /// # Errors
    /// [`StoreError::Storage`]. The old record stays, unless it was the directory's sync that failed.
    pub fn save(&self, record: &Record, durability: Durability) -> Result<(), StoreError> {
        let saved = Saved { record: record.clone(), boot_id: self.boot_id.clone() };
        let content = serde_json::to_vec(&saved).expect("records are plain data");
        match durability {
            Durability::Written => {
                self.write(WRITTEN_SCRATCH, &content)?;
                self.rename(WRITTEN_SCRATCH, WRITTEN_FILE)
            }
            Durability::Synced => {
                let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
                self.replace_synced(&content)?;
                self.storage.remove(WRITTEN_FILE).map_err(failed("remove", WRITTEN_FILE))?;
                self.sync_directory()
            }
        }
    }

    /// Makes the newest record survive the host.
    ///
    /// # Errors
    /// [`StoreError::Storage`]; then a crash of the host may bring an older record back.
    pub fn sync(&self) -> Result<(), StoreError> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ok(saved)) = self.read(WRITTEN_FILE)? {
            let content = serde_json::to_vec(&saved).expect("records are plain data");
            self.replace_synced(&content)?;
        }
        self.sync_directory()
    }

    /// All but the directory's sync.
    fn replace_synced(&self, content: &[u8]) -> Result<(), StoreError> {
        self.write(SYNCED_SCRATCH, content)?;
        self.storage.sync_file(SYNCED_SCRATCH).map_err(failed("sync", SYNCED_SCRATCH))?;
        if let Some(Err(_)) = self.read(WRITTEN_FILE)? {
            // Torn by a crash of the host, or `find` says so; beside a record of this boot it would look like damage.
            self.find()?;
            self.storage.remove(WRITTEN_FILE).map_err(failed("remove", WRITTEN_FILE))?;
        }
        if self.read(SYNCED_FILE)?.is_none() {
            self.storage.sync_parent().map_err(failed("sync the directory of", SYNCED_FILE))?;
        }
        self.rename(SYNCED_SCRATCH, SYNCED_FILE)
    }

    fn write(&self, file: &'static str, content: &[u8]) -> Result<(), StoreError> {
        // A crash in the middle of a rename may have left the file under both its names.
        self.storage.remove(file).map_err(failed("remove", file))?;
        self.storage.write(file, content).map_err(|source| {
            // Half a file is worth nothing, and its space may be needed.
            let _ = self.storage.remove(file);
            StoreError::Storage { operation: "write", file, source }
        })
    }

    fn rename(&self, from: &'static str, to: &'static str) -> Result<(), StoreError> {
        self.storage.rename(from, to).map_err(failed("replace", to))
    }

    fn sync_directory(&self) -> Result<(), StoreError> {
        self.storage.sync_directory().map_err(failed("sync the directory of", SYNCED_FILE))
    }

    fn read(&self, file: &'static str) -> Result<Option<Result<Saved, serde_json::Error>>, StoreError> {
        let content = self.storage.read(file, RECORD_BYTES_MAX + 1).map_err(failed("read", file))?;
        Ok(content.map(|content| match content.len() {
            0..=RECORD_BYTES_MAX => serde_json::from_slice(&content),
            _ => Err(serde::de::Error::custom(format!("more than {RECORD_BYTES_MAX} bytes"))),
        }))
    }

    fn judge(&self, saved: Saved) -> Found {
        let rebooted = saved.boot_id.is_none() || saved.boot_id != self.boot_id;
        Found { record: saved.record, rebooted }
    }
}

fn failed(operation: &'static str, file: &'static str) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Storage { operation, file, source }
}

fn damaged(file: &'static str) -> impl FnOnce(serde_json::Error) -> StoreError {
    move |source| StoreError::Damaged { file, source }
}
