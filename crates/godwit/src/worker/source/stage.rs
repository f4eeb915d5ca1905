//! The stage: what is owed to the target, between the pump, which reads from QEMU's stream what is dirty, and the
//! sender, which takes batches of it.
//!
//! The order is the [`Mover`]'s. Where the contents come from is a choice of two [`Contents`]: `Direct` reads them from
//! QEMU's memory when they are sent. That is exact, because whatever is written later is named again, and the last
//! pass runs with the guest stopped. `Inline` is for machines whose memory can't be read: it keeps what the stream
//! carries, and makes QEMU wait when that is too much. Nothing else knows which of the two is in use.

use std::{
    collections::VecDeque,
    iter::successors,
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use godwit_content::{BATCH_BLOCKS, BlockId, BlockVersion};
use godwit_migration::mover::{Mode, Mover, Settings, Taken, UnknownBlock};
use godwit_qemu::{memory::ProcessMemoryError, stream::PageContent};

use super::contents::Contents;

/// Longest time that a wait goes without looking again.
const WAIT_AT_MOST: Duration = Duration::from_millis(100);

/// Why a stage can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    /// QEMU's memory couldn't be read.
    #[error("can't read the guest's memory")]
    Memory(#[from] ProcessMemoryError),
    /// QEMU named a page beyond its own block list.
    #[error("QEMU's stream names a page that the machine doesn't have")]
    Unknown(#[from] UnknownBlock),
    /// What QEMU sent for a page isn't what stands at the page's address.
    #[error("page {page} as read from QEMU's memory isn't the page in QEMU's own stream")]
    WrongAddress {
        /// The page.
        page: u64,
    },
    /// A page is owed whose contents never came.
    #[error("page {page} is owed, but its contents never came")]
    Missing {
        /// The page.
        page: u64,
    },
}

/// Blocks that go together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) blocks: Vec<BlockVersion>,
    /// Their contents, one after the other.
    pub(super) contents: Vec<u8>,
    pub(super) taken: Taken,
}

/// What is owed.
pub(super) struct Stage {
    pub(super) mover: Mover,
    contents: Box<dyn Contents>,
    embargo: Embargo,
    /// Owed pages that were zero when QEMU named them: most of a guest's memory may be, and a prediction that takes each
    /// page for full would be wrong by as much.
    zeros: Marks,
    /// Where the next of them is looked for.
    zeros_from: u64,
    is_complete: bool,
    is_closed: bool,
}

impl Stage {
    fn new(pages: u64, first: BlockId, contents: Box<dyn Contents>, embargo: Duration) -> Self {
        Self {
            mover: Mover::new(pages, Settings { first_block: first.0, ..Settings::default() }),
            contents,
            embargo: Embargo::new(embargo, pages),
            zeros: Marks::new(pages),
            zeros_from: 0,
            is_complete: false,
            is_closed: false,
        }
    }

    /// Takes note that QEMU named a page.
    pub(super) fn name(
        &mut self,
        id: BlockId,
        content: &PageContent<'_>,
        last: bool,
        now: Instant,
    ) -> Result<(), StageError> {
        self.embargo.hold(id, now);
        self.zeros.set(id, matches!(content, PageContent::Zero(0)));
        self.contents.named(id, content, last)
    }

    /// Owes the pages whose embargo is over.
    pub(super) fn release(&mut self, now: Instant) -> Result<(), StageError> {
        while let Some(ids) = self.embargo.release(now) {
            self.mover.owe_many(ids)?;
        }
        Ok(())
    }

    /// Pages that are owed for the first time and were zero when they were named.
    pub(super) fn zero_blocks(&self) -> u64 {
        self.zeros.count
    }

    /// Pages that were named and aren't owed yet.
    pub(super) fn embargoed(&self) -> u64 {
        self.embargo.held.count
    }

    /// Takes note that the guest is stopped and its last page has been named.
    pub(super) fn complete(&mut self) -> Result<(), StageError> {
        self.contents.complete()?;
        // The guest is stopped: no write is under way.
        self.embargo.period = Duration::ZERO;
        self.release(Instant::now())?;
        self.mover.set_mode(Mode::Final);
        self.is_complete = true;
        Ok(())
    }

    /// Whether nothing is owed and nothing will be.
    pub(super) fn is_drained(&self) -> bool {
        self.is_complete && self.mover.owed_blocks() == 0 && self.embargo.waiting.is_empty()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// The next batch with its newest contents; `None` if nothing is to go now.
    pub(super) fn take(&mut self) -> Result<Option<Batch>, StageError> {
        self.release(Instant::now())?;
        let mut batch = Batch::default();
        // With QEMU waiting for room no pass ends, and what is held back would wait for ever.
        let held_back_go = self.contents.is_full() && !self.is_complete;
        if held_back_go {
            self.mover.set_mode(Mode::Final);
        }
        batch.taken = self.mover.take(BATCH_BLOCKS, &mut batch.blocks);
        if held_back_go {
            self.mover.set_mode(Mode::Live);
        }
        self.fill(batch)
    }

    /// A batch of pages that were zero when they were named, whose turn may be later; `None` if none is owed.
    pub(super) fn take_zeros(&mut self) -> Result<Option<Batch>, StageError> {
        self.release(Instant::now())?;
        let next = |from| self.zeros.next(from);
        let zeros = successors(next(self.zeros_from), |id| next(id.0 + 1));
        let owed: Vec<BlockId> = zeros.filter(|id| self.mover.is_owed(*id)).take(BATCH_BLOCKS).collect();
        // From the beginning, once the end is reached.
        let last = owed.get(BATCH_BLOCKS - 1);
        self.zeros_from = last.map_or(0, |id| id.0 + 1);
        let mut batch = Batch::default();
        batch.taken = self.mover.take_these(&owed, &mut batch.blocks);
        self.fill(batch)
    }

    /// The contents of a batch; `None` if it is empty.
    fn fill(&mut self, mut batch: Batch) -> Result<Option<Batch>, StageError> {
        if batch.blocks.is_empty() {
            return Ok(None);
        }
        // What is learned of sizes is learned of pages that have one.
        let zeros = batch.blocks.iter().filter(|block| self.zeros.set(block.id, false)).count() as u64;
        batch.taken.first_time = batch.taken.first_time.saturating_sub(zeros);
        self.contents.read(&batch.blocks, &mut batch.contents)?;
        Ok(Some(batch))
    }
}

/// Pages wait here for a moment after they were named, before they are read.
///
/// QEMU's emulator (TCG) marks a page dirty *before* it writes. If QEMU looks for dirty pages in between, the mark is
/// gone when the write comes: the page was named for a write that whoever reads at once doesn't see, and isn't named
/// again. The write follows the mark within nanoseconds, or, if its thread loses the processor just then, within
/// a time slice; so a page is read later than that.
#[derive(Debug)]
struct Embargo {
    period: Duration,
    /// A page that was named again stands here again: it is left alone since it was named last.
    waiting: VecDeque<(Instant, Vec<BlockId>)>,
    held: Marks,
}

/// Pages named within this time share a place in the queue.
const EMBARGO_GRAIN: Duration = Duration::from_millis(1);

impl Embargo {
    fn new(period: Duration, pages: u64) -> Self {
        Self { period, waiting: VecDeque::new(), held: Marks::new(pages) }
    }

    fn hold(&mut self, id: BlockId, now: Instant) {
        self.held.set(id, true);
        match self.waiting.back_mut() {
            Some((since, ids)) if now < *since + EMBARGO_GRAIN => ids.push(id),
            _ => self.waiting.push_back((now, vec![id])),
        }
    }

    fn release(&mut self, now: Instant) -> Option<Vec<BlockId>> {
        // Those who came last in a place waited for a grain less.
        let over = self.waiting.front().is_some_and(|(since, _)| now >= *since + EMBARGO_GRAIN + self.period);
        let (_, ids) = if over || self.period.is_zero() { self.waiting.pop_front()? } else { return None };
        for &id in &ids {
            self.held.set(id, false);
        }
        Some(ids)
    }
}

/// A set of pages that knows its size.
#[derive(Debug, Default)]
struct Marks {
    words: Vec<u64>,
    count: u64,
}

impl Marks {
    fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], count: 0 }
    }

    /// The first marked page from here on.
    fn next(&self, from: u64) -> Option<BlockId> {
        let (index, bit) = ((from / 64) as usize, from % 64);
        let first = self.words.get(index)? & (u64::MAX << bit);
        let rest = self.words.iter().copied().skip(index + 1);
        let words = (index..).zip(std::iter::once(first).chain(rest));
        let (index, word) = words.into_iter().find(|(_, word)| *word != 0)?;
        Some(BlockId(index as u64 * 64 + u64::from(word.trailing_zeros())))
    }

    /// Marks a page, or not; returns what it was. Pages beyond the last are never marked.
    fn set(&mut self, id: BlockId, mark: bool) -> bool {
        let Some(word) = self.words.get_mut((id.0 / 64) as usize) else { return false };
        let bit = 1 << (id.0 % 64);
        let was_marked = *word & bit != 0;
        *word = if mark { *word | bit } else { *word & !bit };
        self.count = self.count + u64::from(mark) - u64::from(was_marked);
        was_marked
    }
}

/// A stage between two threads.
pub(super) struct SharedStage {
    stage: Mutex<Stage>,
    changed: Condvar,
}

impl SharedStage {
    /// A stage that owes nothing; its order begins at `first`, and `embargo` is how long a page is left alone after it
    /// was named.
    pub(super) fn new(pages: u64, first: BlockId, contents: Box<dyn Contents>, embargo: Duration) -> Self {
        let stage = Stage::new(pages, first, contents, embargo);
        Self { stage: Mutex::new(stage), changed: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Tells whoever waits that there may be more to send, or more room.
    pub(super) fn wake(&self) {
        self.changed.notify_all();
    }

    /// Waits, a moment at most, for a change.
    pub(super) fn wait<'a>(&self, held: MutexGuard<'a, Stage>) -> MutexGuard<'a, Stage> {
        let longest = if held.embargo.waiting.is_empty() { WAIT_AT_MOST } else { EMBARGO_GRAIN };
        let waited = self.changed.wait_timeout(held, longest);
        waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0
    }

    /// Waits until the stage takes more, or is closed.
    pub(super) fn wait_for_room(&self) {
        let mut stage = self.lock();
        while stage.contents.is_full() && !stage.is_closed {
            stage = self.wait(stage);
        }
    }

    /// Ends all waiting: the worker gives up.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.wake();
    }
}

#[cfg(test)]
mod tests {
    use godwit_content::BLOCK_BYTES;

    use super::{
        super::contents::{INLINE_PAGES_MAX, Inline},
        *,
    };

    fn name(stage: &mut Stage, id: u64, fill: u8, now: Instant) {
        let page = [fill; BLOCK_BYTES];
        stage.name(BlockId(id), &PageContent::Bytes(&page), false, now).unwrap();
    }

    #[test]
    fn inline_sends_the_newest_version_once() {
        let mut stage =
            Stage::new(1 << 17, BlockId(0), Box::new(Inline::new(INLINE_PAGES_MAX)), Duration::ZERO);
        let now = Instant::now();
        name(&mut stage, 7, 1, now);
        name(&mut stage, 7, 2, now + EMBARGO_GRAIN * 2);
        stage.name(BlockId(9), &PageContent::Zero(0), false, now).unwrap();
        let batch = stage.take().unwrap().unwrap();
        assert_eq!(
            batch.blocks.iter().map(|block| block.id.0).collect::<Vec<_>>(),
            [9, 7],
            "the colder first"
        );
        assert_eq!(batch.contents, [[0; BLOCK_BYTES], [2; BLOCK_BYTES]].concat());
        assert!(stage.take().unwrap().is_none());
    }

    #[test]
    fn zero_pages_may_go_before_their_turn() {
        let mut stage =
            Stage::new(1 << 10, BlockId(0), Box::new(Inline::new(INLINE_PAGES_MAX)), Duration::ZERO);
        let now = Instant::now();
        for id in 0..200 {
            match id % 2 {
                0 => stage.name(BlockId(id), &PageContent::Zero(0), false, now).unwrap(),
                _ => name(&mut stage, id, 1, now),
            }
        }
        name(&mut stage, 4, 1, now);
        let mut zeros = Vec::new();
        while let Some(batch) = stage.take_zeros().unwrap() {
            assert!(batch.contents.iter().all(|byte| *byte == 0) && batch.taken.first_time == 0);
            zeros.extend(batch.blocks.iter().map(|block| block.id.0));
        }
        assert_eq!(zeros, (0..200).step_by(2).filter(|id| *id != 4).collect::<Vec<_>>());
        assert_eq!((stage.zero_blocks(), stage.mover.owed_blocks()), (0, 101));
        stage.name(BlockId(6), &PageContent::Zero(0), false, now).unwrap();
        assert_eq!(stage.take_zeros().unwrap().unwrap().blocks[0].id, BlockId(6));
    }

    #[test]
    fn a_full_inline_stage_gives_even_what_is_held_back() {
        let mut stage =
            Stage::new(1 << 17, BlockId(0), Box::new(Inline::new(INLINE_PAGES_MAX)), Duration::ZERO);
        let now = Instant::now();
        for fill in 0..8 {
            name(&mut stage, 1, fill, now);
            stage.take().unwrap();
        }
        assert!(stage.take().unwrap().is_none(), "hot, and sent in this pass already");
        for id in 2..INLINE_PAGES_MAX as u64 + 1 {
            name(&mut stage, id, 1, now);
        }
        let mut taken = Vec::new();
        while stage.contents.is_full() {
            taken.extend(stage.take().unwrap().unwrap().blocks.iter().map(|block| block.id.0));
        }
        assert!(!taken.is_empty());
    }

    #[test]
    fn an_embargo_holds_a_page_back_and_loses_none() {
        let mut embargo = Embargo::new(Duration::from_millis(10), 8);
        let began = Instant::now();
        for ms in 0..5 {
            embargo.hold(BlockId(ms), began + Duration::from_millis(ms));
        }
        assert!(embargo.release(began + Duration::from_millis(9)).is_none());
        let mut released = Vec::new();
        for ms in 10..20 {
            while let Some(ids) = embargo.release(began + Duration::from_millis(ms)) {
                released.extend(ids.into_iter().map(|id| (id.0, ms)));
            }
        }
        assert_eq!(released, [(0, 11), (1, 12), (2, 13), (3, 14), (4, 15)]);
        assert_eq!(embargo.held.count, 0);
    }

    #[test]
    fn marks_are_counted_once() {
        let mut marks = Marks::new(100);
        marks.set(BlockId(99), true);
        assert!(marks.set(BlockId(99), true));
        marks.set(BlockId(5), true);
        assert_eq!(marks.count, 2);
        assert!(marks.set(BlockId(99), false) && !marks.set(BlockId(99), false));
        marks.set(BlockId(100_000), true);
        assert_eq!(marks.count, 1);
    }
}
