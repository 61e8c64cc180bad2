//! Probability distributions over tokens as integers: probabilities are multiples of 2^-48, and all
//! arithmetic on them is integer. So no reduction order can change a decision, and every device takes the
//! same decisions.

/// Probability 1.
pub const ONE: u64 = 1 << 48;

/// A distribution over tokens: `(id, probability)` of the tokens with a positive probability, in ascending
/// order of id, in units of 2^-48.
///
/// Probabilities add up to [`ONE`] exactly. The only exception: those that
/// [`crate::spec::verify::multi_draft_block_verify`] computes internally add up to slightly less, because of
/// rounding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution(Vec<(u32, u64)>);

impl Distribution {
    /// The distribution in proportion to `weights`, `(id, weight)` in ascending order of id. `rounding_token`
    /// gets the probability that rounding leaves over. `None` if the weights add up to 0, or to 2^64 or more,
    /// or if the rounding token is not among them.
    ///
    /// Let `Z` be the sum of the weights, shifted left until bit 63 is set, and `R = floor(2^112 / Z)`, from
    /// 2^48 to 2^49. A probability is the upper half of the product of `R` and the weight, shifted by the
    /// same number of bits. So a row needs one division, and nothing overflows for any vocabulary. Each
    /// probability is short by less than 2 units, so the rounding token gets less than 2 units per token.
    pub fn new(mut weights: Vec<(u32, u64)>, rounding_token: u32) -> Option<Distribution> {
        let total = weights.iter().try_fold(0u64, |sum, &(_, w)| sum.checked_add(w)).filter(|&z| z > 0)?;
        let shift = total.leading_zeros();
        let inverse = ((1u128 << 112) / u128::from(total << shift)) as u64;
        let mut left = ONE;
        for (_, w) in &mut weights {
            *w = high(*w << shift, inverse);
            left -= *w;
        }
        let at = weights.binary_search_by_key(&rounding_token, |&(id, _)| id).ok()?;
        weights[at].1 += left;
        weights.retain(|&(_, p)| p > 0);
        Some(Distribution(weights))
    }

    /// The distribution of a token that is certain.
    pub fn certain(id: u32) -> Distribution {
        Distribution(vec![(id, ONE)])
    }

    /// The distribution in proportion to residual weights. The rounding token is the one with the largest
    /// weight, or the lowest id among several. `None` as in [`Distribution::new`].
    pub(crate) fn from_residual(weights: Vec<(u32, u64)>) -> Option<Distribution> {
        let rounding_token = weights.iter().rev().max_by_key(|&&(_, w)| w)?.0;
        Distribution::new(weights, rounding_token)
    }

    /// A distribution whose probabilities may add up to less than [`ONE`]. Tokens of probability 0 are
    /// dropped.
    pub(crate) fn unnormalized(probabilities: impl Iterator<Item = (u32, u64)>) -> Distribution {
        Distribution(probabilities.filter(|&(_, p)| p > 0).collect())
    }

    /// `(id, probability)` of the tokens with a positive probability, in ascending order of id.
    pub fn tokens(&self) -> &[(u32, u64)] {
        &self.0
    }

    /// The probability of a token, 0 to [`ONE`].
    pub fn probability(&self, id: u32) -> u64 {
        self.0.binary_search_by_key(&id, |&(id, _)| id).map_or(0, |at| self.0[at].1)
    }

    /// This distribution under the condition that the token is not `id`. The next sibling is sampled from it
    /// without replacement. `None` if no other token has a positive probability.
    pub fn without(&self, id: u32) -> Option<Distribution> {
        Distribution::from_residual(self.0.iter().copied().filter(|&(other, _)| other != id).collect())
    }

    /// The weights `max(factor * self - other, 0)`, `(id, weight)` of the tokens where they are not 0.
    /// `factor` is in units of 2^-48; products are rounded down.
    pub(crate) fn residual(&self, factor: u64, other: &Distribution) -> Vec<(u32, u64)> {
        let weight = |&(id, p): &(u32, u64)| (id, times(factor, p).saturating_sub(other.probability(id)));
        self.0.iter().map(weight).filter(|&(_, w)| w > 0).collect()
    }
}

/// `floor(a b / 2^64)`
fn high(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// `floor(a b / 2^48)`, below 2^64.
pub(crate) fn times(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 48) as u64
}

/// `min(2^48, floor(a b / n))` of three numbers that are at most [`ONE`]; 0 if `n` is 0.
pub(crate) fn ratio(a: u64, b: u64, n: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product.checked_div(n.into()).unwrap_or(0).min(ONE.into()) as u64
}
