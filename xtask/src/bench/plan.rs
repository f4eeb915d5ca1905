//! Who has a turn when.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::{Result, bail};
use godwit_sim::{
    guest_image::{BUILD, PROGRAMS, Program},
    lab::Wiring,
    link::Shape,
};

use super::Request;
use crate::contest::{BUILD_MEMORY_MB, Contender, GODWIT, GUEST_MEMORY_MB, NO_SHARED, Patience};

/// What a full bench runs before the real programs.
const WORKLOADS: [&str; 5] = ["idle", "light", "medium", "heavy", "harsh"];
/// What nobody has more of in a quick bench.
const QUICK_LIMIT: Duration = Duration::from_secs(60);
const QUICK_WORKLOADS: [&str; 2] = ["medium", "heavy"];
const ONLY_MEDIUM: [&str; 1] = ["medium"];
/// godwit, and QEMU's best two in bytes and time.
const BEST: [&str; 3] = [GODWIT, "qemu-xbzrle", "qemu-multifd-zstd"];
/// The same where several guests are moved, and godwit without what they share.
const BEST_OF_SEVERAL: [&str; 4] = [GODWIT, NO_SHARED, "qemu-xbzrle", "qemu-multifd-zstd"];
/// The same over links on which compressing takes longer than sending.
const BEST_ON_FAST_LINKS: [&str; 4] = [GODWIT, "qemu-precopy", "qemu-multifd", "qemu-multifd-zstd"];
/// The same where nothing but the machine limits: with encryption, as godwit has it, and without.
const BEST_UNLIMITED: [&str; 5] =
    [GODWIT, "qemu-precopy-tls", "qemu-multifd-tls", "qemu-precopy", "qemu-multifd"];
const SWEEP_SLOW_RATES: [Rate; 3] =
    [Rate::MegabitsPerSecond(50), Rate::MegabitsPerSecond(100), Rate::MegabitsPerSecond(300)];
/// Without delay: a relay that delays so much would take more of the processor than who is measured.
const SWEEP_FAST_LINKS: [Link; 2] = [
    Link { rate: Rate::MegabitsPerSecond(FAST_LINK_MBIT), round_trip_ms: 0 },
    Link { rate: Rate::Unlimited, round_trip_ms: 0 },
];
const SWEEP_ROUND_TRIPS_MS: [u64; 4] = [0, 10, 20, 100];
/// What runs that have a command of the caller's are listed under.
const GUEST_COMMAND: &str = "command";
/// So that it fits on the kernel's command line, of 2,048 bytes, with each byte as two digits.
const MAX_COMMAND_BYTES: usize = 900;
/// From this rate on the link no longer decides alone.
const FAST_LINK_MBIT: u64 = 1_000;
const USUAL_ROUND_TRIP_MS: u64 = 20;
/// As many as a host of the lab has memory and addresses for, several times over.
const GUESTS_MAX: u8 = 16;

/// A link between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) rate: Rate,
    pub(super) round_trip_ms: u64,
}

/// What a link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rate {
    MegabitsPerSecond(u64),
    /// Whatever the machine does.
    Unlimited,
}

/// What is to be run.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) links: Vec<Link>,
    pub(super) workloads: Vec<String>,
    /// How many are moved at once.
    pub(super) guests: Vec<u8>,
    /// `None`: on each link those that are best there.
    chosen: Option<Vec<&'static Contender>>,
    pub(super) rounds: u32,
    pub(super) guest_command: Option<String>,
    /// It is to be over soon: nobody has much time, but everybody all their turns.
    pub(super) is_quick: bool,
}

/// One migration.
#[derive(Debug, Clone)]
pub(super) struct Turn {
    pub(super) link: Link,
    pub(super) workload: String,
    pub(super) guests: u8,
    pub(super) guest_command: Option<String>,
    pub(super) contender: &'static Contender,
    pub(super) round: u32,
}

impl Plan {
    /// What the command line asks for.
    ///
    /// # Errors
    /// When it names a contender or a workload that there isn't, a link without a rate, an unlimited one with a delay, no
    /// guests or too many, or too long a command.
    pub(super) fn of(request: &Request) -> Result<Plan> {
        if request.guest_command.as_ref().is_some_and(|command| command.len() > MAX_COMMAND_BYTES) {
            bail!("the guest's command has more than {MAX_COMMAND_BYTES} bytes");
        }
        if request.guests.iter().any(|guests| !(1..=GUESTS_MAX).contains(guests)) {
            bail!("1 to {GUESTS_MAX} guests can be moved at once");
        }
        let chosen = chosen(request).map(|names| names.into_iter().map(Contender::named).collect());
        Ok(Plan {
            links: links(request)?,
            workloads: workloads(request)?,
            guests: if request.guests.is_empty() { vec![1] } else { request.guests.clone() },
            chosen: chosen.transpose()?,
            rounds: request.rounds,
            guest_command: request.guest_command.clone(),
            is_quick: request.quick,
        })
    }

    /// Who has a turn on a link.
    pub(super) fn contenders(&self, link: Link) -> Vec<&'static Contender> {
        let best = match link.rate {
            Rate::Unlimited => &BEST_UNLIMITED[..],
            _ if link.is_fast() => &BEST_ON_FAST_LINKS,
            _ => &BEST,
        };
        // In the order of their names here; that there are such contenders is tested.
        let of_best = || best.iter().filter_map(|name| Contender::named(name).ok()).collect();
        self.chosen.clone().unwrap_or_else(of_best)
    }

    /// Whether godwit is among the contenders.
    pub(super) fn has_godwit(&self) -> bool {
        self.chosen.as_ref().is_none_or(|chosen| chosen.iter().any(|contender| contender.is_godwit()))
    }

    /// How long contenders have over the usual link, alone.
    pub(super) fn patience(&self) -> Patience {
        Patience { at_most: if self.is_quick { QUICK_LIMIT } else { Duration::MAX }, ..Patience::USUAL }
    }

    /// Memory of each guest.
    pub(super) fn guest_mb(&self) -> u64 {
        self.workloads.iter().map(|workload| guest_mb(workload)).max().unwrap_or(GUEST_MEMORY_MB)
    }

    /// The real programs among the workloads.
    pub(super) fn programs(&self) -> impl Iterator<Item = &'static Program> {
        self.workloads.iter().filter_map(|name| Program::named(name))
    }

    /// All turns in their order: one of everybody, then the next round.
    pub(super) fn turns(&self) -> Vec<Turn> {
        let mut turns = Vec::new();
        for (link, guests) in self.fields() {
            for round in 1..=self.rounds {
                for workload in &self.workloads {
                    turns.extend(self.contenders(link).into_iter().map(|contender| Turn {
                        link,
                        workload: workload.clone(),
                        guests,
                        guest_command: self.guest_command.clone(),
                        contender,
                        round,
                    }));
                }
            }
        }
        turns
    }

    /// Each link with each number of guests.
    pub(super) fn fields(&self) -> impl Iterator<Item = (Link, u8)> {
        self.links.iter().flat_map(|link| self.guests.iter().map(|guests| (*link, *guests)))
    }
}

impl Turn {
    /// Memory of each guest.
    pub(super) fn guest_mb(&self) -> u64 {
        guest_mb(&self.workload)
    }
}

/// Memory of a guest with a workload.
fn guest_mb(workload: &str) -> u64 {
    if workload == BUILD.name { BUILD_MEMORY_MB } else { GUEST_MEMORY_MB }
}

impl Link {
    /// Whether it is so fast that it doesn't decide alone how long a migration takes.
    pub(super) fn is_fast(self) -> bool {
        match self.rate {
            Rate::MegabitsPerSecond(rate) => rate >= FAST_LINK_MBIT,
            Rate::Unlimited => true,
        }
    }

    /// How the lab's hosts are joined: fast links without delay are none of the relay's business.
    pub(super) fn wiring(self) -> Wiring {
        match self.rate {
            Rate::MegabitsPerSecond(rate) if !self.is_fast() || self.round_trip_ms > 0 => {
                Wiring::Relayed(Shape::symmetric(rate, Duration::from_millis(self.round_trip_ms)))
            }
            rate => Wiring::Straight { megabits_per_second: rate.megabits_per_second() },
        }
    }
}

impl Rate {
    /// `None`: unlimited.
    pub(super) fn megabits_per_second(self) -> Option<u64> {
        match self {
            Rate::MegabitsPerSecond(rate) => Some(rate),
            Rate::Unlimited => None,
        }
    }
}

impl From<Option<u64>> for Rate {
    fn from(megabits_per_second: Option<u64>) -> Rate {
        megabits_per_second.map_or(Rate::Unlimited, Rate::MegabitsPerSecond)
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        match text.parse() {
            _ if text == "unlimited" => Ok(Rate::Unlimited),
            Ok(rate @ 1..) => Ok(Rate::MegabitsPerSecond(rate)),
            _ => Err("a whole number of Mbit/s, or `unlimited`".into()),
        }
    }
}

/// Names of contenders; `None`: on each link those that are best there.
fn chosen(request: &Request) -> Option<Vec<&str>> {
    let all = || Contender::all().map(|contender| contender.name);
    match request {
        _ if !request.contenders.is_empty() => Some(request.contenders.iter().map(String::as_str).collect()),
        Request { sweep: true, .. } => None,
        Request { rate: Rate::Unlimited, .. } => None,
        _ if !request.guests.is_empty() => Some(BEST_OF_SEVERAL.to_vec()),
        Request { quick: true, .. } => Some(BEST.to_vec()),
        Request { techniques: true, .. } => Some(
            [GODWIT].into_iter().chain(Contender::techniques().map(|contender| contender.name)).collect(),
        ),
        _ => Some(all().collect()),
    }
}

fn links(request: &Request) -> Result<Vec<Link>> {
    if !request.sweep {
        let usual = if request.rate == Rate::Unlimited { 0 } else { USUAL_ROUND_TRIP_MS };
        let link = Link { rate: request.rate, round_trip_ms: request.round_trip.unwrap_or(usual) };
        if link.rate == Rate::Unlimited && link.round_trip_ms > 0 {
            bail!("an unlimited link has no delay: what emulates one would be the limit");
        }
        return Ok(vec![link]);
    }
    let of_rate = |rate| SWEEP_ROUND_TRIPS_MS.map(|round_trip_ms| Link { rate, round_trip_ms });
    Ok(SWEEP_SLOW_RATES.into_iter().flat_map(of_rate).chain(SWEEP_FAST_LINKS).collect())
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
        _ if !request.guests.is_empty() => owned(&[BUILD.name]),
        _ if !request.workloads.is_empty() => request.workloads.clone(),
        Request { quick: true, .. } => owned(&QUICK_WORKLOADS),
        Request { sweep: true, .. } | Request { techniques: true, .. } => owned(&ONLY_MEDIUM),
        _ => owned(&all),
    })
}

/// As the command line has it.
impl fmt::Display for Rate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rate::MegabitsPerSecond(rate) => write!(formatter, "{rate}"),
            Rate::Unlimited => formatter.write_str("unlimited"),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.rate == Rate::Unlimited { "" } else { " Mbit/s" };
        write!(formatter, "{}{unit}, {} ms", self.rate, self.round_trip_ms)
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Turn { link, workload, guests, contender, round, .. } = self;
        let guests = if *guests > 1 { format!(" · {guests} guests") } else { String::new() };
        write!(formatter, "{} · {workload}{guests} · {link} · round {round}", contender.name)
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
        assert_eq!(plan.patience().at_most, QUICK_LIMIT);
    }

    #[test]
    fn guests_that_are_moved_at_once_build_together() {
        let plan = plan(&["--guests", "1,2,4", "--rounds", "2"]).unwrap();
        let turns = plan.turns();
        let guests: Vec<u8> = turns.iter().step_by(8).map(|turn| turn.guests).collect();
        assert_eq!((turns.len(), guests), (3 * 4 * 2, vec![1, 2, 4]));
        assert_eq!((turns[1].contender.name, turns[1].guest_mb()), (NO_SHARED, BUILD_MEMORY_MB));
        assert!(turns[20].to_string().starts_with("godwit · build · 4 guests · 100 Mbit/s, 20 ms"));
    }

    #[test]
    fn fast_links_need_no_relay_and_have_rivals_of_their_own() {
        let unlimited = plan(&["--rate", "unlimited", "--workloads", "medium"]).unwrap();
        let link = unlimited.links[0];
        assert_eq!(link.wiring(), Wiring::Straight { megabits_per_second: None });
        assert_eq!(unlimited.contenders(link).len(), BEST_UNLIMITED.len());
        assert!(plan(&["--rate", "unlimited", "--round-trip", "20"]).is_err());
        let link = |round_trip_ms| Link { rate: Rate::MegabitsPerSecond(1_000), round_trip_ms };
        assert_eq!(link(0).wiring(), Wiring::Straight { megabits_per_second: Some(1_000) });
        assert!(matches!(link(20).wiring(), Wiring::Relayed(_)));
        let slow = Link { rate: Rate::MegabitsPerSecond(100), round_trip_ms: 0 };
        assert!(matches!(slow.wiring(), Wiring::Relayed(_)));
    }

    #[test]
    fn choices_narrow_a_bench_and_unknown_names_end_it() {
        let plan_of_one = plan(&["--contenders", "qemu-postcopy", "--workloads", "light", "--rounds", "1"]);
        assert_eq!(plan_of_one.unwrap().turns().len(), 1);
        assert_eq!(plan(&["--sweep"]).unwrap().turns().len(), (12 * 3 + 4 + 5) * 3);
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
            ["--rate", "fast"],
            ["--guests", "0"],
            ["--guests", "1,17"],
            ["--guest-command", &too_long],
        ] {
            assert!(plan(&wrong).is_err(), "{wrong:?}");
        }
    }
}
