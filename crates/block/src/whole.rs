//! A disk as a whole, while nobody uses it: whether its copies of the image are right, and all of it in one file.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use thiserror::Error;

use crate::{
    desk::FetchFailure,
    disk::{Disk, DiskBase},
    geometry::ChunkIndex,
    map::Place,
    serve::Base,
    storage::StorageFile,
    store::{Source, StoreError},
};

/// So many problems are told; the rest is counted.
const PROBLEMS_TOLD_MAX: usize = 20;
/// Chunks that are fetched at a time.
const AT_ONCE_MAX: usize = 8;

/// What looking at a disk came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Chunks of which the disk has a right copy, whole or in part.
    pub good_chunks: u64,
    /// Chunks of which its copy is damaged.
    pub bad_chunks: u64,
    /// As many of those are right again.
    pub repaired_chunks: u64,
    /// What is wrong with the first of them.
    pub problems: Vec<String>,
}

/// A disk that can't be looked at or exported.
#[derive(Debug, Error)]
pub enum WholeError {
    /// A chunk of its image can't be had.
    #[error("chunk {} of its image: {why}", chunk.0)]
    Fetch {
        /// Which.
        chunk: ChunkIndex,
        /// Why.
        why: String,
    },
    /// What it has can't be read.
    #[error("the disk's data file")]
    Read(#[source] io::Error),
    /// A chunk can't be repaired.
    #[error("chunk {} can't be repaired", chunk.0)]
    Repair {
        /// Which.
        chunk: ChunkIndex,
        /// Why.
        source: StoreError,
    },
    /// It would be written over something.
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    /// The file can't be written.
    #[error("can't write the file")]
    Write(#[source] io::Error),
}

impl Disk {
    /// Compares every copy of the image that the disk has with the image's digests, and with `repair` fetches those anew
    /// that are damaged. What the disk has of its own has no digests: its file system vouches for that. `progress` is told
    /// how many chunks of how many are done.
    ///
    /// # Errors
    /// [`WholeError`] if a chunk that is needed can't be had, or isn't taken.
    pub async fn check(
        &mut self,
        repair: bool,
        mut progress: impl FnMut(u32, u32),
    ) -> Result<Checked, WholeError> {
        let (geometry, mut checked) = (self.store.geometry(), Checked::default());
        for chunk in geometry.chunks() {
            progress(chunk.0 + 1, geometry.chunk_count());
            let copies = self.store.map().chunk(chunk).at(Place::Fetched) & geometry.blocks(chunk);
            if copies.is_empty() {
                continue;
            }
            let Some(problem) = self.problem_of(chunk).await? else {
                checked.good_chunks += 1;
                continue;
            };
            checked.bad_chunks += 1;
            if checked.problems.len() < PROBLEMS_TOLD_MAX {
                checked.problems.push(format!("chunk {}: {problem}", chunk.0));
            }
            if repair {
                let content = self.image_chunk(chunk).await?;
                let mended = self.store.mend(chunk, &content);
                mended.map_err(|source| WholeError::Repair { chunk, source })?;
                checked.repaired_chunks += 1;
            }
        }
        Ok(checked)
    }

    /// What is wrong with the copies that the disk has of a chunk's blocks.
    async fn problem_of(&self, chunk: ChunkIndex) -> Result<Option<String>, WholeError> {
        let geometry = self.store.geometry();
        let copies = self.store.map().chunk(chunk).at(Place::Fetched) & geometry.blocks(chunk);
        let mut found = vec![0; geometry.chunk_bytes(chunk) as usize];
        if let Err(error) = self.store.data().read_at(chunk.offset(), &mut found) {
            return Ok(Some(format!("it can't be read: {error}")));
        }
        let right = match &self.base {
            Some(DiskBase::Image(image)) if copies == geometry.blocks(chunk) => {
                image.is_copy(chunk, &found).map_err(WholeError::Read)?
            }
            // A digest is that of all blocks, and some are the disk's own.
            _ => {
                let content = self.image_chunk(chunk).await?;
                copies.runs().map(|run| geometry.span(chunk, run)).all(|piece| {
                    let range = piece.start as usize..piece.end as usize;
                    found[range.clone()] == content[range]
                })
            }
        };
        Ok((!right).then(|| "it isn't what the image has".to_owned()))
    }

    /// Writes all that the disk has to a file, which has holes where the disk is zero. `progress` is told how many
    /// chunks of how many are done.
    ///
    /// # Errors
    /// [`WholeError`] says what failed; what was written of the file stays.
    pub async fn export(&self, path: &Path, mut progress: impl FnMut(u32, u32)) -> Result<(), WholeError> {
        let geometry = self.store.geometry();
        let file = File::create_new(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => WholeError::Exists(path.to_owned()),
            _ => WholeError::Write(error),
        })?;
        file.set_len(geometry.size_bytes()).map_err(WholeError::Write)?;
        let chunks = stream::iter(geometry.chunks().map(|chunk| self.parts_of(chunk)));
        let mut parts = chunks.buffered(AT_ONCE_MAX);
        let mut done = 0;
        while let Some(parts) = parts.try_next().await? {
            for (offset, bytes) in parts {
                file.write_all_at(&bytes, offset).map_err(WholeError::Write)?;
            }
            done += 1;
            progress(done, geometry.chunk_count());
        }
        file.sync_all().map_err(WholeError::Write)
    }

    /// What a chunk has that isn't zero, and where.
    async fn parts_of(&self, chunk: ChunkIndex) -> Result<Vec<(u64, Bytes)>, WholeError> {
        let geometry = self.store.geometry();
        let extents = self.store.extents(chunk.offset(), geometry.chunk_bytes(chunk).into());
        let (mut parts, mut of_image) = (Vec::new(), None);
        for extent in extents {
            let bytes = match extent.source {
                Source::Zero => continue,
                Source::File => {
                    let mut bytes = vec![0; extent.length as usize];
                    self.store.data().read_at(extent.offset, &mut bytes).map_err(WholeError::Read)?;
                    bytes.into()
                }
                Source::Base(_) => {
                    let content = match &of_image {
                        Some(content) => content,
                        None => of_image.insert(self.image_chunk(chunk).await?),
                    };
                    let start = (extent.offset - chunk.offset()) as usize;
                    content.slice(start..start + extent.length as usize)
                }
            };
            parts.push((extent.offset, bytes));
        }
        Ok(parts)
    }

    /// What the image has of a chunk, verified.
    async fn image_chunk(&self, chunk: ChunkIndex) -> Result<Bytes, WholeError> {
        let why = |why: String| WholeError::Fetch { chunk, why };
        let base = self.base.as_ref().ok_or_else(|| why("the disk didn't begin as an image".to_owned()))?;
        base.fetch(chunk).await.map_err(|FetchFailure(reason)| why(reason))
    }
}
