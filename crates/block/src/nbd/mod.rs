//! The protocol by which QEMU gets at a disk: NBD, fixed newstyle, over a unix socket. Bytes in, bytes out; no I/O.
//!
//! ```text
//!   server                                   client
//!   greeting ──────────────────────────────►
//!            ◄────────────────────────────── flags
//!            ◄────────────────────────────── option ┐
//!   replies  ──────────────────────────────►        ┘ until GO or EXPORT_NAME   [`Handshake`]
//!            ◄────────────────────────────── request ┐
//!   reply    ──────────────────────────────►         ┘ until DISC, in any order  [`RequestHeader`], [`Replies`]
//! ```
//!
//! Everything is big-endian. The protocol is described in the NBD project's `doc/proto.md`; sections are named where a
//! thing comes from one.

mod handshake;
mod replies;
mod request;

pub use handshake::{Export, Handshake, HandshakeError, Progress, Session};
pub use replies::{Allocation, Replies};
pub use request::{Command, REQUEST_HEADER_BYTES, RequestError, RequestHeader};

/// The most bytes that a request reads or writes ("Block size constraints": what a client may rely on).
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;

/// What goes wrong with a request, as the client is told ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// The disk is read-only.
    NotPermitted = 1,
    /// The disk can't be read or written.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// There is no space left on the host.
    NoSpace = 28,
    /// The request can't be done as fast as was asked.
    NotSupported = 95,
    /// The disk's control is elsewhere.
    Shutdown = 108,
}

/// Puts together what is sent.
trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
}

/// Takes apart what was received; `None` if there is less than that.
struct Take<'a>(&'a [u8]);

impl<'a> Take<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}
