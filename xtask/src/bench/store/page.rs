//! The figures for people.

use std::fmt::Write as _;

use super::{PATTERNS, Pattern, Row, contender::Contender};

/// What is to be reached.
const THROUGHPUT_TARGET: f64 = 0.9;
const LATENCY_TARGET: f64 = 1.2;

/// Under what circumstances the figures were made.
#[derive(Debug)]
pub(super) struct Circumstances {
    pub(super) machine: String,
    pub(super) commit: String,
    pub(super) daemon: String,
    pub(super) fio: String,
    pub(super) rounds: u32,
    pub(super) seconds: u32,
}

/// The page.
pub(super) fn render(rows: &[Row], circumstances: &Circumstances) -> String {
    let Circumstances { machine, commit, daemon, fio, rounds, seconds } = circumstances;
    let mut text = format!(
        "# godwit's disks beside QEMU's\n\n\
         Written by `cargo xtask bench store`. {machine}; commit {commit}; {daemon}; {fio}. Medians of {rounds} turns of \
         {seconds} s, which the contenders took one after the other. fio asks all of them: godwit's server and \
         qemu-storage-daemon over NBD on a unix socket, *raw* is the file itself (io_uring). All files are in the host's page cache. \
         *Against* is the better of QEMU's two: over a raw file where the disk was written before, over a qcow2 where it is \
         written for the first time. Aimed at: {THROUGHPUT_TARGET} of its requests a second, {LATENCY_TARGET} of its latency.\n\n\
         | pattern | queue | contender | a second | MiB/s | p50 µs | p99 µs | requests against | latency against | |\n\
         |---|---|---|---|---|---|---|---|---|---|\n"
    );
    for pattern in &PATTERNS {
        for contender in Contender::ALL {
            let Some(own) = medians(rows, contender, pattern) else { continue };
            let _ = write!(
                text,
                "| {} | {} | {} | {:.0} | {:.0} | {:.1} | {:.1} |",
                pattern.name,
                pattern.queue_depth,
                contender.name(),
                own[0],
                own[1],
                own[2],
                own[3]
            );
            let rival = if pattern.filled { Contender::DaemonRaw } else { Contender::DaemonQcow2 };
            match medians(rows, rival, pattern).filter(|_| contender == Contender::Godwit) {
                Some(rival) => {
                    let (requests, latency) = (own[0] / rival[0], own[2] / rival[2]);
                    let met = requests >= THROUGHPUT_TARGET && latency <= LATENCY_TARGET;
                    let verdict = if met { "met" } else { "not met" };
                    let _ = writeln!(text, " {requests:.2} | {latency:.2} | {verdict} |");
                }
                None => text.push_str(" | | |\n"),
            }
        }
    }
    text
}

/// Requests a second, MiB/s, and the latencies at 50 and 99 %.
fn medians(rows: &[Row], contender: Contender, pattern: &Pattern) -> Option<[f64; 4]> {
    let is_of = |row: &&Row| {
        row.contender == contender.name()
            && row.pattern == pattern.name
            && row.queue_depth == pattern.queue_depth
    };
    let rows: Vec<_> = rows.iter().filter(is_of).map(|row| row.measured).collect();
    let median = |of: fn(&super::Measured) -> f64| {
        let mut values: Vec<f64> = rows.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Some([median(|it| it.iops)?, median(|it| it.mib_s)?, median(|it| it.p50_us)?, median(|it| it.p99_us)?])
}
