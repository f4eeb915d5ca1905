//! Pages that guests from one host have in common, in a file that the workers of all their migrations share.

use std::io;

use godwit_content::{BLOCK_BYTES, SharedPageError, SharedPages, Slot};
use godwit_migration::wire::Kept;

use crate::{
    job::SharedPlace,
    worker::shared_file::{Generation, Shape, SharedFile},
};

/// The file of pages, a slot each.
pub(super) struct Slots {
    file: SharedFile,
    /// Nothing can be added any more.
    is_full: bool,
}

impl Slots {
    /// The pages for the migration `id`. Where they can't be had, it does without.
    pub(super) fn open(place: &SharedPlace, id: &str) -> Option<Self> {
        let SharedPlace { file, limit_bytes, .. } = place;
        let own: Generation = id.as_bytes().try_into().ok()?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_for_all_until_there_is_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let place = SharedPlace {
            file: directory.path().join("from-hosta.pages"),
            limit_bytes: 3 * BLOCK_BYTES as u64 + 1,
            turn: 0,
        };
        let mut one = Slots::open(&place, "1111111111111111").unwrap();
        let mut other = Slots::open(&place, "2222222222222222").unwrap();
        assert_eq!(other.name().as_deref(), Some("1111111111111111"));
        assert_eq!(one.keep(&[7; 2 * BLOCK_BYTES]), Kept { first_slot: 0, blocks: 2 });
        assert_eq!(other.keep(&[8; 2 * BLOCK_BYTES]).blocks, 0, "all or none");
        assert_eq!(other.keep(&[8; BLOCK_BYTES]).blocks, 0, "what was said stays so");
        assert_eq!(one.keep(&[9; BLOCK_BYTES]), Kept { first_slot: 2, blocks: 1 });
        let mut page = [0; BLOCK_BYTES];
        other.read(Slot(2), &mut page).unwrap();
        assert_eq!(page, [9; BLOCK_BYTES]);
        for beyond in [Slot(3), Slot(u64::MAX)] {
            assert!(
                matches!(other.read(beyond, &mut page), Err(SharedPageError::Empty(slot)) if slot == beyond)
            );
        }
    }
}
