//! TAP devices: one for each bridged network card of a machine, made before QEMU starts and removed when it is gone.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    process::Stdio,
    time::Duration,
};

/// How long one `ip` command may take.
const IP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a TAP couldn't be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    /// `ip` couldn't be run.
    #[error("can't run `ip` to make a TAP")]
    Start(#[from] std::io::Error),
    /// `ip` took too long.
    #[error("`ip {command}` took longer than {} s", IP_TIMEOUT.as_secs())]
    Timeout {
        /// What was asked for.
        command: String,
    },
    /// `ip` said no.
    #[error("`ip {command}` failed: {message}")]
    Refused {
        /// What was asked for.
        command: String,
        /// Its first line.
        message: String,
    },
}

/// The TAP of a machine's `index`-th network card: the same each time, different for every agent and machine.
#[must_use]
pub(crate) fn name(host: &str, machine: &str, index: usize) -> String {
    let mut hasher = DefaultHasher::new();
    (host, machine, index).hash(&mut hasher);
    // The kernel's limit is 15 bytes.
    format!("gw{:010x}", hasher.finish() >> 24)
}

/// Makes a TAP that is up and belongs to a bridge; what was half made is removed.
///
/// # Errors
/// [`TapError`], which names the command that failed.
pub(crate) async fn create(tap: &str, bridge: &str, multi_queue: bool) -> Result<(), TapError> {
    remove(tap).await;
    let mut add = vec!["tuntap", "add", "dev", tap, "mode", "tap"];
    if multi_queue {
        add.push("multi_queue");
    }
    ip(&add).await?;
    let joined = ip(&["link", "set", "dev", tap, "master", bridge, "up"]).await;
    if joined.is_err() {
        remove(tap).await;
    }
    joined
}

/// Removes a TAP; that it isn't there is fine.
pub(crate) async fn remove(tap: &str) {
    if nix::net::if_::if_nametoindex(tap).is_ok()
        && let Err(error) = ip(&["link", "del", "dev", tap]).await
    {
        tracing::warn!(tap, %error, "can't remove a TAP");
    }
}

async fn ip(arguments: &[&str]) -> Result<(), TapError> {
    let output =
        tokio::process::Command::new("ip").args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(IP_TIMEOUT, output)
        .await
        .map_err(|_| TapError::Timeout { command: arguments.join(" ") })??;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("no reason").to_owned();
    Err(TapError::Refused { command: arguments.join(" "), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let names = [name("a", "web1", 0), name("a", "web1", 1), name("b", "web1", 0), name("a", "web2", 0)];
        for name in &names {
            assert!(name.len() <= 15, "{name}");
        }
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
