//! The durable record of who may run a machine, in the machine's directory. How it survives what is
//! [`godwit_migration::handover::store`]'s; this is the directory.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use godwit_migration::handover::{
    Record,
    store::{BootId, RecordStore, Storage, StoreError, WRITTEN_FILE},
};

/// The file's name in a machine's directory.
pub(crate) use godwit_migration::handover::store::SYNCED_FILE as TOKEN_FILE;
pub(crate) use godwit_migration::handover::store::{Durability, Found};

/// A new random id at every boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why a record can't be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    /// The file system refused.
    #[error("can't access the token record in {directory}")]
    Access {
        /// The machine's directory.
        directory: PathBuf,
        /// What was tried.
        source: StoreError,
    },
    /// There is a file, but it isn't a record. The machine must not be started from it.
    #[error(
        "{directory} holds a damaged token record; restore it, or remove it if this machine surely runs nowhere else"
    )]
    Damaged {
        /// The machine's directory.
        directory: PathBuf,
        /// Which file, and where it stops making sense.
        source: StoreError,
    },
}

/// Whether a file of a machine's directory belongs to its record.
pub(crate) fn is_record_file(name: &std::ffi::OsStr) -> bool {
    name == TOKEN_FILE || name == WRITTEN_FILE
}

/// The record's place on this host.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    directory: PathBuf,
    records: RecordStore<Directory>,
}

impl Store {
    /// The store of the machine whose directory this is.
    pub(crate) fn open(machine_dir: impl Into<PathBuf>) -> Self {
        let directory = machine_dir.into();
        let records = RecordStore::new(Directory(directory.clone()), boot_id());
        Self { directory, records }
    }

    /// The record, or `None` if the machine never took part in a hand-over here.
    pub(crate) fn load(&self) -> Result<Option<Record>, TokenError> {
        Ok(self.find()?.map(|found| found.record))
    }

    /// [`Store::load`], and whether the host has booted since the record was written.
    pub(crate) fn find(&self) -> Result<Option<Found>, TokenError> {
        self.records.find().map_err(|error| self.explain(error))
    }

    /// Replaces the record; when this returns, the new one survives what `durability` says.
    pub(crate) fn save(&self, record: &Record, durability: Durability) -> Result<(), TokenError> {
        self.records.save(record, durability).map_err(|error| self.explain(error))
    }

    /// Makes the newest record survive the host. May run beside [`Store::save`]; whoever goes on from a record after a
    /// crash does this first.
    pub(crate) fn sync(&self) -> Result<(), TokenError> {
        self.records.sync().map_err(|error| self.explain(error))
    }

    fn explain(&self, source: StoreError) -> TokenError {
        let directory = self.directory.clone();
        match source {
            StoreError::Storage { .. } => TokenError::Access { directory, source },
            StoreError::Damaged { .. } => TokenError::Damaged { directory, source },
        }
    }
}

fn boot_id() -> Option<BootId> {
    fs::read_to_string(BOOT_ID).ok().map(|id| BootId(id.trim().to_owned()))
}

/// A real directory.
#[derive(Debug, Clone)]
struct Directory(PathBuf);

impl Storage for Directory {
    fn read(&self, name: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(self.0.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut content = Vec::new();
        file.take(limit as u64).read_to_end(&mut content)?;
        Ok(Some(content))
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(self.0.join(name))?;
        file.write_all(content)
    }

    fn sync_file(&self, name: &str) -> io::Result<()> {
        sync(&self.0.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.0.join(from), self.0.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        sync(&self.0)
    }

    fn sync_parent(&self) -> io::Result<()> {
        self.0.parent().map_or(Ok(()), sync)
    }
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use godwit_migration::handover::{Epoch, RecordState};

    use super::*;

    fn refused(epoch: u64) -> Record {
        Record { epoch: Epoch(epoch), state: RecordState::Refused { peer: "hosta".into() } }
    }

    #[test]
    fn the_newest_record_is_found_whatever_it_was_to_survive() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(scratch.path().join("web1"));
        assert!(matches!(store.save(&refused(1), Durability::Synced), Err(TokenError::Access { .. })));
        fs::create_dir(scratch.path().join("web1")).unwrap();
        assert_eq!(store.find().unwrap(), None);
        for (epoch, durability) in [
            (1, Durability::Synced),
            (2, Durability::Written),
            (3, Durability::Written),
            (4, Durability::Synced),
        ] {
            store.save(&refused(epoch), durability).unwrap();
            assert_eq!(store.find().unwrap(), Some(Found { record: refused(epoch), rebooted: false }));
            store.sync().unwrap();
            assert_eq!(store.load().unwrap(), Some(refused(epoch)));
        }
    }

    #[test]
    fn a_record_of_another_boot_is_known_by_its_boot_id() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(scratch.path());
        store.save(&refused(1), Durability::Synced).unwrap();
        let path = scratch.path().join(TOKEN_FILE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(&boot_id().unwrap().0, "00000000-0000-4000-8000-000000000000"))
            .unwrap();
        assert_eq!(store.find().unwrap(), Some(Found { record: refused(1), rebooted: true }));
    }

    #[test]
    fn a_record_without_a_boot_id_is_in_doubt() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(scratch.path());
        fs::write(scratch.path().join(TOKEN_FILE), serde_json::to_vec(&refused(1)).unwrap()).unwrap();
        assert_eq!(store.find().unwrap(), Some(Found { record: refused(1), rebooted: true }));
    }

    #[test]
    fn something_else_is_not_taken_for_a_record() {
        let scratch = tempfile::tempdir().unwrap();
        let store = Store::open(scratch.path());
        for content in [&b""[..], b"{\"epoch\":1", b"[]", &[b' '; 5000]] {
            fs::write(scratch.path().join(TOKEN_FILE), content).unwrap();
            assert!(matches!(store.find(), Err(TokenError::Damaged { .. })));
        }
    }
}
