//! Two hosts of one authority, and what they listen on.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use godwit_transport::identity::{Authority, HostIdentity, HostName, JoinRequest, Validity};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// An authority in a directory of its own.
pub(crate) struct Installation {
    scratch: TempDir,
    pub(crate) authority: Authority,
}

impl Installation {
    pub(crate) fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let authority = Authority::create(&scratch.path().join("ca"), SystemTime::now()).unwrap();
        Self { scratch, authority }
    }

    pub(crate) fn host(&self, name: &str) -> Arc<HostIdentity> {
        self.host_at(name, SystemTime::now())
    }

    /// A host that joined at `now`, for a day.
    pub(crate) fn host_at(&self, name: &str, now: SystemTime) -> Arc<HostIdentity> {
        let directory = self.scratch.path().join(name);
        let name = host_name(name);
        let request = JoinRequest::create(&directory, &name).unwrap();
        let bundle = self.authority.sign(&name, request.pem(), Validity::starting(now, DAY)).unwrap();
        Arc::new(HostIdentity::join(&directory, &bundle, now).unwrap())
    }
}

pub(crate) fn host_name(name: &str) -> HostName {
    name.parse().unwrap()
}

/// Listens on loopback and hands out raw connections.
pub(crate) async fn listen() -> (SocketAddr, mpsc::Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if sender.send(stream).await.is_err() {
                return;
            }
        }
    });
    (address, receiver)
}
