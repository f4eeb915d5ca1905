//! Sessions on loopback: echo, order, refusal, resumption, end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod hosts;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use godwit_transport::{
    identity::HostIdentity,
    route::Route,
    session::{
        AcceptConfig, ConnectConfig, Lane, Limits, LinkError, Refusal, Session, SessionError, Timeouts,
        Versions,
        core::Role,
        frame::NextExpected,
        hello::{HELLO_BYTES, Hello, SessionId, VERSIONS, Verdict},
    },
    tls,
};
use hosts::{Installation, host_name, listen};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

fn connect_config(address: SocketAddr, identity: Arc<HostIdentity>, bulk_connections: u8) -> ConnectConfig {
    ConnectConfig {
        address,
        route: Route::Migration("web1-1".to_owned()),
        peer: host_name("hostb"),
        identity,
        bulk_connections,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
    }
}

fn accept_config(identity: Arc<HostIdentity>) -> AcceptConfig {
    AcceptConfig {
        peer: host_name("hosta"),
        identity,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
    }
}

async fn pair(bulk_connections: u8) -> (Session, Session) {
    let installation = Installation::new();
    let (address, streams) = listen().await;
    let source = Session::connect(connect_config(address, installation.host("hosta"), bulk_connections));
    let target = Session::accept(accept_config(installation.host("hostb")), streams);
    let (source, target) = tokio::join!(source, target);
    (source.unwrap(), target.unwrap())
}

/// Messages of all sizes up to the largest, recognisable by kind and content.
fn messages() -> Vec<(u8, Bytes)> {
    let sizes = [0, 1, 31, 16_352, 16_353, 65_536, 300_000, 1 << 20];
    (0..80u8).map(|n| (n, Bytes::from(vec![n; sizes[usize::from(n) % sizes.len()]]))).collect()
}

async fn echo(session: Session, lane: Lane) {
    while let Some(message) = session.recv(lane).await.unwrap() {
        session.send(lane, message.kind, message.payload).await.unwrap();
    }
}

async fn send_all(session: Session, lane: Lane) {
    for (kind, payload) in messages() {
        session.send(lane, kind, payload).await.unwrap();
    }
}

async fn expect_all(session: &Session, lane: Lane) {
    for (kind, payload) in messages() {
        let message = session.recv(lane).await.unwrap().unwrap();
        assert_eq!(message.kind, kind);
        assert!(message.payload == payload, "message {kind} of {} bytes differs", payload.len());
    }
}

async fn both_lanes_come_back_in_order(bulk_connections: u8) {
    let (source, target) = pair(bulk_connections).await;
    for lane in Lane::ALL {
        tokio::spawn(echo(target.clone(), lane));
        tokio::spawn(send_all(source.clone(), lane));
    }
    tokio::join!(expect_all(&source, Lane::Urgent), expect_all(&source, Lane::Bulk));
    let sent_bytes: usize = messages().iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(source.stats().sent_bytes, 2 * sent_bytes as u64);
    source.flush().await.unwrap();
    assert_eq!(source.stats().in_flight_bytes, 0);
    source.close().await.unwrap();
    assert!(target.recv(Lane::Bulk).await.unwrap().is_none());
    assert!(target.recv(Lane::Urgent).await.unwrap().is_none());
    assert!(matches!(target.send(Lane::Bulk, 0, Bytes::new()).await, Err(SessionError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bulk_connection() {
    both_lanes_come_back_in_order(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_bulk_connections() {
    both_lanes_come_back_in_order(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thread_can_send_and_receive() {
    let (source, target) = pair(1).await;
    let thread = std::thread::spawn(move || {
        for n in 0..100 {
            source.blocking_send(Lane::Bulk, n, Bytes::from(vec![n; 100_000])).unwrap();
        }
        source.blocking_recv(Lane::Urgent).unwrap().unwrap().kind
    });
    for n in 0..100 {
        assert_eq!(target.recv(Lane::Bulk).await.unwrap().unwrap().kind, n);
    }
    target.send(Lane::Urgent, 42, Bytes::new()).await.unwrap();
    let joined = tokio::task::spawn_blocking(move || thread.join().unwrap());
    assert_eq!(joined.await.unwrap(), 42);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_waits_for_a_receiver_that_does_not_take() {
    let (source, target) = pair(2).await;
    let sender = tokio::spawn({
        let source = source.clone();
        async move {
            for n in 0..64 {
                source.send(Lane::Bulk, n, Bytes::from(vec![n; 1 << 20])).await.unwrap();
            }
        }
    });
    // The urgent lane goes on while bulk stands still.
    while source.capacity_bytes(Lane::Bulk) > 0 {
        tokio::task::yield_now().await;
    }
    source.send(Lane::Urgent, 9, Bytes::from_static(b"now")).await.unwrap();
    assert_eq!(target.recv(Lane::Urgent).await.unwrap().unwrap().kind, 9);
    for n in 0..64 {
        let message = target.recv(Lane::Bulk).await.unwrap().unwrap();
        assert_eq!((message.kind, message.payload.len()), (n, 1 << 20));
    }
    sender.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_last_handle_ends_both_sides() {
    let (source, target) = pair(2).await;
    let clone = source.clone();
    drop(source);
    clone.send(Lane::Bulk, 1, Bytes::from_static(b"still here")).await.unwrap();
    clone.flush().await.unwrap();
    drop(clone);
    assert_eq!(target.recv(Lane::Bulk).await.unwrap().unwrap().kind, 1);
    let error = target.recv(Lane::Bulk).await.unwrap_err();
    assert!(matches!(error, SessionError::LinkLost { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_of_the_same_authority_is_refused() {
    let installation = Installation::new();
    let (address, streams) = listen().await;
    let target = tokio::spawn(Session::accept(accept_config(installation.host("hostb")), streams));
    let stranger = Session::connect(connect_config(address, installation.host("hostc"), 1)).await;
    let error = stranger.unwrap_err();
    assert!(matches!(error, SessionError::PeerRefused { refusal: Refusal::Host, .. }), "{error}");
    // The right one is still welcome.
    let source = Session::connect(connect_config(address, installation.host("hosta"), 1)).await.unwrap();
    source.send(Lane::Urgent, 3, Bytes::new()).await.unwrap();
    assert_eq!(target.await.unwrap().unwrap().recv(Lane::Urgent).await.unwrap().unwrap().kind, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_keep_nobody_out() {
    let installation = Installation::new();
    let (address, streams) = listen().await;
    let target = tokio::spawn(Session::accept(accept_config(installation.host("hostb")), streams));
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let source = Session::connect(connect_config(address, installation.host("hosta"), 8)).await.unwrap();
    source.send(Lane::Urgent, 3, Bytes::new()).await.unwrap();
    assert_eq!(target.await.unwrap().unwrap().recv(Lane::Urgent).await.unwrap().unwrap().kind, 3);
}

/// A hello as a peer of another release would say it.
fn foreign_hello(versions: Versions, verdict: Verdict) -> Hello {
    Hello {
        versions,
        verdict,
        role: Role::Urgent,
        bulk_connections: 1,
        session: SessionId([7; 16]),
        attempt: 1,
        received: NextExpected::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_another_release_is_told_both_sides_versions() {
    let installation = Installation::new();
    let (address, streams) = listen().await;
    let target = tokio::spawn(Session::accept(accept_config(installation.host("hostb")), streams));
    let source = installation.host("hosta");
    let connector = TlsConnector::from(tls::client_config(&source, &host_name("hostb")).unwrap());
    for foreign in [Versions { lowest: 7, highest: 8 }, Versions { lowest: 0, highest: 0 }] {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = Route::Migration("web1-1".to_owned()).server_name().unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        stream.write_all(&foreign_hello(foreign, Verdict::Offer).encode()).await.unwrap();
        let mut answer = [0; HELLO_BYTES];
        stream.read_exact(&mut answer).await.unwrap();
        let answer = Hello::decode(&answer).unwrap();
        assert_eq!((answer.verdict, answer.versions), (Verdict::Refuse(Refusal::Version), VERSIONS));
    }
    // One of this release is still welcome.
    Session::connect(connect_config(address, source, 1)).await.unwrap();
    target.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_of_another_release_is_named_with_both_sides_versions() {
    let installation = Installation::new();
    let (address, mut streams) = listen().await;
    let acceptor = TlsAcceptor::from(tls::server_config(&installation.host("hostb")).unwrap());
    tokio::spawn(async move {
        while let Some(stream) = streams.recv().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut offer = [0; HELLO_BYTES];
            stream.read_exact(&mut offer).await.unwrap();
            let versions = Versions { lowest: 7, highest: 8 };
            let offer = Hello::decode(&offer).unwrap();
            let answer = Hello { versions, verdict: Verdict::Refuse(Refusal::Version), ..offer };
            stream.write_all(&answer.encode()).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    let error = Session::connect(connect_config(address, installation.host("hosta"), 1)).await.unwrap_err();
    assert!(error.to_string().contains("(it speaks versions 7 to 8, this host 1 to 1)"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_not_there_is_named() {
    let installation = Installation::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = Session::connect(connect_config(address, installation.host("hosta"), 1)).await.unwrap_err();
    assert!(matches!(error, SessionError::LinkLost { cause: LinkError::Io { .. }, .. }), "{error}");
    assert!(error.to_string().contains("hostb"), "{error}");
}

/// A relay whose connections can all be cut; it accepts new ones after that.
async fn relay(to: SocketAddr) -> (SocketAddr, watch::Sender<u32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (cut, cuts) = watch::channel(0);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut cuts = cuts.clone();
            cuts.mark_unchanged();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(to).await.unwrap();
                tokio::select! {
                    _ = copy_bidirectional(&mut near, &mut far) => {}
                    _ = cuts.changed() => {}
                }
            });
        }
    });
    (address, cut)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_outlives_its_connections() {
    let installation = Installation::new();
    let (address, streams): (_, mpsc::Receiver<TcpStream>) = listen().await;
    let (address, cut) = relay(address).await;
    let timeouts = Timeouts { reconnect: Duration::from_secs(30), ..Timeouts::default() };
    let source = ConnectConfig {
        timeouts: timeouts.clone(),
        ..connect_config(address, installation.host("hosta"), 3)
    };
    let target = AcceptConfig { timeouts, ..accept_config(installation.host("hostb")) };
    let (source, target) = tokio::join!(Session::connect(source), Session::accept(target, streams));
    let (source, target) = (source.unwrap(), target.unwrap());
    for lane in Lane::ALL {
        tokio::spawn(send_all(source.clone(), lane));
    }
    let cutting = async {
        for _ in 0..5 {
            cut.send_modify(|cuts| *cuts += 1);
            tokio::time::sleep(Duration::from_millis(120)).await;
        }
    };
    tokio::join!(expect_all(&target, Lane::Urgent), expect_all(&target, Lane::Bulk), cutting);
    source.close().await.unwrap();
    assert!(target.recv(Lane::Bulk).await.unwrap().is_none());
}
