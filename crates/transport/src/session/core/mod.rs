//! The protocol of a session, without I/O and without a clock.
//!
//! ```text
//!   submit ──► Outbound (per lane) ──► poll_transmit ──►  connections  ──► receive ──► Inbound (per lane) ──► take
//!                 ▲     replay            limit, acks                                    reorder, join
//!                 └── acknowledge ◄─────────────────────────────────────────────────────────┘
//! ```
//!
//! A session lives through *attempts*, each a full set of connections:
//!
//! ```text
//!             resume(what the peer expects)             connections lost
//!   detached ───────────────────────────────► attached ─────────────────► detached
//!      │  submit and take go on, nothing moves    │  close(): the last frame of the urgent lane
//!      └──────────────── given up: the owner drops it ─────────────────────────┘
//! ```
//!
//! Losing connections leaves nothing behind but unacknowledged frames, which the next attempt sends again; what the
//! peer has acknowledged is never sent again, and what arrives twice is dropped.

mod acks;
mod bucket;
mod inbound;
mod outbound;
mod path;

use std::time::{Duration, Instant};

use bytes::Bytes;

use self::{acks::Acks, bucket::Bucket, inbound::Inbound, outbound::Outbound, path::Path};
use super::{
    Message,
    frame::{Content, Frame, HEADER_BYTES, Header, Lane, MAX_PAYLOAD_BYTES, NextExpected},
};

/// No more than this is ever unacknowledged on the bulk lane (and one message more).
pub const MAX_WINDOW_BYTES: usize = 16 << 20;
/// The same for the urgent lane.
pub const URGENT_WINDOW_BYTES: usize = 1 << 20;
/// A frame takes what the link delivers in this time, so that acknowledgements and stripes stay fine-grained.
const FRAME_DURATION: Duration = Duration::from_millis(2);
/// Frames are cut to multiples of what one TLS record seals.
const RECORD_BYTES: usize = 16 * 1024;
/// The largest such multiple.
const MAX_CUT_RECORDS: usize = 16;
/// What TLS adds to a record: header, content type, tag.
const RECORD_OVERHEAD_BYTES: usize = 22;
/// What may leave at once under a bandwidth limit, as time: longer than a timer is late.
const BANDWIDTH_BURST: Duration = Duration::from_millis(10);
/// The same under the session's own pace, which makes up for late timers by being faster than the link.
const PACE_BURST: Duration = Duration::from_millis(4);

/// What a session may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most unacknowledged bytes on the bulk lane; at most [`MAX_WINDOW_BYTES`]. The measured path usually asks for
    /// far less.
    pub window_bytes: usize,
    /// Acknowledgements are held back, and so the peer is, while so many bytes of a lane wait to be taken.
    pub receive_queue_bytes: usize,
    /// Frames and TLS records sent per second; `None`: what the link gives.
    pub bandwidth_bytes_per_second: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            window_bytes: MAX_WINDOW_BYTES,
            receive_queue_bytes: 4 << 20,
            bandwidth_bytes_per_second: None,
        }
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The urgent lane and acknowledgements.
    Urgent,
    /// A stripe of the bulk lane.
    Bulk {
        /// Which, from 0.
        index: u8,
    },
}

impl Role {
    /// The lane whose frames this connection carries.
    pub fn lane(self) -> Lane {
        match self {
            Role::Urgent => Lane::Urgent,
            Role::Bulk { .. } => Lane::Bulk,
        }
    }
}

/// What a connection that has room should do.
#[derive(Debug, PartialEq, Eq)]
pub enum Transmit {
    /// Send this.
    Frame(Frame),
    /// Nothing before this moment; ask again then, or when something was submitted or received.
    Wait(Instant),
    /// Nothing; ask again when something was submitted or received.
    Idle,
}

/// What a received frame changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Arrival {
    /// A message can be taken, or the peer has closed.
    pub ready: bool,
    /// Something was acknowledged: there may be room to submit.
    pub acknowledged: bool,
    /// The urgent connection has an acknowledgement to send, or to wait for.
    pub acknowledgement_due: bool,
}

/// Something that no correct peer does; the session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A header that can't be.
    #[error(transparent)]
    Frame(#[from] super::frame::FrameError),
    /// A frame on a connection of the other lane.
    #[error("{lane:?} frame on a connection of the other lane")]
    Lane {
        /// The frame's lane.
        lane: Lane,
    },
    /// A frame further ahead than any sender may be.
    #[error("{lane:?} frame {sequence} while {expected} is expected, beyond what may come early")]
    TooEarly {
        /// The lane.
        lane: Lane,
        /// The frame.
        sequence: u64,
        /// The expected one.
        expected: u64,
    },
    /// An acknowledgement of something that was never sent.
    #[error("the peer expects {lane:?} frame {next} of {sent} sent")]
    Acknowledgement {
        /// The lane.
        lane: Lane,
        /// What the peer claims to expect.
        next: u64,
        /// How many frames were sent.
        sent: u64,
    },
    /// The parts of a message don't belong together or exceed a message's limit.
    #[error("{lane:?} message of mixed kinds or more than {MAX_PAYLOAD_BYTES} bytes")]
    Message {
        /// The lane.
        lane: Lane,
    },
    /// More messages than the peer's window allows.
    #[error("more {lane:?} messages than may wait to be taken")]
    Overrun {
        /// The lane.
        lane: Lane,
    },
    /// A frame after the peer closed.
    #[error("{lane:?} frame after the peer closed")]
    AfterClose {
        /// The lane.
        lane: Lane,
    },
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The message is too long.
    #[error("a message of {bytes} bytes is longer than {MAX_PAYLOAD_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// This side has closed.
    #[error("the session was closed on this side")]
    Closed,
}

/// What a session has done and measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Payload bytes submitted.
    pub sent_bytes: u64,
    /// Bytes handed to TCP: frames, also repeated ones, and their TLS records; without handshakes, TCP and IP.
    pub wire_bytes: u64,
    /// Header and payload bytes that the peer has acknowledged.
    pub acked_bytes: u64,
    /// Header and payload bytes submitted and not acknowledged.
    pub in_flight_bytes: u64,
    /// Payload bytes of received frames.
    pub received_bytes: u64,
    /// How much may be in flight on the bulk lane at the moment.
    pub window_bytes: u64,
    /// What the path delivers, smoothed over half a second, from times in which the sender had enough to send.
    pub delivery_rate_bytes_per_second: Option<u64>,
    /// Round trip of a frame and its acknowledgement, own queues included.
    pub smoothed_rtt: Option<Duration>,
    /// The shortest of the last ten seconds or so.
    pub min_rtt: Option<Duration>,
    /// Per lane, the first frame that the peer has not acknowledged.
    pub acknowledged: NextExpected,
    /// When the peer was last heard; it says something at least once a second.
    pub heard_at: Option<Instant>,
    /// How often new connections took the place of lost ones.
    pub reconnections: u32,
    /// Header and payload bytes that were sent again on new connections.
    pub repeated_bytes: u64,
}

/// One side of a session; both sides are alike.
#[derive(Debug)]
pub struct Core {
    limits: Limits,
    outbound: [Outbound; 2],
    inbound: [Inbound; 2],
    path: Path,
    bandwidth: Bucket,
    pace: Bucket,
    acks: Acks,
    closing: bool,
    attached: bool,
    stats: Stats,
}

impl Core {
    /// A session that has moved nothing; it waits for [`Core::resume`].
    pub fn new(limits: Limits, now: Instant) -> Self {
        let limits = Limits { window_bytes: limits.window_bytes.min(MAX_WINDOW_BYTES), ..limits };
        let mut bandwidth = Bucket::new(BANDWIDTH_BURST);
        bandwidth.set(limits.bandwidth_bytes_per_second, now);
        Self {
            outbound: Lane::ALL.map(Outbound::new),
            inbound: Lane::ALL.map(|lane| Inbound::new(lane, limits.receive_queue_bytes)),
            path: Path::new(limits.window_bytes, now),
            bandwidth,
            pace: Bucket::new(PACE_BURST),
            acks: Acks::new(now),
            closing: false,
            attached: false,
            stats: Stats::default(),
            limits,
        }
    }

    /// How many bytes may be submitted before [`Core::is_writable`] turns false.
    pub fn capacity_bytes(&self, lane: Lane) -> usize {
        let outbound = &self.outbound[lane.index()];
        let window_bytes = match lane {
            Lane::Urgent => URGENT_WINDOW_BYTES,
            Lane::Bulk => self.path.window_bytes(),
        };
        if outbound.is_crowded() { 0 } else { window_bytes.saturating_sub(outbound.bytes()) }
    }

    /// Whether a message should be submitted now. The last one may exceed the window.
    pub fn is_writable(&self, lane: Lane) -> bool {
        self.capacity_bytes(lane) > 0
    }

    /// Takes a message to be sent.
    ///
    /// # Errors
    /// Where it is longer than [`MAX_PAYLOAD_BYTES`], or after [`Core::close`].
    pub fn submit(&mut self, lane: Lane, kind: u8, mut payload: Bytes) -> Result<(), SubmitError> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(SubmitError::TooLong { bytes: payload.len() });
        }
        if self.closing {
            return Err(SubmitError::Closed);
        }
        self.stats.sent_bytes += payload.len() as u64;
        let cut_bytes = self.cut_bytes();
        let outbound = &mut self.outbound[lane.index()];
        while payload.len() > cut_bytes {
            outbound.push(kind, Content::Message { more: true }, payload.split_to(cut_bytes));
        }
        outbound.push(kind, Content::Message { more: false }, payload);
        Ok(())
    }

    /// Sends nothing more after what was submitted; the peer is told.
    pub fn close(&mut self) {
        if !self.closing {
            self.closing = true;
            self.outbound[Lane::Urgent.index()].push(0, Content::Close, Bytes::new());
        }
    }

    /// The next frame for a connection that has room for one. A connection that is ready more often carries more.
    pub fn poll_transmit(&mut self, role: Role, now: Instant) -> Transmit {
        if !self.attached {
            return Transmit::Idle;
        }
        match role {
            Role::Urgent => self.poll_urgent(now),
            Role::Bulk { .. } => self.poll_bulk(now),
        }
    }

    /// Takes in a frame that arrived on a connection.
    ///
    /// # Errors
    /// Where no correct peer sends this; the session has to be given up.
    pub fn receive(&mut self, role: Role, frame: Frame, now: Instant) -> Result<Arrival, Violation> {
        self.stats.heard_at = Some(now);
        let header = frame.header;
        let acknowledged = self.acknowledge(header.received, now)?;
        if header.content == Content::Acknowledgement {
            return Ok(Arrival { acknowledged, ..Arrival::default() });
        }
        if header.lane != role.lane() {
            return Err(Violation::Lane { lane: header.lane });
        }
        self.stats.received_bytes += frame.payload.len() as u64;
        let urgent = header.lane == Lane::Urgent;
        let acknowledgement_due = self.acks.received(frame.wire_bytes(), urgent, now);
        let ready = self.inbound[header.lane.index()].accept(frame)?;
        Ok(Arrival { ready, acknowledged, acknowledgement_due })
    }

    /// The oldest message of a lane that nobody has taken.
    pub fn take(&mut self, lane: Lane) -> Option<Message> {
        let held_back = self.is_holding_back(lane);
        let message = self.inbound[lane.index()].take();
        if held_back && !self.is_holding_back(lane) {
            self.acks.hurry();
        }
        message
    }

    /// Whether acknowledgements are held back until messages of the lane are taken. When [`Core::take`] changes that,
    /// the urgent connection has an acknowledgement to send.
    pub fn is_holding_back(&self, lane: Lane) -> bool {
        self.inbound[lane.index()].is_holding_back()
    }

    /// What this side tells the peer when connections are made anew.
    pub fn next_expected(&self) -> NextExpected {
        let [urgent, bulk] = &self.inbound;
        NextExpected { urgent: urgent.next(), bulk: bulk.next() }
    }

    /// All connections are gone; until [`Core::resume`] nothing is transmitted.
    pub fn detach(&mut self) {
        self.attached = false;
    }

    /// New connections are up, and the peer expects `peer`: everything after that is sent again.
    ///
    /// # Errors
    /// Where the peer expects what was never sent.
    pub fn resume(&mut self, peer: NextExpected, now: Instant) -> Result<(), Violation> {
        for lane in Lane::ALL {
            let outbound = &mut self.outbound[lane.index()];
            self.stats.acked_bytes += outbound.acknowledge(peer.on(lane))?.bytes as u64;
            self.stats.repeated_bytes += outbound.rewind() as u64;
        }
        self.stats.reconnections += u32::from(self.stats.heard_at.is_some());
        self.stats.heard_at = Some(now);
        // Another path may have other properties.
        self.path = Path::new(self.limits.window_bytes, now);
        self.pace = Bucket::new(PACE_BURST);
        self.acks = Acks::new(now);
        self.attached = true;
        Ok(())
    }

    /// Limits what is sent from now on; `None` lifts the limit. The urgent lane is counted but never waits.
    pub fn set_bandwidth(&mut self, bytes_per_second: Option<u64>, now: Instant) {
        self.bandwidth.set(bytes_per_second, now);
    }

    /// Whether the peer has acknowledged everything.
    pub fn is_flushed(&self) -> bool {
        self.outbound.iter().all(Outbound::is_empty)
    }

    /// Whether the peer has said that it sends nothing more; messages may still wait to be taken.
    pub fn is_peer_closed(&self) -> bool {
        self.inbound[Lane::Urgent.index()].is_closed()
    }

    /// What was done and measured so far.
    pub fn stats(&self) -> Stats {
        let [urgent, bulk] = &self.outbound;
        Stats {
            in_flight_bytes: self.in_flight_bytes() as u64,
            window_bytes: self.path.window_bytes() as u64,
            delivery_rate_bytes_per_second: self.path.delivery_rate().map(|rate| rate as u64),
            smoothed_rtt: self.path.smoothed_rtt(),
            min_rtt: self.path.min_rtt(),
            acknowledged: NextExpected { urgent: urgent.acknowledged(), bulk: bulk.acknowledged() },
            ..self.stats
        }
    }

    fn poll_urgent(&mut self, now: Instant) -> Transmit {
        if let Some(frame) = self.transmit(Lane::Urgent, now) {
            return Transmit::Frame(frame);
        }
        let due_at = self.acks.due_at();
        if due_at > now { Transmit::Wait(due_at) } else { Transmit::Frame(self.acknowledgement(now)) }
    }

    fn poll_bulk(&mut self, now: Instant) -> Transmit {
        if !self.outbound[Lane::Bulk.index()].has_waiting() {
            if self.is_writable(Lane::Bulk) {
                self.path.sender_limited(self.in_flight_bytes());
            }
            return Transmit::Idle;
        }
        if let Some(ready_at) = self.bandwidth.ready_at(now).max(self.pace.ready_at(now)) {
            return Transmit::Wait(ready_at);
        }
        self.transmit(Lane::Bulk, now).map_or(Transmit::Idle, Transmit::Frame)
    }

    fn transmit(&mut self, lane: Lane, now: Instant) -> Option<Frame> {
        if !self.outbound[lane.index()].has_waiting() {
            return None;
        }
        let nothing_in_flight = self.outbound.iter().all(|outbound| !outbound.has_transmitted());
        let departure = self.path.sent(nothing_in_flight, now);
        let next = self.outbound[lane.index()].transmit(departure)?;
        Some(self.frame(lane, next.kind, next.content, next.sequence, next.payload, now))
    }

    fn acknowledgement(&mut self, now: Instant) -> Frame {
        self.frame(Lane::Urgent, 0, Content::Acknowledgement, 0, Bytes::new(), now)
    }

    /// Builds a frame that leaves now: it carries the newest acknowledgements and is paid for.
    fn frame(
        &mut self,
        lane: Lane,
        kind: u8,
        content: Content,
        sequence: u64,
        payload: Bytes,
        now: Instant,
    ) -> Frame {
        if lane == Lane::Urgent {
            self.acks.sent(now);
        }
        let frame_bytes = HEADER_BYTES + payload.len();
        let wire_bytes = frame_bytes + frame_bytes.div_ceil(RECORD_BYTES) * RECORD_OVERHEAD_BYTES;
        self.bandwidth.take(wire_bytes, now);
        self.pace.take(wire_bytes, now);
        self.stats.wire_bytes += wire_bytes as u64;
        let payload_bytes = payload.len() as u32;
        let [urgent, bulk] = &self.inbound;
        let received = NextExpected { urgent: urgent.acknowledged(), bulk: bulk.acknowledged() };
        Frame { header: Header { lane, kind, content, payload_bytes, sequence, received }, payload }
    }

    fn acknowledge(&mut self, received: NextExpected, now: Instant) -> Result<bool, Violation> {
        let mut progress = false;
        for lane in Lane::ALL {
            let acknowledged = self.outbound[lane.index()].acknowledge(received.on(lane))?;
            self.stats.acked_bytes += acknowledged.bytes as u64;
            progress |= acknowledged.bytes > 0;
            if let Some(newest) = acknowledged.newest {
                let in_flight_bytes = self.in_flight_bytes();
                self.path.acknowledged(acknowledged.bytes, newest, in_flight_bytes, now);
                self.pace.set(self.path.pace_bytes_per_second(), now);
            }
        }
        Ok(progress)
    }

    fn in_flight_bytes(&self) -> usize {
        self.outbound.iter().map(Outbound::bytes).sum()
    }

    /// The payload after which a message is cut.
    fn cut_bytes(&self) -> usize {
        let rate = self.path.delivery_rate().unwrap_or(0.0);
        let records = (rate * FRAME_DURATION.as_secs_f64()) as usize / RECORD_BYTES;
        records.clamp(1, MAX_CUT_RECORDS) * RECORD_BYTES - HEADER_BYTES
    }
}

#[cfg(test)]
mod tests;
