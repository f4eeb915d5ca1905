//! The program under test: building it as cargo says where it is.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use godwit_sim::guest_image::workspace;
use serde_json::Value;

/// The program that was given, or a release build.
///
/// # Errors
/// When it doesn't build; cargo has said why.
pub(crate) fn given_or_built(given: Option<&Path>) -> Result<PathBuf> {
    given.map_or_else(|| build(&["--release"]), |binary| Ok(binary.to_owned()))
}

/// Builds godwit with more arguments for cargo, such as `--release`; returns where it is.
///
/// # Errors
/// When it doesn't build; cargo has said why.
pub(crate) fn build(arguments: &[&str]) -> Result<PathBuf> {
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(workspace())
        .args(["build", "--package", "godwit", "--message-format=json-render-diagnostics"])
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    let messages = String::from_utf8_lossy(&built.stdout);
    let mut messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = messages.find_map(|message| {
        let path = message["executable"].as_str()?;
        (message["target"]["name"] == "godwit").then(|| PathBuf::from(path))
    });
    match program {
        Some(program) if built.status.success() => Ok(program),
        _ => bail!("godwit doesn't build"),
    }
}
