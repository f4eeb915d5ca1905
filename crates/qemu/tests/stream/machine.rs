//! A real QEMU for the tests: a tiny machine without an operating system whose boot sector keeps dirtying memory.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use godwit_qemu::memory::{MemoryRange, ProcessMemory};
use godwit_qemu::ramblock::{self, RamBlockAddress};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

/// Where the boot sector counts.
const COUNTER_ADDRESS: u64 = 0x8000;

const BOOT_ADDRESS: u64 = 0x7c00;

/// Real-mode code: counts at [`COUNTER_ADDRESS`] and in the first word of each page from 0x10000 to 0x80000.
const BOOT_CODE: [u8; 32] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x66, 0xff, 0x06, 0x00, 0x80, // again: inc dword [0x8000]
    0xbb, 0x00, 0x10, // mov bx, 0x1000
    0x8e, 0xc3, // next: mov es, bx
    0x26, 0x66, 0xff, 0x06, 0x00, 0x00, // inc dword [es:0]
    0x81, 0xc3, 0x00, 0x01, // add bx, 0x100
    0x81, 0xfb, 0x00, 0x80, // cmp bx, 0x8000
    0x72, 0xee, // jb next
    0xeb, 0xe4, // jmp again
];

/// A boot disk with the code above.
fn boot_disk(directory: &Path) -> PathBuf {
    let mut disk = vec![0; 1 << 20];
    disk[..BOOT_CODE.len()].copy_from_slice(&BOOT_CODE);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = directory.join("boot.img");
    std::fs::write(&path, disk).unwrap();
    path
}

/// A QEMU that is killed when the test is over.
pub(crate) struct Machine {
    child: Child,
    monitor: BufReader<UnixStream>,
    directory: PathBuf,
    name: &'static str,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Machine {
    pub(crate) fn start(directory: &Path, name: &'static str, arguments: &str) -> Self {
        let socket = directory.join(format!("{name}.qmp"));
        let disk = boot_disk(directory);
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-accel", "tcg"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(["-drive", &format!("if=none,id=boot,format=raw,readonly=on,file={}", disk.display())])
            .args(["-device", "virtio-blk-pci,drive=boot,bootindex=0"])
            .args(arguments.split_whitespace())
            .stdin(Stdio::null())
            .spawn()
            .expect("these tests need qemu-system-x86_64 (Debian: package qemu-system-x86, version 10)");
        let stream = connect(&socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let directory = directory.to_owned();
        let monitor = BufReader::new(stream);
        let mut machine = Self { child, monitor, directory, name };
        machine.line();
        machine.execute("qmp_capabilities", json!({}));
        machine
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{request}").unwrap();
        loop {
            let mut answer = self.line();
            if answer.get("event").is_some() {
                continue;
            }
            assert!(answer.get("error").is_none(), "{}: {command}: {answer}", self.name);
            return answer["return"].take();
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{}: {line:?}: {error}", self.name))
    }

    pub(crate) fn status(&mut self) -> String {
        self.execute("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    pub(crate) fn wait_for_status(&mut self, status: &str) {
        wait(&format!("{} to be {status}", self.name), || self.status() == status);
    }

    pub(crate) fn capabilities(&mut self, names: &[&str]) {
        let on = names.iter().map(|name| json!({ "capability": name, "state": true })).collect::<Vec<_>>();
        self.execute("migrate-set-capabilities", json!({ "capabilities": on }));
    }

    fn ram_blocks(&mut self) -> Vec<RamBlockAddress> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": "info ramblock" }));
        ramblock::parse(answer.as_str().unwrap()).unwrap()
    }

    pub(crate) fn ram_block(&mut self, name: &str) -> RamBlockAddress {
        self.ram_blocks().into_iter().find(|block| block.name == name).unwrap()
    }

    /// The memory of one block, reached from outside.
    pub(crate) fn memory(&mut self, block: &str) -> ProcessMemory {
        let block = self.ram_block(block);
        let range = MemoryRange { host_address: block.host_address.unwrap(), bytes: block.used_bytes };
        ProcessMemory::open(self.child.id(), &[range]).unwrap()
    }

    /// Guest-physical memory as QEMU itself saves it.
    pub(crate) fn saved(&mut self, address: u64, bytes: u64) -> Vec<u8> {
        let file = self.directory.join(format!("{}.memory", self.name));
        self.execute("pmemsave", json!({ "val": address, "size": bytes, "filename": file.to_str() }));
        std::fs::read(file).unwrap()
    }

    pub(crate) fn counter(&mut self) -> u32 {
        let bytes = self.saved(COUNTER_ADDRESS, 4);
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    /// Until the firmware is through and the boot sector counts.
    pub(crate) fn wait_for_boot(&mut self) {
        wait("the boot sector to run", || {
            let counted = self.counter();
            self.saved(BOOT_ADDRESS, BOOT_CODE.len() as u64) == BOOT_CODE && self.counter() != counted
        });
    }
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let mut stream = None;
    wait(&format!("{}", socket.display()), || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    stream.unwrap()
}

pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        sleep(Duration::from_millis(5));
    }
}
