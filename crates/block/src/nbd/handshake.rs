//! How a client chooses a disk and agrees on the ways of the protocol ("Handshake phase").
//!
//! ```text
//!   Flags ──client's flags──► Options ──GO, EXPORT_NAME──► ready
//!                              │  ▲ └──ABORT─────────────► aborted
//!                              └──┘ every other option
//! ```
//!
//! A client that breaks the rules is let go, with nothing left behind. The options that it may choose from are those
//! that QEMU, libnbd and the kernel use.

use thiserror::Error;

use super::{Put, REQUEST_BYTES_MAX, Take, replies::ALLOCATION_CONTEXT, replies::Replies};
use crate::geometry::{BLOCK_BYTES, SECTOR_BYTES};

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// No option that a client may choose is longer.
const OPTION_BYTES_MAX: u32 = 16 << 10;
/// No client needs more options than that to come to an end.
const OPTIONS_MAX: u32 = 256;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUPPORTED: u32 = (1 << 31) + 1;
const REP_ERR_INVALID: u32 = (1 << 31) + 3;
const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const ALLOCATION: &str = "base:allocation";

/// A disk to be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name. The empty name means it too.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// Whether it can't be written.
    pub read_only: bool,
}

impl Export {
    /// What it can do ("Transmission flags").
    fn flags(&self) -> u16 {
        const HAS_FLAGS: u16 = 1;
        const READ_ONLY: u16 = 1 << 1;
        const FLUSH: u16 = 1 << 2;
        const FUA: u16 = 1 << 3;
        const TRIM: u16 = 1 << 5;
        const WRITE_ZEROES: u16 = 1 << 6;
        const DONT_FRAGMENT: u16 = 1 << 7;
        const CACHE: u16 = 1 << 10;
        const FAST_ZERO: u16 = 1 << 11;
        let always = HAS_FLAGS | FLUSH | FUA | TRIM | WRITE_ZEROES | DONT_FRAGMENT | CACHE | FAST_ZERO;
        if self.read_only { always | READ_ONLY } else { always }
    }
}

/// A client that is choosing.
#[derive(Debug)]
pub struct Handshake {
    export: Export,
    state: State,
    options: u32,
    replies: Replies,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Flags,
    Options { zeroes: bool },
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More must come from it.
    More,
    /// Requests follow.
    Ready(Session),
    /// It has gone.
    Aborted,
}

/// What was agreed with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// How it is answered.
    pub replies: Replies,
}

/// A client that doesn't keep to the protocol.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum HandshakeError {
    /// It has flags that mean nothing here.
    #[error("the client wants {0:#x}, which isn't offered")]
    Flags(u32),
    /// Something else came where an option should be.
    #[error("an option begins with {0:#018x}")]
    Magic(u64),
    /// An option is longer than any is.
    #[error("option {option} has {length} bytes, more than {OPTION_BYTES_MAX}")]
    TooLong {
        /// Which.
        option: u32,
        /// Its length.
        length: u32,
    },
    /// It wants another disk, and can't be told so.
    #[error("the client wants the disk {0:?}")]
    UnknownExport(String),
    /// It comes to no end.
    #[error("the client has tried {OPTIONS_MAX} options")]
    TooMany,
}

impl Handshake {
    /// Greets a client that connected.
    pub fn new(export: Export, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(GREETING);
        out.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
        Self {
            export,
            state: State::Flags,
            options: 0,
            replies: Replies { structured: false, allocation: false },
        }
    }

    /// Takes what the client sent, and puts the answers into `out`. Returns how many bytes of `input` were used; those
    /// after [`Progress::Ready`] are requests.
    ///
    /// # Errors
    /// [`HandshakeError`]: the client is to be let go.
    pub fn receive(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, Progress), HandshakeError> {
        let mut take = Take(input);
        let mut used = 0;
        while let Some(progress) = self.next(&mut take, out)? {
            used = input.len() - take.0.len();
            if progress != Progress::More {
                return Ok((used, progress));
            }
        }
        Ok((used, Progress::More))
    }

    /// Takes one thing; `None` if it isn't whole.
    fn next(&mut self, take: &mut Take<'_>, out: &mut Vec<u8>) -> Result<Option<Progress>, HandshakeError> {
        match self.state {
            State::Flags => {
                let Some(flags) = take.u32() else { return Ok(None) };
                if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
                    return Err(HandshakeError::Flags(flags));
                }
                self.state = State::Options { zeroes: flags & u32::from(NO_ZEROES) == 0 };
                Ok(Some(Progress::More))
            }
            State::Options { zeroes } => {
                let Some((option, data)) = take_option(take)? else { return Ok(None) };
                self.options += 1;
                if self.options > OPTIONS_MAX {
                    return Err(HandshakeError::TooMany);
                }
                self.choose(option, data, zeroes, out).map(Some)
            }
        }
    }

    fn choose(
        &mut self,
        option: u32,
        data: &[u8],
        zeroes: bool,
        out: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        match option {
            OPT_EXPORT_NAME => return self.choose_by_name(data, zeroes, out),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Ok(Progress::Aborted);
            }
            OPT_LIST if data.is_empty() => self.list(out),
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.replies.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => invalid(out, option, "this option has no data"),
            OPT_INFO | OPT_GO => {
                if self.inform(option, data, out) && option == OPT_GO {
                    return Ok(Progress::Ready(Session { replies: self.replies }));
                }
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.contexts(option, data, out),
            _ => reply(out, option, REP_ERR_UNSUPPORTED, b"this option isn't known here"),
        }
        Ok(Progress::More)
    }

    /// The old way of choosing, which can't be answered by an error.
    fn choose_by_name(
        &self,
        name: &[u8],
        zeroes: bool,
        out: &mut Vec<u8>,
    ) -> Result<Progress, HandshakeError> {
        if !self.is_meant_by(name) {
            return Err(HandshakeError::UnknownExport(String::from_utf8_lossy(name).into_owned()));
        }
        out.put_u64(self.export.size_bytes);
        out.put_u16(self.export.flags());
        if zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(Progress::Ready(Session { replies: self.replies }))
    }

    fn is_meant_by(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name.as_bytes()
    }

    fn list(&self, out: &mut Vec<u8>) {
        let mut entry = Vec::new();
        entry.put_u32(self.export.name.len() as u32);
        entry.extend_from_slice(self.export.name.as_bytes());
        reply(out, OPT_LIST, REP_SERVER, &entry);
        reply(out, OPT_LIST, REP_ACK, &[]);
    }

    /// Tells of a disk by its name; whether there is such a disk.
    fn inform(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> bool {
        let mut take = Take(data);
        let Some(name) = take_text(&mut take) else {
            invalid(out, option, "the name is longer than the option");
            return false;
        };
        // What the client would like to be told; it is told everything.
        let wanted = take.u16().map(|count| usize::from(count) * 2);
        if wanted != Some(take.0.len()) {
            invalid(out, option, "the list of what to tell has another length");
            return false;
        }
        if !self.is_meant_by(name) {
            reply(out, option, REP_ERR_UNKNOWN, b"there is no disk of that name");
            return false;
        }
        let mut export = Vec::new();
        export.put_u16(INFO_EXPORT);
        export.put_u64(self.export.size_bytes);
        export.put_u16(self.export.flags());
        reply(out, option, REP_INFO, &export);
        let mut sizes = Vec::new();
        sizes.put_u16(INFO_BLOCK_SIZE);
        sizes.put_u32(SECTOR_BYTES as u32);
        sizes.put_u32(BLOCK_BYTES as u32);
        sizes.put_u32(REQUEST_BYTES_MAX);
        reply(out, option, REP_INFO, &sizes);
        reply(out, option, REP_ACK, &[]);
        true
    }

    /// What can be asked about ranges.
    fn contexts(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let Some((name, queries)) = take_queries(data) else {
            return invalid(out, option, "the queries are cut short");
        };
        if option == OPT_SET_META_CONTEXT && !self.replies.structured {
            return invalid(out, option, "structured replies come first");
        }
        if !self.is_meant_by(name) {
            return reply(out, option, REP_ERR_UNKNOWN, b"there is no disk of that name");
        }
        let listed = option == OPT_LIST_META_CONTEXT;
        let wanted =
            queries.iter().any(|&query| query == ALLOCATION.as_bytes() || listed && query == b"base:")
                || listed && queries.is_empty();
        if !listed {
            self.replies.allocation = wanted;
        }
        if wanted {
            let mut context = Vec::new();
            context.put_u32(if listed { 0 } else { ALLOCATION_CONTEXT });
            context.extend_from_slice(ALLOCATION.as_bytes());
            reply(out, option, REP_META_CONTEXT, &context);
        }
        reply(out, option, REP_ACK, &[]);
    }
}

/// An option and its data; `None` if it isn't whole.
fn take_option<'a>(take: &mut Take<'a>) -> Result<Option<(u32, &'a [u8])>, HandshakeError> {
    let mut ahead = Take(take.0);
    let Some(magic) = ahead.u64() else { return Ok(None) };
    if magic != OPTION_MAGIC {
        return Err(HandshakeError::Magic(magic));
    }
    let Some((option, length)) = ahead.u32().zip(ahead.u32()) else { return Ok(None) };
    if length > OPTION_BYTES_MAX {
        return Err(HandshakeError::TooLong { option, length });
    }
    let Some(data) = ahead.bytes(length as usize) else { return Ok(None) };
    take.0 = ahead.0;
    Ok(Some((option, data)))
}

fn take_text<'a>(take: &mut Take<'a>) -> Option<&'a [u8]> {
    let length = take.u32()?;
    take.bytes(length as usize)
}

/// A disk's name and the queries that come with it. Their number is no promise of so many: it isn't believed.
fn take_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut take = Take(data);
    let name = take_text(&mut take)?;
    let count = take.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(take_text(&mut take)?);
    }
    take.0.is_empty().then_some((name, queries))
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.put_u64(REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.extend_from_slice(data);
}

fn invalid(out: &mut Vec<u8>, option: u32, why: &str) {
    reply(out, option, REP_ERR_INVALID, why.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeted() -> Handshake {
        let mut out = Vec::new();
        let export = Export { name: "root".into(), size_bytes: 1 << 30, read_only: false };
        let handshake = Handshake::new(export, &mut out);
        assert_eq!(out.len(), 18);
        handshake
    }

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.extend_from_slice(data);
        bytes
    }

    fn named(name: &str, rest: &[u8]) -> Vec<u8> {
        let mut data = Vec::new();
        data.put_u32(name.len() as u32);
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(rest);
        data
    }

    /// What QEMU sends before its first request.
    fn like_qemu() -> Vec<u8> {
        let mut query = 1_u32.to_be_bytes().to_vec();
        query.extend_from_slice(&named(ALLOCATION, &[]));
        let flags = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
        let options = [
            option(11, &[]),
            option(OPT_STRUCTURED_REPLY, &[]),
            option(OPT_SET_META_CONTEXT, &named("root", &query)),
            option(OPT_GO, &named("root", &[0, 1, 0, 3])),
        ];
        [flags, options.concat()].concat()
    }

    #[test]
    fn a_client_may_send_its_options_in_any_parts() {
        let bytes = [like_qemu(), b"requests".to_vec()].concat();
        for part in [1, 3, 17, 1000] {
            let (mut handshake, mut out, mut at) = (greeted(), Vec::new(), 0);
            let mut until = 0;
            let session = loop {
                until = (until + part).min(bytes.len());
                let (used, progress) =
                    handshake.receive(&bytes[at..until], &mut out).expect("it keeps to it");
                at += used;
                match progress {
                    Progress::More => assert!(until < bytes.len(), "it comes to an end"),
                    Progress::Ready(session) => break session,
                    Progress::Aborted => panic!("it didn't say so"),
                }
            };
            assert_eq!(session.replies, Replies { structured: true, allocation: true });
            assert_eq!(bytes[at..], *b"requests");
        }
    }

    #[test]
    fn a_disk_of_another_name_is_refused_and_the_client_may_try_again() {
        let (mut handshake, mut out) = (greeted(), Vec::new());
        let flags = 3_u32.to_be_bytes().to_vec();
        let other = option(OPT_GO, &named("swap", &[0, 0]));
        let input = [flags, other].concat();
        assert_eq!(handshake.receive(&input, &mut out), Ok((input.len(), Progress::More)));
        assert_eq!(out[12..16], REP_ERR_UNKNOWN.to_be_bytes());
        let (_, progress) = handshake.receive(&option(OPT_GO, &named("", &[0, 0])), &mut out).expect("known");
        assert!(matches!(progress, Progress::Ready(_)));
    }

    #[test]
    fn who_breaks_the_rules_is_let_go() {
        let mut out = Vec::new();
        let flags = 3_u32.to_be_bytes();
        assert_eq!(greeted().receive(&[0xff; 4], &mut out), Err(HandshakeError::Flags(u32::MAX)));
        let mut strange = greeted();
        let _ = strange.receive(&flags, &mut out).expect("good flags");
        assert!(matches!(strange.receive(&[7; 8], &mut out), Err(HandshakeError::Magic(_))));
        let mut long = greeted();
        let _ = long.receive(&flags, &mut out).expect("good flags");
        let mut huge = option(OPT_LIST, &[]);
        huge[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(long.receive(&huge, &mut out), Err(HandshakeError::TooLong { .. })));
        let mut endless = greeted();
        let _ = endless.receive(&flags, &mut out).expect("good flags");
        let options = option(OPT_LIST, &[]).repeat(OPTIONS_MAX as usize + 1);
        assert_eq!(endless.receive(&options, &mut out), Err(HandshakeError::TooMany));
    }

    #[test]
    fn lengths_that_lie_are_told_to_the_client() {
        let (mut handshake, mut out) = (greeted(), Vec::new());
        let _ = handshake.receive(&3_u32.to_be_bytes(), &mut out).expect("good flags");
        for data in [vec![0, 0, 0, 9, 1], named("root", &[0, 9, 1]), named("root", &[0xff; 8])] {
            for kind in [OPT_INFO, OPT_GO, OPT_SET_META_CONTEXT] {
                out.clear();
                let (_, progress) =
                    handshake.receive(&option(kind, &data), &mut out).expect("told, not let go");
                assert_eq!(progress, Progress::More);
                assert_eq!(out[12..16], REP_ERR_INVALID.to_be_bytes());
            }
        }
    }
}
