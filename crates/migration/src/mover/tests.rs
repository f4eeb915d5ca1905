//! The mover against a model that does the same slowly.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BLOCKS: u64 = 200;

#[derive(Debug, Clone, Default)]
struct Known {
    count: u8,
    owed: bool,
    sent: bool,
    sent_in_pass: bool,
}

/// Blocks by number, with everything about each; nothing clever.
#[derive(Debug, Default)]
struct Naive {
    blocks: BTreeMap<u64, Known>,
    cursors: BTreeMap<Heat, u64>,
    first_block: u64,
    is_through: bool,
    is_final: bool,
}

impl Naive {
    fn heat(known: &Known) -> Heat {
        match known.count {
            0 => Heat::Untouched,
            1..=3 => Heat::Cool,
            4..=31 => Heat::Warm,
            32..=47 => Heat::Hot,
            _ => Heat::Hottest,
        }
    }

    fn owe(&mut self, block: u64) -> Owed {
        let is_rewrite = self.blocks.contains_key(&block);
        let known = self.blocks.entry(block).or_default();
        if is_rewrite {
            known.count = known.count.saturating_add(16);
        }
        if std::mem::replace(&mut known.owed, true) { Owed::Already } else { Owed::Newly }
    }

    fn next_pass(&mut self) {
        self.is_through = true;
        for known in self.blocks.values_mut() {
            known.count -= known.count / 4;
            known.sent_in_pass = false;
        }
    }

    /// The next block of a class, by the cursor, of those that `may_go`.
    fn pick(&self, heat: Heat, may_go: impl Fn(&Known) -> bool) -> Option<u64> {
        let cursor = self.cursors.get(&heat).copied().unwrap_or(self.first_block);
        let fits = |known: &Known| known.owed && Self::heat(known) == heat && may_go(known);
        let ahead = self.blocks.range(cursor..).find(|(_, known)| fits(known));
        ahead.or_else(|| self.blocks.range(..cursor).find(|(_, known)| fits(known))).map(|(&block, _)| block)
    }

    fn pick_any(&self, early_copies: bool) -> Option<u64> {
        let cool = [Heat::Untouched, Heat::Cool, Heat::Warm];
        let hot = [Heat::Hot, Heat::Hottest];
        let first = |classes: &[Heat], may_go: fn(&Known) -> bool| {
            classes.iter().find_map(|&heat| self.pick(heat, may_go))
        };
        if self.is_final {
            return first(&cool, |_| true).or_else(|| first(&hot, |_| true));
        }
        let hot: &[Heat] = if early_copies { &hot } else { &[] };
        first(&cool, |known| !known.sent)
            .or_else(|| first(hot, |known| !known.sent))
            .or_else(|| first(&cool, |_| true))
            .or_else(|| first(hot, |known| !known.sent_in_pass))
    }

    fn take_these(&mut self, blocks: &[u64]) -> Vec<BlockVersion> {
        let mut batch = Vec::new();
        for block in blocks {
            let Some(known) = self.blocks.get_mut(block).filter(|known| known.owed) else { continue };
            (known.owed, known.sent, known.sent_in_pass) = (false, true, true);
            batch.push(BlockVersion { id: BlockId(*block), hot: Self::heat(known) != Heat::Untouched });
        }
        batch
    }

    fn take(&mut self, max: usize, early_copies: bool) -> Vec<BlockVersion> {
        let mut batch = Vec::new();
        while batch.len() < max
            && let Some(block) = self.pick_any(early_copies)
        {
            let known = self.blocks.get_mut(&block).unwrap();
            let heat = Self::heat(known);
            if self.is_through || block >= self.first_block {
                self.cursors.insert(heat, block + 1);
            }
            (known.owed, known.sent, known.sent_in_pass) = (false, true, true);
            batch.push(BlockVersion { id: BlockId(block), hot: heat != Heat::Untouched });
        }
        batch
    }
}

#[derive(Debug, Clone)]
enum Step {
    Owe(u64),
    Take(usize),
    /// Out of order; the last of them don't exist.
    TakeThese(Vec<u64>),
    NextPass,
    Final(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        // A few blocks get most of the writes, so that all classes come up.
        6 => (0..BLOCKS).prop_map(Step::Owe),
        8 => (60..70_u64).prop_map(Step::Owe),
        4 => (0..20_usize).prop_map(Step::Take),
        1 => prop::collection::vec(0..BLOCKS + 5, 0..20).prop_map(Step::TakeThese),
        2 => Just(Step::NextPass),
        1 => any::<bool>().prop_map(Step::Final),
    ];
    prop::collection::vec(step, 0..400)
}

proptest! {
    #[test]
    fn behaves_as_the_model_does(steps in steps(), early_copies: bool, first_block in 0..=BLOCKS) {
        let mut mover = Mover::new(BLOCKS, Settings { early_copies, first_block, ..Settings::default() });
        let mut naive = Naive { first_block, ..Naive::default() };
        for step in steps {
            match step {
                Step::Owe(block) => prop_assert_eq!(mover.owe(BlockId(block)).unwrap(), naive.owe(block)),
                Step::Take(max) => {
                    let mut batch = Vec::new();
                    let taken = mover.take(max, &mut batch);
                    prop_assert_eq!(taken.blocks(), batch.len() as u64);
                    prop_assert_eq!(batch, naive.take(max, early_copies));
                }
                Step::TakeThese(blocks) => {
                    let ids: Vec<_> = blocks.iter().copied().map(BlockId).collect();
                    let mut batch = Vec::new();
                    prop_assert_eq!(mover.take_these(&ids, &mut batch).blocks(), batch.len() as u64);
                    prop_assert_eq!(batch, naive.take_these(&blocks));
                }
                Step::NextPass => {
                    mover.next_pass();
                    naive.next_pass();
                }
                Step::Final(is_final) => {
                    mover.set_mode(if is_final { Mode::Final } else { Mode::Live });
                    naive.is_final = is_final;
                }
            }
            let owed = |fits: fn(&Known) -> bool| naive.blocks.values().filter(|known| known.owed && fits(known)).count() as u64;
            prop_assert_eq!(mover.owed_blocks(), owed(|_| true));
            prop_assert_eq!(mover.never_sent_blocks(), owed(|known| !known.sent));
            prop_assert_eq!(mover.held_back(), owed(|known| Naive::heat(known).is_held_back()));
        }
    }

    #[test]
    fn everything_owed_is_sent_once_in_the_end(writes in prop::collection::vec(0..BLOCKS, 0..600)) {
        let mut mover = Mover::new(BLOCKS, Settings::default());
        let coalesced = mover.owe_many(writes.iter().copied().map(BlockId)).unwrap();
        mover.set_mode(Mode::Final);
        let mut batch = Vec::new();
        while mover.take(7, &mut batch).blocks() > 0 {}
        let mut sent: Vec<_> = batch.iter().map(|version| version.id.0).collect();
        sent.sort_unstable();
        let mut owed = writes.clone();
        owed.sort_unstable();
        owed.dedup();
        prop_assert_eq!(coalesced, (writes.len() - owed.len()) as u64);
        prop_assert_eq!(sent, owed);
    }
}

fn hot_mover() -> Mover {
    let mut mover = Mover::new(BLOCKS, Settings::default());
    for _ in 0..4 {
        mover.owe_many((0..10).map(BlockId)).unwrap();
    }
    mover
}

#[test]
fn hot_blocks_wait_for_cooler_ones_and_go_once_a_pass() {
    let mut mover = hot_mover();
    mover.owe(BlockId(100)).unwrap();
    assert_eq!(mover.held_back(), 10);
    let mut batch = Vec::new();
    assert_eq!(mover.take(64, &mut batch).blocks(), 11);
    assert_eq!(batch[0], BlockVersion { id: BlockId(100), hot: false });

    mover.owe(BlockId(3)).unwrap();
    assert_eq!(mover.take(64, &mut batch).blocks(), 0, "a second copy in the same pass");
    mover.next_pass();
    assert_eq!(mover.take(64, &mut batch), Taken { first_time: 0, again: 1 });
}

/// As in a migration: memory is named faster than it is sent, but not at once.
#[test]
fn the_first_round_begins_at_the_first_block_however_late_that_is_named() {
    let mut mover = Mover::new(BLOCKS, Settings { first_block: 100, ..Settings::default() });
    let mut batch = Vec::new();
    for first in (0..BLOCKS).step_by(50) {
        mover.owe_many((first..first + 50).map(BlockId)).unwrap();
        mover.take(10, &mut batch);
    }
    mover.next_pass();
    while mover.take(10, &mut batch).blocks() > 0 {}
    let sent: Vec<_> = batch.iter().map(|version| version.id.0).collect();
    let expected: Vec<_> = (0..20).chain(100..200).chain(20..100).collect();
    assert_eq!(sent, expected);
}

#[test]
fn without_early_copies_hot_blocks_wait_for_the_stop() {
    let mut mover = hot_mover();
    mover.settings.early_copies = false;
    let mut batch = Vec::new();
    assert_eq!(mover.take(64, &mut batch).blocks(), 0);
    mover.set_mode(Mode::Final);
    assert_eq!(mover.take(64, &mut batch), Taken { first_time: 10, again: 0 });
}

#[test]
fn without_a_threshold_nothing_is_held_back() {
    let mut mover = Mover::new(BLOCKS, Settings { threshold_writes: None, ..Settings::default() });
    for _ in 0..40 {
        mover.owe(BlockId(1)).unwrap();
    }
    assert_eq!(mover.held_back(), 0);
    assert_eq!(mover.write_count(BlockId(1)), 15);
}

#[test]
fn write_counts_settle_where_the_table_says() {
    for (every, settled) in [(1, 64), (2, 37), (3, 28)] {
        let mut mover = Mover::new(1, Settings::default());
        for pass in 0..60 {
            if pass % every == 0 {
                mover.owe(BlockId(0)).unwrap();
            }
            let last_write = pass >= 60 - every && pass % every == 0;
            if last_write {
                assert!(mover.write_counts[0].abs_diff(settled) <= 3, "{every}: {}", mover.write_counts[0]);
            }
            mover.next_pass();
        }
    }
}

#[test]
fn a_block_that_was_ever_rewritten_never_becomes_untouched() {
    let mut mover = Mover::new(1, Settings::default());
    mover.owe_many([BlockId(0), BlockId(0)]).unwrap();
    for _ in 0..1_000 {
        mover.next_pass();
    }
    assert_eq!(mover.heat(BlockId(0)), Heat::Cool);
}

#[test]
fn unknown_blocks_are_refused() {
    let mut mover = Mover::new(8, Settings::default());
    assert_eq!(mover.owe(BlockId(8)), Err(UnknownBlock { block: 8, block_count: 8 }));
    assert_eq!(mover.statistics(), Statistics::default());
    assert_eq!(mover.heat(BlockId(u64::MAX)), Heat::Untouched);
    assert!(!mover.is_owed(BlockId(u64::MAX)));
    assert_eq!(mover.write_count(BlockId(u64::MAX)), 0);
}

#[test]
fn two_bytes_a_block_are_enough() {
    let blocks = 1 << 20;
    assert!(Mover::new(blocks, Settings::default()).memory_bytes() <= 2 * blocks);
}
