//! What a client is answered ("Simple reply message", "Structured reply chunk message").

use super::{Errno, Put};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

const DONE: u16 = 1;
const KIND_NONE: u16 = 0;
const KIND_DATA: u16 = 1;
const KIND_HOLE: u16 = 2;
const KIND_STATUS: u16 = 5;
const KIND_ERROR: u16 = 0x8001;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// The protocol allows 4,096 bytes of text; nobody reads as many.
const TEXT_BYTES_MAX: usize = 1024;

/// The only thing that can be asked about ranges here: `base:allocation`.
pub(super) const ALLOCATION_CONTEXT: u32 = 1;

/// What a range has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Content, here or to be fetched.
    Data,
    /// Zeros that take no space.
    Hole,
}

/// How a client is answered: what was agreed with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replies {
    pub(super) structured: bool,
    pub(super) allocation: bool,
}

impl Replies {
    /// Whether [`Replies::allocation`] may be sent.
    pub fn tells_allocation(self) -> bool {
        self.allocation
    }

    /// A request is done, and it had nothing to tell.
    pub fn done(self, cookie: u64, out: &mut Vec<u8>) {
        if self.structured {
            chunk(out, DONE, KIND_NONE, cookie, 0);
        } else {
            simple(out, 0, cookie);
        }
    }

    /// A request failed.
    pub fn error(self, cookie: u64, errno: Errno, why: &str, out: &mut Vec<u8>) {
        if !self.structured {
            return simple(out, errno as u32, cookie);
        }
        let mut why = why;
        while why.len() > TEXT_BYTES_MAX {
            let last = why.char_indices().next_back().map_or(0, |(at, _)| at);
            why = &why[..last];
        }
        chunk(out, DONE, KIND_ERROR, cookie, 6 + why.len() as u32);
        out.put_u32(errno as u32);
        out.put_u16(why.len() as u16);
        out.extend_from_slice(why.as_bytes());
    }

    /// What was read, `length` bytes from `offset`: the caller puts the bytes behind it.
    pub fn data_header(self, cookie: u64, offset: u64, length: u32, out: &mut Vec<u8>) {
        if self.structured {
            chunk(out, DONE, KIND_DATA, cookie, 8 + length);
            out.put_u64(offset);
        } else {
            simple(out, 0, cookie);
        }
    }

    /// What was read is zero, all of it.
    pub fn zeros(self, cookie: u64, offset: u64, length: u32, out: &mut Vec<u8>) {
        if self.structured {
            chunk(out, DONE, KIND_HOLE, cookie, 12);
            out.put_u64(offset);
            out.put_u32(length);
        } else {
            simple(out, 0, cookie);
            out.resize(out.len() + length as usize, 0);
        }
    }

    /// What a range has, extent by extent, as lengths. There is at least one.
    pub fn allocation(self, cookie: u64, extents: &[(u32, Allocation)], out: &mut Vec<u8>) {
        chunk(out, DONE, KIND_STATUS, cookie, 4 + 8 * extents.len() as u32);
        out.put_u32(ALLOCATION_CONTEXT);
        for &(length, allocation) in extents {
            out.put_u32(length);
            out.put_u32(match allocation {
                Allocation::Data => 0,
                Allocation::Hole => STATE_HOLE | STATE_ZERO,
            });
        }
    }
}

fn simple(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.put_u32(SIMPLE_MAGIC);
    out.put_u32(error);
    out.put_u64(cookie);
}

fn chunk(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, length: u32) {
    out.put_u32(STRUCTURED_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(length);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_where_a_letter_ends() {
        let mut out = Vec::new();
        let replies = Replies { structured: true, allocation: false };
        replies.error(1, Errno::Io, &"ä".repeat(2000), &mut out);
        assert_eq!(out.len(), 20 + 6 + 1024);
        assert_eq!(out[24..26], 1024_u16.to_be_bytes());
    }

    #[test]
    fn who_asked_for_no_structure_gets_zeros_as_bytes() {
        let mut out = Vec::new();
        Replies { structured: false, allocation: false }.zeros(9, 0, 512, &mut out);
        assert_eq!(out.len(), 16 + 512);
        out.clear();
        Replies { structured: true, allocation: false }.zeros(9, 0, 512, &mut out);
        assert_eq!(out.len(), 20 + 12);
    }
}
