//! One busy guest, one link, and whoever wants to move it: godwit, and QEMU alone in three ways. Or godwit alone, while
//! things fail; or with a disk that it serves.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use godwit_sim::{guest_image::GuestImage, lab::Lab};

use crate::{
    contest::{Contender, GODWIT, GUEST_MEMORY_MB, Load, Patience, Stage},
    lab::Link,
    product, setup,
};

mod claims;
mod disk_local;
mod failures;
mod screen;
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
    /// A guest whose disk its host serves, from an image in a repository, while agent and server are killed.
    DiskLocal,
}

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub(crate) struct Request {
    /// What is shown.
    #[arg(default_value = "compare")]
    pub(crate) scenario: Scenario,
    /// Write the figures, or what is claimed, to this file.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// Run only these contenders.
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// What the guest does: idle, light, medium, heavy, harsh.
    #[arg(long, default_value = "medium")]
    pub(crate) workload: String,
    #[command(flatten)]
    pub(crate) link: Link,
    /// More options for `godwit migrate`, such as `-- --early-announce`.
    #[arg(last = true)]
    pub(crate) migrate: Vec<String>,
}

/// Runs the contenders one after the other and prints them side by side; or shows what happens when things fail.
///
/// # Errors
/// When something is missing, a contender fails rather than loses, or a claim doesn't hold.
pub(crate) fn run(request: &Request) -> Result<()> {
    setup::run()?;
    if request.scenario == Scenario::DiskLocal {
        setup::install_disk_tools()?;
    }
    let image = GuestImage::ensure()?;
    let wanted = |name: &str| request.only.is_empty() || request.only.iter().any(|only| only == name);
    let godwit = if wanted(GODWIT) { product::given_or_built(None)? } else { PathBuf::new() };
    let lab = Lab::new(request.link.shape())?;
    let stage = Stage {
        lab: &lab,
        image: &image,
        load: Load::Workload(&request.workload),
        memory_mb: GUEST_MEMORY_MB,
        migrate: &request.migrate,
        godwit: &godwit,
        patience: Patience::USUAL,
        is_burst: false,
        compares_memories: true,
        finds_floor: false,
    };
    if request.scenario != Scenario::DiskLocal {
        println!("a {GUEST_MEMORY_MB} MB guest ({}), over {}", request.workload, request.link);
    }
    match request.scenario {
        Scenario::Compare => compare(&stage, request, wanted),
        Scenario::Failures => failures::run(&stage, request),
        Scenario::DiskLocal => disk_local::run(&stage, request),
    }
}

fn compare(stage: &Stage, request: &Request, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let mut outcomes = Vec::new();
    for name in CONTENDERS.into_iter().filter(|name| wanted(name)) {
        println!("\n{name}");
        outcomes.push(Contender::named(name)?.run(stage)?);
    }
    print!("\n{}", table::render(&outcomes, request.link.round_trip()));
    println!("link emulator: {:.1} s of CPU", stage.lab.relay_statistics().cpu.as_secs_f64());
    if let Some(path) = &request.json {
        std::fs::write(path, serde_json::to_string_pretty(&outcomes)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
