//! A peer's bytes, as they come off a connection: hello, ClientHello, frames, and what a session makes of them.

#![no_main]

use std::time::Instant;

use godwit_transport::{
    route,
    session::{
        Limits,
        core::{Core, Role},
        frame::{Decoder, Lane, NextExpected},
        hello::{HELLO_BYTES, Hello},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = route::parse_client_hello(bytes);
    if let Some(hello) = bytes.first_chunk::<HELLO_BYTES>() {
        let _ = Hello::decode(hello);
    }
    receive(bytes);
});

/// Feeds the bytes to a session in pieces, until it calls them a violation.
fn receive(bytes: &[u8]) {
    let now = Instant::now();
    let mut core = Core::new(Limits::default(), now);
    core.resume(NextExpected::default(), now).expect("nothing was sent, and nothing is expected");
    let mut decoder = Decoder::default();
    for piece in bytes.chunks(1000) {
        decoder.buffer().extend_from_slice(piece);
        loop {
            let Ok(next) = decoder.next_frame() else { return };
            let Some(frame) = next else { break };
            let role = match frame.header.lane {
                Lane::Urgent => Role::Urgent,
                Lane::Bulk => Role::Bulk { index: 0 },
            };
            if core.receive(role, frame, now).is_err() {
                return;
            }
            while core.take(role.lane()).is_some() {}
        }
    }
}
