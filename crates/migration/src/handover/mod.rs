//! Which host may run the machine, whatever crashes.
//!
//! The right to run a machine is a *token* with an epoch. Two machines of states, [`Source`] and [`Target`], move it
//! from one host to the other; each keeps a durable [`Record`], and a restarted process goes on from its record alone.
//! Neither does I/O: an event goes in, actions come out, and the shell carries them out *in order, each complete before
//! the next one begins*. `tests/handover_model.rs` checks the two against every order of messages and crashes.
//!
//! ```text
//!        source                                                       target (QEMU with -S, late-block-activate)
//!   Preparing ─ TargetReady
//!      │  record "offered n" (fsync)
//!   Opening ───────────────── OpenHandover n ──────────────────────►  Idle
//!      │                                                               │  record "awaited n" (fsync)
//!   Ready ◄────────────────── HandoverOpened n ─────────────────────  Awaiting
//!      │  Decided: the gate opens                                      │
//!   Stopping                                                           │
//!      │  Stopped: record the run state, answer SHUT                   │
//!   Flushing                                                           │
//!      │  StateFlushed: record "given away n"                          │
//!   Given ─────────────────── token n, with the last byte ─────────►  Verifying
//!      │                                                               │  Verified: record "taking n" (fsync, while
//!      │                                                              Loading                 QEMU loads the state)
//!      │                                                               │  Loaded and synced: record "mine n", cont
//!      │                                                              Starting
//!      │                                                               │  GuestRunning: record "owner"
//!   Settled ◄──────────────── Taken n ──────────────────────────────  Taken
//!      │  kill the source's QEMU
//!
//!   Settled ◄──────────────── Refused n ────────────────────────────  Refused: record "refused n" (fsync),
//!      │  cont if the guest ran, record "owner"                                kill QEMU, then say so
//! ```
//!
//! # Who has the machine, and what failure leaves behind
//!
//! | source | target | machine is at | a crash of this worker leaves |
//! |---|---|---|---|
//! | Preparing, Opening, Ready | Idle, Awaiting | source, running | the guest running; a restarted source takes back, a restarted target refuses |
//! | Stopping | Awaiting | source | source: QEMU runs the guest again by itself, since SHUT wasn't answered |
//! | Flushing | Awaiting | source, stopped | source: QEMU paused or running again; the restarted source says `cont` |
//! | Given | Awaiting | the token is on its way | source: QEMU in `postmigrate`, does nothing; asks the target. Target: refuses, so the source continues |
//! | Given | Verifying, Loading | target may still refuse | target: its QEMU hasn't run (same boot): it is killed and the epoch refused |
//! | Given | Starting | target | target: record "mine"; QEMU paused: `cont` again; running: fine; dead: the machine died there |
//! | Given, Settled | Taken | target | the source's QEMU stays paused until it learns so, then it is killed |
//! | Given, Settled | Refused | source | the source's `cont` is repeated |
//!
//! A crash of a *host* kills its QEMU and loses what wasn't synced. "Offered" is synced before the gate opens, so a
//! source that boots asks before it starts anything. "Taking" is synced before the guest runs, so a target that boots
//! never refuses a machine that may have run; that fsync happens while QEMU loads and costs the pause nothing unless
//! the disk is slower than QEMU.
//!
//! # Rules
//!
//! 1. A source whose record says "given away n" never runs the guest until the target refused n.
//! 2. A target never runs the guest before it received and verified everything, loaded it, and synced "taking n".
//! 3. A target that refused n has that on disk, and its QEMU is dead before it says so. It never accepts n again.
//! 4. A refusal is legal until the guest may have run, even if `cont` was tried and failed.
//! 5. The source's QEMU is killed only when the target has taken the machine.
//! 6. A guest that didn't run before the stop isn't continued, on either side.
//! 7. Who is told to stand down by a newer epoch has that on disk, and its QEMU is dead, before it says so. No rule can
//!    hold a host that can't be reached: declaring it lost is an operator's word, and a fence is what makes it true.
//! 8. A record that ends the hand-over is written after what it stands for: "owner" at the source after `cont`, so that
//!    a crash in between repeats it. One that promises something is written before it is said.

mod record;
mod source;
pub mod store;
mod target;

use serde::{Deserialize, Serialize};

pub use record::{Permission, Record, RecordState};
pub use source::{Source, SourceEvent, SourceSettings};
pub use target::{Target, TargetEvent};

/// Numbers the hand-overs of a machine. A new attempt takes the next number, whatever became of the last one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The number of the attempt after this one.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// What the guest did before it was stopped for the hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// It ran.
    Running,
    /// Its operator had paused it.
    Paused,
    /// It was asleep (ACPI S3); QEMU puts it to sleep again when it is continued.
    Suspended,
    /// QEMU had paused it on a disk error.
    IoError,
    /// It had panicked.
    Panicked,
}

impl RunState {
    /// Whether `cont` restores this state.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Suspended)
    }
}

/// What a restarted worker finds of the machine's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QemuState {
    /// No process.
    Dead,
    /// A destination that hasn't loaded everything.
    Incoming,
    /// Complete, and not running: a loaded destination, a source in `postmigrate`, or a guest paused by its operator.
    Paused,
    /// The guest runs.
    Running,
}

/// What the two sides say to each other about a hand-over. The token itself is [`crate::wire::Token`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum Message {
    /// Source: hand-over `epoch` is on my disk; put it on yours.
    OpenHandover {
        /// The attempt.
        epoch: Epoch,
    },
    /// Target: it is.
    HandoverOpened {
        /// The attempt.
        epoch: Epoch,
    },
    /// Source: it is off; or, once the token has left: refuse it if you still can.
    Cancel {
        /// The attempt.
        epoch: Epoch,
        /// One line.
        reason: String,
    },
    /// Source: did you take the machine? Unless it did, the target refuses now.
    Query {
        /// The attempt.
        epoch: Epoch,
    },
    /// Target: the machine is mine, and runs unless it wasn't to.
    Taken {
        /// The attempt.
        epoch: Epoch,
        /// When the guest went on, microseconds since the Unix epoch, by the target's clock; if it did and is known.
        resumed_unix_us: Option<u64>,
    },
    /// Target: I don't have it, never will, and my QEMU is dead.
    Refused {
        /// The attempt.
        epoch: Epoch,
        /// One line.
        reason: String,
    },
    /// Either: an operator declared you lost and gave the machine to me; end what you have of it.
    StandDown {
        /// Newer than everything that the lost host can know; see [`Record::reclaimed`].
        epoch: Epoch,
    },
    /// Whoever was lost: I have nothing of it any more, and never will again under an older epoch.
    StoodDown {
        /// The order's.
        epoch: Epoch,
    },
}

impl Message {
    /// The attempt that the message is about.
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::OpenHandover { epoch }
            | Self::HandoverOpened { epoch }
            | Self::Cancel { epoch, .. }
            | Self::Query { epoch }
            | Self::Taken { epoch, .. }
            | Self::Refused { epoch, .. }
            | Self::StandDown { epoch }
            | Self::StoodDown { epoch } => *epoch,
        }
    }
}

/// When a record has to survive the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sync {
    /// It is synced before the next action begins.
    Before,
    /// It is written before the next action begins, so that it survives this process; it is synced as soon as
    /// possible beside the next actions.
    Behind,
}

/// What the shell has to do; in order, each complete before the next one begins.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Replace the machine's record.
    Persist {
        /// The new one.
        record: Record,
        /// When it has to survive the host.
        sync: Sync,
    },
    /// Send a message, on the urgent lane.
    Send(Message),
    /// Source: let SWITCHOVER_ACK through; QEMU stops the guest.
    OpenGate,
    /// Source: answer SHUT on QEMU's return path; QEMU becomes `postmigrate` once its last byte is written.
    AnswerShut,
    /// Source: send the token, in the same flight as the last byte.
    SendToken {
        /// The attempt.
        epoch: Epoch,
        /// What the guest did before the stop.
        run_state: RunState,
        /// Don't run it at the target, whatever it did.
        leave_paused: bool,
    },
    /// Source: cancel QEMU's migration if it is still on, and wait until it is over; QEMU then restores the run state
    /// by itself, unless it was `completed` already.
    AbortMigration,
    /// Say `cont` unless the guest runs already.
    ContinueGuest,
    /// End QEMU and wait until the process is gone. Nothing to do if it is.
    KillQemu,
    /// Target: compare everything that arrived with what the token promises.
    Verify,
    /// Target: let QEMU load the rest of the stream.
    Load,
    /// Tell the agent.
    Report(Outcome),
}

/// What became of a hand-over, as this side knows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Source: the machine is at the target.
    HandedOver {
        /// See [`Message::Taken`].
        resumed_unix_us: Option<u64>,
    },
    /// Source: the machine is here, as it was.
    TakenBack {
        /// One line.
        reason: String,
    },
    /// Source: the token left and the target doesn't answer. Not final: its answer still settles it.
    Unsettled,
    /// Target: the machine is here.
    Taken,
    /// Target: the machine isn't here.
    Refused {
        /// One line.
        reason: String,
    },
    /// Either: the machine belongs to this host, and its QEMU is dead.
    Died {
        /// One line.
        reason: String,
    },
}

#[cfg(test)]
mod tests;
