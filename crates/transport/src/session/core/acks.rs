//! When to acknowledge: at once after a pause, then every few milliseconds or every 64 KiB; and now and then though
//! there is nothing new, so that the peer knows that we are there.

use std::time::{Duration, Instant};

use super::{super::frame::Lane, path::ACK_DELAY};

/// So much is never left unacknowledged.
const ACK_EVERY_BYTES: usize = 64 * 1024;

/// A side that has nothing to say says so this often.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Acks {
    unacknowledged_bytes: usize,
    last_at: Instant,
    /// When the urgent connection was last used: it is the one whose silence ends a session, whatever the others carry.
    urgent_at: Instant,
    due_at: Option<Instant>,
}

impl Acks {
    pub(super) fn new(now: Instant) -> Self {
        Self { unacknowledged_bytes: 0, last_at: now, urgent_at: now, due_at: None }
    }

    /// Something arrived that the peer waits to hear of. Returns whether an acknowledgement is due sooner than before.
    pub(super) fn received(&mut self, bytes: usize, urgent: bool, now: Instant) -> bool {
        self.unacknowledged_bytes += bytes;
        let paced = now.max(self.last_at + ACK_DELAY);
        let at_once = urgent || self.unacknowledged_bytes >= ACK_EVERY_BYTES;
        let due_at = if at_once { now } else { paced };
        let sooner = self.due_at.is_none_or(|earlier| due_at < earlier && earlier > now);
        if sooner {
            self.due_at = Some(due_at);
        }
        sooner
    }

    /// When an acknowledgement has to leave.
    pub(super) fn due_at(&self) -> Instant {
        self.due_at.map_or(self.urgent_at + HEARTBEAT, |due_at| due_at.min(self.urgent_at + HEARTBEAT))
    }

    /// A frame left on a connection of `lane`; it carries the newest acknowledgements.
    pub(super) fn sent(&mut self, lane: Lane, now: Instant) {
        let urgent_at = if lane == Lane::Urgent { now } else { self.urgent_at };
        *self = Self { urgent_at, ..Self::new(now) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_traffic_does_not_stand_in_for_the_urgent_heartbeat() {
        let began = Instant::now();
        let mut acks = Acks::new(began);
        for ms in 1..2_000 {
            acks.sent(Lane::Bulk, began + Duration::from_millis(ms));
        }
        assert_eq!(acks.due_at(), began + HEARTBEAT);
        acks.sent(Lane::Urgent, began + HEARTBEAT);
        assert_eq!(acks.due_at(), began + HEARTBEAT * 2);
    }
}
