//! What is new in a block, as runs of lines: two bytes, the first line and how many follow it, and then the lines.

use crate::{BLOCK_BYTES, Block};

const LINE_BYTES: usize = 16;
const LINES: usize = BLOCK_BYTES / LINE_BYTES;

/// Appends what turns `old` into `new`.
pub(crate) fn push(old: &Block, new: &Block, changes: &mut Vec<u8>) {
    let (old, new) = (lines(old), lines(new));
    let mut from = 0;
    while let Some(first) = (from..LINES).find(|line| old[*line] != new[*line]) {
        let end = (first..LINES).find(|line| old[*line] == new[*line]).unwrap_or(LINES);
        changes.extend([first as u8, (end - first - 1) as u8]);
        changes.extend_from_slice(new[first..end].as_flattened());
        from = end;
    }
}

/// Makes one change after the other. What isn't a change ends it.
pub(crate) fn apply(mut changes: &[u8], block: &mut Block) {
    while let Some(([first, more], rest)) = changes.split_first_chunk() {
        let (from, bytes) = (usize::from(*first) * LINE_BYTES, (usize::from(*more) + 1) * LINE_BYTES);
        let (Some((new, rest)), Some(place)) =
            (rest.split_at_checked(bytes), block.get_mut(from..from + bytes))
        else {
            return;
        };
        place.copy_from_slice(new);
        changes = rest;
    }
}

fn lines(block: &Block) -> &[[u8; LINE_BYTES]] {
    block.as_chunks().0
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn changes_make_the_new_of_the_old(
            versions in vec(vec((0..BLOCK_BYTES, any::<u8>()), 0..40), 1..5),
            whole in any::<bool>(),
        ) {
            let (mut block, mut changes) = ([7; BLOCK_BYTES], Vec::new());
            for writes in versions {
                let before = block;
                writes.into_iter().for_each(|(position, byte)| block[position] = byte);
                if whole {
                    block.iter_mut().for_each(|byte| *byte ^= 1);
                }
                push(&before, &block, &mut changes);
            }
            let mut again = [7; BLOCK_BYTES];
            apply(&changes, &mut again);
            prop_assert_eq!(again, block);
        }

        #[test]
        fn nonsense_does_no_harm(changes in vec(any::<u8>(), 0..600)) {
            apply(&changes, &mut [0; BLOCK_BYTES]);
        }
    }

    #[test]
    fn what_is_equal_takes_nothing() {
        let mut changes = Vec::new();
        push(&[1; BLOCK_BYTES], &[1; BLOCK_BYTES], &mut changes);
        assert!(changes.is_empty());
    }
}
