//! The random draws of verification: each is used once, from its own Philox counter, and with them the
//! emitted tokens have the target's distribution. These tests sample, with fixed seeds.

use crate::support::enumeration;

use dflash::spec::rng::{DrawKey, PhiloxStream, Purpose, RandomSource, philox};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::{Siblings, sample_chain, sample_chains};
use enumeration::*;
use std::collections::HashSet;

#[test]
fn a_draws_bits_are_those_of_its_counter() {
    let draws = PhiloxStream { seed: 0x12345678_DEADBEEF, stream: 42, round: 3, anchor: 1000 };
    let key = |purpose, depth, row| DrawKey { purpose, depth, row };
    assert_eq!(draws.counter(key(Purpose::Draft, 2, 5)), [1002, 0x0200_0005, 42, 3]);
    assert_eq!(draws.counter(key(Purpose::Accept, 1, 1)), [1001, 0x0300_0001, 42, 3]);
    assert_eq!(draws.counter(key(Purpose::Residual, 16, 15)), [1016, 0x0400_000f, 42, 3]);
    // Computed in Python.
    assert_eq!(draws.bits(key(Purpose::Draft, 2, 5)), PYTHON[0]);
    assert_eq!(draws.bits(key(Purpose::Accept, 1, 1)), PYTHON[1]);
    assert_eq!(draws.bits(key(Purpose::Residual, 16, 15)), PYTHON[2]);
}

const PYTHON: [u64; 3] = [0xe9021443_b92ce131, 0x4caae71b_059014b6, 0x8cb62e28_f7049860];

/// Records the counters of the draws.
struct Recorder<'a> {
    draws: PhiloxStream,
    counters: &'a mut HashSet<[u32; 4]>,
}

impl Recorder<'_> {
    fn record(&mut self, key: DrawKey) {
        let counter = self.draws.counter(key);
        assert!(self.counters.insert(counter), "{key:?} of {:?} has been used", self.draws);
        // The stream and the round of the request.
        assert_eq!(counter[2..], [self.draws.stream, self.draws.round]);
    }
}

impl RandomSource for Recorder<'_> {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        self.record(key);
        self.draws.accept(key, s, n)
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.record(key);
        self.draws.pick(key, weights)
    }
}

#[test]
fn no_draw_is_used_twice() {
    let mut rng = Random::new(14);
    for kind in 0..5 {
        let mut counters = HashSet::new();
        let mut anchor = 7;
        for round in 1..500 {
            let depth = 1 + rng.below(3);
            let models = Models::random(&mut rng, 3, depth);
            let draws = PhiloxStream { seed: 5, stream: 6, round, anchor };
            let mut source = Recorder { draws, counters: &mut counters };
            let emitted = match kind {
                0 | 1 => {
                    let drafts = sample_chain(&models.distributions, &mut source).unwrap();
                    models.verify_chain(
                        [Method::Rejection, Method::Block][kind],
                        &drafts,
                        &models.distributions,
                        &mut source,
                    )
                }
                4 => {
                    let (tokens, parents) = sample_chains(0, 3, &models.distributions, &mut source).unwrap();
                    models.verify_chains(&tokens, &parents, &mut source)
                }
                _ => {
                    let siblings = [Siblings::Independent, Siblings::Distinct][kind - 2];
                    let widths = &[3, 2, 2][..depth];
                    let (tokens, parents) =
                        sample_levels(0, widths, &models.distributions, siblings, &mut source).unwrap();
                    models.verify_tree(&tokens, &parents, siblings, &mut source)
                }
            };
            anchor += emitted.len() as u32;
        }
        assert!(counters.len() > 1000);
    }
}

/// Counts of the first `depth + 1` tokens of `runs` requests, indexed in base `vocab`.
fn counts(models: &Models, method: Method, runs: u64, reuse: bool) -> Vec<u64> {
    let (vocab, length) = (models.vocab, models.depth() + 1);
    let mut counts = vec![0; vocab.pow(length as u32)];
    for seed in 0..runs {
        let (mut tokens, mut round) = (Vec::new(), 1);
        while tokens.len() < length {
            let draws = PhiloxStream { seed, stream: 0, round, anchor: tokens.len() as u32 };
            let mut source = KeyedDraws { draws, reuse };
            // The distributions of these models do not depend on earlier tokens.
            let drafts = sample_chain(&models.distributions, &mut source).unwrap();
            tokens.extend(models.verify_chain(method, &drafts, &models.distributions, &mut source));
            round += 1;
        }
        counts[tokens[..length].iter().fold(0, |cell, &id| cell * vocab + id as usize)] += 1;
    }
    counts
}

/// Philox draws. `reuse` makes the mistake that keys contain only position and purpose, so draws repeat.
struct KeyedDraws {
    draws: PhiloxStream,
    reuse: bool,
}

impl KeyedDraws {
    fn key(&mut self, key: DrawKey) -> DrawKey {
        if self.reuse {
            self.draws.round = 1;
            return DrawKey { row: 0, ..key };
        }
        key
    }
}

impl RandomSource for KeyedDraws {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        let key = self.key(key);
        self.draws.accept(key, s, n)
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let key = self.key(key);
        self.draws.pick(key, weights)
    }
}

#[test]
fn reused_draws_are_detected_under_block_verification() {
    let models = Models::new(2, 2, || probabilities(&[1, 2]), || probabilities(&[2, 1]));
    let distance = |method, reuse| {
        let runs = 1 << 18;
        let counts = counts(&models, method, runs, reuse);
        let off = |(tokens, n): (Vec<u32>, &u64)| {
            (*n as f64 / runs as f64 - float(&models.sequence_probability(&tokens))).abs()
        };
        sequences(2, 3).into_iter().zip(&counts).map(off).sum::<f64>() / 2.0
    };
    let found = distance(Method::Block, true);
    println!("{found:.4}");
    // 0.056 if only the second round reuses them.
    assert!((0.055..0.075).contains(&found), "{found}");
    for (method, reuse) in [(Method::Block, false), (Method::Rejection, false), (Method::Rejection, true)] {
        let found = distance(method, reuse);
        assert!(found < 0.008, "{method:?}, {reuse}: {found}");
    }
}

/// Chi-square against the target's distribution, and its bound of one in ten thousand (Wilson and Hilferty).
fn chi_square(models: &Models, counts: &[u64]) -> (f64, f64) {
    let runs = counts.iter().sum::<u64>() as f64;
    let (mut chi, mut cells) = (0.0, 0);
    let (mut rare, mut rare_found) = (0.0, 0.0);
    for (tokens, &n) in sequences(models.vocab, models.depth() + 1).iter().zip(counts) {
        match float(&models.sequence_probability(tokens)) * runs {
            e if e < 10.0 => (rare, rare_found) = (rare + e, rare_found + n as f64),
            e => (chi, cells) = (chi + (n as f64 - e).powi(2) / e, cells + 1),
        }
    }
    if rare > 0.0 {
        (chi, cells) = (chi + (rare_found - rare).powi(2) / rare, cells + 1);
    }
    let dof = f64::from(cells - 1);
    (chi, dof * (1.0 - 2.0 / (9.0 * dof) + 3.72 * (2.0 / (9.0 * dof)).sqrt()).powi(3))
}

#[test]
fn philox_draws_give_the_targets_distribution() {
    let distribution = |logits: &[f32], temperature| {
        let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
        sampling.probabilities(logits).unwrap()
    };
    let mut drafter =
        [distribution(&[0.0, 0.9, -0.4, -1.0], 1.0), distribution(&[0.3, -0.2, 0.8, 0.0], 0.7)].into_iter();
    let p = distribution(&[1.0, 0.2, -0.5, -2.0], 1.0);
    let models = Models::new(4, 2, || p.clone(), || drafter.next().unwrap());
    for method in [Method::Rejection, Method::Block] {
        let (chi, bound) = chi_square(&models, &counts(&models, method, 1 << 18, false));
        println!("{method:?}: {chi:.1} of at most {bound:.1}");
        assert!(chi < bound, "{method:?}: {chi}");
    }
}

#[test]
fn a_philox_stream_calls_philox_with_its_seed() {
    let draws = PhiloxStream { seed: 1 << 32 | 2, stream: 3, round: 4, anchor: 5 };
    let key = DrawKey { purpose: Purpose::Accept, depth: 1, row: 1 };
    let bits = philox(draws.counter(key), [2, 1]);
    assert_eq!(draws.bits(key), u64::from(bits[0]) << 32 | u64::from(bits[1]));
}
