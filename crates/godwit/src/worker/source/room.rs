//! Room for what waits to leave, counted in bytes and not in batches: a run of zero pages takes next to none, so whoever
//! drafts gets through it while the link still carries what came before.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use godwit_content::{BATCH_BLOCKS, BLOCK_BYTES};

use super::sender::LinkClosed;

/// Bytes, before compression, that may wait. What waits when the guest stops lengthens the pause.
const BYTES_MAX: u64 = 1 << 20;
/// However little they weigh, not more parcels wait.
pub(super) const PARCELS_MAX: usize = 256;

/// The room.
#[derive(Debug, Default)]
pub(super) struct Room {
    taken: Mutex<Taken>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: u64,
    parcels: usize,
    is_closed: bool,
}

impl Taken {
    fn has_room(&self, bytes: u64) -> bool {
        self.parcels == 0 || self.bytes + bytes <= BYTES_MAX && self.parcels < PARCELS_MAX
    }
}

impl Room {
    /// Waits until there is room for a parcel; one that is too large for any room gets in when it is empty.
    pub(super) fn enter(&self, bytes: u64) -> Result<(), LinkClosed> {
        let taken = self.changed.wait_while(self.lock(), |taken| !taken.is_closed && !taken.has_room(bytes));
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner);
        if taken.is_closed {
            return Err(LinkClosed);
        }
        taken.bytes += bytes;
        taken.parcels += 1;
        Ok(())
    }

    /// Whether an ordinary batch would have to wait.
    pub(super) fn is_full(&self) -> bool {
        !self.lock().has_room((BATCH_BLOCKS * BLOCK_BYTES) as u64)
    }

    /// A parcel has left.
    pub(super) fn leave(&self, bytes: u64) {
        let mut taken = self.lock();
        taken.bytes -= bytes;
        taken.parcels -= 1;
        self.changed.notify_all();
    }

    /// Nothing leaves any more; whoever waits is told.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// Bytes that wait.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn there_is_room_for_so_many_bytes_and_parcels_and_for_anything_alone() {
        let taken = |bytes, parcels| Taken { bytes, parcels, is_closed: false };
        assert!(taken(0, 0).has_room(2 * BYTES_MAX));
        assert!(!taken(1, 1).has_room(BYTES_MAX) && taken(1, 1).has_room(BYTES_MAX - 1));
        // What weighs nothing needs a place all the same.
        assert!(taken(BYTES_MAX, PARCELS_MAX - 1).has_room(0) && !taken(BYTES_MAX, PARCELS_MAX).has_room(0));
    }

    #[test]
    fn who_waits_gets_in_when_another_leaves() {
        let room = Arc::new(Room::default());
        room.enter(BYTES_MAX).unwrap();
        let waiting = room.clone();
        let late = thread::spawn(move || waiting.enter(1));
        room.leave(BYTES_MAX);
        late.join().unwrap().unwrap();
        assert_eq!(room.waiting_bytes(), 1);
    }

    #[test]
    fn who_waits_is_told_that_the_link_is_closed() {
        let room = Arc::new(Room::default());
        room.enter(BYTES_MAX).unwrap();
        let waiting = room.clone();
        let late = thread::spawn(move || waiting.enter(1));
        room.close();
        assert!(late.join().unwrap().is_err() && room.enter(0).is_err());
    }
}
