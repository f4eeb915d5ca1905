//! One turn of fio.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::{Pattern, contender::Target};

/// What a turn came to. Reads and writes together where there are both.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Measured {
    pub(super) iops: f64,
    pub(super) mib_s: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

/// For some seconds, anywhere on the disk.
pub(super) fn run(pattern: &Pattern, target: &Target, disk_mb: u64, seconds: u32) -> Result<Measured> {
    let mut command = command(pattern, target, disk_mb);
    command.args(["--time_based", "--norandommap"]).arg(format!("--runtime={seconds}"));
    measured(&mut command)
}

/// Each part of the disk once.
pub(super) fn once(pattern: &Pattern, target: &Target, disk_mb: u64) -> Result<Measured> {
    measured(&mut command(pattern, target, disk_mb))
}

fn command(pattern: &Pattern, target: &Target, disk_mb: u64) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=turn", "--output-format=json", "--randrepeat=0"]);
    command.arg(format!("--rw={}", pattern.kind)).arg(format!("--bs={}", pattern.block));
    command.arg(format!("--iodepth={}", pattern.queue_depth)).arg(format!("--size={disk_mb}M"));
    command.args(pattern.sync_every.map(|writes| format!("--fsync={writes}")));
    match target {
        Target::Socket(socket) => {
            command.arg("--ioengine=nbd").arg(format!("--uri=nbd+unix:///disk?socket={}", socket.display()));
        }
        Target::File(file) => {
            command.arg("--ioengine=io_uring").arg(format!("--filename={}", file.display()));
        }
    }
    command
}

fn measured(command: &mut Command) -> Result<Measured> {
    let output = command.output().context("cannot run fio")?;
    if !output.status.success() {
        bail!("fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    // Notes may stand before the JSON.
    let said = String::from_utf8_lossy(&output.stdout);
    let json = said.find('{').map(|start| &said[start..]).context("fio says nothing")?;
    read(&serde_json::from_str(json)?)
}

fn read(said: &Value) -> Result<Measured> {
    let job = &said["jobs"][0];
    if let Some(error) = job["error"].as_i64().filter(|&error| error != 0) {
        bail!("fio's job failed with error {error}");
    }
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let sides = [&job["read"], &job["write"]];
    let sum = |field: &str| sides.iter().map(|side| number(&side[field])).sum::<f64>();
    let worst = |percentile: &str| {
        sides.iter().map(|side| number(&side["clat_ns"]["percentile"][percentile])).fold(0.0, f64::max) / 1e3
    };
    let measured = Measured {
        iops: sum("iops"),
        mib_s: sum("bw_bytes") / f64::from(1 << 20),
        p50_us: worst("50.000000"),
        p99_us: worst("99.000000"),
    };
    if measured.iops == 0.0 {
        bail!("fio did nothing");
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_sides_are_added_and_the_slower_tells_the_latency() {
        let side = |iops: u64, p99: u64| {
            json!({"iops": iops, "bw_bytes": iops * 65536,
                   "clat_ns": {"percentile": {"50.000000": 1000, "99.000000": p99}}})
        };
        let said = json!({"jobs": [{"error": 0, "read": side(700, 5000), "write": side(300, 9000)}]});
        let measured = Measured { iops: 1000.0, mib_s: 62.5, p50_us: 1.0, p99_us: 9.0 };
        assert_eq!(read(&said).unwrap(), measured);
        assert!(read(&json!({"jobs": [{"error": 5}]})).is_err());
    }
}
