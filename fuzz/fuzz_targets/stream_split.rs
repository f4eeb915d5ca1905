//! Any bytes, cut anywhere, with any choice of pages taken: never a panic, never more passed on than came in (but for
//! the block names that are put in), and what is passed on splits again.

#![no_main]

use godwit_qemu::stream::{
    MAX_NAME_BYTES, PageRoute, RamBlock, RamPage, RamSectionEnd, Splitter, StreamSink,
};
use libfuzzer_sys::fuzz_target;

/// Takes the pages whose bit is set, in turn.
#[derive(Default)]
struct Sink {
    passed: Vec<u8>,
    taken: u8,
    pages: usize,
}

impl StreamSink for Sink {
    fn pass(&mut self, bytes: &[u8]) {
        self.passed.extend_from_slice(bytes);
    }

    fn ram_blocks(&mut self, _: &[RamBlock]) {}

    fn page(&mut self, _: &RamPage<'_>) -> PageRoute {
        self.pages += 1;
        if self.taken.rotate_right(self.pages as u32) & 1 == 1 { PageRoute::Take } else { PageRoute::Keep }
    }

    fn ram_section_end(&mut self, _: RamSectionEnd) {}
}

fuzz_target!(|input: (u8, u16, &[u8])| {
    let (taken, piece_bytes, wire) = input;
    // Most streams would fail at the first byte otherwise.
    let wire = [b"QEVM\0\0\0\x03", wire].concat();
    let mut sink = Sink { taken, ..Sink::default() };
    let mut splitter = Splitter::new();
    let valid =
        wire.chunks(usize::from(piece_bytes) + 1).all(|piece| splitter.push(piece, &mut sink).is_ok());
    assert!(sink.passed.len() <= wire.len() + sink.pages * (1 + MAX_NAME_BYTES));
    if valid && splitter.finish().is_ok() {
        let mut again = Splitter::new();
        let mut kept = Sink::default();
        again.push(&sink.passed, &mut kept).expect("a rewritten stream is valid");
        again.finish().expect("a rewritten stream is complete");
        assert_eq!(kept.passed, sink.passed, "keeping everything changes nothing more");
    }
});
