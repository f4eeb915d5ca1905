//! Who has a turn when.

use std::{fmt, ops::RangeInclusive, str::FromStr, time::Duration};

use anyhow::{Result, bail};
use godwit_sim::{
    guest_image::{BUILD, PROGRAMS, Program},
    lab::Wiring,
    link::Shape,
};

use super::{Request, USUAL_RATE_MBIT};
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
    Link { rate: Rate::MegabitsPerSecond(FAST_LINK_MBIT), round_trip_ms: 0, loss_per_mille: 0 },
    Link { rate: Rate::Unlimited, round_trip_ms: 0, loss_per_mille: 0 },
];
const SWEEP_ROUND_TRIPS_MS: [u64; 4] = [0, 10, 20, 100];
/// The web server's guest, which leaves a host where it shares its core; over CloudNet's link (6.5.4).
const BURST: &str = "burst";
const BURST_LINK: Link = Link { rate: Rate::MegabitsPerSecond(85), round_trip_ms: 27, loss_per_mille: 0 };
/// godwit, and QEMU as it comes and at its best.
const BEST_IN_A_BURST: [&str; 3] = [GODWIT, "qemu-precopy", "qemu-xbzrle"];
/// What runs that have a command of the caller's are listed under.
const GUEST_COMMAND: &str = "command";
/// So that it fits on the kernel's command line, of 2,048 bytes, with each byte as two digits.
const MAX_COMMAND_BYTES: usize = 900;
/// From this rate on the link no longer decides alone.
const FAST_LINK_MBIT: u64 = 1_000;
const USUAL_ROUND_TRIP_MS: u64 = 20;
/// The usual link with so many packets of a thousand lost, in a sweep.
const SWEEP_LOSS_PER_MILLE: u16 = 1;
/// Memory of the guest over the usual link, in a sweep; the usual size is there anyway.
const SWEEP_GUESTS_MB: [u64; 4] = [256, 1_024, 2_048, 4_096];
/// What the lab's machines have memory for, twice.
const GUEST_MB: RangeInclusive<u64> = 256..=8_192;
/// As many as a host of the lab has memory and addresses for, several times over.
const GUESTS_MAX: u8 = 16;

/// A link between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) rate: Rate,
    pub(super) round_trip_ms: u64,
    /// Packets lost by chance.
    pub(super) loss_per_mille: u16,
}

/// What a link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rate {
    MegabitsPerSecond(u64),
    /// Whatever the machine does.
    Unlimited,
}

/// A link, and what moves over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) link: Link,
    /// How many are moved at once.
    pub(super) guests: u8,
    /// Memory of each.
    pub(super) guest_mb: u64,
}

/// What is to be run.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) fields: Vec<Field>,
    pub(super) workloads: Vec<String>,
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
    pub(super) field: Field,
    pub(super) workload: String,
    pub(super) guest_command: Option<String>,
    pub(super) contender: &'static Contender,
    pub(super) round: u32,
}

impl Plan {
    /// What the command line asks for.
    ///
    /// # Errors
    /// When it names a contender or a workload that there isn't, a link without a rate, an unlimited one with a delay or a
    /// loss, no guests or too many, one too small or too large, or too long a command.
    pub(super) fn of(request: &Request) -> Result<Plan> {
        if request.guest_command.as_ref().is_some_and(|command| command.len() > MAX_COMMAND_BYTES) {
            bail!("the guest's command has more than {MAX_COMMAND_BYTES} bytes");
        }
        if request.guests.iter().any(|guests| !(1..=GUESTS_MAX).contains(guests)) {
            bail!("1 to {GUESTS_MAX} guests can be moved at once");
        }
        let chosen = chosen(request).map(|names| names.into_iter().map(Contender::named).collect());
        Ok(Plan {
            fields: fields(request)?,
            workloads: workloads(request)?,
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

    /// The real programs among the workloads.
    pub(super) fn programs(&self) -> impl Iterator<Item = &'static Program> {
        self.workloads.iter().filter_map(|name| program(name))
    }

    /// All turns in their order: one of everybody, then the next round.
    pub(super) fn turns(&self) -> Vec<Turn> {
        let mut turns = Vec::new();
        for &field in &self.fields {
            for round in 1..=self.rounds {
                for workload in &self.workloads {
                    turns.extend(self.contenders(field.link).into_iter().map(|contender| Turn {
                        field,
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

impl Turn {
    /// The real program that its guests run.
    pub(super) fn program(&self) -> Option<&'static Program> {
        program(&self.workload)
    }

    /// Whether the guest has more of a processor at the target.
    pub(super) fn is_burst(&self) -> bool {
        self.workload == BURST
    }
}

/// The real program of a workload.
fn program(workload: &str) -> Option<&'static Program> {
    Program::named(if workload == BURST { "web" } else { workload })
}

impl Link {
    /// Whether it is so fast that it doesn't decide alone how long a migration takes.
    pub(super) fn is_fast(self) -> bool {
        match self.rate {
            Rate::MegabitsPerSecond(rate) => rate >= FAST_LINK_MBIT,
            Rate::Unlimited => true,
        }
    }

    /// Whether it does what only a relay can.
    fn needs_relay(self) -> bool {
        self.round_trip_ms > 0 || self.loss_per_mille > 0
    }

    /// How the lab's hosts are joined: fast links without delay are none of the relay's business.
    pub(super) fn wiring(self) -> Wiring {
        match self.rate {
            Rate::MegabitsPerSecond(rate) if !self.is_fast() || self.needs_relay() => {
                let shape = Shape::symmetric(rate, Duration::from_millis(self.round_trip_ms));
                Wiring::Relayed(Shape { loss: f64::from(self.loss_per_mille) / 1e3, ..shape })
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
        Request { burst: true, .. } => Some(BEST_IN_A_BURST.to_vec()),
        Request { techniques: true, .. } => Some(
            [GODWIT].into_iter().chain(Contender::techniques().map(|contender| contender.name)).collect(),
        ),
        _ => Some(all().collect()),
    }
}

fn fields(request: &Request) -> Result<Vec<Field>> {
    if request.sweep {
        return Ok(sweep());
    }
    if request.burst {
        return Ok(vec![Field { link: BURST_LINK, guests: 1, guest_mb: GUEST_MEMORY_MB }]);
    }
    if let Some(wrong) = request.guest_mb.iter().find(|size| !GUEST_MB.contains(size)) {
        bail!("a guest of {wrong} MB: {} to {} MB", GUEST_MB.start(), GUEST_MB.end());
    }
    let link = link(request)?;
    let field = |guests, guest_mb| Field { link, guests, guest_mb };
    Ok(match (request.guests.as_slice(), request.guest_mb.as_slice()) {
        ([], []) => vec![field(1, GUEST_MEMORY_MB)],
        ([], sizes) => sizes.iter().map(|size| field(1, *size)).collect(),
        (numbers, _) => numbers.iter().map(|number| field(*number, BUILD_MEMORY_MB)).collect(),
    })
}

fn link(request: &Request) -> Result<Link> {
    let usual_ms = if request.rate == Rate::Unlimited { 0 } else { USUAL_ROUND_TRIP_MS };
    let round_trip_ms = request.round_trip.unwrap_or(usual_ms);
    let link = Link { rate: request.rate, round_trip_ms, loss_per_mille: request.loss };
    if link.rate == Rate::Unlimited && link.needs_relay() {
        bail!("an unlimited link neither delays nor loses: what emulates that would be the limit");
    }
    Ok(link)
}

/// Every link with the usual guest; the usual one also with losses, and with smaller and larger guests.
fn sweep() -> Vec<Field> {
    let of_rate =
        |rate| SWEEP_ROUND_TRIPS_MS.map(|round_trip_ms| Link { rate, round_trip_ms, loss_per_mille: 0 });
    let usual = Link {
        rate: Rate::MegabitsPerSecond(USUAL_RATE_MBIT),
        round_trip_ms: USUAL_ROUND_TRIP_MS,
        loss_per_mille: 0,
    };
    let lossy = Link { loss_per_mille: SWEEP_LOSS_PER_MILLE, ..usual };
    let links = SWEEP_SLOW_RATES.into_iter().flat_map(of_rate).chain(SWEEP_FAST_LINKS).chain([lossy]);
    let of_links = links.map(|link| Field { link, guests: 1, guest_mb: GUEST_MEMORY_MB });
    of_links.chain(SWEEP_GUESTS_MB.map(|guest_mb| Field { link: usual, guests: 1, guest_mb })).collect()
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
        Request { burst: true, .. } => owned(&[BURST]),
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
        write!(formatter, "{}{unit}, {} ms", self.rate, self.round_trip_ms)?;
        match self.loss_per_mille {
            0 => Ok(()),
            loss => write!(formatter, ", {} % lost", f64::from(loss) / 10.0),
        }
    }
}

/// What isn't as usual of the guests, and the link.
impl fmt::Display for Field {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.guests > 1 {
            write!(formatter, "{} guests, ", self.guests)?;
        }
        if self.guests == 1 && self.guest_mb != GUEST_MEMORY_MB {
            write!(formatter, "{} MB, ", self.guest_mb)?;
        }
        self.link.fmt(formatter)
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Turn { field, workload, contender, round, .. } = self;
        write!(formatter, "{} · {workload} · {field} · round {round}", contender.name)
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
        let guests: Vec<u8> = turns.iter().step_by(8).map(|turn| turn.field.guests).collect();
        assert_eq!((turns.len(), guests), (3 * 4 * 2, vec![1, 2, 4]));
        assert_eq!((turns[1].contender.name, turns[1].field.guest_mb), (NO_SHARED, BUILD_MEMORY_MB));
        assert!(turns[20].to_string().starts_with("godwit · build · 4 guests, 100 Mbit/s, 20 ms"));
    }

    #[test]
    fn a_burst_is_the_web_server_s_over_a_link_of_its_own() {
        let plan = plan(&["--burst"]).unwrap();
        let turns = plan.turns();
        assert_eq!(
            (turns.len(), turns[0].to_string()),
            (9, "godwit · burst · 85 Mbit/s, 27 ms · round 1".into())
        );
        assert!(turns[0].is_burst() && turns[0].program().is_some_and(|program| program.serves_web));
        assert_eq!(plan.programs().count(), 1);
    }

    #[test]
    fn fast_links_need_no_relay_and_have_rivals_of_their_own() {
        let unlimited = plan(&["--rate", "unlimited", "--workloads", "medium"]).unwrap();
        let link = unlimited.fields[0].link;
        assert_eq!(link.wiring(), Wiring::Straight { megabits_per_second: None });
        assert_eq!(unlimited.contenders(link).len(), BEST_UNLIMITED.len());
        assert!(plan(&["--rate", "unlimited", "--round-trip", "20"]).is_err());
        assert!(plan(&["--rate", "unlimited", "--loss", "1"]).is_err());
        let rate = Rate::MegabitsPerSecond(1_000);
        let link = |round_trip_ms| Link { rate, round_trip_ms, loss_per_mille: 0 };
        assert_eq!(link(0).wiring(), Wiring::Straight { megabits_per_second: Some(1_000) });
        assert!(matches!(link(20).wiring(), Wiring::Relayed(_)));
        let slow = Link { rate: Rate::MegabitsPerSecond(100), ..link(0) };
        assert!(matches!(slow.wiring(), Wiring::Relayed(_)));
        let lossy = Link { loss_per_mille: 1, ..link(0) };
        assert!(matches!(lossy.wiring(), Wiring::Relayed(shape) if shape.loss == 0.001));
        assert_eq!(lossy.to_string(), "1000 Mbit/s, 0 ms, 0.1 % lost");
    }

    #[test]
    fn choices_narrow_a_bench_and_unknown_names_end_it() {
        let plan_of_one = plan(&["--contenders", "qemu-postcopy", "--workloads", "light", "--rounds", "1"]);
        assert_eq!(plan_of_one.unwrap().turns().len(), 1);
        assert_eq!(plan(&["--sweep"]).unwrap().turns().len(), (12 * 3 + 4 + 5 + 3 + 4 * 3) * 3);
        let sizes = plan(&["--guest-mb", "256,4096"]).unwrap();
        assert_eq!((sizes.fields.len(), sizes.fields[1].guest_mb), (2, 4_096));
        assert!(sizes.fields[1].to_string().starts_with("4096 MB, 100 Mbit/s"));
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
            ["--guest-mb", "128"],
            ["--guest-command", &too_long],
        ] {
            assert!(plan(&wrong).is_err(), "{wrong:?}");
        }
    }
}
