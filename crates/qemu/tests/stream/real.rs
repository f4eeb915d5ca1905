//! Streams of a real QEMU: read by both readers and compared with its memory, and rewritten for a real destination.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use godwit_qemu::memory::{PageIndex, ProcessMemory};
use godwit_qemu::return_path::{self, Message};
use godwit_qemu::stream::{PageContent, PageRoute, RamBlock, RamPage, RamSectionEnd, Splitter, StreamSink};
use serde_json::json;

use crate::machine::{Machine, connect, wait};
use crate::reader;

/// Two emulators at a time are enough for a small machine.
fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A kind of machine to try.
struct Kind {
    arguments: &'static str,
    /// Blocks that a guest uses as its memory: name, guest-physical address, bytes.
    memory: &'static [(&'static str, u64, u64)],
}

const PC: Kind = Kind {
    arguments: "-machine pc -m 48 -device virtio-balloon-pci -device virtio-rng-pci",
    memory: &[("pc.ram", 0, 48 << 20)],
};

const Q35: Kind = Kind {
    arguments: "-machine q35 -m 64 -device virtio-net-pci -device virtio-serial-pci",
    memory: &[("pc.ram", 0, 64 << 20)],
};

const NUMA: Kind = Kind {
    arguments: "-machine pc -m 48 -smp 2 \
        -object memory-backend-ram,id=near,size=32M -object memory-backend-ram,id=far,size=16M \
        -numa node,memdev=near,cpus=0 -numa node,memdev=far,cpus=1",
    memory: &[("near", 0, 32 << 20), ("far", 32 << 20, 16 << 20)],
};

/// The guest's programs live in the block that QEMU allocates first: under TCG, QEMU 10.0 loses track of what is written
/// to any other (docs/qemu-notes.md, "Stream").
const DIMM: Kind = Kind {
    arguments: "-machine q35,memory-backend=pc.ram -m 32M,slots=1,maxmem=1G \
        -object memory-backend-ram,id=pc.ram,size=32M \
        -object memory-backend-ram,id=stick,size=128M -device pc-dimm,id=dimm,memdev=stick",
    memory: &[("pc.ram", 0, 32 << 20), ("stick", 1 << 32, 128 << 20)],
};

/// Between these addresses firmware and video memory lie over RAM.
const COVERED: std::ops::Range<usize> = 0xa_0000..0x10_0000;

#[test]
fn a_recorded_stream_of_pc_holds_its_memory() {
    recorded(&PC);
}

#[test]
fn a_recorded_stream_of_q35_holds_its_memory() {
    recorded(&Q35);
}

#[test]
fn a_recorded_stream_of_two_numa_nodes_holds_their_memory() {
    recorded(&NUMA);
}

#[test]
fn a_recorded_stream_with_a_dimm_holds_its_memory() {
    recorded(&DIMM);
}

#[test]
fn pc_runs_on_from_a_rewritten_stream() {
    transplanted(&PC);
}

#[test]
fn q35_runs_on_from_a_rewritten_stream() {
    transplanted(&Q35);
}

#[test]
fn two_numa_nodes_run_on_from_a_rewritten_stream() {
    transplanted(&NUMA);
}

#[test]
fn a_machine_with_a_dimm_runs_on_from_a_rewritten_stream() {
    transplanted(&DIMM);
}

/// A stream that was taken down whole means the same to both readers and holds what QEMU's memory holds.
fn recorded(kind: &Kind) {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let mut source = Machine::start(directory.path(), "source", kind.arguments);
    source.wait_for_boot();
    let wire = record(&mut source, directory.path());
    let stream = reader::read(&wire);

    let mut sink = Collected::default();
    let mut splitter = Splitter::new();
    for piece in wire.chunks(10_007) {
        splitter.push(piece, &mut sink).unwrap();
    }
    splitter.finish().unwrap();
    assert_eq!(sink.blocks, stream.blocks);
    assert_eq!(sink.pages, stream.pages);
    assert_eq!(reader::read(&sink.passed).frame, stream.frame);

    for (name, bytes) in &stream.blocks {
        assert_eq!(*bytes, source.ram_block(name).used_bytes, "{name}");
        let memory = read_all(&source.memory(name));
        assert!(memory == stream.memory(name), "{name} isn't what the stream says");
    }
    for (name, address, bytes) in kind.memory {
        let mut saved = source.saved(*address, *bytes);
        let mut memory = stream.memory(name);
        uncover(*address, &mut saved);
        uncover(*address, &mut memory);
        assert!(saved == memory, "{name} isn't what pmemsave says");
    }
}

/// Migrates to a socket without a destination behind it.
fn record(source: &mut Machine, directory: &Path) -> Vec<u8> {
    let socket = directory.join("stream");
    let listener = UnixListener::bind(&socket).unwrap();
    source.execute("migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
    let mut wire = Vec::new();
    listener.accept().unwrap().0.read_to_end(&mut wire).unwrap();
    source.wait_for_status("postmigrate");
    wire
}

fn uncover(address: u64, memory: &mut [u8]) {
    if address == 0 {
        memory[COVERED].fill(0);
    }
}

fn read_all(memory: &ProcessMemory) -> Vec<u8> {
    memory.probe().unwrap();
    let mut bytes = vec![0; memory.pages() as usize * 4096];
    let pages = 0..memory.pages() as usize;
    memory.read(pages.map(|page| PageIndex(page as u64)), &mut bytes).unwrap();
    assert!(memory.still_same());
    bytes
}

/// Keeps everything and remembers it.
#[derive(Default)]
struct Collected {
    passed: Vec<u8>,
    blocks: Vec<(String, u64)>,
    pages: Vec<reader::Page>,
}

impl StreamSink for Collected {
    fn pass(&mut self, bytes: &[u8]) {
        self.passed.extend(bytes);
    }

    fn ram_blocks(&mut self, blocks: &[RamBlock]) {
        self.blocks = blocks.iter().map(|block| (block.name.clone(), block.used_bytes)).collect();
    }

    fn page(&mut self, page: &RamPage<'_>) -> PageRoute {
        let content = contents(page);
        let block = self.blocks[page.block].0.clone();
        self.pages.push(reader::Page { block, offset: page.offset, content, last: page.last });
        PageRoute::Keep
    }

    fn ram_section_end(&mut self, _: RamSectionEnd) {}
}

fn contents(page: &RamPage<'_>) -> Vec<u8> {
    match page.content {
        PageContent::Zero(fill) => vec![fill; 4096],
        PageContent::Bytes(bytes) => bytes.to_vec(),
    }
}

/// A guest moves to another QEMU which gets its memory from outside and everything else through a rewritten stream.
fn transplanted(kind: &Kind) {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let mut source = Machine::start(directory.path(), "source", kind.arguments);
    source.wait_for_boot();
    let arguments = format!("{} -S -incoming defer", kind.arguments);
    let mut destination = Machine::start(directory.path(), "destination", &arguments);
    let landed = migrate(kind, &mut source, &mut destination, directory.path());

    source.wait_for_status("postmigrate");
    destination.wait_for_status("paused");
    assert!(landed.passed_bytes < 2 << 20, "the pages stayed out of the stream: {landed:?}");
    let all_bytes: u64 = kind.memory.iter().map(|(_, _, bytes)| bytes).sum();
    assert!(landed.taken_pages >= all_bytes / 4096, "every page came at least once: {landed:?}");
    for (name, address, bytes) in kind.memory {
        let (ours, theirs) = (read_all(&source.memory(name)), read_all(&destination.memory(name)));
        assert_eq!(differing(&ours, &theirs), NONE, "{name}, read from outside");
        let (ours, theirs) = (source.saved(*address, *bytes), destination.saved(*address, *bytes));
        assert_eq!(differing(&ours, &theirs), NONE, "{name}, saved by QEMU");
    }
    let counted = source.counter();
    assert_eq!(destination.counter(), counted);
    destination.execute("cont", json!({}));
    wait("the guest to go on", || destination.counter() > counted);
    assert_eq!(destination.status(), "running");
}

const NONE: [usize; 0] = [];

/// Where pages differ.
fn differing(ours: &[u8], theirs: &[u8]) -> Vec<usize> {
    let pages = ours.chunks(4096).zip(theirs.chunks(4096)).enumerate();
    pages.filter(|(_, (ours, theirs))| ours != theirs).map(|(page, _)| page * 4096).collect()
}

fn migrate(kind: &Kind, source: &mut Machine, destination: &mut Machine, directory: &Path) -> Landed {
    for machine in [&mut *source, &mut *destination] {
        machine.capabilities(&["events", "return-path", "switchover-ack"]);
    }
    source.execute("migrate-set-parameters", only_between_passes());
    let (incoming, outgoing) = (directory.join("incoming"), directory.join("outgoing"));
    destination.execute("migrate-incoming", json!({ "uri": format!("unix:{}", incoming.display()) }));
    let to_destination = connect(&incoming);
    let listener = UnixListener::bind(&outgoing).unwrap();
    source.execute("migrate", json!({ "uri": format!("unix:{}", outgoing.display()) }));
    let from_source = listener.accept().unwrap().0;

    let elided_sections = AtomicU64::new(0);
    let taken = kind.memory.iter().map(|(name, ..)| ((*name).to_owned(), destination.memory(name)));
    let mut transplant = Transplant {
        to_destination: to_destination.try_clone().unwrap(),
        taken: taken.collect(),
        blocks: vec![],
        kept_pages: 0,
        elided_sections: &elided_sections,
        landed: Landed::default(),
    };
    thread::scope(|scope| {
        let return_path = from_source.try_clone().unwrap();
        scope.spawn(|| gate(source, to_destination, return_path, &elided_sections));
        pump(from_source, &mut transplant);
    });
    transplant.landed
}

/// Has QEMU look for dirty pages only when it has written all that it knew of (less than a page is owed). In the middle
/// of a pass it may lose some under TCG: docs/qemu-notes.md, "Stream".
fn only_between_passes() -> serde_json::Value {
    json!({ "avail-switchover-bandwidth": 1_000_000, "downtime-limit": 1 })
}

/// Forwards the return path, but lets the source stop its guest only after it has written enough in vain.
fn gate(
    source: &mut Machine,
    mut from_destination: UnixStream,
    mut to_source: UnixStream,
    elided_sections: &AtomicU64,
) {
    let mut decoder = return_path::Decoder::new();
    let mut bytes = [0; 1024];
    loop {
        let read_bytes = from_destination.read(&mut bytes).unwrap();
        decoder.push(&bytes[..read_bytes]);
        while let Some(message) = decoder.next_message().unwrap() {
            if message == Message::SwitchoverAck {
                wait("elided sections", || elided_sections.load(Ordering::Relaxed) > ELIDED_SECTIONS);
            }
            to_source.write_all(&return_path::encode(&message)).unwrap();
            if message == Message::SwitchoverAck {
                source.execute("migrate-set-parameters", json!({ "downtime-limit": 2_000_000 }));
            }
            if let Message::Shut(status) = message {
                assert_eq!(status, 0, "the destination has loaded everything");
                return;
            }
        }
        assert!(read_bytes > 0, "the destination hung up before it had loaded");
    }
}

fn pump(mut from_source: UnixStream, transplant: &mut Transplant<'_>) {
    let mut splitter = Splitter::new();
    let mut bytes = vec![0; 100_000];
    loop {
        let read_bytes = from_source.read(&mut bytes).unwrap();
        if read_bytes == 0 {
            break;
        }
        splitter.push(&bytes[..read_bytes], transplant).unwrap();
    }
    splitter.finish().unwrap();
}

const ELIDED_SECTIONS: u64 = 20;

/// Takes the pages of the guest's memory and writes them into the destination; the rest goes on in the stream.
struct Transplant<'a> {
    to_destination: UnixStream,
    taken: Vec<(String, ProcessMemory)>,
    blocks: Vec<RamBlock>,
    kept_pages: u64,
    elided_sections: &'a AtomicU64,
    landed: Landed,
}

/// How a migration went.
#[derive(Debug, Default)]
struct Landed {
    passed_bytes: usize,
    taken_pages: u64,
}

impl StreamSink for Transplant<'_> {
    fn pass(&mut self, bytes: &[u8]) {
        self.landed.passed_bytes += bytes.len();
        self.to_destination.write_all(bytes).unwrap();
    }

    fn ram_blocks(&mut self, blocks: &[RamBlock]) {
        self.blocks = blocks.to_vec();
    }

    fn page(&mut self, page: &RamPage<'_>) -> PageRoute {
        let name = &self.blocks[page.block].name;
        let Some((_, memory)) = self.taken.iter().find(|(taken, _)| taken == name) else {
            self.kept_pages += 1;
            return PageRoute::Keep;
        };
        let index = PageIndex(page.offset / 4096);
        memory.write([index].into_iter(), &contents(page)).unwrap();
        self.landed.taken_pages += 1;
        PageRoute::Take
    }

    fn ram_section_end(&mut self, end: RamSectionEnd) {
        let kept_pages = std::mem::take(&mut self.kept_pages);
        self.elided_sections.fetch_add(u64::from(kept_pages == 0 && !end.last), Ordering::Relaxed);
    }
}
