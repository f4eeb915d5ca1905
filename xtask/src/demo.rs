//! One busy guest, one link, and whoever wants to move it: godwit, and QEMU alone in three ways. Or godwit alone, while
//! things fail.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use clap::ValueEnum;
use godwit_sim::{guest_image::GuestImage, lab::Lab, link::Shape};

use crate::{
    contest::{Contender, GODWIT, GUEST_MEMORY_MB, Load, Stage},
    product, setup,
};

mod failures;
mod table;

/// Who is compared.
const CONTENDERS: [&str; 4] = [GODWIT, "qemu-precopy", "qemu-xbzrle", "qemu-xbzrle-downtime"];

/// What is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// godwit beside QEMU alone.
    Compare,
    /// What becomes of a guest when the link is cut and processes are killed while it moves.
    Failures,
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) scenario: Scenario,
    pub(crate) json: Option<PathBuf>,
    /// Names of contenders; empty: all.
    pub(crate) only: Vec<String>,
    pub(crate) workload: String,
    /// Options for `godwit migrate`.
    pub(crate) migrate: Vec<String>,
    /// Mbit/s.
    pub(crate) rate: u64,
    /// Milliseconds.
    pub(crate) round_trip: u64,
}

/// Runs the contenders one after the other and prints them side by side; or shows what happens when things fail.
///
/// # Errors
/// When something is missing, a contender fails rather than loses, or a claim doesn't hold.
pub(crate) fn run(request: &Request) -> Result<()> {
    setup::run()?;
    let image = GuestImage::ensure()?;
    let wanted = |name: &str| request.only.is_empty() || request.only.iter().any(|only| only == name);
    let godwit = if wanted(GODWIT) { product::build(&["--release"])? } else { PathBuf::new() };
    let round_trip = Duration::from_millis(request.round_trip);
    let lab = Lab::new(Shape::symmetric(request.rate, round_trip))?;
    let stage = Stage {
        lab: &lab,
        image: &image,
        load: Load::Workload(&request.workload),
        migrate: &request.migrate,
        godwit: &godwit,
        patience: 1,
        compares_memories: true,
        finds_floor: false,
    };
    println!(
        "a {GUEST_MEMORY_MB} MB guest ({}), over {} Mbit/s with a round trip of {} ms",
        request.workload, request.rate, request.round_trip
    );
    match request.scenario {
        Scenario::Compare => compare(&stage, request, wanted),
        Scenario::Failures => failures::run(&stage, request),
    }
}

fn compare(stage: &Stage, request: &Request, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let mut outcomes = Vec::new();
    for name in CONTENDERS.into_iter().filter(|name| wanted(name)) {
        println!("\n{name}");
        outcomes.push(Contender::named(name)?.run(stage)?);
    }
    print!("\n{}", table::render(&outcomes, Duration::from_millis(request.round_trip)));
    println!("link emulator: {:.1} s of CPU", stage.lab.relay_statistics().cpu.as_secs_f64());
    if let Some(path) = &request.json {
        std::fs::write(path, serde_json::to_string_pretty(&outcomes)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
