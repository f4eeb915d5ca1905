//! Guards that can be taken away, to see that the checker notices.

use godwit_migration::handover::{Action, Message, Outcome, RecordState, Sync};

use crate::{
    BACK_IN_TIME, DESTROYED, INCOMPLETE, RUNNABLE_BESIDE_RUNNING, TWO_RUNNING, UNSETTLED, WOKEN, world::Side,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// "Offered" isn't synced before the gate opens.
    SourceOffersUnsynced,
    /// The token leaves before "given away" is written.
    SourceSendsTokenUnrecorded,
    /// SHUT isn't answered, and QEMU not waited for.
    SourceLeavesShutUnanswered,
    /// The source continues the guest when the target is silent.
    SourceContinuesUnanswered,
    /// The source's QEMU is killed as soon as the token has left.
    SourceKillsEarly,
    /// The source continues a guest that its operator had paused.
    SourceWakesPaused,
    /// Messages about another attempt are taken for messages about this one.
    SourceIgnoresEpochs,
    /// The source takes "given away" for settled before it asked.
    SourceForgetsToAsk,
    /// "Taking" isn't recorded.
    TargetTakesUnrecorded,
    /// "Mine" isn't recorded before `cont`.
    TargetContinuesUnrecorded,
    /// A refusal isn't recorded.
    TargetRefusesUnrecorded,
    /// The target's QEMU isn't killed before the refusal is said.
    TargetRefusesAlive,
    /// The destination is started without `-S`.
    TargetStartsByItself,
    /// What arrived isn't compared with what the token promises.
    TargetSkipsVerification,
}

impl Mutant {
    pub(crate) const ALL: [Self; 14] = [
        Self::SourceOffersUnsynced,
        Self::SourceSendsTokenUnrecorded,
        Self::SourceLeavesShutUnanswered,
        Self::SourceContinuesUnanswered,
        Self::SourceKillsEarly,
        Self::SourceWakesPaused,
        Self::SourceIgnoresEpochs,
        Self::SourceForgetsToAsk,
        Self::TargetTakesUnrecorded,
        Self::TargetContinuesUnrecorded,
        Self::TargetRefusesUnrecorded,
        Self::TargetRefusesAlive,
        Self::TargetStartsByItself,
        Self::TargetSkipsVerification,
    ];

    /// The property that the guard is for.
    pub(crate) fn violates(self) -> &'static str {
        match self {
            Self::SourceOffersUnsynced
            | Self::SourceSendsTokenUnrecorded
            | Self::SourceLeavesShutUnanswered
            | Self::SourceContinuesUnanswered
            | Self::SourceIgnoresEpochs
            | Self::TargetRefusesUnrecorded => TWO_RUNNING,
            Self::TargetTakesUnrecorded | Self::TargetContinuesUnrecorded | Self::TargetStartsByItself => {
                BACK_IN_TIME
            }
            Self::TargetRefusesAlive => RUNNABLE_BESIDE_RUNNING,
            Self::SourceKillsEarly => DESTROYED,
            Self::TargetSkipsVerification => INCOMPLETE,
            Self::SourceWakesPaused => WOKEN,
            Self::SourceForgetsToAsk => UNSETTLED,
        }
    }

    /// What a shell with this mutation makes of the actions it was given. Reports are dropped: nobody reads them here.
    pub(crate) fn alter(mutant: Option<Self>, side: Side, actions: Vec<Action>) -> Vec<Action> {
        let altered = actions.into_iter().flat_map(|action| match mutant {
            Some(mutant) => mutant.alter_one(side, action),
            None => vec![action],
        });
        altered.filter(|action| !matches!(action, Action::Report(_) | Action::Verify)).collect()
    }

    fn alter_one(self, side: Side, action: Action) -> Vec<Action> {
        use RecordState::{GivenAway, Mine, Offered, Refused, Taking};
        let state = match &action {
            Action::Persist { record, .. } => Some(record.state.clone()),
            _ => None,
        };
        match (self, side, &action, state) {
            (Self::SourceOffersUnsynced, _, Action::Persist { record, .. }, Some(Offered { .. })) => {
                vec![Action::Persist { record: record.clone(), sync: Sync::Behind }]
            }
            (Self::SourceSendsTokenUnrecorded, _, _, Some(GivenAway { settled: false, .. }))
            | (Self::SourceLeavesShutUnanswered, _, Action::AnswerShut, _)
            | (Self::TargetTakesUnrecorded, _, _, Some(Taking { .. }))
            | (Self::TargetContinuesUnrecorded, _, _, Some(Mine { .. }))
            | (Self::TargetRefusesUnrecorded, _, _, Some(Refused { .. }))
            | (Self::TargetRefusesAlive, Side::Target, Action::KillQemu, _) => vec![],
            (Self::SourceContinuesUnanswered, _, Action::Report(Outcome::Unsettled), _) => {
                vec![Action::ContinueGuest]
            }
            (Self::SourceKillsEarly, _, Action::SendToken { .. }, _) => vec![action, Action::KillQemu],
            (Self::SourceWakesPaused, Side::Source, Action::AbortMigration, _) => {
                vec![action, Action::ContinueGuest]
            }
            (Self::SourceForgetsToAsk, _, Action::Send(Message::Query { .. }), _) => vec![],
            _ => vec![action],
        }
    }
}
