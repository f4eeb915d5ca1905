//! Machines that somebody started by hand and the agent took on: what can differ from a machine of godwit's own.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use godwit_sim::{
    guest_image::accelerator,
    lab::{FIRST_GUEST_ADDRESS, Place, Process},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::{
    guest::{Guest, Plan, migrate},
    hosts::{EMULATOR, Hosts, MACHINE, OWN_TAP},
    moves::{BUSY, goes_there_and_back, move_and_compare},
};

/// Where the kernel is told how many huge pages to set aside.
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
const HUGE_PAGE_MB: u64 = 2;

/// A QEMU that was started by hand, and is ended with the test if it hasn't left.
pub(crate) struct ByHand {
    _qemu: Process,
    pub(crate) guest: Guest,
}

/// How it is started: QEMU's options beside those that every guest needs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Start {
    /// Of `-machine`, appended to its type.
    pub(crate) machine: &'static str,
    /// Of `-accel`.
    pub(crate) accel: &'static str,
    /// Of `-m`, appended to the size.
    pub(crate) memory: &'static str,
    /// Whatever else.
    pub(crate) more: Vec<String>,
    /// Another QEMU than the one that is installed.
    pub(crate) emulator: Option<PathBuf>,
}

impl ByHand {
    /// Boots it at host a, and has the agent adopt it.
    pub(crate) fn boot(hosts: &Hosts, plan: Plan, start: &Start) -> Self {
        for host in [Place::A, Place::B] {
            hosts.lab.make_guest_tap(host, OWN_TAP).unwrap();
        }
        let qemu = hosts.lab.spawn(Place::A, "own", &mut command(hosts, plan, start), true).unwrap();
        let guest = Guest::met(hosts, plan, FIRST_GUEST_ADDRESS);
        let monitor = hosts.a.path("own.sock").display().to_string();
        hosts.a.godwit(&["vm", "adopt", "--qmp", &monitor]).succeeds();
        Self { _qemu: qemu, guest }
    }
}

fn command(hosts: &Hosts, plan: Plan, start: &Start) -> Command {
    let monitor = |name: &str| format!("unix:{},server=on,wait=off", hosts.a.path(name).display());
    let mut command = Command::new(start.emulator.as_deref().unwrap_or(Path::new(EMULATOR)));
    command.args(["-name", MACHINE, "-nodefaults", "-display", "none", "-serial", "null"]);
    command.arg("-machine").arg(format!("{}{}", plan.machine, start.machine));
    command.arg("-accel").arg(format!("{}{}", accelerator(), start.accel));
    command.arg("-m").arg(format!("{}M{}", plan.memory_mb, start.memory));
    command.args([
        "-smp",
        &plan.vcpus.to_string(),
        "-append",
        &plan.kernel_command_line(FIRST_GUEST_ADDRESS),
    ]);
    command.arg("-kernel").arg(&hosts.image.kernel).arg("-initrd").arg(&hosts.image.initrd);
    command.args(["-netdev", &format!("tap,id=n,ifname={OWN_TAP},script=no,downscript=no")]);
    command.args(["-device", "virtio-net-pci,netdev=n"]);
    command.args(["-qmp", &monitor("own.sock"), "-qmp", &monitor("test.sock")]);
    command.args(&start.more);
    command
}

/// Main memory that is an object of its own.
fn backed_by(object: &str) -> Start {
    let object = format!("{object},id=ram,size={}M", Plan::LIGHT.memory_mb);
    Start { machine: ",memory-backend=ram", more: vec!["-object".into(), object], ..Start::default() }
}

fn travels(plan: Plan, start: &Start) {
    let hosts = Hosts::new();
    let own = ByHand::boot(&hosts, plan, start);
    goes_there_and_back(&hosts, &own.guest, &[]);
}

#[test]
fn a_machine_with_anonymous_memory_travels() {
    travels(Plan::LIGHT, &Start::default());
}

#[test]
fn a_machine_with_shared_memory_travels() {
    travels(Plan::LIGHT, &backed_by("memory-backend-memfd,share=on"));
}

#[test]
#[ignore = "takes half a minute"]
fn a_guest_of_two_processors_travels_whichever_way_qemu_emulates_them() {
    let ways: &[_] = if accelerator() == "tcg" { &[",thread=multi", ",thread=single"] } else { &[""] };
    for accel in ways {
        let plan = Plan { vcpus: 2, command: BUSY, ..Plan::PATTERN };
        travels(plan, &Start { accel, ..Start::default() });
    }
}

/// Both hosts' machines have to find huge pages, since both are there for a while.
#[test]
fn a_machine_with_huge_pages_travels() {
    let _pages = HugePages::set_aside(2 * Plan::LIGHT.memory_mb / HUGE_PAGE_MB + 8);
    travels(Plan::LIGHT, &backed_by("memory-backend-memfd,hugetlb=on,prealloc=on"));
}

#[test]
#[ignore = "differs from the one above in where the pages come from"]
fn a_machine_in_a_file_of_huge_pages_travels() {
    let _pages = HugePages::set_aside(2 * Plan::LIGHT.memory_mb / HUGE_PAGE_MB + 8);
    let hosts = Hosts::new();
    let mounted = HugeFiles::mount(hosts.shared().join("huge"));
    let start = backed_by(&format!("memory-backend-file,prealloc=on,mem-path={}", mounted.0.display()));
    let own = ByHand::boot(&hosts, Plan::LIGHT, &start);
    goes_there_and_back(&hosts, &own.guest, &[]);
}

/// Huge pages that the kernel sets aside, as many as before when this is dropped.
struct HugePages(String);

impl HugePages {
    fn set_aside(more: u64) -> Self {
        let before = fs::read_to_string(HUGE_PAGES).unwrap();
        let wanted = before.trim().parse::<u64>().unwrap() + more;
        fs::write(HUGE_PAGES, wanted.to_string()).unwrap();
        let kept = Self(before);
        assert_eq!(fs::read_to_string(HUGE_PAGES).unwrap().trim(), wanted.to_string(), "memory is too short");
        kept
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, &self.0);
    }
}

/// A directory whose files are of huge pages.
struct HugeFiles(PathBuf);

impl HugeFiles {
    fn mount(directory: PathBuf) -> Self {
        fs::create_dir(&directory).unwrap();
        mount(Some("godwit-test"), &directory, Some("hugetlbfs"), MsFlags::empty(), None::<&str>).unwrap();
        Self(directory)
    }
}

impl Drop for HugeFiles {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Its memory can't be read, its directory isn't known, and it may open none of our files.
#[test]
fn a_machine_of_another_user_travels_by_its_own_stream() {
    let mut hosts = Hosts::new();
    hosts.a.crash();
    hosts.a.start_confined(&hosts.lab);
    writable_by_anyone(&hosts);
    let start = Start { more: vec!["-run-with".into(), "user=nobody".into()], ..Start::default() };
    let own = ByHand::boot(&hosts, Plan::LIGHT, &start);
    let check = hosts.a.godwit(&["check", MACHINE, "--to", "b"]).succeeds();
    assert!(check["forecast"].is_null(), "{check}");
    let report = move_and_compare(&hosts, &own.guest, &hosts.a, &hosts.b, &[]);
    hosts.only_at(&hosts.b);
    own.guest.goes_on();
    let log =
        fs::read_to_string(hosts.a.migration_file(report["id"].as_str().unwrap(), "worker.log")).unwrap();
    assert!(log.contains("the guest's pages are taken from QEMU's stream instead"), "{log}");
    // There it is the agent's own.
    migrate(&hosts.b, &hosts.a, &[]);
    own.guest.goes_on();
}

/// QEMU saves memories itself, to be compared.
fn writable_by_anyone(hosts: &Hosts) {
    for directory in [hosts.lab.directory().to_owned(), hosts.shared()] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
    }
}

/// An equal machine couldn't be started at the target from what the agent knows.
#[test]
fn memory_that_was_plugged_in_is_refused_with_the_remedy() {
    let hosts = Hosts::new();
    let start = Start { memory: ",slots=2,maxmem=1G", ..Start::default() };
    let own = ByHand::boot(&hosts, Plan::IDLE, &start);
    let mut monitor = hosts.a.monitor();
    monitor
        .execute("object-add", json!({ "qom-type": "memory-backend-ram", "id": "m1", "size": 128 << 20 }))
        .unwrap();
    monitor.execute("device_add", json!({ "driver": "pc-dimm", "id": "dimm1", "memdev": "m1" })).unwrap();
    for verb in ["check", "migrate"] {
        let answer = hosts.a.godwit(&[verb, MACHINE, "--to", "b"]).fails(3);
        let reason = "has memory devices (dimm1), which can't be moved: unplug them (`device_del`), or start";
        assert!(answer.message.contains(reason) && answer.message.trim().lines().count() == 1, "{answer:?}");
    }
    own.guest.goes_on();
    hosts.only_at(&hosts.a);
}
