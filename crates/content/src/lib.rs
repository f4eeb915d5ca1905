//! The content engine: the cheapest lossless form of a block of memory or disk.
//!
//! A source drafts batches of up to [`BATCH_BLOCKS`] blocks with an [`Encoder`], any thread seals them with a
//! [`Compressor`], and the target rebuilds them with a [`Decoder`] straight into its [`Memory`]. For each block the
//! cheapest of these wins: zero; a reference to content that the target has, whole or by 1 KiB sub-block; the XOR
//! with the version last sent, as runs; the content itself. What is left is compressed with zstd, a batch at a time.
//! The format is drawn in `docs/wire-format.md`, section "Batch".
//!
//! The source keeps a bounded cache; the target's own memory is what references and deltas read. What guests that come
//! from one host have in common, the target keeps once for all of them ([`SharedPages`], found by [`SharedIndex`]).
//! Every reference is compared byte for byte before it is made, and every batch carries a digest, chained to the
//! batches before it, that the target checks before it writes anything.
//!
//! This crate may not do I/O, read a clock, use entropy or start threads, and it knows nothing of QEMU: the same bytes
//! in give the same bytes out. Bytes given to [`Decoder::decode`] and [`open_bytes`] are hostile until proven
//! otherwise: they cause errors, never panics, and no allocation beyond named limits.
//!
//! ```
//! use godwit_content::{
//!     BLOCK_BYTES, BlockId, BlockVersion, Compressor, Decoder, DecoderLimits, Encoder, EncoderLimits, VecMemory,
//! };
//!
//! let mut encoder = Encoder::new(EncoderLimits { base_bytes: 1 << 20, level: 1 });
//! let mut compressor = Compressor::new();
//! let mut decoder = Decoder::new(DecoderLimits { block_count: 16 });
//! let mut target = VecMemory::zeroed(16);
//!
//! let versions = [BlockVersion { id: BlockId(3), hot: false }];
//! let batch = encoder.draft(&versions, vec![7; BLOCK_BYTES]).seal(&mut compressor);
//! decoder.decode(&batch.bytes, &mut target)?;
//!
//! assert_eq!(target.block(BlockId(3)), [7; BLOCK_BYTES]);
//! assert_eq!(encoder.chain(), decoder.chain());
//! # Ok::<(), godwit_content::DecodeError>(())
//! ```

pub mod analyze;
mod bases;
mod batch;
mod changes;
mod compress;
mod contents;
mod decoder;
mod delta;
mod density;
mod digest;
mod draft;
mod encoder;
mod governor;
mod held;
#[cfg(test)]
mod hostile_tests;
mod index;
mod memory;
mod queue;
mod rebuild;
#[cfg(test)]
mod roundtrip_tests;
mod shared;
#[cfg(test)]
mod sharing_tests;
mod tally;

pub use compress::{Compressor, OpenError, open_bytes, seal_bytes};
pub use decoder::{DecodeError, Decoded, Decoder, DecoderLimits};
pub use digest::Chain;
pub use draft::{Batch, Draft};
pub use encoder::{Encoder, EncoderLimits, Techniques};
pub use governor::{Interval, LevelGovernor, Tried};
pub use held::{Held, HeldDigests};
pub use memory::{Memory, MemoryError, VecMemory};
pub use shared::{ContentDigest, SharedIndex, SharedPageError, SharedPages, Slot, VecSharedPages};
pub use tally::Tally;

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a block: a guest page, or a part of a disk chunk.
pub const BLOCK_BYTES: usize = 4096;

/// Bytes in a sub-block, the finer unit of references (CloudNet, 6.4.2.2: four to a page is the best trade).
pub const SUB_BLOCK_BYTES: usize = 1024;

/// The most blocks in one batch (256 KiB of content): enough for zstd to find what pages share, small enough that an
/// urgent batch doesn't wait long behind it on a slow link.
pub const BATCH_BLOCKS: usize = 64;

const SUB_BLOCKS: usize = BLOCK_BYTES / SUB_BLOCK_BYTES;

type Block = [u8; BLOCK_BYTES];
type SubBlock = [u8; SUB_BLOCK_BYTES];

/// Which block: for memory, the index of a guest page counted through all RAM blocks in the order of the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(pub u64);

impl fmt::Display for BlockId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// A block that is about to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockVersion {
    /// The block.
    pub id: BlockId,
    /// Likely to be written and sent again, so worth keeping as a delta base. The mover knows.
    pub hot: bool,
}

/// Whether every byte is zero; 128 bytes a step, because one OR a step hides the loads' latency.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<128>();
    let line_is_zero = |line: &[u8; 128]| {
        let (words, _) = line.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    };
    lines.iter().all(line_is_zero) && rest.iter().all(|byte| *byte == 0)
}

/// The sub-blocks of a block.
fn sub_blocks(block: &Block) -> &[SubBlock; SUB_BLOCKS] {
    let (sub_blocks, _) = block.as_chunks();
    sub_blocks.try_into().expect("a block is a whole number of sub-blocks")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_told_from_a_single_set_byte_anywhere() {
        let mut block = [0; BLOCK_BYTES];
        assert!(is_zero(&block));
        for position in 0..BLOCK_BYTES {
            block[position] = 1;
            assert!(!is_zero(&block), "byte {position}");
            block[position] = 0;
        }
    }
}
