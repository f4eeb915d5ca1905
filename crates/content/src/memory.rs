//! The memory that a decoder rebuilds.

use crate::{BLOCK_BYTES, BlockId};

/// Blocks of a target: a paused guest's memory, a disk, or a vector in a test.
///
/// `contents` holds the blocks of `ids`, in order, [`BLOCK_BYTES`] each. The decoder calls [`read`](Memory::read) at
/// most once and then [`write`](Memory::write) at most once for a batch, each with different ids. Ids are below the
/// decoder's `block_count`; an implementation that has a stricter rule refuses with [`MemoryError::Refused`].
pub trait Memory {
    /// Fills `contents` with what the blocks hold now.
    fn read(&mut self, ids: &[BlockId], contents: &mut [u8]) -> Result<(), MemoryError>;

    /// Replaces the blocks by `contents`.
    fn write(&mut self, ids: &[BlockId], contents: &[u8]) -> Result<(), MemoryError>;
}

/// Why memory could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The block isn't one that this decoder may touch.
    #[error("block {id} may not be touched")]
    Refused {
        /// The block.
        id: BlockId,
    },
    /// The memory itself failed.
    #[error("cannot access memory")]
    Access(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Memory in a vector, for tests, examples and simulations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VecMemory {
    bytes: Vec<u8>,
}

impl VecMemory {
    /// `blocks` zero blocks.
    pub fn zeroed(blocks: usize) -> Self {
        Self { bytes: vec![0; blocks * BLOCK_BYTES] }
    }

    /// The content of a block.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block(&self, id: BlockId) -> &[u8] {
        &self.bytes.as_chunks::<BLOCK_BYTES>().0[id.0 as usize]
    }

    fn block_mut(&mut self, id: BlockId) -> Result<&mut [u8; BLOCK_BYTES], MemoryError> {
        let (blocks, _) = self.bytes.as_chunks_mut::<BLOCK_BYTES>();
        usize::try_from(id.0).ok().and_then(|index| blocks.get_mut(index)).ok_or(MemoryError::Refused { id })
    }
}

impl Memory for VecMemory {
    fn read(&mut self, ids: &[BlockId], contents: &mut [u8]) -> Result<(), MemoryError> {
        for (id, content) in ids.iter().zip(contents.as_chunks_mut::<BLOCK_BYTES>().0) {
            *content = *self.block_mut(*id)?;
        }
        Ok(())
    }

    fn write(&mut self, ids: &[BlockId], contents: &[u8]) -> Result<(), MemoryError> {
        for (id, content) in ids.iter().zip(contents.as_chunks::<BLOCK_BYTES>().0) {
            *self.block_mut(*id)? = *content;
        }
        Ok(())
    }
}
