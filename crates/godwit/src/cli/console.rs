//! `godwit vm console`: this terminal becomes the guest's.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use nix::sys::termios::{self, SetArg, Termios};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, stdin, stdout},
    net::UnixStream,
};

use super::{client::Client, exit::Failure, machines::path};
use crate::api::Machine;

/// Ctrl-]
const LEAVE: u8 = 0x1d;
const PIECE_BYTES: usize = 4096;

/// Connects the terminal to a machine's console until Ctrl-], the end of input, or the end of the machine.
pub(super) async fn run(client: &Client, name: &str) -> Result<ExitCode, Failure> {
    let machine: Machine = client.get(&path(name, "")).await?;
    let socket = machine
        .console
        .ok_or_else(|| Failure::refused(format!("{name} has no console; set `serial = true` in its file")))?;
    let guest = UnixStream::connect(&socket).await?;
    eprintln!("connected to {name}; Ctrl-] leaves");
    let raw = RawTerminal::enter()?;
    let result = exchange(guest).await;
    drop(raw);
    eprintln!();
    result?;
    // The runtime waits for a read of standard input that never returns.
    std::process::exit(0);
}

async fn exchange(guest: UnixStream) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = guest.into_split();
    let typing = async {
        let mut keys = [0; PIECE_BYTES];
        loop {
            let count = stdin().read(&mut keys).await?;
            let typed = keys.get(..count).unwrap_or_default();
            let end = typed.iter().position(|key| *key == LEAVE);
            to_guest.write_all(typed.get(..end.unwrap_or(count)).unwrap_or_default()).await?;
            if count == 0 || end.is_some() {
                return Ok(());
            }
        }
    };
    let showing = async {
        let mut text = [0; PIECE_BYTES];
        let mut screen = stdout();
        loop {
            let count = from_guest.read(&mut text).await?;
            if count == 0 {
                return Ok(());
            }
            screen.write_all(text.get(..count).unwrap_or_default()).await?;
            screen.flush().await?;
        }
    };
    tokio::select! {
        result = typing => result,
        result = showing => result,
    }
}

/// A terminal that passes every key on; as it was when this is dropped.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}
