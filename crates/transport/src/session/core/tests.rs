//! The protocol against arbitrary connections, and its window on a simulated link.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const BULK_CONNECTIONS: usize = 3;
const ROLES: [Role; 1 + BULK_CONNECTIONS] =
    [Role::Urgent, Role::Bulk { index: 0 }, Role::Bulk { index: 1 }, Role::Bulk { index: 2 }];

/// Something that may happen to two connected cores; `side` 0 or 1 acts.
#[derive(Debug, Clone)]
enum Step {
    Submit {
        side: usize,
        lane: Lane,
        bytes: usize,
    },
    Transmit {
        side: usize,
        connection: usize,
    },
    Deliver {
        side: usize,
        connection: usize,
    },
    /// The application takes what has arrived.
    Take {
        side: usize,
        lane: Lane,
    },
    /// A frame arrives once more, as after a resumption that raced with it.
    Repeat {
        side: usize,
        connection: usize,
    },
    Cut,
    Wait {
        ms: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let side = 0..2usize;
    let connection = 0..ROLES.len();
    let lane = || prop_oneof![Just(Lane::Urgent), Just(Lane::Bulk)];
    let bytes = prop_oneof![0..64usize, 16_000..17_000usize, 0..200_000usize, Just(MAX_PAYLOAD_BYTES)];
    let step = prop_oneof![
        4 => (side.clone(), lane(), bytes).prop_map(|(side, lane, bytes)| Step::Submit { side, lane, bytes }),
        8 => (side.clone(), connection.clone())
            .prop_map(|(side, connection)| Step::Transmit { side, connection }),
        8 => (side.clone(), connection.clone())
            .prop_map(|(side, connection)| Step::Deliver { side, connection }),
        2 => (side.clone(), lane()).prop_map(|(side, lane)| Step::Take { side, lane }),
        1 => (side, connection).prop_map(|(side, connection)| Step::Repeat { side, connection }),
        1 => Just(Step::Cut),
        2 => (0..10u64).prop_map(|ms| Step::Wait { ms }),
    ];
    prop::collection::vec(step, 0..300)
}

/// Two cores and what is on its way between them.
struct Pair {
    now: Instant,
    cores: [Core; 2],
    /// What each side has sent on each connection.
    wires: [[VecDeque<Frame>; ROLES.len()]; 2],
    submitted: [[Vec<(u8, usize)>; 2]; 2],
    taken: [[Vec<(u8, usize)>; 2]; 2],
}

impl Pair {
    fn new() -> Self {
        let now = Instant::now();
        // Little enough that acknowledgements are held back often.
        let limits = Limits { receive_queue_bytes: 100_000, ..Limits::default() };
        let mut pair = Self {
            now,
            cores: [(), ()].map(|()| Core::new(limits.clone(), now)),
            wires: Default::default(),
            submitted: Default::default(),
            taken: Default::default(),
        };
        pair.cut();
        pair
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Submit { side, lane, bytes } => self.submit(side, lane, bytes),
            Step::Transmit { side, connection } => drop(self.transmit(side, connection)),
            Step::Deliver { side, connection } => drop(self.deliver(side, connection)),
            Step::Take { side, lane } => self.take(side, lane),
            Step::Repeat { side, connection } => {
                let wire = &mut self.wires[side][connection];
                wire.extend(wire.front().cloned());
            }
            Step::Cut => self.cut(),
            Step::Wait { ms } => self.now += Duration::from_millis(ms),
        }
    }

    fn submit(&mut self, side: usize, lane: Lane, bytes: usize) {
        let core = &mut self.cores[side];
        if core.is_writable(lane) {
            let kind = self.submitted[side][lane.index()].len() as u8;
            core.submit(lane, kind, Bytes::from(vec![kind; bytes])).unwrap();
            self.submitted[side][lane.index()].push((kind, bytes));
            let most = MAX_WINDOW_BYTES + URGENT_WINDOW_BYTES + 3 * MAX_PAYLOAD_BYTES;
            assert!(core.stats().in_flight_bytes as usize <= most);
        }
    }

    fn transmit(&mut self, side: usize, connection: usize) -> bool {
        let role = ROLES[connection];
        let acknowledged = self.cores[side].stats().acknowledged.on(role.lane());
        let Transmit::Frame(frame) = self.cores[side].poll_transmit(role, self.now) else { return false };
        if frame.header.content != Content::Acknowledgement {
            assert!(frame.header.sequence >= acknowledged, "an acknowledged frame was sent again");
        }
        self.wires[side][connection].push_back(frame);
        true
    }

    /// Delivers the oldest frame that `side` has sent on a connection.
    fn deliver(&mut self, side: usize, connection: usize) -> bool {
        let Some(frame) = self.wires[side][connection].pop_front() else { return false };
        self.cores[1 - side].receive(ROLES[connection], frame, self.now).unwrap();
        true
    }

    fn take(&mut self, side: usize, lane: Lane) {
        while let Some(message) = self.cores[side].take(lane) {
            assert!(message.payload.iter().all(|byte| *byte == message.kind));
            self.taken[side][lane.index()].push((message.kind, message.payload.len()));
        }
    }

    fn take_all(&mut self) {
        for side in 0..2 {
            Lane::ALL.iter().for_each(|lane| self.take(side, *lane));
        }
    }

    /// All connections break, whatever is on them is lost, and new ones are made.
    fn cut(&mut self) {
        self.wires = Default::default();
        let expected = self.cores.each_ref().map(Core::next_expected);
        for (side, core) in self.cores.iter_mut().enumerate() {
            core.detach();
            assert_eq!(core.poll_transmit(Role::Urgent, self.now), Transmit::Idle);
            core.resume(expected[1 - side], self.now).unwrap();
            assert_eq!(core.stats().acknowledged, expected[1 - side]);
        }
    }

    /// Lets everything arrive.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.take_all();
            if self.cores.iter().all(Core::is_flushed) {
                return;
            }
            self.now += Duration::from_millis(1);
            for side in 0..2 {
                for connection in 0..ROLES.len() {
                    while self.transmit(side, connection) {}
                    while self.deliver(side, connection) {}
                }
            }
        }
        panic!("the session does not settle");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_happens_to_connections_messages_arrive_once_and_in_order(steps in steps()) {
        let mut pair = Pair::new();
        for step in &steps {
            pair.apply(step);
        }
        pair.settle();
        for side in 0..2 {
            prop_assert_eq!(&pair.taken[1 - side], &pair.submitted[side]);
        }
    }

    #[test]
    fn hostile_frames_end_in_a_violation_or_are_dropped(
        sequence in prop_oneof![0..4u64, Just(u64::MAX), any::<u64>()],
        urgent in prop_oneof![0..4u64, any::<u64>()],
        bulk in prop_oneof![0..4u64, any::<u64>()],
        more: bool,
        on_bulk: bool,
    ) {
        let now = Instant::now();
        let mut core = Core::new(Limits::default(), now);
        core.resume(NextExpected::default(), now).unwrap();
        let received = NextExpected { urgent, bulk };
        let (lane, content) = (Lane::Bulk, Content::Message { more });
        let header = Header { lane, kind: 0, content, payload_bytes: 1, sequence, received };
        let role = if on_bulk { Role::Bulk { index: 0 } } else { Role::Urgent };
        let frame = Frame { header, payload: Bytes::from_static(b"x") };
        let result = core.receive(role, frame, now);
        let acceptable = (urgent, bulk) == (0, 0) && on_bulk && sequence <= 2 * 16 * 1024;
        prop_assert_eq!(result.is_ok(), acceptable);
    }
}

#[test]
fn close_comes_after_everything_else_and_ends_submission() {
    let mut pair = Pair::new();
    pair.submit(0, Lane::Urgent, 10);
    pair.cores[0].close();
    assert_eq!(pair.cores[0].submit(Lane::Urgent, 0, Bytes::new()), Err(SubmitError::Closed));
    pair.cut();
    pair.settle();
    assert!(pair.cores[1].is_peer_closed());
    assert_eq!(pair.taken[1], pair.submitted[0]);
}

#[test]
fn bulk_keeps_to_the_bandwidth_and_urgent_does_not_wait() {
    let mut pair = Pair::new();
    pair.cores[0].set_bandwidth(Some(1_000_000), pair.now);
    pair.submit(0, Lane::Bulk, 100_000);
    while pair.transmit(0, 1) {}
    assert!(matches!(pair.cores[0].poll_transmit(ROLES[1], pair.now), Transmit::Wait(_)));
    pair.submit(0, Lane::Urgent, 100);
    assert!(pair.transmit(0, 0));
    pair.settle();
}

/// A peer whose bulk connections are slow must still learn what arrived, and that we are there.
#[test]
fn bulk_frames_do_not_stand_in_for_acknowledgements_on_the_urgent_connection() {
    let mut pair = Pair::new();
    pair.submit(1, Lane::Bulk, 50_000);
    pair.submit(0, Lane::Bulk, 50_000);
    while pair.transmit(1, 1) && pair.deliver(1, 1) {}
    while pair.transmit(0, 1) {}
    pair.now += Duration::from_millis(5);
    assert!(pair.transmit(0, 0), "no acknowledgement left on the urgent connection");
    pair.deliver(0, 0);
    assert!(pair.cores[1].is_flushed());
    pair.submit(0, Lane::Bulk, 100);
    pair.now += acks::HEARTBEAT;
    assert!(pair.transmit(0, 1) && pair.transmit(0, 0), "no heartbeat left on the urgent connection");
}

/// One direction of a link with a queue that never drops: the worst case for what waits in it.
struct Link {
    bytes_per_second: f64,
    delay: Duration,
    free_at: Instant,
    queue: VecDeque<(Instant, Role, Frame)>,
}

impl Link {
    fn send(&mut self, role: Role, frame: Frame, now: Instant) {
        let serialising = Duration::from_secs_f64(frame.wire_bytes() as f64 / self.bytes_per_second);
        self.free_at = self.free_at.max(now) + serialising;
        self.queue.push_back((self.free_at + self.delay, role, frame));
    }

    fn arrived(&mut self, now: Instant) -> Option<(Role, Frame)> {
        let arrived = self.queue.front().is_some_and(|(at, ..)| *at <= now);
        arrived.then(|| self.queue.pop_front().map(|(_, role, frame)| (role, frame))).flatten()
    }
}

/// A sender with always something to send, over a link with 10 ms each way.
struct Transfer {
    now: Instant,
    cores: [Core; 2],
    links: [Link; 2],
    taken_bytes: usize,
    /// In the latest run, before the link.
    most_queued_bytes: usize,
}

impl Transfer {
    fn new(bytes_per_second: f64) -> Self {
        let now = Instant::now();
        let delay = Duration::from_millis(10);
        let link = || Link { bytes_per_second, delay, free_at: now, queue: VecDeque::new() };
        let mut cores = [(), ()].map(|()| Core::new(Limits::default(), now));
        for core in &mut cores {
            core.resume(NextExpected::default(), now).unwrap();
        }
        Self { now, cores, links: [link(), link()], taken_bytes: 0, most_queued_bytes: 0 }
    }

    /// Runs for a time; returns the share of the link that was used, and the most that was in flight.
    fn run(&mut self, time: Duration) -> (f64, usize) {
        let (until, before) = (self.now + time, self.taken_bytes);
        let (mut most_in_flight, mut most_queued_bytes) = (0, 0);
        while self.now < until {
            while self.cores[0].is_writable(Lane::Bulk) {
                self.cores[0].submit(Lane::Bulk, 0, Bytes::from_static(&[0; 60_000])).unwrap();
            }
            self.exchange();
            most_queued_bytes = most_queued_bytes.max(self.queued_bytes());
            most_in_flight = most_in_flight.max(self.cores[0].stats().in_flight_bytes as usize);
            self.now += Duration::from_micros(200);
        }
        self.most_queued_bytes = most_queued_bytes;
        let possible = self.links[0].bytes_per_second * time.as_secs_f64();
        ((self.taken_bytes - before) as f64 / possible, most_in_flight)
    }

    /// The receiver is busy for a time: nothing is taken from the link, and nothing acknowledged.
    fn stall(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            while let Transmit::Frame(frame) = self.cores[0].poll_transmit(Role::Bulk { index: 0 }, self.now)
            {
                self.links[0].send(Role::Bulk { index: 0 }, frame, self.now);
            }
            self.now += Duration::from_micros(200);
        }
    }

    /// What waits before the link.
    fn queued_bytes(&self) -> usize {
        let link = &self.links[0];
        (link.free_at.saturating_duration_since(self.now).as_secs_f64() * link.bytes_per_second) as usize
    }

    fn exchange(&mut self) {
        for side in 0..2 {
            for role in [Role::Urgent, Role::Bulk { index: 0 }] {
                while let Transmit::Frame(frame) = self.cores[side].poll_transmit(role, self.now) {
                    self.links[side].send(role, frame, self.now);
                }
            }
            while let Some((role, frame)) = self.links[side].arrived(self.now) {
                self.cores[1 - side].receive(role, frame, self.now).unwrap();
            }
        }
        while let Some(message) = self.cores[1].take(Lane::Bulk) {
            self.taken_bytes += message.payload.len();
        }
    }
}

#[test]
fn the_link_is_used_and_its_queue_stays_short() {
    // 100 Mbit/s and 20 ms: 250 KB fill the pipe.
    let mut transfer = Transfer::new(12.5e6);
    transfer.run(Duration::from_secs(1));
    let (used, most_in_flight) = transfer.run(Duration::from_secs(30));
    assert!(used > 0.97, "only {used} of the link was used");
    assert!(most_in_flight < 480_000, "{most_in_flight} bytes were in flight");
    // It becomes a link of 20 Mbit/s, then of 400 Mbit/s.
    transfer.links[0].bytes_per_second = 2.5e6;
    transfer.run(Duration::from_secs(3));
    let (used, most_in_flight) = transfer.run(Duration::from_secs(30));
    assert!(used > 0.97, "only {used} of the slower link was used");
    assert!(most_in_flight < 200_000, "{most_in_flight} bytes were in flight on the slower link");
    transfer.links[0].bytes_per_second = 50e6;
    transfer.run(Duration::from_secs(2));
    let (used, most_in_flight) = transfer.run(Duration::from_secs(30));
    assert!(used > 0.97, "only {used} of the faster link was used");
    assert!(most_in_flight < 2_200_000, "{most_in_flight} bytes were in flight on the faster link");
}

/// A router drops what comes in one piece and is longer than its queue, which seldom holds more than rate × round trip.
#[test]
fn what_a_stall_has_held_back_does_not_leave_at_once() {
    let mut transfer = Transfer::new(12.5e6);
    transfer.run(Duration::from_secs(1));
    for stall_ms in [15, 25, 40] {
        transfer.stall(Duration::from_millis(stall_ms));
        transfer.run(Duration::from_millis(500));
        let most = transfer.most_queued_bytes;
        assert!(most < 250_000, "{most} bytes queued after a stall of {stall_ms} ms");
    }
    let (used, _) = transfer.run(Duration::from_secs(5));
    assert!(used > 0.97, "only {used} of the link was used");
}
