//! `godwit check`: whether a migration would be refused, and what it would take.
//!
//! ```text
//! what `migrate` refuses here ─► what its worker refuses ─► the target rehearses its own part ─► forecast
//!             └──────────────────────────┴── the same code, one line ──┴── meanwhile: sample, link
//! ```
//!
//! Nothing is left behind: the target starts a QEMU for the machine under another name and ends it again.

use std::sync::Arc;

use godwit_qemu::qmp;

use super::{
    Agent,
    api::unix_s,
    error::{AgentError, Refusal},
    incoming::available_memory_bytes,
    machines::monitor,
    outgoing::{Prepared, offer},
    peers::REHEARSAL_PATH,
};
use crate::{
    api::{Check, CheckedHost, MigrateRequest},
    worker,
};

impl Agent {
    /// Checks a migration without beginning it.
    pub(super) async fn check(self: &Arc<Self>, request: MigrateRequest) -> Result<Check, AgentError> {
        let Prepared { job, peer, directory, running } = self.prepare(request).await?;
        drop(self.busy.claim(&job.spec.name, "it is being checked")?);
        let monitor = monitor(&directory, &running).await?;
        worker::look(&monitor).await.map_err(Refusal::from)?;
        let source = self.checked_host(&monitor).await?;
        let machine_type = monitor.machine_type().await?;
        let outlook = self.look_ahead(&monitor, &job, &peer).await;
        drop(monitor);
        let target = self.post(&peer, REHEARSAL_PATH, &offer(&job, source.qemu_version.clone())).await?;
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
        })
    }
}
