//! A client outside the guest, with a clock of its own.
//!
//! It holds a TCP connection on which the guest tells its progress (writes made, or work done) every 10 ms, and takes the beat that
//! the guest sends every 10 ms by UDP. Both are stamped when they arrive, by the clock that QEMU's events on this
//! machine are stamped by.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant, SystemTime},
};

use thiserror::Error;

use crate::{
    lab::CLIENT_ADDRESS,
    namespace::{EnterError, Namespace},
};

/// The guests' TCP port.
const PROGRESS_PORT: u16 = 7;
const CONNECT_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How often the listener for the beat looks whether it is still wanted.
const BEAT_WAIT: Duration = Duration::from_millis(100);

/// Takes the beat of one guest.
#[derive(Debug)]
pub struct BeatListener {
    address: SocketAddr,
    arrivals: Arc<Mutex<Vec<SystemTime>>>,
}

/// Follows the progress of one guest over a TCP connection that is held throughout.
#[derive(Debug)]
pub struct Progress {
    samples: Arc<Mutex<Vec<Sample>>>,
    /// Behind a lock so that several threads can have the guest do things.
    answers: Mutex<mpsc::Receiver<String>>,
    stream: TcpStream,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: SystemTime,
    writes: u64,
}

/// A guest couldn't be observed.
#[derive(Debug, Error)]
pub enum ObserverError {
    /// The clients' namespace is gone.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// The guest can't be reached or has closed the connection.
    #[error("cannot talk to the guest")]
    Io(#[from] io::Error),
    /// A check wasn't answered in time.
    #[error("the guest did not answer a check within {0:?}")]
    NoAnswer(Duration),
    /// The guest's memory isn't what it wrote.
    #[error("the guest's memory is damaged: {0}")]
    Damaged(String),
}

impl BeatListener {
    /// Listens in the clients' namespace; [`BeatListener::address`] goes on the guest's kernel command line.
    ///
    /// # Errors
    /// When no socket can be had there.
    pub fn start(clients: &Namespace) -> Result<BeatListener, ObserverError> {
        let socket = clients.run(|| UdpSocket::bind((CLIENT_ADDRESS, 0)))??;
        socket.set_read_timeout(Some(BEAT_WAIT))?;
        let address = socket.local_addr()?;
        let arrivals = Arc::new(Mutex::new(Vec::new()));
        let wanted = Arc::downgrade(&arrivals);
        std::thread::spawn(move || {
            let mut beat = [0; 8];
            loop {
                let received = socket.recv(&mut beat).is_ok();
                let Some(arrivals) = wanted.upgrade() else { return };
                if received {
                    lock(&arrivals).push(SystemTime::now());
                }
            }
        });
        Ok(BeatListener { address, arrivals })
    }

    /// Where the guest is to send its beat.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Beats a second that came between `from` and `to`; `None`: that is no time.
    pub fn rate(&self, from: SystemTime, to: SystemTime) -> Option<f64> {
        let seconds = since(to, from).as_secs_f64();
        let beats = lock(&self.arrivals).iter().filter(|at| (from..to).contains(*at)).count();
        (seconds > 0.0).then(|| beats as f64 / seconds)
    }

    /// The longest time without a beat between `from` and `to`.
    pub fn largest_gap(&self, from: SystemTime, to: SystemTime) -> Duration {
        let arrivals = lock(&self.arrivals);
        let within = arrivals.iter().copied().filter(|at| (from..to).contains(at));
        let marks: Vec<SystemTime> = std::iter::once(from).chain(within).chain([to]).collect();
        marks.windows(2).map(|pair| since(pair[1], pair[0])).max().unwrap_or_default()
    }
}

impl Progress {
    /// Connects to a guest, trying again until it answers or `limit` has passed.
    ///
    /// # Errors
    /// When it doesn't answer in time.
    pub fn connect(clients: &Namespace, guest: Ipv4Addr, limit: Duration) -> Result<Progress, ObserverError> {
        let started = Instant::now();
        let address = SocketAddr::from((guest, PROGRESS_PORT));
        let stream = loop {
            match clients.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)))? {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() >= limit => return Err(error.into()),
                Err(_) => std::thread::sleep(CONNECT_AGAIN_AFTER),
            }
        };
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (answer, answers) = mpsc::channel();
        let (reader, kept) = (BufReader::new(stream.try_clone()?), Arc::clone(&samples));
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                match line.parse() {
                    Ok(writes) => lock(&kept).push(Sample { at: SystemTime::now(), writes }),
                    Err(_) => drop(answer.send(line)),
                }
            }
        });
        Ok(Progress { samples, answers: Mutex::new(answers), stream })
    }

    /// Writes a second that the guest made between `from` and `to`; `None` when it wasn't heard around both.
    pub fn rate(&self, from: SystemTime, to: SystemTime) -> Option<f64> {
        let samples = lock(&self.samples);
        let writes = writes_at(&samples, to)? - writes_at(&samples, from)?;
        Some(writes / since(to, from).as_secs_f64())
    }

    /// Writes that the guest has told of so far.
    pub fn writes(&self) -> u64 {
        lock(&self.samples).last().map_or(0, |sample| sample.writes)
    }

    /// Tells the guest to do something to itself: `power off`, `reset`, `panic` or `suspend`. It may be gone before it
    /// answers.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn tell(&self, order: &str) -> Result<(), ObserverError> {
        Ok((&self.stream).write_all(format!("{order}\n").as_bytes())?)
    }

    /// Has the guest compare its whole working set with what it ever wrote, and returns its account. Writing rests
    /// meanwhile.
    ///
    /// # Errors
    /// When a page isn't what it should be, or no answer comes within `limit`.
    pub fn check(&self, limit: Duration) -> Result<String, ObserverError> {
        self.tell("check")?;
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = answers.recv_timeout(limit).map_err(|_| ObserverError::NoAnswer(limit))?;
        if answer.starts_with("check ok") { Ok(answer) } else { Err(ObserverError::Damaged(answer)) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // Ends the reading thread; a connection that is gone already has ended it.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Writes at a moment, on a straight line between the samples around it.
fn writes_at(samples: &[Sample], at: SystemTime) -> Option<f64> {
    let after = samples.partition_point(|sample| sample.at < at);
    let (before, after) = (samples.get(after.checked_sub(1)?)?, samples.get(after)?);
    let share =
        since(at, before.at).as_secs_f64() / since(after.at, before.at).as_secs_f64().max(f64::MIN_POSITIVE);
    Some(before.writes as f64 + share * (after.writes - before.writes) as f64)
}

fn since(later: SystemTime, earlier: SystemTime) -> Duration {
    later.duration_since(earlier).unwrap_or_default()
}

fn lock<T>(shared: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds)
    }

    #[test]
    fn progress_lies_on_a_line_between_samples_and_nowhere_else() {
        let samples = [Sample { at: at(10), writes: 100 }, Sample { at: at(30), writes: 140 }];
        assert_eq!(writes_at(&samples, at(20)), Some(120.0));
        assert_eq!(writes_at(&samples, at(30)), Some(140.0));
        assert_eq!(writes_at(&samples, at(5)), None);
        assert_eq!(writes_at(&samples, at(31)), None);
    }

    #[test]
    fn a_gap_reaches_to_the_ends_of_the_time_asked_for() {
        let listener = BeatListener {
            address: ([127, 0, 0, 1], 9).into(),
            arrivals: Arc::new(Mutex::new([0, 10, 20, 90, 100].map(at).to_vec())),
        };
        assert_eq!(listener.largest_gap(at(0), at(100)), Duration::from_millis(70));
        assert_eq!(listener.largest_gap(at(0), at(25)), Duration::from_millis(10));
        assert_eq!(listener.largest_gap(at(200), at(300)), Duration::from_millis(100));
    }
}
