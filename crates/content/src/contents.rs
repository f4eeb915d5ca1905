//! The contents of the base cache's slots, within a bound: whole while there is room, packed by zstd where there isn't.
//!
//! ```text
//!   put ──► whole ──half of the room taken──► packed ──little of it changes──► packed, and what has changed since
//!             ▲    the oldest first      └──► dense: packing saves too little; stays whole         │
//!             └─────────────────────────────────────────────────────────────────── too much ───────┘
//! ```
//!
//! Packing a page costs about 13 µs of one core and unpacking 5 (get unpacks into a buffer of its own), where drafting a
//! delta takes 3; so a packed page that is written to isn't packed anew, and a dense one isn't tried again for a while.
//! Packing begins early, a page for each that comes, so that it doesn't hold up the link all at once when there is no
//! room left.

use std::collections::VecDeque;

use crate::changes;
use crate::compress::{Compressor, Decompressor};
use crate::density::is_dense;
use crate::{BLOCK_BYTES, Block};

/// zstd's level: pages alone hardly gain from more.
const LEVEL: i32 = 1;
/// A block that doesn't become smaller than this isn't worth the time to unpack it.
const PACKED_BYTES_MAX: usize = BLOCK_BYTES * 3 / 4;
/// What may have changed of a packed block; of more, little would be left to save.
const CHANGES_BYTES_MAX: usize = BLOCK_BYTES / 8;
/// How many versions of a dense block aren't tried either: most are written to in places, and stay dense.
const DENSE_FOR: u8 = 16;
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
    /// So many of them, at the end, say what has changed since it was packed.
    changes_bytes: u16,
    /// Packing was tried and saved too little; it isn't tried with so many versions.
    dense_for: u8,
    /// It stands in the queue of those that may be packed.
    is_queued: bool,
}

impl Slot {
    /// The block, packed or not, and what has changed since it was packed.
    fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(self.bytes.len() - usize::from(self.changes_bytes))
    }
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
        let (packed, changes) = self.slots[slot as usize].parts();
        if packed.is_empty() {
            return None;
        }
        if let Ok(whole) = <&Block>::try_from(packed) {
            return Some(whole);
        }
        if self.unpacked_slot != Some(slot) {
            let unpacked = self.decompressor.unpack(packed, &mut self.unpacked[..]);
            changes::apply(changes, &mut self.unpacked);
            self.unpacked_slot = unpacked.then_some(slot);
        }
        // What can't be unpacked is as good as not there, though what was packed here always can.
        self.unpacked_slot.map(|_| &*self.unpacked)
    }

    /// Puts a block into a slot, in place of what is there; false if there is no room for it: the slot is empty then.
    pub(crate) fn put(&mut self, slot: u32, content: &Block) -> bool {
        if self.change(slot, content) {
            return true;
        }
        let was_whole = self.slots[slot as usize].bytes.len() == BLOCK_BYTES;
        self.fill(slot, &[]);
        if !was_whole && self.used_bytes > self.limit_bytes / 2 {
            self.pack_oldest();
        }
        while self.used_bytes + Self::WHOLE_BYTES > self.limit_bytes {
            if !self.pack_oldest() {
                return false;
            }
        }
        self.fill(slot, content);
        let dense_for = &mut self.slots[slot as usize].dense_for;
        *dense_for = dense_for.saturating_sub(1);
        if !std::mem::replace(&mut self.slots[slot as usize].is_queued, true) {
            self.whole.push_back(slot);
        }
        true
    }

    /// Empties a slot.
    pub(crate) fn clear(&mut self, slot: u32) {
        self.fill(slot, &[]);
        self.slots[slot as usize].dense_for = 0;
    }

    /// Adds to a packed block what is new of it; false: it isn't packed, too much has changed, or there is no room.
    fn change(&mut self, slot: u32, content: &Block) -> bool {
        let at = slot as usize;
        let is_packed = !self.slots[at].bytes.is_empty() && self.slots[at].bytes.len() < BLOCK_BYTES;
        if !is_packed || self.get(slot).is_none() {
            return false;
        }
        let (packed, _) = self.slots[at].parts();
        let (packed_bytes, mut bytes) = (packed.len(), self.slots[at].bytes.to_vec());
        changes::push(&self.unpacked, content, &mut bytes);
        let changes_bytes = bytes.len() - packed_bytes;
        let more_bytes = allocated(bytes.len()) - allocated(self.slots[at].bytes.len());
        if changes_bytes > CHANGES_BYTES_MAX || self.used_bytes + more_bytes > self.limit_bytes {
            return false;
        }
        self.fill(slot, &bytes);
        self.slots[at].changes_bytes = changes_bytes as u16;
        (*self.unpacked, self.unpacked_slot) = (*content, Some(slot));
        true
    }

    fn fill(&mut self, slot: u32, bytes: &[u8]) {
        if self.unpacked_slot == Some(slot) {
            self.unpacked_slot = None;
        }
        let slot = &mut self.slots[slot as usize];
        let before = std::mem::replace(&mut slot.bytes, Box::from(bytes));
        slot.changes_bytes = 0;
        self.used_bytes = self.used_bytes + allocated(bytes.len()) - allocated(before.len());
    }

    /// Packs what has been whole for longest; false: there is nothing that might pack.
    fn pack_oldest(&mut self) -> bool {
        let Some(slot) = self.whole.pop_front() else { return false };
        let at = slot as usize;
        self.slots[at].is_queued = false;
        if self.slots[at].bytes.len() == BLOCK_BYTES && self.slots[at].dense_for == 0 {
            self.pack(slot);
        }
        true
    }

    fn pack(&mut self, slot: u32) {
        let at = slot as usize;
        let whole = <&Block>::try_from(&self.slots[at].bytes[..]).ok().filter(|block| !is_dense(block));
        let packed = whole.and_then(|block| self.compressor.compress(LEVEL, block)).map(Box::<[u8]>::from);
        match packed.filter(|packed| packed.len() <= PACKED_BYTES_MAX) {
            Some(packed) => self.fill(slot, &packed),
            None => self.slots[at].dense_for = DENSE_FOR,
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
    fn a_packed_block_that_changes_a_little_stays_packed() {
        let mut contents = contents(2);
        (0..3).for_each(|slot| assert!(contents.put(slot, &text(slot as u8))));
        assert!(contents.slots[0].bytes.len() < 200, "packed");
        let mut block = text(0);
        for position in (0..BLOCK_BYTES).step_by(97) {
            block[position] ^= 0xff;
            assert!(contents.put(0, &block));
            assert_eq!(contents.get(0), Some(&block), "{position}");
            assert_eq!(contents.get(1), Some(&text(1)));
            assert_eq!(contents.get(0), Some(&block), "unpacked again, {position}");
            if position < 10 * 97 {
                assert!(contents.slots[0].changes_bytes > 0, "{position}");
            }
        }
        assert!(contents.used_bytes <= contents.limit_bytes);
    }

    #[test]
    fn what_is_dense_is_tried_again_after_a_while() {
        let mut contents = contents(8);
        (0..8).for_each(|slot| assert!(contents.put(slot, &noise(u64::from(slot)))));
        assert_eq!(contents.slots[0].dense_for, DENSE_FOR);
        for left in (0..DENSE_FOR).rev() {
            assert!(contents.put(0, &text(left)));
            assert_eq!((contents.slots[0].dense_for, contents.slots[0].bytes.len()), (left, BLOCK_BYTES));
        }
        for _ in 0..4 {
            (1..8).for_each(|slot| contents.clear(slot));
            (1..8).for_each(|slot| assert!(contents.put(slot, &noise(u64::from(slot)))));
        }
        assert!(contents.slots[0].bytes.len() < BLOCK_BYTES && contents.get(0) == Some(&text(0)));
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
