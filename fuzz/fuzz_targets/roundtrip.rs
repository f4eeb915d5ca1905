//! Any sequence of changes and batches: the target has what the source had.

#![no_main]

use arbitrary::Arbitrary;
use godwit_content::{
    BATCH_BLOCKS, BLOCK_BYTES, BlockId, BlockVersion, Compressor, Decoder, DecoderLimits, Encoder,
    EncoderLimits, SUB_BLOCK_BYTES, VecMemory,
};
use libfuzzer_sys::fuzz_target;

const BLOCKS: usize = 16;

#[derive(Arbitrary, Debug)]
struct Input {
    base_bytes: u16,
    level: i8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Fill { block: u8, byte: u8 },
    Copy { from: u8, to: u8, rotate_sub_blocks: u8 },
    Write { block: u8, offset: u16, bytes: Vec<u8> },
    Scatter { block: u8, every: u8, add: u8 },
    Send { blocks: Vec<(u8, bool)> },
}

fuzz_target!(|input: Input| {
    let limits = EncoderLimits { base_bytes: input.base_bytes.into(), level: (input.level % 4).into() };
    let mut encoder = Encoder::new(limits);
    let mut compressor = Compressor::new();
    let mut decoder = Decoder::new(DecoderLimits { block_count: BLOCKS as u64 });
    let mut target = VecMemory::zeroed(BLOCKS);
    let mut source = vec![[0; BLOCK_BYTES]; BLOCKS];
    for step in input.steps {
        let Step::Send { blocks } = step else {
            change(&step, &mut source);
            continue;
        };
        let version =
            |(block, hot): &(u8, bool)| BlockVersion { id: BlockId((index(*block)) as u64), hot: *hot };
        let versions: Vec<_> = blocks.iter().take(BATCH_BLOCKS).map(version).collect();
        let contents: Vec<u8> = versions.iter().flat_map(|version| source[version.id.0 as usize]).collect();
        let batch = encoder.draft(&versions, contents).seal(&mut compressor);
        decoder.decode(&batch.bytes, &mut target).expect("an honest batch decodes");
        for version in &versions {
            assert_eq!(target.block(version.id), source[version.id.0 as usize]);
        }
        assert_eq!(encoder.chain(), decoder.chain());
    }
});

fn change(step: &Step, source: &mut [[u8; BLOCK_BYTES]]) {
    match step {
        Step::Fill { block, byte } => source[index(*block)].fill(*byte),
        Step::Copy { from, to, rotate_sub_blocks } => {
            source[index(*to)] = source[index(*from)];
            source[index(*to)].rotate_left(usize::from(rotate_sub_blocks % 4) * SUB_BLOCK_BYTES);
        }
        Step::Write { block, offset, bytes } => {
            let targets = &mut source[index(*block)][usize::from(*offset) % BLOCK_BYTES..];
            targets.iter_mut().zip(bytes).for_each(|(target, byte)| *target = *byte);
        }
        Step::Scatter { block, every, add } => {
            let bytes = source[index(*block)].iter_mut().step_by(usize::from(*every).max(1));
            bytes.for_each(|byte| *byte = byte.wrapping_add(*add));
        }
        Step::Send { .. } => {}
    }
}

fn index(block: u8) -> usize {
    usize::from(block) % BLOCKS
}
