//! How often somebody may do something: a token bucket for each, in a table that doesn't grow without bound.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// More keys than this aren't remembered.
const KEYS_MAX: usize = 4096;

/// So many at once, and so many a second after that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub burst: u32,
    pub per_second: f64,
}

/// A bucket for each key; one that nobody has taken from for long is as good as none and is forgotten.
#[derive(Debug)]
pub(super) struct Buckets<K> {
    rate: Rate,
    levels: HashMap<K, Level>,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    tokens: f64,
    at: Instant,
}

impl<K: Eq + Hash> Buckets<K> {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, levels: HashMap::new() }
    }

    /// Takes one token of `key`, or says how long it will be until there is one.
    pub(super) fn take(&mut self, key: K, now: Instant) -> Result<(), Duration> {
        if self.levels.len() >= KEYS_MAX && !self.levels.contains_key(&key) {
            self.forget(now);
        }
        let rate = self.rate;
        let level = self.levels.entry(key).or_insert(Level { tokens: f64::from(rate.burst), at: now });
        level.tokens = level.refilled(rate, now);
        level.at = now;
        if level.tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - level.tokens) / rate.per_second));
        }
        level.tokens -= 1.0;
        Ok(())
    }

    /// Makes room. Where everybody is busy, everybody starts anew: what is bounded for all together still is.
    fn forget(&mut self, now: Instant) {
        let rate = self.rate;
        self.levels.retain(|_, level| level.refilled(rate, now) < f64::from(rate.burst));
        if self.levels.len() >= KEYS_MAX {
            self.levels.clear();
        }
    }
}

impl Level {
    fn refilled(&self, rate: Rate, now: Instant) -> f64 {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * rate.per_second;
        (self.tokens + gained).min(f64::from(rate.burst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 3, per_second: 2.0 };

    #[test]
    fn after_the_burst_one_waits_and_others_do_not() {
        let (mut buckets, now) = (Buckets::new(RATE), Instant::now());
        for _ in 0..3 {
            buckets.take("a", now).unwrap();
        }
        assert_eq!(buckets.take("a", now), Err(Duration::from_millis(500)));
        buckets.take("b", now).unwrap();
        buckets.take("a", now + Duration::from_millis(500)).unwrap();
        buckets.take("a", now + Duration::from_millis(501)).unwrap_err();
    }

    #[test]
    fn a_clock_that_stands_still_or_a_long_time_gives_no_more_than_the_burst() {
        let (mut buckets, now) = (Buckets::new(RATE), Instant::now());
        buckets.take("a", now).unwrap();
        let later = now + Duration::from_secs(1_000_000);
        let taken = (0..10).filter(|_| buckets.take("a", later).is_ok()).count();
        assert_eq!(taken, 3);
    }

    #[test]
    fn the_table_is_bounded() {
        let (mut buckets, now) = (Buckets::new(RATE), Instant::now());
        for key in 0..3 * KEYS_MAX {
            buckets.take(key, now).unwrap();
            assert!(buckets.levels.len() <= KEYS_MAX);
        }
    }
}
