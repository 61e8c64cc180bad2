//! Which token the target chooses: logits become integer weights, filters remove some of them, and an
//! exponential race picks one. This is the one definition that every device reproduces, decision for
//! decision.
//!
//! One f32 subtraction, one f32 multiplication and one rounding per logit turn a row into integer weights.
//! Everything after that is integer, so no reduction order can change a decision. The noise of a token is a
//! function of (seed, stream, position, id) alone: never of the round, the row, the batch slot, or the
//! drafts. That is what makes exact verification lossless ([`crate::spec::verify::match_chain`]).

use crate::spec::distribution::Distribution;
use crate::spec::rng::{RACE, TABLES, key, philox};
use crate::{Error, Result};

/// How one request samples. The default is greedy: temperature 0, which ignores the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; else 0.0001 to 10000.
    pub temperature: f32,
    /// Keep the `k` best tokens; 0 keeps all. Of equal logits at the boundary the lowest ids stay, so that
    /// exactly `k` do.
    pub top_k: usize,
    /// Keep the smallest set of best tokens with this probability, above 0 and up to 1; 1 keeps all. Counted
    /// among the tokens that `top_k` kept, best first.
    pub top_p: f64,
    /// Keep tokens whose probability is at least this fraction of the best token's; from 0, which keeps all,
    /// to below 1.
    pub min_p: f64,
    /// The Philox key.
    pub seed: u64,
    /// Keeps requests of one seed apart: the index of a prompt within a run, never a batch slot.
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
    /// Refuses NaN, negative and out-of-range values.
    ///
    /// # Errors
    /// [`Error::Usage`]; the sentence begins with the name of the field.
    pub fn check(&self) -> Result<()> {
        let (t, p, m) = (self.temperature, self.top_p, self.min_p);
        if t != 0.0 && !(1e-4..=1e4).contains(&t) {
            return Err(Error::Usage(format!("temperature is {t}, expected 0 (greedy) or 0.0001 to 10000")));
        }
        if !(p > 0.0 && p <= 1.0) {
            return Err(Error::Usage(format!("top_p is {p}, expected more than 0 and at most 1")));
        }
        if !(0.0..1.0).contains(&m) {
            return Err(Error::Usage(format!("min_p is {m}, expected at least 0 and less than 1")));
        }
        Ok(())
    }

    /// Samples the token at absolute position `position` from the target's f32 logits `[vocab]` for it. A
    /// fixed function of logits, parameters and position; autoregressive and speculative decoding call it
    /// alike. `None` as in [`argmax`].
    ///
    /// It is an exponential race: with `L(u)` an exponential variate, the smallest `L(u_x) / W(x)` is token
    /// x's with probability `W(x) / sum W`. Ratios are compared by cross-multiplication (both products are
    /// below 2^64) and ties go to the lower id: a total order, so a device may reduce partial winners in any
    /// order.
    pub fn choose(&self, logits: &[f32], position: u32) -> Option<u32> {
        let (tables, key) = (&*TABLES, key(self.seed));
        let (mut group, mut words) = (u32::MAX, [0; 4]); // the four ids whose noise `words` is
        let mut best: Option<(u32, u64, u64)> = None; // id, L, W
        for (id, weight) in self.survivors(logits)? {
            if id / 4 != group {
                group = id / 4;
                words = philox([position, (RACE << 24) | group, self.stream, 0], key);
            }
            let time = tables.time(words[id as usize % 4]);
            // Ids ascend, so strictly less leaves a tie with the lower one.
            if best.is_none_or(|(_, t, w)| time * w < t * weight) {
                best = Some((id, time, weight));
            }
        }
        best.map(|(id, _, _)| id)
    }

    /// The weights that `choose` samples from: `(id, W)` of every token that passes the filters and has `W >
    /// 0`, in ascending order of id. A token's probability is `W / sum W`. `None` as in [`argmax`].
    ///
    /// The best token has `W = 2^32`, and the sum is below 2^58 for vocabularies up to 2^26, the maximum that
    /// the race's counters can tell apart. At temperature 0 only the best token is left.
    ///
    /// Order of the filters: temperature, top-k by (logit descending, id ascending), top-p on what is left in
    /// that order, min-p. Their bounds are integers: `top_p` and `min_p` are first rounded to multiples of
    /// 2^-32.
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
        // The best token weighs 2^32, so a fraction of its weight is the fraction in units of 2^-32.
        let least = fixed_point(self.min_p);
        kept.retain(|&(_, w)| w >= least);
        let mut kept: Vec<(u32, u64)> = kept.into_iter().map(|(rank, w)| (rank as u32, w)).collect();
        if cut_k || cut_p {
            kept.sort_unstable_by_key(|&(id, _)| id);
        }
        Some(kept)
    }

    /// The distribution of [`SamplingParams::survivors`] in units of 2^-48, for the methods of
    /// [`crate::spec::verify`]. The best token gets what rounding leaves over; survivors whose probability
    /// rounds to 0 are dropped. `None` as in [`argmax`].
    pub fn probabilities(&self, logits: &[f32]) -> Option<Distribution> {
        Distribution::new(self.survivors(logits)?, argmax(logits)?)
    }

    /// The parameters in 32 bits each, for kernels; seed and stream apart.
    ///
    /// Nothing is lost. A vocabulary has at most 2^26 tokens, so `top_k` fits. The best token alone has more
    /// than 2^-32 of any mass, so a `top_p` that rounds to 0 keeps it and no other. A `top_p` of 1 keeps
    /// every token. No weight is 2^32 - 1, so `min_p` fits.
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
    /// Tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Probability kept in units of 2^-32; 0 keeps all.
    pub top_p: u32,
    /// Smallest fraction of the best token's weight that is kept, in units of 2^-32.
    pub min_p: u32,
}

/// Factor of a logit's distance from the best: 65536 log2(e) / T in f32.
fn scale(temperature: f32) -> f32 {
    (65536.0 * std::f64::consts::LOG2_E) as f32 / temperature
}

/// 1 in units of 2^-32, and the weight of a row's best token.
const ONE: u64 = 1 << 32;

/// A logit's bits as an integer of the same order, with `-0.0` taken for `0.0`. NaN has no order.
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
/// `None` if the largest value is not finite: the row holds a NaN or `+inf`, or only `-inf` (masked tokens),
/// or it is empty.
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
