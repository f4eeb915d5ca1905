//! The stage: what is owed to the target, between QEMU's stream, which names dirty pages, and the sender, which takes
//! batches of them.
//!
//! There are two. [`Direct`] keeps only *which* pages are owed and reads their contents from QEMU's memory when they
//! are sent; that is exact, because whatever is written later is named again, and the last pass runs with the guest
//! stopped. [`Inline`] is for machines whose memory can't be read: it queues the contents that the stream carries, in
//! stream order, and makes QEMU wait when the queue is full. Nothing else knows which of the two is in use.

use std::collections::VecDeque;

use godwit_content::{BLOCK_BYTES, BlockId, BlockVersion};
use godwit_migration::mover::Mover;
use godwit_qemu::{
    memory::{MemoryError, ProcessMemory},
    stream::PageContent,
};

/// Pages that the inline stage holds at most: 16 MiB.
const INLINE_PAGES_MAX: usize = 4096;
/// Pages compared with QEMU's stream at once, in the pause.
const COMPARED_AT_ONCE: usize = 64;

/// Why a stage can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    /// QEMU's memory couldn't be read.
    #[error("can't read the guest's memory")]
    Memory(#[from] MemoryError),
    /// What QEMU sent for a page isn't what stands at the page's address.
    #[error("page {page} read from QEMU's memory differs from the one in QEMU's own stream; its address is wrong")]
    WrongAddress {
        /// The page.
        page: u64,
    },
}

/// What is owed, and in which order it goes.
pub(super) trait Stage: Send {
    /// Takes note that QEMU named `id`; `last` when the guest was already stopped, so that `content` is its last.
    fn name(&mut self, id: BlockId, content: PageContent<'_>, last: bool) -> Result<(), StageError>;
    /// Takes the next batch: appends to `blocks` and returns how its contents are got at.
    fn take(&mut self, max: usize, blocks: &mut Vec<BlockVersion>, contents: &mut Vec<u8>);
    /// QEMU went once through its memory.
    fn pass_ended(&mut self);
    /// From now on nothing is held back.
    fn release_all(&mut self);
    /// Everything that QEMU will ever name has been named.
    fn seal(&mut self) -> Result<(), StageError>;
    /// Whether QEMU should wait before it names more.
    fn is_full(&self) -> bool;
    /// The counts that decide when to stop.
    fn mover(&self) -> &Mover;
}
