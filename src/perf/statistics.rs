//! Statistics of measurements: quantiles, and confidence intervals for the ratio of two sets of samples.

/// Resamples of a bootstrap. With 4000, the ends of an interval vary by 2 % of its width from seed to seed
/// (numpy, 100 seeds).
const RESAMPLES: usize = 4000;
/// Confidence level of an interval. It is high, because a comparison has many rows and should raise few false
/// alarms.
const LEVEL: f64 = 0.99;
/// Minimum number of samples, or groups of samples, for an interval. A bootstrap interval is never wider than
/// the range of its samples, so with fewer it would be too narrow.
pub const MIN_SAMPLES: usize = 5;

/// A summary of samples, in their own unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Arithmetic mean.
    pub mean: f64,
    /// 50 % quantile.
    pub median: f64,
    /// 10 % quantile.
    pub p10: f64,
    /// 90 % quantile.
    pub p90: f64,
    /// 99 % quantile.
    pub p99: f64,
}

impl Summary {
    /// The summary; `None` without samples.
    pub fn of(samples: &[f64]) -> Option<Summary> {
        let sorted = sorted(samples);
        let at = |q| quantile_of_sorted(&sorted, q);
        (!samples.is_empty()).then(|| Summary {
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
            median: at(0.5),
            p10: at(0.1),
            p90: at(0.9),
            p99: at(0.99),
        })
    }
}

/// The `q` quantile (0 to 1) of the samples, linear between neighbours as in numpy's default. `None` without
/// samples.
pub fn quantile(samples: &[f64], q: f64) -> Option<f64> {
    (!samples.is_empty()).then(|| quantile_of_sorted(&sorted(samples), q))
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The `q` quantile of at least one sample in ascending order.
fn quantile_of_sorted(sorted: &[f64], q: f64) -> f64 {
    let place = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let low = place.floor() as usize;
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

/// A ratio and its 99 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The estimate.
    pub ratio: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Whether the groups of `before` and `after` were measured in pairs, one right after the other, so that both
/// had the same clocks and the same load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Group `i` of both sides was measured together.
    Paired,
    /// The sides were measured independently.
    Unpaired,
}

/// The median of `after` over the median of `before`, with a percentile bootstrap interval. Both are
/// groups of samples (`chunks(1)` for single samples). Whole groups are resampled, because samples of one
/// group share clocks and load. Paired groups are resampled together. The random numbers are always the same
/// (splitmix64 from 0).
///
/// `None` if a side has no samples, a group is empty, a sample is not above 0, or paired sides have different
/// numbers of groups.
pub fn ratio(before: &[&[f64]], after: &[&[f64]], pairing: Pairing) -> Option<Interval> {
    let usable = |side: &[&[f64]]| {
        let mut samples = side.iter().copied().flatten().peekable();
        samples.peek().is_some() && samples.all(|x| x.is_finite() && *x > 0.0)
    };
    let matched = pairing == Pairing::Unpaired || before.len() == after.len();
    // A resample of empty groups would have no median.
    let whole = before.iter().chain(after).all(|group| !group.is_empty());
    if !(usable(before) && usable(after) && matched && whole) {
        return None;
    }
    let ratio = median_of(after, 0..after.len()) / median_of(before, 0..before.len());
    Some(bootstrap(ratio, |picks| {
        let first = picks(before.len());
        let second = if pairing == Pairing::Paired { first.clone() } else { picks(after.len()) };
        median_of(after, second) / median_of(before, first)
    }))
}

/// An amount of work and the time it took, such as tokens and seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// How much was done.
    pub amount: f64,
    /// How long it took.
    pub time: f64,
}

/// The rate of `after` over the rate of `before`, each the sum of amounts over the sum of times, with a
/// percentile bootstrap interval. Both sides did the same tasks, which are resampled together. The random
/// numbers are those of [`ratio`].
///
/// `None` without tasks, if an amount or a time is not above 0, or if the sides have different numbers of
/// tasks.
pub fn rates(before: &[Work], after: &[Work]) -> Option<Interval> {
    let usable = |work: &Work| [work.amount, work.time].iter().all(|x| x.is_finite() && *x > 0.0);
    if before.is_empty() || before.len() != after.len() || !before.iter().chain(after).all(usable) {
        return None;
    }
    let rate = |tasks: &[Work], picks: &[usize]| {
        let sum = |of: fn(&Work) -> f64| picks.iter().map(|&i| of(&tasks[i])).sum::<f64>();
        sum(|work| work.amount) / sum(|work| work.time)
    };
    let speed_up = |picks: &[usize]| rate(after, picks) / rate(before, picks);
    let all: Vec<usize> = (0..before.len()).collect();
    Some(bootstrap(speed_up(&all), |picks| speed_up(&picks(before.len()))))
}

/// The interval around `ratio`. `resampled` returns the ratio of one resample; its argument picks `count`
/// indices below `count` with replacement.
fn bootstrap(ratio: f64, mut resampled: impl FnMut(&mut dyn FnMut(usize) -> Vec<usize>) -> f64) -> Interval {
    let mut state = 0;
    let mut picks = |count: usize| -> Vec<usize> { (0..count).map(|_| below(&mut state, count)).collect() };
    let mut ratios: Vec<f64> = (0..RESAMPLES).map(|_| resampled(&mut picks)).collect();
    ratios.sort_by(f64::total_cmp);
    let tail = (1.0 - LEVEL) / 2.0;
    Interval { ratio, low: quantile_of_sorted(&ratios, tail), high: quantile_of_sorted(&ratios, 1.0 - tail) }
}

/// The median of all samples of the picked groups.
fn median_of(groups: &[&[f64]], picks: impl IntoIterator<Item = usize>) -> f64 {
    let mut samples: Vec<f64> = picks.into_iter().flat_map(|i| groups[i]).copied().collect();
    samples.sort_by(f64::total_cmp);
    quantile_of_sorted(&samples, 0.5)
}

/// A random index below `count` (splitmix64).
fn below(state: &mut u64, count: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((u128::from(x ^ x >> 31) * count as u128) >> 64) as usize
}

/// The result of comparing one row of two benchmark records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Faster by more than the threshold.
    Faster,
    /// Slower by more than the threshold.
    Slower,
    /// The same, within the threshold.
    Same,
    /// The interval is too wide to tell.
    Unclear,
}

impl Verdict {
    /// The name in tables and records.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Faster => "FASTER",
            Verdict::Slower => "SLOWER",
            Verdict::Same => "SAME",
            Verdict::Unclear => "UNCLEAR",
        }
    }
}

impl Interval {
    /// The verdict on a ratio of speeds, where more is better. Faster or slower: the ratio is more than
    /// `threshold` (0.01 for 1 %) away from 1, and the whole interval lies on that side of 1. Same: the whole
    /// interval lies within the threshold. Otherwise unclear.
    pub fn verdict(&self, threshold: f64) -> Verdict {
        let Interval { ratio, low, high } = *self;
        if low > 1.0 && ratio > 1.0 + threshold {
            Verdict::Faster
        } else if high < 1.0 && ratio < 1.0 - threshold {
            Verdict::Slower
        } else if low >= 1.0 - threshold && high <= 1.0 + threshold {
            Verdict::Same
        } else {
            Verdict::Unclear
        }
    }

    /// The interval of the inverse ratio.
    pub fn inverse(&self) -> Interval {
        Interval { ratio: 1.0 / self.ratio, low: 1.0 / self.high, high: 1.0 / self.low }
    }
}
