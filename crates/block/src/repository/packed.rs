//! A chunk as the repository keeps it: compressed if that pays.

use std::io;

use bytes::Bytes;
use thiserror::Error;

use super::manifest::ChunkDigest;
use crate::geometry::CHUNK_BYTES;

/// zstd's level: images are written once and read often, and higher levels gain a few per cent.
const LEVEL: i32 = 3;
const STORED: u8 = 0;
const COMPRESSED: u8 = 1;
/// Compression pays if it saves an eighth.
const WORTH_NUM: usize = 7;
const WORTH_DEN: usize = 8;

/// A chunk that isn't what it should be.
#[derive(Debug, Error)]
pub enum PackedError {
    /// It isn't kept as chunks are.
    #[error("it isn't a chunk: {0}")]
    Form(String),
    /// It can't be unpacked.
    #[error("it can't be unpacked")]
    Unpack(#[source] io::Error),
    /// Its content is another.
    #[error("its content isn't what its name says")]
    Digest,
}

/// Packs a chunk's content.
///
/// # Errors
/// What zstd says, which it does for want of memory.
pub fn pack(content: &[u8]) -> io::Result<Vec<u8>> {
    let compressed = zstd::bulk::compress(content, LEVEL)?;
    let worth = compressed.len() * WORTH_DEN < content.len() * WORTH_NUM;
    let (form, bytes) = if worth { (COMPRESSED, compressed.as_slice()) } else { (STORED, content) };
    Ok([&[form], bytes].concat())
}

/// Unpacks a chunk and verifies that its content is the one of which `digest` is the digest.
///
/// # Errors
/// [`PackedError`] says what is wrong with it.
pub fn unpack(packed: &Bytes, digest: ChunkDigest) -> Result<Bytes, PackedError> {
    let (form, bytes) = packed.split_first().ok_or_else(|| PackedError::Form("it is empty".into()))?;
    let content = match *form {
        STORED if bytes.len() as u64 <= CHUNK_BYTES => packed.slice(1..),
        STORED => return Err(PackedError::Form(format!("it has {} bytes", bytes.len()))),
        COMPRESSED => {
            zstd::bulk::decompress(bytes, CHUNK_BYTES as usize).map_err(PackedError::Unpack)?.into()
        }
        other => return Err(PackedError::Form(format!("it is kept in form {other}"))),
    };
    if ChunkDigest::of(&content) == digest { Ok(content) } else { Err(PackedError::Digest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pays_is_compressed_and_what_does_not_is_not() {
        let plain = b"the same again ".repeat(1000);
        let mut random = vec![0; 100_000];
        fastrand::Rng::with_seed(1).fill(&mut random);
        for (content, form) in [(plain, COMPRESSED), (random, STORED)] {
            let packed = pack(&content).expect("there is memory");
            assert_eq!(packed[0], form);
            assert_eq!(unpack(&packed.into(), ChunkDigest::of(&content)).expect("it is whole"), content);
        }
    }

    #[test]
    fn every_damage_is_found() {
        let mut random = vec![0; 3000];
        fastrand::Rng::with_seed(2).fill(&mut random);
        for content in [b"some content, and more of it ".repeat(100), random] {
            let packed = pack(&content).expect("there is memory");
            for at in 0..packed.len() {
                let mut damaged = packed.clone();
                damaged[at] ^= 0x10;
                // Some bits of zstd's header say nothing about the content.
                let same = unpack(&damaged.clone().into(), ChunkDigest::of(&content))
                    .is_ok_and(|unpacked| unpacked == content);
                let refused = unpack(&damaged.clone().into(), ChunkDigest::of(&content)).is_err();
                assert!(refused || same && packed[0] == COMPRESSED && at < 10, "byte {at}");
            }
        }
        assert!(unpack(&Bytes::new(), ChunkDigest::ZERO).is_err());
    }

    #[test]
    fn no_more_is_unpacked_than_a_chunk_has() {
        let bomb =
            [&[COMPRESSED], zstd::bulk::compress(&vec![0; 1 << 24], 1).expect("memory").as_slice()].concat();
        assert!(matches!(unpack(&bomb.into(), ChunkDigest::ZERO), Err(PackedError::Unpack(_))));
    }
}
