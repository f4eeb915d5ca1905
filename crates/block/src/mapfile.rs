//! The file `map.<number>`: where the blocks of a disk were at some time, and what changed since.
//!
//! ```text
//!   0            4096                     records_at
//!   ┌────────────┬────────────────────────┬────────┬────────┬────────┬─ ─ ─
//!   │ header     │ checkpoint             │ record │ record │ record │
//!   │ 4,096      │ 16 a chunk, padded     │ 32     │ 32     │ 32     │
//!   └────────────┴────────────────────────┴────────┴────────┴────────┴─ ─ ─
//! ```
//!
//! The header is written last and has the checkpoint's digest: a file with a good header is a whole one. Records that
//! belong to it from its beginning are there before it. A record's number is its place.

use std::io;

use thiserror::Error;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use crate::{
    geometry::{Geometry, SizeError},
    map::{ChunkState, Map},
    record::{RECORD_BYTES, Record, word},
    storage::StorageFile,
};

const MAGIC: &[u8; 16] = b"godwit disk map\n";
/// The version of the files that this program writes.
pub const FORMAT_VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const STATE_BYTES: usize = 16;
/// What is read or written at a time.
const WINDOW_BYTES: usize = 1 << 18;

/// What tells a disk from all others, wherever it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiskId(pub [u8; 16]);

/// The content that a disk began with: its image's digest, or zeros for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BaseId(pub [u8; 32]);

impl BaseId {
    /// In hexadecimal digits, as the repository calls it; `None` for none.
    pub fn to_hex(self) -> Option<String> {
        (self != Self::default()).then(|| blake3::Hash::from_bytes(self.0).to_hex().to_string())
    }
}

/// What doesn't change in a disk's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which disk it is.
    pub disk: DiskId,
    /// What it began with.
    pub base: BaseId,
    /// How large it is.
    pub geometry: Geometry,
}

/// A map that can't be relied on.
#[derive(Debug, Error)]
pub enum MapError {
    /// The file can't be read.
    #[error("can't be read")]
    Read(#[from] io::Error),
    /// The beginning is missing, or isn't what was written.
    #[error("its header is damaged, or it is no map")]
    Header,
    /// It is of a version that this program doesn't know.
    #[error("it is of version {0}, and this program knows versions up to {FORMAT_VERSION}")]
    Newer(u32),
    /// The size in it is none.
    #[error("its disk can't be")]
    Size(#[from] SizeError),
    /// The checkpoint isn't what was written.
    #[error("its checkpoint is damaged")]
    Checkpoint,
    /// A record that was synced isn't what was written.
    #[error("record {0} is damaged, and later ones rely on it")]
    Record(u64),
}

/// A map file, open.
#[derive(Debug)]
pub(crate) struct MapFile<F> {
    file: F,
    number: u64,
    seed: u64,
    records_at: u64,
    next: u64,
}

impl<F: StorageFile> MapFile<F> {
    /// The name of the file with this number.
    pub(crate) fn name(number: u64) -> String {
        format!("map.{number}")
    }

    /// The number in a file's name, if it is a map's.
    pub(crate) fn number_in(name: &str) -> Option<u64> {
        let number = name.strip_prefix("map.")?.parse().ok()?;
        (Self::name(number) == name).then_some(number)
    }

    /// Writes a new file of `states`, ending with `records`. It is good once this returns, and survives the host once
    /// it and its name are synced.
    pub(crate) fn write(
        file: F,
        number: u64,
        identity: &Identity,
        states: impl Iterator<Item = ChunkState>,
        records: impl Iterator<Item = Record>,
    ) -> io::Result<Self> {
        let mut map = Self::empty(file, number, identity);
        let digest = map.write_checkpoint(states)?;
        for record in records {
            map.append(record)?;
        }
        map.file.write_at(0, &encode_header(number, identity, digest))?;
        Ok(map)
    }

    /// Reads a file's header and checkpoint. Its records come next ([`MapFile::records`]).
    pub(crate) fn read(file: F, number: u64) -> Result<(Self, Identity, Map), MapError> {
        let mut header = [0; HEADER_BYTES];
        file.read_at(0, &mut header).map_err(|_short| MapError::Header)?;
        let (identity, digest) = decode_header(&header, number)?;
        let map_file = Self::empty(file, number, &identity);
        let map = map_file.read_checkpoint(identity.geometry, digest)?;
        Ok((map_file, identity, map))
    }

    fn empty(file: F, number: u64, identity: &Identity) -> Self {
        let checkpoint = u64::from(identity.geometry.chunk_count()) * STATE_BYTES as u64;
        let records_at = HEADER_BYTES as u64 + checkpoint.next_multiple_of(HEADER_BYTES as u64);
        let seed = xxh3_64_with_seed(&identity.disk.0, number);
        Self { file, number, seed, records_at, next: 0 }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The number that the next record gets.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    pub(crate) fn file(&self) -> &F {
        &self.file
    }

    /// Adds a record. What fails leaves the file as it was, as far as anyone who reads it can tell.
    pub(crate) fn append(&mut self, record: Record) -> io::Result<u64> {
        let number = self.next;
        self.file.write_at(self.place(number), &record.encode(self.seed.wrapping_add(number)))?;
        self.next += 1;
        Ok(number)
    }

    fn place(&self, number: u64) -> u64 {
        self.records_at + number * RECORD_BYTES as u64
    }

    fn write_checkpoint(&self, states: impl Iterator<Item = ChunkState>) -> io::Result<u128> {
        let mut digest = Xxh3::new();
        let mut at = HEADER_BYTES as u64;
        let mut window = Vec::with_capacity(WINDOW_BYTES);
        let mut states = states.peekable();
        while states.peek().is_some() {
            window.clear();
            for state in states.by_ref().take(WINDOW_BYTES / STATE_BYTES) {
                let (present, own) = state.bits();
                window.extend_from_slice(&present.to_le_bytes());
                window.extend_from_slice(&own.to_le_bytes());
            }
            digest.update(&window);
            self.file.write_at(at, &window)?;
            at += window.len() as u64;
        }
        self.file.set_length(self.records_at)?;
        Ok(digest.digest128())
    }

    fn read_checkpoint(&self, geometry: Geometry, expected: u128) -> Result<Map, MapError> {
        let mut map = Map::new(geometry);
        let mut digest = Xxh3::new();
        let mut at = HEADER_BYTES as u64;
        let mut left = geometry.chunk_count() as usize * STATE_BYTES;
        let mut window = vec![0; WINDOW_BYTES.min(left)];
        let mut chunks = geometry.chunks();
        while left > 0 {
            let window = &mut window[..WINDOW_BYTES.min(left)];
            self.file.read_at(at, window).map_err(|_short| MapError::Checkpoint)?;
            digest.update(window);
            for (state, chunk) in window.chunks_exact(STATE_BYTES).zip(chunks.by_ref()) {
                let state = ChunkState::from_bits(word(state, 0), word(state, 8));
                if !(state.present() | state.own()).without(geometry.blocks(chunk)).is_empty() {
                    return Err(MapError::Checkpoint);
                }
                *map.chunk_mut(chunk) = state;
            }
            at += window.len() as u64;
            left -= window.len();
        }
        if digest.digest128() == expected { Ok(map) } else { Err(MapError::Checkpoint) }
    }

    /// Reads the records up to the first that isn't one, after which new ones will be added.
    ///
    /// What follows a gap was written after what the gap had, and reached the disk before it: a host's crash may do
    /// that to records that weren't synced. It is damage if a later record says that the gap's were.
    pub(crate) fn records(&mut self, geometry: Geometry) -> Result<Vec<Record>, MapError> {
        let mut records = Vec::new();
        let mut gap = None;
        let bytes = self.file.length()?.saturating_sub(self.records_at);
        let mut window = vec![0; WINDOW_BYTES];
        let total = bytes / RECORD_BYTES as u64;
        let mut number = 0;
        while number < total {
            let count = (total - number).min((WINDOW_BYTES / RECORD_BYTES) as u64);
            let window = &mut window[..count as usize * RECORD_BYTES];
            self.file.read_at(self.place(number), window)?;
            for bytes in window.as_chunks::<RECORD_BYTES>().0 {
                match (gap, Record::decode(bytes, self.seed.wrapping_add(number), geometry)) {
                    (None, Some(record)) => records.push(record),
                    (None, None) => gap = Some(number),
                    (Some(gap), Some(later)) if later.vouches_for(gap) => return Err(MapError::Record(gap)),
                    (Some(_), _) => {}
                }
                number += 1;
            }
        }
        self.next = records.len() as u64;
        Ok(records)
    }
}

/// ```text
///   0       16        20   24      32     40           48       64       96           112     4088
///   │ magic │ version │ 0  │ number │ size │ (reserved) │ disk id │ base id │ checkpoint's digest │ 0 … │ digest │
/// ```
fn encode_header(number: u64, identity: &Identity, checkpoint: u128) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..16].copy_from_slice(MAGIC);
    header[16..20].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    header[24..32].copy_from_slice(&number.to_le_bytes());
    header[32..40].copy_from_slice(&identity.geometry.size_bytes().to_le_bytes());
    header[48..64].copy_from_slice(&identity.disk.0);
    header[64..96].copy_from_slice(&identity.base.0);
    header[96..112].copy_from_slice(&checkpoint.to_le_bytes());
    let digest = xxh3_64(&header[..HEADER_BYTES - 8]);
    header[HEADER_BYTES - 8..].copy_from_slice(&digest.to_le_bytes());
    header
}

fn decode_header(header: &[u8; HEADER_BYTES], number: u64) -> Result<(Identity, u128), MapError> {
    let digest = xxh3_64(&header[..HEADER_BYTES - 8]);
    if &header[..16] != MAGIC || word(header, HEADER_BYTES - 8) != digest {
        return Err(MapError::Header);
    }
    let version = word(header, 16) as u32;
    if version != FORMAT_VERSION {
        return Err(MapError::Newer(version));
    }
    if word(header, 24) != number {
        return Err(MapError::Header);
    }
    let mut identity =
        Identity { disk: DiskId([0; 16]), base: BaseId([0; 32]), geometry: Geometry::new(word(header, 32))? };
    identity.disk.0.copy_from_slice(&header[48..64]);
    identity.base.0.copy_from_slice(&header[64..96]);
    Ok((identity, u128::from(word(header, 96)) | u128::from(word(header, 104)) << 64))
}
