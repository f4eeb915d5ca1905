//! One client: its bytes in, its replies out.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
};

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;
use tokio::{net::UnixStream, select, sync::Notify};

use super::{Base, Outbox, Served};
use crate::{
    desk::{Request, RequestId, Work},
    nbd::{
        Command, Errno, Export, Handshake, HandshakeError, Progress, REQUEST_BYTES_MAX, REQUEST_HEADER_BYTES,
        Replies, RequestError, RequestHeader,
    },
};

/// What is read at a time, at least.
const READ_BYTES: usize = 128 << 10;
/// No more requests are taken from a client that has that many unanswered.
const REQUESTS_MAX: usize = 1024;
/// No more requests are taken from a client that has that much to be sent, or that much to be written.
const BYTES_MAX: usize = REQUEST_BYTES_MAX as usize;

/// Why a client was let go.
#[derive(Debug, Error)]
pub(super) enum ClientError {
    /// Its socket failed.
    #[error("its socket")]
    Socket(#[from] io::Error),
    /// It doesn't choose as the protocol says.
    #[error("its handshake")]
    Handshake(#[from] HandshakeError),
    /// It doesn't ask as the protocol says.
    #[error("its request")]
    Request(#[from] RequestError),
}

/// A client that has chosen.
#[derive(Debug)]
pub(super) struct Client {
    number: u64,
    replies: Replies,
    outbox: RefCell<Outbox>,
    /// Told when something was put into the outbox.
    answered: Notify,
    /// Requests that weren't answered.
    open: Cell<usize>,
    /// Bytes of theirs.
    open_bytes: Cell<usize>,
}

impl Client {
    /// Puts an answer into the outbox.
    pub(super) fn answer(&self, put: impl FnOnce(Replies, &mut Vec<u8>)) {
        put(self.replies, self.outbox.borrow_mut().end());
        self.count_answer();
    }

    /// Puts what was read into the outbox, if it could be read at once.
    pub(super) fn answer_with(
        &self,
        cookie: u64,
        offset: u64,
        length: usize,
        read: impl FnOnce(&mut [u8]) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let mut outbox = self.outbox.borrow_mut();
        let out = outbox.end();
        let before = out.len();
        self.replies.data_header(cookie, offset, length as u32, out);
        let start = out.len();
        out.resize(start + length, 0);
        let result = read(&mut out[start..]);
        if matches!(result, Ok(true)) {
            drop(outbox);
            self.count_answer();
        } else {
            outbox.cut(before);
        }
        result
    }

    pub(super) fn fail(&self, cookie: u64, errno: Errno, error: &io::Error) {
        self.answer(|replies, out| replies.error(cookie, errno, &error.to_string(), out));
    }

    fn count_answer(&self) {
        self.open.set(self.open.get().saturating_sub(1));
        if self.open.get() == 0 {
            self.open_bytes.set(0);
        }
        self.answered.notify_one();
    }

    fn count_request(&self, bytes: usize) {
        self.open.set(self.open.get() + 1);
        self.open_bytes.set(self.open_bytes.get() + bytes);
    }

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        let waiting = self.outbox.borrow().waiting_bytes();
        self.open.get() < REQUESTS_MAX && self.open_bytes.get() + waiting < BYTES_MAX
    }
}

/// Serves a client until it goes.
pub(super) async fn attend<B: Base>(
    served: &Rc<Served<B>>,
    number: u64,
    socket: UnixStream,
    export: Export,
) -> Result<(), ClientError> {
    let mut input = BytesMut::with_capacity(READ_BYTES);
    let Some(replies) = shake_hands(&socket, &mut input, export).await? else { return Ok(()) };
    let client = Rc::new(Client {
        number,
        replies,
        outbox: RefCell::default(),
        answered: Notify::new(),
        open: Cell::new(0),
        open_bytes: Cell::new(0),
    });
    served.clients.borrow_mut().insert(number, Rc::clone(&client));
    loop {
        if take_requests(served, &client, &mut input)? {
            client.outbox.borrow_mut().send(&socket)?;
            return Ok(());
        }
        client.outbox.borrow_mut().send(&socket)?;
        let sending = client.outbox.borrow().waiting_bytes() > 0;
        select! {
            ready = socket.readable(), if client.has_room() => {
                ready?;
                if !receive(&socket, &mut input)? {
                    return Ok(());
                }
            }
            ready = socket.writable(), if sending => ready?,
            () = client.answered.notified() => {}
        }
    }
}

async fn shake_hands(
    socket: &UnixStream,
    input: &mut BytesMut,
    export: Export,
) -> Result<Option<Replies>, ClientError> {
    let mut outbox = Outbox::default();
    let mut handshake = Handshake::new(export, outbox.end());
    loop {
        let (used, progress) = handshake.receive(input, outbox.end())?;
        let _ = input.split_to(used);
        while outbox.waiting_bytes() > 0 {
            socket.writable().await?;
            outbox.send(socket)?;
        }
        match progress {
            Progress::Ready(session) => return Ok(Some(session.replies)),
            Progress::Aborted => return Ok(None),
            Progress::More => {}
        }
        socket.readable().await?;
        if !receive(socket, input)? {
            return Ok(None);
        }
    }
}

/// Takes what has come; whether the client is still there.
fn receive(socket: &UnixStream, input: &mut BytesMut) -> io::Result<bool> {
    let wanted = whole_request_bytes(input).saturating_sub(input.len());
    input.reserve(wanted.max(READ_BYTES));
    match socket.try_read_buf(input) {
        Ok(0) => Ok(false),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(true),
    }
}

/// How long the request is that `input` begins with, as far as can be told.
fn whole_request_bytes(input: &BytesMut) -> usize {
    let header = input.first_chunk().and_then(|header| RequestHeader::decode(header).ok());
    REQUEST_HEADER_BYTES + header.map_or(0, |header| header.payload_bytes())
}

/// Takes all whole requests to the desk; whether the client says good-bye.
fn take_requests<B: Base>(
    served: &Rc<Served<B>>,
    client: &Rc<Client>,
    input: &mut BytesMut,
) -> Result<bool, ClientError> {
    while client.has_room() {
        let Some(header) = input.first_chunk().map(RequestHeader::decode).transpose()? else {
            return Ok(false);
        };
        let length = REQUEST_HEADER_BYTES + header.payload_bytes();
        if input.len() < length {
            return Ok(false);
        }
        input.advance(REQUEST_HEADER_BYTES);
        let bytes = match header.payload_bytes() {
            0 => Bytes::new(),
            count => input.split_to(count).freeze(),
        };
        if header.command == Some(Command::Disconnect) {
            return Ok(true);
        }
        client.count_request(header.payload_bytes());
        match work(&header, bytes, client.replies) {
            Some(work) => {
                let id = RequestId { client: client.number, cookie: header.cookie };
                let request = Request { id, offset: header.offset, length: u64::from(header.length), work };
                served.at_desk(|desk| desk.submit(request));
            }
            None => client.answer(|replies, out| {
                replies.error(header.cookie, Errno::Invalid, "this request isn't known here", out);
            }),
        }
    }
    Ok(false)
}

fn work(header: &RequestHeader, bytes: Bytes, replies: Replies) -> Option<Work> {
    Some(match header.command? {
        Command::Read if header.length > REQUEST_BYTES_MAX => return None,
        Command::Read => Work::Read,
        Command::Write { durable } => Work::Write { bytes, durable },
        // Zeros that keep their space are bytes like others.
        Command::Zero { durable, allocate: true } if header.length <= REQUEST_BYTES_MAX => {
            Work::Write { bytes: vec![0; header.length as usize].into(), durable }
        }
        Command::Zero { durable, .. } => Work::Zero { durable },
        Command::Trim { durable } => Work::Discard { durable },
        Command::Flush => Work::Flush,
        Command::Cache => Work::Cache,
        Command::Status { one } if replies.tells_allocation() && header.length > 0 => Work::Status { one },
        Command::Status { .. } | Command::Disconnect => return None,
    })
}
