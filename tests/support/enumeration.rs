//! Models of a few tokens, and the exact distribution that a verification method emits for them. The code
//! under test runs with a random source that enumerates every branch. The emitted distribution, completed to
//! a fixed length by the target, is compared with the target's in exact fractions.

use crate::support::random;

use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::rng::{DrawKey, RandomSource};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::{
    Siblings, block_verify, multi_draft_block_verify, recursive_rejection, rejection, sample_chain,
    sample_chains, sample_tree,
};
use num_rational::BigRational;
pub use random::Random;
use std::collections::HashMap;

// ---- the enumerating random source ----

/// Takes the branches of `script`, then first branches, and multiplies their probabilities.
pub struct Enumerator {
    /// (branch taken, number of branches)
    script: Vec<(usize, usize)>,
    at: usize,
    probability: BigRational,
}

pub fn ratio(a: u64, b: u64) -> BigRational {
    BigRational::new(a.into(), b.into())
}

impl Enumerator {
    /// Takes one branch. Branch `i` has probability `weights[i] / total`; branches of weight 0 are never
    /// taken.
    pub fn branch(&mut self, weights: &[u64], total: u64) -> usize {
        let open: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0).collect();
        if self.at == self.script.len() {
            self.script.push((0, open.len()));
        }
        let taken = open[self.script[self.at].0];
        self.at += 1;
        if weights[taken] < total {
            self.probability *= ratio(weights[taken], total);
        }
        taken
    }
}

impl RandomSource for Enumerator {
    fn accept(&mut self, _key: DrawKey, s: u64, n: u64) -> bool {
        let s = s.min(n);
        n == 0 || self.branch(&[s, n - s], n) == 0
    }

    fn pick(&mut self, _key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        assert!(weights.is_sorted_by(|a, b| a.0 < b.0), "ids ascend");
        let only: Vec<u64> = weights.iter().map(|&(_, w)| w).collect();
        Some(weights[self.branch(&only, only.iter().sum())].0)
    }
}

pub type JointDistribution = HashMap<Vec<u32>, BigRational>;

/// The distribution of the values that `run` returns.
pub fn enumerate(mut run: impl FnMut(&mut Enumerator) -> Vec<u32>) -> JointDistribution {
    let mut distribution = JointDistribution::new();
    let mut script = Vec::new();
    loop {
        let mut source = Enumerator { script, at: 0, probability: ratio(1, 1) };
        let emitted = run(&mut source);
        *distribution.entry(emitted).or_insert_with(|| ratio(0, 1)) += source.probability;
        script = source.script;
        // The next leaf: advance the last choice that has a branch left.
        while script.pop_if(|(taken, of)| *taken + 1 == *of).is_some() {}
        match script.last_mut() {
            Some((taken, _)) => *taken += 1,
            None => return distribution,
        }
    }
}

// ---- models ----

/// Rows of a target or a drafter.
impl Random {
    /// Small integer weights; with `zeros`, some of them are 0.
    pub fn weights(&mut self, vocab: usize, zeros: bool) -> Vec<u64> {
        loop {
            let one = |rng: &mut Random| if zeros && rng.below(4) == 0 { 0 } else { 1 + rng.below(9) as u64 };
            let weights: Vec<u64> = (0..vocab).map(|_| one(self)).collect();
            if weights.iter().any(|&w| w > 0) {
                return weights;
            }
        }
    }

    /// A row as the engine computes it: logits with ties and masked tokens, a temperature, filters.
    pub fn sampled(&mut self, vocab: usize) -> Distribution {
        let mut logits: Vec<f32> = (0..vocab).map(|_| self.below(9) as f32 * 0.5).collect();
        let at = self.below(2 * vocab);
        if at < vocab - 1 {
            logits[at] = f32::NEG_INFINITY;
        }
        let sampling = SamplingParams {
            temperature: [0.0, 0.5, 1.0, 2.0][self.below(4)],
            top_k: self.below(vocab),
            top_p: [0.6, 0.9, 1.0][self.below(3)],
            min_p: [0.0, 0.0, 0.2][self.below(3)],
            seed: 0,
            stream: 0,
        };
        sampling.probabilities(&logits).unwrap()
    }

    /// Any kind of row: fractions, sampled logits, one token, multiples of 1/256.
    pub fn row(&mut self, vocab: usize) -> Distribution {
        match self.below(8) {
            0..3 => probabilities(&self.weights(vocab, true)),
            3..6 => self.sampled(vocab),
            6 => one_hot(self.below(vocab) as u32),
            _ => self.dyadic(vocab),
        }
    }

    /// Probabilities that are multiples of 1/256.
    pub fn dyadic(&mut self, vocab: usize) -> Distribution {
        let mut cuts: Vec<u64> = (1..vocab).map(|_| self.below(257) as u64).collect();
        cuts.sort();
        let ends = cuts.iter().copied().chain([256]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        probabilities(&ends.zip(starts).map(|(end, start)| end - start).collect::<Vec<_>>())
    }

    /// Probabilities that are powers of 1/2, so that division by them does not round.
    pub fn powers(&mut self, vocab: usize) -> Distribution {
        let mut weights = vec![256u64];
        while weights.len() < vocab {
            let at = self.below(weights.len());
            if weights[at] > 1 {
                weights[at] /= 2;
                let half = weights[at];
                weights.push(half);
            }
        }
        for i in (1..vocab).rev() {
            weights.swap(i, self.below(i + 1));
        }
        if self.below(3) == 0 {
            // One token is never drafted.
            let (a, b) = (self.below(vocab), self.below(vocab));
            if weights[a] == weights[b] && a != b {
                (weights[a], weights[b]) = (weights[a] * 2, 0);
            }
        }
        probabilities(&weights)
    }
}

/// The distribution with these weights for ids 0, 1, ...; the heaviest token absorbs the rounding error.
pub fn probabilities(weights: &[u64]) -> Distribution {
    let rounding_token = (0..weights.len()).rev().max_by_key(|&i| weights[i]).unwrap();
    Distribution::new((0u32..).zip(weights.iter().copied()).collect(), rounding_token as u32).unwrap()
}

pub fn one_hot(id: u32) -> Distribution {
    Distribution::new(vec![(id, 1)], id).unwrap()
}

/// A target whose distribution depends on all tokens before, and a drafter with one distribution per depth.
#[derive(Clone)]
pub struct Models {
    pub vocab: usize,
    pub target: HashMap<Vec<u32>, Distribution>,
    pub distributions: Vec<Distribution>,
}

/// All sequences of `length` tokens.
pub fn sequences(vocab: usize, length: usize) -> Vec<Vec<u32>> {
    let longer = |all: Vec<Vec<u32>>| {
        let with = |s: &Vec<u32>, id: u32| [&s[..], &[id]].concat();
        all.iter().flat_map(|s| (0..vocab as u32).map(move |id| with(s, id))).collect()
    };
    (0..length).fold(vec![vec![]], |all, _| longer(all))
}

impl Models {
    pub fn new(
        vocab: usize,
        depth: usize,
        mut row: impl FnMut() -> Distribution,
        distribution: impl FnMut() -> Distribution,
    ) -> Models {
        let before = (0..=depth).flat_map(|length| sequences(vocab, length));
        let target = before.map(|s| (s, row())).collect();
        Models { vocab, target, distributions: std::iter::repeat_with(distribution).take(depth).collect() }
    }

    pub fn random(rng: &mut Random, vocab: usize, depth: usize) -> Models {
        let mut models = Models::new(vocab, depth, || rng.row(vocab), || one_hot(0));
        let kind = rng.below(8);
        for d in 0..depth {
            models.distributions[d] = match kind {
                // 0: equal to the target along one path. 1: only tokens that the target never emits there, if
                // there are any.
                0 => models.target[&vec![0; d]].clone(),
                1 => {
                    let taken = models.target[&vec![0; d]].clone();
                    let others: Vec<u64> =
                        (0..vocab as u32).map(|id| u64::from(taken.probability(id) == 0)).collect();
                    if others.contains(&1) { probabilities(&others) } else { taken }
                }
                _ => rng.row(vocab),
            };
        }
        models
    }

    pub fn depth(&self) -> usize {
        self.distributions.len()
    }

    pub fn p(&self, before: &[u32]) -> Distribution {
        self.target[before].clone()
    }

    /// The target's probability of a sequence.
    pub fn sequence_probability(&self, tokens: &[u32]) -> BigRational {
        let p = |i: usize| ratio(self.target[&tokens[..i]].probability(tokens[i]), ONE);
        (0..tokens.len()).map(p).product()
    }

    /// Total variation distance between the target's distribution of `depth + 1` tokens and `distribution`,
    /// completed to that length by the target.
    pub fn distance(&self, distribution: &JointDistribution) -> BigRational {
        let length = self.depth() + 1;
        let total: BigRational = distribution.values().sum();
        assert_eq!(total, ratio(1, 1), "the enumeration took every branch");
        let mut differences = ratio(0, 1);
        for tokens in sequences(self.vocab, length) {
            let mut emitted = ratio(0, 1);
            for n in 1..=length {
                if let Some(probability) = distribution.get(&tokens[..n]) {
                    // The target samples the rest.
                    let rest =
                        (n..length).map(|i| ratio(self.target[&tokens[..i]].probability(tokens[i]), ONE));
                    emitted += rest.fold(probability.clone(), |a, b| a * b);
                }
            }
            let difference = emitted - self.sequence_probability(&tokens);
            let zero = ratio(0, 1);
            differences += if difference < zero { -difference } else { difference };
        }
        differences / ratio(2, 1)
    }

    /// The distribution that a round with a chain emits under `method`.
    pub fn chain(&self, method: Method) -> JointDistribution {
        self.chain_with(method, &self.distributions)
    }

    /// The same, verified as if the drafts were sampled from `claimed`.
    pub fn chain_with(&self, method: Method, claimed: &[Distribution]) -> JointDistribution {
        enumerate(|source| {
            let drafts = sample_chain(&self.distributions, source).unwrap();
            self.verify_chain(method, &drafts, claimed, source)
        })
    }

    pub fn verify_chain(
        &self,
        method: Method,
        drafts: &[u32],
        distributions: &[Distribution],
        source: &mut impl RandomSource,
    ) -> Vec<u32> {
        let target = |row: usize| Some(self.p(&drafts[..row]));
        let (accepted, next) = match method {
            Method::Rejection => rejection(drafts, distributions, target, source),
            Method::Block => block_verify(drafts, distributions, target, source),
        }
        .unwrap();
        [&drafts[..accepted], &[next]].concat()
    }

    /// The distribution that a round with a tree emits.
    pub fn tree(&self, widths: &[usize], siblings: Siblings) -> JointDistribution {
        enumerate(|source| {
            let (tokens, parents) = sample_levels(9, widths, &self.distributions, siblings, source).unwrap();
            self.verify_tree(&tokens, &parents, siblings, source)
        })
    }

    pub fn verify_tree(
        &self,
        tokens: &[u32],
        parents: &[u32],
        siblings: Siblings,
        source: &mut impl RandomSource,
    ) -> Vec<u32> {
        let target = |row: usize| Some(self.p(&path_to(tokens, parents, row)));
        let (path, next) =
            recursive_rejection(tokens, parents, &self.distributions, siblings, target, source).unwrap();
        path[1..].iter().map(|&row| tokens[row]).chain([next]).collect()
    }

    /// The distribution that a round with `count` chains emits under multi-draft block verification.
    pub fn chains(&self, count: usize) -> JointDistribution {
        enumerate(|source| {
            let (tokens, parents) = sample_chains(9, count, &self.distributions, source).unwrap();
            self.verify_chains(&tokens, &parents, source)
        })
    }

    pub fn verify_chains(&self, tokens: &[u32], parents: &[u32], source: &mut impl RandomSource) -> Vec<u32> {
        let target = |row: usize| Some(self.p(&path_to(tokens, parents, row)));
        let (path, next) = multi_draft_block_verify(tokens, &self.distributions, target, source).unwrap();
        assert!(path[1..].iter().zip(&path).all(|(&row, &before)| parents[row] as usize == before));
        path[1..].iter().map(|&row| tokens[row]).chain([next]).collect()
    }
}

/// The drafts on the path to a row.
pub fn path_to(tokens: &[u32], parents: &[u32], row: usize) -> Vec<u32> {
    let mut path = Vec::new();
    let mut at = row;
    while at > 0 {
        path.push(tokens[at]);
        at = parents[at] as usize;
    }
    path.reverse();
    path
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    Rejection,
    Block,
}

/// Mean number of accepted drafts.
pub fn accepted(distribution: &JointDistribution) -> BigRational {
    distribution.iter().map(|(tokens, probability)| probability * ratio(tokens.len() as u64 - 1, 1)).sum()
}

pub fn float(x: &BigRational) -> f64 {
    // Numerator and denominator have hundreds of digits.
    let shifted: BigRational = x * BigRational::from_integer((1u128 << 100).into());
    let whole: i128 = shifted.to_integer().try_into().unwrap();
    whole as f64 / 2f64.powi(100)
}

pub fn near(x: &BigRational, expected: f64, within: f64) {
    assert!((float(x) - expected).abs() <= within, "{} instead of {expected}", float(x));
}

/// Bound of the rounding error: 2 V 2^-48 per row.
pub fn rounding(models: &Models) -> BigRational {
    ratio((2 * models.vocab * (models.depth() + 1)) as u64, ONE)
}

pub const SHAPES: [(usize, usize); 6] = [(2, 3), (3, 1), (3, 2), (4, 1), (4, 2), (3, 3)];

pub fn models(count: u64, seed: u64) -> impl Iterator<Item = Models> {
    (0..count).map(move |i| {
        let (vocab, depth) = SHAPES[i as usize % SHAPES.len()];
        Models::random(&mut Random::new(seed * 1000 + i), vocab, depth)
    })
}

/// Samples a tree, level by level: `widths[d]` children of every row of depth `d`, from `distributions[d]`.
/// Returns its tokens, as [`sample_tree`] does, and the parents that define its shape.
pub fn sample_levels(
    anchor: u32,
    widths: &[usize],
    distributions: &[Distribution],
    siblings: Siblings,
    source: &mut impl RandomSource,
) -> Option<(Vec<u32>, Vec<u32>)> {
    let (mut parents, mut level) = (vec![0], 0..1);
    for &width in widths {
        let end = parents.len();
        parents.extend(level.flat_map(|parent| std::iter::repeat_n(parent, width)));
        level = end as u32..parents.len() as u32;
    }
    Some((sample_tree(anchor, &parents, distributions, siblings, source)?, parents))
}
