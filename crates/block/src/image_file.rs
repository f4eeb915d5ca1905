//! Images in files, as others make them: raw, and qcow2 with what lies beneath it. They are only ever read.

use std::{
    fs::File as StdFile,
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use imago::{
    FormatAccess, FormatDriverBuilder, Mapping, Storage, StorageOpenOptions, file::File,
    format::gate::ImplicitOpenGate, qcow2::Qcow2, raw::Raw,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::runtime::Handle;

use crate::{
    geometry::{CHUNK_BYTES, ChunkIndex, Geometry, SizeError},
    repository::ImageSource,
};

const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";
/// Where a qcow2 says how it is encrypted: 0, not at all.
const QCOW2_ENCRYPTION: usize = 32;
/// Where a qcow2 says how long the name of the file beneath it is.
const QCOW2_BACKING: usize = 16;
const HEADER_BYTES: usize = 72;
/// As many files at most lie one beneath the other.
const LAYERS_MAX: usize = 32;

/// How an image's bytes are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The disk's bytes.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// A file that is no image that can be read.
#[derive(Debug, Error)]
pub enum ImageFileError {
    /// It can't be opened or read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It isn't a file with content.
    #[error("{} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// It is a qcow2 above another file, and nobody said so.
    #[error("{} says that it is a qcow2 above another file; say `--format qcow2` if that is so, or `--format raw`", .0.display())]
    Ambiguous(PathBuf),
    /// No disk has its size.
    #[error("{} has a size that no disk has", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SizeError,
    },
}

/// An image in a file.
#[derive(Debug)]
pub struct ImageFile {
    access: FormatAccess<File>,
    geometry: Geometry,
    runtime: Handle,
}

impl ImageFile {
    /// Opens the image at `path`. Without a format it is guessed, unless that would open other files: a guest can write
    /// anything into the beginning of its raw disk.
    ///
    /// # Errors
    /// [`ImageFileError`] says what is wrong with which file.
    pub async fn open(path: &Path, format: Option<ImageFormat>) -> Result<Self, ImageFileError> {
        let failed = |source| ImageFileError::Read { path: path.to_owned(), source };
        let header =
            read_header(path).map_err(failed)?.ok_or_else(|| ImageFileError::Kind(path.to_owned()))?;
        let is_qcow2 = header.starts_with(QCOW2_MAGIC);
        if format.is_none() && is_qcow2 && number(&header, QCOW2_BACKING) != 0 {
            return Err(ImageFileError::Ambiguous(path.to_owned()));
        }
        let access = match format {
            Some(ImageFormat::Qcow2) | None if is_qcow2 => {
                let gate = Gate::default().entering(path).map_err(failed)?;
                FormatAccess::new(Qcow2::<File>::builder_path(path).open(gate).await.map_err(failed)?)
            }
            Some(ImageFormat::Qcow2) => return Err(failed(io::Error::other("it is no qcow2"))),
            _ => FormatAccess::new(
                Raw::<File>::builder_path(path).open(Gate::default()).await.map_err(failed)?,
            ),
        };
        let geometry = Geometry::new(access.size())
            .map_err(|source| ImageFileError::Size { path: path.to_owned(), source })?;
        Ok(Self { access, geometry, runtime: Handle::current() })
    }

    /// Whether a file begins as a qcow2 does.
    pub(crate) fn looks_like_qcow2(path: &Path) -> Result<bool, ImageFileError> {
        let header = read_header(path);
        let header = header.map_err(|source| ImageFileError::Read { path: path.to_owned(), source })?;
        Ok(header.is_some_and(|header| header.starts_with(QCOW2_MAGIC)))
    }

    /// The chunks of which something is written somewhere.
    pub(crate) async fn content(&self) -> io::Result<Vec<ChunkIndex>> {
        let (mut chunks, mut offset) = (Vec::new(), 0);
        let end = self.geometry.size_bytes();
        while offset < end {
            let (mapping, length) = self.access.get_mapping(offset, end - offset).await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !matches!(mapping, Mapping::Zero { .. }) {
                let last = ((offset + length - 1) / CHUNK_BYTES) as u32;
                chunks.extend(((offset / CHUNK_BYTES) as u32..=last).map(ChunkIndex));
            }
            offset += length;
        }
        Ok(chunks)
    }

    /// Fills `bytes` with what the disk in it has from `offset`. Not in a thread that others wait for.
    pub(crate) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.runtime.block_on(self.access.read(bytes, offset))
    }

    /// Whether a range is zero without being written anywhere.
    async fn is_hole(&self, mut offset: u64, end: u64) -> io::Result<bool> {
        while offset < end {
            match self.access.get_mapping(offset, end - offset).await? {
                (Mapping::Zero { .. }, length) if length > 0 => offset += length,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }
}

impl ImageSource for ImageFile {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read(&self, chunk: ChunkIndex) -> io::Result<Option<Vec<u8>>> {
        let length = self.geometry.chunk_bytes(chunk);
        self.runtime.block_on(async {
            if self.is_hole(chunk.offset(), chunk.offset() + u64::from(length)).await? {
                return Ok(None);
            }
            let mut content = vec![0; length as usize];
            self.access.read(content.as_mut_slice(), chunk.offset()).await?;
            Ok(Some(content))
        })
    }
}

/// The beginning of a file or block device; `None` if it is something else.
fn read_header(path: &Path) -> io::Result<Option<[u8; HEADER_BYTES]>> {
    let kind = path.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    let mut header = [0; HEADER_BYTES];
    let file = StdFile::open(path)?;
    let mut length = 0;
    while length < HEADER_BYTES {
        match file.read_at(&mut header[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    Ok(Some(header))
}

fn number(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&header[at..at + 4]);
    u32::from_be_bytes(bytes)
}

/// Lets files open that lie beneath an image: each once, and none that is encrypted.
#[derive(Clone, Debug, Default)]
struct Gate {
    /// Device and inode of the files above.
    above: Vec<(u64, u64)>,
}

impl Gate {
    /// The gate for what lies beneath `path`.
    fn entering(mut self, path: &Path) -> io::Result<Self> {
        let refused = |problem: &str| Err(io::Error::other(format!("{}: {problem}", path.display())));
        let Some(header) = read_header(path)? else {
            return refused("it is neither a file nor a block device");
        };
        if header.starts_with(QCOW2_MAGIC) && number(&header, QCOW2_ENCRYPTION) != 0 {
            return refused("it is encrypted");
        }
        let found = path.metadata()?;
        let file = (found.dev(), found.ino());
        if self.above.contains(&file) {
            return refused("it lies beneath itself");
        }
        if self.above.len() == LAYERS_MAX {
            return refused("too many files lie above it");
        }
        self.above.push(file);
        Ok(self)
    }
}

impl<S: Storage + 'static> ImplicitOpenGate<S> for Gate {
    async fn open_format<F: FormatDriverBuilder<S>>(&mut self, builder: F) -> io::Result<FormatAccess<S>> {
        let path =
            builder.get_image_path().ok_or_else(|| io::Error::other("the file beneath it has no name"))?;
        let gate = self.clone().entering(&path)?;
        let beneath = Box::pin(builder.open(gate)).await;
        let beneath = beneath.map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        Ok(FormatAccess::new(beneath))
    }

    async fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<S> {
        S::open(options).await
    }
}
