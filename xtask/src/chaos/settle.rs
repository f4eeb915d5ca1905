//! Waiting until both agents agree on who has the machine, and nothing is under way any more.

use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_sim::lab::Place;
use serde_json::Value;

use super::{
    fault::Fault,
    hosts::{Host, MACHINE},
    plan::Plan,
    stage::Stage,
    watch::overlap,
};

/// How long the agents have to settle a migration by themselves.
pub(super) const SETTLE_LIMIT: Duration = Duration::from_secs(120);
/// How long a machine that `recover` calls settled may take until everything agrees.
const RECOVER_LIMIT: Duration = Duration::from_secs(20);
/// Two copies that run for so long are waited for no longer.
const TWICE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Twice in a row, lest a glimpse between two steps be taken for the end.
const LOOKS: u32 = 2;
/// Token records in these states await something.
const OPEN_RECORDS: [&str; 4] = ["offered", "awaited", "taking", "mine"];

/// What both hosts agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreement {
    /// Who has the machine.
    pub(super) holder: Place,
    /// QEMU's word for what it does, or `off`.
    pub(super) state: String,
}

/// How a round's migration was settled.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) agreement: Option<Agreement>,
    /// How long it took after the last fault was over.
    pub(super) took: Duration,
    /// The operator had to say `recover`.
    pub(super) recovered: bool,
    /// What stood in the way in the end.
    pub(super) obstacle: String,
}

/// Waits until the agents have settled the migration, and has them `recover` it if they don't.
pub(super) fn settle(stage: &Stage, plan: &Plan, id: Option<&str>, since: Instant) -> Result<Settled> {
    let (mut looks, mut recovered_at) = (0, None);
    loop {
        stage.hosts().iter().try_for_each(|host| host.keep_agent(&stage.lab))?;
        let view = look(stage, plan, id);
        looks = if view.is_ok() { looks + 1 } else { 0 };
        let waited = since.elapsed();
        let is_late = recovered_at.is_some_and(|at: Instant| at.elapsed() > RECOVER_LIMIT);
        if looks >= LOOKS || is_late || run_twice(stage) {
            let (agreement, obstacle) = match view {
                Ok(agreement) => (Some(agreement), String::new()),
                Err(obstacle) => (None, obstacle),
            };
            return Ok(Settled { agreement, took: waited, recovered: recovered_at.is_some(), obstacle });
        }
        if recovered_at.is_none() && waited > SETTLE_LIMIT {
            for host in stage.hosts() {
                host.godwit(&["recover", MACHINE]);
            }
            recovered_at = Some(Instant::now());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether both hosts run the machine, and not for an instant: nothing can mend that.
fn run_twice(stage: &Stage) -> bool {
    let [a, b] = [Place::A, Place::B].map(|place| stage.watcher(place).seen().intervals);
    overlap(&a, &b) > TWICE
}

/// What both hosts agree on, or why they don't.
fn look(stage: &Stage, plan: &Plan, id: Option<&str>) -> Result<Agreement, String> {
    let mut holders = Vec::new();
    for host in stage.hosts() {
        is_closed(host, id)?;
        if let Some((at, state)) = machine(host)? {
            let is_here = at == host.name();
            if is_here {
                holders.push(Agreement { holder: host.place, state });
            } else if state != "off" {
                return Err(format!(
                    "{} says that {at} has the machine, but its own is {state}",
                    host.name()
                ));
            }
        }
    }
    let [agreement] = holders.as_slice() else {
        return Err(format!("{} hosts have the machine", holders.len()));
    };
    is_final(plan, agreement)?;
    Ok(agreement.clone())
}

/// Whether this is how a machine can be for good, after what was done to it.
fn is_final(plan: &Plan, agreement: &Agreement) -> Result<(), String> {
    let state = agreement.state.as_str();
    let may_be_paused = plan.has(Fault::OperatorStop) || plan.has(Fault::OperatorStopCont);
    match state {
        "off" => Ok(()),
        "running" if !plan.has(Fault::PowerOff) => Ok(()),
        // QEMU has no other way back from the end of a paused guest's migration than to run it.
        "paused" | "postmigrate" if may_be_paused => Ok(()),
        _ => Err(format!("the machine is {state} at {}", agreement.holder.name())),
    }
}

/// Nothing is under way at a host: no hand-over is open, and the migration has its report.
fn is_closed(host: &Host, id: Option<&str>) -> Result<(), String> {
    let name = host.name();
    let unsettled = host.record().filter(|record| OPEN_RECORDS.contains(&record.as_str()));
    if let Some(record) = unsettled {
        return Err(format!("the record of {name} is `{record}`"));
    }
    let Some(id) = id.filter(|id| host.migrations().join(id).exists()) else { return Ok(()) };
    let answer = host.godwit(&["status", id]);
    match (answer.code, answer.json["report"]["outcome"].as_str()) {
        (Some(0), None) => Err(format!("the migration goes on at {name}")),
        (Some(0), Some("unsettled")) => Err(format!("the migration is unsettled at {name}")),
        // It couldn't be written down, and will never be known: the machine is what counts.
        (Some(0) | Some(4), _) => Ok(()),
        _ => Err(format!("{name} doesn't tell of the migration: {}", answer.error.trim())),
    }
}

/// Who has the machine, as this host sees it, and what it does here; `None`: it isn't known here.
fn machine(host: &Host) -> Result<Option<(String, String)>, String> {
    let answer = host.godwit(&["vm", "show", MACHINE]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match answer.code {
        Some(0) => Ok(Some((text(&answer.json["at"]), text(&answer.json["state"])))),
        Some(4) => Ok(None),
        _ => Err(format!("{} doesn't tell of the machine: {}", host.name(), answer.error.trim())),
    }
}
