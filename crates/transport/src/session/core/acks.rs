//! When to acknowledge: at once after a pause, then every few milliseconds or every 64 KiB.

use std::time::Instant;

use super::path::ACK_DELAY;

/// So much is never left unacknowledged.
const ACK_EVERY_BYTES: usize = 64 * 1024;

#[derive(Debug, Default)]
pub(super) struct Acks {
    unacknowledged_bytes: usize,
    last_at: Option<Instant>,
    due_at: Option<Instant>,
}

impl Acks {
    /// Something arrived that the peer waits to hear of. Returns whether an acknowledgement is due sooner than before.
    pub(super) fn received(&mut self, bytes: usize, urgent: bool, now: Instant) -> bool {
        self.unacknowledged_bytes += bytes;
        let paced = self.last_at.map_or(now, |last_at| now.max(last_at + ACK_DELAY));
        let at_once = urgent || self.unacknowledged_bytes >= ACK_EVERY_BYTES;
        let due_at = if at_once { now } else { paced };
        let sooner = self.due_at.is_none_or(|earlier| due_at < earlier && earlier > now);
        if sooner {
            self.due_at = Some(due_at);
        }
        sooner
    }

    /// When an acknowledgement has to leave, if anything is to be acknowledged.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.due_at
    }

    /// A frame left that carries the newest acknowledgements.
    pub(super) fn sent(&mut self, now: Instant) {
        *self = Self { unacknowledged_bytes: 0, last_at: Some(now), due_at: None };
    }
}
