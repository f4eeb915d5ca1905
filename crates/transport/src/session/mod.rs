//! Two lanes of messages between two hosts, over one urgent and one to eight bulk TCP connections.
//!
//! The source dials ([`Session::connect`]); the target takes its raw TCP connections from whoever listens
//! ([`Session::accept`]). From then on both sides are alike. Messages of a lane arrive in the order in which they were
//! sent, each exactly once, also when the connections break and are made anew within [`Timeouts::reconnect`].
//!
//! [`core`] is the protocol; the rest is its shell: `link` makes connections, `driver` keeps a set of them alive,
//! `carry` moves frames between one set and the core.

mod carry;
pub mod core;
mod driver;
pub mod frame;
pub mod hello;
mod link;
mod shared;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{net::TcpStream, runtime, sync::mpsc, task::AbortHandle};

pub use self::{
    core::{Limits, Stats, SubmitError, Violation},
    frame::Lane,
    hello::{Refusal, Versions},
    link::LinkError,
};
use self::{driver::Side, shared::Shared};
use crate::{
    identity::{HostIdentity, HostName},
    route::{Route, RouteError},
    tls::ConfigError,
};

/// A message: what the application calls it, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message<P = Bytes> {
    /// The application's name for it; not interpreted here.
    pub kind: u8,
    /// At most [`frame::MAX_PAYLOAD_BYTES`].
    pub payload: P,
}

/// How long a session waits for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// For all connections of a session to be up, handshakes included.
    pub connect: Duration,
    /// For a lost session to be up again. Zero: a lost connection ends the session.
    pub reconnect: Duration,
    /// For a peer from which nothing is heard; it says something every second, however slow its application is.
    pub silence: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), reconnect: Duration::ZERO, silence: Duration::from_secs(10) }
    }
}

/// Whom to connect to, and how.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    /// Where the peer listens.
    pub address: SocketAddr,
    /// What the listener should make of the connections.
    pub route: Route,
    /// The host that the peer's certificate must name.
    pub peer: HostName,
    /// Who we are.
    pub identity: Arc<HostIdentity>,
    /// Bulk connections, 1 to 8; other values are taken as the nearest of these.
    pub bulk_connections: u8,
    /// What the session may use.
    pub limits: Limits,
    /// How long it waits.
    pub timeouts: Timeouts,
}

/// Whom to accept, and how.
#[derive(Debug, Clone)]
pub struct AcceptConfig {
    /// The host that the peer's certificate must name.
    pub peer: HostName,
    /// Who we are.
    pub identity: Arc<HostIdentity>,
    /// What the session may use.
    pub limits: Limits,
    /// How long it waits.
    pub timeouts: Timeouts,
}

/// Why a session did not come about or ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SessionError {
    /// The host's identity can't be used.
    #[error("cannot prepare tls")]
    Config(#[source] Arc<ConfigError>),
    /// The route isn't one.
    #[error("cannot route the session")]
    Route(#[source] Arc<RouteError>),
    /// A connection could not be made or broke, and was not replaced in time.
    #[error("the link to {peer} was lost")]
    LinkLost {
        /// The other host.
        peer: HostName,
        /// What broke.
        #[source]
        cause: LinkError,
    },
    /// The peer doesn't want this session.
    #[error("{peer} refused: {refusal} (it speaks versions {theirs}, this host {ours})")]
    PeerRefused {
        /// The other host.
        peer: HostName,
        /// Its reason.
        refusal: Refusal,
        /// The versions that it speaks.
        theirs: Versions,
        /// The versions that we speak.
        ours: Versions,
    },
    /// The peer sent what no correct peer sends.
    #[error("{peer} broke the protocol")]
    Violation {
        /// The other host.
        peer: HostName,
        /// What it sent.
        #[source]
        violation: Violation,
    },
    /// The message can't be sent.
    #[error(transparent)]
    Message(SubmitError),
    /// The session was closed, by this side or the other.
    #[error("the session is closed")]
    Closed,
}

/// A session with a peer. Clones are the same session, to be used from any task or thread; it ends with the last one.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use godwit_transport::{identity::HostIdentity, route::Route, session::*};
/// # async fn example(identity: Arc<HostIdentity>) -> Result<(), Box<dyn std::error::Error>> {
/// let session = Session::connect(ConnectConfig {
///     address: "192.0.2.7:7700".parse()?,
///     route: Route::Migration("web1-3".to_owned()),
///     peer: "hostb".parse()?,
///     identity,
///     bulk_connections: 2,
///     limits: Limits::default(),
///     timeouts: Timeouts::default(),
/// })
/// .await?;
/// session.send(Lane::Urgent, 1, "hello".into()).await?;
/// while let Some(message) = session.recv(Lane::Bulk).await? {
///     println!("{} bytes of kind {}", message.payload.len(), message.kind);
/// }
/// session.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Session(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    driver: AbortHandle,
    runtime: runtime::Handle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    /// Dials all connections of a new session.
    ///
    /// # Errors
    /// Where the peer can't be reached, isn't who it should be, or refuses.
    pub async fn connect(config: ConnectConfig) -> Result<Self, SessionError> {
        let shared = Shared::new(config.peer.clone(), config.limits.clone(), config.timeouts.silence);
        let mut dialer = link::Dialer::new(config)?;
        let connections = dialer.dial(&shared).await?;
        Ok(Self::start(shared, Side::Source(dialer), connections))
    }

    /// Waits for all connections of a session among the TCP connections in `streams`, of which no byte has been read.
    ///
    /// Connections of other hosts are refused and logged. `streams` is kept: later connections replace lost ones.
    ///
    /// # Errors
    /// Where they don't come in time.
    pub async fn accept(
        config: AcceptConfig,
        streams: mpsc::Receiver<TcpStream>,
    ) -> Result<Self, SessionError> {
        let shared = Shared::new(config.peer.clone(), config.limits.clone(), config.timeouts.silence);
        let mut door = link::Door::new(config, streams)?;
        let connections = door.gather(&shared, None).await?;
        Ok(Self::start(shared, Side::Target(door), connections))
    }

    fn start(shared: Arc<Shared>, side: Side, connections: link::Connections) -> Self {
        let driver = tokio::spawn(driver::drive(shared.clone(), side, connections)).abort_handle();
        Self(Arc::new(Handle { shared, driver, runtime: runtime::Handle::current() }))
    }

    /// Sends a message; waits while as much is in flight as the path takes. When it returns, the message is on its
    /// way or in a bounded queue, and will be sent again if its connection breaks.
    ///
    /// # Errors
    /// Where the session has ended, or the message is too long.
    pub async fn send(&self, lane: Lane, kind: u8, payload: Bytes) -> Result<(), SessionError> {
        self.0.shared.send(lane, kind, payload).await
    }

    /// [`Session::send`] for a thread that isn't the runtime's.
    ///
    /// # Errors
    /// As [`Session::send`].
    ///
    /// # Panics
    /// In an asynchronous task.
    pub fn blocking_send(&self, lane: Lane, kind: u8, payload: Bytes) -> Result<(), SessionError> {
        self.0.runtime.block_on(self.send(lane, kind, payload))
    }

    /// Waits until a message could be sent without waiting.
    ///
    /// # Errors
    /// Where the session has ended.
    pub async fn writable(&self, lane: Lane) -> Result<(), SessionError> {
        self.0.shared.writable(lane).await
    }

    /// How many bytes may be sent without waiting; the last message may exceed it.
    pub fn capacity_bytes(&self, lane: Lane) -> usize {
        self.0.shared.lock().core.capacity_bytes(lane)
    }

    /// The next message of a lane; `None` when the peer has closed and everything was taken. Only one task at a time
    /// should ask for a lane.
    ///
    /// Messages that arrived before a failure are given out before the failure.
    ///
    /// # Errors
    /// Where the session has failed.
    pub async fn recv(&self, lane: Lane) -> Result<Option<Message>, SessionError> {
        self.0.shared.recv(lane).await
    }

    /// [`Session::recv`] for a thread that isn't the runtime's.
    ///
    /// # Errors
    /// As [`Session::recv`].
    ///
    /// # Panics
    /// In an asynchronous task.
    pub fn blocking_recv(&self, lane: Lane) -> Result<Option<Message>, SessionError> {
        self.0.runtime.block_on(self.recv(lane))
    }

    /// Waits until the peer's session has received everything sent so far, and whatever is sent meanwhile.
    ///
    /// # Errors
    /// Where the session ends before.
    pub async fn flush(&self) -> Result<(), SessionError> {
        self.0.shared.flush().await
    }

    /// Flushes, tells the peer that nothing more will come, and ends the session on this side.
    ///
    /// What the peer sends after that is lost: agree on the end first.
    ///
    /// # Errors
    /// Where the session fails before the peer has everything.
    pub async fn close(&self) -> Result<(), SessionError> {
        self.0.shared.close().await
    }

    /// Limits what the session sends from now on, over all its connections; `None` lifts the limit.
    ///
    /// Counted are frames and TLS records, not TCP and IP. Urgent messages are counted but never wait.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.0.shared.set_bandwidth(bytes_per_second);
    }

    /// What was done and measured so far.
    pub fn stats(&self) -> Stats {
        self.0.shared.lock().core.stats()
    }

    /// The other host.
    pub fn peer(&self) -> &HostName {
        self.0.shared.peer()
    }
}
