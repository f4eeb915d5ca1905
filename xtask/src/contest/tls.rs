//! What QEMU's own TLS needs: an authority, and a certificate for each host (QEMU's docs/system/tls.rst).

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use godwit_sim::lab::{Lab, Place};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

/// The name of the object that has them.
pub(super) const ID: &str = "tls0";
/// Hosts that may be in a lab.
const HOSTS: [Place; 2] = [Place::A, Place::B];

/// A host's certificate and the authority's, where QEMU finds them.
pub(super) struct Credentials {
    directory: PathBuf,
    is_server: bool,
}

impl Credentials {
    /// Makes those of all hosts of a lab, if that hasn't been done.
    ///
    /// # Errors
    /// When they can't be made or written.
    pub(super) fn make(lab: &Lab, host: Place) -> Result<Credentials> {
        let directory = |host: Place| lab.directory().join("tls").join(host.name());
        if !directory(host).exists() {
            let authority = authority().context("cannot make a certificate authority")?;
            for host in HOSTS {
                issue(&authority, host, directory(host)).context("cannot make a certificate")?;
            }
        }
        Ok(Credentials { directory: directory(host), is_server: host == Place::B })
    }

    /// The arguments by which a QEMU has them. Whoever listens asks for the other's certificate too.
    pub(super) fn arguments(&self) -> [String; 2] {
        let (endpoint, directory) = (endpoint(self.is_server), self.directory.display());
        let object = format!("tls-creds-x509,id={ID},dir={directory},endpoint={endpoint},verify-peer=on");
        ["-object".to_owned(), object]
    }
}

fn endpoint(is_server: bool) -> &'static str {
    if is_server { "server" } else { "client" }
}

fn authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, "lab");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Ok(CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?)
}

/// Writes a host's certificate, its key and the authority's certificate under the names that QEMU looks for.
fn issue(authority: &CertifiedIssuer<'static, KeyPair>, host: Place, directory: PathBuf) -> Result<()> {
    let mut parameters = CertificateParams::new([host.name().to_owned()])?;
    parameters.distinguished_name.push(DnType::CommonName, host.name());
    parameters.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let certificate = parameters.signed_by(&key, authority)?;
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("ca-cert.pem"), authority.pem())?;
    let endpoint = endpoint(host == Place::B);
    fs::write(directory.join(format!("{endpoint}-cert.pem")), certificate.pem())?;
    fs::write(directory.join(format!("{endpoint}-key.pem")), key.serialize_pem())?;
    Ok(())
}
