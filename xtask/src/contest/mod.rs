//! Busy guests, mostly one, one link, and whoever moves them: what the demo shows and the bench measures.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use godwit_sim::{
    guest_image::{BUILD, GuestImage, Program},
    lab::{FIRST_GUEST_ADDRESS, Lab},
};

mod contender;
pub(crate) mod cores;
mod fleet;
mod floor;
mod godwit;
pub(crate) mod hosts;
mod outcome;
mod plain_qemu;
mod responses;
mod target;
mod tls;
pub(crate) mod watch;

pub(crate) use self::{
    contender::{Contender, NO_SHARED},
    outcome::{Account, Forecast, Outcome, Range},
    responses::{Means, Responses},
    target::Target,
    watch::Span,
};

/// The pause that godwit aims at, and that one of QEMU's contenders is given as its limit.
pub(crate) const DOWNTIME_TARGET: Duration = Duration::from_millis(50);
/// Memory of a guest that is alone.
pub(crate) const GUEST_MEMORY_MB: u64 = 512;
/// Memory of each of the guests that build together.
pub(crate) const BUILD_MEMORY_MB: u64 = 256;
/// The contender that all others are there for.
pub(crate) const GODWIT: &str = "godwit";

/// Where a contender does its work.
pub(crate) struct Stage<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) image: &'a GuestImage,
    pub(crate) load: Load<'a>,
    /// Of each guest.
    pub(crate) memory_mb: u64,
    /// More options for `godwit migrate`.
    pub(crate) migrate: &'a [String],
    /// The program.
    pub(crate) godwit: &'a Path,
    pub(crate) patience: Patience,
    /// At host a the guest shares its core with something that never rests, at host b it has it to itself (CloudNet, 6.5.4).
    pub(crate) is_burst: bool,
    /// godwit moves the guest back, no longer timed, and both memories are compared.
    pub(crate) compares_memories: bool,
    /// The floor of the guest's memory is worked out where godwit has moved it.
    pub(crate) finds_floor: bool,
}

/// How long contenders have before they are given up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// What nobody has more of.
    pub(crate) at_most: Duration,
    /// By how much all that is stretched.
    pub(crate) times: u32,
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
    /// One build by so many guests; the stage's image has [`BUILD`].
    Build {
        /// At least one.
        guests: u8,
    },
}

impl Patience {
    /// Everybody's own.
    pub(crate) const USUAL: Patience = Patience { at_most: Duration::MAX, times: 1 };

    /// What is left of a contender's own.
    fn of(self, own: Duration) -> Duration {
        own.min(self.at_most).saturating_mul(self.times)
    }
}

impl<'a> Load<'a> {
    /// How many guests are moved at once.
    pub(crate) fn guests(self) -> u8 {
        match self {
            Load::Build { guests } => guests,
            _ => 1,
        }
    }

    fn program(self) -> Option<&'static Program> {
        match self {
            Load::Program(program) => Some(program),
            Load::Build { .. } => Some(const { &BUILD }),
            _ => None,
        }
    }

    /// The kernel command line of a guest.
    fn command_line(self, guest: u8, beat: Option<SocketAddr>) -> String {
        let line = |workload| GuestImage::command_line(workload, guest_address(guest), beat);
        match self {
            Load::Workload(name) => line(name),
            Load::Command(command) => line("idle") + &GuestImage::command_word(command),
            Load::Program(program) => line("idle") + &GuestImage::command_word(&program.command()),
            Load::Build { guests } => {
                let command = format!("{} {guest} {guests}", BUILD.command());
                line("idle") + &GuestImage::command_word(&command)
            }
        }
    }
}

impl Stage<'_> {
    /// The kernel command line of the first guest, the one that beats.
    pub(crate) fn command_line(&self, beat: SocketAddr) -> String {
        self.load.command_line(0, Some(beat))
    }

    /// The kernel command lines of all guests.
    fn command_lines(&self, beat: SocketAddr) -> Vec<String> {
        let beat_of = |guest| (guest == 0).then_some(beat);
        (0..self.load.guests()).map(|guest| self.load.command_line(guest, beat_of(guest))).collect()
    }
}

/// Where a guest is.
fn guest_address(guest: u8) -> Ipv4Addr {
    let [a, b, c, d] = FIRST_GUEST_ADDRESS.octets();
    Ipv4Addr::new(a, b, c, d.saturating_add(guest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_that_build_know_which_they_are_and_only_the_first_beats() {
        let load = Load::Build { guests: 4 };
        let beat: SocketAddr = ([10, 78, 0, 1], 9000).into();
        let lines = [load.command_line(0, Some(beat)), load.command_line(3, None)];
        let command = |guest| GuestImage::command_word(&format!("/programs/build {guest} 4"));
        assert!(lines[0].ends_with(&format!("address=10.78.0.10 observer=10.78.0.1:9000{}", command(0))));
        assert!(lines[1].ends_with(&format!("address=10.78.0.13{}", command(3))), "{}", lines[1]);
        assert_eq!(load.guests(), 4);
    }
}
