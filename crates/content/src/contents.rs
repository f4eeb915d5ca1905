//! The contents of the base cache's slots, within a bound: whole while there is room, packed by zstd where there isn't.
//!
//! ```text
//!   put ──► whole ──half of the room taken──► packed          (get unpacks into a buffer of its own)
//!                  the oldest first      └──► dense, if packing saves too little; stays whole
//! ```
//!
//! Packing a page costs about 13 µs of one core and unpacking 5, and both only happen where memory is short; what the
//! link has to carry for a page without a base takes several times as long even at 1 Gbit/s. It begins early, a page for
//! each that comes, so that it doesn't hold up the link all at once when there is no room left.

use std::collections::VecDeque;

use crate::compress::{Compressor, Decompressor};
use crate::{BLOCK_BYTES, Block};

/// zstd's level: pages alone hardly gain from more.
const LEVEL: i32 = 1;
/// A block that doesn't become smaller than this isn't worth the time to unpack it.
const PACKED_BYTES_MAX: usize = BLOCK_BYTES * 3 / 4;
/// What the allocator adds to a piece of memory, and rounds its size up to.
const ALLOCATION_BYTES: usize = 16;

/// Contents by slot.
pub(crate) struct Contents {
    slots: Vec<Slot>,
    /// Slots whose contents may be packed, those that have been whole for longest first; some aren't any more.
    whole: VecDeque<u32>,
    used_bytes: usize,
    limit_bytes: usize,
    compressor: Compressor,
    decompressor: Decompressor,
    /// What was unpacked last, and of which slot it is.
    unpacked: Box<Block>,
    unpacked_slot: Option<u32>,
}

#[derive(Clone, Default)]
struct Slot {
    /// A block if it has the size of one, a packed one if it is shorter, nothing if it is empty.
    bytes: Box<[u8]>,
    /// Packing was tried and saved too little.
    is_dense: bool,
    /// It stands in the queue of those that may be packed.
    is_queued: bool,
}

impl Contents {
    /// What a slot takes, whatever is in it.
    pub(crate) const BYTES_PER_SLOT: usize = size_of::<Slot>() + size_of::<u32>();
    /// What a whole block takes.
    pub(crate) const WHOLE_BYTES: usize = allocated(BLOCK_BYTES);

    /// Empty slots for contents of at most `limit_bytes` together.
    pub(crate) fn new(slots: usize, limit_bytes: usize) -> Self {
        Self {
            slots: vec![Slot::default(); slots],
            whole: VecDeque::with_capacity(slots),
            used_bytes: 0,
            limit_bytes,
            compressor: Compressor::new(),
            decompressor: Decompressor::default(),
            unpacked: Box::new([0; BLOCK_BYTES]),
            unpacked_slot: None,
        }
    }

    /// All memory in use but for zstd's own.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.whole.capacity() * size_of::<u32>() + self.used_bytes
    }

    /// The content of a slot, unless it is empty.
    pub(crate) fn get(&mut self, slot: u32) -> Option<&Block> {
        let bytes = &self.slots[slot as usize].bytes;
        if bytes.is_empty() {
            return None;
        }
        if let Ok(whole) = <&Block>::try_from(&bytes[..]) {
            return Some(whole);
        }
        if self.unpacked_slot != Some(slot) {
            let unpacked = self.decompressor.unpack(bytes, &mut self.unpacked[..]);
            self.unpacked_slot = unpacked.then_some(slot);
        }
        // What can't be unpacked is as good as not there, though what was packed here always can.
        self.unpacked_slot.map(|_| &*self.unpacked)
    }

    /// Puts a block into a slot, in place of what is there; false if there is no room for it: the slot is empty then.
    pub(crate) fn put(&mut self, slot: u32, content: &Block) -> bool {
        self.clear(slot);
        if self.used_bytes > self.limit_bytes / 2 {
            self.pack_oldest();
        }
        while self.used_bytes + Self::WHOLE_BYTES > self.limit_bytes {
            if !self.pack_oldest() {
                return false;
            }
        }
        self.fill(slot, content);
        if !std::mem::replace(&mut self.slots[slot as usize].is_queued, true) {
            self.whole.push_back(slot);
        }
        true
    }

    /// Empties a slot.
    pub(crate) fn clear(&mut self, slot: u32) {
        self.fill(slot, &[]);
        self.slots[slot as usize].is_dense = false;
    }

    fn fill(&mut self, slot: u32, bytes: &[u8]) {
        if self.unpacked_slot == Some(slot) {
            self.unpacked_slot = None;
        }
        let before = std::mem::replace(&mut self.slots[slot as usize].bytes, Box::from(bytes));
        self.used_bytes = self.used_bytes + allocated(bytes.len()) - allocated(before.len());
    }

    /// Packs what has been whole for longest; false: there is nothing that might pack.
    fn pack_oldest(&mut self) -> bool {
        let Some(slot) = self.whole.pop_front() else { return false };
        let at = slot as usize;
        self.slots[at].is_queued = false;
        if self.slots[at].bytes.len() == BLOCK_BYTES && !self.slots[at].is_dense {
            self.pack(slot);
        }
        true
    }

    fn pack(&mut self, slot: u32) {
        let at = slot as usize;
        let packed = self.compressor.compress(LEVEL, &self.slots[at].bytes).map(Box::<[u8]>::from);
        match packed.filter(|packed| packed.len() <= PACKED_BYTES_MAX) {
            Some(packed) => self.fill(slot, &packed),
            None => self.slots[at].is_dense = true,
        }
    }
}

/// What a piece of memory of this size takes.
const fn allocated(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { bytes.next_multiple_of(ALLOCATION_BYTES) + ALLOCATION_BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bases::tests::noise;

    fn text(seed: u8) -> Block {
        std::array::from_fn(|position| (position / 512) as u8 ^ seed)
    }

    fn contents(whole_blocks: usize) -> Contents {
        Contents::new(100, whole_blocks * Contents::WHOLE_BYTES)
    }

    #[test]
    fn what_packs_well_fits_many_times_over_and_comes_back() {
        let mut contents = contents(4);
        for slot in 0..100 {
            assert!(contents.put(slot, &text(slot as u8)));
        }
        for slot in (0..100).rev() {
            assert_eq!(contents.get(slot), Some(&text(slot as u8)));
        }
        assert!(contents.used_bytes <= contents.limit_bytes);
    }

    #[test]
    fn packing_begins_when_half_of_the_room_is_taken_with_the_oldest() {
        let mut contents = contents(8);
        (0..8).for_each(|slot| assert!(contents.put(slot, &text(slot as u8))));
        let is_whole = |slot: &u32| contents.slots[*slot as usize].bytes.len() == BLOCK_BYTES;
        assert_eq!((0..8).filter(is_whole).collect::<Vec<_>>(), [3, 4, 5, 6, 7]);
    }

    #[test]
    fn what_does_not_pack_fills_the_room_and_is_not_tried_again() {
        let mut contents = contents(4);
        (0..4).for_each(|slot| assert!(contents.put(slot, &noise(u64::from(slot)))));
        assert!(!contents.put(4, &noise(4)) && contents.get(4).is_none());
        assert!(contents.whole.is_empty());
        contents.clear(2);
        assert!(contents.put(4, &noise(4)));
        assert_eq!(contents.get(4), Some(&noise(4)));
    }

    #[test]
    fn the_newest_content_is_what_a_slot_has_whether_it_was_packed_or_not() {
        let mut contents = contents(2);
        for round in 0..50 {
            assert!(contents.put(0, &text(round)) && contents.put(1, &text(round + 1)));
            assert_eq!(contents.get(0), Some(&text(round)));
            assert!(contents.put(0, &text(round + 2)));
            assert_eq!(contents.get(0), Some(&text(round + 2)));
            assert_eq!(contents.get(1), Some(&text(round + 1)));
        }
        contents.clear(0);
        assert_eq!(contents.get(0), None);
        assert!(contents.whole.len() <= 100);
    }
}
