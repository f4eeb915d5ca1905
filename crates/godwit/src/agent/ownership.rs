//! Who may run a machine, by the token record in its directory (`godwit_migration::handover`).

use godwit_migration::handover::{Epoch, Permission};

use super::{
    error::{AgentError, Refusal},
    state::MachineDir,
};
use crate::token::{Found, Store, TokenError};

/// What this host knows of the right to run a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ownership {
    /// The newest hand-over that this host knows of; 0 if there was none.
    pub(super) epoch: Epoch,
    /// Who has the right.
    pub(super) holder: Holder,
}

/// Who has the right to run a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Holder {
    /// This host.
    Here,
    /// Another host.
    Peer(String),
    /// This host or the other: only the other knows.
    Unsettled(String),
}

/// Reads the record. A machine without one was never handed over, so it is this host's.
pub(super) fn of(directory: &MachineDir) -> Result<Ownership, TokenError> {
    let Some(Found { record, rebooted }) = Store::open(directory.path()).find()? else {
        return Ok(Ownership { epoch: Epoch::default(), holder: Holder::Here });
    };
    let holder = match record.may_run(rebooted) {
        Permission::Granted => Holder::Here,
        Permission::AskFirst { peer } => Holder::Unsettled(peer.to_owned()),
        Permission::Denied { holder } => Holder::Peer(holder.to_owned()),
    };
    Ok(Ownership { epoch: record.epoch, holder })
}

/// Refuses unless this host may run the machine; names who may.
pub(super) fn check(machine: &str, directory: &MachineDir) -> Result<Epoch, AgentError> {
    let machine = machine.to_owned();
    let Ownership { epoch, holder } = of(directory)?;
    match holder {
        Holder::Here => Ok(epoch),
        Holder::Peer(holder) => Err(Refusal::GivenAway { machine, holder }.into()),
        Holder::Unsettled(peer) => Err(Refusal::Unsettled { machine, peer }.into()),
    }
}
