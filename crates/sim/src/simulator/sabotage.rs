//! Guards that can be taken away, to see that the simulator notices.

use godwit_migration::handover::{Action, Message, Outcome, RecordState, Sync};

/// A guard that is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// A page that is owed isn't sent.
    PageDropped,
    /// The destination runs as soon as it has loaded.
    TargetStartsByItself,
    /// The target's QEMU isn't ended before the refusal is said.
    TargetRefusesAlive,
    /// A refusal isn't recorded.
    RefusalUnrecorded,
    /// "Taking" isn't recorded.
    TakingUnrecorded,
    /// "Mine" isn't recorded before `cont`.
    MineUnrecorded,
    /// "Offered" isn't synced before the gate opens.
    OfferedUnsynced,
    /// The token leaves before "given away" is written.
    GivenAwayUnrecorded,
    /// The source continues the guest when the target is silent.
    SourceContinuesUnanswered,
    /// The source's QEMU is ended as soon as the token has left.
    SourceKillsEarly,
    /// The source never asks what became of the token.
    SourceForgetsToAsk,
    /// A guest that its operator had paused is continued.
    PausedGuestWoken,
    /// What follows a record is said although the disk was full.
    SaidUnrecorded,
}

impl Sabotage {
    /// Every one.
    pub const ALL: [Self; 13] = [
        Self::PageDropped,
        Self::TargetStartsByItself,
        Self::TargetRefusesAlive,
        Self::RefusalUnrecorded,
        Self::TakingUnrecorded,
        Self::MineUnrecorded,
        Self::OfferedUnsynced,
        Self::GivenAwayUnrecorded,
        Self::SourceContinuesUnanswered,
        Self::SourceKillsEarly,
        Self::SourceForgetsToAsk,
        Self::PausedGuestWoken,
        Self::SaidUnrecorded,
    ];

    /// What a shell with this sabotage makes of an action.
    pub(super) fn alter(self, action: Action) -> Vec<Action> {
        match (self, &action) {
            (Self::PausedGuestWoken, Action::AbortMigration) => vec![action, Action::ContinueGuest],
            (Self::SourceKillsEarly, Action::SendToken { .. }) => vec![action, Action::KillQemu],
            (Self::SourceContinuesUnanswered, Action::Report(Outcome::Unsettled)) => {
                vec![Action::ContinueGuest, action]
            }
            (Self::SourceForgetsToAsk, Action::Send(Message::Query { .. }))
            | (Self::TargetRefusesAlive, Action::KillQemu) => vec![],
            _ => vec![action],
        }
    }

    /// What of a record is left to be done: how it is to be synced, or nothing.
    pub(super) fn weaken(self, state: &RecordState, sync: Sync) -> Option<Sync> {
        use RecordState::{GivenAway, Mine, Offered, Refused, Taking};
        match (self, state) {
            (Self::RefusalUnrecorded, Refused { .. })
            | (Self::TakingUnrecorded, Taking { .. })
            | (Self::MineUnrecorded, Mine { .. })
            | (Self::GivenAwayUnrecorded, GivenAway { settled: false, .. }) => None,
            (Self::OfferedUnsynced, Offered { .. }) => Some(Sync::Behind),
            _ => Some(sync),
        }
    }
}
