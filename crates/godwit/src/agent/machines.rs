//! What is asked about machines: run, list, stop, resume, kill, remove.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use godwit_migration::handover::Epoch;
use godwit_qemu::{
    machine::Spec,
    qmp::{self, QmpError, RunState},
};
use tokio::time::{Instant, interval, sleep};

use super::{
    Agent,
    error::{AgentError, Refusal},
    launch,
    ownership::{self, Holder, Ownership},
    state::{MachineDir, Running},
};
use crate::{
    api::{Machine, Removed},
    job::Role,
};

/// How long a monitor may take to answer a question.
pub(super) const MONITOR_TIMEOUT: Duration = Duration::from_secs(3);
/// Monitors that are asked at the same time.
const ASKED_AT_ONCE_MAX: usize = 16;
/// How long QEMU may take to quit before it is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often the agent looks whether a process has ended.
const POLL: Duration = Duration::from_millis(50);
/// How often the agent looks for machines that ended by themselves.
const REAP_EVERY: Duration = Duration::from_secs(2);

/// Machines with which something is being done that excludes everything else.
#[derive(Debug, Clone, Default)]
pub(super) struct Busy(Arc<Mutex<BTreeMap<String, String>>>);

impl Busy {
    /// Claims a machine until the claim is dropped.
    pub(super) fn claim(&self, machine: &str, doing: &str) -> Result<Claim, Refusal> {
        let mut busy = self.lock();
        if let Some(doing) = busy.get(machine) {
            return Err(Refusal::Busy { machine: machine.to_owned(), doing: doing.clone() });
        }
        busy.insert(machine.to_owned(), doing.to_owned());
        Ok(Claim { busy: self.clone(), machine: machine.to_owned() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine that nobody else may touch.
#[derive(Debug)]
pub(super) struct Claim {
    busy: Busy,
    machine: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.busy.lock().remove(&self.machine);
    }
}

impl Agent {
    /// All machines.
    pub(super) async fn list_machines(&self) -> Result<Vec<Machine>, AgentError> {
        let known = self.state.machines()?;
        let views = known.iter().map(|(name, directory)| self.view(name, directory, false));
        // One QEMU that doesn't answer mustn't keep the others waiting.
        stream::iter(views.collect::<Vec<_>>()).buffered(ASKED_AT_ONCE_MAX).try_collect().await
    }

    /// One machine, with its spec.
    pub(super) async fn show_machine(&self, name: &str) -> Result<Machine, AgentError> {
        self.view(name, &self.known(name)?, true).await
    }

    /// Starts a machine.
    pub(super) async fn run_machine(&self, spec: Spec) -> Result<Machine, AgentError> {
        spec.validate()?;
        let _claim = self.busy.claim(&spec.name, "it is being started")?;
        let directory = self.state.machine(&spec.name);
        if running(&directory)?.is_some() {
            return Err(Refusal::Runs(spec.name).into());
        }
        ownership::check(&spec.name, &directory)?;
        let is_new = !directory.exists();
        launch::clear(&directory).await;
        directory.create(&spec)?;
        if let Err(error) = launch::start(self, spec.clone(), &directory, false).await {
            if is_new {
                directory.remove()?;
            }
            return Err(error);
        }
        tracing::info!(machine = spec.name, "started");
        self.view(&spec.name, &directory, true).await
    }

    /// Presses the power button and waits.
    pub(super) async fn stop_machine(&self, name: &str, timeout: Duration) -> Result<Machine, AgentError> {
        let directory = self.known(name)?;
        let running = running(&directory)?.ok_or_else(|| Refusal::Off(name.to_owned()))?;
        drop(self.busy.claim(name, "it is being stopped")?);
        monitor(&directory, &running).await?.system_powerdown().await?;
        if !ends_within(&running, timeout).await {
            return Err(AgentError::StillRunning { machine: name.to_owned(), timeout });
        }
        launch::clear(&directory).await;
        self.view(name, &directory, false).await
    }

    /// Lets a guest go on that QEMU stopped because a disk couldn't be read or written.
    pub(super) async fn resume_machine(&self, name: &str) -> Result<Machine, AgentError> {
        let directory = self.known(name)?;
        let running = running(&directory)?.ok_or_else(|| Refusal::Off(name.to_owned()))?;
        let _claim = self.busy.claim(name, "it is being resumed")?;
        ownership::check(name, &directory)?;
        let monitor = monitor(&directory, &running).await?;
        // In every other state it is somebody else who decides whether it runs, above all a hand-over.
        if monitor.query_status().await?.state != RunState::IoError {
            return Err(Refusal::NotStopped(name.to_owned()).into());
        }
        monitor.cont().await?;
        tracing::info!(machine = name, "resumed");
        self.view(name, &directory, false).await
    }

    /// Ends QEMU.
    pub(super) async fn kill_machine(&self, name: &str) -> Result<Machine, AgentError> {
        let directory = self.known(name)?;
        let running = running(&directory)?.ok_or_else(|| Refusal::Off(name.to_owned()))?;
        let _claim = self.busy.claim(name, "it is being killed")?;
        end(&directory, &running).await;
        launch::clear(&directory).await;
        tracing::info!(machine = name, "killed");
        self.view(name, &directory, false).await
    }

    /// Forgets a machine that is off, or an adopted one, which goes on without us; and the record of who may run it.
    pub(super) async fn remove_machine(&self, name: &str) -> Result<Removed, AgentError> {
        let directory = self.directory(name)?;
        if !directory.path().exists() {
            return Err(unknown(name));
        }
        let _claim = self.busy.claim(name, "it is being removed")?;
        if running(&directory)?.is_some_and(|running| running.adopted_qmp.is_none()) {
            return Err(Refusal::Runs(name.to_owned()).into());
        }
        launch::clear(&directory).await;
        directory.remove()?;
        tracing::info!(machine = name, "forgotten");
        Ok(Removed { name: name.to_owned() })
    }

    /// Clears away what ended by itself, for as long as the agent lives.
    pub(super) async fn reap_machines(self: Arc<Self>) {
        let mut ticks = interval(REAP_EVERY);
        loop {
            ticks.tick().await;
            self.undo_unfinished_starts().await;
            for (name, directory) in self.state.machines().unwrap_or_default() {
                let ended = directory.running().ok().flatten().is_some_and(|it| !it.process.is_alive());
                if ended && let Ok(_claim) = self.busy.claim(&name, "it is being cleared away") {
                    tracing::info!(machine = name, "ended");
                    launch::clear(&directory).await;
                }
            }
        }
    }

    /// The directory of a machine that this host knows.
    pub(super) fn known(&self, name: &str) -> Result<MachineDir, AgentError> {
        let directory = self.directory(name)?;
        if directory.exists() { Ok(directory) } else { Err(unknown(name)) }
    }

    /// A machine's directory; a name that can't be one never becomes a path.
    pub(super) fn directory(&self, name: &str) -> Result<MachineDir, AgentError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(unknown(name));
        }
        Ok(self.state.machine(name))
    }

    async fn view(&self, name: &str, directory: &MachineDir, whole: bool) -> Result<Machine, AgentError> {
        let spec = directory.spec()?;
        let running = running(directory)?;
        let migration = self.migrations.of_machine(name);
        let state = match &running {
            None => "off".to_owned(),
            Some(running) if running.adopted_qmp.is_some() && migration.is_some() => "migrating".to_owned(),
            Some(running) => run_state(directory, running).await.unwrap_or_else(|error| {
                tracing::debug!(machine = name, %error, "no state");
                "unknown".to_owned()
            }),
        };
        let arriving = migration.as_ref().filter(|job| job.role == Role::Target);
        let at = match (arriving, ownership::of(directory)?) {
            (Some(job), Ownership { epoch: Epoch(0), .. }) => job.peer.clone(),
            (_, Ownership { holder: Holder::Here, .. }) => self.config.name.to_string(),
            (_, Ownership { holder: Holder::Peer(peer) | Holder::Unsettled(peer), .. }) => peer,
        };
        let console = directory.files().console();
        Ok(Machine {
            name: name.to_owned(),
            state,
            at,
            pid: running.as_ref().map(|running| running.process.pid),
            memory_bytes: spec.memory.bytes(),
            adopted: spec.adopted.is_some(),
            migration: migration.map(|job| job.id),
            console: (running.is_some() && console.exists()).then_some(console),
            spec: whole.then_some(spec),
        })
    }
}

fn unknown(name: &str) -> AgentError {
    AgentError::NotFound { what: "machine", name: name.to_owned() }
}

/// What is written down of a machine's process, if that lives.
pub(super) fn running(directory: &MachineDir) -> Result<Option<Running>, AgentError> {
    Ok(directory.running()?.filter(|running| running.process.is_alive()))
}

/// A connection to the machine's monitor.
pub(super) async fn monitor(directory: &MachineDir, running: &Running) -> Result<qmp::Client, QmpError> {
    let own = directory.files().qmp();
    qmp::Client::connect(running.adopted_qmp.as_ref().unwrap_or(&own), MONITOR_TIMEOUT).await
}

/// Ends QEMU: asks it to quit, so that its images are closed in order, then kills it.
pub(super) async fn end(directory: &MachineDir, running: &Running) {
    if let Ok(client) = monitor(directory, running).await {
        let _ = client.quit().await;
    }
    if !ends_within(running, QUIT_TIMEOUT).await {
        running.process.kill();
        ends_within(running, QUIT_TIMEOUT).await;
    }
}

/// Whether the process ends in this time.
pub(super) async fn ends_within(running: &Running, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while running.process.is_alive() {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
    true
}

async fn run_state(directory: &MachineDir, running: &Running) -> Result<String, QmpError> {
    let status = monitor(directory, running).await?.query_status().await?;
    let word = serde_json::to_value(status.state).ok();
    Ok(word.and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_else(|| "unknown".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_at_a_time_is_done_with_a_machine() {
        let busy = Busy::default();
        let claim = busy.claim("web1", "it is being started").unwrap();
        let refusal = busy.claim("web1", "it is being killed").unwrap_err();
        assert_eq!(refusal.to_string(), "web1 is busy: it is being started");
        busy.claim("web2", "it is being started").unwrap();
        drop(claim);
        busy.claim("web1", "it is being killed").unwrap();
    }
}
