//! The one TCP port of a host: agents and workers of other hosts come here.
//!
//! A connection says in its ClientHello whom it is for. `agent` is answered here; `m-<id>` is handed, untouched, to
//! the worker of that migration, which does the TLS itself. Whoever names nobody, is slow, or comes when too many wait
//! already is closed.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::Router;
use godwit_transport::{
    route::{Route, peek},
    tls,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Agent, incoming,
    rate::{Buckets, Rate},
    workers,
};
use crate::output::one_line;

/// Connections of which it isn't known yet whom they are for, and those to the agent.
const CONNECTIONS_MAX: usize = 64;
/// Of these, how many one address may have: a flood from one host leaves places for the others.
const CONNECTIONS_OF_ONE_MAX: usize = 32;
/// Connections of one address. A session that is cut again and again dials nine a second; a TLS handshake costs the
/// agent less than a millisecond.
const ARRIVALS: Rate = Rate { burst: 256, per_second: 64.0 };
/// What is logged of connections that weren't let in.
const COMPLAINTS: Rate = Rate { burst: 8, per_second: 0.2 };
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one connection to the agent may last: a target starts QEMU in it.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(180);
/// After an error of `accept` (too many open files), before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves other hosts for as long as the agent lives.
pub(super) async fn serve(agent: Arc<Agent>, listener: TcpListener) {
    accept_all(listener, |stream, from, place| {
        tokio::spawn(route(agent.clone(), stream, from, place));
    })
    .await;
}

/// Accepts connections without end, and passes on those for which there is a place.
pub(super) async fn accept_all(listener: TcpListener, serve: impl Fn(TcpStream, SocketAddr, Place)) {
    let mut door = Door::default();
    loop {
        match listener.accept().await {
            Ok((stream, from)) => match door.admit(from, Instant::now()) {
                Ok(place) => serve(stream, from, place),
                Err(reason) => door.complain(from, reason),
            },
            Err(error) => {
                tracing::warn!(%error, "can't accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Who may come in. Nobody has shown a certificate yet, so that all there is to go by is the address.
struct Door {
    places: Arc<Semaphore>,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
    arrivals: Buckets<IpAddr>,
    complaints: Buckets<()>,
}

impl Default for Door {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            taken: Arc::default(),
            arrivals: Buckets::new(ARRIVALS),
            complaints: Buckets::new(COMPLAINTS),
        }
    }
}

impl Door {
    fn admit(&mut self, from: SocketAddr, now: Instant) -> Result<Place, &'static str> {
        let address = network(from.ip());
        self.arrivals.take(address, now).map_err(|_| "it comes too often")?;
        let permit = self.places.clone().try_acquire_owned().map_err(|_| "too many connections wait")?;
        let mut taken = lock(&self.taken);
        let mine = taken.entry(address).or_default();
        if *mine >= CONNECTIONS_OF_ONE_MAX {
            return Err("too many connections of this address wait");
        }
        *mine += 1;
        Ok(Place { address, taken: self.taken.clone(), _permit: permit })
    }

    /// Says whom nobody let in, but not for every connection of a flood.
    fn complain(&mut self, from: SocketAddr, reason: &str) {
        if self.complaints.take((), Instant::now()).is_ok() {
            tracing::warn!(%from, reason, "closed");
        }
    }
}

/// One of the connections that may wait; free again when it is dropped.
pub(super) struct Place {
    address: IpAddr,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        if let Some(mine) = taken.get_mut(&self.address) {
            *mine -= 1;
            if *mine == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whose address it is: of IPv6 the half that a site can't choose.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

async fn route(agent: Arc<Agent>, stream: TcpStream, from: SocketAddr, _place: Place) {
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
        // It gets its one line from `admission`; this one is for the operator.
        tracing::warn!(%from, %peer, "a host that isn't among [peers]");
    }
    speak_http(stream, incoming::router(agent, peer)).await
}

/// Serves HTTP on a connection without TLS.
pub(super) async fn serve_http(stream: TcpStream, router: Router) -> io::Result<()> {
    timeout(CONNECTION_TIMEOUT, speak_http(stream, router)).await?
}

async fn speak_http<S>(stream: S, router: Router) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().unwrap(), 1)
    }

    #[test]
    fn one_address_leaves_places_for_others_and_gives_its_own_back() {
        let (mut door, now) = (Door::default(), Instant::now());
        let mut places: Vec<_> = (0..100).filter_map(|_| door.admit(from("192.0.2.1"), now).ok()).collect();
        assert_eq!(places.len(), CONNECTIONS_OF_ONE_MAX);
        let other = door.admit(from("192.0.2.2"), now).unwrap();
        assert!(door.admit(from("192.0.2.1"), now).is_err());
        places.pop();
        places.push(door.admit(from("192.0.2.1"), now).unwrap());
        drop((places, other));
        assert!(lock(&door.taken).is_empty());
        assert_eq!(door.places.available_permits(), CONNECTIONS_MAX);
    }

    #[test]
    fn no_crowd_of_addresses_gets_more_than_all_places() {
        let (mut door, now) = (Door::default(), Instant::now());
        let places: Vec<_> =
            (0..200).filter_map(|host| door.admit(from(&format!("192.0.2.{host}")), now).ok()).collect();
        assert_eq!(places.len(), CONNECTIONS_MAX);
    }

    #[test]
    fn who_comes_too_often_waits_also_if_nothing_is_kept_open() {
        let (mut door, now) = (Door::default(), Instant::now());
        let admitted = (0..1_000).filter(|_| door.admit(from("192.0.2.1"), now).is_ok()).count();
        assert_eq!(admitted, 256);
        door.admit(from("192.0.2.2"), now).unwrap();
        door.admit(from("192.0.2.1"), now + Duration::from_secs(1)).unwrap();
    }

    #[test]
    fn a_site_of_many_addresses_is_one() {
        assert_eq!(network("2001:db8::1".parse().unwrap()), network("2001:db8::ffff:2".parse().unwrap()));
        assert_ne!(network("2001:db8::1".parse().unwrap()), network("2001:db8:0:1::1".parse().unwrap()));
        assert_eq!(network("::ffff:192.0.2.1".parse().unwrap()), network("192.0.2.1".parse().unwrap()));
    }
}
