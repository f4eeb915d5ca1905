//! `godwit history`: what migrations were thought to take, beside what they took.

use std::process::ExitCode;

use godwit_migration::forecast::Score;

use super::{client::Client, exit::Failure};
use crate::{
    api::{History, HistoryEntry, HistoryScore},
    job::Range,
    output::{Output, table},
    quantity::{size, time_ms},
};

/// Shows the history.
pub(super) async fn run(client: &Client, output: Output) -> Result<ExitCode, Failure> {
    let history: History = client.get("/v1/history").await?;
    output.answer(&history, show);
    Ok(ExitCode::SUCCESS)
}

fn show(history: &History) -> String {
    if history.entries.is_empty() {
        return "no machine has left this host yet".to_owned();
    }
    let rows: Vec<_> = history.entries.iter().map(row).collect();
    let header = ["ID", "MACHINE", "TO", "TOTAL", "FORESEEN", "ON THE WIRE", "FORESEEN", "PAUSE", "FORESEEN"];
    let HistoryScore { total, bytes, downtime } = &history.score;
    let scores = [("total", total), ("on the wire", bytes), ("pause", downtime)];
    let scores: String = scores.iter().map(|(name, score)| line(name, score)).collect();
    format!("{}\n{scores}", table(header, &rows))
}

fn row(entry: &HistoryEntry) -> [String; 9] {
    let time = |ms: u64| time_ms(ms as f64);
    let foreseen = |range: Option<Range>, unit: fn(u64) -> String| {
        range.map_or_else(|| "-".to_owned(), |range| between(range, unit))
    };
    let forecast = entry.forecast.as_ref();
    [
        entry.id.clone(),
        entry.machine.clone(),
        entry.peer.clone(),
        time(entry.total_ms),
        foreseen(forecast.map(|it| it.total_ms), time),
        size(entry.wire_bytes),
        foreseen(forecast.map(|it| it.wire_bytes), size),
        entry.downtime_ms.map_or_else(|| "-".to_owned(), time_ms),
        foreseen(forecast.map(|it| it.downtime_ms), time),
    ]
}

/// A range in words: what is likely, and the two ends.
pub(super) fn between(range: Range, unit: fn(u64) -> String) -> String {
    format!("{} ({} to {})", unit(range.likely), unit(range.low), unit(range.high))
}

fn line(name: &str, score: &Score) -> String {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    format!(
        "{name}: median error {}, {} of {} within their interval (median width {})\n",
        percent(score.median_error),
        percent(score.coverage),
        score.count,
        percent(score.median_width),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_says_all_three() {
        let range = Range { low: 9_000, likely: 12_000, high: 14_500 };
        assert_eq!(between(range, |ms| time_ms(ms as f64)), "12 s (9 s to 14.5 s)");
    }
}
