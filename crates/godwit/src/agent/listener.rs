//! The one TCP port of a host: agents and workers of other hosts come here.
//!
//! A connection says in its ClientHello whom it is for. `agent` is answered here; `m-<id>` is handed, untouched, to
//! the worker of that migration, which does the TLS itself. Whoever names nobody, is slow, or comes when too many wait
//! already is closed.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use godwit_transport::{
    route::{Route, peek},
    tls,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{Agent, incoming, workers};
use crate::output::one_line;

/// Connections of which it isn't known yet whom they are for, and those to the agent.
const CONNECTIONS_MAX: usize = 64;
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one connection to the agent may last: a target starts QEMU in it.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(180);
/// After an error of `accept` (too many open files), before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections for as long as the agent lives.
pub(super) async fn serve(agent: Arc<Agent>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "can't accept");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(%from, "closed: {CONNECTIONS_MAX} connections wait already");
            continue;
        };
        tokio::spawn(route(agent.clone(), stream, from, place));
    }
}

async fn route(agent: Arc<Agent>, stream: TcpStream, from: SocketAddr, _place: OwnedSemaphorePermit) {
    let _ = stream.set_nodelay(true);
    match peek(&stream).await {
        Ok(Route::Agent) => {
            let serving = timeout(CONNECTION_TIMEOUT, answer(agent, stream, from)).await;
            if let Err(error) = serving.unwrap_or_else(|late| Err(late.into())) {
                tracing::info!(%from, error = one_line(&error), "connection ended");
            }
        }
        Ok(Route::Migration(id)) => {
            if let Err(error) = hand_over(&agent, &id, stream) {
                tracing::warn!(%from, migration = id, %error, "closed: no worker takes it");
            }
        }
        Err(error) => tracing::warn!(%from, error = one_line(&error), "closed"),
    }
}

fn hand_over(agent: &Agent, id: &str, stream: TcpStream) -> io::Result<()> {
    agent.existing(id).map_err(|error| io::Error::new(io::ErrorKind::NotFound, error.to_string()))?;
    workers::hand_over(&agent.state.migration(id), &stream.into_std()?)
}

/// Serves the API for agents on one connection.
async fn answer(agent: Arc<Agent>, stream: TcpStream, from: SocketAddr) -> io::Result<()> {
    let acceptor = TlsAcceptor::from(agent.credentials.current().server.clone());
    let stream = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let peer = tls::peer_name(stream.get_ref().1).map_err(io::Error::other)?;
    if agent.config.peer(peer.as_str()).is_none() {
        // It gets its one line from the handler; this one is for the operator.
        tracing::warn!(%from, %peer, "a host that isn't among [peers]");
    }
    let service = TowerToHyperService::new(incoming::router(agent, peer));
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(io::Error::other)
}
