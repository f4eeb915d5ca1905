//! A disk's directory in the host's file system.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSliceMut},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::{Errno, ReadWriteFlags, preadv2},
};

use crate::storage::{Storage, StorageFile};

/// A directory of the host.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The directory at `path`, which is there.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Storage for Directory {
    type File = HostFile;

    fn names(&self) -> io::Result<Vec<String>> {
        self.path.read_dir()?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn open(&self, name: &str) -> io::Result<HostFile> {
        Ok(HostFile(Arc::new(options().open(self.path.join(name))?)))
    }

    fn create(&self, name: &str) -> io::Result<HostFile> {
        Ok(HostFile(Arc::new(options().create(true).truncate(true).mode(0o600).open(self.path.join(name))?)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
}

/// A file of the host.
#[derive(Clone, Debug)]
pub struct HostFile(Arc<File>);

impl HostFile {
    /// Fills `bytes` with what the file has from `offset`, if it is in the host's memory; whether it was.
    ///
    /// # Errors
    /// What the file system says.
    pub fn read_at_once(&self, offset: u64, bytes: &mut [u8]) -> io::Result<bool> {
        let wanted = bytes.len();
        match preadv2(&self.0, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == wanted),
            Err(Errno::AGAIN | Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl StorageFile for HostFile {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.0, hole, offset, length) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
