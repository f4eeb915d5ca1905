//! Requests that change the disk.

use std::{borrow::Cow, io};

use bytes::Bytes;

use super::{Outcome, Store, StoreError, data_error};
use crate::{
    geometry::{BLOCK_BYTES, Blocks, ChunkIndex, Geometry, Piece},
    map::Place,
    record::{Event, digest_content},
    storage::{Storage, StorageFile},
};

const BLOCK: u32 = BLOCK_BYTES as u32;

/// A chunk of the base on its way into the data file.
#[derive(Clone, Debug)]
#[must_use]
pub struct Fill<F> {
    chunk: ChunkIndex,
    /// The blocks that aren't here yet.
    missing: Blocks,
    content: Bytes,
    geometry: Geometry,
    data: F,
}

impl<F: StorageFile> Fill<F> {
    /// Which chunk it is.
    pub fn chunk(&self) -> ChunkIndex {
        self.chunk
    }

    /// Writes it; slow, in any thread. What the file has in these blocks' places counts for nothing until the fill has ended.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self) -> io::Result<()> {
        for run in self.missing.runs() {
            let piece = self.geometry.span(self.chunk, run);
            self.data.write_at(piece.offset(), &self.content[piece.start as usize..piece.end as usize])?;
        }
        Ok(())
    }
}

impl<S: Storage> Store<S> {
    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// [`StoreError`] says what failed; then any part of it may have been written, as on a disk.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<Outcome, StoreError> {
        self.check_range(offset, bytes.len() as u64)?;
        let mut left = bytes;
        for piece in self.geometry().pieces(offset, bytes.len() as u64) {
            let (now, rest) = left.split_at(piece.length());
            left = rest;
            match self.write_piece(piece, now)? {
                Outcome::Done => {}
                wait => return Ok(wait),
            }
        }
        Ok(Outcome::Done)
    }

    /// Makes `length` bytes from `offset` zero, and gives back the space of whole blocks.
    ///
    /// # Errors
    /// As for [`Store::write`].
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<Outcome, StoreError> {
        self.check_range(offset, length)?;
        for piece in self.geometry().pieces(offset, length) {
            for edge in self.edges(piece).into_iter().flatten() {
                match self.zero_edge(edge)? {
                    Outcome::Done => {}
                    wait => return Ok(wait),
                }
            }
            match self.zero_blocks(piece.chunk, self.geometry().covered(piece))? {
                Outcome::Done => {}
                wait => return Ok(wait),
            }
        }
        Ok(Outcome::Done)
    }

    /// Lets go of what whole blocks of a range have; they are zero then. What is left of the range stays.
    ///
    /// # Errors
    /// As for [`Store::write`].
    pub fn discard(&mut self, offset: u64, length: u64) -> Result<Outcome, StoreError> {
        self.check_range(offset, length)?;
        for piece in self.geometry().pieces(offset, length) {
            match self.zero_blocks(piece.chunk, self.geometry().covered(piece))? {
                Outcome::Done => {}
                wait => return Ok(wait),
            }
        }
        Ok(Outcome::Done)
    }

    /// Takes the content that the base has of a chunk, which the caller has verified. Blocks that aren't at
    /// [`Place::Base`] stay as they are.
    ///
    /// # Errors
    /// [`StoreError`] says what failed; then nothing has changed.
    pub fn fill(&mut self, chunk: ChunkIndex, content: &[u8]) -> Result<Outcome, StoreError> {
        let fill = self.begin_fill(chunk, Bytes::copy_from_slice(content));
        fill.write().map_err(data_error("write a chunk of the base"))?;
        self.end_fill(&fill)
    }

    /// Begins to take the content that the base has of a chunk. Until [`Store::end_fill`] nothing may change the chunk.
    pub fn begin_fill(&self, chunk: ChunkIndex, content: Bytes) -> Fill<S::File> {
        debug_assert_eq!(content.len(), self.geometry().chunk_bytes(chunk) as usize);
        let missing = self.state(chunk).at(Place::Base) & self.geometry().blocks(chunk);
        Fill { chunk, missing, content, geometry: self.geometry(), data: self.data.clone() }
    }

    /// Ends with a chunk that was written ([`Fill::write`]).
    ///
    /// # Errors
    /// [`StoreError`] says what failed; then nothing has changed.
    pub fn end_fill(&mut self, fill: &Fill<S::File>) -> Result<Outcome, StoreError> {
        if self.unsealed.is_full() {
            return Ok(Outcome::NeedsFlush);
        }
        let missing = fill.missing & self.state(fill.chunk).at(Place::Base);
        debug_assert_eq!(missing, fill.missing, "a chunk was changed while it was filled");
        if !missing.is_empty() {
            self.change(fill.chunk, missing, Event::Fetched)?;
        }
        Ok(Outcome::Done)
    }

    /// Puts what the base has, which the caller has verified, over the copies of a chunk's blocks.
    ///
    /// # Errors
    /// [`StoreError`] says what failed.
    pub fn mend(&mut self, chunk: ChunkIndex, content: &[u8]) -> Result<(), StoreError> {
        let copies = self.state(chunk).at(Place::Fetched) & self.geometry().blocks(chunk);
        for run in copies.runs() {
            let piece = self.geometry().span(chunk, run);
            let part = &content[piece.start as usize..piece.end as usize];
            self.data.write_at(piece.offset(), part).map_err(data_error("repair a copy of the base"))?;
        }
        Ok(())
    }

    fn write_piece(&mut self, piece: Piece, bytes: &[u8]) -> Result<Outcome, StoreError> {
        let chunk = piece.chunk;
        let state = self.state(chunk);
        let touched = piece.touched();
        if touched.without(state.at(Place::Written)).is_empty() {
            self.data.write_at(piece.offset(), bytes).map_err(data_error("write"))?;
            return Ok(Outcome::Done);
        }
        if self.unsealed.is_full() {
            return Ok(Outcome::NeedsFlush);
        }
        let partial = touched.without(self.geometry().covered(piece));
        if !(partial & state.at(Place::Base)).is_empty() && !self.base_is_zero(chunk) {
            return Ok(Outcome::NeedsBase(chunk));
        }
        let copies = touched & state.at(Place::Fetched);
        if !copies.is_empty() {
            self.change(chunk, copies, Event::Forgotten)?;
        }
        let (wide, padded) = self.pad(piece, bytes, partial.without(state.present()));
        self.data.write_at(wide.offset(), &padded).map_err(data_error("write"))?;
        let content = if (partial & state.present()).is_empty() {
            digest_content(chunk, &padded)
        } else {
            self.digest_data(chunk, touched)?
        };
        self.change(chunk, touched, Event::Written(content))?;
        Ok(Outcome::Done)
    }

    /// Completes a piece to whole blocks where the rest of the block is zero without being in the file.
    fn pad<'a>(&self, piece: Piece, bytes: &'a [u8], zero: Blocks) -> (Piece, Cow<'a, [u8]>) {
        if zero.is_empty() {
            return (piece, Cow::Borrowed(bytes));
        }
        let mut wide = piece;
        let (first, last) = (piece.start / BLOCK, (piece.end - 1) / BLOCK);
        if zero.contains(first) {
            wide.start = first * BLOCK;
        }
        if zero.contains(last) {
            wide.end = self.geometry().span(piece.chunk, last..last + 1).end;
        }
        let mut padded = vec![0; wide.length()];
        let start = (piece.start - wide.start) as usize;
        padded[start..start + bytes.len()].copy_from_slice(bytes);
        (wide, Cow::Owned(padded))
    }

    /// The digest of what the file has of some blocks.
    pub(super) fn digest_data(&self, chunk: ChunkIndex, blocks: Blocks) -> Result<u64, StoreError> {
        let mut content = Vec::new();
        for run in blocks.runs() {
            let piece = self.geometry().span(chunk, run);
            let start = content.len();
            content.resize(start + piece.length(), 0);
            self.data.read_at(piece.offset(), &mut content[start..]).map_err(data_error("read"))?;
        }
        Ok(digest_content(chunk, &content))
    }

    /// What a piece has before and after the blocks that it covers.
    fn edges(&self, piece: Piece) -> [Option<Piece>; 2] {
        let Some(covered) = self.geometry().covered(piece).runs().next() else {
            return [Some(piece), None];
        };
        let whole = self.geometry().span(piece.chunk, covered);
        let before = Piece { end: whole.start, ..piece };
        let after = Piece { start: whole.end, ..piece };
        [before, after].map(|edge| (edge.start < edge.end).then_some(edge))
    }

    fn zero_edge(&mut self, edge: Piece) -> Result<Outcome, StoreError> {
        let state = self.state(edge.chunk);
        let mut zero = state.at(Place::Zero);
        if self.base_is_zero(edge.chunk) {
            zero = zero | state.at(Place::Base);
        }
        if edge.touched().without(zero).is_empty() {
            return Ok(Outcome::Done);
        }
        self.write_piece(edge, &vec![0; edge.length()])
    }

    fn zero_blocks(&mut self, chunk: ChunkIndex, blocks: Blocks) -> Result<Outcome, StoreError> {
        let state = self.state(chunk);
        let mut changed = blocks.without(state.at(Place::Zero));
        if self.base_is_zero(chunk) {
            changed = changed.without(state.at(Place::Base));
        }
        if changed.is_empty() {
            return Ok(Outcome::Done);
        }
        if self.unsealed.is_full() {
            return Ok(Outcome::NeedsFlush);
        }
        self.change(chunk, changed, Event::Zeroed)?;
        self.punch(chunk, changed)?;
        Ok(Outcome::Done)
    }

    /// Gives back the space of blocks whose content in the file doesn't count.
    pub(super) fn punch(&self, chunk: ChunkIndex, blocks: Blocks) -> Result<(), StoreError> {
        for run in blocks.runs() {
            let piece = self.geometry().span(chunk, run);
            self.data.punch(piece.offset(), piece.length() as u64).map_err(data_error("give back space"))?;
        }
        Ok(())
    }
}
