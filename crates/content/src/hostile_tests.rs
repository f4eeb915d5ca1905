//! Guests that write what is worst for the engine: it grows beyond no bound, and is slower by no more than a factor.
//!
//! xxh3 has no secret, so a guest can choose contents that meet in the index. What it gains is bounded by
//! construction: a bucket has eight entries, and whoever follows one compares bytes before believing it.

use std::time::{Duration, Instant};

use crate::*;

const BLOCKS: usize = 2048;
const BASE_BYTES: usize = 2 << 20;

/// What a guest's memory holds at a step, block by block.
type Content = fn(step: u64, block: u64) -> Vec<u8>;

/// The contents, and whether everything in them meets in one bucket under one tag.
const GUESTS: [(&str, Content, bool); 8] = [
    ("text, a part rewritten", text, false),
    ("noise, always new", noise, false),
    ("two letters at random, always new", letters, false),
    ("matches of four bytes, always new", matches, false),
    ("every other byte changes", comb, false),
    ("a byte of every line changes", lines, false),
    ("alike but for the end, all collide", alike, true),
    ("repeats, all collide", repeats, true),
];

fn random(state: u64) -> u64 {
    xxhash_rust::xxh3::xxh3_64(&state.to_le_bytes())
}

fn words(mut word: impl FnMut(u64) -> u64) -> Vec<u8> {
    (0..BLOCK_BYTES as u64 / 8).flat_map(|index| word(index).to_le_bytes()).collect()
}

fn text(step: u64, block: u64) -> Vec<u8> {
    words(|index| random(block << 20 | index | (u64::from(index < 16) * step) << 40) & 0x0f0f_0707_0f0f_0303)
}

fn noise(step: u64, block: u64) -> Vec<u8> {
    words(|index| random(step << 40 | block << 20 | index))
}

/// Much to try and little to find, for zstd.
fn letters(step: u64, block: u64) -> Vec<u8> {
    words(|index| random(step << 40 | block << 20 | index) & 0x0101_0101_0101_0101)
}

fn matches(step: u64, block: u64) -> Vec<u8> {
    words(|index| {
        let dice = random(step << 40 | block << 20 | index);
        random(dice % 64) & 0xffff_ffff | dice & !0xffff_ffff
    })
}

fn comb(step: u64, block: u64) -> Vec<u8> {
    let mut content = noise(0, block);
    content.iter_mut().step_by(2).for_each(|byte| *byte = byte.wrapping_add(step as u8));
    content
}

fn lines(step: u64, block: u64) -> Vec<u8> {
    let mut content = noise(0, block);
    content.iter_mut().step_by(64).for_each(|byte| *byte = byte.wrapping_add(step as u8));
    content
}

fn alike(step: u64, block: u64) -> Vec<u8> {
    let mut content = vec![7; BLOCK_BYTES];
    for sub_block in content.chunks_mut(SUB_BLOCK_BYTES) {
        let end = sub_block.len() - 8;
        sub_block[end..].copy_from_slice(&random(step << 40 | block).to_le_bytes());
    }
    content
}

fn repeats(step: u64, block: u64) -> Vec<u8> {
    noise(0, (block + step) % 9)
}

/// Sends everything twice and a half of it hot; the CPU time and the bytes that were put in.
fn send(content: Content, collide: bool, mut check: impl FnMut(&Encoder, &Batch)) -> (Duration, usize) {
    let key_of: fn(u128) -> u64 = if collide { |_| 0 } else { |digest| digest as u64 };
    let mut encoder = Encoder::with_keys(EncoderLimits { base_bytes: BASE_BYTES, level: 1 }, key_of);
    let (mut compressor, mut spent, mut bytes) = (Compressor::new(), Duration::ZERO, 0);
    for step in 0..3_u64 {
        for first in (0..BLOCKS as u64).step_by(BATCH_BLOCKS) {
            let ids: Vec<u64> = (first..first + BATCH_BLOCKS as u64).collect();
            let versions: Vec<_> =
                ids.iter().map(|id| BlockVersion { id: BlockId(*id), hot: id % 2 == 0 }).collect();
            let contents: Vec<u8> = ids.iter().flat_map(|id| content(step, *id)).collect();
            bytes += contents.len();
            let start = Instant::now();
            let batch = encoder.draft(&versions, contents).seal(&mut compressor);
            spent += start.elapsed();
            check(&encoder, &batch);
        }
    }
    (spent, bytes)
}

#[test]
fn no_guest_makes_the_engine_or_a_batch_larger_than_their_bounds() {
    let raw_bytes = BATCH_BLOCKS * BLOCK_BYTES;
    for (name, content, collide) in GUESTS {
        send(content, collide, |encoder, batch| {
            assert!(encoder.cached_bytes() <= BASE_BYTES, "{name}: {} bytes kept", encoder.cached_bytes());
            // At worst a batch is its blocks, ids and forms, and what zstd adds to what it can't shorten.
            assert!(batch.bytes.len() <= raw_bytes + raw_bytes / 32, "{name}: {} bytes", batch.bytes.len());
        });
    }
}

#[test]
fn what_collides_is_rebuilt_all_the_same() {
    for (name, content, collide) in GUESTS {
        let mut decoder = Decoder::new(DecoderLimits { block_count: BLOCKS as u64 });
        let mut memory = VecMemory::zeroed(BLOCKS);
        send(content, collide, |encoder, batch| {
            decoder.decode(&batch.bytes, &mut memory).unwrap();
            assert_eq!(decoder.chain(), encoder.chain(), "{name}");
        });
        for block in 0..BLOCKS as u64 {
            assert_eq!(memory.block(BlockId(block))[..], content(2, block), "{name}, block {block}");
        }
    }
}

/// The figures of docs/bench/engine.md: `cargo test --release -p godwit-content -- --ignored --nocapture worst`.
#[test]
#[ignore = "a measurement"]
fn worst_guests_measured() {
    for (name, content, collide) in GUESTS {
        let rate = |_| {
            let (spent, bytes) = send(content, collide, |_, _| {});
            bytes as f64 / spent.as_secs_f64() / 1e9
        };
        let best = (0..5).map(rate).fold(0.0, f64::max);
        println!("{name:<40} {best:5.2} GB/s");
    }
}
