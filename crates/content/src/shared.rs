//! What several guests that come from one host have in common: sent once, kept at the target, named from then on
//! (CloudNet, 6.5.8).
//!
//! ```text
//!   source                                                          target
//!     draft: a cold block that nobody has  ── literal, marked ──►   decode; the caller gives it a slot
//!     SharedIndex: digest ─► slot          ◄── "it is in slot 7" ──
//!     draft, of another guest              ── slot 7 ──────────►    read from SharedPages, checked like all else
//! ```
//!
//! The index is only told of slots that the target has said to be written, and what is in a slot never changes. Blocks
//! are found by BLAKE3: contents that one guest chooses must not be taken for another's. Whatever a slot really holds,
//! the batch's own digest is compared before anything is written.

use std::collections::HashMap;

use crate::{BLOCK_BYTES, Block};

/// A place for a block at the target, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

/// BLAKE3 of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContentDigest([u8; Self::BYTES]);

impl ContentDigest {
    /// Its size.
    pub const BYTES: usize = 32;

    /// The digest of a block.
    pub fn of(content: &[u8; BLOCK_BYTES]) -> Self {
        Self(blake3::hash(content).into())
    }

    /// The digest as it is kept.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }

    /// A digest that was kept.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

/// Which blocks the target holds for all guests: the source's half. At most 100 bytes a block; the caller bounds
/// them.
#[derive(Debug, Default)]
pub struct SharedIndex {
    slots: HashMap<ContentDigest, Slot>,
    is_growing: bool,
}

impl SharedIndex {
    /// Takes note of a block that the target has said to hold.
    pub fn insert(&mut self, digest: ContentDigest, slot: Slot) {
        self.slots.insert(digest, slot);
    }

    /// Asks the target to keep the cold blocks that it doesn't hold, or no more; off at first. Who turns it on says to
    /// [`insert`](Self::insert) what became of each [`Draft::kept`](crate::Draft::kept).
    pub fn set_growing(&mut self, is_growing: bool) {
        self.is_growing = is_growing;
    }

    /// How many blocks are known.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub(crate) fn is_growing(&self) -> bool {
        self.is_growing
    }

    /// Whether a digest is worth its time.
    pub(crate) fn is_in_use(&self) -> bool {
        self.is_growing || !self.is_empty()
    }

    pub(crate) fn find(&self, digest: &ContentDigest) -> Option<Slot> {
        self.slots.get(digest).copied()
    }
}

/// The blocks that a target holds for all guests.
pub trait SharedPages {
    /// Fills `content` with what a slot holds.
    fn read(&mut self, slot: Slot, content: &mut [u8; BLOCK_BYTES]) -> Result<(), SharedPageError>;
}

/// Why a slot could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SharedPageError {
    /// Nothing was ever written there.
    #[error("there is nothing in slot {}", .0.0)]
    Empty(Slot),
    /// The pages themselves failed.
    #[error("cannot read slot {}", .slot.0)]
    Access {
        /// The slot.
        slot: Slot,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A target that holds nothing for other guests.
pub(crate) struct NoSharedPages;

impl SharedPages for NoSharedPages {
    fn read(&mut self, slot: Slot, _content: &mut Block) -> Result<(), SharedPageError> {
        Err(SharedPageError::Empty(slot))
    }
}

/// Shared pages in a vector, for tests and simulations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VecSharedPages {
    pages: Vec<Block>,
}

impl VecSharedPages {
    /// Gives each of `contents` ([`Decoded::kept`](crate::Decoded::kept)) a slot; the slots, in order.
    pub fn keep(&mut self, contents: &[u8]) -> Vec<Slot> {
        let first = self.pages.len() as u64;
        self.pages.extend_from_slice(contents.as_chunks().0);
        (first..self.pages.len() as u64).map(Slot).collect()
    }
}

impl SharedPages for VecSharedPages {
    fn read(&mut self, slot: Slot, content: &mut Block) -> Result<(), SharedPageError> {
        let page = usize::try_from(slot.0).ok().and_then(|index| self.pages.get(index));
        *content = *page.ok_or(SharedPageError::Empty(slot))?;
        Ok(())
    }
}
