//! Where content was seen: from a hash of a sub-block to places in the base cache.
//!
//! The index is lossy and may be stale, which keeps it small and lets nothing need removal: whoever follows a place
//! compares the bytes there first. A full bucket drops its oldest entry.

/// A fixed number of buckets of eight entries, newest first. An entry is a tag (upper half) and a place plus one
/// (lower half), so that zeroed memory, which the system hands out lazily, is an empty index.
pub(crate) struct ContentIndex {
    buckets: Vec<[u64; WAYS]>,
}

/// A sub-block in the base cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    pub(crate) sub_block: u8,
}

const WAYS: usize = 8;

/// Entries a slot: its four sub-blocks, and half as much again so that few buckets overflow.
const ENTRIES_PER_SLOT: usize = 6;

impl ContentIndex {
    pub(crate) const BYTES_PER_SLOT: usize = ENTRIES_PER_SLOT * size_of::<u64>();

    pub(crate) fn new(slots: usize) -> Self {
        Self { buckets: vec![[0; WAYS]; (slots * ENTRIES_PER_SLOT).div_ceil(WAYS)] }
    }

    /// The places where content with this key may be, newest first; at most eight.
    pub(crate) fn candidates(&self, key: u64) -> impl Iterator<Item = Place> {
        let bucket = self.bucket(key).map_or(&[][..], |bucket| &self.buckets[bucket][..]);
        bucket.iter().filter(move |entry| **entry != 0 && tag(**entry) == tag(key)).map(|entry| place(*entry))
    }

    /// Remembers a place, instead of an older one of the same tag if there is one.
    pub(crate) fn insert(&mut self, key: u64, place: Place) {
        let Some(bucket) = self.bucket(key) else { return };
        let bucket = &mut self.buckets[bucket];
        let same = bucket.iter().position(|entry| *entry == 0 || tag(*entry) == tag(key));
        bucket[..=same.unwrap_or(WAYS - 1)].rotate_right(1);
        bucket[0] = entry(key, place);
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.buckets.capacity() * size_of::<[u64; WAYS]>()
    }

    /// Scales the key's low half to the number of buckets; the high half is the tag.
    fn bucket(&self, key: u64) -> Option<usize> {
        let scaled = ((key & 0xffff_ffff) * self.buckets.len() as u64) >> 32;
        (!self.buckets.is_empty()).then_some(scaled as usize)
    }
}

fn tag(key_or_entry: u64) -> u32 {
    (key_or_entry >> 32) as u32
}

fn entry(key: u64, place: Place) -> u64 {
    let number = u64::from(place.slot) * 4 + u64::from(place.sub_block) + 1;
    key & !0xffff_ffff | number
}

fn place(entry: u64) -> Place {
    let number = (entry as u32) - 1;
    Place { slot: number / 4, sub_block: (number % 4) as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_bucket_drops_its_oldest_entry() {
        let mut index = ContentIndex::new(1);
        let key = |number: u64| number << 32;
        for number in 0..9 {
            index.insert(key(number), Place { slot: number as u32, sub_block: 3 });
        }
        assert_eq!(index.candidates(key(0)).count(), 0);
        for number in 1..9 {
            let found: Vec<_> = index.candidates(key(number)).collect();
            assert_eq!(found, [Place { slot: number as u32, sub_block: 3 }]);
        }
    }

    #[test]
    fn a_newer_place_replaces_an_older_one_of_the_same_tag() {
        let mut index = ContentIndex::new(4);
        index.insert(9, Place { slot: 1, sub_block: 0 });
        index.insert(9, Place { slot: 2, sub_block: 1 });
        assert_eq!(index.candidates(9).collect::<Vec<_>>(), [Place { slot: 2, sub_block: 1 }]);
    }

    #[test]
    fn an_index_without_room_remembers_nothing() {
        let mut index = ContentIndex::new(0);
        index.insert(1, Place { slot: 0, sub_block: 0 });
        assert_eq!(index.candidates(1).count(), 0);
    }
}
