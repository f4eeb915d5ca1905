//! One busy guest, one link, and whoever moves it: what the demo shows and the bench measures.

use std::{net::SocketAddr, path::Path, time::Duration};

use godwit_sim::{
    guest_image::{GuestImage, Program},
    lab::Lab,
};

mod contender;
pub(crate) mod cores;
mod floor;
mod godwit;
pub(crate) mod hosts;
mod outcome;
mod plain_qemu;
mod responses;
mod target;
pub(crate) mod watch;

pub(crate) use self::{
    contender::Contender,
    outcome::{Account, Outcome},
    responses::Responses,
    target::Target,
    watch::Span,
};

/// The pause that godwit aims at, and that one of QEMU's contenders is given as its limit.
pub(crate) const DOWNTIME_TARGET: Duration = Duration::from_millis(50);
/// Memory of the guest.
pub(crate) const GUEST_MEMORY_MB: u64 = 512;
/// The contender that all others are there for.
pub(crate) const GODWIT: &str = "godwit";

/// Where a contender does its work.
pub(crate) struct Stage<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) image: &'a GuestImage,
    pub(crate) load: Load<'a>,
    /// More options for `godwit migrate`.
    pub(crate) migrate: &'a [String],
    /// The program.
    pub(crate) godwit: &'a Path,
    /// By how much the time is stretched that contenders have.
    pub(crate) patience: u32,
    /// godwit moves the guest back, no longer timed, and both memories are compared.
    pub(crate) compares_memories: bool,
    /// The floor of the guest's memory is worked out where godwit has moved it.
    pub(crate) finds_floor: bool,
}

/// What the guest does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Load<'a> {
    /// A workload of its own program, by name.
    Workload(&'a str),
    /// A command, again and again.
    Command(&'a str),
    /// A real program, which the stage's image has.
    Program(&'static Program),
}

impl Stage<'_> {
    /// The guest's kernel command line.
    pub(crate) fn command_line(&self, beat: SocketAddr) -> String {
        let line = |workload| GuestImage::command_line(workload, watch::GUEST_ADDRESS, Some(beat));
        match self.load {
            Load::Workload(name) => line(name),
            Load::Command(command) => line("idle") + &GuestImage::command_word(command),
            Load::Program(program) => line("idle") + &GuestImage::command_word(&program.command()),
        }
    }
}
