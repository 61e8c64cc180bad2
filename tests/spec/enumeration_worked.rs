//! The rules that judge drafts, held against numbers that were worked out by hand, published or bounded by theory, by
//! enumeration; and the distributions of rows that they judge by.

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

/// Lets every draft fall, and keeps what it was asked.
#[derive(Default)]
struct Falls {
    chances: Vec<(u64, u64)>,
    weights: Vec<(u32, u64)>,
}

impl RandomSource for Falls {
    fn accept(&mut self, _: DrawKey, s: u64, n: u64) -> bool {
        self.chances.push((s, n));
        s >= n
    }

    fn pick(&mut self, _: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.weights = weights.to_vec();
        weights.first().map(|&(id, _)| id)
    }
}

#[test]
fn chances_and_what_is_left_are_the_worked_examples() {
    let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
    let p = sampling.probabilities(&[1.0, 0.25, -0.5, -3.0]).unwrap();
    let q = sampling.probabilities(&[0.0, 1.0, -0.5, -1.0]).unwrap();
    for (draft, stands) in [(0, None), (1, Some(0.4758225)), (2, None), (3, Some(0.1363248))] {
        let mut coin = Falls::default();
        let (accepted, _) =
            rejection(&[draft], std::slice::from_ref(&q), |_| Some(p.clone()), &mut coin).unwrap();
        let (s, n) = coin.chances[0];
        assert_eq!((accepted, s >= n), (usize::from(stands.is_none()), stands.is_none()), "{draft}");
        if let Some(stands) = stands {
            assert!((s as f64 / n as f64 - stands).abs() < 1e-7, "{draft}: {s} of {n}");
            assert_eq!(coin.weights, [(0, 104257175306647), (2, 266038055173)]);
        }
    }
}

#[test]
fn probabilities_add_up_and_are_the_weights_shares_whatever_those_are() {
    let mut rng = Random::new(1);
    for round in 0..3000 {
        let count = 1 + rng.below(if round % 10 == 0 { 3000 } else { 9 });
        // Up to 2^64 in all.
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
    // The ends: one token; a sum of 2^64 - 1; all of 2^26 tokens as good as the best.
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
fn what_rounding_leaves_over_is_the_best_tokens_and_the_lowest_of_several() {
    let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
    let distribution = sampling.probabilities(&[0.0, 2.0, 2.0, 2.0]).unwrap();
    assert!(
        distribution.probability(1) > distribution.probability(2)
            && distribution.probability(2) == distribution.probability(3)
    );
    // So near the best that it weighs as much: the logit decides.
    let distribution = sampling.probabilities(&[1.0, 1.000_001, 1.0]).unwrap();
    assert!(
        distribution.probability(1) > distribution.probability(0)
            && distribution.probability(0) == distribution.probability(2)
    );
    // Of what is left of a distribution, the heaviest.
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

/// p() = (1/4, 1/2, 1/4), p(0) = (3/4, 0, 1/4), p(1) = (1/4, 3/4, 0), p(2) = (0, 1/2, 1/2), then uniform; q1 = (1/2,
/// 1/4, 1/4), q2 = (1/2, 1/2, 0).
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
fn chains_of_the_worked_example_are_accepted_as_computed_by_hand() {
    let models = worked();
    // Drafts; probabilities of 0, 1, 2 accepted by token and by block.
    let paths = [
        ([0, 0], [(1, 2), (0, 1), (1, 2)], [(1, 5), (1, 20), (3, 4)]),
        ([0, 1], [(1, 2), (1, 2), (0, 1)], [(4, 5), (1, 5), (0, 1)]),
        ([1, 0], [(0, 1), (1, 2), (1, 2)], [(0, 1), (1, 2), (1, 2)]),
        ([1, 1], [(0, 1), (0, 1), (1, 1)], [(0, 1), (0, 1), (1, 1)]),
        ([2, 0], [(0, 1), (1, 1), (0, 1)], [(0, 1), (1, 1), (0, 1)]),
        ([2, 1], [(0, 1), (0, 1), (1, 1)], [(0, 1), (0, 1), (1, 1)]),
    ];
    for (drafts, by_token, by_block) in paths {
        for (rule, expected) in [(Rule::Rejection, by_token), (Rule::Block, by_block)] {
            let distribution = enumerate(|coin| models.judged(rule, &drafts, &models.distributions, coin));
            for (accepted, (a, b)) in expected.into_iter().enumerate() {
                let found: BigRational = distribution
                    .iter()
                    .filter(|(tokens, _)| tokens.len() == accepted + 1)
                    .map(|(_, p)| p)
                    .sum();
                assert_eq!(found, ratio(a, b), "{rule:?}, {drafts:?}, {accepted} accepted");
            }
            // Where the first falls, 1 follows; where a block of one is kept of (0, .), 2 does.
            for tokens in distribution.keys() {
                assert!(tokens.len() != 1 || tokens[..] == [1], "{rule:?}: {tokens:?}");
                assert!(rule != Rule::Block || tokens.len() != 2 || drafts[0] != 0 || tokens[1] == 2);
            }
        }
    }
    for (rule, mean) in [(Rule::Rejection, ratio(19, 16)), (Rule::Block, ratio(5, 4))] {
        let distribution = models.chain(rule);
        assert_eq!((accepted(&distribution), models.distance(&distribution)), (mean, ratio(0, 1)));
    }
}

#[test]
fn the_published_toy_accepts_what_was_published() {
    // Sun et al.: p = (1/3, 2/3), q = (2/3, 1/3), two drafts.
    let models = Models::new(2, 2, || probabilities(&[1, 2]), || probabilities(&[2, 1]));
    near(&accepted(&models.chain(Rule::Rejection)), 10.0 / 9.0, 1e-13);
    near(&accepted(&models.chain(Rule::Block)), 11.0 / 9.0, 1e-13);
}

fn four() -> Models {
    Models::new(4, 1, || probabilities(&[4, 3, 2, 1]), || probabilities(&[1, 2, 3, 4]))
}

#[test]
fn siblings_of_the_worked_example_are_accepted_as_computed_by_hand() {
    let models = four();
    // Draws; then (accepted token: probability) and (residual token: probability).
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
    for (draws, siblings, stand, fall) in cases {
        let distribution =
            enumerate(|coin| models.judged_tree(&[9, draws[0], draws[1]], &[0; 3], siblings, coin));
        for id in 0..4 {
            let sum = |cells: Cells| cells.iter().filter(|cell| cell.0 == id).map(|cell| cell.1).sum::<f64>();
            let of = |keep: &dyn Fn(&[u32]) -> bool| -> BigRational {
                distribution
                    .iter()
                    .filter(|(tokens, _)| tokens[0] == id && keep(tokens))
                    .map(|(_, p)| p)
                    .sum()
            };
            near(&of(&|tokens| tokens.len() == 2), sum(stand), 1e-13);
            near(&of(&|tokens| tokens.len() == 1), sum(fall), 1e-13);
        }
    }
    near(&accepted(&models.tree(&[1], Siblings::Distinct)), 3.0 / 5.0, 1e-13);
    near(&accepted(&models.tree(&[2], Siblings::Independent)), 18.0 / 25.0, 1e-13);
    near(&accepted(&models.tree(&[2], Siblings::Distinct)), 107.0 / 140.0, 1e-13);
}

/// The most that any lossless rule accepts of candidates that are drawn so: the least, over sets of tokens, of the set's
/// probability and the chance that some candidate is outside.
fn most(p: &Distribution, drawn: &JointDistribution) -> BigRational {
    let sets = (0..1u32 << 4).map(|set| {
        let inside = |id: u32| set >> id & 1 == 1;
        let mass = p.tokens().iter().filter(|t| inside(t.0)).map(|t| ratio(t.1, ONE)).sum::<BigRational>();
        let within = drawn.iter().filter(|(ids, _)| ids.iter().all(|&id| inside(id)));
        mass + ratio(1, 1) - within.map(|(_, p)| p).sum::<BigRational>()
    });
    sets.min().unwrap()
}

#[test]
fn siblings_accept_no_more_than_optimal_transport_does() {
    let candidates = |models: &Models, siblings| {
        enumerate(|coin| draw_tree(9, &[2], &models.distributions, siblings, coin).unwrap().0.split_off(1))
    };
    let worked = four();
    for (siblings, bound) in [(Siblings::Independent, 79.0 / 100.0), (Siblings::Distinct, 701.0 / 840.0)] {
        near(&most(&worked.p(&[]), &candidates(&worked, siblings)), bound, 1e-12);
    }
    for i in 0..40 {
        let models = Models::random(&mut Random::new(10_000 + i), 4, 1);
        for siblings in [Siblings::Independent, Siblings::Distinct] {
            let bound = most(&models.p(&[]), &candidates(&models, siblings));
            let found = accepted(&models.tree(&[2], siblings));
            assert!(found <= bound + rounding(&models), "model {i}, {siblings:?}");
        }
    }
}

/// Of each draft of the chain that is chosen, which it is and which chain has it.
type Chosen = Vec<(u32, usize)>;

/// Halves of an octave, piecewise linear, by their bounds.
fn halves(p: u64) -> i32 {
    let bound = |n: i32| (2 + u128::from(n as u32 % 2)) << (n / 2);
    (0..).take_while(|&n| bound(n) <= 2 * u128::from(p)).count() as i32
}

/// The choice by its definition: of the chains that have had the drafts so far the one of the highest class, of several
/// the first.
fn choose(models: &Models, chains: &[Vec<u32>]) -> Chosen {
    let mut chosen = Chosen::new();
    for i in 0..models.depth() {
        let before: Vec<u32> = chosen.iter().map(|&(id, _)| id).collect();
        let class = |id: u32| {
            let (p, q) = (models.p(&before).probability(id), models.distributions[i].probability(id));
            if p == 0 { 0 } else { (halves(p) - halves(q) + 32).clamp(0, 63) }
        };
        let mut running = (0..chains.len()).filter(|&chain| chains[chain][..i] == before);
        let first = running.next().unwrap();
        let better = |best: usize, chain: usize| {
            if class(chains[chain][i]) > class(chains[best][i]) { chain } else { best }
        };
        let winner = running.fold(first, better);
        chosen.push((chains[winner][i], winner));
    }
    chosen
}

/// Chains of [`sample_chains`], each its tokens.
fn chains(tokens: &[u32], depth: usize) -> Vec<Vec<u32>> {
    tokens[1..].chunks(depth).map(<[u32]>::to_vec).collect()
}

/// How likely each beginning of a choice is, by all draws there are.
fn choices(models: &Models, count: usize) -> HashMap<Chosen, BigRational> {
    let mut all = HashMap::new();
    for (tokens, likely) in enumerate(|coin| sample_chains(9, count, &models.distributions, coin).unwrap().0)
    {
        let chosen = choose(models, &chains(&tokens, models.depth()));
        for end in 0..=chosen.len() {
            *all.entry(chosen[..end].to_vec()).or_insert_with(|| ratio(0, 1)) += likely.clone();
        }
    }
    all
}

/// The distribution of the next draft of a choice that began so, whichever chain has it.
fn chosen_law(
    all: &HashMap<Chosen, BigRational>,
    vocab: usize,
    count: usize,
    begun: &[(u32, usize)],
) -> Vec<BigRational> {
    let of = |id: u32| -> BigRational {
        let with = |chain: usize| all.get(&[begun, &[(id, chain)]].concat()).cloned();
        (0..count).filter_map(with).sum::<BigRational>() / all[begun].clone()
    };
    (0..vocab as u32).map(of).collect()
}

#[test]
fn the_best_of_several_chains_accepts_what_was_computed_by_hand() {
    near(&accepted(&four().best(2)), 79.0 / 100.0, 1e-13);
    // Two depths, context-free. After token 0 of the first chain, the other one had it too in one of ten cases; of the
    // second chain, the first did not.
    let models = Models::new(4, 2, || probabilities(&[4, 3, 2, 1]), || probabilities(&[1, 2, 3, 4]));
    let all = choices(&models, 2);
    for (begun, expected) in [
        (&[][..], [0.19, 0.32, 0.33, 0.16]),
        (&[(0, 0)], [0.109, 0.212, 0.303, 0.376]),
        (&[(0, 1)], [0.1, 0.2, 0.3, 0.4]),
    ] {
        for (found, expected) in chosen_law(&all, 4, 2, begun).iter().zip(expected) {
            near(found, expected, 1e-13);
        }
    }
    near(&all[&vec![(0, 0)]], 0.1, 1e-13);
    near(&all[&vec![(0, 1)]], 0.09, 1e-13);
    // Where the drafter is the target, a choice of chains bends nothing: all of it stands, as of one.
    let even = Models::new(2, 1, || probabilities(&[1, 1]), || probabilities(&[1, 1]));
    near(&accepted(&even.best(2)), 1.0, 1e-13);
}

/// Lets no draft stand, and keeps what its chances were.
struct Refusing(Vec<(DrawKey, u64, u64)>);

impl RandomSource for Refusing {
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool {
        self.0.push((word, s, n));
        false
    }

    fn pick(&mut self, _: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        weights.first().map(|&(id, _)| id)
    }
}

#[test]
fn the_law_of_a_choice_is_what_all_draws_of_it_say() {
    let (mut compared, mut parted) = (0, 0);
    for i in 0..24 {
        let mut random = Random::new(30_000 + i);
        let (vocab, depth, count) = [(3, 2, 2), (3, 3, 2), (2, 3, 3), (4, 2, 2)][i as usize % 4];
        let row = |random: &mut Random, zeros| probabilities(&random.weights(vocab, zeros));
        let q = row(&mut random, false);
        let models = Models::new(vocab, depth, || row(&mut random, i % 8 < 4), || q.clone());
        let all = choices(&models, count);
        let draws = enumerate(|coin| sample_chains(9, count, &models.distributions, coin).unwrap().0);
        for tokens in draws.keys() {
            let chosen = choose(&models, &chains(tokens, depth));
            let drafts: Vec<u32> = chosen.iter().map(|&(id, _)| id).collect();
            let target = |row: usize| {
                Some(models.p(&chains(tokens, depth)[row.saturating_sub(1) / depth][..drafted(row, depth)]))
            };
            let mut coin = Refusing(vec![]);
            multi_draft_block_verify(tokens, &models.distributions, target, &mut coin).unwrap();
            parted += usize::from(chosen.iter().any(|&(_, chain)| chain != chosen[0].1));
            // The share of each beginning, and what the next draft's two distributions have in common.
            let (mut share, mut shares) = (ratio(1, 1), vec![ratio(1, 1)]);
            for (at, &draft) in drafts.iter().enumerate() {
                let distribution = chosen_law(&all, vocab, count, &chosen[..at]);
                share = share * ratio(models.p(&drafts[..at]).probability(draft), ONE)
                    / distribution[draft as usize].clone();
                share = share.min(ratio(1, 1));
                shares.push(share.clone());
            }
            for &(word, s, n) in &coin.0 {
                let (at, w) = (word.row, &shares[word.row]);
                let mut common = ratio(0, 1);
                if at < depth && *w < ratio(1, 1) {
                    let distribution = chosen_law(&all, vocab, count, &chosen[..at]);
                    let p = models.p(&drafts[..at]);
                    common = (0..vocab as u32)
                        .map(|id| (w * ratio(p.probability(id), ONE)).min(distribution[id as usize].clone()))
                        .sum();
                }
                let (s, n) = (ratio(s, ONE), ratio(n, ONE));
                // All of it stands in any case, and what of it is said does not matter.
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
    println!("{compared} chances, {parted} choices that went from one chain to another");
    assert!(compared > 5000 && parted > 500, "{compared} {parted}");
}

/// Drafts on the way to a row of [`sample_chains`].
fn drafted(row: usize, depth: usize) -> usize {
    if row == 0 { 0 } else { (row - 1) % depth + 1 }
}
