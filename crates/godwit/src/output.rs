//! What people read: tables, bars, reports; or JSON, when they ask for it.

use std::io::{self, Write};

use serde::Serialize;

use crate::{
    api::{Machine, Migration, Problem},
    job::{Forecast, Outcome, Phase, Report, Role},
    quantity::{count, rate, size, time_ms},
};

/// How to answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// In JSON.
    pub json: bool,
}

impl Output {
    /// Prints an object as JSON.
    pub(crate) fn json(self, value: &impl Serialize) {
        let text = serde_json::to_string_pretty(value).unwrap_or_else(|error| error.to_string());
        self.line(&text);
    }

    /// Prints `value` as JSON if that is asked for, else what `human` makes of it.
    pub(crate) fn answer<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) {
        if self.json { self.json(value) } else { self.line(human(value).trim_end()) }
    }

    /// Prints a line to standard output; that nobody reads it is no error.
    pub(crate) fn line(self, text: &str) {
        let _ = writeln!(io::stdout().lock(), "{text}");
    }

    /// Prints an error to standard error, in one line or as an object.
    pub(crate) fn failure(self, problem: &Problem) {
        let text = if self.json {
            serde_json::to_string(problem).unwrap_or_else(|error| error.to_string())
        } else {
            format!("godwit: {}", problem.message)
        };
        let _ = writeln!(io::stderr().lock(), "{text}");
    }
}

/// An error and its causes in one line.
#[must_use]
pub(crate) fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line.replace('\n', " ")
}

/// Lays rows out in columns, each as wide as its widest cell.
#[must_use]
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String; N]| {
        let padded: Vec<_> =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(&header.map(str::to_owned));
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

/// A bar of up to `width` cells for a share between 0 and 1.
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the share is clamped")]
pub(crate) fn bar(share: f64, width: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * width as f64 * 8.0).round() as usize;
    let part = [" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    format!("{}{}", "█".repeat(eighths / 8), if eighths.is_multiple_of(8) { "" } else { part })
}

/// The machines of a host.
#[must_use]
pub(crate) fn machines(machines: &[Machine]) -> String {
    if machines.is_empty() {
        return "no machines; start one with `godwit vm run FILE`".to_owned();
    }
    let rows: Vec<_> = machines
        .iter()
        .map(|machine| {
            [
                machine.name.clone(),
                machine.state.clone(),
                machine.at.clone(),
                size(machine.memory_bytes),
                machine.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                if machine.adopted { "adopted" } else { "godwit" }.to_owned(),
                machine.migration.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        })
        .collect();
    table(["NAME", "STATE", "AT", "MEMORY", "PID", "STARTED BY", "MIGRATION"], &rows)
}

/// The migrations of a host.
#[must_use]
pub(crate) fn migrations(migrations: &[Migration]) -> String {
    if migrations.is_empty() {
        return "no migrations".to_owned();
    }
    let rows: Vec<_> = migrations
        .iter()
        .map(|migration| {
            let direction = if migration.role == Role::Source { "to" } else { "from" };
            let (state, sent) = match &migration.report {
                Some(report) => (outcome(report.outcome).to_owned(), report.wire_bytes),
                None => (phase(migration.phase).to_owned(), migration.progress.wire_bytes),
            };
            [
                migration.id.clone(),
                migration.machine.clone(),
                format!("{direction} {}", migration.peer),
                state,
                size(sent),
            ]
        })
        .collect();
    table(["ID", "MACHINE", "PEER", "STATE", "ON THE WIRE"], &rows)
}

/// A phase in words.
#[must_use]
pub(crate) fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Preparing => "preparing",
        Phase::PreCopy => "copying",
        Phase::Switchover => "switching over",
        Phase::HandedOver => "handed over",
        Phase::Done => "done",
    }
}

/// An outcome in a word.
#[must_use]
pub(crate) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Completed => "completed",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed => "failed",
        Outcome::Unsettled => "unsettled",
    }
}

/// A forecast in one line.
#[must_use]
pub(crate) fn forecast(forecast: &Forecast) -> String {
    let Forecast { total_ms, wire_bytes, downtime_ms, .. } = forecast;
    let time = |ms: u64| time_ms(ms as f64);
    format!(
        "about {} ({} to {}), {}, pause {}",
        time(total_ms.likely),
        time(total_ms.low),
        time(total_ms.high),
        size(wire_bytes.likely),
        time(downtime_ms.likely)
    )
}

/// A report on one screen.
#[must_use]
pub(crate) fn report(report: &Report) -> String {
    let mut text = headline(report);
    let mut line = |label: &str, value: String| text.push_str(&format!("  {label:<18}{value}\n"));
    line("total", time_ms(report.total_ms as f64));
    if let Some(foreseen) = &report.forecast {
        line("foreseen", forecast(foreseen));
    }
    if let Some(downtime) = report.downtime_source_ms.or(report.downtime_ms) {
        let predicted = report.predicted_downtime_ms.map(|ms| format!(" (predicted {ms} ms)"));
        line("downtime", format!("{}{}", time_ms(downtime), predicted.unwrap_or_default()));
    }
    if report.throttled_ms > 0 {
        line("guest slowed", format!("for {}", time_ms(report.throttled_ms as f64)));
    }
    if let Some(round_trip) = report.round_trip_ms {
        line("round trip", time_ms(round_trip));
    }
    let average = report.wire_bytes.saturating_mul(1_000).checked_div(report.total_ms).unwrap_or(0);
    line("on the wire", format!("{} ({} on average)", size(report.wire_bytes), rate(average)));
    if report.reconnections > 0 {
        let again = size(report.repeated_bytes);
        line("link lost", format!("{} times; {again} were sent again", report.reconnections));
    }
    line("device state", size(report.device_state_bytes));
    line("passes", count(report.passes));
    line(
        "page versions",
        format!(
            "{} named, {} never sent because newer ones came, {} sent in the pause",
            count(report.versions_named),
            count(report.versions_coalesced),
            count(report.pages_in_pause)
        ),
    );
    if let Some(pages) = report.pages_verified {
        line("verified", format!("{} pages read again on both sides, all equal", count(pages)));
    }
    line(
        "this worker",
        format!("{:.1} s of CPU, {} of memory", report.cpu_seconds, size(report.peak_memory_bytes)),
    );
    text.push_str(&techniques(report));
    text
}

fn headline(report: &Report) -> String {
    let Report { machine, source, target, .. } = report;
    let detail = report.detail.as_deref().unwrap_or("no reason given");
    let place = report.machine_is_at.as_deref().map(|host| format!("; it is at {host}")).unwrap_or_default();
    match report.outcome {
        Outcome::Completed => format!("{machine} runs at {target} now (it came from {source})\n"),
        Outcome::Cancelled => format!("cancelled: {machine} goes on where it was{place}\n"),
        Outcome::Failed => format!("failed: {detail}{place}\n"),
        Outcome::Unsettled => format!("unsettled: {detail}{place}\n"),
    }
}

fn techniques(report: &Report) -> String {
    let forms = &report.techniques;
    let rows = [
        ("zero", forms.zero_pages, None),
        ("seen before", forms.reference_pages, None),
        ("of another guest", forms.shared_pages, None),
        ("partly seen", forms.partial_reference_pages, None),
        ("delta", forms.delta_pages, Some(forms.delta_bytes)),
        ("whole", forms.literal_pages, Some(forms.literal_bytes)),
    ];
    let pages: u64 = rows.iter().map(|row| row.1).sum();
    if pages == 0 {
        return String::new();
    }
    let rows = rows.map(|(name, number, bytes)| {
        let share = number as f64 / pages as f64;
        [
            format!("  {name}"),
            count(number),
            format!("{:.1} %", share * 100.0),
            bytes.map(size).unwrap_or_default(),
            bar(share, 24),
        ]
    });
    let sent = size(forms.batch_bytes);
    format!(
        "\n{}  all batches after compression: {sent}\n",
        table(["  PAGES SENT AS", "PAGES", "SHARE", "BEFORE ZSTD", ""], &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Techniques;

    #[test]
    fn columns_line_up() {
        let text = table(["A", "LONG"], &[["wide cell".into(), "x".into()]]);
        assert_eq!(text, "A          LONG\nwide cell  x\n");
    }

    #[test]
    fn a_bar_never_leaves_its_frame() {
        for share in [-1.0, 0.0, 0.3, 1.0, 7.0, f64::NAN] {
            assert!(bar(share, 10).chars().count() <= 10, "{share}");
        }
        assert_eq!(bar(0.5, 4), "██");
    }

    #[test]
    fn a_report_fits_on_a_screen() {
        let mut all = sample();
        all.pages_verified = Some(131_072);
        let text = report(&all);
        assert!(text.lines().count() <= 24, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
        assert!(text.starts_with("web1 runs at hostb now"));
    }

    #[test]
    fn a_failure_says_why_and_where_the_machine_is() {
        let failed = Report {
            outcome: Outcome::Failed,
            detail: Some("hostb has 200 MiB free".into()),
            machine_is_at: Some("hosta".into()),
            ..sample()
        };
        assert!(report(&failed).starts_with("failed: hostb has 200 MiB free; it is at hosta\n"));
    }

    fn sample() -> Report {
        Report {
            id: "5f2c9e01a7b3d846".into(),
            machine: "web1".into(),
            role: Role::Source,
            source: "hosta".into(),
            target: "hostb".into(),
            outcome: Outcome::Completed,
            detail: None,
            machine_is_at: Some("hostb".into()),
            total_ms: 14_200,
            downtime_ms: Some(9.5),
            downtime_source_ms: Some(19.0),
            resumed_unix_ms: None,
            round_trip_ms: Some(20.1),
            predicted_downtime_ms: Some(31),
            forecast: None,
            throttled_ms: 0,
            wire_bytes: 168_000_000,
            reconnections: 1,
            repeated_bytes: 300_000,
            techniques: Techniques {
                zero_pages: 60_000,
                reference_pages: 4_000,
                shared_pages: 300,
                partial_reference_pages: 900,
                delta_pages: 40_000,
                delta_bytes: 9_000_000,
                literal_pages: 30_000,
                literal_bytes: 120_000_000,
                batch_bytes: 150_000_000,
            },
            device_state_bytes: 41_000,
            passes: 20,
            versions_named: 213_000,
            versions_coalesced: 106_000,
            pages_in_pause: 120,
            peak_memory_bytes: 200 << 20,
            cpu_seconds: 4.2,
            pages_verified: None,
        }
    }
}
