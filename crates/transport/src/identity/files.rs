//! Files of an identity: created once, never overwritten, private where they hold a key.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// No file of an identity is larger; a certificate has about 1 KiB.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Who may read a file that is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Public,
    OwnerOnly,
}

/// Why a file of an identity could not be created or read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file is there already.
    #[error("{} exists already and is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Others than the owner may read a private key.
    #[error("{} may be read by others than its owner (mode {mode:04o}): chmod 600 it", path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is larger than any that belongs to an identity.
    #[error("{} has more than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
}

/// Creates `directory` (mode 0700) unless it is there.
pub(super) fn create_directory(directory: &Path) -> Result<(), FileError> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("create", directory))
}

/// Creates `path` with `contents` and syncs it; fails where the file is there already.
pub(super) fn create(path: &Path, access: Access, contents: &str) -> Result<(), FileError> {
    let mode = match access {
        Access::Public => 0o644,
        Access::OwnerOnly => 0o600,
    };
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(FileError::Exists { path: path.to_owned() });
        }
        opened => opened.map_err(failed("create", path))?,
    };
    file.write_all(contents.as_bytes()).and_then(|()| file.sync_all()).map_err(failed("write", path))
}

/// Reads a file; one that is `OwnerOnly` must be closed to everyone else.
pub(super) fn read(path: &Path, access: Access) -> Result<String, FileError> {
    let file = File::open(path).map_err(failed("open", path))?;
    let mode = file.metadata().map_err(failed("inspect", path))?.permissions().mode() & 0o7777;
    if access == Access::OwnerOnly && mode & 0o077 != 0 {
        return Err(FileError::TooOpen { path: path.to_owned(), mode });
    }
    let mut contents = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut contents).map_err(failed("read", path))?;
    if contents.len() as u64 > MAX_FILE_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(contents)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { action, path, source }
}
