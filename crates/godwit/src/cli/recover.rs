//! `godwit recover`.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use super::{arguments::Recover, client::Client, exit::Failure};
use crate::{
    api::{AssumeLost, Finding, FindingState, ProblemCode, RecoverRequest, Recovery},
    output::{Output, table},
};

/// Has the agent finish or roll back what is open, and shows what it found and did.
pub(super) async fn run(client: &Client, recover: Recover, output: Output) -> Result<ExitCode, Failure> {
    let Recover { machine, assume_lost, confirm } = recover;
    if let (Some(host), Some(typed)) = (&assume_lost, &confirm) {
        compare(host, typed)?;
    }
    let request = |confirmed| RecoverRequest {
        machine: machine.clone(),
        assume_lost: assume_lost.clone().map(|host| AssumeLost { host, confirmed }),
    };
    let asked = client.post("/v1/recovery", &request(confirm.is_some())).await;
    let recovery: Recovery = match (asked, &assume_lost) {
        (Err(Failure::Problem(problem)), Some(host))
            if problem.code == ProblemCode::Refused
                && confirm.is_none()
                && std::io::stdin().is_terminal() =>
        {
            ask(host, &problem.message)?;
            client.post("/v1/recovery", &request(true)).await?
        }
        (answer, _) => answer?,
    };
    output.answer(&recovery, |recovery| describe(&recovery.machines));
    let all_settled = recovery.machines.iter().all(|finding| finding.state == FindingState::Settled);
    Ok(if all_settled { ExitCode::SUCCESS } else { ExitCode::from(6) })
}

/// Has the operator type the lost host's name: the word that it runs nothing any more.
fn ask(host: &str, risk: &str) -> Result<(), Failure> {
    eprint!("{risk}.\nIf {host} surely runs nothing any more, type its name: ");
    std::io::stderr().flush()?;
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    compare(host, typed.trim())
}

fn compare(host: &str, typed: &str) -> Result<(), Failure> {
    if typed == host {
        return Ok(());
    }
    Err(Failure::invalid(format!("`{typed}` isn't {host}; nothing was changed")))
}

fn describe(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "no machines are known here".to_owned();
    }
    let rows: Vec<_> = findings
        .iter()
        .map(|finding| {
            let state = match finding.state {
                FindingState::Settled => "settled",
                FindingState::Waiting => "waiting",
                FindingState::Failed => "failed",
            };
            let at = finding.at.clone().unwrap_or_else(|| "?".to_owned());
            [finding.name.clone(), state.to_owned(), at, finding.found.clone(), finding.did.clone()]
        })
        .collect();
    table(["NAME", "STATE", "AT", "FOUND", "DID"], &rows)
}
