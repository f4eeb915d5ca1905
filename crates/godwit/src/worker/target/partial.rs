//! What a target keeps of a migration that broke, so that the next one needn't begin with nothing (`--keep-partial`).
//!
//! QEMU takes one incoming migration in its life, so the memory goes into a file before QEMU is ended, and from there
//! into the next QEMU. The file begins with a block that says whose memory it is, then has the pages in the order of the
//! memory map; pages that are all zero are holes. Nothing in it is trusted: the source compares digests, and every
//! batch is checked as ever.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use godwit_content::{BLOCK_BYTES, Held, HeldDigests, is_zero};
use godwit_qemu::memory::{PageIndex, ProcessMemory, ProcessMemoryError};
use serde::{Deserialize, Serialize};

use crate::worker::memory_map::MemoryMap;

/// Pages that are read and written at once.
const CHUNK_PAGES: usize = 256;
/// The form of the file.
const VERSION: u16 = 1;

/// Why memory isn't kept, or can't be had back.
#[derive(Debug, thiserror::Error)]
pub(super) enum PartialError {
    /// The file system refused.
    #[error("can't use {path}")]
    File {
        /// The file.
        path: String,
        /// What it said.
        source: io::Error,
    },
    /// QEMU's memory can't be reached.
    #[error(transparent)]
    Memory(#[from] ProcessMemoryError),
    /// It would be too large.
    #[error("{bytes} bytes are more than `partial_limit` allows ({limit_bytes})")]
    TooLarge {
        /// The machine's memory.
        bytes: u64,
        /// The host's limit.
        limit_bytes: u64,
    },
}

/// Whose memory a file holds.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    version: u16,
    peer: String,
    blocks: Vec<(String, u64)>,
}

impl Header {
    fn of(peer: &str, map: &MemoryMap) -> Self {
        let blocks = map.sizes().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        Self { version: VERSION, peer: peer.to_owned(), blocks }
    }
}

/// Writes the memory of a QEMU that is about to be ended into the file at `path`; a file that is there is replaced.
pub(super) fn keep(
    path: &Path,
    limit_bytes: u64,
    peer: &str,
    map: &MemoryMap,
    memory: &ProcessMemory,
) -> Result<(), PartialError> {
    let bytes = memory.pages() * BLOCK_BYTES as u64;
    if bytes > limit_bytes {
        return Err(PartialError::TooLarge { bytes, limit_bytes });
    }
    let scratch = path.with_extension("new");
    let written = write(&scratch, &Header::of(peer, map), memory)
        .and_then(|()| fs::rename(&scratch, path).map_err(at(path)));
    if written.is_err() {
        let _ = fs::remove_file(scratch);
    }
    written
}

/// Fills a QEMU's memory with what was kept for it, and says what that is. The file is used up: whatever becomes of this
/// migration, the memory is newer then. A file of another machine is removed.
pub(super) fn restore(
    path: &Path,
    peer: &str,
    map: &MemoryMap,
    memory: &ProcessMemory,
) -> Result<Option<Vec<HeldDigests>>, PartialError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(at(path))?,
    };
    let held = match read_header(&file) {
        Ok(header) if header == Header::of(peer, map) => read(path, &file, memory).map(Some),
        _ => Ok(None),
    };
    let _ = fs::remove_file(path);
    held
}

fn write(path: &Path, header: &Header, memory: &ProcessMemory) -> Result<(), PartialError> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(at(path))?;
    }
    let mut options = OpenOptions::new();
    let file = options.create(true).write(true).truncate(true).mode(0o600).open(path).map_err(at(path))?;
    let mut first = serde_json::to_vec(header).expect("a header is plain data");
    if first.len() > BLOCK_BYTES {
        return Err(at(path)(io::Error::other("the machine has too many RAM blocks")));
    }
    first.resize(BLOCK_BYTES, b' ');
    file.write_all_at(&first, 0).map_err(at(path))?;
    each_chunk(memory, |pages, chunk| {
        memory.read(pages.iter().copied(), chunk)?;
        for (page, content) in pages.iter().zip(blocks(chunk)) {
            if !is_zero(content) {
                file.write_all_at(content, offset(*page)).map_err(at(path))?;
            }
        }
        Ok(())
    })?;
    file.set_len(offset(PageIndex(memory.pages()))).map_err(at(path))
}

fn read(path: &Path, file: &File, memory: &ProcessMemory) -> Result<Vec<HeldDigests>, PartialError> {
    let mut digests = Vec::new();
    each_chunk(memory, |pages, chunk| {
        file.read_exact_at(chunk, offset(pages[0])).map_err(at(path))?;
        // A page that was never touched stays so.
        let indexed = pages.iter().copied().zip(blocks(chunk).copied());
        let (held, contents): (Vec<_>, Vec<[u8; BLOCK_BYTES]>) =
            indexed.filter(|(_, content)| !is_zero(content)).unzip();
        memory.write(held.into_iter(), contents.as_flattened())?;
        let digest = |content: &[u8; BLOCK_BYTES]| {
            if is_zero(content) { HeldDigests::default() } else { Held::digests(content) }
        };
        digests.extend(blocks(chunk).map(digest));
        Ok(())
    })?;
    Ok(digests)
}

fn read_header(file: &File) -> io::Result<Header> {
    let mut first = [0; BLOCK_BYTES];
    file.read_exact_at(&mut first, 0)?;
    Ok(serde_json::from_slice(&first)?)
}

/// Calls `take` with the pages of one chunk after the other, and a buffer for them.
fn each_chunk(
    memory: &ProcessMemory,
    mut take: impl FnMut(&[PageIndex], &mut [u8]) -> Result<(), PartialError>,
) -> Result<(), PartialError> {
    let mut buffer = vec![0; CHUNK_PAGES * BLOCK_BYTES];
    let pages: Vec<PageIndex> = (0..memory.pages()).map(PageIndex).collect();
    pages.chunks(CHUNK_PAGES).try_for_each(|pages| take(pages, &mut buffer[..pages.len() * BLOCK_BYTES]))
}

fn blocks(chunk: &[u8]) -> impl Iterator<Item = &[u8; BLOCK_BYTES]> {
    chunk.as_chunks::<BLOCK_BYTES>().0.iter()
}

fn offset(page: PageIndex) -> u64 {
    (page.0 + 1) * BLOCK_BYTES as u64
}

fn at(path: &Path) -> impl Fn(io::Error) -> PartialError {
    let path = path.display().to_string();
    move |source| PartialError::File { path: path.clone(), source }
}
