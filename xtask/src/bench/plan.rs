//! Who has a turn when.

use std::fmt;

use anyhow::{Result, bail};
use godwit_sim::guest_image::{PROGRAMS, Program};

use super::Request;
use crate::contest::{Contender, GODWIT};

/// What a full bench runs before the real programs.
const WORKLOADS: [&str; 5] = ["idle", "light", "medium", "heavy", "harsh"];
const QUICK_WORKLOADS: [&str; 2] = ["medium", "heavy"];
const ONLY_MEDIUM: [&str; 1] = ["medium"];
/// godwit, and QEMU's best two in bytes and time.
const BEST: [&str; 3] = [GODWIT, "qemu-xbzrle", "qemu-multifd-zstd"];
const SWEEP_RATES_MBIT: [u64; 4] = [50, 100, 300, 1_000];
const SWEEP_ROUND_TRIPS_MS: [u64; 4] = [0, 10, 20, 100];
/// What runs that have a command of the caller's are listed under.
const GUEST_COMMAND: &str = "command";
/// So that it fits on the kernel's command line, of 2,048 bytes, with each byte as two digits.
const MAX_COMMAND_BYTES: usize = 900;

/// An emulated link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Link {
    pub(super) rate_mbit: u64,
    pub(super) round_trip_ms: u64,
}

/// What is to be run.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) links: Vec<Link>,
    pub(super) workloads: Vec<String>,
    pub(super) contenders: Vec<&'static Contender>,
    pub(super) rounds: u32,
    pub(super) guest_command: Option<String>,
}

/// One migration.
#[derive(Debug, Clone)]
pub(super) struct Turn {
    pub(super) link: Link,
    pub(super) workload: String,
    pub(super) guest_command: Option<String>,
    pub(super) contender: &'static Contender,
    pub(super) round: u32,
}

impl Plan {
    /// What the command line asks for.
    ///
    /// # Errors
    /// When it names a contender or a workload that there isn't, a link without a rate, or too long a command.
    pub(super) fn of(request: &Request) -> Result<Plan> {
        if request.rate == 0 {
            bail!("a link needs a rate");
        }
        if request.guest_command.as_ref().is_some_and(|command| command.len() > MAX_COMMAND_BYTES) {
            bail!("the guest's command has more than {MAX_COMMAND_BYTES} bytes");
        }
        let all: Vec<&str> = Contender::all().map(|contender| contender.name).collect();
        let contenders = match request.contenders.iter().map(String::as_str).collect::<Vec<_>>() {
            chosen if !chosen.is_empty() => chosen,
            _ if request.quick || request.sweep => BEST.to_vec(),
            _ if request.techniques => {
                [GODWIT].into_iter().chain(Contender::techniques().map(|contender| contender.name)).collect()
            }
            _ => all,
        };
        Ok(Plan {
            links: links(request),
            workloads: workloads(request)?,
            contenders: contenders.into_iter().map(Contender::named).collect::<Result<_>>()?,
            rounds: request.rounds,
            guest_command: request.guest_command.clone(),
        })
    }

    /// Whether godwit is among the contenders.
    pub(super) fn has_godwit(&self) -> bool {
        self.contenders.iter().any(|contender| contender.is_godwit())
    }

    /// The real programs among the workloads.
    pub(super) fn programs(&self) -> impl Iterator<Item = &'static Program> {
        self.workloads.iter().filter_map(|name| Program::named(name))
    }

    /// All turns in their order: one of everybody, then the next round.
    pub(super) fn turns(&self) -> Vec<Turn> {
        let mut turns = Vec::new();
        for link in &self.links {
            for round in 1..=self.rounds {
                for workload in &self.workloads {
                    turns.extend(self.contenders.iter().map(|contender| Turn {
                        link: *link,
                        workload: workload.clone(),
                        guest_command: self.guest_command.clone(),
                        contender,
                        round,
                    }));
                }
            }
        }
        turns
    }
}

fn links(request: &Request) -> Vec<Link> {
    if !request.sweep {
        return vec![Link { rate_mbit: request.rate, round_trip_ms: request.round_trip }];
    }
    let of_rate = |rate_mbit| SWEEP_ROUND_TRIPS_MS.map(|round_trip_ms| Link { rate_mbit, round_trip_ms });
    SWEEP_RATES_MBIT.into_iter().flat_map(of_rate).collect()
}

fn workloads(request: &Request) -> Result<Vec<String>> {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    if request.guest_command.is_some() {
        return Ok(owned(&[GUEST_COMMAND]));
    }
    let all: Vec<&str> = WORKLOADS.into_iter().chain(PROGRAMS.map(|program| program.name)).collect();
    if let Some(unknown) = request.workloads.iter().find(|name| !all.contains(&name.as_str())) {
        bail!("no workload {unknown}; there are {}", all.join(", "));
    }
    Ok(match request {
        _ if !request.workloads.is_empty() => request.workloads.clone(),
        Request { quick: true, .. } => owned(&QUICK_WORKLOADS),
        Request { sweep: true, .. } | Request { techniques: true, .. } => owned(&ONLY_MEDIUM),
        _ => owned(&all),
    })
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} Mbit/s, {} ms", self.rate_mbit, self.round_trip_ms)
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Turn { link, workload, contender, round, .. } = self;
        write!(formatter, "{} · {workload} · {link} · round {round}", contender.name)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        request: Request,
    }

    fn plan(arguments: &[&str]) -> Result<Plan> {
        let line = Line::try_parse_from(["bench"].iter().chain(arguments))?;
        Plan::of(&line.request)
    }

    #[test]
    fn a_quick_bench_takes_turns() {
        let plan = plan(&["--quick"]).unwrap();
        let turns = plan.turns();
        let first: Vec<&str> = turns.iter().take(4).map(|turn| turn.contender.name).collect();
        assert_eq!(first, ["godwit", "qemu-xbzrle", "qemu-multifd-zstd", "godwit"]);
        assert_eq!((turns.len(), turns[3].workload.as_str(), turns[6].round), (18, "heavy", 2));
    }

    #[test]
    fn choices_narrow_a_bench_and_unknown_names_end_it() {
        let plan_of_one = plan(&["--contenders", "qemu-postcopy", "--workloads", "light", "--rounds", "1"]);
        assert_eq!(plan_of_one.unwrap().turns().len(), 1);
        assert_eq!(plan(&["--sweep"]).unwrap().turns().len(), 16 * 3 * 3);
        assert_eq!(plan(&["--techniques"]).unwrap().turns().len(), 11 * 3);
        assert_eq!(plan(&["--guest-command", "ls"]).unwrap().workloads, ["command"]);
        let plan_of_all = plan(&[]).unwrap();
        assert_eq!(plan_of_all.workloads[4..], ["harsh", "sqlite", "redis", "compress", "web"]);
        assert_eq!(plan_of_all.programs().count(), 4);
        let too_long = "x".repeat(MAX_COMMAND_BYTES + 1);
        for wrong in [
            ["--contenders", "xen"],
            ["--workloads", "hard"],
            ["--rate", "0"],
            ["--guest-command", &too_long],
        ] {
            assert!(plan(&wrong).is_err(), "{wrong:?}");
        }
    }
}
