//! From a bare kernel to a system with file systems, drivers and an address.

use std::{fs::File, net::Ipv4Addr, path::Path, process::Command};

use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount as mount_at},
};

/// Names the modules to load, one a line, in an order in which each finds what it needs.
const MODULE_LIST: &str = "/modules/order";

/// Mounts `/proc`, `/sys` and `/dev`, and gives busybox its names.
pub(crate) fn mount() {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        if let Err(error) = mount_at(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>) {
            eprintln!("cannot mount {at}: {error}");
        }
    }
    run("/bin/busybox", &["--install", "-s", "/bin"]);
}

/// The kernel's command line.
pub(crate) fn kernel_command_line() -> String {
    std::fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// Loads the modules of the image. One that fails is named and left out.
pub(crate) fn load_modules() {
    for name in std::fs::read_to_string(MODULE_LIST).unwrap_or_default().lines() {
        let path = Path::new("/modules").join(name);
        let loaded = File::open(&path).map_err(|error| error.to_string()).and_then(|file| {
            finit_module(&file, c"", ModuleInitFlags::empty()).map_err(|error| error.to_string())
        });
        if let Err(error) = loaded {
            eprintln!("cannot load {name}: {error}");
        }
    }
}

/// Raises `lo` and `eth0`; false: there is no network.
pub(crate) fn raise_network(address: Ipv4Addr) -> bool {
    run("/bin/ip", &["link", "set", "lo", "up"]);
    run("/bin/ip", &["addr", "add", &format!("{address}/24"), "dev", "eth0"])
        && run("/bin/ip", &["link", "set", "eth0", "up"])
}

/// Lowers `eth0` again. Without that a shutdown can hang: this kernel's virtio-net spins for ever when it is to send through
/// a device that was shut down.
pub(crate) fn lower_network() {
    run("/bin/ip", &["link", "set", "eth0", "down"]);
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let ended = Command::new(program).args(arguments).status();
    let succeeded = ended.as_ref().is_ok_and(|status| status.success());
    if !succeeded {
        eprintln!("{program} {}: {ended:?}", arguments.join(" "));
    }
    succeeded
}
