//! A machine's specification: what a user writes in TOML and what travels with a machine.

use serde::{Deserialize, Serialize};

/// A machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Unique on a host.
    pub name: String,
}
