//! Arbitrary bytes as what a repository has: a manifest of an image that is one, or no manifest; a chunk within its limits.

#![no_main]

use bytes::Bytes;
use godwit_block::{
    CHUNK_BYTES,
    repository::{
        manifest::{ChunkDigest, Manifest},
        packed::{pack, unpack},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::decode(bytes) {
        assert!(manifest.content().count() <= manifest.geometry().chunk_count() as usize);
        assert_eq!(manifest.encode(), bytes);
    }
    if let Ok(content) = unpack(&Bytes::copy_from_slice(bytes), ChunkDigest::of(bytes)) {
        assert!(content.len() as u64 <= CHUNK_BYTES);
    }
    let packed = pack(bytes).expect("there is memory");
    assert_eq!(unpack(&packed.into(), ChunkDigest::of(bytes)).expect("it was packed here"), bytes);
});
