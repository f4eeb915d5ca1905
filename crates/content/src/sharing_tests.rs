//! What must hold for several guests that share pages: each gets what it had, whatever was kept meanwhile, and what one
//! has sent costs the others nothing.

use std::collections::VecDeque;

use proptest::prelude::*;

use crate::*;

const GUESTS: usize = 3;
const BLOCKS: usize = 8;
/// Different contents; few, so that guests have the same.
const CONTENTS: u8 = 6;

#[derive(Clone, Debug)]
enum Step {
    /// A guest's blocks, each with the content that it has now and whether it is hot, are sent.
    Send { guest: usize, blocks: Vec<(usize, u8, bool)> },
    /// The oldest answers of the target to a guest arrive.
    Hear { guest: usize, answers: usize },
    /// A guest asks for more to be kept, or no longer.
    Grow { guest: usize, grows: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = prop::collection::vec((0..BLOCKS, 0..CONTENTS, prop::bool::weighted(0.2)), 0..6);
    prop_oneof![
        4 => (0..GUESTS, blocks).prop_map(|(guest, blocks)| Step::Send { guest, blocks }),
        3 => (0..GUESTS, 0..4usize).prop_map(|(guest, answers)| Step::Hear { guest, answers }),
        1 => (0..GUESTS, any::<bool>()).prop_map(|(guest, grows)| Step::Grow { guest, grows }),
    ]
}

/// A guest on its way: source and target.
struct Guest {
    source: Vec<Block>,
    encoder: Encoder,
    decoder: Decoder,
    target: VecMemory,
    /// What was asked to be kept, and where it went.
    answers: VecDeque<(Vec<ContentDigest>, Vec<Slot>)>,
}

impl Guest {
    fn new(base_bytes: usize) -> Self {
        let mut encoder = Encoder::new(EncoderLimits { base_bytes, level: 1 });
        encoder.shared_index().set_growing(true);
        Self {
            source: vec![[0; BLOCK_BYTES]; BLOCKS],
            encoder,
            decoder: Decoder::new(DecoderLimits { block_count: BLOCKS as u64 }),
            target: VecMemory::zeroed(BLOCKS),
            answers: VecDeque::new(),
        }
    }

    fn encode(&mut self, blocks: &[(usize, u8, bool)]) -> (Vec<ContentDigest>, Batch) {
        let (mut versions, mut contents) = (Vec::new(), Vec::new());
        for (block, fill, hot) in blocks {
            self.source[*block] = content(*fill);
            contents.extend_from_slice(&self.source[*block]);
            versions.push(BlockVersion { id: BlockId(*block as u64), hot: *hot });
        }
        let draft = self.encoder.draft(&versions, contents);
        (draft.kept().to_vec(), draft.seal(&mut Compressor::new()))
    }

    fn send(&mut self, blocks: &[(usize, u8, bool)], pages: &mut VecSharedPages) -> Tally {
        let (kept, batch) = self.encode(blocks);
        let decoded = self.decoder.decode_sharing(&batch.bytes, &mut self.target, pages).unwrap();
        let slots = pages.keep(&decoded.kept);
        assert_eq!(kept.len(), slots.len());
        self.answers.push_back((kept, slots));
        batch.tally
    }
}

/// Zero, a repeated byte, or noise with a zero sub-block in it.
fn content(number: u8) -> Block {
    let mut content = bases::tests::noise(number.into());
    match number {
        0 => content.fill(0),
        1 => content.fill(9),
        2 => content[SUB_BLOCK_BYTES..2 * SUB_BLOCK_BYTES].fill(0),
        _ => {}
    }
    content
}

/// What the target said to one guest is known to all.
fn hear(guests: &mut [Guest], guest: usize) {
    let Some((kept, slots)) = guests[guest].answers.pop_front() else { return };
    for guest in guests {
        for (digest, slot) in kept.iter().zip(&slots) {
            guest.encoder.shared_index().insert(*digest, *slot);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_guest_gets_what_it_had(
        base_bytes in prop_oneof![Just(0), Just(1usize << 20)],
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut guests: Vec<_> = (0..GUESTS).map(|_| Guest::new(base_bytes)).collect();
        let mut pages = VecSharedPages::default();
        for step in steps {
            match step {
                Step::Send { guest, blocks } => {
                    let guest = &mut guests[guest];
                    let tally = guest.send(&blocks, &mut pages);
                    prop_assert_eq!(tally.blocks(), blocks.len() as u64);
                    for (block, _, _) in blocks {
                        prop_assert_eq!(guest.target.block(BlockId(block as u64)), guest.source[block]);
                    }
                    prop_assert_eq!(guest.encoder.chain(), guest.decoder.chain());
                }
                Step::Hear { guest, answers } => (0..answers).for_each(|_| hear(&mut guests, guest)),
                Step::Grow { guest, grows } => guests[guest].encoder.shared_index().set_growing(grows),
            }
        }
    }

    #[test]
    fn slots_of_any_content_change_nothing_or_hold_what_was_promised(
        fills in prop::collection::vec(0..CONTENTS, BLOCKS),
        slots in prop::collection::vec(any::<prop::sample::Index>(), CONTENTS as usize),
        held in prop::collection::vec(0..CONTENTS, 0..4),
    ) {
        let mut guest = Guest::new(1 << 20);
        for (fill, slot) in (0..CONTENTS).zip(&slots) {
            guest.encoder.shared_index().insert(ContentDigest::of(&content(fill)), Slot(slot.index(6) as u64));
        }
        let mut pages = VecSharedPages::default();
        pages.keep(&held.into_iter().flat_map(content).collect::<Vec<_>>());
        let blocks: Vec<_> = fills.into_iter().enumerate().map(|(block, fill)| (block, fill, false)).collect();
        let batch = guest.encode(&blocks).1;
        match guest.decoder.decode_sharing(&batch.bytes, &mut guest.target, &mut pages) {
            Ok(_) => for (block, content) in guest.source.iter().enumerate() {
                prop_assert_eq!(guest.target.block(BlockId(block as u64)), content);
            },
            Err(error) => {
                prop_assert!(matches!(error, DecodeError::Shared(_) | DecodeError::SharedDiffers { .. }), "{error}");
                prop_assert!(guest.target == VecMemory::zeroed(BLOCKS));
                prop_assert_eq!(guest.decoder.chain(), Chain::default());
            }
        }
    }
}

fn pair() -> ([Guest; 2], VecSharedPages) {
    ([Guest::new(1 << 20), Guest::new(1 << 20)], VecSharedPages::default())
}

#[test]
fn what_one_guest_has_sent_is_named_by_the_other_once_the_target_has_said_so() {
    let (mut guests, mut pages) = pair();
    let sent = guests[0].send(&[(0, 2, false), (1, 3, false), (2, 3, false)], &mut pages);
    assert_eq!((sent.shared_blocks, sent.literal_blocks, sent.reference_blocks), (0, 2, 1));
    let unheard = guests[1].send(&[(5, 3, false)], &mut pages);
    assert_eq!((unheard.shared_blocks, unheard.literal_blocks), (0, 1));
    hear(&mut guests, 0);
    let heard = guests[1].send(&[(7, 2, false), (6, 3, false)], &mut pages);
    assert_eq!((heard.shared_blocks, heard.reference_blocks, heard.literal_bytes), (1, 1, 0));
    // What it got so is its own from then on.
    let again = guests[1].send(&[(4, 2, false)], &mut pages);
    assert_eq!((again.reference_blocks, again.shared_blocks), (1, 0));
}

#[test]
fn hot_blocks_and_guests_without_the_technique_neither_give_nor_take() {
    let (mut guests, mut pages) = pair();
    assert!(guests[0].encode(&[(0, 3, true)]).0.is_empty());
    guests[0].encoder.set_techniques(Techniques { shared: false, ..Techniques::ALL });
    assert!(guests[0].encode(&[(1, 4, false)]).0.is_empty());
    guests[1].send(&[(0, 5, false)], &mut pages);
    hear(&mut guests, 1);
    let (kept, batch) = guests[0].encode(&[(2, 5, false)]);
    assert_eq!((kept.len(), batch.tally.shared_blocks, batch.tally.literal_blocks), (0, 0, 1));
}

#[test]
fn a_slot_that_was_never_written_is_refused() {
    let ([mut guest, _], mut pages) = pair();
    guest.encoder.shared_index().insert(ContentDigest::of(&content(3)), Slot(u64::MAX));
    let batch = guest.encode(&[(0, 3, false)]).1;
    let refused = guest.decoder.decode_sharing(&batch.bytes, &mut guest.target, &mut pages);
    assert!(matches!(refused, Err(DecodeError::Shared(SharedPageError::Empty(Slot(u64::MAX))))));
    let without = guest.decoder.decode(&batch.bytes, &mut guest.target);
    assert!(matches!(without, Err(DecodeError::Shared(_))));
}
