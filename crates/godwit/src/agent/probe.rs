//! How fast the way to another host is: a bounded request that only takes time.
//!
//! ```text
//!   connect ── the handshake's time is the round trip ──► POST of at most 2 MiB, 1 s ──► the peer says when what arrived
//! ```
//!
//! The first half brings TCP up to speed and isn't counted.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::{Body, Bytes},
};
use futures_util::{StreamExt, stream};
use http_body_util::StreamBody;
use hyper::{Method, body::Frame};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Agent, peers::PeerAgent};
use crate::{http, output::one_line};

/// The path that measures.
pub(super) const PROBE_PATH: &str = "/v1/probe";
/// What is sent at most: at 100 Mbit/s the half that counts takes 90 ms, several times as long as a busy receiver is late.
const PROBE_BYTES: usize = 2 << 20;
/// What is sent at once.
const PIECE_BYTES: usize = 16 << 10;
/// After so long the receiver has seen enough.
const ENOUGH: Duration = Duration::from_secs(1);
/// A probe that takes longer, connecting included, has failed.
const GIVE_UP: Duration = Duration::from_secs(3);

/// By how much faster the second half may be than the last three quarters: so much where TCP's window doubled from one to the
/// other, and not much more.
const FASTER_MAX: f64 = 1.5;

/// What the receiver of a probe saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Probed {
    /// Of the second half; `None` if too little came.
    pub(super) rate_bytes_per_second: Option<u64>,
}

/// The way to a peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Measured {
    pub(super) rate_bytes_per_second: u64,
    pub(super) round_trip_ms: f64,
}

impl Agent {
    /// Measures the way to a peer; `None` if it can't be, or the peer doesn't want to.
    pub(super) async fn probe(&self, peer: &PeerAgent) -> Option<Measured> {
        match timeout(GIVE_UP, self.send_probe(peer)).await {
            Ok(Ok(measured)) => measured,
            Ok(Err(reason)) => {
                tracing::info!(reason, "the way to the target can't be measured");
                None
            }
            Err(_) => None,
        }
    }

    async fn send_probe(&self, peer: &PeerAgent) -> Result<Option<Measured>, String> {
        let (stream, round_trip) = self.connect(peer).await.map_err(|error| one_line(&error))?;
        // What still waits to be sent once the answer has come is of no use.
        let _ = stream.get_ref().0.set_zero_linger();
        let pieces = stream::iter(0..PROBE_BYTES / PIECE_BYTES);
        let pieces =
            pieces.map(|_| Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0x5a; PIECE_BYTES]))));
        let answer = http::send_body(stream, Method::POST, PROBE_PATH, StreamBody::new(pieces)).await;
        let answer = answer.map_err(|error| one_line(&error))?;
        let probed: Probed = http::receive(answer).await.map_err(|error| one_line(&error))?;
        Ok(probed.rate_bytes_per_second.map(|rate_bytes_per_second| Measured {
            rate_bytes_per_second,
            round_trip_ms: round_trip.as_secs_f64() * 1e3,
        }))
    }
}

/// Takes a probe and says how fast it came.
pub(super) async fn receive(body: Body) -> Json<Probed> {
    let mut arrivals = Vec::new();
    let (began, mut pieces, mut bytes) = (Instant::now(), body.into_data_stream(), 0);
    let take = async {
        while let Some(Ok(piece)) = pieces.next().await {
            bytes += piece.len();
            arrivals.push((began.elapsed(), bytes));
            if bytes >= PROBE_BYTES {
                break;
            }
        }
    };
    let _ = timeout(ENOUGH, take).await;
    Json(Probed { rate_bytes_per_second: rate(&arrivals) })
}

/// Bytes a second in the second half of what arrived, by the times at which so many bytes were seen; in the last three quarters
/// if the half begins with what a receiver that was kept until then sees all at once.
fn rate(arrivals: &[(Duration, usize)]) -> Option<u64> {
    let (_, all) = *arrivals.last()?;
    let from = |share: usize| {
        let first = arrivals.partition_point(|(_, bytes)| bytes * 4 < all * share);
        rate_between_stops(&arrivals[first..])
    };
    let half = from(2)?;
    let rate = from(1).filter(|quarters| half > quarters * FASTER_MAX).unwrap_or(half);
    rate.is_finite().then_some(rate.round() as u64)
}

/// A receiver that is busy sees things late, and then many at once, but nothing early. So the link's rate is the slope of the
/// points' upper hull, where that goes on for longest: before or after whatever kept the receiver.
fn rate_between_stops(arrivals: &[(Duration, usize)]) -> Option<f64> {
    let mut hull: Vec<(f64, f64)> = Vec::new();
    for point in arrivals.iter().map(|(at, bytes)| (at.as_secs_f64(), *bytes as f64)) {
        while let [.., before, last] = hull[..]
            && slope(before, last) <= slope(last, point)
        {
            hull.pop();
        }
        hull.push(point);
    }
    let edges = hull.windows(2).map(|edge| (edge[1].0 - edge[0].0, slope(edge[0], edge[1])));
    edges.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, rate)| rate)
}

fn slope(from: (f64, f64), to: (f64, f64)) -> f64 {
    (to.1 - from.1) / (to.0 - from.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_second_half_counts() {
        let at = |ms, bytes| (Duration::from_millis(ms), bytes);
        assert_eq!(rate(&[at(0, 10), at(900, 100), at(950, 150), at(1_000, 200)]), Some(1_000));
        assert_eq!(rate(&[at(0, 10)]), None);
        assert_eq!(rate(&[]), None);
        assert_eq!(rate(&[at(5, 10), at(5, 20)]), None);
    }

    #[test]
    fn a_receiver_that_was_busy_for_a_moment_sees_the_same_rate() {
        let at_a_megabyte_a_second = |kept_ms: std::ops::Range<u64>| -> Vec<_> {
            let seen_ms = |ms: u64| if kept_ms.contains(&ms) { kept_ms.end } else { ms };
            (0..=200).map(|ms| (Duration::from_millis(seen_ms(ms)), ms as usize * 1_000)).collect()
        };
        for kept_ms in [0..0, 95..140, 120..160, 170..205, 0..110] {
            assert_eq!(rate(&at_a_megabyte_a_second(kept_ms.clone())), Some(1_000_000), "{kept_ms:?}");
        }
    }

    /// As an agent saw it that shared a core with a QEMU that started: 12 MB/s, kept from 125 to 170 ms, and then at 27 MB/s what
    /// had come until then.
    #[test]
    fn what_is_read_late_and_slowly_is_not_taken_for_a_faster_link() {
        let arrived = |ms: f64| ((ms - 50.0) * 12_000.0) as usize;
        let read = |ms: f64| (arrived(125.0) + ((ms - 170.0) * 27_000.0) as usize).min(arrived(ms));
        let seen = |ms: f64| if ms < 170.0 { arrived(ms.min(125.0)) } else { read(ms) };
        let arrivals: Vec<_> =
            (50..=220).map(f64::from).map(|ms| (Duration::from_secs_f64(ms / 1e3), seen(ms))).collect();
        let rate = rate(&arrivals).unwrap();
        assert!((11_000_000..14_000_000).contains(&rate), "{rate}");
    }

    #[test]
    fn a_window_that_still_doubles_is_no_stop() {
        let arrivals: Vec<_> = [(0, 1), (20, 2), (40, 4), (60, 8), (80, 16), (100, 32)]
            .map(|(ms, pieces)| (Duration::from_millis(ms), pieces * 64_000))
            .into();
        assert_eq!(rate(&arrivals), Some(51_200_000));
    }

    #[tokio::test]
    async fn what_is_too_long_is_not_read_to_its_end() {
        let endless = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[0; PIECE_BYTES])));
        let Json(probed) = receive(Body::from_stream(endless)).await;
        assert!(probed.rate_bytes_per_second.is_some());
    }
}
