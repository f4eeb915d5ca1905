//! Arbitrary bytes as a batch: an error, or memory that changed in range; never a panic.

#![no_main]

use godwit_content::{BLOCK_BYTES, Decoder, DecoderLimits, VecMemory, VecSharedPages, open_bytes};
use libfuzzer_sys::fuzz_target;

const BLOCKS: u64 = 8;
/// Pages of other guests.
const SLOTS: usize = 3;
const LIMIT_BYTES: usize = 64 << 10;

fuzz_target!(|bytes: &[u8]| {
    let mut decoder = Decoder::new(DecoderLimits { block_count: BLOCKS });
    let mut memory = VecMemory::zeroed(BLOCKS as usize);
    let mut shared = VecSharedPages::default();
    shared.keep(&[7; SLOTS * BLOCK_BYTES]);
    let chain = decoder.chain();
    match decoder.decode_sharing(bytes, &mut memory, &mut shared) {
        Ok(decoded) => {
            assert!(decoded.ids.iter().all(|id| id.0 < BLOCKS));
            assert!(decoded.kept.len() <= decoded.ids.len() * BLOCK_BYTES);
        }
        Err(_) => assert!(memory == VecMemory::zeroed(BLOCKS as usize) && decoder.chain() == chain),
    }
    if let Ok(opened) = open_bytes(bytes, LIMIT_BYTES) {
        assert!(opened.len() <= LIMIT_BYTES);
    }
});
