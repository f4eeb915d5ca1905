//! Whole migrations in virtual time, from a seed.
//!
//! Two hosts and a link. On them run the product's own cores: the hand-over's two halves, also restarted from their
//! records; the mover; the content encoder and decoder; the transport's session; the store of records on a
//! [`disk`] that forgets what wasn't synced. Around them is what a seed chooses: a guest that writes to its memory, the
//! link's rate and delay, how long everything takes, and what fails when.
//!
//! ```text
//!   seed ─► plan: machine, link, faults          ┌─ worker (source): pages owed ─► batches ─► session ─┐
//!             │                                   │                                                     ▼
//!             ▼                                   │   worker (target): batches ─► QEMU's memory ◄── session
//!   queue of events by virtual time ─► world ─────┤
//!             ▲                          │        ├─ agents: what workers leave behind, by the records
//!             └── events that follow ────┘        └─ disks, QEMUs, guest
//!                                        │
//!                                        └─► judge, after each event
//! ```
//!
//! What fails: the link is cut; frames of different lanes overtake each other; messages between agents come late, twice
//! or never; workers, agents, QEMUs and hosts die, also in the middle of a save; disks are full; verifying, loading and
//! `cont` fail; operators cancel, and stop the guest.
//!
//! What must hold, after every event: no two copies run, and none could be let run beside a running one; no two hosts
//! may start the machine by their records; a copy that is let run is the source's at the stop, page for page, and the
//! guest never goes back; a guest that is to stay paused does; godwit never ends the last complete copy. In the end one
//! host has the machine, both know it, and it does there what its operator wants; if its QEMU or host died while it
//! held it, it can be switched on there.
//!
//! What is simpler than in a real worker: there is no greeting; the stop comes when few pages are owed or after so many
//! passes; agents' messages are single and not requests with answers.

pub mod disk;

mod agent;
mod faults;
mod judge;
mod qemu;
mod sabotage;
mod site;
mod source;
mod target;
#[cfg(test)]
mod tests;
mod wire;
mod worker;
mod world;

use std::{fmt, ops::AddAssign};

pub use sabotage::Sabotage;
use world::World;

/// What became of a seed's migrations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// All that were begun.
    pub migrations: u64,
    /// The machine ended at the target.
    pub completed: u64,
    /// It ended at the source.
    pub rolled_back: u64,
    /// Times the machine died with the QEMU or the host that held it, as without a migration.
    pub died_with_owner: u64,
}

impl AddAssign for Account {
    fn add_assign(&mut self, other: Self) {
        self.migrations += other.migrations;
        self.completed += other.completed;
        self.rolled_back += other.rolled_back;
        self.died_with_owner += other.died_with_owner;
    }
}

/// Something that must hold didn't.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was run.
    pub seed: u64,
    /// What is wrong.
    pub violation: String,
    /// Everything up to there, a line each.
    pub trace: Vec<String>,
}

/// Lines of the trace that a failure shows.
const LINES_SHOWN: usize = 60;

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, violation, trace } = self;
        for line in &trace[trace.len().saturating_sub(LINES_SHOWN)..] {
            writeln!(formatter, "{line}")?;
        }
        writeln!(formatter, "seed {seed}: {violation}")?;
        write!(formatter, "replay: cargo run -p godwit-sim --example replay -- {seed}")
    }
}

impl std::error::Error for Failure {}

/// Runs a seed's migrations, one to three of them; with a guard taken away, if `sabotage` says so, only one.
///
/// # Errors
/// [`Failure`] if anything that must hold doesn't. The same seed always fails alike.
pub fn run(seed: u64, sabotage: Option<Sabotage>) -> Result<Account, Box<Failure>> {
    let mut world = World::new(seed, sabotage, false);
    match world.run() {
        Ok(()) => Ok(world.history.account),
        // Once more, and this time with a trace.
        Err(violation) => Err(Box::new(Failure { seed, violation, trace: trace(seed, sabotage) })),
    }
}

/// The trace of a seed's migrations, a line for each thing of note.
pub fn trace(seed: u64, sabotage: Option<Sabotage>) -> Vec<String> {
    let mut world = World::new(seed, sabotage, true);
    // What it ends with is known to whoever ran it.
    let _ = world.run();
    world.trace.unwrap_or_default()
}
