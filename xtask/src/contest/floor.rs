//! The fewest bytes in which a memory can travel if every page of it is sent once: its different pages, compressed.
//!
//! Only who looks at a guest that stands still can have it so cheap: he knows every page's last version. What is sent while
//! the guest writes comes on top.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use godwit_sim::qmp::Qmp;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_128;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const PAGE_BYTES: usize = 4096;
/// What is compressed together.
const BATCH_BYTES: usize = 64 << 10;
/// The level with which godwit begins.
const LEVEL: i32 = 3;

/// The floor of running guests' memories, of so many MB each: a page that several have counts once. Their monitors must be
/// free; an image at a time lies in `directory` meanwhile.
///
/// # Errors
/// What QEMU or the file system says.
pub(super) fn of_guests(
    monitors: impl IntoIterator<Item = PathBuf>,
    memory_mb: u64,
    directory: &Path,
) -> Result<u64> {
    let image = directory.join("memory.image");
    let mut floor = Floor::new()?;
    for monitor in monitors {
        let mut monitor =
            Qmp::connect(&monitor, CONNECT_LIMIT).context("cannot reach the guest's monitor")?;
        let range = json!({ "val": 0, "size": memory_mb << 20, "filename": image });
        let saved = monitor.execute("pmemsave", range).context("cannot save the guest's memory");
        let added = saved.and_then(|_| Ok(floor.add(File::open(&image)?)?));
        let _ = fs::remove_file(&image);
        added?;
    }
    Ok(floor.finish()?)
}

/// A floor that grows with each image.
struct Floor {
    compressor: zstd::bulk::Compressor<'static>,
    /// Pages' digests.
    seen: HashSet<u128>,
    batch: Vec<u8>,
    bytes: u64,
}

impl Floor {
    fn new() -> io::Result<Floor> {
        Ok(Floor {
            compressor: zstd::bulk::Compressor::new(LEVEL)?,
            seen: HashSet::from([xxh3_128(&[0; PAGE_BYTES])]),
            batch: Vec::with_capacity(BATCH_BYTES),
            bytes: 0,
        })
    }

    /// Adds a raw image.
    fn add(&mut self, mut image: impl Read) -> io::Result<()> {
        let mut page = [0; PAGE_BYTES];
        while read_page(&mut image, &mut page)? {
            if self.seen.insert(xxh3_128(&page)) {
                self.batch.extend_from_slice(&page);
            }
            if self.batch.len() == BATCH_BYTES {
                self.compress()?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<u64> {
        self.compress()?;
        Ok(self.bytes)
    }

    fn compress(&mut self) -> io::Result<()> {
        self.bytes += self.compressor.compress(&self.batch)?.len().min(self.batch.len()) as u64;
        self.batch.clear();
        Ok(())
    }
}

/// Whether there was another page.
fn read_page(image: &mut impl Read, page: &mut [u8; PAGE_BYTES]) -> io::Result<bool> {
    match image.read_exact(page) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that no compressor makes smaller.
    fn noise(seed: u64) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..PAGE_BYTES).map(|_| random.u8(..)).collect()
    }

    fn floor_of(images: &[&[u8]]) -> u64 {
        let mut floor = Floor::new().unwrap();
        images.iter().for_each(|image| floor.add(*image).unwrap());
        floor.finish().unwrap()
    }

    #[test]
    fn a_page_that_several_guests_have_counts_once() {
        let (one, other, third) = (noise(1), noise(2), noise(3));
        let images = [[one.clone(), other.clone()].concat(), [third, one, other].concat()];
        assert_eq!(floor_of(&[&images[0], &images[1]]), 3 * PAGE_BYTES as u64);
    }

    #[test]
    fn only_different_pages_count_and_zeros_not_at_all() {
        let (one, other, zero) = (noise(1), noise(2), vec![0; PAGE_BYTES]);
        let floor = |pages: &[&Vec<u8>]| {
            let image: Vec<u8> = pages.iter().flat_map(|page| page.iter().copied()).collect();
            floor_of(&[&image])
        };
        assert_eq!(floor(&[&zero, &zero]), 0);
        assert_eq!(floor(&[&one]), PAGE_BYTES as u64);
        assert_eq!(floor(&[&one, &zero, &one, &other, &one]), 2 * PAGE_BYTES as u64);
    }

    #[test]
    fn what_repeats_within_a_batch_is_compressed() {
        let text: Vec<u8> = b"the same words again ".iter().copied().cycle().take(64 * PAGE_BYTES).collect();
        assert!(floor_of(&[&text]) < 8 * PAGE_BYTES as u64);
    }
}
