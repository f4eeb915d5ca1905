//! What the target lacks, and in which order it gets it.
//!
//! The mover keeps a *set* of owed blocks, not their contents: a block that is written twice before it was sent is
//! owed once and costs nothing more. This is Nicolae and Cappello's RemainingSet with WriteCount and Threshold (HPDC
//! 2012, algorithms 1 and 2), which they made for disk chunks; it serves guest memory and chunks alike.
//!
//! # Heat
//!
//! A write adds one to a block's write count; every pass takes a quarter of the count away again, rounded so that a
//! block that was ever rewritten never becomes quite cold. A block rewritten in every pass settles at a count of 4, in
//! every second one at 2.3, in every third one at 1.7. The first time a block is named is no write: everything is
//! named once.
//!
//! | class | write count | meaning |
//! |---|---|---|
//! | [`Heat::Untouched`] | 0 | not rewritten since the migration began |
//! | [`Heat::Cool`] | < ¼ | rewritten, but not lately |
//! | [`Heat::Warm`] | < threshold | rewritten lately |
//! | [`Heat::Hot`] | < threshold + 1 | rewritten in about every other pass |
//! | [`Heat::Hottest`] | more | rewritten in nearly every pass |
//!
//! # Order
//!
//! 1. Blocks that the target never had, the least hot first. Each has to go whole once, before the stop or in the
//!    pause; once it has gone, whatever is written to it later is a delta. So they come first, and all of them have
//!    gone after a time that is known: their bytes over the rate of the link.
//! 2. Other blocks below the threshold, the least hot first.
//! 3. Hot blocks are *held back*. A hot block's next write comes, by its very class, within about two passes; unless
//!    the guest is stopped before that, sending it again is in vain, and Nicolae's answer is not to push it at all.
//!    But when nothing else is owed the link would idle, and then a copy is free and pays: what is sent in the pause
//!    is a delta with fewer writes in it. So they go when nothing else is owed, the least hot first, and each at most
//!    once a pass, since a second copy in the same pass would buy nothing that the first didn't.
//!
//! Within a class, blocks go in address order by a cursor that moves on and wraps, so that neighbours travel together
//! and nobody starves. The first time round it begins at [`Settings::first_block`]: guests that were booted from one
//! image hold much the same in much the same order, and if each begins elsewhere, each sends a part that the others can
//! then refer to (`content::SharedIndex`) instead of all sending the same part at once. In [`Mode::Final`] the guest is
//! stopped, nothing can be in vain, and everything goes.
//!
//! Both exceptions for hot blocks live from deltas. Chunks that always travel whole want the paper's own rule, which
//! [`Settings::early_copies`] switches on by being off: a block over the threshold isn't sent while the guest runs.

mod bitmap;

use thiserror::Error;

use crate::{BlockId, BlockVersion};
use bitmap::Bitmap;

/// One write in units of a stored write count.
const WRITE: u8 = 16;
/// Below this a count is what decay leaves of writes long ago; `count - count / 4` stays at 3 for ever.
const LONG_AGO: u8 = 4;
/// Number of heat classes.
const CLASSES: usize = 5;

/// How often a block has been rewritten lately; the least hot go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Heat {
    /// Not rewritten since the migration began.
    Untouched,
    /// Rewritten, but not lately.
    Cool,
    /// Rewritten lately, fewer times than the threshold.
    Warm,
    /// At the threshold: held back.
    Hot,
    /// At least one write over the threshold: held back, and last.
    Hottest,
}

impl Heat {
    const ALL: [Self; CLASSES] = [Self::Untouched, Self::Cool, Self::Warm, Self::Hot, Self::Hottest];
    const NOT_HELD_BACK: [Self; 3] = [Self::Untouched, Self::Cool, Self::Warm];
    const HELD_BACK: [Self; 2] = [Self::Hot, Self::Hottest];

    /// Whether blocks of this class wait once the target has some version of them.
    pub fn is_held_back(self) -> bool {
        self >= Self::Hot
    }
}

/// What can be chosen about a mover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Recent writes from which a block is held back (Nicolae's Threshold), 1 to 3; `None` holds nothing back. The
    /// default of 2 is reached by a block that is rewritten in every second pass or oftener.
    pub threshold_writes: Option<u8>,
    /// Send hot blocks before the stop where that makes a later delta smaller, as described above.
    pub early_copies: bool,
    /// Where the address order begins; 0 unless several are moved at once.
    pub first_block: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { threshold_writes: Some(2), early_copies: true, first_block: 0 }
    }
}

/// Whether the guest can still write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The guest runs; hot blocks are held back.
    Live,
    /// The guest is stopped; whatever is owed goes.
    Final,
}

/// What [`Mover::owe`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owed {
    /// The block wasn't owed before.
    Newly,
    /// It was owed already: the version in between is never sent.
    Already,
}

/// A block number beyond the end of what is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("block {block} is beyond the last of {block_count} blocks")]
pub struct UnknownBlock {
    /// The number that was named.
    pub block: u64,
    /// How many blocks there are.
    pub block_count: u64,
}

/// What [`Mover::take`] took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Blocks that the target never had.
    pub first_time: u64,
    /// Blocks of which the target has an older version.
    pub again: u64,
}

impl Taken {
    /// All blocks taken.
    pub fn blocks(self) -> u64 {
        self.first_time + self.again
    }
}

/// Running totals of a mover, in versions of blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Versions named by [`Mover::owe`].
    pub named: u64,
    /// Of these, versions of blocks that had been named before: the guest's writes, as far as they were seen.
    pub rewritten: u64,
    /// Versions that found their block owed already, so that an older one was never sent.
    pub coalesced: u64,
    /// Versions handed out by [`Mover::take`].
    pub sent: u64,
}

/// Owed blocks that are passed over.
#[derive(Debug, Clone, Copy)]
enum Except {
    None,
    Sent,
    SentInPass,
}

/// The set of owed blocks and the order in which they go.
///
/// ```
/// use godwit_migration::{BlockId, mover::{Mover, Owed, Settings}};
///
/// let mut mover = Mover::new(1024, Settings::default());
/// assert_eq!(mover.owe(BlockId(7)).unwrap(), Owed::Newly);
/// assert_eq!(mover.owe(BlockId(7)).unwrap(), Owed::Already); // two versions, one to send
///
/// let mut batch = Vec::new();
/// assert_eq!(mover.take(64, &mut batch).blocks(), 1);
/// assert_eq!(batch[0].id, BlockId(7));
/// assert_eq!(mover.owed_blocks(), 0);
/// ```
#[derive(Debug, Clone)]
pub struct Mover {
    block_count: u64,
    settings: Settings,
    mode: Mode,
    write_counts: Vec<u8>,
    owed: [Bitmap; CLASSES],
    cursors: [u64; CLASSES],
    named: Bitmap,
    sent: Bitmap,
    sent_in_pass: Bitmap,
    owed_first_time: u64,
    /// Whether everything has been named once.
    is_through: bool,
    statistics: Statistics,
}

impl Mover {
    /// A mover of `block_count` blocks, none of them owed yet.
    pub fn new(block_count: u64, settings: Settings) -> Self {
        let bytes =
            usize::try_from(block_count).expect("a byte for each of the machine's blocks fits in memory");
        Self {
            block_count,
            settings,
            mode: Mode::Live,
            write_counts: vec![0; bytes],
            owed: std::array::from_fn(|_| Bitmap::new(block_count)),
            cursors: [settings.first_block.min(block_count); CLASSES],
            named: Bitmap::new(block_count),
            sent: Bitmap::new(block_count),
            sent_in_pass: Bitmap::new(block_count),
            owed_first_time: 0,
            is_through: false,
            statistics: Statistics::default(),
        }
    }

    /// Says that `id` has a version that the target lacks.
    ///
    /// # Errors
    /// [`UnknownBlock`] if there is no such block; nothing has changed then.
    pub fn owe(&mut self, id: BlockId) -> Result<Owed, UnknownBlock> {
        if id.0 >= self.block_count {
            return Err(UnknownBlock { block: id.0, block_count: self.block_count });
        }
        self.statistics.named += 1;
        let before = self.heat_of(id.0);
        let was_owed = self.owed[before as usize].remove(id.0);
        if !self.named.insert(id.0) {
            self.statistics.rewritten += 1;
            let count = &mut self.write_counts[id.0 as usize];
            *count = count.saturating_add(WRITE);
        }
        self.owed[self.heat_of(id.0) as usize].insert(id.0);
        if was_owed {
            self.statistics.coalesced += 1;
            return Ok(Owed::Already);
        }
        self.owed_first_time += u64::from(!self.sent.contains(id.0));
        Ok(Owed::Newly)
    }

    /// [`Mover::owe`] for each of `ids`; returns how many were owed already.
    ///
    /// # Errors
    /// [`UnknownBlock`] at the first unknown one; those before it are owed.
    pub fn owe_many(&mut self, ids: impl IntoIterator<Item = BlockId>) -> Result<u64, UnknownBlock> {
        ids.into_iter().try_fold(0, |coalesced, id| Ok(coalesced + u64::from(self.owe(id)? == Owed::Already)))
    }

    /// Appends at most `max` blocks to `batch` in the order described above; they are no longer owed. The contents
    /// must be read after this call: what is written later is named again.
    pub fn take(&mut self, max: usize, batch: &mut Vec<BlockVersion>) -> Taken {
        let end = batch.len().saturating_add(max);
        let mut taken = Taken::default();
        match self.mode {
            Mode::Final => self.take_classes(&Heat::ALL, Except::None, end, batch, &mut taken),
            Mode::Live => self.take_live(end, batch, &mut taken),
        }
        self.statistics.sent += taken.blocks();
        taken
    }

    /// Takes those of `ids` that are owed, out of their order; they are appended to `batch` and no longer owed.
    pub fn take_these(&mut self, ids: &[BlockId], batch: &mut Vec<BlockVersion>) -> Taken {
        let mut taken = Taken::default();
        for &id in ids {
            if !self.is_owed(id) {
                continue;
            }
            let heat = self.heat_of(id.0);
            self.send(id.0, heat, &mut taken);
            batch.push(BlockVersion { id, hot: heat != Heat::Untouched });
        }
        self.statistics.sent += taken.blocks();
        taken
    }

    /// Ends a pass over the guest's memory: write counts decay, and every held-back block may go once more. A pass
    /// is what the source of dirty blocks makes of it; it should last 0.1 to 1 s for heat to mean anything.
    pub fn next_pass(&mut self) {
        self.is_through = true;
        self.sent_in_pass.clear();
        for count in &mut self.write_counts {
            *count -= *count / 4;
        }
        for heat in Heat::ALL.into_iter().skip(1) {
            self.cool_down(heat);
        }
    }

    /// Says whether the guest can still write.
    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }

    /// Blocks owed, of any class.
    pub fn owed_blocks(&self) -> u64 {
        self.owed.iter().map(Bitmap::len).sum()
    }

    /// Blocks owed of one class.
    pub fn owed_of(&self, heat: Heat) -> u64 {
        self.owed[heat as usize].len()
    }

    /// Blocks owed that are hot.
    pub fn held_back(&self) -> u64 {
        Heat::HELD_BACK.into_iter().map(|heat| self.owed_of(heat)).sum()
    }

    /// Blocks owed that the target never had in any version.
    pub fn never_sent_blocks(&self) -> u64 {
        self.owed_first_time
    }

    /// Whether `id` is owed.
    pub fn is_owed(&self, id: BlockId) -> bool {
        id.0 < self.block_count && self.owed[self.heat_of(id.0) as usize].contains(id.0)
    }

    /// Recent rewrites of a block, rounded down; 0 for a block that doesn't exist.
    pub fn write_count(&self, id: BlockId) -> u8 {
        usize::try_from(id.0)
            .ok()
            .and_then(|index| self.write_counts.get(index))
            .map_or(0, |count| count / WRITE)
    }

    /// The heat class of a block; [`Heat::Untouched`] for one that doesn't exist.
    pub fn heat(&self, id: BlockId) -> Heat {
        if id.0 < self.block_count { self.heat_of(id.0) } else { Heat::Untouched }
    }

    /// Totals since the beginning.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Bytes of memory that the mover takes: two a block.
    pub fn memory_bytes(&self) -> u64 {
        let bitmaps = self.owed.iter().chain([&self.named, &self.sent, &self.sent_in_pass]);
        self.write_counts.len() as u64 + bitmaps.map(Bitmap::memory_bytes).sum::<u64>()
    }

    fn take_live(&mut self, end: usize, batch: &mut Vec<BlockVersion>, taken: &mut Taken) {
        if self.owed_first_time > 0 {
            let classes: &[Heat] = if self.settings.early_copies { &Heat::ALL } else { &Heat::NOT_HELD_BACK };
            self.take_classes(classes, Except::Sent, end, batch, taken);
        }
        self.take_classes(&Heat::NOT_HELD_BACK, Except::None, end, batch, taken);
        let would_idle = Heat::NOT_HELD_BACK.into_iter().all(|heat| self.owed_of(heat) == 0);
        if self.settings.early_copies && would_idle {
            self.take_classes(&Heat::HELD_BACK, Except::SentInPass, end, batch, taken);
        }
    }

    fn take_classes(
        &mut self,
        classes: &[Heat],
        except: Except,
        end: usize,
        batch: &mut Vec<BlockVersion>,
        taken: &mut Taken,
    ) {
        for &heat in classes {
            self.take_class(heat, except, end, batch, taken);
        }
    }

    /// Takes blocks of one class from its cursor on, wrapping once, until `batch` is `end` long.
    fn take_class(
        &mut self,
        heat: Heat,
        except: Except,
        end: usize,
        batch: &mut Vec<BlockVersion>,
        taken: &mut Taken,
    ) {
        let start = self.cursors[heat as usize];
        for range in [start..self.block_count, 0..start] {
            let mut from = range.start;
            while batch.len() < end && !self.owed[heat as usize].is_empty() {
                let Some(block) = self.next_owed(heat, except, from).filter(|block| *block < range.end)
                else {
                    break;
                };
                from = block + 1;
                // Names come in address order too: what lies before the first block goes meanwhile, and doesn't lead
                // astray.
                if self.is_through || block >= self.settings.first_block {
                    self.cursors[heat as usize] = block + 1;
                }
                self.send(block, heat, taken);
                batch.push(BlockVersion { id: BlockId(block), hot: heat != Heat::Untouched });
            }
        }
    }

    fn next_owed(&self, heat: Heat, except: Except, from: u64) -> Option<u64> {
        let owed = &self.owed[heat as usize];
        match except {
            Except::None => owed.next(from),
            Except::Sent => owed.next_outside(&self.sent, from),
            Except::SentInPass => owed.next_outside(&self.sent_in_pass, from),
        }
    }

    fn send(&mut self, block: u64, heat: Heat, taken: &mut Taken) {
        self.owed[heat as usize].remove(block);
        self.sent_in_pass.insert(block);
        if self.sent.insert(block) {
            self.owed_first_time -= 1;
            taken.first_time += 1;
        } else {
            taken.again += 1;
        }
    }

    /// Moves owed blocks of one class to where their decayed counts belong.
    fn cool_down(&mut self, heat: Heat) {
        let mut from = 0;
        while let Some(block) = self.owed[heat as usize].next(from) {
            let now = self.heat_of(block);
            if now != heat {
                self.owed[heat as usize].remove(block);
                self.owed[now as usize].insert(block);
            }
            from = block + 1;
        }
    }

    fn heat_of(&self, block: u64) -> Heat {
        let count = self.write_counts[block as usize];
        let threshold = self.settings.threshold_writes.map_or(u8::MAX, |writes| writes.saturating_mul(WRITE));
        match count {
            0 => Heat::Untouched,
            1..LONG_AGO => Heat::Cool,
            _ if self.settings.threshold_writes.is_none() || count < threshold => Heat::Warm,
            _ if count < threshold.saturating_add(WRITE) => Heat::Hot,
            _ => Heat::Hottest,
        }
    }
}

#[cfg(test)]
mod tests;
