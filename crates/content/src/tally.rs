//! What a batch was made of.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// Blocks and bytes by form. Every block is counted in exactly one of the `_blocks` fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Blocks that are all zero.
    pub zero_blocks: u64,
    /// Blocks that the target has elsewhere, whole.
    pub reference_blocks: u64,
    /// Blocks that the target has of another guest.
    pub shared_blocks: u64,
    /// Blocks of which at least one sub-block is a reference.
    pub partial_reference_blocks: u64,
    /// Blocks of which at least one sub-block is a delta and none a reference.
    pub delta_blocks: u64,
    /// Runs and changed bytes of all deltas, before compression.
    pub delta_bytes: u64,
    /// Blocks that are sent as they are, but for zero sub-blocks.
    pub literal_blocks: u64,
    /// Content that is sent as it is, before compression.
    pub literal_bytes: u64,
    /// What plain transfer would send.
    pub raw_bytes: u64,
    /// What is sent.
    pub encoded_bytes: u64,
}

impl Tally {
    /// All blocks.
    pub fn blocks(&self) -> u64 {
        self.zero_blocks
            + self.reference_blocks
            + self.shared_blocks
            + self.partial_reference_blocks
            + self.delta_blocks
            + self.literal_blocks
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.zero_blocks += other.zero_blocks;
        self.reference_blocks += other.reference_blocks;
        self.shared_blocks += other.shared_blocks;
        self.partial_reference_blocks += other.partial_reference_blocks;
        self.delta_blocks += other.delta_blocks;
        self.delta_bytes += other.delta_bytes;
        self.literal_blocks += other.literal_blocks;
        self.literal_bytes += other.literal_bytes;
        self.raw_bytes += other.raw_bytes;
        self.encoded_bytes += other.encoded_bytes;
    }
}
