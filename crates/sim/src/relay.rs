//! Joins two TAP interfaces by a [`Link`] in each direction.
//!
//! One thread waits in `ppoll` for frames and for the next moment at which one is due; it uses no time while nothing
//! moves. Being woken costs more than a frame does, so it rests for [`REST`] after each turn: frames are stamped and
//! delivered late by that at most, and by the kernel's timer slack of 50 µs. A real link isn't slowed by what the hosts
//! compute, so the thread runs in real time (SCHED_FIFO) where it may.

use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime},
};

use crate::{
    link::{Counters, Link, Shape},
    tap::{MAX_FRAME_BYTES, Tap},
};

/// How long the thread rests after each turn.
pub const REST: Duration = Duration::from_micros(150);
/// Frames taken from one TAP before the other gets its turn.
const FRAMES_PER_TURN: usize = 64;

/// A running link between two TAPs; it ends, and takes the TAPs with it, when this is dropped.
#[derive(Debug)]
pub struct Relay {
    wire: Arc<Mutex<Wire>>,
    cpu_ns: Arc<AtomicU64>,
    /// Closing it ends the thread; a byte wakes it.
    wake: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

/// What became of the packets in both directions, and what relaying them cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct RelayStatistics {
    /// From the first TAP to the second.
    pub forward: Counters,
    /// From the second TAP to the first.
    pub backward: Counters,
    /// CPU time of the relay's thread.
    pub cpu: Duration,
}

#[derive(Debug)]
struct Wire {
    forward: Link,
    backward: Link,
}

impl Relay {
    /// Joins `first` and `second`, both directions shaped alike.
    ///
    /// # Errors
    /// When no socket pair or thread can be had.
    pub fn start(first: Tap, second: Tap, shape: Shape) -> io::Result<Relay> {
        let (wake, woken) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        let wire = Arc::new(Mutex::new(Wire {
            forward: Link::new(shape.clone(), 1),
            backward: Link::new(shape, 2),
        }));
        let cpu_ns = Arc::new(AtomicU64::new(0));
        let shell = Shell {
            first,
            second,
            woken: woken.into(),
            wire: Arc::clone(&wire),
            cpu_ns: Arc::clone(&cpu_ns),
            start: Instant::now(),
        };
        let thread = std::thread::Builder::new().name("relay".into()).spawn(move || shell.run())?;
        Ok(Relay { wire, cpu_ns, wake: Some(wake), thread: Some(thread) })
    }

    /// Shapes both directions anew.
    pub fn reshape(&self, shape: &Shape) {
        self.with_wire(|wire| {
            wire.forward.reshape(shape.clone());
            wire.backward.reshape(shape.clone());
        });
    }

    /// Cuts the link in both directions; what is under way is lost.
    pub fn cut(&self) {
        self.with_wire(|wire| {
            wire.forward.cut();
            wire.backward.cut();
        });
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.with_wire(|wire| {
            wire.forward.restore();
            wire.backward.restore();
        });
    }

    /// Counters of both directions and the thread's CPU time.
    pub fn statistics(&self) -> RelayStatistics {
        let wire = lock(&self.wire);
        RelayStatistics {
            forward: wire.forward.counters(),
            backward: wire.backward.counters(),
            cpu: Duration::from_nanos(self.cpu_ns.load(Ordering::Relaxed)),
        }
    }

    fn with_wire(&self, change: impl FnOnce(&mut Wire)) {
        change(&mut lock(&self.wire));
        if let Some(mut wake) = self.wake.as_ref() {
            // A full socket means that the thread is about to wake anyway.
            let _ = wake.write(&[0]);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.wake.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A link is plain data that no panic leaves half changed in a way that matters.
fn lock(wire: &Mutex<Wire>) -> MutexGuard<'_, Wire> {
    wire.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Shell {
    first: Tap,
    second: Tap,
    woken: OwnedFd,
    wire: Arc<Mutex<Wire>>,
    cpu_ns: Arc<AtomicU64>,
    start: Instant,
}

impl Shell {
    fn run(self) {
        rise_to_real_time();
        let mut frame = [0; MAX_FRAME_BYTES];
        while let Ok(Ready { first, second, woken }) = self.wait() {
            if woken && self.told_to_end() {
                return;
            }
            let mut wire = lock(&self.wire);
            if first {
                self.take(&self.first, &mut wire.forward, &mut frame);
            }
            if second {
                self.take(&self.second, &mut wire.backward, &mut frame);
            }
            self.deliver(&mut wire.forward, &self.second);
            self.deliver(&mut wire.backward, &self.first);
            drop(wire);
            self.publish_cpu();
            std::thread::sleep(REST);
        }
    }

    fn wait(&self) -> nix::Result<Ready> {
        let timeout = {
            let wire = lock(&self.wire);
            let next = wire.forward.next_due().into_iter().chain(wire.backward.next_due()).min();
            next.map(|at| TimeSpec::from(at.saturating_sub(self.start.elapsed())))
        };
        let mut fds = [self.first.as_fd(), self.second.as_fd(), self.woken.as_fd()]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match ppoll(&mut fds, timeout, None) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error),
        }
        let [first, second, woken] = fds.map(|fd| fd.any().unwrap_or(false));
        Ok(Ready { first, second, woken })
    }

    fn told_to_end(&self) -> bool {
        let mut bytes = [0; 64];
        matches!(nix::unistd::read(&self.woken, &mut bytes), Ok(0))
    }

    fn take(&self, tap: &Tap, link: &mut Link, frame: &mut [u8; MAX_FRAME_BYTES]) {
        for _ in 0..FRAMES_PER_TURN {
            let Ok(bytes) = tap.receive(frame) else { return };
            link.offer(self.start.elapsed(), &frame[..bytes]);
        }
    }

    fn deliver(&self, link: &mut Link, tap: &Tap) {
        while let Some(packet) = link.due(self.start.elapsed()) {
            // A frame that the far end refuses (down, out of memory) is lost, as on a wire.
            let _ = tap.send(&packet);
        }
    }

    fn publish_cpu(&self) {
        if let Ok(used) = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID) {
            self.cpu_ns.store(Duration::from(used).as_nanos() as u64, Ordering::Relaxed);
        }
    }
}

/// Has util-linux move the calling thread, and those it starts, to SCHED_FIFO. Where that isn't permitted, it is only less
/// punctual.
pub(crate) fn rise_to_real_time() {
    let thread = nix::unistd::gettid().to_string();
    let mut command = Command::new("chrt");
    command
        .args(["--fifo", "--pid", "1", &thread])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _ = command.status();
}

struct Ready {
    first: bool,
    second: bool,
    woken: bool,
}
