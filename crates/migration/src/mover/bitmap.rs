//! A set of block numbers, one bit each, walked word by word.

/// A fixed-size set of small integers.
#[derive(Debug, Clone)]
pub(super) struct Bitmap {
    words: Vec<u64>,
    ones: u64,
}

impl Bitmap {
    pub(super) fn new(bits: u64) -> Self {
        let words =
            usize::try_from(bits.div_ceil(64)).expect("a bitmap of the machine's blocks fits in memory");
        Self { words: vec![0; words], ones: 0 }
    }

    /// How many members there are.
    pub(super) fn len(&self) -> u64 {
        self.ones
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ones == 0
    }

    pub(super) fn contains(&self, bit: u64) -> bool {
        self.words[(bit / 64) as usize] & mask(bit) != 0
    }

    /// Returns whether the bit was new.
    pub(super) fn insert(&mut self, bit: u64) -> bool {
        let word = &mut self.words[(bit / 64) as usize];
        let new = *word & mask(bit) == 0;
        *word |= mask(bit);
        self.ones += u64::from(new);
        new
    }

    /// Returns whether the bit was there.
    pub(super) fn remove(&mut self, bit: u64) -> bool {
        let word = &mut self.words[(bit / 64) as usize];
        let was = *word & mask(bit) != 0;
        *word &= !mask(bit);
        self.ones -= u64::from(was);
        was
    }

    pub(super) fn clear(&mut self) {
        self.words.fill(0);
        self.ones = 0;
    }

    /// The smallest member at or after `from`.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        self.first_word(from, |index| self.words[index])
    }

    /// The smallest member at or after `from` that isn't in `other`, a set of the same size.
    pub(super) fn next_outside(&self, other: &Self, from: u64) -> Option<u64> {
        self.first_word(from, |index| self.words[index] & !other.words[index])
    }

    fn first_word(&self, from: u64, word: impl Fn(usize) -> u64) -> Option<u64> {
        let first = (from / 64) as usize;
        let bit_of = |index: usize, word: u64| index as u64 * 64 + u64::from(word.trailing_zeros());
        if first >= self.words.len() {
            return None;
        }
        let head = word(first) & (u64::MAX << (from % 64));
        if head != 0 {
            return Some(bit_of(first, head));
        }
        let index = (first + 1..self.words.len()).find(|&index| word(index) != 0)?;
        Some(bit_of(index, word(index)))
    }

    /// Bytes that the set takes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.words.len() as u64 * 8
    }
}

const fn mask(bit: u64) -> u64 {
    1 << (bit % 64)
}
