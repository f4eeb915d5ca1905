//! Removing images, and the chunks that no image has any more.
//!
//! An import counts on chunks that it found, and a sweep removes chunks that no image has yet. So neither goes on while the
//! other is under way: each first says what it does, and then looks who else did.

use std::{collections::HashSet, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use super::{AT_ONCE_MAX, ImageName, Repository, RepositoryError, away, hex};

/// What is said by someone who died is believed for so long.
const BUSY_AT_MOST: Duration = Duration::from_secs(24 * 3600);

/// What is done with a repository that others must know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Busy {
    Import,
    Sweep,
}

impl Busy {
    fn name(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Sweep => "sweep",
        }
    }

    /// Imports don't mind each other.
    fn minds(self, other: &str) -> bool {
        self == Self::Sweep || other == Self::Sweep.name()
    }
}

/// What a sweep gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Chunks that no image had.
    pub chunks: u64,
    /// Their bytes, as the repository kept them.
    pub bytes: u64,
}

impl Repository {
    /// Removes an image, and the chunks that no other has.
    ///
    /// # Errors
    /// [`RepositoryError::NoImage`] if there is none; [`RepositoryError::Busy`] if an import is under way: then the name
    /// is gone, and the chunks go with the next sweep.
    pub async fn remove(&self, name: &ImageName) -> Result<Swept, RepositoryError> {
        self.image(name).await?;
        let path = self.path(&["images", &name.0]);
        self.store.delete(&path).await.map_err(|error| away(&path, error))?;
        self.sweep().await
    }

    /// Removes what no image has.
    ///
    /// # Errors
    /// As for [`Repository::remove`].
    pub async fn sweep(&self) -> Result<Swept, RepositoryError> {
        let busy = self.begin(Busy::Sweep).await?;
        let swept = self.sweep_chunks().await;
        self.end(&busy).await?;
        swept
    }

    async fn sweep_chunks(&self) -> Result<Swept, RepositoryError> {
        let (mut manifests, mut chunks) = (HashSet::new(), HashSet::new());
        for (_, image) in self.images().await? {
            if manifests.insert(image.manifest.clone()) {
                chunks.extend(self.manifest(&image).await?.content().map(|(_, digest)| hex(&digest.0)));
            }
        }
        self.remove_others(super::MANIFESTS, &manifests).await?;
        self.remove_others("chunks", &chunks).await
    }

    /// Removes the objects below a part of the repository whose names aren't among these.
    async fn remove_others(&self, part: &str, names: &HashSet<String>) -> Result<Swept, RepositoryError> {
        let path = self.path(&[part]);
        let objects = self.store.list(Some(&path)).map_err(|error| away(&path, error));
        let others = objects.try_filter(|object| {
            let others = object.location.filename().is_some_and(|name| !names.contains(name));
            async move { others }
        });
        let removed = others.map_ok(|object| async move {
            self.store.delete(&object.location).await.map_err(|error| away(&object.location, error))?;
            Ok(object.size)
        });
        let sizes: Vec<u64> = removed.try_buffer_unordered(AT_ONCE_MAX).try_collect().await?;
        Ok(Swept { chunks: sizes.len() as u64, bytes: sizes.iter().sum() })
    }

    /// Says that something is done, unless something is that it minds.
    pub(super) async fn begin(&self, busy: Busy) -> Result<Path, RepositoryError> {
        let id = format!("{}-{:016x}", busy.name(), fastrand::u64(..));
        let path = self.path(&["busy", &id]);
        self.write(&path, Vec::new()).await?;
        match self.minded(busy, &path).await {
            Ok(None) => Ok(path),
            Ok(Some(other)) => {
                self.end(&path).await?;
                Err(RepositoryError::Busy(other))
            }
            Err(error) => {
                self.end(&path).await?;
                Err(error)
            }
        }
    }

    pub(super) async fn end(&self, busy: &Path) -> Result<(), RepositoryError> {
        self.store.delete(busy).await.map_err(|error| away(busy, error))
    }

    /// Someone else who does what `busy` minds. What is old was left by someone who died, and is removed.
    async fn minded(&self, busy: Busy, own: &Path) -> Result<Option<String>, RepositoryError> {
        let path = self.path(&["busy"]);
        let objects: Vec<_> =
            self.store.list(Some(&path)).try_collect().await.map_err(|error| away(&path, error))?;
        let now = self.store.head(own).await.map_err(|error| away(own, error))?.last_modified;
        let others = objects.into_iter().filter(|object| object.location != *own);
        let (old, fresh): (Vec<_>, Vec<_>) = others
            .partition(|object| (now - object.last_modified).to_std().is_ok_and(|age| age > BUSY_AT_MOST));
        stream::iter(old)
            .map(Ok)
            .try_for_each(|object| async move { self.end(&object.location).await })
            .await?;
        let kinds = fresh.iter().filter_map(|object| object.location.filename()?.split('-').next());
        Ok(kinds.filter(|kind| busy.minds(kind)).map(|kind| format!("another {kind}")).next())
    }
}
