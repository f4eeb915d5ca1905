//! The agent's certificate: used for every new connection, replaced while the agent runs, missed before it expires.
//!
//! ```text
//! files as known ──(changed, and unchanged since the last look)──► verified ──► used from the next connection on
//!       ▲                                                             └─ not accepted: one line, the old one stays
//!       └─────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Files are replaced one after the other, so that a set which doesn't fit together yet is given the time of one look.
//! Established connections, and workers that run, keep what they began with.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use godwit_transport::{
    identity::{
        AUTHORITY_CERTIFICATE_FILE, HOST_CERTIFICATE_FILE, HOST_KEY_FILE, HostIdentity, HostName,
        IdentityError,
    },
    tls::{self, ConfigError},
};
use rustls::ServerConfig;
use tokio::{
    signal::unix::Signal,
    time::{MissedTickBehavior, interval},
};

use crate::output::one_line;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How often an expiry that comes near is mentioned.
const REMINDER: Duration = Duration::from_secs(86_400);
/// From when on it is.
const NOTICE: Duration = Duration::from_secs(30 * 86_400);

/// Why an identity isn't used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CredentialsError {
    /// Its files.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It is another host's.
    #[error("the configuration calls this host {configured}, its certificate {certified}")]
    OtherName {
        /// In `agent.toml`.
        configured: HostName,
        /// In `host.pem`.
        certified: HostName,
    },
    /// TLS can't be set up with it.
    #[error("can't set TLS up")]
    Tls(#[from] ConfigError),
}

/// An identity and the configuration that is made of it.
#[derive(Debug)]
pub(super) struct Current {
    pub identity: HostIdentity,
    pub server: Arc<ServerConfig>,
}

impl Current {
    fn open(directory: &Path, name: &HostName, now: SystemTime) -> Result<Self, CredentialsError> {
        let identity = HostIdentity::open(directory, now)?;
        if identity.name() != name {
            let (configured, certified) = (name.clone(), identity.name().clone());
            return Err(CredentialsError::OtherName { configured, certified });
        }
        Ok(Self { server: tls::server_config(&identity)?, identity })
    }
}

/// What the agent shows other hosts, at any time.
#[derive(Debug)]
pub(super) struct Credentials {
    directory: PathBuf,
    name: HostName,
    current: RwLock<Arc<Current>>,
}

impl Credentials {
    /// Opens the identity of the host `name`.
    pub(super) fn open(directory: &Path, name: &HostName, now: SystemTime) -> Result<Self, CredentialsError> {
        let current = RwLock::new(Arc::new(Current::open(directory, name, now)?));
        Ok(Self { directory: directory.to_owned(), name: name.clone(), current })
    }

    /// What a connection that begins now uses.
    pub(super) fn current(&self) -> Arc<Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses what lies in the directory, if it can be used; otherwise what there was stays.
    fn renew(&self, now: SystemTime) -> Result<(), CredentialsError> {
        let renewed = Arc::new(Current::open(&self.directory, &self.name, now)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        Ok(())
    }

    /// Looks after files and expiry for as long as the agent lives; at once when it is told to reload.
    pub(super) async fn keep(&self, mut reload: Signal) {
        let mut files = Files::new(stamp(&self.directory));
        let (mut looks, mut reminders) = (interval(LOOK), interval(REMINDER));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let changed = tokio::select! {
                _ = looks.tick() => files.look(stamp(&self.directory)),
                Some(()) = reload.recv() => true,
                _ = reminders.tick() => {
                    self.remind(SystemTime::now());
                    false
                }
            };
            if changed {
                self.renew_aloud(SystemTime::now());
            }
        }
    }

    fn renew_aloud(&self, now: SystemTime) {
        match self.renew(now) {
            Ok(()) => {
                tracing::info!("the certificate was renewed: {}", remaining(self.expires(), now));
                self.remind(now);
            }
            Err(error) => {
                let directory = self.directory.display();
                tracing::error!(%directory, error = one_line(&error), "the new identity isn't used, the old one is");
            }
        }
    }

    fn remind(&self, now: SystemTime) {
        let expires = self.expires();
        if expires.duration_since(now).unwrap_or_default() < NOTICE {
            tracing::warn!("this host's certificate {}: let it join again", remaining(expires, now));
        }
    }

    /// When the certificate in use ends.
    pub(super) fn expires(&self) -> SystemTime {
        self.current().identity.expires()
    }
}

fn remaining(expires: SystemTime, now: SystemTime) -> String {
    match expires.duration_since(now) {
        Ok(left) => format!("expires in {} days", left.as_secs() / 86_400),
        Err(_) => "has expired".to_owned(),
    }
}

/// What tells a file from the one that it replaced: inode, size, time of change.
type Stamp = [Option<(u64, u64, i64, i64)>; 3];

fn stamp(directory: &Path) -> Stamp {
    [AUTHORITY_CERTIFICATE_FILE, HOST_CERTIFICATE_FILE, HOST_KEY_FILE].map(|file| {
        let found = fs::metadata(directory.join(file)).ok()?;
        Some((found.ino(), found.len(), found.ctime(), found.ctime_nsec()))
    })
}

/// Notices files that have changed and come to rest.
struct Files {
    known: Stamp,
    last: Stamp,
}

impl Files {
    fn new(known: Stamp) -> Self {
        Self { known, last: known }
    }

    /// Whether there is something new that looked the same the last time.
    fn look(&mut self, seen: Stamp) -> bool {
        let at_rest = seen == self.last;
        self.last = seen;
        let changed = at_rest && seen != self.known;
        if changed {
            self.known = seen;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use godwit_transport::identity::{Authority, Validity};

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    struct Host {
        scratch: tempfile::TempDir,
        authority: Authority,
    }

    impl Host {
        fn new() -> Self {
            let scratch = tempfile::tempdir().unwrap();
            let authority = Authority::create(&scratch.path().join("ca"), SystemTime::now()).unwrap();
            Self { scratch, authority }
        }

        fn identity(&self) -> PathBuf {
            self.scratch.path().join("identity")
        }

        /// Puts an identity in place as an operator would: made elsewhere, then moved.
        fn join(&self, name: &str, lifetime: Duration) {
            let fresh = self.scratch.path().join("fresh");
            let now = SystemTime::now();
            let bundle =
                self.authority.issue(&name.parse().unwrap(), Validity::starting(now, lifetime)).unwrap();
            HostIdentity::join(&fresh, &bundle, now).unwrap();
            let _ = fs::remove_dir_all(self.identity());
            fs::rename(&fresh, self.identity()).unwrap();
        }

        fn credentials(&self) -> Credentials {
            Credentials::open(&self.identity(), &"hosta".parse().unwrap(), SystemTime::now()).unwrap()
        }
    }

    #[test]
    fn a_new_certificate_is_used_for_new_connections() {
        let host = Host::new();
        host.join("hosta", DAY);
        let credentials = host.credentials();
        let (before, began_with) = (credentials.expires(), credentials.current());
        host.join("hosta", 90 * DAY);
        credentials.renew(SystemTime::now()).unwrap();
        assert!(credentials.expires() > before + 80 * DAY);
        assert!(!Arc::ptr_eq(&began_with.server, &credentials.current().server));
        assert_eq!(began_with.identity.expires(), before, "what is established keeps what it began with");
    }

    #[test]
    fn what_cannot_be_used_leaves_the_old_one_in_use() {
        let host = Host::new();
        host.join("hosta", DAY);
        let credentials = host.credentials();
        let in_use = credentials.current();
        let refused = |reason: &str| {
            let error = one_line(&credentials.renew(SystemTime::now()).unwrap_err());
            assert!(error.contains(reason), "{error}");
            assert!(Arc::ptr_eq(&in_use, &credentials.current()));
        };
        host.join("hostb", DAY);
        refused("calls this host hosta, its certificate hostb");
        host.join("hosta", DAY);
        let key = host.identity().join(HOST_KEY_FILE);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        refused("chmod 600");
        fs::remove_file(&key).unwrap();
        refused("host.key");
        host.join("hosta", DAY);
        fs::write(host.identity().join(HOST_CERTIFICATE_FILE), "not a certificate").unwrap();
        refused("certificate");
        // Made for another key: as when only one of the two files was replaced.
        let other = Host::new();
        other.join("hosta", DAY);
        host.join("hosta", DAY);
        fs::copy(other.identity().join(HOST_KEY_FILE), host.identity().join(HOST_KEY_FILE)).unwrap();
        refused("does not belong to the private key");
        host.join("hosta", DAY);
        credentials.renew(SystemTime::now()).unwrap();
    }

    #[test]
    fn an_expired_one_is_refused_with_its_date() {
        let host = Host::new();
        host.join("hosta", Duration::from_secs(3600));
        let later = SystemTime::now() + DAY;
        let error = Credentials::open(&host.identity(), &"hosta".parse().unwrap(), later).unwrap_err();
        assert!(error.to_string().contains("expired on"), "{error}");
    }

    #[test]
    fn files_are_taken_when_they_have_come_to_rest() {
        let host = Host::new();
        host.join("hosta", DAY);
        let mut files = Files::new(stamp(&host.identity()));
        assert!(!files.look(stamp(&host.identity())));
        host.join("hosta", DAY);
        let new = stamp(&host.identity());
        assert!(!files.look(new) && files.look(new) && !files.look(new));
        let gone = [None; 3];
        assert!(!files.look(gone) && !files.look(new), "back before the second look");
    }

    #[test]
    fn what_is_left_is_said_in_days() {
        let now = SystemTime::now();
        assert_eq!(remaining(now + 29 * DAY + DAY / 2, now), "expires in 29 days");
        assert_eq!(remaining(now - DAY, now), "has expired");
    }

    #[test]
    fn nothing_that_is_printed_shows_the_key() {
        let host = Host::new();
        host.join("hosta", DAY);
        let printed = format!("{:?}", host.credentials());
        let pem = fs::read_to_string(host.identity().join(HOST_KEY_FILE)).unwrap();
        let key = pem::parse(pem).unwrap().into_contents();
        // The scalar in RFC 5915's ECPrivateKey; what stands behind it is public, and in the certificate.
        const BEFORE: [u8; 5] = [2, 1, 1, 4, 32];
        let start = key.windows(BEFORE.len()).position(|bytes| bytes == BEFORE).unwrap() + BEFORE.len();
        // Any eight bytes of it, as people and programs print bytes.
        for part in key[start..start + 32].windows(8) {
            let decimal = part.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
            let hexadecimal: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(!printed.contains(&decimal) && !printed.to_lowercase().contains(&hexadecimal));
        }
    }
}
