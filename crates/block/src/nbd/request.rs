//! What a client asks for, once it has chosen a disk ("Transmission phase").

use thiserror::Error;

use super::{REQUEST_BYTES_MAX, Take};

/// The length of a request, without what it writes.
pub const REQUEST_HEADER_BYTES: usize = 28;

const MAGIC: u32 = 0x2560_9513;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 2;
const FLAG_DONT_FRAGMENT: u16 = 4;
const FLAG_ONE_EXTENT: u16 = 8;
const FLAG_FAST_ZERO: u16 = 16;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read,
    /// Write what follows the header; survive the host before the reply if `durable`.
    Write {
        /// Force unit access.
        durable: bool,
    },
    /// No request follows.
    Disconnect,
    /// Let everything that was replied to survive the host.
    Flush,
    /// The content isn't needed any more.
    Trim {
        /// Force unit access.
        durable: bool,
    },
    /// Have it ready, since it will be read.
    Cache,
    /// Make it zero.
    Zero {
        /// Force unit access.
        durable: bool,
        /// Keep the space.
        allocate: bool,
    },
    /// Say where there is content.
    Status {
        /// One extent will do.
        one: bool,
    },
}

/// A request, without what it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// What the reply is told by.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u32,
    /// What is to be done; `None` if the server doesn't know it, and says so.
    pub command: Option<Command>,
}

/// A request after which nothing can be understood.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// It doesn't begin as requests do.
    #[error("a request begins with {0:#010x}, not with {MAGIC:#010x}")]
    Magic(u32),
    /// It writes more than was agreed.
    #[error("a request writes {0} bytes, and {REQUEST_BYTES_MAX} are allowed")]
    TooLong(u32),
}

impl RequestHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// [`RequestError`]: the connection is of no use any more.
    pub fn decode(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, RequestError> {
        let (magic, flags, kind, cookie, offset, length) =
            fields(Take(bytes)).expect("the header's length is that of its fields");
        if magic != MAGIC {
            return Err(RequestError::Magic(magic));
        }
        if kind == WRITE && length > REQUEST_BYTES_MAX {
            return Err(RequestError::TooLong(length));
        }
        Ok(Self { cookie, offset, length, command: command(kind, flags) })
    }

    /// How many bytes follow the header.
    pub fn payload_bytes(&self) -> usize {
        if matches!(self.command, Some(Command::Write { .. })) { self.length as usize } else { 0 }
    }
}

fn fields(mut take: Take<'_>) -> Option<(u32, u16, u16, u64, u64, u32)> {
    Some((take.u32()?, take.u16()?, take.u16()?, take.u64()?, take.u64()?, take.u32()?))
}

fn command(kind: u16, flags: u16) -> Option<Command> {
    let durable = flags & FLAG_FUA != 0;
    let (command, allowed) = match kind {
        READ => (Command::Read, FLAG_DONT_FRAGMENT | FLAG_FUA),
        WRITE => (Command::Write { durable }, FLAG_FUA),
        DISCONNECT => (Command::Disconnect, u16::MAX),
        FLUSH => (Command::Flush, FLAG_FUA),
        TRIM => (Command::Trim { durable }, FLAG_FUA),
        CACHE => (Command::Cache, FLAG_FUA),
        WRITE_ZEROES => {
            let allocate = flags & FLAG_NO_HOLE != 0;
            (Command::Zero { durable, allocate }, FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO)
        }
        BLOCK_STATUS => (Command::Status { one: flags & FLAG_ONE_EXTENT != 0 }, FLAG_ONE_EXTENT | FLAG_FUA),
        _ => return None,
    };
    // A write's bytes follow whatever its flags are, so it is understood, though it may be asked for too much.
    (flags & !allowed == 0 || kind == WRITE).then_some(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u16, kind: u16, length: u32) -> [u8; REQUEST_HEADER_BYTES] {
        let mut bytes = [0; REQUEST_HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&77_u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&4096_u64.to_be_bytes());
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        bytes
    }

    #[test]
    fn a_write_has_its_bytes_after_it() {
        let request = RequestHeader::decode(&header(FLAG_FUA, WRITE, 512)).expect("a good request");
        assert_eq!((request.cookie, request.offset, request.payload_bytes()), (77, 4096, 512));
        assert_eq!(request.command, Some(Command::Write { durable: true }));
    }

    #[test]
    fn what_is_not_known_is_told_from_what_cannot_be_understood() {
        assert_eq!(RequestHeader::decode(&header(0, 99, 512)).map(|request| request.command), Ok(None));
        assert_eq!(
            RequestHeader::decode(&header(FLAG_ONE_EXTENT, READ, 1)).map(|read| read.command),
            Ok(None)
        );
        let long = REQUEST_BYTES_MAX + 1;
        assert_eq!(RequestHeader::decode(&header(0, WRITE, long)), Err(RequestError::TooLong(long)));
        assert_eq!(RequestHeader::decode(&[0; REQUEST_HEADER_BYTES]), Err(RequestError::Magic(0)));
    }
}
