//! The fewest bytes in which a memory can travel if every page of it is sent once: its different pages, compressed.
//!
//! Only who looks at a guest that stands still can have it so cheap: he knows every page's last version. What is sent while
//! the guest writes comes on top.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use godwit_sim::qmp::Qmp;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_128;

use super::GUEST_MEMORY_MB;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const PAGE_BYTES: usize = 4096;
/// What is compressed together.
const BATCH_BYTES: usize = 64 << 10;
/// The level with which godwit begins.
const LEVEL: i32 = 3;

/// The floor of a running guest's memory. Its monitor must be free; the image lies in `directory` meanwhile.
///
/// # Errors
/// What QEMU or the file system says.
pub(super) fn of_guest(monitor: &Path, directory: &Path) -> Result<u64> {
    let image = directory.join("memory.image");
    let mut monitor = Qmp::connect(monitor, CONNECT_LIMIT).context("cannot reach the guest's monitor")?;
    let range = json!({ "val": 0, "size": GUEST_MEMORY_MB << 20, "filename": image });
    let saved = monitor.execute("pmemsave", range).context("cannot save the guest's memory");
    let floor = saved.and_then(|_| Ok(of_image(File::open(&image)?)?));
    let _ = fs::remove_file(&image);
    floor
}

/// The floor of a raw image.
fn of_image(mut image: impl Read) -> io::Result<u64> {
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    let mut seen = HashSet::from([xxh3_128(&[0; PAGE_BYTES])]);
    let (mut batch, mut floor) = (Vec::with_capacity(BATCH_BYTES), 0);
    let mut page = [0; PAGE_BYTES];
    loop {
        let is_over = !read_page(&mut image, &mut page)?;
        if !is_over && seen.insert(xxh3_128(&page)) {
            batch.extend_from_slice(&page);
        }
        if batch.len() == BATCH_BYTES || is_over {
            floor += compressor.compress(&batch)?.len().min(batch.len()) as u64;
            batch.clear();
        }
        if is_over {
            return Ok(floor);
        }
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

    #[test]
    fn only_different_pages_count_and_zeros_not_at_all() {
        let (one, other, zero) = (noise(1), noise(2), vec![0; PAGE_BYTES]);
        let floor = |pages: &[&Vec<u8>]| {
            let image: Vec<u8> = pages.iter().flat_map(|page| page.iter().copied()).collect();
            of_image(image.as_slice()).unwrap()
        };
        assert_eq!(floor(&[&zero, &zero]), 0);
        assert_eq!(floor(&[&one]), PAGE_BYTES as u64);
        assert_eq!(floor(&[&one, &zero, &one, &other, &one]), 2 * PAGE_BYTES as u64);
    }

    #[test]
    fn what_repeats_within_a_batch_is_compressed() {
        let text: Vec<u8> = b"the same words again ".iter().copied().cycle().take(64 * PAGE_BYTES).collect();
        assert!(of_image(text.as_slice()).unwrap() < 8 * PAGE_BYTES as u64);
    }
}
