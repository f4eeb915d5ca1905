//! Which chunks to fetch before anyone asks for them: those after a stretch that is read in order.

use crate::geometry::{ChunkIndex, Geometry};

/// As many chunks at most are fetched ahead: 4 MiB.
const WINDOW_MAX: u32 = 16;

/// What was missed last.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// Where a reader in order would miss next: the chunks up to there are fetched or under way.
    fetched: Option<(ChunkIndex, ChunkIndex)>,
    window: u32,
}

impl ReadAhead {
    /// The chunks to fetch after a reader missed those from `first` to `last`. The window doubles with each miss that
    /// follows on what was fetched before.
    pub(super) fn after(
        &mut self,
        first: ChunkIndex,
        last: ChunkIndex,
        geometry: Geometry,
    ) -> impl Iterator<Item = ChunkIndex> + use<> {
        let next = last.0 + 1;
        let until = match self.fetched {
            // Whoever waits for the same chunks says nothing of what comes after them.
            Some((from, _)) if from == first => next,
            Some((from, until)) if (from.0..=until.0).contains(&first.0) => {
                self.window = (self.window * 2).clamp(1, WINDOW_MAX);
                self.begin(first, next + self.window, geometry)
            }
            _ => {
                self.window = 0;
                self.begin(first, next, geometry)
            }
        };
        (next..until).map(ChunkIndex)
    }

    fn begin(&mut self, first: ChunkIndex, until: u32, geometry: Geometry) -> u32 {
        let until = until.min(geometry.chunk_count());
        self.fetched = Some((first, ChunkIndex(until)));
        until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::CHUNK_BYTES;

    fn count(ahead: &mut ReadAhead, missed: u32) -> usize {
        let geometry = Geometry::new(100 * CHUNK_BYTES).expect("a good size");
        ahead.after(ChunkIndex(missed), ChunkIndex(missed), geometry).count()
    }

    #[test]
    fn the_window_grows_with_what_is_read_in_order_and_closes_with_what_is_not() {
        let mut ahead = ReadAhead::default();
        assert_eq!([0, 1, 3, 6].map(|missed| count(&mut ahead, missed)), [0, 1, 2, 4]);
        assert_eq!(count(&mut ahead, 50), 0);
        assert_eq!(count(&mut ahead, 51), 1);
    }

    #[test]
    fn nothing_is_fetched_beyond_the_end() {
        let mut ahead = ReadAhead::default();
        assert_eq!([96, 97, 99].map(|missed| count(&mut ahead, missed)), [0, 1, 0]);
    }
}
