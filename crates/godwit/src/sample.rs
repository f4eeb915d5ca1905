//! Looking at a running guest's memory from outside: what is in it, and how the guest writes to it.
//!
//! ```text
//!   sampled pages read ─► all that is scanned: zero? ─► read again ─► … ─► a sample a line, better and better
//! ```
//!
//! The guest isn't stopped and nothing of its QEMU is asked or changed: what it notices is some memory bandwidth, and others
//! less than that, since they go first. The agent
//! may not read other processes' memory, so this runs in a process of its own (`godwit sample`, hidden), which takes a
//! [`Request`] on standard input, prints a [`MemorySample`] a line, and ends by itself.

use std::{
    io::{self, Write},
    iter, thread,
    time::{Duration, Instant},
};

use godwit_content::{
    BATCH_BLOCKS, BLOCK_BYTES, BlockId, BlockVersion, Compressor, Encoder, EncoderLimits, LevelGovernor,
    is_zero,
};
use godwit_migration::forecast::{Changes, Dirtying, MemorySample};
use godwit_qemu::memory::{MAX_PAGES_A_CALL, MemoryRange, PageIndex, ProcessMemory, ProcessMemoryError};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// Runs of neighbours that are read again and again, and pages in each: 32 MiB. Neighbours, since they are compressed
/// together when they travel; many short runs, since what a guest has in one place says little about another.
const SAMPLED_RUNS: u64 = 1024;
const SAMPLED_RUN_PAGES: u64 = 8;
/// Runs that are only looked at for zeros, once: 128 MiB.
const SCANNED_RUNS: u64 = 2048;
const SCANNED_RUN_PAGES: u64 = 16;
/// It makes way for whatever else the host does; by `nice`'s measure, a tenth of an ordinary process's share.
const NICENESS: i32 = 10;
/// Between two readings, at least. A target is ready after half a second, and isn't to wait for the sample.
const READ_EVERY: Duration = Duration::from_millis(100);
/// Readings after the first. No more than bits in [`Sampler::changed`].
const INTERVALS: usize = 8;
/// With fewer, pages that always change can't be told from those that change now and then.
const LEAST_INTERVALS: usize = 3;

/// Whose memory to look at.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// QEMU's process.
    pub pid: u32,
    /// Addresses and sizes, in bytes, of the RAM blocks that travel.
    pub ranges: Vec<(u64, u64)>,
    /// Chooses the pages.
    pub seed: u64,
}

/// Why there is no sample.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SampleError {
    /// The request isn't one.
    #[error("no request on standard input")]
    Request(#[from] serde_json::Error),
    /// The memory can't be read.
    #[error(transparent)]
    Memory(#[from] ProcessMemoryError),
    /// Nobody takes the samples.
    #[error("can't print a sample")]
    Print(#[from] io::Error),
}

/// Reads a request, looks, and prints samples.
///
/// # Errors
/// [`SampleError`].
pub(crate) fn run(request: impl io::Read, mut samples: impl Write) -> Result<(), SampleError> {
    // Without it the samples are as good, and somebody else is slower.
    let _ = rustix::process::nice(NICENESS);
    let request: Request = serde_json::from_reader(request)?;
    let range = |&(host_address, bytes): &(u64, u64)| MemoryRange { host_address, bytes };
    let memory = ProcessMemory::open(request.pid, &request.ranges.iter().map(range).collect::<Vec<_>>())?;
    let mut sampler = Sampler::new(memory.pages(), request.seed);
    let began = Instant::now();
    let mut last = began;
    sampler.begin(|pages, contents| memory.read(pages.iter().copied().map(PageIndex), contents))?;
    sampler.zero_share = zero_share(&memory, request.seed)?;
    for number in 1..=INTERVALS {
        thread::sleep(READ_EVERY.saturating_sub(last.elapsed()));
        last = Instant::now();
        sampler.read_again(elapsed_ms(began), |pages, contents| {
            memory.read(pages.iter().copied().map(PageIndex), contents)
        })?;
        if number >= LEAST_INTERVALS {
            let mut line = serde_json::to_vec(&sampler.sample())?;
            line.push(b'\n');
            samples.write_all(&line)?;
            samples.flush()?;
        }
    }
    Ok(())
}

fn elapsed_ms(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Share of the pages that are zero.
fn zero_share(memory: &ProcessMemory, seed: u64) -> Result<f64, ProcessMemoryError> {
    let pages = places(memory.pages(), SCANNED_RUNS, SCANNED_RUN_PAGES, seed);
    let mut contents = vec![0; MAX_PAGES_A_CALL * BLOCK_BYTES];
    let mut zero_pages = 0;
    for some in pages.chunks(MAX_PAGES_A_CALL) {
        let contents = &mut contents[..some.len() * BLOCK_BYTES];
        memory.read(some.iter().copied().map(PageIndex), contents)?;
        zero_pages += contents.chunks_exact(BLOCK_BYTES).filter(|page| is_zero(page)).count();
    }
    Ok(zero_pages as f64 / pages.len().max(1) as f64)
}

/// Chooses runs of neighbouring pages: one at random in each of `runs_max` equal parts of the memory, or all there are.
fn places(pages: u64, runs_max: u64, run_pages: u64, seed: u64) -> Vec<u64> {
    let runs = pages.div_ceil(run_pages);
    let parts = runs.min(runs_max);
    let run = |part: u64| {
        let (from, to) = (part * runs / parts, (part + 1) * runs / parts);
        from + xxh3_64(&(seed ^ part).to_le_bytes()) % (to - from)
    };
    (0..parts).map(run).flat_map(|run| run * run_pages..((run + 1) * run_pages).min(pages)).collect()
}

/// What is known of the sampled pages. No clock and no memory of its own: both come in.
struct Sampler {
    pages_total: u64,
    pages: Vec<u64>,
    zero_share: f64,
    /// Mean encoded size of a page that isn't zero.
    whole_bytes: f64,
    /// As they were at first, and in the newest reading.
    first: Vec<u8>,
    newest: Vec<u8>,
    /// Digests of the newest reading.
    digests: Vec<u64>,
    /// Of each page one bit an interval: whether it changed.
    changed: Vec<u8>,
    /// When the readings after the first were.
    read_at_ms: Vec<u64>,
}

impl Sampler {
    fn new(pages_total: u64, seed: u64) -> Self {
        let pages = places(pages_total, SAMPLED_RUNS, SAMPLED_RUN_PAGES, seed);
        let bytes = pages.len() * BLOCK_BYTES;
        Self {
            pages_total,
            zero_share: 0.0,
            whole_bytes: 0.0,
            first: vec![0; bytes],
            newest: vec![0; bytes],
            digests: vec![0; pages.len()],
            changed: vec![0; pages.len()],
            read_at_ms: Vec::new(),
            pages,
        }
    }

    fn begin<E>(&mut self, read: impl Fn(&[u64], &mut [u8]) -> Result<(), E>) -> Result<(), E> {
        read(&self.pages, &mut self.first)?;
        self.digests = self.first.chunks_exact(BLOCK_BYTES).map(xxh3_64).collect();
        let is_full = |page: &usize| !is_zero(block(&self.first, *page));
        let full: Vec<usize> = (0..self.pages.len()).filter(is_full).collect();
        self.whole_bytes = mean_encoded_bytes(&mut encoder(self.first.len()), &self.first, &full);
        Ok(())
    }

    fn read_again<E>(
        &mut self,
        now_ms: u64,
        read: impl Fn(&[u64], &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        read(&self.pages, &mut self.newest)?;
        let bit = 1 << self.read_at_ms.len();
        let pages = self.newest.chunks_exact(BLOCK_BYTES).zip(&mut self.digests).zip(&mut self.changed);
        for ((content, digest), changed) in pages {
            let now = xxh3_64(content);
            if now != *digest {
                *changed |= bit;
                *digest = now;
            }
        }
        self.read_at_ms.push(now_ms);
        Ok(())
    }

    fn sample(&self) -> MemorySample {
        let (hot, intervals) = self.intervals();
        MemorySample {
            pages: self.pages_total,
            zero_share: self.zero_share,
            whole_bytes: self.whole_bytes,
            delta_bytes: self.delta_bytes(),
            delta_age_ms: self.read_at_ms.last().map_or(0.0, |ms| *ms as f64),
            dirtying: Dirtying::fit(self.pages_total, self.pages.len() as u64, hot, &intervals),
        }
    }

    /// Pages that changed in every interval, and what the others did.
    fn intervals(&self) -> (u64, Vec<Changes>) {
        let always = ((1_u16 << self.read_at_ms.len()) - 1) as u8;
        let (hot, others): (Vec<u8>, Vec<u8>) =
            self.changed.iter().filter(|bits| **bits != 0).partition(|bits| **bits == always);
        let starts = iter::once(0).chain(self.read_at_ms.iter().copied());
        let changes = |(number, (from, to)): (usize, (u64, &u64))| {
            let (this, before) = (1_u8 << number, (1_u8 << number) - 1);
            let count = |of: &dyn Fn(u8) -> bool| others.iter().filter(|bits| of(**bits)).count() as u64;
            Changes {
                elapsed_ms: to - from,
                changed: count(&|bits| bits & this != 0),
                again: count(&|bits| bits & this != 0 && bits & before != 0),
                known: count(&|bits| bits & before != 0),
            }
        };
        (hot.len() as u64, starts.zip(&self.read_at_ms).enumerate().map(changes).collect())
    }

    /// Mean encoded size of a page that changed, against what it was at first.
    fn delta_bytes(&self) -> f64 {
        let pages: Vec<usize> = (0..self.pages.len()).filter(|page| self.changed[*page] != 0).collect();
        let mut encoder = encoder(4 * pages.len() * BLOCK_BYTES);
        for batch in pages.chunks(BATCH_BLOCKS) {
            encoder.draft(&versions(batch), gather(&self.first, batch));
        }
        mean_encoded_bytes(&mut encoder, &self.newest, &pages)
    }
}

/// An encoder as a migration begins with, that keeps what it saw in so much memory.
fn encoder(base_bytes: usize) -> Encoder {
    Encoder::new(EncoderLimits { base_bytes, level: LevelGovernor::default().level() })
}

/// What a page takes in batches of these; 0 of none.
fn mean_encoded_bytes(encoder: &mut Encoder, contents: &[u8], pages: &[usize]) -> f64 {
    let mut compressor = Compressor::new();
    let encoded = |batch: &[usize]| {
        let draft = encoder.draft(&versions(batch), gather(contents, batch));
        draft.seal(&mut compressor).bytes.len()
    };
    let bytes: usize = pages.chunks(BATCH_BLOCKS).map(encoded).sum();
    bytes as f64 / pages.len().max(1) as f64
}

fn versions(pages: &[usize]) -> Vec<BlockVersion> {
    pages.iter().map(|page| BlockVersion { id: BlockId(*page as u64), hot: true }).collect()
}

fn gather(contents: &[u8], pages: &[usize]) -> Vec<u8> {
    pages.iter().map(|page| block(contents, *page)).collect::<Vec<_>>().concat()
}

fn block(contents: &[u8], page: usize) -> &[u8] {
    &contents[page * BLOCK_BYTES..][..BLOCK_BYTES]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A memory of which every second page is zero, and every fourth gets another first byte at each reading.
    fn read(reading: u8) -> impl Fn(&[u64], &mut [u8]) -> Result<(), ()> {
        move |pages, contents| {
            for (page, content) in pages.iter().zip(contents.chunks_exact_mut(BLOCK_BYTES)) {
                let mut word = page.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                for byte in content.iter_mut() {
                    word = word.rotate_left(9).wrapping_mul(0x2545_f491_4f6c_dd1d);
                    *byte = if page % 2 == 0 { 0 } else { (word >> 56) as u8 };
                }
                if page % 4 == 1 {
                    content[0] = reading;
                }
            }
            Ok(())
        }
    }

    #[test]
    fn a_memory_is_described() {
        let mut sampler = Sampler::new(100_000, 7);
        sampler.begin(read(0)).unwrap();
        for reading in 1..=4 {
            sampler.read_again(u64::from(reading) * 200, read(reading)).unwrap();
        }
        let sample = sampler.sample();
        assert!((4_000.0..4_200.0).contains(&sample.whole_bytes), "{sample:?}");
        assert!((1.0..40.0).contains(&sample.delta_bytes), "{sample:?}");
        assert!((sample.dirtying.hot_pages - 25_000.0).abs() < 300.0, "{sample:?}");
        assert_eq!(sample.dirtying.warm_pages_per_second, 0.0);
        assert_eq!((sample.pages, sample.delta_age_ms), (100_000, 800.0));
    }

    #[test]
    fn runs_lie_everywhere_once_and_within_the_memory() {
        for pages in [1, 7, 8, 9, 8_191, 8_193, 131_072, 1 << 28] {
            let places = places(pages, SAMPLED_RUNS, SAMPLED_RUN_PAGES, 3);
            assert!(places.is_sorted_by(|one, next| one < next), "{pages}");
            assert!(places.last().is_some_and(|last| *last < pages), "{pages}");
            let enough = pages.min(SAMPLED_RUNS * SAMPLED_RUN_PAGES).saturating_sub(SAMPLED_RUN_PAGES);
            assert!(places.len() as u64 > enough, "{pages}: {}", places.len());
        }
    }
}
