//! Makes the connections of a session: TCP, TLS, and the hello each way.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
    time::Duration,
};

use rustls::ServerConfig;
use rustls_pki_types::ServerName;
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{
    AcceptConfig, ConnectConfig, SessionError,
    core::Role,
    frame::NextExpected,
    hello::{HELLO_BYTES, Hello, HelloError, MAX_BULK_CONNECTIONS, Refusal, SessionId, VERSIONS, Verdict},
    shared::Shared,
};
use crate::{
    identity::HostName,
    tls::{self, PeerError},
};

/// The kernel takes more from us only while less than this waits to be sent for the first time: what is urgent or
/// newer should not queue behind megabytes in a socket.
const NOT_SENT_LOW_WATER_BYTES: u32 = 128 * 1024;
/// Handshakes under way at a target. A further connection takes the place of the oldest: silent ones must not keep out a
/// source that dials anew, and its own take a few round trips only.
const MAX_HANDSHAKES: usize = 32;
/// The first pause between two attempts to reconnect, doubled until [`MAX_REDIAL_PAUSE`].
const MIN_REDIAL_PAUSE: Duration = Duration::from_millis(50);
/// The longest.
const MAX_REDIAL_PAUSE: Duration = Duration::from_secs(1);

/// What broke a connection, or kept it from being made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The operating system, TLS, or the end of the stream.
    #[error("cannot {action} the {} connection: {source}", describe(*role))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which connection.
        role: Role,
        /// Why it failed.
        source: Arc<io::Error>,
    },
    /// The connections were not all up in time.
    #[error("no complete set of connections within {} ms", within.as_millis())]
    Slow {
        /// The time they had.
        within: Duration,
    },
    /// Nothing was heard of the peer.
    #[error("nothing was heard for {} ms", silence.as_millis())]
    Silent {
        /// How long.
        silence: Duration,
    },
    /// The peer's hello made no sense.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The peer's certificate names no host.
    #[error("the peer cannot be identified: {0}")]
    Peer(#[source] Arc<PeerError>),
    /// Nobody passes on connections any more.
    #[error("no further connections can arrive")]
    NoListener,
    /// The connection's task was stopped.
    #[error("the connections were replaced or stopped")]
    Stopped,
}

impl LinkError {
    pub(super) fn reading(role: Role, error: io::Error) -> Self {
        Self::Io { action: "read from", role, source: Arc::new(error) }
    }

    pub(super) fn writing(role: Role, error: io::Error) -> Self {
        Self::Io { action: "write to", role, source: Arc::new(error) }
    }

    fn making(role: Role) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io { action: "make", role, source: Arc::new(error) }
    }
}

fn describe(role: Role) -> String {
    match role {
        Role::Urgent => "urgent".to_owned(),
        Role::Bulk { index } => format!("bulk {index}"),
    }
}

/// A complete set of connections.
#[derive(Debug)]
pub(super) struct Connections {
    pub(super) streams: Vec<(Role, TlsStream<TcpStream>)>,
    pub(super) peer_expects: NextExpected,
}

/// The source's side: dials.
#[derive(Debug)]
pub(super) struct Dialer {
    config: Arc<ConnectConfig>,
    connector: Arc<rustls::ClientConfig>,
    server_name: ServerName<'static>,
    session: SessionId,
    attempt: u32,
}

impl Dialer {
    pub(super) fn new(config: ConnectConfig) -> Result<Self, SessionError> {
        let server_name = config.route.server_name().map_err(|error| SessionError::Route(Arc::new(error)))?;
        let tls_config = tls::client_config(&config.identity, &config.peer)
            .map_err(|error| SessionError::Config(Arc::new(error)))?;
        let session = new_session_id(&tls_config)?;
        let bulk_connections = config.bulk_connections.clamp(1, MAX_BULK_CONNECTIONS);
        let config = Arc::new(ConnectConfig { bulk_connections, ..config });
        Ok(Self { config, connector: tls_config, server_name, session, attempt: 0 })
    }

    /// Makes one attempt at all connections.
    pub(super) async fn dial(&mut self, shared: &Shared) -> Result<Connections, SessionError> {
        let within = self.config.timeouts.connect;
        self.attempt += 1;
        let received = shared.lock().core.next_expected();
        let dialled = timeout(within, self.dial_all(received)).await;
        dialled.unwrap_or_else(|_| Err(lost(&self.config.peer, LinkError::Slow { within })))
    }

    /// Dials until all connections are up again, the peer refuses, or the time is over.
    pub(super) async fn redial(
        &mut self,
        shared: &Shared,
        mut cause: LinkError,
    ) -> Result<Connections, SessionError> {
        let deadline = Instant::now() + self.config.timeouts.reconnect;
        let mut pause = MIN_REDIAL_PAUSE;
        while Instant::now() < deadline {
            match timeout_at(deadline, self.dial(shared)).await {
                Ok(Err(SessionError::LinkLost { cause: newer, .. })) => cause = newer,
                Ok(dialled) => return dialled,
                Err(_) => break,
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_REDIAL_PAUSE);
        }
        Err(lost(&self.config.peer, cause))
    }

    async fn dial_all(&self, received: NextExpected) -> Result<Connections, SessionError> {
        let roles = roles(self.config.bulk_connections);
        let mut dials = JoinSet::new();
        for role in roles {
            let offer = self.hello(role, received);
            let connector = TlsConnector::from(self.connector.clone());
            dials.spawn(dial_one(self.config.clone(), connector, self.server_name.clone(), offer));
        }
        let mut connections = Connections { streams: Vec::new(), peer_expects: NextExpected::default() };
        while let Some(dialled) = dials.join_next().await {
            let (role, stream, answer) =
                dialled.map_err(|_| lost(&self.config.peer, LinkError::Stopped))??;
            connections.add(role, stream, answer.received);
        }
        Ok(connections)
    }

    fn hello(&self, role: Role, received: NextExpected) -> Hello {
        Hello {
            versions: VERSIONS,
            verdict: Verdict::Offer,
            role,
            bulk_connections: self.config.bulk_connections,
            session: self.session,
            attempt: self.attempt,
            received,
        }
    }
}

impl Connections {
    fn add(&mut self, role: Role, stream: TlsStream<TcpStream>, peer_expects: NextExpected) {
        self.streams.push((role, stream));
        // The peer closes its old connections before it answers, so that all answers agree; the newest holds anyway.
        self.peer_expects.urgent = self.peer_expects.urgent.max(peer_expects.urgent);
        self.peer_expects.bulk = self.peer_expects.bulk.max(peer_expects.bulk);
    }
}

async fn dial_one(
    config: Arc<ConnectConfig>,
    connector: TlsConnector,
    server_name: ServerName<'static>,
    offer: Hello,
) -> Result<(Role, TlsStream<TcpStream>, Hello), SessionError> {
    let role = offer.role;
    let made = async {
        let stream = TcpStream::connect(config.address).await?;
        prepare(&stream)?;
        let mut stream = connector.connect(server_name, stream).await?;
        write_hello(&mut stream, &offer).await?;
        let answer = read_hello_bytes(&mut stream).await?;
        Ok((TlsStream::from(stream), answer))
    };
    let (stream, answer) =
        made.await.map_err(LinkError::making(role)).map_err(|cause| lost(&config.peer, cause))?;
    let answer = Hello::decode(&answer).map_err(|error| lost(&config.peer, error.into()))?;
    match answer.verdict {
        Verdict::Accept if answer.session == offer.session && answer.role == role => {
            Ok((role, stream, answer))
        }
        Verdict::Refuse(refusal) => Err(SessionError::PeerRefused {
            peer: config.peer.clone(),
            refusal,
            theirs: answer.versions,
            ours: VERSIONS,
        }),
        _ => Err(lost(&config.peer, HelloError::Field { field: "verdict or session" }.into())),
    }
}

/// The target's side: takes connections from whoever listens.
#[derive(Debug)]
pub(super) struct Door {
    config: Arc<AcceptConfig>,
    tls_config: Arc<ServerConfig>,
    incoming: mpsc::Receiver<TcpStream>,
    handshakes: JoinSet<Result<Offer, LinkError>>,
    /// The same, oldest first.
    oldest: VecDeque<AbortHandle>,
    session: Option<SessionId>,
    attempt: u32,
}

/// A connection whose peer was verified and has said hello.
#[derive(Debug)]
pub(super) struct Offer {
    stream: TlsStream<TcpStream>,
    hello: Hello,
}

impl Door {
    pub(super) fn new(
        config: AcceptConfig,
        incoming: mpsc::Receiver<TcpStream>,
    ) -> Result<Self, SessionError> {
        let tls_config =
            tls::server_config(&config.identity).map_err(|error| SessionError::Config(Arc::new(error)))?;
        Ok(Self {
            config: Arc::new(config),
            tls_config,
            incoming,
            handshakes: JoinSet::new(),
            oldest: VecDeque::new(),
            session: None,
            attempt: 0,
        })
    }

    /// Waits for a complete set of connections, of which `first` may be one.
    pub(super) async fn gather(
        &mut self,
        shared: &Shared,
        first: Option<Offer>,
    ) -> Result<Connections, SessionError> {
        let within = self.config.timeouts.connect;
        let peer = self.config.peer.clone();
        match timeout(within, self.gather_all(shared, first)).await {
            Ok(gathered) => gathered.map_err(|cause| lost(&peer, cause)),
            Err(_) => Err(lost(&peer, LinkError::Slow { within })),
        }
    }

    /// Waits until the source has dialled anew, or the time is over.
    pub(super) async fn regather(
        &mut self,
        shared: &Shared,
        cause: LinkError,
    ) -> Result<Connections, SessionError> {
        let within = self.config.timeouts.reconnect;
        let peer = self.config.peer.clone();
        let gathered = timeout(within, self.gather_all(shared, None)).await;
        gathered.ok().and_then(Result::ok).ok_or_else(|| lost(&peer, cause))
    }

    /// Waits for a connection of a newer attempt of this session.
    pub(super) async fn newer_offer(&mut self) -> Offer {
        loop {
            match self.next_offer().await {
                Some(offer) => match self.judge(&offer.hello, self.attempt) {
                    Ok(()) => return offer,
                    Err(refusal) => refuse(offer, refusal).await,
                },
                None => std::future::pending().await,
            }
        }
    }

    async fn gather_all(
        &mut self,
        shared: &Shared,
        mut first: Option<Offer>,
    ) -> Result<Connections, LinkError> {
        let received = shared.lock().core.next_expected();
        let carried = self.attempt;
        let mut gathered: BTreeMap<u8, Offer> = BTreeMap::new();
        loop {
            let offer = match first.take() {
                Some(offer) => offer,
                None => self.next_offer().await.ok_or(LinkError::NoListener)?,
            };
            if let Err(refusal) = self.admit(&offer.hello, carried, &mut gathered) {
                refuse(offer, refusal).await;
                continue;
            }
            let complete = 1 + usize::from(offer.hello.bulk_connections);
            if let Some(offer) = answer(offer, Verdict::Accept, received).await {
                gathered.insert(slot(offer.hello.role), offer);
            }
            if gathered.len() == complete {
                return Ok(connections(gathered));
            }
        }
    }

    /// Decides whether a connection belongs to the newest attempt; one of a newer attempt drops what was gathered.
    fn admit(
        &mut self,
        hello: &Hello,
        carried: u32,
        gathered: &mut BTreeMap<u8, Offer>,
    ) -> Result<(), Refusal> {
        self.judge(hello, carried)?;
        if hello.attempt < self.attempt {
            return Err(Refusal::Attempt);
        }
        if hello.attempt > self.attempt {
            gathered.clear();
        }
        let alike = |other: &Offer| other.hello.bulk_connections == hello.bulk_connections;
        if gathered.contains_key(&slot(hello.role)) || !gathered.values().all(alike) {
            return Err(Refusal::Attempt);
        }
        self.attempt = hello.attempt;
        self.session = Some(hello.session);
        Ok(())
    }

    fn judge(&self, hello: &Hello, carried: u32) -> Result<(), Refusal> {
        if hello.versions.common(VERSIONS).is_none() {
            return Err(Refusal::Version);
        }
        if hello.verdict != Verdict::Offer || self.session.is_some_and(|session| session != hello.session) {
            return Err(Refusal::Session);
        }
        if hello.attempt <= carried { Err(Refusal::Attempt) } else { Ok(()) }
    }

    /// The next connection that has come through its handshake; `None` when no more can come.
    async fn next_offer(&mut self) -> Option<Offer> {
        let mut listening = true;
        loop {
            tokio::select! {
                incoming = self.incoming.recv(), if listening => match incoming {
                    Some(stream) => self.begin_handshake(stream),
                    None => listening = false,
                },
                Some(shaken) = self.handshakes.join_next() => match shaken {
                    Ok(Ok(offer)) => return Some(offer),
                    Ok(Err(error)) => tracing::warn!(peer = %self.config.peer, %error, "connection refused"),
                    Err(error) if error.is_cancelled() => {
                        tracing::warn!(peer = %self.config.peer, "the oldest handshake gave way to a newer one");
                    }
                    Err(error) => tracing::error!(%error, "a handshake was stopped"),
                },
                else => return None,
            }
        }
    }

    fn begin_handshake(&mut self, stream: TcpStream) {
        self.oldest.retain(|handshake| !handshake.is_finished());
        if self.oldest.len() >= MAX_HANDSHAKES
            && let Some(oldest) = self.oldest.pop_front()
        {
            oldest.abort();
        }
        let acceptor = TlsAcceptor::from(self.tls_config.clone());
        let handshake = shake_hands(self.config.clone(), acceptor, stream);
        self.oldest.push_back(self.handshakes.spawn(handshake));
    }
}

async fn shake_hands(
    config: Arc<AcceptConfig>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
) -> Result<Offer, LinkError> {
    let within = config.timeouts.connect;
    let shaken = async {
        prepare(&stream)?;
        let mut stream = acceptor.accept(stream).await?;
        let hello = read_hello_bytes(&mut stream).await?;
        Ok((stream, hello))
    };
    // Until the hello is read nobody knows which connection this is.
    let making = LinkError::making(Role::Urgent);
    let (stream, hello) =
        timeout(within, shaken).await.map_err(|_| LinkError::Slow { within })?.map_err(making)?;
    let host = tls::peer_name(stream.get_ref().1).map_err(|error| LinkError::Peer(Arc::new(error)))?;
    let offer = Offer { hello: Hello::decode(&hello)?, stream: stream.into() };
    if host != config.peer {
        refuse(offer, Refusal::Host).await;
        let reason = format!("it comes from {host}");
        return Err(LinkError::making(Role::Urgent)(io::Error::other(reason)));
    }
    Ok(offer)
}

async fn refuse(offer: Offer, refusal: Refusal) {
    tracing::warn!(session = ?offer.hello.session, %refusal, "connection refused");
    if let Some(mut offer) = answer(offer, Verdict::Refuse(refusal), NextExpected::default()).await {
        // The peer reads the refusal whether or not it hears the end of the stream.
        let _ = offer.stream.shutdown().await;
    }
}

/// Answers a hello; `None` where the connection has broken meanwhile, which the source will notice too.
async fn answer(mut offer: Offer, verdict: Verdict, received: NextExpected) -> Option<Offer> {
    let answer = Hello { versions: VERSIONS, verdict, received, ..offer.hello };
    write_hello(&mut offer.stream, &answer).await.ok().map(|()| offer)
}

fn connections(gathered: BTreeMap<u8, Offer>) -> Connections {
    let mut connections = Connections { streams: Vec::new(), peer_expects: NextExpected::default() };
    for offer in gathered.into_values() {
        connections.add(offer.hello.role, offer.stream, offer.hello.received);
    }
    connections
}

fn roles(bulk_connections: u8) -> impl Iterator<Item = Role> {
    std::iter::once(Role::Urgent).chain((0..bulk_connections).map(|index| Role::Bulk { index }))
}

fn slot(role: Role) -> u8 {
    match role {
        Role::Urgent => 0,
        Role::Bulk { index } => index + 1,
    }
}

fn lost(peer: &HostName, cause: LinkError) -> SessionError {
    SessionError::LinkLost { peer: peer.clone(), cause }
}

fn new_session_id(config: &rustls::ClientConfig) -> Result<SessionId, SessionError> {
    let mut id = [0; 16];
    config.crypto_provider().secure_random.fill(&mut id).map_err(|_| {
        let error = rustls::Error::FailedToGetRandomBytes;
        SessionError::Config(Arc::new(error.into()))
    })?;
    Ok(SessionId(id))
}

/// Small frames leave at once, and little waits unsent.
///
/// No TCP_USER_TIMEOUT: it would also end a connection whose reader is slow. The urgent connection's heartbeat notices
/// a silent peer.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER_BYTES)
}

async fn write_hello(stream: &mut (impl AsyncWriteExt + Unpin), hello: &Hello) -> io::Result<()> {
    stream.write_all(&hello.encode()).await?;
    stream.flush().await
}

async fn read_hello_bytes(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<[u8; HELLO_BYTES]> {
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}
