//! Reading one element of the stream from bytes that may end in its middle.

use super::{PAGE_BYTES, StreamProblem};

/// Why an element couldn't be read.
#[derive(Debug)]
pub(super) enum Unread {
    /// It has at least this many bytes, which aren't all there yet.
    Short(usize),
    /// It is wrong, and more bytes won't help.
    Wrong(StreamProblem),
}

impl From<StreamProblem> for Unread {
    fn from(problem: StreamProblem) -> Self {
        Unread::Wrong(problem)
    }
}

/// Takes an element apart, field by field; numbers are big-endian.
pub(super) struct Element<'a> {
    bytes: &'a [u8],
    read_bytes: usize,
}

impl<'a> Element<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, read_bytes: 0 }
    }

    /// All that was read so far.
    pub(super) fn read(&self) -> &'a [u8] {
        &self.bytes[..self.read_bytes]
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<&'a [u8], Unread> {
        let end = self.read_bytes + count;
        let field = self.bytes.get(self.read_bytes..end).ok_or(Unread::Short(end))?;
        self.read_bytes = end;
        Ok(field)
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Unread> {
        let end = self.read_bytes + N;
        let field = self.bytes[self.read_bytes..].first_chunk().ok_or(Unread::Short(end))?;
        self.read_bytes = end;
        Ok(field)
    }

    pub(super) fn page(&mut self) -> Result<&'a [u8; PAGE_BYTES], Unread> {
        self.array()
    }

    pub(super) fn u8(&mut self) -> Result<u8, Unread> {
        self.array().map(|bytes| u8::from_be_bytes(*bytes))
    }

    pub(super) fn u16(&mut self) -> Result<u16, Unread> {
        self.array().map(|bytes| u16::from_be_bytes(*bytes))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Unread> {
        self.array().map(|bytes| u32::from_be_bytes(*bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Unread> {
        self.array().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// A byte with the length, then the name.
    pub(super) fn name(&mut self) -> Result<&'a str, Unread> {
        let length = self.u8()?;
        let bytes = self.skip(usize::from(length))?;
        std::str::from_utf8(bytes).map_err(|_| StreamProblem::Name.into())
    }
}
