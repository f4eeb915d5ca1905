//! One direction of a link, in virtual time.
//!
//! ```text
//!  offer ──► tail drop? ──► FIFO queue ──► serialise at `rate` ──► loss? ──► delay + jitter ──► due
//!              full                        one packet at a time     gone      order is kept
//! ```
//!
//! A packet's fate is settled when it is offered: when it will have been serialised follows from what was offered
//! before. So there is one queue, ordered by arrival, and no timer per stage. Whoever drives a [`Link`] says what time
//! it is, as a [`Duration`] since a start of its choice that never goes backwards.

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

/// The smallest queue of a shaped link, bytes: 64 full Ethernet frames.
pub const MIN_QUEUE_BYTES: u64 = 64 * 1514;

/// What a link does to packets, in one direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Rate of serialisation, bytes per second; `None`: at once.
    pub bytes_per_second: Option<u64>,
    /// Propagation delay, one way.
    pub delay: Duration,
    /// At most this much is added to `delay`, evenly distributed; packets keep their order.
    pub jitter: Duration,
    /// Share of packets lost, 0 to 1.
    pub loss: f64,
    /// Room of the queue before the link, bytes; what doesn't fit is dropped. `None`: see [`Shape::queue_limit_bytes`].
    pub queue_bytes: Option<u64>,
}

impl Shape {
    /// A link that neither limits, delays nor loses.
    pub const UNSHAPED: Shape = Shape {
        bytes_per_second: None,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
        queue_bytes: None,
    };

    /// A link of `megabits_per_second` (10⁶ bits) over which there and back takes `round_trip`, both directions alike.
    ///
    /// ```
    /// use std::time::Duration;
    /// use godwit_sim::link::Shape;
    /// let shape = Shape::symmetric(100, Duration::from_millis(20));
    /// assert_eq!(shape.bytes_per_second, Some(12_500_000));
    /// assert_eq!(shape.queue_limit_bytes(), 250_000);
    /// ```
    pub fn symmetric(megabits_per_second: u64, round_trip: Duration) -> Shape {
        Shape {
            bytes_per_second: Some(megabits_per_second * 125_000),
            delay: round_trip / 2,
            ..Shape::UNSHAPED
        }
    }

    /// The room of the queue: as given, else the product of rate and round trip (the rule of Villamizar and Song,
    /// "High Performance TCP in ANSNET", 1994, by which routers are built), and [`MIN_QUEUE_BYTES`] at least.
    pub fn queue_limit_bytes(&self) -> u64 {
        let round_trip = 2.0 * self.delay.as_secs_f64();
        let product = self.bytes_per_second.unwrap_or(0) as f64 * round_trip;
        self.queue_bytes.unwrap_or((product as u64).max(MIN_QUEUE_BYTES))
    }

    fn serialisation(&self, bytes: usize) -> Duration {
        match self.bytes_per_second {
            Some(rate) => Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / rate.max(1)),
            None => Duration::ZERO,
        }
    }
}

/// What became of the packets offered to a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets offered.
    pub offered_packets: u64,
    /// Bytes offered, Ethernet headers included.
    pub offered_bytes: u64,
    /// Packets handed out at the far end.
    pub delivered_packets: u64,
    /// Bytes handed out at the far end.
    pub delivered_bytes: u64,
    /// Packets that found the queue full.
    pub overflowed_packets: u64,
    /// Packets lost by chance.
    pub lost_packets: u64,
    /// Packets that were offered to, or under way on, a link that was cut.
    pub cut_packets: u64,
}

/// One direction of a link.
#[derive(Debug)]
pub struct Link {
    shape: Shape,
    cut: bool,
    under_way: VecDeque<UnderWay>,
    /// When the last queued packet will have been serialised.
    wire_free_at: Duration,
    dice: Dice,
    counters: Counters,
}

#[derive(Debug)]
struct UnderWay {
    arrives: Duration,
    packet: Vec<u8>,
}

impl Link {
    /// A link at rest. `seed` decides which packets are lost and how much each is delayed.
    pub fn new(shape: Shape, seed: u64) -> Link {
        Link {
            shape,
            cut: false,
            under_way: VecDeque::new(),
            wire_free_at: Duration::ZERO,
            dice: Dice(seed),
            counters: Counters::default(),
        }
    }

    /// Changes the shape for packets offered from now on.
    pub fn reshape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    /// Cuts the link: what is under way is lost, and so is whatever is offered until [`Link::restore`].
    pub fn cut(&mut self) {
        self.cut = true;
        self.counters.cut_packets += self.under_way.len() as u64;
        self.under_way.clear();
        self.wire_free_at = Duration::ZERO;
    }

    /// Ends a cut.
    pub fn restore(&mut self) {
        self.cut = false;
    }

    /// A packet enters the link at `now`.
    pub fn offer(&mut self, now: Duration, packet: &[u8]) {
        self.counters.offered_packets += 1;
        self.counters.offered_bytes += packet.len() as u64;
        if self.cut {
            self.counters.cut_packets += 1;
            return;
        }
        if self.queued_bytes(now) + packet.len() as u64 > self.shape.queue_limit_bytes() {
            self.counters.overflowed_packets += 1;
            return;
        }
        self.wire_free_at = self.wire_free_at.max(now) + self.shape.serialisation(packet.len());
        if self.dice.fraction() < self.shape.loss {
            self.counters.lost_packets += 1;
            return;
        }
        let arrives = self.wire_free_at + self.shape.delay + self.shape.jitter.mul_f64(self.dice.fraction());
        let arrives = self.under_way.back().map_or(arrives, |last| last.arrives.max(arrives));
        self.under_way.push_back(UnderWay { arrives, packet: packet.to_vec() });
    }

    /// The next packet that has arrived by `now`; call until `None`.
    pub fn due(&mut self, now: Duration) -> Option<Vec<u8>> {
        if self.next_due()? > now {
            return None;
        }
        let packet = self.under_way.pop_front()?.packet;
        self.counters.delivered_packets += 1;
        self.counters.delivered_bytes += packet.len() as u64;
        Some(packet)
    }

    /// When [`Link::due`] will have the next packet.
    pub fn next_due(&self) -> Option<Duration> {
        self.under_way.front().map(|next| next.arrives)
    }

    /// What became of the packets so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes that wait for the wire at `now`.
    fn queued_bytes(&self, now: Duration) -> u64 {
        let backlog = self.wire_free_at.saturating_sub(now);
        self.shape.bytes_per_second.map_or(0, |rate| (backlog.as_secs_f64() * rate as f64) as u64)
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_packet_takes_its_serialisation_and_the_delay() {
        let mut link = Link::new(Shape::symmetric(100, ms(20)), 1);
        link.offer(ms(5), &[7; 1250]);
        let expected = ms(15) + Duration::from_micros(100);
        assert_eq!(link.next_due(), Some(expected));
        assert_eq!(link.due(expected - Duration::from_nanos(1)), None);
        assert_eq!(link.due(expected), Some(vec![7; 1250]));
        assert_eq!(link.due(expected), None);
    }

    #[test]
    fn a_full_queue_drops_the_newest() {
        let shape = Shape { queue_bytes: Some(2500), ..Shape::symmetric(1, ms(0)) };
        let mut link = Link::new(shape, 1);
        for tag in 0..4 {
            link.offer(ms(0), &[tag; 1000]);
        }
        let out: Vec<u8> = std::iter::from_fn(|| link.due(ms(1000))).map(|packet| packet[0]).collect();
        assert_eq!(out, [0, 1]);
        assert_eq!(link.counters().overflowed_packets, 2);
    }

    #[test]
    fn a_cut_loses_what_is_under_way_and_a_restored_link_is_empty() {
        let mut link = Link::new(Shape::symmetric(1, ms(100)), 1);
        link.offer(ms(0), &[1; 1000]);
        link.cut();
        link.offer(ms(1), &[2; 1000]);
        link.restore();
        link.offer(ms(2), &[3; 1000]);
        assert_eq!(link.next_due(), Some(ms(2) + ms(8) + ms(50)));
        assert_eq!(link.due(ms(100)).map(|packet| packet[0]), Some(3));
        assert_eq!(link.counters().cut_packets, 2);
    }

    fn any_shape() -> impl Strategy<Value = Shape> {
        (proptest::option::of(1_000u64..10_000_000), 0u64..50, 0u64..20, 0.0..1.0f64, 2_000u64..100_000)
            .prop_map(|(bytes_per_second, delay, jitter, loss, queue)| Shape {
                bytes_per_second,
                delay: ms(delay),
                jitter: ms(jitter),
                loss,
                queue_bytes: Some(queue),
            })
    }

    proptest! {
        /// Whatever the shape: order is kept, nothing arrives faster than rate and delay allow, the queue keeps to its
        /// bound, and every packet is accounted for once.
        #[test]
        fn order_rate_bound_and_account(
            shape in any_shape(),
            offers in proptest::collection::vec((0u64..3_000, 60usize..1514), 1..200),
        ) {
            let mut link = Link::new(shape.clone(), 42);
            let mut now = Duration::ZERO;
            let mut sent = Vec::new();
            for (sequence, (gap_us, bytes)) in offers.iter().enumerate() {
                now += Duration::from_micros(*gap_us);
                let mut packet = vec![0; *bytes];
                packet[..4].copy_from_slice(&(sequence as u32).to_le_bytes());
                link.offer(now, &packet);
                sent.push((now, *bytes));
                prop_assert!(link.queued_bytes(now) <= shape.queue_limit_bytes());
            }
            let (mut last, mut floor) = (None, Duration::ZERO);
            while let Some(at) = link.next_due() {
                let packet = link.due(at).expect("due when it says so");
                let sequence = u32::from_le_bytes(packet[..4].try_into().unwrap());
                let (offered, bytes) = sent[sequence as usize];
                floor = floor.max(offered) + shape.serialisation(bytes);
                prop_assert_eq!(packet.len(), bytes);
                prop_assert!(last < Some(sequence));
                prop_assert!(at >= floor + shape.delay);
                last = Some(sequence);
            }
            let counters = link.counters();
            prop_assert_eq!(counters.offered_packets, offers.len() as u64);
            prop_assert_eq!(
                counters.offered_packets,
                counters.delivered_packets + counters.overflowed_packets + counters.lost_packets
            );
        }
    }
}
