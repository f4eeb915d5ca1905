//! `ip` and `tc`, the commands of iproute2, inside namespaces.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr},
    process::{Command, Output, Stdio},
};

use super::LabError;
use crate::namespace::Namespace;

/// What a token bucket lets through at once, and how long what exceeds it may wait before it is dropped. A full frame of
/// segmentation offload has 64 KB.
const BURST: &str = "128kb";
const WAIT: &str = "20ms";

pub(super) fn run(arguments: &[&str]) -> Result<String, LabError> {
    run_program("ip", arguments)
}

fn run_program(program: &str, arguments: &[&str]) -> Result<String, LabError> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().map_err(LabError::Ip)?;
    accept(output, || format!("{program} {}", arguments.join(" ")))
}

/// Limits what an interface sends, by a token bucket (tc-tbf(8)).
pub(super) fn limit(
    namespace: &Namespace,
    interface: &str,
    megabits_per_second: u64,
) -> Result<(), LabError> {
    let rate = format!("{megabits_per_second}mbit");
    let bucket = ["root", "tbf", "rate", &rate, "burst", BURST, "latency", WAIT];
    let add = ["-n", namespace.name(), "qdisc", "add", "dev", interface];
    run_program("tc", &[&add[..], &bucket].concat()).map(|_| ())
}

/// Runs one `ip` command a line, in one process.
pub(super) fn batch(namespace: &Namespace, lines: &str) -> Result<(), LabError> {
    let arguments = ["-n", namespace.name(), "-batch", "-"];
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(LabError::Ip)?;
    let mut stdin = child.stdin.take().expect("was asked for");
    stdin.write_all(lines.as_bytes()).map_err(LabError::Ip)?;
    drop(stdin);
    accept(child.wait_with_output().map_err(LabError::Ip)?, || {
        format!("ip {}", lines.trim().replace('\n', "; "))
    })
    .map(|_| ())
}

fn accept(output: Output, arguments: impl FnOnce() -> String) -> Result<String, LabError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(LabError::IpRefused { arguments: arguments(), message })
}

/// Bytes that an interface has sent.
pub(super) fn sent_bytes(namespace: &Namespace, interface: &str) -> Result<u64, LabError> {
    let arguments = ["-n", namespace.name(), "-json", "-statistics", "link", "show", "dev", interface];
    let shown: serde_json::Value = serde_json::from_str(&run(&arguments)?).unwrap_or_default();
    shown[0]["stats64"]["tx"]["bytes"].as_u64().ok_or_else(|| LabError::IpRefused {
        arguments: format!("ip {}", arguments.join(" ")),
        message: "no stats64.tx.bytes in the answer".into(),
    })
}

/// Has TCP be the one that most hosts have between two hosts, whatever this machine prefers. It is told of the route, since
/// namespaces may not choose what the machine doesn't allow to everyone (`tcp_allowed_congestion_control`).
pub(super) fn use_cubic(namespace: &Namespace, interface: &str, address: IpAddr) {
    let IpAddr::V4(address) = address else { return };
    let network = Ipv4Addr::from_bits(address.to_bits() & !0xff);
    let route = format!(
        "route replace {network}/24 dev {interface} proto kernel scope link src {address} congctl cubic\n"
    );
    // On a kernel without it, everybody has another one: the same for all.
    let _ = batch(namespace, &route);
}

/// Makes the calling thread's namespace say nothing by itself, and keep nothing of one connection for the next: the
/// counters are to show the contenders' bytes, and no contender is to profit from the one before it.
pub(super) fn quieten() {
    for (setting, value) in [
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
        ("ipv4/tcp_no_metrics_save", "1"),
    ] {
        // A kernel without IPv6 lacks the first two; then there is nothing to silence.
        let _ = std::fs::write(format!("/proc/sys/net/{setting}"), value);
    }
}
