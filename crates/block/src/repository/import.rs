//! Bringing an image into the repository.

use std::{
    collections::HashSet,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::ObjectStoreExt;

use super::{
    AT_ONCE_MAX, Image, ImageName, Repository, RepositoryError, away, hex,
    manifest::{ChunkDigest, Manifest},
    packed::pack,
    sweep::Busy,
};
use crate::geometry::{ChunkIndex, Geometry};

/// What is imported.
pub trait ImageSource: Send + Sync + 'static {
    /// Its size.
    fn geometry(&self) -> Geometry;

    /// A chunk's content; `None` if it is known to be zero without reading it.
    ///
    /// # Errors
    /// What the file system says, or how the image is damaged.
    fn read(&self, chunk: ChunkIndex) -> io::Result<Option<Vec<u8>>>;
}

/// How far an import is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportProgress {
    /// Chunks that are done.
    pub done: u32,
    /// Chunks there are.
    pub total: u32,
}

/// What became of an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The image.
    pub image: Image,
    /// Bytes that the repository had not before, as it keeps them.
    pub new_bytes: u64,
    /// Chunks that the repository had already.
    pub known_chunks: u32,
}

/// A chunk that is in the repository now.
struct Kept {
    digest: ChunkDigest,
    /// As many bytes were written; none if it was there, or is zero.
    new_bytes: u64,
}

/// The chunks of an import so far: the same one twice is written once.
#[derive(Debug, Default)]
struct Seen(Mutex<HashSet<ChunkDigest>>);

impl Seen {
    fn is_first(&self, digest: ChunkDigest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(digest)
    }
}

impl Repository {
    /// Imports an image under a name. What an import that was cut off left is used; an image that is there already, the
    /// same under the same name, is nothing to do.
    ///
    /// # Errors
    /// [`RepositoryError::Exists`] if the name means another image; otherwise as for everything here.
    pub async fn import(
        &self,
        name: &ImageName,
        source: Arc<dyn ImageSource>,
        mut progress: impl FnMut(ImportProgress),
    ) -> Result<Imported, RepositoryError> {
        let busy = self.begin(Busy::Import).await?;
        let imported = self.import_chunks(name, source, &mut progress).await;
        self.end(&busy).await?;
        imported
    }

    async fn import_chunks(
        &self,
        name: &ImageName,
        source: Arc<dyn ImageSource>,
        progress: &mut impl FnMut(ImportProgress),
    ) -> Result<Imported, RepositoryError> {
        let geometry = source.geometry();
        let total = geometry.chunk_count();
        let seen = Seen::default();
        let chunks =
            stream::iter(geometry.chunks()).map(|chunk| self.keep(Arc::clone(&source), chunk, &seen));
        let mut chunks = chunks.buffered(AT_ONCE_MAX);
        let (mut digests, mut new_bytes, mut known_chunks) = (Vec::with_capacity(total as usize), 0, 0);
        while let Some(Kept { digest, new_bytes: new }) = chunks.try_next().await? {
            digests.push(digest);
            new_bytes += new;
            known_chunks += u32::from(new == 0 && digest != ChunkDigest::ZERO);
            progress(ImportProgress { done: digests.len() as u32, total });
        }
        let image = self.name(name, &Manifest::new(geometry, digests)).await?;
        Ok(Imported { image, new_bytes, known_chunks })
    }

    async fn keep(
        &self,
        source: Arc<dyn ImageSource>,
        chunk: ChunkIndex,
        seen: &Seen,
    ) -> Result<Kept, RepositoryError> {
        let read = elsewhere(move || {
            let Some(content) = source.read(chunk)? else { return Ok((ChunkDigest::ZERO, Vec::new())) };
            Ok((ChunkDigest::of(&content), content))
        });
        let (digest, content) = read.await.map_err(RepositoryError::Source)?;
        if digest == ChunkDigest::ZERO || !seen.is_first(digest) || self.has(digest).await? {
            return Ok(Kept { digest, new_bytes: 0 });
        }
        let packed = elsewhere(move || pack(&content)).await.map_err(RepositoryError::Source)?;
        let new_bytes = packed.len() as u64;
        self.write(&self.chunk_path(digest), packed).await?;
        Ok(Kept { digest, new_bytes })
    }

    async fn has(&self, digest: ChunkDigest) -> Result<bool, RepositoryError> {
        let path = self.chunk_path(digest);
        match self.store.head(&path).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(away(&path, error)),
        }
    }

    /// Writes the manifest, and then what makes it an image.
    async fn name(&self, name: &ImageName, manifest: &Manifest) -> Result<Image, RepositoryError> {
        let geometry = manifest.geometry();
        let image = Image {
            manifest: hex(&manifest.id().0),
            size_bytes: geometry.size_bytes(),
            content_bytes: manifest.content().map(|(chunk, _)| u64::from(geometry.chunk_bytes(chunk))).sum(),
        };
        match self.image(name).await {
            Ok(other) if other == image => return Ok(image),
            Ok(_) => return Err(RepositoryError::Exists(name.to_string())),
            Err(RepositoryError::NoImage(_)) => {}
            Err(error) => return Err(error),
        }
        self.write(&self.path(&[super::MANIFESTS, &image.manifest]), manifest.encode()).await?;
        self.sync().await?;
        let path = self.path(&["images", &name.0]);
        let told = serde_json::to_vec_pretty(&image).map_err(|error| super::damaged(&path, &error))?;
        self.write(&path, told).await?;
        self.sync().await?;
        Ok(image)
    }

    /// Makes what was written survive the host, where the repository is a directory of it.
    async fn sync(&self) -> Result<(), RepositoryError> {
        let Some(directory) = self.directory.clone() else { return Ok(()) };
        let sync = elsewhere(move || Ok(rustix::fs::syncfs(std::fs::File::open(directory)?)?));
        sync.await.map_err(RepositoryError::Source)
    }
}

/// Does something that takes long in another thread.
async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)))
}
