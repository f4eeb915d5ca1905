//! The working set: what it holds, how it is written to, and how one knows that it is right.
//!
//! Even pages hold random bytes, odd ones text-like bytes: words of a fixed vocabulary, which general compressors
//! bring to about a third. So half the working set gives a compressor nothing, which is no better than what memories
//! of real guests give (a zstd ratio of 0.42 to 0.46).
//!
//! Each page begins with the number of writes to it and a checksum of the rest, both kept up by every write. Where the
//! n-th write goes and what it says follows from the seed and n alone. So a check needs no second copy: it replays
//! *where* all writes went, which gives each page's number, and sums up each page. A page that is older than it should
//! be, torn, or swapped with another is found; the price is one word in 512 and a few additions a write.

use crate::random::Random;

const PAGE_WORDS: usize = 512;
/// The words at a page's start that hold its write count and its checksum.
const HEADER_WORDS: usize = 2;
const VOCABULARY_WORDS: usize = 1024;
const LETTERS: &[u8; 32] = b"eeettaaooiinnsshhrrddlucmwfgypb ";

/// How a guest treats its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Workload {
    /// Size of the working set.
    pub(crate) pages: usize,
    /// Pages written to each second; `None`: as fast as it goes.
    pub(crate) pages_per_second: Option<usize>,
    /// Bytes written to a page each time, a multiple of 8.
    pub(crate) bytes_per_write: usize,
    /// Writes random bytes even into pages of text.
    pub(crate) incompressible_writes: bool,
}

impl Workload {
    /// Does nothing.
    pub(crate) const IDLE: Workload =
        Workload { pages: 0, pages_per_second: Some(0), bytes_per_write: 0, incompressible_writes: false };

    /// The workload of that name.
    pub(crate) fn named(name: &str) -> Option<Workload> {
        let paced = |megabytes: usize, pages_per_second, bytes_per_write| Workload {
            pages: megabytes * 256,
            pages_per_second: Some(pages_per_second),
            bytes_per_write,
            incompressible_writes: false,
        };
        Some(match name {
            "idle" => Workload::IDLE,
            "light" => paced(64, 500, 64),
            "medium" => paced(128, 3_000, 128),
            "heavy" => paced(128, 8_000, 512),
            "harsh" => Workload { incompressible_writes: true, ..paced(256, 20_000, 1_024) },
            // Small, and its check stays quick for hours: it replays all writes.
            "steady" => paced(24, 1_500, 256),
            "pattern" => Workload { pages_per_second: None, ..paced(32, 0, 512) },
            _ => return None,
        })
    }
}

/// A guest's working set and the number of writes made to it.
#[derive(Debug)]
pub(crate) struct WorkingSet {
    workload: Workload,
    seed: u64,
    vocabulary: Vec<u64>,
    pages: Vec<Page>,
    places: Random,
    writes: u64,
}

/// A page of the guest, in one page of the machine.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
struct Page([u64; PAGE_WORDS]);

/// What a check found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Every page is what history makes it.
    Right { pages: usize, writes: u64 },
    /// The first page that isn't.
    Wrong { page: usize, reason: &'static str },
}

impl WorkingSet {
    /// A working set as it is before the first write.
    pub(crate) fn fill(workload: Workload, seed: u64) -> WorkingSet {
        let vocabulary = vocabulary(seed);
        let fill = |index| Page::fill(index, &vocabulary, seed);
        let pages = (0..workload.pages).map(fill).collect();
        WorkingSet { workload, seed, vocabulary, pages, places: places(seed), writes: 0 }
    }

    /// Writes to `count` pages; none if there is no working set.
    pub(crate) fn write(&mut self, count: usize) {
        for _ in 0..count.min(self.pages.len() * count) {
            let index = self.places.below(self.pages.len());
            let mut content = Random::new(self.seed, self.writes.wrapping_add(1 << 63));
            let words = self.workload.bytes_per_write / 8;
            let first = HEADER_WORDS + content.below(PAGE_WORDS - HEADER_WORDS - words + 1);
            let random = is_random(index) || self.workload.incompressible_writes;
            let page = &mut self.pages[index];
            for position in first..first + words {
                page.put(position, word(&mut content, random, &self.vocabulary));
            }
            page.0[0] += 1;
            self.writes += 1;
        }
    }

    /// Writes so far: the guest's progress.
    pub(crate) fn writes(&self) -> u64 {
        self.writes
    }

    /// Compares every page with what history makes it.
    pub(crate) fn check(&self) -> Check {
        let mut counts = vec![0u64; self.pages.len()];
        let mut places = places(self.seed);
        for _ in 0..self.writes {
            counts[places.below(self.pages.len())] += 1;
        }
        for (index, (page, count)) in self.pages.iter().zip(counts).enumerate() {
            if page.0[0] != count {
                return Check::Wrong { page: index, reason: "not as many writes as history has" };
            }
            if page.0[1] != page.sum(index) {
                return Check::Wrong { page: index, reason: "contents don't match the checksum" };
            }
        }
        Check::Right { pages: self.pages.len(), writes: self.writes }
    }
}

impl Page {
    fn fill(index: usize, vocabulary: &[u64], seed: u64) -> Page {
        let mut content = Random::new(seed, index as u64);
        let mut page = Page([0; PAGE_WORDS]);
        for position in HEADER_WORDS..PAGE_WORDS {
            page.0[position] = word(&mut content, is_random(index), vocabulary);
        }
        page.0[1] = page.sum(index);
        page
    }

    fn put(&mut self, position: usize, value: u64) {
        let change = value.wrapping_sub(self.0[position]).wrapping_mul(weight(position));
        self.0[1] = self.0[1].wrapping_add(change);
        self.0[position] = value;
    }

    fn sum(&self, index: usize) -> u64 {
        let weighted =
            (HEADER_WORDS..PAGE_WORDS).map(|position| self.0[position].wrapping_mul(weight(position)));
        weighted.fold(index as u64, u64::wrapping_add)
    }
}

/// Odd, so that no changed word vanishes; different for each position, so that no two can be swapped.
fn weight(position: usize) -> u64 {
    2 * position as u64 + 1
}

fn places(seed: u64) -> Random {
    Random::new(seed, 1 << 62)
}

fn is_random(page: usize) -> bool {
    page.is_multiple_of(2)
}

fn word(content: &mut Random, random: bool, vocabulary: &[u64]) -> u64 {
    if random { content.next() } else { vocabulary[content.below(vocabulary.len())] }
}

/// Words of eight letters, the frequent ones oftener.
fn vocabulary(seed: u64) -> Vec<u64> {
    let mut random = Random::new(seed, u64::MAX);
    let mut letter = || LETTERS[random.below(LETTERS.len())];
    (0..VOCABULARY_WORDS).map(|_| u64::from_le_bytes(std::array::from_fn(|_| letter()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALL: Workload =
        Workload { pages: 16, pages_per_second: None, bytes_per_write: 512, incompressible_writes: false };

    #[test]
    fn an_idle_guest_has_nothing_to_write_to() {
        let mut set = WorkingSet::fill(Workload::IDLE, 1);
        set.write(10);
        assert_eq!(set.check(), Check::Right { pages: 0, writes: 0 });
    }

    #[test]
    fn a_page_of_an_earlier_time_is_found() {
        let mut set = WorkingSet::fill(SMALL, 1);
        set.write(50);
        let old = set.pages[3].clone();
        while set.pages[3].0 == old.0 {
            set.write(1);
        }
        set.pages[3] = old;
        assert_eq!(set.check(), Check::Wrong { page: 3, reason: "not as many writes as history has" });
    }

    #[test]
    fn swapped_pages_are_found() {
        let mut set = WorkingSet::fill(SMALL, 1);
        set.pages.swap(2, 4);
        assert_eq!(set.check(), Check::Wrong { page: 2, reason: "contents don't match the checksum" });
    }

    proptest! {
        /// Whatever was written, the check agrees; whichever word is then changed, it doesn't.
        #[test]
        fn a_check_finds_any_changed_word(
            seed: u64,
            writes in 0usize..200,
            page in 0usize..16,
            position in 0usize..PAGE_WORDS,
            change in 1u64..,
        ) {
            let mut set = WorkingSet::fill(SMALL, seed);
            set.write(writes);
            prop_assert_eq!(set.check(), Check::Right { pages: 16, writes: writes as u64 });
            set.pages[page].0[position] ^= change;
            let found = matches!(set.check(), Check::Wrong { page: found, .. } if found == page);
            prop_assert!(found);
        }
    }
}
