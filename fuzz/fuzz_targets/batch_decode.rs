//! Arbitrary bytes as a batch: an error, or memory that changed in range; never a panic.

#![no_main]

use godwit_content::{Decoder, DecoderLimits, VecMemory, open_bytes};
use libfuzzer_sys::fuzz_target;

const BLOCKS: u64 = 8;
const LIMIT_BYTES: usize = 64 << 10;

fuzz_target!(|bytes: &[u8]| {
    let mut decoder = Decoder::new(DecoderLimits { block_count: BLOCKS });
    let mut memory = VecMemory::zeroed(BLOCKS as usize);
    let chain = decoder.chain();
    match decoder.decode(bytes, &mut memory) {
        Ok(decoded) => assert!(decoded.ids.iter().all(|id| id.0 < BLOCKS)),
        Err(_) => assert!(memory == VecMemory::zeroed(BLOCKS as usize) && decoder.chain() == chain),
    }
    if let Ok(opened) = open_bytes(bytes, LIMIT_BYTES) {
        assert!(opened.len() <= LIMIT_BYTES);
    }
});
