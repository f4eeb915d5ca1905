//! Machines that somebody else started: what they are, and whether an equal one can be started elsewhere.

mod live;
mod process;

pub use self::{
    live::{BlockNode, LiveDevice, LiveFacts, LiveNetdev, inspect},
    process::{Process, ProcessError, process_of},
};
use crate::machine::{Spec, SpecError};

/// Why a machine isn't adopted; one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AdoptRefusal(String);

impl From<SpecError> for AdoptRefusal {
    fn from(error: SpecError) -> Self {
        Self(error.to_string())
    }
}

/// The specification of a running machine, from its process and what its monitor says.
///
/// # Errors
/// Whatever an equal machine couldn't be started with.
pub fn classify(process: &Process, live: &LiveFacts) -> Result<Spec, AdoptRefusal> {
    let _ = live;
    Err(AdoptRefusal(format!("process {} isn't understood", process.pid)))
}
