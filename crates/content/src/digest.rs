//! Digests: one pass of xxh3-128 over each sub-block serves the content index and the running digest.

use std::fmt;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::{BATCH_BLOCKS, Block, BlockId, SUB_BLOCK_BYTES, SUB_BLOCKS, is_zero, sub_blocks};

/// The running digest of everything that was sent or decoded, in order: ids and contents.
///
/// Equal chains at source and target mean that the target rebuilt every block that the source sent. xxh3-128 guards
/// against mistakes, not against an adversary: the session's TLS does that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Chain([u8; 16]);

impl Chain {
    /// The digest as it is sent.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// A digest that was received.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:032x}", u128::from_le_bytes(self.0))
    }
}

/// The digests of a block's sub-blocks.
pub(crate) type Digests = [u128; SUB_BLOCKS];

/// The digests of a block. Zero sub-blocks, which are many, cost no hashing.
pub(crate) fn digests(block: &Block) -> Digests {
    sub_blocks(block).each_ref().map(|sub_block| match is_zero(sub_block) {
        true => *ZERO,
        false => xxh3_128(sub_block),
    })
}

/// The digests of a zero block.
pub(crate) fn zero_digests() -> Digests {
    [*ZERO; SUB_BLOCKS]
}

static ZERO: LazyLock<u128> = LazyLock::new(|| xxh3_128(&[0; SUB_BLOCK_BYTES]));

/// Gathers a batch's ids and digests for the next link of the chain.
#[derive(Default)]
pub(crate) struct Link {
    input: Vec<u8>,
}

impl Link {
    /// Starts a batch that follows `previous`.
    pub(crate) fn start(&mut self, previous: Chain) {
        self.input.clear();
        self.input.reserve(16 + BATCH_BLOCKS * (8 + SUB_BLOCKS * 16));
        self.input.extend_from_slice(&previous.0);
    }

    pub(crate) fn push(&mut self, id: BlockId, digests: &Digests) {
        self.input.extend_from_slice(&id.0.to_le_bytes());
        for digest in digests {
            self.input.extend_from_slice(&digest.to_le_bytes());
        }
    }

    pub(crate) fn finish(&self) -> Chain {
        Chain(xxh3_128(&self.input).to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BLOCK_BYTES;

    #[test]
    fn the_short_cut_for_zeros_gives_the_true_digest() {
        assert_eq!(digests(&[0; BLOCK_BYTES]), [xxh3_128(&[0; SUB_BLOCK_BYTES]); SUB_BLOCKS]);
        assert_eq!(digests(&[0; BLOCK_BYTES]), zero_digests());
    }

    #[test]
    fn the_chain_depends_on_id_content_order_and_history() {
        let chain = |previous: Chain, blocks: &[(u64, u8)]| {
            let mut link = Link::default();
            link.start(previous);
            blocks.iter().for_each(|(id, fill)| link.push(BlockId(*id), &digests(&[*fill; BLOCK_BYTES])));
            link.finish()
        };
        let start = Chain::default();
        let chains = [
            chain(start, &[(1, 1), (2, 2)]),
            chain(start, &[(2, 2), (1, 1)]),
            chain(start, &[(1, 1), (3, 2)]),
            chain(start, &[(1, 1), (2, 3)]),
            chain(chain(start, &[]), &[(1, 1), (2, 2)]),
        ];
        for (position, one) in chains.iter().enumerate() {
            assert!(chains[..position].iter().all(|other| other != one));
        }
    }
}
