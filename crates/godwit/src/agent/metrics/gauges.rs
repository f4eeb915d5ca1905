//! What goes up and down: set anew from an observation each time somebody looks.

use std::{
    sync::atomic::AtomicU64,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::totals::{OfRole, role};
use crate::job::{Progress, Role};

/// How a host is at one moment.
#[derive(Debug)]
pub(in crate::agent) struct Observation {
    /// When its certificate ends.
    pub certificate_expires: SystemTime,
    /// The state of each machine that it knows.
    pub machine_states: Vec<String>,
    /// Its migrations.
    pub under_way: Vec<UnderWay>,
}

/// A migration that isn't over.
#[derive(Debug)]
pub(in crate::agent) struct UnderWay {
    /// The machine.
    pub machine: String,
    /// The other host.
    pub peer: String,
    /// Which side this host is.
    pub role: Role,
    /// What the worker said last; only a source's says anything.
    pub progress: Progress,
}

/// No host is in two migrations of one machine, so that these two name one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMigration {
    machine: String,
    peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: String,
}

type Count = Gauge<u64, AtomicU64>;
type Seconds = Gauge<f64, AtomicU64>;
type Ratio = Gauge<f64, AtomicU64>;

/// The gauges.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    certificate_expires: Count,
    machines: Family<OfState, Count>,
    migrations: Family<OfRole, Count>,
    pages: Family<OfMigration, Count>,
    pages_settled: Family<OfMigration, Count>,
    pages_owed: Family<OfMigration, Count>,
    dirty_pages: Family<OfMigration, Count>,
    sent_bytes: Family<OfMigration, Count>,
    rate: Family<OfMigration, Count>,
    downtime: Family<OfMigration, Seconds>,
    remaining: Family<OfMigration, Seconds>,
    silent: Family<OfMigration, Seconds>,
    guest_share: Family<OfMigration, Ratio>,
}

impl Gauges {
    /// All of them; those of migrations have no series until there is one.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let gauges = Self::default();
        let help = "When this host's certificate ends, since the Unix epoch";
        let expires = gauges.certificate_expires.clone();
        registry.register_with_unit("certificate_expiry_timestamp", help, Unit::Seconds, expires);
        let help = "Machines that this host knows, by QEMU's word for their state";
        registry.register("machines", help, gauges.machines.clone());
        let help = "Migrations under way, by this host's part";
        registry.register("migrations_under_way", help, gauges.migrations.clone());
        gauges.register_of_migrations(registry);
        gauges
    }

    fn register_of_migrations(&self, registry: &mut Registry) {
        let mut count = |name, help, gauge: &Family<OfMigration, Count>| {
            registry.register(name, help, gauge.clone());
        };
        let per_second = "migration_rate_bytes_per_second";
        count("migration_memory_pages", "Pages of a machine that is leaving this host", &self.pages);
        count("migration_pages_settled", "Of these, the pages that the target has", &self.pages_settled);
        count("migration_pages_owed", "Pages that are still to be sent", &self.pages_owed);
        count("migration_dirty_pages_per_second", "Pages that the guest writes to", &self.dirty_pages);
        count("migration_sent_bytes", "Put on the wire by a migration under way so far", &self.sent_bytes);
        count(per_second, "Measured rate of the link to the target", &self.rate);
        let mut seconds = |name: &str, help, gauge: &Family<OfMigration, Seconds>| {
            registry.register_with_unit(name, help, Unit::Seconds, gauge.clone());
        };
        let help = "The pause if the guest were stopped now, as predicted";
        seconds("migration_predicted_downtime", help, &self.downtime);
        let help = "Time until the machine runs at the target, as predicted";
        seconds("migration_predicted_remaining", help, &self.remaining);
        let help = "Since when nothing is heard of the target; 0 while it is heard";
        seconds("migration_link_silent", help, &self.silent);
        let help = "The share of its speed that a guest is throttled to; 1 while it isn't";
        registry.register("migration_guest_share_ratio", help, self.guest_share.clone());
    }

    /// Sets all gauges, and drops the series of what isn't there any more.
    pub(super) fn set(&self, observed: &Observation) {
        let expires = observed.certificate_expires.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.certificate_expires.set(expires.as_secs());
        self.machines.clear();
        for state in &observed.machine_states {
            self.machines.get_or_create(&OfState { state: state.clone() }).inc();
        }
        self.clear_migrations();
        for migration in &observed.under_way {
            self.migrations.get_or_create(&OfRole { role: role(migration.role) }).inc();
            if migration.role == Role::Source {
                self.show(migration);
            }
        }
    }

    fn clear_migrations(&self) {
        for role in [Role::Source, Role::Target].map(role) {
            self.migrations.get_or_create(&OfRole { role }).set(0);
        }
        for gauge in [
            &self.pages,
            &self.pages_settled,
            &self.pages_owed,
            &self.dirty_pages,
            &self.sent_bytes,
            &self.rate,
        ] {
            gauge.clear();
        }
        for gauge in [&self.downtime, &self.remaining, &self.silent, &self.guest_share] {
            gauge.clear();
        }
    }

    /// What the source's worker says of its migration.
    fn show(&self, migration: &UnderWay) {
        let UnderWay { machine, peer, progress, .. } = migration;
        let labels = OfMigration { machine: escaped(machine), peer: escaped(peer) };
        for (gauge, value) in [
            (&self.pages, progress.pages_total),
            (&self.pages_settled, progress.pages_settled),
            (&self.pages_owed, progress.pages_owed),
            (&self.dirty_pages, progress.dirty_pages_per_second),
            (&self.sent_bytes, progress.wire_bytes),
            (&self.rate, progress.rate_bytes_per_second),
        ] {
            gauge.get_or_create(&labels).set(value);
        }
        for (gauge, value_ms) in [
            (&self.downtime, progress.predicted_downtime_ms),
            (&self.remaining, progress.predicted_remaining_ms),
            (&self.silent, Some(progress.link_silent_ms.unwrap_or(0))),
        ] {
            // What isn't predicted yet has no series, rather than a value that lies.
            if let Some(value_ms) = value_ms {
                gauge.get_or_create(&labels).set(value_ms as f64 / 1e3);
            }
        }
        let guest_share = f64::from(progress.guest_share_percent.unwrap_or(100)) / 100.0;
        self.guest_share.get_or_create(&labels).set(guest_share);
    }
}

/// A label's value as the format wants it, which the encoder takes as it is.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}
