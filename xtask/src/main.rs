//! Everything a developer runs: `cargo xtask setup|lab|demo|chaos|fuzz|test|bench|profile|tidy`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;

mod bench;
mod chaos;
mod contest;
mod demo;
mod fuzz;
mod kvm;
mod lab;
mod product;
mod profile;
mod provenance;
mod setup;
mod test;
mod tidy;

/// What developers run.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
enum Task {
    /// Install or fetch what is missing: QEMU, busybox, a guest kernel.
    Setup,
    /// Make two hosts and a link to try things in, and obey commands until `quit`.
    Lab {
        /// Rate of the link, Mbit/s.
        #[arg(long, default_value_t = 100)]
        rate: u64,
        /// Round trip of the link, milliseconds.
        #[arg(long, default_value_t = 20)]
        round_trip: u64,
    },
    /// Run every check and every test.
    Test {
        /// Run the long tests too.
        #[arg(long)]
        long: bool,
        /// Run only the tests with real guests, all of them, under KVM.
        #[arg(long, conflicts_with = "long")]
        kvm: bool,
    },
    /// Run the benches: those of the crates, or the one that is named.
    Bench {
        #[command(subcommand)]
        bench: Option<bench::Bench>,
    },
    /// Say where the processor time goes.
    Profile {
        #[command(subcommand)]
        subject: profile::Subject,
    },
    /// Check the map of the crates, and the sources for length and names.
    Tidy,
    /// Strike migrations of real guests with random faults, and check what must hold.
    Chaos(chaos::Request),
    /// Feed bytes that mean harm to everything that reads bytes of peers and guests.
    Fuzz(fuzz::Request),
    /// Migrate a busy guest over a slow link: beside QEMU alone, or while things fail.
    Demo {
        /// What is shown.
        #[arg(default_value = "compare")]
        scenario: demo::Scenario,
        /// Write the figures, or what is claimed, to this file.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Run only these contenders.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// What the guest does: idle, light, medium, heavy, harsh.
        #[arg(long, default_value = "medium")]
        workload: String,
        /// Rate of the link, Mbit/s.
        #[arg(long, default_value_t = 100)]
        rate: u64,
        /// Round trip of the link, milliseconds.
        #[arg(long, default_value_t = 20)]
        round_trip: u64,
        /// More options for `godwit migrate`, such as `-- --early-announce`.
        #[arg(last = true)]
        migrate: Vec<String>,
    },
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
        Task::Lab { rate, round_trip } => lab::run(rate, Duration::from_millis(round_trip)),
        Task::Test { kvm: true, .. } => test::run_under_kvm(),
        Task::Test { long, .. } => test::run(long),
        Task::Bench { bench: None } => test::bench(),
        Task::Bench { bench: Some(bench) } => bench::run(&bench),
        Task::Profile { subject } => profile::run(&subject),
        Task::Tidy => tidy::run(),
        Task::Chaos(request) => chaos::run(&request),
        Task::Fuzz(request) => fuzz::run(&request),
        Task::Demo { scenario, json, only, workload, rate, round_trip, migrate } => {
            demo::run(&demo::Request { scenario, json, only, workload, rate, round_trip, migrate })
        }
    }
}
