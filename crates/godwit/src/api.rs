//! The objects of the agent's HTTP API, as the command line and other agents see them.

use std::path::PathBuf;

use godwit_migration::{forecast::Score, handover};
use godwit_qemu::{
    machine::Spec,
    processor::{Outline, Processor},
};
use godwit_transport::session::Versions;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::job::{Forecast, OnStall, Options, Phase, Progress, Report, Role};

/// The versions that agents speak among themselves; a release speaks its own and the one before.
pub(crate) const AGENT_VERSIONS: Versions = Versions { lowest: 1, highest: 1 };
/// The header in which an agent says, `lowest-highest`, what it speaks: read before anything else of a request, so that
/// a request which only a newer agent understands is refused for the right reason.
pub(crate) const VERSIONS_HEADER: &str = "godwit-versions";

/// An error in the API: one line, and a kind that decides the exit code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Problem {
    /// The kind.
    pub code: ProblemCode,
    /// One line for people.
    pub message: String,
}

/// The kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ProblemCode {
    /// The request makes no sense.
    Invalid,
    /// Not possible or not permitted now; no guest was touched.
    Refused,
    /// There is no such machine, migration or peer.
    NotFound,
    /// It was tried and failed.
    Failed,
    /// No agent answers; said by the command line only.
    Unreachable,
}

/// How the agent is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Health {
    /// The host's name.
    pub name: String,
    /// godwit's version.
    pub version: String,
    /// The accelerator that `accelerator = "auto"` means here; `None`: not probed yet.
    pub accelerator: Option<String>,
    /// Machines known.
    pub machines: usize,
    /// Migrations under way.
    pub migrations: usize,
    /// When this host's certificate expires, seconds since the Unix epoch.
    pub certificate_expires_unix_s: u64,
}

/// A machine as this host sees it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Machine {
    /// Its name.
    pub name: String,
    /// QEMU's word for its run state (`running`, `paused`, `postmigrate` …), or `off`.
    pub state: String,
    /// The host that holds the right to run it, as far as is known here.
    pub at: String,
    /// QEMU's process.
    pub pid: Option<i32>,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Started by somebody else and adopted.
    pub adopted: bool,
    /// The migration under way.
    pub migration: Option<String>,
    /// The socket of its serial console.
    #[schema(value_type = Option<String>)]
    pub console: Option<PathBuf>,
    /// Its specification; only for a single machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub spec: Option<Spec>,
}

/// A disk that this host serves, or has served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct DiskView {
    /// Its name: the machine's, a dot, and its number there.
    pub name: String,
    /// Why nothing more is known of it.
    pub problem: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// The id of the image that it began as.
    pub image: Option<String>,
    /// The file that lies beneath it, if it adopted one.
    #[schema(value_type = Option<String>)]
    pub beneath: Option<PathBuf>,
    /// The process that serves it.
    pub server_pid: Option<i32>,
    /// Where it is on this host.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// Where its image is.
    pub repository: String,
    /// How much of it is where.
    pub total: Places,
    /// The same of parts of equal size, in order; only for a single disk.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub parts: Vec<Places>,
}

impl DiskView {
    /// A disk of which only this is known.
    pub(crate) fn unreadable(name: String, problem: String) -> Self {
        Self { name, problem: Some(problem), ..Self::default() }
    }
}

/// How much of a disk is where, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Places {
    /// In its image, and not fetched yet; zero of a disk without one.
    pub base_bytes: u64,
    /// Here, as the image has it.
    pub fetched_bytes: u64,
    /// Here, and only here.
    pub written_bytes: u64,
    /// Zero, whatever the image has.
    pub zero_bytes: u64,
}

/// A machine that isn't known any more.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Removed {
    /// Its name.
    pub name: String,
}

/// Start a machine.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunRequest {
    /// The machine, the same fields as in its TOML file.
    #[schema(value_type = Object)]
    pub spec: Spec,
}

/// Take on a machine that somebody else started.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdoptRequest {
    /// Its QMP socket.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
    /// What to call it; by default its `-name`.
    pub name: Option<String>,
}

/// Ask a guest to power off.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StopRequest {
    /// How long to wait for it.
    pub timeout_ms: u64,
}

/// Move a machine.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrateRequest {
    /// The machine.
    pub machine: String,
    /// The host that is to get it, by its name under `[peers]`.
    pub to: String,
    /// How.
    #[serde(default)]
    pub options: Options,
}

/// A migration as this host sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Migration {
    /// Its id, the same at both hosts.
    pub id: String,
    /// The machine.
    pub machine: String,
    /// Which side this host is.
    pub role: Role,
    /// The other host.
    pub peer: String,
    /// Where it is.
    pub phase: Phase,
    /// How far it is.
    pub progress: Progress,
    /// What it was thought to take before its first byte was sent; at the source only.
    pub forecast: Option<Forecast>,
    /// The final report, once there is one.
    pub report: Option<Report>,
}

/// A new bandwidth limit.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct BandwidthRequest {
    /// Bytes per second; `null` lifts the limit.
    pub bytes_per_second: Option<u64>,
}

/// What to do from now on when the downtime target can't be met.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OnStallRequest {
    /// The new choice.
    pub on_stall: OnStall,
}

/// One agent asks another to take a machine.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct IncomingRequest {
    /// The migration's id, 16 hexadecimal digits.
    pub id: String,
    /// The machine as the source runs it; data, to be judged by this host's own configuration.
    #[schema(value_type = Object)]
    pub spec: Spec,
    /// The epoch that is to be handed over.
    pub epoch: u64,
    /// What the operator chose.
    pub options: Options,
    /// The version of the source's QEMU, as `query-version` says it.
    pub qemu_version: String,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// The guest's processor, where so little tells whether the target gives it the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub processor: Option<Outline>,
}

/// The other agent is ready.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct IncomingReady {
    /// The version of the target's QEMU.
    pub qemu_version: String,
    /// Its QEMU gives the machine the very processor that was offered.
    #[serde(default)]
    pub same_processor: bool,
    /// Else what it gives; an older agent doesn't say, and then nothing is compared.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub processor: Option<Processor>,
}

/// An offered machine won't come.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Withdrawn {
    /// The migration.
    pub id: String,
}

/// Finish or roll back what migrations left behind.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecoverRequest {
    /// One machine; by default all.
    pub machine: Option<String>,
    /// Take the machine here although this host has, or may have, it.
    #[serde(default)]
    pub assume_lost: Option<AssumeLost>,
}

/// A host that doesn't come back.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AssumeLost {
    /// Its name.
    pub host: String,
    /// The operator says that it surely runs nothing; needed where no `fence_command` makes sure.
    #[serde(default)]
    pub confirmed: bool,
}

/// What was found and done.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Recovery {
    /// One entry a machine.
    pub machines: Vec<Finding>,
}

/// What was found of one machine, and done about it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Finding {
    /// The machine.
    pub name: String,
    /// How its hand-over stood.
    pub found: String,
    /// What was done about it.
    pub did: String,
    /// Whether anything is still open.
    pub state: FindingState,
    /// The host that has the machine, if it is known.
    pub at: Option<String>,
}

/// Whether anything is still open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FindingState {
    /// Nothing.
    Settled,
    /// The other host has to answer, or a worker is at it; it is tried again by itself.
    Waiting,
    /// QEMU or the disk doesn't do what it should; it is tried again by itself.
    Failed,
}

/// A migration that wouldn't be refused.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Check {
    /// The machine.
    pub machine: String,
    /// Its type, versioned.
    pub machine_type: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// The host that has it.
    pub from: String,
    /// The host that would get it.
    pub to: String,
    /// The host that has it.
    pub source: CheckedHost,
    /// The host that would get it.
    pub target: CheckedHost,
    /// The pause to aim at.
    pub downtime_target_ms: u64,
    /// What it would take; `None` if the guest's memory can't be read, or the link not be measured.
    pub forecast: Option<Forecast>,
}

/// One end of a migration that was checked.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct CheckedHost {
    /// The version of its QEMU.
    pub qemu_version: String,
    /// Whether the processor executes the guest (KVM), or QEMU does.
    pub kvm: bool,
    /// Memory that could be given to programs.
    pub available_memory_bytes: u64,
    /// When its certificate expires, seconds since the Unix epoch.
    pub certificate_expires_unix_s: u64,
    /// What the guest has of its processor there; an older agent doesn't say, and then nothing is compared.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub processor: Option<Processor>,
}

/// What migrations were thought to take, and what they took.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct History {
    /// The newest first.
    pub entries: Vec<HistoryEntry>,
    /// How good the forecasts were.
    pub score: HistoryScore,
}

/// A machine that went to another host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct HistoryEntry {
    /// The migration.
    pub id: String,
    /// The machine.
    pub machine: String,
    /// Where it went.
    pub peer: String,
    /// When, seconds since the Unix epoch.
    pub ended_unix_s: u64,
    /// What was foreseen.
    pub forecast: Option<Forecast>,
    /// What it took.
    pub total_ms: u64,
    /// Payload on the wire.
    pub wire_bytes: u64,
    /// STOP to RESUME.
    pub downtime_ms: Option<f64>,
    /// What the link carried.
    pub rate_bytes_per_second: Option<u64>,
    /// The link's round trip.
    pub round_trip_ms: Option<f64>,
}

/// How good forecasts were: median error, share within the interval, median width of the intervals.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct HistoryScore {
    /// In total time.
    #[schema(value_type = Object)]
    pub total: Score,
    /// In bytes on the wire.
    #[schema(value_type = Object)]
    pub bytes: Score,
    /// In downtime.
    #[schema(value_type = Object)]
    pub downtime: Score,
}

/// One agent says something about an open hand-over to another, because a worker can't.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HandoverRequest {
    /// The machine.
    pub machine: String,
    /// What is said.
    pub message: handover::Message,
}

/// The answer to a [`HandoverRequest`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HandoverAnswer {
    /// `None`: nothing to say, or not yet.
    pub message: Option<handover::Message>,
}

/// What a host that was declared lost has to stand down from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// One entry a machine.
    pub orders: Vec<StandDownOrder>,
}

/// See [`handover::Message::StandDown`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StandDownOrder {
    /// The machine.
    pub machine: String,
    /// The epoch under which it was taken over.
    pub epoch: u64,
}
