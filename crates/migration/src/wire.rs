//! What the two sides of a migration say to each other.
//!
//! Every message travels in one frame of the session, which carries its *kind* beside its body. Control messages are
//! JSON: they are few, people read them in traces, and unknown fields are ignored, so that versions can differ.
//! Control messages of the hand-over travel in the session's urgent lane; everything else in the bulk lane, which keeps
//! its order, so that a token has behind it all that it promises. Bytes from a peer are never trusted: [`decode`] limits
//! sizes and counts and returns an error for anything else.
//!
//! ```text
//! source                                   target
//!   HELLO      ───────────────────────────►          versions, the machine, its RAM blocks
//!              ◄───────────────────────────  WELCOME  or REFUSE, with the reason
//!              ◄───────────────────────────  HELD …   what it kept of an earlier migration, if it did
//!   HANDOVER   ◄──────────────────────────►          see `handover`
//!   BATCH …    ───────────────────────────►          memory, bulk lanes
//!              ◄───────────────────────────  KEPT …   where blocks are that other guests may use too, bulk lane
//!   STREAM …   ───────────────────────────►          what of QEMU's stream isn't memory, up to the stop
//!   DEVICE_STATE … ───────────────────────►          and from then on
//!   TOKEN      ───────────────────────────►
//! ```

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use thiserror::Error;

use crate::handover::{self, Epoch, RunState};

/// The oldest version of the protocol that this build speaks.
pub const VERSION_MIN: u16 = 2;
/// The newest one.
pub const VERSION_MAX: u16 = 2;

/// Kind of [`Message::Hello`].
pub const HELLO: u8 = 1;
/// Kind of [`Message::Welcome`].
pub const WELCOME: u8 = 2;
/// Kind of [`Message::Refuse`].
pub const REFUSE: u8 = 3;
/// Kind of [`Message::Handover`].
pub const HANDOVER: u8 = 4;
/// Kind of [`Message::Token`].
pub const TOKEN: u8 = 5;
/// Kind of a frame with an encoded batch of blocks (`godwit_content::Batch`).
pub const BATCH: u8 = 16;
/// Kind of a frame with a sealed piece of QEMU's stream that QEMU may have at once.
pub const STREAM: u8 = 17;
/// Kind of a frame with a sealed piece of QEMU's stream that QEMU gets only when the token has come and everything
/// has been verified: devices read guest memory while they load.
pub const DEVICE_STATE: u8 = 18;
/// Kind of a frame with the digests of the source's memory, read again while it is paused.
pub const VERIFY: u8 = 19;

/// Kind of a frame with sealed 64-bit digests of what the target holds of an earlier migration: four a page, in order,
/// eight bytes each, little-endian, whole pages in each frame; from the target, right after its welcome.
pub const HELD: u8 = 20;

/// Kind of a frame with a [`Kept`]; from the target, one for each batch that asked for it, in their order.
pub const KEPT: u8 = 21;

/// Longest body of a control message.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Most RAM blocks that a machine may have.
pub const RAM_BLOCKS_MAX: usize = 1_024;
/// Longest name or reason in a message, in bytes.
pub const TEXT_BYTES_MAX: usize = 4_096;

/// A control message.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Source: what is to come.
    Hello(Box<Hello>),
    /// Target: it may come.
    Welcome(Welcome),
    /// Either: it may not; the last message of a session.
    Refuse(Refuse),
    /// About the right to run the machine.
    Handover(handover::Message),
    /// The right to run the machine.
    Token(Token),
}

/// The first message of a source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version that the source speaks.
    pub version_min: u16,
    /// Newest version that the source speaks.
    pub version_max: u16,
    /// Names the migration at both hosts.
    pub migration_id: String,
    /// The machine's name.
    pub machine: String,
    /// The attempt.
    pub epoch: Epoch,
    /// The machine's RAM blocks in the order of QEMU's stream.
    pub ram_blocks: Vec<RamBlock>,
    /// What the target has to know of the operator's choices.
    pub options: TransferOptions,
    /// QEMU's version at the source, as QEMU says it.
    pub qemu_version: String,
    /// The machine type, versioned: `pc-q35-10.0`.
    pub machine_type: String,
}

/// A RAM block of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// QEMU's name of it, such as `pc.ram`.
    pub name: String,
    /// Its used length.
    pub bytes: u64,
    /// Its blocks travel in batches and are written into QEMU's memory; otherwise its pages stay in the stream.
    pub direct: bool,
}

/// Choices of the operator that concern the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TransferOptions {
    /// Don't run the guest at the target, whatever it did before.
    pub leave_paused: bool,
    /// Announce the guest's addresses at the target right after the stop.
    pub early_announce: bool,
}

/// The target's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that both speak from here on.
    pub version: u16,
    /// QEMU's version at the target.
    pub qemu_version: String,
    /// Of how many pages digests follow in [`HELD`] frames; 0 if the target holds nothing.
    #[serde(default)]
    pub held_pages: u64,
    /// Names what the target holds for all guests from this source, so that both mean the same by a slot; `None` if it
    /// holds nothing for others.
    #[serde(default)]
    pub shared_pages: Option<String>,
}

/// Where the target put the blocks that a batch asked it to keep for other guests: in consecutive slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// The slot of the first.
    pub first_slot: u64,
    /// How many; 0 where there was no room, and then there won't be any later.
    pub blocks: u32,
}

impl Kept {
    /// The frame's body: both numbers, little-endian.
    pub fn to_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.first_slot.to_le_bytes());
        bytes[8..].copy_from_slice(&self.blocks.to_le_bytes());
        bytes
    }

    /// Reads a frame's body; `None` if it isn't one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (first_slot, blocks) = bytes.split_first_chunk()?;
        let blocks = u32::from_le_bytes(blocks.try_into().ok()?);
        Some(Self { first_slot: u64::from_le_bytes(*first_slot), blocks })
    }
}

/// Why a migration can't be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// One line for the operator.
    pub reason: String,
}

/// The right to run the machine, and what the target must have before it may use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The attempt.
    pub epoch: Epoch,
    /// What the guest did before the stop.
    pub run_state: RunState,
    /// Don't run it, whatever it did.
    pub leave_paused: bool,
    /// Batches of memory sent.
    pub batches: u64,
    /// The encoder's running digest after the last of them.
    pub chain: Digest,
    /// Bytes of QEMU's stream sent.
    pub stream_bytes: u64,
    /// xxh3-128 of them.
    pub stream_digest: Digest,
    /// When QEMU stopped the guest, microseconds since the Unix epoch, by the source's clock.
    pub stopped_unix_us: u64,
}

/// A 128-bit digest; 32 hexadecimal digits in JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 16]);

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:032x}", u128::from_be_bytes(self.0)))
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(serde::de::Error::custom("a digest has 32 hexadecimal digits"));
        }
        let value = u128::from_str_radix(&text, 16).map_err(serde::de::Error::custom)?;
        Ok(Self(value.to_be_bytes()))
    }
}

/// Why a message could not be encoded.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// It is larger than a peer would accept.
    #[error("a control message of {bytes} bytes is over the limit of {CONTROL_BYTES_MAX}")]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// It has no JSON form.
    #[error("a control message has no JSON form")]
    Json(#[from] serde_json::Error),
}

/// Why a frame from a peer isn't a message.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The kind is none of a control message.
    #[error("{kind} is not the kind of a control message")]
    UnknownKind {
        /// The frame's kind.
        kind: u8,
    },
    /// The body is too long.
    #[error("a control message of {bytes} bytes is over the limit of {CONTROL_BYTES_MAX}")]
    TooLong {
        /// Its size.
        bytes: usize,
    },
    /// The body isn't what its kind says.
    #[error("a control message of kind {kind} can't be read")]
    Json {
        /// The frame's kind.
        kind: u8,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A name, a reason or a list is too long.
    #[error("{what} in a control message is over its limit of {limit}")]
    OverLimit {
        /// Which.
        what: &'static str,
        /// Bytes or entries allowed.
        limit: usize,
    },
}

/// The frame for a control message: its kind and its body.
///
/// # Errors
/// [`EncodeError::TooLong`] if no peer would accept it.
///
/// ```
/// use godwit_migration::wire::{self, Message, Refuse};
///
/// let message = Message::Refuse(Refuse { reason: "no such bridge".into() });
/// let (kind, body) = wire::encode(&message)?;
/// assert_eq!(kind, wire::REFUSE);
/// assert_eq!(wire::decode(kind, &body)?, message);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn encode(message: &Message) -> Result<(u8, Bytes), EncodeError> {
    let (kind, body) = match message {
        Message::Hello(hello) => (HELLO, serde_json::to_vec(hello)?),
        Message::Welcome(welcome) => (WELCOME, serde_json::to_vec(welcome)?),
        Message::Refuse(refuse) => (REFUSE, serde_json::to_vec(refuse)?),
        Message::Handover(handover) => (HANDOVER, serde_json::to_vec(handover)?),
        Message::Token(token) => (TOKEN, serde_json::to_vec(token)?),
    };
    if body.len() > CONTROL_BYTES_MAX {
        return Err(EncodeError::TooLong { bytes: body.len() });
    }
    Ok((kind, body.into()))
}

/// The control message in a frame.
///
/// # Errors
/// [`DecodeError`] for anything that isn't one, or is larger than a real one would be.
pub fn decode(kind: u8, body: &[u8]) -> Result<Message, DecodeError> {
    if body.len() > CONTROL_BYTES_MAX {
        return Err(DecodeError::TooLong { bytes: body.len() });
    }
    let message = match kind {
        HELLO => Message::Hello(parse(kind, body)?),
        WELCOME => Message::Welcome(parse(kind, body)?),
        REFUSE => Message::Refuse(parse(kind, body)?),
        HANDOVER => Message::Handover(parse(kind, body)?),
        TOKEN => Message::Token(parse(kind, body)?),
        _ => return Err(DecodeError::UnknownKind { kind }),
    };
    check_limits(&message)?;
    Ok(message)
}

/// The newest version that both sides speak, or `None`.
pub fn negotiate(hello: &Hello) -> Option<u16> {
    let newest = hello.version_max.min(VERSION_MAX);
    (newest >= hello.version_min.max(VERSION_MIN)).then_some(newest)
}

fn parse<T: DeserializeOwned>(kind: u8, body: &[u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(body).map_err(|source| DecodeError::Json { kind, source })
}

fn check_limits(message: &Message) -> Result<(), DecodeError> {
    match message {
        Message::Hello(hello) => {
            limit("the list of RAM blocks", hello.ram_blocks.len(), RAM_BLOCKS_MAX)?;
            let names = [&hello.migration_id, &hello.machine, &hello.qemu_version, &hello.machine_type];
            let blocks = hello.ram_blocks.iter().map(|block| &block.name);
            names.into_iter().chain(blocks).try_for_each(|name| limit("a name", name.len(), TEXT_BYTES_MAX))
        }
        Message::Welcome(welcome) => {
            let shared_pages = welcome.shared_pages.as_deref().unwrap_or_default();
            [welcome.qemu_version.as_str(), shared_pages]
                .into_iter()
                .try_for_each(|name| limit("a name", name.len(), TEXT_BYTES_MAX))
        }
        Message::Refuse(Refuse { reason })
        | Message::Handover(
            handover::Message::Cancel { reason, .. } | handover::Message::Refused { reason, .. },
        ) => limit("a reason", reason.len(), TEXT_BYTES_MAX),
        Message::Handover(_) | Message::Token(_) => Ok(()),
    }
}

fn limit(what: &'static str, length: usize, limit: usize) -> Result<(), DecodeError> {
    if length > limit { Err(DecodeError::OverLimit { what, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello {
            version_min: 1,
            version_max: 3,
            migration_id: "m1".into(),
            machine: "web1".into(),
            epoch: Epoch(7),
            ram_blocks: vec![RamBlock { name: "pc.ram".into(), bytes: 1 << 29, direct: true }],
            options: TransferOptions { leave_paused: true, ..TransferOptions::default() },
            qemu_version: "10.0.2".into(),
            machine_type: "pc-q35-10.0".into(),
        }
    }

    fn token() -> Token {
        Token {
            epoch: Epoch(7),
            run_state: RunState::IoError,
            leave_paused: false,
            batches: 3,
            chain: Digest([0xab; 16]),
            stream_bytes: 9,
            stream_digest: Digest([1; 16]),
            stopped_unix_us: 1,
        }
    }

    #[test]
    fn every_kind_survives_the_wire() {
        let epoch = Epoch(7);
        for message in [
            Message::Hello(Box::new(hello())),
            Message::Welcome(Welcome {
                version: 1,
                qemu_version: "10.0.2".into(),
                held_pages: 3,
                shared_pages: Some("0123456789abcdef".into()),
            }),
            Message::Refuse(Refuse { reason: "no".into() }),
            Message::Handover(handover::Message::Cancel { epoch, reason: "operator".into() }),
            Message::Handover(handover::Message::Taken { epoch, resumed_unix_us: Some(5) }),
            Message::Token(token()),
        ] {
            let (kind, body) = encode(&message).unwrap();
            assert_eq!(decode(kind, &body).unwrap(), message);
        }
    }

    #[test]
    fn a_token_reads_as_people_would_write_it() {
        let (_, body) = encode(&Message::Token(token())).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(json["chain"], "ab".repeat(16));
        assert_eq!(json["run_state"], "io-error");
        assert_eq!(json["epoch"], 7);
    }

    #[test]
    fn digests_with_signs_or_of_other_lengths_are_refused() {
        for text in
            ["", "+0000000000000000000000000000000", &"0".repeat(31), &"0".repeat(33), &"é".repeat(16)]
        {
            assert!(serde_json::from_value::<Digest>(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn limits_hold() {
        let mut long = hello();
        long.machine = "x".repeat(TEXT_BYTES_MAX + 1);
        let body = serde_json::to_vec(&long).unwrap();
        assert!(matches!(decode(HELLO, &body), Err(DecodeError::OverLimit { .. })));

        let mut many = hello();
        many.ram_blocks = vec![many.ram_blocks[0].clone(); RAM_BLOCKS_MAX + 1];
        let body = serde_json::to_vec(&many).unwrap();
        assert!(matches!(decode(HELLO, &body), Err(DecodeError::OverLimit { .. })));

        let body = vec![b' '; CONTROL_BYTES_MAX + 1];
        assert!(matches!(decode(HELLO, &body), Err(DecodeError::TooLong { .. })));
        assert!(matches!(decode(BATCH, b"{}"), Err(DecodeError::UnknownKind { kind: BATCH })));
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        let between = |version_min, version_max| negotiate(&Hello { version_min, version_max, ..hello() });
        assert_eq!(between(VERSION_MIN, VERSION_MAX + 4), Some(VERSION_MAX));
        assert_eq!(between(VERSION_MAX + 1, VERSION_MAX + 4), None);
        assert_eq!(between(VERSION_MAX, VERSION_MIN - 1), None);
    }

    proptest! {
        #[test]
        fn slots_survive_the_wire_and_other_lengths_are_refused(first_slot: u64, blocks: u32, bytes: Vec<u8>) {
            let kept = Kept { first_slot, blocks };
            prop_assert_eq!(Kept::from_bytes(&kept.to_bytes()), Some(kept));
            prop_assert_eq!(Kept::from_bytes(&bytes).is_some(), bytes.len() == 12);
        }

        #[test]
        fn arbitrary_bytes_are_errors(kind: u8, body: Vec<u8>) {
            let _ = decode(kind, &body);
        }

        #[test]
        fn damaged_messages_are_errors_or_other_messages(at: prop::sample::Index, byte: u8) {
            let (kind, body) = encode(&Message::Hello(Box::new(hello()))).unwrap();
            let mut body = body.to_vec();
            let at = at.index(body.len());
            body[at] = byte;
            let _ = decode(kind, &body);
        }
    }
}
