//! Keeps a session alive: carries frames over one set of connections, and makes the next set when it breaks.
//!
//! ```text
//!                    ┌───────────── new connections (resume) ──────────────┐
//!                    ▼                                                     │
//!   start ──► carrying ──── a connection fails, or the peer dials ──► reconnecting ── in vain ──► ended: LinkLost
//!                    ├──── the peer breaks the protocol ──► ended: Violation
//!                    └──── close() on either side ────────► ended: Closed
//! ```
//!
//! Ending wakes everyone who waits for the session and closes its sockets; nothing else is left behind.

use std::sync::Arc;

use super::{
    SessionError,
    carry::{Fault, carriers, first_fault},
    link::{Connections, Dialer, Door, LinkError, Offer},
    shared::Shared,
};

/// Who makes new connections.
#[derive(Debug)]
pub(super) enum Side {
    Source(Dialer),
    Target(Door),
}

/// Why a set of connections is not carried any further.
enum Stop {
    Ended,
    Fault(Fault),
    /// The source has noticed a loss that we haven't, and dials anew.
    Superseded(Box<Offer>),
}

/// Runs a session until it ends.
pub(super) async fn drive(shared: Arc<Shared>, mut side: Side, mut connections: Connections) {
    let _ending = EndOnDrop(shared.clone());
    let reason = loop {
        if let Err(violation) = shared.resume(connections.peer_expects) {
            break SessionError::Violation { peer: shared.peer().clone(), violation };
        }
        let stop = carry_until_stopped(&shared, &mut side, connections).await;
        shared.lock().core.detach();
        if let Some(reason) = over(&shared, &stop) {
            break reason;
        }
        connections = match reconnect(&shared, &mut side, stop).await {
            Ok(connections) => connections,
            Err(reason) => break reason,
        };
    };
    tracing::debug!(peer = %shared.peer(), %reason, "session ended");
    shared.end(reason);
}

/// Wakes whoever waits for the session when its runtime goes away.
struct EndOnDrop(Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(SessionError::Closed);
    }
}

async fn carry_until_stopped(shared: &Arc<Shared>, side: &mut Side, connections: Connections) -> Stop {
    let mut carriers = carriers(shared, connections);
    let stop = tokio::select! {
        fault = first_fault(&mut carriers) => Stop::Fault(fault),
        () = shared.ended() => Stop::Ended,
        offer = newer_offer(side) => Stop::Superseded(Box::new(offer)),
    };
    // No old connection may take a frame, or deliver one, once the next set is negotiated.
    carriers.shutdown().await;
    stop
}

async fn newer_offer(side: &mut Side) -> Offer {
    match side {
        Side::Source(_) => std::future::pending().await,
        Side::Target(door) => door.newer_offer().await,
    }
}

/// The reason to end the session, unless it should be resumed.
fn over(shared: &Shared, stop: &Stop) -> Option<SessionError> {
    let closed = shared.lock().core.is_peer_closed();
    match stop {
        Stop::Ended => Some(SessionError::Closed),
        Stop::Fault(Fault::Violation(violation)) => {
            Some(SessionError::Violation { peer: shared.peer().clone(), violation: *violation })
        }
        Stop::Fault(_) if closed => Some(SessionError::Closed),
        Stop::Fault(_) | Stop::Superseded(_) => None,
    }
}

async fn reconnect(shared: &Shared, side: &mut Side, stop: Stop) -> Result<Connections, SessionError> {
    let cause = match (&stop, &mut *side) {
        (Stop::Fault(Fault::Link(cause)), _) => cause.clone(),
        _ => LinkError::Stopped,
    };
    tracing::info!(peer = %shared.peer(), %cause, "connections lost");
    match (side, stop) {
        (Side::Source(dialer), _) => dialer.redial(shared, cause).await,
        (Side::Target(door), Stop::Superseded(offer)) => door.gather(shared, Some(*offer)).await,
        (Side::Target(door), _) => door.regather(shared, cause).await,
    }
}
