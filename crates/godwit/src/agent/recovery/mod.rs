//! Finishing or rolling back what a migration left behind.
//!
//! A worker settles its own hand-over. Where it can't (it was killed, its host went down, the link was gone for too
//! long, the disk was full), the agent does, with the same state machines and another shell: no data path, only QEMU's
//! monitor, the durable record, and questions to the other host's agent.
//!
//! ```text
//!   a worker ended ─┐                          ┌─ nothing open ────────────────► settled
//!   the agent starts├─► what does the record ──┼─ a source's ─► Source::restarted ─┐
//!   every few secs ─┤   say, what does QEMU?   ├─ a target's ─► Target::restarted ─┤
//!   godwit recover ─┤                          └─ QEMU's settings: put back        │
//!   the peer says ──┘                                                              ▼
//!                  settled ◄── it answers ── tell or ask the peer's agent ◄── carry the actions out
//!                  waiting ◄── it doesn't ──┘                                      │
//!                  failed  ◄── QEMU or the disk doesn't do what it should ◄────────┘
//! ```
//!
//! Everything here can be done twice, and stopped anywhere: each step is found again in the record. A machine that is
//! waiting or failed is looked at again and again, ever more rarely.

mod hear;
mod lost;
mod shell;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future, stream};
use godwit_migration::handover::{Record, RecordState};
use tokio::time::{interval, timeout};

use self::shell::Shell;
use super::{
    Agent,
    error::AgentError,
    machines,
    migrations::doing,
    ownership::{self, Holder},
    state::MachineDir,
    workers,
};
use crate::{
    api::{Finding, FindingState, Recovery},
    borrowed,
    job::{self, Job, Outcome, Report, Role},
    output::one_line,
    token::{Store, TokenError},
    whole_file,
};

/// How often the agent looks whether something is to be settled.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A machine that can't be settled is tried again after this, and then ever later.
const FIRST_DELAY: Duration = Duration::from_millis(500);
/// But never later than this.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Machines that are looked after at the same time.
const SETTLED_AT_ONCE_MAX: usize = 16;
/// A worker that says nothing for so long is taken for dead when an operator asks.
const WORKER_SILENCE: Duration = Duration::from_secs(5);
/// How long a worker's end may take to be dealt with.
const AFTER_WORKER: Duration = Duration::from_secs(30);

/// What is to be done about a machine that no worker looks after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    /// This host is, or was, the source of an open hand-over.
    Source,
    /// This host is its target.
    Target,
    /// Only QEMU's settings are still changed.
    Settings,
}

/// When machines that couldn't be settled are tried again.
#[derive(Debug, Default)]
struct Delays(BTreeMap<String, (Instant, Duration)>);

impl Delays {
    fn is_due(&self, machine: &str, now: Instant) -> bool {
        self.0.get(machine).is_none_or(|(at, _)| now >= *at)
    }

    fn note(&mut self, machine: &str, state: FindingState, now: Instant) {
        if state == FindingState::Settled {
            self.0.remove(machine);
            return;
        }
        let delay = self.0.get(machine).map_or(FIRST_DELAY, |(_, delay)| (*delay * 2).min(LONGEST_DELAY));
        self.0.insert(machine.to_owned(), (now + delay, delay));
    }
}

impl Agent {
    /// Settles whatever can be settled, for as long as the agent lives.
    pub(in crate::agent) async fn keep_settling(self: Arc<Self>) {
        let mut delays = Delays::default();
        let mut ticks = interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            let known = self.state.known_machines().unwrap_or_default();
            let due = known
                .into_iter()
                .filter(|(name, directory)| delays.is_due(name, Instant::now()) && open(directory).is_some());
            // A peer that doesn't answer mustn't keep the machines of others waiting.
            let settling = due.map(|(name, _)| self.settle_if_idle(name)).collect::<Vec<_>>();
            let settled = stream::iter(settling).buffer_unordered(SETTLED_AT_ONCE_MAX);
            for (name, state) in settled.filter_map(future::ready).collect::<Vec<_>>().await {
                delays.note(&name, state, Instant::now());
            }
            self.repeat_orders(&mut delays).await;
            self.write_reports();
        }
    }

    async fn settle_if_idle(&self, name: String) -> Option<(String, FindingState)> {
        let _claim = self.busy.claim(&name, "its hand-over is being settled").ok()?;
        let finding = self.settle(&name, None).await;
        self.correct_reports(&name, &finding);
        Some((name, finding.state))
    }

    /// Settles one machine, or all, now; says what was found and done.
    pub(in crate::agent) async fn recover(&self, machine: Option<&str>) -> Result<Recovery, AgentError> {
        let known = self.state.known_machines()?;
        if let Some(name) = machine
            && !known.iter().any(|(known, _)| known == name)
        {
            return Err(AgentError::NotFound { what: "machine", name: name.to_owned() });
        }
        let mut machines = Vec::new();
        for (name, _) in known.iter().filter(|(name, _)| machine.is_none_or(|wanted| wanted == name)) {
            machines.push(self.recover_machine(name).await);
        }
        Ok(Recovery { machines })
    }

    async fn recover_machine(&self, name: &str) -> Finding {
        let mut ended_worker = false;
        if let Some(job) = self.migrations.of_machine(name) {
            if !self.worker_is_silent(&job).await {
                let found = format!("{}, and isn't over", doing(&job));
                return self.finding(name, found, "nothing".to_owned(), FindingState::Waiting);
            }
            workers::kill(&self.state.migration(&job.id));
            ended_worker = true;
            let gone = async {
                while self.migrations.of_machine(name).is_some() {
                    tokio::time::sleep(LOOK_EVERY / 20).await;
                }
            };
            let _ = timeout(AFTER_WORKER, gone).await;
        }
        let mut finding = match self.busy.claim(name, "its hand-over is being settled") {
            Ok(_claim) => self.settle(name, None).await,
            Err(busy) => self.finding(name, busy.to_string(), "nothing".to_owned(), FindingState::Waiting),
        };
        if ended_worker {
            finding.did = format!("ended its worker, which said nothing any more; {}", finding.did);
        }
        self.correct_reports(name, &finding);
        finding
    }

    /// Whether the worker of a migration takes a connection and then says nothing, as one does that is stopped or stuck.
    async fn worker_is_silent(&self, job: &Job) -> bool {
        let socket = self.state.migration(&job.id).join(job::WORKER_SOCKET);
        let says = async {
            let mut worker = tokio::net::UnixStream::connect(socket).await?;
            tokio::io::AsyncReadExt::read_u8(&mut worker).await
        };
        timeout(WORKER_SILENCE, says).await.is_err()
    }

    /// Finishes or rolls back what is open of a machine. The caller has claimed it; `ended` is the job of a worker that
    /// has just died, if that is why.
    pub(in crate::agent) async fn settle(&self, name: &str, ended: Option<&Job>) -> Finding {
        let directory = self.state.machine(name);
        whole_file::sweep(directory.path());
        let store = Store::open(directory.path());
        // What a worker wrote last may not survive the host yet; what is built on it would.
        let record = match synced(&store) {
            Ok(record) => record,
            Err(error) => {
                return self.finding(name, one_line(&error), "nothing".to_owned(), FindingState::Failed);
            }
        };
        let found = describe(record.as_ref(), borrowed::noted(directory.path()).is_some());
        let mut shell = Shell::new(self, name);
        // First of all: what follows may wait for the peer, and a slow guest shouldn't.
        shell.give_speed_back();
        let settled = match (ended, open(&directory)) {
            // Nothing was recorded of this attempt: lest it come true later, it is refused for good.
            (Some(job), _) if job.role == Role::Target && is_older(record.as_ref(), job) => {
                shell.refuse_unknown(record, job).await
            }
            (_, None) => Ok(()),
            (_, Some(Open::Source)) => shell.settle_source(record).await,
            (_, Some(Open::Target)) => shell.settle_target(record).await,
            (_, Some(Open::Settings)) => shell.give_settings_back().await,
        };
        let (did, state) = match settled {
            Ok(()) if open(&directory).is_none() => (shell.account(), FindingState::Settled),
            Ok(()) => (format!("{}; it hasn't decided yet", shell.account()), FindingState::Waiting),
            Err(error @ AgentError::Unreachable { .. }) => {
                (format!("{}; {}", shell.account(), one_line(&error)), FindingState::Waiting)
            }
            Err(error) => (format!("{}; {}", shell.account(), one_line(&error)), FindingState::Failed),
        };
        if !shell.did.is_empty() || state != FindingState::Settled {
            tracing::info!(machine = name, found, did, ?state, "settling");
            self.metrics.settled(state);
        }
        self.finding(name, found, did, state)
    }

    fn finding(&self, name: &str, found: String, did: String, state: FindingState) -> Finding {
        let at = match ownership::of(&self.state.machine(name)) {
            Ok(known) => match known.holder {
                Holder::Here => Some(self.config.name.to_string()),
                Holder::Peer(peer) => Some(peer),
                Holder::Unsettled(_) => None,
            },
            Err(_) => None,
        };
        Finding { name: name.to_owned(), found, did, state, at }
    }

    /// Reports of a machine that had to say "unsettled" say what became of it.
    fn correct_reports(&self, name: &str, finding: &Finding) {
        if finding.state != FindingState::Settled {
            return;
        }
        for id in self.state.migrations().unwrap_or_default() {
            let unsettled = |it: &Report| it.machine == name && it.outcome == Outcome::Unsettled;
            let report = self.report(&id).filter(unsettled);
            if let Some(report) = report.and_then(|report| corrected(report, finding)) {
                self.keep_report(report);
            }
        }
    }
}

/// The report of the newest migration of a machine, now that it is known where the machine is; `None` if it said so.
pub(in crate::agent) fn corrected(report: Report, finding: &Finding) -> Option<Report> {
    let arrived = finding.at.as_deref() == Some(report.target.as_str());
    let outcome = match (arrived, report.outcome) {
        (true, _) => Outcome::Completed,
        (false, Outcome::Unsettled) => Outcome::Failed,
        (false, outcome) => outcome,
    };
    let detail = Some(format!("settled later: {}", finding.did));
    (outcome != report.outcome).then(|| Report {
        outcome,
        machine_is_at: finding.at.clone(),
        detail,
        ..report
    })
}

fn synced(store: &Store) -> Result<Option<Record>, TokenError> {
    let record = store.load()?;
    if record.is_some() {
        store.sync()?;
    }
    Ok(record)
}

fn is_older(record: Option<&Record>, job: &Job) -> bool {
    record.is_none_or(|record| record.epoch.0 < job.epoch)
}

/// Whether anything is open of a machine that no worker looks after.
pub(in crate::agent) fn is_open(directory: &MachineDir) -> bool {
    open(directory).is_some()
}

/// What is open of a machine, by its record and by what is left of it.
fn open(directory: &MachineDir) -> Option<Open> {
    let has_qemu = machines::running(directory).ok().flatten().is_some();
    let record = Store::open(directory.path()).load().ok().flatten();
    match record.map(|record| record.state) {
        Some(RecordState::Offered { .. } | RecordState::GivenAway { settled: false, .. }) => {
            Some(Open::Source)
        }
        Some(RecordState::GivenAway { settled: true, .. }) if has_qemu => Some(Open::Source),
        Some(RecordState::Awaited { .. } | RecordState::Taking { .. } | RecordState::Mine { .. }) => {
            Some(Open::Target)
        }
        Some(RecordState::Refused { .. }) if has_qemu || directory.exists() => Some(Open::Target),
        _ if has_qemu && borrowed::noted(directory.path()).is_some() => Some(Open::Settings),
        _ => None,
    }
}

/// The record in words.
fn describe(record: Option<&Record>, settings_are_changed: bool) -> String {
    let Some(Record { epoch, state }) = record else {
        return if settings_are_changed { "QEMU's settings are changed" } else { "nothing open" }.to_owned();
    };
    let epoch = epoch.0;
    match state {
        RecordState::Owner { .. } if settings_are_changed => "QEMU's settings are changed".to_owned(),
        RecordState::Owner { .. } => "nothing open".to_owned(),
        RecordState::Offered { peer, stopped: None } => {
            format!("hand-over {epoch} to {peer} was open; the machine hadn't left")
        }
        RecordState::Offered { peer, .. } => {
            format!("hand-over {epoch} to {peer} was open and the guest stopped; the machine hadn't left")
        }
        RecordState::GivenAway { peer, settled: false, .. } => {
            format!("the machine had left for {peer} in hand-over {epoch}; no answer had come")
        }
        RecordState::GivenAway { peer, .. } => format!("{peer} has the machine since hand-over {epoch}"),
        RecordState::Awaited { peer } => {
            format!("hand-over {epoch} from {peer} was open; the machine hadn't come")
        }
        RecordState::Taking { peer, .. } => {
            format!("the machine had come from {peer} in hand-over {epoch}, but hadn't run")
        }
        RecordState::Mine { peer } => {
            format!("the machine had come from {peer} in hand-over {epoch}; whether it ran wasn't known")
        }
        RecordState::Refused { peer } => format!("hand-over {epoch} from {peer} was refused"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_settled_is_tried_ever_more_rarely() {
        let (mut delays, start) = (Delays::default(), Instant::now());
        assert!(delays.is_due("web1", start));
        let mut waited = Vec::new();
        for _ in 0..7 {
            delays.note("web1", FindingState::Waiting, start);
            waited.push(delays.0["web1"].0 - start);
        }
        assert_eq!(waited[0], FIRST_DELAY);
        assert!(waited.is_sorted() && waited[6] == LONGEST_DELAY);
        assert!(!delays.is_due("web1", start) && delays.is_due("web2", start));
        delays.note("web1", FindingState::Settled, start);
        assert!(delays.is_due("web1", start));
    }
}
