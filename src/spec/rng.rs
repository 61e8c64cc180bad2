//! Randomness that every device reproduces bit for bit: Philox as the generator, integer tables in place of
//! `exp` and `log`, and keyed random draws for the verification methods that sample.
//!
//! A random number is a pure function of (seed, stream, position, round, purpose, row). The generator has no
//! state, so the order in which threads draw does not matter.

use std::sync::LazyLock;

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random words
/// from a counter and a key.
///
/// The key is the 64-bit seed as `[low half, high half]`. The counter is `[position, purpose << 24 | index,
/// stream, round]`. The round is 0 if the result must not depend on the number of earlier rounds.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let (a, b) = (0xD2511F53 * u64::from(c0), 0xCD9E8D57 * u64::from(c2));
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        (k0, k1) = (k0.wrapping_add(0x9E3779B9), k1.wrapping_add(0xBB67AE85));
    }
    [c0, c1, c2, c3]
}

/// The key of [`philox`] for a seed.
pub(crate) fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Purpose of the exponential race in [`crate::spec::sampling::SamplingParams::choose`]: the top byte of a
/// counter's second word. The lower 24 bits are the group of four ids, `id / 4`. [`Purpose`] has the other
/// purposes.
pub(crate) const RACE: u32 = 5;

// ---- tables ----

/// Tables of the transcendental functions that sampling needs. Every device uses exactly these bits.
pub struct Tables {
    /// `round(2^(31 - i/256))`, `[256]`
    pub thi: [u32; 256],
    /// `round(2^(31 - i/65536))`, `[256]`
    pub tlo: [u32; 256],
    /// `round((1 - log2(1 + i/4096)) * 2^27)`, `[4097]`: 2^27 down to 0
    pub rlog: [u32; 4097],
}

/// The tables, computed once in f64.
///
/// `exp2` and `log2` of two platforms may differ in their last bits, by 2^-22 (`thi`, `tlo`) or 2^-26
/// (`rlog`) of a table's unit. No value is within 2^-10 or 2^-17, respectively, of a rounding boundary, so
/// all platforms round to the same integers. A test checks the margins and the checksums.
pub static TABLES: LazyLock<Tables> = LazyLock::new(|| Tables {
    thi: std::array::from_fn(|i| (31.0 - i as f64 / 256.0).exp2().round() as u32),
    tlo: std::array::from_fn(|i| (31.0 - i as f64 / 65536.0).exp2().round() as u32),
    rlog: std::array::from_fn(|i| ((1.0 - (1.0 + i as f64 / 4096.0).log2()) * 134217728.0).round() as u32),
});

impl Tables {
    /// The weight of a token: `W = 2^32 * exp((logit - max)/T)` with a relative error of about 1e-5,
    /// truncated to an integer.
    ///
    /// `max` is the row's largest logit, and `c = 65536 * log2(e) / T` in f32. The best token has weight
    /// 2^32; the weight is 0 if the logit is 22.2 T or more below the best. The exponent is rounded to a
    /// multiple of 2^-16 and split into its integer part and two fields of 8 bits. The weight is monotone in
    /// `logit`.
    pub fn weight(&self, max: f32, logit: f32, c: f32) -> u64 {
        // The bound also covers infinity: any `t` above 32 << 16 gives weight 0.
        let t = ((max - logit) * c).round_ties_even().min((40 << 16) as f32) as u32;
        let (whole, hi, lo) = (t >> 16, (t >> 8) as usize & 255, t as usize & 255);
        (u64::from(self.thi[hi]) * u64::from(self.tlo[lo])) >> 30 >> whole
    }

    /// An exponential variate from a uniform 32-bit word: `L = -log2(u / 2^32) * 2^27`, interpolated linearly
    /// between the table's points.
    ///
    /// The result is 1 to 31 * 2^27, so its product with a weight fits into 64 bits; words 0 and 1 are read
    /// as 2. The winner of a row usually has a small time, so the unit 2^-27 limits the accuracy: a token of
    /// probability 10^-6 is sampled with a relative error below 0.5 %, one of 10^-7 below 5 %.
    pub fn time(&self, u: u32) -> u64 {
        let u = u.max(2);
        let zeros = u.leading_zeros();
        let mantissa = (u << zeros) & 0x7fff_ffff;
        let (i, fraction) = ((mantissa >> 19) as usize, u64::from(mantissa & 0x7_ffff));
        let (from, to) = (u64::from(self.rlog[i]), u64::from(self.rlog[i + 1]));
        (u64::from(zeros) << 27) + from - (((from - to) * fraction) >> 19)
    }
}

// ---- random draws ----

/// What a random draw decides. It is the top byte of a counter's second word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The token that a row drafts.
    Draft = 2,
    /// Whether the draft of a row is accepted.
    Accept = 3,
    /// The token that follows a row if all drafts after the row are rejected, or if it has none.
    Residual = 4,
}

/// Identifies a random draw within a round. No two draws of a round have the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    /// What the draw decides.
    pub purpose: Purpose,
    /// Position of the token that the draw decides about, relative to the anchor's position.
    pub depth: usize,
    /// Row of the verification pass that the purpose refers to; the anchor is row 0.
    pub row: usize,
}

/// The source of the verification methods' random draws. Devices use [`PhiloxStream`]; a test's source takes
/// every branch in turn and adds up exact probabilities.
pub trait RandomSource {
    /// True with probability `s / n`; always true if `s >= n`.
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool;

    /// A token id, sampled in proportion to `weights`: `(id, weight)` in ascending order of id, with a sum
    /// below 2^64. `None` if the sum is 0.
    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32>;
}

/// The random draws of one round of a request, from Philox. Probabilities are exact to 2^-64.
///
/// The round is part of every counter: draws for drafts beyond the point where a round stopped have
/// influenced where it stopped, so the next round must not reuse their random numbers. The batch slot is not
/// part of any counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhiloxStream {
    /// The request's seed.
    pub seed: u64,
    /// The request's stream id.
    pub stream: u32,
    /// Number of the round within the request, from 1 on. Exact verification uses counters with round 0.
    pub round: u32,
    /// The anchor's position.
    pub anchor: u32,
}

impl PhiloxStream {
    /// The Philox counter of a draw. Rows must be below 2^24.
    pub fn counter(&self, draw: DrawKey) -> [u32; 4] {
        let position = self.anchor.wrapping_add(draw.depth as u32);
        [position, ((draw.purpose as u32) << 24) | draw.row as u32, self.stream, self.round]
    }

    /// 64 random bits for a draw.
    pub fn bits(&self, draw: DrawKey) -> u64 {
        let words = philox(self.counter(draw), key(self.seed));
        (u64::from(words[0]) << 32) | u64::from(words[1])
    }

    /// A random integer below `n`; 0 if `n` is 0.
    fn below(&self, draw: DrawKey, n: u64) -> u64 {
        ((u128::from(self.bits(draw)) * u128::from(n)) >> 64) as u64
    }
}

impl RandomSource for PhiloxStream {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        s >= n || self.below(key, n) < s
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let mut at = self.below(key, weights.iter().map(|&(_, w)| w).sum());
        for &(id, w) in weights {
            match at.checked_sub(w) {
                Some(beyond) => at = beyond,
                None => return Some(id),
            }
        }
        None
    }
}
