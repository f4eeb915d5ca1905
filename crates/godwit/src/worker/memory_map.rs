//! Which RAM blocks of a machine travel page by page, and where they are.

use godwit_content::BLOCK_BYTES;
use godwit_qemu::{
    memory::MemoryRange,
    qmp::{Client, QmpError},
    ramblock::{self, RamBlockAddress, RamBlockError, parse_address},
};

/// Smaller blocks (firmware, ACPI tables) stay in QEMU's stream, which knows how to resize them.
const SMALLEST_PAGED_BYTES: u64 = 4 << 20;

/// Why a machine's RAM blocks can't be listed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryMapError {
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] QmpError),
    /// The answer isn't understood.
    #[error("QEMU's list of RAM blocks isn't understood")]
    List(#[from] RamBlockError),
    /// There is no block that could travel.
    #[error("the machine has no RAM block of at least 4 MiB")]
    Empty,
    /// QEMU before 8.0 tells only where the guest's own memory is.
    #[error(
        "this QEMU doesn't say where the memory of {0} is (before 8.0); start the machine without that device, or with a \
         newer QEMU"
    )]
    NoAddress(String),
}

/// The RAM blocks that travel page by page; their pages are numbered through, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryMap {
    blocks: Vec<RamBlockAddress>,
}

impl MemoryMap {
    /// Asks QEMU.
    pub(crate) async fn of(monitor: &Client) -> Result<Self, MemoryMapError> {
        let mut blocks = ramblock::parse(&monitor.hmp("info ramblock").await?)?;
        if blocks.iter().any(|block| block.host_address.is_none()) {
            let answer = monitor.hmp("gpa2hva 0x0").await?;
            let main = parse_address(&answer);
            for block in &mut blocks {
                block.host_address = main.filter(|(name, _)| *name == block.name).map(|(_, address)| address);
            }
        }
        blocks.retain(|block| {
            block.used_bytes == block.total_bytes
                && block.used_bytes >= SMALLEST_PAGED_BYTES
                && block.used_bytes.is_multiple_of(BLOCK_BYTES as u64)
        });
        // QEMU lists blocks in an order of its own; both ends must number them alike.
        blocks.sort_by(|left, right| left.name.cmp(&right.name));
        if blocks.is_empty() { Err(MemoryMapError::Empty) } else { Ok(Self { blocks }) }
    }

    /// Names and sizes in bytes.
    pub(super) fn sizes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.blocks.iter().map(|block| (block.name.as_str(), block.used_bytes))
    }

    /// Names, and the number of the first page of each.
    pub(super) fn first_pages(&self) -> Vec<(String, u64)> {
        let mut next = 0;
        let number = |block: &RamBlockAddress| {
            let first = next;
            next += block.used_bytes / BLOCK_BYTES as u64;
            (block.name.clone(), first)
        };
        self.blocks.iter().map(number).collect()
    }

    /// Pages in all.
    pub(super) fn page_count(&self) -> u64 {
        self.blocks.iter().map(|block| block.used_bytes / BLOCK_BYTES as u64).sum()
    }

    /// Where the blocks are in QEMU's address space.
    ///
    /// # Errors
    /// [`MemoryMapError::NoAddress`] for the first of which QEMU doesn't say.
    pub(crate) fn ranges(&self) -> Result<Vec<MemoryRange>, MemoryMapError> {
        let range = |block: &RamBlockAddress| {
            let host_address =
                block.host_address.ok_or_else(|| MemoryMapError::NoAddress(block.name.clone()))?;
            Ok(MemoryRange { host_address, bytes: block.used_bytes })
        };
        self.blocks.iter().map(range).collect()
    }
}
