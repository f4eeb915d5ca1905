//! How many different pages a guest writes in a time, from a few readings of a few pages.

use serde::{Deserialize, Serialize};

/// What the sampled pages did between one reading and the next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// The time between the two, milliseconds.
    pub elapsed_ms: u64,
    /// Pages that changed, those that change in every interval left out.
    pub changed: u64,
    /// Of these, pages that had changed in an interval before.
    pub again: u64,
    /// Pages that had changed in an interval before, whether in this one or not.
    pub known: u64,
}

/// How a guest writes to its memory.
///
/// *Hot* pages are written all the time; *warm* ones are a working set of which a random page is written, so and so often
/// a second. In a time `t` they show `hot + warm·(1 − exp(−rate·t / warm))` different pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Dirtying {
    /// Pages that every look finds changed.
    pub hot_pages: f64,
    /// Pages of the working set besides.
    pub warm_pages: f64,
    /// Writes to these a second, as far as they can be told from each other.
    pub warm_pages_per_second: f64,
}

impl Dirtying {
    /// Fits the model to what `sampled` of `total` pages did; `hot` of the sampled changed in every interval.
    ///
    /// The working set comes from recaptures: the larger it is, the seldomer a page that changed once changes again
    /// (Schnabel 1938, "The estimation of the total fish population of a lake", as corrected by Chapman: one more
    /// recapture than was seen, so that few of them don't promise an endless set).
    pub fn fit(total: u64, sampled: u64, hot: u64, intervals: &[Changes]) -> Self {
        let sampled_pages = sampled.max(1) as f64;
        let scale = total as f64 / sampled_pages;
        let sum = |value: fn(&Changes) -> f64| intervals.iter().map(value).sum::<f64>();
        let met = sum(|it| it.changed as f64 * it.known as f64);
        let seen = intervals.last().map_or(0, |it| it.known + it.changed - it.again.min(it.changed)) as f64;
        let warm =
            (met / (sum(|it| it.again as f64) + 1.0)).clamp(seen, (sampled_pages - hot as f64).max(seen));
        let writes: f64 = intervals.iter().map(|it| writes(it.changed as f64, warm)).sum();
        let seconds = sum(|it| it.elapsed_ms as f64) / 1e3;
        let per_second = if seconds > 0.0 { writes / seconds } else { 0.0 };
        Self {
            hot_pages: hot as f64 * scale,
            warm_pages: warm * scale,
            warm_pages_per_second: per_second * scale,
        }
    }

    /// Different pages written in a time.
    pub fn distinct_pages(&self, ms: f64) -> f64 {
        if ms <= 0.0 {
            return 0.0;
        }
        self.hot_pages + self.warm_pages * (1.0 - (-self.warm_writes_a_page(ms)).exp())
    }

    /// Writes to each of the warm pages that were written at all in a time; at least 1.
    pub fn writes_a_page(&self, ms: f64) -> f64 {
        let writes = self.warm_writes_a_page(ms);
        if writes <= 0.0 { 1.0 } else { (writes / (1.0 - (-writes).exp())).max(1.0) }
    }

    fn warm_writes_a_page(&self, ms: f64) -> f64 {
        if self.warm_pages > 0.0 { self.warm_pages_per_second * ms / 1e3 / self.warm_pages } else { 0.0 }
    }
}

/// How many writes to random ones of `set` pages leave `changed` of them changed; where that is nearly all, no more can
/// be told than that it was a few times the set.
fn writes(changed: f64, set: f64) -> f64 {
    const MOST_WRITES_A_PAGE: f64 = 3.0;
    if set <= 0.0 {
        return 0.0;
    }
    let share = (changed / set).min(1.0);
    set * -(1.0 - share).ln().max(-MOST_WRITES_A_PAGE)
}
