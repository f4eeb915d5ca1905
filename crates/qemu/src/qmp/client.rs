//! The tokio shell around the codec: a connection, commands in flight, events.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, oneshot},
    task::JoinHandle,
    time::timeout,
};

use super::codec::{self, CodecError, Decoder, Event, Message};

/// Events that a slow receiver may be behind before it loses the oldest.
const EVENTS_BEHIND_MAX: usize = 1024;
const READ_BYTES: usize = 64 * 1024;

/// Why a monitor didn't do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there.
    #[error("can't connect to the monitor {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Connected, but no greeting came.
    #[error(
        "the monitor {path} accepts the connection but doesn't greet within {waited:?}: another client holds it (a \
         monitor serves one at a time), or QEMU hangs"
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// QEMU's answer is an error.
    #[error("QEMU refuses {command}: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// `GenericError`, `CommandNotFound`, `DeviceNotActive`, ...
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// No answer in time. Whether the command was or will be executed isn't known.
    #[error("QEMU hasn't answered {command} within {waited:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The connection ended: QEMU is gone, or broke off. Whether the command was executed isn't known.
    #[error("the connection to the monitor ended before {command} was answered")]
    Closed {
        /// The command.
        command: String,
    },
    /// The monitor doesn't speak QMP.
    #[error("what listens at {path} isn't a QMP monitor")]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What came.
        source: CodecError,
    },
    /// The answer lacks what is needed.
    #[error("QEMU's answer to {command} isn't understood")]
    Unexpected {
        /// The command.
        command: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// A connection to a monitor. Commands may be executed concurrently; QEMU answers them in order.
#[derive(Debug)]
pub struct Client {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    calls: Arc<Mutex<Calls>>,
    /// Events may be subscribed to as long as the client lives; the reader's sender is the only one, so that receivers
    /// see the end of the connection.
    events: broadcast::WeakSender<Event>,
    reader: JoinHandle<()>,
    timeout: Duration,
}

/// Commands in flight.
#[derive(Debug, Default)]
struct Calls {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Reply>>,
    /// Nothing will be answered any more.
    closed: bool,
}

#[derive(Debug)]
enum Reply {
    Return(Value),
    Error { class: String, description: String },
}

impl Client {
    /// Connects and negotiates. `timeout` is also that of each command that doesn't bring its own.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::Silent`] if another client holds the monitor, [`QmpError::NotQmp`].
    pub async fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, QmpError> {
        let path = path.as_ref();
        let connect = |source| QmpError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).await.map_err(connect)?;
        let (mut read, write) = stream.into_split();
        let mut decoder = Decoder::default();
        let greeting = tokio::time::timeout(timeout, greeting(&mut read, &mut decoder, path));
        greeting.await.map_err(|_| QmpError::Silent { path: path.to_owned(), waited: timeout })??;

        let (events, _) = broadcast::channel(EVENTS_BEHIND_MAX);
        let calls = Arc::new(Mutex::new(Calls::default()));
        let client = Self {
            writer: tokio::sync::Mutex::new(write),
            calls: Arc::clone(&calls),
            events: events.downgrade(),
            reader: tokio::spawn(read_until_end(read, decoder, calls, events)),
            timeout,
        };
        client.execute("qmp_capabilities", Value::Null).await?;
        Ok(client)
    }

    /// Executes `command` with `arguments` (an object, or `Null`) and gives what it returns.
    ///
    /// # Errors
    /// [`QmpError::Refused`], [`QmpError::Timeout`], [`QmpError::Closed`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(self.timeout, command, arguments).await
    }

    /// As [`Self::execute`], with a time limit of its own.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn execute_within(
        &self,
        limit: Duration,
        command: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        self.execute_with(None, limit, command, arguments).await
    }

    /// Gives QEMU a file descriptor under a name, for a command that takes `fd:NAME`. It is this connection's: another
    /// one doesn't know the name. QEMU needs no right to open what is behind it.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn get_fd(&self, name: &str, descriptor: OwnedFd) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.execute_with(Some(descriptor), self.timeout, "getfd", arguments).await.map(drop)
    }

    async fn execute_with(
        &self,
        descriptor: Option<OwnedFd>,
        limit: Duration,
        command: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        let timed_out = |_| QmpError::Timeout { command: command.to_owned(), waited: limit };
        match timeout(limit, self.call(descriptor, command, &arguments)).await.map_err(timed_out)? {
            None => Err(QmpError::Closed { command: command.to_owned() }),
            Some(Reply::Return(value)) => Ok(value),
            Some(Reply::Error { class, description }) => {
                Err(QmpError::Refused { command: command.to_owned(), class, description })
            }
        }
    }

    /// What happens from now on. The receiver ends with the connection; one that falls too far behind loses the
    /// oldest events and is told how many.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match self.events.upgrade() {
            Some(sender) => sender.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        lock(&self.calls).closed
    }

    async fn call(&self, descriptor: Option<OwnedFd>, command: &str, arguments: &Value) -> Option<Reply> {
        let mut writer = self.writer.lock().await;
        let (call, reply) = Call::register(&self.calls)?;
        let line = codec::encode(call.id, command, arguments);
        let sent = match &descriptor {
            Some(descriptor) => send_with(writer.as_ref(), &line, descriptor).await.ok()?,
            None => 0,
        };
        writer.write_all(&line[sent..]).await.ok()?;
        drop(writer);
        reply.await.ok()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Forgets a command nobody waits for any more, so that what is in flight stays bounded by who waits.
struct Call<'a> {
    calls: &'a Mutex<Calls>,
    id: u64,
}

impl<'a> Call<'a> {
    fn register(calls: &'a Mutex<Calls>) -> Option<(Self, oneshot::Receiver<Reply>)> {
        let (sender, receiver) = oneshot::channel();
        let mut locked = lock(calls);
        if locked.closed {
            return None;
        }
        let id = locked.next_id;
        locked.next_id += 1;
        locked.waiting.insert(id, sender);
        Some((Self { calls, id }, receiver))
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        lock(self.calls).waiting.remove(&self.id);
    }
}

fn lock(calls: &Mutex<Calls>) -> MutexGuard<'_, Calls> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends the beginning of `line`, and the descriptor with its first byte; how much of it went.
async fn send_with(stream: &UnixStream, line: &[u8], descriptor: &OwnedFd) -> io::Result<usize> {
    let rights = [descriptor.as_raw_fd()];
    let send = || {
        let control = [ControlMessage::ScmRights(&rights)];
        let line = [IoSlice::new(line)];
        Ok(sendmsg::<UnixAddr>(stream.as_raw_fd(), &line, &control, MsgFlags::empty(), None)?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}

async fn greeting(read: &mut OwnedReadHalf, decoder: &mut Decoder, path: &Path) -> Result<(), QmpError> {
    loop {
        let not_qmp = |source| QmpError::NotQmp { path: path.to_owned(), source };
        if let Some(Message::Greeting) = decoder.next_message().map_err(not_qmp)? {
            return Ok(());
        }
        if !receive(read, decoder).await {
            let source = std::io::ErrorKind::UnexpectedEof.into();
            return Err(QmpError::Connect { path: path.to_owned(), source });
        }
    }
}

/// False at the end of the connection.
async fn receive(read: &mut OwnedReadHalf, decoder: &mut Decoder) -> bool {
    let mut chunk = vec![0; READ_BYTES];
    match read.read(&mut chunk).await {
        Ok(0) | Err(_) => false,
        Ok(length) => {
            decoder.push(&chunk[..length]);
            true
        }
    }
}

async fn read_until_end(
    mut read: OwnedReadHalf,
    mut decoder: Decoder,
    calls: Arc<Mutex<Calls>>,
    events: broadcast::Sender<Event>,
) {
    loop {
        match decoder.next_message() {
            Ok(Some(message)) => deliver(message, &calls, &events),
            Ok(None) => {
                if !receive(&mut read, &mut decoder).await {
                    break;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the monitor is given up");
                break;
            }
        }
    }
    let mut calls = lock(&calls);
    calls.closed = true;
    calls.waiting.clear();
}

fn deliver(message: Message, calls: &Mutex<Calls>, events: &broadcast::Sender<Event>) {
    let (id, reply) = match message {
        Message::Greeting => return,
        Message::Event(event) => {
            // Fails if nobody listens, which is fine.
            let _ = events.send(event);
            return;
        }
        Message::Return { id, value } => (id, Reply::Return(value)),
        Message::Error { id: Some(id), class, description } => (id, Reply::Error { class, description }),
        Message::Error { id: None, class, description } => {
            tracing::warn!(class, description, "the monitor couldn't read a command");
            return;
        }
    };
    if let Some(waiting) = lock(calls).waiting.remove(&id) {
        // Fails if the caller gave up meanwhile, which is fine.
        let _ = waiting.send(reply);
    }
}
