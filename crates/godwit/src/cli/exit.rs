//! Exit codes: a promise to scripts.

use std::process::ExitCode;

use crate::{
    agent::{CredentialsError, StartError, StateError},
    api::{Problem, ProblemCode},
    job::Outcome,
    output::one_line,
};

/// The table that `--help` and docs/operations.md show.
pub(super) const TABLE: &str = "\
Exit codes:
  0  done
  1  it was tried and failed; the guest runs where it was
  2  the command line or a file is wrong
  3  refused, or not possible here; no guest was touched
  4  no such machine, migration or host
  5  the agent can't be reached
  6  unsettled: the machine was handed over and no answer came; the report says what to do
  7  cancelled; the guest runs where it was";

/// Why a command didn't do what it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The agent (or a local verb) says why.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// Input or output failed at this end.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl Failure {
    /// Something was tried and failed.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::Problem(Problem { code: ProblemCode::Failed, message: message.into() })
    }

    /// What was asked for makes no sense.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::Problem(Problem { code: ProblemCode::Invalid, message: message.into() })
    }

    /// Not possible here.
    pub(super) fn refused(message: impl Into<String>) -> Self {
        Self::Problem(Problem { code: ProblemCode::Refused, message: message.into() })
    }

    /// No agent answers.
    pub(super) fn unreachable(message: impl Into<String>) -> Self {
        Self::Problem(Problem { code: ProblemCode::Unreachable, message: message.into() })
    }

    /// Whether the agent couldn't be reached; it may be back soon.
    pub(super) fn is_of_connection(&self) -> bool {
        matches!(self, Self::Problem(problem) if problem.code == ProblemCode::Unreachable)
    }

    /// The exit code.
    pub(super) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Problem(problem) => match problem.code {
                ProblemCode::Failed => 1,
                ProblemCode::Invalid => 2,
                ProblemCode::Refused => 3,
                ProblemCode::NotFound => 4,
                ProblemCode::Unreachable => 5,
            },
            Self::Io(_) => 1,
        })
    }

    /// The same as an object, for `--json`.
    pub(super) fn problem(&self) -> Problem {
        match self {
            Self::Problem(problem) => problem.clone(),
            other => Problem { code: ProblemCode::Failed, message: other.to_string() },
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let code = match &error {
            StartError::Config(_)
            | StartError::Identity { source: CredentialsError::OtherName { .. }, .. } => ProblemCode::Invalid,
            StartError::State(StateError::Locked(_)) | StartError::Emulator(_) => ProblemCode::Refused,
            _ => ProblemCode::Failed,
        };
        Self::Problem(Problem { code, message: one_line(&error) })
    }
}

/// The exit code of a finished migration.
pub(super) fn of_outcome(outcome: Outcome) -> ExitCode {
    ExitCode::from(match outcome {
        Outcome::Completed => 0,
        Outcome::Failed => 1,
        Outcome::Unsettled => 6,
        Outcome::Cancelled => 7,
    })
}

/// `--help` and `--version` are no errors.
pub(super) fn of_usage(error: &clap::Error) -> ExitCode {
    if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
}
