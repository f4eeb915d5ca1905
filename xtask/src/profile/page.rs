//! A profile for people and for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::stages::{Profile, Row, per_gb};
use crate::contest::{GUEST_MEMORY_MB, cores::Busy};

const COLUMNS: [&str; 9] = [
    "host",
    "stage",
    "CPU s",
    "a GB of memory",
    "a GB on the wire",
    "through it, MB",
    "a GB through it",
    "roofline",
    "of",
];

/// What the columns mean.
const MEANING: &str = "\
*CPU s*: processor time in user and system mode of the stage's threads, by `/proc/PID/task/TID/schedstat`, from the request until \
half a second after the guest's arrival; the guest's own threads are left out, as are the command line and the emulated link. *A GB \
of memory*, *on the wire*, *through it*: the same seconds for each 10⁹ bytes of the guest's memory, of both interfaces' counters, and \
of what the stage works on: pages that QEMU named (pump, QEMU's stream), pages that were sent in whatever form (draft, decode and \
write), deltas and literals before compression (seal), batches (send), all that the session carried. *Roofline*: seconds for each \
10⁹ bytes through it that the stage's work takes at best on one core of the machine that the design was made on (Sapphire Rapids), \
and of what. Where there is none, nothing was measured then. What a socket costs beyond copying is in *send*'s, *session*'s and \
*pump*'s CPU s; the kernel's share of the network that runs in other threads' time is not.\n";

/// Under what circumstances the profile was made.
#[derive(Debug)]
pub(super) struct Circumstances {
    pub(super) workload: String,
    pub(super) link_mbit: u64,
    pub(super) rtt_ms: u64,
    pub(super) total_ms: f64,
    pub(super) downtime_ms: Option<f64>,
    pub(super) busy: Option<Busy>,
    pub(super) machine: String,
    pub(super) commit: String,
    pub(super) has_own_binary: bool,
}

/// The page.
pub(super) fn render(profile: &Profile, circumstances: &Circumstances) -> String {
    let Circumstances { workload, link_mbit, rtt_ms, machine, commit, .. } = circumstances;
    let binary =
        if circumstances.has_own_binary { " (godwit itself was given, and may be of another)" } else { "" };
    let mut text = format!(
        "# Where a migration's processor time goes\n\n\
         Written by `cargo xtask profile migrate`; one run. {machine}; commit {commit}{binary}. A guest of {GUEST_MEMORY_MB} MB \
         ({workload}) under TCG, on a core of its own, over {link_mbit} Mbit/s with a round trip of {rtt_ms} ms: {:.1} MB on the wire, \
         {:.1} s, a pause of {} ms.",
        profile.volumes.wire_bytes as f64 / 1e6,
        circumstances.total_ms / 1e3,
        circumstances.downtime_ms.map_or("unknown".into(), |pause| format!("{pause:.1}")),
    );
    if let Some(busy) = circumstances.busy {
        // Writing to a string doesn't fail.
        let _ = write!(
            text,
            " The other cores were busy for {:.0} % of the time, the emulated link included; what has nothing to do with it used \
             {:.0} % of the machine.",
            busy.all * 100.0,
            busy.foreign * 100.0
        );
    }
    format!("{text}\n\n{}\n{MEANING}", table(profile))
}

/// The stages, and all of them together.
pub(super) fn table(profile: &Profile) -> String {
    let mut text = line(&COLUMNS.map(str::to_owned)) + &line(&COLUMNS.map(|_| "---".to_owned()));
    profile.rows.iter().for_each(|row| text.push_str(&line(&cells(row, profile))));
    let blank = String::new;
    let [cpu, memory, wire] = shares(profile.cpu(), profile);
    text + &line(&[blank(), "together".into(), cpu, memory, wire, blank(), blank(), blank(), blank()])
}

/// The same for programs; what wasn't measured is null.
pub(super) fn figures(profile: &Profile, circumstances: &Circumstances) -> Value {
    let stage = |row: &Row| {
        json!({
            "host": row.host.name(),
            "stage": row.stage,
            "cpu_seconds": row.cpu.as_secs_f64(),
            "through_bytes": row.through_bytes,
            "seconds_per_gb_through": row.seconds_per_gb(),
            "roofline_seconds_per_gb": row.roofline.map(|roofline| roofline.seconds_per_gb),
        })
    };
    json!({
        "workload": circumstances.workload,
        "link_mbit": circumstances.link_mbit,
        "rtt_ms": circumstances.rtt_ms,
        "guest_mb": GUEST_MEMORY_MB,
        "wire_bytes": profile.volumes.wire_bytes,
        "total_ms": circumstances.total_ms,
        "downtime_ms": circumstances.downtime_ms,
        "cpu_seconds": profile.cpu().as_secs_f64(),
        "busy_share": circumstances.busy.map(|busy| busy.all),
        "foreign_cpu_share": circumstances.busy.map(|busy| busy.foreign),
        "machine": circumstances.machine,
        "commit": circumstances.commit,
        "stages": profile.rows.iter().map(stage).collect::<Vec<_>>(),
    })
}

fn cells(row: &Row, profile: &Profile) -> [String; COLUMNS.len()] {
    let figure = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.2}"));
    let [cpu, memory, wire] = shares(row.cpu, profile);
    let through = row.through_bytes.map_or("–".into(), |bytes| format!("{:.0}", bytes as f64 / 1e6));
    [
        row.host.name().to_owned(),
        row.stage.to_owned(),
        cpu,
        memory,
        wire,
        through,
        figure(row.seconds_per_gb()),
        figure(row.roofline.map(|roofline| roofline.seconds_per_gb)),
        row.roofline.map_or("–", |roofline| roofline.of).to_owned(),
    ]
}

/// Seconds; for each GB of memory; for each GB on the wire.
fn shares(cpu: std::time::Duration, profile: &Profile) -> [String; 3] {
    let each = |bytes| format!("{:.2}", per_gb(cpu, bytes));
    let volumes = profile.volumes;
    [format!("{:.2}", cpu.as_secs_f64()), each(volumes.memory_bytes), each(volumes.wire_bytes)]
}

fn line(cells: &[String; COLUMNS.len()]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::{super::stages::tests::profile, *};

    fn circumstances() -> Circumstances {
        Circumstances {
            workload: "medium".into(),
            link_mbit: 100,
            rtt_ms: 20,
            total_ms: 12_345.0,
            downtime_ms: Some(27.25),
            busy: Some(Busy { emulator: 0.2, all: 0.5, foreign: 0.02 }),
            machine: "2 cores".into(),
            commit: "abc".into(),
            has_own_binary: false,
        }
    }

    #[test]
    fn a_stage_stands_beside_its_roofline() {
        let page = render(&profile(), &circumstances());
        for expected in [
            "2 cores; commit abc. A guest of 512 MB (medium)",
            "107.0 MB on the wire, 12.3 s, a pause of 27.2 ms. The other cores were busy for 50 % of the time",
            "| a | seal | 1.00 | 1.86 | 9.35 | 201 | 4.98 | 2.10 | zstd 1,",
            "| b | agent | 0.03 | 0.06 | 0.28 | – | – | – | – |",
            "|  | together | 1.59 | 2.96 | 14.86 |",
        ] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
    }

    #[test]
    fn programs_read_the_same_figures() {
        let figures = figures(&profile(), &circumstances());
        let stages = figures["stages"].as_array().unwrap();
        let seal = stages.iter().find(|stage| stage["stage"] == "seal").unwrap();
        assert_eq!(seal["cpu_seconds"], 1.0);
        assert_eq!(
            (&figures["wire_bytes"], &figures["foreign_cpu_share"]),
            (&json!(107_000_000), &json!(0.02))
        );
        assert!(stages.iter().all(|stage| stage["stage"] != "guest"));
    }
}
