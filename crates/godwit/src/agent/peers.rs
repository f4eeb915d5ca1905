//! Talking to the agents of other hosts: mutual TLS, and the host's name must be in its certificate.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use godwit_transport::{identity::HostName, route::Route, tls};
use hyper::Method;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Agent,
    error::{AgentError, Refusal},
};
use crate::{
    api::{IncomingReady, IncomingRequest, Withdrawn},
    http::{self, HttpError},
    output::one_line,
};

/// How long a host may take to accept a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a target may take to be ready: it starts QEMU and a worker.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// The path that a target answers.
pub(super) const INCOMING_PATH: &str = "/v1/incoming";

/// The path at which a target says whether it would take a machine.
pub(super) const REHEARSAL_PATH: &str = "/v1/rehearsal";
/// The path at which agents speak about open hand-overs.
pub(super) const HANDOVER_PATH: &str = "/v1/handover";
/// The path at which a host that was away finds what it was ordered meanwhile.
pub(super) const ORDERS_PATH: &str = "/v1/orders";

/// Another host, looked up.
#[derive(Debug, Clone)]
pub(super) struct PeerAgent {
    name: HostName,
    /// Where its agent listens.
    pub(super) address: SocketAddr,
}

impl Agent {
    /// Finds a host to which machines may be sent.
    pub(super) async fn find_receiver(&self, name: &str) -> Result<PeerAgent, AgentError> {
        if self.config.peer(name).is_some_and(|peer| !peer.may_receive) {
            return Err(Refusal::MayNotReceive(name.to_owned()).into());
        }
        self.find_peer(name).await
    }

    /// Finds a host, whatever it may do.
    pub(super) async fn find_peer(&self, name: &str) -> Result<PeerAgent, AgentError> {
        let unknown = || AgentError::NotFound { what: "host among [peers]", name: name.to_owned() };
        let (name, peer) =
            self.config.peers.iter().find(|(known, _)| known.as_str() == name).ok_or_else(unknown)?;
        let address = peer.address.as_str();
        let looked_up = lookup_host(address).await.map(|mut found| found.next());
        match looked_up {
            Ok(Some(address)) => Ok(PeerAgent { name: name.clone(), address }),
            Ok(None) => Err(unreachable(name, format!("{address} has no address"))),
            Err(error) => Err(unreachable(name, format!("{address}: {error}"))),
        }
    }

    /// Asks a host to take a machine; when this returns, its QEMU and its worker wait.
    pub(super) async fn offer(
        &self,
        peer: &PeerAgent,
        request: &IncomingRequest,
    ) -> Result<IncomingReady, AgentError> {
        self.request(peer, Method::POST, INCOMING_PATH, Some(request)).await
    }

    /// Asks another agent for something.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        peer: &PeerAgent,
        path: &str,
    ) -> Result<T, AgentError> {
        self.request(peer, Method::GET, path, None::<&()>).await
    }

    /// Tells another agent something.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        peer: &PeerAgent,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, AgentError> {
        self.request(peer, Method::POST, path, Some(body)).await
    }

    /// Tells a host that an offered machine won't come; that it knows already is fine.
    pub(super) async fn withdraw(&self, peer: &PeerAgent, id: &str) {
        let path = format!("{INCOMING_PATH}/{id}");
        let answer: Result<Withdrawn, _> = self.request(peer, Method::DELETE, &path, None::<&()>).await;
        if let Err(error) = answer {
            // Its worker gives up by itself when nobody connects.
            tracing::warn!(peer = %peer.name, error = one_line(&error), "offer not withdrawn");
        }
    }

    async fn request<T: DeserializeOwned>(
        &self,
        peer: &PeerAgent,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, AgentError> {
        let stream = timeout(CONNECT_TIMEOUT, self.connect(peer)).await;
        let (stream, _) = stream.map_err(|_| unreachable(&peer.name, "it doesn't answer".to_owned()))??;
        let exchange = async { http::receive(http::send(stream, method, path, body).await?).await };
        match timeout(READY_TIMEOUT, exchange).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(HttpError::Problem(problem))) => {
                tracing::debug!(code = ?problem.code, "refused");
                let reason = problem.message;
                Err(Refusal::Peer { peer: peer.name.to_string(), reason }.into())
            }
            Ok(Err(error)) => Err(unreachable(&peer.name, one_line(&error))),
            Err(_) => Err(unreachable(&peer.name, format!("no answer in {} s", READY_TIMEOUT.as_secs()))),
        }
    }

    /// Connects, and says how long TCP's handshake took: a round trip.
    pub(super) async fn connect(
        &self,
        peer: &PeerAgent,
    ) -> Result<(TlsStream<TcpStream>, Duration), AgentError> {
        let failed = |error: &dyn std::error::Error| unreachable(&peer.name, one_line(error));
        let config = tls::client_config(&self.credentials.current().identity, &peer.name)
            .map_err(|error| failed(&error))?;
        let route = Route::Agent.server_name().map_err(|error| failed(&error))?;
        let began = Instant::now();
        let stream = TcpStream::connect(peer.address).await.map_err(|error| failed(&error))?;
        let round_trip = began.elapsed();
        let _ = stream.set_nodelay(true);
        let connected = TlsConnector::from(config).connect(route, stream).await;
        Ok((connected.map_err(|error| failed(&error))?, round_trip))
    }
}

fn unreachable(peer: &HostName, reason: String) -> AgentError {
    AgentError::Unreachable { peer: peer.to_string(), reason }
}
