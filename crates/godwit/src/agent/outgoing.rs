//! The source's side of beginning a migration: everything that can be refused is refused before the guest is touched.
//!
//! ```text
//! machine here and ours ─► peer known ─► QEMU looked at ─► attempt numbered ─► peer's agent says ready ─► processors
//!         │                   │                │                                │  meanwhile: a forecast       │
//!         └───────────────────┴────────────────┴─── any refusal: one line, nothing left behind ───────────────┤
//!                                                                                job written, worker started ◄─┘
//! ```

use std::{fs::File, io::Read, sync::Arc};

use godwit_migration::handover::{Epoch, Record, RecordState};
use godwit_qemu::{processor::Outline, qmp::Client};

use super::{
    Agent,
    check::{compare, examine, outline, processor},
    error::{AgentError, Refusal},
    machines::{monitor, running},
    migrations::doing,
    ownership,
    peers::PeerAgent,
    state::{MachineDir, Running, read_json},
};
use crate::{
    api::{IncomingRequest, MigrateRequest, Migration},
    job::{Command, JOB_FILE, Job, OnStall, Options, RECONNECT_TIMEOUT_MS, Role, StopPolicyName},
    output::one_line,
    throttle,
    token::{Durability, Store},
};

/// The range of bulk connections.
const CONNECTIONS_MAX: u8 = 8;

/// A machine that could be sent, as far as this host can tell by itself.
pub(super) struct Prepared {
    pub(super) job: Job,
    pub(super) peer: PeerAgent,
    pub(super) directory: MachineDir,
    pub(super) running: Running,
}

impl Agent {
    /// Begins to move a machine; returns as soon as its worker is at it.
    pub(super) async fn start_migration(
        self: &Arc<Self>,
        request: MigrateRequest,
    ) -> Result<Migration, AgentError> {
        let Prepared { mut job, peer, directory, running } = self.prepare(request).await?;
        let claim = self.busy.claim(&job.spec.name, &doing(&job))?;
        let monitor = monitor(&directory, &running).await?;
        examine(&monitor, &running).await?;
        // The target keeps the number of every attempt that it heard of, so none is used twice.
        let state = RecordState::Owner { peer: Some(job.peer.clone()) };
        let record = Record { epoch: Epoch(job.epoch), state };
        Store::open(directory.path()).save(&record, Durability::Synced)?;
        let outlook = self.look_ahead(&monitor, &job, &peer).await;
        self.find_room(&monitor, &job, &peer).await?;
        drop(monitor);
        job.forecast = self.foresee(&job, outlook).await;
        job.shared = self.shared_place(&job.peer, Role::Source);
        let id = job.id.clone();
        if let Err(error) = self.begin(job, claim) {
            self.withdraw(&peer, &id).await;
            return Err(error);
        }
        self.show_migration(&id)
    }

    /// Offers the machine; when this returns, its QEMU waits at the peer, with a processor that will do.
    async fn find_room(&self, monitor: &Client, job: &Job, peer: &PeerAgent) -> Result<(), AgentError> {
        let request = offer(job, monitor.query_version().await?.to_string(), outline(monitor).await);
        let in_detail = async |is_needed| if is_needed { processor(monitor).await } else { None };
        let (here, ready) = tokio::join!(in_detail(request.processor.is_none()), self.offer(peer, &request));
        let ready = ready?;
        if ready.same_processor {
            return Ok(());
        }
        let here = if here.is_some() { here } else { processor(monitor).await };
        if let Err(refusal) = compare(job, here.as_ref(), ready.processor.as_ref()) {
            self.withdraw(peer, &job.id).await;
            return Err(refusal.into());
        }
        Ok(())
    }

    /// What can be refused without asking anybody; changes nothing.
    pub(super) async fn prepare(&self, request: MigrateRequest) -> Result<Prepared, AgentError> {
        check_options(&request.options)?;
        let directory = self.known(&request.machine)?;
        let name = request.machine;
        if request.to == self.config.name.as_str() {
            return Err(Refusal::SameHost(name).into());
        }
        let peer = self.find_receiver(&request.to).await?;
        let epoch = ownership::check(&name, &directory)?.next();
        let running = running(&directory)?.ok_or_else(|| Refusal::Off(name.clone()))?;
        if request.options.on_stall == OnStall::Throttle {
            check_throttle(&name, running.process.pid)?;
        }
        let own_monitor = directory.files().migration_qmp();
        let job = Job {
            id: new_id()?,
            role: Role::Source,
            spec: directory.spec()?,
            machine_dir: directory.path().to_owned(),
            qmp: running.adopted_qmp.clone().unwrap_or(own_monitor),
            pid: running.process.pid,
            host: self.config.name.to_string(),
            peer: request.to.clone(),
            peer_address: Some(peer.address),
            identity_dir: self.config.identity_dir.clone(),
            partial: None,
            learned: Some(self.state.learned(&request.to)),
            shared: None,
            epoch: epoch.0,
            forecast: None,
            options: request.options,
        };
        Ok(Prepared { job, peer, directory, running })
    }

    /// Tells a migration under way what to do when its downtime target can't be met; what can't be done is refused here.
    pub(super) async fn set_on_stall(&self, id: &str, on_stall: OnStall) -> Result<Migration, AgentError> {
        let job: Job = read_json(&self.state.migration(self.existing(id)?).join(JOB_FILE))?;
        if job.role == Role::Target {
            return Err(Refusal::AtSource(job.peer).into());
        }
        check_options(&Options { on_stall, ..job.options })?;
        if on_stall == OnStall::Throttle {
            check_throttle(&job.spec.name, job.pid)?;
        }
        self.command(id, &Command::SetOnStall { on_stall }).await
    }
}

/// Whether a machine could be slowed, which is known before it is needed.
pub(super) fn check_throttle(machine: &str, pid: i32) -> Result<(), Refusal> {
    throttle::probe(pid)
        .map_err(|error| Refusal::Throttle { machine: machine.to_owned(), reason: one_line(&error) })
}

/// What the target is asked.
pub(super) fn offer(job: &Job, qemu_version: String, processor: Option<Outline>) -> IncomingRequest {
    IncomingRequest {
        id: job.id.clone(),
        spec: job.spec.clone(),
        epoch: job.epoch,
        options: job.options.clone(),
        qemu_version,
        memory_bytes: job.spec.memory.bytes(),
        processor,
    }
}

/// What the command line can't say wrongly the API could.
pub(super) fn check_options(options: &Options) -> Result<(), AgentError> {
    let wrong = if !(1..=CONNECTIONS_MAX).contains(&options.connections) {
        "connections: 1 to 8"
    } else if options.bandwidth_bytes_per_second == Some(0) {
        "bandwidth_bytes_per_second: more than 0, or null for no limit"
    } else if options.downtime_target_ms == 0 {
        "downtime_target_ms: more than 0"
    } else if options.on_stall != OnStall::Switch && options.stop_policy != StopPolicyName::Gate {
        "on_stall: `switch` unless the stop policy is `gate`"
    } else if !RECONNECT_TIMEOUT_MS.contains(&options.reconnect_timeout_ms) {
        "reconnect_timeout_ms: 1,000 to 3,600,000"
    } else {
        return Ok(());
    };
    Err(AgentError::Invalid(wrong.to_owned()))
}

/// 64 random bits; the id also routes TLS connections, so it must not be guessed before it is used.
fn new_id() -> Result<String, AgentError> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|error| AgentError::Worker(format!("gets no id from /dev/urandom: {error}")))?;
    Ok(format!("{:016x}", u64::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::migrations::is_id;

    #[test]
    fn ids_are_ids_and_differ() {
        let (one, other) = (new_id().unwrap(), new_id().unwrap());
        assert!(is_id(&one) && is_id(&other));
        assert_ne!(one, other);
    }

    #[test]
    fn options_from_the_api_are_checked() {
        check_options(&Options::default()).unwrap();
        for wrong in [
            Options { connections: 0, ..Options::default() },
            Options { connections: 9, ..Options::default() },
            Options { bandwidth_bytes_per_second: Some(0), ..Options::default() },
            Options { downtime_target_ms: 0, ..Options::default() },
            Options { stop_policy: StopPolicyName::SmartStop, on_stall: OnStall::Wait, ..Options::default() },
            Options { reconnect_timeout_ms: 999, ..Options::default() },
            Options { reconnect_timeout_ms: 3_600_001, ..Options::default() },
        ] {
            check_options(&wrong).unwrap_err();
        }
    }
}
