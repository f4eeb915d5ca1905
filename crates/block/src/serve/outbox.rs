//! What is to be sent to a client.

use std::io;

use tokio::net::UnixStream;

/// Bytes that wait to be sent, in order. Their memory is kept, so that what is read into it needn't be cleared each time.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outbox {
    /// How much waits.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Where more is put.
    pub(super) fn end(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Takes back what was put behind the first `length` bytes.
    pub(super) fn cut(&mut self, length: usize) {
        self.bytes.truncate(length);
    }

    /// Sends as much as the socket takes.
    pub(super) fn send(&mut self, socket: &UnixStream) -> io::Result<()> {
        while self.sent < self.bytes.len() {
            match socket.try_write(&self.bytes[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }
}
