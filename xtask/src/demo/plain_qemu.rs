//! QEMU migrates by itself, over TCP, as its documentation has it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use godwit_sim::{
    guest_image::GuestImage,
    lab::{Place, Process},
    observer::BeatListener,
    qmp::Qmp,
};
use serde_json::json;

use super::{
    DOWNTIME_TARGET, GUEST_MEMORY_MB, Stage,
    outcome::Outcome,
    watch::{GUEST_ADDRESS, Span, Watch, milliseconds},
};

const MIGRATION_PORT: u16 = 4444;
const TAP: &str = "vm0";
/// More than any link here; QEMU's default would limit a link of 1 Gbit/s.
const UNLIMITED_BYTES_PER_SECOND: u64 = 10_000_000_000;
const XBZRLE_CACHE_BYTES: u64 = 256 << 20;
const START_LIMIT: Duration = Duration::from_secs(10);

/// One way to have QEMU migrate.
pub(super) struct Way {
    name: &'static str,
    xbzrle: bool,
    downtime_limit: Option<Duration>,
    /// When to give up.
    limit: Duration,
}

/// As it comes.
pub(super) const PRECOPY: Way =
    Way { name: "qemu-precopy", xbzrle: false, downtime_limit: None, limit: Duration::from_secs(60) };
/// With deltas against a cache that holds the working set twice.
pub(super) const XBZRLE: Way =
    Way { name: "qemu-xbzrle", xbzrle: true, limit: Duration::from_secs(120), ..PRECOPY };
/// The same, and asked for the pause that godwit aims at.
pub(super) const XBZRLE_DOWNTIME: Way =
    Way { name: "qemu-xbzrle-downtime", downtime_limit: Some(DOWNTIME_TARGET), ..XBZRLE };

/// Boots the guest at host a and has QEMU migrate it to host b.
pub(super) fn run(stage: &Stage, way: &Way) -> Result<Outcome> {
    let beat = BeatListener::start(&stage.lab.namespace(Place::Lan))?;
    let command_line = GuestImage::command_line(stage.workload, GUEST_ADDRESS, Some(beat.address()));
    let mut source = Machine::start(stage, Place::A, &command_line, way)?;
    let watch = Watch::start(stage.lab, beat)?;
    let mut target = Machine::start(stage, Place::B, &command_line, way)?;
    let before = watch.wire_bytes()?;
    let started = SystemTime::now();
    let address = format!("tcp:{}:{MIGRATION_PORT}", Place::B.address());
    source.qmp.execute("migrate", json!({ "uri": address }))?;
    let resumed = target.qmp.wait_for(way.limit, |event| event.name == "RESUME")?;
    let ended = resumed.as_ref().map_or_else(SystemTime::now, |event| event.at);
    let mut outcome = watch.outcome(way.name, Span { started, ended }, before)?;
    if resumed.is_some() {
        let stopped = source.qmp.wait_for(START_LIMIT, |event| event.name == "STOP")?;
        let stopped = stopped.context("the target runs but the source has not stopped")?;
        outcome.converged = true;
        outcome.downtime_ms = Some(milliseconds(stopped.at, ended));
        println!("  {}", watch.check()?);
    }
    Ok(outcome)
}

/// A QEMU at one of the hosts; it and its TAP go when this is dropped.
struct Machine<'a> {
    qmp: Qmp,
    process: Process,
    stage: &'a Stage<'a>,
    host: Place,
}

impl<'a> Machine<'a> {
    /// Starts QEMU: at host a to boot the guest, at host b to receive it.
    fn start(stage: &'a Stage, host: Place, command_line: &str, way: &Way) -> Result<Machine<'a>> {
        stage.lab.make_guest_tap(host, TAP)?;
        let socket = stage.lab.directory_of(host)?.join(format!("{}.qmp", way.name));
        let mut command = command(stage.image, command_line, &socket);
        if host == Place::B {
            command.args(["-incoming", &format!("tcp:{}:{MIGRATION_PORT}", Place::B.address())]);
        }
        let process = stage.lab.spawn(host, way.name, &mut command, true)?;
        let qmp = Qmp::connect(&socket, START_LIMIT).context("QEMU has not started")?;
        let mut machine = Machine { qmp, process, stage, host };
        machine.prepare(way)?;
        Ok(machine)
    }

    fn prepare(&mut self, way: &Way) -> Result<()> {
        let capabilities = json!([{ "capability": "xbzrle", "state": way.xbzrle }]);
        self.qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let mut parameters = json!({ "max-bandwidth": UNLIMITED_BYTES_PER_SECOND });
        if way.xbzrle {
            parameters["xbzrle-cache-size"] = XBZRLE_CACHE_BYTES.into();
        }
        if let Some(limit) = way.downtime_limit {
            parameters["downtime-limit"] = (limit.as_millis() as u64).into();
        }
        self.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // Both fail only where there is nothing left to remove.
        let _ = self.process.kill();
        let _ = self.stage.lab.remove_guest_tap(self.host, TAP);
    }
}

fn command(image: &GuestImage, command_line: &str, socket: &Path) -> Command {
    let serial: PathBuf = socket.with_extension("serial");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "pc,accel=tcg", "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-m", &format!("{GUEST_MEMORY_MB}M")])
        .args(["-netdev", &format!("tap,id=net0,ifname={TAP},script=no,downscript=no")])
        .args(["-device", "virtio-net-pci,netdev=net0,mac=52:54:00:4e:00:10"])
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-append", command_line]);
    command
}
