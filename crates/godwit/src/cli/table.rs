//! All migrations of this host at once: a table that is redrawn where there is a terminal, else a line a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal,
    process::ExitCode,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::{signal::ctrl_c, time::sleep};

use super::{
    client::Client,
    exit::{self, Failure},
    watch::AGENT_PATIENCE,
};
use crate::{
    api::Migration,
    job::{Outcome, Phase, Report, Role, Techniques},
    output::{self, Output},
    quantity::{count, rate, size, time_ms},
};

/// How often the agent is asked.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// Rows that are kept; beyond them the oldest that are over go.
const ROWS_MAX: usize = 100;
/// Without a terminal, progress is worth a line each time so many more percent are settled.
const LINE_EVERY_PERCENT: u64 = 10;
const HEADER: [&str; 8] =
    ["MACHINE", "PEER", "STATE", "SETTLED", "RATE", "PAUSE NOW", "TIME LEFT", "ON THE WIRE"];

/// Shows what is under way until nothing is, or until the user has seen enough.
///
/// The exit code is that of the first migration that didn't do what it should.
///
/// # Errors
/// When the agent is away for longer than a restart takes.
pub(super) async fn watch(
    client: &Client,
    first: Vec<Migration>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let mut board = Board::new(&first);
    let mut view = View::new(output);
    tokio::select! {
        followed = follow(client, first, &mut board, &mut view) => followed?,
        _ = ctrl_c() => {
            view.end(&board);
            eprintln!("\nthe migrations go on; give one up: godwit cancel VM");
            return Ok(ExitCode::SUCCESS);
        }
    }
    view.end(&board);
    Ok(board.exit_code())
}

async fn follow(
    client: &Client,
    first: Vec<Migration>,
    board: &mut Board,
    view: &mut View,
) -> Result<(), Failure> {
    let mut newest = first;
    let mut answered_at = Instant::now();
    loop {
        let changed = board.update(newest);
        view.show(board, &changed);
        if board.is_over() {
            return Ok(());
        }
        newest = loop {
            sleep(ASK_EVERY).await;
            match client.get("/v1/migrations").await {
                Ok(newest) => break newest,
                // Migrations go on without their agent, which may be restarting.
                Err(failure) if failure.is_of_connection() && answered_at.elapsed() < AGENT_PATIENCE => {}
                Err(failure) => return Err(failure),
            }
        };
        answered_at = Instant::now();
    }
}

/// The migrations that were under way when the watching began, and those that began since; the oldest first.
#[derive(Debug)]
struct Board {
    over_before: BTreeSet<String>,
    rows: Vec<Migration>,
}

impl Board {
    fn new(first: &[Migration]) -> Self {
        let over = first.iter().filter(|migration| migration.report.is_some());
        Self { over_before: over.map(|migration| migration.id.clone()).collect(), rows: Vec::new() }
    }

    /// Takes in how all migrations stand, the newest first; those that changed.
    fn update(&mut self, newest: Vec<Migration>) -> Vec<Migration> {
        let known: BTreeSet<String> = newest.iter().map(|migration| migration.id.clone()).collect();
        self.rows.retain(|row| row.report.is_some() || known.contains(&row.id));
        let mut changed = Vec::new();
        for migration in newest.into_iter().rev().filter(|it| !self.over_before.contains(&it.id)) {
            match self.rows.iter_mut().find(|row| row.id == migration.id) {
                Some(row) if *row == migration => continue,
                Some(row) => *row = migration.clone(),
                None => self.rows.push(migration.clone()),
            }
            changed.push(migration);
        }
        while self.rows.len() > ROWS_MAX
            && let Some(over) = self.rows.iter().position(|row| row.report.is_some())
        {
            self.over_before.insert(self.rows.remove(over).id);
        }
        changed
    }

    fn is_over(&self) -> bool {
        self.rows.iter().all(|row| row.report.is_some())
    }

    fn exit_code(&self) -> ExitCode {
        let mut outcomes = self.rows.iter().filter_map(|row| row.report.as_ref()).map(|it| it.outcome);
        exit::of_outcome(outcomes.find(|it| *it != Outcome::Completed).unwrap_or(Outcome::Completed))
    }

    fn table(&self) -> String {
        output::table(HEADER, &self.rows.iter().map(cells).collect::<Vec<_>>())
    }

    /// In which form the pages travelled, of the migrations that are over and left this host; empty if there are none.
    fn techniques(&self) -> String {
        let reports = self.rows.iter().filter_map(|row| row.report.as_ref());
        let rows: Vec<_> =
            reports.filter(|it| it.techniques != Techniques::default()).map(technique_cells).collect();
        if rows.is_empty() {
            return String::new();
        }
        let header = [
            "MACHINE",
            "ZERO",
            "SEEN BEFORE",
            "OF ANOTHER",
            "PARTLY SEEN",
            "DELTA",
            "WHOLE",
            "SENT FOR ALL PAGES",
        ];
        output::table(header, &rows)
    }
}

/// How it is shown.
#[derive(Debug)]
enum View {
    /// Redrawn in place.
    Table(ProgressBar),
    /// A line where something happened, with what was last said of each migration.
    Lines(Output, BTreeMap<String, Mark>),
    /// Every change as an object of the API.
    Json(Output),
}

impl View {
    fn new(output: Output) -> Self {
        if output.json {
            return Self::Json(output);
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines(output, BTreeMap::new());
        }
        let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        Self::Table(ProgressBar::new_spinner().with_style(style))
    }

    fn show(&mut self, board: &Board, changed: &[Migration]) {
        match self {
            Self::Table(drawn) => {
                drawn.set_message(board.table().trim_end().to_owned());
                drawn.tick();
            }
            Self::Lines(output, said) => {
                for migration in changed {
                    let mark = Mark::of(migration);
                    if said.insert(migration.id.clone(), mark) != Some(mark) {
                        output.line(&line(migration));
                    }
                }
            }
            Self::Json(output) => {
                for migration in changed {
                    output.line(&serde_json::to_string(migration).unwrap_or_else(|error| error.to_string()));
                }
            }
        }
    }

    /// What stays to be read.
    fn end(&self, board: &Board) {
        match self {
            Self::Table(drawn) => {
                drawn.finish_and_clear();
                Output { json: false }.line(board.table().trim_end());
            }
            Self::Lines(..) => {}
            Self::Json(_) => return,
        }
        let techniques = board.techniques();
        if !techniques.is_empty() {
            Output { json: false }.line(&format!("\n{}", techniques.trim_end()));
        }
    }
}

/// What makes a line worth writing when it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    phase: Phase,
    is_silent: bool,
    settled_steps: u64,
    outcome: Option<Outcome>,
}

impl Mark {
    fn of(migration: &Migration) -> Self {
        Self {
            phase: migration.phase,
            is_silent: migration.progress.link_silent_ms.is_some(),
            settled_steps: settled_percent(migration).unwrap_or(0) / LINE_EVERY_PERCENT,
            outcome: migration.report.as_ref().map(|report| report.outcome),
        }
    }
}

/// A migration in one line, with what it consists of named.
fn line(migration: &Migration) -> String {
    let [machine, peer, state, settled, rate, pause, time, sent] = cells(migration);
    let words = match &migration.report {
        Some(_) => ["", " on average", "paused ", "in ", " sent"],
        None => [" settled", "", "pause now ", "left: ", " sent"],
    };
    let parts = [
        (&settled, format!("{settled}{}", words[0])),
        (&rate, format!("{rate}{}", words[1])),
        (&pause, format!("{}{pause}", words[2])),
        (&time, format!("{}{time}", words[3])),
        (&sent, format!("{sent}{}", words[4])),
    ];
    let said = parts.into_iter().filter(|(cell, _)| *cell != NOTHING).map(|(_, part)| part);
    [format!("{machine} {peer}: {state}")].into_iter().chain(said).collect::<Vec<_>>().join(", ")
}

/// In a cell of which nothing is known.
const NOTHING: &str = "–";

fn cells(migration: &Migration) -> [String; HEADER.len()] {
    let direction = if migration.role == Role::Source { "to" } else { "from" };
    let peer = format!("{direction} {}", migration.peer);
    let [state, settled, rate, pause, time, sent] = match &migration.report {
        Some(report) => ended(report),
        None => under_way(migration),
    };
    [migration.machine.clone(), peer, state, settled, rate, pause, time, sent]
}

fn under_way(migration: &Migration) -> [String; 6] {
    let progress = &migration.progress;
    let time = |ms: Option<u64>| ms.map_or_else(nothing, |ms| time_ms(ms as f64));
    let state = match (progress.link_silent_ms, progress.guest_share_percent) {
        (Some(ms), _) => format!("silent for {}", time_ms(ms as f64)),
        (None, Some(percent)) => format!("{}, guest at {percent} %", output::phase(migration.phase)),
        (None, None) => output::phase(migration.phase).to_owned(),
    };
    // Only the source knows more than the phase.
    let Some(percent) = settled_percent(migration) else {
        return [state, nothing(), nothing(), nothing(), nothing(), nothing()];
    };
    [
        state,
        format!("{percent} %"),
        rate(progress.rate_bytes_per_second),
        time(progress.predicted_downtime_ms),
        time(progress.predicted_remaining_ms),
        size(progress.wire_bytes),
    ]
}

/// Of what is over the same columns say what it was: the average rate, the pause, the time that it took.
fn ended(report: &Report) -> [String; 6] {
    let average = report.wire_bytes.saturating_mul(1_000).checked_div(report.total_ms);
    let sent = Some(report.wire_bytes).filter(|bytes| *bytes > 0);
    [
        output::outcome(report.outcome).to_owned(),
        nothing(),
        average.filter(|_| sent.is_some()).map_or_else(nothing, rate),
        report.downtime_source_ms.or(report.downtime_ms).map_or_else(nothing, time_ms),
        time_ms(report.total_ms as f64),
        sent.map_or_else(nothing, size),
    ]
}

fn nothing() -> String {
    NOTHING.to_owned()
}

fn settled_percent(migration: &Migration) -> Option<u64> {
    let progress = &migration.progress;
    progress.pages_settled.min(progress.pages_total).saturating_mul(100).checked_div(progress.pages_total)
}

fn technique_cells(report: &Report) -> [String; 8] {
    let forms = &report.techniques;
    let with_bytes = |pages, bytes| format!("{} ({})", count(pages), size(bytes));
    [
        report.machine.clone(),
        count(forms.zero_pages),
        count(forms.reference_pages),
        count(forms.shared_pages),
        count(forms.partial_reference_pages),
        with_bytes(forms.delta_pages, forms.delta_bytes),
        with_bytes(forms.literal_pages, forms.literal_bytes),
        size(forms.batch_bytes),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Progress;

    fn migration(id: &str, settled: u64) -> Migration {
        Migration {
            id: id.into(),
            machine: format!("vm-{id}"),
            role: Role::Source,
            peer: "hostb".into(),
            phase: Phase::PreCopy,
            progress: Progress {
                pages_settled: settled,
                pages_total: 1_000,
                wire_bytes: 50 << 20,
                rate_bytes_per_second: 10_000_000,
                predicted_downtime_ms: Some(48),
                predicted_remaining_ms: Some(9_000),
                ..Progress::default()
            },
            forecast: None,
            report: None,
        }
    }

    fn over(id: &str, outcome: Outcome) -> Migration {
        let report = serde_json::json!({
            "id": id, "machine": format!("vm-{id}"), "role": "source", "source": "hosta", "target": "hostb",
            "outcome": outcome, "total_ms": 10_000, "downtime_source_ms": 19.0, "wire_bytes": 12_500_000,
            "reconnections": 0, "repeated_bytes": 0, "techniques": Techniques { delta_pages: 5, ..Techniques::default() },
            "device_state_bytes": 0, "passes": 0, "versions_named": 0, "versions_coalesced": 0,
            "pages_in_pause": 0, "peak_memory_bytes": 0, "cpu_seconds": 0.0,
        });
        let report = Some(serde_json::from_value(report).unwrap());
        Migration { phase: Phase::Done, progress: Progress::default(), report, ..migration(id, 0) }
    }

    fn ids(migrations: &[Migration]) -> Vec<&str> {
        migrations.iter().map(|it| it.id.as_str()).collect()
    }

    #[test]
    fn what_was_over_before_is_not_shown_and_what_ends_stays() {
        let first = vec![migration("b", 1), migration("a", 1), over("old", Outcome::Failed)];
        let mut board = Board::new(&first);
        assert_eq!(ids(&board.update(first.clone())), ["a", "b"]);
        assert_eq!(board.update(first.clone()), []);
        let next = vec![migration("c", 0), migration("b", 2), over("a", Outcome::Completed)];
        assert_eq!(ids(&board.update(next)), ["a", "b", "c"]);
        assert!(!board.is_over());
        // The agent keeps only the newest; the board keeps what it showed.
        board.update(vec![over("c", Outcome::Completed), over("b", Outcome::Cancelled)]);
        assert_eq!(ids(&board.rows), ["a", "b", "c"]);
        assert!(board.is_over());
        assert_eq!(board.exit_code(), exit::of_outcome(Outcome::Cancelled));
    }

    #[test]
    fn a_migration_that_is_not_known_any_more_keeps_nobody_waiting() {
        let mut board = Board::new(&[]);
        board.update(vec![migration("a", 1)]);
        board.update(Vec::new());
        assert!(board.is_over());
    }

    #[test]
    fn rows_are_bounded_and_those_under_way_stay() {
        let mut board = Board::new(&[]);
        let mut all = vec![migration("under-way", 1)];
        all.extend((0..2 * ROWS_MAX).map(|number| over(&number.to_string(), Outcome::Completed)));
        board.update(all.clone());
        assert_eq!(board.rows.len(), ROWS_MAX);
        assert!(ids(&board.rows).contains(&"under-way"));
        assert_eq!(board.update(all), [], "what was dropped doesn't come back");
    }

    #[test]
    fn the_table_says_what_an_operator_waits_for() {
        let mut board = Board::new(&[]);
        let mut arriving = migration("c", 0);
        arriving.role = Role::Target;
        arriving.progress = Progress::default();
        board.update(vec![arriving, over("b", Outcome::Completed), migration("a", 425)]);
        let expected = "\
MACHINE  PEER        STATE      SETTLED  RATE       PAUSE NOW  TIME LEFT  ON THE WIRE
vm-a     to hostb    copying    42 %     80 Mbit/s  48 ms      9 s        50 MiB
vm-b     to hostb    completed  –        10 Mbit/s  19 ms      10 s       11.9 MiB
vm-c     from hostb  copying    –        –          –          –          –
";
        assert_eq!(board.table(), expected);
        assert!(board.techniques().contains("vm-b     0     0"), "{}", board.techniques());
        assert!(!board.techniques().contains("vm-a"));
    }

    #[test]
    fn a_line_is_written_when_something_happened() {
        let marks = |changes: &[Migration]| changes.iter().map(Mark::of).collect::<Vec<_>>();
        let mut silent = migration("a", 420);
        silent.progress.link_silent_ms = Some(2_000);
        let [same, other, silent, done] =
            [migration("a", 421), migration("a", 431), silent, over("a", Outcome::Completed)];
        let seen = marks(&[migration("a", 400), same, other, silent.clone(), done.clone()]);
        assert_eq!((seen[0], seen[1]), (seen[1], seen[2]), "nobody reads each percent");
        assert!(seen[2] != seen[3] && seen[3] != seen[4]);
        assert_ne!(Mark::of(&migration("a", 500)), seen[0]);
        assert_eq!(
            line(&migration("a", 420)),
            "vm-a to hostb: copying, 42 % settled, 80 Mbit/s, pause now 48 ms, left: 9 s, 50 MiB sent"
        );
        assert!(line(&silent).starts_with("vm-a to hostb: silent for 2 s, 42 % settled"));
        let mut slowed = migration("a", 420);
        slowed.progress.guest_share_percent = Some(40);
        assert!(line(&slowed).starts_with("vm-a to hostb: copying, guest at 40 %, 42 % settled"));
        assert_eq!(
            line(&done),
            "vm-a to hostb: completed, 10 Mbit/s on average, paused 19 ms, in 10 s, 11.9 MiB sent"
        );
    }
}
