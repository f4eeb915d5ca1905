//! Machines that somebody else started.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use godwit_qemu::{
    adopt::{self, LiveFacts, classify, inspect, process_of},
    machine::Spec,
    qmp::Client,
};

use super::{
    Agent,
    error::{AgentError, Refusal},
    machines::running,
    process::{self, Process},
    state::Running,
};
use crate::{
    api::{AdoptRequest, Machine},
    output::one_line,
};

/// Adoption asks many questions; a busy QEMU answers slowly.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

impl Agent {
    /// Takes a running machine on, if an equal one could be started at another host.
    pub(super) async fn adopt_machine(&self, request: AdoptRequest) -> Result<Machine, AgentError> {
        let qmp = request
            .qmp
            .canonicalize()
            .map_err(|error| AgentError::Invalid(format!("{}: {error}", request.qmp.display())))?;
        let found = process_behind(qmp.clone())?;
        let client = Client::connect(&qmp, QUESTION_TIMEOUT).await?;
        let live = inspect(&client).await?;
        drop(client);
        let mut spec = classified(&found, &live)?;
        if let Some(name) = request.name {
            spec.name = name;
        }
        spec.validate()?;
        let _claim = self.busy.claim(&spec.name, "it is being adopted")?;
        self.not_adopted_twice(&qmp)?;
        let directory = self.state.machine(&spec.name);
        if directory.exists() {
            return Err(match running(&directory)? {
                Some(_) => Refusal::Runs(spec.name),
                None => Refusal::NameTaken(spec.name),
            }
            .into());
        }
        let process =
            Process::of(found.pid).ok_or_else(|| Refusal::Adoption("its QEMU has ended".to_owned()))?;
        directory.create(&spec)?;
        directory.set_running(&Running { process, taps: Vec::new(), adopted_qmp: Some(qmp) })?;
        tracing::info!(machine = spec.name, pid = found.pid, "adopted");
        self.show_machine(&spec.name).await
    }

    fn not_adopted_twice(&self, qmp: &Path) -> Result<(), AgentError> {
        for (name, directory) in self.state.machines()? {
            let known = running(&directory)?.and_then(|running| running.adopted_qmp);
            if known.as_deref() == Some(qmp) || directory.path() == qmp.parent().unwrap_or(qmp) {
                return Err(Refusal::Adoption(format!("this is {name}, which is known here")).into());
            }
        }
        Ok(())
    }
}

/// Looks again at an adopted machine: what was plugged in or out since then, an equal one elsewhere wouldn't have.
pub(super) async fn check_unchanged(qmp: &Path, monitor: &Client) -> Result<(), AgentError> {
    let found = process_behind(qmp.to_owned())?;
    classified(&found, &inspect(monitor).await?).map(drop).map_err(AgentError::from)
}

fn classified(found: &adopt::Process, live: &LiveFacts) -> Result<Spec, Refusal> {
    classify(found, live).map_err(|error| Refusal::Adoption(one_line(&error)))
}

fn process_behind(qmp: PathBuf) -> Result<adopt::Process, AgentError> {
    process::with_trace(move || process_of(&qmp))
        .map_err(|error| AgentError::Invalid(error.to_string()))?
        .map_err(|error| Refusal::Adoption(one_line(&error)).into())
}
