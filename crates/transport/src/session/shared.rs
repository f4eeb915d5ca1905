//! What the tasks of a session share: the core behind a lock, and who waits for what.
//!
//! Every wait follows one pattern: register for the notification, look under the lock, then await. A notification
//! between looking and awaiting is so never missed.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    Message, SessionError,
    core::{Core, Limits, Role, Transmit, Violation},
    frame::{Frame, Lane, NextExpected},
};
use crate::identity::HostName;

#[derive(Debug)]
pub(super) struct Shared {
    peer: HostName,
    silence: Duration,
    state: Mutex<State>,
    /// Per lane: a frame may be waiting for a connection.
    submitted: [Notify; 2],
    /// Per lane: a message may be waiting to be taken.
    arrived: [Notify; 2],
    /// Something was acknowledged.
    acknowledged: Notify,
    ended: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) core: Core,
    pub(super) end: Option<SessionError>,
}

impl Shared {
    pub(super) fn new(peer: HostName, limits: Limits, silence: Duration) -> Arc<Self> {
        Arc::new(Self {
            peer,
            silence,
            state: Mutex::new(State { core: Core::new(limits, Instant::now()), end: None }),
            submitted: Default::default(),
            arrived: Default::default(),
            acknowledged: Notify::new(),
            ended: Notify::new(),
        })
    }

    pub(super) fn peer(&self) -> &HostName {
        &self.peer
    }

    /// How long nothing may be heard on the urgent connection.
    pub(super) fn silence(&self) -> Duration {
        self.silence
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug that was reported already; the state is still the session's only one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn send(&self, lane: Lane, kind: u8, payload: Bytes) -> Result<(), SessionError> {
        loop {
            let acknowledged = self.acknowledged.notified();
            {
                let mut state = self.lock();
                state.check()?;
                if state.core.is_writable(lane) {
                    state.core.submit(lane, kind, payload).map_err(SessionError::Message)?;
                    drop(state);
                    self.submitted[lane.index()].notify_waiters();
                    return Ok(());
                }
            }
            acknowledged.await;
        }
    }

    pub(super) async fn writable(&self, lane: Lane) -> Result<(), SessionError> {
        self.acknowledged_until(|core| core.is_writable(lane).then_some(())).await
    }

    pub(super) async fn flush(&self) -> Result<(), SessionError> {
        self.acknowledged_until(|core| core.is_flushed().then_some(())).await
    }

    pub(super) async fn close(&self) -> Result<(), SessionError> {
        let closed = async {
            self.acknowledged_until(|core| core.is_flushed().then(|| core.close())).await?;
            self.submitted[Lane::Urgent.index()].notify_waiters();
            self.flush().await
        };
        match closed.await {
            Ok(()) | Err(SessionError::Closed) => {
                self.end(SessionError::Closed);
                Ok(())
            }
            failed => failed,
        }
    }

    pub(super) async fn recv(&self, lane: Lane) -> Result<Option<Message>, SessionError> {
        loop {
            let arrived = self.arrived[lane.index()].notified();
            {
                let mut state = self.lock();
                let held_back = state.core.is_holding_back(lane);
                if let Some(message) = state.core.take(lane) {
                    if held_back && !state.core.is_holding_back(lane) {
                        self.submitted[Lane::Urgent.index()].notify_waiters();
                    }
                    return Ok(Some(message));
                }
                match &state.end {
                    _ if state.core.is_peer_closed() => return Ok(None),
                    Some(SessionError::Closed) => return Ok(None),
                    Some(error) => return Err(error.clone()),
                    None => {}
                }
            }
            arrived.await;
        }
    }

    pub(super) fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.lock().core.set_bandwidth(bytes_per_second, Instant::now());
        self.submitted[Lane::Bulk.index()].notify_waiters();
    }

    /// Ends the session for everyone; the first reason stays.
    pub(super) fn end(&self, reason: SessionError) {
        self.lock().end.get_or_insert(reason);
        for notify in self.submitted.iter().chain(&self.arrived) {
            notify.notify_waiters();
        }
        for notify in [&self.acknowledged, &self.ended] {
            notify.notify_waiters();
        }
    }

    /// Waits until [`Shared::end`].
    pub(super) async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.lock().end.is_some() {
                return;
            }
            ended.await;
        }
    }

    pub(super) fn resume(&self, peer: NextExpected) -> Result<(), Violation> {
        self.lock().core.resume(peer, Instant::now())?;
        self.acknowledged.notify_waiters();
        Ok(())
    }

    /// What a connection should send, and a wait for when that changes, registered before the question was asked.
    pub(super) fn poll_transmit(&self, role: Role) -> (Transmit, impl Future<Output = ()>) {
        let submitted = self.submitted[role.lane().index()].notified();
        (self.lock().core.poll_transmit(role, Instant::now()), submitted)
    }

    /// Takes in what arrived on a connection.
    pub(super) fn receive(&self, role: Role, frames: &mut Vec<Frame>) -> Result<(), Violation> {
        let now = Instant::now();
        let (mut ready, mut acknowledged, mut acknowledgement_due) = (false, false, false);
        {
            let mut state = self.lock();
            for frame in frames.drain(..) {
                let arrival = state.core.receive(role, frame, now)?;
                ready |= arrival.ready;
                acknowledged |= arrival.acknowledged;
                acknowledgement_due |= arrival.acknowledgement_due;
            }
        }
        if ready {
            self.announce_arrival(role.lane());
        }
        if acknowledged {
            self.acknowledged.notify_waiters();
        }
        if acknowledgement_due {
            self.submitted[Lane::Urgent.index()].notify_waiters();
        }
        Ok(())
    }

    fn announce_arrival(&self, lane: Lane) {
        self.arrived[lane.index()].notify_waiters();
        // The close travels on the urgent lane and ends both.
        if self.lock().core.is_peer_closed() {
            self.arrived[Lane::Bulk.index()].notify_waiters();
        }
    }

    async fn acknowledged_until(
        &self,
        mut done: impl FnMut(&mut Core) -> Option<()>,
    ) -> Result<(), SessionError> {
        loop {
            let acknowledged = self.acknowledged.notified();
            {
                let mut state = self.lock();
                if done(&mut state.core).is_some() {
                    return Ok(());
                }
                state.check()?;
            }
            acknowledged.await;
        }
    }
}

impl State {
    fn check(&self) -> Result<(), SessionError> {
        match &self.end {
            Some(reason) => Err(reason.clone()),
            None if self.core.is_peer_closed() => Err(SessionError::Closed),
            None => Ok(()),
        }
    }
}
