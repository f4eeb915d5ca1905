//! Frames between two hosts, over sessions that are authenticated both ways and outlive a TCP connection.
//!
//! - [`identity`]: the authority of an installation and the identities of its hosts, kept in plain PEM files.
//! - [`tls`]: TLS 1.3 between hosts, each verified against the authority and the host name it is expected to carry.
//! - [`route`]: where an accepted connection belongs, read from its first bytes without consuming them.
//! - [`session`]: two lanes of messages over one urgent and one to eight bulk TCP connections, with sequence numbers,
//!   acknowledgements, replay, back-pressure and a bandwidth limit.
//!
//! What it may not do: this crate knows nothing of migrations, machines, QEMU or pages. A message is a kind, which it
//! doesn't interpret, and bytes. Within it, `session::core` and the codecs do no I/O and read no clock; everything a
//! peer sends is checked and bounded before anything is allocated for it. The bytes on the wire are described in
//! `docs/wire-format.md`.

pub mod identity;
pub mod route;
pub mod session;
pub mod tls;
