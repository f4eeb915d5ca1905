//! What earlier pauses taught, kept in a file a peer: a prediction is no better than its terms for what only a pause
//! shows.

use std::{fs, path::Path};

use godwit_migration::predict::Learned;

use crate::{token::Durability, whole_file};

/// A file is no longer than this.
const BYTES_MAX: u64 = 4096;

/// What is known about pauses towards this peer; the defaults if nothing is, or the file can't be used.
pub(super) fn load(path: Option<&Path>) -> Learned {
    let Some(path) = path else { return Learned::default() };
    let small = fs::metadata(path).is_ok_and(|meta| meta.len() <= BYTES_MAX);
    let bytes = if small { fs::read(path).unwrap_or_default() } else { Vec::new() };
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Keeps it for the next migration. Failing to is no reason to bother anybody.
pub(super) fn save(path: Option<&Path>, learned: &Learned) {
    let Some(path) = path else { return };
    let text = serde_json::to_vec(learned).expect("numbers have a JSON form");
    if let Err(error) = whole_file::replace(path, &text, Durability::Written) {
        tracing::info!(%error, "what the pause taught isn't kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_rubbish_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hostb.json");
        assert_eq!(load(Some(&path)), Learned::default());
        let learned = Learned { fixed_ms: 7.0, ..Learned::default() };
        save(Some(&path), &learned);
        assert_eq!(load(Some(&path)), learned);
        fs::write(&path, "{\"fixed_ms\":").unwrap();
        assert_eq!(load(Some(&path)), Learned::default());
    }
}
