//! A file that somebody else made, beneath a disk: read where it lies, never written.
//!
//! It is locked the way QEMU locks images (`block/file-posix.c`: a byte for each permission that someone uses, and one for each
//! that someone doesn't share), so that neither takes a file into which the other writes. Whoever doesn't mind such locks and
//! changes it all the same is found when the disk is opened next.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    geometry::{ChunkIndex, Geometry},
    image_file::{ImageFile, ImageFileError, ImageFormat},
    mapfile::BaseId,
    repository::ImageSource,
};

/// QEMU's byte for those who write.
const LOCK_WRITES: i64 = 100 + 1;
/// QEMU's byte for those who want nobody else to write.
const LOCK_OTHERS_WRITE: i64 = 200 + 1;

/// Which file lies beneath a disk, as it was when it was adopted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// The file.
    pub path: PathBuf,
    /// How it is read.
    pub format: ImageFormat,
    /// Its length, as a file.
    pub file_bytes: u64,
    /// When it was last written, in seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

/// A file that can't be adopted, or not be used any more.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// It can't be read as an image.
    #[error(transparent)]
    Image(#[from] ImageFileError),
    /// It is said to be raw, and looks otherwise.
    #[error("{} begins like a qcow2; say `format = \"qcow2\"`", .0.display())]
    LooksLikeQcow2(PathBuf),
    /// It can't be looked at.
    #[error("can't use {}", path.display())]
    Use {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody writes to it.
    #[error("{} is in use by another program, such as QEMU", .0.display())]
    InUse(PathBuf),
    /// What the disk has was written above other content.
    #[error("{} was changed since it was adopted, so what was written above it doesn't fit any more", .0.display())]
    Changed(PathBuf),
}

/// A file beneath a disk, open.
#[derive(Debug)]
pub struct AdoptedFile {
    adopted: Adopted,
    image: Arc<ImageFile>,
    /// Its lock goes with it.
    _locked: File,
}

impl AdoptedFile {
    /// Opens a file to lie beneath a new disk.
    ///
    /// # Errors
    /// [`AdoptError`] says why it can't.
    pub async fn adopt(path: &Path, format: ImageFormat) -> Result<Self, AdoptError> {
        if format == ImageFormat::Raw && ImageFile::looks_like_qcow2(path)? {
            return Err(AdoptError::LooksLikeQcow2(path.to_owned()));
        }
        let used = |source| AdoptError::Use { path: path.to_owned(), source };
        let found = path.metadata().map_err(used)?;
        let (file_bytes, modified) = (found.len(), (found.mtime(), found.mtime_nsec()));
        Self::open(Adopted { path: path.to_owned(), format, file_bytes, modified }).await
    }

    /// Opens the file that lies beneath a disk.
    ///
    /// # Errors
    /// [`AdoptError::Changed`] if it isn't what it was; otherwise as for [`AdoptedFile::adopt`].
    pub(crate) async fn open(adopted: Adopted) -> Result<Self, AdoptError> {
        let path = &adopted.path;
        let used = |source| AdoptError::Use { path: path.clone(), source };
        let locked = File::open(path).map_err(used)?;
        if !lock(&locked).map_err(used)? {
            return Err(AdoptError::InUse(path.clone()));
        }
        let found = locked.metadata().map_err(used)?;
        let now = (found.len(), (found.mtime(), found.mtime_nsec()));
        if now != (adopted.file_bytes, adopted.modified) {
            return Err(AdoptError::Changed(path.clone()));
        }
        let image = Arc::new(ImageFile::open(path, Some(adopted.format)).await?);
        Ok(Self { adopted, image, _locked: locked })
    }

    /// Which file it is.
    pub fn adopted(&self) -> &Adopted {
        &self.adopted
    }

    /// How large the disk in it is.
    pub fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    /// Which of its chunks aren't zero, as far as can be told without reading them.
    pub(crate) async fn content(&self) -> Result<Vec<ChunkIndex>, AdoptError> {
        let content = self.image.content().await;
        content.map_err(|source| AdoptError::Use { path: self.adopted.path.clone(), source })
    }

    /// What it has from `offset`; zeros beyond its end.
    pub(crate) async fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let image = Arc::clone(&self.image);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            let there = image.geometry().size_bytes().saturating_sub(offset).min(length as u64);
            image.read_at(offset, &mut bytes[..there as usize])?;
            Ok(bytes.into())
        });
        read.await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
    }
}

impl Adopted {
    /// As it is kept beside the disk.
    pub(crate) fn encode(&self) -> io::Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).map_err(io::Error::other)
    }

    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        serde_json::from_slice(bytes).map_err(io::Error::other)
    }
}

/// The id of a base that is described by these bytes.
pub(crate) fn id_of(described: &[u8]) -> BaseId {
    BaseId(blake3::hash(described).into())
}

/// Says that nobody else may write to it; false: somebody does.
fn lock(file: &File) -> io::Result<bool> {
    let on = |kind, byte| libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&on(libc::F_RDLCK, LOCK_OTHERS_WRITE)))?;
    let mut writers = on(libc::F_WRLCK, LOCK_WRITES);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut writers))?;
    Ok(i32::from(writers.l_type) == libc::F_UNLCK)
}
