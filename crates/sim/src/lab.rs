//! Two hosts, the link between them, and the guests' network, in three network namespaces.
//!
//! ```text
//!    gw<pid>-<n>-a                    relay                    gw<pid>-<n>-b
//!    wan0 10.77.0.1/24 ◄── rate, delay, jitter, loss, cut ──► wan0 10.77.0.2/24
//!    br0: lan0, guests' TAPs                                  br0: lan0, guests' TAPs
//!           │                                                        │
//!           └─ veth ──► a0    br0 10.78.0.1/24    b0 ◄── veth ───────┘
//!                             gw<pid>-<n>-lan (clients)
//! ```
//!
//! Links too fast for a relay are a veth pair straight from `wan0` to `wan0`, with the kernel's token bucket (tbf) where
//! they have a rate, see [`Wiring`].
//!
//! The guests' network is one undelayed Ethernet, so a machine keeps its address when it moves. What crosses `wan0` is
//! what a migration costs. Everything, processes included, goes when the [`Lab`] is dropped, at Ctrl-C and SIGTERM,
//! and, had the process been killed, when the next lab is made.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::mount::{MsFlags, mount};
use serde::Serialize;
use thiserror::Error;

use crate::{
    link::Shape,
    namespace::{EnterError, Namespace},
    relay::{Relay, RelayStatistics},
    tap::Tap,
};

mod cleanup;
mod ip;
mod process;

pub use process::Process;

/// The bridge of the guests' network, at every place.
pub const GUEST_BRIDGE: &str = "br0";
/// The interface of the migration network, at both hosts.
pub const MIGRATION_INTERFACE: &str = "wan0";
/// The address of [`Place::Lan`] in the guests' network, where clients are.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// Addresses of guests are this one and those after it; the prefix has 24 bits.
pub const FIRST_GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 10);

/// A place in the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// The first host.
    A,
    /// The second host.
    B,
    /// The guests' network, outside both hosts.
    Lan,
}

impl Place {
    const ALL: [Place; 3] = [Place::A, Place::B, Place::Lan];

    /// `a`, `b` or `lan`.
    pub fn name(self) -> &'static str {
        match self {
            Place::A => "a",
            Place::B => "b",
            Place::Lan => "lan",
        }
    }

    /// The port of the clients' bridge that leads to this host.
    pub fn client_port(self) -> String {
        format!("{}0", self.name())
    }

    /// The address to use for this place from another one: of a host in the migration network, of the clients in the
    /// guests' network.
    pub fn address(self) -> IpAddr {
        match self {
            Place::A => Ipv4Addr::new(10, 77, 0, 1),
            Place::B => Ipv4Addr::new(10, 77, 0, 2),
            Place::Lan => CLIENT_ADDRESS,
        }
        .into()
    }
}

/// A lab couldn't be made or used.
#[derive(Debug, Error)]
pub enum LabError {
    /// Namespaces and TAPs need it.
    #[error("the lab makes network namespaces and needs root")]
    NotRoot,
    /// `ip` or `tc` isn't there or couldn't be started.
    #[error("cannot run ip or tc (package iproute2)")]
    Ip(#[source] io::Error),
    /// `ip` or `tc` refused something.
    #[error("{arguments} failed: {message}")]
    IpRefused {
        /// What it was asked.
        arguments: String,
        /// What it said.
        message: String,
    },
    /// A namespace is gone, or may not be entered.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// Anything else.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl LabError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
        let what = what.into();
        move |source| LabError::Io { what, source }
    }
}

/// What the migration network has carried since the lab was made, as the hosts' interfaces counted it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct WireBytes {
    /// Sent by host a.
    pub a_to_b: u64,
    /// Sent by host b.
    pub b_to_a: u64,
}

impl WireBytes {
    /// Both directions together.
    pub fn total(self) -> u64 {
        self.a_to_b + self.b_to_a
    }

    /// What was carried after `earlier`.
    pub fn since(self, earlier: WireBytes) -> WireBytes {
        WireBytes { a_to_b: self.a_to_b - earlier.a_to_b, b_to_a: self.b_to_a - earlier.b_to_a }
    }
}

/// How the hosts are joined.
#[derive(Debug, Clone, PartialEq)]
pub enum Wiring {
    /// By a relay that shapes both directions.
    Relayed(Shape),
    /// Straight, without delay or loss. What is sent is counted before the kernel cuts it into frames, so that of
    /// Ethernet, IP and TCP headers only one in many shows.
    Straight {
        /// In each direction, 10⁶ bits a second; `None`: whatever the machine does.
        megabits_per_second: Option<u64>,
    },
}

/// Two hosts and a link; see the module's page.
#[derive(Debug)]
pub struct Lab {
    /// `None`: they are joined straight.
    relay: Option<Relay>,
    remains: cleanup::Remains,
}

impl Lab {
    /// Removes what dead processes left, then makes a lab whose link has `shape` in both directions.
    ///
    /// # Errors
    /// Without root or `ip`; whatever had been made is removed again.
    pub fn new(shape: Shape) -> Result<Lab, LabError> {
        Lab::wired(Wiring::Relayed(shape))
    }

    /// The same, with hosts that are joined in any way.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn wired(wiring: Wiring) -> Result<Lab, LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        cleanup::remove_stale();
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let remains = cleanup::Remains::register(std::process::id(), number)
            .map_err(LabError::io("watch for Ctrl-C"))?;
        let mut lab = Lab { relay: None, remains };
        std::fs::create_dir_all(lab.directory()).map_err(LabError::io("make the lab's directory"))?;
        lab.make_guest_network()?;
        match wiring {
            Wiring::Relayed(shape) => lab.relay_hosts(shape)?,
            Wiring::Straight { megabits_per_second } => lab.join_hosts(megabits_per_second)?,
        }
        Ok(lab)
    }

    /// A scratch directory that goes with the lab. Its path is short enough for unix sockets.
    pub fn directory(&self) -> &Path {
        self.remains.directory()
    }

    /// The directory of one place within [`Lab::directory`], made on first use.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn directory_of(&self, place: Place) -> Result<PathBuf, LabError> {
        let directory = self.directory().join(place.name());
        std::fs::create_dir_all(&directory).map_err(LabError::io("make a host's directory"))?;
        Ok(directory)
    }

    /// The namespace of a place; [`Namespace::run`] opens sockets there.
    pub fn namespace(&self, place: Place) -> Namespace {
        self.remains.namespace(place)
    }

    /// Starts `command` at `place`. Its output goes to `<name>.log` in the directory of the place unless the caller
    /// has said otherwise (`log` false); its standard input is empty.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(
        &self,
        place: Place,
        name: &str,
        command: &mut Command,
        log: bool,
    ) -> Result<Process, LabError> {
        command.stdin(Stdio::null());
        if log {
            let path = self.directory_of(place)?.join(format!("{name}.log"));
            let append = std::fs::OpenOptions::new().create(true).append(true).open(&path);
            let out = append.map_err(LabError::io(format!("write {}", path.display())))?;
            let err = out.try_clone().map_err(LabError::io("share a log"))?;
            command.stdout(out).stderr(err);
        }
        let child = self.namespace(place).run(|| command.spawn())?;
        Ok(Process::new(child.map_err(LabError::io(format!("start {name}")))?))
    }

    /// Makes a TAP for a guest at a host and joins it to [`GUEST_BRIDGE`]; QEMU opens it by its name.
    ///
    /// # Errors
    /// When the name is taken or longer than 15 bytes.
    pub fn make_guest_tap(&self, host: Place, name: &str) -> Result<(), LabError> {
        ip::batch(
            &self.namespace(host),
            &format!("tuntap add dev {name} mode tap\nlink set {name} master {GUEST_BRIDGE} up\n"),
        )
    }

    /// Removes a TAP made by [`Lab::make_guest_tap`].
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn remove_guest_tap(&self, host: Place, name: &str) -> Result<(), LabError> {
        ip::batch(&self.namespace(host), &format!("link del {name}\n"))
    }

    /// Gives a host an address in the guests' network: [`FIRST_GUEST_ADDRESS`] and `index` more.
    ///
    /// # Errors
    /// When it has it already.
    pub fn give_guest_address(&self, host: Place, index: u8) -> Result<(), LabError> {
        let [a, b, c, d] = FIRST_GUEST_ADDRESS.octets();
        let address = Ipv4Addr::new(a, b, c, d.saturating_add(index));
        ip::batch(&self.namespace(host), &format!("addr add {address}/24 dev {GUEST_BRIDGE}\n"))
    }

    /// The guests' TAPs at a host.
    ///
    /// # Errors
    /// When they can't be listed.
    pub fn guest_taps(&self, host: Place) -> Result<Vec<String>, LabError> {
        let listed = ip::run(&["-n", self.namespace(host).name(), "-json", "tuntap", "show"])?;
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap_or_default();
        let names = listed.as_array().into_iter().flatten().filter_map(|tap| tap["ifname"].as_str());
        Ok(names.filter(|name| *name != MIGRATION_INTERFACE).map(str::to_owned).collect())
    }

    /// The processes that run at a place, whoever started them.
    pub fn processes(&self, place: Place) -> Vec<nix::unistd::Pid> {
        cleanup::processes_in(&self.namespace(place))
    }

    /// Makes a directory of `bytes`, a file system of its own, at a place; it goes with the lab.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub fn make_small_directory(&self, place: Place, name: &str, bytes: u64) -> Result<PathBuf, LabError> {
        let path = self.directory_of(place)?.join(name);
        let failed = || LabError::io(format!("mount {}", path.display()));
        std::fs::create_dir_all(&path).map_err(failed())?;
        let options = format!("size={bytes},mode=700");
        mount(Some("godwit-lab"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .map_err(|error| failed()(error.into()))?;
        Ok(path)
    }

    /// What the migration network has carried so far: the interfaces' own counters, the same for whoever sends.
    ///
    /// # Errors
    /// When the counters can't be read.
    pub fn wire_bytes(&self) -> Result<WireBytes, LabError> {
        let sent = |place| ip::sent_bytes(&self.namespace(place), MIGRATION_INTERFACE);
        Ok(WireBytes { a_to_b: sent(Place::A)?, b_to_a: sent(Place::B)? })
    }

    /// Shapes a relayed link anew, both directions alike; a straight one stays what it is.
    pub fn reshape(&self, shape: &Shape) {
        self.relay.iter().for_each(|relay| relay.reshape(shape));
    }

    /// Cuts a relayed link between the hosts; the guests' network stays, and so does a straight link.
    pub fn cut(&self) {
        self.relay.iter().for_each(Relay::cut);
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.relay.iter().for_each(Relay::restore);
    }

    /// What the relay did and used; nothing where there is none.
    pub fn relay_statistics(&self) -> RelayStatistics {
        self.relay.as_ref().map(Relay::statistics).unwrap_or_default()
    }

    fn make_guest_network(&self) -> Result<(), LabError> {
        for place in Place::ALL {
            ip::run(&["netns", "add", self.namespace(place).name()])?;
            self.namespace(place).run(ip::quieten)?;
            ip::batch(
                &self.namespace(place),
                "link set lo up\nlink add br0 type bridge forward_delay 0\nlink set br0 up\n",
            )?;
        }
        let lan = self.namespace(Place::Lan);
        for host in [Place::A, Place::B] {
            let port = host.client_port();
            ip::batch(
                &self.namespace(host),
                &format!(
                    "link add lan0 type veth peer name {port} netns {}\nlink set lan0 master br0 up\n",
                    lan.name()
                ),
            )?;
            ip::batch(&lan, &format!("link set {port} master br0 up\n"))?;
        }
        ip::batch(&lan, &format!("addr add {CLIENT_ADDRESS}/24 dev br0\n"))
    }

    fn relay_hosts(&mut self, shape: Shape) -> Result<(), LabError> {
        let [first, second] = [Place::A, Place::B].map(|host| {
            let tap = self.namespace(host).run(|| Tap::create(MIGRATION_INTERFACE))?;
            let tap = tap.map_err(LabError::io("make a TAP"))?;
            let address = host.address();
            ip::batch(
                &self.namespace(host),
                &format!("addr add {address}/24 dev wan0\nlink set wan0 txqueuelen 1000 up\n"),
            )?;
            ip::use_cubic(&self.namespace(host), MIGRATION_INTERFACE, address);
            Ok::<Tap, LabError>(tap)
        });
        let relay = Relay::start(first?, second?, shape).map_err(LabError::io("start the relay"))?;
        self.relay = Some(relay);
        Ok(())
    }

    fn join_hosts(&mut self, megabits_per_second: Option<u64>) -> Result<(), LabError> {
        let [a, b] = [Place::A, Place::B].map(|host| self.namespace(host));
        let pair = format!(
            "link add {MIGRATION_INTERFACE} type veth peer name {MIGRATION_INTERFACE} netns {}\n",
            b.name()
        );
        ip::batch(&a, &pair)?;
        for host in [Place::A, Place::B] {
            let address = host.address();
            ip::batch(
                &self.namespace(host),
                &format!(
                    "addr add {address}/24 dev {MIGRATION_INTERFACE}\nlink set {MIGRATION_INTERFACE} up\n"
                ),
            )?;
            ip::use_cubic(&self.namespace(host), MIGRATION_INTERFACE, address);
            if let Some(rate) = megabits_per_second {
                ip::limit(&self.namespace(host), MIGRATION_INTERFACE, rate)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        time::{Duration, Instant},
    };

    use nix::sys::socket::{getsockopt, sockopt::TcpCongestion};

    use super::*;

    /// Without root there is no lab; the check of the whole runs as root and says when it couldn't.
    fn lab(shape: Shape) -> Option<Lab> {
        match Lab::new(shape) {
            Err(LabError::NotRoot) => None,
            made => Some(made.unwrap()),
        }
    }

    #[test]
    fn bytes_cross_the_link_and_are_counted() {
        let Some(lab) = lab(Shape::symmetric(100, Duration::from_millis(20))) else { return };
        let listener =
            lab.namespace(Place::B).run(|| TcpListener::bind((Place::B.address(), 7000))).unwrap().unwrap();
        let before = lab.wire_bytes().unwrap();
        let started = Instant::now();
        let mut sender =
            lab.namespace(Place::A).run(|| TcpStream::connect((Place::B.address(), 7000))).unwrap().unwrap();
        // SYN there and SYN+ACK back: the link delays, whatever the machine is doing.
        assert!(started.elapsed() >= Duration::from_millis(20));
        assert!(getsockopt(&sender, TcpCongestion).unwrap().to_string_lossy().starts_with("cubic"));
        let (mut receiver, _) = listener.accept().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            receiver.read_to_end(&mut all).map(|_| all.len())
        });
        sender.write_all(&vec![7; 1 << 20]).unwrap();
        drop(sender);
        assert_eq!(reader.join().unwrap().unwrap(), 1 << 20);
        assert!(lab.wire_bytes().unwrap().since(before).a_to_b > 1 << 20);
    }

    #[test]
    fn a_straight_link_has_its_rate_and_no_relay() {
        let straight = Wiring::Straight { megabits_per_second: Some(8) };
        let lab = match Lab::wired(straight) {
            Err(LabError::NotRoot) => return,
            made => made.unwrap(),
        };
        let listener =
            lab.namespace(Place::B).run(|| TcpListener::bind((Place::B.address(), 7000))).unwrap().unwrap();
        let mut sender =
            lab.namespace(Place::A).run(|| TcpStream::connect((Place::B.address(), 7000))).unwrap().unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let writer = std::thread::spawn(move || sender.write_all(&vec![7; 1 << 20]));
        let started = Instant::now();
        assert_eq!(receiver.read_to_end(&mut Vec::new()).unwrap(), 1 << 20);
        writer.join().unwrap().unwrap();
        // A megabyte takes a second, less what the bucket held at first; however busy the machine is, not less.
        assert!(started.elapsed() >= Duration::from_millis(500));
        assert!(lab.wire_bytes().unwrap().a_to_b > 1 << 20);
        assert_eq!(lab.relay_statistics().cpu, Duration::ZERO);
    }

    #[test]
    fn nothing_is_left_when_a_lab_goes() {
        let Some(lab) = lab(Shape::UNSHAPED) else { return };
        let (namespace, directory) = (lab.namespace(Place::A), lab.directory().to_owned());
        let mut sleeper = lab.spawn(Place::A, "sleep", Command::new("sleep").arg("600"), true).unwrap();
        assert!(namespace.path().exists() && directory.exists());
        drop(lab);
        assert!(!namespace.path().exists() && !directory.exists());
        assert!(!sleeper.wait_for(Duration::from_secs(5)).unwrap().unwrap().success());
    }
}
