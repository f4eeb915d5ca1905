//! What an image is made of: the digests of its chunks. An image's id is the digest of its manifest.
//!
//! ```text
//!   0       16        20  24     32
//!   ┌───────┬─────────┬───┬──────┬───────────────┬───────────────┬─ ─ ─
//!   │ magic │ version │ 0 │ size │ first digest  │ next digest   │         little-endian; digests are BLAKE3
//!   └───────┴─────────┴───┴──────┴───────────────┴───────────────┴─ ─ ─
//! ```
//!
//! A chunk that is zero has a digest of zeros and is nowhere kept. The last chunk is as short as the image is.

use thiserror::Error;

use crate::{
    geometry::{ChunkIndex, Geometry, SizeError},
    mapfile::BaseId,
    record::word,
};

const MAGIC: &[u8; 16] = b"godwit image\n\0\0\0";
/// The version of the manifests that this program writes.
const VERSION: u32 = 1;
/// Where the digests begin.
pub(crate) const HEADER_BYTES: usize = 32;
const DIGEST_BYTES: usize = 32;

/// The digest of a chunk's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkDigest(pub [u8; 32]);

impl ChunkDigest {
    /// That of a chunk that is zero, by agreement.
    pub const ZERO: Self = Self([0; 32]);

    /// That of `content`.
    pub fn of(content: &[u8]) -> Self {
        if is_zero(content) { Self::ZERO } else { Self(blake3::hash(content).into()) }
    }
}

/// Whether there is nothing but zeros.
fn is_zero(content: &[u8]) -> bool {
    // Words first: a chunk that isn't zero is known by its beginning most of the time.
    let (words, rest) = content.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    geometry: Geometry,
    digests: Vec<ChunkDigest>,
}

/// Bytes that are no manifest.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    /// They don't begin as one.
    #[error("it is no manifest of an image")]
    Magic,
    /// It is of a version that this program doesn't know.
    #[error("it is of version {0}, and this program knows versions up to {VERSION}")]
    Newer(u32),
    /// Its size is none.
    #[error("its image can't be")]
    Size(#[from] SizeError),
    /// It is too short or too long for its size.
    #[error("it tells of {found} chunks, and its size is that of {expected}")]
    Length {
        /// As many there are.
        found: usize,
        /// As many there should be.
        expected: usize,
    },
}

impl Manifest {
    /// An image of these chunks: as many as the geometry has.
    pub fn new(geometry: Geometry, digests: Vec<ChunkDigest>) -> Self {
        debug_assert_eq!(digests.len(), geometry.chunk_count() as usize);
        Self { geometry, digests }
    }

    /// The image's size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The digest of a chunk; zero beyond the image's end.
    pub fn digest(&self, chunk: ChunkIndex) -> ChunkDigest {
        self.digests.get(chunk.0 as usize).copied().unwrap_or(ChunkDigest::ZERO)
    }

    /// The chunks that aren't zero, with their digests.
    pub fn content(&self) -> impl Iterator<Item = (ChunkIndex, ChunkDigest)> {
        let chunks = self.geometry.chunks().zip(self.digests.iter().copied());
        chunks.filter(|&(_, digest)| digest != ChunkDigest::ZERO)
    }

    /// As it is kept.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.digests.len() * DIGEST_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.geometry.size_bytes().to_le_bytes());
        self.digests.iter().for_each(|digest| bytes.extend_from_slice(&digest.0));
        bytes
    }

    /// The image's id.
    pub fn id(&self) -> BaseId {
        BaseId(blake3::hash(&self.encode()).into())
    }

    /// The manifest in `bytes`.
    ///
    /// # Errors
    /// [`ManifestError`] says why they are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let (header, digests) = bytes.split_first_chunk().ok_or(ManifestError::Magic)?;
        let geometry = decode_header(header)?;
        let (digests, cut) = digests.as_chunks::<DIGEST_BYTES>();
        let expected = geometry.chunk_count() as usize;
        if digests.len() != expected || !cut.is_empty() {
            return Err(ManifestError::Length { found: digests.len(), expected });
        }
        Ok(Self { geometry, digests: digests.iter().map(|digest| ChunkDigest(*digest)).collect() })
    }
}

/// The size of the image that a manifest beginning like this is of.
pub(crate) fn decode_header(header: &[u8; HEADER_BYTES]) -> Result<Geometry, ManifestError> {
    if &header[..16] != MAGIC {
        return Err(ManifestError::Magic);
    }
    let version = word(header, 16) as u32;
    if version != VERSION {
        return Err(ManifestError::Newer(version));
    }
    Ok(Geometry::new(word(header, 24))?)
}

/// Where a chunk's digest stands in a manifest.
pub(crate) fn digest_at(chunk: ChunkIndex) -> u64 {
    HEADER_BYTES as u64 + u64::from(chunk.0) * DIGEST_BYTES as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_manifest_is_read_as_it_was_written(sectors in 1..4096_u64, seed: u8) {
            let geometry = Geometry::new(sectors * 512).expect("a good size");
            let digest = |chunk: ChunkIndex| match chunk.0 % 3 {
                0 => ChunkDigest::ZERO,
                _ => ChunkDigest([seed.wrapping_add(chunk.0 as u8); 32]),
            };
            let manifest = Manifest::new(geometry, geometry.chunks().map(digest).collect());
            let bytes = manifest.encode();
            prop_assert_eq!(Manifest::decode(&bytes), Ok(manifest));
            prop_assert!(Manifest::decode(&bytes[..bytes.len() - 1]).is_err());
        }

        #[test]
        fn bytes_that_are_none_are_refused(bytes: Vec<u8>) {
            prop_assert!(Manifest::decode(&bytes).is_err());
        }
    }

    #[test]
    fn zeros_are_known() {
        assert_eq!(ChunkDigest::of(&[0; 5000]), ChunkDigest::ZERO);
        let mut content = [0; 5000];
        content[4999] = 1;
        assert_ne!(ChunkDigest::of(&content), ChunkDigest::ZERO);
    }
}
