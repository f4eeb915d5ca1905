//! The source's only cache: what was last sent, found by content first and by id second (CloudNet, 6.4.2.3).
//!
//! Which blocks stay is decided by what they are worth as bases of deltas. Cold blocks fill free room and go first.
//! Hot blocks replace cold ones. Among hot blocks alone, a newcomer doesn't simply displace the oldest: hot blocks
//! are sent in sweeps, and if the sweep is longer than the cache, first-in-first-out and least-recently-used both
//! drop every block just before it comes round again. So each block earns credit when it is sent again, each
//! newcomer that finds no room takes one credit from the block at the front instead of its place, and only a block
//! without credit goes. A cache that holds a half of the hot blocks then serves a half of them.

use hashbrown::HashTable;

use crate::contents::Contents;
use crate::index::{ContentIndex, Place};
use crate::queue::{Queue, Queues};
use crate::{BLOCK_BYTES, Block, BlockId, BlockVersion, SUB_BLOCKS, SubBlock, sub_blocks};

/// Blocks as they were last sent, within a bound that counts pages (packed where there is little room), queues and
/// indices.
///
/// What a slot holds is what the target's memory holds at that id, always: a block that is sent and doesn't stay
/// leaves no older version behind.
pub(crate) struct Bases {
    contents: Contents,
    owners: Vec<u64>,
    credits: Vec<u8>,
    queues: Queues,
    by_id: HashTable<u32>,
    by_content: ContentIndex,
}

/// A sub-block of a block as the target has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    pub(crate) id: BlockId,
    pub(crate) sub_block: u8,
}

/// Where a block's content was seen before.
#[derive(Default)]
pub(crate) struct Seen {
    /// A block that equals it as a whole.
    pub(crate) whole: Option<BlockId>,
    /// Sub-blocks that equal its own.
    pub(crate) sub_blocks: [Option<Reference>; SUB_BLOCKS],
}

/// Index keys of a block's sub-blocks; `None` where there is nothing to find, as in a zero sub-block.
pub(crate) type Keys = [Option<u64>; SUB_BLOCKS];

/// The id table's entries: room for twice the slots, so that hashbrown tidies it in place and never grows it, at the
/// worst load before the next power of two, five bytes each.
const ID_TABLE_BYTES_PER_SLOT: usize = 23;

/// What a slot takes besides its content.
const TABLE_BYTES_PER_SLOT: usize = Contents::BYTES_PER_SLOT
    + size_of::<u64>()
    + size_of::<u8>()
    + Queues::BYTES_PER_SLOT
    + ContentIndex::BYTES_PER_SLOT
    + ID_TABLE_BYTES_PER_SLOT;

/// What a packed block takes, about. Where they take less, slots run out before memory does.
const PACKED_BYTES: usize = BLOCK_BYTES / 2;

/// What tables cost beyond their share of each slot (rounding up).
const FIXED_BYTES: usize = 256;

/// Credit of a block that was sent again while it was here.
const FULL_CREDIT: u8 = 2;

impl Bases {
    /// A cache whose memory, zstd's own aside, never exceeds `limit_bytes`; less than a few KiB means no cache.
    pub(crate) fn new(limit_bytes: usize) -> Self {
        let limit_bytes = limit_bytes.saturating_sub(FIXED_BYTES);
        let slots = limit_bytes / (TABLE_BYTES_PER_SLOT + PACKED_BYTES);
        let slots = slots.min(u32::MAX as usize / SUB_BLOCKS - 1);
        Self {
            contents: Contents::new(slots, limit_bytes - slots * TABLE_BYTES_PER_SLOT),
            owners: vec![0; slots],
            credits: vec![0; slots],
            queues: Queues::new(slots),
            by_id: HashTable::with_capacity(2 * slots),
            by_content: ContentIndex::new(slots),
        }
    }

    /// All memory in use, pages and tables.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.contents.memory_bytes()
            + self.owners.capacity() * size_of::<u64>()
            + self.credits.capacity()
            + self.queues.memory_bytes()
            + self.by_id.allocation_size()
            + self.by_content.memory_bytes()
    }

    /// The version of a block that the target has, if it is kept.
    pub(crate) fn get(&mut self, id: BlockId) -> Option<&Block> {
        self.slot_of(id).and_then(|slot| self.contents.get(slot))
    }

    /// Whether the version of a block that the target has is kept.
    pub(crate) fn holds(&self, id: BlockId) -> bool {
        self.slot_of(id).is_some()
    }

    /// Looks a block's content up, and compares it with what was found.
    pub(crate) fn find(&mut self, content: &Block, keys: &Keys) -> Seen {
        let mut seen = Seen::default();
        for (position, (sub_block, key)) in sub_blocks(content).iter().zip(keys).enumerate() {
            let Some(place) = key.and_then(|key| self.find_sub_block(sub_block, key)) else { continue };
            let id = BlockId(self.owners[place.slot as usize]);
            seen.sub_blocks[position] = Some(Reference { id, sub_block: place.sub_block });
            if usize::from(place.sub_block) == position && self.contents.get(place.slot) == Some(content) {
                let whole = |sub_block| Some(Reference { id, sub_block });
                return Seen { whole: Some(id), sub_blocks: [whole(0), whole(1), whole(2), whole(3)] };
            }
        }
        seen
    }

    /// Keeps a version that is being sent, if it is worth its room. Cold content is indexed by those `keys` that are
    /// given; hot content isn't, because it won't stay what it is.
    pub(crate) fn keep(&mut self, version: BlockVersion, content: &Block, keys: &Keys) {
        let Some(slot) = self.renew(version).or_else(|| self.admit(version)) else { return };
        while !self.contents.put(slot, content) {
            match self.evict(version.hot).filter(|victim| *victim != slot) {
                Some(victim) => self.release(victim),
                None => return self.release(slot),
            }
        }
        if version.hot {
            return;
        }
        for (sub_block, key) in (0..).zip(keys) {
            if let Some(key) = key {
                self.by_content.insert(*key, Place { slot, sub_block });
            }
        }
    }

    /// Drops a block: the target is about to have another version that isn't worth keeping.
    pub(crate) fn forget(&mut self, id: BlockId) {
        if let Some(slot) = self.slot_of(id) {
            self.release(slot);
        }
    }

    /// The slot of a block that is kept already, in the queue that it now belongs to.
    fn renew(&mut self, version: BlockVersion) -> Option<u32> {
        let slot = self.slot_of(version.id)?;
        match (version.hot, self.queues.queue_of(slot)) {
            (true, Queue::Hot) => self.credits[slot as usize] = FULL_CREDIT,
            (true, _) => self.enqueue(slot, Queue::Hot),
            (false, Queue::Cold) => {}
            (false, _) => self.enqueue(slot, Queue::Cold),
        }
        Some(slot)
    }

    /// A slot for a block that isn't kept yet, if one can be had.
    fn admit(&mut self, version: BlockVersion) -> Option<u32> {
        if self.queues.front(Queue::Free).is_none() {
            let victim = self.evict(version.hot)?;
            self.release(victim);
        }
        let slot = self.queues.front(Queue::Free)?;
        self.owners[slot as usize] = version.id.0;
        self.by_id.insert_unique(hash(version.id.0), slot, |slot| hash(self.owners[*slot as usize]));
        self.enqueue(slot, if version.hot { Queue::Hot } else { Queue::Cold });
        Some(slot)
    }

    /// The block that is to make room for a hot one; or takes a credit from the one that stays.
    fn evict(&mut self, for_hot: bool) -> Option<u32> {
        let oldest = self.queues.front(Queue::Cold).or_else(|| self.queues.front(Queue::Hot));
        let slot = oldest.filter(|_| for_hot)?;
        if self.queues.queue_of(slot) == Queue::Hot && self.credits[slot as usize] > 0 {
            self.credits[slot as usize] -= 1;
            self.queues.move_to_back(slot, Queue::Hot);
            return None;
        }
        Some(slot)
    }

    fn enqueue(&mut self, slot: u32, queue: Queue) {
        self.credits[slot as usize] = 1;
        self.queues.move_to_back(slot, queue);
    }

    /// Empties a slot.
    fn release(&mut self, slot: u32) {
        let owner = self.owners[slot as usize];
        if let Ok(entry) = self.by_id.find_entry(hash(owner), |other| *other == slot) {
            entry.remove();
        }
        self.contents.clear(slot);
        self.queues.move_to_back(slot, Queue::Free);
    }

    fn slot_of(&self, id: BlockId) -> Option<u32> {
        self.by_id.find(hash(id.0), |slot| self.owners[*slot as usize] == id.0).copied()
    }

    fn find_sub_block(&mut self, sub_block: &SubBlock, key: u64) -> Option<Place> {
        let Self { by_content, contents, .. } = self;
        by_content.candidates(key).find(|place| {
            let block = contents.get(place.slot);
            block.is_some_and(|block| sub_blocks(block)[usize::from(place.sub_block)] == *sub_block)
        })
    }
}

/// Spreads ids over the table: sequential ones, and those with equal low bits.
fn hash(id: u64) -> u64 {
    let product = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const NO_KEYS: Keys = [None; SUB_BLOCKS];

    /// A block that can't be packed.
    pub(crate) fn noise(seed: u64) -> Block {
        let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
    }

    /// A cache with room for so many blocks that can't be packed.
    fn bases(blocks: usize) -> Bases {
        let for_tables = Contents::WHOLE_BYTES * TABLE_BYTES_PER_SLOT / PACKED_BYTES;
        Bases::new(FIXED_BYTES + blocks * (Contents::WHOLE_BYTES + for_tables) + TABLE_BYTES_PER_SLOT)
    }

    fn keep(bases: &mut Bases, id: u64, hot: bool) {
        bases.keep(BlockVersion { id: BlockId(id), hot }, &noise(id), &NO_KEYS);
    }

    fn kept(bases: &mut Bases, ids: std::ops::Range<u64>) -> Vec<u64> {
        ids.filter(|id| bases.get(BlockId(*id)).is_some_and(|block| *block == noise(*id))).collect()
    }

    #[test]
    fn memory_stays_within_every_limit_even_when_full() {
        for limit_bytes in (0..40_000).step_by(97).chain([1 << 20, (3 << 20) + 12_345, 40 << 20]) {
            let mut bases = Bases::new(limit_bytes);
            let slots = bases.owners.len() as u64;
            for id in 0..slots * 5 {
                let hot = id % 3 != 0;
                match id % 2 {
                    0 => keep(&mut bases, id * 64, hot),
                    _ => bases.keep(BlockVersion { id: BlockId(id * 64), hot }, &[1; BLOCK_BYTES], &NO_KEYS),
                }
                bases.forget(BlockId(id * 32));
            }
            assert!(bases.memory_bytes() <= limit_bytes.max(FIXED_BYTES), "limit {limit_bytes}");
        }
    }

    #[test]
    fn cold_blocks_take_free_room_only_and_leave_first() {
        let mut bases = bases(3);
        (0..5).for_each(|id| keep(&mut bases, id, false));
        assert_eq!(kept(&mut bases, 0..5), [0, 1, 2]);
        keep(&mut bases, 9, true);
        assert_eq!(kept(&mut bases, 0..10), [1, 2, 9]);
        keep(&mut bases, 1, true);
        keep(&mut bases, 8, true);
        assert_eq!(kept(&mut bases, 0..10), [1, 8, 9]);
    }

    #[test]
    fn half_the_room_serves_half_of_a_sweep() {
        let mut bases = bases(50);
        let mut hits = 0;
        for _ in 0..20 {
            for id in 0..100 {
                hits += usize::from(bases.get(BlockId(id)).is_some());
                keep(&mut bases, id, true);
            }
        }
        assert!(hits > 19 * 40, "{hits} of {}", 19 * 100);
    }

    #[test]
    fn hot_blocks_that_cool_down_make_room() {
        let mut bases = bases(50);
        (0..50).cycle().take(500).for_each(|id| keep(&mut bases, id, true));
        (50..100).cycle().take(50 * 5).for_each(|id| keep(&mut bases, id, true));
        assert_eq!(kept(&mut bases, 0..100), (50..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_forgotten_or_replaced_version_is_never_found_by_content() {
        let mut bases = bases(4);
        let content = [7; BLOCK_BYTES];
        let keys = [Some(1), Some(2), Some(3), Some(4)];
        let version = BlockVersion { id: BlockId(1), hot: false };
        bases.keep(version, &content, &keys);
        assert_eq!(bases.find(&content, &keys).whole, Some(BlockId(1)));
        bases.keep(version, &[8; BLOCK_BYTES], &NO_KEYS);
        assert!(bases.find(&content, &keys).sub_blocks.iter().all(Option::is_none));
        bases.forget(BlockId(1));
        assert!(bases.find(&[8; BLOCK_BYTES], &keys).sub_blocks.iter().all(Option::is_none));
    }
}
