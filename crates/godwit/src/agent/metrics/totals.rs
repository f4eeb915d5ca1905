//! What only grows: counted when a migration is over, from its report.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{
    api::FindingState,
    job::{Outcome, Report, Role, Techniques},
    output,
};

/// One second to four and a half hours, each bound twice the one before: a move over a slow link takes as long as the
/// memory is large, and what is asked about it is the order of magnitude.
const SHORTEST_DURATION_S: f64 = 1.0;
const DURATION_BUCKETS: u16 = 15;
/// Fine around the pause that is aimed at by default (50 ms), and where it begins to be noticed: 200 ms is TCP's shortest
/// retransmission timeout, at 1 s people wait, and from 5 s on clients give up.
const DOWNTIME_BUCKETS_S: [f64; 14] =
    [0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0];

const ROLES: [Role; 2] = [Role::Source, Role::Target];
const OUTCOMES: [Outcome; 4] = [Outcome::Completed, Outcome::Cancelled, Outcome::Failed, Outcome::Unsettled];
const FINDINGS: [FindingState; 3] = [FindingState::Settled, FindingState::Waiting, FindingState::Failed];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    role: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfRole {
    pub(super) role: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTechnique {
    technique: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: &'static str,
}

/// A family of histograms needs to know how one is made.
type Histograms = Family<OfRole, Histogram, fn() -> Histogram>;

/// The counters and histograms.
#[derive(Debug)]
pub(super) struct Totals {
    migrations: Family<Ended, Counter>,
    durations: Histograms,
    downtimes: Histogram,
    wire_bytes: Counter,
    repeated_bytes: Counter,
    reconnections: Counter,
    pages: Family<OfTechnique, Counter>,
    uncompressed_bytes: Family<OfTechnique, Counter>,
    batch_bytes: Counter,
    recoveries: Family<OfState, Counter>,
}

impl Totals {
    /// All of them, at 0, so that the first migration is an increase of something.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let totals = Self {
            migrations: Family::default(),
            durations: Family::new_with_constructor(durations),
            downtimes: Histogram::new(DOWNTIME_BUCKETS_S),
            wire_bytes: Counter::default(),
            repeated_bytes: Counter::default(),
            reconnections: Counter::default(),
            pages: Family::default(),
            uncompressed_bytes: Family::default(),
            batch_bytes: Counter::default(),
            recoveries: Family::default(),
        };
        totals.name(registry);
        totals.begin();
        totals
    }

    fn name(&self, registry: &mut Registry) {
        let help = "Migrations that ended, by this host's part and by how they ended";
        registry.register("migrations", help, self.migrations.clone());
        let help =
            "Time of completed migrations, from the worker's start to the machine running at the target";
        registry.register_with_unit("migration_duration", help, Unit::Seconds, self.durations.clone());
        let help = "Time for which machines stood still when they left this host";
        registry.register_with_unit("migration_downtime", help, Unit::Seconds, self.downtimes.clone());
        let help = "Sent by this host's migrations, without the headers of TLS and TCP";
        registry.register_with_unit("migration_wire", help, Unit::Bytes, self.wire_bytes.clone());
        let help = "Of the bytes on the wire, those sent again on new connections";
        registry.register_with_unit("migration_repeated", help, Unit::Bytes, self.repeated_bytes.clone());
        let help = "New connections that took the place of lost ones";
        registry.register("migration_reconnections", help, self.reconnections.clone());
        let help = "Pages sent, by the form in which they travelled";
        registry.register("migration_pages", help, self.pages.clone());
        let help = "Content of pages sent, by its form, before it was compressed";
        let uncompressed = self.uncompressed_bytes.clone();
        registry.register_with_unit("migration_uncompressed", help, Unit::Bytes, uncompressed);
        let help = "Pages sent, in whatever form, after they were compressed";
        registry.register_with_unit("migration_batch", help, Unit::Bytes, self.batch_bytes.clone());
        let help = "Looks at hand-overs that a worker left open, by what they came to";
        registry.register("recoveries", help, self.recoveries.clone());
    }

    fn begin(&self) {
        for role in ROLES.map(role) {
            drop(self.durations.get_or_create(&OfRole { role }));
            for outcome in OUTCOMES.map(output::outcome) {
                drop(self.migrations.get_or_create(&Ended { role, outcome }));
            }
        }
        self.count_techniques(&Techniques::default());
        for state in FINDINGS.map(finding) {
            drop(self.recoveries.get_or_create(&OfState { state }));
        }
    }

    /// Counts a migration that is over. What was sent, and how long the guest stood still, is the source's to count: the
    /// sum over all hosts is then the sum over all migrations.
    pub(super) fn count(&self, report: &Report) {
        let role = role(report.role);
        self.migrations.get_or_create(&Ended { role, outcome: output::outcome(report.outcome) }).inc();
        let is_completed = report.outcome == Outcome::Completed;
        // A report of which the worker died has no time.
        if is_completed && report.total_ms > 0 {
            self.durations.get_or_create(&OfRole { role }).observe(report.total_ms as f64 / 1e3);
        }
        if report.role == Role::Target {
            return;
        }
        let downtime_ms = report.downtime_source_ms.or(report.downtime_ms);
        if let Some(downtime_ms) = downtime_ms.filter(|_| is_completed) {
            self.downtimes.observe(downtime_ms.max(0.0) / 1e3);
        }
        self.wire_bytes.inc_by(report.wire_bytes);
        self.repeated_bytes.inc_by(report.repeated_bytes);
        self.reconnections.inc_by(report.reconnections.into());
        self.count_techniques(&report.techniques);
    }

    fn count_techniques(&self, sent: &Techniques) {
        for (technique, pages) in [
            ("zero", sent.zero_pages),
            ("reference", sent.reference_pages),
            ("shared", sent.shared_pages),
            ("partial_reference", sent.partial_reference_pages),
            ("delta", sent.delta_pages),
            ("literal", sent.literal_pages),
        ] {
            self.pages.get_or_create(&OfTechnique { technique }).inc_by(pages);
        }
        for (technique, bytes) in [("delta", sent.delta_bytes), ("literal", sent.literal_bytes)] {
            self.uncompressed_bytes.get_or_create(&OfTechnique { technique }).inc_by(bytes);
        }
        self.batch_bytes.inc_by(sent.batch_bytes);
    }

    /// Counts a look at an open hand-over.
    pub(super) fn settled(&self, state: FindingState) {
        self.recoveries.get_or_create(&OfState { state: finding(state) }).inc();
    }
}

fn durations() -> Histogram {
    Histogram::new(exponential_buckets(SHORTEST_DURATION_S, 2.0, DURATION_BUCKETS))
}

/// A role as the API has it.
pub(super) fn role(role: Role) -> &'static str {
    match role {
        Role::Source => "source",
        Role::Target => "target",
    }
}

fn finding(state: FindingState) -> &'static str {
    match state {
        FindingState::Settled => "settled",
        FindingState::Waiting => "waiting",
        FindingState::Failed => "failed",
    }
}
