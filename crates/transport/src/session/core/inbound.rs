//! What one lane has received: frames that came early, a message in the making, and messages ready to be taken.
//!
//! A connection is always read, because acknowledgements for the other direction come the same way. What bounds the
//! messages that nobody takes is the sender's window: while there are many, further frames are not acknowledged.

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
const MAX_EARLY_BYTES: usize = super::MAX_WINDOW_BYTES + 2 * MAX_PAYLOAD_BYTES;

#[derive(Debug)]
pub(super) struct Inbound {
    lane: Lane,
    next: u64,
    /// What the peer is told; stays behind `next` while much waits to be taken.
    acknowledged: u64,
    /// So much may wait to be taken.
    queue_bytes: usize,
    early: BTreeMap<u64, Frame>,
    early_bytes: usize,
    unfinished: Option<Message<BytesMut>>,
    ready: VecDeque<Message>,
    ready_bytes: usize,
    closed: bool,
}

impl Inbound {
    pub(super) fn new(lane: Lane, queue_bytes: usize) -> Self {
        Self {
            lane,
            next: 0,
            acknowledged: 0,
            queue_bytes,
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

    /// The sequence number below which everything is acknowledged.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether frames are not acknowledged because too much waits to be taken.
    pub(super) fn is_holding_back(&self) -> bool {
        self.acknowledged < self.next
    }

    pub(super) fn take(&mut self) -> Option<Message> {
        let message = self.ready.pop_front()?;
        self.ready_bytes -= HEADER_BYTES + message.payload.len();
        self.acknowledge();
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
        self.acknowledge();
        Ok(progress)
    }

    fn acknowledge(&mut self) {
        if self.ready_bytes < self.queue_bytes {
            self.acknowledged = self.next;
        }
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
        // Each counts a header too, so that empty messages are bounded as well.
        self.ready_bytes += HEADER_BYTES + message.payload.len();
        if self.ready_bytes > self.queue_bytes + MAX_EARLY_BYTES {
            return Err(Violation::Overrun { lane: self.lane });
        }
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
        let mut inbound = Inbound::new(Lane::Bulk, 0);
        let far = inbound.accept(frame(MAX_EARLY_FRAMES + 1, 0, false, 0));
        assert!(matches!(far, Err(Violation::TooEarly { .. })));
        let mut kept = 0;
        while inbound.accept(frame(1 + kept, 0, false, MAX_PAYLOAD_BYTES)).is_ok() {
            kept += 1;
        }
        assert_eq!(kept as usize, MAX_EARLY_BYTES / (MAX_PAYLOAD_BYTES + HEADER_BYTES));
    }

    #[test]
    fn what_nobody_takes_is_bounded() {
        let mut inbound = Inbound::new(Lane::Bulk, 100);
        inbound.accept(frame(0, 0, false, 60)).unwrap();
        assert!(!inbound.is_holding_back());
        inbound.accept(frame(1, 0, false, 60)).unwrap();
        assert_eq!((inbound.next(), inbound.acknowledged()), (2, 1));
        inbound.take().unwrap();
        assert_eq!(inbound.acknowledged(), 2);
        let mut sequence = 2;
        while inbound.accept(frame(sequence, 0, false, MAX_PAYLOAD_BYTES)).is_ok() {
            sequence += 1;
        }
        assert_eq!((sequence as usize - 2) * MAX_PAYLOAD_BYTES, MAX_EARLY_BYTES - MAX_PAYLOAD_BYTES);
    }

    #[test]
    fn a_message_that_never_ends_is_refused() {
        let mut inbound = Inbound::new(Lane::Bulk, 0);
        inbound.accept(frame(0, 7, true, MAX_PAYLOAD_BYTES)).unwrap();
        assert_eq!(inbound.accept(frame(1, 7, true, 1)), Err(Violation::Message { lane: Lane::Bulk }));
    }
}
