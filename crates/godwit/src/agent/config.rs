//! `agent.toml`: what a host is called, where it keeps things, and whom it trusts with what.
//!
//! Nothing is permitted that isn't written: a peer without an entry can't talk to the agent, a peer's machine may name
//! only the paths, networks and QEMU arguments under `[accept]`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use godwit_qemu::{commandline::Policy, machine::ByteSize};
use godwit_transport::identity::HostName;
use serde::{Deserialize, Deserializer, de::Error as _};

/// Where the agent looks for its configuration when it isn't told.
pub(crate) const DEFAULT_CONFIG: &str = "/etc/godwit/agent.toml";
/// Where the command line looks for the agent when it isn't told.
pub(crate) const DEFAULT_SOCKET: &str = "/run/godwit/agent.sock";
/// Where images are kept when nothing else is said.
pub(crate) const DEFAULT_REPOSITORY: &str = "/var/lib/godwit/repository";
/// Where a host's identity lies when nothing else is said.
pub(crate) const DEFAULT_IDENTITY: &str = "/etc/godwit/identity";

/// A host's configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// This host's name, as in its certificate.
    pub name: HostName,
    /// Machines, migrations and their logs.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// The unix socket of the API.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Where other agents reach this one; one port for everything.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where metrics are read over plain HTTP; by default nowhere.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// `ca.pem`, `host.pem` and `host.key`, written by `godwit join`.
    #[serde(default = "default_identity_dir")]
    pub identity_dir: PathBuf,
    /// QEMU, a path or a name to be found in PATH.
    #[serde(default = "default_emulator")]
    pub emulator: PathBuf,
    /// Memory that incoming machines must leave free.
    #[serde(default = "default_memory_reserve")]
    pub memory_reserve: ByteSize,
    /// The largest memory of which `--keep-partial` keeps a copy in the state directory; 0 keeps none.
    #[serde(default = "default_partial_limit")]
    pub partial_limit: ByteSize,
    /// The most memory of pages that are kept for guests which come from one host, so that each page is sent once; 0
    /// keeps none, and asks no other host to.
    #[serde(default = "default_shared_pages")]
    pub shared_pages: ByteSize,
    /// Where the images are that machines' disks begin as: a directory, or `s3://bucket/prefix`.
    #[serde(default = "default_repository")]
    pub repository: String,
    /// What a peer's machine may name on this host, and what that is here.
    #[serde(default)]
    pub accept: Policy,
    /// The hosts that this one knows.
    #[serde(default)]
    pub peers: BTreeMap<HostName, Peer>,
}

/// Another host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Peer {
    /// `host:port` of its agent.
    pub address: PeerAddress,
    /// It may send machines to this host.
    #[serde(default)]
    pub may_send: bool,
    /// A program and its arguments that cut the host off for sure (its power, its switch port), for `godwit recover
    /// --assume-lost`; exit code 0 says that it is done.
    #[serde(default)]
    pub fence_command: Option<Vec<String>>,
    /// Machines may be sent to it.
    #[serde(default)]
    pub may_receive: bool,
}

/// Why a configuration can't be used; one line with file, line and key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file can't be read.
    #[error("can't read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something in the file is wrong.
    #[error("{}:{line}: {}{message}", file.display(), key.as_ref().map(|key| format!("`{key}`: ")).unwrap_or_default())]
    Wrong {
        /// The file.
        file: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The dotted key, where there is one.
        key: Option<String>,
        /// What is wrong with it.
        message: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`], one line that names file, line and key.
    pub(crate) fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
        Self::parse(&text, file)
    }

    /// Where pages are kept that guests have in common: beside the socket, which by default is in memory, so that a disk with
    /// better things to do doesn't write them.
    #[must_use]
    pub(crate) fn shared_dir(&self) -> PathBuf {
        self.socket.with_extension("shared")
    }

    /// The host with this name, if it is known.
    #[must_use]
    pub(crate) fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|(known, _)| known.as_str() == name).map(|(_, peer)| peer)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let (line, key) = locate(text, error.span().map_or(0, |span| span.start));
            let message = error.message().lines().next().unwrap_or("not TOML").to_owned();
            ConfigError::Wrong { file: file.to_owned(), line, key, message }
        })
    }
}

/// The line of an offset, and the dotted key that is set on it.
fn locate(text: &str, offset: usize) -> (usize, Option<String>) {
    let before = text.get(..offset).unwrap_or(text);
    let line_number = before.matches('\n').count() + 1;
    let line = text.lines().nth(line_number - 1).unwrap_or("").trim();
    let header = |line: &str| line.strip_prefix('[').map(|rest| rest.trim_matches(['[', ']']).to_owned());
    if let Some(table) = header(line) {
        return (line_number, Some(table));
    }
    let table = text.lines().take(line_number - 1).filter_map(|line| header(line.trim())).last();
    let key = line.split_once('=').map(|(key, _)| key.trim().to_owned()).filter(|key| !key.is_empty());
    (line_number, key.map(|key| table.map(|table| format!("{table}.{key}")).unwrap_or(key)))
}

fn default_state_dir() -> PathBuf {
    PathBuf::from("/var/lib/godwit")
}

fn default_socket() -> PathBuf {
    PathBuf::from(DEFAULT_SOCKET)
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 4577))
}

fn default_identity_dir() -> PathBuf {
    PathBuf::from(DEFAULT_IDENTITY)
}

fn default_emulator() -> PathBuf {
    PathBuf::from("qemu-system-x86_64")
}

fn default_partial_limit() -> ByteSize {
    ByteSize::from_bytes(16 << 30)
}

fn default_shared_pages() -> ByteSize {
    ByteSize::from_bytes(256 << 20)
}

fn default_repository() -> String {
    DEFAULT_REPOSITORY.to_owned()
}

fn default_memory_reserve() -> ByteSize {
    ByteSize::from_bytes(256 << 20)
}

/// `host:port`; looked up when it is used, so that a name that can't be resolved yet doesn't stop the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerAddress(String);

impl PeerAddress {
    /// The address as it was written.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for PeerAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let address = String::deserialize(deserializer)?;
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
        match port.map(str::parse::<u16>) {
            Some(Ok(_)) => Ok(Self(address)),
            _ => Err(D::Error::custom(format!("{address:?} is not host:port"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_smallest_configuration_denies_everything() {
        let config = parse("name = \"hosta\"").unwrap();
        assert_eq!(config.name.as_str(), "hosta");
        assert!(config.peers.is_empty() && config.accept == Policy::default());
        assert_eq!(config.metrics_listen, None);
    }

    #[test]
    fn a_peer_may_do_only_what_is_written() {
        let config = parse("name = \"a\"\n[peers.hostb]\naddress = \"10.0.0.2:4577\"").unwrap();
        let peer = config.peer("hostb").unwrap();
        assert!(!peer.may_send && !peer.may_receive);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let cases = [
            ("name = \"a\"\nlisten = \"nowhere\"", "agent.toml:2: `listen`:"),
            ("name = \"a\"\nmetrics_listen = \"9577\"", "agent.toml:2: `metrics_listen`:"),
            ("name = \"a\"\nstate_dri = \"/x\"", "agent.toml:2: `state_dri`:"),
            ("name = \"a b\"", "agent.toml:1: `name`:"),
            ("name = \"a\"\n[peers.b]\naddress = \"b\"", "agent.toml:3: `peers.b.address`:"),
            ("name = \"a\"\n\n[peers.b]\nmay_send = true", "agent.toml:3: `peers.b`:"),
            ("name = \"a\"\nmemory_reserve = \"lots\"", "agent.toml:2: `memory_reserve`:"),
            ("name = \"a\"\nname = \"b\"", "agent.toml:2: `name`:"),
        ];
        for (text, start) in cases {
            let error = parse(text).expect_err(text);
            assert!(error.starts_with(start), "{error:?} should start with {start:?}");
            assert_eq!(error.lines().count(), 1);
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nonexistent/agent.toml")).unwrap_err();
        assert_eq!(error.to_string(), "can't read /nonexistent/agent.toml");
    }
}
