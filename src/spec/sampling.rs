//! Sampling: logits become integer weights, filters remove some of them, and an exponential race picks a
//! token. Every device reproduces this definition, decision for decision.
//!
//! One f32 subtraction, one f32 multiplication and one rounding per logit convert a row to integer weights.
//! Everything after that is integer arithmetic, so no reduction order can change a decision. The noise of a
//! token depends only on (seed, stream, position, id), and not on the round, the row, the batch slot or the
//! drafts. This makes exact verification lossless ([`crate::spec::verify::match_chain`]).

use crate::spec::distribution::Distribution;
use crate::spec::rng::{RACE, TABLES, key, philox};
use crate::{Error, Result};

/// How one request samples. The default is greedy: temperature 0, which ignores the other fields.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 for greedy, else 0.0001 to 10000.
    pub temperature: f32,
    /// Keeps the `top_k` most probable tokens; 0 keeps all. Among equal logits at the boundary it keeps the
    /// lowest ids, so that exactly `top_k` tokens stay.
    pub top_k: usize,
    /// Keeps the smallest set of most probable tokens whose probabilities add up to this value or more; above
    /// 0 and at most 1, which keeps all. Probabilities are relative to the tokens that `top_k` kept.
    pub top_p: f64,
    /// Keeps tokens whose probability is at least this fraction of the most probable token's; from 0, which
    /// keeps all, to below 1.
    pub min_p: f64,
    /// The Philox key.
    pub seed: u64,
    /// Gives requests with the same seed different random numbers: the index of a prompt within a run, never
    /// a batch slot.
    pub stream: u32,
}

impl Default for SamplingParams {
    /// Greedy, seed 0.
    ///
    /// ```
    /// use dflash::SamplingParams;
    ///
    /// let sampling = SamplingParams { temperature: 0.7, top_k: 40, ..SamplingParams::default() };
    /// assert_eq!(sampling.check(), Ok(()));
    /// let wrong = SamplingParams { top_p: 1.5, ..sampling };
    /// assert!(wrong.check().unwrap_err().to_string().contains("is 1.5, expected more than 0 and at most 1"));
    /// ```
    fn default() -> SamplingParams {
        SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 }
    }
}

impl SamplingParams {
    /// Refuses NaN and values out of range.
    ///
    /// # Errors
    /// [`Error::Option`] with the name of the field.
    pub fn check(&self) -> Result<()> {
        let (t, p, m) = (self.temperature, self.top_p, self.min_p);
        if t != 0.0 && !(1e-4..=1e4).contains(&t) {
            return Err(Error::option(
                "temperature",
                format!("is {t}, expected 0 (greedy) or 0.0001 to 10000"),
            ));
        }
        if !(p > 0.0 && p <= 1.0) {
            return Err(Error::option("top_p", format!("is {p}, expected more than 0 and at most 1")));
        }
        if !(0.0..1.0).contains(&m) {
            return Err(Error::option("min_p", format!("is {m}, expected at least 0 and less than 1")));
        }
        Ok(())
    }

    /// Samples the token at absolute position `position` from the target's f32 logits `[vocab]` for it. The
    /// result depends only on logits, parameters and position. Autoregressive and speculative decoding both
    /// use it. `None` as in [`argmax`].
    ///
    /// It is an exponential race: token x has the time `L(u_x) / W(x)`, where `L` is an exponential variate
    /// ([`Tables::time`](crate::spec::rng::Tables::time)). The smallest time wins, and it is x's with
    /// probability `W(x) / sum W`. Times are compared by cross-multiplication (both products are below 2^64),
    /// and ties go to the lower id. This is a total order, so a device may reduce partial winners in any
    /// order.
    pub fn choose(&self, logits: &[f32], position: u32) -> Option<u32> {
        let (tables, key) = (&*TABLES, key(self.seed));
        let (mut group, mut words) = (u32::MAX, [0; 4]); // a group of four ids, and their random words
        let mut best: Option<(u32, u64, u64)> = None; // id, L, W
        for (id, weight) in self.survivors(logits)? {
            if id / 4 != group {
                group = id / 4;
                words = philox([position, (RACE << 24) | group, self.stream, 0], key);
            }
            let time = tables.time(words[id as usize % 4]);
            // Ids ascend, so with a strict comparison the lower id wins a tie.
            if best.is_none_or(|(_, t, w)| time * w < t * weight) {
                best = Some((id, time, weight));
            }
        }
        best.map(|(id, _, _)| id)
    }

    /// The weights that `choose` samples from: `(id, W)` of every token that passes the filters and has `W >
    /// 0`, in ascending order of id. A token's probability is `W / sum W`. `None` as in [`argmax`].
    ///
    /// The best token has `W = 2^32`. The sum is at most 2^58 for vocabularies up to 2^26, the largest for
    /// which the race's counters are distinct. At temperature 0 only the best token is left.
    ///
    /// The filters are applied in this order: temperature, top-k by (logit descending, id ascending), top-p
    /// on the remaining tokens in that order, min-p. The filters compare integers: `top_p` and `min_p` are
    /// first rounded to multiples of 2^-32.
    pub fn survivors(&self, logits: &[f32]) -> Option<Vec<(u32, u64)>> {
        let best = argmax(logits)?;
        if self.temperature == 0.0 {
            return Some(vec![(best, ONE)]);
        }
        let tables = &*TABLES;
        let max = logits[best as usize];
        let c = scale(self.temperature);
        // Sorting by rank sorts by (logit descending, id ascending).
        let mut kept = Vec::new();
        for (id, &logit) in (0u32..).zip(logits) {
            match tables.weight(max, logit, c) {
                0 => {}
                weight => kept.push(((u64::from(!ascending(logit)) << 32) | u64::from(id), weight)),
            }
        }
        let cut_k = 0 < self.top_k && self.top_k < kept.len();
        if cut_k {
            kept.select_nth_unstable(self.top_k - 1);
            kept.truncate(self.top_k);
        }
        let cut_p = self.top_p < 1.0;
        if cut_p {
            kept.sort_unstable_by_key(|&(rank, _)| rank);
            let total: u64 = kept.iter().map(|&(_, w)| w).sum();
            let need = (total as u128 * fixed_point(self.top_p) as u128).div_ceil(ONE as u128) as u64;
            let mut mass = 0;
            let n = kept.iter().position(|&(_, w)| {
                mass += w;
                mass >= need
            });
            kept.truncate(n.map_or(kept.len(), |n| n + 1));
        }
        // The best token has weight 2^32, so a fraction of its weight is the fraction in units of 2^-32.
        let least = fixed_point(self.min_p);
        kept.retain(|&(_, w)| w >= least);
        let mut kept: Vec<(u32, u64)> = kept.into_iter().map(|(rank, w)| (rank as u32, w)).collect();
        if cut_k || cut_p {
            kept.sort_unstable_by_key(|&(id, _)| id);
        }
        Some(kept)
    }

    /// The distribution of [`SamplingParams::survivors`] in units of 2^-48, for the methods of
    /// [`crate::spec::verify`]. The best token is the rounding token; survivors whose probability rounds to 0
    /// are dropped. `None` as in [`argmax`].
    pub fn probabilities(&self, logits: &[f32]) -> Option<Distribution> {
        Distribution::new(self.survivors(logits)?, argmax(logits)?)
    }

    /// The parameters in 32 bits each, for kernels, without seed and stream.
    ///
    /// The conversion does not change which tokens are kept. A vocabulary has at most 2^26 tokens, so `top_k`
    /// fits. The best token alone has more than 2^-32 of the total weight, so a `top_p` that rounds to 0
    /// keeps this token and no other, as 1 unit does. A `top_p` of 1 keeps every token, as 0 does here. No
    /// weight is 2^32 - 1, so `min_p` fits.
    pub fn settings(&self) -> SamplerSettings {
        if self.temperature == 0.0 {
            return SamplerSettings { c: 0.0, top_k: 0, top_p: 0, min_p: 0 };
        }
        let top_p = match fixed_point(self.top_p) {
            ONE.. => 0,
            top_p => (top_p as u32).max(1),
        };
        SamplerSettings {
            c: scale(self.temperature),
            top_k: u32::try_from(self.top_k).unwrap_or(u32::MAX),
            top_p,
            min_p: u32::try_from(fixed_point(self.min_p)).unwrap_or(u32::MAX),
        }
    }
}

/// [`SamplingParams`] as kernels take them (`cuda/common/state.cuh`), without the request's seed and stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerSettings {
    /// `65536 log2(e) / temperature`; 0 for greedy.
    pub c: f32,
    /// Number of tokens to keep; 0 keeps all.
    pub top_k: u32,
    /// Probability to keep, in units of 2^-32; 0 keeps all.
    pub top_p: u32,
    /// Smallest fraction of the best token's weight to keep, in units of 2^-32.
    pub min_p: u32,
}

/// The factor on a logit's distance from the best logit: 65536 log2(e) / T in f32.
fn scale(temperature: f32) -> f32 {
    (65536.0 * std::f64::consts::LOG2_E) as f32 / temperature
}

/// 1 in units of 2^-32, and the weight of a row's best token.
const ONE: u64 = 1 << 32;

/// A logit's bits as an integer with the same order. `-0.0` counts as `0.0`. NaN has no order.
fn ascending(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | (1 << 31) }
}

/// A fraction in units of 2^-32, rounded to nearest.
fn fixed_point(x: f64) -> u64 {
    (x * ONE as f64).round() as u64
}

/// Index of the largest value, the lowest index on ties; `-0.0` equals `0.0`.
///
/// `None` if the row is empty, holds a NaN or `+inf`, or holds only `-inf` (masked tokens).
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let (mut best, mut max) = (None, f32::NEG_INFINITY);
    for (id, &logit) in (0u32..).zip(logits) {
        if logit > max {
            (best, max) = (Some(id), logit);
        } else if logit.is_nan() {
            return None;
        }
    }
    best.filter(|_| max < f32::INFINITY)
}
