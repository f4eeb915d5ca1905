//! Starting QEMU for a machine, and clearing away what it leaves.
//!
//! ```text
//! note written ──► disks served ──► TAPs made ──► QEMU starts, daemonises ──► monitor answers ──► process and spec written down
//!     └────── any failure: QEMU killed, TAPs removed, note removed; by the next agent, if this one died ──┘
//! ```

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use godwit_qemu::{
    commandline::{Launch, build},
    machine::{Accel, Spec},
};
use tokio::time::timeout;

use super::{
    Agent, disks,
    error::AgentError,
    machines::monitor,
    process::{self, Privilege, Process},
    state::{MachineDir, Running, Starting},
    taps,
};

/// How long QEMU may take until it is up: it allocates memory and opens images.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// QEMU's complaints are shown up to here.
const COMPLAINT_CHARS_MAX: usize = 400;

/// Starts the machine in its directory and writes down process and spec, with its versioned machine type.
///
/// A QEMU of this machine that is there already is left alone, and none is started beside it. A failure leaves nothing
/// behind but the directory; an agent that dies on the way leaves a note, by which the next one undoes what was begun
/// ([`undo`]).
pub(super) async fn start(
    agent: &Agent,
    spec: Spec,
    directory: &MachineDir,
    incoming: bool,
) -> Result<Running, AgentError> {
    // What fails from here on ends every QEMU that was started with this machine's pid file.
    if let Some(process) = process::with_argument(&directory.files().pid_file()).first() {
        let found = format!("process {} is a QEMU of it that this host doesn't know of", process.pid);
        return Err(AgentError::Start(found));
    }
    let starting = Starting { taps: tap_names(agent, &spec), incoming };
    directory.set_starting(&starting)?;
    let started = bring_up(agent, spec, directory, &starting).await;
    match &started {
        Ok(_) if incoming => {}
        Ok(_) => directory.set_started(),
        Err(_) => undo(directory, &starting).await,
    }
    started
}

async fn bring_up(
    agent: &Agent,
    mut spec: Spec,
    directory: &MachineDir,
    starting: &Starting,
) -> Result<Running, AgentError> {
    agent.serve_disks(&spec, directory).await?;
    let taps = make_taps(&spec, &starting.taps).await?;
    let process = launch(agent, &spec, directory, taps, starting.incoming).await?;
    let running = Running { process, taps: starting.taps.clone(), adopted_qmp: None };
    spec.machine = monitor(directory, &running).await?.machine_type().await?;
    directory.create(&spec)?;
    directory.set_running(&running)?;
    Ok(running)
}

/// Removes the TAPs, sockets and the note of a machine whose process is gone (or no concern of ours any more).
pub(super) async fn clear(directory: &MachineDir) {
    if let Ok(Some(running)) = directory.running() {
        remove_taps(&running.taps).await;
    }
    disks::end_servers(directory).await;
    directory.clear_running();
    directory.set_started();
}

/// Undoes a start that an agent which died left half done: whatever QEMU was started ends, and its TAPs go.
pub(super) async fn undo(directory: &MachineDir, starting: &Starting) {
    let noted = directory.running().ok().flatten().map(|running| running.process);
    for process in process::with_argument(&directory.files().pid_file()).into_iter().chain(noted) {
        tracing::info!(pid = process.pid, "of a start that wasn't finished; ended");
        process.kill();
    }
    remove_taps(&starting.taps).await;
    clear(directory).await;
}

/// The names of the TAPs that are made for a machine, in the order of its bridged cards.
fn tap_names(agent: &Agent, spec: &Spec) -> Vec<String> {
    let bridged = spec.net.iter().enumerate().filter(|(_, net)| net.bridge.is_some());
    bridged.map(|(index, _)| taps::name(agent.config.name.as_str(), &spec.name, index)).collect()
}

/// Makes the TAPs with these names; returns those of all cards, in order.
async fn make_taps(spec: &Spec, names: &[String]) -> Result<Vec<String>, AgentError> {
    let (mut all, mut names) = (Vec::new(), names.iter());
    for net in &spec.net {
        match (&net.bridge, &net.tap) {
            (Some(bridge), _) => {
                let Some(tap) = names.next() else { break };
                taps::create(tap, bridge, net.queues > 1).await?;
                all.push(tap.clone());
            }
            (None, tap) => all.extend(tap.clone()),
        }
    }
    Ok(all)
}

async fn remove_taps(made: &[String]) {
    for tap in made {
        taps::remove(tap).await;
    }
}

/// Starts QEMU and waits until it has daemonised.
async fn launch(
    agent: &Agent,
    spec: &Spec,
    directory: &MachineDir,
    taps: Vec<String>,
    incoming: bool,
) -> Result<Process, AgentError> {
    let accel = match spec.accel {
        Accel::Auto => agent.accelerator().await,
        chosen => chosen,
    };
    let emulator = agent.emulator.clone();
    let launch = Launch { emulator, accel, directory: directory.files().clone(), taps, incoming };
    let arguments = build(spec, &launch)?;
    #[cfg(feature = "sabotage")]
    let arguments = crate::sabotage::without_dash_s(arguments);
    directory.clear_running();
    let output = run(arguments).await?;
    // What QEMU says before it has opened its log is on standard error, the rest in the log.
    let mut complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    complaint.push_str(&std::fs::read_to_string(directory.files().log()).unwrap_or_default());
    if !output.status.success() {
        return Err(AgentError::Start(shorten(&complaint)));
    }
    if !complaint.trim().is_empty() {
        tracing::warn!(machine = spec.name, "QEMU says: {}", shorten(&complaint));
    }
    let pid = std::fs::read_to_string(directory.files().pid_file()).ok();
    let process = pid.and_then(|pid| Process::of(pid.trim().parse().ok()?));
    process.ok_or_else(|| AgentError::Start("it ended as soon as it was up".to_owned()))
}

async fn run(arguments: Vec<String>) -> Result<Output, AgentError> {
    let failed = |error: std::io::Error| AgentError::Start(error.to_string());
    let (program, arguments) =
        arguments.split_first().ok_or_else(|| AgentError::Start("no command line".to_owned()))?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = process::spawn(command, Privilege::NoTrace).map_err(failed)?;
    let starting = Process::of(child.id().cast_signed());
    let output = tokio::task::spawn_blocking(move || child.wait_with_output());
    match timeout(START_TIMEOUT, output).await {
        Ok(Ok(output)) => output.map_err(failed),
        Ok(Err(_)) => Err(AgentError::Start("waiting for it failed".to_owned())),
        Err(_) => {
            starting.inspect(|process| process.kill());
            Err(AgentError::Start(format!("it isn't up after {} s", START_TIMEOUT.as_secs())))
        }
    }
}

/// QEMU's complaint as one bounded line, without time and program.
fn shorten(complaint: &str) -> String {
    let said =
        |line: &str| line.split_once("qemu-system-x86_64: ").map_or(line, |(_, said)| said).trim().to_owned();
    let line = complaint.lines().map(said).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    let mut line: String = line.chars().take(COMPLAINT_CHARS_MAX).collect();
    if line.is_empty() {
        line.push_str("it ended without a word");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_becomes_one_line() {
        assert_eq!(shorten("2026-11-21T07:43:16Z qemu-system-x86_64: a\n\n  b\n"), "a; b");
        assert_eq!(shorten(""), "it ended without a word");
        assert_eq!(shorten(&"x".repeat(9_999)).len(), COMPLAINT_CHARS_MAX);
    }
}
