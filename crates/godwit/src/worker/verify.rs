//! `--verify full`: both memories read again while both are paused, and compared.

use godwit_content::BLOCK_BYTES;
use godwit_qemu::memory::{PageIndex, ProcessMemory, ProcessMemoryError};
use xxhash_rust::xxh3::xxh3_128;

/// Pages under one digest: 1 MiB.
const RUN_PAGES: u64 = 256;
const DIGEST_BYTES: usize = 16;

/// Why two memories aren't known to be equal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerifyError {
    /// Memory can't be read.
    #[error("can't read the guest's memory again to compare it")]
    Memory(#[from] ProcessMemoryError),
    /// The lists have different lengths.
    #[error("the source has {theirs} runs of memory to compare, this host {ours}")]
    Runs {
        /// Digests that came.
        theirs: usize,
        /// Digests that we have.
        ours: usize,
    },
    /// The memories differ.
    #[error("memory differs within the {RUN_PAGES} pages from page {first_page} on")]
    Differs {
        /// First page of the run.
        first_page: u64,
    },
}

/// Digests of all runs of `memory`, one after the other.
pub(super) fn digests(memory: &ProcessMemory) -> Result<Vec<u8>, VerifyError> {
    let mut all = Vec::new();
    let mut contents = Vec::new();
    for first in (0..memory.pages()).step_by(RUN_PAGES as usize) {
        let pages = RUN_PAGES.min(memory.pages() - first) as usize;
        contents.resize(pages * BLOCK_BYTES, 0);
        memory.read((0..pages).map(|page| PageIndex(first + page as u64)), &mut contents)?;
        all.extend_from_slice(&xxh3_128(&contents).to_le_bytes());
    }
    Ok(all)
}

/// Compares `memory` with the digests of the other side; returns the number of pages, all of them equal.
pub(super) fn compare(memory: &ProcessMemory, theirs: &[u8]) -> Result<u64, VerifyError> {
    let ours = digests(memory)?;
    if ours.len() != theirs.len() {
        return Err(VerifyError::Runs {
            theirs: theirs.len() / DIGEST_BYTES,
            ours: ours.len() / DIGEST_BYTES,
        });
    }
    let mut pairs = ours.chunks_exact(DIGEST_BYTES).zip(theirs.chunks_exact(DIGEST_BYTES));
    match pairs.position(|(ours, theirs)| ours != theirs) {
        Some(run) => Err(VerifyError::Differs { first_page: run as u64 * RUN_PAGES }),
        None => Ok(memory.pages()),
    }
}
