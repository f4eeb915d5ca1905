//! Reading an image whole, to find out whether all of it is there.

use futures_util::{StreamExt, stream};

use super::{AT_ONCE_MAX, Image, Repository, RepositoryError};

/// So many problems are told; the rest is counted.
const PROBLEMS_TOLD_MAX: usize = 20;

/// What reading an image came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that are there and whole.
    pub good_chunks: u64,
    /// Chunks that are missing or damaged.
    pub bad_chunks: u64,
    /// What is wrong with the first of them.
    pub problems: Vec<String>,
}

impl Repository {
    /// Reads every chunk of an image and compares it with its name. `progress` is told how many of how many are done.
    ///
    /// # Errors
    /// [`RepositoryError`] if the manifest can't be had, or the repository goes away.
    pub async fn verify(
        &self,
        image: &Image,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Verified, RepositoryError> {
        let manifest = self.manifest(image).await?;
        let total = manifest.content().count() as u64;
        let chunks = manifest.content().map(|(_, digest)| self.chunk(digest));
        let mut chunks = stream::iter(chunks).buffer_unordered(AT_ONCE_MAX);
        let mut verified = Verified::default();
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(_) => verified.good_chunks += 1,
                Err(error @ (RepositoryError::Missing { .. } | RepositoryError::Damaged { .. })) => {
                    verified.bad_chunks += 1;
                    if verified.problems.len() < PROBLEMS_TOLD_MAX {
                        verified.problems.push(error.to_string());
                    }
                }
                Err(error) => return Err(error),
            }
            progress(verified.good_chunks + verified.bad_chunks, total);
        }
        Ok(verified)
    }
}
