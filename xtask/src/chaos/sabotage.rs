//! A test of the test: programs that do one thing wrong, which chaos has to find.

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::{
    carry_out,
    fault::Fault,
    plan::{Moment, Plan, Sign},
    stage::Stage,
};
use crate::{chaos::fault::Side, product};

/// Rounds until which it has to be found.
const ROUNDS_MAX: u64 = 12;

/// What a sabotaged program does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sabotage {
    /// The target's QEMU is started without `-S`, so that it runs the guest by itself.
    DashS,
    /// The source doesn't answer SHUT, so that its QEMU doesn't end its migration.
    Shut,
    /// A page is left out before anything is summed up over it.
    Page,
    /// The source doesn't write down that the token has left.
    Fence,
}

impl Sabotage {
    /// All of them.
    pub(crate) const ALL: [Sabotage; 4] = [Sabotage::DashS, Sabotage::Shut, Sabotage::Page, Sabotage::Fence];

    /// Its name, on the command line and in the program's environment.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Sabotage::DashS => "dash-s",
            Sabotage::Shut => "shut",
            Sabotage::Page => "page",
            Sabotage::Fence => "fence",
        }
    }

    /// What brings it to light: where nothing needs to go wrong besides, something that hardly matters.
    fn revealed_by(self) -> (Fault, Moment) {
        let at = |side, sign| Moment::After(side, sign, std::time::Duration::ZERO);
        match self {
            Sabotage::DashS => (Fault::StopTargetWorker, at(Side::Target, Sign::Record("taking"))),
            Sabotage::Shut | Sabotage::Page => {
                (Fault::KillCommandLine, at(Side::Source, Sign::Phase("pre_copy")))
            }
            Sabotage::Fence => (Fault::KillSourceWorker, at(Side::Target, Sign::Phase("handed_over"))),
        }
    }
}

/// Builds the program and runs rounds until one fails.
///
/// # Errors
/// When none does.
pub(super) fn run(sabotage: Sabotage, seed: u64) -> Result<()> {
    let program = product::build(&["--features", "sabotage"])?;
    let mut stage = Stage::new(&program, Some(sabotage.name()))?;
    let (fault, moment) = sabotage.revealed_by();
    for number in 0..ROUNDS_MAX {
        let mut plan = Plan::of(seed, number, Some(fault));
        plan.strikes.truncate(1);
        plan.strikes[0].moment = moment;
        if carry_out(&mut stage, &plan)?.has_failed() {
            println!("{} was found", sabotage.name());
            return Ok(());
        }
    }
    bail!("{} wasn't found in {ROUNDS_MAX} rounds", sabotage.name())
}
