//! Files that are there whole or not at all.
//!
//! A file is written beside its name, with the extension `new`, and renamed once it is complete: whoever dies meanwhile
//! leaves the old file, and a scratch that the next [`replace`] overwrites or [`sweep`] removes.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use crate::token::Durability;

/// Of a file that isn't whole yet; a token's records use it too.
const SCRATCH_EXTENSION: &str = "new";

/// Replaces the file at `path`, readable by this user only. [`Durability::Synced`] makes file and name survive the host.
///
/// # Errors
/// What the file system says; the old file is as it was then, and nothing lies beside it.
pub(crate) fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let is_synced = durability == Durability::Synced;
    let scratch = path.with_extension(SCRATCH_EXTENSION);
    let replaced = write(&scratch, content, is_synced).and_then(|()| fs::rename(&scratch, path));
    if replaced.is_err() {
        let _ = fs::remove_file(&scratch);
    }
    match path.parent().filter(|_| is_synced) {
        Some(directory) => replaced.and_then(|()| sync_directory(directory)),
        None => replaced,
    }
}

/// Removes the files of a directory that were being written when their writer died. Nobody may be writing any there now.
pub(crate) fn sweep(directory: &Path) {
    for name in fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name()) {
        if Path::new(&name).extension().is_some_and(|extension| extension == SCRATCH_EXTENSION) {
            // Whoever writes that file next replaces it.
            let _ = fs::remove_file(directory.join(name));
        }
    }
}

/// Makes the names in a directory survive the host.
///
/// # Errors
/// What the file system says.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn write(scratch: &Path, content: &[u8], is_synced: bool) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(scratch)?;
    file.write_all(content)?;
    if is_synced { file.sync_data() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_and_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spec.json");
        for (content, durability) in [("longer before", Durability::Written), ("now", Durability::Synced)] {
            replace(&path, content.as_bytes(), durability).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(directory.path()), ["spec.json"]);
    }

    #[test]
    fn what_cannot_be_replaced_stays_and_nothing_lies_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spec.json");
        // A file never replaces a directory.
        fs::create_dir(&path).unwrap();
        replace(&path, b"now", Durability::Written).unwrap_err();
        assert_eq!(names(directory.path()), ["spec.json"]);
    }

    #[test]
    fn only_what_was_being_written_is_swept() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["spec.json", "spec.new", "new"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        sweep(directory.path());
        let mut left = names(directory.path());
        left.sort();
        assert_eq!(left, ["new", "spec.json"]);
    }
}
