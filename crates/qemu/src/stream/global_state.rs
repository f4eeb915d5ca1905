//! What the guest did just before QEMU stopped it, by QEMU's own word in the stream.

use memchr::memmem;
use serde::{
    Deserialize,
    de::value::{Error, StrDeserializer},
};

use crate::qmp::RunState;

/// The section's name, its length before it.
const NAME: &[u8] = b"\x0bglobalstate";
/// Instance and version, then the length of the state's name with its NUL, all be32, then the name's field.
const LENGTH_AT: usize = NAME.len() + 8;
const STATE_AT: usize = LENGTH_AT + 4;
const STATE_BYTES: usize = 100;
const SECTION_BYTES: usize = STATE_AT + STATE_BYTES;

/// Finds the section `globalstate` among the device sections as they pass.
///
/// An operator may pause a guest, or let it go on, in the moment before QEMU stops it for the switch-over; no event tells
/// the two stops apart, this section does. It comes behind all devices, so of several that look like it, the last counts:
/// what a guest put into its devices' state comes earlier.
///
/// ```
/// use godwit_qemu::{qmp::RunState, stream::GlobalState};
///
/// let mut section = b"\x04\0\0\0\x29\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x07paused".to_vec();
/// section.resize(section.len() + 100, 0);
/// let mut state = GlobalState::default();
/// section.chunks(10).for_each(|chunk| state.push(chunk));
/// assert_eq!(state.before_stop(), Some(RunState::Paused));
/// ```
#[derive(Debug, Clone, Default)]
pub struct GlobalState {
    /// The newest bytes, fewer than a section has: one may go on in the next piece.
    newest: Vec<u8>,
    found: Option<RunState>,
}

impl GlobalState {
    /// Looks at the next bytes of the device sections.
    pub fn push(&mut self, bytes: &[u8]) {
        self.newest.extend_from_slice(bytes);
        for at in memmem::find_iter(&self.newest, NAME) {
            self.found = self.newest[at..].get(..SECTION_BYTES).and_then(state_of).or(self.found);
        }
        let known = self.newest.len().saturating_sub(SECTION_BYTES - 1);
        self.newest.drain(..known);
    }

    /// What the guest did before it was stopped; `None` if the section hasn't come, or says something unknown.
    pub fn before_stop(&self) -> Option<RunState> {
        self.found
    }
}

fn state_of(section: &[u8]) -> Option<RunState> {
    let length = section[LENGTH_AT..].first_chunk().map(|bytes| u32::from_be_bytes(*bytes))?;
    let name = section[STATE_AT..].get(..usize::try_from(length).ok()?)?.strip_suffix(b"\0")?;
    let name = std::str::from_utf8(name).ok()?;
    let state = RunState::deserialize(StrDeserializer::<Error>::new(name)).ok()?;
    (state != RunState::Unknown).then_some(state)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn section(state: &str) -> Vec<u8> {
        let length = u32::try_from(state.len() + 1).unwrap().to_be_bytes();
        let mut section =
            [b"\x04\0\0\0\x29", NAME, &[0, 0, 0, 0, 0, 0, 0, 1], &length, state.as_bytes()].concat();
        section.resize(5 + SECTION_BYTES, 0);
        section
    }

    fn found(stream: &[u8], piece: usize) -> Option<RunState> {
        let mut state = GlobalState::default();
        stream.chunks(piece).for_each(|piece| state.push(piece));
        state.before_stop()
    }

    #[test]
    fn the_last_section_of_its_name_counts() {
        let stream =
            [section("running"), vec![7; 300], section("paused"), b"\x06vmdescription globalstate".to_vec()];
        assert_eq!(found(&stream.concat(), 4096), Some(RunState::Paused));
    }

    #[test]
    fn what_is_no_state_is_not_taken_for_one() {
        for wrong in [section("at-ease"), section(""), section("running")[..60].to_vec()] {
            assert_eq!(found(&wrong, 4096), None, "{wrong:?}");
        }
        let mut long = section("running");
        long[5 + LENGTH_AT] = 0xff;
        assert_eq!(found(&long, 4096), None);
    }

    proptest! {
        #[test]
        fn it_is_found_wherever_the_stream_is_cut(
            before in prop::collection::vec(any::<u8>(), 0..400),
            after in prop::collection::vec(any::<u8>(), 0..400),
            piece in 1usize..300,
        ) {
            let stream = [before, section("suspended"), after].concat();
            prop_assert_eq!(found(&stream, piece), Some(RunState::Suspended));
        }
    }
}
