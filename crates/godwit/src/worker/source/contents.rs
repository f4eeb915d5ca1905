//! Where the contents of owed pages come from: QEMU's memory, or its stream.

use std::collections::HashMap;

use godwit_content::{BLOCK_BYTES, BlockId, BlockVersion};
use godwit_qemu::{
    memory::{PageIndex, ProcessMemory},
    stream::PageContent,
};

use super::stage::StageError;

/// Pages that the inline stage holds at most: 16 MiB.
pub(super) const INLINE_PAGES_MAX: usize = 4096;
/// The same where QEMU stops the guest by itself, so that what is held lengthens the pause: 1 MiB.
pub(super) const UNGATED_PAGES_MAX: usize = 256;
/// Pages, also such as need no room for contents, that the inline stage knows at most before QEMU has to wait.
const INLINE_ENTRIES_MAX: usize = 65_536;
/// Pages compared with QEMU's stream at once, in the pause.
const COMPARED_AT_ONCE: usize = 64;

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
pub(super) struct Inline {
    pages_max: usize,
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
    /// Holds contents of so many pages at most, give or take what QEMU writes before it waits.
    pub(super) fn new(pages_max: usize) -> Self {
        Self { pages_max, pages: HashMap::new(), slots: Vec::new(), free: Vec::new() }
    }

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
        self.used_slots() >= self.pages_max || self.pages.len() >= INLINE_ENTRIES_MAX
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

    #[test]
    fn inline_reuses_its_room_and_says_when_it_is_full() {
        let mut inline = Inline::new(INLINE_PAGES_MAX);
        for round in 0..3 {
            for id in 0..INLINE_PAGES_MAX as u64 {
                assert!(!inline.is_full() || round > 0);
                inline.named(BlockId(id), &PageContent::Bytes(&[round; BLOCK_BYTES]), false).unwrap();
            }
            assert!(inline.is_full());
        }
        assert_eq!(inline.slots.len(), INLINE_PAGES_MAX * BLOCK_BYTES);
    }
}
