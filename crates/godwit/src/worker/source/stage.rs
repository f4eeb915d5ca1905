//! The stage: what is owed to the target, between the pump, which reads from QEMU's stream what is dirty, and the
//! sender, which takes batches of it.
//!
//! The order is the [`Mover`]'s. Where the contents come from is a choice of two [`Contents`]: [`Direct`] reads them from
//! QEMU's memory when they are sent. That is exact, because whatever is written later is named again, and the last
//! pass runs with the guest stopped. [`Inline`] is for machines whose memory can't be read: it keeps what the stream
//! carries, and makes QEMU wait when that is too much. Nothing else knows which of the two is in use.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use godwit_content::{BATCH_BLOCKS, BLOCK_BYTES, BlockId, BlockVersion};
use godwit_migration::mover::{Mode, Mover, Taken, UnknownBlock};
use godwit_qemu::{
    memory::{PageIndex, ProcessMemory, ProcessMemoryError},
    stream::PageContent,
};

/// Pages that the inline stage holds at most: 16 MiB.
const INLINE_PAGES_MAX: usize = 4096;
/// Pages, also such as need no room for contents, that the inline stage knows at most before QEMU has to wait.
const INLINE_ENTRIES_MAX: usize = 65_536;
/// Pages compared with QEMU's stream at once, in the pause.
const COMPARED_AT_ONCE: usize = 64;
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

/// Where the contents of owed pages come from.
pub(super) trait Contents: Send {
    /// QEMU named `id`; `last` when the guest was already stopped, so that `content` is final.
    fn named(&mut self, id: BlockId, content: &PageContent<'_>, last: bool) -> Result<(), StageError>;
    /// Appends the newest contents of `blocks` to `contents`.
    fn read(&mut self, blocks: &[BlockVersion], contents: &mut Vec<u8>) -> Result<(), StageError>;
    /// Everything that QEMU will ever name has been named.
    fn complete(&mut self) -> Result<(), StageError>;
    /// Whether QEMU should wait before it names more.
    fn is_full(&self) -> bool;
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
    is_complete: bool,
    is_closed: bool,
}

impl Stage {
    /// Takes note that QEMU named a page.
    pub(super) fn name(
        &mut self,
        id: BlockId,
        content: &PageContent<'_>,
        last: bool,
        now: Instant,
    ) -> Result<(), StageError> {
        self.embargo.hold(id, now);
        self.contents.named(id, content, last)
    }

    /// Owes the pages whose embargo is over.
    pub(super) fn release(&mut self, now: Instant) -> Result<(), StageError> {
        while let Some(ids) = self.embargo.release(now) {
            self.mover.owe_many(ids)?;
        }
        Ok(())
    }

    /// Pages that were named and aren't owed yet.
    pub(super) fn embargoed(&self) -> u64 {
        self.embargo.held
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
        self.is_complete && self.mover.owed_blocks() == 0 && self.embargoed() == 0
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
        if batch.blocks.is_empty() {
            return Ok(None);
        }
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
    waiting: VecDeque<(Instant, Vec<BlockId>)>,
    held: u64,
}

/// Pages named within this time share a place in the queue.
const EMBARGO_GRAIN: Duration = Duration::from_millis(1);

impl Embargo {
    fn new(period: Duration) -> Self {
        Self { period, waiting: VecDeque::new(), held: 0 }
    }

    fn hold(&mut self, id: BlockId, now: Instant) {
        self.held += 1;
        match self.waiting.back_mut() {
            Some((since, ids)) if now < *since + EMBARGO_GRAIN => ids.push(id),
            _ => self.waiting.push_back((now, vec![id])),
        }
    }

    fn release(&mut self, now: Instant) -> Option<Vec<BlockId>> {
        // Those who came last in a place waited for a grain less.
        let over = self.waiting.front().is_some_and(|(since, _)| now >= *since + EMBARGO_GRAIN + self.period);
        let (_, ids) = if over || self.period.is_zero() { self.waiting.pop_front()? } else { return None };
        self.held -= ids.len() as u64;
        Some(ids)
    }
}

/// A stage between two threads.
pub(super) struct SharedStage {
    stage: Mutex<Stage>,
    changed: Condvar,
}

impl SharedStage {
    /// A stage that owes nothing; `embargo` is how long a page is left alone after it was named.
    pub(super) fn new(mover: Mover, contents: Box<dyn Contents>, embargo: Duration) -> Self {
        let embargo = Embargo::new(embargo);
        let stage = Stage { mover, contents, embargo, is_complete: false, is_closed: false };
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
        let longest = if held.embargoed() > 0 { EMBARGO_GRAIN } else { WAIT_AT_MOST };
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

/// Reads contents from QEMU's memory when they are sent.
pub(super) struct Direct {
    memory: ProcessMemory,
    suspects: Suspects,
}

impl Direct {
    /// Contents in a memory whose pages are numbered as the mover's blocks are.
    pub(super) fn new(memory: ProcessMemory) -> Self {
        Self { memory, suspects: Suspects::default() }
    }
}

impl Contents for Direct {
    fn named(&mut self, id: BlockId, content: &PageContent<'_>, last: bool) -> Result<(), StageError> {
        if !last {
            return Ok(());
        }
        self.suspects.pages.push(PageIndex(id.0));
        append(content, &mut self.suspects.expected);
        if self.suspects.pages.len() < COMPARED_AT_ONCE {
            Ok(())
        } else {
            self.suspects.compare(&self.memory)
        }
    }

    fn read(&mut self, blocks: &[BlockVersion], contents: &mut Vec<u8>) -> Result<(), StageError> {
        let pages = blocks.iter().map(|block| PageIndex(block.id.0));
        let before = contents.len();
        contents.resize(before + blocks.len() * BLOCK_BYTES, 0);
        Ok(self.memory.read(pages, &mut contents[before..])?)
    }

    fn complete(&mut self) -> Result<(), StageError> {
        self.suspects.compare(&self.memory)
    }

    fn is_full(&self) -> bool {
        false
    }
}

/// Pages that QEMU sent after the stop, to be compared with what stands at their addresses: a wrong address must not
/// pass.
#[derive(Default)]
struct Suspects {
    pages: Vec<PageIndex>,
    expected: Vec<u8>,
    found: Vec<u8>,
}

impl Suspects {
    fn compare(&mut self, memory: &ProcessMemory) -> Result<(), StageError> {
        self.found.resize(self.expected.len(), 0);
        memory.read(self.pages.iter().copied(), &mut self.found)?;
        let mut pairs = self.expected.chunks_exact(BLOCK_BYTES).zip(self.found.chunks_exact(BLOCK_BYTES));
        if let Some(wrong) = pairs.position(|(expected, found)| expected != found) {
            return Err(StageError::WrongAddress { page: self.pages[wrong].0 });
        }
        self.pages.clear();
        self.expected.clear();
        Ok(())
    }
}

/// Keeps the newest contents that QEMU's stream carried. Not under an embargo: a page that was named twice would be owed
/// once more after its contents had gone.
#[derive(Default)]
pub(super) struct Inline {
    pages: HashMap<BlockId, Kept>,
    /// Contents, a slot each.
    slots: Vec<u8>,
    free: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Kept {
    /// Every byte has this value; a read from QEMU can bring tens of thousands of these.
    Fill(u8),
    Slot(usize),
}

impl Inline {
    fn used_slots(&self) -> usize {
        self.slots.len() / BLOCK_BYTES - self.free.len()
    }

    fn free(&mut self, kept: Option<Kept>) {
        if let Some(Kept::Slot(slot)) = kept {
            self.free.push(slot);
        }
    }

    fn keep(&mut self, page: &[u8; BLOCK_BYTES]) -> Kept {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.resize(self.slots.len() + BLOCK_BYTES, 0);
            self.slots.len() / BLOCK_BYTES - 1
        });
        self.slots[slot * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(page);
        Kept::Slot(slot)
    }
}

impl Contents for Inline {
    fn named(&mut self, id: BlockId, content: &PageContent<'_>, _last: bool) -> Result<(), StageError> {
        let older = self.pages.remove(&id);
        self.free(older);
        let kept = match content {
            PageContent::Zero(fill) => Kept::Fill(*fill),
            PageContent::Bytes(page) => self.keep(page),
        };
        self.pages.insert(id, kept);
        Ok(())
    }

    fn read(&mut self, blocks: &[BlockVersion], contents: &mut Vec<u8>) -> Result<(), StageError> {
        for block in blocks {
            let kept = self.pages.remove(&block.id).ok_or(StageError::Missing { page: block.id.0 })?;
            match kept {
                Kept::Fill(fill) => contents.resize(contents.len() + BLOCK_BYTES, fill),
                Kept::Slot(slot) => {
                    contents.extend_from_slice(&self.slots[slot * BLOCK_BYTES..][..BLOCK_BYTES])
                }
            }
            self.free(Some(kept));
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<(), StageError> {
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.used_slots() >= INLINE_PAGES_MAX || self.pages.len() >= INLINE_ENTRIES_MAX
    }
}

fn append(content: &PageContent<'_>, bytes: &mut Vec<u8>) {
    match content {
        PageContent::Zero(fill) => bytes.resize(bytes.len() + BLOCK_BYTES, *fill),
        PageContent::Bytes(page) => bytes.extend_from_slice(*page),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_migration::mover::Settings;

    fn stage(contents: Box<dyn Contents>, embargo: Duration) -> Stage {
        let mover = Mover::new(1 << 17, Settings::default());
        Stage { mover, contents, embargo: Embargo::new(embargo), is_complete: false, is_closed: false }
    }

    fn name(stage: &mut Stage, id: u64, fill: u8, now: Instant) {
        let page = [fill; BLOCK_BYTES];
        stage.name(BlockId(id), &PageContent::Bytes(&page), false, now).unwrap();
    }

    #[test]
    fn inline_sends_the_newest_version_once() {
        let mut stage = stage(Box::new(Inline::default()), Duration::ZERO);
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
    fn inline_reuses_its_room_and_says_when_it_is_full() {
        let mut inline = Inline::default();
        for round in 0..3 {
            for id in 0..INLINE_PAGES_MAX as u64 {
                assert!(!inline.is_full() || round > 0);
                inline.named(BlockId(id), &PageContent::Bytes(&[round; BLOCK_BYTES]), false).unwrap();
            }
            assert!(inline.is_full());
        }
        assert_eq!(inline.slots.len(), INLINE_PAGES_MAX * BLOCK_BYTES);
    }

    #[test]
    fn a_full_inline_stage_gives_even_what_is_held_back() {
        let mut stage = stage(Box::new(Inline::default()), Duration::ZERO);
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
        let mut embargo = Embargo::new(Duration::from_millis(10));
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
        assert_eq!(embargo.held, 0);
    }
}
