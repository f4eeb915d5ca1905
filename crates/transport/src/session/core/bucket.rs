//! A token bucket: the bandwidth limit of a session, and its pace.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Bucket {
    limit: Option<Level>,
    /// A full bucket holds what the limit gives in this time.
    burst: Duration,
}

#[derive(Debug)]
struct Level {
    bytes_per_second: f64,
    /// Below zero after a frame larger than what was there.
    tokens: f64,
    filled_at: Instant,
}

impl Bucket {
    /// Without a limit.
    pub(super) fn new(burst: Duration) -> Self {
        Self { limit: None, burst }
    }

    /// Changes the limit; what was overdrawn stays overdrawn. A limit of zero is taken as one byte a second.
    pub(super) fn set(&mut self, bytes_per_second: Option<u64>, now: Instant) {
        let tokens = self.limit.as_mut().map_or(0.0, |level| {
            level.fill(self.burst, now);
            level.tokens
        });
        self.limit = bytes_per_second.map(|rate| Level {
            bytes_per_second: rate.max(1) as f64,
            tokens,
            filled_at: now,
        });
    }

    pub(super) fn take(&mut self, bytes: usize, now: Instant) {
        if let Some(level) = &mut self.limit {
            level.fill(self.burst, now);
            level.tokens -= bytes as f64;
        }
    }

    /// When something may be taken; `None`: now.
    pub(super) fn ready_at(&mut self, now: Instant) -> Option<Instant> {
        let level = self.limit.as_mut()?;
        level.fill(self.burst, now);
        let wait_seconds = -level.tokens / level.bytes_per_second;
        // Far more than a session lasts; keeps the addition below within what an Instant can hold.
        (wait_seconds > 0.0).then(|| now + Duration::from_secs_f64(wait_seconds.min(1e6)))
    }
}

impl Level {
    fn fill(&mut self, burst: Duration, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        let full = self.bytes_per_second * burst.as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.bytes_per_second).min(full);
        self.filled_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(bytes_per_second: u64, now: Instant) -> Bucket {
        let mut bucket = Bucket::new(Duration::from_millis(10));
        bucket.set(Some(bytes_per_second), now);
        bucket
    }

    #[test]
    fn what_is_taken_over_time_keeps_to_the_limit() {
        let start = Instant::now();
        let mut bucket = bucket(1_000_000, start);
        let (mut now, mut taken) = (start, 0);
        while now < start + Duration::from_secs(2) {
            match bucket.ready_at(now) {
                Some(at) => now = at.max(now + Duration::from_nanos(1)),
                None => {
                    bucket.take(16_384, now);
                    taken += 16_384;
                }
            }
        }
        assert!((1_980_000..2_040_000).contains(&taken), "{taken}");
    }

    #[test]
    fn a_limit_changes_while_it_is_in_use() {
        let now = Instant::now();
        let mut bucket = bucket(1000, now);
        bucket.take(1000, now);
        let second = Duration::from_secs(1);
        assert_eq!(bucket.ready_at(now), Some(now + second));
        bucket.set(Some(10_000), now);
        assert_eq!(bucket.ready_at(now), Some(now + second / 10));
        bucket.set(None, now);
        assert_eq!(bucket.ready_at(now), None);
    }
}
