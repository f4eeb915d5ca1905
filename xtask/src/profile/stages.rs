//! What the threads are for, how much went through each stage, and what it would take at best.

use std::time::Duration;

use godwit_sim::lab::Place;
use serde_json::Value;

use super::sampler::{Program, Used};

const PAGE_BYTES: u64 = 4096;

/// A part of the work, and the threads that do it.
struct Stage {
    name: &'static str,
    host: Place,
    program: Program,
    /// Beginnings of threads' names; empty: all that no stage before has.
    threads: &'static [&'static str],
    /// What goes through it.
    through: Option<fn(&Volumes) -> u64>,
    roofline: Option<Roofline>,
}

/// What a stage takes at best on one core of the machine on which the design was made (a Sapphire Rapids), and what that
/// is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Roofline {
    pub(super) seconds_per_gb: f64,
    pub(super) of: &'static str,
}

const fn roofline(seconds_per_gb: f64, of: &'static str) -> Option<Roofline> {
    Some(Roofline { seconds_per_gb, of })
}

const NAMED: Option<fn(&Volumes) -> u64> = Some(|volumes| volumes.named_bytes);
const SENT: Option<fn(&Volumes) -> u64> = Some(|volumes| volumes.sent_bytes);
const SEALED: Option<fn(&Volumes) -> u64> = Some(|volumes| volumes.sealed_bytes);
const BATCHES: Option<fn(&Volumes) -> u64> = Some(|volumes| volumes.batch_bytes);
const PAYLOAD: Option<fn(&Volumes) -> u64> = Some(|volumes| volumes.payload_bytes);

/// In the order in which a page passes them. QEMU's threads of the guest's processors aren't the migration's.
const STAGES: [Stage; 17] = [
    Stage { threads: &["CPU "], ..others("guest", Place::A, Program::Qemu) },
    Stage {
        threads: &["mig/", "live_migration"],
        through: NAMED,
        roofline: roofline(0.09, "memcpy 11.2 GB/s"),
        ..others("QEMU: its stream", Place::A, Program::Qemu)
    },
    others("QEMU: the rest, the guest's devices included", Place::A, Program::Qemu),
    Stage {
        threads: &["pump"],
        through: NAMED,
        roofline: roofline(0.09, "memcpy 11.2 GB/s"),
        ..others("pump", Place::A, Program::Worker)
    },
    Stage {
        threads: &["draft"],
        through: SENT,
        roofline: roofline(0.36, "reading 5.9 GB/s; zero, keys and delta 5.3 GB/s"),
        ..others("draft", Place::A, Program::Worker)
    },
    Stage {
        threads: &["seal"],
        through: SEALED,
        roofline: roofline(2.1, "zstd 1, in batches of 64 KiB, 0.48 GB/s"),
        ..others("seal", Place::A, Program::Worker)
    },
    Stage { threads: &["send"], through: BATCHES, ..others("send", Place::A, Program::Worker) },
    Stage {
        threads: &["session"],
        through: PAYLOAD,
        ..others("session: TLS, TCP", Place::A, Program::Worker)
    },
    others("control and the rest", Place::A, Program::Worker),
    others("sample beforehand", Place::A, Program::Sample),
    others("agent", Place::A, Program::Agent),
    Stage {
        threads: &["session"],
        through: PAYLOAD,
        ..others("session: TLS, TCP", Place::B, Program::Worker)
    },
    Stage {
        threads: &["intake"],
        through: SENT,
        roofline: roofline(0.13, "writing 7.5 GB/s; decoding isn't in it"),
        ..others("decode and write", Place::B, Program::Worker)
    },
    others("control and the rest", Place::B, Program::Worker),
    Stage { threads: &["CPU "], ..others("guest", Place::B, Program::Qemu) },
    others("QEMU, the guest's devices included", Place::B, Program::Qemu),
    others("agent", Place::B, Program::Agent),
];
/// The stage of guests' own threads, which is left out.
const GUEST: &str = "guest";

const fn others(name: &'static str, host: Place, program: Program) -> Stage {
    Stage { name, host, program, threads: &[], through: None, roofline: None }
}

/// How much there was to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Volumes {
    pub(super) memory_bytes: u64,
    /// By the interfaces' counters.
    pub(super) wire_bytes: u64,
    /// Pages that QEMU named, again and again.
    pub(super) named_bytes: u64,
    /// Pages that were sent, in whatever form.
    pub(super) sent_bytes: u64,
    /// What of them was left to compress.
    pub(super) sealed_bytes: u64,
    /// Compressed.
    pub(super) batch_bytes: u64,
    /// All that the session carried.
    pub(super) payload_bytes: u64,
}

impl Volumes {
    /// From the source's report of a migration; what it lacks counts as nothing.
    pub(super) fn of(report: &Value, memory_bytes: u64, wire_bytes: u64) -> Volumes {
        let technique = |name: &str| report["techniques"][name].as_u64().unwrap_or(0);
        let pages = ["zero", "reference", "partial_reference", "shared", "delta", "literal"];
        let pages: u64 = pages.iter().map(|form| technique(&format!("{form}_pages"))).sum();
        Volumes {
            memory_bytes,
            wire_bytes,
            named_bytes: report["versions_named"].as_u64().unwrap_or(0) * PAGE_BYTES,
            sent_bytes: pages * PAGE_BYTES,
            sealed_bytes: technique("delta_bytes") + technique("literal_bytes"),
            batch_bytes: technique("batch_bytes"),
            payload_bytes: report["wire_bytes"].as_u64().unwrap_or(0),
        }
    }
}

/// What a stage took.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) host: Place,
    pub(super) stage: &'static str,
    pub(super) cpu: Duration,
    pub(super) through_bytes: Option<u64>,
    pub(super) roofline: Option<Roofline>,
}

impl Row {
    /// Seconds for each 10⁹ bytes that went through it.
    pub(super) fn seconds_per_gb(&self) -> Option<f64> {
        self.through_bytes.filter(|bytes| *bytes > 0).map(|bytes| per_gb(self.cpu, bytes))
    }
}

/// Seconds for each 10⁹ bytes.
pub(super) fn per_gb(cpu: Duration, bytes: u64) -> f64 {
    cpu.as_secs_f64() / (bytes as f64 / 1e9)
}

/// A migration's stages.
#[derive(Debug)]
pub(super) struct Profile {
    pub(super) rows: Vec<Row>,
    pub(super) volumes: Volumes,
}

impl Profile {
    /// Sums up threads by stage.
    pub(super) fn of(used: &[Used], volumes: Volumes) -> Profile {
        let mut rows: Vec<Row> = STAGES.iter().map(|stage| stage.row(&volumes)).collect();
        for thread in used {
            let stage = STAGES.iter().position(|stage| stage.has(thread));
            // Every program has a stage for all that no other has, where it runs at all.
            let row = stage.and_then(|stage| rows.get_mut(stage));
            row.into_iter().for_each(|row| row.cpu += thread.cpu);
        }
        rows.retain(|row| row.stage != GUEST);
        Profile { rows, volumes }
    }

    /// All stages together.
    pub(super) fn cpu(&self) -> Duration {
        self.rows.iter().map(|row| row.cpu).sum()
    }
}

impl Stage {
    fn has(&self, used: &Used) -> bool {
        let is_named = || self.threads.iter().any(|name| used.thread.starts_with(name));
        (self.host, self.program) == (used.host, used.program) && (self.threads.is_empty() || is_named())
    }

    fn row(&self, volumes: &Volumes) -> Row {
        Row {
            host: self.host,
            stage: self.name,
            cpu: Duration::ZERO,
            through_bytes: self.through.map(|through| through(volumes)),
            roofline: self.roofline,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn profile() -> Profile {
        let used = |host, program, thread: &str, cpu_ms| Used {
            host,
            program,
            thread: thread.into(),
            cpu: Duration::from_millis(cpu_ms),
        };
        let threads = [
            used(Place::A, Program::Qemu, "CPU 0/TCG", 9_000),
            used(Place::A, Program::Qemu, "mig/src/main", 300),
            used(Place::A, Program::Qemu, "qemu-system-x86", 40),
            used(Place::A, Program::Worker, "seal", 600),
            used(Place::A, Program::Worker, "seal", 400),
            used(Place::A, Program::Worker, "godwit", 20),
            used(Place::B, Program::Worker, "intake", 200),
            used(Place::B, Program::Agent, "tokio-runtime-w", 30),
        ];
        let report = json!({
            "versions_named": 100_000,
            "wire_bytes": 101_000_000,
            "techniques": { "zero_pages": 50_000, "literal_pages": 40_000, "delta_pages": 1_000,
                            "literal_bytes": 200_000_000, "delta_bytes": 1_000_000, "batch_bytes": 99_000_000 }
        });
        Profile::of(&threads, Volumes::of(&report, 512 << 20, 107_000_000))
    }

    #[test]
    fn threads_are_summed_up_by_stage_and_the_guest_s_own_left_out() {
        let profile = profile();
        let cpu_ms = |host, stage| {
            let row = profile.rows.iter().find(|row| (row.host, row.stage) == (host, stage)).unwrap();
            row.cpu.as_millis()
        };
        assert_eq!(cpu_ms(Place::A, "seal"), 1_000);
        assert_eq!(
            (
                cpu_ms(Place::A, "QEMU: its stream"),
                cpu_ms(Place::A, "QEMU: the rest, the guest's devices included")
            ),
            (300, 40)
        );
        assert_eq!(cpu_ms(Place::A, "control and the rest"), 20);
        assert_eq!((cpu_ms(Place::B, "agent"), cpu_ms(Place::A, "agent")), (30, 0));
        assert_eq!(profile.cpu(), Duration::from_millis(1_590));
    }

    #[test]
    fn what_went_through_a_stage_is_read_from_the_report() {
        let profile = profile();
        let seal = profile.rows.iter().find(|row| row.stage == "seal").unwrap();
        assert_eq!(seal.through_bytes, Some(201_000_000));
        assert!((seal.seconds_per_gb().unwrap() - 1.0 / 0.201).abs() < 1e-9);
        assert_eq!(profile.volumes.sent_bytes, 91_000 * PAGE_BYTES);
        let nothing = Volumes::of(&json!({}), 512 << 20, 0);
        assert_eq!(nothing.sent_bytes, 0);
        assert_eq!(Row { through_bytes: Some(0), ..seal.clone() }.seconds_per_gb(), None);
    }
}
