//! Which token is emitted: the sampling distribution, its randomness, and the rule that judges drafts. The one definition
//! that every device is held to, decision for decision; knows no device and no model.
//!
//! One f32 subtraction, one f32 multiplication and one rounding per logit turn a row into integer weights; all that
//! follows is integer, so no reduction order can change a decision. The noise of a token is a function of
//! (seed, stream, position, id) alone: never of the round, of a node, of a batch slot, or of what was drafted.

use crate::spec::verify::Distribution;
use crate::{Error, Result};
use std::sync::LazyLock;

/// How one request samples. `temperature` 0 is greedy and ignores the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    pub temperature: f32,
    /// Keep the k best, 0 = all. Equal logits at the boundary: lowest ids stay, so that exactly k do.
    pub top_k: usize,
    /// Smallest prefix of that mass, 1 = all. Counted among what `top_k` kept, in its order.
    pub top_p: f64,
    /// Keep weights of at least this share of the best one's, 0 = all.
    pub min_p: f64,
    /// Philox key.
    pub seed: u64,
    /// Request stream id: which prompt of a run this is, never a batch slot.
    pub stream: u32,
}

impl SamplingParams {
    /// Refuses NaN, negative and out-of-range values, naming the flag. `Error::Usage`.
    pub fn check(&self) -> Result<()> {
        let (t, p, m) = (self.temperature, self.top_p, self.min_p);
        if t != 0.0 && !(1e-4..=1e4).contains(&t) {
            return Err(Error::Usage(format!(
                "--temperature is {t}, expected 0 (greedy) or 0.0001 to 10000"
            )));
        }
        if !(p > 0.0 && p <= 1.0) {
            return Err(Error::Usage(format!("--top-p is {p}, expected more than 0 and at most 1")));
        }
        if !(0.0..1.0).contains(&m) {
            return Err(Error::Usage(format!("--min-p is {m}, expected at least 0 and less than 1")));
        }
        Ok(())
    }

    /// The token for absolute position `position`, given the target's f32 logits `[vocab]` for it. A fixed function
    /// of logits, settings, seed, stream and position: plain and speculative decoding call it alike.
    /// `None` as in [`argmax`].
    ///
    /// An exponential race: with `L(u)` an exponential variate, the least `L(u_x) / W(x)` is token x's with
    /// probability `W(x) / sum W`. Ratios are compared by cross-multiplication (both products are below 2^64) and
    /// ties go to the lower id: a total order, so partial winners may meet in any order.
    pub fn choose(&self, logits: &[f32], position: u32) -> Option<u32> {
        let tables = &*TABLES;
        let key = [self.seed as u32, (self.seed >> 32) as u32];
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

    /// The distribution that `choose` samples: every token of positive weight that the filters leave, as `(id, W)`, ids
    /// ascending. Its probability is `W / sum W`. The best token has `W = 2^32`, and the sum is below 2^58 for
    /// vocabularies up to 2^26, the most that race counters can tell apart. At temperature 0 only the best token is
    /// left. `None` as in [`argmax`].
    ///
    /// Order: temperature, top-k by (logit descending, id ascending), top-p on what is left in that order, min-p.
    /// The bounds are integers: `top_p` and `min_p` are rounded to multiples of 2^-32 first.
    pub fn survivors(&self, logits: &[f32]) -> Option<Vec<(u32, u64)>> {
        let best = argmax(logits)?;
        if self.temperature == 0.0 {
            return Some(vec![(best, ONE)]);
        }
        let tables = &*TABLES;
        let max = logits[best as usize];
        let c = scale(self.temperature);
        // Sorting these ranks sorts by (logit descending, id ascending).
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
            let need = (total as u128 * share(self.top_p) as u128).div_ceil(ONE as u128) as u64;
            let mut mass = 0;
            let n = kept.iter().position(|&(_, w)| {
                mass += w;
                mass >= need
            });
            kept.truncate(n.map_or(kept.len(), |n| n + 1));
        }
        // The best token passes every filter and weighs 2^32: its share and its weight are the same number.
        let least = share(self.min_p);
        kept.retain(|&(_, w)| w >= least);
        let mut kept: Vec<(u32, u64)> = kept.into_iter().map(|(rank, w)| (rank as u32, w)).collect();
        if cut_k || cut_p {
            kept.sort_unstable_by_key(|&(id, _)| id);
        }
        Some(kept)
    }
}

impl SamplingParams {
    /// The distribution of [`SamplingParams::survivors`] in units of 2^-48, for the rules of [`crate::spec::verify`]; the best token takes
    /// what rounding leaves over. Survivors that it rounds to nothing are gone. `None` as in [`argmax`].
    pub fn probabilities(&self, logits: &[f32]) -> Option<Distribution> {
        Distribution::new(self.survivors(logits)?, argmax(logits)?)
    }
}

/// The settings as kernels take them (cuda/common/state.cuh), all that is not the request's seed and stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerSettings {
    /// `65536 log2(e) / temperature`, 0 for greedy.
    pub c: f32,
    /// Tokens kept, 0 = all.
    pub top_k: u32,
    /// Share of the mass kept in units of 2^-32, 0 = all.
    pub top_p: u32,
    /// Least share of the best weight in units of 2^-32.
    pub min_p: u32,
}

impl SamplingParams {
    /// The same distribution in 32 bits a setting. Nothing is lost: a vocabulary has at most 2^26 tokens; the best token alone
    /// has more than the share 2^-32 of any mass, so that it stands for shares rounded to 0; all of the mass is every
    /// token that weighs anything; and no weight is 2^32 - 1.
    pub fn distribution(&self) -> SamplerSettings {
        if self.temperature == 0.0 {
            return SamplerSettings { c: 0.0, top_k: 0, top_p: 0, min_p: 0 };
        }
        let top_p = match share(self.top_p) {
            ONE.. => 0,
            share => (share as u32).max(1),
        };
        SamplerSettings {
            c: scale(self.temperature),
            top_k: u32::try_from(self.top_k).unwrap_or(u32::MAX),
            top_p,
            min_p: u32::try_from(share(self.min_p)).unwrap_or(u32::MAX),
        }
    }
}

/// What a logit's distance from the best is multiplied with: 65536 log2(e) / T in f32.
fn scale(temperature: f32) -> f32 {
    (65536.0 * std::f64::consts::LOG2_E) as f32 / temperature
}

/// 1 as an integer share, and the weight of a row's best token.
const ONE: u64 = 1 << 32;

/// A logit's bits as an integer of the same order, `-0.0` taken for `0.0`; NaN has no order.
fn ascending(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | (1 << 31) }
}

/// A share of one in units of 2^-32, to nearest.
fn share(x: f64) -> u64 {
    (x * ONE as f64).round() as u64
}

/// Index of the largest value, lowest index on ties; `-0.0` equals `0.0`. `None` if the row has no such value that
/// is finite: it holds a NaN or `+inf`, or nothing but `-inf` (masked tokens), or nothing at all.
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

/// Judges a chain of drafted tokens by the rule `match`: sample the target at every row, accept while equal. Row `j`
/// is the target's after the drafts before `j`; `target_at(j)` samples it, and is asked only once all of those are
/// accepted. Returns how many drafts are accepted and the token that follows them, a correction or, if all of them
/// stand, a bonus; `None` as soon as `target_at` says so. Greedy verification is this rule at temperature 0.
///
/// Lossless: by induction a row is sampled only where the drafts before it are what autoregressive decoding emits, and what is
/// emitted there is the target's own sample, with the noise of its position and of nothing else. So the output is
/// autoregressive decoding's, token for token and for every drafter and block length; for a draft that is fixed before the
/// noise is seen, no lossless rule accepts more often. Sources: the DFlash reference implementation (arXiv
/// 2602.06036), and coupled sampling in Daliri et al., arXiv 2408.07978.
pub fn judge(draft: &[u32], mut target_at: impl FnMut(usize) -> Option<u32>) -> Option<(usize, u32)> {
    for (row, &token) in draft.iter().enumerate() {
        let own = target_at(row)?;
        if own != token {
            return Some((row, own));
        }
    }
    Some((draft.len(), target_at(draft.len())?))
}

/// Judges a tree of drafts by the same rule. `tokens` `[rows]`: the anchor, then the drafts; `parents` `[rows]`: the row
/// that a draft follows, itself an earlier one (row 0's is not looked at; a draft that follows no earlier row is
/// unreachable). `target_at(row)` samples the target's row after the drafts on the way there. From row 0 on the walk
/// goes to the child that is what the target chose, the lowest where several are. Returns the rows of the walk, 0
/// first, and the token that follows them; `None` as soon as `target_at` says so. A chain is the tree in which each
/// row follows the one before.
pub fn walk(
    tokens: &[u32],
    parents: &[u32],
    mut target_at: impl FnMut(usize) -> Option<u32>,
) -> Option<(Vec<usize>, u32)> {
    let mut path = vec![0];
    let mut row = 0;
    loop {
        let own = target_at(row)?;
        let children = (row + 1..tokens.len()).filter(|&child| parents[child] as usize == row);
        match children.into_iter().find(|&child| tokens[child] == own) {
            Some(child) => row = child,
            None => return Some((path, own)),
        }
        path.push(row);
    }
}

/// Purpose in the top byte of a counter's second word: the exponential race of [`SamplingParams::choose`], token group
/// (id / 4) below it.
const RACE: u32 = 5;

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A 64-bit seed is the key
/// `[low half, high half]`; counters are `[position, purpose << 24 | index, stream, round]`, the round 0 wherever
/// output must not depend on it.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let (a, b) = (0xD2511F53 * u64::from(c0), 0xCD9E8D57 * u64::from(c2));
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        (k0, k1) = (k0.wrapping_add(0x9E3779B9), k1.wrapping_add(0xBB67AE85));
    }
    [c0, c1, c2, c3]
}

/// All that is not integer arithmetic, tabulated. Every device uses these bits.
pub struct Tables {
    /// `round(2^(31 - i/256))`, `[256]`
    pub thi: [u32; 256],
    /// `round(2^(31 - i/65536))`, `[256]`
    pub tlo: [u32; 256],
    /// `round((1 - log2(1 + i/4096)) * 2^27)`, `[4097]`: 2^27 down to 0
    pub rlog: [u32; 4097],
}

/// Computed once, in f64. A platform's `exp2` and `log2` may differ in their last bits (2^-22 and 2^-26 of a table's
/// unit), but no value lies within 2^-10 and 2^-17 of a rounding boundary, so all platforms round alike. A test holds
/// the margins and the checksums.
pub static TABLES: LazyLock<Tables> = LazyLock::new(|| Tables {
    thi: std::array::from_fn(|i| (31.0 - i as f64 / 256.0).exp2().round() as u32),
    tlo: std::array::from_fn(|i| (31.0 - i as f64 / 65536.0).exp2().round() as u32),
    rlog: std::array::from_fn(|i| ((1.0 - (1.0 + i as f64 / 4096.0).log2()) * 134217728.0).round() as u32),
});

impl Tables {
    /// `W = 2^32 * exp((logit - max)/T)` to about 1e-5 of itself, cut down to an integer; 2^32 for the best token and
    /// 0 from 22.2 T below it on. `c = 65536 * log2(e) / T` in f32. The exponent is rounded to 2^-16 and split into
    /// whole, upper and lower bits; monotone in `logit`.
    pub fn weight(&self, max: f32, logit: f32, c: f32) -> u64 {
        // The bound also catches infinity: a weight is 0 above 32 << 16.
        let t = ((max - logit) * c).round_ties_even().min((40 << 16) as f32) as u32;
        let (whole, hi, lo) = (t >> 16, (t >> 8) as usize & 255, t as usize & 255);
        (u64::from(self.thi[hi]) * u64::from(self.tlo[lo])) >> 30 >> whole
    }

    /// `L = -log2(u / 2^32) * 2^27`, an exponential variate where `u` is uniform: 1 to 31 * 2^27, so that products with
    /// a weight fit 64 bits; 0 and 1 are read as 2. Linear between the table's points. The winner of a row usually has
    /// a small time, so small times decide the distribution: here they keep the word's own resolution, and a token that a
    /// row's best outweigh 10^6 times is drawn in proportion to 0.5 %, at 10^7 to 5 %.
    pub fn time(&self, u: u32) -> u64 {
        let u = u.max(2);
        let zeros = u.leading_zeros();
        let mantissa = (u << zeros) & 0x7fff_ffff;
        let (i, between) = ((mantissa >> 19) as usize, u64::from(mantissa & 0x7_ffff));
        let (from, to) = (u64::from(self.rlog[i]), u64::from(self.rlog[i + 1]));
        (u64::from(zeros) << 27) + from - (((from - to) * between) >> 19)
    }
}
