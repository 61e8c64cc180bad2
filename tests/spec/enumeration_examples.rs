//! The verification methods, by enumeration, against results computed by hand, published results and
//! theoretical bounds. Also tests the row distributions that they read.

use crate::support::enumeration;

use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::rng::{DrawKey, RandomSource};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::{Siblings, multi_draft_block_verify, rejection, sample_chains};
use enumeration::*;
use num_rational::BigRational;
use std::collections::HashMap;

// ---- distributions of rows ----

#[test]
fn probabilities_are_the_worked_examples() {
    let of = |temperature, logits: &[f32]| {
        let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
        sampling.probabilities(logits).unwrap().tokens().iter().map(|&(_, p)| p).collect::<Vec<_>>()
    };
    let p = [1.0, 0.25, -0.5, -3.0];
    assert_eq!(of(1.0, &p), [164238993696570, 77581291677696, 36646554055860, 3008137280530]);
    assert_eq!(
        of(1.0, &[0.0, 1.0, -0.5, -1.0]),
        [59981818389923, 163046689983644, 36380516000687, 22065952336402]
    );
    assert_eq!(of(0.5, &p), [221067737783788, 49326719680635, 11006359540146, 74159706087]);
    assert_eq!(of(0.0, &p), [ONE]);
}

/// Rejects every draft that can be rejected, and records the draws.
#[derive(Default)]
struct RejectAll {
    acceptance: Vec<(u64, u64)>,
    weights: Vec<(u32, u64)>,
}

impl RandomSource for RejectAll {
    fn accept(&mut self, _: DrawKey, s: u64, n: u64) -> bool {
        self.acceptance.push((s, n));
        s >= n
    }

    fn pick(&mut self, _: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.weights = weights.to_vec();
        weights.first().map(|&(id, _)| id)
    }
}

#[test]
fn acceptance_and_residual_are_the_worked_examples() {
    let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
    let p = sampling.probabilities(&[1.0, 0.25, -0.5, -3.0]).unwrap();
    let q = sampling.probabilities(&[0.0, 1.0, -0.5, -1.0]).unwrap();
    for (draft, probability) in [(0, None), (1, Some(0.4758225)), (2, None), (3, Some(0.1363248))] {
        let mut source = RejectAll::default();
        let (accepted, _) =
            rejection(&[draft], std::slice::from_ref(&q), |_| Some(p.clone()), &mut source).unwrap();
        let (s, n) = source.acceptance[0];
        assert_eq!(
            (accepted, s >= n),
            (usize::from(probability.is_none()), probability.is_none()),
            "{draft}"
        );
        if let Some(probability) = probability {
            assert!((s as f64 / n as f64 - probability).abs() < 1e-7, "{draft}: {s} of {n}");
            assert_eq!(source.weights, [(0, 104257175306647), (2, 266038055173)]);
        }
    }
}

#[test]
fn probabilities_sum_to_one_and_follow_any_weights() {
    let mut rng = Random::new(1);
    for round in 0..3000 {
        let count = 1 + rng.below(if round % 10 == 0 { 3000 } else { 9 });
        // A total of up to 2^64.
        let most = 63 - count.ilog2();
        let bits = rng.below(most as usize + 1) as u32;
        let weights: Vec<(u32, u64)> =
            (0..count as u32).map(|id| (id * 3, rng.next() >> (63 - bits) >> rng.below(4))).collect();
        let total: u128 = weights.iter().map(|&(_, w)| u128::from(w)).sum();
        let rounding_token = weights[rng.below(count)].0;
        let Some(distribution) = Distribution::new(weights.clone(), rounding_token) else {
            assert!(total == 0 || total >> 64 > 0);
            continue;
        };
        assert_eq!(distribution.tokens().iter().map(|&(_, p)| p).sum::<u64>(), ONE);
        assert!(
            distribution.tokens().iter().all(|&(_, p)| p > 0)
                && distribution.tokens().is_sorted_by(|a, b| a.0 < b.0)
        );
        let mut short = 0;
        for &(id, w) in &weights {
            let exact = (u128::from(w) << 48) / total;
            if id != rounding_token {
                assert!(
                    (0..2).contains(&(exact as i128 - i128::from(distribution.probability(id)))),
                    "{w} of {total}"
                );
            }
            short += 2;
        }
        let (at, extra) = ((rounding_token / 3) as usize, distribution.probability(rounding_token));
        assert!(i128::from(extra) - ((u128::from(weights[at].1) << 48) / total) as i128 <= short);
    }
    // Extremes: one token; a total of 2^64 - 1; 2^26 tokens of equal weight.
    assert_eq!(Distribution::new(vec![(7, 1)], 7).unwrap().tokens(), [(7, ONE)]);
    assert_eq!(Distribution::new(vec![(7, u64::MAX)], 7).unwrap().tokens(), [(7, ONE)]);
    let widest = Distribution::new((0..1 << 26).map(|id| (id, 1u64 << 32)).collect(), 0).unwrap();
    assert!(widest.tokens().iter().all(|&(_, p)| p == 1 << 22));
    for bad in [vec![], vec![(0, 0)], vec![(0, u64::MAX), (1, 1)]] {
        assert_eq!(Distribution::new(bad, 0), None);
    }
    assert_eq!(Distribution::new(vec![(1, 1)], 0), None, "no such rounding_token");
}

#[test]
fn the_best_token_absorbs_the_rounding_error() {
    let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
    let distribution = sampling.probabilities(&[0.0, 2.0, 2.0, 2.0]).unwrap();
    assert!(
        distribution.probability(1) > distribution.probability(2)
            && distribution.probability(2) == distribution.probability(3)
    );
    // Logits so close that the weights are equal: the larger logit decides.
    let distribution = sampling.probabilities(&[1.0, 1.000_001, 1.0]).unwrap();
    assert!(
        distribution.probability(1) > distribution.probability(0)
            && distribution.probability(0) == distribution.probability(2)
    );
    // After the removal of a token, the heaviest of the others.
    let distribution = probabilities(&[1, 5, 3, 3]).without(1).unwrap();
    assert!(
        distribution.probability(2) > distribution.probability(3)
            && distribution.probability(3) > distribution.probability(0)
            && distribution.probability(1) == 0
    );
    assert_eq!(one_hot(3).without(3), None);
    assert_eq!(one_hot(3).without(4).unwrap(), one_hot(3));
    assert_eq!(sampling.probabilities(&[f32::NAN, 0.0]), None);
}

// ---- worked numbers ----

/// p() = (1/4, 1/2, 1/4), p(0) = (3/4, 0, 1/4), p(1) = (1/4, 3/4, 0), p(2) = (0, 1/2, 1/2), then uniform; q1
/// = (1/2, 1/4, 1/4), q2 = (1/2, 1/2, 0).
fn worked() -> Models {
    let rows = |tokens: &[u32]| match tokens {
        [] => probabilities(&[1, 2, 1]),
        [0] => probabilities(&[3, 0, 1]),
        [1] => probabilities(&[1, 3, 0]),
        [2] => probabilities(&[0, 1, 1]),
        _ => probabilities(&[1, 1, 1]),
    };
    let before = (0..3).flat_map(|length| sequences(3, length));
    Models {
        vocab: 3,
        target: before.map(|s| (s.clone(), rows(&s))).collect(),
        distributions: vec![probabilities(&[2, 1, 1]), probabilities(&[1, 1, 0])],
    }
}

#[test]
fn worked_chain_example_has_the_hand_computed_acceptance() {
    let models = worked();
    // Drafts; probabilities of 0, 1, 2 accepted drafts under rejection and under block verification.
    let paths = [
        ([0, 0], [(1, 2), (0, 1), (1, 2)], [(1, 5), (1, 20), (3, 4)]),
        ([0, 1], [(1, 2), (1, 2), (0, 1)], [(4, 5), (1, 5), (0, 1)]),
        ([1, 0], [(0, 1), (1, 2), (1, 2)], [(0, 1), (1, 2), (1, 2)]),
        ([1, 1], [(0, 1), (0, 1), (1, 1)], [(0, 1), (0, 1), (1, 1)]),
        ([2, 0], [(0, 1), (1, 1), (0, 1)], [(0, 1), (1, 1), (0, 1)]),
        ([2, 1], [(0, 1), (0, 1), (1, 1)], [(0, 1), (0, 1), (1, 1)]),
    ];
    for (drafts, by_token, by_block) in paths {
        for (method, expected) in [(Method::Rejection, by_token), (Method::Block, by_block)] {
            let distribution =
                enumerate(|source| models.verify_chain(method, &drafts, &models.distributions, source));
            for (accepted, (a, b)) in expected.into_iter().enumerate() {
                let found: BigRational = distribution
                    .iter()
                    .filter(|(tokens, _)| tokens.len() == accepted + 1)
                    .map(|(_, p)| p)
                    .sum();
                assert_eq!(found, ratio(a, b), "{method:?}, {drafts:?}, {accepted} accepted");
            }
            // If the first draft is rejected, 1 follows; if block verification keeps one draft of (0, .), 2
            // follows.
            for tokens in distribution.keys() {
                assert!(tokens.len() != 1 || tokens[..] == [1], "{method:?}: {tokens:?}");
                assert!(method != Method::Block || tokens.len() != 2 || drafts[0] != 0 || tokens[1] == 2);
            }
        }
    }
    for (method, mean) in [(Method::Rejection, ratio(19, 16)), (Method::Block, ratio(5, 4))] {
        let distribution = models.chain(method);
        assert_eq!((accepted(&distribution), models.distance(&distribution)), (mean, ratio(0, 1)));
    }
}

#[test]
fn the_published_example_has_the_published_acceptance() {
    // Sun et al.: p = (1/3, 2/3), q = (2/3, 1/3), two drafts.
    let models = Models::new(2, 2, || probabilities(&[1, 2]), || probabilities(&[2, 1]));
    near(&accepted(&models.chain(Method::Rejection)), 10.0 / 9.0, 1e-13);
    near(&accepted(&models.chain(Method::Block)), 11.0 / 9.0, 1e-13);
}

fn four() -> Models {
    Models::new(4, 1, || probabilities(&[4, 3, 2, 1]), || probabilities(&[1, 2, 3, 4]))
}

#[test]
fn worked_sibling_example_has_the_hand_computed_acceptance() {
    let models = four();
    // Sampled siblings; then (accepted token, probability) and (residual token, probability).
    type Cells = &'static [(u32, f64)];
    let cases: [([u32; 2], Siblings, Cells, Cells); 8] = [
        ([3, 1], Siblings::Distinct, &[(3, 0.25), (1, 9.0 / 16.0)], &[(0, 3.0 / 16.0)]),
        ([3, 1], Siblings::Independent, &[(3, 0.25), (1, 0.75)], &[]),
        ([3, 2], Siblings::Distinct, &[(3, 0.25)], &[(0, 0.75)]),
        ([3, 2], Siblings::Independent, &[(3, 0.25)], &[(0, 39.0 / 56.0), (1, 3.0 / 56.0)]),
        ([2, 3], Siblings::Distinct, &[(2, 2.0 / 3.0)], &[(0, 1.0 / 3.0)]),
        ([2, 3], Siblings::Independent, &[(2, 2.0 / 3.0)], &[(0, 13.0 / 42.0), (1, 1.0 / 42.0)]),
        ([0, 1], Siblings::Distinct, &[(0, 1.0)], &[]),
        ([0, 1], Siblings::Independent, &[(0, 1.0)], &[]),
    ];
    for (draws, siblings, kept, residual) in cases {
        let distribution =
            enumerate(|source| models.verify_tree(&[9, draws[0], draws[1]], &[0; 3], siblings, source));
        for id in 0..4 {
            let sum = |cells: Cells| cells.iter().filter(|cell| cell.0 == id).map(|cell| cell.1).sum::<f64>();
            let of = |keep: &dyn Fn(&[u32]) -> bool| -> BigRational {
                distribution
                    .iter()
                    .filter(|(tokens, _)| tokens[0] == id && keep(tokens))
                    .map(|(_, p)| p)
                    .sum()
            };
            near(&of(&|tokens| tokens.len() == 2), sum(kept), 1e-13);
            near(&of(&|tokens| tokens.len() == 1), sum(residual), 1e-13);
        }
    }
    near(&accepted(&models.tree(&[1], Siblings::Distinct)), 3.0 / 5.0, 1e-13);
    near(&accepted(&models.tree(&[2], Siblings::Independent)), 18.0 / 25.0, 1e-13);
    near(&accepted(&models.tree(&[2], Siblings::Distinct)), 107.0 / 140.0, 1e-13);
}

/// The maximum acceptance of any lossless method for candidates of this distribution: the minimum, over sets
/// of tokens, of the set's probability plus the probability that some candidate is outside.
fn max_acceptance(p: &Distribution, candidates: &JointDistribution) -> BigRational {
    let sets = (0..1u32 << 4).map(|set| {
        let inside = |id: u32| set >> id & 1 == 1;
        let mass = p.tokens().iter().filter(|t| inside(t.0)).map(|t| ratio(t.1, ONE)).sum::<BigRational>();
        let within = candidates.iter().filter(|(ids, _)| ids.iter().all(|&id| inside(id)));
        mass + ratio(1, 1) - within.map(|(_, p)| p).sum::<BigRational>()
    });
    sets.min().unwrap()
}

#[test]
fn siblings_accept_no_more_than_optimal_transport_does() {
    let candidates = |models: &Models, siblings| {
        enumerate(|source| {
            sample_levels(9, &[2], &models.distributions, siblings, source).unwrap().0.split_off(1)
        })
    };
    let worked = four();
    for (siblings, bound) in [(Siblings::Independent, 79.0 / 100.0), (Siblings::Distinct, 701.0 / 840.0)] {
        near(&max_acceptance(&worked.p(&[]), &candidates(&worked, siblings)), bound, 1e-12);
    }
    for i in 0..40 {
        let models = Models::random(&mut Random::new(10_000 + i), 4, 1);
        for siblings in [Siblings::Independent, Siblings::Distinct] {
            let bound = max_acceptance(&models.p(&[]), &candidates(&models, siblings));
            let found = accepted(&models.tree(&[2], siblings));
            assert!(found <= bound + rounding(&models), "model {i}, {siblings:?}");
        }
    }
}

/// For each selected draft: its token, and the chain that it comes from.
type Selection = Vec<(u32, usize)>;

/// log2 in half octaves, piecewise linear, rounded down and counted from the bounds of each half octave.
fn twice_log2(p: u64) -> i32 {
    let bound = |n: i32| (2 + u128::from(n as u32 % 2)) << (n / 2);
    (0..).take_while(|&n| bound(n) <= 2 * u128::from(p)).count() as i32
}

/// The selection by its definition: at each depth, of the chains with the drafts selected so far, the one
/// whose token has the highest class; among equals the first.
fn select(models: &Models, chains: &[Vec<u32>]) -> Selection {
    let mut selected = Selection::new();
    for i in 0..models.depth() {
        let before: Vec<u32> = selected.iter().map(|&(id, _)| id).collect();
        let class = |id: u32| {
            let (p, q) = (models.p(&before).probability(id), models.distributions[i].probability(id));
            if p == 0 { 0 } else { (twice_log2(p) - twice_log2(q) + 32).clamp(0, 63) }
        };
        let mut candidates = (0..chains.len()).filter(|&chain| chains[chain][..i] == before);
        let first = candidates.next().unwrap();
        let better = |best: usize, chain: usize| {
            if class(chains[chain][i]) > class(chains[best][i]) { chain } else { best }
        };
        let winner = candidates.fold(first, better);
        selected.push((chains[winner][i], winner));
    }
    selected
}

/// The tokens of each chain of [`sample_chains`].
fn chains(tokens: &[u32], depth: usize) -> Vec<Vec<u32>> {
    tokens[1..].chunks(depth).map(<[u32]>::to_vec).collect()
}

/// The probability of each prefix of a selection, by enumerating all draws.
fn selection_probabilities(models: &Models, count: usize) -> HashMap<Selection, BigRational> {
    let mut all = HashMap::new();
    for (tokens, probability) in
        enumerate(|source| sample_chains(9, count, &models.distributions, source).unwrap().0)
    {
        let selected = select(models, &chains(&tokens, models.depth()));
        for end in 0..=selected.len() {
            *all.entry(selected[..end].to_vec()).or_insert_with(|| ratio(0, 1)) += probability.clone();
        }
    }
    all
}

/// The distribution of the next selected draft after this prefix, over all chains.
fn selected_distribution(
    all: &HashMap<Selection, BigRational>,
    vocab: usize,
    count: usize,
    prefix: &[(u32, usize)],
) -> Vec<BigRational> {
    let of = |id: u32| -> BigRational {
        let with = |chain: usize| all.get(&[prefix, &[(id, chain)]].concat()).cloned();
        (0..count).filter_map(with).sum::<BigRational>() / all[prefix].clone()
    };
    (0..vocab as u32).map(of).collect()
}

#[test]
fn worked_multi_chain_example_has_hand_computed_acceptance() {
    near(&accepted(&four().chains(2)), 79.0 / 100.0, 1e-13);
    // Two depths, distributions without context. If token 0 of the first chain is selected, the second chain
    // has it too with probability 1/10. If that of the second chain is selected, the first chain lacks it.
    let models = Models::new(4, 2, || probabilities(&[4, 3, 2, 1]), || probabilities(&[1, 2, 3, 4]));
    let all = selection_probabilities(&models, 2);
    for (prefix, expected) in [
        (&[][..], [0.19, 0.32, 0.33, 0.16]),
        (&[(0, 0)], [0.109, 0.212, 0.303, 0.376]),
        (&[(0, 1)], [0.1, 0.2, 0.3, 0.4]),
    ] {
        for (found, expected) in selected_distribution(&all, 4, 2, prefix).iter().zip(expected) {
            near(found, expected, 1e-13);
        }
    }
    near(&all[&vec![(0, 0)]], 0.1, 1e-13);
    near(&all[&vec![(0, 1)]], 0.09, 1e-13);
    // If the drafter is the target, the selection loses nothing: all drafts are accepted, as with one chain.
    let even = Models::new(2, 1, || probabilities(&[1, 1]), || probabilities(&[1, 1]));
    near(&accepted(&even.chains(2)), 1.0, 1e-13);
}

/// Rejects every draft, and records the draws.
struct RejectEvery(Vec<(DrawKey, u64, u64)>);

impl RandomSource for RejectEvery {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        self.0.push((key, s, n));
        false
    }

    fn pick(&mut self, _: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        weights.first().map(|&(id, _)| id)
    }
}

#[test]
fn the_selected_drafts_distribution_equals_the_enumerated_one() {
    let (mut compared, mut changed) = (0, 0);
    for i in 0..24 {
        let mut random = Random::new(30_000 + i);
        let (vocab, depth, count) = [(3, 2, 2), (3, 3, 2), (2, 3, 3), (4, 2, 2)][i as usize % 4];
        let row = |random: &mut Random, zeros| probabilities(&random.weights(vocab, zeros));
        let q = row(&mut random, false);
        let models = Models::new(vocab, depth, || row(&mut random, i % 8 < 4), || q.clone());
        let all = selection_probabilities(&models, count);
        let draws = enumerate(|source| sample_chains(9, count, &models.distributions, source).unwrap().0);
        for tokens in draws.keys() {
            let selected = select(&models, &chains(tokens, depth));
            let drafts: Vec<u32> = selected.iter().map(|&(id, _)| id).collect();
            let target = |row: usize| {
                Some(models.p(&chains(tokens, depth)[row.saturating_sub(1) / depth][..drafted(row, depth)]))
            };
            let mut source = RejectEvery(vec![]);
            multi_draft_block_verify(tokens, &models.distributions, target, &mut source).unwrap();
            changed += usize::from(selected.iter().any(|&(_, chain)| chain != selected[0].1));
            // The acceptance weight w of each prefix, and the common mass of the next draft's two distributions.
            let (mut weight, mut weights) = (ratio(1, 1), vec![ratio(1, 1)]);
            for (at, &draft) in drafts.iter().enumerate() {
                let distribution = selected_distribution(&all, vocab, count, &selected[..at]);
                weight = weight * ratio(models.p(&drafts[..at]).probability(draft), ONE)
                    / distribution[draft as usize].clone();
                weight = weight.min(ratio(1, 1));
                weights.push(weight.clone());
            }
            for &(key, s, n) in &source.0 {
                let (at, w) = (key.row, &weights[key.row]);
                let mut common = ratio(0, 1);
                if at < depth && *w < ratio(1, 1) {
                    let distribution = selected_distribution(&all, vocab, count, &selected[..at]);
                    let p = models.p(&drafts[..at]);
                    common = (0..vocab as u32)
                        .map(|id| (w * ratio(p.probability(id), ONE)).min(distribution[id as usize].clone()))
                        .sum();
                }
                let (s, n) = (ratio(s, ONE), ratio(n, ONE));
                // Otherwise the prefix is always accepted, and s and n do not matter.
                if s < n {
                    near(&(s - w.clone() + common.clone()), 0.0, 1e-11);
                    near(&(n - ratio(1, 1) + common), 0.0, 1e-11);
                    compared += 1;
                } else {
                    near(w, 1.0, 1e-11);
                }
            }
        }
    }
    println!("{compared} draws, {changed} selections that change chains");
    assert!(compared > 5000 && changed > 500, "{compared} {changed}");
}

/// The number of drafts on the path to a row of [`sample_chains`].
fn drafted(row: usize, depth: usize) -> usize {
    if row == 0 { 0 } else { (row - 1) % depth + 1 }
}
