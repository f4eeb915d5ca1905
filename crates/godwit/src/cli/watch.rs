//! Watching a migration: a progress bar for people, one JSON event a line for programs.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::{signal::ctrl_c, time::sleep};

use super::{client::Client, exit::Failure};
use crate::{
    api::Migration,
    job::{Event, Happening, Phase, Progress, Report},
    output::{self, Output},
    quantity::{rate, size, time_ms},
};

/// After the events have ended, the agent puts the host in order before it shows the report.
const REPORT_POLL: Duration = Duration::from_millis(50);
/// A worker that hasn't begun to listen has no events yet.
const EVENTS_POLL: Duration = Duration::from_millis(200);

/// How long an agent that was there may be away.
pub(super) const AGENT_PATIENCE: Duration = Duration::from_secs(30);
/// What is owed is counted in pages.
const PAGE_BYTES: u64 = 4096;

/// Why watching ended.
#[derive(Debug)]
pub(super) enum Watched {
    /// The migration ended.
    Ended(Box<Report>),
    /// Ctrl-C: only the watching ended.
    Left,
}

/// Watches until the migration has ended or the user has seen enough.
pub(super) async fn to_the_end(
    client: &Client,
    migration: &Migration,
    output: Output,
    as_events: bool,
) -> Result<Watched, Failure> {
    let mut view = View::new(output, as_events, migration);
    tokio::select! {
        report = follow(client, &migration.id, &mut view) => report.map(|report| Watched::Ended(Box::new(report))),
        _ = ctrl_c() => Ok(Watched::Left),
    }
}

async fn follow(client: &Client, id: &str, view: &mut View) -> Result<Report, Failure> {
    let mut seen = 0;
    let mut answered_at = Instant::now();
    loop {
        match watch(client, id, view, &mut seen).await {
            Ok(Migration { report: Some(report), .. }) => {
                view.end();
                return Ok(report);
            }
            Ok(migration) => {
                answered_at = Instant::now();
                sleep(if migration.phase == Phase::Done { REPORT_POLL } else { EVENTS_POLL }).await;
            }
            // A migration goes on without its agent, which may be restarting.
            Err(failure) if failure.is_of_connection() && answered_at.elapsed() < AGENT_PATIENCE => {
                sleep(EVENTS_POLL).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Shows the events that weren't shown yet, until their stream ends; how the migration stands then.
async fn watch(client: &Client, id: &str, view: &mut View, seen: &mut usize) -> Result<Migration, Failure> {
    let mut events = client.events(id).await?;
    // Each stream begins with the first event.
    let mut index = 0;
    while let Some(event) = events.next().await? {
        index += 1;
        if index > *seen {
            *seen = index;
            view.show(&event);
        }
    }
    client.get(&format!("/v1/migrations/{id}")).await
}

/// What is shown while it goes on.
#[derive(Debug)]
enum View {
    /// A bar; hidden by itself where standard error is no terminal.
    Bar(ProgressBar),
    /// Events as they come.
    Events(Output),
    /// Nothing: only the report is wanted.
    Quiet,
}

impl View {
    fn new(output: Output, as_events: bool, migration: &Migration) -> Self {
        match (output.json, as_events) {
            (true, true) => Self::Events(output),
            (true, false) => Self::Quiet,
            (false, _) => Self::Bar(bar(&migration.machine, &migration.peer)),
        }
    }

    fn show(&self, event: &Event) {
        match self {
            Self::Events(output) => {
                output.line(&serde_json::to_string(event).unwrap_or_else(|error| error.to_string()));
            }
            Self::Bar(bar) => match &event.what {
                Happening::Phase { phase } => bar.set_prefix(output::phase(*phase)),
                Happening::Progress(progress) => {
                    bar.set_length(progress.pages_total);
                    bar.set_position(progress.pages_settled.min(progress.pages_total));
                    bar.set_message(line(progress));
                }
                Happening::Warning { message } => bar.suspend(|| eprintln!("godwit: {message}")),
                Happening::Ready | Happening::Finished(_) => {}
            },
            Self::Quiet => {}
        }
    }

    fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn bar(machine: &str, peer: &str) -> ProgressBar {
    let template =
        format!("{machine} → {peer}  {{prefix:14}} {{bar:24}} {{percent:>3}} %  {{elapsed}}\n  {{wide_msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(1).with_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
    bar.set_prefix(output::phase(Phase::Preparing));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn line(progress: &Progress) -> String {
    let mut parts = Vec::new();
    parts.extend(progress.link_silent_ms.map(|ms| format!("nothing heard for {}", time_ms(ms as f64))));
    parts.extend(progress.guest_share_percent.map(|percent| format!("guest slowed to {percent} %")));
    parts.extend(progress.predicted_remaining_ms.map(|ms| format!("{} left", time_ms(ms as f64))));
    parts.extend(progress.predicted_downtime_ms.map(|ms| format!("pause now {}", time_ms(ms as f64))));
    parts.push(rate(progress.rate_bytes_per_second));
    parts.push(format!("{} sent", size(progress.wire_bytes)));
    parts.push(format!("{} owed", size(progress.pages_owed.saturating_mul(PAGE_BYTES))));
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_an_operator_waits_for() {
        let progress = Progress {
            pages_owed: 1_000,
            wire_bytes: 50 << 20,
            rate_bytes_per_second: 10_000_000,
            predicted_downtime_ms: Some(48),
            predicted_remaining_ms: Some(9_000),
            ..Progress::default()
        };
        assert_eq!(line(&progress), "9 s left · pause now 48 ms · 80 Mbit/s · 50 MiB sent · 3.91 MiB owed");
    }
}
