//! Fetching what a disk hasn't yet of its image.

use std::{cell::RefCell, collections::HashSet, io, time::Duration};

use bytes::Bytes;
use tokio::time::sleep;

use crate::{
    desk::FetchFailure,
    directory::{Directory, HostFile},
    disk::BASE_FILE,
    geometry::{ChunkIndex, Geometry},
    repository::{
        Repository, RepositoryError,
        manifest::{self, ChunkDigest},
    },
    serve::Base,
    storage::{Storage, StorageFile},
};

/// The first wait for a repository that is away; each further one is twice as long.
const WAIT: Duration = Duration::from_millis(100);
/// The longest.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// The image that a disk began as, in its repository.
#[derive(Debug)]
pub struct ImageBase {
    repository: Repository,
    /// The image's manifest: digests are read when they are needed, since all of them are as much as the map.
    manifest: HostFile,
    image: Geometry,
    disk: Geometry,
    data: HostFile,
    /// Chunks of which the disk may have a copy that nobody vouches for.
    claimed: RefCell<HashSet<ChunkIndex>>,
}

impl ImageBase {
    pub(crate) fn open(
        storage: &Directory,
        disk: Geometry,
        data: HostFile,
        repository: Repository,
        claimed: HashSet<ChunkIndex>,
    ) -> io::Result<Self> {
        let manifest = storage.open(BASE_FILE)?;
        let mut header = [0; manifest::HEADER_BYTES];
        manifest.read_at(0, &mut header)?;
        let image = manifest::decode_header(&header).map_err(io::Error::other)?;
        Ok(Self { repository, manifest, image, disk, data, claimed: RefCell::new(claimed) })
    }

    /// The digest of what the image has of a chunk.
    fn digest(&self, chunk: ChunkIndex) -> io::Result<ChunkDigest> {
        let mut digest = ChunkDigest::ZERO;
        self.manifest.read_at(manifest::digest_at(chunk), &mut digest.0)?;
        Ok(digest)
    }

    /// What the disk has of a chunk already, if it is what the image has.
    fn claimed(&self, chunk: ChunkIndex, digest: ChunkDigest) -> io::Result<Option<Vec<u8>>> {
        if !self.claimed.borrow_mut().remove(&chunk) {
            return Ok(None);
        }
        let mut content = vec![0; self.disk.chunk_bytes(chunk) as usize];
        self.data.read_at(chunk.offset(), &mut content)?;
        Ok(self.has_digest(chunk, &content, digest).then_some(content))
    }

    /// Whether `content` is what the disk would have of a chunk if it had all of it from the image.
    pub(crate) fn is_copy(&self, chunk: ChunkIndex, content: &[u8]) -> io::Result<bool> {
        Ok(self.has_digest(chunk, content, self.digest(chunk)?))
    }

    fn has_digest(&self, chunk: ChunkIndex, content: &[u8], digest: ChunkDigest) -> bool {
        let (image, beyond) = content.split_at(self.image.chunk_bytes(chunk) as usize);
        ChunkDigest::of(image) == digest && ChunkDigest::of(beyond) == ChunkDigest::ZERO
    }

    async fn fetch_patiently(&self, digest: ChunkDigest) -> Result<Bytes, RepositoryError> {
        let mut wait = WAIT;
        loop {
            match self.repository.chunk(digest).await {
                Err(RepositoryError::Away { object, source }) => {
                    tracing::warn!(object, error = %source, "the repository is away; its chunks are waited for");
                    sleep(wait).await;
                    wait = (wait * 2).min(WAIT_MAX);
                }
                result => return result,
            }
        }
    }
}

impl Base for ImageBase {
    async fn fetch(&self, chunk: ChunkIndex) -> Result<Bytes, FetchFailure> {
        let unreadable =
            |error: io::Error| FetchFailure(format!("the manifest of the disk's image: {error}"));
        let digest = self.digest(chunk).map_err(unreadable)?;
        match self.claimed(chunk, digest) {
            Ok(Some(content)) => return Ok(content.into()),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(chunk = chunk.0, %error, "can't read the disk's copy; it is fetched")
            }
        }
        let content = self.fetch_patiently(digest).await.map_err(|error| FetchFailure(error.to_string()))?;
        let expected = self.image.chunk_bytes(chunk) as usize;
        if content.len() != expected {
            return Err(FetchFailure(format!(
                "chunk {} has {} bytes, not {expected}",
                chunk.0,
                content.len()
            )));
        }
        Ok(lengthened(content, self.disk.chunk_bytes(chunk) as usize))
    }
}

/// What a disk has where its image ends within a chunk.
fn lengthened(content: Bytes, length: usize) -> Bytes {
    if content.len() == length {
        return content;
    }
    let mut longer = Vec::from(content);
    longer.resize(length, 0);
    longer.into()
}
