//! Room for what waits to leave, counted in bytes and not in batches: a run of zero pages takes next to none, so whoever
//! drafts gets through it while the link still carries what came before.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

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

impl Room {
    /// Waits until there is room for a parcel; one that is too large for any room gets in when it is empty.
    pub(super) fn enter(&self, bytes: u64) -> Result<(), LinkClosed> {
        let is_full = |taken: &mut Taken| {
            let too_much = taken.bytes + bytes > BYTES_MAX || taken.parcels >= PARCELS_MAX;
            !taken.is_closed && taken.parcels > 0 && too_much
        };
        let taken = self.changed.wait_while(self.lock(), is_full);
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner);
        if taken.is_closed {
            return Err(LinkClosed);
        }
        taken.bytes += bytes;
        taken.parcels += 1;
        Ok(())
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
    fn what_weighs_nothing_always_gets_in_up_to_a_number() {
        let room = Room::default();
        room.enter(BYTES_MAX).unwrap();
        (1..PARCELS_MAX).for_each(|_| room.enter(0).unwrap());
        assert_eq!(room.waiting_bytes(), BYTES_MAX);
        let room = Arc::new(room);
        let waiting = room.clone();
        let late = thread::spawn(move || waiting.enter(0));
        room.leave(0);
        late.join().unwrap().unwrap();
    }

    #[test]
    fn a_parcel_larger_than_the_room_waits_until_it_is_empty() {
        let room = Arc::new(Room::default());
        room.enter(1).unwrap();
        let waiting = room.clone();
        let large = thread::spawn(move || waiting.enter(2 * BYTES_MAX));
        room.leave(1);
        large.join().unwrap().unwrap();
        assert_eq!(room.waiting_bytes(), 2 * BYTES_MAX);
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
