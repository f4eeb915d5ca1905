//! What a target has kept of an earlier session that broke: a digest of each block, so that a block which is still the
//! same isn't sent again.
//!
//! The digests are 64 bits. Two blocks that differ and share one are found out when the batch is decoded, by the digest
//! over its contents; the session then fails as with any damaged batch.

use xxhash_rust::xxh3::xxh3_64;

use crate::{Block, BlockId};

/// Stands for "nothing is known of this block".
const UNKNOWN: u64 = 0;

/// Digests of the blocks that a target holds, by block; what is past the end isn't known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held(Vec<u64>);

impl Held {
    /// Takes digests as [`Held::digest`] makes them, from block 0 on.
    pub fn new(digests: Vec<u64>) -> Self {
        Self(digests)
    }

    /// The digest of a block; never 0, which says that nothing is known.
    pub fn digest(content: &Block) -> u64 {
        xxh3_64(content).max(UNKNOWN + 1)
    }

    /// Whether the target holds just this content of the block. Whatever is sent next, it holds something else after
    /// that, so the answer is given once.
    pub(crate) fn take(&mut self, id: BlockId, content: &Block) -> bool {
        let Some(digest) = usize::try_from(id.0).ok().and_then(|index| self.0.get_mut(index)) else {
            return false;
        };
        let known = std::mem::replace(digest, UNKNOWN);
        known != UNKNOWN && known == Self::digest(content)
    }
}
