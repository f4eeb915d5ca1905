//! Benches: those of the crates, and godwit beside every way QEMU has to move the same guest over the same link.
//!
//! ```text
//!  plan ──turn──► contest (a lab of its own, a fresh guest) ──run──► ledger ──► summary ──► table, page, plot
//! ```
//!
//! Contenders take turns, so that a machine that becomes slower does so for all of them. A turn that broke is told and
//! left out; the ledger keeps those that are done, and a bench that is started again does the rest.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Result, bail};
use godwit_sim::{
    guest_image::{BUILD, GuestImage, workspace},
    lab::Lab,
};

use self::{
    ledger::{Ledger, Run},
    page::Circumstances,
    plan::{Field, Plan, Rate, Turn},
    summary::Summary,
};
use crate::{
    contest::{Load, Patience, Stage, cores::Cores},
    product, provenance, setup,
};

mod foresight;
mod ledger;
mod page;
mod plan;
mod plot;
mod store;
mod summary;
mod table;

/// The page that a full bench writes, below the checkout; the plot lies beside it.
const PAGE: &str = "docs/bench/migrate.md";
/// The page that the bench of several guests writes.
const GUESTS_PAGE: &str = "docs/bench/guests.md";
/// The page that a burst writes.
const BURST_PAGE: &str = "docs/bench/burst.md";
/// The rate that contenders' times are made for; over slower links they have more.
const USUAL_RATE_MBIT: u64 = 100;

/// Which bench.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// Move the same guest over the same link by godwit and by every way QEMU has.
    Migrate(Request),
    /// Read and write a disk through godwit's server and through QEMU's.
    Store(store::Request),
}

/// What the command line asks for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Request {
    /// Only medium and heavy; godwit and QEMU's best two (15 minutes).
    #[arg(long)]
    quick: bool,
    /// Only medium, godwit and QEMU's best on each link; links of many rates and round trips, one that loses packets, guests of
    /// many sizes (hours).
    #[arg(long, conflicts_with_all = ["quick", "rate", "round_trip", "loss", "guest_mb"])]
    sweep: bool,
    /// Only medium; godwit with each technique alone, and with each left out.
    #[arg(long, conflicts_with_all = ["quick", "sweep"])]
    techniques: bool,
    /// Move so many guests of 256 MB at once, which do one build together; godwit as it comes and without its cache across
    /// guests, and QEMU's best two.
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS", conflicts_with_all = ["quick", "sweep", "techniques", "workloads", "guest_command", "guest_mb"])]
    guests: Vec<u8>,
    /// Only the web server's guest, from a host where it shares its core to one where it doesn't (CloudNet's cloud burst).
    #[arg(long, conflicts_with_all = ["quick", "sweep", "techniques", "guests", "workloads", "rate", "round_trip", "loss", "guest_mb", "guest_command"])]
    burst: bool,
    /// Only these contenders.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    contenders: Vec<String>,
    /// Only these workloads: idle, light, medium, heavy, harsh; real programs: sqlite, redis, compress, web.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    workloads: Vec<String>,
    /// How often everybody has a turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Rate of the link, Mbit/s, or `unlimited`: hosts joined straight, godwit beside QEMU with its own TLS and without.
    #[arg(long, default_value_t = Rate::MegabitsPerSecond(USUAL_RATE_MBIT))]
    rate: Rate,
    /// Round trip of the link, milliseconds [default: 20, and 0 for an unlimited link].
    #[arg(long)]
    round_trip: Option<u64>,
    /// Packets of a thousand that the link loses.
    #[arg(long, default_value_t = 0, value_name = "PER_MILLE", value_parser = clap::value_parser!(u16).range(0..=500))]
    loss: u16,
    /// Memory of the guest, MB; several are benched one after the other [default: 512].
    #[arg(long, value_delimiter = ',', value_name = "MB")]
    guest_mb: Vec<u64>,
    /// Run this in the guest instead of a workload, again and again (a shell's command); its progress is the lines that it
    /// prints, else that of a beat.
    #[arg(long, value_name = "CMD", conflicts_with_all = ["workloads", "sweep"])]
    guest_command: Option<String>,
    /// Keep the runs in this file; those that are in it already aren't run again.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the result for people to this file, and a plot beside it [default: docs/bench/migrate.md, if all is run].
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// The program [default: a release build].
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

impl Request {
    /// Whether everything is to be run, so that the result is what the docs show.
    fn is_full(&self) -> bool {
        let chosen = !self.workloads.is_empty() || self.guest_command.is_some();
        let is_usual = self.rate == Rate::MegabitsPerSecond(USUAL_RATE_MBIT)
            && (self.round_trip, self.loss) == (None, 0)
            && self.guest_mb.is_empty();
        !(self.quick || self.sweep || self.techniques || self.burst || chosen)
            && self.contenders.is_empty()
            && is_usual
    }
}

/// Runs a bench.
///
/// # Errors
/// When something is missing, or a turn broke.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Migrate(request) => migrate(request),
        Bench::Store(request) => store::run(request),
    }
}

fn migrate(request: &Request) -> Result<()> {
    let plan = Plan::of(request)?;
    setup::run()?;
    let image = GuestImage::ensure()?;
    let program_images = program_images(&plan, &image)?;
    let godwit =
        if plan.has_godwit() { product::given_or_built(request.binary.as_deref())? } else { PathBuf::new() };
    let (cores, commit) = (Cores::reserve()?, provenance::commit()?);
    let arena = Arena { image, program_images, godwit, cores, commit };
    let mut ledger = Ledger::open(request.json.as_deref())?;
    let broken = arena.carry_out(&plan, &mut ledger)?;
    let summary = Summary::of(&plan, ledger.runs());
    print!("\n{}", table::render(&summary));
    let standard = match request {
        _ if request.burst => Some(BURST_PAGE),
        _ if !request.is_full() => None,
        _ if request.guests.is_empty() => Some(PAGE),
        _ => Some(GUESTS_PAGE),
    };
    let standard = standard.map(|page| workspace().join(page));
    if let Some(path) = request.page.clone().or(standard) {
        let circumstances = Circumstances::of(request, &plan, ledger.runs(), arena.cores.is_some());
        page::write(&path, &summary, &circumstances)?;
    }
    if broken > 0 {
        bail!("{broken} turns broke; run it again with the same --json to have only these again");
    }
    Ok(())
}

/// The guests of the plan's real programs, by the programs' names.
fn program_images(plan: &Plan, image: &GuestImage) -> Result<BTreeMap<&'static str, GuestImage>> {
    if plan.programs().next().is_some() {
        setup::fetch_programs()?;
    }
    plan.programs().map(|program| Ok((program.name, image.with_program(program)?))).collect()
}

/// Where all turns take place.
struct Arena {
    image: GuestImage,
    program_images: BTreeMap<&'static str, GuestImage>,
    godwit: PathBuf,
    cores: Option<Cores>,
    commit: String,
}

impl Arena {
    /// Takes all turns that the ledger hasn't; returns how many broke.
    fn carry_out(&self, plan: &Plan, ledger: &mut Ledger) -> Result<usize> {
        let turns = plan.turns();
        let mut broken = 0;
        for (index, turn) in turns.iter().enumerate() {
            if ledger.has(turn) {
                continue;
            }
            println!("\n{}/{} {turn}", index + 1, turns.len());
            if let Some(reason) = ledger.needless(turn).filter(|_| !plan.is_quick) {
                println!("  {reason}");
                continue;
            }
            match self.take(turn, plan.patience()) {
                Ok(run) => {
                    println!("  {run}");
                    ledger.enter(run)?;
                }
                Err(error) => {
                    println!("  {error:#}");
                    broken += 1;
                }
            }
        }
        Ok(broken)
    }

    fn take(&self, turn: &Turn, patience: Patience) -> Result<Run> {
        let Field { link, guests, guest_mb } = turn.field;
        let lab = Lab::wired(link.wiring())?;
        let slowness = link.rate.megabits_per_second().map_or(1, |rate| USUAL_RATE_MBIT.div_ceil(rate));
        let times = slowness.try_into().unwrap_or(u32::MAX).saturating_mul(guests.into());
        let stage = Stage {
            lab: &lab,
            image: turn.program().and_then(|it| self.program_images.get(it.name)).unwrap_or(&self.image),
            load: match (&turn.guest_command, turn.program()) {
                (Some(command), _) => Load::Command(command),
                (None, Some(program)) if *program == BUILD => Load::Build { guests },
                (None, Some(program)) => Load::Program(program),
                (None, None) => Load::Workload(&turn.workload),
            },
            memory_mb: guest_mb,
            migrate: &[],
            godwit: &self.godwit,
            patience: Patience { times, ..patience },
            is_burst: turn.is_burst(),
            compares_memories: false,
            finds_floor: true,
        };
        let Some(cores) = &self.cores else {
            return Ok(Run::of(turn, &turn.contender.run(&stage)?, None, &self.commit));
        };
        let (outcome, usage) = cores.during(&lab, || turn.contender.run(&stage));
        let outcome = outcome?;
        Ok(Run::of(turn, &outcome, cores.busy(&usage, outcome.span), &self.commit))
    }
}
