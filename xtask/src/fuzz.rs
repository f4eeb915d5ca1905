//! `cargo xtask fuzz`: builds the fuzz targets with coverage, runs them, and writes down what was run.
//!
//! The instrumentation is the compiler's own, so that the stable toolchain does; there is hardly any unsafe code that a
//! sanitizer could watch. What a run finds worth keeping lies under `fuzz/target/corpus`; `--minimise` makes the
//! committed corpus of it.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use godwit_sim::guest_image::workspace;
use serde::Deserialize;

use crate::provenance::{self, said};

/// The triple is named so that build scripts and procedural macros aren't instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";
const LEDGER: &str = "docs/fuzz-ledger.toml";
/// Longest input: two pages and what surrounds them.
const INPUT_BYTES_MAX: u32 = 16 * 1024;
/// Longest input of the committed corpus.
const KEPT_BYTES_MAX: u32 = 6 * 1024;
/// How a target ends that was told to by SIGINT; what it has executed counts.
const INTERRUPTED: i32 = 72;
/// Executions of each target in `cargo xtask test --long`.
pub(crate) const LONG_EXECUTIONS: u64 = 1_000_000;

/// What to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Request {
    /// Executions of each target.
    #[arg(long, default_value_t = 10_000_000)]
    pub(crate) executions: u64,
    /// Afterwards make the committed corpus of what was found, as small as it covers the same.
    #[arg(long)]
    pub(crate) minimise: bool,
    /// Only this target.
    pub(crate) target: Option<String>,
}

/// Runs the targets one after the other and appends to the ledger; stops at the first finding.
///
/// # Errors
/// When a target doesn't build, or something was found: the error names the input.
pub(crate) fn run(request: &Request) -> Result<()> {
    let targets = targets(request.target.as_deref())?;
    let commit = provenance::commit()?;
    build()?;
    for target in &targets {
        let run = fuzz(target, request.executions)?;
        record(target, &commit, &run)?;
        ensure!(run.finding.is_none(), "{target}: {}", run.finding.unwrap_or_default());
        if request.minimise {
            minimise(target)?;
        }
    }
    let total: u64 = ledger()?.iter().map(|entry| entry.executions).sum();
    println!("{total} executions in all, by {LEDGER}");
    Ok(())
}

/// Runs all targets without writing to the ledger.
///
/// # Errors
/// As [`run`].
pub(crate) fn check(executions: u64) -> Result<()> {
    build()?;
    for target in targets(None)? {
        if let Some(finding) = fuzz(&target, executions)?.finding {
            bail!("{target}: {finding}");
        }
    }
    Ok(())
}

struct Run {
    executions: u64,
    seconds: u64,
    /// The input that made the target fail.
    finding: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    executions: u64,
}

#[derive(Deserialize)]
struct Ledger {
    #[serde(default)]
    run: Vec<Entry>,
}

fn ledger() -> Result<Vec<Entry>> {
    let text = fs::read_to_string(workspace().join(LEDGER)).context(LEDGER)?;
    Ok(toml::from_str::<Ledger>(&text).context(LEDGER)?.run)
}

fn directory() -> PathBuf {
    workspace().join("fuzz")
}

/// All targets, or the one that was named.
fn targets(only: Option<&str>) -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(directory().join("fuzz_targets"))? {
        let path = entry?.path();
        targets.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    targets.retain(|target| only.is_none_or(|only| only == target));
    targets.sort();
    ensure!(!targets.is_empty(), "there is no such target");
    Ok(targets)
}

fn build() -> Result<()> {
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--release", "--target", TRIPLE])
        .env("RUSTFLAGS", FLAGS)
        .current_dir(directory())
        .status()
        .context("can't run cargo")?;
    ensure!(status.success(), "the fuzz targets don't build");
    Ok(())
}

/// The program of a target with the arguments that all its uses have; the working corpus comes first.
fn program(target: &str, input_bytes_max: u32) -> Result<Command> {
    let artifacts = directory().join("artifacts").join(target);
    fs::create_dir_all(&artifacts)?;
    let mut command = Command::new(directory().join("target").join(TRIPLE).join("release").join(target));
    command
        .arg(format!("-max_len={input_bytes_max}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()));
    let dictionary = directory().join("dictionaries").join(target);
    if dictionary.exists() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    Ok(command)
}

/// The directories of inputs: the working corpus, the committed one, and the seeds made by hand.
fn inputs(target: &str) -> Result<[PathBuf; 3]> {
    let directories = ["target/corpus", "corpus", "seeds"]
        .map(|directory_name| directory().join(directory_name).join(target));
    directories.iter().try_for_each(fs::create_dir_all)?;
    Ok(directories)
}

fn fuzz(target: &str, executions: u64) -> Result<Run> {
    println!("{target}: {executions} executions");
    let start = Instant::now();
    let output = program(target, INPUT_BYTES_MAX)?
        .args([&format!("-runs={executions}"), "-verbosity=0", "-print_final_stats=1"])
        .args(inputs(target)?)
        .output()
        .with_context(|| format!("can't run {target}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let counted = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let executions = counted.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
    let input =
        said.lines().find_map(|line| line.split_once("Test unit written to ")).map(|(_, input)| input);
    let failed = !output.status.success() && output.status.code() != Some(INTERRUPTED);
    let finding = failed.then(|| input.unwrap_or("it failed without an input").to_owned());
    if finding.is_some() {
        eprintln!("{said}");
    }
    Ok(Run { executions, seconds: start.elapsed().as_secs(), finding })
}

fn record(target: &str, commit: &str, run: &Run) -> Result<()> {
    let date = said("date", &["--utc", "+%F"])?;
    let Run { executions, seconds, finding } = run;
    let findings = u32::from(finding.is_some());
    let mut ledger = OpenOptions::new().append(true).open(workspace().join(LEDGER)).context(LEDGER)?;
    writeln!(
        ledger,
        "\n[[run]]\ntarget = \"{target}\"\ncommit = \"{commit}\"\ndate = {date}\nexecutions = {executions}\n\
         seconds = {seconds}\nnew_findings = {findings}"
    )?;
    Ok(())
}

/// Replaces the committed corpus by the fewest inputs that cover what all together cover.
fn minimise(target: &str) -> Result<()> {
    let [working, committed, seeds] = inputs(target)?;
    let merged = directory().join("target/minimised").join(target);
    let _ = fs::remove_dir_all(&merged);
    fs::create_dir_all(&merged)?;
    let status = program(target, KEPT_BYTES_MAX)?
        .args(["-merge=1", "-use_counters=0", "-verbosity=0"])
        .args([&merged, &working, &committed, &seeds])
        .status()?;
    ensure!(status.success(), "the corpus of {target} can't be merged");
    fs::remove_dir_all(&committed)?;
    move_all(&merged, &committed)
}

fn move_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::rename(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
