//! Everything a developer runs: `cargo xtask setup|lab|demo|test|tidy`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

mod setup;

/// What developers run.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Install or fetch what is missing: QEMU, busybox, a guest kernel.
    Setup,
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::run(),
    }
}
