//! godwit's disk server beside QEMU's, over the same protocol, asked by the same client.
//!
//! ```text
//!   fio ──NBD──► godwit disk-server ────► data, map
//!   fio ──NBD──► qemu-storage-daemon ──┬► a raw file      where the disk was written before
//!                                      └► a qcow2         where it is written for the first time
//!   fio ─────────────────────────────────► a raw file
//! ```
//!
//! Everybody has a turn with each pattern, then everybody the next turn, so that a machine that becomes slower does so for
//! all. Files are in the host's page cache for all of them.

mod contender;
mod fio;
mod image;
mod page;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use self::{
    contender::{Contender, Served},
    fio::Measured,
    image::Figures,
    page::Circumstances,
};
use crate::{product, provenance, setup};

/// The page that a full bench writes, below the checkout.
const PAGE: &str = "docs/bench/store.md";
/// The disk.
const DISK_MB: u64 = 1024;

/// What the command line asks for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Request {
    /// How often everybody has a turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of a turn.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Only these patterns.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    patterns: Vec<String>,
    /// Only these contenders.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    contenders: Vec<String>,
    /// Write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the result for people to this file [default: docs/bench/store.md, if all is run].
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// The program [default: a release build].
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where the disks are made [default: a directory for temporary files].
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pattern {
    name: &'static str,
    /// fio's word for it.
    kind: &'static str,
    block: &'static str,
    queue_depth: u32,
    /// A sync after so many writes.
    sync_every: Option<u32>,
    /// Whether the disk was written before.
    filled: bool,
}

const READ: Pattern =
    Pattern { name: "", kind: "randread", block: "4k", queue_depth: 1, sync_every: None, filled: true };
const WRITE: Pattern = Pattern { kind: "randwrite", ..READ };

const PATTERNS: [Pattern; 11] = [
    Pattern { name: "read-4k", ..READ },
    Pattern { name: "read-4k", queue_depth: 32, ..READ },
    Pattern { name: "overwrite-4k", ..WRITE },
    Pattern { name: "overwrite-4k", queue_depth: 32, ..WRITE },
    Pattern { name: "allocate-4k", filled: false, ..WRITE },
    Pattern { name: "allocate-4k", queue_depth: 32, filled: false, ..WRITE },
    Pattern { name: "mixed-64k", kind: "randrw", block: "64k", queue_depth: 8, ..READ },
    Pattern { name: "read-256k", kind: "read", block: "256k", queue_depth: 4, ..READ },
    Pattern { name: "overwrite-256k", kind: "write", block: "256k", queue_depth: 4, ..WRITE },
    Pattern { name: "sync-overwrite-4k", sync_every: Some(32), ..WRITE },
    Pattern { name: "sync-allocate-4k", sync_every: Some(32), filled: false, ..WRITE },
];

/// A turn's figures.
#[derive(Clone, Debug, Serialize)]
struct Row {
    contender: &'static str,
    pattern: &'static str,
    queue_depth: u32,
    #[serde(flatten)]
    measured: Measured,
}

/// Runs the bench.
///
/// # Errors
/// When something is missing, or a turn broke.
pub(super) fn run(request: &Request) -> Result<()> {
    setup::run()?;
    setup::install_disk_clients()?;
    let binary = product::given_or_built(request.binary.as_deref())?;
    let is_full = request.patterns.is_empty() && request.contenders.is_empty();
    let figures = if is_full { Some(measure_images(request, &binary)?) } else { None };
    let rows = take_turns(request, &binary)?;
    let text = page::render(&rows, figures.as_ref(), &circumstances(request)?);
    print!("{text}");
    if let Some(path) = &request.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rows)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let standard = is_full.then(|| godwit_sim::guest_image::workspace().join(PAGE));
    if let Some(path) = request.page.clone().or(standard) {
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn measure_images(request: &Request, binary: &Path) -> Result<Figures> {
    image::measure(binary, directory(request)?.path(), request.rounds)
}

/// A directory for a turn's files.
fn directory(request: &Request) -> Result<tempfile::TempDir> {
    Ok(match &request.directory {
        Some(directory) => tempfile::tempdir_in(directory)?,
        None => tempfile::tempdir()?,
    })
}

fn take_turns(request: &Request, binary: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for pattern in PATTERNS.iter().filter(|pattern| is_wanted(&request.patterns, pattern.name)) {
        for round in 1..=request.rounds {
            for contender in Contender::ALL.into_iter().filter(|it| is_wanted(&request.contenders, it.name()))
            {
                let directory = directory(request)?;
                let (directory, filled) = (directory.path(), pattern.filled);
                let served = Served { godwit: binary, directory, size_mb: DISK_MB, filled };
                let disk = served.start(contender)?;
                let measured = fio::run(pattern, &disk.target(), DISK_MB, request.seconds)
                    .with_context(|| format!("{} · {} · round {round}", contender.name(), pattern.name))?;
                eprintln!(
                    "{} · {} · queue {} · round {round}: {:.0} a second, {:.0} MiB/s, {:.0} µs",
                    contender.name(),
                    pattern.name,
                    pattern.queue_depth,
                    measured.iops,
                    measured.mib_s,
                    measured.p50_us
                );
                let (contender, pattern_name) = (contender.name(), pattern.name);
                rows.push(Row {
                    contender,
                    pattern: pattern_name,
                    queue_depth: pattern.queue_depth,
                    measured,
                });
            }
        }
    }
    Ok(rows)
}

fn is_wanted(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|wanted| wanted == name)
}

fn circumstances(request: &Request) -> Result<Circumstances> {
    Ok(Circumstances {
        machine: provenance::machine(),
        commit: provenance::commit()?,
        daemon: provenance::said("qemu-storage-daemon", &["--version"])?
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
        fio: provenance::said("fio", &["--version"])?,
        rounds: request.rounds,
        seconds: request.seconds,
    })
}
