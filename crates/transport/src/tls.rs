//! TLS 1.3 between hosts: mutual, one authority, and a peer is whoever its certificate names.
//!
//! The server name in a ClientHello only routes ([`crate::route`]). A client verifies the server's certificate against
//! the *host* it wants to talk to; a server learns from [`peer_name`] who it is talking to and decides.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    server::WebPkiClientVerifier,
    sign::CertifiedKey,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::identity::{HostIdentity, HostName, IdentityError, certified_name};

/// Why a TLS configuration can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The authority's certificate can't be used to verify peers.
    #[error("the authority's certificate cannot be used")]
    Authority(#[source] rustls::server::VerifierBuilderError),
    /// Certificate, key or provider don't fit.
    #[error("the host's identity cannot be used for tls")]
    Identity(#[from] rustls::Error),
}

/// Why a connection's peer has no name.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The handshake isn't over, or the peer showed no certificate.
    #[error("the peer has shown no certificate")]
    Unknown,
    /// The certificate names no host.
    #[error("the peer's certificate names no host")]
    Unnamed(#[source] IdentityError),
}

/// The configuration of a connection to the host `peer`.
///
/// # Errors
/// Where the identity doesn't fit together.
pub fn client_config(identity: &HostIdentity, peer: &HostName) -> Result<Arc<ClientConfig>, ConfigError> {
    let verifier =
        HostVerifier { authority: server_verifier(identity.authority())?, host: server_name(peer) };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(vec![identity.certificate().clone()], identity.key().clone_key())?;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The configuration of accepted connections: any host of the same authority gets through; [`peer_name`] says which.
///
/// # Errors
/// Where the identity doesn't fit together.
pub fn server_config(identity: &HostIdentity) -> Result<Arc<ServerConfig>, ConfigError> {
    let roots = roots(identity.authority())?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(ConfigError::Authority)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate().clone()], identity.key().clone_key())?;
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The host at the other end of an established connection, from its verified certificate.
///
/// # Errors
/// Where there is no certificate yet, or it names no host.
pub fn peer_name(connection: &CommonState) -> Result<HostName, PeerError> {
    let certificates = connection.peer_certificates().ok_or(PeerError::Unknown)?;
    certified_name(certificates.first().ok_or(PeerError::Unknown)?).map_err(PeerError::Unnamed)
}

/// Verifies a host's certificate as a peer would.
pub(crate) fn verify_identity(
    certificate: &CertificateDer<'_>,
    authority: &CertificateDer<'static>,
    name: &HostName,
    now: SystemTime,
) -> Result<(), Error> {
    let verifier = server_verifier(authority).map_err(|error| Error::General(error.to_string()))?;
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    verifier.verify_server_cert(certificate, &[], &server_name(name), &[], now).map(drop)
}

/// Verifies that a certificate and a key belong together.
pub(crate) fn verify_key(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
) -> Result<(), Error> {
    let key = provider().key_provider.load_private_key(key.clone_key())?;
    CertifiedKey::new(vec![certificate.clone()], key).keys_match()
}

/// Ring, with AES-128-GCM preferred: it seals faster than AES-256 and is no easier to break in practice.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    let preferred = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != preferred);
    Arc::new(provider)
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

fn server_verifier(authority: &CertificateDer<'static>) -> Result<Arc<WebPkiServerVerifier>, ConfigError> {
    WebPkiServerVerifier::builder_with_provider(roots(authority)?, provider())
        .build()
        .map_err(ConfigError::Authority)
}

fn server_name(host: &HostName) -> ServerName<'static> {
    ServerName::try_from(host.as_str().to_owned()).expect("every host name is a DNS name")
}

/// Verifies that the server is `host`, whatever server name the connection was routed by.
#[derive(Debug)]
struct HostVerifier {
    authority: Arc<WebPkiServerVerifier>,
    host: ServerName<'static>,
}

impl ServerCertVerifier for HostVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _routed_by: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.authority.verify_server_cert(end_entity, intermediates, &self.host, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.authority.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.authority.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.supported_verify_schemes()
    }
}
