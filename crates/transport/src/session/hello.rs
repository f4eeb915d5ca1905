//! The hello: the first 64 bytes on every connection, each way.
//!
//! The source offers, the target accepts or refuses; either names the versions it speaks, the session, which of its
//! connections this is, and the frames it expects next. Little-endian.
//!
//! ```text
//!  0          8         10        12       13     14     15     16             32        36       40        48       56
//! ┌──────────┬─────────┬─────────┬────────┬──────┬──────┬──────┬──────────────┬─────────┬────────┬─────────┬────────┬──────┐ 64
//! │ "godwit/s" │ lowest │ highest │ verdict│ role │ index│ count│ session id   │ attempt │ zero   │ urgent  │ bulk   │ zero │
//! └──────────┴─────────┴─────────┴────────┴──────┴──────┴──────┴──────────────┴─────────┴────────┴─────────┴────────┴──────┘
//! ```

use std::fmt;

use super::{
    core::Role,
    frame::{NextExpected, u64_at},
};

/// Bytes of a hello.
pub const HELLO_BYTES: usize = 64;
/// The versions of the frame format that this code speaks.
pub const VERSIONS: Versions = Versions { lowest: 1, highest: 1 };
/// Most bulk connections of a session.
pub const MAX_BULK_CONNECTIONS: u8 = 8;

const MAGIC: &[u8; 8] = b"godwit/s";

/// A range of protocol versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub lowest: u16,
    /// The newest.
    pub highest: u16,
}

impl Versions {
    /// The newest version that both sides speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.highest.min(other.highest);
        (newest >= self.lowest && newest >= other.lowest).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} to {}", self.lowest, self.highest)
    }
}

/// Names a session at both ends: 16 random bytes that the source chose.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Debug for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// What a hello says about the session it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The source asks for this connection.
    Offer,
    /// The target takes it.
    Accept,
    /// The target doesn't.
    Refuse(Refusal),
}

/// Why a target refuses a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No common version.
    #[error("no common protocol version")]
    Version,
    /// The certificate is not the expected host's.
    #[error("another host was expected")]
    Host,
    /// The target serves another session, or this one is over.
    #[error("unknown session")]
    Session,
    /// A newer attempt has begun, or the connection doesn't fit its attempt.
    #[error("the connection does not fit the session's newest attempt")]
    Attempt,
}

/// A hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// What the sender speaks.
    pub versions: Versions,
    /// Offer or answer.
    pub verdict: Verdict,
    /// Which connection this is.
    pub role: Role,
    /// How many bulk connections the session has, 1 to [`MAX_BULK_CONNECTIONS`].
    pub bulk_connections: u8,
    /// The session.
    pub session: SessionId,
    /// Counts the sets of connections of this session; the newest is valid.
    pub attempt: u32,
    /// What the sender expects next.
    pub received: NextExpected,
}

/// A hello that no correct peer sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// It doesn't begin as a hello does.
    #[error("the peer does not speak this protocol")]
    Magic,
    /// A field has no meaning.
    #[error("the peer's hello has a {field} that means nothing")]
    Field {
        /// Which.
        field: &'static str,
    },
}

impl Hello {
    /// The hello's bytes.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let verdict = match self.verdict {
            Verdict::Offer => 0,
            Verdict::Accept => 1,
            Verdict::Refuse(Refusal::Version) => 2,
            Verdict::Refuse(Refusal::Host) => 3,
            Verdict::Refuse(Refusal::Session) => 4,
            Verdict::Refuse(Refusal::Attempt) => 5,
        };
        let (role, index) = match self.role {
            Role::Urgent => (0, 0),
            Role::Bulk { index } => (1, index),
        };
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.lowest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.highest.to_le_bytes());
        bytes[12..16].copy_from_slice(&[verdict, role, index, self.bulk_connections]);
        bytes[16..32].copy_from_slice(&self.session.0);
        bytes[32..36].copy_from_slice(&self.attempt.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.received.urgent.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.received.bulk.to_le_bytes());
        bytes
    }

    /// Reads a hello. The reserved bytes are not looked at: a later version may use them.
    ///
    /// # Errors
    /// Where the bytes are no hello.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, HelloError> {
        if &bytes[0..8] != MAGIC {
            return Err(HelloError::Magic);
        }
        let bulk_connections = bytes[15];
        if !(1..=MAX_BULK_CONNECTIONS).contains(&bulk_connections) {
            return Err(HelloError::Field { field: "number of connections" });
        }
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[16..32]);
        Ok(Self {
            versions: decode_versions(bytes)?,
            verdict: decode_verdict(bytes[12])?,
            role: decode_role(bytes[13], bytes[14], bulk_connections)?,
            bulk_connections,
            session: SessionId(session),
            attempt: u32::from_le_bytes([bytes[32], bytes[33], bytes[34], bytes[35]]),
            received: NextExpected { urgent: u64_at(bytes, 40), bulk: u64_at(bytes, 48) },
        })
    }
}

fn decode_versions(bytes: &[u8; HELLO_BYTES]) -> Result<Versions, HelloError> {
    let lowest = u16::from_le_bytes([bytes[8], bytes[9]]);
    let highest = u16::from_le_bytes([bytes[10], bytes[11]]);
    if lowest > highest {
        return Err(HelloError::Field { field: "version range" });
    }
    Ok(Versions { lowest, highest })
}

fn decode_verdict(verdict: u8) -> Result<Verdict, HelloError> {
    Ok(match verdict {
        0 => Verdict::Offer,
        1 => Verdict::Accept,
        2 => Verdict::Refuse(Refusal::Version),
        3 => Verdict::Refuse(Refusal::Host),
        4 => Verdict::Refuse(Refusal::Session),
        5 => Verdict::Refuse(Refusal::Attempt),
        _ => return Err(HelloError::Field { field: "verdict" }),
    })
}

fn decode_role(role: u8, index: u8, bulk_connections: u8) -> Result<Role, HelloError> {
    match (role, index) {
        (0, 0) => Ok(Role::Urgent),
        (1, index) if index < bulk_connections => Ok(Role::Bulk { index }),
        _ => Err(HelloError::Field { field: "role" }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_decoded_encodes_to_the_same_hello(
            tail: [u8; 32],
            session: [u8; 16],
            fields in [0u8..4, 0..4, 0..7, 0..3, 0..9, 0..10],
        ) {
            let [lowest, highest, verdict, role, index, count] = fields;
            let mut bytes = [0; HELLO_BYTES];
            bytes[0..8].copy_from_slice(MAGIC);
            bytes[8] = lowest;
            bytes[10] = highest;
            bytes[12..16].copy_from_slice(&[verdict, role, index, count]);
            bytes[16..32].copy_from_slice(&session);
            bytes[32..].copy_from_slice(&tail);
            if let Ok(hello) = Hello::decode(&bytes) {
                prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
                prop_assert_eq!(&hello.encode()[..36], &bytes[..36]);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: [u8; 32], more: [u8; 32]) {
            let mut hello = [0; HELLO_BYTES];
            hello[..32].copy_from_slice(&bytes);
            hello[32..].copy_from_slice(&more);
            prop_assert_eq!(Hello::decode(&hello), Err(HelloError::Magic));
        }
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        let versions = |lowest, highest| Versions { lowest, highest };
        assert_eq!(versions(1, 3).common(versions(2, 5)), Some(3));
        assert_eq!(versions(2, 5).common(versions(1, 3)), Some(3));
        assert_eq!(versions(1, 1).common(versions(2, 2)), None);
    }
}
