//! Flushes: what makes acknowledged writes survive the host.
//!
//! ```text
//!   begin_flush ──► Flush::sync          slow; in any thread
//!   seal        ──► JournalSync::run     slow; in any thread
//!   sealed
//! ```
//!
//! Requests go on meanwhile. What was done before `begin_flush` survives the host once `sealed` was called. A flush that
//! fails anywhere leaves everything as unsealed as it was.

use std::io;

use super::{Store, StoreError, data_error};
use crate::{
    mapfile::MapFile,
    record::Record,
    storage::{Storage, StorageFile},
};

/// A flush that has begun: the data's part.
#[derive(Clone, Debug)]
#[must_use]
pub struct Flush<F> {
    /// The first change that it doesn't seal.
    total: u64,
    data: F,
}

impl<F: StorageFile> Flush<F> {
    /// Makes the data survive the host.
    ///
    /// # Errors
    /// What the file system says; then nobody knows what survives, and the store should not be used any more.
    pub fn sync(&self) -> io::Result<()> {
        self.data.sync()
    }
}

/// The second part of a flush: the journal's.
#[derive(Clone, Debug)]
#[must_use]
pub struct JournalSync<F> {
    /// The journal, unless nothing in it is new.
    file: Option<F>,
    number: u64,
    /// The first record that it may not make survive.
    until: u64,
    retired: Vec<String>,
}

impl<F: StorageFile> JournalSync<F> {
    /// Makes the journal survive the host, and removes files that it replaces.
    ///
    /// # Errors
    /// As for [`Flush::sync`].
    pub fn run<S: Storage<File = F>>(&self, storage: &S) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        file.sync()?;
        if self.retired.is_empty() {
            return Ok(());
        }
        storage.sync_names()?;
        for name in &self.retired {
            storage.remove(name)?;
        }
        storage.sync_names()
    }
}

impl<S: Storage> Store<S> {
    /// Begins a flush of everything that was done.
    pub fn begin_flush(&self) -> Flush<S::File> {
        Flush { total: self.unsealed.total(), data: self.data.clone() }
    }

    /// Goes on with a flush whose data is synced.
    ///
    /// # Errors
    /// [`StoreError`] says what failed.
    pub fn seal(&mut self, flush: &Flush<S::File>) -> Result<JournalSync<S::File>, StoreError> {
        let through = self.unsealed.number_at(flush.total).unwrap_or(self.journal.next());
        // A record may have been synced with an earlier flush that didn't seal it.
        if self.journal.next() > self.durable || self.unsealed.reaches_below(flush.total) {
            let sealed = Record::Sealed { through, durable: self.durable };
            self.journal.append(sealed).map_err(StoreError::Map)?;
        }
        self.unsealed.seal(flush.total);
        if self.journal.next() > self.compact_at {
            self.compact();
        }
        let new = self.journal.next() > self.durable;
        Ok(JournalSync {
            file: new.then(|| self.journal.file().clone()),
            number: self.journal.number(),
            until: self.journal.next(),
            retired: self.retired.clone(),
        })
    }

    /// Ends a flush whose journal is synced.
    pub fn sealed(&mut self, sync: JournalSync<S::File>) {
        if sync.number == self.journal.number() {
            self.durable = self.durable.max(sync.until);
            self.retired.retain(|name| !sync.retired.contains(name));
        }
    }

    /// A whole flush, waited for.
    ///
    /// # Errors
    /// [`StoreError`] says what failed; then the store should not be used any more.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        let flush = self.begin_flush();
        flush.sync().map_err(data_error("sync"))?;
        let journal = self.seal(&flush)?;
        journal.run(&self.storage).map_err(StoreError::Map)?;
        self.sealed(journal);
        Ok(())
    }

    /// Whether a flush is due although nobody asked for one, so that the host's crash can't take back too much.
    pub fn is_flush_due(&self) -> bool {
        self.unsealed.is_flush_due()
    }

    /// Flushes, and says that nothing was left to lose. No requests may follow.
    ///
    /// # Errors
    /// As for [`Store::flush`]; then the disk opens as after a crash.
    pub fn close(&mut self) -> Result<(), StoreError> {
        self.flush()?;
        self.journal.append(Record::Closed).map_err(StoreError::Map)?;
        self.journal.file().sync().map_err(StoreError::Map)
    }

    /// Begins a new map file: the states at the last seal, and the changes since. The old one stays until the new one is
    /// synced. If there is no space for it, the old one goes on, and it is tried again when that is twice as long.
    fn compact(&mut self) {
        let name = MapFile::<S::File>::name(self.journal.number() + 1);
        match self.write_next_map(&name) {
            Ok(next) => {
                self.retired.push(MapFile::<S::File>::name(self.journal.number()));
                self.unsealed.renumber(1);
                self.journal = next;
                self.durable = 0;
                self.compact_at = super::open::compact_at(self.geometry());
            }
            Err(_full) => {
                // What is left of it has no header, so it is no map; it will be written over.
                let _ = self.storage.remove(&name);
                self.compact_at *= 2;
            }
        }
    }

    fn write_next_map(&self, name: &str) -> io::Result<MapFile<S::File>> {
        let sealed = self.unsealed.states_sealed();
        let chunks = self.geometry().chunks();
        let states = chunks.map(|chunk| sealed.get(&chunk).copied().unwrap_or_else(|| self.state(chunk)));
        let records = std::iter::once(Record::Opened(self.boot)).chain(self.unsealed.records());
        MapFile::write(self.storage.create(name)?, self.journal.number() + 1, &self.identity, states, records)
    }
}
