//! Disks that godwit serves, below guests that read what they wrote.

use std::{fs, path::Path, process::Command, thread::sleep, time::Duration};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    guest::{Guest, Plan},
    hosts::{Host, Hosts, MACHINE, eventually},
};

/// Writes half a megabyte of random bytes somewhere on the disk, reads it past the guest's cache, and prints a line if it is
/// the same. If it once isn't, nothing is printed any more.
const WRITE_AND_READ: &str = "I=0; while true; do I=$((I+1)); AT=$((I*37%120)); \
    dd if=/dev/urandom of=/tmp/a bs=64k count=8 2>/dev/null; \
    dd if=/tmp/a of=/dev/vda bs=64k seek=$AT conv=notrunc,fsync 2>/dev/null; \
    echo 3 > /proc/sys/vm/drop_caches; \
    dd if=/dev/vda of=/tmp/b bs=64k skip=$AT count=8 2>/dev/null; \
    cmp /tmp/a /tmp/b || sleep 99999; echo same; done";

/// Reads all of the disk, a chunk at a time and here and there; meanwhile writes to blocks of its beginning, over and over,
/// and prints a line each time.
const READ_AND_WRITE: &str = "(I=0; while [ $I -lt 64 ]; do I=$((I+1)); \
    dd if=/dev/vda of=/dev/null bs=256k skip=$((I*37%64)) count=1 iflag=direct 2>/dev/null; sleep 0.2; done) & \
    I=0; while true; do I=$((I+1)); \
    dd if=/dev/zero of=/dev/vda bs=4k seek=$((I%16)) count=1 oflag=direct conv=notrunc 2>/dev/null; \
    echo written; done";

/// As many blocks that command writes.
const WRITTEN_BLOCKS: u64 = 16;

/// A disk of the image that [`import`] brings.
const IMAGE_DISK: &str = "[[disk]]\nimage = \"root\"\n";

const DISKS: &str = "[[disk]]\nsize = \"16M\"\n";

#[test]
fn a_guest_does_not_notice_that_the_server_of_its_disk_or_the_agent_dies() {
    let mut hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, command: WRITE_AND_READ, ..Plan::IDLE });
    guest.works_on();
    for round in 0..5 {
        kill_server(&hosts.a);
        if round == 2 {
            hosts.a.crash();
            hosts.a.start(&hosts.lab);
        }
        guest.works_on();
        sleep(Duration::from_millis(150));
    }
    assert_eq!(hosts.a.machine()["state"], "running");
}

#[test]
fn a_disk_is_closed_with_its_machine_and_is_there_when_that_runs_again() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, command: WRITE_AND_READ, ..Plan::IDLE });
    guest.works_on();
    hosts.a.godwit(&["vm", "kill", MACHINE]).succeeds();
    assert_eq!(servers(&hosts.a), []);
    let content = || fs::read(hosts.a.path(&format!("state/disks/{MACHINE}.0/data"))).unwrap();
    let before = content();
    assert!(before.iter().any(|byte| *byte != 0));

    let idle = Guest::boot(&hosts, Plan { disks: DISKS, ..Plan::IDLE });
    idle.goes_on();
    assert!(content() == before);
    let log = fs::read_to_string(hosts.a.path(&format!("state/disks/{MACHINE}.0/server.log"))).unwrap();
    assert!(log.contains("ending=Closed"), "{log}");
}

#[test]
fn a_machine_with_a_served_disk_is_not_sent_away_yet() {
    let hosts = Hosts::new();
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, ..Plan::IDLE });
    let refused = hosts.a.godwit(&["migrate", MACHINE, "--to", hosts.b.name()]).fails(3);
    assert!(refused.message.contains("served by its host"), "{refused:?}");
    guest.goes_on();
}

#[test]
fn what_an_away_repository_has_is_waited_for_and_everything_else_goes_on() {
    let hosts = Hosts::new();
    let repository = hosts.a.path("repository");
    import(&hosts.a, 16);
    let guest = Guest::boot(&hosts, Plan { disks: IMAGE_DISK, command: READ_AND_WRITE, ..Plan::IDLE });
    guest.works_on();
    let away = hosts.a.path("away");
    fs::rename(&repository, &away).unwrap();
    sleep(Duration::from_secs(2));
    let fetched = fetched_bytes(&hosts.a);
    assert!(fetched < 16 << 20, "all was fetched too soon");
    for _ in 0..5 {
        guest.works_on();
    }
    assert_eq!(fetched_bytes(&hosts.a), fetched);
    fs::rename(&away, &repository).unwrap();
    eventually("all was read", || fetched_bytes(&hosts.a) + 4096 * WRITTEN_BLOCKS >= 16 << 20);
    guest.works_on();
    let log = fs::read_to_string(hosts.a.path(&format!("state/disks/{MACHINE}.0/server.log"))).unwrap();
    assert!(log.contains("the repository is away"), "{log}");
}

#[test]
fn a_file_is_adopted_without_being_copied_or_changed() {
    let hosts = Hosts::new();
    let (raw, qcow2) = (hosts.shared().join("own.raw"), hosts.shared().join("own.qcow2"));
    write_random(&raw, 16);
    let convert = ["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()];
    assert!(Command::new("qemu-img").args(convert).status().unwrap().success());
    let before = fs::read(&qcow2).unwrap();

    let as_raw = format!("[[disk]]\nadopt = {qcow2:?}\n").leak();
    let refused = Guest::refused(&hosts, Plan { disks: as_raw, ..Plan::IDLE });
    assert!(refused.contains("begins like a qcow2"), "{refused}");

    let disks = format!("[[disk]]\nadopt = {qcow2:?}\nformat = \"qcow2\"\n").leak();
    let guest = Guest::boot(&hosts, Plan { disks, command: READ_AND_WRITE, ..Plan::IDLE });
    guest.works_on();
    guest.works_on();
    let writer =
        Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 512"]).arg(&qcow2).output().unwrap();
    assert!(!writer.status.success(), "QEMU may write beneath a disk that is in use");
    eventually("its blocks are written", || total(&hosts.a, "written_bytes") == 4096 * WRITTEN_BLOCKS);
    hosts.a.godwit(&["vm", "kill", MACHINE]).succeeds();
    assert_eq!(total(&hosts.a, "fetched_bytes"), 0);
    assert!(fs::read(&qcow2).unwrap() == before);

    let exported = hosts.shared().join("exported");
    let name = format!("{MACHINE}.0");
    hosts.a.godwit(&["disk", "export", &name, "--to", exported.to_str().unwrap()]).succeeds();
    let (exported, raw) = (fs::read(exported).unwrap(), fs::read(raw).unwrap());
    let written = 4096 * WRITTEN_BLOCKS as usize;
    assert!(exported[..written].iter().all(|byte| *byte == 0) && exported[written..] == raw[written..]);

    fs::write(&qcow2, before).unwrap();
    let refused = Guest::refused(&hosts, Plan { disks, ..Plan::IDLE });
    assert!(refused.contains("was changed since it was adopted"), "{refused}");
}

#[test]
fn a_host_without_space_stops_the_machine_and_its_guest_sees_nothing() {
    let hosts = Hosts::new();
    let disks = hosts.a.path("state/disks");
    fs::create_dir_all(&disks).unwrap();
    let place = Mounted::tmpfs(&disks, "size=6M");
    let refused = hosts.a.godwit(&["vm", "resume", MACHINE]).fails(4);
    assert!(refused.message.contains(MACHINE), "{refused:?}");
    let guest = Guest::boot(&hosts, Plan { disks: DISKS, command: WRITE_AND_READ, ..Plan::IDLE });
    guest.works_on();
    eventually("it stops", || hosts.a.machine()["state"] == "io-error");
    place.remount("size=64M");
    hosts.a.godwit(&["vm", "resume", MACHINE]).succeeds();
    guest.works_on();
    let refused = hosts.a.godwit(&["vm", "resume", MACHINE]).fails(3);
    assert!(refused.message.contains("nothing to resume"), "{refused:?}");
    hosts.a.godwit(&["vm", "kill", MACHINE]).succeeds();
}

/// A file system in memory, until it is dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, options: &str) -> Self {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
        Self(at.to_owned())
    }

    fn remount(&self, options: &str) {
        mount(None::<&str>, &self.0, None::<&str>, MsFlags::MS_REMOUNT, Some(options)).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever still has files there keeps them until they are closed.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Brings an image of random bytes into a host's repository, called `root`.
fn import(host: &Host, megabytes: usize) {
    let file = host.path("root.raw");
    write_random(&file, megabytes);
    let (file, repository) = (file.display().to_string(), host.path("repository").display().to_string());
    host.godwit(&["image", "--repository", &repository, "import", &file, "--name", "root"]).succeeds();
}

fn write_random(file: &Path, megabytes: usize) {
    let mut bytes = vec![0; megabytes << 20];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    fs::write(file, bytes).unwrap();
}

fn fetched_bytes(host: &Host) -> u64 {
    total(host, "fetched_bytes")
}

/// How much of the machine's disk is somewhere.
fn total(host: &Host, place: &str) -> u64 {
    let disk = host.godwit(&["disk", "show", &format!("{MACHINE}.0")]).succeeds();
    disk["total"][place].as_u64().unwrap()
}

/// Kills the server of the machine's disk, and waits for the next.
fn kill_server(host: &Host) {
    let before = servers(host);
    assert_eq!(before.len(), 1);
    kill(before[0], Signal::SIGKILL).unwrap();
    eventually("another server is up", || servers(host).first().is_some_and(|server| *server != before[0]));
}

/// The servers of a host's disks.
fn servers(host: &Host) -> Vec<Pid> {
    let own = host.path("state/disks");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments);
        arguments.contains("disk-server") && arguments.contains(own.to_str().unwrap())
    })
    .map(Pid::from_raw)
    .collect()
}
