//! What is logged, to standard error: an agent's to a terminal or the journal, a worker's to the file that its agent gave
//! it.
//!
//! | where it goes | time | level | colours | the migration |
//! |---|---|---|---|---|
//! | a terminal | yes | a word | yes | where a line belongs to one |
//! | the journal | the journal's own | a word, and sd-daemon(3)'s number for `journalctl -p` | no | where a line belongs to one |
//! | a worker's file, or another | yes | a word | no | a worker's: on every line, whichever thread writes it |

use std::{fmt, io::IsTerminal, os::unix::fs::MetadataExt};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use crate::job::Job;

/// The variable that says how much is logged, in the syntax of `tracing_subscriber::EnvFilter`.
const LOG_VARIABLE: &str = "GODWIT_LOG";
/// Where systemd says which file its journal reads, as `device:inode` (systemd.exec(5)).
const JOURNAL_VARIABLE: &str = "JOURNAL_STREAM";

/// Logs what an agent does.
pub(crate) fn of_agent() {
    let lines = tracing_subscriber::fmt().with_env_filter(filter()).with_writer(std::io::stderr);
    if is_journal(std::env::var(JOURNAL_VARIABLE).ok().as_deref()) {
        lines.with_ansi(false).event_format(JournalLine::default()).init();
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).init();
    }
}

/// Logs what the worker of a migration does.
pub(crate) fn of_worker(job: &Job) {
    let lines = tracing_subscriber::fmt().with_env_filter(filter()).with_writer(std::io::stderr);
    lines.with_ansi(false).with_timer(LineStart::of(job)).init();
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"))
}

/// Whether standard error is what systemd's journal reads. The variable alone doesn't say so: a child inherits it even if
/// its standard error goes elsewhere.
fn is_journal(stream: Option<&str>) -> bool {
    let stderr = std::fs::metadata("/proc/self/fd/2").map(|file| format!("{}:{}", file.dev(), file.ino()));
    stream.is_some() && stderr.ok().as_deref() == stream
}

/// A line as the journal likes it: it keeps the time itself, and reads the level from the start.
#[derive(Debug)]
struct JournalLine(Format<Full, ()>);

impl Default for JournalLine {
    fn default() -> Self {
        Self(Format::default().without_time())
    }
}

impl JournalLine {
    fn number(level: Level) -> u8 {
        match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        }
    }
}

impl<S, N> FormatEvent<S, N> for JournalLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(line, "<{}>", Self::number(*event.metadata().level()))?;
        self.0.format_event(context, line, event)
    }
}

/// What every line of a worker begins with. A span would be left out by every thread and task that isn't told of it; a
/// worker has one migration, so that the line's start can name it.
#[derive(Debug)]
struct LineStart {
    migration: String,
}

impl LineStart {
    fn of(job: &Job) -> Self {
        // The same words as of the agent's span.
        let Job { id, spec, role, .. } = job;
        Self { migration: format!("migration{{id={id:?} machine={:?} role={role:?}}}:", spec.name) }
    }
}

impl FormatTime for LineStart {
    fn format_time(&self, line: &mut Writer<'_>) -> fmt::Result {
        SystemTime.format_time(line)?;
        write!(line, " {}", self.migration)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
        thread,
    };

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn the_journal_gets_levels_and_no_time() {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().with_writer(lines.clone()).with_ansi(false);
        tracing::subscriber::with_default(subscriber.event_format(JournalLine::default()).finish(), || {
            tracing::info_span!("migration", id = "5f2c").in_scope(|| tracing::warn!(peer = "b", "late"));
        });
        let text = lines.text();
        assert!(text.starts_with("<4> WARN migration{id=\"5f2c\"}: "), "{text:?}");
        assert!(text.ends_with("late peer=\"b\"\n"), "{text:?}");
    }

    #[test]
    fn every_line_of_a_worker_names_its_migration_whichever_thread_writes_it() {
        let lines = Lines::default();
        let timer = LineStart { migration: "migration{id=\"5f2c\"}:".into() };
        let subscriber =
            tracing_subscriber::fmt().with_writer(lines.clone()).with_ansi(false).with_timer(timer);
        let dispatch = tracing::Dispatch::new(subscriber.finish());
        let other = dispatch.clone();
        tracing::dispatcher::with_default(&dispatch, || tracing::info!("one"));
        thread::spawn(move || tracing::dispatcher::with_default(&other, || tracing::warn!("other")))
            .join()
            .unwrap();
        let text = lines.text();
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            let (time, rest) = line.split_once(' ').unwrap();
            assert!(time.ends_with('Z') && rest.starts_with("migration{id=\"5f2c\"}:"), "{line:?}");
        }
    }

    #[test]
    fn only_the_stream_that_is_named_is_the_journal() {
        let file = std::fs::metadata("/proc/self/fd/2").unwrap();
        assert!(is_journal(Some(&format!("{}:{}", file.dev(), file.ino()))));
        assert!(!is_journal(Some(&format!("{}:{}", file.dev(), file.ino() + 1))));
        assert!(!is_journal(Some("")) && !is_journal(None));
    }
}
