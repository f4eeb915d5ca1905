//! What each technique would save on a given memory, and why: the figures of CloudNet's evaluation, for any RAM image
//! or captured stream.
//!
//! Memory: [`AnalysisLimits::hashes`] × 6 granularities × at most 41 bytes, [`AnalysisLimits::base_bytes`] × 6
//! encoders, and at most 21 bytes for each different page. With the defaults, and 1 GiB of pages: at most 650 MB.

mod redundancy;

use hashbrown::HashSet;
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3Builder;

pub use redundancy::Redundancy;
use redundancy::RedundancyCounter;

use crate::{
    BATCH_BLOCKS, BLOCK_BYTES, BlockId, BlockVersion, Compressor, Encoder, EncoderLimits, Tally, Techniques,
};

/// The bounds of an [`Analyzer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnalysisLimits {
    /// Hashes kept at each granularity. More different content is counted by sampling.
    pub hashes: usize,
    /// Memory of each encoder that a set of techniques is tried with, in bytes.
    pub base_bytes: usize,
    /// zstd's level.
    pub level: i32,
}

impl Default for AnalysisLimits {
    fn default() -> Self {
        Self { hashes: 1 << 20, base_bytes: 64 << 20, level: 1 }
    }
}

/// The result, as plain data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Analysis {
    /// Pages of the image or stream, repeats of a page counted.
    pub pages: u64,
    /// Redundancy at 1, 2, 4, 8, 16 and 32 blocks a page (CloudNet, Figures 6.4(c) and 6.11).
    pub redundancy: Vec<Redundancy>,
    /// Each technique alone, then all (Figure 6.9).
    pub savings: Vec<Saving>,
    /// Sizes of deltas of pages sent again (Figure 6.5). Empty for a plain image.
    pub delta_sizes: Vec<DeltaSizes>,
    /// First against later passes (Table 6.2).
    pub passes: Passes,
}

/// What a set of techniques saves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Saving {
    /// The set.
    pub techniques: Techniques,
    /// Blocks and bytes by form.
    pub tally: Tally,
    /// Bytes saved, in percent of plain transfer; negative if headers cost more than was saved.
    pub saved_percent: f64,
}

/// A bar of the histogram of delta sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeltaSizes {
    /// Deltas are at most this large, and larger than the bar before.
    pub up_to_bytes: u64,
    /// How many there are.
    pub pages: u64,
}

/// First against later sendings of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Passes {
    /// Bytes of pages when they are sent first.
    pub first_bytes: u64,
    /// Bytes of pages when they are sent again.
    pub later_bytes: u64,
    /// What deltas save of the latter.
    pub delta_saved_bytes: u64,
    /// Bytes of pages sent again whose last version was not kept any more.
    pub without_base_bytes: u64,
}

/// Takes pages in the order of an image or a stream.
pub struct Analyzer {
    seen: HashSet<BlockId, Xxh3Builder>,
    redundancy: RedundancyCounter,
    trials: Vec<Trial>,
    delta_sizes: Vec<DeltaSizes>,
    passes: Passes,
    pages: u64,
    versions: Vec<BlockVersion>,
    contents: Vec<u8>,
    compressor: Compressor,
}

struct Trial {
    techniques: Techniques,
    encoder: Encoder,
    tally: Tally,
}

/// Upper ends of the histogram's bars.
const DELTA_SIZE_BARS: [u64; 9] = [16, 64, 128, 256, 512, 1024, 2048, 3072, BLOCK_BYTES as u64];

const TRIALS: [Techniques; 6] = [
    Techniques { zero: true, ..Techniques::NONE },
    Techniques { reference: true, ..Techniques::NONE },
    Techniques { sub_block: true, ..Techniques::NONE },
    DELTA_ALONE,
    Techniques { compress: true, ..Techniques::NONE },
    Techniques::ALL,
];

const DELTA_ALONE: Techniques = Techniques { delta: true, ..Techniques::NONE };

impl Analyzer {
    /// An analyzer that has seen no page yet.
    pub fn new(limits: AnalysisLimits) -> Self {
        let trial = |techniques| {
            let mut encoder =
                Encoder::new(EncoderLimits { base_bytes: limits.base_bytes, level: limits.level });
            encoder.set_techniques(techniques);
            Trial { techniques, encoder, tally: Tally::default() }
        };
        Self {
            seen: HashSet::default(),
            redundancy: RedundancyCounter::new(limits.hashes),
            trials: TRIALS.into_iter().map(trial).collect(),
            delta_sizes: DELTA_SIZE_BARS.map(|up_to_bytes| DeltaSizes { up_to_bytes, pages: 0 }).into(),
            passes: Passes::default(),
            pages: 0,
            versions: Vec::new(),
            contents: Vec::new(),
            compressor: Compressor::new(),
        }
    }

    /// Takes the next page; a page that was given before is a later version of it.
    pub fn push(&mut self, id: BlockId, page: &[u8; BLOCK_BYTES]) {
        let sent_before = !self.seen.insert(id);
        self.pages += 1;
        *if sent_before { &mut self.passes.later_bytes } else { &mut self.passes.first_bytes } +=
            BLOCK_BYTES as u64;
        self.redundancy.push(page);
        self.versions.push(BlockVersion { id, hot: sent_before });
        self.contents.extend_from_slice(page);
        if self.versions.len() == BATCH_BLOCKS {
            self.try_batch();
        }
    }

    /// The result over all pages.
    pub fn finish(mut self) -> Analysis {
        self.try_batch();
        if self.passes.later_bytes == 0 {
            self.delta_sizes.clear();
        }
        Analysis {
            pages: self.pages,
            redundancy: self.redundancy.finish(),
            savings: self.trials.iter().map(Trial::saving).collect(),
            delta_sizes: self.delta_sizes,
            passes: self.passes,
        }
    }

    /// Gives what was gathered to each trial. A stream that holds a page twice in a batch has a base for the second.
    fn try_batch(&mut self) {
        for trial in &mut self.trials {
            let had_base: Vec<_> =
                self.versions.iter().map(|version| trial.encoder.has_base(version.id)).collect();
            let draft = trial.encoder.draft(&self.versions, &self.contents[..]);
            if trial.techniques == DELTA_ALONE {
                let later = self.versions.iter().zip(draft.delta_sizes().zip(had_base));
                for (_, (size_bytes, had_base)) in later.filter(|(version, _)| version.hot) {
                    count_later(&mut self.passes, &mut self.delta_sizes, size_bytes as u64, had_base);
                }
            }
            trial.tally += draft.seal(&mut self.compressor).tally;
        }
        self.versions.clear();
        self.contents.clear();
    }
}

impl Trial {
    fn saving(&self) -> Saving {
        let Tally { raw_bytes, encoded_bytes, .. } = self.tally;
        let saved_percent = 100.0 * (1.0 - encoded_bytes as f64 / raw_bytes.max(1) as f64);
        Saving { techniques: self.techniques, tally: self.tally, saved_percent }
    }
}

fn count_later(passes: &mut Passes, bars: &mut [DeltaSizes], size_bytes: u64, had_base: bool) {
    let block_bytes = BLOCK_BYTES as u64;
    if !had_base {
        passes.without_base_bytes += block_bytes;
        return;
    }
    passes.delta_saved_bytes += block_bytes.saturating_sub(size_bytes);
    if let Some(bar) = bars.iter_mut().find(|bar| size_bytes <= bar.up_to_bytes) {
        bar.pages += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(analysis: &Analysis, techniques: Techniques) -> f64 {
        let saving = analysis.savings.iter().find(|saving| saving.techniques == techniques);
        saving.expect("a trial of each").saved_percent
    }

    fn page(seed: u64) -> [u8; BLOCK_BYTES] {
        let mut page = [0; BLOCK_BYTES];
        for (position, word) in (0u64..).zip(page.as_chunks_mut::<8>().0) {
            *word = xxhash_rust::xxh3::xxh3_64_with_seed(&position.to_le_bytes(), seed).to_le_bytes();
        }
        page
    }

    #[test]
    fn an_image_of_zeros_and_repeats_is_taken_apart() {
        let mut analyzer = Analyzer::new(AnalysisLimits { base_bytes: 8 << 20, ..AnalysisLimits::default() });
        for id in 0..400 {
            let content = if id < 200 { [0; BLOCK_BYTES] } else { page(id % 100) };
            analyzer.push(BlockId(id), &content);
        }
        let analysis = analyzer.finish();
        for redundancy in &analysis.redundancy {
            assert_eq!((redundancy.zero_percent, redundancy.repeated_percent), (50.0, 25.0));
        }
        assert!((49.0..50.0).contains(&saved(&analysis, TRIALS[0])));
        assert!((74.0..75.0).contains(&saved(&analysis, Techniques::ALL)));
        assert!(analysis.delta_sizes.is_empty());
        assert_eq!(analysis.passes, Passes { first_bytes: 400 * 4096, ..Passes::default() });
    }

    #[test]
    fn later_versions_are_told_from_first_ones() {
        let mut analyzer = Analyzer::new(AnalysisLimits { base_bytes: 1 << 20, ..AnalysisLimits::default() });
        for version in 0..3 {
            for id in 0..100 {
                let mut content = page(id);
                content[..100].fill(version);
                analyzer.push(BlockId(id), &content);
            }
        }
        let Analysis { passes, delta_sizes, .. } = analyzer.finish();
        assert_eq!((passes.first_bytes, passes.later_bytes), (100 * 4096, 200 * 4096));
        assert_eq!(passes.without_base_bytes, 0);
        assert!(passes.delta_saved_bytes > 200 * 3900);
        let up_to_128: Vec<_> = delta_sizes.iter().map(|bar| bar.pages).collect();
        assert_eq!(up_to_128, [0, 0, 200, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn an_empty_file_has_an_analysis() {
        let analysis = Analyzer::new(AnalysisLimits::default()).finish();
        assert_eq!(analysis.pages, 0);
        assert!(analysis.savings.iter().all(|saving| saving.saved_percent.is_finite()));
    }
}
