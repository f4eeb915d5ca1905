//! Changes that the host's crash may take back: those since the last seal.

use std::collections::{HashMap, VecDeque};

use crate::{
    geometry::ChunkIndex,
    map::ChunkState,
    record::{Event, Record},
};

/// As many changes at most wait for a flush.
const CHANGES_MAX: usize = 1 << 16;
/// A flush is due when that many wait.
const CHANGES_DUE: usize = CHANGES_MAX / 2;

/// A change, and what was before it.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// Its record's number in the journal.
    number: u64,
    record: Record,
    /// The chunk's state before it.
    before: ChunkState,
}

/// The changes since the last seal, oldest first.
#[derive(Debug, Default)]
pub(super) struct Unsealed {
    changes: VecDeque<Change>,
    /// How many changes there were before the first of them.
    sealed: u64,
}

impl Unsealed {
    pub(super) fn push(&mut self, number: u64, record: Record, before: ChunkState) {
        self.changes.push_back(Change { number, record, before });
    }

    pub(super) fn is_full(&self) -> bool {
        self.changes.len() >= CHANGES_MAX
    }

    pub(super) fn is_flush_due(&self) -> bool {
        self.changes.len() >= CHANGES_DUE
    }

    /// How many changes there were ever: what a flush that begins now will seal.
    pub(super) fn total(&self) -> u64 {
        self.sealed + self.changes.len() as u64
    }

    /// The number of the first record that a flush up to change number `total` doesn't seal.
    pub(super) fn number_at(&self, total: u64) -> Option<u64> {
        let index = usize::try_from(total.saturating_sub(self.sealed)).ok()?;
        self.changes.get(index).map(|change| change.number)
    }

    /// Whether there are changes before number `total`.
    pub(super) fn reaches_below(&self, total: u64) -> bool {
        self.sealed < total
    }

    /// Lets go of the changes before number `total`.
    pub(super) fn seal(&mut self, total: u64) {
        let count = total.saturating_sub(self.sealed).min(self.changes.len() as u64);
        self.changes.drain(..count as usize);
        self.sealed += count;
    }

    /// The states at the last seal of those chunks that changed since.
    pub(super) fn states_sealed(&self) -> HashMap<ChunkIndex, ChunkState> {
        let mut states = HashMap::new();
        for change in &self.changes {
            if let Record::Change { chunk, .. } = change.record {
                states.entry(chunk).or_insert(change.before);
            }
        }
        states
    }

    /// The changes' records, oldest first.
    pub(super) fn records(&self) -> impl Iterator<Item = Record> {
        self.changes.iter().map(|change| change.record)
    }

    /// Gives the changes new numbers, from `first` on: they stand in another journal now.
    pub(super) fn renumber(&mut self, first: u64) {
        for (change, number) in self.changes.iter_mut().zip(first..) {
            change.number = number;
        }
    }
}

/// Whether a record's data is to be compared with it after the host crashed.
pub(super) fn content_told(event: Event) -> Option<u64> {
    if let Event::Written(content) = event { Some(content) } else { None }
}
