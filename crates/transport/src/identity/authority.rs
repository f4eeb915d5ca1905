//! The authority that signs the hosts of one installation.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};

use super::{
    AUTHORITY_CERTIFICATE_FILE, AUTHORITY_KEY_FILE, HostName,
    files::{self, Access, FileError},
};

/// How long an authority is valid.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 86_400);

/// How far a certificate reaches into the past, for hosts whose clocks lag.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(3600);

/// The time in which a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: SystemTime,
    /// The last moment.
    pub until: SystemTime,
}

impl Validity {
    /// From an hour before `now` (clocks differ) for `lifetime` after it.
    pub fn starting(now: SystemTime, lifetime: Duration) -> Self {
        Self { from: now - CLOCK_TOLERANCE, until: now + lifetime }
    }
}

/// Signs the certificates of an installation's hosts; lives in a directory of its own.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use godwit_transport::identity::{Authority, HostIdentity, JoinRequest, Validity};
///
/// # let scratch = tempfile::tempdir()?;
/// # let (ca_dir, host_dir) = (scratch.path().join("ca"), scratch.path().join("host"));
/// let now = SystemTime::now();
/// let authority = Authority::create(&ca_dir, now)?;
/// let name = "hostb".parse()?;
/// let request = JoinRequest::create(&host_dir, &name)?;
/// let bundle = authority.sign(&name, request.pem(), Validity::starting(now, Duration::from_secs(86_400)))?;
/// let identity = HostIdentity::join(&host_dir, &bundle, now)?;
/// assert_eq!(identity.name(), &name);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Why an authority could not be created or opened, or would not sign.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// One of its files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its certificate or key is damaged, or key generation failed.
    #[error("the authority's certificate or key cannot be used")]
    Authority(#[source] rcgen::Error),
    /// The request can't be read, or wasn't signed with the key it names.
    #[error("this is not a valid certificate request")]
    Request(#[source] rcgen::Error),
    /// The request asks for another name than the operator.
    #[error("the request is for {requested}, not for {expected}")]
    OtherName {
        /// The name that the operator gave.
        expected: HostName,
        /// What the request asks for.
        requested: String,
    },
    /// The certificate could not be signed.
    #[error("cannot sign a certificate for {name}")]
    Sign {
        /// The host.
        name: HostName,
        /// The reason.
        source: rcgen::Error,
    },
}

impl Authority {
    /// Makes a new authority in `directory`: `ca.pem` and `ca.key`.
    ///
    /// # Errors
    /// Where one of the files is there already, or can't be written.
    pub fn create(directory: &Path, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Authority)?;
        let parameters = authority_parameters(&key, Validity::starting(now, AUTHORITY_LIFETIME));
        let certificate_pem = parameters.self_signed(&key).map_err(AuthorityError::Authority)?.pem();
        files::create_directory(directory)?;
        files::create(&directory.join(AUTHORITY_KEY_FILE), Access::OwnerOnly, &key.serialize_pem())?;
        files::create(&directory.join(AUTHORITY_CERTIFICATE_FILE), Access::Public, &certificate_pem)?;
        Ok(Self { certificate_pem, issuer: Issuer::new(parameters, key) })
    }

    /// Opens the authority in `directory`.
    ///
    /// # Errors
    /// Where a file is missing, damaged, or the key may be read by others.
    pub fn open(directory: &Path) -> Result<Self, AuthorityError> {
        let certificate_pem = files::read(&directory.join(AUTHORITY_CERTIFICATE_FILE), Access::Public)?;
        let key_pem = files::read(&directory.join(AUTHORITY_KEY_FILE), Access::OwnerOnly)?;
        let key = KeyPair::from_pem(&key_pem).map_err(AuthorityError::Authority)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(AuthorityError::Authority)?;
        Ok(Self { certificate_pem, issuer })
    }

    /// Signs `request_pem` for the host `name`; returns the bundle (host certificate, authority certificate) that
    /// [`HostIdentity::join`](super::HostIdentity::join) takes. It holds no secret.
    ///
    /// Only the public key and the name are taken from the request, so that it can't ask for powers.
    ///
    /// # Errors
    /// Where the request is damaged or asks for another name.
    pub fn sign(
        &self,
        name: &HostName,
        request_pem: &str,
        validity: Validity,
    ) -> Result<String, AuthorityError> {
        let request =
            CertificateSigningRequestParams::from_pem(request_pem).map_err(AuthorityError::Request)?;
        let requested = requested_name(&request.params);
        if requested != name.as_str() {
            return Err(AuthorityError::OtherName { expected: name.clone(), requested });
        }
        self.certify(name, &request.public_key, validity)
    }

    /// Makes a key and a certificate for the host `name`: the same bundle, followed by the private key.
    ///
    /// Whoever reads the bundle can act as that host; prefer [`Authority::sign`].
    ///
    /// # Errors
    /// Where no key can be generated.
    pub fn issue(&self, name: &HostName, validity: Validity) -> Result<String, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Authority)?;
        let bundle = self.certify(name, &key, validity)?;
        Ok(bundle + &key.serialize_pem())
    }

    fn certify(
        &self,
        name: &HostName,
        public_key: &impl PublicKeyData,
        validity: Validity,
    ) -> Result<String, AuthorityError> {
        let certificate = host_parameters(name, validity)
            .and_then(|parameters| parameters.signed_by(public_key, &self.issuer))
            .map_err(|source| AuthorityError::Sign { name: name.clone(), source })?;
        Ok(certificate.pem() + &self.certificate_pem)
    }
}

/// A certificate request for `name`, as PEM.
pub(super) fn request_pem(name: &HostName, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut parameters = CertificateParams::new(vec![name.as_str().to_owned()])?;
    parameters.distinguished_name = common_name(name.as_str());
    parameters.serialize_request(key)?.pem()
}

fn authority_parameters(key: &KeyPair, validity: Validity) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    // Two authorities have different names, so that a foreign certificate is told from a forged one.
    let identifier: String =
        parameters.key_identifier(key).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    parameters.distinguished_name = common_name(&format!("godwit authority {identifier}"));
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.not_before = validity.from.into();
    parameters.not_after = validity.until.into();
    parameters
}

fn host_parameters(name: &HostName, validity: Validity) -> Result<CertificateParams, rcgen::Error> {
    let mut parameters = CertificateParams::new(vec![name.as_str().to_owned()])?;
    parameters.distinguished_name = common_name(name.as_str());
    parameters.use_authority_key_identifier_extension = true;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    parameters.not_before = validity.from.into();
    parameters.not_after = validity.until.into();
    Ok(parameters)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

/// The names that a request asks for; joined where there are several, so that none equals them.
fn requested_name(parameters: &CertificateParams) -> String {
    let names = parameters.subject_alt_names.iter().map(|name| match name {
        rcgen::SanType::DnsName(name) => name.as_str().to_owned(),
        other => format!("{other:?}"),
    });
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_authority_is_private_and_not_overwritten() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("ca");
        Authority::create(&directory, SystemTime::now()).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join(AUTHORITY_KEY_FILE)), 0o600);
        let again = Authority::create(&directory, SystemTime::now()).unwrap_err();
        assert!(matches!(again, AuthorityError::File(FileError::Exists { .. })), "{again}");
        Authority::open(&directory).unwrap();
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        Authority::create(scratch.path(), SystemTime::now()).unwrap();
        let key = scratch.path().join(AUTHORITY_KEY_FILE);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Authority::open(scratch.path()).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}
