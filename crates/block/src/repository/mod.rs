//! Images, and the chunks that they are made of: immutable, named by their content, shared between images.
//!
//! ```text
//!   images/<name>          which manifest the name means
//!   manifests/<digest>     which chunks an image is made of     ([`manifest`])
//!   chunks/<xx>/<digest>   a chunk                               ([`packed`])
//!   busy/<what>-<id>       an import or a sweep is under way
//! ```
//!
//! A repository is a directory or a prefix in an S3-compatible store. Whatever is read is compared with its name, so a
//! repository needn't be trusted to be what it was, only to be there. An import writes chunks first, then the
//! manifest, then the name: cut off anywhere, it leaves chunks that the next one finds.

mod import;
pub mod manifest;
mod open;
pub mod packed;
mod sweep;
mod verify;

use std::{fmt, path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::{
    import::{ImageSource, ImportProgress, Imported},
    sweep::Swept,
    verify::Verified,
};
use self::{
    manifest::{ChunkDigest, Manifest, ManifestError},
    packed::PackedError,
};
use crate::mapfile::BaseId;

/// Objects that are asked for at a time.
const AT_ONCE_MAX: usize = 8;
/// Where manifests are: in every repository that has an image.
const MANIFESTS: &str = "manifests";
/// The longest manifest that is read: that of an image of 64 TiB.
const MANIFEST_BYTES_MAX: u64 = 8 << 30;

/// What can go wrong with a repository.
#[derive(Debug, Error)]
pub enum RepositoryError {
    /// It can't be told where it is.
    #[error("{location:?} is no repository: {problem}")]
    Location {
        /// What was said.
        location: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No image is called that.
    #[error(
        "{0:?} isn't an image's name: 1 to 63 of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
    )]
    Name(String),
    /// There is no such image.
    #[error("there is no image {0:?}")]
    NoImage(String),
    /// Another image has the name.
    #[error("there is another image {0:?}; remove it first, or choose another name")]
    Exists(String),
    /// Something that should be there isn't.
    #[error("{object} is missing from the repository")]
    Missing {
        /// What.
        object: String,
    },
    /// Something isn't what its name says.
    #[error("{object} is damaged in the repository: {problem}")]
    Damaged {
        /// What.
        object: String,
        /// How.
        problem: String,
    },
    /// The repository doesn't answer, or not now.
    #[error("{object}")]
    Away {
        /// What was asked for.
        object: String,
        /// What came instead.
        source: object_store::Error,
    },
    /// What is imported can't be read.
    #[error("the image that is imported")]
    Source(#[source] std::io::Error),
    /// Something else is being done with it.
    #[error("{0} is under way in this repository; try again when it is over")]
    Busy(String),
}

/// An image's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(String);

impl TryFrom<String> for ImageName {
    type Error = RepositoryError;

    fn try_from(name: String) -> Result<Self, RepositoryError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        let starts_well = name.starts_with(|first: char| first.is_ascii_alphanumeric());
        if starts_well && name.len() <= 63 && name.bytes().all(plain) {
            return Ok(Self(name));
        }
        Err(RepositoryError::Name(name.chars().take(80).collect()))
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What a name means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its manifest: the image's id, in hexadecimal digits.
    pub manifest: String,
    /// Its size.
    pub size_bytes: u64,
    /// How much of it isn't zero, in whole chunks.
    pub content_bytes: u64,
}

/// A repository.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    /// Where it is, if it is a directory.
    directory: Option<PathBuf>,
}

impl Repository {
    /// All images, by name.
    ///
    /// # Errors
    /// [`RepositoryError`], as for everything here.
    pub async fn images(&self) -> Result<Vec<(ImageName, Image)>, RepositoryError> {
        let objects = self.list("images").await?;
        let names = objects.into_iter().filter_map(|object| ImageName::try_from(object).ok());
        let images = names.map(|name| async {
            let image = self.image(&name).await?;
            Ok::<_, RepositoryError>((name, image))
        });
        let mut images: Vec<_> = stream::iter(images).buffered(AT_ONCE_MAX).try_collect().await?;
        images.sort_by(|a: &(ImageName, Image), b| a.0.cmp(&b.0));
        Ok(images)
    }

    /// What a name means.
    ///
    /// # Errors
    /// [`RepositoryError::NoImage`] if it means nothing.
    pub async fn image(&self, name: &ImageName) -> Result<Image, RepositoryError> {
        let path = self.path(&["images", &name.0]);
        match self.read(&path).await {
            Err(
                RepositoryError::Missing { .. }
                | RepositoryError::Away { source: object_store::Error::NotFound { .. }, .. },
            ) => Err(RepositoryError::NoImage(name.0.clone())),
            Err(error) => Err(error),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| damaged(&path, &error)),
        }
    }

    /// An image's manifest, verified.
    ///
    /// # Errors
    /// [`RepositoryError`] says what is missing or damaged.
    pub async fn manifest(&self, image: &Image) -> Result<Manifest, RepositoryError> {
        let path = self.path(&[MANIFESTS, &image.manifest]);
        let bytes = self.read(&path).await?;
        if hex(&blake3::hash(&bytes).into()) != image.manifest {
            return Err(damaged(&path, &"its content isn't what its name says"));
        }
        Manifest::decode(&bytes).map_err(|error: ManifestError| damaged(&path, &error))
    }

    /// The manifest of the image that a name means, verified.
    ///
    /// # Errors
    /// As for [`Repository::image`] and [`Repository::manifest`].
    pub async fn manifest_called(&self, name: &ImageName) -> Result<Manifest, RepositoryError> {
        self.manifest(&self.image(name).await?).await
    }

    /// A chunk's content, verified.
    ///
    /// # Errors
    /// [`RepositoryError`] says whether it is missing, damaged, or the repository away.
    pub async fn chunk(&self, digest: ChunkDigest) -> Result<Bytes, RepositoryError> {
        let path = self.chunk_path(digest);
        let packed = self.read(&path).await?;
        // What unpacks and verifies it is work; whoever waits may have other things to do.
        let unpacked = tokio::task::spawn_blocking(move || packed::unpack(&packed, digest)).await;
        match unpacked {
            Ok(content) => content.map_err(|error: PackedError| damaged(&path, &error)),
            Err(panicked) => Err(damaged(&path, &panicked)),
        }
    }

    async fn read(&self, path: &Path) -> Result<Bytes, RepositoryError> {
        let found = self.store.get(path).await.map_err(|error| self.absent(path, error))?;
        if found.meta.size > MANIFEST_BYTES_MAX {
            return Err(damaged(path, &format!("it has {} bytes", found.meta.size)));
        }
        found.bytes().await.map_err(|error| away(path, error))
    }

    /// Why something isn't there. Where nothing is left of a directory, it is away, as one is that isn't mounted.
    fn absent(&self, path: &Path, source: object_store::Error) -> RepositoryError {
        let is_gone = self.directory.as_ref().is_some_and(|directory| !directory.join(MANIFESTS).is_dir());
        match source {
            object_store::Error::NotFound { .. } if is_gone => {
                RepositoryError::Away { object: path.to_string(), source }
            }
            source => away(path, source),
        }
    }

    async fn write(&self, path: &Path, bytes: Vec<u8>) -> Result<(), RepositoryError> {
        self.store.put(path, bytes.into()).await.map(drop).map_err(|error| away(path, error))
    }

    /// The last parts of the names below a part of the repository.
    async fn list(&self, part: &str) -> Result<Vec<String>, RepositoryError> {
        let path = self.path(&[part]);
        let objects = self.store.list(Some(&path)).map_err(|error| away(&path, error));
        objects
            .try_filter_map(|object| async move { Ok(object.location.filename().map(str::to_owned)) })
            .try_collect()
            .await
    }

    fn path(&self, parts: &[&str]) -> Path {
        parts.iter().fold(self.prefix.clone(), |path, part| path.join(*part))
    }

    fn chunk_path(&self, digest: ChunkDigest) -> Path {
        let name = hex(&digest.0);
        self.path(&["chunks", &name[..2], &name])
    }
}

/// A digest in hexadecimal digits.
pub(crate) fn hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}

impl Image {
    /// The image's id.
    ///
    /// # Errors
    /// [`RepositoryError::Damaged`] if what the name means is none.
    pub fn id(&self) -> Result<BaseId, RepositoryError> {
        let hash = blake3::Hash::from_hex(&self.manifest).map_err(|error| RepositoryError::Damaged {
            object: format!("the manifest's name {:?}", self.manifest),
            problem: error.to_string(),
        })?;
        Ok(BaseId(hash.into()))
    }
}

fn away(path: &Path, source: object_store::Error) -> RepositoryError {
    let object = path.to_string();
    match source {
        object_store::Error::NotFound { .. } => RepositoryError::Missing { object },
        source => RepositoryError::Away { object, source },
    }
}

fn damaged(path: &Path, problem: &dyn fmt::Display) -> RepositoryError {
    RepositoryError::Damaged { object: path.to_string(), problem: problem.to_string() }
}
