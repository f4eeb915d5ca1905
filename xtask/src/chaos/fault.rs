//! What can go wrong, by name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A kind of fault; each is a row of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// The link is cut for less than the reconnect timeout, up to three times.
    LinkCut,
    /// The link is cut for longer than that.
    LinkCutLong,
    /// Processes are killed; agents come back after up to two seconds, as under a supervisor.
    KillSourceAgent,
    KillTargetAgent,
    KillSourceWorker,
    KillTargetWorker,
    KillSourceQemu,
    KillTargetQemu,
    KillCommandLine,
    /// Processes are stopped (SIGSTOP) and continued after one to thirty seconds.
    StopSourceAgent,
    StopTargetAgent,
    StopSourceWorker,
    StopTargetWorker,
    StopSourceQemu,
    StopTargetQemu,
    StopCommandLine,
    /// The state directory takes nothing more for a while.
    FullDiskSource,
    FullDiskTarget,
    /// The target has no memory for the machine.
    NoMemoryTarget,
    /// The operator gives the migration up.
    Cancel,
    /// The guest does something by itself.
    PowerOff,
    Reset,
    Panic,
    /// The operator pauses the guest at its monitor.
    OperatorStop,
    /// The operator pauses it and lets it go on.
    OperatorStopCont,
}

impl Fault {
    /// All kinds, in the order of the result's rows.
    pub(crate) const ALL: [Fault; 25] = [
        Fault::LinkCut,
        Fault::LinkCutLong,
        Fault::KillSourceAgent,
        Fault::KillTargetAgent,
        Fault::KillSourceWorker,
        Fault::KillTargetWorker,
        Fault::KillSourceQemu,
        Fault::KillTargetQemu,
        Fault::KillCommandLine,
        Fault::StopSourceAgent,
        Fault::StopTargetAgent,
        Fault::StopSourceWorker,
        Fault::StopTargetWorker,
        Fault::StopSourceQemu,
        Fault::StopTargetQemu,
        Fault::StopCommandLine,
        Fault::FullDiskSource,
        Fault::FullDiskTarget,
        Fault::NoMemoryTarget,
        Fault::Cancel,
        Fault::PowerOff,
        Fault::Reset,
        Fault::Panic,
        Fault::OperatorStop,
        Fault::OperatorStopCont,
    ];

    /// What may strike besides another fault in the same round: whatever leaves the guest's own fate alone.
    pub(super) const BESIDES: [Fault; 8] = [
        Fault::LinkCut,
        Fault::KillSourceAgent,
        Fault::KillTargetAgent,
        Fault::KillSourceWorker,
        Fault::KillTargetWorker,
        Fault::StopSourceWorker,
        Fault::StopTargetWorker,
        Fault::Cancel,
    ];

    /// The process whose fault it is, if it is one's.
    pub(super) fn victim(self) -> Option<Victim> {
        use Fault::*;
        Some(match self {
            KillSourceAgent | StopSourceAgent => Victim::Agent(Side::Source),
            KillTargetAgent | StopTargetAgent => Victim::Agent(Side::Target),
            KillSourceWorker | StopSourceWorker => Victim::Worker(Side::Source),
            KillTargetWorker | StopTargetWorker => Victim::Worker(Side::Target),
            KillSourceQemu | StopSourceQemu => Victim::Qemu(Side::Source),
            KillTargetQemu | StopTargetQemu => Victim::Qemu(Side::Target),
            KillCommandLine | StopCommandLine => Victim::CommandLine,
            _ => return None,
        })
    }

    /// Whether the guest boots anew because of it.
    pub(super) fn reboots(self) -> bool {
        matches!(self, Fault::Reset | Fault::Panic)
    }

    /// Whether its victim dies of it.
    pub(super) fn kills(self) -> bool {
        use Fault::*;
        matches!(
            self,
            KillSourceAgent
                | KillTargetAgent
                | KillSourceWorker
                | KillTargetWorker
                | KillSourceQemu
                | KillTargetQemu
                | KillCommandLine
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = serde_json::to_value(self).ok();
        formatter.pad(name.as_ref().and_then(|name| name.as_str()).unwrap_or_default())
    }
}

/// An end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

/// A process that can be killed or stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Agent(Side),
    Worker(Side),
    Qemu(Side),
    CommandLine,
}
