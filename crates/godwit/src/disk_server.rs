//! The process that serves one disk to QEMU (`godwit disk-server`, hidden). It outlives the agent.
//!
//! ```text
//!   lock ─► open, recover ─► socket ─► serve ──SIGTERM──► closed
//! ```
//!
//! Killed, it leaves what the next one finds ([`godwit_block::Store`]); QEMU waits for that one
//! (`reconnect-delay`) and asks again for what wasn't answered.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use godwit_block::{
    Base, Desk, Disk, DiskError, DiskId, NoBase, Origin, Served, StoreError,
    nbd::Export,
    repository::{ImageName, Repository, RepositoryError},
};
use tokio::{
    net::UnixListener,
    select,
    signal::unix::{SignalKind, signal},
    task::LocalSet,
};

/// What is served, and where.
#[derive(Debug)]
pub(crate) struct DiskServer {
    /// The disk's directory.
    pub directory: PathBuf,
    /// The unix socket for QEMU. One that nobody listens on any more is replaced.
    pub socket: PathBuf,
    /// Where the disk's image is.
    pub repository: Option<String>,
    /// Whether QEMU may not write.
    pub read_only: bool,
}

/// Why a disk isn't served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskServerError {
    /// The disk can't be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its image can't be had.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The socket can't be made, or no more clients be accepted.
    #[error("can't serve on {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No thread, no signals.
    #[error("can't begin")]
    Begin(#[source] io::Error),
    /// The disk can't be closed; it opens as after a crash.
    #[error("can't close the disk")]
    Close(#[source] StoreError),
}

/// A disk that is made first, if it is to have a size or an image.
#[derive(Debug, Default)]
pub(crate) struct Create {
    /// Its size; without it that of its image.
    pub size_bytes: Option<u64>,
    /// What it begins as.
    pub image: Option<ImageName>,
}

/// Makes the disk if it is to be made, and serves it until the process is told to end.
///
/// # Errors
/// [`DiskServerError`] says what failed.
pub(crate) fn main(create: Create, server: DiskServer) -> Result<(), DiskServerError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(DiskServerError::Begin)?;
    let lock = LocalSet::new().block_on(&runtime, async {
        server.create(create).await?;
        server.open_and_serve().await
    })?;
    // Threads that still write chunks of the image are waited for, before anyone else may have the disk.
    drop(runtime);
    drop(lock);
    Ok(())
}

impl DiskServer {
    async fn create(&self, create: Create) -> Result<(), DiskServerError> {
        let origin = match create.image {
            Some(image) => {
                let repository = self.repository()?;
                let repository = repository.ok_or_else(|| DiskError::NoRepository(self.directory.clone()))?;
                Origin::Image(repository.manifest_called(&image).await?)
            }
            None if create.size_bytes.is_none() => return Ok(()),
            None => Origin::Nothing,
        };
        let id = DiskId(fastrand::u128(..).to_le_bytes());
        Ok(Disk::create(&self.directory, id, create.size_bytes, &origin)?)
    }

    fn repository(&self) -> Result<Option<Repository>, RepositoryError> {
        let opened = self.repository.as_deref().map(|location| Repository::open(location, std::env::vars()));
        opened.transpose()
    }

    /// Returns the disk's lock.
    async fn open_and_serve(self) -> Result<File, DiskServerError> {
        let mut disk = Disk::open(&self.directory, self.repository()?).await?;
        let opening = &disk.opening;
        tracing::info!(ending = ?opening.ending, blocks_lost = opening.blocks_lost, "opened");
        match disk.base.take() {
            Some(base) => self.serve(disk, base).await,
            None => self.serve(disk, NoBase).await,
        }
    }

    async fn serve<B: Base>(&self, disk: Disk, base: B) -> Result<File, DiskServerError> {
        let Disk { store, storage, lock, .. } = disk;
        let export = Export {
            name: "disk".to_owned(),
            size_bytes: store.geometry().size_bytes(),
            read_only: self.read_only,
        };
        let failed = |source| DiskServerError::Socket { path: self.socket.clone(), source };
        let listener = listen(&self.socket).map_err(failed)?;
        let mut end = signal(SignalKind::terminate()).map_err(DiskServerError::Begin)?;
        let served = Served::new(Desk::new(store), storage, base);
        select! {
            result = served.serve(listener, export) => result.map_err(failed)?,
            _ = end.recv() => {}
        }
        // From here on nothing else runs in this thread, so no client is heard any more; what wasn't answered is asked again.
        served.at_desk(|desk| desk.close()).map_err(DiskServerError::Close)?;
        tracing::info!("closed");
        Ok(lock)
    }
}

/// Listens on a socket in place of one that a server before this left. The disk's lock says that there is none now.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}
