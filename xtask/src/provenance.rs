//! Where figures come from: the machine, the commit, and what programs say of themselves.

use std::process::Command;

use anyhow::{Context, Result};
use godwit_sim::guest_image::workspace;

/// The processor and how many of it.
pub(crate) fn machine() -> String {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut names = processors.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = processors.lines().filter(|line| line.starts_with("processor")).count();
    format!("{count} cores ({})", names.next().map_or("unknown", |(_, name)| name))
}

/// What is checked out.
///
/// # Errors
/// When git can't be run.
pub(crate) fn commit() -> Result<String> {
    said("git", &["rev-parse", "--short=10", "HEAD"])
}

/// What a program prints, run in the workspace.
///
/// # Errors
/// When it can't be run.
pub(crate) fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(workspace()).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
