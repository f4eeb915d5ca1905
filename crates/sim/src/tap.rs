//! A TAP interface: Ethernet frames in and out of a file descriptor.
//!
//! The only module with `unsafe`: neither `nix` nor the standard library wraps `TUNSETIFF`.
#![allow(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::libc;

/// The largest frame read from a TAP, bytes; the lab's interfaces have an MTU of 1,500 and no segmentation offload.
pub const MAX_FRAME_BYTES: usize = 2048;

nix::ioctl_write_ptr_bad!(
    /// TUNSETIFF: makes the descriptor an interface.
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// An open TAP; the interface goes when this is dropped.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Creates the interface `name` in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When `/dev/net/tun` can't be opened, the name has more than 15 bytes or is taken, or for lack of
    /// CAP_NET_ADMIN.
    pub fn create(name: &str) -> io::Result<Tap> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the descriptor is open for the whole call, and TUNSETIFF reads and writes one `ifreq`, which
        // `request` is and which outlives the call.
        unsafe { tun_set_iff(file.as_raw_fd(), &request) }?;
        Ok(Tap(file))
    }

    /// Reads one frame; `WouldBlock` when there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn receive(&self, frame: &mut [u8; MAX_FRAME_BYTES]) -> io::Result<usize> {
        (&self.0).read(frame)
    }

    /// Writes one frame. An interface that is down refuses it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(|_| ())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
