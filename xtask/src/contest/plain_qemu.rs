//! QEMU migrates by itself, over TCP, as its documentation has it, or through a compressor that the operator put between.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    lab::{Place, Process},
    observer::BeatListener,
    qmp::{Event, Qmp},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    DOWNTIME_TARGET, Outcome, Patience, Span, Stage,
    tls::{self, Credentials},
    watch::{Watch, milliseconds},
};

/// The first guest's; the others' follow.
const MIGRATION_PORT: u16 = 4444;
/// More than any link here; QEMU's default would limit a link of 1 Gbit/s.
const UNLIMITED_BYTES_PER_SECOND: u64 = 10_000_000_000;
const XBZRLE_CACHE_BYTES: u64 = 256 << 20;
const START_LIMIT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One way to have QEMU migrate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// Capabilities, switched on at both ends.
    capabilities: &'static [&'static str],
    /// Parameters, set at both ends.
    parameters: &'static [(&'static str, Setting)],
    channel: Channel,
    /// Every connection is encrypted, and both ends show certificates.
    pub(super) tls: bool,
    /// The guest goes on at the target after the first pass; the rest of its memory follows.
    pub(super) postcopy: bool,
    /// When to give up.
    limit: Duration,
}

/// The value of a migration parameter.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(untagged)]
enum Setting {
    Number(u64),
    Word(&'static str),
}

/// What the stream goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Tcp,
    /// `zstd -1` and netcat, in a pipe at each end.
    ZstdPipe,
}

const CACHE: (&str, Setting) = ("xbzrle-cache-size", Setting::Number(XBZRLE_CACHE_BYTES));
const CHANNELS: (&str, Setting) = ("multifd-channels", Setting::Number(2));

/// As it comes.
pub(super) const PRECOPY: Way = Way {
    capabilities: &[],
    parameters: &[],
    channel: Channel::Tcp,
    tls: false,
    postcopy: false,
    limit: Duration::from_secs(60),
};
/// The guest is slowed until it dirties less than the link carries.
pub(super) const AUTO_CONVERGE: Way =
    Way { capabilities: &["auto-converge"], limit: Duration::from_secs(120), ..PRECOPY };
/// With deltas against a cache that holds the working set twice.
pub(super) const XBZRLE: Way =
    Way { capabilities: &["xbzrle"], parameters: &[CACHE], limit: Duration::from_secs(120), ..PRECOPY };
/// The same, and asked for the pause that godwit aims at.
pub(super) const XBZRLE_DOWNTIME: Way = Way {
    parameters: &[CACHE, ("downtime-limit", Setting::Number(DOWNTIME_TARGET.as_millis() as u64))],
    ..XBZRLE
};
/// Over two connections.
pub(super) const MULTIFD: Way = Way { capabilities: &["multifd"], parameters: &[CHANNELS], ..PRECOPY };
/// Over two connections, compressed.
pub(super) const MULTIFD_ZSTD: Way = Way {
    parameters: &[CHANNELS, ("multifd-compression", Setting::Word("zstd"))],
    limit: Duration::from_secs(120),
    ..MULTIFD
};
/// As it comes, encrypted.
pub(super) const PRECOPY_TLS: Way = Way { tls: true, ..PRECOPY };
/// Over two connections, encrypted.
pub(super) const MULTIFD_TLS: Way = Way { tls: true, ..MULTIFD };
/// Compressed outside QEMU.
pub(super) const ZSTD_PIPE: Way =
    Way { channel: Channel::ZstdPipe, limit: Duration::from_secs(120), ..PRECOPY };
/// Deltas, compressed outside QEMU.
pub(super) const XBZRLE_ZSTD_PIPE: Way = Way { channel: Channel::ZstdPipe, ..XBZRLE };
/// One pass, then the guest goes on at the target and fetches what it lacks.
pub(super) const POSTCOPY: Way = Way {
    capabilities: &["postcopy-ram", "events"],
    postcopy: true,
    limit: Duration::from_secs(120),
    ..PRECOPY
};

impl Way {
    /// What it is, in a line for people.
    pub(super) fn describe(&self, patience: Patience) -> String {
        let capabilities =
            self.capabilities.iter().filter(|name| **name != "events").map(|name| format!("`{name}`"));
        let parameters = self.parameters.iter().map(|(name, setting)| match setting {
            Setting::Number(number) => format!("`{name}` {number}"),
            Setting::Word(word) => format!("`{name}` {word}"),
        });
        let channel = (self.channel == Channel::ZstdPipe).then(|| "through `zstd -1`".to_owned());
        let tls = self.tls.then(|| "QEMU's own TLS with certificates on both sides".to_owned());
        let parts: Vec<String> = capabilities.chain(parameters).chain(channel).chain(tls).collect();
        let what = if parts.is_empty() { "as it comes".to_owned() } else { parts.join(", ") };
        format!("{what}; given up after {} s", patience.of(self.limit).as_secs())
    }
}

impl Channel {
    /// Where a guest's target listens.
    fn listening(self, guest: u8) -> String {
        let port = MIGRATION_PORT + u16::from(guest);
        match self {
            Channel::Tcp => format!("tcp:{}:{port}", Place::B.address()),
            Channel::ZstdPipe => format!("exec:busybox nc -l -p {port} | zstd -dcq"),
        }
    }

    /// Where its source sends.
    fn sending(self, guest: u8) -> String {
        let port = MIGRATION_PORT + u16::from(guest);
        match self {
            Channel::Tcp => self.listening(guest),
            Channel::ZstdPipe => format!("exec:zstd -1 -cq | busybox nc {} {port}", Place::B.address()),
        }
    }

    fn check(self) -> Result<()> {
        let probe = || Command::new("zstd").arg("--version").stdout(Stdio::null()).status();
        if self == Channel::ZstdPipe && !probe().is_ok_and(|status| status.success()) {
            bail!("it needs the program zstd (package zstd)");
        }
        Ok(())
    }
}

/// Boots the guests at host a and has QEMU migrate them to host b, all at once.
pub(super) fn run(stage: &Stage, name: &'static str, way: &Way) -> Result<Outcome> {
    way.channel.check()?;
    let beat = BeatListener::start(&stage.lab.namespace(Place::Lan))?;
    let command_lines = stage.command_lines(beat.address());
    let start = |host| {
        let guests = (0u8..).zip(&command_lines);
        let start = |(guest, line): (u8, &String)| Machine::start(stage, host, guest, line, name, way);
        guests.map(start).collect::<Result<Vec<Machine>>>()
    };
    let mut sources = start(Place::A)?;
    let mut watch = Watch::start(stage, beat)?;
    let mut targets = start(Place::B)?;
    for target in &mut targets {
        target.qmp.execute("migrate-incoming", json!({ "uri": way.channel.listening(target.guest) }))?;
    }
    let before = watch.wire_bytes()?;
    let started = SystemTime::now();
    for source in &mut sources {
        source.qmp.execute("migrate", json!({ "uri": way.channel.sending(source.guest) }))?;
    }
    let arrivals = await_arrivals(&mut sources, &mut targets, way, stage.patience.of(way.limit))?;
    let complete = arrivals.iter().flatten().map(|arrival| arrival.complete).max();
    let ended = complete.unwrap_or_else(SystemTime::now);
    let mut outcome = watch.outcome(name, Span { started, ended }, before)?;
    if let Some(arrivals) = arrivals {
        outcome.converge(arrivals.iter().map(|arrival| arrival.downtime_ms).collect());
        println!("  {}", watch.check()?);
    }
    Ok(outcome)
}

/// A guest at the target.
struct Arrival {
    /// From its stop to its running there.
    downtime_ms: f64,
    /// It runs there and has all its memory.
    complete: SystemTime,
}

/// Waits until all guests are at the target; `None`: not all within `limit`.
fn await_arrivals(
    sources: &mut [Machine],
    targets: &mut [Machine],
    way: &Way,
    limit: Duration,
) -> Result<Option<Vec<Arrival>>> {
    let deadline = Instant::now() + limit;
    thread::scope(|scope| {
        let pairs = sources.iter_mut().zip(targets);
        let waits: Vec<_> = pairs
            .map(|(source, target)| scope.spawn(move || await_arrival(source, target, way, deadline)))
            .collect();
        let joined = waits.into_iter().map(|wait| wait.join());
        joined.map(|arrival| arrival.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Waits until a guest is at the target; `None`: not before `deadline`.
fn await_arrival(
    source: &mut Machine,
    target: &mut Machine,
    way: &Way,
    deadline: Instant,
) -> Result<Option<Arrival>> {
    if way.postcopy && !start_postcopy(source, deadline)? {
        return Ok(None);
    }
    let mut await_event = |wanted: fn(&Event) -> bool| {
        let left = deadline.saturating_duration_since(Instant::now());
        Ok::<_, anyhow::Error>(target.qmp.wait_for(left, wanted)?.map(|event| event.at))
    };
    let Some(resumed) = await_event(|event| event.name == "RESUME")? else { return Ok(None) };
    let complete = if way.postcopy {
        await_event(|event| event.name == "MIGRATION" && event.data["status"] == "completed")?
    } else {
        Some(resumed)
    };
    let Some(complete) = complete else { return Ok(None) };
    let stopped = source.qmp.wait_for(START_LIMIT, |event| event.name == "STOP")?;
    let stopped = stopped.context("the target runs but the source has not stopped")?;
    Ok(Some(Arrival { downtime_ms: milliseconds(stopped.at, resumed), complete }))
}

/// Lets the guest go on at the target as soon as all of its memory was sent once; false: not before `deadline`.
fn start_postcopy(source: &mut Machine, deadline: Instant) -> Result<bool> {
    while Instant::now() < deadline {
        let progress = source.qmp.execute("query-migrate", json!({}))?;
        // The first look is at the beginning.
        if progress["ram"]["dirty-sync-count"].as_u64().is_some_and(|looks| looks > 1) {
            source.qmp.execute("migrate-start-postcopy", json!({}))?;
            return Ok(true);
        }
        if progress["status"] == "completed" {
            return Ok(true);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(false)
}

/// A QEMU at one of the hosts; it and its TAP go when this is dropped.
struct Machine<'a> {
    qmp: Qmp,
    process: Process,
    stage: &'a Stage<'a>,
    host: Place,
    guest: u8,
}

impl<'a> Machine<'a> {
    /// Starts QEMU: at host a to boot a guest, at host b to receive it.
    fn start(
        stage: &'a Stage,
        host: Place,
        guest: u8,
        command_line: &str,
        name: &str,
        way: &Way,
    ) -> Result<Machine<'a>> {
        stage.lab.make_guest_tap(host, &tap(guest))?;
        let name = format!("{name}-{guest}");
        let socket = stage.lab.directory_of(host)?.join(format!("{name}.qmp"));
        let mut command = command(stage, guest, command_line, &socket);
        let credentials = if way.tls { Some(Credentials::make(stage.lab, host)?) } else { None };
        command.args(credentials.iter().flat_map(Credentials::arguments));
        if host == Place::B {
            command.args(["-incoming", "defer"]);
        }
        let process = stage.lab.spawn(host, &name, &mut command, true)?;
        let qmp = Qmp::connect(&socket, START_LIMIT).context("QEMU has not started")?;
        let mut machine = Machine { qmp, process, stage, host, guest };
        machine.prepare(way)?;
        Ok(machine)
    }

    fn prepare(&mut self, way: &Way) -> Result<()> {
        let on = |capability| json!({ "capability": capability, "state": true });
        let capabilities: Vec<Value> = way.capabilities.iter().map(on).collect();
        self.qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let mut parameters = json!({ "max-bandwidth": UNLIMITED_BYTES_PER_SECOND });
        for (name, setting) in way.parameters {
            parameters[*name] = json!(setting);
        }
        if way.tls {
            parameters["tls-creds"] = json!(tls::ID);
            parameters["tls-hostname"] = json!(Place::B.name());
        }
        self.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // Both fail only where there is nothing left to remove.
        let _ = self.process.kill();
        let _ = self.stage.lab.remove_guest_tap(self.host, &tap(self.guest));
    }
}

/// The TAP of a guest, at both hosts.
fn tap(guest: u8) -> String {
    format!("vm{guest}")
}

fn command(stage: &Stage, guest: u8, command_line: &str, socket: &Path) -> Command {
    let serial: PathBuf = socket.with_extension("serial");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "pc,accel=tcg", "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot"])
        // Names the thread of the guest's processor, so that it can be told from the others.
        .args(["-name", "debug-threads=on"])
        .args(["-m", &format!("{}M", stage.memory_mb)])
        .args(["-netdev", &format!("tap,id=net0,ifname={},script=no,downscript=no", tap(guest))])
        .args(["-device", &format!("virtio-net-pci,netdev=net0,mac=52:54:00:4e:00:{:02x}", 0x10 + guest)])
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .arg("-kernel")
        .arg(&stage.image.kernel)
        .arg("-initrd")
        .arg(&stage.image.initrd)
        .args(["-append", command_line]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_say_what_they_are() {
        let usual = Patience::USUAL;
        assert_eq!(PRECOPY.describe(usual), "as it comes; given up after 60 s");
        let compressed = "`multifd`, `multifd-channels` 2, `multifd-compression` zstd; given up after ";
        assert_eq!(MULTIFD_ZSTD.describe(usual), format!("{compressed}120 s"));
        let brief = Patience { at_most: Duration::from_secs(60), ..usual };
        assert_eq!(MULTIFD_ZSTD.describe(brief), format!("{compressed}60 s"));
        let piped = "`xbzrle`, `xbzrle-cache-size` 268435456, through `zstd -1`; given up after 120 s";
        assert_eq!(XBZRLE_ZSTD_PIPE.describe(usual), piped);
        let encrypted = "QEMU's own TLS with certificates on both sides; given up after 60 s";
        assert_eq!(PRECOPY_TLS.describe(usual), encrypted);
    }
}
