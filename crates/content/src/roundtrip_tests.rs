//! What must hold for encoder and decoder together, for any sequence of blocks and any bound.

use std::collections::HashSet;

use proptest::prelude::*;

use crate::*;

const BLOCKS: usize = 12;

/// The real keys, and two that make different contents collide.
const KEYS: [fn(u128) -> u64; 3] = [|digest| digest as u64, |_| 0, |digest| (digest as u64 & 1) << 32];

/// What happens to a block before it is sent.
#[derive(Clone, Debug)]
enum Change {
    Nothing,
    Zero,
    Fill(u8),
    Noise(u64),
    Copy { from: usize },
    Shift { from: usize, sub_blocks: usize },
    CopySubBlock { from: usize, from_sub_block: usize, to_sub_block: usize },
    Write { offset: usize, bytes: Vec<u8> },
    Count { step: u8 },
}

#[derive(Clone, Debug)]
struct Sent {
    block: usize,
    hot: bool,
    change: Change,
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    base_bytes: usize,
    level: i32,
    techniques: Techniques,
    key_of: fn(u128) -> u64,
    /// The source knows what the target's memory starts as.
    held: bool,
}

fn change() -> impl Strategy<Value = Change> {
    let block = 0..BLOCKS;
    prop_oneof![
        Just(Change::Nothing),
        Just(Change::Zero),
        any::<u8>().prop_map(Change::Fill),
        any::<u64>().prop_map(Change::Noise),
        block.clone().prop_map(|from| Change::Copy { from }),
        (block.clone(), 1..SUB_BLOCKS).prop_map(|(from, sub_blocks)| Change::Shift { from, sub_blocks }),
        (block, 0..SUB_BLOCKS, 0..SUB_BLOCKS).prop_map(|(from, from_sub_block, to_sub_block)| {
            Change::CopySubBlock { from, from_sub_block, to_sub_block }
        }),
        (0..BLOCK_BYTES, prop::collection::vec(any::<u8>(), 1..600))
            .prop_map(|(offset, bytes)| Change::Write { offset, bytes }),
        any::<u8>().prop_map(|step| Change::Count { step }),
    ]
}

fn batches() -> impl Strategy<Value = Vec<Vec<Sent>>> {
    let sent =
        (0..BLOCKS, any::<bool>(), change()).prop_map(|(block, hot, change)| Sent { block, hot, change });
    prop::collection::vec(prop::collection::vec(sent, 0..10), 1..12)
}

fn setting() -> impl Strategy<Value = Setting> {
    let base_bytes = prop_oneof![Just(0), 0..40_000usize, Just(1 << 20)];
    let technique = || prop::bool::weighted(0.8);
    let techniques = (technique(), technique(), technique(), technique(), technique()).prop_map(
        |(zero, reference, sub_block, delta, compress)| Techniques {
            zero,
            reference,
            shared: true,
            sub_block,
            delta,
            compress,
        },
    );
    (base_bytes, -5..4i32, techniques, prop::sample::select(&KEYS[..]), any::<bool>()).prop_map(
        |(base_bytes, level, techniques, key_of, held)| Setting {
            base_bytes,
            level,
            techniques,
            key_of,
            held,
        },
    )
}

/// A source and its target, whose memory starts as noise.
struct Pair {
    source: Vec<Block>,
    encoder: Encoder,
    compressor: Compressor,
    decoder: Decoder,
    target: StrictMemory,
}

impl Pair {
    fn new(setting: Setting) -> Self {
        let limits = EncoderLimits { base_bytes: setting.base_bytes, level: setting.level };
        let mut encoder = Encoder::with_keys(limits, setting.key_of);
        encoder.set_techniques(setting.techniques);
        let mut target = VecMemory::zeroed(BLOCKS);
        let odd: Vec<_> = (0..BLOCKS as u64).filter(|id| id % 2 == 1).map(BlockId).collect();
        let noise: Vec<Block> = odd.iter().map(|id| noise(id.0)).collect();
        target.write(&odd, noise.as_flattened()).unwrap();
        if setting.held {
            let digest = |id| Held::digests(target.block(BlockId(id)).try_into().unwrap());
            encoder.assume_held(Held::new((0..BLOCKS as u64).map(digest).collect()));
        }
        Self {
            source: vec![[0; BLOCK_BYTES]; BLOCKS],
            encoder,
            compressor: Compressor::new(),
            decoder: Decoder::new(DecoderLimits { block_count: BLOCKS as u64 }),
            target: StrictMemory {
                memory: target,
                reads: 0,
                writes: 0,
                refuse_zeros: setting.techniques.zero,
            },
        }
    }

    fn encode(&mut self, batch: &[Sent]) -> Batch {
        let mut contents = Vec::new();
        let mut versions = Vec::new();
        for sent in batch {
            apply(&sent.change, sent.block, &mut self.source);
            contents.extend_from_slice(&self.source[sent.block]);
            versions.push(BlockVersion { id: BlockId(sent.block as u64), hot: sent.hot });
        }
        self.encoder.draft(&versions, contents).seal(&mut self.compressor)
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Decoded, DecodeError> {
        (self.target.reads, self.target.writes) = (0, 0);
        self.decoder.decode(bytes, &mut self.target)
    }
}

/// Memory that insists on how it is used.
struct StrictMemory {
    memory: VecMemory,
    reads: usize,
    writes: usize,
    refuse_zeros: bool,
}

impl Memory for StrictMemory {
    fn read(&mut self, ids: &[BlockId], contents: &mut [u8]) -> Result<(), MemoryError> {
        self.reads += 1;
        assert!(self.reads == 1 && self.writes == 0, "one read, before the write");
        assert_distinct(ids);
        self.memory.read(ids, contents)
    }

    fn write(&mut self, ids: &[BlockId], contents: &[u8]) -> Result<(), MemoryError> {
        self.writes += 1;
        assert_eq!(self.writes, 1);
        assert_distinct(ids);
        for (id, content) in ids.iter().zip(contents.chunks(BLOCK_BYTES)) {
            let needless = is_zero(content) && is_zero(self.memory.block(*id));
            assert!(!(self.refuse_zeros && needless), "zero written to zero block {id}");
        }
        self.memory.write(ids, contents)
    }
}

fn assert_distinct(ids: &[BlockId]) {
    assert!(!ids.is_empty());
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len(), "{ids:?}");
}

fn apply(change: &Change, block: usize, source: &mut [Block]) {
    let position = |sub_block: usize| sub_block * SUB_BLOCK_BYTES..(sub_block + 1) * SUB_BLOCK_BYTES;
    match change {
        Change::Nothing => {}
        Change::Zero => source[block].fill(0),
        Change::Fill(byte) => source[block].fill(*byte),
        Change::Noise(seed) => source[block] = noise(*seed),
        Change::Copy { from } => source[block] = source[*from],
        Change::Shift { from, sub_blocks } => {
            source[block] = source[*from];
            source[block].rotate_left(sub_blocks * SUB_BLOCK_BYTES);
        }
        Change::CopySubBlock { from, from_sub_block, to_sub_block } => {
            let copied = source[*from];
            source[block][position(*to_sub_block)].copy_from_slice(&copied[position(*from_sub_block)]);
        }
        Change::Write { offset, bytes } => {
            source[block][*offset..].iter_mut().zip(bytes).for_each(|(target, byte)| *target = *byte);
        }
        Change::Count { step } => {
            source[block].iter_mut().step_by(8).for_each(|byte| *byte = byte.wrapping_add(*step));
        }
    }
}

fn noise(seed: u64) -> Block {
    let mut block = [0; BLOCK_BYTES];
    for (position, word) in (0u64..).zip(block.as_chunks_mut::<8>().0) {
        *word = xxhash_rust::xxh3::xxh3_64_with_seed(&position.to_le_bytes(), seed).to_le_bytes();
    }
    block
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_target_gets_what_the_source_had(setting in setting(), batches in batches()) {
        let mut pair = Pair::new(setting);
        let mut sent = HashSet::new();
        for batch in &batches {
            let encoded = pair.encode(batch);
            let decoded = pair.decode(&encoded.bytes).unwrap();
            prop_assert_eq!(decoded.ids.len(), batch.len());
            prop_assert_eq!(encoded.tally.blocks(), batch.len() as u64);
            prop_assert_eq!(encoded.tally.zero_blocks, decoded.zero_blocks as u64);
            prop_assert_eq!(encoded.tally.encoded_bytes, encoded.bytes.len() as u64);
            sent.extend(batch.iter().map(|sent| sent.block));
            for block in &sent {
                prop_assert!(pair.target.memory.block(BlockId(*block as u64)) == pair.source[*block]);
            }
            prop_assert_eq!(pair.encoder.chain(), pair.decoder.chain());
            prop_assert!(pair.encoder.cached_bytes() <= setting.base_bytes.max(256));
        }
    }

    #[test]
    fn a_damaged_batch_changes_nothing_or_means_the_same(
        setting in setting(),
        batches in batches(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 0..3),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let mut pair = Pair::new(setting);
        for batch in &batches {
            let encoded = pair.encode(batch);
            let mut damaged = encoded.bytes.clone();
            damage.iter().for_each(|(position, flips)| damaged[position.index(encoded.bytes.len())] ^= flips);
            damaged.truncate(cut.map_or(damaged.len(), |cut| cut.index(encoded.bytes.len())));
            let (memory, chain) = (pair.target.memory.clone(), pair.decoder.chain());
            if pair.decode(&damaged).is_err() {
                prop_assert!(pair.target.memory == memory && pair.decoder.chain() == chain);
                pair.decode(&encoded.bytes).unwrap();
            }
            for sent in batch {
                prop_assert!(pair.target.memory.block(BlockId(sent.block as u64)) == pair.source[sent.block]);
            }
            prop_assert_eq!(pair.encoder.chain(), pair.decoder.chain());
        }
    }

    #[test]
    fn sealing_depends_on_the_draft_alone(setting in setting(), batches in batches()) {
        let (mut one, mut other) = (Pair::new(setting), Pair::new(setting));
        for batch in &batches {
            other.compressor = Compressor::new();
            prop_assert_eq!(one.encode(batch), other.encode(batch));
        }
    }
}

fn default_pair() -> Pair {
    Pair::new(Setting {
        base_bytes: 1 << 20,
        level: 1,
        techniques: Techniques::ALL,
        key_of: |digest| digest as u64,
        held: false,
    })
}

#[test]
fn what_the_target_holds_is_named_and_not_sent_until_it_changes() {
    let mut pair = default_pair();
    let held = |id: u64| if id % 2 == 1 { Held::digests(&noise(id)) } else { HeldDigests::default() };
    pair.encoder.assume_held(Held::new((0..BLOCKS as u64).map(held).collect()));
    let changes = [sent(3, Change::Noise(3)), sent(5, Change::Noise(6)), sent(7, Change::Noise(7))];
    let batch = pair.encode(&changes);
    assert_eq!((batch.tally.reference_blocks, batch.tally.literal_blocks), (2, 1));
    pair.decode(&batch.bytes).unwrap();
    pair.source[9] = noise(9);
    let batch = pair.encode(&[sent(9, Change::Write { offset: 5, bytes: vec![1; 9] })]);
    assert_eq!((batch.tally.partial_reference_blocks, batch.tally.literal_bytes), (1, 1024));
    pair.decode(&batch.bytes).unwrap();
    let batch = pair.encode(&[sent(3, Change::Fill(1)), sent(3, Change::Noise(3)), sent(7, Change::Zero)]);
    pair.decode(&batch.bytes).unwrap();
    for block in [3, 5, 7, 9] {
        assert!(pair.target.memory.block(BlockId(block)) == pair.source[block as usize]);
    }
}

#[test]
fn what_the_target_only_seems_to_hold_is_found_out() {
    let mut pair = default_pair();
    pair.source[2] = noise(2);
    pair.encoder.assume_held(Held::new(vec![Held::digests(&noise(2)); BLOCKS]));
    let batch = pair.encode(&[sent(2, Change::Nothing)]);
    assert!(matches!(pair.decode(&batch.bytes), Err(DecodeError::DigestDiffers { .. })));
}

fn sent(block: usize, change: Change) -> Sent {
    Sent { block, hot: false, change }
}

#[test]
fn each_form_is_used_where_it_is_cheapest() {
    let mut pair = default_pair();
    let write = Change::Write { offset: 10, bytes: vec![1; 100] };
    let changes = [
        sent(0, Change::Noise(0)),
        sent(1, Change::Zero),
        sent(2, Change::Copy { from: 0 }),
        sent(3, Change::Shift { from: 0, sub_blocks: 1 }),
        sent(0, write),
    ];
    let tally = pair.encode(&changes).tally;
    let blocks = [
        tally.literal_blocks,
        tally.zero_blocks,
        tally.reference_blocks,
        tally.partial_reference_blocks,
        tally.delta_blocks,
    ];
    assert_eq!(blocks, [1; 5]);
    assert_eq!((tally.literal_bytes, tally.delta_bytes), (4096, 104));
}

#[test]
fn random_pages_are_left_as_they_are_and_apart_from_others() {
    let mut pair = default_pair();
    let text = Change::Write { offset: 0, bytes: b"godwit ".repeat(BLOCK_BYTES / 7) };
    let batch = pair.encode(&[sent(0, Change::Noise(0)), sent(1, text), sent(2, Change::Noise(2))]);
    let excess = batch.bytes.len() - 2 * BLOCK_BYTES;
    assert!(excess < 150, "{excess} bytes more than the random pages");
    let of = |id| noise(id).to_vec();
    let place = |page: Vec<u8>| batch.bytes.windows(BLOCK_BYTES).position(|window| window == page).unwrap();
    assert_eq!(place(of(2)), place(of(0)) + BLOCK_BYTES);
    pair.decode(&batch.bytes).unwrap();
    assert!((0..3).all(|id| pair.target.memory.block(BlockId(id)) == pair.source[id as usize]));
}

#[test]
fn a_rewritten_page_is_compressed_rather_than_patched() {
    let mut pair = default_pair();
    pair.encode(&[sent(0, Change::Noise(0))]);
    pair.source[0][..2000].fill(7);
    let tally = pair.encode(&[sent(0, Change::Nothing)]).tally;
    assert_eq!(tally.delta_blocks, 1);
    assert!(tally.encoded_bytes < 300, "{tally:?}");
}

#[test]
fn a_batch_out_of_order_is_refused() {
    let mut pair = default_pair();
    let first = pair.encode(&[sent(0, Change::Noise(0))]);
    let second = pair.encode(&[sent(1, Change::Noise(1))]);
    assert!(matches!(pair.decode(&second.bytes), Err(DecodeError::DigestDiffers { .. })));
    pair.decode(&first.bytes).unwrap();
    assert!(matches!(pair.decode(&first.bytes), Err(DecodeError::DigestDiffers { .. })));
    pair.decode(&second.bytes).unwrap();
}

#[test]
fn a_block_beyond_the_end_is_refused() {
    let mut pair = default_pair();
    let batch = pair.encode(&[sent(BLOCKS - 1, Change::Noise(0))]);
    let mut decoder = Decoder::new(DecoderLimits { block_count: BLOCKS as u64 - 1 });
    let refusal = decoder.decode(&batch.bytes, &mut pair.target);
    assert!(matches!(refusal, Err(DecodeError::OutOfRange { id: BlockId(11), block_count: 11 })));
}

#[test]
fn a_draft_is_tried_at_the_next_level_and_sealed_at_its_own() {
    let words = |position: usize| (position / 7 * position / 11 % 251) as u8;
    let contents: Vec<u8> = (0..64 * BLOCK_BYTES).map(words).collect();
    let blocks: Vec<_> = (0..64).map(|id| BlockVersion { id: BlockId(id), hot: false }).collect();
    let draft = |level, compress| {
        let mut encoder = Encoder::new(EncoderLimits { base_bytes: 0, level });
        encoder.set_techniques(Techniques { compress, ..Techniques::ALL });
        encoder.draft(&blocks, contents.clone())
    };
    let mut compressor = Compressor::new();
    let above = draft(6, true).seal(&mut compressor).tally.encoded_bytes;
    let own = draft(3, true).seal(&mut compressor).tally.encoded_bytes;
    assert_ne!(own, above);
    let tried = draft(3, true);
    assert_eq!(tried.bytes_above(&mut compressor), Some(above));
    assert_eq!(tried.seal(&mut compressor).tally.encoded_bytes, own);
    assert_eq!(draft(9, true).bytes_above(&mut compressor), None);
    assert_eq!(draft(3, false).bytes_above(&mut compressor), None);
}

#[test]
fn a_draft_that_waits_with_nothing_to_send_keeps_no_contents() {
    let mut encoder = Encoder::new(EncoderLimits { base_bytes: 1 << 20, level: 1 });
    let blocks: Vec<_> = (0..64).map(|id| BlockVersion { id: BlockId(id), hot: false }).collect();
    let zeros = encoder.draft(&blocks, vec![0; 64 * BLOCK_BYTES]);
    assert_eq!((zeros.weight_bytes(), zeros.contents.len()), (0, 0));
    let sealed = zeros.seal(&mut Compressor::new());
    assert_eq!((sealed.tally.zero_blocks, sealed.tally.raw_bytes), (64, 64 * BLOCK_BYTES as u64));
    let one = encoder.draft(&blocks[..1], noise(1).to_vec());
    assert_eq!((one.weight_bytes(), one.contents.len()), (BLOCK_BYTES as u64, BLOCK_BYTES));
}
