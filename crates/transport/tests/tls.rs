//! Who gets through TLS, and whom a connection is routed to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod hosts;

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use godwit_transport::{
    identity::{HostIdentity, HostName, IdentityError, JoinRequest, Validity},
    route::{self, Route, RouteError},
    tls,
};
use hosts::{DAY, Installation, host_name, listen};
use rustls::{
    ClientConfig, RootCertStore, SignatureScheme, client::ResolvesClientCert, crypto::ring,
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

type Outcome<T> = (io::Result<()>, T);

/// Connects `client` to a server with `identity`; returns what the client saw and whom the server saw.
async fn shake(client: Arc<ClientConfig>, identity: &HostIdentity) -> Outcome<io::Result<HostName>> {
    let (address, mut streams) = listen().await;
    let server = async {
        let acceptor = TlsAcceptor::from(tls::server_config(identity).unwrap());
        let mut stream = acceptor.accept(streams.recv().await.unwrap()).await?;
        stream.write_all(b"x").await?;
        stream.shutdown().await?;
        tls::peer_name(stream.get_ref().1).map_err(io::Error::other)
    };
    let client = async {
        let stream = TcpStream::connect(address).await?;
        let name = Route::Agent.server_name().unwrap();
        // In TLS 1.3 a client learns only when it reads that the server refused its certificate.
        TlsConnector::from(client).connect(name, stream).await?.read_u8().await.map(drop)
    };
    tokio::join!(client, server)
}

fn expect_failure<T: std::fmt::Debug>(result: io::Result<T>, reason: &str) {
    let error = result.unwrap_err();
    assert!(error.to_string().contains(reason), "{error}");
}

#[tokio::test]
async fn hosts_of_one_authority_know_each_other() {
    let installation = Installation::new();
    let (a, b) = (installation.host("hosta"), installation.host("hostb"));
    let (client, server) = shake(tls::client_config(&a, b.name()).unwrap(), &b).await;
    client.unwrap();
    assert_eq!(server.unwrap(), host_name("hosta"));
}

#[tokio::test]
async fn a_server_with_another_name_is_refused() {
    let installation = Installation::new();
    let (a, b) = (installation.host("hosta"), installation.host("hostb"));
    let (client, server) = shake(tls::client_config(&a, &host_name("hostc")).unwrap(), &b).await;
    expect_failure(client, "not valid for name");
    server.unwrap_err();
}

#[tokio::test]
async fn hosts_of_another_authority_are_refused() {
    let (ours, theirs) = (Installation::new(), Installation::new());
    let (a, b) = (ours.host("hosta"), theirs.host("hostb"));
    let (client, server) = shake(tls::client_config(&a, b.name()).unwrap(), &b).await;
    expect_failure(client, "UnknownIssuer");
    server.unwrap_err();
}

#[tokio::test]
async fn a_client_of_another_authority_is_refused() {
    let (ours, theirs) = (Installation::new(), Installation::new());
    let b = ours.host("hostb");
    let client = client_that_trusts(&ours, &theirs.host("hosta"));
    let (client, server) = shake(client, &b).await;
    client.unwrap_err();
    expect_failure(server, "UnknownIssuer");
}

#[tokio::test]
async fn expired_hosts_are_refused() {
    let installation = Installation::new();
    let long_ago = SystemTime::now() - 3 * DAY;
    let (a, b) = (installation.host_at("hosta", long_ago), installation.host("hostb"));
    let (client, server) = shake(tls::client_config(&a, b.name()).unwrap(), &b).await;
    client.unwrap_err();
    expect_failure(server, "expired");
    let (client, server) = shake(tls::client_config(&b, a.name()).unwrap(), &a).await;
    expect_failure(client, "expired");
    server.unwrap_err();
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let installation = Installation::new();
    let b = installation.host("hostb");
    let mut config = (*tls::client_config(&installation.host("hosta"), b.name()).unwrap()).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let (client, server) = shake(Arc::new(config), &b).await;
    client.unwrap_err();
    expect_failure(server, "sent no certificates");
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let installation = Installation::new();
    let b = installation.host("hostb");
    let (client, server) = shake(plain_client(&installation, &[&rustls::version::TLS12]), &b).await;
    client.unwrap_err();
    expect_failure(server, "incompatible");
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// The authority's certificate, as anyone can read it off a bundle.
fn authority_of(installation: &Installation) -> RootCertStore {
    let validity = Validity::starting(SystemTime::now(), DAY);
    let bundle = installation.authority.issue(&host_name("nobody"), validity).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::pem_slice_iter(bundle.as_bytes()).nth(1).unwrap().unwrap()).unwrap();
    roots
}

fn plain_client(
    installation: &Installation,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(authority_of(installation))
        .with_no_client_auth();
    Arc::new(config)
}

/// A client with the certificate of `identity` that would believe a server of `installation`.
fn client_that_trusts(installation: &Installation, identity: &HostIdentity) -> Arc<ClientConfig> {
    let own = tls::client_config(identity, &host_name("hostb")).unwrap();
    let trusting = installation.host("hostz");
    let mut config = (*tls::client_config(&trusting, &host_name("hostb")).unwrap()).clone();
    config.client_auth_cert_resolver = own.client_auth_cert_resolver.clone();
    Arc::new(config)
}

#[test]
fn an_identity_says_what_is_wrong_with_it() {
    let installation = Installation::new();
    let now = SystemTime::now();
    let scratch = tempfile::tempdir().unwrap();
    let name = host_name("hostb");
    let validity = Validity::starting(now, DAY);
    let bundle = installation.authority.issue(&name, validity).unwrap();
    let identity = HostIdentity::join(scratch.path(), &bundle, now).unwrap();
    assert!(identity.expires() <= now + DAY && identity.expires() > now + DAY - Duration::from_secs(2));
    let expired = HostIdentity::open(scratch.path(), now + 2 * DAY).unwrap_err();
    assert!(matches!(expired, IdentityError::Expired { .. }), "{expired}");
    let other = Installation::new().authority.issue(&name, validity).unwrap();
    let (_, authority) = other.split_once("-----END CERTIFICATE-----\n").unwrap();
    let (authority, _) = authority.split_once("-----BEGIN PRIVATE").unwrap();
    std::fs::write(scratch.path().join("ca.pem"), authority).unwrap();
    let foreign = HostIdentity::open(scratch.path(), now).unwrap_err();
    assert!(matches!(foreign, IdentityError::NotAccepted { .. }), "{foreign}");
}

#[test]
fn a_bundle_for_another_key_is_refused_and_leaves_nothing() {
    let installation = Installation::new();
    let now = SystemTime::now();
    let scratch = tempfile::tempdir().unwrap();
    let name = host_name("hostb");
    let directories = ["one", "two"].map(|name| scratch.path().join(name));
    let [request, _] = directories.each_ref().map(|directory| JoinRequest::create(directory, &name).unwrap());
    let validity = Validity::starting(now, DAY);
    let bundle = installation.authority.sign(&name, request.pem(), validity).unwrap();
    let error = HostIdentity::join(&directories[1], &bundle, now).unwrap_err();
    assert!(error.to_string().contains("bundle"), "{error}");
    assert!(!directories[1].join("host.pem").exists());
    HostIdentity::join(&directories[0], &bundle, now).unwrap();
    let other_name = installation.authority.sign(&host_name("hostc"), request.pem(), validity);
    assert!(other_name.unwrap_err().to_string().contains("not for hostc"));
}

#[tokio::test]
async fn a_connection_is_routed_untouched() {
    let installation = Installation::new();
    let (a, b) = (installation.host("hosta"), installation.host("hostb"));
    let (address, mut streams) = listen().await;
    let route = Route::Migration("web1-7".to_owned());
    let client = tls::client_config(&a, b.name()).unwrap();
    let name = route.server_name().unwrap();
    let client = tokio::spawn(async move {
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(client).connect(name, stream).await.unwrap().read_u8().await.unwrap()
    });
    let stream = streams.recv().await.unwrap();
    assert_eq!(route::peek(&stream).await.unwrap(), route);
    // What a worker gets is a file descriptor.
    let stream = TcpStream::from_std(stream.into_std().unwrap()).unwrap();
    let acceptor = TlsAcceptor::from(tls::server_config(&b).unwrap());
    let mut stream = acceptor.accept(stream).await.unwrap();
    stream.write_u8(7).await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(client.await.unwrap(), 7);
}

/// The first bytes of a client that asks for `name`.
fn client_hello(installation: &Installation, name: &str) -> Vec<u8> {
    let config = plain_client(installation, &[&rustls::version::TLS13]);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn a_client_hello_may_come_in_pieces() {
    let bytes = client_hello(&Installation::new(), "agent");
    let (address, mut streams) = listen().await;
    let mut client = TcpStream::connect(address).await.unwrap();
    let stream = streams.recv().await.unwrap();
    let peeking = tokio::spawn(async move { route::peek(&stream).await });
    for piece in bytes.chunks(50) {
        client.write_all(piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    assert_eq!(peeking.await.unwrap().unwrap(), Route::Agent);
}

#[tokio::test]
async fn what_cannot_be_routed_is_named() {
    let installation = Installation::new();
    let parse = |bytes: &[u8]| route::parse_client_hello(bytes);
    let hello = client_hello(&installation, "somebody");
    assert!(matches!(parse(&hello), Err(RouteError::Unknown { name: Some(_) })));
    for cut in [0, 1, 5, 20, hello.len() - 1] {
        assert!(matches!(parse(&hello[..cut]), Ok(None)), "{cut}");
    }
    assert!(matches!(parse(b"GET / HTTP/1.1\r\n\r\n"), Err(RouteError::NotTls { .. })));
    let bad = Route::Migration("Web1".to_owned()).server_name();
    assert!(matches!(bad, Err(RouteError::Unknown { .. })));
}

#[tokio::test]
async fn a_client_that_leaves_within_its_hello_is_noticed() {
    let bytes = client_hello(&Installation::new(), "agent");
    let (address, mut streams) = listen().await;
    let mut client = TcpStream::connect(address).await.unwrap();
    let stream = streams.recv().await.unwrap();
    client.write_all(&bytes[..40]).await.unwrap();
    drop(client);
    assert!(matches!(route::peek(&stream).await, Err(RouteError::Ended)));
}
