//! A guest that works and gives account of it, and its migrations.

use std::{fs, net::Ipv4Addr, process::Command, time::Duration};

use godwit_sim::{
    guest_image::{GuestImage, accelerator},
    lab::{FIRST_GUEST_ADDRESS, GUEST_BRIDGE, Place},
    observer::Progress,
};
use serde_json::Value;

use crate::hosts::{Answer, Host, Hosts, MACHINE, eventually};

const BOOT_LIMIT: Duration = Duration::from_secs(40);
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// What is to be booted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub machine: &'static str,
    pub memory_mb: u64,
    pub workload: &'static str,
    /// Disks, a random number generator and a balloon besides the card and the serial port.
    pub all_devices: bool,
    pub vcpus: u32,
    /// A shell's command that the guest runs again and again beside its workload; none if empty.
    pub command: &'static str,
    /// Disks that godwit serves, as they stand in the machine's file.
    pub disks: &'static str,
}

impl Plan {
    pub(crate) const IDLE: Plan = Plan {
        machine: "pc",
        memory_mb: 256,
        workload: "idle",
        all_devices: false,
        vcpus: 1,
        command: "",
        disks: "",
    };
    pub(crate) const LIGHT: Plan = Plan { workload: "light", ..Plan::IDLE };
    pub(crate) const MEDIUM: Plan = Plan { workload: "medium", ..Plan::IDLE };
    /// Does nothing but write to its memory.
    pub(crate) const PATTERN: Plan = Plan { workload: "pattern", ..Plan::IDLE };

    /// What the guest's kernel is told.
    pub(crate) fn kernel_command_line(self, address: Ipv4Addr) -> String {
        let line = GuestImage::command_line(self.workload, address, None);
        let command = Some(self.command).filter(|command| !command.is_empty());
        line + &command.map(GuestImage::command_word).unwrap_or_default()
    }

    /// The machine's specification, its disk made.
    fn specification(self, hosts: &Hosts, name: &str, address: Ipv4Addr) -> String {
        let (kernel, initrd) = (hosts.image.kernel.display(), hosts.image.initrd.display());
        let (append, accel) = (self.kernel_command_line(address), accelerator());
        let Self { machine, memory_mb, all_devices, vcpus, .. } = self;
        let mut devices = format!("[[net]]\nbridge = \"{GUEST_BRIDGE}\"\n{}", self.disks);
        if all_devices {
            let disk = hosts.shared().join("disk.raw");
            fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
            devices.push_str(&format!("[[disk]]\npath = {disk:?}\ncache = \"writeback\"\n"));
            let disk = hosts.shared().join("disk.qcow2");
            let made =
                Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("16M").status();
            assert!(made.unwrap().success());
            devices
                .push_str(&format!("[[disk]]\npath = {disk:?}\nformat = \"qcow2\"\ncache = \"writeback\"\n"));
        }
        format!(
            "name = \"{name}\"\nmachine = \"{machine}\"\naccel = \"{accel}\"\nvcpus = {vcpus}\n\
             memory = \"{memory_mb}M\"\nrng = {all_devices}\nballoon = {all_devices}\n\n\
             [boot]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\nappend = \"{append}\"\n\n{devices}"
        )
    }
}

/// A guest, with a TCP connection from its clients' network that is held through all its moves.
pub(crate) struct Guest {
    plan: Plan,
    progress: Progress,
}

impl Guest {
    /// Boots it at host a.
    pub(crate) fn boot(hosts: &Hosts, plan: Plan) -> Self {
        Self::boot_as(hosts, plan, MACHINE, FIRST_GUEST_ADDRESS)
    }

    /// The same, one of several.
    pub(crate) fn boot_as(hosts: &Hosts, plan: Plan, name: &str, address: Ipv4Addr) -> Self {
        Self::run(hosts, plan, name, address).succeeds();
        Self::met(hosts, plan, address)
    }

    /// Tries to boot it at host a, which refuses; why.
    pub(crate) fn refused(hosts: &Hosts, plan: Plan) -> String {
        let answer = Self::run(hosts, plan, MACHINE, FIRST_GUEST_ADDRESS);
        assert_ne!(answer.code, 0, "{answer:?}");
        answer.message
    }

    fn run(hosts: &Hosts, plan: Plan, name: &str, address: Ipv4Addr) -> Answer {
        let file = hosts.a.path(&format!("{name}.toml"));
        fs::write(&file, plan.specification(hosts, name, address)).unwrap();
        hosts.a.godwit(&["vm", "run", &file.display().to_string()])
    }

    /// A guest that is booting at host a.
    pub(crate) fn met(hosts: &Hosts, plan: Plan, address: Ipv4Addr) -> Self {
        let clients = hosts.lab.namespace(Place::Lan);
        let progress = Progress::connect(&clients, address, BOOT_LIMIT).unwrap();
        let guest = Self { plan, progress };
        guest.goes_on();
        guest
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.plan.memory_mb << 20
    }

    /// Tells it to do something to itself, such as `suspend`.
    pub(crate) fn is_told(&self, order: &str) {
        self.progress.tell(order).unwrap();
    }

    /// What its command does goes on.
    pub(crate) fn works_on(&self) {
        let before = self.progress.writes();
        eventually("the guest's command goes on", || self.progress.writes() > before + 1);
    }

    /// It works, its connection lives, and its whole working set is what it ever wrote.
    pub(crate) fn goes_on(&self) {
        if self.plan.workload != "idle" {
            let before = self.progress.writes();
            eventually("the guest writes", || self.progress.writes() > before);
        }
        self.progress.check(CHECK_LIMIT).unwrap();
    }
}

/// Moves the machine and returns the source's report.
pub(crate) fn migrate(from: &Host, to: &Host, options: &[&str]) -> Value {
    let report = from.godwit(&[&["migrate", MACHINE, "--to", to.name()], options].concat()).succeeds();
    assert_eq!(report["outcome"], "completed", "{report}");
    report
}

/// A migration under way.
pub(crate) struct Migration<'a> {
    pub id: String,
    pub from: &'a Host,
}

impl<'a> Migration<'a> {
    pub(crate) fn begin(from: &'a Host, to: &Host, options: &[&str]) -> Self {
        Self::begin_with(MACHINE, from, to, options)
    }

    /// The same of one of several machines.
    pub(crate) fn begin_with(machine: &str, from: &'a Host, to: &Host, options: &[&str]) -> Self {
        let begin = ["migrate", machine, "--detach", "--to", to.name()];
        let answer = from.godwit(&[&begin, options].concat()).succeeds();
        Self { id: answer["id"].as_str().unwrap().to_owned(), from }
    }

    /// Waits until it is in a phase, or past it.
    pub(crate) fn reaches(&self, phase: &str) {
        let (phase, over) = (format!("\"phase\":\"{phase}\""), "\"event\":\"finished\"");
        eventually(&phase, || {
            let events =
                fs::read_to_string(self.from.migration_file(&self.id, "events.ndjson")).unwrap_or_default();
            events.contains(&phase) || events.contains(over)
        });
    }

    pub(crate) fn cancel(&self) -> Answer {
        self.from.godwit(&["cancel", &self.id])
    }

    /// Waits for its end; the command's exit code, and the report.
    pub(crate) fn ends(&self) -> (i32, Value) {
        let code = self.from.godwit(&["status", &self.id, "--watch"]).code;
        (code, self.from.godwit(&["status", &self.id]).json["report"].clone())
    }
}
