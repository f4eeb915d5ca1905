//! godwit moves running QEMU/KVM machines from host to host without a stop that anyone notices.
//!
//! One binary: the command line, the agent that runs on every host, and the worker that carries one migration. It
//! wires the other crates together and holds no algorithm of its own.

mod agent;
mod api;
mod borrowed;
mod cli;
mod disk_server;
mod http;
mod job;
mod log;
mod output;
mod quantity;
#[cfg(feature = "sabotage")]
mod sabotage;
mod sample;
mod throttle;
mod token;
mod whole_file;
mod worker;

fn main() -> std::process::ExitCode {
    cli::main()
}
