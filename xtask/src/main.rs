//! Everything a developer runs: `cargo xtask setup|lab|demo|chaos|fuzz|test|bench|profile|tidy`.

use std::process::ExitCode;

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
    Lab(lab::Link),
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
    Demo(demo::Request),
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
        Task::Lab(link) => lab::run(&link),
        Task::Test { kvm: true, .. } => test::run_under_kvm(),
        Task::Test { long, .. } => test::run(long),
        Task::Bench { bench: None } => test::bench(),
        Task::Bench { bench: Some(bench) } => bench::run(&bench),
        Task::Profile { subject } => profile::run(&subject),
        Task::Tidy => tidy::run(),
        Task::Chaos(request) => chaos::run(&request),
        Task::Fuzz(request) => fuzz::run(&request),
        Task::Demo(request) => demo::run(&request),
    }
}
