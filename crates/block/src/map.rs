//! What is known of each of a disk's blocks: where its content is.
//!
//! ```text
//!             fill                     write
//!   base ───────────────► fetched     ─────────► written
//!    ▲ ◄───────────────── (a copy of  forget      ▲   │
//!    │      forget         the base)  first       │   │ zero
//!    │                         │ zero       write │   ▼
//!    └──────────────────────── └────────────────► zero
//! ```
//!
//! A block never goes back from *written* or *zero* to *base*, but for one that a host's crash took back
//! ([`Store::open`](crate::Store::open)).

use crate::geometry::{Blocks, ChunkIndex, Geometry};

/// Where a block's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// In the base, and not here. What the data file has in its place counts for nothing.
    Base,
    /// Here, a copy of what the base has.
    Fetched,
    /// Here, and only here.
    Written,
    /// Nowhere: the block is zero, whatever the base has. What the data file has in its place counts for nothing.
    Zero,
}

/// Where the contents of a chunk's blocks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkState {
    /// The data file has the content.
    present: Blocks,
    /// The content isn't the base's.
    own: Blocks,
}

impl ChunkState {
    /// From what a file says; all is possible.
    pub(crate) fn from_bits(present: u64, own: u64) -> Self {
        Self { present: Blocks(present), own: Blocks(own) }
    }

    /// As it is kept in a file: present, own.
    pub(crate) fn bits(self) -> (u64, u64) {
        (self.present.0, self.own.0)
    }

    /// Blocks at a place. Those beyond a disk's end are at [`Place::Base`].
    pub fn at(self, place: Place) -> Blocks {
        match place {
            Place::Base => Blocks::ALL.without(self.present | self.own),
            Place::Fetched => self.present.without(self.own),
            Place::Written => self.present & self.own,
            Place::Zero => self.own.without(self.present),
        }
    }

    /// Blocks whose content the data file has.
    pub fn present(self) -> Blocks {
        self.present
    }

    /// Blocks whose content isn't the base's.
    pub fn own(self) -> Blocks {
        self.own
    }

    /// Where one block's content is.
    pub fn place(self, block: u32) -> Place {
        match (self.present.contains(block), self.own.contains(block)) {
            (false, false) => Place::Base,
            (true, false) => Place::Fetched,
            (true, true) => Place::Written,
            (false, true) => Place::Zero,
        }
    }

    /// Says where the contents of some blocks are from now on.
    pub(crate) fn put(&mut self, blocks: Blocks, place: Place) {
        let (present, own) = match place {
            Place::Base => (false, false),
            Place::Fetched => (true, false),
            Place::Written => (true, true),
            Place::Zero => (false, true),
        };
        self.present = set(self.present, blocks, present);
        self.own = set(self.own, blocks, own);
    }
}

fn set(all: Blocks, some: Blocks, to: bool) -> Blocks {
    if to { all | some } else { all.without(some) }
}

/// The states of all chunks of a disk: 16 bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    chunks: Vec<ChunkState>,
}

/// How many blocks are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Blocks at [`Place::Base`].
    pub base: u64,
    /// Blocks at [`Place::Fetched`].
    pub fetched: u64,
    /// Blocks at [`Place::Written`].
    pub written: u64,
    /// Blocks at [`Place::Zero`].
    pub zero: u64,
}

impl Map {
    /// A disk that has nothing but its base.
    pub fn new(geometry: Geometry) -> Self {
        Self { chunks: vec![ChunkState::default(); geometry.chunk_count() as usize] }
    }

    /// A chunk's state. The chunk is one of the disk's.
    pub fn chunk(&self, chunk: ChunkIndex) -> ChunkState {
        self.chunks[chunk.0 as usize]
    }

    pub(crate) fn chunk_mut(&mut self, chunk: ChunkIndex) -> &mut ChunkState {
        &mut self.chunks[chunk.0 as usize]
    }

    /// All chunks' states, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ChunkState> {
        self.chunks.iter().copied()
    }

    /// How many blocks are where.
    pub fn tally(&self, geometry: Geometry) -> Tally {
        let mut tally = Tally::default();
        for (chunk, state) in geometry.chunks().zip(self.iter()) {
            let here = geometry.blocks(chunk);
            let count = |place| u64::from((state.at(place) & here).count());
            tally.base += count(Place::Base);
            tally.fetched += count(Place::Fetched);
            tally.written += count(Place::Written);
            tally.zero += count(Place::Zero);
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_at_one_place() {
        let mut state = ChunkState::default();
        state.put(Blocks::span(0..16), Place::Fetched);
        state.put(Blocks::span(8..32), Place::Written);
        state.put(Blocks::span(30..34), Place::Zero);
        let places = [Place::Base, Place::Fetched, Place::Written, Place::Zero];
        assert_eq!(places.iter().map(|&place| state.at(place).count()).sum::<u32>(), 64);
        assert_eq!(state.place(0), Place::Fetched);
        assert_eq!(state.place(8), Place::Written);
        assert_eq!(state.place(30), Place::Zero);
        assert_eq!(state.place(34), Place::Base);
    }

    #[test]
    fn blocks_beyond_the_end_are_not_counted() {
        let geometry = Geometry::new(5 * 4096).expect("a good size");
        let mut map = Map::new(geometry);
        map.chunk_mut(ChunkIndex(0)).put(Blocks::span(1..2), Place::Zero);
        assert_eq!(map.tally(geometry), Tally { base: 4, zero: 1, ..Tally::default() });
    }
}
