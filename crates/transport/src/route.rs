//! Where an accepted connection belongs, read from its ClientHello while the bytes stay in the socket.
//!
//! The process that listens can so hand the untouched TCP connection to the process that is meant, which then does
//! the TLS handshake from the first byte. A route is a claim: nothing is authenticated by it.

use std::{fmt, io, time::Duration};

use rustls::server::Acceptor;
use rustls_pki_types::ServerName;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{sleep, timeout},
};

/// A ClientHello may take this much; ours have about 300 bytes.
pub const MAX_CLIENT_HELLO_BYTES: usize = 16 * 1024;
/// How long a client may take for its ClientHello.
pub const CLIENT_HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a socket with half a ClientHello is looked at: it stays readable, so that there is nothing to wait for.
const INCOMPLETE_POLL: Duration = Duration::from_millis(5);

const AGENT: &str = "agent";
const MIGRATION_PREFIX: &str = "m-";

/// Whom a connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Route {
    /// The agent's own API.
    Agent,
    /// The migration with this id.
    Migration(String),
}

/// Why a connection could not be routed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The socket failed.
    #[error("cannot read from the connection")]
    Io(#[from] io::Error),
    /// The peer closed before its ClientHello was complete.
    #[error("the connection ended within its client hello")]
    Ended,
    /// The peer was too slow.
    #[error("no client hello within {} s", CLIENT_HELLO_TIMEOUT.as_secs())]
    Slow,
    /// The peer doesn't speak TLS, or sent more than a ClientHello may take.
    #[error("the connection does not begin with a tls client hello: {reason}")]
    NotTls {
        /// What is wrong.
        reason: String,
    },
    /// No server name, or one that names nothing here.
    #[error("the connection is for {name:?}, which is nobody")]
    Unknown {
        /// The server name, if there was one.
        name: Option<String>,
    },
}

impl Route {
    /// The server name that leads here.
    ///
    /// # Errors
    /// Where a migration's id isn't 1 to 61 lower-case letters, digits or hyphens.
    pub fn server_name(&self) -> Result<ServerName<'static>, RouteError> {
        let name = self.to_string();
        if Self::parse(&name).as_ref() != Some(self) {
            return Err(RouteError::Unknown { name: Some(name) });
        }
        ServerName::try_from(name.clone()).map_err(|_| RouteError::Unknown { name: Some(name) })
    }

    fn parse(name: &str) -> Option<Self> {
        if name == AGENT {
            return Some(Self::Agent);
        }
        let id = name.strip_prefix(MIGRATION_PREFIX)?;
        let well_formed = (1..=61).contains(&id.len())
            && !id.ends_with('-')
            && id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        well_formed.then(|| Self::Migration(id.to_owned()))
    }
}

impl fmt::Display for Route {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent => formatter.write_str(AGENT),
            Self::Migration(id) => write!(formatter, "{MIGRATION_PREFIX}{id}"),
        }
    }
}

/// Reads the route of a connection; every byte stays in the socket.
///
/// # Errors
/// Where the peer is silent, closes, isn't TLS or names nobody; the connection should then be dropped.
pub async fn peek(stream: &TcpStream) -> Result<Route, RouteError> {
    timeout(CLIENT_HELLO_TIMEOUT, peek_patiently(stream)).await.map_err(|_| RouteError::Slow)?
}

async fn peek_patiently(stream: &TcpStream) -> Result<Route, RouteError> {
    let mut bytes = vec![0; MAX_CLIENT_HELLO_BYTES];
    let mut seen = 0;
    loop {
        let available = stream.peek(&mut bytes).await?;
        if available == 0 {
            return Err(RouteError::Ended);
        }
        if available > seen {
            seen = available;
            if let Some(route) = parse_client_hello(&bytes[..seen])? {
                return Ok(route);
            }
        } else if stream.ready(Interest::READABLE).await?.is_read_closed() {
            return Err(RouteError::Ended);
        }
        if seen == bytes.len() {
            return Err(RouteError::NotTls { reason: "its client hello is too long".to_owned() });
        }
        sleep(INCOMPLETE_POLL).await;
    }
}

/// The route in a ClientHello; `None` while it is incomplete.
///
/// # Errors
/// Where the bytes are no ClientHello, or it names nobody.
pub fn parse_client_hello(mut bytes: &[u8]) -> Result<Option<Route>, RouteError> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes)?;
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let name = hello.server_name();
                let unknown = || RouteError::Unknown { name: name.map(str::to_owned) };
                return name.and_then(Route::parse).map(Some).ok_or_else(unknown);
            }
            Err((error, _alert)) => return Err(RouteError::NotTls { reason: error.to_string() }),
        }
    }
    Ok(None)
}
