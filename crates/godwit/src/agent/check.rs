//! `godwit check`: whether a migration would be refused, and what it would take.
//!
//! ```text
//! what `migrate` refuses here ─► what its worker refuses ─► the target rehearses its own part ─► processors ─► forecast
//!             └──────────────────────────┴─── the same code, one line ──┴── meanwhile: sample, link ──┘
//! ```
//!
//! Nothing is left behind: the target starts a QEMU for the machine under another name and ends it again.

use std::sync::Arc;

use godwit_qemu::{
    memory_layout::MemoryLayout,
    processor::{Outline, Processor},
    qmp,
};

use super::{
    Agent, adoption,
    api::unix_s,
    error::{AgentError, Refusal},
    incoming::available_memory_bytes,
    machines::monitor,
    outgoing::{Prepared, offer},
    peers::REHEARSAL_PATH,
    state::Running,
};
use crate::{
    api::{Check, CheckedHost, MigrateRequest},
    job::Job,
    output::one_line,
    worker,
};

impl Agent {
    /// Checks a migration without beginning it.
    pub(super) async fn check(self: &Arc<Self>, request: MigrateRequest) -> Result<Check, AgentError> {
        let Prepared { job, peer, directory, running } = self.prepare(request).await?;
        drop(self.busy.claim(&job.spec.name, "it is being checked")?);
        let monitor = monitor(&directory, &running).await?;
        examine(&monitor, &running).await?;
        let source = self.checked_host(&monitor).await?;
        let machine_type = monitor.machine_type().await?;
        let outlook = self.look_ahead(&monitor, &job, &peer).await;
        drop(monitor);
        let request = offer(&job, source.qemu_version.clone(), None);
        let target: CheckedHost = self.post(&peer, REHEARSAL_PATH, &request).await?;
        compare(&job, source.processor.as_ref(), target.processor.as_ref())?;
        Ok(Check {
            machine: job.spec.name.clone(),
            machine_type,
            memory_bytes: job.spec.memory.bytes(),
            from: job.host.clone(),
            to: job.peer.clone(),
            source,
            target,
            downtime_target_ms: job.options.downtime_target_ms,
            forecast: self.foresee(&job, outlook).await,
        })
    }

    /// This host, as far as a machine's QEMU and a migration see it.
    pub(super) async fn checked_host(&self, monitor: &qmp::Client) -> Result<CheckedHost, AgentError> {
        Ok(CheckedHost {
            qemu_version: monitor.query_version().await?.to_string(),
            kvm: monitor.query_kvm().await?,
            available_memory_bytes: available_memory_bytes(),
            certificate_expires_unix_s: unix_s(self.credentials.expires()),
            processor: processor(monitor).await,
        })
    }
}

/// Whether QEMU lets the machine go, and, of an adopted one, whether it still is what was adopted.
pub(super) async fn examine(monitor: &qmp::Client, running: &Running) -> Result<(), AgentError> {
    worker::look(monitor).await.map_err(Refusal::from)?;
    MemoryLayout::of(monitor).await?.check().map_err(Refusal::from)?;
    match &running.adopted_qmp {
        Some(qmp) => adoption::check_unchanged(qmp, monitor).await,
        None => Ok(()),
    }
}

/// What a machine's QEMU gives its guest; `None` if QEMU doesn't say.
pub(super) async fn processor(monitor: &qmp::Client) -> Option<Processor> {
    let read = Processor::of(monitor).await;
    read.inspect_err(|error| tracing::warn!(error = one_line(error), "its processor can't be compared")).ok()
}

/// The same in a few questions; `None` where they don't tell enough, or QEMU doesn't say.
pub(super) async fn outline(monitor: &qmp::Client) -> Option<Outline> {
    let read = Outline::of(monitor).await;
    read.inspect_err(|error| tracing::debug!(error = one_line(error), "its processor has no outline")).ok()?
}

/// Whether the guest can go on with what the target gives it. What isn't known isn't compared: an agent of an earlier
/// version doesn't say, and mustn't keep machines from leaving.
pub(super) fn compare(job: &Job, here: Option<&Processor>, there: Option<&Processor>) -> Result<(), Refusal> {
    let (Some(here), Some(there)) = (here, there) else { return Ok(()) };
    let (machine, peer) = (job.spec.name.clone(), job.peer.clone());
    here.check_replacement(there).map_err(|mismatch| Refusal::Processor { machine, peer, mismatch })
}
