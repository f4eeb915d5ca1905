//! What runs in the test guests, as process 1 of an initramfs that holds it, busybox and a few kernel modules.
//!
//! It writes to a working set at a set pace and lets others see how it fares: a counter over TCP, a beat over UDP, and
//! on request a check of every page against all that was ever written. The kernel command line says what to do:
//!
//! | word | meaning |
//! |---|---|
//! | `workload=NAME` | `idle` (default), `light`, `medium`, `heavy`, `harsh`, `pattern`, `steady`; see [`workload::Workload::named`] |
//! | `address=A.B.C.D` | the guest's address, 24 bits of prefix |
//! | `observer=A.B.C.D:PORT` | where the beat goes; none without it |
//! | `seed=N` | what is written, and where, follows from it |
//! | `command=HEX` | a shell's command, as hexadecimal bytes since it may have blanks, run again and again; each line that it prints counts like a write |
//!
//! It knows nothing of migrations, may use nothing of the product, and must not catch up: time that a migration took
//! from it is to show as writes that were never made.

mod boot;
mod command;
mod power;
mod random;
mod service;
mod workload;

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use workload::{WorkingSet, Workload};

/// The line on the serial console after which the guest works and answers.
const READY: &str = "GODWIT-GUEST READY";

fn main() {
    boot::mount();
    let order = Order::parse(&boot::kernel_command_line());
    boot::load_modules();
    let networked = order.address.is_some_and(boot::raise_network);
    let workload = Workload::named(&order.workload).unwrap_or_else(|| {
        eprintln!("no workload {}: idle", order.workload);
        Workload::IDLE
    });
    let set = Arc::new(Mutex::new(WorkingSet::fill(workload, order.seed)));
    let work = Arc::new(AtomicU64::new(0));
    if networked {
        service::start(&set, &work, order.observer);
    }
    if let Some(command) = order.command {
        std::thread::spawn(move || command::keep_running(&command, &work));
    }
    let pace = Arc::clone(&set);
    std::thread::spawn(move || service::keep_pace(&pace, workload));
    println!("{READY}");
    serve_console();
}

/// What the kernel command line asks for.
#[derive(Debug, PartialEq, Eq)]
struct Order {
    workload: String,
    address: Option<Ipv4Addr>,
    observer: Option<SocketAddr>,
    seed: u64,
    command: Option<String>,
}

impl Order {
    fn parse(command_line: &str) -> Order {
        let value = |name: &str| {
            let mut words = command_line.split_whitespace().filter_map(|word| word.split_once('='));
            words.find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        Order {
            workload: value("workload").unwrap_or("idle").into(),
            address: value("address").and_then(|text| text.parse().ok()),
            observer: value("observer").and_then(|text| text.parse().ok()),
            seed: value("seed").and_then(|text| text.parse().ok()).unwrap_or(1),
            command: value("command").and_then(from_hexadecimal),
        }
    }
}

fn from_hexadecimal(text: &str) -> Option<String> {
    let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let bytes =
        digits?.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte * 16 + *digit as u8)).collect();
    String::from_utf8(bytes).ok()
}

/// Keeps a shell on the console. Process 1 may not end.
fn serve_console() -> ! {
    loop {
        if let Ok(mut shell) = Command::new("/bin/setsid").args(["-c", "/bin/sh", "-l"]).spawn() {
            let _ = shell.wait();
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_and_nonsense_ignored() {
        let order =
            Order::parse("console=ttyS0 quiet workload=light address=10.78.0.10 observer=10.78.0.1:9 seed=x");
        assert_eq!(
            order,
            Order {
                workload: "light".into(),
                address: Some(Ipv4Addr::new(10, 78, 0, 10)),
                observer: Some(([10, 78, 0, 1], 9).into()),
                seed: 1,
                command: None,
            }
        );
        assert_eq!(Order::parse("").workload, "idle");
    }

    #[test]
    fn a_command_comes_as_bytes() {
        assert_eq!(Order::parse("command=6c73202d6c").command.as_deref(), Some("ls -l"));
        for wrong in ["command=6x", "command=ls", "command=ff"] {
            assert_eq!(Order::parse(wrong).command, None, "{wrong}");
        }
    }
}
