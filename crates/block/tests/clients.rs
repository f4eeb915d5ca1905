//! Clients that aren't ours against the server: qemu-io and qemu-img.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread::JoinHandle,
};

use bytes::Bytes;
use godwit_block::{
    Base, BaseId, BaseOutline, Boot, CHUNK_BYTES, ChunkIndex, Desk, Directory, DiskId, FetchFailure,
    Geometry, Identity, NoBase, Served, Store, nbd::Export,
};
use tokio::{net::UnixListener, sync::oneshot, task::LocalSet};

const SIZE_BYTES: u64 = 64 * CHUNK_BYTES;

/// A disk that is served until it is dropped.
struct Server {
    directory: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start<B: Base + Send>(outline: BaseOutline, base: B) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let geometry = Geometry::new(SIZE_BYTES).unwrap();
        let identity = Identity { disk: DiskId([1; 16]), base: BaseId::default(), geometry };
        Store::create(Directory::new(directory.path()), identity, outline.clone(), Boot([1; 16]))
            .unwrap()
            .close()
            .unwrap();
        let mut server = Self { directory, stop: None, thread: None };
        server.serve(outline, base);
        server
    }

    fn serve<B: Base + Send>(&mut self, outline: BaseOutline, base: B) {
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let path = self.directory.path().to_owned();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let serve = async move {
                let storage = Directory::new(&path);
                let (store, _) = Store::open(storage.clone(), Boot([1; 16]), |_| Ok(outline)).unwrap();
                let export = Export { name: "root".into(), size_bytes: SIZE_BYTES, read_only: false };
                let listener = UnixListener::bind(path.join("socket")).unwrap();
                let served = Served::new(Desk::new(store), storage, base);
                ready.send(()).unwrap();
                tokio::select! {
                    result = served.serve(listener, export) => result.unwrap(),
                    _ = stopped => {}
                }
            };
            LocalSet::new().block_on(&runtime, serve);
        });
        is_ready.recv().unwrap();
        (self.stop, self.thread) = (Some(stop), Some(thread));
    }

    /// Ends the server as a crash would: nothing is flushed or closed.
    fn stop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
        std::fs::remove_file(self.socket()).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn url(&self) -> String {
        format!("nbd+unix:///root?socket={}", self.socket().display())
    }

    /// Runs qemu-io commands; what they print.
    fn qemu_io(&self, commands: &[&str]) -> String {
        let url = self.url();
        let arguments = commands.iter().flat_map(|command| ["-c", command]);
        let said = run("qemu-io", &[&["-f", "raw", &url], &*arguments.collect::<Vec<_>>()].concat());
        assert!(!said.contains("failed") && !said.contains("error"), "{said}");
        said
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

/// A base of which each chunk is filled with its number.
#[derive(Clone, Copy, Debug)]
struct Numbers;

impl Base for Numbers {
    async fn fetch(&self, chunk: ChunkIndex) -> Result<Bytes, FetchFailure> {
        tokio::task::yield_now().await;
        Ok(vec![chunk.0 as u8; CHUNK_BYTES as usize].into())
    }
}

fn all_content() -> BaseOutline {
    let geometry = Geometry::new(SIZE_BYTES).unwrap();
    BaseOutline::new(geometry, geometry.chunks())
}

fn data_bytes(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(directory.join("data")).unwrap().blocks() * 512
}

#[test]
fn qemu_reads_what_it_wrote_and_what_the_base_has() {
    let server = Server::start(all_content(), Numbers);
    server.qemu_io(&[
        "write -P 0xab 4k 64k",
        "write -P 0xcd 1000k 300k",
        "write -z -u 2M 64k",
        "discard 3M 256k",
        "flush",
        "read -P 0xab 4k 64k",
        "read -P 0xcd 1000k 300k",
        "read -P 0 2M 64k",
        "read -P 0 3M 256k",
        "read -P 1 256k 256k",
        "read -P 3 768k 232k",
        "aio_write -P 0x11 5M 1M",
        "aio_write -P 0x22 6M 1M",
        "aio_write -f -P 0x33 7M 512",
        "aio_flush",
        "read -P 0x11 5M 1M",
        "read -P 0x22 6M 1M",
        "read -P 0x33 7M 512",
        "read -P 28 7340544 512",
    ]);
}

#[test]
fn what_was_acknowledged_is_there_after_a_crash_though_nobody_flushed() {
    let mut server = Server::start(all_content(), Numbers);
    server.qemu_io(&["write -P 0xab 4k 64k", "write -P 0xee 300k 512"]);
    server.stop();
    server.serve(all_content(), Numbers);
    server.qemu_io(&["read -P 0xab 4k 64k", "read -P 0xee 300k 512", "read -P 1 262144 4096"]);
}

#[test]
fn a_disk_takes_the_space_of_what_was_written() {
    let server = Server::start(BaseOutline::blank(), NoBase);
    server.qemu_io(&["write -P 1 0 1M", "write -P 1 8M 1M"]);
    assert_eq!(data_bytes(server.directory.path()), 2 << 20);
    server.qemu_io(&["discard 0 1M"]);
    assert_eq!(data_bytes(server.directory.path()), 1 << 20);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &server.url()]);
    let map: Vec<&str> = map.lines().collect();
    assert!(
        map[0].contains("\"start\": 0, \"length\": 8388608") && map[0].contains("\"zero\": true"),
        "{map:?}"
    );
    assert!(map[1].contains("\"length\": 1048576") && map[1].contains("\"data\": true"), "{map:?}");
}

#[test]
fn a_copy_through_qemu_is_the_same() {
    let server = Server::start(BaseOutline::blank(), NoBase);
    let source = server.directory.path().join("source");
    let mut bytes = vec![0; SIZE_BYTES as usize];
    fastrand::Rng::with_seed(5).fill(&mut bytes[1 << 20..5 << 20]);
    std::fs::write(&source, &bytes).unwrap();
    let source = source.to_str().unwrap();
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &server.url()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &server.url()]);
}
