//! A host's identity and how it is obtained.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pem::Pem;
use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::{
    AUTHORITY_CERTIFICATE_FILE, FileError, HOST_CERTIFICATE_FILE, HOST_KEY_FILE, HOST_REQUEST_FILE, HostName,
    authority,
    files::{self, Access},
};
use crate::tls;

const CERTIFICATE_TAG: &str = "CERTIFICATE";
const KEY_TAG: &str = "PRIVATE KEY";

/// What a host shows its peers, and what it judges theirs by.
#[derive(Debug)]
pub struct HostIdentity {
    name: HostName,
    expires: SystemTime,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// Why a host's identity can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// One of its files.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file holds no PEM of the expected kind, or a certificate that can't be read.
    #[error("{what} cannot be read: {reason}")]
    Malformed {
        /// Which part of the identity.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The certificate's time is over.
    #[error("the certificate of {name} expired on {expired}: let it join again")]
    Expired {
        /// The host.
        name: HostName,
        /// When it expired.
        expired: String,
    },
    /// The certificate was signed by another authority, or isn't valid for this use.
    #[error("the certificate of {name} is not accepted by its authority")]
    NotAccepted {
        /// The host.
        name: HostName,
        /// The verifier's reason.
        source: rustls::Error,
    },
    /// Certificate and key don't belong together.
    #[error("the certificate of {name} does not belong to the private key")]
    OtherKey {
        /// The host.
        name: HostName,
        /// The reason.
        source: rustls::Error,
    },
}

/// Why a host could not ask for or take an identity.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// One of the files.
    #[error(transparent)]
    File(#[from] FileError),
    /// No key or request could be made.
    #[error("cannot make a certificate request for {name}")]
    Request {
        /// The host.
        name: HostName,
        /// The reason.
        source: rcgen::Error,
    },
    /// The bundle isn't one, or doesn't fit the key that asked for it.
    #[error("the bundle is not accepted")]
    Bundle(#[source] IdentityError),
}

/// A host's request for a certificate, and the key that belongs to it.
#[derive(Debug)]
pub struct JoinRequest {
    pem: String,
}

impl JoinRequest {
    /// Makes a key and a request in `directory` (`host.key`, `host.csr`).
    ///
    /// # Errors
    /// Where the host has a key already, or a file can't be written.
    pub fn create(directory: &Path, name: &HostName) -> Result<Self, JoinError> {
        let failed = |source| JoinError::Request { name: name.clone(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let pem = authority::request_pem(name, &key).map_err(failed)?;
        files::create_directory(directory)?;
        files::create(&directory.join(HOST_KEY_FILE), Access::OwnerOnly, &key.serialize_pem())?;
        files::create(&directory.join(HOST_REQUEST_FILE), Access::Public, &pem)?;
        Ok(Self { pem })
    }

    /// The request, to be taken to the authority; it holds no secret.
    pub fn pem(&self) -> &str {
        &self.pem
    }
}

impl HostIdentity {
    /// Takes the authority's answer: a bundle for the key that [`JoinRequest::create`] made, or one with a key of its
    /// own. Everything is verified before a file is written; a failure leaves the directory as it was.
    ///
    /// # Errors
    /// Where the bundle is damaged, expired or for another key, or the host has joined already.
    pub fn join(directory: &Path, bundle_pem: &str, now: SystemTime) -> Result<Self, JoinError> {
        let bundle = Sections::parse("the bundle", bundle_pem).map_err(JoinError::Bundle)?;
        let key_file = directory.join(HOST_KEY_FILE);
        let key = match &bundle.key {
            Some(key) => key.clone(),
            None => read_key(&key_file).map_err(JoinError::Bundle)?,
        };
        let [certificate, authority] = bundle.certificates().map_err(JoinError::Bundle)?;
        let identity = Self::verified(certificate, authority, key, now).map_err(JoinError::Bundle)?;
        files::create_directory(directory)?;
        if let Some(key) = &bundle.key {
            files::create(&key_file, Access::OwnerOnly, &pem::encode(key))?;
        }
        let write = |file, der: &[u8]| {
            let text = pem::encode(&Pem::new(CERTIFICATE_TAG, der));
            files::create(&directory.join(file), Access::Public, &text)
        };
        write(AUTHORITY_CERTIFICATE_FILE, &identity.authority)?;
        write(HOST_CERTIFICATE_FILE, &identity.certificate)?;
        Ok(identity)
    }

    /// Opens the identity in `directory` and verifies it as a peer would.
    ///
    /// # Errors
    /// One line on what is wrong: a file missing or too open, expired, signed by another authority, not its key.
    pub fn open(directory: &Path, now: SystemTime) -> Result<Self, IdentityError> {
        let [certificate] = read_certificate(&directory.join(HOST_CERTIFICATE_FILE))?;
        let [authority] = read_certificate(&directory.join(AUTHORITY_CERTIFICATE_FILE))?;
        let key = read_key(&directory.join(HOST_KEY_FILE))?;
        Self::verified(certificate, authority, key, now)
    }

    /// This host's name.
    pub fn name(&self) -> &HostName {
        &self.name
    }

    /// When the certificate ends.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(crate) fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    pub(crate) fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }

    fn verified(
        certificate: CertificateDer<'static>,
        authority: CertificateDer<'static>,
        key: Pem,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let key = PrivateKeyDer::try_from(key.into_contents()).map_err(|reason| {
            IdentityError::Malformed { what: "the private key", reason: reason.to_owned() }
        })?;
        let facts = facts(&certificate)?;
        let name = facts.name;
        if facts.expires <= now {
            return Err(IdentityError::Expired { name, expired: facts.expires_text });
        }
        tls::verify_identity(&certificate, &authority, &name, now)
            .map_err(|source| IdentityError::NotAccepted { name: name.clone(), source })?;
        tls::verify_key(&certificate, &key)
            .map_err(|source| IdentityError::OtherKey { name: name.clone(), source })?;
        Ok(Self { name, expires: facts.expires, certificate, authority, key })
    }
}

/// The host that a certificate names.
///
/// # Errors
/// Where the certificate can't be read, or doesn't carry exactly one DNS name.
pub(crate) fn certified_name(certificate: &CertificateDer<'_>) -> Result<HostName, IdentityError> {
    facts(certificate).map(|facts| facts.name)
}

struct Facts {
    name: HostName,
    expires: SystemTime,
    expires_text: String,
}

fn facts(certificate: &CertificateDer<'_>) -> Result<Facts, IdentityError> {
    let malformed = |reason: String| IdentityError::Malformed { what: "the host's certificate", reason };
    let (_, parsed) = parse_x509_certificate(certificate).map_err(|error| malformed(error.to_string()))?;
    let extension = parsed.subject_alternative_name().map_err(|error| malformed(error.to_string()))?;
    let names = extension.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let [GeneralName::DNSName(name)] = names else {
        return Err(malformed("it must carry exactly one DNS name".to_owned()));
    };
    let name = name.parse().map_err(|error: super::InvalidHostName| malformed(error.to_string()))?;
    let not_after = parsed.validity().not_after;
    let seconds = u64::try_from(not_after.timestamp()).unwrap_or(0);
    Ok(Facts {
        name,
        expires: UNIX_EPOCH + Duration::from_secs(seconds),
        expires_text: not_after.to_string(),
    })
}

/// What a PEM text holds: certificates in their order, and a private key perhaps.
struct Sections {
    what: &'static str,
    certificates: Vec<CertificateDer<'static>>,
    key: Option<Pem>,
}

impl Sections {
    fn parse(what: &'static str, text: &str) -> Result<Self, IdentityError> {
        let mut sections = Self { what, certificates: Vec::new(), key: None };
        let parsed = pem::parse_many(text)
            .map_err(|error| IdentityError::Malformed { what, reason: error.to_string() })?;
        for section in parsed {
            match section.tag() {
                CERTIFICATE_TAG => sections.certificates.push(section.into_contents().into()),
                KEY_TAG => sections.key = Some(section),
                tag => {
                    let reason = format!("it holds {tag:?}, which does not belong there");
                    return Err(IdentityError::Malformed { what, reason });
                }
            }
        }
        Ok(sections)
    }

    fn certificates<const N: usize>(&self) -> Result<[CertificateDer<'static>; N], IdentityError> {
        self.certificates.clone().try_into().map_err(|found: Vec<_>| IdentityError::Malformed {
            what: self.what,
            reason: format!("it must hold {N} certificates and holds {}", found.len()),
        })
    }
}

fn read_certificate(path: &Path) -> Result<[CertificateDer<'static>; 1], IdentityError> {
    Sections::parse("a certificate file", &files::read(path, Access::Public)?)?.certificates()
}

fn read_key(path: &Path) -> Result<Pem, IdentityError> {
    let what = "the private key";
    let sections = Sections::parse(what, &files::read(path, Access::OwnerOnly)?)?;
    sections.key.ok_or_else(|| IdentityError::Malformed { what, reason: "there is none".to_owned() })
}
