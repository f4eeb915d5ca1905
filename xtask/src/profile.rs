//! Where the processor time of a migration goes: one guest is moved by godwit, and every thread of both hosts is watched.
//!
//! ```text
//!  contest (a lab, a guest, godwit) ──/proc──► sampler ──CPU by thread──► stages ──► table, page, json
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result};
use godwit_sim::{
    guest_image::{GuestImage, workspace},
    lab::Lab,
};

use self::{
    page::Circumstances,
    sampler::Sampler,
    stages::{Profile, Volumes},
};
use crate::{
    contest::{Contender, GODWIT, GUEST_MEMORY_MB, Load, Patience, Stage, cores::Cores},
    lab::Link,
    product, provenance, setup,
};

mod page;
mod sampler;
mod stages;

/// The page for people, below the checkout.
const PAGE: &str = "docs/bench/profile.md";

/// What is profiled.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Subject {
    /// A migration by godwit: processor time of each stage, at both hosts, beside its roofline.
    Migrate(Request),
}

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub(crate) struct Request {
    /// What the guest does: idle, light, medium, heavy, harsh.
    #[arg(long, default_value = "medium")]
    workload: String,
    #[command(flatten)]
    link: Link,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the page to this file [default: docs/bench/profile.md].
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// The program [default: a release build].
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Profiles one migration.
///
/// # Errors
/// When something is missing, or the migration fails.
pub(crate) fn run(subject: &Subject) -> Result<()> {
    let Subject::Migrate(request) = subject;
    setup::run()?;
    let image = GuestImage::ensure()?;
    let godwit = product::given_or_built(request.binary.as_deref())?;
    let lab = Lab::new(request.link.shape())?;
    let stage = Stage {
        lab: &lab,
        image: &image,
        load: Load::Workload(&request.workload),
        memory_mb: GUEST_MEMORY_MB,
        migrate: &[],
        godwit: &godwit,
        patience: Patience::USUAL,
        is_burst: false,
        compares_memories: false,
        finds_floor: false,
    };
    let cores = Cores::reserve()?.context("a profile needs two cores: one is the guest's")?;
    let contender = Contender::named(GODWIT)?;
    let ((outcome, sampler), usage) = cores.during(&lab, || Sampler::during(&lab, || contender.run(&stage)));
    let outcome = outcome?;
    let report = outcome.report.as_ref().context("the migration didn't end in time")?;
    let volumes = Volumes::of(report, GUEST_MEMORY_MB << 20, outcome.wire_bytes);
    let profile = Profile::of(&sampler.used(outcome.span), volumes);
    let circumstances = Circumstances {
        workload: request.workload.clone(),
        link_mbit: request.link.rate,
        rtt_ms: request.link.round_trip,
        total_ms: outcome.total_ms,
        downtime_ms: outcome.downtime_ms,
        busy: cores.busy(&usage, outcome.span),
        machine: provenance::machine(),
        commit: provenance::commit()?,
        has_own_binary: request.binary.is_some(),
    };
    print!("\n{}", page::table(&profile));
    let path = request.page.clone().unwrap_or_else(|| workspace().join(PAGE));
    std::fs::write(&path, page::render(&profile, &circumstances))
        .with_context(|| format!("cannot write {}", path.display()))?;
    if let Some(path) = &request.json {
        std::fs::write(path, serde_json::to_string_pretty(&page::figures(&profile, &circumstances))? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
