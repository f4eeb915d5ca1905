//! The return path: what a destination's QEMU tells the source's while it loads, as bytes in and messages out.
//!
//! A message is a big-endian 16-bit type, a 16-bit length, and so many bytes. [`Decoder`] takes them in pieces of any
//! size; [`encode`] writes one, so that a proxy can hold messages back or put in its own.

/// QEMU itself takes no longer payload (`source_return_path_thread`).
pub const MAX_PAYLOAD_BYTES: usize = 512;

const HEADER_BYTES: usize = 4;

/// A message of the return path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The destination is done: 0 if it has loaded everything. The source's migration completes on seeing 0.
    Shut(u32),
    /// Answer to a PING of the stream, with its number.
    Pong(u32),
    /// The destination is ready for the switch-over; the source stops the guest only after it (capability
    /// `switchover-ack`).
    SwitchoverAck,
    /// Post-copy asks for pages.
    ReqPages {
        /// Their block; the one of the request before if left out.
        block: Option<String>,
        /// Where in the block.
        offset: u64,
        /// How many bytes.
        bytes: u32,
    },
    /// A post-copy that is being recovered announces which pages of a block it has.
    RecvBitmap {
        /// The block.
        block: String,
    },
    /// A post-copy that is being recovered goes on.
    ResumeAck(u32),
    /// A type this decoder doesn't know.
    Other {
        /// The type.
        kind: u16,
        /// Its payload, so that it can be forwarded.
        payload: Vec<u8>,
    },
}

/// The return path can't be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReturnPathError {
    /// A length that QEMU wouldn't take either.
    #[error("return path message of type {kind} has {bytes} bytes, at most {MAX_PAYLOAD_BYTES} are expected")]
    TooLong {
        /// The message's type.
        kind: u16,
        /// Its announced length.
        bytes: usize,
    },
    /// The length or contents don't fit the type.
    #[error("return path message of type {kind} is malformed ({bytes} bytes)")]
    Malformed {
        /// The message's type.
        kind: u16,
        /// Its length.
        bytes: usize,
    },
}

/// Takes the return path apart.
///
/// ```
/// use godwit_qemu::return_path::{Decoder, Message, encode};
///
/// let mut decoder = Decoder::new();
/// decoder.push(&encode(&Message::SwitchoverAck));
/// assert_eq!(decoder.next_message()?, Some(Message::SwitchoverAck));
/// assert_eq!(decoder.next_message()?, None);
/// # Ok::<(), godwit_qemu::return_path::ReturnPathError>(())
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
}

impl Decoder {
    /// For a return path from its first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that were read. Call [`next_message`](Self::next_message) until it returns `None` before the next
    /// push; then no more than a message is held.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    ///
    /// # Errors
    /// The message is longer than any, or isn't what its type says. The connection is of no more use then.
    pub fn next_message(&mut self) -> Result<Option<Message>, ReturnPathError> {
        let Some((header, rest)) = self.pending.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let kind = u16::from_be_bytes([header[0], header[1]]);
        let bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if bytes > MAX_PAYLOAD_BYTES {
            return Err(ReturnPathError::TooLong { kind, bytes });
        }
        let Some(payload) = rest.get(..bytes) else {
            return Ok(None);
        };
        let message = parse(kind, payload).ok_or(ReturnPathError::Malformed { kind, bytes })?;
        self.pending.drain(..HEADER_BYTES + bytes);
        Ok(Some(message))
    }
}

/// A message as it goes over the wire.
///
/// # Panics
/// If a name is longer than 255 bytes or a payload longer than [`MAX_PAYLOAD_BYTES`].
pub fn encode(message: &Message) -> Vec<u8> {
    let (kind, payload) = match message {
        Message::Shut(status) => (kind::SHUT, status.to_be_bytes().to_vec()),
        Message::Pong(number) => (kind::PONG, number.to_be_bytes().to_vec()),
        Message::ReqPages { block, offset, bytes } => {
            let mut payload = [&offset.to_be_bytes()[..], &bytes.to_be_bytes()].concat();
            payload.extend(block.iter().flat_map(|name| counted(name)));
            (if block.is_some() { kind::REQ_PAGES_ID } else { kind::REQ_PAGES }, payload)
        }
        Message::RecvBitmap { block } => (kind::RECV_BITMAP, counted(block)),
        Message::ResumeAck(value) => (kind::RESUME_ACK, value.to_be_bytes().to_vec()),
        Message::SwitchoverAck => (kind::SWITCHOVER_ACK, Vec::new()),
        Message::Other { kind, payload } => (*kind, payload.clone()),
    };
    assert!(payload.len() <= MAX_PAYLOAD_BYTES, "QEMU takes no payload of {} bytes", payload.len());
    let length = payload.len() as u16;
    [&kind.to_be_bytes()[..], &length.to_be_bytes(), &payload].concat()
}

/// QEMU's `MIG_RP_MSG_*`.
mod kind {
    pub(super) const SHUT: u16 = 1;
    pub(super) const PONG: u16 = 2;
    pub(super) const REQ_PAGES_ID: u16 = 3;
    pub(super) const REQ_PAGES: u16 = 4;
    pub(super) const RECV_BITMAP: u16 = 5;
    pub(super) const RESUME_ACK: u16 = 6;
    pub(super) const SWITCHOVER_ACK: u16 = 7;
}

fn parse(kind: u16, payload: &[u8]) -> Option<Message> {
    Some(match kind {
        kind::SHUT => Message::Shut(number(payload)?),
        kind::PONG => Message::Pong(number(payload)?),
        kind::REQ_PAGES => requested(payload, |rest| rest.is_empty().then_some(None))?,
        kind::REQ_PAGES_ID => requested(payload, |rest| name(rest).map(Some))?,
        kind::RECV_BITMAP => Message::RecvBitmap { block: name(payload)? },
        kind::RESUME_ACK => Message::ResumeAck(number(payload)?),
        kind::SWITCHOVER_ACK if payload.is_empty() => Message::SwitchoverAck,
        kind::SWITCHOVER_ACK => return None,
        _ => Message::Other { kind, payload: payload.to_vec() },
    })
}

fn number(payload: &[u8]) -> Option<u32> {
    payload.try_into().ok().map(u32::from_be_bytes)
}

fn requested(payload: &[u8], block: impl Fn(&[u8]) -> Option<Option<String>>) -> Option<Message> {
    let (offset, rest) = payload.split_first_chunk()?;
    let (bytes, rest) = rest.split_first_chunk()?;
    Some(Message::ReqPages {
        block: block(rest)?,
        offset: u64::from_be_bytes(*offset),
        bytes: u32::from_be_bytes(*bytes),
    })
}

fn name(counted: &[u8]) -> Option<String> {
    let (length, bytes) = counted.split_first()?;
    let name = std::str::from_utf8(bytes).ok()?;
    (bytes.len() == usize::from(*length)).then(|| name.to_owned())
}

fn counted(name: &str) -> Vec<u8> {
    let length = u8::try_from(name.len()).expect("QEMU's block names have at most 255 bytes");
    [&[length], name.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = Message> {
        let block = || "[a-z0-9./: -]{0,255}";
        prop_oneof![
            any::<u32>().prop_map(Message::Shut),
            any::<u32>().prop_map(Message::Pong),
            Just(Message::SwitchoverAck),
            (proptest::option::of(block()), any::<u64>(), any::<u32>())
                .prop_map(|(block, offset, bytes)| Message::ReqPages { block, offset, bytes }),
            block().prop_map(|block| Message::RecvBitmap { block }),
            any::<u32>().prop_map(Message::ResumeAck),
            (8u16.., proptest::collection::vec(any::<u8>(), 0..MAX_PAYLOAD_BYTES))
                .prop_map(|(kind, payload)| Message::Other { kind, payload }),
        ]
    }

    fn drain(decoder: &mut Decoder) -> Vec<Message> {
        std::iter::from_fn(|| decoder.next_message().unwrap()).collect()
    }

    proptest! {
        #[test]
        fn decodes_what_was_encoded_in_pieces_of_any_size(
            messages in proptest::collection::vec(message(), 0..8),
            piece_bytes in 1usize..40,
        ) {
            let wire = messages.iter().flat_map(encode).collect::<Vec<_>>();
            let mut decoder = Decoder::new();
            let mut decoded = Vec::new();
            for piece in wire.chunks(piece_bytes) {
                decoder.push(piece);
                decoded.extend(drain(&mut decoder));
            }
            prop_assert_eq!(decoded, messages);
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(wire in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::new();
            decoder.push(&wire);
            while let Ok(Some(_)) = decoder.next_message() {}
        }
    }

    #[test]
    fn bytes_of_the_acknowledgement_and_of_shut() {
        assert_eq!(encode(&Message::SwitchoverAck), [0, 7, 0, 0]);
        assert_eq!(encode(&Message::Shut(0)), [0, 1, 0, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn refuses_wrong_lengths() {
        let mut decoder = Decoder::new();
        decoder.push(&[0, 1, 0, 3, 0, 0, 0]);
        assert_eq!(decoder.next_message(), Err(ReturnPathError::Malformed { kind: 1, bytes: 3 }));
        let mut decoder = Decoder::new();
        decoder.push(&[0, 9, 2, 1]);
        assert_eq!(decoder.next_message(), Err(ReturnPathError::TooLong { kind: 9, bytes: 513 }));
    }
}
