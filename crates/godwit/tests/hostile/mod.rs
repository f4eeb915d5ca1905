//! Peers that misbehave, over real sockets: the agent refuses them in one line and goes on for the others.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    time::{Duration, SystemTime},
};

use godwit_migration::wire::{self, Hello, Message, TransferOptions};
use godwit_transport::{
    identity::{Authority, HostIdentity, Validity},
    route::Route,
    session::{ConnectConfig, Lane, Limits, Session, Timeouts},
    tls,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    host::{Host, Site, free_port},
    peer,
};

const ID: &str = "00112233445566";

/// A host with the agent under test, and another one's certificate.
struct Scene {
    host: Host,
    agent: SocketAddr,
    identity: HostIdentity,
    _site: Site,
}

impl Scene {
    /// `hostb`, which accepts machines of `hosta`; the certificate is that of `name`.
    fn new(name: &str) -> Self {
        let site = Site::new();
        let agent = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let host = site.host("hostb", agent.port(), &peer("hosta", 1, "may_send = true"));
        let authority = Authority::open(&site.path("ca")).unwrap();
        let now = SystemTime::now();
        let validity = Validity::starting(now, Duration::from_secs(3600));
        let bundle = authority.issue(&name.parse().unwrap(), validity).unwrap();
        let identity = HostIdentity::join(&site.path("peer.id"), &bundle, now).unwrap();
        Self { host, agent, identity, _site: site }
    }

    /// A connection with the agent's API for agents.
    async fn connect(&self) -> TlsStream<TcpStream> {
        let config = tls::client_config(&self.identity, &"hostb".parse().unwrap()).unwrap();
        let stream = TcpStream::connect(self.agent).await.unwrap();
        TlsConnector::from(config).connect(Route::Agent.server_name().unwrap(), stream).await.unwrap()
    }

    /// Sends these bytes; the status and the body of the answer.
    async fn send(&self, bytes: &[u8]) -> (u16, Value) {
        let mut stream = self.connect().await;
        // It may answer and close before it has everything.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        parse(&String::from_utf8(answer).unwrap())
    }

    async fn offer(&self, versions: &str, body: &str) -> (u16, Value) {
        self.send(request("POST", "/v1/incoming", versions, body).as_bytes()).await
    }

    /// The agent still answers its operator, and has begun nothing.
    fn is_well(&self) {
        assert_eq!(self.host.http("GET", "/v1/health", "").0, 200);
        assert_eq!(self.host.http("GET", "/v1/machines", "").1, json!([]));
        assert_eq!(self.host.http("GET", "/v1/migrations", "").1, json!([]));
    }
}

fn request(method: &str, path: &str, versions: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: godwit\r\nconnection: close\r\ngodwit-versions: {versions}\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

fn parse(answer: &str) -> (u16, Value) {
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, serde_json::from_str(body).unwrap_or_default())
}

fn said(answer: &(u16, Value), status: u16, message: &str) {
    let text = answer.1["message"].as_str().unwrap_or_default();
    assert!(answer.0 == status && text.contains(message) && text.lines().count() == 1, "{answer:?}");
}

/// An offer of a machine without anything.
fn offer() -> Value {
    json!({
        "id": format!("{ID}77"),
        "spec": { "name": "web1", "machine": "pc-i440fx-10.0", "memory": "16M", "accel": "tcg" },
        "epoch": 1,
        "options": {},
        "qemu_version": "10.0.2",
        "memory_bytes": 16 << 20,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_certificate_is_no_permission() {
    let scene = Scene::new("hostc");
    for (method, path) in [
        ("POST", "/v1/incoming"),
        ("DELETE", "/v1/incoming/0011223344556677"),
        ("POST", "/v1/handover"),
        ("GET", "/v1/machines"),
    ] {
        let answer = scene.send(request(method, path, "1-1", "{}").as_bytes()).await;
        assert!(matches!(answer.0, 404 | 409), "{answer:?}");
        if answer.0 == 409 {
            said(&answer, 409, "hostc isn't among [peers]");
        }
    }
    said(&scene.offer("1-1", &offer().to_string()).await, 409, "hostc isn't among [peers]");
    scene.is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_of_other_releases_are_told_both_versions() {
    let scene = Scene::new("hosta");
    let said_versions = |answer: &(u16, Value), theirs: &str| {
        said(answer, 409, &format!("hosta speaks {theirs} between agents, this host versions 1 to 1"));
    };
    // What it sends besides need not make sense here: it is from the future.
    said_versions(&scene.offer("7-8", r#"{"everything":"else"}"#).await, "versions 7 to 8");
    said_versions(&scene.offer("0-0", "{}").await, "versions 0 to 0");
    said_versions(&scene.offer("", "{}").await, "no version that can be read");
    said(&scene.offer("1-2", "{}").await, 400, "missing field");
    scene.is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_another_release_is_told_both_versions() {
    let scene = Scene::new("hosta");
    let accepted = scene.offer("1-1", &offer().to_string()).await;
    assert_eq!(accepted.0, 200, "{accepted:?}");
    let session = Session::connect(ConnectConfig {
        address: scene.agent,
        route: Route::Migration(format!("{ID}77")),
        peer: "hostb".parse().unwrap(),
        identity: std::sync::Arc::new(scene.identity),
        bulk_connections: 1,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
    })
    .await
    .unwrap();
    let hello = Message::Hello(Box::new(Hello {
        version_min: 7,
        version_max: 8,
        migration_id: format!("{ID}77"),
        machine: "web1".to_owned(),
        epoch: godwit_migration::handover::Epoch(1),
        ram_blocks: vec![],
        options: TransferOptions::default(),
        qemu_version: "10.0.2".to_owned(),
        machine_type: "pc-i440fx-10.0".to_owned(),
    }));
    let (kind, body) = wire::encode(&hello).unwrap();
    session.send(Lane::Urgent, kind, body).await.unwrap();
    let answer = session.recv(Lane::Urgent).await.unwrap().unwrap();
    let Message::Refuse(refuse) = wire::decode(answer.kind, &answer.payload).unwrap() else {
        panic!("{answer:?}");
    };
    assert!(
        refuse.reason.contains("versions 7 to 8") && refuse.reason.contains("this host 2 to 2"),
        "{refuse:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_no_requests_are_refused() {
    let scene = Scene::new("hosta");
    let deep = "[".repeat(200_000);
    for body in ["", "null", "{}", "\u{0}", "{\"id\":", deep.as_str(), &format!("{{\"id\":{deep}")] {
        let answer = scene.offer("1-1", body).await;
        said(&answer, 400, "");
    }
    let huge = scene.offer("1-1", &" ".repeat(3 << 20)).await;
    assert!(matches!(huge.0, 0 | 400), "{huge:?}");
    let mut many = offer();
    many["spec"]["extra"] = json!(vec!["-no-reboot"; 100_000]);
    assert_eq!(scene.offer("1-1", &many.to_string()).await.0, 400);
    for garbage in [&b"\x00\x01\x02\xff\xfe\r\n\r\n"[..], b"GET", b"POST /v1/incoming HTTP/9.9\r\n\r\n"] {
        assert_ne!(scene.send_and_close(garbage).await.0, 200);
    }
    scene.is_well();
}

impl Scene {
    /// As [`Self::send`], from a peer that has nothing more to say.
    async fn send_and_close(&self, bytes: &[u8]) -> (u16, Value) {
        let mut stream = self.connect().await;
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        parse(&String::from_utf8_lossy(&answer))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_is_given_up() {
    let scene = Scene::new("hosta");
    let whole = request("POST", "/v1/incoming", "1-1", &offer().to_string());
    let answer = scene.send(&whole.as_bytes()[..whole.len() - 9]).await;
    said(&answer, 400, "isn't complete after 10 s");
    scene.is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_offered_only_so_often() {
    let scene = Scene::new("hosta");
    let mut refused = 0;
    for _ in 0..60 {
        let answer = scene.offer("1-1", "{}").await;
        match answer.0 {
            400 => {}
            _ => {
                said(&answer, 409, "hosta offers machines too often; it may again in");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    scene.is_well();
}

/// Silent connections from one address of the loopback network.
async fn silent(agent: SocketAddr, from: Ipv4Addr, count: usize) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((from, 0))).unwrap();
        streams.push(socket.connect(agent).await.unwrap());
    }
    streams
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_of_one_address_leave_room_for_others_and_end() {
    let scene = Scene::new("hosta");
    let mut silent = silent(scene.agent, Ipv4Addr::new(127, 0, 0, 2), 60).await;
    // Half of a TLS record, one byte now and then.
    for stream in &mut silent {
        let _ = stream.write_all(&[22, 3, 1]).await;
    }
    // From 127.0.0.1, while the others hold all they can get.
    said(&scene.offer("1-1", "{}").await, 400, "missing field");
    for mut stream in silent {
        let mut byte = [0];
        // Closed by the agent, at once or when its time is over.
        assert!(matches!(stream.read(&mut byte).await, Ok(0) | Err(_)));
    }
    scene.is_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_connections_is_cut_and_the_agent_goes_on() {
    let scene = Scene::new("hosta");
    let flooder = Ipv4Addr::new(127, 0, 0, 3);
    let mut cut = 0;
    for _ in 0..20 {
        for mut stream in silent(scene.agent, flooder, 30).await {
            let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            cut += usize::from(answer.is_empty());
        }
    }
    assert!(cut > 0);
    said(&scene.offer("1-1", "{}").await, 400, "missing field");
    scene.is_well();
}

#[test]
fn the_operators_socket_takes_garbage_and_goes_on() {
    let site = Site::new();
    let host = site.host("hosta", 0, "");
    let deep = "[".repeat(200_000);
    for body in [deep.as_str(), "\u{0}", "{\"spec\":"] {
        assert_eq!(host.http("POST", "/v1/machines", body).0, 400);
    }
    for garbage in [&b"\x00\x01\xff\r\n\r\n"[..], b"POST /v1/machines HTTP/1.1\r\ncontent-length: -1\r\n\r\n"]
    {
        let mut stream = UnixStream::connect(host.socket()).unwrap();
        stream.write_all(garbage).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let mut stream = UnixStream::connect(host.socket()).unwrap();
    let head = format!("POST /v1/machines HTTP/1.0\r\ncontent-length: {}\r\n\r\n", 1_u64 << 40);
    stream.write_all(head.as_bytes()).unwrap();
    let _ = stream.write_all(&vec![b' '; 4 << 20]);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).contains("400"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(host.http("GET", "/v1/health", "").0, 200);
}
