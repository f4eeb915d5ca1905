//! The socket through which the agent passes this migration's TCP connections, as file descriptors.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
        listen, recvmsg, socket,
    },
};
use tokio::{net::TcpStream, sync::mpsc};

use crate::worker::start_thread;

/// Connections that may wait to be taken.
const WAITING_MAX: usize = 16;

/// Listens at `path`; the connections that come through it can be taken from the receiver.
pub(super) fn open(path: &Path) -> io::Result<mpsc::Receiver<TcpStream>> {
    let door = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(door.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&door, Backlog::new(8)?)?;
    let (found, streams) = mpsc::channel(WAITING_MAX);
    let runtime = tokio::runtime::Handle::current();
    start_thread("door", move || {
        while let Ok(agent) = accept4(door.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            let agent = owned(agent);
            let passed = receive(&agent).and_then(|stream| {
                stream.set_nonblocking(true)?;
                let _guard = runtime.enter();
                TcpStream::from_std(stream)
            });
            match passed {
                Ok(stream) => drop(found.blocking_send(stream)),
                Err(error) => tracing::warn!(%error, "the agent passed no connection"),
            }
        }
    });
    Ok(streams)
}

fn receive(agent: &OwnedFd) -> io::Result<std::net::TcpStream> {
    let mut byte = [0; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; 1]);
    let message =
        recvmsg::<UnixAddr>(agent.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(&descriptor) = descriptors.first()
        {
            return Ok(owned(descriptor).into());
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "no descriptor in the message"))
}

/// Takes a descriptor that the kernel has just made for this process.
#[expect(unsafe_code, reason = "nix hands these out as numbers")]
fn owned(descriptor: RawFd) -> OwnedFd {
    // SAFETY: accept4 and SCM_RIGHTS return new descriptors that nobody else in this process knows.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
