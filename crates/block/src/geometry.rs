//! Sizes and places: a disk is cut into chunks of 256 KiB, and a chunk into 64 blocks of 4 KiB.
//!
//! A chunk is what is fetched from the repository and what moves between hosts; a block is what a disk tells apart. The
//! last chunk and the last block of a disk may be short.

use std::ops::{BitAnd, BitOr, Range};

use thiserror::Error;

/// A block: the least that a disk tells apart.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks in a chunk.
pub const CHUNK_BLOCKS: u32 = 64;
/// A chunk: what is fetched and moved as one.
pub const CHUNK_BYTES: u64 = BLOCK_BYTES * CHUNK_BLOCKS as u64;
/// What a disk's size is a multiple of.
pub const SECTOR_BYTES: u64 = 512;
/// The largest disk, 64 TiB: its map takes 4 GiB of memory then.
pub const DISK_BYTES_MAX: u64 = 1 << 46;

/// A size that no disk has.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// Nothing to store.
    #[error("a disk of no bytes")]
    Empty,
    /// Not whole sectors.
    #[error("{0} bytes are not a multiple of {SECTOR_BYTES}")]
    NotSectors(u64),
    /// Over [`DISK_BYTES_MAX`].
    #[error("{0} bytes are more than {DISK_BYTES_MAX}")]
    TooLarge(u64),
}

/// A chunk's place among a disk's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(pub u32);

impl ChunkIndex {
    /// Where it starts on the disk, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * CHUNK_BYTES
    }
}

/// Some of a chunk's blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Blocks(pub u64);

impl Blocks {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self(u64::MAX);

    /// The blocks of `range`, which ends at [`CHUNK_BLOCKS`] at most.
    pub fn span(range: Range<u32>) -> Self {
        if range.is_empty() {
            return Self::NONE;
        }
        let ones = u64::MAX >> (CHUNK_BLOCKS - (range.end - range.start));
        Self(ones << range.start)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether `block` is one of them.
    pub fn contains(self, block: u32) -> bool {
        self.0 >> block & 1 == 1
    }

    /// Those that aren't among `others`.
    #[must_use]
    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// Neighbours as one, in order.
    pub fn runs(self) -> impl Iterator<Item = Range<u32>> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let start = left.trailing_zeros();
            let length = (left >> start).trailing_ones();
            left &= !Self::span(start..start + length).0;
            Some(start..start + length)
        })
    }
}

impl BitAnd for Blocks {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Blocks {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A part of a request that lies within one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Its first byte in the chunk.
    pub start: u32,
    /// The byte after its last, in the chunk.
    pub end: u32,
}

impl Piece {
    /// Where it starts on the disk.
    pub fn offset(self) -> u64 {
        self.chunk.offset() + u64::from(self.start)
    }

    /// Its length in bytes.
    pub fn length(self) -> usize {
        (self.end - self.start) as usize
    }

    /// The blocks that it lies in, wholly or in part.
    pub fn touched(self) -> Blocks {
        let block = BLOCK_BYTES as u32;
        Blocks::span(self.start / block..self.end.div_ceil(block))
    }
}

/// A disk's size, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size_bytes: u64,
}

impl Geometry {
    /// A disk of `size_bytes`.
    ///
    /// # Errors
    /// [`SizeError`] says what is wrong with the size.
    pub fn new(size_bytes: u64) -> Result<Self, SizeError> {
        match size_bytes {
            0 => Err(SizeError::Empty),
            DISK_BYTES_MAX.. if size_bytes > DISK_BYTES_MAX => Err(SizeError::TooLarge(size_bytes)),
            _ if !size_bytes.is_multiple_of(SECTOR_BYTES) => Err(SizeError::NotSectors(size_bytes)),
            _ => Ok(Self { size_bytes }),
        }
    }

    /// The disk's size in bytes.
    pub fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    /// How many chunks the disk has.
    pub fn chunk_count(self) -> u32 {
        // At most 2^46 / 2^18 (DISK_BYTES_MAX).
        self.size_bytes.div_ceil(CHUNK_BYTES) as u32
    }

    /// All chunks, in order.
    pub fn chunks(self) -> impl Iterator<Item = ChunkIndex> {
        (0..self.chunk_count()).map(ChunkIndex)
    }

    /// A chunk's length: [`CHUNK_BYTES`], but for the last.
    pub fn chunk_bytes(self, chunk: ChunkIndex) -> u32 {
        (self.size_bytes - chunk.offset()).min(CHUNK_BYTES) as u32
    }

    /// The blocks that a chunk has: all, but for the last chunk.
    pub fn blocks(self, chunk: ChunkIndex) -> Blocks {
        Blocks::span(0..self.chunk_bytes(chunk).div_ceil(BLOCK_BYTES as u32))
    }

    /// Whether `length` bytes from `offset` are within the disk.
    pub fn holds(self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.size_bytes)
    }

    /// A range of the disk, chunk by chunk. The range is within the disk ([`Geometry::holds`]).
    pub fn pieces(self, offset: u64, length: u64) -> impl Iterator<Item = Piece> {
        debug_assert!(self.holds(offset, length));
        let end = offset + length;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let chunk = ChunkIndex((at / CHUNK_BYTES) as u32);
            let start = (at % CHUNK_BYTES) as u32;
            let stop = (end - chunk.offset()).min(CHUNK_BYTES) as u32;
            at = chunk.offset() + u64::from(stop);
            Some(Piece { chunk, start, end: stop })
        })
    }

    /// The blocks of which a piece has every byte. What a short last block has is what the disk has of it.
    pub fn covered(self, piece: Piece) -> Blocks {
        let block = BLOCK_BYTES as u32;
        let first = piece.start.div_ceil(block);
        let last = if piece.end == self.chunk_bytes(piece.chunk) {
            piece.end.div_ceil(block)
        } else {
            piece.end / block
        };
        if first < last { Blocks::span(first..last) } else { Blocks::NONE }
    }

    /// Where neighbouring blocks of a chunk lie, as a piece; cut at the disk's end.
    pub fn span(self, chunk: ChunkIndex, blocks: Range<u32>) -> Piece {
        let block = BLOCK_BYTES as u32;
        Piece { chunk, start: blocks.start * block, end: (blocks.end * block).min(self.chunk_bytes(chunk)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        assert_eq!(Geometry::new(0), Err(SizeError::Empty));
        assert_eq!(Geometry::new(513), Err(SizeError::NotSectors(513)));
        assert_eq!(Geometry::new(DISK_BYTES_MAX + 512), Err(SizeError::TooLarge(DISK_BYTES_MAX + 512)));
        assert_eq!(Geometry::new(DISK_BYTES_MAX).map(Geometry::chunk_count), Ok(1 << 28));
    }

    #[test]
    fn a_request_over_three_chunks_falls_into_three_pieces() {
        let disk = Geometry::new(3 * CHUNK_BYTES).expect("a good size");
        let pieces: Vec<Piece> = disk.pieces(CHUNK_BYTES - 512, CHUNK_BYTES + 1024).collect();
        let ends: Vec<(u32, u32, u32)> = pieces.iter().map(|p| (p.chunk.0, p.start, p.end)).collect();
        let chunk = CHUNK_BYTES as u32;
        assert_eq!(ends, [(0, chunk - 512, chunk), (1, 0, chunk), (2, 0, 512)]);
        assert_eq!(pieces[0].touched(), Blocks::span(63..64));
        assert_eq!(disk.covered(pieces[0]), Blocks::NONE);
        assert_eq!(disk.covered(pieces[1]), Blocks::ALL);
    }

    #[test]
    fn the_last_block_is_covered_by_what_the_disk_has_of_it() {
        let disk = Geometry::new(CHUNK_BYTES + BLOCK_BYTES + 512).expect("a good size");
        let last = ChunkIndex(1);
        assert_eq!(disk.blocks(last), Blocks::span(0..2));
        let whole = Piece { chunk: last, start: 4096, end: 4608 };
        assert_eq!(disk.covered(whole), Blocks::span(1..2));
        assert_eq!(disk.span(last, 0..2), Piece { chunk: last, start: 0, end: 4608 });
    }

    #[test]
    fn runs_are_neighbours_in_order() {
        let blocks = Blocks::span(0..3) | Blocks::span(10..11) | Blocks::span(62..64);
        assert_eq!(blocks.runs().collect::<Vec<_>>(), [0..3, 10..11, 62..64]);
        assert!(Blocks::ALL.runs().eq(std::iter::once(0..64)));
        assert_eq!(Blocks::NONE.runs().count(), 0);
    }
}
