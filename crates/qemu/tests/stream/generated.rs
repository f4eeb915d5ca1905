//! Generated streams: any that QEMU could write, cut anywhere, with any choice of pages taken out.

use godwit_qemu::stream::{
    MAX_RAM_BLOCKS, PageContent, PageRoute, RamBlock, RamPage, RamSectionEnd, Splitter, StreamError,
    StreamProblem, StreamSink,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::reader::{self, Page};

/// A stream to be written.
#[derive(Debug, Clone)]
struct Recipe {
    configured: bool,
    commands: Vec<(u16, usize)>,
    blocks: Vec<(String, u64)>,
    parts: Vec<Vec<Record>>,
    end: Vec<Record>,
    devices: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Record {
    block: Index,
    page: Index,
    fill: u8,
    zero: bool,
    /// QEMU names the block again although it is the same.
    renamed: bool,
}

fn record() -> impl Strategy<Value = Record> {
    (any::<Index>(), any::<Index>(), any::<u8>(), any::<bool>(), any::<bool>())
        .prop_map(|(block, page, fill, zero, renamed)| Record { block, page, fill, zero, renamed })
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let commands = vec((prop_oneof![Just(1u16), Just(2), Just(11)], 0usize..6), 0..4);
    let blocks = proptest::collection::hash_map("[a-z./ -]{1,40}", 1u64..50, 1..5);
    let parts = vec(vec(record(), 0..8), 0..8);
    (any::<bool>(), commands, blocks, parts, vec(record(), 0..8), vec(any::<u8>(), 0..300)).prop_map(
        |(configured, commands, blocks, parts, end, devices)| Recipe {
            configured,
            commands,
            blocks: blocks.into_iter().map(|(name, pages)| (name, pages * 4096)).collect(),
            parts,
            end,
            devices,
        },
    )
}

impl Recipe {
    fn write(&self) -> Vec<u8> {
        let mut wire = b"QEVM\0\0\0\x03".to_vec();
        if self.configured {
            wire.extend(b"\x07\0\0\0\x0apc-q35-9.2");
            wire.extend(b"\x05\x12configuration/uuid\0\0\0\x010123456789abcdef");
        }
        for (kind, length) in &self.commands {
            wire.push(8);
            wire.extend(kind.to_be_bytes());
            wire.extend((*length as u16).to_be_bytes());
            wire.extend(vec![7; *length]);
        }
        self.start(&mut wire);
        let mut block = None;
        for part in &self.parts {
            self.section(2, part, &mut block, &mut wire);
        }
        self.section(3, &self.end, &mut block, &mut wire);
        wire.extend(&self.devices);
        wire
    }

    fn start(&self, wire: &mut Vec<u8>) {
        wire.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        let total: u64 = self.blocks.iter().map(|(_, bytes)| bytes).sum();
        wire.extend((total | 4).to_be_bytes());
        for (name, bytes) in &self.blocks {
            wire.push(name.len() as u8);
            wire.extend(name.bytes());
            wire.extend(bytes.to_be_bytes());
        }
        wire.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    }

    fn section(&self, kind: u8, records: &[Record], block: &mut Option<usize>, wire: &mut Vec<u8>) {
        wire.extend([kind, 0, 0, 0, 2]);
        for record in records {
            let index = record.block.index(self.blocks.len());
            let (name, bytes) = &self.blocks[index];
            let continued = *block == Some(index) && !record.renamed;
            let offset = record.page.index((bytes / 4096) as usize) as u64 * 4096;
            let flags = if record.zero { 2 } else { 8 } | if continued { 32 } else { 0 };
            wire.extend((offset | flags).to_be_bytes());
            if !continued {
                wire.push(name.len() as u8);
                wire.extend(name.bytes());
            }
            wire.extend(std::iter::repeat_n(record.fill, if record.zero { 1 } else { 4096 }));
            *block = Some(index);
        }
        wire.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    }
}

/// What a sink was told; bytes that were passed in one go or in several are the same.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Pass(Vec<u8>),
    Blocks(Vec<RamBlock>),
    Page { block: usize, offset: u64, content: Vec<u8>, last: bool },
    End(RamSectionEnd),
}

/// Writes down every call and takes the pages that it is told to.
#[derive(Default)]
struct Scribe {
    calls: Vec<Call>,
    taken: Vec<bool>,
    pages: usize,
}

impl Scribe {
    fn taking(taken: &[bool]) -> Self {
        Self { taken: taken.to_vec(), ..Self::default() }
    }

    fn output(&self) -> Vec<u8> {
        let passed = self.calls.iter().filter_map(|call| match call {
            Call::Pass(bytes) => Some(&bytes[..]),
            _ => None,
        });
        passed.collect::<Vec<_>>().concat()
    }
}

impl StreamSink for Scribe {
    fn pass(&mut self, bytes: &[u8]) {
        match self.calls.last_mut() {
            Some(Call::Pass(passed)) => passed.extend(bytes),
            _ => self.calls.push(Call::Pass(bytes.to_vec())),
        }
    }

    fn ram_blocks(&mut self, blocks: &[RamBlock]) {
        self.calls.push(Call::Blocks(blocks.to_vec()));
    }

    fn page(&mut self, page: &RamPage<'_>) -> PageRoute {
        let content = match page.content {
            PageContent::Zero(fill) => vec![fill; 4096],
            PageContent::Bytes(bytes) => bytes.to_vec(),
        };
        let RamPage { block, offset, last, .. } = *page;
        self.calls.push(Call::Page { block, offset, content, last });
        self.pages += 1;
        match self.taken.get((self.pages - 1) % self.taken.len().max(1)) {
            Some(true) => PageRoute::Take,
            _ => PageRoute::Keep,
        }
    }

    fn ram_section_end(&mut self, end: RamSectionEnd) {
        self.calls.push(Call::End(end));
    }
}

fn split(wire: &[u8], piece_bytes: &[usize], taken: &[bool]) -> (Scribe, Result<(), StreamError>) {
    let mut scribe = Scribe::taking(taken);
    let mut splitter = Splitter::new();
    let mut rest = wire;
    for bytes in piece_bytes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, left) = rest.split_at((*bytes).min(rest.len()));
        if let Err(error) = splitter.push(piece, &mut scribe) {
            assert!(splitter.push(b"more", &mut scribe).is_err(), "an error is final");
            return (scribe, Err(error));
        }
        rest = left;
    }
    let finished = splitter.finish();
    (scribe, finished)
}

fn problem(wire: &[u8]) -> StreamProblem {
    split(wire, &[wire.len()], &[]).1.unwrap_err().problem
}

/// A page as the independent reader would name it, out of what the sink was told.
fn told(scribe: &Scribe, blocks: &[(String, u64)]) -> Vec<Page> {
    let pages = scribe.calls.iter().filter_map(|call| match call {
        Call::Page { block, offset, content, last } => Some(Page {
            block: blocks[*block].0.clone(),
            offset: *offset,
            content: content.clone(),
            last: *last,
        }),
        _ => None,
    });
    pages.collect()
}

proptest! {
    #[test]
    fn cuts_make_no_difference(
        recipe in recipe(),
        pieces in vec(prop_oneof![1usize..20, 1usize..9000], 1..20),
        taken in vec(any::<bool>(), 0..9),
    ) {
        let wire = recipe.write();
        let (whole, finished) = split(&wire, &[wire.len()], &taken);
        prop_assert_eq!(finished, Ok(()));
        let (cut, finished) = split(&wire, &pieces, &taken);
        prop_assert_eq!(finished, Ok(()));
        prop_assert_eq!(cut.calls, whole.calls);
    }

    #[test]
    fn kept_whole_it_is_the_input_without_empty_parts(mut recipe in recipe()) {
        let (scribe, _) = split(&recipe.write(), &[usize::MAX], &[]);
        recipe.parts.retain(|part| !part.is_empty());
        prop_assert_eq!(scribe.output(), recipe.write());
    }

    #[test]
    fn the_output_holds_the_kept_pages_and_all_that_is_not_ram(
        recipe in recipe(),
        taken in vec(any::<bool>(), 1..9),
    ) {
        let wire = recipe.write();
        let (scribe, _) = split(&wire, &[usize::MAX], &taken);
        let input = reader::read(&wire);
        let output = reader::read(&scribe.output());
        prop_assert_eq!(told(&scribe, &input.blocks), &input.pages[..]);
        let keep = |ordinal: usize| !taken[ordinal % taken.len()];
        let kept = input.pages.iter().enumerate().filter(|(ordinal, _)| keep(*ordinal)).map(|(_, page)| page.clone());
        prop_assert_eq!(output.pages, kept.collect::<Vec<_>>());
        prop_assert_eq!(output.frame, input.frame);
        prop_assert!(output.parts.iter().all(|pages| *pages > 0), "no empty PART is left");
    }

    #[test]
    fn damage_is_an_error_or_harmless_and_never_a_panic(
        recipe in recipe(),
        damage in vec((any::<Index>(), any::<u8>()), 1..4),
        pieces in vec(1usize..5000, 1..8),
    ) {
        let mut wire = recipe.write();
        for (place, value) in damage {
            let place = place.index(wire.len());
            wire[place] = value;
        }
        split(&wire, &pieces, &[true, false]).1.ok();
    }

    #[test]
    fn a_truncated_stream_is_not_finished(recipe in recipe(), cut in any::<Index>()) {
        let wire = recipe.write();
        let ram_bytes = wire.len() - recipe.devices.len();
        let (_, finished) = split(&wire[..cut.index(ram_bytes)], &[usize::MAX], &[]);
        prop_assert_eq!(finished.unwrap_err().problem, StreamProblem::Truncated);
    }

    #[test]
    fn garbage_is_an_error(wire in vec(any::<u8>(), 8..3000), sensible in any::<bool>()) {
        let start = if sensible { &b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"[..] } else { &[] };
        prop_assert!(split(&[start, &wire].concat(), &[usize::MAX], &[]).1.is_err());
    }
}

fn after_preamble(bytes: &[u8]) -> Vec<u8> {
    [b"QEVM\0\0\0\x03", bytes].concat()
}

fn after_start(blocks: &[(&str, u64)], bytes: &[u8]) -> Vec<u8> {
    let blocks = blocks.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect();
    let recipe =
        Recipe { configured: true, commands: vec![], blocks, parts: vec![], end: vec![], devices: vec![] };
    let mut wire = b"QEVM\0\0\0\x03".to_vec();
    recipe.start(&mut wire);
    [&wire, bytes].concat()
}

#[test]
fn names_what_it_cannot_delimit() {
    let early = b"\x04\0\0\0\x01\x23virtio-mem-device-early-and-its-path\0\0\0\0\0\0\0\x01";
    let StreamProblem::ForeignSection(name) = problem(&after_preamble(early)) else { panic!() };
    assert!(name.starts_with("virtio-mem-device-early"));
    let bitmap = b"\x01\0\0\0\x01\x0cdirty-bitmap\0\0\0\0\0\0\0\x01";
    assert_eq!(problem(&after_preamble(bitmap)), StreamProblem::ForeignSection("dirty-bitmap".into()));
}

#[test]
fn names_the_capability_that_must_be_off() {
    let postcopy = problem(&after_preamble(b"\x08\0\x03\0\x10"));
    assert!(postcopy.to_string().contains("POSTCOPY_ADVISE"), "{postcopy}");
    let shared = b"\x07\0\0\0\x02pc\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    assert_eq!(problem(&after_preamble(shared)), StreamProblem::Capability("x-ignore-shared".into()));
    for (flags, name) in [(0x40, "xbzrle"), (0x60, "xbzrle"), (0x200, "multifd"), (0x100, "compress")] {
        let record = [&b"\x02\0\0\0\x02"[..], &u64::to_be_bytes(0x1000 | flags)].concat();
        let problem = problem(&after_start(&[("pc.ram", 1 << 20)], &record));
        assert!(problem.to_string().contains(name), "{problem}");
    }
}

#[test]
fn limits_hold() {
    let many = (0..MAX_RAM_BLOCKS + 1).map(|number| (format!("block-{number}"), 4096)).collect::<Vec<_>>();
    let many = many.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect::<Vec<_>>();
    assert_eq!(problem(&after_start(&many, &[])), StreamProblem::TooManyBlocks);
    assert_eq!(problem(&after_start(&many[..MAX_RAM_BLOCKS], &[])), StreamProblem::Truncated);
    let twice = [("pc.ram", 4096), ("pc.ram", 4096)];
    assert_eq!(problem(&after_start(&twice, &[])), StreamProblem::DuplicateBlock("pc.ram".into()));
    assert_eq!(problem(&after_preamble(b"\x07\0\0\x01\x01")), StreamProblem::MachineName(257));
    let long = StreamProblem::CommandLength { kind: 2, bytes: 65 };
    assert_eq!(problem(&after_preamble(b"\x08\0\x02\0\x41")), long);
}

#[test]
fn pages_are_checked_against_the_block_list() {
    let part = |record: &[u8]| after_start(&[("pc.ram", 8192)], &[b"\x02\0\0\0\x02", record].concat());
    let beyond = StreamProblem::PageOffset { name: "pc.ram".into(), offset: 0x2000 };
    assert_eq!(problem(&part(b"\0\0\0\0\0\0\x20\x02\x06pc.ram\0")), beyond);
    assert_eq!(problem(&part(b"\0\0\0\0\0\0\0\x02\x03rom\0")), StreamProblem::UnknownBlock("rom".into()));
    assert_eq!(problem(&part(b"\0\0\0\0\0\0\0\x22\0")), StreamProblem::NoBlock);
    assert_eq!(problem(&part(b"\0\0\0\0\0\0\0\x04")), StreamProblem::Misplaced);
}
