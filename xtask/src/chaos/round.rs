//! One round: a healthy guest, a migration, faults, and what came of it.

use std::{
    process::Child,
    sync::{Mutex, PoisonError, atomic::AtomicBool, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::unistd::Pid;

use super::{
    fault::{Fault, Side},
    hosts::{Answer, MACHINE},
    ledger::{Outcome, Round, milliseconds},
    plan::Plan,
    settle::{self, Settled},
    stage::Stage,
    strike::{Flight, Struck},
    verdict::{self, Verdict},
};

/// How long the command line may take altogether.
const COMMAND_LIMIT: Duration = Duration::from_secs(150);
/// How long the agent goes on with what a command line asked for that was killed at once.
const BEGINNING: Duration = Duration::from_secs(2);

/// Carries a round out. What is wrong is in the result; an error means that the harness itself doesn't work.
pub(super) fn run(stage: &mut Stage, plan: &Plan) -> Result<Round> {
    let began = Instant::now();
    if let Err(error) = stage.prepare(plan.from) {
        return Ok(unprepared(plan, began, format!("before the round: {error:#}")));
    }
    let (struck, id) = migrate_under_fire(stage, plan)?;
    let since = struck.iter().map(|struck| struck.over).max().unwrap_or(began);
    let settled = settle::settle(stage, plan, id.as_deref(), since)?;
    let verdict = verdict::judge(stage, plan, &struck, &settled);
    Ok(entry(plan, began, &struck, &settled, verdict))
}

/// Migrates while faults strike; what they did, and the migration's id.
fn migrate_under_fire(stage: &Stage, plan: &Plan) -> Result<(Vec<Struck>, Option<String>)> {
    let memory_is_short = plan.has(Fault::NoMemoryTarget);
    stage.host(plan.to()).take_memory(memory_is_short);
    let known = stage.migration_ids();
    let mut arguments = vec!["migrate", MACHINE, "--to", plan.to().name()];
    arguments.extend(plan.options.iter().map(String::as_str));
    let began = Instant::now();
    let child = stage.host(plan.from).begin(&arguments)?;
    let flight = Flight {
        stage,
        plan,
        known,
        command_line: Pid::from_raw(child.id().cast_signed()),
        began,
        is_over: AtomicBool::new(false),
        struck: Mutex::new(Vec::new()),
    };
    std::thread::scope(|scope| {
        for strike in &plan.strikes {
            let flight = &flight;
            scope.spawn(move || flight.strike(*strike));
        }
        await_command_line(&flight, child);
    });
    stage.host(plan.to()).take_memory(false);
    let id = flight.id(Side::Source).or_else(|| flight.id(Side::Target));
    let struck = flight.struck.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((struck, id))
}

/// Waits for the command line's end. Moments that haven't come when a migration is over don't come any more.
fn await_command_line(flight: &Flight, child: Child) {
    let answer = Answer::of(child, COMMAND_LIMIT);
    if answer.code.is_some() {
        flight.is_over.store(true, Ordering::Relaxed);
    } else {
        std::thread::sleep(BEGINNING);
    }
}

fn entry(plan: &Plan, began: Instant, struck: &[Struck], settled: &Settled, verdict: Verdict) -> Round {
    let in_flight = struck.iter().any(|struck| struck.fault == plan.fault && struck.hit && struck.in_flight);
    Round {
        in_flight,
        strikes: struck.iter().map(|struck| struck.what.clone()).collect(),
        outcome: verdict.outcome,
        doubled: verdict.doubled,
        corrupted: verdict.corrupted,
        leftovers: verdict.leftovers,
        recover_failed: settled.agreement.is_none(),
        recovered: settled.recovered,
        settled_ms: milliseconds(settled.took),
        findings: verdict.findings,
        ..blank(plan, began)
    }
}

/// The machine wasn't as the round before had left it: it can't be moved, or isn't whole.
fn unprepared(plan: &Plan, began: Instant, finding: String) -> Round {
    Round { recover_failed: true, findings: vec![finding], ..blank(plan, began) }
}

fn blank(plan: &Plan, began: Instant) -> Round {
    Round {
        round: plan.round,
        fault: plan.fault,
        direction: format!("{} to {}", plan.from.name(), plan.to().name()),
        strikes: Vec::new(),
        in_flight: false,
        outcome: Outcome::RolledBack,
        doubled: false,
        corrupted: false,
        leftovers: false,
        recover_failed: false,
        recovered: false,
        settled_ms: 0,
        seconds: began.elapsed().as_secs_f64(),
        findings: Vec::new(),
    }
}
