//! The frame: what every connection of a session carries after its hello.
//!
//! ```text
//!  0        1        2                 4                                 8
//! ┌────────┬────────┬─────────────────┬─────────────────────────────────┬─────────────────────────────────┐
//! │ lane   │ kind   │ flags           │ length of the payload           │ sequence number                 │
//! ├────────┴────────┴─────────────────┴─────────────────────────────────┼─────────────────────────────────┤ 16
//! │ next sequence number expected on the urgent lane                    │ the same on the bulk lane       │
//! └─────────────────────────────────────────────────────────────────────┴─────────────────────────────────┘ 32
//! ```
//!
//! Little-endian. A message longer than a frame is cut into consecutive frames of its lane, all but the last with
//! [`MORE`]. `docs/wire-format.md` says what each field means.

use bytes::{Bytes, BytesMut};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 32;
/// The longest payload of one frame, and of a message put together from several.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// Room for a read, at least: what one TLS record holds.
const MIN_READ_BYTES: usize = 16 * 1024;
/// How much is allocated when there is less; payloads share it until the last of them is dropped.
const BUFFER_BYTES: usize = 256 * 1024;

/// The message goes on in the next frame of its lane.
const MORE: u16 = 1;
/// The frame carries acknowledgements only: no sequence number, no payload.
const ACKNOWLEDGEMENT: u16 = 2;
/// The sender will send nothing more on any lane.
const CLOSE: u16 = 4;

/// One of a session's two ordered streams of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// For what must not wait behind bulk data; has a connection of its own.
    Urgent,
    /// For volume; striped over the bulk connections, delivered in order.
    Bulk,
}

impl Lane {
    /// Both lanes.
    pub const ALL: [Lane; 2] = [Lane::Urgent, Lane::Bulk];

    pub(super) fn index(self) -> usize {
        match self {
            Lane::Urgent => 0,
            Lane::Bulk => 1,
        }
    }
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A message, or a part of one.
    Message {
        /// Whether the message goes on in the next frame of the lane.
        more: bool,
    },
    /// Nothing but the acknowledgements that every header carries.
    Acknowledgement,
    /// The end of everything that this side sends.
    Close,
}

/// Per lane, the sequence number that a receiver expects next; everything below has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NextExpected {
    /// On the urgent lane.
    pub urgent: u64,
    /// On the bulk lane.
    pub bulk: u64,
}

impl NextExpected {
    /// On `lane`.
    pub fn on(&self, lane: Lane) -> u64 {
        match lane {
            Lane::Urgent => self.urgent,
            Lane::Bulk => self.bulk,
        }
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The lane it belongs to; `Urgent` for a pure acknowledgement.
    pub lane: Lane,
    /// What the application calls this message; not interpreted here.
    pub kind: u8,
    /// What the frame is.
    pub content: Content,
    /// Bytes of payload that follow, at most [`MAX_PAYLOAD_BYTES`].
    pub payload_bytes: u32,
    /// Counts the lane's frames from 0.
    pub sequence: u64,
    /// What the sender of this frame has received.
    pub received: NextExpected,
}

/// A header and its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// Exactly `header.payload_bytes` bytes.
    pub payload: Bytes,
}

/// A header that no correct peer sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The lane doesn't exist.
    #[error("frame on lane {lane}, which does not exist")]
    Lane {
        /// The number.
        lane: u8,
    },
    /// Flags that are unknown or exclude each other.
    #[error("frame with flags {flags:#06x}, which mean nothing")]
    Flags {
        /// The flags.
        flags: u16,
    },
    /// The payload is longer than allowed, or should not be there.
    #[error("frame announces {payload_bytes} bytes of payload, allowed are {allowed}")]
    Length {
        /// What it announces.
        payload_bytes: u32,
        /// What this frame may have.
        allowed: u32,
    },
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let flags = match self.content {
            Content::Message { more: false } => 0,
            Content::Message { more: true } => MORE,
            Content::Acknowledgement => ACKNOWLEDGEMENT,
            Content::Close => CLOSE,
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.lane.index() as u8;
        bytes[1] = self.kind;
        bytes[2..4].copy_from_slice(&u16::to_le_bytes(flags));
        bytes[4..8].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.received.urgent.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.received.bulk.to_le_bytes());
        bytes
    }

    /// Reads a header; what it accepts, [`Header::encode`] gives back.
    ///
    /// # Errors
    /// On an unknown lane or flag and on a length beyond its limit, so that nothing is allocated for it.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let lane = match bytes[0] {
            0 => Lane::Urgent,
            1 => Lane::Bulk,
            lane => return Err(FrameError::Lane { lane }),
        };
        let flags = u16::from_le_bytes([bytes[2], bytes[3]]);
        let content = match flags {
            0 => Content::Message { more: false },
            MORE => Content::Message { more: true },
            ACKNOWLEDGEMENT => Content::Acknowledgement,
            CLOSE => Content::Close,
            flags => return Err(FrameError::Flags { flags }),
        };
        let allowed = match content {
            Content::Message { .. } => MAX_PAYLOAD_BYTES as u32,
            Content::Acknowledgement | Content::Close => 0,
        };
        let payload_bytes = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if payload_bytes > allowed {
            return Err(FrameError::Length { payload_bytes, allowed });
        }
        let received = NextExpected { urgent: u64_at(bytes, 16), bulk: u64_at(bytes, 24) };
        Ok(Self { lane, kind: bytes[1], content, payload_bytes, sequence: u64_at(bytes, 8), received })
    }
}

impl Frame {
    /// Bytes of header and payload.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }
}

/// Cuts a connection's bytes into frames, without copying payloads.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: BytesMut,
    header: Option<Header>,
}

impl Decoder {
    /// Where to put what was read from the connection: room for the rest of the frame that has begun, and for more.
    pub fn buffer(&mut self) -> &mut BytesMut {
        let missing = self.wanted_bytes().saturating_sub(self.bytes.len());
        if self.bytes.capacity() - self.bytes.len() < missing.max(MIN_READ_BYTES) {
            self.bytes.reserve(missing.max(BUFFER_BYTES));
        }
        &mut self.bytes
    }

    /// The next complete frame.
    ///
    /// # Errors
    /// On a header that no correct peer sends; what follows it can't be told apart any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.bytes.len() < self.wanted_bytes() {
            return Ok(None);
        }
        let header = match self.header.take() {
            Some(header) => header,
            None => self.take_header()?,
        };
        let payload_bytes = header.payload_bytes as usize;
        if self.bytes.len() < payload_bytes {
            self.header = Some(header);
            return Ok(None);
        }
        Ok(Some(Frame { header, payload: self.bytes.split_to(payload_bytes).freeze() }))
    }

    /// Buffered bytes that allow the next step.
    fn wanted_bytes(&self) -> usize {
        self.header.map_or(HEADER_BYTES, |header| header.payload_bytes as usize)
    }

    fn take_header(&mut self) -> Result<Header, FrameError> {
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(&self.bytes.split_to(HEADER_BYTES));
        Header::decode(&bytes)
    }
}

/// Reads the little-endian number at `offset`, which the caller knows to lie within `bytes`.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_decoded_encodes_to_the_same_bytes(bytes: [u8; HEADER_BYTES], lane in 0u8..3, flags in 0u16..6) {
            let mut bytes = bytes;
            bytes[0] = lane;
            bytes[2..4].copy_from_slice(&flags.to_le_bytes());
            bytes[7] = 0;
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.payload_bytes as usize <= MAX_PAYLOAD_BYTES);
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[4..8].copy_from_slice(&(MAX_PAYLOAD_BYTES as u32 + 1).to_le_bytes());
        assert!(matches!(Header::decode(&bytes), Err(FrameError::Length { .. })));
        bytes[4..8].copy_from_slice(&1u32.to_le_bytes());
        bytes[2] = ACKNOWLEDGEMENT as u8;
        assert!(matches!(Header::decode(&bytes), Err(FrameError::Length { allowed: 0, .. })));
        bytes[2] = (MORE | CLOSE) as u8;
        assert!(matches!(Header::decode(&bytes), Err(FrameError::Flags { .. })));
        bytes[0] = 2;
        assert!(matches!(Header::decode(&bytes), Err(FrameError::Lane { lane: 2 })));
    }
}
