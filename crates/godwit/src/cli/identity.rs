//! `godwit ca` and `godwit join`: identities without openssl.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use godwit_transport::identity::{
    AUTHORITY_CERTIFICATE_FILE, Authority, HOST_REQUEST_FILE, HostIdentity, HostName, JoinRequest, Validity,
};
use serde_json::json;

use super::{
    arguments::{Bundle, CaVerb, Join},
    exit::Failure,
};
use crate::output::{Output, one_line};

/// Requests are a few hundred bytes, bundles a few thousand.
const PEM_BYTES_MAX: u64 = 64 * 1024;

/// What the authority does.
pub(super) fn authority(verb: CaVerb, output: Output) -> Result<(), Failure> {
    match verb {
        CaVerb::Init { ca } => {
            Authority::create(&ca, SystemTime::now()).map_err(chain)?;
            let certificate = ca.join(AUTHORITY_CERTIFICATE_FILE);
            output.answer(&json!({ "certificate": certificate }), |_| {
                format!("made an authority in {}; keep its key off the hosts", ca.display())
            });
        }
        CaVerb::Sign { ca, name, request, bundle } => {
            let request = read(&request)?;
            let authority = Authority::open(&ca).map_err(chain)?;
            let signed = authority.sign(&name, &request, validity(&bundle)).map_err(chain)?;
            write_bundle(&bundle.out, &signed)?;
            output.answer(&json!({ "bundle": bundle.out }), |_| {
                format!("signed; on {name}: godwit join --bundle {}", bundle.out.display())
            });
        }
        CaVerb::Issue { ca, name, bundle } => {
            let authority = Authority::open(&ca).map_err(chain)?;
            let issued = authority.issue(&name, validity(&bundle)).map_err(chain)?;
            write_bundle(&bundle.out, &issued)?;
            output.answer(&json!({ "bundle": bundle.out }), |_| {
                format!("issued (secret); on {name}: godwit join --bundle {}", bundle.out.display())
            });
        }
    }
    Ok(())
}

/// Asks for an identity, or takes it on.
pub(super) fn join(join: &Join, output: Output) -> Result<(), Failure> {
    match (&join.bundle, &join.name) {
        (Some(bundle), _) => take_on(join, &read(bundle)?, output),
        (None, Some(name)) => ask(join, name, output),
        (None, None) => Err(Failure::invalid("name this host, or give --bundle")),
    }
}

fn ask(join: &Join, name: &HostName, output: Output) -> Result<(), Failure> {
    JoinRequest::create(&join.identity, name).map_err(chain)?;
    let request = join.identity.join(HOST_REQUEST_FILE);
    output.answer(&json!({ "request": request }), |_| {
        let request = request.display();
        format!(
            "wrote {request}; where the authority is: godwit ca sign CA {name} host.csr --out {name}.bundle"
        )
    });
    Ok(())
}

fn take_on(join: &Join, text: &str, output: Output) -> Result<(), Failure> {
    let identity = HostIdentity::join(&join.identity, text, SystemTime::now()).map_err(chain)?;
    output.answer(&json!({ "name": identity.name(), "identity": join.identity }), |_| {
        format!("this host is {} now; its identity is in {}", identity.name(), join.identity.display())
    });
    Ok(())
}

fn validity(bundle: &Bundle) -> Validity {
    Validity::starting(SystemTime::now(), Duration::from_secs(u64::from(bundle.days) * 86_400))
}

fn read(path: &PathBuf) -> Result<String, Failure> {
    let named = |error: std::io::Error| Failure::invalid(format!("{}: {error}", path.display()));
    let length = fs::metadata(path).map_err(named)?.len();
    if length > PEM_BYTES_MAX {
        return Err(Failure::invalid(format!(
            "{} is {length} bytes long; that isn't a PEM file",
            path.display()
        )));
    }
    fs::read_to_string(path).map_err(named)
}

/// For the owner's eyes only, and never over something that is there.
fn write_bundle(path: &Path, contents: &str) -> Result<(), Failure> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(contents.as_bytes()))
        .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
}

/// An error with its causes in one line.
fn chain(error: impl std::error::Error) -> Failure {
    Failure::failed(one_line(&error))
}
