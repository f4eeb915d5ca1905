//! Contenders side by side, on a terminal or on a page.

use std::fmt::Write as _;

use super::summary::{Group, Row, Spread, Summary};

/// What a table tells of a contender.
pub(super) const COLUMNS: [&str; 10] = [
    "contender",
    "converged",
    "wire MB",
    "total s",
    "downtime ms",
    "beat gap ms",
    "guest progress",
    "forecast off by",
    "emulator CPU",
    "busy",
];

/// A contender's cells, as [`COLUMNS`] has them.
pub(super) fn cells(row: &Row) -> [String; COLUMNS.len()] {
    let figure =
        |spread: Option<Spread>, decimals| spread.map_or("–".into(), |spread| spread.shown(decimals));
    let share = |spread: Option<Spread>| {
        spread.map_or("–".into(), |spread| format!("{:.0} %", spread.median * 100.0))
    };
    let forecast = match (row.total_error, row.wire_error) {
        (None, None) => "–".to_owned(),
        (total, wire) => format!("{} time, {} bytes", share(total), share(wire)),
    };
    let worst = |spread: Spread| format!("; worst {}", spread.shown(1));
    let mark = if row.is_limited() { " *" } else { "" };
    [
        row.contender.name.to_owned(),
        format!("{}/{}", row.converged, row.rounds),
        figure(row.wire_mb, 1),
        figure(row.total_s, 1),
        figure(row.downtime_ms, 1) + &row.worst_downtime_ms.map(worst).unwrap_or_default(),
        figure(row.beat_gap_ms, 0),
        figure(row.progress, 3),
        forecast,
        share(row.emulator),
        share(row.busy) + mark,
    ]
}

/// Everything, for a terminal.
pub(super) fn render(summary: &Summary) -> String {
    let mut text = String::new();
    for group in &summary.groups {
        // Writing to a string doesn't fail.
        let _ = writeln!(text, "{}; medians (lowest–highest)", group.title());
        text.push_str(&aligned(group));
        if let Some(disturbance) = group.disturbance() {
            let _ = writeln!(text, "{disturbance}");
        }
        for line in group.responses().into_iter().chain(group.floor()) {
            let _ = writeln!(text, "{line}");
        }
        for verdict in group.verdicts() {
            let _ = writeln!(text, "{:<62}{:>9}  {verdict}", verdict.target.text, verdict.target.shown());
        }
        for line in group.better() {
            let _ = writeln!(text, "QEMU does better: {line}");
        }
        text.push('\n');
    }
    for verdict in &summary.foresight {
        let _ = writeln!(text, "{:<78}{:>9}  {verdict}", verdict.target.text, verdict.target.shown());
    }
    text
}

fn aligned(group: &Group) -> String {
    let mut lines = vec![COLUMNS.map(str::to_owned)];
    lines.extend(group.rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}
