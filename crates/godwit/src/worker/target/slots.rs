//! Pages that guests from one host have in common, in a file that the workers of all their migrations share.

use std::io;

use godwit_content::{BLOCK_BYTES, SharedPageError, SharedPages, Slot};
use godwit_migration::wire::Kept;

use crate::{
    job::{Job, SharedPlace},
    worker::shared_file::{Generation, Shape, SharedFile},
};

/// The file of pages, a slot each.
pub(super) struct Slots {
    file: SharedFile,
    /// Nothing can be added any more.
    is_full: bool,
}

impl Slots {
    /// The pages for this job, if it may use any. Where they can't be had, the migration does without.
    pub(super) fn open(job: &Job) -> Option<Self> {
        let SharedPlace { file, limit_bytes, .. } = job.shared_place()?;
        let own: Generation = job.id.as_bytes().try_into().ok()?;
        let page_bytes = BLOCK_BYTES as u64;
        let shape = Shape { record_bytes: page_bytes, records_max: limit_bytes / page_bytes };
        match SharedFile::open(file, shape, own, None) {
            Ok(file) => Some(Self { file, is_full: false }),
            Err(error) => {
                tracing::warn!(%error, path = %file.display(), "no pages are shared");
                None
            }
        }
    }

    /// What the source calls them.
    pub(super) fn name(&self) -> Option<String> {
        String::from_utf8(self.file.generation().to_vec()).ok()
    }

    /// Gives each of `pages` a slot, or none of them.
    pub(super) fn keep(&mut self, pages: &[u8]) -> Kept {
        let kept = if self.is_full { Ok(None) } else { self.file.append(pages) };
        let first_slot = kept.unwrap_or_else(|error| {
            tracing::warn!(%error, "no more pages are kept for other guests");
            None
        });
        self.is_full = first_slot.is_none();
        let blocks = first_slot.map_or(0, |_| (pages.len() / BLOCK_BYTES) as u32);
        Kept { first_slot: first_slot.unwrap_or_default(), blocks }
    }

    /// The pages aren't what they were: nobody is to find them again.
    pub(super) fn give_up(&self) {
        self.file.give_up();
    }
}

impl SharedPages for Slots {
    fn read(&mut self, slot: Slot, content: &mut [u8; BLOCK_BYTES]) -> Result<(), SharedPageError> {
        self.file.read(slot.0, content).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => SharedPageError::Empty(slot),
            _ => SharedPageError::Access { slot, source: Box::new(error) },
        })
    }
}
