//! What one lane has yet to get across: frames waiting to be sent, and frames sent but not acknowledged.
//!
//! ```text
//!   first (oldest unacknowledged)      first + transmitted           first + frames.len()
//!     │  sent on this attempt            │  waiting                      │ next submitted
//! ```

use std::collections::VecDeque;

use bytes::Bytes;

use super::{Violation, path::Departure};
use crate::session::frame::{Content, HEADER_BYTES, Lane};

/// More frames than this are never unacknowledged at once; a receiver's bound on what may arrive early.
pub(super) const MAX_UNACKNOWLEDGED_FRAMES: usize = 16 * 1024;

#[derive(Debug)]
pub(super) struct Outbound {
    lane: Lane,
    frames: VecDeque<Outgoing>,
    /// Sequence number of `frames[0]`.
    first: u64,
    /// How many of `frames` were sent since the last resume.
    transmitted: usize,
    /// One more than the highest sequence number ever sent.
    ever_transmitted: u64,
    /// Header and payload bytes of `frames`.
    bytes: usize,
}

#[derive(Debug)]
struct Outgoing {
    kind: u8,
    content: Content,
    payload: Bytes,
    departure: Option<Departure>,
}

/// A frame to be sent.
pub(super) struct Next {
    pub(super) sequence: u64,
    pub(super) kind: u8,
    pub(super) content: Content,
    pub(super) payload: Bytes,
}

/// What an acknowledgement was for.
#[derive(Debug, Default)]
pub(super) struct Acknowledged {
    pub(super) bytes: usize,
    pub(super) newest: Option<Departure>,
}

impl Outbound {
    pub(super) fn new(lane: Lane) -> Self {
        Self { lane, frames: VecDeque::new(), first: 0, transmitted: 0, ever_transmitted: 0, bytes: 0 }
    }

    /// Header and payload bytes that are not acknowledged.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn is_crowded(&self) -> bool {
        self.frames.len() >= MAX_UNACKNOWLEDGED_FRAMES
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.transmitted < self.frames.len()
    }

    pub(super) fn has_transmitted(&self) -> bool {
        self.transmitted > 0
    }

    /// One more than the highest acknowledged sequence number.
    pub(super) fn acknowledged(&self) -> u64 {
        self.first
    }

    pub(super) fn push(&mut self, kind: u8, content: Content, payload: Bytes) {
        self.bytes += HEADER_BYTES + payload.len();
        self.frames.push_back(Outgoing { kind, content, payload, departure: None });
    }

    /// Takes the next waiting frame; `departure` is remembered with it.
    pub(super) fn transmit(&mut self, departure: Departure) -> Option<Next> {
        let frame = self.frames.get_mut(self.transmitted)?;
        frame.departure = Some(departure);
        let sequence = self.first + self.transmitted as u64;
        self.transmitted += 1;
        self.ever_transmitted = self.ever_transmitted.max(sequence + 1);
        Some(Next { sequence, kind: frame.kind, content: frame.content, payload: frame.payload.clone() })
    }

    /// The peer expects `next`: everything below is forgotten.
    pub(super) fn acknowledge(&mut self, next: u64) -> Result<Acknowledged, Violation> {
        if next > self.ever_transmitted {
            return Err(Violation::Acknowledgement { lane: self.lane, next, sent: self.ever_transmitted });
        }
        let mut acknowledged = Acknowledged::default();
        while self.first < next {
            // Holds because `first + frames.len()` is at least `ever_transmitted`.
            let Some(frame) = self.frames.pop_front() else { break };
            self.first += 1;
            self.transmitted = self.transmitted.saturating_sub(1);
            acknowledged.bytes += HEADER_BYTES + frame.payload.len();
            acknowledged.newest = latest(acknowledged.newest, frame.departure);
        }
        self.bytes -= acknowledged.bytes;
        Ok(acknowledged)
    }

    /// New connections: what isn't acknowledged will be sent again. Returns how many bytes that are.
    pub(super) fn rewind(&mut self) -> usize {
        let again =
            self.frames.iter().take(self.transmitted).map(|frame| HEADER_BYTES + frame.payload.len()).sum();
        self.transmitted = 0;
        for frame in &mut self.frames {
            frame.departure = None;
        }
        again
    }
}

fn latest(one: Option<Departure>, other: Option<Departure>) -> Option<Departure> {
    match (one, other) {
        (Some(one), Some(other)) => Some(if other.is_later_than(&one) { other } else { one }),
        (one, other) => one.or(other),
    }
}
