//! How fast the engine drafts on one core, beside what the machine could do at most.
//!
//! The mix is that of 14 measured guests: zero pages, few repeats, the rest fresh; then a writer that changes some
//! bytes of many pages. The table is printed before criterion's own figures, engine and roofline of the same minute.
//! It counts the thread's CPU time, best of five passes, because a machine that compiles something else meanwhile
//! makes wall time meaningless.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use godwit_content::{
    BATCH_BLOCKS, BLOCK_BYTES, BlockId, BlockVersion, Compressor, Decoder, DecoderLimits, Draft, Encoder,
    EncoderLimits, Tally, Techniques, VecMemory,
};
use nix::time::{ClockId, clock_gettime};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

const GUEST_BLOCKS: usize = 32 * 1024;
const BATCH_BYTES: usize = BATCH_BLOCKS * BLOCK_BYTES;

/// A guest's memory and how it changes, from a seed.
struct Guest {
    memory: Vec<u8>,
    state: u64,
}

impl Guest {
    /// `zero_percent` of zero pages; of the rest `repeat_percent` repeat, the others are half random and half text.
    fn new(zero_percent: u64, repeat_percent: u64) -> Self {
        let mut guest = Self { memory: vec![0; GUEST_BLOCKS * BLOCK_BYTES], state: 1 };
        for block in 0..GUEST_BLOCKS {
            let (kind, repeat) = (guest.random(100), guest.random(100));
            if kind < zero_percent {
                continue;
            }
            if repeat < repeat_percent && block > 0 {
                let from = guest.random(block as u64) as usize * BLOCK_BYTES;
                guest.memory.copy_within(from..from + BLOCK_BYTES, block * BLOCK_BYTES);
                continue;
            }
            guest.fill(block);
        }
        guest
    }

    fn fill(&mut self, block: usize) {
        for word in 0..BLOCK_BYTES / 8 {
            let random = self.random(u64::MAX);
            let value = if block.is_multiple_of(2) { random } else { random & 0x0f0f_0707_0f0f_0303 };
            let at = block * BLOCK_BYTES + word * 8;
            self.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Changes `bytes` bytes at a random place of each block in `blocks`.
    fn write(&mut self, blocks: std::ops::Range<usize>, bytes: usize) {
        for block in blocks {
            let offset = self.random((BLOCK_BYTES - bytes) as u64) as usize;
            for byte in 0..bytes {
                self.memory[block * BLOCK_BYTES + offset + byte] = self.random(256) as u8;
            }
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        xxh3_64(&self.state.to_le_bytes()) % below
    }

    fn batches(&self) -> impl Iterator<Item = (Vec<BlockVersion>, &[u8])> {
        self.memory.chunks(BATCH_BYTES).enumerate().map(|(batch, contents)| {
            let ids = (batch * BATCH_BLOCKS) as u64..;
            let versions = ids.take(contents.len() / BLOCK_BYTES);
            (versions.map(|id| BlockVersion { id: BlockId(id), hot: id % 4 == 0 }).collect(), contents)
        })
    }
}

fn encoder() -> Encoder {
    Encoder::new(EncoderLimits { base_bytes: GUEST_BLOCKS * BLOCK_BYTES / 4, level: 1 })
}

/// Drafts a whole pass; the copy into the vectors that drafts take over stands for reading the guest's memory and
/// isn't counted.
fn draft(encoder: &mut Encoder, guest: &Guest, mut keep: impl FnMut(Draft)) -> Duration {
    let mut spent = Duration::ZERO;
    for (versions, contents) in guest.batches() {
        let contents = contents.to_vec();
        let start = cpu_time();
        let draft = encoder.draft(&versions, contents);
        spent += cpu_time() - start;
        keep(draft);
    }
    spent
}

fn print_rate(name: &str, bytes: usize, spent: Duration) {
    println!("{name:<44} {:6.2} GB/s", bytes as f64 / spent.as_secs_f64() / 1e9);
}

fn print_best(name: &str, bytes: usize, mut pass: impl FnMut() -> Duration) {
    print_rate(name, bytes, (0..5).map(|_| pass()).min().unwrap_or_default());
}

fn timed(mut work: impl FnMut()) -> Duration {
    let start = cpu_time();
    work();
    cpu_time() - start
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has a clock").into()
}

fn roofline(guest: &Guest) {
    let bytes = guest.memory.len();
    let mut copy = vec![0; BATCH_BYTES];
    let per_block = |work: &dyn Fn(&[u8]) -> u64| {
        timed(|| {
            guest.memory.chunks(BLOCK_BYTES).for_each(|block| {
                black_box(work(block));
            })
        })
    };
    let or = |block: &[u8]| {
        let words = block.as_chunks::<8>().0.iter();
        words.fold(0, |all, word| all | u64::from_ne_bytes(*word))
    };
    print_best("roofline: memcpy", bytes, || {
        timed(|| {
            guest.memory.chunks(BATCH_BYTES).for_each(|batch| black_box(&mut copy).copy_from_slice(batch))
        })
    });
    print_best("roofline: zero check (OR of all words)", bytes, || per_block(&or));
    print_best("roofline: xxh3-128, 1 KiB at a time", bytes, || {
        per_block(&|block| block.chunks(1024).fold(0, |all, sub| all ^ xxh3_128(sub) as u64))
    });
}

fn table(_: &mut Criterion) {
    for (zero_percent, repeat_percent) in [(29, 11), (50, 7), (74, 3), (0, 0)] {
        let mut guest = Guest::new(zero_percent, repeat_percent);
        let bytes = guest.memory.len();
        println!("\n{zero_percent} % zero, {repeat_percent} % repeats");
        if zero_percent == 29 {
            roofline(&guest);
        }
        print_best("draft, first pass", bytes, || draft(&mut encoder(), &guest, drop));
        let mut encoder = encoder();
        draft(&mut encoder, &guest, drop);
        let mut compressor = Compressor::new();
        let mut tally = Tally::default();
        print_best("draft, pass of 128 byte deltas", bytes / 4, || {
            guest.write(0..GUEST_BLOCKS, 128);
            hot_pass(&mut encoder, &guest, |draft| tally += draft.seal(&mut compressor).tally)
        });
        println!("{tally:?}");
    }
}

/// Drafts the hot quarter of the guest.
fn hot_pass(encoder: &mut Encoder, guest: &Guest, mut keep: impl FnMut(Draft)) -> Duration {
    let hot: Vec<_> = (0..GUEST_BLOCKS).step_by(4).collect();
    let mut spent = Duration::ZERO;
    for batch in hot.chunks(BATCH_BLOCKS) {
        let versions: Vec<_> =
            batch.iter().map(|block| BlockVersion { id: BlockId(*block as u64), hot: true }).collect();
        let block = |block: &usize| &guest.memory[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES];
        let contents = batch.iter().flat_map(block).copied().collect::<Vec<_>>();
        let start = cpu_time();
        let draft = encoder.draft(&versions, contents);
        spent += cpu_time() - start;
        keep(draft);
    }
    spent
}

fn stages(criterion: &mut Criterion) {
    let guest = Guest::new(50, 7);
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Bytes(guest.memory.len() as u64)).sample_size(10);
    group.bench_function("draft", |bencher| {
        bencher.iter_custom(|count| (0..count).map(|_| draft(&mut encoder(), &guest, drop)).sum())
    });
    for level in [-5, 1, 3] {
        group.bench_function(format!("draft and seal, zstd {level}"), |bencher| {
            let mut compressor = Compressor::new();
            bencher.iter(|| {
                let mut encoder = encoder();
                encoder.set_level(level);
                draft(&mut encoder, &guest, |draft| drop(black_box(draft.seal(&mut compressor))))
            })
        });
    }
    group.bench_function("decode, uncompressed", |bencher| {
        let mut encoder = encoder();
        encoder.set_techniques(Techniques { compress: false, ..Techniques::ALL });
        let (mut batches, mut compressor) = (Vec::new(), Compressor::new());
        draft(&mut encoder, &guest, |draft| batches.push(draft.seal(&mut compressor)));
        let mut memory = VecMemory::zeroed(GUEST_BLOCKS);
        bencher.iter(|| {
            let mut decoder = Decoder::new(DecoderLimits { block_count: GUEST_BLOCKS as u64 });
            for batch in &batches {
                decoder.decode(&batch.bytes, &mut memory).expect("own batches decode");
            }
        })
    });
}

criterion_group!(benches, table, stages);
criterion_main!(benches);
