//! Where the content of a range is.

use super::Store;
use crate::{
    geometry::{BLOCK_BYTES, CHUNK_BYTES, ChunkIndex},
    map::Place,
    storage::Storage,
};

/// Where the content of an extent is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The data file has it, in its place.
    File,
    /// It is zero.
    Zero,
    /// The base has it: this chunk must be fetched.
    Base(ChunkIndex),
}

/// A part of a range whose content is to be had in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts on the disk.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where its content is.
    pub source: Source,
}

/// The extents of a range, in order; neighbours differ in their source.
pub struct Extents<'a, S: Storage> {
    store: &'a Store<S>,
    at: u64,
    end: u64,
}

impl<S: Storage> Store<S> {
    /// Where the content of `length` bytes from `offset` is. The range is on the disk.
    pub fn extents(&self, offset: u64, length: u64) -> Extents<'_, S> {
        debug_assert!(self.geometry().holds(offset, length));
        Extents { store: self, at: offset, end: offset + length }
    }

    /// The source of the byte at `at`, and where the next block is that may have another.
    fn source(&self, at: u64) -> (Source, u64) {
        let chunk = ChunkIndex((at / CHUNK_BYTES) as u32);
        let block = (at % CHUNK_BYTES / BLOCK_BYTES) as u32;
        let state = self.state(chunk);
        let place = state.place(block);
        let alike = (state.at(place).0 >> block).trailing_ones();
        let source = match place {
            Place::Fetched | Place::Written => Source::File,
            Place::Base if !self.base_is_zero(chunk) => Source::Base(chunk),
            Place::Base | Place::Zero => Source::Zero,
        };
        (source, chunk.offset() + u64::from(block + alike) * BLOCK_BYTES)
    }
}

impl<S: Storage> Iterator for Extents<'_, S> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        if self.at >= self.end {
            return None;
        }
        let offset = self.at;
        let (source, mut until) = self.store.source(offset);
        while until < self.end {
            let (next, after) = self.store.source(until);
            if next != source {
                break;
            }
            until = after;
        }
        self.at = until.min(self.end);
        Some(Extent { offset, length: self.at - offset, source })
    }
}
