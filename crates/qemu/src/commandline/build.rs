//! The command line of a machine at one host.
//!
//! The same specification gives the same devices in the same order, with the same ids and PCI addresses, at every
//! host; only paths, TAP devices and sockets differ. That is what a migration needs.

use std::path::{Path, PathBuf};

use super::{
    Argument,
    properties::{Properties, escape},
};
use crate::machine::{
    Accel, Adopted, Disk, DiskCache, DiskFormat, DiskInterface, Net, NetModel, Spec, SpecError,
};

/// Options that [`build`] sets itself; a specification may not bring them.
#[rustfmt::skip]
pub const RESERVED_OPTIONS: &[&str] = &[
    "D", "M", "S", "accel", "add-fd", "daemonize", "display", "dump-vmstate", "enable-kvm", "h", "help",
    "incoming", "loadvm", "name", "no-user-config", "nodefaults", "nographic", "pidfile", "preconfig",
    "qmp", "qmp-pretty", "readconfig", "version",
];

/// `sun_path` without the final NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What a disk that godwit serves is called by its server.
pub const SERVED_DISK: &str = "disk";
/// How long QEMU waits for a disk's server that has gone, in seconds: an agent starts another at once, and whoever restarts
/// an agent that has gone too does it in less.
const RECONNECT_DELAY_S: &str = "60";

/// The first PCI slot of each kind of device, fixed so that a further card doesn't move the disks. 0 to 2 and 31 are
/// the chipset's and a display's.
const NET_SLOT: usize = 0x03;
const DISK_SLOT: usize = 0x0b;
const BALLOON_SLOT: usize = 0x1b;
const RNG_SLOT: usize = 0x1c;

/// The directory that an agent gives a machine; QEMU's sockets and files have fixed names in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineDir(PathBuf);

impl MachineDir {
    /// `directory` is absolute and short: a socket's path has at most 107 bytes.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self(directory.into())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The agent's QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.0.join("qmp.sock")
    }

    /// The QMP socket that a migration's worker has for itself.
    pub fn migration_qmp(&self) -> PathBuf {
        self.0.join("qmp-migration.sock")
    }

    /// QEMU's process id; there once QEMU is up.
    pub fn pid_file(&self) -> PathBuf {
        self.0.join("qemu.pid")
    }

    /// What QEMU says since its last start, why it didn't start included.
    pub fn log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }

    /// The other end of the guest's first serial port.
    pub fn console(&self) -> PathBuf {
        self.0.join("console.sock")
    }

    /// The socket of the server of a disk that godwit serves.
    pub fn disk(&self, index: usize) -> PathBuf {
        self.0.join(format!("disk{index}.sock"))
    }

    /// The other end of a character device of an adopted machine.
    pub fn character_device(&self, id: &str) -> PathBuf {
        self.0.join(format!("chardev-{id}.sock"))
    }
}

/// How a machine is started at this host.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Absolute path of `qemu-system-x86_64`.
    pub emulator: PathBuf,
    /// What executes the guest; the agent has resolved [`Accel::Auto`].
    pub accel: Accel,
    /// Where QEMU's sockets and files go; exists.
    pub directory: MachineDir,
    /// Names of the TAP devices, one for each of [`Spec::net`]; they exist and have as many queues as the card.
    pub taps: Vec<String>,
    /// Waits for a migration, and then for `cont`, instead of running.
    pub incoming: bool,
}

/// Why no command line can be built.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The specification is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// `auto` was left.
    #[error("what executes the guest hasn't been decided")]
    AccelUndecided,
    /// The launch doesn't fit the specification.
    #[error("the machine has {nets} network cards but {taps} TAP devices were made")]
    Taps {
        /// Cards.
        nets: usize,
        /// Devices.
        taps: usize,
    },
    /// The kernel couldn't bind a socket there.
    #[error("{path} is too long for a unix socket (107 bytes); use a shorter directory")]
    SocketPath {
        /// The socket.
        path: PathBuf,
    },
    /// An alias means another machine at another host.
    #[error("machine {0} is an alias; a migration needs the versioned type that the source runs")]
    UnversionedMachine(String),
    /// An adopted machine's argument isn't what classification gives.
    #[error("can't read {0}")]
    Argument(String),
}

/// The arguments of QEMU, the program first. QEMU daemonises: it ends with 0 once the machine is up (paused, if
/// `incoming`), otherwise with 1 and the reason in [`MachineDir::log`], or on standard error if QEMU didn't get as far
/// as opening the log.
///
/// # Errors
/// See [`BuildError`].
pub fn build(spec: &Spec, launch: &Launch) -> Result<Vec<String>, BuildError> {
    check(spec, launch)?;
    let mut line = CommandLine(vec![launch.emulator.to_string_lossy().into_owned()]);
    line.frame(spec, launch);
    match &spec.adopted {
        Some(adopted) => line.adopted(adopted, launch)?,
        None => line.described(spec, launch),
    }
    if launch.incoming {
        line.option("incoming", "defer");
        line.switch("S");
    }
    Ok(line.0)
}

fn check(spec: &Spec, launch: &Launch) -> Result<(), BuildError> {
    spec.validate()?;
    if launch.accel == Accel::Auto {
        return Err(BuildError::AccelUndecided);
    }
    if launch.taps.len() != spec.net.len() {
        return Err(BuildError::Taps { nets: spec.net.len(), taps: launch.taps.len() });
    }
    let longest = launch.directory.migration_qmp();
    if longest.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(BuildError::SocketPath { path: longest });
    }
    if launch.incoming && matches!(spec.machine.as_str(), "pc" | "q35") {
        return Err(BuildError::UnversionedMachine(spec.machine.clone()));
    }
    Ok(())
}

struct CommandLine(Vec<String>);

impl CommandLine {
    fn switch(&mut self, option: &str) {
        self.0.push(format!("-{option}"));
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.switch(option);
        self.0.push(value.into());
    }

    fn properties<V: Into<String>>(
        &mut self,
        option: &str,
        entries: impl IntoIterator<Item = (&'static str, V)>,
    ) {
        self.option(option, entries.into_iter().collect::<Properties>().to_string());
    }

    /// What ties any machine to its agent.
    fn frame(&mut self, spec: &Spec, launch: &Launch) {
        let directory = &launch.directory;
        self.option("name", &spec.name);
        self.switch("no-user-config");
        self.option("display", "none");
        self.option("monitor", "none");
        self.switch("daemonize");
        self.option("pidfile", text(&directory.pid_file()));
        self.option("D", text(&directory.log()));
        self.option("msg", "timestamp=on");
        for socket in [directory.qmp(), directory.migration_qmp()] {
            self.option("qmp", format!("unix:{},server=on,wait=off", escape(&text(&socket))));
        }
        if spec.serial {
            self.socket("console", &directory.console());
        }
    }

    fn socket(&mut self, id: &str, path: &Path) {
        let path = text(path);
        let entries = [("backend", "socket"), ("id", id), ("path", &path), ("server", "on"), ("wait", "off")];
        self.properties("chardev", entries);
    }

    fn described(&mut self, spec: &Spec, launch: &Launch) {
        self.switch("nodefaults");
        self.option("machine", &spec.machine);
        self.option("accel", if launch.accel == Accel::Kvm { "kvm" } else { "tcg" });
        self.option("cpu", &spec.cpu);
        self.option("smp", spec.vcpus.to_string());
        self.option("m", spec.memory.to_string());
        if spec.serial {
            self.option("serial", "chardev:console");
        }
        let bus = if spec.machine.contains("q35") { "pcie.0" } else { "pci.0" };
        for (index, (net, tap)) in spec.net.iter().zip(&launch.taps).enumerate() {
            self.net(net, index, tap, &spec.mac(index).to_string(), bus);
        }
        for (index, disk) in spec.disk.iter().enumerate() {
            self.disk(disk, index, bus, &launch.directory);
        }
        self.small_devices(spec, bus);
        self.boot(spec);
        self.0.extend(spec.extra.iter().cloned());
    }

    fn net(&mut self, net: &Net, index: usize, tap: &str, mac: &str, bus: &'static str) {
        let netdev = format!("net{index}");
        let mut backend: Vec<(&str, String)> = vec![
            ("type", "tap".into()),
            ("id", netdev.clone()),
            ("ifname", tap.into()),
            ("script", "no".into()),
            ("downscript", "no".into()),
        ];
        let driver = match net.model {
            NetModel::VirtioNetPci => "virtio-net-pci",
            NetModel::E1000 => "e1000",
        };
        let mut card = device(driver, &format!("net{index}-card"), bus, NET_SLOT + index);
        card.extend([("netdev", netdev), ("mac", mac.to_owned())]);
        if net.queues > 1 {
            let vectors = 2 * u32::from(net.queues) + 2;
            backend.push(("queues", net.queues.to_string()));
            card.extend([("mq", "on".to_owned()), ("vectors", vectors.to_string())]);
        }
        self.properties("netdev", backend);
        self.properties("device", card);
    }

    fn disk(&mut self, disk: &Disk, index: usize, bus: &'static str, directory: &MachineDir) {
        let node = format!("disk{index}");
        match &disk.path {
            Some(path) => self.file_node(disk, &node, path),
            None => self.served_node(disk, &node, &directory.disk(index)),
        }
        let driver = match disk.interface {
            DiskInterface::VirtioBlk => "virtio-blk-pci",
        };
        let mut front = device(driver, &format!("disk{index}-device"), bus, DISK_SLOT + index);
        front.push(("drive", node));
        front.push(("write-cache", on_off(disk.cache != DiskCache::Writethrough).to_owned()));
        front.extend(disk.serial.clone().map(|serial| ("serial", serial)));
        if disk.path.is_none() {
            // What the server refuses, because it is full or has given the disk away, stops the machine and not the guest.
            front.extend([("werror", "stop".to_owned()), ("rerror", "stop".to_owned())]);
        }
        self.properties("device", front);
    }

    fn file_node(&mut self, disk: &Disk, node: &str, path: &Path) {
        let path = text(path);
        let special = path.starts_with("/dev/") && !path.starts_with("/dev/shm/");
        self.properties(
            "blockdev",
            [
                ("driver", format_name(disk.format)),
                ("node-name", node),
                ("read-only", on_off(disk.read_only)),
                ("cache.direct", on_off(disk.cache == DiskCache::None)),
                ("file.driver", if special { "host_device" } else { "file" }),
                ("file.filename", &path),
            ],
        );
    }

    /// A node above the server's, so that what is beneath it can be exchanged.
    fn served_node(&mut self, disk: &Disk, node: &str, socket: &Path) {
        self.properties(
            "blockdev",
            [
                ("driver", "raw"),
                ("node-name", node),
                ("read-only", on_off(disk.read_only)),
                ("discard", "unmap"),
                ("file.driver", "nbd"),
                ("file.node-name", &format!("{node}-server")),
                ("file.server.type", "unix"),
                ("file.server.path", &text(socket)),
                ("file.export", SERVED_DISK),
                ("file.reconnect-delay", RECONNECT_DELAY_S),
                ("file.discard", "unmap"),
            ],
        );
    }

    fn small_devices(&mut self, spec: &Spec, bus: &'static str) {
        if spec.balloon {
            self.properties("device", device("virtio-balloon-pci", "balloon0", bus, BALLOON_SLOT));
        }
        if spec.rng {
            self.properties("object", [("qom-type", "rng-builtin"), ("id", "rng0")]);
            let mut front = device("virtio-rng-pci", "rng0-device", bus, RNG_SLOT);
            front.push(("rng", "rng0".to_owned()));
            self.properties("device", front);
        }
    }

    fn boot(&mut self, spec: &Spec) {
        if let Some(firmware) = &spec.firmware {
            self.option("bios", text(firmware));
        }
        let Some(boot) = &spec.boot else { return };
        self.option("kernel", text(&boot.kernel));
        if let Some(initrd) = &boot.initrd {
            self.option("initrd", text(initrd));
        }
        self.option("append", &boot.append);
    }

    fn adopted(&mut self, adopted: &Adopted, launch: &Launch) -> Result<(), BuildError> {
        let mut taps = launch.taps.iter();
        for argument in &adopted.arguments {
            let argument = plug_in(argument, &mut taps, &launch.directory)?;
            self.switch(&argument.option);
            self.0.extend(argument.value);
        }
        Ok(())
    }
}

/// Gives an adopted machine's TAP networks and sockets their ends at this host.
fn plug_in<'a>(
    argument: &Argument,
    taps: &mut impl Iterator<Item = &'a String>,
    directory: &MachineDir,
) -> Result<Argument, BuildError> {
    let unreadable = || BuildError::Argument(argument.to_string());
    let value = argument.value.as_deref().unwrap_or_default();
    match argument.option.as_str() {
        "netdev" | "nic" => {
            let mut backend = Properties::parse(value, "type").map_err(|_| unreadable())?;
            if backend.get("type") != Some("tap") {
                return Ok(argument.clone());
            }
            backend.set("ifname", taps.next().ok_or_else(unreadable)?);
            backend.set("script", "no");
            backend.set("downscript", "no");
            Ok(Argument::new(&argument.option, backend.to_string()))
        }
        "chardev" => {
            let mut device = Properties::parse(value, "backend").map_err(|_| unreadable())?;
            if device.get("backend") != Some("socket") {
                return Ok(argument.clone());
            }
            let path = directory.character_device(device.get("id").ok_or_else(unreadable)?);
            if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
                return Err(BuildError::SocketPath { path });
            }
            device.set("path", text(&path));
            device.set("server", "on");
            device.set("wait", "off");
            Ok(Argument::new("chardev", device.to_string()))
        }
        _ => Ok(argument.clone()),
    }
}

fn device(driver: &str, id: &str, bus: &str, slot: usize) -> Vec<(&'static str, String)> {
    vec![
        ("driver", driver.to_owned()),
        ("id", id.to_owned()),
        ("bus", bus.to_owned()),
        ("addr", format!("{slot:#04x}")),
    ]
}

const fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

const fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Paths in a specification are UTF-8 (`Spec::validate`); the agent's own are by its configuration.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"
        name = "web1"
        machine = "pc-q35-10.0"
        memory = "512M"
        net = [{ bridge = "br0", queues = 2 }, { tap = "tap7", model = "e1000", mac = "52:54:00:00:00:07" }]
        disk = [
            { path = "/srv/a,id=x.img" }, { path = "/dev/vg/b", cache = "writethrough", read_only = true },
            { image = "debian", size = "20G" },
        ]
        boot = { kernel = "/srv/vmlinuz", append = "console=ttyS0, quiet" }
        extra = ["-rtc", "base=utc"]
    "#;

    fn launch(incoming: bool) -> Launch {
        Launch {
            emulator: "/usr/bin/qemu-system-x86_64".into(),
            accel: Accel::Tcg,
            directory: MachineDir::new("/run/godwit/web,1"),
            taps: vec!["gw0".into(), "tap7".into()],
            incoming,
        }
    }

    fn spec() -> Spec {
        Spec::from_toml(SPEC, "web1.toml").unwrap()
    }

    #[test]
    fn values_stay_in_their_option() {
        let line = build(&spec(), &launch(false)).unwrap();
        let has = |value: &str| assert!(line.iter().any(|word| word == value), "{value} isn't in {line:#?}");
        has("unix:/run/godwit/web,,1/qmp.sock,server=on,wait=off");
        has("backend=socket,id=console,path=/run/godwit/web,,1/console.sock,server=on,wait=off");
        has("type=tap,id=net0,ifname=gw0,script=no,downscript=no,queues=2");
        has("driver=e1000,id=net1-card,bus=pcie.0,addr=0x04,netdev=net1,mac=52:54:00:00:00:07");
        has("driver=raw,node-name=disk0,read-only=off,cache.direct=on,file.driver=file,\
             file.filename=/srv/a,,id=x.img");
        has("driver=raw,node-name=disk1,read-only=on,cache.direct=off,file.driver=host_device,\
             file.filename=/dev/vg/b");
        has("driver=raw,node-name=disk2,read-only=off,discard=unmap,file.driver=nbd,\
             file.node-name=disk2-server,file.server.type=unix,file.server.path=/run/godwit/web,,1/disk2.sock,\
             file.export=disk,file.reconnect-delay=60,file.discard=unmap");
        has("driver=virtio-blk-pci,id=disk2-device,bus=pcie.0,addr=0x0d,drive=disk2,write-cache=on,\
             werror=stop,rerror=stop");
        has("console=ttyS0, quiet");
        assert_eq!(line.last().unwrap(), "base=utc");
    }

    #[test]
    fn only_the_ends_in_the_host_differ_at_the_target() {
        let here = build(&spec(), &launch(false)).unwrap();
        let there = build(&spec(), &Launch { taps: vec!["gw3".into(), "t".into()], ..launch(true) }).unwrap();
        let incoming = ["-incoming", "defer", "-S"];
        assert_eq!(there[here.len()..], incoming);
        let differing = here.iter().zip(&there).filter(|(here, there)| here != there);
        assert!(differing.into_iter().all(|(_, there)| there.starts_with("type=tap,")));
    }

    #[test]
    fn what_cant_be_launched_is_refused() {
        let refused = |spec: &Spec, launch: &Launch| build(spec, launch).unwrap_err().to_string();
        let alias = Spec { machine: "q35".into(), ..spec() };
        assert!(build(&alias, &launch(false)).is_ok());
        assert!(refused(&alias, &launch(true)).contains("q35 is an alias"));
        assert!(
            refused(&spec(), &Launch { accel: Accel::Auto, ..launch(false) }).contains("hasn't been decided")
        );
        assert!(refused(&spec(), &Launch { taps: Vec::new(), ..launch(false) }).contains("2 network cards"));
        let deep = MachineDir::new(format!("/{}", "d".repeat(100)));
        assert!(refused(&spec(), &Launch { directory: deep, ..launch(false) }).contains("too long"));
    }
}
