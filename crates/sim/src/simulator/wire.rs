//! The session between two workers: the transport's own cores, and connections that carry their frames late, at a
//! rate, each in its own order, and until they are cut.

use std::time::{Duration, Instant};

use bytes::Bytes;
use godwit_transport::session::{
    Message,
    core::{Core, Limits, Role, Transmit},
    frame::{Frame, Lane},
};

use super::{
    site::Site,
    world::{Event, World},
};

/// One urgent connection and two bulk ones, so that frames of a lane overtake each other.
const ROLES: [Role; 3] = [Role::Urgent, Role::Bulk { index: 0 }, Role::Bulk { index: 1 }];
/// A session that goes away on purpose has so long to say its last words.
const GOODBYE_US: u64 = 2_000_000;
/// So much may be under way, lest everything left in one go.
const WINDOW_BYTES: usize = 96 * 1024;

/// A session. It is *attached* while its connections are up; each time they are lost or made anew, a new generation
/// begins, and what is still on the way from an older one is lost.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) id: u64,
    generation: u64,
    attached: bool,
    began: Instant,
    ends: [End; 2],
}

/// The source's end is 0, the target's 1.
#[derive(Debug)]
struct End {
    site: Site,
    worker: u64,
    core: Core,
    is_up: bool,
    /// When the direction away from this end is free again.
    free_us: u64,
    pipes: [Pipe; ROLES.len()],
}

#[derive(Debug, Default)]
struct Pipe {
    last_arrival_us: u64,
    poll_us: Option<u64>,
}

/// Something on its way between two ends.
#[derive(Debug)]
pub(super) struct Delivery {
    wire: u64,
    generation: u64,
    end: usize,
    role: usize,
    frame: Option<Frame>,
}

impl Wire {
    pub(super) fn new(id: u64, source: (Site, u64), target: (Site, u64), began: Instant) -> Self {
        let limits = Limits { window_bytes: WINDOW_BYTES, ..Limits::default() };
        let ends = [source, target].map(|(site, worker)| End {
            site,
            worker,
            core: Core::new(limits.clone(), began),
            is_up: true,
            free_us: 0,
            pipes: Default::default(),
        });
        Self { id, generation: 0, attached: false, began, ends }
    }

    fn end_of(&self, worker: u64) -> Option<usize> {
        self.ends.iter().position(|end| end.worker == worker && end.is_up)
    }

    fn instant(&self, now_us: u64) -> Instant {
        self.began + Duration::from_micros(now_us)
    }
}

impl World {
    /// Whether a worker's session lasts.
    pub(super) fn has_session(&self, worker: u64) -> bool {
        self.wire.as_ref().is_some_and(|wire| wire.end_of(worker).is_some())
    }

    /// Whether more should be submitted.
    pub(super) fn is_writable(&self, worker: u64) -> bool {
        let Some(wire) = &self.wire else { return false };
        wire.end_of(worker).is_some_and(|end| wire.ends[end].core.is_writable(Lane::Bulk))
    }

    /// Bytes of a worker that the other end has acknowledged.
    pub(super) fn acked_bytes(&self, worker: u64) -> u64 {
        let Some(wire) = &self.wire else { return 0 };
        wire.end_of(worker).map_or(0, |end| wire.ends[end].core.stats().acked_bytes)
    }

    /// Sends over the session, if it lasts.
    pub(super) fn submit(&mut self, worker: u64, lane: Lane, kind: u8, body: Bytes) {
        let Some(wire) = &mut self.wire else { return };
        let Some(end) = wire.end_of(worker) else { return };
        wire.ends[end].core.submit(lane, kind, body).expect("messages are short and the session open");
        self.pump(end);
    }

    /// A worker is gone; `gently` if its session may still say its last words.
    pub(super) fn leave_wire(&mut self, worker: u64, gently: bool) {
        let Some(wire) = &mut self.wire else { return };
        let Some(end) = wire.end_of(worker) else { return };
        if !gently {
            wire.ends[end].is_up = false;
            self.detach();
            return;
        }
        wire.ends[end].core.close();
        let id = wire.id;
        self.after(GOODBYE_US, Event::Farewell { wire: id, worker });
        self.pump(end);
    }

    /// The connections are lost, and whatever was on them.
    pub(super) fn detach(&mut self) {
        let Some(wire) = &mut self.wire else { return };
        if !std::mem::take(&mut wire.attached) {
            return;
        }
        wire.generation += 1;
        let (id, generation) = (wire.id, wire.generation);
        wire.ends.iter_mut().for_each(|end| end.core.detach());
        self.note(None, || "the connections are lost".into());
        let patience_us = self.plan.reconnect_us;
        self.after(patience_us, Event::Reconnected { wire: id, generation, in_time: false });
        self.try_to_connect(id, generation);
    }

    /// Makes connections as soon as there is a link.
    pub(super) fn try_to_connect(&mut self, wire: u64, generation: u64) {
        let pause_us = 2 * self.plan.delay_us + self.random.u64(1_000..500_000);
        let at_us = self.now_us.max(self.link_up_us) + pause_us;
        self.at(at_us, Event::Reconnected { wire, generation, in_time: true });
    }

    /// The connections are up again, or nobody waits for them any more.
    pub(super) fn reconnected(&mut self, id: u64, generation: u64, in_time: bool) {
        let Some(wire) = self.wire.as_mut().filter(|wire| wire.id == id && wire.generation == generation)
        else {
            return;
        };
        let both_up = wire.ends.iter().all(|end| end.is_up);
        if !in_time {
            return self.lose_session();
        }
        if !both_up {
            return;
        }
        if self.link_up_us > self.now_us {
            return self.try_to_connect(id, generation);
        }
        wire.generation += 1;
        wire.attached = true;
        let now = wire.instant(self.now_us);
        let expected = wire.ends.each_ref().map(|end| end.core.next_expected());
        for (end, expects) in wire.ends.iter_mut().zip([expected[1], expected[0]]) {
            end.core.resume(expects, now).expect("a peer expects only what was sent");
            end.pipes = Default::default();
        }
        self.note(None, || "the connections are up".into());
        self.pump(0);
        self.pump(1);
    }

    fn lose_session(&mut self) {
        let Some(wire) = &mut self.wire else { return };
        let mut lost = Vec::new();
        for end in wire.ends.iter_mut().filter(|end| end.is_up) {
            end.is_up = false;
            lost.push((end.site, end.worker));
        }
        for (site, worker) in lost {
            self.session_is_over(site, worker);
        }
    }

    /// Lets frames leave an end for as long as its connections have room.
    fn pump(&mut self, end: usize) {
        (0..ROLES.len()).for_each(|role| self.pump_pipe(end, role));
    }

    fn pump_pipe(&mut self, end: usize, role: usize) {
        let (delay_us, rate) = (self.plan.delay_us, self.plan.bytes_per_second);
        let now_us = self.now_us;
        let Some(wire) = self.wire.as_mut().filter(|wire| wire.attached) else { return };
        let (id, generation, now) = (wire.id, wire.generation, wire.instant(now_us));
        let from = &mut wire.ends[end];
        let (frame, at_us) = if ROLES[role] != Role::Urgent && from.free_us > now_us {
            (None, from.free_us)
        } else {
            match from.core.poll_transmit(ROLES[role], now) {
                Transmit::Idle => return,
                Transmit::Wait(at) => (None, at.saturating_duration_since(wire.began).as_micros() as u64 + 1),
                Transmit::Frame(frame) => {
                    from.free_us = from.free_us.max(now_us) + frame.wire_bytes() as u64 * 1_000_000 / rate;
                    let jitter_us = self.random.u64(..=delay_us / 2);
                    let pipe = &mut from.pipes[role];
                    let arrival_us = (from.free_us + delay_us + jitter_us).max(pipe.last_arrival_us + 1);
                    pipe.last_arrival_us = arrival_us;
                    (Some(frame), arrival_us)
                }
            }
        };
        let sent = frame.is_some();
        if !sent {
            let pipe = &mut from.pipes[role];
            if pipe.poll_us.is_some_and(|poll_us| poll_us > now_us && poll_us <= at_us) {
                return;
            }
            pipe.poll_us = Some(at_us);
        }
        self.at(at_us, Event::Wire(Delivery { wire: id, generation, end, role, frame }));
        if sent {
            self.pump_pipe(end, role);
        }
    }

    /// A frame arrives, or a connection has room again.
    pub(super) fn deliver(&mut self, delivery: Delivery) {
        let Delivery { wire: id, generation, end, role, frame } = delivery;
        let now_us = self.now_us;
        let Some(wire) = self.wire.as_mut().filter(|wire| wire.id == id && wire.generation == generation)
        else {
            return;
        };
        let Some(frame) = frame else {
            wire.ends[end].pipes[role].poll_us = None;
            return self.pump_pipe(end, role);
        };
        let now = wire.instant(now_us);
        let to = &mut wire.ends[1 - end];
        let (site, worker) = (to.site, to.worker);
        to.core.receive(ROLES[role], frame, now).expect("a core sends what a core accepts");
        let mut messages: Vec<(Lane, Message)> = Vec::new();
        for lane in Lane::ALL {
            messages.extend(std::iter::from_fn(|| to.core.take(lane)).map(|message| (lane, message)));
        }
        let closed = to.core.is_peer_closed();
        self.pump(1 - end);
        for (_, message) in messages {
            self.receive(site, worker, message.kind, &message.payload);
        }
        if closed && self.has_session(worker) {
            self.farewell(id, worker);
            self.session_is_over(site, worker);
        } else {
            self.feed(site, worker);
        }
    }

    /// An end that has nothing more to say or to hear.
    pub(super) fn farewell(&mut self, id: u64, worker: u64) {
        let Some(wire) = self.wire.as_mut().filter(|wire| wire.id == id) else { return };
        if let Some(end) = wire.end_of(worker) {
            wire.ends[end].is_up = false;
            self.detach();
        }
    }
}
