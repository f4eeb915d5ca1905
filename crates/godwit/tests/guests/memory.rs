//! Whole memories, as QEMU itself writes them to a file (`pmemsave`), and where they differ.

use std::{
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use godwit_sim::qmp::Qmp;
use serde_json::json;

const PAGE_BYTES: usize = 4096;

/// Pages that a device writes while it is loaded, and that may differ therefore: none on record.
const WRITTEN_WHILE_LOADING: [u64; 0] = [];

/// Has a paused QEMU write the first `bytes` of its guest's address space to `path`.
pub(crate) fn save(monitor: &mut Qmp, bytes: u64, path: &Path) {
    monitor.execute("pmemsave", json!({ "val": 0, "size": bytes, "filename": path })).unwrap();
}

/// The addresses of the pages that differ.
pub(crate) fn differing_pages(left: &Path, right: &Path) -> Vec<u64> {
    let [mut left, mut right] = [left, right].map(|path| BufReader::new(File::open(path).unwrap()));
    let (mut ours, mut theirs) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    let mut differing = Vec::new();
    let mut address = 0;
    while left.read_exact(&mut ours).is_ok() {
        right.read_exact(&mut theirs).unwrap();
        if ours != theirs && !WRITTEN_WHILE_LOADING.contains(&address) {
            differing.push(address);
        }
        address += PAGE_BYTES as u64;
    }
    assert_eq!(right.read(&mut theirs).unwrap(), 0, "the memories are of different sizes");
    differing
}

#[test]
fn a_page_that_differs_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let [left, right] = ["left", "right"].map(|name| directory.path().join(name));
    let mut memory = vec![7; 3 * PAGE_BYTES];
    std::fs::write(&left, &memory).unwrap();
    std::fs::write(&right, &memory).unwrap();
    assert!(differing_pages(&left, &right).is_empty());
    memory[2 * PAGE_BYTES - 1] = 8;
    std::fs::write(&right, &memory).unwrap();
    assert_eq!(differing_pages(&left, &right), [PAGE_BYTES as u64]);
}
