//! Host names as certificates carry them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The name of a host: DNS labels of lower-case letters, digits and inner hyphens, 253 bytes at most.
///
/// ```
/// use godwit_transport::identity::HostName;
///
/// let name: HostName = "hostb.example".parse()?;
/// assert_eq!(name.as_str(), "hostb.example");
/// assert!("Host_B".parse::<HostName>().is_err());
/// # Ok::<(), godwit_transport::identity::InvalidHostName>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

/// A text that is no host name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is not a host name: use lower-case letters, digits and hyphens, labels of 1 to 63 joined by dots"
)]
pub struct InvalidHostName {
    /// The text.
    pub name: String,
}

impl HostName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = InvalidHostName;

    fn from_str(name: &str) -> Result<Self, InvalidHostName> {
        // A name of digits and dots could be taken for an address, which certificates carry differently.
        let numeric = name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if name.len() > 253 || numeric || !name.split('.').all(is_label) {
            return Err(InvalidHostName { name: name.chars().take(253).collect() });
        }
        Ok(Self(name.to_owned()))
    }
}

fn is_label(label: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&label.len())
        && label.bytes().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

impl TryFrom<String> for HostName {
    type Error = InvalidHostName;

    fn try_from(name: String) -> Result<Self, InvalidHostName> {
        name.parse()
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dns_names_are_host_names() {
        for good in ["a", "hostb", "host-b.example", "1a", "10.0.0.1a"] {
            assert!(good.parse::<HostName>().is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", ".", "a.", "-a", "a-", "A", "a_b", "ä", "10.0.0.1", "*.example", &long] {
            assert!(bad.parse::<HostName>().is_err(), "{bad}");
        }
    }
}
