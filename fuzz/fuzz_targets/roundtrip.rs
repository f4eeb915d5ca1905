//! Any sequence of changes and batches of two guests that share pages: each target has what its source had.

#![no_main]

use arbitrary::Arbitrary;
use godwit_content::{
    BATCH_BLOCKS, BLOCK_BYTES, BlockId, BlockVersion, Compressor, ContentDigest, Decoder, DecoderLimits,
    Encoder, EncoderLimits, SUB_BLOCK_BYTES, Slot, VecMemory, VecSharedPages,
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
    /// The other guest's turn.
    Other,
}

/// A guest on its way.
struct Guest {
    encoder: Encoder,
    decoder: Decoder,
    target: VecMemory,
    source: Vec<[u8; BLOCK_BYTES]>,
}

impl Guest {
    fn new(limits: EncoderLimits) -> Self {
        let mut encoder = Encoder::new(limits);
        encoder.shared_index().set_growing(true);
        Self {
            encoder,
            decoder: Decoder::new(DecoderLimits { block_count: BLOCKS as u64 }),
            target: VecMemory::zeroed(BLOCKS),
            source: vec![[0; BLOCK_BYTES]; BLOCKS],
        }
    }

    /// Sends blocks; what is kept of them, and where.
    fn send(&mut self, blocks: &[(u8, bool)], pages: &mut VecSharedPages) -> Vec<(ContentDigest, Slot)> {
        let version =
            |(block, hot): &(u8, bool)| BlockVersion { id: BlockId((index(*block)) as u64), hot: *hot };
        let versions: Vec<_> = blocks.iter().take(BATCH_BLOCKS).map(version).collect();
        let contents: Vec<u8> =
            versions.iter().flat_map(|version| self.source[version.id.0 as usize]).collect();
        let draft = self.encoder.draft(&versions, contents);
        let batch = draft.seal(&mut Compressor::new());
        let decoded = self.decoder.decode_sharing(&batch.bytes, &mut self.target, pages);
        let slots = pages.keep(&decoded.expect("an honest batch decodes").kept);
        assert_eq!(slots.len(), draft.kept().len());
        for version in &versions {
            assert_eq!(self.target.block(version.id), self.source[version.id.0 as usize]);
        }
        assert_eq!(self.encoder.chain(), self.decoder.chain());
        draft.kept().iter().copied().zip(slots).collect()
    }
}

fuzz_target!(|input: Input| {
    let limits = EncoderLimits { base_bytes: input.base_bytes.into(), level: (input.level % 4).into() };
    let (mut now, mut other) = (Guest::new(limits), Guest::new(limits));
    let mut pages = VecSharedPages::default();
    for step in input.steps {
        match &step {
            Step::Other => std::mem::swap(&mut now, &mut other),
            Step::Send { blocks } => {
                for (digest, slot) in now.send(blocks, &mut pages) {
                    now.encoder.shared_index().insert(digest, slot);
                    other.encoder.shared_index().insert(digest, slot);
                }
            }
            _ => change(&step, &mut now.source),
        }
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
        Step::Send { .. } | Step::Other => {}
    }
}

fn index(block: u8) -> usize {
    usize::from(block) % BLOCKS
}
