//! A small blocking QMP client for QEMU's own contenders and for tests that compare two machines.
//!
//! It shares nothing with the product's client, so that a test's verdict doesn't rest on the code it judges. See
//! QEMU's docs/interop/qmp-spec.rst.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use thiserror::Error;

/// How long a command may take to be answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const CONNECT_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// A connection to a QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: Vec<Event>,
    /// The beginning of a line that hasn't fully arrived.
    partial: Vec<u8>,
}

/// Something QEMU said by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// When, by the clock of the QEMU's host.
    pub at: SystemTime,
    /// What came with it.
    pub data: Value,
}

/// QEMU couldn't be asked, or said no.
#[derive(Debug, Error)]
pub enum QmpError {
    /// The socket failed or nothing came in time.
    #[error("no answer from QEMU")]
    Io(#[from] io::Error),
    /// QEMU refused a command.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's own words.
        reason: String,
    },
    /// It wasn't JSON.
    #[error("QEMU's answer isn't JSON")]
    Json(#[from] serde_json::Error),
}

impl Qmp {
    /// Connects, trying again until the socket is there or `limit` has passed, and leaves negotiation mode.
    ///
    /// # Errors
    /// When there is no QEMU in time, or it serves another client.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Qmp, QmpError> {
        let started = Instant::now();
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() >= limit => return Err(error.into()),
                Err(_) => std::thread::sleep(CONNECT_AGAIN_AFTER),
            }
        };
        let reader = BufReader::new(writer.try_clone()?);
        let mut client = Qmp { reader, writer, events: Vec::new(), partial: Vec::new() };
        client.read_until(Instant::now() + ANSWER_LIMIT)?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    /// When QEMU refuses it, doesn't answer within half a minute, or is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.writer.write_all(format!("{request}\n").as_bytes())?;
        let limit = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut message = self.read_until(limit)?;
            if let Some(error) = message.get("error") {
                let reason = error["desc"].as_str().unwrap_or_default().to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), reason });
            }
            if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
        }
    }

    /// Executes a command of the human monitor.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn monitor(&mut self, command_line: &str) -> Result<String, QmpError> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": command_line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// All events since the connection was made.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Forgets the events so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits for an event that `wanted` accepts, one that was seen before included; `None`: not within `limit`.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn wait_for(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Option<Event>, QmpError> {
        let limit = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.iter().find(|event| wanted(event)) {
                return Ok(Some(event.clone()));
            }
            match self.read_until(limit) {
                Err(QmpError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                read => read?,
            };
        }
    }

    /// Reads one message; an event is kept as well as returned.
    fn read_until(&mut self, limit: Instant) -> Result<Value, QmpError> {
        let left = limit.saturating_duration_since(Instant::now());
        self.reader.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        if self.reader.read_until(b'\n', &mut self.partial)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let message: Value = serde_json::from_slice(&std::mem::take(&mut self.partial))?;
        if let Some(name) = message["event"].as_str() {
            let event = Event {
                name: name.to_owned(),
                at: time_of(&message["timestamp"]),
                data: message["data"].clone(),
            };
            self.events.push(event);
        }
        Ok(message)
    }
}

fn time_of(timestamp: &Value) -> SystemTime {
    let part = |name: &str| timestamp[name].as_u64().unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds"))
}
