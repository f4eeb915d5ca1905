//! The agent's HTTP API on its unix socket; who may open the socket may do everything.
//!
//! ```sh
//! curl --unix-socket /run/godwit/agent.sock http://godwit/v1/machines
//! ```

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    body::{Body as HttpBody, Bytes},
    extract::{FromRequest, Path, Request, State},
    http::header,
    middleware,
    response::{IntoResponse, Response},
};
use serde::de::DeserializeOwned;
use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt},
    net::UnixStream,
    time::timeout,
};
use utoipa::{OpenApi, openapi::OpenApi as Description};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Agent, detached::detached, error::AgentError};
use crate::{
    api::{
        AdoptRequest, AssumeLost, BandwidthRequest, Check, DiskView, Health, History, Machine,
        MigrateRequest, Migration, OnStallRequest, Problem, ProblemCode, RecoverRequest, Recovery, Removed,
        RunRequest, StopRequest,
    },
    job::{self, Command, Event},
};

/// How long a request's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Events are read from a worker in pieces of this size.
const PIECE_BYTES: usize = 16 * 1024;

type Shared = State<Arc<Agent>>;
type Answer<T> = Result<Json<T>, AgentError>;

#[derive(OpenApi)]
#[openapi(
    info(title = "godwit agent", description = "Machines and migrations of one host."),
    components(schemas(Event, Problem))
)]
struct Document;

/// The routes and their description.
fn described() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(health))
        .routes(routes!(metrics))
        .routes(routes!(description))
        .routes(routes!(list_machines, run_machine))
        .routes(routes!(adopt_machine))
        .routes(routes!(show_machine, remove_machine))
        .routes(routes!(stop_machine))
        .routes(routes!(resume_machine))
        .routes(routes!(kill_machine))
        .routes(routes!(list_disks))
        .routes(routes!(show_disk, remove_disk))
        .routes(routes!(list_migrations, start_migration))
        .routes(routes!(show_migration))
        .routes(routes!(events))
        .routes(routes!(cancel))
        .routes(routes!(recover))
        .routes(routes!(history))
        .routes(routes!(check))
        .routes(routes!(set_bandwidth))
        .routes(routes!(set_on_stall))
}

/// The API's description.
#[must_use]
pub(crate) fn openapi() -> Description {
    described().into_openapi()
}

/// The API.
pub(super) fn router(agent: Arc<Agent>) -> Router {
    let (router, _) = described().split_for_parts();
    router
        .fallback(nothing_there)
        .method_not_allowed_fallback(nothing_there)
        .layer(middleware::from_fn(detached))
        .with_state(agent)
}

async fn nothing_there(request: Request) -> Problem {
    let message = format!("there is no {} {}; see /v1/openapi.json", request.method(), request.uri().path());
    Problem { code: ProblemCode::NotFound, message }
}

/// A JSON body; what is wrong with it is answered as a [`Problem`].
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let wrong = |message: String| Problem { code: ProblemCode::Invalid, message };
        // Whatever its content type: `curl -d` doesn't say JSON.
        let read = timeout(BODY_TIMEOUT, Bytes::from_request(request, state)).await;
        let read = read
            .map_err(|_| wrong(format!("the request isn't complete after {} s", BODY_TIMEOUT.as_secs())))?;
        let bytes = read.map_err(|error| wrong(error.body_text()))?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| wrong(format!("the request: {error}")))
    }
}

/// How the agent is
#[utoipa::path(get, path = "/v1/health", responses((status = OK, body = Health)))]
async fn health(State(agent): Shared) -> Answer<Health> {
    Ok(Json(Health {
        name: agent.config.name.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        accelerator: agent.accelerator.get().map(|accel| format!("{accel:?}").to_lowercase()),
        machines: agent.state.machines()?.len(),
        migrations: agent.migrations.count(),
        certificate_expires_unix_s: unix_s(agent.credentials.expires()),
    }))
}

/// What is counted and measured, for Prometheus
#[utoipa::path(get, path = "/v1/metrics", responses(
    (status = OK, body = String, content_type = "application/openmetrics-text")))]
async fn metrics(State(agent): Shared) -> Response {
    agent.metrics_page().await
}

pub(super) fn unix_s(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// This description
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = OK, body = Object)))]
async fn description() -> Json<Description> {
    Json(openapi())
}

/// All machines that this host knows
#[utoipa::path(get, path = "/v1/machines", responses((status = OK, body = [Machine])))]
async fn list_machines(State(agent): Shared) -> Answer<Vec<Machine>> {
    agent.list_machines().await.map(Json)
}

/// Start a machine
#[utoipa::path(post, path = "/v1/machines", request_body = RunRequest, responses(
    (status = OK, body = Machine), (status = BAD_REQUEST, body = Problem), (status = CONFLICT, body = Problem),
    (status = INTERNAL_SERVER_ERROR, body = Problem)))]
async fn run_machine(State(agent): Shared, Body(request): Body<RunRequest>) -> Answer<Machine> {
    agent.run_machine(request.spec).await.map(Json)
}

/// Take on a machine that somebody else started
#[utoipa::path(post, path = "/v1/adoptions", request_body = AdoptRequest, responses(
    (status = OK, body = Machine), (status = BAD_REQUEST, body = Problem), (status = CONFLICT, body = Problem)))]
async fn adopt_machine(State(agent): Shared, Body(request): Body<AdoptRequest>) -> Answer<Machine> {
    agent.adopt_machine(request).await.map(Json)
}

/// One machine with its specification
#[utoipa::path(get, path = "/v1/machines/{name}", responses(
    (status = OK, body = Machine), (status = NOT_FOUND, body = Problem)))]
async fn show_machine(State(agent): Shared, Path(name): Path<String>) -> Answer<Machine> {
    agent.show_machine(&name).await.map(Json)
}

/// Forget a machine that is off or adopted, and who may run it
#[utoipa::path(delete, path = "/v1/machines/{name}", responses(
    (status = OK, body = Removed), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn remove_machine(State(agent): Shared, Path(name): Path<String>) -> Answer<Removed> {
    agent.remove_machine(&name).await.map(Json)
}

/// The disks that are served here, or were
#[utoipa::path(get, path = "/v1/disks", responses((status = OK, body = Vec<DiskView>)))]
async fn list_disks(State(agent): Shared) -> Answer<Vec<DiskView>> {
    agent.list_disks().await.map(Json)
}

/// One disk, with what its parts have
#[utoipa::path(get, path = "/v1/disks/{name}", responses(
    (status = OK, body = DiskView), (status = NOT_FOUND, body = Problem)))]
async fn show_disk(State(agent): Shared, Path(name): Path<String>) -> Answer<DiskView> {
    agent.show_disk(&name).await.map(Json)
}

/// Remove a disk that no machine uses, with all that it has
#[utoipa::path(delete, path = "/v1/disks/{name}", responses(
    (status = OK, body = Removed), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn remove_disk(State(agent): Shared, Path(name): Path<String>) -> Answer<Removed> {
    agent.remove_disk(&name).await.map(Json)
}

/// Ask the guest to power off, and wait until it has
#[utoipa::path(post, path = "/v1/machines/{name}/stop", request_body = StopRequest, responses(
    (status = OK, body = Machine), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem),
    (status = INTERNAL_SERVER_ERROR, body = Problem)))]
async fn stop_machine(
    State(agent): Shared,
    Path(name): Path<String>,
    Body(request): Body<StopRequest>,
) -> Answer<Machine> {
    agent.stop_machine(&name, Duration::from_millis(request.timeout_ms)).await.map(Json)
}

/// Let a guest go on that stopped because a disk couldn't be read or written
#[utoipa::path(post, path = "/v1/machines/{name}/resume", responses(
    (status = OK, body = Machine), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn resume_machine(State(agent): Shared, Path(name): Path<String>) -> Answer<Machine> {
    agent.resume_machine(&name).await.map(Json)
}

/// End a machine at once
#[utoipa::path(post, path = "/v1/machines/{name}/kill", responses(
    (status = OK, body = Machine), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn kill_machine(State(agent): Shared, Path(name): Path<String>) -> Answer<Machine> {
    agent.kill_machine(&name).await.map(Json)
}

/// All migrations that are remembered, the newest first
#[utoipa::path(get, path = "/v1/migrations", responses((status = OK, body = [Migration])))]
async fn list_migrations(State(agent): Shared) -> Answer<Vec<Migration>> {
    agent.list_migrations().map(Json)
}

/// Begin to move a machine
#[utoipa::path(post, path = "/v1/migrations", request_body = MigrateRequest, responses(
    (status = OK, body = Migration), (status = BAD_REQUEST, body = Problem), (status = NOT_FOUND, body = Problem),
    (status = CONFLICT, body = Problem)))]
async fn start_migration(State(agent): Shared, Body(request): Body<MigrateRequest>) -> Answer<Migration> {
    agent.start_migration(request).await.map(Json)
}

/// One migration
#[utoipa::path(get, path = "/v1/migrations/{id}", responses(
    (status = OK, body = Migration), (status = NOT_FOUND, body = Problem)))]
async fn show_migration(State(agent): Shared, Path(id): Path<String>) -> Answer<Migration> {
    agent.show_migration(&id).map(Json)
}

/// The events of a migration, one JSON object a line, from the first to the last as it happens
#[utoipa::path(get, path = "/v1/migrations/{id}/events", responses(
    (status = OK, body = Event, content_type = "application/x-ndjson"), (status = NOT_FOUND, body = Problem)))]
async fn events(State(agent): Shared, Path(id): Path<String>) -> Result<Response, AgentError> {
    let directory = agent.state.migration(agent.existing(&id)?);
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    // The worker tells everything from the first event on; its file holds the same once it has ended.
    if let Ok(worker) = UnixStream::connect(directory.join(job::WORKER_SOCKET)).await {
        return Ok((kind, stream(worker)).into_response());
    }
    match File::open(directory.join(job::EVENTS_FILE)).await {
        Ok(file) => Ok((kind, stream(file)).into_response()),
        Err(_) => Ok((kind, HttpBody::empty()).into_response()),
    }
}

/// Give a migration up; the guest goes on at the source
#[utoipa::path(post, path = "/v1/migrations/{id}/cancel", responses(
    (status = OK, body = Migration), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn cancel(State(agent): Shared, Path(id): Path<String>) -> Answer<Migration> {
    agent.command(&id, &Command::Cancel).await.map(Json)
}

/// Whether a migration would be refused, and what it would take; nothing is moved
#[utoipa::path(post, path = "/v1/checks", request_body = MigrateRequest, responses(
    (status = OK, body = Check), (status = BAD_REQUEST, body = Problem), (status = NOT_FOUND, body = Problem),
    (status = CONFLICT, body = Problem)))]
async fn check(State(agent): Shared, Body(request): Body<MigrateRequest>) -> Answer<Check> {
    agent.check(request).await.map(Json)
}

/// What migrations were thought to take, and what they took, the newest first
#[utoipa::path(get, path = "/v1/history", responses((status = OK, body = History)))]
async fn history(State(agent): Shared) -> Json<History> {
    Json(agent.show_history())
}

/// Finish or roll back what migrations left behind
#[utoipa::path(post, path = "/v1/recovery", request_body = RecoverRequest, responses(
    (status = OK, body = Recovery), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn recover(State(agent): Shared, Body(request): Body<RecoverRequest>) -> Answer<Recovery> {
    match (&request.machine, &request.assume_lost) {
        (machine, None) => agent.recover(machine.as_deref()).await.map(Json),
        (Some(machine), Some(AssumeLost { host, confirmed })) => {
            let finding = agent.assume_lost(machine, host, *confirmed).await?;
            Ok(Json(Recovery { machines: vec![finding] }))
        }
        (None, Some(_)) => Err(AgentError::Invalid("assume_lost: name the machine".to_owned())),
    }
}

/// Change the bandwidth limit of a migration
#[utoipa::path(put, path = "/v1/migrations/{id}/bandwidth", request_body = BandwidthRequest, responses(
    (status = OK, body = Migration), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn set_bandwidth(
    State(agent): Shared,
    Path(id): Path<String>,
    Body(request): Body<BandwidthRequest>,
) -> Answer<Migration> {
    let bytes_per_second = request.bytes_per_second;
    if bytes_per_second == Some(0) {
        return Err(AgentError::Invalid("bytes_per_second: more than 0, or null for no limit".to_owned()));
    }
    agent.command(&id, &Command::SetBandwidth { bytes_per_second }).await.map(Json)
}

/// Change what a migration does when the downtime target can't be met
#[utoipa::path(put, path = "/v1/migrations/{id}/on-stall", request_body = OnStallRequest, responses(
    (status = OK, body = Migration), (status = NOT_FOUND, body = Problem), (status = CONFLICT, body = Problem)))]
async fn set_on_stall(
    State(agent): Shared,
    Path(id): Path<String>,
    Body(request): Body<OnStallRequest>,
) -> Answer<Migration> {
    agent.set_on_stall(&id, request.on_stall).await.map(Json)
}

/// A body that passes on what a reader gives, until it ends.
fn stream(reader: impl AsyncRead + Send + Unpin + 'static) -> HttpBody {
    HttpBody::from_stream(futures_util::stream::unfold(reader, |mut reader| async move {
        let mut piece = vec![0; PIECE_BYTES];
        let read = reader.read(&mut piece).await;
        match read {
            Ok(0) => None,
            Ok(length) => {
                piece.truncate(length);
                Some((Ok(Bytes::from(piece)), reader))
            }
            Err(error) => Some((Err(error), reader)),
        }
    }))
}
