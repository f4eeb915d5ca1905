//! The target's side of beginning a migration: another host's machine is data, judged by this host's configuration.
//!
//! ```text
//! may the peer send? ─► would the machine be allowed? ─► room, name, epoch ─► QEMU -incoming ─► worker ready
//!         └──────────────────────┴───── any refusal: one line to the peer, nothing left behind ────┘
//! ```

use std::{fs, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{DefaultBodyLimit, Path, State},
    middleware,
    routing::{delete, get, post},
};
use godwit_migration::handover::Epoch;
use godwit_qemu::{
    commandline::{self, localise},
    machine::Spec,
};
use godwit_transport::identity::HostName;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    Agent,
    admission::admit,
    api::Body,
    check::{outline, processor},
    detached::detached,
    error::{AgentError, Refusal},
    launch,
    machines::{Claim, monitor, running},
    migrations::{News, doing, is_id},
    outgoing::check_options,
    ownership::{self, Holder, Ownership},
    peers::{HANDOVER_PATH, INCOMING_PATH, ORDERS_PATH, REHEARSAL_PATH},
    probe::{self, PROBE_PATH},
    reach,
    state::{MachineDir, Running, Starting},
    workers,
};
use crate::{
    api::{CheckedHost, HandoverAnswer, HandoverRequest, IncomingReady, IncomingRequest, Orders, Withdrawn},
    job::{Command, Job, Partial, Role},
};

/// What QEMU and a worker need beside the guest's memory.
const OVERHEAD_BYTES: u64 = 128 << 20;
/// How long the worker may take to take connections.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the worker of a withdrawn migration may take to end.
const WITHDRAWN_TIMEOUT: Duration = Duration::from_secs(15);
/// A request is a machine's spec and a few numbers.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// The routes for other agents, and nothing else; the peer's name comes from its certificate.
pub(super) fn router(agent: Arc<Agent>, peer: HostName) -> Router {
    Router::new()
        .route(INCOMING_PATH, post(accept))
        .route(&format!("{INCOMING_PATH}/{{id}}"), delete(withdraw))
        .route(HANDOVER_PATH, post(hear))
        .route(ORDERS_PATH, get(orders))
        .route(REHEARSAL_PATH, post(rehearse))
        .route(PROBE_PATH, post(probe::receive))
        .layer(middleware::from_fn(detached))
        .layer(middleware::from_fn_with_state(agent.clone(), admit))
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .layer(Extension(peer))
        .with_state(agent)
}

async fn accept(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<HostName>,
    Body(request): Body<IncomingRequest>,
) -> Result<Json<IncomingReady>, AgentError> {
    let (id, machine) = (request.id.clone(), request.spec.name.clone());
    let answer = agent.accept(&peer, request).await;
    if let Err(error) = &answer {
        tracing::warn!(%peer, id, machine, error = crate::output::one_line(error), "refused");
    }
    answer.map(Json)
}

async fn rehearse(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<HostName>,
    Body(request): Body<IncomingRequest>,
) -> Result<Json<CheckedHost>, AgentError> {
    agent.rehearse(&peer, request).await.map(Json)
}

async fn hear(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<HostName>,
    Body(request): Body<HandoverRequest>,
) -> Result<Json<HandoverAnswer>, AgentError> {
    agent.hear(&peer, request).await.map(Json)
}

async fn orders(State(agent): State<Arc<Agent>>, Extension(peer): Extension<HostName>) -> Json<Orders> {
    Json(agent.orders_for(peer.as_str()))
}

async fn withdraw(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<HostName>,
    Path(id): Path<String>,
) -> Result<Json<Withdrawn>, AgentError> {
    let migration = agent.show_migration(&id)?;
    if migration.role != Role::Target || migration.peer != peer.as_str() {
        return Err(AgentError::NotFound { what: "migration", name: id });
    }
    if migration.report.is_none() {
        // Whether the worker hears it or not, it must not wait for what won't come.
        tokio::spawn(end_worker(agent.clone(), id.clone(), migration.machine));
        agent.command(&id, &Command::Cancel).await?;
    }
    Ok(Json(Withdrawn { id }))
}

/// Kills the worker of a withdrawn migration that hasn't ended by itself, unless the machine is this host's by now.
async fn end_worker(agent: Arc<Agent>, id: String, machine: String) {
    sleep(WITHDRAWN_TIMEOUT).await;
    let known = ownership::of(&agent.state.machine(&machine));
    let arrived =
        !matches!(known, Ok(Ownership { holder: Holder::Peer(_), .. } | Ownership { epoch: Epoch(0), .. }));
    let over = agent.show_migration(&id).is_ok_and(|migration| migration.report.is_some());
    if !over && !arrived {
        tracing::warn!(migration = id, "its worker doesn't end; killed");
        workers::kill(&agent.state.migration(&id));
    }
}

impl Agent {
    async fn accept(
        self: &Arc<Self>,
        peer: &HostName,
        request: IncomingRequest,
    ) -> Result<IncomingReady, AgentError> {
        let spec = self.judge(peer, &request)?;
        self.look_at_files(&spec).await?;
        let directory = self.state.machine(&spec.name);
        let mut job = self.job(peer, &request, spec, &directory);
        let claim = self.busy.claim(&job.spec.name, &doing(&job))?;
        self.room_for(&directory, &job, request.memory_bytes)?;
        launch::clear(&directory).await;
        let started = async {
            let running = self.receive_into(&directory, &job.spec).await?;
            let monitor = monitor(&directory, &running).await?;
            let qemu_version = monitor.query_version().await?.to_string();
            Ok::<_, AgentError>((running.process.pid, monitor, qemu_version))
        };
        let started = started.await;
        if started.is_err() {
            self.abandon(&job.spec.name).await;
        }
        let (pid, monitor, qemu_version) = started?;
        job.pid = pid;
        job.spec = directory.spec()?;
        job.shared = self.shared_place(peer.as_str(), Role::Target);
        // QEMU answers questions about its processor while the worker starts.
        let offered = request.processor;
        let compared = async {
            let same_processor = offered.is_some() && outline(&monitor).await == offered;
            (same_processor, if same_processor { None } else { processor(&monitor).await })
        };
        let (receiving, (same_processor, processor)) =
            tokio::join!(self.start_receiving(job, claim), compared);
        receiving?;
        Ok(IncomingReady { qemu_version, same_processor, processor })
    }

    /// Goes as far as [`Self::accept`] does before there is a worker, under another name, and takes everything back.
    async fn rehearse(&self, peer: &HostName, request: IncomingRequest) -> Result<CheckedHost, AgentError> {
        let mut spec = self.judge(peer, &request)?;
        self.look_at_files(&spec).await?;
        let directory = self.state.machine(&spec.name);
        let job = self.job(peer, &request, spec.clone(), &directory);
        drop(self.busy.claim(&spec.name, "it is being checked")?);
        self.room_for(&directory, &job, request.memory_bytes)?;
        spec.name = format!("check-{}", request.id);
        let _claim = self.busy.claim(&spec.name, "it is a rehearsal")?;
        let stage = self.state.machine(&spec.name);
        let rehearsed = async {
            let running = self.receive_into(&stage, &spec).await?;
            self.checked_host(&monitor(&stage, &running).await?).await
        };
        let checked = rehearsed.await;
        self.abandon(&spec.name).await;
        checked
    }

    /// Whether the peer may send this machine; the machine as this host would run it.
    fn judge(&self, peer: &HostName, request: &IncomingRequest) -> Result<Spec, AgentError> {
        let entry = self.config.peer(peer.as_str()).ok_or_else(|| Refusal::UnknownPeer(peer.to_string()))?;
        if !entry.may_send {
            return Err(Refusal::MayNotSend(peer.to_string()).into());
        }
        if !is_id(&request.id) || self.existing(&request.id).is_ok() {
            return Err(AgentError::Invalid("the migration's id isn't a new one".to_owned()));
        }
        check_options(&request.options)?;
        Ok(localise(&request.spec, &self.config.accept).map_err(Refusal::from)?)
    }

    /// Whether the machine's files lead where their names say.
    async fn look_at_files(&self, spec: &Spec) -> Result<(), AgentError> {
        let (files, policy) = (commandline::files(spec), self.config.accept.clone());
        let looked = tokio::task::spawn_blocking(move || reach::check(&files, &policy)).await;
        Ok(looked
            .map_err(|_| AgentError::Start("looking at its files was stopped".to_owned()))?
            .map_err(Refusal::from)?)
    }

    fn room_for(&self, directory: &MachineDir, job: &Job, memory_bytes: u64) -> Result<(), AgentError> {
        let name = job.spec.name.clone();
        if running(directory)?.is_some() {
            return Err(Refusal::Runs(name).into());
        }
        let known = ownership::of(directory)?;
        if directory.exists() && known.holder == Holder::Here {
            return Err(Refusal::NameTaken(name).into());
        }
        if Epoch(job.epoch) <= known.epoch {
            return Err(Refusal::OldEpoch { offered: job.epoch, known: known.epoch.0 }.into());
        }
        let reserve_bytes = self.config.memory_reserve.bytes();
        let needed_bytes = memory_bytes.max(job.spec.memory.bytes()).saturating_add(OVERHEAD_BYTES);
        let available_bytes = available_memory_bytes();
        if needed_bytes.saturating_add(reserve_bytes) > available_bytes {
            return Err(Refusal::Memory { needed_bytes, available_bytes, reserve_bytes }.into());
        }
        Ok(())
    }

    async fn receive_into(&self, directory: &MachineDir, spec: &Spec) -> Result<Running, AgentError> {
        directory.set_starting(&Starting { taps: Vec::new(), incoming: true })?;
        directory.create(spec)?;
        launch::start(self, spec.clone(), directory, true).await
    }

    /// Starts the worker and waits until it takes connections.
    async fn start_receiving(self: &Arc<Self>, job: Job, claim: Claim) -> Result<(), AgentError> {
        let (id, machine) = (job.id.clone(), job.spec.name.clone());
        let news = match self.begin(job, claim) {
            Ok(news) => news,
            Err(error) => {
                self.abandon(&machine).await;
                return Err(error);
            }
        };
        match timeout(READY_TIMEOUT, ready(news)).await {
            Ok(result) => result,
            Err(_) => {
                // Without its worker the migration ends, and ending it clears everything away.
                workers::kill(&self.state.migration(&id));
                Err(AgentError::Worker(format!("isn't ready after {} s", READY_TIMEOUT.as_secs())))
            }
        }
    }

    fn job(&self, peer: &HostName, request: &IncomingRequest, spec: Spec, directory: &MachineDir) -> Job {
        let machine = spec.name.clone();
        Job {
            id: request.id.clone(),
            role: Role::Target,
            spec,
            machine_dir: directory.path().to_owned(),
            qmp: directory.files().migration_qmp(),
            pid: 0,
            host: self.config.name.to_string(),
            peer: peer.to_string(),
            peer_address: None,
            identity_dir: self.config.identity_dir.clone(),
            learned: None,
            partial: Some(Partial {
                file: self.state.partial(&machine),
                limit_bytes: self.config.partial_limit.bytes(),
            }),
            shared: None,
            epoch: request.epoch,
            forecast: None,
            options: request.options.clone(),
        }
    }
}

async fn ready(mut news: watch::Receiver<News>) -> Result<(), AgentError> {
    let begun = news.wait_for(|news| news.ready || news.report.is_some()).await;
    match begun.as_deref() {
        Ok(News { report: Some(report), .. }) => {
            let detail = report.detail.clone().unwrap_or_else(|| "ended at once".to_owned());
            Err(AgentError::Worker(format!("can't begin: {detail}")))
        }
        Ok(_) => Ok(()),
        Err(_) => Err(AgentError::Worker("was lost".to_owned())),
    }
}

/// Memory that can be given to programs without swapping, as the kernel estimates it; 0 if it doesn't say.
pub(super) fn available_memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0).saturating_mul(1024)
}
