//! The rewritten stream: what is passed on when some of the page records are taken out.

use super::StreamSink;

/// The record is of the same block as the one before it and leaves out the name.
pub(super) const CONTINUE: u64 = 0x20;

const PART_HEADER_BYTES: usize = 5;

/// Knows what the destination's QEMU has seen, which differs from what the source's wrote.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// Block of the last record that was passed; survives the end of a section, as it does in QEMU.
    block: Option<usize>,
    /// Header of a PART section of which nothing has been passed yet.
    held_header: Option<[u8; PART_HEADER_BYTES]>,
}

impl Output {
    /// A PART section begins; its header waits for the first kept record.
    pub(super) fn begin_part(&mut self, header: &[u8]) {
        self.held_header = header.first_chunk().copied();
    }

    /// Bytes of a section that belong to no page: dropped with the section if nothing in it is kept.
    pub(super) fn frame(&mut self, bytes: &[u8], sink: &mut impl StreamSink) {
        if self.held_header.is_none() {
            sink.pass(bytes);
        }
    }

    /// The section is over; nothing is held back any more.
    pub(super) fn end_section(&mut self) {
        self.held_header = None;
    }

    /// Passes the record of a page of block number `block`, called `name`.
    pub(super) fn page(&mut self, record: &[u8], block: usize, name: &str, sink: &mut impl StreamSink) {
        if let Some(header) = self.held_header.take() {
            sink.pass(&header);
        }
        match record.split_first_chunk() {
            Some((address, content)) if self.must_name(*address, block) => {
                let named = u64::from_be_bytes(*address) & !CONTINUE;
                sink.pass(&named.to_be_bytes());
                sink.pass(&[name.len() as u8]);
                sink.pass(name.as_bytes());
                sink.pass(content);
            }
            _ => sink.pass(record),
        }
        self.block = Some(block);
    }

    fn must_name(&self, address: [u8; 8], block: usize) -> bool {
        u64::from_be_bytes(address) & CONTINUE != 0 && self.block != Some(block)
    }
}
