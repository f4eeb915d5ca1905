//! Foreseeing a migration: the guest's memory is looked at, and the link measured, while the target prepares itself; what
//! became of earlier migrations corrects what comes of it.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use godwit_content::BLOCK_BYTES;
use godwit_migration::{
    forecast::{Link, Plan, course},
    predict::Learned,
    stop::GateSettings,
};
use godwit_qemu::qmp;
use tokio::task::JoinHandle;

use super::{Agent, history, peers::PeerAgent, probe::Measured, sampling::Sampling, state};
use crate::{
    api::{History, HistoryEntry},
    job::{Forecast, Job, Options, Outcome, Report, Role, Technique},
    output::one_line,
    worker::{GATE, MemoryMap},
};

/// One page of so many may be shared before a forecast couldn't have known; a guest shares some with itself.
const SHARED_PART_MAX: u64 = 50;
/// What a migration measured of the link is believed for so long; a probe sees much less of it.
const MEASURED_LATELY: Duration = Duration::from_secs(15 * 60);

/// What is looked at before a migration begins, under way.
pub(super) struct Outlook {
    sampling: Option<Sampling>,
    link: LinkOutlook,
}

enum LinkOutlook {
    Known(Measured),
    Probing(JoinHandle<Option<Measured>>),
}

impl Agent {
    /// Begins to look at a guest's memory and at the way to the target; no migration fails for want of either.
    pub(super) async fn look_ahead(
        self: &Arc<Self>,
        monitor: &qmp::Client,
        job: &Job,
        peer: &PeerAgent,
    ) -> Outlook {
        let sampling = begin_sampling(monitor, job).await;
        let link = match self.history.link(&job.peer, now_unix_s().saturating_sub(MEASURED_LATELY.as_secs()))
        {
            Some(measured) => LinkOutlook::Known(measured),
            None => {
                let (agent, peer) = (self.clone(), peer.clone());
                LinkOutlook::Probing(tokio::spawn(async move { agent.probe(&peer).await }))
            }
        };
        Outlook { sampling, link }
    }

    /// What the migration will take, if the guest's memory could be looked at and the link is known.
    pub(super) async fn foresee(&self, job: &Job, outlook: Outlook) -> Option<Forecast> {
        if !is_foreseeable(&job.options) {
            return None;
        }
        let began = Instant::now();
        let sample = outlook.sampling?.newest().await?;
        let Measured { rate_bytes_per_second: measured, round_trip_ms } = match outlook.link {
            LinkOutlook::Known(measured) => measured,
            LinkOutlook::Probing(probing) => probing.await.ok()??,
        };
        let Job { peer, options, .. } = job;
        let rate = options.bandwidth_bytes_per_second.map_or(measured, |limit| measured.min(limit)).max(1);
        let learned: Learned = state::read_json(&self.state.learned(peer)).unwrap_or_default();
        let link = Link { rate_bytes_per_second: rate as f64, round_trip_ms };
        let plan = Plan {
            gate: GateSettings::new(options.downtime_target_ms as f64),
            base_bytes: options.base_limit_bytes.unwrap_or(sample.pages * BLOCK_BYTES as u64 / 4),
        };
        let course = course(&sample, &link, &plan, &learned);
        let waited_ms = began.elapsed().as_millis();
        tracing::debug!(?sample, ?link, ?course, waited_ms, "foreseen");
        let corrections = self.history.corrections(&job.spec.name, peer);
        Some(corrections.apply(course, options.downtime_target_ms, (rate, round_trip_ms)))
    }

    /// Keeps what became of a migration that this host sent, for the next forecast.
    pub(super) fn remember(&self, job: &Job, report: &Report, rate_bytes_per_second: u64) {
        let is_telling = is_foreseeable(&job.options);
        if (job.role, report.outcome) != (Role::Source, Outcome::Completed) || !is_telling {
            return;
        }
        // What other guests spared it wasn't foreseen, and teaches nothing about what will be.
        let sent = &report.techniques;
        let was_alone = sent.shared_pages <= sent.literal_pages / SHARED_PART_MAX;
        let forecast = report.forecast.clone().filter(|_| was_alone);
        // The last that was measured may be of a guest with little to send; on average it carried at least this.
        let average = report.wire_bytes.saturating_mul(1_000).checked_div(report.total_ms);
        let carried = average.map(|average| average.max(rate_bytes_per_second)).filter(|rate| *rate > 0);
        let entry = HistoryEntry {
            id: job.id.clone(),
            machine: job.spec.name.clone(),
            peer: job.peer.clone(),
            ended_unix_s: now_unix_s(),
            forecast,
            total_ms: report.total_ms,
            wire_bytes: report.wire_bytes,
            downtime_ms: report.downtime_source_ms.or(report.downtime_ms),
            rate_bytes_per_second: carried.filter(|_| job.options.bandwidth_bytes_per_second.is_none()),
            round_trip_ms: report.round_trip_ms,
        };
        if let Err(error) = self.history.add(&entry) {
            tracing::warn!(%error, "not kept in the history");
        }
    }

    /// All that is kept, the newest first.
    pub(super) fn show_history(&self) -> History {
        let mut entries = self.history.entries();
        let score = history::score(&entries);
        entries.reverse();
        History { entries, score }
    }
}

/// The model and the history are of migrations that use everything within one guest.
fn is_foreseeable(options: &Options) -> bool {
    options.without.iter().all(|technique| *technique == Technique::Shared)
}

/// Begins to look at the guest's memory, where that can be done.
async fn begin_sampling(monitor: &qmp::Client, job: &Job) -> Option<Sampling> {
    let seed = u64::from_str_radix(&job.id, 16).unwrap_or_default();
    // Where QEMU has its own way with the stop, it also has its own pace.
    if !monitor.migrate_capabilities().await.ok()?.contains_key(GATE) {
        tracing::info!("no forecast: QEMU lacks {GATE}");
        return None;
    }
    let ranges = MemoryMap::of(monitor).await.and_then(|map| map.ranges());
    let ranges = ranges.inspect_err(|error| tracing::info!(error = one_line(error), "no forecast")).ok()?;
    let begun = Sampling::begin(job.pid, &ranges, seed);
    begun.inspect_err(|error| tracing::info!(%error, "no forecast")).ok()
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
