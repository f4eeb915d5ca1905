//! The figures for people.

use std::fmt::Write as _;

use super::{PATTERNS, Pattern, Row, contender::Contender, image::Figures};

/// What is to be reached.
const THROUGHPUT_TARGET: f64 = 0.9;
const LATENCY_TARGET: f64 = 1.2;
const FIRST_TOUCH_TARGET: f64 = 0.8;
const IMPORT_TARGET: f64 = 0.5;
const START_TARGET: f64 = 1.5;
const SPACE_TARGET: f64 = 1.02;

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
pub(super) fn render(rows: &[Row], figures: Option<&Figures>, circumstances: &Circumstances) -> String {
    let Circumstances { machine, commit, daemon, fio, rounds, seconds } = circumstances;
    let mut text = format!(
        "# godwit's disks beside QEMU's\n\n\
         Written by `cargo xtask bench store`. {machine}; commit {commit}; {daemon}; {fio}. Medians of {rounds} turns of \
         {seconds} s, which the contenders took one after the other. fio asks all of them: godwit's server and \
         QEMU's daemon over NBD on a unix socket, *raw* is the file itself (io_uring). All files are in the host's page cache. \
         *qsd* is qemu-storage-daemon with threads, *qsd-uring* with io_uring: over a raw file where the disk was written before, \
         over a qcow2 where it is written for the first time. *Against* is the one of the two with more requests a second. \
         Aimed at: {THROUGHPUT_TARGET} of its requests a second, {LATENCY_TARGET} of its latency.\n\n\
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
            match best_rival(rows, pattern).filter(|_| contender == Contender::Godwit) {
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
    if let Some(figures) = figures {
        text.push_str(&images(figures));
    }
    text
}

/// What is told of disks that begin as images.
fn images(figures: &Figures) -> String {
    let verdict = |met: bool| if met { "met" } else { "not met" };
    let touch = figures.first_touch_mib_s / figures.file_mib_s;
    let import = figures.convert_qcow2_s.min(figures.convert_raw_s) / figures.import_s;
    let start = figures.start_large_ms / figures.start_small_ms;
    format!(
        "\n## Images\n\n\
         An image of 1 GiB of random bytes, raw, in a repository that is a directory.\n\n\
         | | godwit | QEMU | aimed at | |\n|---|---|---|---|---|\n\
         | reading each part of a new disk once, 256 KiB, queue of 4 | {:.0} MiB/s | {:.0} MiB/s by qemu-storage-daemon from \
         the image's file, {:.0} MiB/s from the file itself | {FIRST_TOUCH_TARGET} of the file: {touch:.2} | {} |\n\
         | bringing the image in, digests and zstd included | {:.1} s | {:.1} s for qemu-img convert to a raw file, {:.1} s to a qcow2 | \
         {IMPORT_TARGET} of its pace: {import:.2} | {} |\n\
         | until the first block of a new disk is read | {:.0} ms with an image of 1 GiB, {:.0} ms with one of 64 GiB | | \
         alike: {start:.2} | {} |\n\
         | space for what was written in blocks of 4 KiB, each once and nowhere in order | {:.3} of it | | {SPACE_TARGET} | {} |\n",
        figures.first_touch_mib_s,
        figures.daemon_mib_s,
        figures.file_mib_s,
        verdict(touch >= FIRST_TOUCH_TARGET),
        figures.import_s,
        figures.convert_raw_s,
        figures.convert_qcow2_s,
        verdict(import >= IMPORT_TARGET),
        figures.start_small_ms,
        figures.start_large_ms,
        verdict(start <= START_TARGET),
        figures.space_ratio,
        verdict(figures.space_ratio <= SPACE_TARGET),
    )
}

/// The figures of the rival with the most requests a second.
fn best_rival(rows: &[Row], pattern: &Pattern) -> Option<[f64; 4]> {
    let rivals = Contender::RIVALS.into_iter().filter_map(|rival| medians(rows, rival, pattern));
    rivals.max_by(|a, b| a[0].total_cmp(&b[0]))
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
