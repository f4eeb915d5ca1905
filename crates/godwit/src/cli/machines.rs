//! `godwit vm`.

use std::{fs, path::Path, process::ExitCode, time::Duration};

use godwit_qemu::machine::{Disk, Spec};

use super::{arguments::VmVerb, client::Client, console, exit::Failure};
use crate::{
    api::{AdoptRequest, Machine, Removed, RunRequest, StopRequest},
    output::{self, Output},
    quantity::size,
};

/// A specification is a page of text.
const SPEC_BYTES_MAX: u64 = 1 << 20;

/// Does what a verb says.
pub(super) async fn run(client: &Client, verb: VmVerb, output: Output) -> Result<ExitCode, Failure> {
    match verb {
        VmVerb::Run { file } => {
            let machine: Machine =
                client.post("/v1/machines", &RunRequest { spec: read_spec(&file)? }).await?;
            output.answer(&machine, |machine| format!("{} is {}", machine.name, machine.state));
        }
        VmVerb::Adopt { qmp, name } => {
            // The agent has another working directory.
            let qmp = std::path::absolute(qmp)?;
            let machine: Machine = client.post("/v1/adoptions", &AdoptRequest { qmp, name }).await?;
            output.answer(&machine, |machine| format!("{} is adopted", machine.name));
        }
        VmVerb::Ls => {
            let machines: Vec<Machine> = client.get("/v1/machines").await?;
            output.answer(&machines, |machines| output::machines(machines));
        }
        VmVerb::Show { name } => {
            let machine: Machine = client.get(&path(&name, "")).await?;
            output.answer(&machine, show);
        }
        VmVerb::Stop { name, timeout } => {
            let machine: Machine = client.post(&path(&name, "/stop"), &stop_request(timeout)).await?;
            output.answer(&machine, |machine| format!("{} is off", machine.name));
        }
        VmVerb::Resume { name } => {
            let machine: Machine = client.post(&path(&name, "/resume"), &()).await?;
            output.answer(&machine, |machine| format!("{} goes on", machine.name));
        }
        VmVerb::Kill { name } => {
            let machine: Machine = client.post(&path(&name, "/kill"), &()).await?;
            output.answer(&machine, |machine| format!("{} is off", machine.name));
        }
        VmVerb::Rm { name } => {
            let removed: Removed = client.delete(&path(&name, "")).await?;
            output.answer(&removed, |removed| format!("{} is forgotten", removed.name));
        }
        VmVerb::Console { name } => return console::run(client, &name).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// The path of a machine in the API; whatever can't be in a name can't be in the path either.
pub(super) fn path(name: &str, verb: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || *c == '-';
    format!("/v1/machines/{}{verb}", name.chars().filter(plain).collect::<String>())
}

fn stop_request(timeout: Duration) -> StopRequest {
    StopRequest { timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) }
}

fn read_spec(file: &Path) -> Result<Spec, Failure> {
    let named = |error: std::io::Error| Failure::invalid(format!("can't read {}: {error}", file.display()));
    let length = fs::metadata(file).map_err(named)?.len();
    if length > SPEC_BYTES_MAX {
        let file = file.display();
        return Err(Failure::invalid(format!("{file} is {length} bytes long; that isn't a specification")));
    }
    let text = fs::read_to_string(file).map_err(named)?;
    Spec::from_toml(&text, &file.display().to_string()).map_err(|error| Failure::invalid(error.to_string()))
}

fn show(machine: &Machine) -> String {
    let mut rows = vec![
        ["state".to_owned(), machine.state.clone()],
        ["at".to_owned(), machine.at.clone()],
        ["memory".to_owned(), size(machine.memory_bytes)],
    ];
    rows.extend(machine.pid.map(|pid| ["process".to_owned(), pid.to_string()]));
    rows.extend(machine.migration.clone().map(|id| ["migration".to_owned(), id]));
    rows.extend(machine.console.as_ref().map(|path| ["console".to_owned(), path.display().to_string()]));
    if let Some(spec) = &machine.spec {
        rows.push(["machine type".to_owned(), spec.machine.clone()]);
        rows.push(["cpu".to_owned(), format!("{} × {}", spec.vcpus, spec.cpu)]);
        rows.extend(spec.disk.iter().map(|disk| ["disk".to_owned(), content(disk)]));
        rows.extend(spec.net.iter().enumerate().map(|(index, net)| {
            let plug = net.bridge.as_ref().or(net.tap.as_ref()).map_or("-", String::as_str);
            ["network".to_owned(), format!("{plug} {}", spec.mac(index))]
        }));
        let left_behind = spec.adopted.iter().flat_map(|adopted| &adopted.left_behind);
        rows.extend(left_behind.map(|what| ["left behind".to_owned(), what.clone()]));
    }
    output::table(["name", &machine.name], &rows)
}

/// What a disk is.
fn content(disk: &Disk) -> String {
    if let Some(path) = &disk.path {
        return path.display().to_string();
    }
    let image = match (&disk.image, &disk.adopt) {
        (Some(image), _) => format!("served, began as {image}"),
        (None, Some(file)) => format!("served, above {}", file.display()),
        (None, None) => "served".to_owned(),
    };
    disk.size.map_or(image.clone(), |size| format!("{image}, {size}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_leaves_its_place_in_the_path() {
        assert_eq!(path("web1", "/stop"), "/v1/machines/web1/stop");
        assert_eq!(path("../x?y#z", ""), "/v1/machines/xyz");
    }

    #[test]
    fn a_wrong_file_is_named_with_line_and_key() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("web1.toml");
        fs::write(&file, "name = \"web1\"\nmemory = \"much\"\n").unwrap();
        let message = read_spec(&file).unwrap_err().to_string();
        assert!(message.contains("web1.toml:2: memory"), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
}
