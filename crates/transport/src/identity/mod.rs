//! Who a host is: an authority's certificate, the host's own certificate, and its private key.
//!
//! A host joins an installation without its private key ever leaving it:
//!
//! ```text
//! authority                                  new host
//! Authority::create  ca.pem, ca.key
//!                                            JoinRequest::create  host.key, host.csr
//!                      <── host.csr ──
//! Authority::sign
//!                      ── bundle ──>
//!                                            HostIdentity::join   ca.pem, host.pem
//! ```
//!
//! [`Authority::issue`] makes key and certificate at once, for whoever prefers one file to carry; that bundle is a
//! secret. Every private key is a file of mode 0600 in a directory of mode 0700, and nothing is ever overwritten.

mod authority;
mod files;
mod host;
mod name;

pub use authority::{Authority, AuthorityError, Validity};
pub use files::FileError;
pub(crate) use host::certified_name;
pub use host::{HostIdentity, IdentityError, JoinError, JoinRequest};
pub use name::{HostName, InvalidHostName};

/// The authority's certificate, at the authority and at every host.
pub const AUTHORITY_CERTIFICATE_FILE: &str = "ca.pem";
/// The authority's private key, at the authority only.
pub const AUTHORITY_KEY_FILE: &str = "ca.key";
/// A host's certificate.
pub const HOST_CERTIFICATE_FILE: &str = "host.pem";
/// A host's private key.
pub const HOST_KEY_FILE: &str = "host.key";
/// A host's request for a certificate.
pub const HOST_REQUEST_FILE: &str = "host.csr";
