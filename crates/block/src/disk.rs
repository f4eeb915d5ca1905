//! A disk's directory: how one is made, and who has it.
//!
//! ```text
//!   <disk>/lock          held by the process that serves the disk; says which it is
//!          data  map.<n> the disk ([`Store`])
//!          base          the manifest of its image, if it began as one
//! ```

use std::{
    collections::HashSet,
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::{
    base::BaseOutline,
    directory::Directory,
    fetch::ImageBase,
    geometry::{ChunkIndex, Geometry, SizeError},
    mapfile::{BaseId, DiskId, Identity},
    record::Boot,
    repository::{
        Repository,
        manifest::{Manifest, ManifestError},
    },
    store::{CreateError, OpenError, Opening, Store, StoreError},
};

const LOCK_FILE: &str = "lock";
/// The manifest of the disk's image.
pub(crate) const BASE_FILE: &str = "base";
/// Who has a disk is told in less.
const HOLDER_BYTES_MAX: u64 = 200;

/// A disk that can't be made or opened.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Another process has it.
    #[error("{} is in use by {holder}", path.display())]
    Locked {
        /// The disk's directory.
        path: PathBuf,
        /// Which process.
        holder: String,
    },
    /// Its directory can't be used.
    #[error("can't use {}", path.display())]
    Directory {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No disk has the size.
    #[error("the disk's size")]
    Size(#[from] SizeError),
    /// It would be smaller than its image.
    #[error("a disk of {size_bytes} bytes is smaller than its image, which has {image_bytes}")]
    Smaller {
        /// The disk's.
        size_bytes: u64,
        /// The image's.
        image_bytes: u64,
    },
    /// It can't be made.
    #[error("can't make the disk {}", path.display())]
    Create {
        /// The disk's directory.
        path: PathBuf,
        /// Why.
        source: CreateError,
    },
    /// It can't be opened.
    #[error("can't open the disk {}", path.display())]
    Open {
        /// The disk's directory.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// It can't be closed.
    #[error("can't close the disk {}", path.display())]
    Close {
        /// The disk's directory.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// It began as an image, and nobody says where that is.
    #[error("{} began as an image, and no repository is given", .0.display())]
    NoRepository(PathBuf),
}

/// An open disk, which nobody else has.
#[derive(Debug)]
pub struct Disk {
    /// What it has.
    pub store: Store<Directory>,
    /// Where it is.
    pub storage: Directory,
    /// How it was found.
    pub opening: Opening,
    /// Where the rest of it comes from, if it began as an image.
    pub base: Option<ImageBase>,
    /// Held as long as anyone may write.
    pub lock: File,
}

impl Disk {
    /// Makes a disk of `size_bytes` in a directory that is made for it; or of its image's size, if it is to have one.
    ///
    /// # Errors
    /// [`DiskError`] says why it can't be; then nothing is left of it that wasn't there.
    pub fn create(
        path: &Path,
        id: DiskId,
        size_bytes: Option<u64>,
        image: Option<&Manifest>,
    ) -> Result<(), DiskError> {
        let image_bytes = image.map_or(0, |image| image.geometry().size_bytes());
        let size_bytes = size_bytes.unwrap_or(image_bytes);
        if size_bytes < image_bytes {
            return Err(DiskError::Smaller { size_bytes, image_bytes });
        }
        let geometry = Geometry::new(size_bytes)?;
        let directory = |source| DiskError::Directory { path: path.to_owned(), source };
        DirBuilder::new().mode(0o700).create(path).map_err(directory)?;
        let base = image.map_or_else(BaseId::default, Manifest::id);
        let made = write_manifest(path, image).map_err(directory).and_then(|()| {
            let identity = Identity { disk: id, base, geometry };
            let mut store =
                Store::create(Directory::new(path), identity, BaseOutline::blank(), Boot([0; 16]))
                    .map_err(|source| DiskError::Create { path: path.to_owned(), source })?;
            store.close().map_err(|source| DiskError::Close { path: path.to_owned(), source })
        });
        if made.is_err() {
            // What can't be removed either stays; the error that is told is the first.
            let _ = std::fs::remove_dir_all(path);
        }
        made
    }

    /// Opens a disk, and keeps everyone else from it. What it hasn't yet of its image comes from `repository`.
    ///
    /// # Errors
    /// [`DiskError`] says who has it, or what is wrong with which of its files.
    pub fn open(path: &Path, repository: Option<Repository>) -> Result<Self, DiskError> {
        let lock = lock(path)?;
        let storage = Directory::new(path);
        let boot = boot().map_err(|source| DiskError::Directory { path: path.to_owned(), source })?;
        let mut manifest = None;
        let (store, opening) = Store::open(storage.clone(), boot, |identity| {
            manifest = read_manifest(path, identity)?;
            let content = manifest.iter().flat_map(|manifest| manifest.content().map(|(chunk, _)| chunk));
            Ok(BaseOutline::new(identity.geometry, content))
        })
        .map_err(|source| DiskError::Open { path: path.to_owned(), source })?;
        let base = match (manifest, repository) {
            (None, _) => None,
            (Some(_), None) => return Err(DiskError::NoRepository(path.to_owned())),
            (Some(_), Some(repository)) => {
                let claimed: HashSet<ChunkIndex> = opening.claimed.iter().copied().collect();
                let base =
                    ImageBase::open(&storage, store.geometry(), store.data().clone(), repository, claimed);
                Some(base.map_err(|source| DiskError::Directory { path: path.join(BASE_FILE), source })?)
            }
        };
        Ok(Self { store, storage, opening, base, lock })
    }

    /// Flushes a disk, and says that nothing is left to lose. No requests may follow.
    ///
    /// # Errors
    /// [`DiskError::Close`] says what failed; then the disk opens as after a crash.
    pub fn close(&mut self) -> Result<(), DiskError> {
        let path = self.storage.path().to_owned();
        self.store.close().map_err(|source| DiskError::Close { path, source })
    }
}

/// Removes a disk that nobody has open, with all that it has.
///
/// # Errors
/// [`DiskError::Locked`] says who has it.
pub fn remove(path: &Path) -> Result<(), DiskError> {
    let _lock = lock(path)?;
    std::fs::remove_dir_all(path).map_err(|source| DiskError::Directory { path: path.to_owned(), source })
}

/// Locks a disk's directory, and says by whom.
fn lock(path: &Path) -> Result<File, DiskError> {
    let file = path.join(LOCK_FILE);
    let failed = |source| DiskError::Directory { path: file.clone(), source };
    let mut options = OpenOptions::new();
    let mut lock = options.create(true).read(true).write(true).mode(0o600).open(&file).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Who can't be read is unknown.
            let _ = lock.take(HOLDER_BYTES_MAX).read_to_string(&mut holder);
            let holder = if holder.is_empty() { "another process".to_owned() } else { holder };
            return Err(DiskError::Locked { path: path.to_owned(), holder });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    let holder = format!("process {}", std::process::id());
    lock.set_len(0).and_then(|()| lock.write_all(holder.as_bytes())).map_err(failed)?;
    Ok(lock)
}

/// This run of the kernel.
fn boot() -> io::Result<Boot> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok(Boot(number.to_be_bytes()))
}

fn write_manifest(path: &Path, image: Option<&Manifest>) -> io::Result<()> {
    let Some(image) = image else { return Ok(()) };
    let mut file = File::create_new(path.join(BASE_FILE))?;
    file.write_all(&image.encode())?;
    file.sync_all()
}

/// The manifest of the disk's image, verified; `None` if it began as nothing.
fn read_manifest(path: &Path, identity: &Identity) -> io::Result<Option<Manifest>> {
    if identity.base == BaseId::default() {
        return Ok(None);
    }
    let bytes = std::fs::read(path.join(BASE_FILE))?;
    let damaged = |problem: String| {
        io::Error::new(io::ErrorKind::InvalidData, format!("file {BASE_FILE:?}: {problem}"))
    };
    if BaseId(blake3::hash(&bytes).into()) != identity.base {
        return Err(damaged("it isn't the manifest of the disk's image".to_owned()));
    }
    Manifest::decode(&bytes).map(Some).map_err(|error: ManifestError| damaged(error.to_string()))
}
