//! A disk's directory, as far as the store needs one.
//!
//! The store does all its I/O through these two traits, so that tests can put storage beneath it that fails, tears and
//! reorders. [`Directory`](crate::Directory) is the real one.

use std::io;

/// A directory of files.
pub trait Storage {
    /// One of its files, opened for reading and writing.
    type File: StorageFile;

    /// The names of all files in it.
    ///
    /// # Errors
    /// What the file system says; so for all operations.
    fn names(&self) -> io::Result<Vec<String>>;
    /// Opens a file that is there.
    ///
    /// # Errors
    /// As above.
    fn open(&self, name: &str) -> io::Result<Self::File>;
    /// Creates an empty file, in place of one that had the name.
    ///
    /// # Errors
    /// As above.
    fn create(&self, name: &str) -> io::Result<Self::File>;
    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// As above.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes the names in the directory survive the host.
    ///
    /// # Errors
    /// As above.
    fn sync_names(&self) -> io::Result<()>;
}

/// A file. Clones are the same file; [`StorageFile::sync`] and reads may run beside everything else, in other threads.
///
/// What was written survives the process when a call returns, and the host when a later [`StorageFile::sync`] returns.
pub trait StorageFile: Clone {
    /// Fills `bytes` with what the file has from `offset`.
    ///
    /// # Errors
    /// What the file system says; so for all operations. A file that is too short is an
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// As above; then any part of it may have been written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Gives a range's space back. It reads as zeros afterwards; or, where the file system can't, stays as it is.
    ///
    /// # Errors
    /// As above.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The file's length in bytes.
    ///
    /// # Errors
    /// As above.
    fn length(&self) -> io::Result<u64>;
    /// Sets the file's length. What is new is zero.
    ///
    /// # Errors
    /// As above.
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Makes what was written before survive the host.
    ///
    /// # Errors
    /// As above; then nobody knows what survives.
    fn sync(&self) -> io::Result<()>;
}
