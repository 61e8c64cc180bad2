//! What samples say: quantiles, and how much better one set is than another, beyond chance. Knows no clock and no device.

/// Draws of a bootstrap. With 4000 the ends of an interval stray by 2 % of its width from seed to seed (numpy, 100 seeds).
const DRAWS: usize = 4000;
/// How sure an interval is: a comparison has many rows, and few of them may cry wolf.
const LEVEL: f64 = 0.99;
/// Fewer samples, or rounds of samples, than this decide nothing: an interval is never wider than their range.
pub const FEWEST: usize = 5;

/// Samples in short, in their own unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub mean: f64,
    pub median: f64,
    pub p10: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Summary {
    /// None without samples.
    pub fn of(samples: &[f64]) -> Option<Summary> {
        let sorted = sorted(samples);
        let at = |q| between(&sorted, q);
        (!samples.is_empty()).then(|| Summary {
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
            median: at(0.5),
            p10: at(0.1),
            p90: at(0.9),
            p99: at(0.99),
        })
    }
}

/// The value below which the share `q` (0 to 1) of the samples lies, linear between neighbours: numpy's default. None
/// without samples.
pub fn quantile(samples: &[f64], q: f64) -> Option<f64> {
    (!samples.is_empty()).then(|| between(&sorted(samples), q))
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Of samples in ascending order, at least one.
fn between(sorted: &[f64], q: f64) -> f64 {
    let place = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let low = place.floor() as usize;
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

/// A ratio and the interval that holds the true one with a probability of 99 %.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub ratio: f64,
    pub low: f64,
    pub high: f64,
}

/// Whether what is `before` and `after` was measured round by round together, so that both had the same weather.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounds {
    Together,
    Apart,
}

/// The median of `after` over the median of `before`, with the percentile bootstrap's interval. Both are rounds of
/// samples, `chunks(1)` where no round groups them: rounds are drawn, with all their samples, because samples of one
/// round share its clocks and its neighbours. Of rounds together the same ones are drawn on both sides. The draws are
/// always the same (splitmix64 from 0).
///
/// None where a side has no samples, a sample is not above 0, or rounds together are not equally many.
pub fn ratio(before: &[&[f64]], after: &[&[f64]], rounds: Rounds) -> Option<Interval> {
    let usable = |side: &[&[f64]]| {
        let mut samples = side.iter().copied().flatten().peekable();
        samples.peek().is_some() && samples.all(|x| x.is_finite() && *x > 0.0)
    };
    let matched = rounds == Rounds::Apart || before.len() == after.len();
    // A round without samples would leave draws of nothing.
    let whole = before.iter().chain(after).all(|round| !round.is_empty());
    if !(usable(before) && usable(after) && matched && whole) {
        return None;
    }
    let ratio = median_of(after, 0..after.len()) / median_of(before, 0..before.len());
    Some(bootstrap(ratio, |picks| {
        let first = picks(before.len());
        let second = if rounds == Rounds::Together { first.clone() } else { picks(after.len()) };
        median_of(after, second) / median_of(before, first)
    }))
}

/// How much was done in how long: tokens and seconds, say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    pub amount: f64,
    pub time: f64,
}

/// The rate of `after` over the rate of `before`, each of them all amounts over all times, with the percentile
/// bootstrap's interval. Both did the same tasks, of which the same ones are drawn on both sides; the draws are those of [`ratio`].
///
/// None without tasks, where an amount or a time is not above 0, or where tasks are not equally many.
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

/// The interval around `ratio` from what it is for draws: `draw` gets who picks so many places among as many.
fn bootstrap(ratio: f64, mut draw: impl FnMut(&mut dyn FnMut(usize) -> Vec<usize>) -> f64) -> Interval {
    let mut state = 0;
    let mut picks = |count: usize| -> Vec<usize> { (0..count).map(|_| below(&mut state, count)).collect() };
    let mut ratios: Vec<f64> = (0..DRAWS).map(|_| draw(&mut picks)).collect();
    ratios.sort_by(f64::total_cmp);
    let tail = (1.0 - LEVEL) / 2.0;
    Interval { ratio, low: between(&ratios, tail), high: between(&ratios, 1.0 - tail) }
}

fn median_of(rounds: &[&[f64]], picks: impl IntoIterator<Item = usize>) -> f64 {
    let mut samples: Vec<f64> = picks.into_iter().flat_map(|i| rounds[i]).copied().collect();
    samples.sort_by(f64::total_cmp);
    between(&samples, 0.5)
}

/// splitmix64, brought below `count`.
fn below(state: &mut u64, count: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((u128::from(x ^ x >> 31) * count as u128) >> 64) as usize
}

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Faster,
    Slower,
    Same,
    Unclear,
}

impl Verdict {
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
    /// Of a ratio of speeds, more being better. Faster or slower: the ratio is more than `threshold` (0.01 for 1 %) away
    /// from 1, and the interval lies on that side of 1. Same: all of the interval is within the threshold. Else unclear.
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

    /// The ratio the other way round.
    pub fn inverse(&self) -> Interval {
        Interval { ratio: 1.0 / self.ratio, low: 1.0 / self.high, high: 1.0 / self.low }
    }
}
