//! Deliberate mistakes, one at a time, to show that `cargo xtask chaos` finds them. They exist only in builds with the
//! feature `sabotage`, which are never shipped, and only the one is made that [`VARIABLE`] names.

use godwit_migration::handover::{Record, RecordState};

/// Names the mistake: `dash-s`, `shut`, `page` or `fence`.
const VARIABLE: &str = "GODWIT_SABOTAGE";
/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

/// `dash-s`: an incoming machine is started without `-S`, so that QEMU runs it as soon as it is loaded.
pub(crate) fn without_dash_s(mut arguments: Vec<String>) -> Vec<String> {
    if makes("dash-s") {
        arguments.retain(|argument| argument != "-S");
    }
    arguments
}

/// `shut`: the source's QEMU waits for an answer that doesn't come.
pub(crate) fn leaves_shut_unanswered() -> bool {
    makes("shut")
}

/// `page`: the last page of a batch is left out before anything is summed up over it.
pub(crate) fn all_but_one<B>(mut blocks: Vec<B>, mut contents: Vec<u8>) -> (Vec<B>, Vec<u8>) {
    if makes("page") && blocks.len() > 1 {
        blocks.pop();
        contents.truncate(blocks.len() * PAGE_BYTES);
    }
    (blocks, contents)
}

/// `fence`: that the token leaves isn't written down.
pub(crate) fn forgets(record: &Record) -> bool {
    makes("fence") && matches!(record.state, RecordState::GivenAway { .. })
}

fn makes(mistake: &str) -> bool {
    std::env::var_os(VARIABLE).is_some_and(|named| named == mistake)
}
