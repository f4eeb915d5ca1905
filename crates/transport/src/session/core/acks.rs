//! When to acknowledge: at once after a pause, then every few milliseconds or every 64 KiB; and now and then though
//! there is nothing new, so that the peer knows that we are there.
//!
//! Only what leaves on the urgent connection counts. Bulk frames carry the same numbers, but may wait behind others.

use std::time::{Duration, Instant};

use super::path::ACK_DELAY;

/// So much is never left unacknowledged.
const ACK_EVERY_BYTES: usize = 64 * 1024;

/// A side that has nothing to say says so this often.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Acks {
    unacknowledged_bytes: usize,
    last_at: Instant,
    due_at: Option<Instant>,
}

impl Acks {
    pub(super) fn new(now: Instant) -> Self {
        Self { unacknowledged_bytes: 0, last_at: now, due_at: None }
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

    /// What was held back may be acknowledged now.
    pub(super) fn hurry(&mut self) {
        self.due_at = Some(self.last_at);
    }

    /// When an acknowledgement has to leave.
    pub(super) fn due_at(&self) -> Instant {
        let heartbeat_at = self.last_at + HEARTBEAT;
        self.due_at.map_or(heartbeat_at, |due_at| due_at.min(heartbeat_at))
    }

    /// A frame left on the urgent connection; it carries the newest acknowledgements.
    pub(super) fn sent(&mut self, now: Instant) {
        *self = Self::new(now);
    }
}
