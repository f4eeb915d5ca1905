//! Chaos on real guests: random faults strike real migrations, and what must hold is checked from outside.
//!
//! ```text
//!   a healthy guest at one host ─► godwit migrate ─┬─► settled: both agents agree, ─► checks ─► a line in the ledger
//!      (booted, or moved there)    faults strike ──┘   nothing is under way
//! ```
//!
//! Everything that a round does follows from the seed and its number ([`plan`]). What judges shares no code with the
//! product: the guest's account of its own memory, its numbered beats as they come through the cables of both hosts, a
//! second monitor at every QEMU ([`watch`]), the processes and files that are left ([`verdict`]). A failed round keeps
//! its logs and says how to play it again; the next one starts from nothing.
//!
//! Left out: a host's clock that jumps. Both hosts of the lab share the machine's one clock, which isn't ours to set; the
//! guests' tests give one of them another (`a_clock_that_jumps_changes_nothing`).

mod fault;
mod hosts;
mod ledger;
mod plan;
mod round;
mod sabotage;
mod settle;
mod stage;
mod strike;
mod verdict;
mod watch;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};
use godwit_sim::guest_image::directory;

pub(crate) use self::{fault::Fault, sabotage::Sabotage};
use self::{
    ledger::{Ledger, Round},
    plan::Plan,
    stage::Stage,
};
use crate::{product, provenance, setup};

/// What the command line asks for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Request {
    /// How many rounds.
    #[arg(long, default_value_t = 10)]
    pub(crate) rounds: u64,
    /// What happens in them follows from this and the round's number.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// The first round.
    #[arg(long, default_value_t = 0)]
    pub(crate) from: u64,
    /// Keep the results in this file; rounds that are in it already aren't run again.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// Write the result for people to this file, if no round failed.
    #[arg(long)]
    pub(crate) markdown: Option<PathBuf>,
    /// The fault that strikes in every round.
    #[arg(long, value_enum)]
    pub(crate) only: Option<Fault>,
    /// The program [default: a debug build].
    #[arg(long)]
    pub(crate) binary: Option<PathBuf>,
    /// Build a program that does something wrong, and fail unless chaos finds out.
    #[arg(long, value_enum, conflicts_with_all = ["only", "binary", "json", "markdown"])]
    pub(crate) sabotage: Option<Sabotage>,
}

impl Request {
    /// So many rounds of the first seed.
    pub(crate) fn rounds(rounds: u64) -> Request {
        Request {
            rounds,
            seed: 1,
            from: 0,
            json: None,
            markdown: None,
            only: None,
            binary: None,
            sabotage: None,
        }
    }

    /// As many rounds as it takes to find a mistake.
    pub(crate) fn sabotaged(sabotage: Sabotage) -> Request {
        Request { sabotage: Some(sabotage), ..Request::rounds(0) }
    }
}

/// Runs the rounds.
///
/// # Errors
/// When a round failed, or with sabotage: when none did.
pub(crate) fn run(request: &Request) -> Result<()> {
    setup::run()?;
    if let Some(sabotage) = request.sabotage {
        return sabotage::run(sabotage, request.seed);
    }
    let program = match &request.binary {
        Some(program) => program.clone(),
        None => product::build(&[])?,
    };
    let mut ledger = Ledger::open(request.json.as_deref(), request.seed)?;
    let mut stage = Stage::new(&program, None)?;
    for number in request.from..request.from + request.rounds {
        if ledger.has(number) {
            continue;
        }
        let round = carry_out(&mut stage, &Plan::of(request.seed, number, request.only))?;
        if round.has_failed() {
            keep(&mut stage, request, &round)?;
        }
        ledger.enter(round);
        if let Some(path) = &request.json {
            ledger.save(path)?;
        }
    }
    conclude(request, &ledger)
}

/// Runs a round and prints it.
fn carry_out(stage: &mut Stage, plan: &Plan) -> Result<Round> {
    let began = Instant::now();
    let mut round = round::run(stage, plan)?;
    round.seconds = began.elapsed().as_secs_f64();
    println!(
        "{:>4} {:<18} {} {:<15} settled after {:>6} ms, {:>5.1} s{}{}",
        round.round,
        round.fault.to_string(),
        round.direction,
        format!("{:?}", round.outcome),
        round.settled_ms,
        round.seconds,
        if round.in_flight { "" } else { " (missed)" },
        if round.recovered { " (recovered by hand)" } else { "" },
    );
    if round.has_failed() {
        round.strikes.iter().chain(&round.findings).for_each(|line| println!("       {line}"));
    }
    Ok(round)
}

/// Keeps what a failed round left, says how to play it again, and starts from nothing.
fn keep(stage: &mut Stage, request: &Request, round: &Round) -> Result<()> {
    let logs =
        directory().with_file_name("chaos").join(format!("seed-{}-round-{}", request.seed, round.round));
    // Of an earlier try of the same round.
    let _ = std::fs::remove_dir_all(&logs);
    stage.keep_logs(&logs)?;
    std::fs::write(logs.join("round.json"), serde_json::to_vec_pretty(round)?)?;
    let only = request.only.map(|fault| format!(" --only {fault}")).unwrap_or_default();
    println!("       logs: {}", logs.display());
    println!(
        "       again: cargo xtask chaos --seed {} --from {} --rounds 1{only}",
        request.seed, round.round
    );
    stage.renew()
}

fn conclude(request: &Request, ledger: &Ledger) -> Result<()> {
    println!("\n{}", serde_json::to_string(&ledger.counts)?);
    let failed: Vec<u64> =
        ledger.details.iter().filter(|round| round.has_failed()).map(|round| round.round).collect();
    if !failed.is_empty() {
        bail!("{} rounds failed: {failed:?}", failed.len());
    }
    match &request.markdown {
        Some(path) => std::fs::write(path, ledger.markdown(&provenance::machine(), &provenance::commit()?))
            .with_context(|| format!("cannot write {}", path.display())),
        None => Ok(()),
    }
}
