//! A repository behind a server that speaks S3, over HTTP on the loopback.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use godwit_block::{
    Base, CHUNK_BYTES, ChunkIndex, Disk, DiskId, ImageFile, Origin,
    repository::{ImageName, Imported, Repository, RepositoryError, manifest::ChunkDigest},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};

const KEY: &str = "the-key";
const SECRET: &str = "the-secret";
const BUCKET: &str = "images";

/// A server over a directory, until it is stopped.
struct Server {
    directory: PathBuf,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Server {
    async fn start(directory: &Path) -> Self {
        fs::create_dir_all(directory.join(BUCKET)).unwrap();
        Self::start_at(directory, ([127, 0, 0, 1], 0).into()).await
    }

    async fn start_at(directory: &Path, address: SocketAddr) -> Self {
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(directory).unwrap());
        service.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = service.build();
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let service = service.clone();
                // What is under way ends with the server.
                connections.spawn(async move {
                    let http = Builder::new(TokioExecutor::new());
                    let _ = http.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { directory: directory.to_owned(), address, serving }
    }

    /// The repository, as the usual environment would have it found.
    fn repository(&self, secret: &str) -> Repository {
        let endpoint = format!("http://{}", self.address);
        let settings = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", secret),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Repository::open(&format!("s3://{BUCKET}/prod"), settings).unwrap()
    }

    fn chunk_file(&self, digest: ChunkDigest) -> PathBuf {
        let name = blake3::Hash::from_bytes(digest.0).to_hex().to_string();
        self.directory.join(BUCKET).join("prod/chunks").join(&name[..2]).join(name)
    }
}

fn name() -> ImageName {
    "debian".to_owned().try_into().unwrap()
}

/// Imports an image of four chunks, of which one is zero.
async fn import(repository: &Repository, directory: &Path) -> Imported {
    let file = directory.join("debian.raw");
    let mut content = vec![0; 4 * CHUNK_BYTES as usize];
    fastrand::Rng::with_seed(5).fill(&mut content[..3 * CHUNK_BYTES as usize]);
    fs::write(&file, content).unwrap();
    let source = ImageFile::open(&file, None).await.unwrap();
    repository.import(&name(), Arc::new(source), |_| {}).await.unwrap()
}

#[tokio::test]
async fn an_image_is_imported_listed_verified_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&directory.path().join("s3")).await;
    let repository = server.repository(SECRET);
    let imported = import(&repository, directory.path()).await;
    assert_eq!(imported.image.content_bytes, 3 * CHUNK_BYTES);
    assert_eq!(repository.images().await.unwrap(), [(name(), imported.image.clone())]);
    assert_eq!(import(&repository, directory.path()).await.new_bytes, 0);
    let digests: Vec<_> =
        repository.manifest(&imported.image).await.unwrap().content().map(|(_, digest)| digest).collect();

    fs::remove_file(server.chunk_file(digests[0])).unwrap();
    fs::write(server.chunk_file(digests[1]), "rot").unwrap();
    let verified = repository.verify(&imported.image, |_, _| {}).await.unwrap();
    assert_eq!((verified.good_chunks, verified.bad_chunks), (1, 2));
    let told = verified.problems.join("\n");
    assert!(told.contains("is missing from the repository") && told.contains("is damaged"), "{told}");

    repository.remove(&name()).await.unwrap();
    assert_eq!(repository.images().await.unwrap(), []);
    assert!(!server.chunk_file(digests[2]).exists());
}

#[tokio::test]
async fn a_server_that_is_away_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&directory.path().join("s3")).await;
    let repository = server.repository(SECRET);
    import(&repository, directory.path()).await;
    let manifest = repository.manifest_called(&name()).await.unwrap();
    let path = directory.path().join("disk");
    Disk::create(&path, DiskId([5; 16]), None, &Origin::Image(manifest)).unwrap();
    let disk = Disk::open(&path, Some(repository)).await.unwrap();
    let base = disk.base.as_ref().unwrap();
    base.fetch(ChunkIndex(0)).await.unwrap();

    server.serving.abort();
    let _ = server.serving.await;
    let fetch = base.fetch(ChunkIndex(1));
    tokio::pin!(fetch);
    assert!(timeout(Duration::from_secs(1), &mut fetch).await.is_err());
    let _again = Server::start_at(&server.directory, server.address).await;
    let content = timeout(Duration::from_secs(60), fetch).await.unwrap().unwrap();
    assert_eq!(content.len() as u64, CHUNK_BYTES);
}

#[tokio::test]
async fn a_wrong_secret_is_told_and_not_taken_for_a_missing_image() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(&directory.path().join("s3")).await;
    import(&server.repository(SECRET), directory.path()).await;
    let refused = server.repository("guess").image(&name()).await.unwrap_err();
    assert!(matches!(refused, RepositoryError::Away { .. }), "{refused:?}");
    let told = format!("{:?}", refused);
    assert!(told.contains("403") || told.contains("SignatureDoesNotMatch"), "{told}");
}
