//! What the agent answers when it doesn't do what it was asked.

use std::time::Duration;

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use godwit_qemu::{
    commandline::{BuildError, PolicyRefusal},
    machine::SpecError,
    memory_layout::MemoryObstacle,
    processor::ProcessorMismatch,
    qmp::QmpError,
};

use super::{reach::ReachRefusal, state::StateError, taps::TapError};
use crate::{
    api::{Problem, ProblemCode},
    output::one_line,
    quantity::{size, time_ms},
    token::TokenError,
    worker::GuestError,
};

/// Why a machine isn't touched: a rule forbids it, or it isn't in the state for it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("{0} runs already")]
    Runs(String),
    #[error("{0} is off")]
    Off(String),
    #[error("{0} wasn't stopped by a disk that failed, so there is nothing to resume")]
    NotStopped(String),
    #[error("{machine} is busy: {doing}")]
    Busy { machine: String, doing: String },
    #[error(
        "{machine} was given to {holder}; migrate it back, or see `godwit recover --help` if {holder} is lost for good"
    )]
    GivenAway { machine: String, holder: String },
    #[error("{0} is known here and off; `godwit vm rm {0}` makes room for another")]
    NameTaken(String),
    #[error("{0} can't be moved to the host that it is on")]
    SameHost(String),
    #[error("{0} isn't among [peers]")]
    UnknownPeer(String),
    #[error("machines may not be sent to {0}: [peers.{0}] has no may_receive")]
    MayNotReceive(String),
    #[error("machines of {0} aren't accepted: [peers.{0}] has no may_send")]
    MayNotSend(String),
    #[error("{peer} speaks {theirs} between agents, this host {ours}")]
    Versions { peer: String, theirs: String, ours: String },
    #[error("{peer} {what} too often; it may again in {wait}", wait = time_ms((wait.as_millis() as f64).max(1.0)))]
    TooOften { peer: String, what: &'static str, wait: Duration },
    #[error("{peer} refuses: {reason}")]
    Peer { peer: String, reason: String },
    #[error("{needed} are needed and {available} are free ({reserve} of it reserved)", needed = size(*needed_bytes),
        available = size(*available_bytes), reserve = size(*reserve_bytes))]
    Memory { needed_bytes: u64, available_bytes: u64, reserve_bytes: u64 },
    #[error("epoch {offered} isn't newer than {known}, which this host has on record")]
    OldEpoch { offered: u64, known: u64 },
    #[error(
        "{machine} was handed to {peer} and no answer came: only {peer} knows whether it took it; `godwit recover {machine}` asks"
    )]
    Unsettled { machine: String, peer: String },
    #[error("the migration is over")]
    Over,
    #[error("{host} neither has {machine} nor may have it; `godwit vm show {machine}` says who has")]
    NotThere { machine: String, host: String },
    #[error("{0} never came here completely; there is nothing to take over")]
    Incomplete(String),
    #[error(
        "{lost} may still run {machine}: if it does, two copies write to the same disks and both are ruined. Cut its \
         power, then repeat with `--confirm {lost}`, or give [peers.{lost}] a fence_command"
    )]
    NotFenced { machine: String, lost: String },
    #[error("the fence of {host} failed ({reason}), so {host} may still run; nothing was changed")]
    FenceFailed { host: String, reason: String },
    #[error(transparent)]
    Policy(#[from] PolicyRefusal),
    #[error("that is for {0} to decide, where the machine is; ask its agent")]
    AtSource(String),
    #[error("{machine} can't be throttled: {reason}")]
    Throttle { machine: String, reason: String },
    #[error(transparent)]
    Layout(#[from] MemoryObstacle),
    #[error("{machine} can't go on at {peer}: {mismatch}")]
    Processor { machine: String, peer: String, mismatch: ProcessorMismatch },
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Reach(#[from] ReachRefusal),
    #[error("{0}")]
    Adoption(String),
    #[error("{0}; stop its machine first")]
    DiskInUse(String),
}

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    #[error("there is no {what} called {name} here")]
    NotFound { what: &'static str, name: String },
    #[error("{0}")]
    Invalid(String),
    #[error("a disk of the machine can't be served: {0}")]
    Disk(String),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("QEMU's monitor failed")]
    Qmp(#[from] QmpError),
    #[error("QEMU doesn't start: {0}")]
    Start(String),
    #[error("the agent failed: {0}")]
    Broken(String),
    #[error("QEMU {0}")]
    Stuck(String),
    #[error("{machine} still runs after {waited}; `godwit vm kill {machine}` ends it", waited = time_ms(timeout.as_millis() as f64))]
    StillRunning { machine: String, timeout: Duration },
    #[error("can't reach {peer}: {reason}")]
    Unreachable { peer: String, reason: String },
    #[error("the migration's worker {0}")]
    Worker(String),
}

impl AgentError {
    fn code(&self) -> ProblemCode {
        match self {
            Self::NotFound { .. } => ProblemCode::NotFound,
            Self::Invalid(_) | Self::Spec(_) | Self::Build(_) => ProblemCode::Invalid,
            Self::Refused(_) | Self::Unreachable { .. } => ProblemCode::Refused,
            _ => ProblemCode::Failed,
        }
    }
}

impl From<AgentError> for Problem {
    fn from(error: AgentError) -> Self {
        Self { code: error.code(), message: one_line(&error) }
    }
}

impl IntoResponse for AgentError {
    fn into_response(self) -> Response {
        Problem::from(self).into_response()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = match self.code {
            ProblemCode::Invalid => StatusCode::BAD_REQUEST,
            ProblemCode::Refused => StatusCode::CONFLICT,
            ProblemCode::NotFound => StatusCode::NOT_FOUND,
            ProblemCode::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            ProblemCode::Unreachable => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(self)).into_response()
    }
}
