//! A disk's directory: how one is made, and who has it.
//!
//! ```text
//!   <disk>/lock          held by the process that serves the disk; says which it is
//!          data  map.<n> the disk ([`Store`])
//!          base          the manifest of its image, if it began as one
//!          beneath       which file lies beneath it, if it adopted one
//! ```

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use thiserror::Error;

use crate::{
    adopted::{self, AdoptError, Adopted, AdoptedFile},
    base::BaseOutline,
    desk::FetchFailure,
    directory::Directory,
    fetch::ImageBase,
    geometry::{ChunkIndex, Geometry, SizeError},
    mapfile::{BaseId, DiskId, Identity},
    record::Boot,
    repository::{Repository, manifest::Manifest},
    serve::Base,
    store::{CreateError, OpenError, Opening, Store, StoreError},
};

const LOCK_FILE: &str = "lock";
/// The manifest of the disk's image.
pub(crate) const BASE_FILE: &str = "base";
/// Which file the disk adopted.
const BENEATH_FILE: &str = "beneath";
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
    /// The file beneath it can't be used.
    #[error("the file beneath {}", path.display())]
    Adopted {
        /// The disk's directory.
        path: PathBuf,
        /// Why.
        source: AdoptError,
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
    pub base: Option<DiskBase>,
    /// Held as long as anyone may write.
    pub lock: File,
}

/// What a disk begins as.
#[derive(Debug, Default)]
pub enum Origin {
    /// Zeros.
    #[default]
    Nothing,
    /// An image of a repository.
    Image(Manifest),
    /// A file, which stays where it is and as it is.
    File(AdoptedFile),
}

/// Where the rest of a disk comes from.
#[derive(Debug)]
pub enum DiskBase {
    /// An image.
    Image(ImageBase),
    /// A file.
    File(AdoptedFile, Geometry),
}

impl Origin {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Image(manifest) => manifest.geometry().size_bytes(),
            Self::File(file) => file.geometry().size_bytes(),
        }
    }

    /// Writes down what it is, and returns its id.
    fn keep(&self, path: &Path) -> io::Result<BaseId> {
        let (name, bytes) = match self {
            Self::Nothing => return Ok(BaseId::default()),
            Self::Image(manifest) => (BASE_FILE, manifest.encode()),
            Self::File(file) => (BENEATH_FILE, file.adopted().encode()?),
        };
        let mut file = File::create_new(path.join(name))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        Ok(adopted::id_of(&bytes))
    }
}

impl Base for DiskBase {
    async fn fetch(&self, chunk: ChunkIndex) -> Result<Bytes, FetchFailure> {
        match self {
            Self::Image(image) => image.fetch(chunk).await,
            Self::File(file, disk) => {
                let read = file.read(chunk.offset(), disk.chunk_bytes(chunk) as usize).await;
                read.map_err(|error| FetchFailure(format!("the file beneath the disk: {error}")))
            }
        }
    }

    fn is_near(&self) -> bool {
        matches!(self, Self::File(..))
    }

    async fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        match self {
            Self::Image(_) => Err(io::ErrorKind::Unsupported.into()),
            Self::File(file, _) => file.read(offset, length).await,
        }
    }
}

impl Disk {
    /// Makes a disk of `size_bytes` in a directory that is made for it; or as large as what it begins as.
    ///
    /// # Errors
    /// [`DiskError`] says why it can't be; then nothing is left of it that wasn't there.
    pub fn create(
        path: &Path,
        id: DiskId,
        size_bytes: Option<u64>,
        origin: &Origin,
    ) -> Result<(), DiskError> {
        let image_bytes = origin.size_bytes();
        let size_bytes = size_bytes.unwrap_or(image_bytes);
        if size_bytes < image_bytes {
            return Err(DiskError::Smaller { size_bytes, image_bytes });
        }
        let geometry = Geometry::new(size_bytes)?;
        let directory = |source| DiskError::Directory { path: path.to_owned(), source };
        // Under another name until it is whole: whoever dies here leaves nothing that looks like a disk.
        let making = unfinished(path);
        let _ = std::fs::remove_dir_all(&making);
        DirBuilder::new().mode(0o700).create(&making).map_err(directory)?;
        let made = origin.keep(&making).map_err(directory).and_then(|base| {
            let identity = Identity { disk: id, base, geometry };
            let storage = Directory::new(&making);
            let mut store = Store::create(storage, identity, BaseOutline::blank(), Boot([0; 16]))
                .map_err(|source| DiskError::Create { path: path.to_owned(), source })?;
            store.close().map_err(|source| DiskError::Close { path: path.to_owned(), source })?;
            finish(&making, path).map_err(directory)
        });
        if made.is_err() {
            // What can't be removed either is removed by the next who makes it; the error that is told is the first.
            let _ = std::fs::remove_dir_all(&making);
        }
        made
    }

    /// Opens a disk, and keeps everyone else from it. What it hasn't yet of its image comes from `repository`.
    ///
    /// # Errors
    /// [`DiskError`] says who has it, or what is wrong with which of its files.
    pub async fn open(path: &Path, repository: Option<Repository>) -> Result<Self, DiskError> {
        let lock = lock(path)?;
        let storage = Directory::new(path);
        let boot = boot().map_err(|source| DiskError::Directory { path: path.to_owned(), source })?;
        let kept = Kept::read(path).await?;
        let (store, opening) = Store::open(storage.clone(), boot, |identity| kept.outline(identity))
            .map_err(|source| DiskError::Open { path: path.to_owned(), source })?;
        let disk = store.geometry();
        let base = match (kept.origin, repository) {
            (Origin::Nothing, _) => None,
            (Origin::Image(_), None) => return Err(DiskError::NoRepository(path.to_owned())),
            (Origin::Image(_), Some(repository)) => {
                let claimed: HashSet<ChunkIndex> = opening.claimed.iter().copied().collect();
                let base = ImageBase::open(&storage, disk, store.data().clone(), repository, claimed);
                let base =
                    base.map_err(|source| DiskError::Directory { path: path.join(BASE_FILE), source })?;
                Some(DiskBase::Image(base))
            }
            (Origin::File(file), _) => Some(DiskBase::File(file, disk)),
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

/// Where a disk is until it is whole. No disk's name begins with a dot.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Gives a disk that is whole its name, for good.
fn finish(making: &Path, path: &Path) -> io::Result<()> {
    if path.exists() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    std::fs::rename(making, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Removes a disk that nobody has open, with all that it has.
///
/// # Errors
/// [`DiskError::Locked`] says who has it.
pub fn remove(path: &Path) -> Result<(), DiskError> {
    let _lock = lock(path)?;
    let failed = |source| DiskError::Directory { path: path.to_owned(), source };
    let going = unfinished(path);
    let _ = std::fs::remove_dir_all(&going);
    std::fs::rename(path, &going).and_then(|()| std::fs::remove_dir_all(&going)).map_err(failed)
}

/// The file that a disk adopted, if it did.
///
/// # Errors
/// [`DiskError::Directory`] if what says so can't be read.
pub fn beneath(path: &Path) -> Result<Option<Adopted>, DiskError> {
    let file = path.join(BENEATH_FILE);
    let read = match std::fs::read(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.and_then(|bytes| Adopted::decode(&bytes)),
    };
    read.map(Some).map_err(|source| DiskError::Directory { path: file, source })
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

/// What is kept of what a disk began as.
struct Kept {
    origin: Origin,
    id: BaseId,
    /// Which parts of a file have content.
    content: Vec<ChunkIndex>,
}

impl Kept {
    async fn read(path: &Path) -> Result<Self, DiskError> {
        let nothing = Self { origin: Origin::Nothing, id: BaseId::default(), content: Vec::new() };
        let read = |name: &str| match std::fs::read(path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(|source| DiskError::Directory { path: path.join(name), source }),
        };
        let damaged = |name, problem: &dyn std::fmt::Display| DiskError::Directory {
            path: path.join(name),
            source: io::Error::new(io::ErrorKind::InvalidData, problem.to_string()),
        };
        if let Some(bytes) = read(BASE_FILE)? {
            let manifest = Manifest::decode(&bytes).map_err(|error| damaged(BASE_FILE, &error))?;
            return Ok(Self { origin: Origin::Image(manifest), id: adopted::id_of(&bytes), ..nothing });
        }
        let Some(bytes) = read(BENEATH_FILE)? else { return Ok(nothing) };
        let adopted = Adopted::decode(&bytes).map_err(|error| damaged(BENEATH_FILE, &error))?;
        let unusable = |source| DiskError::Adopted { path: path.to_owned(), source };
        let file = AdoptedFile::open(adopted).await.map_err(unusable)?;
        let content = file.content().await.map_err(unusable)?;
        Ok(Self { origin: Origin::File(file), id: adopted::id_of(&bytes), content })
    }

    /// What must be known of it without fetching anything, if it is the disk's.
    fn outline(&self, identity: &Identity) -> io::Result<BaseOutline> {
        if self.id != identity.base {
            let problem = "what the disk began as is missing or damaged";
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        let geometry = identity.geometry;
        Ok(match &self.origin {
            Origin::Nothing => BaseOutline::blank(),
            Origin::Image(manifest) => BaseOutline::new(geometry, manifest.content().map(|(chunk, _)| chunk)),
            Origin::File(_) => BaseOutline::new(geometry, self.content.iter().copied()),
        })
    }
}
