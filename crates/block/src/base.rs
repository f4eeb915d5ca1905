//! What must be known of a disk's base without fetching any of it.

use crate::geometry::{ChunkIndex, Geometry};

/// Which chunks of a disk's base are zero: a bit each. What a disk has beyond its image is zero too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseOutline {
    /// Chunks that aren't zero.
    content: Vec<u64>,
}

impl BaseOutline {
    /// The base of a disk that began as nothing.
    pub fn blank() -> Self {
        Self { content: Vec::new() }
    }

    /// The base of which `content` are the chunks that aren't zero.
    pub fn new(geometry: Geometry, content: impl Iterator<Item = ChunkIndex>) -> Self {
        let mut outline = Self { content: vec![0; geometry.chunk_count().div_ceil(64) as usize] };
        for chunk in content {
            outline.content[(chunk.0 / 64) as usize] |= 1 << (chunk.0 % 64);
        }
        outline
    }

    /// Whether the base has nothing but zeros there.
    pub fn is_zero(&self, chunk: ChunkIndex) -> bool {
        let word = self.content.get((chunk.0 / 64) as usize).copied().unwrap_or(0);
        word >> (chunk.0 % 64) & 1 == 0
    }
}
