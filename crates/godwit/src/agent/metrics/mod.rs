//! What the agent counts and measures, in the OpenMetrics text format that Prometheus reads.
//!
//! ```text
//!   a migration ended ──► Metrics::count ────┐
//!   a hand-over settled ► Metrics::settled ──┴► totals ─┐
//!                                                       ├─► one page: /v1/metrics on the API's socket,
//!   at each look: Observation ──────────────► gauges ───┘             /metrics where `metrics_listen` says
//! ```
//!
//! Totals begin at 0 with the agent. Labels are bounded: roles, outcomes, techniques and QEMU's run states are few, and
//! the series of one migration vanish when it ends.

mod gauges;
mod listener;
mod totals;

use std::sync::{Mutex, PoisonError};

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use prometheus_client::{encoding::text, metrics::info::Info, registry::Registry};

use self::{gauges::Gauges, totals::Totals};
pub(super) use self::{
    gauges::{Observation, UnderWay},
    listener::serve,
};
use super::Agent;
use crate::{api::FindingState, job::Report};

/// What every name begins with.
const PREFIX: &str = "godwit";
/// How the page is to be read.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of an agent.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    totals: Totals,
    gauges: Mutex<Gauges>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The running version of godwit", build);
        let totals = Totals::register(&mut registry);
        let gauges = Mutex::new(Gauges::register(&mut registry));
        Self { registry, totals, gauges }
    }
}

impl Metrics {
    /// Counts a migration that is over; the caller sees to it that each is counted once.
    pub(super) fn count(&self, report: &Report) {
        self.totals.count(report);
    }

    /// Counts what a look at a machine's open hand-over came to.
    pub(super) fn settled(&self, state: FindingState) {
        self.totals.settled(state);
    }

    /// The page: the totals as they are, the gauges as they are observed.
    pub(super) fn page(&self, observed: &Observation) -> String {
        // The gauges of one observation must not mix with another's.
        let gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.set(observed);
        let mut page = String::new();
        text::encode(&mut page, &self.registry).expect("writing to a string doesn't fail");
        page
    }
}

impl Agent {
    /// The page of metrics, with what is observed now.
    pub(super) async fn metrics_page(&self) -> Response {
        let machines = self.list_machines().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "machines aren't in the metrics");
            Vec::new()
        });
        let observed = Observation {
            certificate_expires: self.credentials.expires(),
            machine_states: machines.into_iter().map(|machine| machine.state).collect(),
            under_way: self.migrations.under_way(),
        };
        ([(header::CONTENT_TYPE, CONTENT_TYPE)], self.metrics.page(&observed)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        time::{Duration, SystemTime},
    };

    use serde_json::Value;

    use super::*;
    use crate::job::{Outcome, Progress, Role, Techniques};

    const DASHBOARD: &str = include_str!("../../../../../dist/grafana/godwit.json");

    fn report(role: Role, outcome: Outcome) -> Report {
        let job = serde_json::json!({
            "id": "5f2c9e01a7b3d846", "machine": "web1", "role": role, "source": "hosta", "target": "hostb",
            "outcome": outcome, "total_ms": 14_200, "downtime_ms": 30.0, "downtime_source_ms": 19.0,
            "predicted_downtime_ms": 31, "wire_bytes": 168_000_000, "reconnections": 2, "repeated_bytes": 300_000,
            "techniques": Techniques { zero_pages: 7, delta_pages: 5, delta_bytes: 900, ..Techniques::default() },
            "device_state_bytes": 41_000, "passes": 20, "versions_named": 213_000, "versions_coalesced": 106_000,
            "pages_in_pause": 120, "peak_memory_bytes": 1, "cpu_seconds": 4.2,
        });
        serde_json::from_value(job).unwrap()
    }

    fn under_way(role: Role) -> UnderWay {
        let progress = Progress {
            pages_owed: 12,
            predicted_downtime_ms: Some(48),
            predicted_remaining_ms: Some(9_000),
            link_silent_ms: Some(2_500),
            guest_share_percent: Some(40),
            ..Progress::default()
        };
        UnderWay { machine: "web1".into(), peer: "hostb".into(), role, progress }
    }

    fn observed(under_way: Vec<UnderWay>) -> Observation {
        Observation {
            certificate_expires: SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000),
            machine_states: vec!["running".into(), "off".into(), "running".into()],
            under_way,
        }
    }

    /// Everything that can be exported is.
    fn full_page() -> String {
        let metrics = Metrics::default();
        metrics.count(&report(Role::Source, Outcome::Completed));
        metrics.page(&observed(vec![under_way(Role::Source)]))
    }

    fn has(page: &str, line: &str) {
        assert!(page.lines().any(|it| it == line), "{line:?} isn't in\n{page}");
    }

    #[test]
    fn a_source_counts_what_it_sent() {
        let page = full_page();
        for line in [
            r#"godwit_migrations_total{role="source",outcome="completed"} 1"#,
            r#"godwit_migrations_total{role="target",outcome="failed"} 0"#,
            "godwit_migration_wire_bytes_total 168000000",
            "godwit_migration_reconnections_total 2",
            "godwit_migration_repeated_bytes_total 300000",
            r#"godwit_migration_pages_total{technique="zero"} 7"#,
            r#"godwit_migration_uncompressed_bytes_total{technique="delta"} 900"#,
            r#"godwit_migration_downtime_seconds_bucket{le="0.02"} 1"#,
            r#"godwit_migration_downtime_seconds_bucket{le="0.01"} 0"#,
            r#"godwit_migration_duration_seconds_sum{role="source"} 14.2"#,
            r#"godwit_recoveries_total{state="settled"} 0"#,
        ] {
            has(&page, line);
        }
    }

    #[test]
    fn a_target_counts_the_arrival_and_nothing_that_the_source_counts() {
        let metrics = Metrics::default();
        metrics.count(&report(Role::Target, Outcome::Completed));
        let page = metrics.page(&observed(Vec::new()));
        has(&page, r#"godwit_migrations_total{role="target",outcome="completed"} 1"#);
        has(&page, "godwit_migration_wire_bytes_total 0");
        has(&page, "godwit_migration_downtime_seconds_count 0");
    }

    #[test]
    fn what_did_not_come_to_an_end_is_no_measure_of_one() {
        let metrics = Metrics::default();
        metrics.count(&report(Role::Source, Outcome::Cancelled));
        let page = metrics.page(&observed(Vec::new()));
        has(&page, r#"godwit_migrations_total{role="source",outcome="cancelled"} 1"#);
        has(&page, r#"godwit_migration_duration_seconds_count{role="source"} 0"#);
        has(&page, "godwit_migration_wire_bytes_total 168000000");
    }

    #[test]
    fn gauges_are_those_of_now_and_vanish_with_their_migration() {
        let metrics = Metrics::default();
        let page = metrics.page(&observed(vec![under_way(Role::Source)]));
        for line in [
            r#"godwit_machines{state="running"} 2"#,
            r#"godwit_machines{state="off"} 1"#,
            r#"godwit_migrations_under_way{role="source"} 1"#,
            r#"godwit_migration_pages_owed{machine="web1",peer="hostb"} 12"#,
            r#"godwit_migration_predicted_downtime_seconds{machine="web1",peer="hostb"} 0.048"#,
            r#"godwit_migration_link_silent_seconds{machine="web1",peer="hostb"} 2.5"#,
            r#"godwit_migration_guest_share_ratio{machine="web1",peer="hostb"} 0.4"#,
            "godwit_certificate_expiry_timestamp_seconds 2000000000",
        ] {
            has(&page, line);
        }
        let page = metrics.page(&observed(Vec::new()));
        assert!(!page.contains("machine=\"web1\""), "{page}");
        has(&page, r#"godwit_migrations_under_way{role="source"} 0"#);
    }

    #[test]
    fn names_and_labels_of_machines_cannot_break_the_page() {
        let mut odd = under_way(Role::Source);
        odd.machine = "a\"b\\c\nd".into();
        let page = Metrics::default().page(&observed(vec![odd]));
        has(&page, r#"godwit_migration_pages_owed{machine="a\"b\\c\nd",peer="hostb"} 12"#);
    }

    /// Of each family its name and its kind.
    fn families(page: &str) -> Vec<(&str, &str)> {
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect()
    }

    #[test]
    fn every_metric_says_what_it_is() {
        let page = full_page();
        let families = families(&page);
        assert!(families.len() >= 20, "{families:?}");
        for (name, _) in families {
            let start = format!("# HELP {name} ");
            let help = page.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default();
            assert!(help.len() > 10, "{name}: {help:?}");
        }
    }

    /// The names that a query may use.
    fn series(page: &str) -> BTreeSet<String> {
        let suffixes = |kind| match kind {
            "counter" => &["_total"][..],
            "histogram" => &["_bucket", "_count", "_sum"],
            "info" => &["_info"],
            _ => &[""],
        };
        let named = |(name, kind)| suffixes(kind).iter().map(move |suffix| format!("{name}{suffix}"));
        families(page).into_iter().flat_map(named).collect()
    }

    fn expressions<'a>(json: &'a Value, found: &mut Vec<&'a str>) {
        match json {
            Value::Object(fields) => {
                found.extend(fields.get("expr").and_then(Value::as_str));
                found.extend(fields.get("query").and_then(Value::as_str));
                fields.values().for_each(|field| expressions(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| expressions(item, found)),
            _ => {}
        }
    }

    /// The names in a text that begin as all of ours do.
    fn names(text: &str) -> impl Iterator<Item = &str> {
        text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_').filter(|it| it.starts_with("godwit_"))
    }

    #[test]
    fn the_dashboard_shows_what_there_is() {
        let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
        let mut queries = Vec::new();
        expressions(&dashboard, &mut queries);
        let used: BTreeSet<_> = queries.into_iter().flat_map(names).map(str::to_owned).collect();
        let exported = series(&full_page());
        let unknown: Vec<_> = used.difference(&exported).collect();
        assert!(unknown.is_empty(), "the dashboard asks for {unknown:?}; there are {exported:?}");
        assert!(used.len() >= 15, "{used:?}");
    }

    #[test]
    fn the_manual_lists_every_metric() {
        let manual = include_str!("../../../../../docs/operations.md");
        let listed: BTreeSet<_> = names(manual).collect();
        for (family, kind) in families(&full_page()) {
            let suffix = if kind == "counter" {
                "_total"
            } else if kind == "info" {
                "_info"
            } else {
                ""
            };
            assert!(
                listed.contains(format!("{family}{suffix}").as_str()),
                "docs/operations.md: {family}{suffix}"
            );
        }
    }
}
