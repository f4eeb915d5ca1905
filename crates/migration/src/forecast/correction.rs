//! What earlier forecasts got wrong, taken out of the next.

use serde::{Deserialize, Serialize};

/// A forecast counts as if so many more had been right, so that one odd migration doesn't move the next one's far.
const TRUST: f64 = 1.0;
/// The same for the width of intervals.
const WIDTH_TRUST: f64 = 4.0;
/// The share of outcomes that an interval is to cover.
const COVERAGE: f64 = 0.9;
/// An interval is never narrower than this, to each side.
const LEAST_SPREAD: f64 = 0.04;

/// A figure and what it will be between in nine of ten cases.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// Hardly less.
    pub low: f64,
    /// Most likely.
    pub likely: f64,
    /// Hardly more.
    pub high: f64,
}

/// How outcomes stood to forecasts lately.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Correction {
    factor: f64,
    spread: f64,
}

impl Correction {
    /// Learns from pairs of what was foreseen, uncorrected, and what came; `spread` (the logarithm of how far off an
    /// outcome may be) is believed as long as there are few. Pairs in which something isn't positive say nothing.
    ///
    /// The factor is the median of the logarithms of the ratios: one migration over a link that broke doesn't count for
    /// more than any other.
    pub fn learn(pairs: impl IntoIterator<Item = (f64, f64)>, spread: f64) -> Self {
        let ratio = |(foreseen, came): (f64, f64)| (came / foreseen).ln();
        let mut ratios: Vec<f64> = pairs.into_iter().map(ratio).filter(|ratio| ratio.is_finite()).collect();
        let count = ratios.len() as f64;
        let median = quantile(&mut ratios, 0.5);
        let mut errors: Vec<f64> = ratios.iter().map(|ratio| (ratio - median).abs()).collect();
        let error = quantile(&mut errors, COVERAGE);
        Self {
            factor: (median * count / (count + TRUST)).exp(),
            spread: ((spread * WIDTH_TRUST + error * count) / (WIDTH_TRUST + count)).max(LEAST_SPREAD),
        }
    }

    /// A corrected forecast with its interval.
    pub fn apply(&self, foreseen: f64) -> Range {
        let likely = foreseen * self.factor;
        Range { low: likely * (-self.spread).exp(), likely, high: likely * self.spread.exp() }
    }
}

/// How good forecasts were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Of how many.
    pub count: usize,
    /// Median of how far outcomes were from what was likely, as a share of that.
    pub median_error: f64,
    /// Share of outcomes within their interval.
    pub coverage: f64,
    /// Median width of the intervals, as a share of what was likely.
    pub median_width: f64,
}

impl Score {
    /// Scores forecasts by what came.
    pub fn of(pairs: &[(Range, f64)]) -> Self {
        let shares = |of: &dyn Fn(&(Range, f64)) -> f64| {
            let mut shares: Vec<f64> = pairs.iter().map(of).filter(|share| share.is_finite()).collect();
            quantile(&mut shares, 0.5)
        };
        let within = pairs.iter().filter(|(range, came)| (range.low..=range.high).contains(came)).count();
        Self {
            count: pairs.len(),
            median_error: shares(&|(range, came)| (came / range.likely - 1.0).abs()),
            coverage: within as f64 / pairs.len().max(1) as f64,
            median_width: shares(&|(range, _)| (range.high - range.low) / range.likely),
        }
    }
}

/// The smallest value that at least this share of all values doesn't exceed, or between the middle two for the median;
/// 0 of none.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    values.sort_by(f64::total_cmp);
    if share == 0.5 {
        return f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
    }
    let index = (values.len() as f64 * share).ceil() as usize;
    values[index.clamp(1, values.len()) - 1]
}
