//! Everything that has to hold before a change goes in.

use std::{
    io::{BufRead, BufReader},
    ops::AddAssign,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use cargo_metadata::{MetadataCommand, TargetKind};
use godwit_sim::guest_image::{ACCELERATOR_VARIABLE, workspace};

use crate::{
    chaos::{self, Sabotage},
    fuzz, kvm, setup, tidy,
};

/// The crate whose integration tests each need the machine for themselves.
const END_TO_END: &str = "godwit";
/// Rounds of chaos that go with every check.
const CHAOS_ROUNDS: u64 = 10;

/// Runs every check and every test, all of them even after a failure; the last line says how many passed and failed.
/// With `long`, tests that are ignored for their length run as well, and the fuzz targets.
///
/// # Errors
/// When anything failed.
pub(crate) fn run(long: bool) -> Result<()> {
    setup::run()?;
    let mut count = Count::default();
    count += check("tidy", tidy::run());
    if long {
        count += check("an older QEMU", setup::fetch_older_qemu());
    }
    for step in steps(long)? {
        println!("\n== cargo {}", step.join(" "));
        count += cargo(&step)?;
    }
    if long {
        println!("\n== fuzz targets");
        count += check("fuzz", fuzz::check(fuzz::LONG_EXECUTIONS));
    }
    println!("\n== chaos");
    count += check("chaos", chaos::run(&chaos::Request::rounds(CHAOS_ROUNDS)));
    for sabotage in Sabotage::ALL.into_iter().filter(|_| long) {
        count += check(sabotage.name(), chaos::run(&chaos::Request::sabotaged(sabotage)));
    }
    println!("\n{} passed, {} failed", count.passed, count.failed);
    if count.failed > 0 {
        bail!("{} failed", count.failed);
    }
    Ok(())
}

/// Runs the tests with real guests, the long ones included, under KVM. Without it they run under QEMU's emulator.
///
/// # Errors
/// When KVM can't run a guest here, or a test fails.
pub(crate) fn run_under_kvm() -> Result<()> {
    setup::run()?;
    setup::fetch_older_qemu()?;
    kvm::probe()?;
    let arguments =
        ["test", "--package", END_TO_END, "--test", "guests", "--", "--test-threads=1", "--include-ignored"];
    let tested = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(arguments)
        .current_dir(workspace())
        .env(ACCELERATOR_VARIABLE, "kvm")
        .status()
        .context("cannot run cargo")?;
    if !tested.success() {
        bail!("a guest failed under KVM");
    }
    Ok(())
}

/// Runs all benches.
///
/// # Errors
/// When one doesn't build or fails.
pub(crate) fn bench() -> Result<()> {
    setup::run()?;
    match cargo(&["bench", "--workspace", "--benches"])? {
        Count { failed: 0, .. } => Ok(()),
        _ => bail!("a bench failed"),
    }
}

/// Tests and checks by their result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
}

impl Count {
    const PASSED: Count = Count { passed: 1, failed: 0 };
    const FAILED: Count = Count { passed: 0, failed: 1 };
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// What cargo is to run, in order.
fn steps(long: bool) -> Result<Vec<Vec<&'static str>>> {
    let mut steps = vec![
        vec!["fmt", "--all", "--check"],
        vec!["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"],
        vec!["test", "--workspace", "--no-fail-fast", "--lib", "--bins"],
        vec!["test", "--workspace", "--no-fail-fast", "--doc"],
    ];
    let (alone, together) = integration_tests()?;
    if together {
        steps.push(vec!["test", "--workspace", "--no-fail-fast", "--exclude", END_TO_END, "--test", "*"]);
    }
    if alone {
        steps.push(vec![
            "test",
            "--package",
            END_TO_END,
            "--no-fail-fast",
            "--test",
            "*",
            "--",
            "--test-threads=1",
        ]);
    }
    if long {
        for step in steps.iter_mut().filter(|step| step[0] == "test" && !step.contains(&"--doc")) {
            if !step.contains(&"--") {
                step.push("--");
            }
            step.push("--include-ignored");
        }
    }
    Ok(steps)
}

/// Whether [`END_TO_END`], and whether any other crate, has integration tests; cargo refuses to run none.
fn integration_tests() -> Result<(bool, bool)> {
    let metadata = MetadataCommand::new().current_dir(workspace()).no_deps().exec()?;
    let (mut alone, mut together) = (false, false);
    for package in &metadata.packages {
        let has_tests = package.targets.iter().any(|target| target.kind.contains(&TargetKind::Test));
        if package.name.as_str() == END_TO_END {
            alone |= has_tests;
        } else {
            together |= has_tests;
        }
    }
    Ok((alone, together))
}

/// Runs cargo, shows what it prints, and counts the tests it tells of; without any it counts as one check.
fn cargo(arguments: &[&str]) -> Result<Count> {
    let mut child = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(arguments)
        .current_dir(workspace())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut count = Count::default();
    for line in BufReader::new(child.stdout.take().expect("was asked for")).lines() {
        let line = line?;
        println!("{line}");
        count += counted(&line).unwrap_or_default();
    }
    let succeeded = child.wait()?.success();
    Ok(match (succeeded, count) {
        (true, Count { passed: 0, failed: 0 }) if arguments[0] != "test" => Count::PASSED,
        (true, count) => count,
        (false, Count { passed, failed: 0 }) => Count { passed, failed: 1 },
        (false, count) => count,
    })
}

/// Reads `test result: ok. 7 passed; 0 failed; 0 ignored; ...`.
fn counted(line: &str) -> Option<Count> {
    let (_, figures) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let figure = |name: &str| {
        let part = figures.split("; ").find_map(|part| part.strip_suffix(name))?;
        part.trim().parse().ok()
    };
    Some(Count { passed: figure("passed")?, failed: figure("failed")? })
}

fn check(name: &str, result: Result<()>) -> Count {
    match result {
        Ok(()) => Count::PASSED,
        Err(error) => {
            println!("{name}: {error:#}");
            Count::FAILED
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_other_lines_are_not() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.35s";
        assert_eq!(counted(line), Some(Count { passed: 12, failed: 3 }));
        assert_eq!(counted("test link::tests::a ... ok"), None);
        assert_eq!(counted("test result: ok. many passed; 0 failed"), None);
    }
}
