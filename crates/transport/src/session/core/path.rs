//! What acknowledgements tell about the path: round trips, the rate of delivery, and how much may be in flight.
//!
//! The window follows BBR (Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016, and
//! draft-cheng-iccrg-delivery-rate-estimation): a little more than rate × shortest round trip keeps the link busy, and
//! more than that only waits in a queue. TCP's own congestion control stays in charge beneath; the window sees to it
//! that what is handed to it is young. The shortest round trip is measured anew every ten seconds with the link's
//! queue drained, because under load a round trip contains our own queue.

use std::time::{Duration, Instant};

/// The window before anything is known.
const INITIAL_WINDOW_BYTES: usize = 256 * 1024;
/// The window of the slowest path: a few frames.
const MIN_WINDOW_BYTES: usize = 64 * 1024;
/// How much more than rate × round trip may be in flight. With 1.5, a router's queue of one rate × round trip overflowed
/// (100 Mbit/s, 20 ms: 3 % of packets lost, a tenth of the throughput); with 1.25 it doesn't, whichever congestion
/// control TCP uses.
const WINDOW_GAIN: f64 = 1.25;
/// In which share of the shortest round trip a window may leave that opens all at once: slow enough that a router's queue takes
/// the excess, fast enough that the window grows as it would.
const PACE_SHARE: f64 = 0.75;
/// What the rate has to grow by, and within how many round trips, as long as the path is only being found out (BBR's startup).
const STARTUP_GROWTH: f64 = 1.25;
const STARTUP_ROUND_TRIPS: u32 = 3;
/// What an acknowledgement may be late at the receiver.
pub(super) const ACK_DELAY: Duration = Duration::from_millis(5);
/// The same while the shortest round trip is measured anew; below 1, so that queues drain.
const PROBE_GAIN: f64 = 0.5;
/// How long a shortest round trip is believed.
const MIN_RTT_LIFETIME: Duration = Duration::from_secs(10);
/// How long the highest rate is believed, at least.
const MIN_RATE_LIFETIME: Duration = Duration::from_millis(250);
/// Over how much time the reported rate is smoothed.
const SMOOTHING: Duration = Duration::from_millis(500);

/// What was known when a frame was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Departure {
    at: Instant,
    delivered_bytes: u64,
    delivered_at: Instant,
    first_sent_at: Instant,
    sender_limited: bool,
}

impl Departure {
    pub(super) fn is_later_than(&self, other: &Self) -> bool {
        self.at > other.at
    }
}

#[derive(Debug)]
pub(super) struct Path {
    max_window_bytes: usize,
    delivered_bytes: u64,
    delivered_at: Instant,
    first_sent_at: Instant,
    /// While fewer bytes than this are delivered, samples say what the sender offered, not what the link gives.
    sender_limited_until: u64,
    highest_rate: RecentMaximum,
    smoothed_rate: Option<f64>,
    smoothed_rtt: Option<Duration>,
    min_rtt: Option<(Duration, Instant)>,
    probe: Option<Probe>,
    startup: Option<Startup>,
}

/// TCP is still doubling what it sends: the rate says what it dared, not what the link gives.
#[derive(Debug, Clone, Copy)]
struct Startup {
    rate: f64,
    grew_at: Instant,
}

/// Measuring the shortest round trip: wait until little is in flight, then take the first frame sent after that.
#[derive(Debug, Clone, Copy)]
struct Probe {
    drained_at: Option<Instant>,
}

impl Path {
    pub(super) fn new(max_window_bytes: usize, now: Instant) -> Self {
        Self {
            max_window_bytes,
            delivered_bytes: 0,
            delivered_at: now,
            first_sent_at: now,
            sender_limited_until: 0,
            highest_rate: RecentMaximum::new(now),
            smoothed_rate: None,
            smoothed_rtt: None,
            min_rtt: None,
            probe: None,
            startup: Some(Startup { rate: 0.0, grew_at: now }),
        }
    }

    pub(super) fn sent(&mut self, nothing_in_flight: bool, now: Instant) -> Departure {
        if nothing_in_flight {
            self.first_sent_at = now;
            self.delivered_at = now;
        }
        Departure {
            at: now,
            delivered_bytes: self.delivered_bytes,
            delivered_at: self.delivered_at,
            first_sent_at: self.first_sent_at,
            sender_limited: self.delivered_bytes < self.sender_limited_until,
        }
    }

    /// The sender had less to send than the window allows.
    pub(super) fn sender_limited(&mut self, in_flight_bytes: usize) {
        self.sender_limited_until = self.delivered_bytes + in_flight_bytes as u64 + 1;
    }

    /// `bytes` were acknowledged, `newest` the latest departure among them; `in_flight_bytes` remain.
    pub(super) fn acknowledged(
        &mut self,
        bytes: usize,
        newest: Departure,
        in_flight_bytes: usize,
        now: Instant,
    ) {
        self.smooth_rate(bytes, newest.sender_limited, now);
        self.delivered_bytes += bytes as u64;
        self.delivered_at = now;
        self.first_sent_at = newest.at;
        self.sample_rtt(newest, in_flight_bytes, now);
        self.sample_rate(newest, now);
    }

    /// How many unacknowledged bytes there may be.
    pub(super) fn window_bytes(&self) -> usize {
        let (Some(rate), Some((min_rtt, _))) = (self.highest_rate.get(), self.min_rtt) else {
            return INITIAL_WINDOW_BYTES.min(self.max_window_bytes);
        };
        let window = match self.probe {
            Some(_) => PROBE_GAIN * rate * min_rtt.as_secs_f64(),
            None => rate * (WINDOW_GAIN * min_rtt.as_secs_f64() + ACK_DELAY.as_secs_f64()),
        };
        let least = if self.startup.is_some() { INITIAL_WINDOW_BYTES } else { MIN_WINDOW_BYTES };
        (window as usize).clamp(least.min(self.max_window_bytes), self.max_window_bytes)
    }

    /// How fast frames may follow each other; `None`: too little is known yet.
    ///
    /// A receiver that was busy for a moment acknowledges all it has at once. What the window then allows would arrive in one
    /// piece at a queue that is as long.
    pub(super) fn pace_bytes_per_second(&self) -> Option<u64> {
        let (round_trip, _) = self.min_rtt.filter(|_| self.startup.is_none())?;
        let pace = self.window_bytes() as f64 / (round_trip.as_secs_f64() * PACE_SHARE);
        Some(pace as u64)
    }

    pub(super) fn delivery_rate(&self) -> Option<f64> {
        self.smoothed_rate
    }

    pub(super) fn smoothed_rtt(&self) -> Option<Duration> {
        self.smoothed_rtt
    }

    pub(super) fn min_rtt(&self) -> Option<Duration> {
        self.min_rtt.map(|(rtt, _)| rtt)
    }

    fn sample_rtt(&mut self, newest: Departure, in_flight_bytes: usize, now: Instant) {
        let rtt = now.saturating_duration_since(newest.at);
        self.smoothed_rtt = Some(self.smoothed_rtt.map_or(rtt, |old| (old * 7 + rtt) / 8));
        let expired = match self.min_rtt {
            Some((shortest, at)) if rtt > shortest => now.saturating_duration_since(at) > MIN_RTT_LIFETIME,
            _ => {
                self.min_rtt = Some((rtt, now));
                self.probe = None;
                return;
            }
        };
        match self.probe {
            None if expired => self.probe = Some(Probe { drained_at: None }),
            Some(Probe { drained_at: None }) if in_flight_bytes <= self.window_bytes() => {
                self.probe = Some(Probe { drained_at: Some(now) });
            }
            Some(Probe { drained_at: Some(drained_at) }) if newest.at >= drained_at => {
                self.min_rtt = Some((rtt, now));
                self.probe = None;
            }
            _ => {}
        }
    }

    fn sample_rate(&mut self, newest: Departure, now: Instant) {
        let acknowledging = now.saturating_duration_since(newest.delivered_at);
        let sending = newest.at.saturating_duration_since(newest.first_sent_at);
        let elapsed = acknowledging.max(sending);
        let shortest = self.min_rtt.map_or(Duration::ZERO, |(rtt, _)| rtt);
        if elapsed < shortest || elapsed.is_zero() {
            return;
        }
        let rate = (self.delivered_bytes - newest.delivered_bytes) as f64 / elapsed.as_secs_f64();
        if newest.sender_limited && self.highest_rate.get().is_some_and(|highest| rate < highest) {
            return;
        }
        self.highest_rate.add(rate, MIN_RATE_LIFETIME.max(shortest * 5), now);
        self.smoothed_rate.get_or_insert(rate);
        if !newest.sender_limited {
            self.startup = self.startup.and_then(|startup| startup.after(rate, shortest, now));
        }
    }

    /// What arrived since the last acknowledgement, averaged; so that a stall and the burst after it cancel out.
    fn smooth_rate(&mut self, bytes: usize, sender_limited: bool, now: Instant) {
        let elapsed = now.saturating_duration_since(self.delivered_at).as_secs_f64();
        if let Some(smoothed) = &mut self.smoothed_rate
            && !sender_limited
        {
            let kept = (-elapsed / SMOOTHING.as_secs_f64()).exp();
            // For short times the second factor is elapsed / smoothing; divided by elapsed it stays finite.
            let weight = if elapsed > 0.0 { (1.0 - kept) / elapsed } else { 1.0 / SMOOTHING.as_secs_f64() };
            *smoothed = *smoothed * kept + bytes as f64 * weight;
        }
    }
}

impl Startup {
    /// `None`: it is over.
    fn after(self, rate: f64, round_trip: Duration, now: Instant) -> Option<Self> {
        if rate > self.rate * STARTUP_GROWTH {
            return Some(Self { rate, grew_at: now });
        }
        let waited = now.saturating_duration_since(self.grew_at);
        (waited < round_trip * STARTUP_ROUND_TRIPS).then_some(self)
    }
}

/// The maximum over the running and the previous of equal spans of time.
#[derive(Debug)]
struct RecentMaximum {
    previous: Option<f64>,
    current: Option<f64>,
    began_at: Instant,
}

impl RecentMaximum {
    fn new(now: Instant) -> Self {
        Self { previous: None, current: None, began_at: now }
    }

    fn add(&mut self, value: f64, span: Duration, now: Instant) {
        if now.saturating_duration_since(self.began_at) > span {
            self.previous = self.current.take();
            self.began_at = now;
        }
        self.current = Some(self.current.map_or(value, |maximum| maximum.max(value)));
    }

    fn get(&self) -> Option<f64> {
        match (self.previous, self.current) {
            (Some(previous), Some(current)) => Some(previous.max(current)),
            (previous, current) => previous.or(current),
        }
    }
}
