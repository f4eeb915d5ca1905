//! What a target has kept of an earlier session that broke: digests of each block, a sub-block at a time, so that what is
//! still the same isn't sent again.
//!
//! The digests are 64 bits. Contents that differ and share one are found out when the batch is decoded, by the digest
//! over its contents; the session then fails as with any damaged batch.

use xxhash_rust::xxh3::xxh3_64;

use crate::{Block, BlockId, SUB_BLOCKS, sub_blocks};

/// Stands for "nothing is known of this".
const UNKNOWN: u64 = 0;

/// Digests of a block's sub-blocks.
pub type HeldDigests = [u64; SUB_BLOCKS];

/// Digests of the blocks that a target holds, by block; what is past the end isn't known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held(Vec<HeldDigests>);

impl Held {
    /// Takes digests as [`Held::digests`] makes them, from block 0 on; zeros where nothing is known.
    pub fn new(digests: Vec<HeldDigests>) -> Self {
        Self(digests)
    }

    /// The digests of a block; none is 0.
    pub fn digests(content: &Block) -> HeldDigests {
        sub_blocks(content).each_ref().map(|sub_block| xxh3_64(sub_block).max(UNKNOWN + 1))
    }

    /// Which sub-blocks the target holds just so. Whatever is sent next, it holds something else after that, so the
    /// answer is given once.
    pub(crate) fn take(&mut self, id: BlockId, content: &Block) -> [bool; SUB_BLOCKS] {
        let known = usize::try_from(id.0).ok().and_then(|index| self.0.get_mut(index));
        let known = known.map_or([UNKNOWN; SUB_BLOCKS], std::mem::take);
        if known == [UNKNOWN; SUB_BLOCKS] {
            return [false; SUB_BLOCKS];
        }
        let now = Self::digests(content);
        std::array::from_fn(|position| known[position] == now[position])
    }
}
