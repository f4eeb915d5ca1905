//! Names for what is moved.

/// A block of 4,096 bytes, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u64);

/// A block to be sent in the version that it has now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockVersion {
    /// Which block.
    pub id: BlockId,
    /// It has been rewritten before and will probably be again, so its base is worth keeping.
    pub hot: bool,
}
