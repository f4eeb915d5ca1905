//! What a host knows durably about its right to run a machine.

use serde::{Deserialize, Serialize};

use super::{Epoch, RunState};

/// How far [`Record::reclaimed`] goes ahead.
const RECLAIM_STEP: u64 = 1 << 20;

/// The durable record of one machine at one host. Written by replacing the whole file.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The newest hand-over that this host knows of.
    pub epoch: Epoch,
    /// How it stands.
    #[serde(flatten)]
    pub state: RecordState,
}

/// How the newest hand-over stands at this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RecordState {
    /// The machine is here and no hand-over is open.
    Owner {
        /// The other side of the last one, which may yet ask about it, or reclaim the machine.
        #[serde(default)]
        peer: Option<String>,
    },
    /// The machine is here; a hand-over to `peer` is open. The token hasn't left, unless the host crashed before the
    /// next record was synced.
    Offered {
        /// The target.
        peer: String,
        /// What the guest did before the stop, once it was stopped.
        stopped: Option<RunState>,
    },
    /// The token left for `peer`.
    GivenAway {
        /// The target.
        peer: String,
        /// What the guest did before the stop.
        run_state: RunState,
        /// The target said that it took the machine.
        settled: bool,
    },
    /// A token from `peer` is awaited.
    Awaited {
        /// The source.
        peer: String,
    },
    /// Everything arrived from `peer` and was verified; the guest hasn't run, unless the host crashed before the next
    /// record was synced.
    Taking {
        /// The source.
        peer: String,
        /// Whether the guest is to be continued.
        start: bool,
    },
    /// The machine is here, loaded; whether its guest has run yet isn't known.
    Mine {
        /// The source.
        peer: String,
    },
    /// The hand-over was refused; the machine is at `peer`.
    Refused {
        /// The source.
        peer: String,
    },
}

/// Whether a host may start a machine by itself (`vm run`, or after a boot).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission<'a> {
    /// It may.
    Granted,
    /// Only `peer` knows; ask it.
    AskFirst {
        /// The other side of the open hand-over.
        peer: &'a str,
    },
    /// It may not; `holder` has the machine.
    Denied {
        /// The host that does, as far as this one knows.
        holder: &'a str,
    },
}

impl Record {
    /// The record of a machine that was created here.
    pub fn created() -> Self {
        Self { epoch: Epoch::default(), state: RecordState::Owner { peer: None } }
    }

    /// The record of a machine that an operator takes here because the host that has it, or may have it, is lost. The
    /// epoch leaves room for hand-overs that the lost host may have begun since, so that it is newer than all of them.
    pub fn reclaimed(&self) -> Self {
        let state = RecordState::Owner { peer: self.peer().map(str::to_owned) };
        Self { epoch: Epoch(self.epoch.0.saturating_add(RECLAIM_STEP)), state }
    }

    /// The other side of the newest hand-over, if there was one.
    pub fn peer(&self) -> Option<&str> {
        match &self.state {
            RecordState::Owner { peer } => peer.as_deref(),
            RecordState::Offered { peer, .. }
            | RecordState::GivenAway { peer, .. }
            | RecordState::Awaited { peer }
            | RecordState::Taking { peer, .. }
            | RecordState::Mine { peer }
            | RecordState::Refused { peer } => Some(peer),
        }
    }

    /// Whether this host may start the machine. `rebooted` says that the host has booted since the record was
    /// written: then newer records may have been lost, and whatever ran is dead.
    pub fn may_run(&self, rebooted: bool) -> Permission<'_> {
        match &self.state {
            RecordState::Owner { .. } | RecordState::Mine { .. } => Permission::Granted,
            RecordState::Offered { peer, .. } if rebooted => Permission::AskFirst { peer },
            RecordState::Offered { .. } => Permission::Granted,
            RecordState::Taking { .. } if rebooted => Permission::Granted,
            RecordState::GivenAway { peer, settled: false, .. } => Permission::AskFirst { peer },
            RecordState::GivenAway { peer, .. }
            | RecordState::Awaited { peer }
            | RecordState::Taking { peer, .. }
            | RecordState::Refused { peer } => Permission::Denied { holder: peer },
        }
    }
}
