//! A record of a disk's journal: 32 bytes that say what changed.
//!
//! ```text
//!   0        8      9          12       16               24               32
//!   ┌────────┬──────┬──────────┬────────┬────────────────┬────────────────┐
//!   │ digest │ kind │ 0  0  0  │ chunk  │ blocks         │ content        │   little-endian
//!   └────────┴──────┴──────────┴────────┴────────────────┴────────────────┘
//! ```
//!
//! The digest is xxh3 of what follows it, with a seed that is another one in each file and at each place, so that a
//! record that lies elsewhere than it was written isn't one.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    geometry::{Blocks, ChunkIndex, Geometry},
    map::Place,
};

/// A record's length.
pub(crate) const RECORD_BYTES: usize = 32;

/// One run of a host's kernel: what was written in it and not synced is there until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot(pub [u8; 16]);

/// What happened to a chunk's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// They were written. The file has their content, of which this is the digest ([`digest_content`]).
    Written(u64),
    /// They are zero.
    Zeroed,
    /// The file has a copy of what the base has.
    Fetched,
    /// The file's copy of what the base has counts no more.
    Forgotten,
}

impl Event {
    /// Where the blocks are afterwards.
    pub(crate) fn place(self) -> Place {
        match self {
            Self::Written(_) => Place::Written,
            Self::Zeroed => Place::Zero,
            Self::Fetched => Place::Fetched,
            Self::Forgotten => Place::Base,
        }
    }
}

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// A chunk's blocks changed.
    Change {
        /// The chunk.
        chunk: ChunkIndex,
        /// The blocks.
        blocks: Blocks,
        /// What happened to them.
        event: Event,
    },
    /// What the records before number `through` say of the data survives the host, and so do the records before number
    /// `durable`.
    Sealed {
        /// The first record of whose data nothing is promised.
        through: u64,
        /// The first record that may not have survived by then.
        durable: u64,
    },
    /// The disk was opened, in this run of the host's kernel.
    Opened(Boot),
    /// The disk was closed, with everything synced. The last record then.
    Closed,
}

const WRITTEN: u8 = 1;
const ZEROED: u8 = 2;
const FETCHED: u8 = 3;
const FORGOTTEN: u8 = 4;
const SEALED: u8 = 5;
const OPENED: u8 = 6;
const CLOSED: u8 = 7;

impl Record {
    /// As it is kept. `seed` tells its file and place.
    pub(crate) fn encode(&self, seed: u64) -> [u8; RECORD_BYTES] {
        let (kind, chunk, first, second) = match *self {
            Self::Change { chunk, blocks, event } => match event {
                Event::Written(content) => (WRITTEN, chunk.0, blocks.0, content),
                Event::Zeroed => (ZEROED, chunk.0, blocks.0, 0),
                Event::Fetched => (FETCHED, chunk.0, blocks.0, 0),
                Event::Forgotten => (FORGOTTEN, chunk.0, blocks.0, 0),
            },
            Self::Sealed { through, durable } => (SEALED, 0, through, durable),
            Self::Opened(Boot(boot)) => (OPENED, 0, word(&boot, 0), word(&boot, 8)),
            Self::Closed => (CLOSED, 0, 0, 0),
        };
        let mut bytes = [0; RECORD_BYTES];
        bytes[8] = kind;
        bytes[12..16].copy_from_slice(&chunk.to_le_bytes());
        bytes[16..24].copy_from_slice(&first.to_le_bytes());
        bytes[24..].copy_from_slice(&second.to_le_bytes());
        let digest = xxh3_64_with_seed(&bytes[8..], seed);
        bytes[..8].copy_from_slice(&digest.to_le_bytes());
        bytes
    }

    /// Whether record number `other`, which came before this one, had been synced when this one was written.
    pub(crate) fn vouches_for(&self, other: u64) -> bool {
        match self {
            Self::Sealed { durable, .. } => other < *durable,
            Self::Opened(_) | Self::Closed => true,
            Self::Change { .. } => false,
        }
    }

    /// The record in `bytes`, if they are one of such a disk.
    pub(crate) fn decode(bytes: &[u8; RECORD_BYTES], seed: u64, geometry: Geometry) -> Option<Self> {
        if word(bytes, 0) != xxh3_64_with_seed(&bytes[8..], seed) {
            return None;
        }
        let (first, second) = (word(bytes, 16), word(bytes, 24));
        let event = match bytes[8] {
            WRITTEN => Event::Written(second),
            ZEROED => Event::Zeroed,
            FETCHED => Event::Fetched,
            FORGOTTEN => Event::Forgotten,
            SEALED => return Some(Self::Sealed { through: first, durable: second }),
            OPENED => {
                let mut boot = [0; 16];
                boot.copy_from_slice(&bytes[16..]);
                return Some(Self::Opened(Boot(boot)));
            }
            CLOSED => return Some(Self::Closed),
            _ => return None,
        };
        let (chunk, blocks) = (ChunkIndex((word(bytes, 8) >> 32) as u32), Blocks(first));
        let has = chunk.0 < geometry.chunk_count() && blocks.without(geometry.blocks(chunk)).is_empty();
        has.then_some(Self::Change { chunk, blocks, event })
    }
}

/// The digest of some blocks' content, which is told from the same content elsewhere.
pub(crate) fn digest_content(chunk: ChunkIndex, content: &[u8]) -> u64 {
    xxh3_64_with_seed(content, u64::from(chunk.0))
}

/// Eight bytes as a number.
pub(crate) fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::geometry::CHUNK_BYTES;

    /// A hundred chunks, and two blocks of another.
    fn geometry() -> Geometry {
        Geometry::new(100 * CHUNK_BYTES + 4608).expect("a good size")
    }

    fn records() -> impl Strategy<Value = Record> {
        let event = prop_oneof![
            any::<u64>().prop_map(Event::Written),
            Just(Event::Zeroed),
            Just(Event::Fetched),
            Just(Event::Forgotten)
        ];
        prop_oneof![
            (0..100_u32, any::<u64>(), event).prop_map(|(chunk, blocks, event)| Record::Change {
                chunk: ChunkIndex(chunk),
                blocks: Blocks(blocks),
                event
            }),
            any::<(u64, u64)>().prop_map(|(through, durable)| Record::Sealed { through, durable }),
            any::<[u8; 16]>().prop_map(|boot| Record::Opened(Boot(boot))),
            Just(Record::Closed),
        ]
    }

    proptest! {
        #[test]
        fn a_record_is_read_as_it_was_written(record in records(), seed: u64) {
            prop_assert_eq!(Record::decode(&record.encode(seed), seed, geometry()), Some(record));
        }

        #[test]
        fn a_record_elsewhere_or_with_a_bit_changed_is_none(record in records(), seed: u64, bit in 0..256_usize) {
            let mut bytes = record.encode(seed);
            prop_assert_eq!(Record::decode(&bytes, seed.wrapping_add(1), geometry()), None);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Record::decode(&bytes, seed, geometry()), None);
        }
    }

    #[test]
    fn blocks_that_the_disk_has_not_got_are_no_record() {
        for (chunk, blocks) in [(101, Blocks::ALL), (100, Blocks::ALL), (100, Blocks::span(2..3))] {
            let record = Record::Change { chunk: ChunkIndex(chunk), blocks, event: Event::Zeroed };
            assert_eq!(Record::decode(&record.encode(0), 0, geometry()), None);
        }
    }
}
