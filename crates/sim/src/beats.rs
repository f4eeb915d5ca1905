//! The guest's beats, each with the host through which it came.
//!
//! Guests keep their address and their MAC when they move, so a beat itself doesn't tell where it was sent. The port
//! of the clients' bridge on which it arrives does: each host has a cable of its own. One packet socket sees both
//! ports, so that what came first is seen first.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::SystemTime,
};

use nix::{
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

use crate::{
    lab::{CLIENT_ADDRESS, Lab, Place},
    observer::{BeatListener, ObserverError},
};

/// How often the listener looks whether it is still wanted.
const WAIT_MS: i64 = 100;
/// The kernel's mark of frames that leave through a port (packet(7)).
const OUTGOING: u8 = 4;
const UDP: u8 = 17;
const IP_HEADER_BYTES_MIN: usize = 20;
const UDP_HEADER_BYTES: usize = 8;

/// One beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Counts up from 0 in each boot of the guest.
    pub number: u64,
    /// Names the boot.
    pub boot: u64,
    /// The host through which it came.
    pub from: Place,
    /// When it came.
    pub at: SystemTime,
}

/// Takes the beats of one guest, at the ports of both hosts.
#[derive(Debug)]
pub struct BeatRecorder {
    address: SocketAddr,
    beats: Arc<Mutex<Vec<Beat>>>,
    /// Keeps the port, so that the guest isn't told that nobody listens; never read. `None`: somebody listens.
    _sink: Option<UdpSocket>,
}

impl BeatRecorder {
    /// Listens in the clients' namespace; [`BeatRecorder::address`] goes on the guest's kernel command line.
    ///
    /// # Errors
    /// When no socket can be had there.
    pub fn start(lab: &Lab) -> Result<BeatRecorder, ObserverError> {
        let sink = lab.namespace(Place::Lan).run(|| UdpSocket::bind((CLIENT_ADDRESS, 0)))??;
        BeatRecorder::record(lab, sink.local_addr()?, Some(sink))
    }

    /// Sees the beats that `listener` takes.
    ///
    /// # Errors
    /// When no socket can be had in the clients' namespace.
    pub fn beside(lab: &Lab, listener: &BeatListener) -> Result<BeatRecorder, ObserverError> {
        BeatRecorder::record(lab, listener.address(), None)
    }

    fn record(
        lab: &Lab,
        address: SocketAddr,
        sink: Option<UdpSocket>,
    ) -> Result<BeatRecorder, ObserverError> {
        let (packets, ports) = lab.namespace(Place::Lan).run(open)??;
        let beats = Arc::new(Mutex::new(Vec::new()));
        let listener = Listener { packets, ports, port: address.port(), beats: Arc::downgrade(&beats) };
        std::thread::spawn(move || listener.run());
        Ok(BeatRecorder { address, beats, _sink: sink })
    }

    /// Where the guest is to send its beat.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The beats since the last call, in the order in which they came.
    pub fn take(&self) -> Vec<Beat> {
        std::mem::take(&mut self.beats.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A port by its index, and the host behind it.
type Port = (usize, Place);

fn open() -> io::Result<(OwnedFd, [Port; 2])> {
    let packets =
        socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    setsockopt(&packets, sockopt::ReceiveTimeout, &TimeVal::milliseconds(WAIT_MS))?;
    let port =
        |host: Place| Ok::<_, io::Error>((if_nametoindex(host.client_port().as_str())? as usize, host));
    Ok((packets, [port(Place::A)?, port(Place::B)?]))
}

struct Listener {
    packets: OwnedFd,
    ports: [Port; 2],
    port: u16,
    beats: Weak<Mutex<Vec<Beat>>>,
}

impl Listener {
    fn run(self) {
        let mut packet = [0; 2048];
        loop {
            let received = recvfrom::<LinkAddr>(self.packets.as_raw_fd(), &mut packet);
            let Some(beats) = self.beats.upgrade() else { return };
            let Ok((bytes, Some(address))) = received else { continue };
            let from = self.ports.iter().find(|(index, _)| *index == address.ifindex());
            let (Some((_, from)), false) = (from, address.pkttype() == OUTGOING) else { continue };
            if let Some([number, boot]) = beat_of(&packet[..bytes], self.port) {
                let beat = Beat { number, boot, from: *from, at: SystemTime::now() };
                beats.lock().unwrap_or_else(PoisonError::into_inner).push(beat);
            }
        }
    }
}

/// The two numbers of a beat, if this IPv4 packet is one to `port`.
fn beat_of(packet: &[u8], port: u16) -> Option<[u64; 2]> {
    let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
    if packet[0] >> 4 != 4 || header_bytes < IP_HEADER_BYTES_MIN || *packet.get(9)? != UDP {
        return None;
    }
    let datagram = packet.get(header_bytes..)?;
    let payload = datagram.get(UDP_HEADER_BYTES..)?;
    let word = |at: usize| Some(u64::from_le_bytes(payload.get(at..at + 8)?.try_into().ok()?));
    (datagram[2..4] == port.to_be_bytes()).then_some([word(0)?, word(8)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(protocol: u8, port: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; IP_HEADER_BYTES_MIN + UDP_HEADER_BYTES];
        packet[0] = 0x45;
        packet[9] = protocol;
        packet[22..24].copy_from_slice(&port.to_be_bytes());
        packet.extend(payload);
        packet
    }

    #[test]
    fn beats_are_told_from_other_packets() {
        let payload: Vec<u8> = [7u64, 9].map(u64::to_le_bytes).concat();
        assert_eq!(beat_of(&datagram(UDP, 4000, &payload), 4000), Some([7, 9]));
        assert_eq!(beat_of(&datagram(UDP, 4001, &payload), 4000), None);
        assert_eq!(beat_of(&datagram(6, 4000, &payload), 4000), None);
        assert_eq!(beat_of(&datagram(UDP, 4000, &payload[..15]), 4000), None);
        for bytes in 0..28 {
            assert_eq!(beat_of(&datagram(UDP, 4000, &payload)[..bytes], 4000), None);
        }
    }

    #[test]
    fn the_port_tells_the_host() {
        let lab = match Lab::new(crate::link::Shape::UNSHAPED) {
            Err(crate::lab::LabError::NotRoot) => return,
            made => made.unwrap(),
        };
        let recorder = BeatRecorder::start(&lab).unwrap();
        for (index, host) in [Place::A, Place::B].into_iter().enumerate() {
            lab.give_guest_address(host, index as u8).unwrap();
            let socket = lab.namespace(host).run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
            let beat: Vec<u8> = [index as u64, 9].map(u64::to_le_bytes).concat();
            socket.send_to(&beat, recorder.address()).unwrap();
        }
        let started = std::time::Instant::now();
        let mut beats = Vec::new();
        while beats.len() < 2 && started.elapsed().as_secs() < 5 {
            beats.extend(recorder.take().into_iter().map(|beat| (beat.number, beat.boot, beat.from)));
        }
        beats.sort_by_key(|beat| beat.0);
        assert_eq!(beats, [(0, 9, Place::A), (1, 9, Place::B)]);
    }
}
