//! The command line: what can be said, and what it answers with.
//!
//! Everything but the local verbs (`ca`, `join`, `analyze`, `completions`, `man`, `openapi`) is a request to the agent
//! over its unix socket. An operation belongs to the agent: the command line only watches it.

mod analyze;
mod arguments;
mod check;
mod client;
mod console;
mod disk;
mod exit;
mod history;
mod identity;
mod image;
mod machines;
mod migrations;
mod recover;
mod table;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use self::{
    arguments::{Arguments, Verb},
    client::Client,
    exit::Failure,
};
use crate::{
    agent, disk_server, log,
    output::{Output, one_line},
    sample, worker,
};

/// Reads the arguments, does what they say, and returns the exit code.
pub(crate) fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return exit::of_usage(&error);
        }
    };
    let output = Output { json: arguments.json };
    match run(arguments, output) {
        Ok(code) => code,
        Err(failure) => {
            output.failure(&failure.problem());
            failure.exit_code()
        }
    }
}

fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Failure> {
    let client = Client::new(arguments.socket);
    match arguments.verb {
        Verb::Ca(verb) => identity::authority(verb, output)?,
        Verb::Join(join) => identity::join(&join, output)?,
        Verb::Agent(start) => {
            log::of_agent();
            agent::main(&start.config, start.check)?;
        }
        Verb::Analyze(analyze) => analyze::run(&analyze.file, output)?,
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "godwit", &mut std::io::stdout());
        }
        Verb::Man { directory } => clap_mangen::generate_to(Arguments::command(), directory)?,
        Verb::Openapi => output.json(&agent::openapi()),
        Verb::Worker { directory } => {
            // A session of its own: the worker outlives the agent's terminal.
            let _ = nix::unistd::setsid();
            worker::run(directory).map_err(|error| Failure::failed(format!("{error:#}")))?;
        }
        Verb::Sample => sample::run(std::io::stdin().lock(), std::io::stdout().lock())
            .map_err(|error| Failure::failed(one_line(&error)))?,
        Verb::DiskServer(start) => {
            log::of_agent();
            let create = disk_server::Create { size_bytes: start.create, image: start.image.clone() };
            disk_server::main(create, start.into()).map_err(|error| Failure::failed(one_line(&error)))?;
        }
        Verb::Check(check) => return block_on(check::run(&client, check, output)),
        Verb::History => return block_on(history::run(&client, output)),
        Verb::Disk(verb) => block_on(disk::run(&client, verb, output))?,
        Verb::Image(images) => block_on(image::run(images, output))?,
        Verb::Vm(verb) => return block_on(machines::run(&client, verb, output)),
        Verb::Migrate(migrate) => return block_on(migrations::migrate(&client, migrate, output)),
        Verb::Status(status) => return block_on(migrations::status(&client, status, output)),
        Verb::Cancel { migration } => return block_on(migrations::cancel(&client, &migration, output)),
        Verb::Recover(recover) => return block_on(recover::run(&client, recover, output)),
        Verb::SetBandwidth { migration, rate } => {
            return block_on(migrations::set_bandwidth(&client, &migration, rate, output));
        }
        Verb::SetOnStall { migration, on_stall } => {
            return block_on(migrations::set_on_stall(&client, &migration, on_stall, output));
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl From<arguments::DiskServer> for disk_server::DiskServer {
    fn from(start: arguments::DiskServer) -> Self {
        Self {
            directory: start.directory,
            socket: start.listen,
            repository: start.repository,
            read_only: start.read_only,
        }
    }
}

/// The verbs that talk to the agent need a runtime of one thread.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
