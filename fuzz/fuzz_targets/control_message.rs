//! What a peer says in a session's control messages, and what QEMU says on its return path: an error or a message that
//! means the same when it is said again; never a panic.

#![no_main]

use godwit_migration::wire;
use godwit_qemu::return_path;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    if let Ok(message) = wire::decode(kind % 8, bytes) {
        let (kind, again) = wire::encode(&message).expect("what was decoded can be encoded");
        assert_eq!(wire::decode(kind, &again).expect("and decoded again"), message);
    }
    let mut decoder = return_path::Decoder::new();
    for piece in bytes.chunks(usize::from(kind) + 1) {
        decoder.push(piece);
        while let Ok(Some(_)) = decoder.next_message() {}
    }
});
