//! A disk's store: reads, writes, zeros and flushes against one data file and one journalled map.
//!
//! What the file has in a block's place counts only while the map says that it is there ([`Place::Fetched`],
//! [`Place::Written`]). From that everything else follows:
//!
//! ```text
//!   write where the map has nothing        data ─► record                     a crash between leaves the old content
//!   write over a copy of the base          record: forgotten ─► data ─► record     so a copy is always a true copy
//!   write over what was written            data                                    as on any disk
//!   zero                                   record ─► hole in the data
//!   copy of the base arrives               data ─► record
//!   flush                                  sync data ─► record: sealed ─► sync records
//! ```
//!
//! A *process* that is killed loses nothing of this, since the kernel has it all. A *host* that crashes may lose any part
//! that wasn't synced, and in any order; so records after the last seal count only if the data has the content that
//! they tell the digest of, and copies of the base only once their digest was compared again ([`Store::open`]).
//!
//! The store waits for nothing: what it can't do yet it says ([`Outcome`]), and the slow parts of a flush are handed out
//! to be done in another thread ([`Store::begin_flush`]), as is the writing of a chunk that came ([`Store::begin_fill`]).

#[cfg(test)]
pub(crate) mod crash_storage;
#[cfg(test)]
mod crash_tests;
mod extents;
mod flush;
#[cfg(test)]
mod model_tests;
mod open;
mod unsealed;
mod write;

use std::io;

use thiserror::Error;

use self::unsealed::Unsealed;
pub use self::{
    extents::{Extent, Extents, Source},
    flush::{Flush, JournalSync},
    open::{CreateError, Ending, OpenError, Opening, look},
    write::Fill,
};
use crate::{
    base::BaseOutline,
    geometry::{Blocks, ChunkIndex, Geometry},
    map::{ChunkState, Map, Tally},
    mapfile::{Identity, MapFile},
    record::{Boot, Event, Record},
    storage::{Storage, StorageFile},
};

/// The name of the file with the content.
pub(crate) const DATA_FILE: &str = "data";

/// A disk's store. See the [module](self) for how it keeps its promises.
#[derive(Debug)]
pub struct Store<S: Storage> {
    storage: S,
    identity: Identity,
    base: BaseOutline,
    boot: Boot,
    data: S::File,
    map: Map,
    journal: MapFile<S::File>,
    unsealed: Unsealed,
    /// Records of the journal that are known to survive the host.
    durable: u64,
    /// Map files before this one, which go once this one is synced.
    retired: Vec<String>,
    /// How many records the journal may have before a new file is begun.
    compact_at: u64,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It is done, and survives this process.
    Done,
    /// A chunk of the base must be here first ([`Store::fill`]). Ask again then; what was done already doesn't matter.
    NeedsBase(ChunkIndex),
    /// Too much would be lost with the host: a flush must come first. Ask again then.
    NeedsFlush,
}

/// A request that failed. What was there before is still there, as on a disk.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The range isn't on the disk.
    #[error("{length} bytes from {offset} are beyond the disk's end, {size_bytes}")]
    Range {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        length: u64,
        /// How large the disk is.
        size_bytes: u64,
    },
    /// The content can't be read or written.
    #[error("the disk's data file: {action}")]
    Data {
        /// What was tried.
        action: &'static str,
        /// What the file system says.
        source: io::Error,
    },
    /// The map can't be written.
    #[error("the disk's map")]
    Map(#[source] io::Error),
}

impl StoreError {
    /// Whether there is no space left, so that it may go on later.
    pub fn is_full(&self) -> bool {
        let kind = match self {
            Self::Range { .. } => return false,
            Self::Data { source, .. } | Self::Map(source) => source.kind(),
        };
        matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

fn data_error(action: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Data { action, source }
}

impl<S: Storage> Store<S> {
    /// Which disk it is, and how large.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The disk's size, and what follows from it.
    pub fn geometry(&self) -> Geometry {
        self.identity.geometry
    }

    /// Where the blocks are.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// How many blocks are where.
    pub fn tally(&self) -> Tally {
        self.map.tally(self.geometry())
    }

    /// The file that [`Source::File`] means. It may be read in any thread, at any time.
    pub fn data(&self) -> &S::File {
        &self.data
    }

    /// Reads `bytes` from `offset`, if all of it is here.
    ///
    /// # Errors
    /// [`StoreError`] says what failed.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<Outcome, StoreError> {
        self.check_range(offset, bytes.len() as u64)?;
        for extent in self.extents(offset, bytes.len() as u64) {
            let start = (extent.offset - offset) as usize;
            let part = &mut bytes[start..start + extent.length as usize];
            match extent.source {
                Source::Zero => part.fill(0),
                Source::Base(chunk) => return Ok(Outcome::NeedsBase(chunk)),
                Source::File => self.data.read_at(extent.offset, part).map_err(data_error("read"))?,
            }
        }
        Ok(Outcome::Done)
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), StoreError> {
        let geometry = self.geometry();
        if geometry.holds(offset, length) {
            return Ok(());
        }
        Err(StoreError::Range { offset, length, size_bytes: geometry.size_bytes() })
    }

    /// Whether blocks at [`Place::Base`](crate::Place::Base) of a chunk are zero, so that nothing has to be fetched.
    fn base_is_zero(&self, chunk: ChunkIndex) -> bool {
        self.base.is_zero(chunk)
    }

    fn state(&self, chunk: ChunkIndex) -> ChunkState {
        self.map.chunk(chunk)
    }

    /// Records that something happened to a chunk's blocks, and minds it.
    fn change(&mut self, chunk: ChunkIndex, blocks: Blocks, event: Event) -> Result<(), StoreError> {
        let number = self.journal.append(Record::Change { chunk, blocks, event }).map_err(StoreError::Map)?;
        let state = self.map.chunk_mut(chunk);
        self.unsealed.push(number, Record::Change { chunk, blocks, event }, *state);
        state.put(blocks, event.place());
        Ok(())
    }
}
