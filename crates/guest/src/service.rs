//! Keeps the pace, and lets others see it: a counter over TCP, a beat over UDP.

use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    power,
    workload::{Check, WorkingSet, Workload},
};

/// The TCP port that streams the counter and takes `check`.
const PORT: u16 = 7;
/// How often the counter and the beat are sent, and the writes of a paced workload are made.
const TICK: Duration = Duration::from_millis(10);
/// Writes between two looks at who else wants the working set, where the workload has no pace.
const UNPACED_WRITES: usize = 256;

/// Serves the counter at [`PORT`], of writes to `set` and `work` of a command together, and sends a beat to `observer`: a
/// sequence number and the number of this boot, 64 bits each, little-endian.
pub(crate) fn start(set: &Arc<Mutex<WorkingSet>>, work: &Arc<AtomicU64>, observer: Option<SocketAddr>) {
    let (set, work) = (Arc::clone(set), Arc::clone(work));
    std::thread::spawn(move || match TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)) {
        Ok(listener) => listener.incoming().flatten().for_each(|client| attend(client, &set, &work)),
        Err(error) => eprintln!("cannot listen: {error}"),
    });
    if let Some(observer) = observer {
        std::thread::spawn(move || beat(observer));
    }
}

/// Writes at the workload's pace, for ever. Time lost beyond one tick is not made up for.
pub(crate) fn keep_pace(set: &Mutex<WorkingSet>, workload: Workload) {
    match workload.pages_per_second {
        Some(0) => {}
        Some(pages_per_second) => {
            let per_tick = pages_per_second * TICK.as_millis() as usize / 1000;
            each_tick(|| {
                lock(set).write(per_tick);
                true
            });
        }
        None => loop {
            lock(set).write(UNPACED_WRITES);
            std::thread::yield_now();
        },
    }
}

/// Writes are complete before the lock is given back, and nothing in them panics.
fn lock(set: &Mutex<WorkingSet>) -> MutexGuard<'_, WorkingSet> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

fn attend(client: TcpStream, set: &Arc<Mutex<WorkingSet>>, work: &Arc<AtomicU64>) {
    let Ok(reader) = client.try_clone() else { return };
    let (counted, checked, work) = (Arc::clone(set), Arc::clone(set), Arc::clone(work));
    std::thread::spawn(move || {
        let mut writer = client;
        each_tick(|| {
            let count = lock(&counted).writes() + work.load(Ordering::Relaxed);
            writer.write_all(format!("{count}\n").as_bytes()).is_ok()
        });
    });
    std::thread::spawn(move || answer_checks(reader, &checked));
}

fn answer_checks(client: TcpStream, set: &Mutex<WorkingSet>) {
    let Ok(mut writer) = client.try_clone() else { return };
    for line in BufReader::new(client).lines().map_while(Result::ok) {
        let answer = match line.as_str() {
            "check" => match lock(set).check() {
                Check::Right { pages, writes } => {
                    format!("check ok {pages} pages {writes} writes {:016x} boot\n", power::boot())
                }
                Check::Wrong { page, reason } => format!("check bad page {page}: {reason}\n"),
            },
            "power off" => power::off(),
            "reset" => power::reset(),
            "panic" => power::panic(),
            "suspend" => power::suspend(),
            _ => continue,
        };
        if writer.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn beat(observer: SocketAddr) {
    let Ok(socket) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)) else { return };
    let (mut sequence, boot) = (0u64, power::boot());
    each_tick(|| {
        let beat = [sequence, boot].map(u64::to_le_bytes).concat();
        // Whoever listens sees the gap; there is nothing else to do about a beat that couldn't be sent.
        let _ = socket.send_to(&beat, observer);
        sequence += 1;
        true
    });
}

/// Does `work` every [`TICK`] until it returns false. A tick that comes late is made up for, one that was missed isn't.
fn each_tick(mut work: impl FnMut() -> bool) {
    let mut next = Instant::now();
    while work() {
        next += TICK;
        let now = Instant::now();
        if now > next + TICK {
            next = now;
        }
        std::thread::sleep(next.saturating_duration_since(now));
    }
}
