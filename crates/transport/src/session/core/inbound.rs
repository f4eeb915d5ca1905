//! What one lane has received: frames that came early, a message in the making, and messages ready to be taken.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};

use super::{Violation, outbound::MAX_UNACKNOWLEDGED_FRAMES};
use crate::session::{
    Message,
    frame::{Content, Frame, HEADER_BYTES, Lane, MAX_PAYLOAD_BYTES},
};

/// How far ahead of the expected frame others may be: what a sender may have unacknowledged, and one more message.
const MAX_EARLY_FRAMES: u64 = 2 * MAX_UNACKNOWLEDGED_FRAMES as u64;
/// How much they may take, likewise.
pub(super) const MAX_EARLY_BYTES: usize = super::MAX_WINDOW_BYTES + 2 * MAX_PAYLOAD_BYTES;

#[derive(Debug)]
pub(super) struct Inbound {
    lane: Lane,
    next: u64,
    early: BTreeMap<u64, Frame>,
    early_bytes: usize,
    unfinished: Option<Message<BytesMut>>,
    ready: VecDeque<Message>,
    ready_bytes: usize,
    closed: bool,
}

impl Inbound {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            lane,
            next: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
            unfinished: None,
            ready: VecDeque::new(),
            ready_bytes: 0,
            closed: false,
        }
    }

    /// The sequence number that is expected next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Bytes of messages that nobody has taken; each counts a header too, so that empty ones are bounded.
    pub(super) fn ready_bytes(&self) -> usize {
        self.ready_bytes
    }

    pub(super) fn take(&mut self) -> Option<Message> {
        let message = self.ready.pop_front()?;
        self.ready_bytes -= HEADER_BYTES + message.payload.len();
        Some(message)
    }

    /// A frame arrived, perhaps early, perhaps again. Returns whether a message is ready or the lane closed.
    pub(super) fn accept(&mut self, frame: Frame) -> Result<bool, Violation> {
        let sequence = frame.header.sequence;
        if sequence < self.next {
            return Ok(false);
        }
        if sequence > self.next {
            return self.keep_early(frame).map(|()| false);
        }
        let mut progress = self.append(frame)?;
        while let Some(frame) = self.early.remove(&self.next) {
            self.early_bytes -= frame.wire_bytes();
            progress |= self.append(frame)?;
        }
        Ok(progress)
    }

    fn keep_early(&mut self, frame: Frame) -> Result<(), Violation> {
        let sequence = frame.header.sequence;
        let bytes = frame.wire_bytes();
        let beyond = sequence - self.next > MAX_EARLY_FRAMES || self.early_bytes + bytes > MAX_EARLY_BYTES;
        if beyond {
            return Err(Violation::TooEarly { lane: self.lane, sequence, expected: self.next });
        }
        if self.early.insert(sequence, frame).is_none() {
            self.early_bytes += bytes;
        }
        Ok(())
    }

    fn append(&mut self, frame: Frame) -> Result<bool, Violation> {
        if self.closed {
            return Err(Violation::AfterClose { lane: self.lane });
        }
        self.next += 1;
        let kind = frame.header.kind;
        match frame.header.content {
            Content::Message { more } => self.extend(kind, frame.payload, more),
            Content::Close => {
                self.closed = true;
                Ok(true)
            }
            Content::Acknowledgement => Ok(false),
        }
    }

    fn extend(&mut self, kind: u8, payload: Bytes, more: bool) -> Result<bool, Violation> {
        let message = match self.unfinished.take() {
            // The usual case: a message in one frame is handed on without a copy.
            None if !more => Message { kind, payload },
            begun => {
                let mut begun = begun.unwrap_or(Message { kind, payload: BytesMut::new() });
                if begun.kind != kind || begun.payload.len() + payload.len() > MAX_PAYLOAD_BYTES {
                    return Err(Violation::Message { lane: self.lane });
                }
                begun.payload.extend_from_slice(&payload);
                if more {
                    self.unfinished = Some(begun);
                    return Ok(false);
                }
                Message { kind, payload: begun.payload.freeze() }
            }
        };
        self.ready_bytes += HEADER_BYTES + message.payload.len();
        self.ready.push_back(message);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::frame::{Header, NextExpected};

    fn frame(sequence: u64, kind: u8, more: bool, payload: usize) -> Frame {
        let header = Header {
            lane: Lane::Bulk,
            kind,
            content: Content::Message { more },
            payload_bytes: payload as u32,
            sequence,
            received: NextExpected::default(),
        };
        Frame { header, payload: Bytes::from(vec![kind; payload]) }
    }

    #[test]
    fn what_comes_early_is_bounded() {
        let mut inbound = Inbound::new(Lane::Bulk);
        let far = inbound.accept(frame(MAX_EARLY_FRAMES + 1, 0, false, 0));
        assert!(matches!(far, Err(Violation::TooEarly { .. })));
        let mut kept = 0;
        while inbound.accept(frame(1 + kept, 0, false, MAX_PAYLOAD_BYTES)).is_ok() {
            kept += 1;
        }
        assert_eq!(kept as usize, MAX_EARLY_BYTES / (MAX_PAYLOAD_BYTES + HEADER_BYTES));
    }

    #[test]
    fn a_message_that_never_ends_is_refused() {
        let mut inbound = Inbound::new(Lane::Bulk);
        inbound.accept(frame(0, 7, true, MAX_PAYLOAD_BYTES)).unwrap();
        assert_eq!(inbound.accept(frame(1, 7, true, 1)), Err(Violation::Message { lane: Lane::Bulk }));
    }
}
