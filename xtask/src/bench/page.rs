//! The page that the docs keep: what was measured, on what, and what was to be reached.

use std::{collections::BTreeSet, fmt::Write as _, io::ErrorKind, path::Path};

use anyhow::{Context, Result};
use godwit_sim::lab::Wiring;

use super::{
    Request, USUAL_RATE_MBIT,
    ledger::Run,
    plan::{Plan, Rate},
    plot,
    summary::{Group, Summary, Verdict},
    table::{COLUMNS, cells},
};
use crate::{
    contest::{DOWNTIME_TARGET, Patience},
    provenance::{machine, said},
};

/// What the figures mean, and what isn't among them.
const MEANING: &str = "\
*Wire MB*: both directions, Ethernet headers included. *Total*: from the request until the guest runs at the target with \
all its memory. *Downtime*: STOP at the source to RESUME at the target, by the events of both QEMUs. *Beat gap*: the longest \
silence in the guest's beat of 10 ms, as a client heard it. *Guest progress*: the guest's writes a second during all of \
that, the pause included, over those of the five seconds before; real programs count what they do instead (transactions, \
changes, 32 KB compressed, answers). Where nothing is counted, as in `idle`, beats take their place, which says how long \
the guest stood still but not how fast it was. *Responses*: a client asks the web server for a page every 10 ms, each time \
over a new connection; the pause lasts from the last beat through the one host to the first through the other, and what was under way then is \
left out of the percentile. *Forecast off by*: \
median error of what was forecast before the first byte, against the time from the worker's start and the payload, both by \
godwit's own account. *Floor*: the different pages of the moved guest's memory, zeros left \
out, by zstd at the level with which godwit begins, 64 KiB at a time, worked out when the guest had arrived. *Emulator CPU*: \
what the emulated link used of a core. *Busy*: what \
it and the contender used of the cores that aren't the guest's. From 80 % on, or where something foreign used a quarter of \
the machine (\\*), the machine limited and not the link, and nothing is judged. More in [lab.md](../lab.md).\n\n\
A contender that didn't converge was given up; its figures are what it had cost by then, and but for a quick run it has no \
further turn. Auto-converge has turns where plain pre-copy doesn't converge. Post-copy's guest runs at the \
target long before its memory is there: its downtime says little, its progress until the last page says more, and it is \
nobody that pre-copy is held against.\n";

/// What several guests do, and what the seed's did.
const BUILD: &str = "\
The guests compile libcurl's examples together, again and again, by distcc with tcc: the first preprocesses and hands out over \
the guests' network, all compile. They were booted from one image, and all are moved at once, by as many commands. *Progress* is \
the build's, in objects a second, over the twenty seconds before; all guests' processors share the guests' core. *Total* reaches \
from the first request to the last guest's arrival, *downtime* is the median of the guests and the worst. *Beat gap* is the \
first guest's.\n\n\
The seed (wood, section 6.5.8, Figure 6.14): four guests of 1.7 GB that build a kernel together by distcc, over 465 Mbit/s and 27 \
ms, by plain pre-copy 13 GB, 245 s and pauses of 6.1 s on average; by CloudNet 4 GB (0.31), 87 s (0.36) and 3.1 s (0.51). That rival compresses nothing, as xbzrle doesn't in its first pass; held \
against multifd with zstd the same share is harder to reach.\n";

/// What a burst is, and what the seed's came to.
const BURST: &str = "\
A web server's guest leaves a host where it shares its core with a process that never rests, for one where it has its core to \
itself; what shares it ends when the guest has arrived. *On average*: all answers of five seconds before, of the move with its \
pause, and of five seconds afterwards.\n\n\
The seed (wood, section 6.5.4, Figure 6.8): TPC-W in a guest of 1.7 GB, over 85 Mbit/s and 27 ms, from one core to four. Plain \
pre-copy took 210 s, 2.2 GB and a pause of 2.2 s, answers 20 ms before, 52 ms during and 10 ms after; CloudNet 115 s (0.55), 1.5 \
GB (0.68) and 1 s (0.45). Its 52 ms are for the most part a disk written at both sites at once, which isn't part of this.\n";

/// What links faster than any relay are.
const STRAIGHT: &str = "\
Links of 1,000 Mbit/s and more without delay, and the unlimited one, are a veth pair from host to host, with the kernel's token \
bucket where there is a rate: no emulator takes part, and *wire MB* has one Ethernet, IP and TCP header for what the kernel cuts \
into up to 45 frames. On the unlimited link the processor is all that limits: whatever isn't the guest shares what cores the \
guest leaves, source, target and kernel alike. There godwit is held against QEMU with its own TLS, and *busy* is no reason not to \
judge; QEMU without TLS stands beside it.\n";

/// Targets that no column stands for yet.
const UNMEASURED: &str = "\
- KVM: there was none.
- QEMU 7.2: its emulator loses what a running guest writes (qemu-notes.md), so that godwit refuses to move a running one without \
KVM.\n";

/// Under what circumstances the runs were made.
#[derive(Debug)]
pub(super) struct Circumstances {
    command: String,
    is_quick: bool,
    patience: Patience,
    rounds: u32,
    guest_command: Option<String>,
    /// Memory of each guest, MB.
    guest_mb: String,
    has_several_guests: bool,
    is_burst: bool,
    has_straight_links: bool,
    machine: String,
    commits: String,
    guest_has_core: bool,
    /// The program was built elsewhere.
    has_own_binary: bool,
}

impl Circumstances {
    pub(super) fn of(request: &Request, plan: &Plan, runs: &[Run], guest_has_core: bool) -> Circumstances {
        let mut command = "cargo xtask bench migrate".to_owned();
        for (flag, is_set) in [
            (" --quick", request.quick),
            (" --sweep", request.sweep),
            (" --techniques", request.techniques),
            (" --burst", request.burst),
        ] {
            command.push_str(if is_set { flag } else { "" });
        }
        if !request.guests.is_empty() {
            let guests: Vec<String> = request.guests.iter().map(u8::to_string).collect();
            command.push_str(&format!(" --guests {}", guests.join(",")));
        }
        if request.rate != Rate::MegabitsPerSecond(USUAL_RATE_MBIT) {
            command.push_str(&format!(" --rate {}", request.rate));
        }
        if let Some(round_trip_ms) = request.round_trip {
            command.push_str(&format!(" --round-trip {round_trip_ms}"));
        }
        if request.loss > 0 {
            command.push_str(&format!(" --loss {}", request.loss));
        }
        if !request.guest_mb.is_empty() {
            command.push_str(&format!(" --guest-mb {}", sizes(plan)));
        }
        let commits: BTreeSet<&str> = runs.iter().map(|run| run.commit.as_str()).collect();
        Circumstances {
            command,
            is_quick: request.quick,
            patience: plan.patience(),
            rounds: plan.rounds,
            guest_command: plan.guest_command.clone(),
            guest_mb: sizes(plan),
            has_several_guests: !request.guests.is_empty(),
            is_burst: request.burst,
            has_straight_links: plan
                .fields
                .iter()
                .any(|field| matches!(field.link.wiring(), Wiring::Straight { .. })),
            machine: machine(),
            commits: commits.into_iter().collect::<Vec<_>>().join(", "),
            guest_has_core,
            has_own_binary: request.binary.is_some(),
        }
    }

    fn described(&self) -> String {
        let kind = if self.is_quick { "**This is a quick run.** " } else { "" };
        let core = if self.guest_has_core {
            "The guest (QEMU's threads of its processors and its main loop) has a core of its own, by affinity, for every \
             contender; all else shares the others, the emulated link included."
        } else {
            "The machine has one core; the guest shares it with everything else."
        };
        let binary =
            if self.has_own_binary { " (godwit itself was given, and may be of another)" } else { "" };
        let guest = match &self.guest_command {
            Some(command) => format!("The guest runs `{command}` again and again. "),
            None => String::new(),
        };
        format!(
            "{kind}Written by `{}`; {} rounds in turns, medians with the lowest and highest.\n\n\
             {}; commit {}{binary}; QEMU {} under TCG on both sides; {} of {} MB, godwit aiming at a pause of \
             {} ms. {guest}{core}\n",
            self.command,
            self.rounds,
            self.machine,
            self.commits,
            qemu_version(),
            if self.has_several_guests { "guests" } else { "a guest" },
            self.guest_mb,
            DOWNTIME_TARGET.as_millis(),
        )
    }
}

/// All sizes of guests, the smallest first.
fn sizes(plan: &Plan) -> String {
    let sizes: BTreeSet<u64> = plan.fields.iter().map(|field| field.guest_mb).collect();
    sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

/// Writes the page, and the plot beside it.
///
/// # Errors
/// When a file can't be written.
pub(super) fn write(path: &Path, summary: &Summary, circumstances: &Circumstances) -> Result<()> {
    let plot = path.with_extension("svg");
    let reasons = read_reasons(&path.with_extension("reasons.md"))?;
    let name = plot.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for (path, text) in
        [(path, render(summary, circumstances, &name, &reasons)), (plot.as_path(), plot::render(summary))]
    {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// What people add to a page, from a file beside it, so that writing the page again doesn't lose it; empty if there is none.
fn read_reasons(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("cannot read {}", path.display())),
    }
}

fn render(summary: &Summary, circumstances: &Circumstances, plot: &str, reasons: &str) -> String {
    let mut text = format!("# Migrations: godwit beside QEMU\n\n{}\n", circumstances.described());
    // Writing to a string doesn't fail.
    if !reasons.is_empty() {
        let _ = writeln!(text, "{reasons}");
    }
    let _ = writeln!(text, "![medians and spreads]({plot})\n\n{MEANING}");
    let conditions = [
        (circumstances.has_several_guests, BUILD),
        (circumstances.is_burst, BURST),
        (circumstances.has_straight_links, STRAIGHT),
    ];
    for (_, words) in conditions.iter().filter(|(applies, _)| *applies) {
        let _ = writeln!(text, "{words}");
    }
    summary.groups.iter().for_each(|group| text.push_str(&section(group)));
    text.push_str(&foresight(summary));
    text.push_str("## Contenders\n\n| contender | what it is |\n|---|---|\n");
    let mut told = BTreeSet::new();
    for row in summary.groups.iter().flat_map(|group| &group.rows) {
        if told.insert(row.contender.name) {
            let _ = writeln!(
                text,
                "| {} | {} |",
                row.contender.name,
                row.contender.describe(circumstances.patience)
            );
        }
    }
    let _ = write!(text, "\n## Not measured yet\n\n{UNMEASURED}");
    text
}

fn section(group: &Group) -> String {
    let mut text = format!("## {}\n\n", group.title());
    text.push_str(&line(&COLUMNS));
    text.push_str(&line(&COLUMNS.map(|_| "---")));
    group.rows.iter().for_each(|row| text.push_str(&line(&cells(row))));
    if let Some(disturbance) = group.disturbance() {
        text.push_str(&format!("\n**Beware:** {disturbance}.\n"));
    }
    let notes: Vec<String> = group.responses().into_iter().chain(group.floor()).collect();
    if !notes.is_empty() {
        text.push('\n');
        notes.iter().for_each(|line| text.push_str(&format!("- {line}\n")));
    }
    let verdicts = group.verdicts();
    if !verdicts.is_empty() {
        text.push_str(&targets(&verdicts));
    }
    let better = group.better();
    if !better.is_empty() {
        text.push_str("\nWhat QEMU does better:\n\n");
        better.iter().for_each(|line| text.push_str(&format!("- {line}\n")));
    }
    text + "\n"
}

/// Nothing where nothing was forecast.
fn foresight(summary: &Summary) -> String {
    if summary.foresight.is_empty() {
        return String::new();
    }
    let head = "## Foresight\n\nAll workloads of this page, godwit as it comes; every forecast was made before the first byte, \
                by an agent without a history.\n";
    format!("{head}{}\n", targets(&summary.foresight))
}

fn targets(verdicts: &[Verdict]) -> String {
    let told =
        |verdict: &Verdict| line(&[verdict.target.text.clone(), verdict.target.shown(), verdict.to_string()]);
    let lines: String = verdicts.iter().map(told).collect();
    format!("\n| target | value | |\n|---|---|---|\n{lines}")
}

fn line<T: AsRef<str>>(cells: &[T]) -> String {
    let cells: Vec<&str> = cells.iter().map(AsRef::as_ref).collect();
    format!("| {} |\n", cells.join(" | "))
}

fn qemu_version() -> String {
    let banner = said("qemu-system-x86_64", &["--version"]).unwrap_or_default();
    banner.split_whitespace().nth(3).unwrap_or("unknown").to_owned()
}

#[cfg(test)]
mod tests {
    use super::{
        super::summary::tests::{summary, three},
        *,
    };
    use crate::contest::Range;

    #[test]
    fn a_page_tells_what_was_reached_and_what_was_not() {
        let mut runs = three("godwit", [100, 90, 110]);
        runs[0].predicted_wire_range_bytes = Some(Range { low: 90, likely: 100, high: 110 });
        runs[0].reported_wire_bytes = Some(125);
        runs.extend(three("qemu-xbzrle", [300, 290, 310]));
        runs.extend(three("qemu-postcopy", [80, 80, 80]));
        let circumstances = Circumstances {
            command: "cargo xtask bench migrate --quick".into(),
            is_quick: true,
            patience: Patience { at_most: std::time::Duration::from_secs(60), times: 1 },
            rounds: 3,
            guest_command: None,
            guest_mb: "512".into(),
            has_several_guests: false,
            is_burst: false,
            has_straight_links: false,
            machine: "2 cores".into(),
            commits: "abc".into(),
            guest_has_core: true,
            has_own_binary: false,
        };
        let page = render(&summary(&runs), &circumstances, "migrate.svg", "- *Why*: so.\n");
        assert!(!page.contains("distcc") && !page.contains("veth"));
        for expected in [
            "**This is a quick run.**",
            "2 cores; commit abc; QEMU",
            "- *Why*: so.",
            "## medium, 100 Mbit/s, 20 ms",
            "| godwit | 3/3 | 100.0 (90.0–110.0) | 8.0 (7.2–8.8) |",
            "| bytes on the wire: at most 0.5 of qemu-xbzrle's | 0.33 | met |",
            "| bytes on the wire: at most 1.1 of the floor, 90.0 MB | 1.11 | NOT MET |",
            "| downtime: at most 0.2 of qemu-xbzrle's | 0.33 | NOT MET |",
            "| forecast of bytes, 1 runs: outcomes within the interval, at least 0.9 | 0.00 | NOT MET |",
            "- qemu-postcopy: bytes on the wire 80.0 MB, godwit 100.0 MB",
            "| qemu-postcopy | `postcopy-ram`; given up after 60 s |",
        ] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
    }
}
