//! What an agent and the worker of one migration say to each other.
//!
//! The agent writes a [`Job`] to `<migration directory>/job.json` and starts `godwit worker <migration directory>`.
//! The worker then owns the migration: it binds `worker.sock` in that directory, appends every [`Event`] to
//! `events.ndjson`, and writes the final [`Report`] to `report.json` before it ends. Whoever connects to `worker.sock`
//! gets one JSON event a line, from the first on, and may write one JSON [`Command`] a line. A restarted agent reads
//! the files and connects again; nothing else ties the two processes together.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use godwit_migration::{
    forecast::{self, Course},
    handover,
};
use godwit_qemu::machine::Spec;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The file in which the agent leaves the job.
pub(crate) const JOB_FILE: &str = "job.json";
/// The socket of a running worker: NDJSON events out, NDJSON commands in.
pub(crate) const WORKER_SOCKET: &str = "worker.sock";
/// The socket (SOCK_SEQPACKET) to which the target's agent passes accepted TCP connections by SCM_RIGHTS.
pub(crate) const ACCEPT_SOCKET: &str = "accept.sock";
/// All events so far, one JSON object a line.
pub(crate) const EVENTS_FILE: &str = "events.ndjson";
/// The final report; its presence means that the worker is done.
pub(crate) const REPORT_FILE: &str = "report.json";

/// Everything a worker needs to know; complete, so that a worker never asks its agent anything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// Names the migration at both hosts; also the TLS server name that routes connections (`m-<id>`).
    pub id: String,
    /// Which side this worker is.
    pub role: Role,
    /// The machine as this host runs it.
    pub spec: Spec,
    /// The machine's directory at this host; the token record lives there.
    pub machine_dir: PathBuf,
    /// QEMU's QMP socket that the worker may have for itself.
    pub qmp: PathBuf,
    /// QEMU's process.
    pub pid: i32,
    /// This host's name, as in its certificate.
    pub host: String,
    /// The other host's name; its certificate must carry it.
    pub peer: String,
    /// Where the other agent listens (source only).
    pub peer_address: Option<SocketAddr>,
    /// Directory with `ca.pem`, `host.pem`, `host.key`.
    pub identity_dir: PathBuf,
    /// File in which the source keeps what pauses towards this peer taught (source only).
    pub learned: Option<PathBuf>,
    /// Where memory is kept of a migration that broke (target only).
    pub partial: Option<Partial>,
    /// Where pages are kept that guests have in common; `None` if this host keeps none.
    pub shared: Option<SharedPlace>,
    /// The epoch that this migration tries to hand over.
    pub epoch: u64,
    /// What the migration will take (source only).
    pub forecast: Option<Forecast>,
    /// What the operator chose.
    pub options: Options,
}

impl Job {
    /// Where pages are kept that guests have in common, if this one may use them.
    #[must_use]
    pub(crate) fn shared_place(&self) -> Option<&SharedPlace> {
        self.shared.as_ref().filter(|_| self.options.techniques().shared)
    }

    /// A report that says how the migration ended, without figures.
    #[must_use]
    pub(crate) fn report(&self, outcome: Outcome) -> Report {
        let (source, target) = match self.role {
            Role::Source => (self.host.clone(), self.peer.clone()),
            Role::Target => (self.peer.clone(), self.host.clone()),
        };
        Report {
            id: self.id.clone(),
            machine: self.spec.name.clone(),
            role: self.role,
            source,
            target,
            outcome,
            detail: None,
            machine_is_at: None,
            total_ms: 0,
            downtime_ms: None,
            downtime_source_ms: None,
            resumed_unix_ms: None,
            round_trip_ms: None,
            predicted_downtime_ms: None,
            forecast: self.forecast.clone(),
            throttled_ms: 0,
            wire_bytes: 0,
            reconnections: 0,
            repeated_bytes: 0,
            techniques: Techniques::default(),
            device_state_bytes: 0,
            passes: 0,
            versions_named: 0,
            versions_coalesced: 0,
            pages_in_pause: 0,
            peak_memory_bytes: 0,
            cpu_seconds: 0.0,
            pages_verified: None,
        }
    }
}

/// A place for the memory of a migration that broke.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Partial {
    /// The file.
    pub file: PathBuf,
    /// No larger memory is kept.
    pub limit_bytes: u64,
}

/// A place for what guests that move between the same two hosts have in common: at the target the pages, at the source
/// the list of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SharedPlace {
    /// The file.
    pub file: PathBuf,
    /// No more pages are kept, or listed.
    pub limit_bytes: u64,
    /// Counts the migrations of this host, so that each that is under way at once begins elsewhere (source only).
    pub turn: u32,
}

/// Which end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Has the machine.
    Source,
    /// Is to get it.
    Target,
}

/// What [`Options::reconnect_timeout_ms`] may be: one second to one hour.
pub(crate) const RECONNECT_TIMEOUT_MS: RangeInclusive<u64> = 1_000..=3_600_000;

/// What the operator chose for a migration; the same object in the API, on the wire and in the job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Options {
    /// Limit on what the migration sends, bytes per second; `None`: what the link gives.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// The pause to aim at, STOP to RESUME.
    pub downtime_target_ms: u64,
    /// When to stop the guest.
    pub stop_policy: StopPolicyName,
    /// What to do when the downtime target can't be met; everything but `switch` needs the stop policy `gate`.
    pub on_stall: OnStall,
    /// Memory for delta bases at the source; `None`: a quarter of the guest's memory.
    pub base_limit_bytes: Option<u64>,
    /// Leave the machine paused at the target, whatever it did before.
    pub leave_paused: bool,
    /// `full` rereads both memories while both are paused; a test's tool, it lengthens the pause.
    pub verify: Verify,
    /// Bulk TCP connections, 1 to 8.
    pub connections: u8,
    /// Announce the guest's addresses at the target right after the stop, before it runs (CloudNet, 6.4.1.4).
    pub early_announce: bool,
    /// Read pages from QEMU's stream even where its memory could be read.
    pub inline: bool,
    /// Longest outage of the link that the migration survives, 1,000 to 3,600,000.
    pub reconnect_timeout_ms: u64,
    /// If the link is lost for good, the target keeps what it has for the next try.
    pub keep_partial: bool,
    /// What isn't done to make pages smaller; for measuring what each technique is worth.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<Technique>,
}

impl Options {
    /// What may be done to make pages smaller.
    #[must_use]
    pub(crate) fn techniques(&self) -> godwit_content::Techniques {
        let is_used = |technique| !self.without.contains(&technique);
        godwit_content::Techniques {
            zero: is_used(Technique::Zero),
            reference: is_used(Technique::Reference),
            shared: is_used(Technique::Shared),
            sub_block: is_used(Technique::SubBlock),
            delta: is_used(Technique::Delta),
            compress: is_used(Technique::Compress),
        }
    }

    /// Longest outage of the link that the migration survives.
    #[must_use]
    pub(crate) fn reconnect_timeout(&self) -> Duration {
        Duration::from_millis(self.reconnect_timeout_ms)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bandwidth_bytes_per_second: None,
            downtime_target_ms: 50,
            stop_policy: StopPolicyName::Gate,
            on_stall: OnStall::Switch,
            base_limit_bytes: None,
            leave_paused: false,
            verify: Verify::Digest,
            connections: 1,
            early_announce: false,
            inline: false,
            reconnect_timeout_ms: 60_000,
            keep_partial: false,
            without: Vec::new(),
        }
    }
}

/// What makes pages smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Technique {
    /// A page of zeros is only named.
    Zero,
    /// A page that the target has elsewhere is only named.
    Reference,
    /// So is a page that the target has of another guest.
    Shared,
    /// So is a block of 1 KiB that the target has elsewhere.
    SubBlock,
    /// Of a page that was sent before, only what changed is sent.
    Delta,
    /// zstd over what is left.
    Compress,
}

/// The stop policies a user can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum StopPolicyName {
    /// Stop when the predicted pause meets the target, or at its local minimum.
    Gate,
    /// CloudNet's Smart Stop: after pages sent and dirtied cross, the minimum over a sliding window.
    SmartStop,
}

/// What to do when the downtime target can't be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnStall {
    /// Go on until the target can be met, or the operator says otherwise.
    Wait,
    /// Slow the guest's virtual CPUs until the target can be met.
    Throttle,
    /// Stop the guest at about the shortest pause to be had.
    Switch,
    /// Give the migration up.
    Cancel,
}

/// How the target's memory is checked before it may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verify {
    /// Every batch carries a chained digest of what it decodes to.
    Digest,
    /// Besides, both memories are read again and compared while both are paused.
    Full,
}

/// What a worker can be told while it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "command")]
pub(crate) enum Command {
    /// Give up; the guest goes on at the source. Too late once the token has left.
    Cancel,
    /// The other host's agent says this for its worker, which is gone or can't be reached.
    PeerSays {
        /// What it says.
        #[schema(value_type = Object)]
        message: handover::Message,
    },
    /// Change the bandwidth limit.
    SetBandwidth {
        /// Bytes per second; `None` lifts the limit.
        bytes_per_second: Option<u64>,
    },
    /// Change what is done when the downtime target can't be met.
    SetOnStall {
        /// The new choice.
        on_stall: OnStall,
    },
}

/// One thing that happened, with the host's clock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Event {
    /// Milliseconds since the Unix epoch, at the host that says it.
    pub at_unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub what: Happening,
}

/// What a worker reports while it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "event")]
pub(crate) enum Happening {
    /// The worker is up; a target now takes connections.
    Ready,
    /// A new phase began.
    Phase {
        /// The phase.
        phase: Phase,
    },
    /// How far it is; a few times a second.
    Progress(Progress),
    /// Something the operator should know; the migration goes on.
    Warning {
        /// One line.
        message: String,
    },
    /// The end, for better or worse; the last event of a worker.
    Finished(Box<Report>),
}

/// The phases of a migration, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// Connecting, comparing, opening QEMU's stream.
    Preparing,
    /// The guest runs at the source while its memory is sent.
    PreCopy,
    /// The guest is stopped; the last flight is under way.
    Switchover,
    /// The token has left; the target loads and verifies.
    HandedOver,
    /// Over.
    Done,
}

/// A snapshot for people and for `--json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Progress {
    /// Pages that the target has in their newest known version.
    pub pages_settled: u64,
    /// Pages of the machine that migrate.
    pub pages_total: u64,
    /// Pages still owed.
    pub pages_owed: u64,
    /// Bytes put on the wire so far.
    pub wire_bytes: u64,
    /// Measured rate of the link, bytes per second.
    pub rate_bytes_per_second: u64,
    /// Pages the guest dirties a second.
    pub dirty_pages_per_second: u64,
    /// The pause if the guest were stopped now.
    pub predicted_downtime_ms: Option<u64>,
    /// The share of its speed that the guest is slowed to, if it is.
    #[serde(default)]
    pub guest_share_percent: Option<u8>,
    /// Since when nothing is heard of the target, if that is long.
    pub link_silent_ms: Option<u64>,
    /// Time until the machine runs at the target, if the guest goes on as it does.
    pub predicted_remaining_ms: Option<u64>,
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The machine lives at the target.
    Completed,
    /// The operator gave up; the machine is where it was.
    Cancelled,
    /// Something failed; the machine is where it was.
    Failed,
    /// The token left and no answer came; only the target may know. `detail` says what to do.
    Unsettled,
}

/// The account of a finished migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Report {
    /// The migration.
    pub id: String,
    /// The machine's name.
    pub machine: String,
    /// Which side wrote this.
    pub role: Role,
    /// From.
    pub source: String,
    /// To.
    pub target: String,
    /// How it ended.
    pub outcome: Outcome,
    /// One line: why, when it isn't `completed`.
    pub detail: Option<String>,
    /// The host on which the machine is now.
    pub machine_is_at: Option<String>,
    /// From the worker's start to the machine running at the target.
    pub total_ms: u64,
    /// STOP at the source to RESUME at the target, by the clocks of both QEMUs. Meaningful as far as the hosts' clocks
    /// agree; `downtime_source_ms` needs one clock only.
    pub downtime_ms: Option<f64>,
    /// STOP at the source to the arrival of the target's "running", less half a round trip; one clock.
    pub downtime_source_ms: Option<f64>,
    /// When the guest ran at the target, by the target's clock.
    #[serde(default)]
    pub resumed_unix_ms: Option<u64>,
    /// Smallest round trip seen by the session.
    pub round_trip_ms: Option<f64>,
    /// What the prediction said when the stop was decided.
    pub predicted_downtime_ms: Option<u64>,
    /// What was foreseen before the first byte was sent; `None` at the target, and where the guest's memory can't be
    /// read.
    pub forecast: Option<Forecast>,
    /// For how long the guest was slowed, so that its target could be met.
    #[serde(default)]
    pub throttled_ms: u64,
    /// Payload put on the wire by the session, TLS and TCP headers excluded.
    pub wire_bytes: u64,
    /// How often new connections took the place of lost ones.
    pub reconnections: u32,
    /// Of the wire bytes, those sent again on new connections.
    pub repeated_bytes: u64,
    /// Bytes of memory batches before compression and after, by technique.
    pub techniques: Techniques,
    /// Bytes of QEMU's own sections, compressed.
    pub device_state_bytes: u64,
    /// Passes over the guest's memory that QEMU's stream made.
    pub passes: u64,
    /// Versions of pages that QEMU named.
    pub versions_named: u64,
    /// Versions that were never sent because a newer one came first.
    pub versions_coalesced: u64,
    /// Pages sent after STOP.
    pub pages_in_pause: u64,
    /// Peak resident memory of this worker.
    pub peak_memory_bytes: u64,
    /// CPU time of this worker.
    pub cpu_seconds: f64,
    /// Result of `--verify full`: pages compared and found equal.
    pub pages_verified: Option<u64>,
}

/// What a migration was thought to take before its first byte was sent (docs/foresight.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Forecast {
    /// As [`Report::total_ms`].
    pub total_ms: Range,
    /// As [`Report::wire_bytes`].
    pub wire_bytes: Range,
    /// STOP to RESUME, if the gate takes its time.
    pub downtime_ms: Range,
    /// Whether that is likely to meet the operator's target.
    pub meets_target: bool,
    /// What the link was thought to carry, the operator's limit included.
    pub rate_bytes_per_second: u64,
    /// The link's round trip.
    pub round_trip_ms: f64,
    /// The same before earlier outcomes corrected it.
    #[schema(value_type = Object)]
    pub uncorrected: Course,
}

/// A figure that isn't known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Range {
    /// Nine of ten outcomes are between this
    pub low: u64,
    /// Most likely.
    pub likely: u64,
    /// and this.
    pub high: u64,
}

impl From<forecast::Range> for Range {
    fn from(range: forecast::Range) -> Self {
        Self {
            low: range.low.floor() as u64,
            likely: range.likely.round() as u64,
            high: range.high.ceil() as u64,
        }
    }
}

impl From<Range> for forecast::Range {
    fn from(range: Range) -> Self {
        Self { low: range.low as f64, likely: range.likely as f64, high: range.high as f64 }
    }
}

/// Pages and bytes by the form in which they travelled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Techniques {
    /// Pages that were all zero.
    pub zero_pages: u64,
    /// Pages that the target had elsewhere.
    pub reference_pages: u64,
    /// Pages that the target had among those that guests share.
    #[serde(default)]
    pub shared_pages: u64,
    /// Pages of which at least one 1 KiB block was a reference.
    pub partial_reference_pages: u64,
    /// Pages sent as a delta.
    pub delta_pages: u64,
    /// Bytes of deltas before compression.
    pub delta_bytes: u64,
    /// Pages sent whole.
    pub literal_pages: u64,
    /// Bytes of literals before compression.
    pub literal_bytes: u64,
    /// Bytes of all batches as sent.
    pub batch_bytes: u64,
}
