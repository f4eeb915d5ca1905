//! How much content repeats, at several granularities, in bounded memory.

use hashbrown::HashMap;
use serde::Serialize;
use xxhash_rust::xxh3::{Xxh3Builder, xxh3_64};

use crate::{BLOCK_BYTES, is_zero};

/// Redundancy at one granularity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Redundancy {
    /// Into how many blocks each page is cut.
    pub blocks_per_page: u32,
    /// Blocks that are zero, in percent of all.
    pub zero_percent: f64,
    /// Blocks that aren't zero and repeat an earlier one, in percent of all.
    pub repeated_percent: f64,
    /// The share of different content that was looked at, in percent: below 100, `repeated_percent` is an estimate,
    /// and a coarse one if few contents make up most repeats.
    pub sampled_percent: f64,
}

/// Counts zero and repeated blocks at each granularity.
pub(super) struct RedundancyCounter {
    granularities: Vec<Granularity>,
    hash_limit: usize,
}

struct Granularity {
    blocks_per_page: u32,
    blocks: u64,
    zero_blocks: u64,
    /// Occurrences by hash, of the content whose hash ends in `sample_bits` zeros.
    occurrences: HashMap<u64, u32, Xxh3Builder>,
    sample_bits: u32,
}

const BLOCKS_PER_PAGE: [u32; 6] = [1, 2, 4, 8, 16, 32];

impl RedundancyCounter {
    /// Keeps at most `hash_limit` hashes at each granularity, at least one.
    pub(super) fn new(hash_limit: usize) -> Self {
        let granularity = |blocks_per_page| Granularity {
            blocks_per_page,
            blocks: 0,
            zero_blocks: 0,
            occurrences: HashMap::default(),
            sample_bits: 0,
        };
        Self { granularities: BLOCKS_PER_PAGE.map(granularity).into(), hash_limit: hash_limit.max(1) }
    }

    pub(super) fn push(&mut self, page: &[u8; BLOCK_BYTES]) {
        for granularity in &mut self.granularities {
            for block in page.chunks_exact(BLOCK_BYTES / granularity.blocks_per_page as usize) {
                granularity.push(block, self.hash_limit);
            }
        }
    }

    pub(super) fn finish(&self) -> Vec<Redundancy> {
        self.granularities.iter().map(Granularity::redundancy).collect()
    }
}

impl Granularity {
    fn push(&mut self, block: &[u8], hash_limit: usize) {
        self.blocks += 1;
        if is_zero(block) {
            self.zero_blocks += 1;
            return;
        }
        let hash = xxh3_64(block);
        if !is_sampled(hash, self.sample_bits) {
            return;
        }
        while self.occurrences.len() >= hash_limit && !self.occurrences.contains_key(&hash) {
            self.sample_bits += 1;
            self.occurrences.retain(|hash, _| is_sampled(*hash, self.sample_bits));
            if !is_sampled(hash, self.sample_bits) {
                return;
            }
        }
        let occurrences = self.occurrences.entry(hash).or_insert(0);
        *occurrences = occurrences.saturating_add(1);
    }

    fn redundancy(&self) -> Redundancy {
        let sampled = 0.5f64.powi(self.sample_bits as i32);
        let repeated: u64 = self.occurrences.values().map(|count| u64::from(*count) - 1).sum();
        let percent = |blocks: f64| 100.0 * blocks / self.blocks.max(1) as f64;
        let most = (self.blocks - self.zero_blocks) as f64;
        Redundancy {
            blocks_per_page: self.blocks_per_page,
            zero_percent: percent(self.zero_blocks as f64),
            repeated_percent: percent((repeated as f64 / sampled).min(most)),
            sampled_percent: 100.0 * sampled,
        }
    }
}

/// Sampling by content, so that all occurrences of a content are counted or none. Past 63 bits one hash in all of
/// them is left, and the loop that asks ends.
fn is_sampled(hash: u64, sample_bits: u32) -> bool {
    hash.trailing_zeros() >= sample_bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_stays_near_the_truth_within_its_bound() {
        let mut counter = RedundancyCounter::new(1000);
        for number in 0..20_000u64 {
            let mut page = [0; BLOCK_BYTES];
            page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = (number / 2 + 1).to_le_bytes());
            counter.push(&page);
        }
        let pages = counter.finish()[0];
        assert!(counter.granularities.iter().all(|granularity| granularity.occurrences.len() <= 1000));
        assert!(pages.sampled_percent < 10.0);
        assert!((45.0..55.0).contains(&pages.repeated_percent), "{pages:?}");
    }
}
