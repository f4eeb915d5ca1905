//! Deltas: the XOR of two versions of a sub-block as runs of changed bytes (CloudNet, 6.4.2.3; Svärd).

use crate::{SUB_BLOCK_BYTES, SubBlock};

/// A run of changed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Unchanged bytes before it, since the run before or the start of the sub-block.
    pub(crate) skip: u16,
    /// Changed bytes in it.
    pub(crate) length: u16,
}

/// Deltas of many sub-blocks, one after another, by column: each column has a character of its own, and zstd does
/// better on them apart.
#[derive(Default)]
pub(crate) struct Deltas {
    /// Runs in each sub-block.
    pub(crate) run_counts: Vec<u8>,
    pub(crate) runs: Vec<Run>,
    /// The XOR of both versions, for the bytes of all runs.
    pub(crate) xor: Vec<u8>,
}

/// Bytes that a run costs beside its content, before compression.
pub(crate) const RUN_BYTES: usize = 4;

/// A delta that would cost more than this is dense: zstd over the new content usually beats it, and giving it up
/// early is cheap.
const DENSE_BYTES: usize = SUB_BLOCK_BYTES * 3 / 4;

/// Changed bytes nearer to each other than this share a run, which is cheaper than another run.
const MERGE_BYTES: usize = RUN_BYTES;

const LINE_BYTES: usize = 64;

impl Deltas {
    /// Appends the delta from `old` to `new` and returns its cost in bytes; appends nothing if it is dense.
    pub(crate) fn push(&mut self, old: &SubBlock, new: &SubBlock) -> Option<usize> {
        let (first_run, first_xor) = (self.runs.len(), self.xor.len());
        let mut open: Option<(usize, usize)> = None;
        let mut written = 0;
        for (line, (old_line, new_line)) in lines(old).iter().zip(lines(new)).enumerate() {
            let mut changed = changed_bytes(old_line, new_line);
            while changed != 0 {
                let start = changed.trailing_zeros() as usize;
                let length = (changed >> start).trailing_ones() as usize;
                changed &= u64::MAX.checked_shl((start + length) as u32).unwrap_or(0);
                let (start, end) = (line * LINE_BYTES + start, line * LINE_BYTES + start + length);
                open = match open {
                    Some((first, last)) if start - last < MERGE_BYTES => Some((first, end)),
                    Some(run) => {
                        written = self.close_run(run, written, old, new);
                        Some((start, end))
                    }
                    None => Some((start, end)),
                };
            }
            if self.cost_since(first_run, first_xor) > DENSE_BYTES {
                break;
            }
        }
        if let Some(run) = open {
            self.close_run(run, written, old, new);
        }
        self.keep_unless_dense(first_run, first_xor)
    }

    /// Appends a copy of `counts` sub-blocks' deltas from other columns.
    pub(crate) fn append(&mut self, run_counts: &[u8], runs: &[Run], xor: &[u8]) {
        self.run_counts.extend_from_slice(run_counts);
        self.runs.extend_from_slice(runs);
        self.xor.extend_from_slice(xor);
    }

    /// Takes the last sub-block's delta off again.
    pub(crate) fn pop(&mut self) {
        let Some(count) = self.run_counts.pop() else { return };
        let first_run = self.runs.len() - usize::from(count);
        let xor_bytes: usize = self.runs.drain(first_run..).map(|run| usize::from(run.length)).sum();
        self.xor.truncate(self.xor.len() - xor_bytes);
    }

    pub(crate) fn clear(&mut self) {
        self.run_counts.clear();
        self.runs.clear();
        self.xor.clear();
    }

    fn close_run(&mut self, run: (usize, usize), written: usize, old: &SubBlock, new: &SubBlock) -> usize {
        let (start, end) = run;
        self.runs.push(Run { skip: (start - written) as u16, length: (end - start) as u16 });
        self.xor.extend(old[start..end].iter().zip(&new[start..end]).map(|(old, new)| old ^ new));
        end
    }

    fn cost_since(&self, first_run: usize, first_xor: usize) -> usize {
        (self.runs.len() - first_run) * RUN_BYTES + self.xor.len() - first_xor
    }

    fn keep_unless_dense(&mut self, first_run: usize, first_xor: usize) -> Option<usize> {
        let cost = self.cost_since(first_run, first_xor);
        if cost > DENSE_BYTES {
            self.runs.truncate(first_run);
            self.xor.truncate(first_xor);
            return None;
        }
        self.run_counts.push((self.runs.len() - first_run) as u8);
        Some(cost)
    }
}

/// XORs runs into a sub-block that holds the old version. `None` if the runs leave the sub-block or `xor` is short;
/// the sub-block's content is then unspecified.
pub(crate) fn apply(runs: &[Run], xor: &mut &[u8], sub_block: &mut [u8]) -> Option<()> {
    let mut position = 0;
    for run in runs {
        let start = position + usize::from(run.skip);
        position = start + usize::from(run.length);
        let target = sub_block.get_mut(start..position)?;
        let (bytes, rest) = xor.split_at_checked(target.len())?;
        target.iter_mut().zip(bytes).for_each(|(target, byte)| *target ^= byte);
        *xor = rest;
    }
    Some(())
}

fn lines(sub_block: &SubBlock) -> &[[u8; LINE_BYTES]] {
    sub_block.as_chunks().0
}

/// A bit for each byte of a line that differs.
fn changed_bytes(old: &[u8; LINE_BYTES], new: &[u8; LINE_BYTES]) -> u64 {
    let (old, _) = old.as_chunks::<8>();
    let (new, _) = new.as_chunks::<8>();
    let xor: [u64; LINE_BYTES / 8] =
        std::array::from_fn(|word| u64::from_le_bytes(old[word]) ^ u64::from_le_bytes(new[word]));
    if xor.iter().fold(0, |all, word| all | word) == 0 {
        return 0;
    }
    (0..).zip(xor).fold(0, |mask, (word, xor)| mask | nonzero_bytes(xor) << (word * 8))
}

/// A bit for each byte of a word that isn't zero: carries into each byte's top bit, then gathers the top bits.
fn nonzero_bytes(word: u64) -> u64 {
    const LOW_SEVEN: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let tops = (((word & LOW_SEVEN) + LOW_SEVEN) | word) & !LOW_SEVEN;
    (tops >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rebuilt(deltas: &Deltas, old: &SubBlock) -> SubBlock {
        let mut rebuilt = *old;
        let mut xor = &deltas.xor[..];
        apply(&deltas.runs, &mut xor, &mut rebuilt).expect("own runs stay inside");
        assert!(xor.is_empty());
        rebuilt
    }

    proptest! {
        #[test]
        fn nonzero_bytes_agrees_with_looking(word: u64, blank: u8) {
            let mut bytes = word.to_le_bytes();
            (0..8).filter(|bit| blank >> bit & 1 == 1).for_each(|byte| bytes[byte] = 0);
            let expected = (0..8).fold(0, |mask, byte| mask | u64::from(bytes[byte] != 0) << byte);
            prop_assert_eq!(nonzero_bytes(u64::from_le_bytes(bytes)), expected);
        }

        #[test]
        fn applying_a_delta_gives_the_new_version(
            old in prop::collection::vec(any::<u8>(), SUB_BLOCK_BYTES),
            writes in prop::collection::vec((0..SUB_BLOCK_BYTES, any::<u8>()), 0..300),
        ) {
            let old: SubBlock = old.try_into().unwrap();
            let mut new = old;
            writes.iter().for_each(|(position, byte)| new[*position] = *byte);
            let mut deltas = Deltas::default();
            match deltas.push(&old, &new) {
                Some(cost) => {
                    prop_assert!(cost <= DENSE_BYTES);
                    prop_assert_eq!(rebuilt(&deltas, &old), new);
                    deltas.pop();
                }
                None => prop_assert!(writes.len() * (RUN_BYTES + 1) > DENSE_BYTES),
            }
            prop_assert!(deltas.runs.is_empty() && deltas.xor.is_empty() && deltas.run_counts.is_empty());
        }
    }

    #[test]
    fn an_unchanged_sub_block_costs_nothing() {
        let mut deltas = Deltas::default();
        assert_eq!(deltas.push(&[5; SUB_BLOCK_BYTES], &[5; SUB_BLOCK_BYTES]), Some(0));
        assert_eq!(deltas.run_counts, [0]);
    }

    #[test]
    fn runs_cross_lines_and_merge_over_small_gaps() {
        let old = [0; SUB_BLOCK_BYTES];
        let mut new = old;
        new[60..70].fill(1);
        new[72..80].fill(1);
        new[84..90].fill(1);
        let mut deltas = Deltas::default();
        deltas.push(&old, &new);
        assert_eq!(deltas.runs, [Run { skip: 60, length: 20 }, Run { skip: 4, length: 6 }]);
    }

    #[test]
    fn hostile_runs_are_refused() {
        let mut sub_block = [0; SUB_BLOCK_BYTES];
        let beyond = [Run { skip: 1000, length: 25 }];
        assert_eq!(apply(&beyond, &mut &[0; 2000][..], &mut sub_block), None);
        let short = [Run { skip: 0, length: 25 }];
        assert_eq!(apply(&short, &mut &[0; 24][..], &mut sub_block), None);
    }
}
