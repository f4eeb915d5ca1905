//! Arbitrary bytes as what an NBD client sends: replies in measure, an end of the connection, and never a panic.

#![no_main]

use godwit_block::nbd::{
    Errno, Export, Handshake, Progress, REQUEST_BYTES_MAX, REQUEST_HEADER_BYTES, Replies, RequestHeader,
};
use libfuzzer_sys::fuzz_target;

/// What a server may say unasked, or to a single option.
const SAID_BYTES_MAX: usize = 4096;

fuzz_target!(|bytes: &[u8]| {
    let export = Export { name: "disk".to_owned(), size_bytes: 1 << 30, read_only: bytes.len() % 2 == 0 };
    if let Some((replies, rest)) = shake_hands(export, bytes) {
        take_requests(replies, rest);
    }
});

fn shake_hands(export: Export, bytes: &[u8]) -> Option<(Replies, &[u8])> {
    let mut said = Vec::new();
    let mut handshake = Handshake::new(export, &mut said);
    let mut rest = bytes;
    loop {
        let before = said.len();
        let (used, progress) = handshake.receive(rest, &mut said).ok()?;
        rest = &rest[used..];
        assert!(said.len() - before <= SAID_BYTES_MAX * (1 + used / 16));
        match progress {
            Progress::Ready(session) => return Some((session.replies, rest)),
            Progress::Aborted => return None,
            Progress::More if used == 0 => return None,
            Progress::More => {}
        }
    }
}

fn take_requests(replies: Replies, mut rest: &[u8]) {
    while let Some((header, after)) = rest.split_first_chunk::<REQUEST_HEADER_BYTES>() {
        let Ok(request) = RequestHeader::decode(header) else { return };
        assert!(request.payload_bytes() <= REQUEST_BYTES_MAX as usize);
        let mut said = Vec::new();
        replies.error(request.cookie, Errno::Invalid, "no", &mut said);
        assert!(!said.is_empty() && said.len() < 64);
        rest = after.get(request.payload_bytes()..).unwrap_or_default();
    }
}
