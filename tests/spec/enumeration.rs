//! The verification methods emit the target's distribution. The tests enumerate all outcomes of all random
//! draws; nothing is sampled. For each known mistake a test shows that the enumeration detects it.

use crate::support::enumeration;

use dflash::checkpoint::pair::Lookup;
use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::lookup::drafts;
use dflash::spec::rng::{DrawKey, Purpose, RandomSource};
use dflash::spec::verify::{
    Siblings, block_verify, match_chain, match_tree, rejection, sample_chain, sample_chains, sample_draft,
};
use enumeration::*;
use num_rational::BigRational;
use std::collections::{HashMap, HashSet};

/// The answers of rounds that look up their drafts in the text so far, verified by `verify`: the number of
/// accepted drafts and the next token, from the drafts and the target's distribution after each number of
/// them.
fn looked_up(
    models: &Models,
    verify: impl Fn(&[u32], &dyn Fn(usize) -> Option<Distribution>, &mut Enumerator) -> (usize, u32),
) -> JointDistribution {
    enumerate(|source| {
        let mut text = vec![0, 1, 1, 0];
        let (prompt, length) = (text.len(), models.depth() + 1);
        while text.len() < prompt + length {
            let left = prompt + length - text.len();
            let drafts = drafts(Lookup { least: 1, most: 3 }, &text, 2.min(left - 1));
            let target = |row: usize| Some(models.p(&[&text[prompt..], &drafts[..row]].concat()));
            let (accepted, next) = verify(&drafts, &target, source);
            text.extend(&drafts[..accepted]);
            text.push(next);
        }
        text.split_off(prompt)
    })
}

// ---- every method emits the target's distribution ----

#[test]
fn rejection_emits_the_targets_distribution_exactly() {
    for (i, models) in models(90, 1).enumerate() {
        let distribution = models.chain(Method::Rejection);
        assert_eq!(models.distance(&distribution), ratio(0, 1), "model {i}");
        // A prefix is accepted with probability prod min(p, q).
        let mut expected = ratio(0, 1);
        for length in 1..=models.depth() {
            for tokens in sequences(models.vocab, length) {
                let shared = |i: usize| {
                    models
                        .p(&tokens[..i])
                        .probability(tokens[i])
                        .min(models.distributions[i].probability(tokens[i]))
                };
                expected += (0..length).map(|i| ratio(shared(i), ONE)).product::<BigRational>();
            }
        }
        assert_eq!(accepted(&distribution), expected, "model {i}");
    }
}

/// The mean number of drafts that block verification accepts: the sum of q w over all prefixes, w in exact
/// fractions.
fn expected_accepted(models: &Models) -> BigRational {
    let mut sum = ratio(0, 1);
    for length in 1..=models.depth() {
        for tokens in sequences(models.vocab, length) {
            let (mut w, mut q) = (ratio(1, 1), ratio(1, 1));
            for (i, &token) in tokens.iter().enumerate() {
                let sampled = ratio(models.distributions[i].probability(token), ONE);
                q *= &sampled;
                if q == ratio(0, 1) {
                    break;
                }
                w = (w * ratio(models.p(&tokens[..i]).probability(token), ONE) / sampled).min(ratio(1, 1));
            }
            sum += q * w;
        }
    }
    sum
}

#[test]
fn block_verification_emits_targets_distribution_up_to_rounding() {
    let mut worst = ratio(0, 1);
    for (i, models) in models(90, 2).enumerate() {
        let distribution = models.chain(Method::Block);
        let distance = models.distance(&distribution);
        assert!(distance <= rounding(&models), "model {i}: {}", float(&distance));
        worst = worst.max(distance);
        near(&(accepted(&distribution) - expected_accepted(&models)), 0.0, 1e-13);
        assert!(
            accepted(&distribution) + rounding(&models) >= accepted(&models.chain(Method::Rejection)),
            "model {i}"
        );
    }
    println!("largest distance {:e}", float(&worst));
}

#[test]
fn block_verification_is_exact_where_nothing_is_rounded() {
    let mut gains = 0;
    for i in 0..60 {
        let (vocab, depth) = SHAPES[i as usize % SHAPES.len()];
        let (mut p, mut q) = (Random::new(3000 + i), Random::new(4000 + i));
        let models = Models::new(vocab, depth, || p.dyadic(vocab), || q.powers(vocab));
        let distribution = models.chain(Method::Block);
        assert_eq!(models.distance(&distribution), ratio(0, 1), "model {i}");
        assert_eq!(accepted(&distribution), expected_accepted(&models), "model {i}");
        let by_token = accepted(&models.chain(Method::Rejection));
        assert!(accepted(&distribution) >= by_token, "model {i}");
        gains += u32::from(accepted(&distribution) > by_token);
    }
    assert!(gains > 10, "block verification accepts more in {gains} models only");
}

#[test]
fn every_method_verifies_deterministic_drafts_as_match_does() {
    for (i, mut models) in models(40, 5).enumerate() {
        let drafts: Vec<u32> = (0..models.depth()).map(|d| (i + d) as u32 % models.vocab as u32).collect();
        models.distributions = drafts.iter().map(|&id| one_hot(id)).collect();
        let matched = enumerate(|source| {
            let key = |row| DrawKey { purpose: Purpose::Residual, depth: row + 1, row };
            let sample = |row: usize| source.pick(key(row), models.p(&drafts[..row]).tokens());
            let (accepted, next) = match_chain(&drafts, sample).unwrap();
            [&drafts[..accepted], &[next]].concat()
        });
        assert_eq!(models.distance(&matched), ratio(0, 1));
        assert_eq!(models.chain(Method::Rejection), matched, "model {i}");
        let by_block = models.chain(Method::Block);
        assert!(models.distance(&by_block) <= rounding(&models));
        near(&(accepted(&by_block) - accepted(&matched)), 0.0, 1e-13);
    }
}

#[test]
fn drafts_that_are_looked_up_emit_the_targets_distribution() {
    for i in 0..24 {
        let models = Models::random(&mut Random::new(14_000 + i), 2 + i as usize % 2, 3);
        let certain = |drafts: &[u32]| drafts.iter().map(|id| Distribution::certain(*id)).collect::<Vec<_>>();
        let emitted = looked_up(&models, |drafts, target, source| {
            rejection(drafts, &certain(drafts), target, source).unwrap()
        });
        assert_eq!(models.distance(&emitted), ratio(0, 1), "model {i}");
        let emitted = looked_up(&models, |drafts, target, source| {
            block_verify(drafts, &certain(drafts), target, source).unwrap()
        });
        assert!(models.distance(&emitted) <= rounding(&models) * ratio(4, 1), "model {i}");
    }
}

#[test]
fn a_chain_may_end_after_a_draft_chosen_by_its_value() {
    // The draft that ends the chain is still verified, so the output stays correct.
    for (i, models) in models(40, 6).enumerate() {
        for method in [Method::Rejection, Method::Block] {
            let distribution = enumerate(|source| {
                let mut drafts = sample_chain(&models.distributions, source).unwrap();
                let last =
                    drafts.iter().zip(&models.distributions).position(|(&id, q)| q.probability(id) < ONE / 3);
                drafts.truncate(last.map_or(drafts.len(), |at| at + 1));
                models.verify_chain(method, &drafts, &models.distributions, source)
            });
            assert!(models.distance(&distribution) <= rounding(&models), "model {i}, {method:?}");
        }
    }
}

/// A drafter whose distribution depends on the drafts before it: one for every sequence of drafts.
fn walk(rng: &mut Random, models: &Models, row: fn(&mut Random, usize) -> Distribution) -> Walk {
    let before = (0..models.depth()).flat_map(|length| sequences(models.vocab, length));
    before.map(|drafts| (drafts, row(rng, models.vocab))).collect()
}
type Walk = HashMap<Vec<u32>, Distribution>;

/// The drafts of a walk and the distribution that each was sampled from.
fn walked(walk: &Walk, depth: usize, source: &mut impl RandomSource) -> (Vec<u32>, Vec<Distribution>) {
    let (mut drafts, mut distributions) = (vec![], vec![]);
    for i in 1..=depth {
        distributions.push(walk[&drafts].clone());
        drafts.push(sample_draft(i, &walk[&drafts], source).unwrap());
    }
    (drafts, distributions)
}

#[test]
fn drafts_of_a_walk_emit_the_targets_distribution() {
    for (i, models) in models(48, 9).enumerate() {
        let q = walk(&mut Random::new(i as u64), &models, Random::row);
        for method in [Method::Rejection, Method::Block] {
            let distribution = enumerate(|source| {
                let (drafts, distributions) = walked(&q, models.depth(), source);
                models.verify_chain(method, &drafts, &distributions, source)
            });
            assert!(models.distance(&distribution) <= rounding(&models), "model {i}, {method:?}");
        }
    }
}

/// Whether to draft another token may depend on the drafts before it, here by a parity of their ids, but not on the
/// token itself: see `a_draft_dropped_for_its_value_is_detected`.
#[test]
fn a_walk_may_be_cut_by_the_drafts_before_the_first_dropped_one() {
    for (i, models) in models(48, 10).enumerate() {
        let q = walk(&mut Random::new(i as u64), &models, Random::row);
        for method in [Method::Rejection, Method::Block] {
            let distribution = enumerate(|source| {
                let (mut drafts, mut distributions) = (vec![], vec![]);
                while drafts.len() < models.depth()
                    && (drafts.iter().sum::<u32>() + i as u32).is_multiple_of(2)
                {
                    distributions.push(q[&drafts].clone());
                    drafts.push(sample_draft(drafts.len() + 1, &q[&drafts], source).unwrap());
                }
                models.verify_chain(method, &drafts, &distributions, source)
            });
            assert!(models.distance(&distribution) <= rounding(&models), "model {i}, {method:?}");
        }
    }
}

const TREES: [(usize, &[usize]); 6] =
    [(3, &[2]), (4, &[3]), (2, &[2, 2]), (3, &[2, 1]), (2, &[3, 1, 1]), (3, &[1, 2])];

#[test]
fn sampled_trees_emit_the_targets_distribution() {
    let mut worst = ratio(0, 1);
    for i in 0..48 {
        let (vocab, widths) = TREES[i as usize % TREES.len()];
        let models = Models::random(&mut Random::new(7000 + i), vocab, widths.len());
        for siblings in [Siblings::Independent, Siblings::Distinct] {
            let distribution = models.tree(widths, siblings);
            let distance = models.distance(&distribution);
            // Up to three siblings: two rejections, each with a rounded residual.
            assert!(
                distance <= rounding(&models) * ratio(2, 1),
                "model {i}, {siblings:?}: {}",
                float(&distance)
            );
            worst = worst.max(distance);
        }
        // A tree that is a chain is verified as one.
        let chain: Vec<usize> = vec![1; widths.len()];
        for siblings in [Siblings::Independent, Siblings::Distinct] {
            assert_eq!(models.tree(&chain, siblings), models.chain(Method::Rejection), "model {i}");
        }
    }
    println!("largest distance {:e}", float(&worst));
}

#[test]
fn independent_siblings_may_be_verified_as_distinct_ones() {
    // A repeated token is skipped.
    for i in 0..30 {
        let (vocab, widths) = TREES[i as usize % TREES.len()];
        let models = Models::random(&mut Random::new(8000 + i), vocab, widths.len());
        let distribution = enumerate(|source| {
            let (tokens, parents) =
                sample_levels(9, widths, &models.distributions, Siblings::Independent, source).unwrap();
            models.verify_tree(&tokens, &parents, Siblings::Distinct, source)
        });
        assert!(models.distance(&distribution) <= rounding(&models) * ratio(2, 1), "model {i}");
    }
}

#[test]
fn match_emits_the_targets_distribution_for_any_fixed_tree() {
    let mut rng = Random::new(9);
    for i in 0..40 {
        let (vocab, depth) = SHAPES[i % SHAPES.len()];
        let models = Models::random(&mut rng, vocab, depth);
        // Each row's parent is any earlier row above the last depth; some paths occur twice.
        let (mut tokens, mut parents) = (vec![0u32], vec![0u32]);
        for _ in 0..rng.below(7) {
            let parent = rng.below(tokens.len());
            if path_to(&tokens, &parents, parent).len() < depth {
                tokens.push(rng.below(vocab) as u32);
                parents.push(parent as u32);
            }
        }
        let distribution = enumerate(|source| {
            let key = |row| DrawKey { purpose: Purpose::Residual, depth: 0, row };
            let sample =
                |row: usize| source.pick(key(row), models.p(&path_to(&tokens, &parents, row)).tokens());
            let (path, next) = match_tree(&tokens, &parents, sample).unwrap();
            path[1..].iter().map(|&row| tokens[row]).chain([next]).collect()
        });
        assert_eq!(models.distance(&distribution), ratio(0, 1), "tree {i}");
        // The expected number of accepted drafts is the sum of the target's probabilities of the paths.
        let nodes: HashSet<Vec<u32>> = (1..tokens.len()).map(|row| path_to(&tokens, &parents, row)).collect();
        // Of rows with the same path only the first is followed, so this holds for trees without repeats.
        if nodes.len() == tokens.len() - 1 {
            assert_eq!(
                accepted(&distribution),
                nodes.iter().map(|path| models.sequence_probability(path)).sum(),
                "tree {i}"
            );
        }
    }
}

#[test]
fn multi_draft_block_emits_the_targets_distribution() {
    let (mut worst, mut gains, mut losses) = (ratio(0, 1), 0, 0);
    for i in 0..48u64 {
        let (vocab, depth, count) =
            [(2, 2, 2), (3, 2, 2), (2, 2, 3), (2, 3, 2), (4, 1, 3), (3, 1, 3)][i as usize % 6];
        let models = Models::random(&mut Random::new(15_000 + i), vocab, depth);
        let distribution = models.chains(count);
        let distance = models.distance(&distribution);
        assert!(
            distance <= rounding(&models) * ratio(2 * count as u64, 1),
            "model {i}: {}",
            float(&distance)
        );
        worst = worst.max(distance);
        let one = models.chain(Method::Block);
        assert_eq!(models.chains(1), one, "model {i}: one chain is block verification");
        let gain = float(&(accepted(&distribution) - accepted(&one)));
        gains += u32::from(gain > 1e-9);
        losses += u32::from(gain < -1e-9);
    }
    println!("largest distance {:e}; better than one chain {gains} times, worse {losses}", float(&worst));
    assert!(gains > losses);
}

#[test]
fn chains_are_accepted_fully_if_the_drafter_is_the_target() {
    for i in 0..12 {
        let mut random = Random::new(16_000 + i);
        let (vocab, depth, count) = [(2, 2, 2), (3, 2, 2), (2, 2, 3), (4, 1, 3)][i as usize % 4];
        let row = random.row(vocab);
        let models = Models::new(vocab, depth, || row.clone(), || row.clone());
        let missing = ratio(depth as u64, 1) - accepted(&models.chains(count));
        assert!(missing <= rounding(&models) * ratio(2 * count as u64, 1), "model {i}: {}", float(&missing));
    }
}

// ---- known mistakes are detected ----

/// The largest distance from the target's distribution among 30 models of three tokens and two drafts,
/// without zeros.
fn worst(mut distribution: impl FnMut(&Models) -> JointDistribution) -> f64 {
    let one = |i: u64| {
        let mut rng = Random::new(11_000 + i);
        let mut row = || probabilities(&rng.weights(3, false));
        let distributions = [row(), row()].into_iter();
        let mut distributions = distributions.cycle();
        let models = Models::new(3, 2, row, || distributions.next().unwrap());
        float(&models.distance(&distribution(&models)))
    };
    (0..30).map(one).fold(0.0, f64::max)
}

#[test]
fn a_distribution_the_drafts_were_not_sampled_from_is_detected() {
    // Sampled from the best two tokens, verified as if from all three.
    let filtered = |distribution: &Distribution| {
        let rarest = distribution.tokens().iter().rev().min_by_key(|t| t.1).unwrap().0;
        distribution.without(rarest).unwrap()
    };
    for method in [Method::Rejection, Method::Block] {
        let distance = worst(|models| {
            let sampled = Models {
                distributions: models.distributions.iter().map(filtered).collect(),
                ..models.clone()
            };
            sampled.chain_with(method, &models.distributions)
        });
        println!("{method:?}: {distance:.3}");
        assert!((0.15..0.45).contains(&distance), "{method:?}: {distance}");
    }
    // The opposite, drafts sampled from all three and verified as if from two, is exact under rejection: drafts
    // outside the claimed distribution are rejected, and the others follow it.
    let other = worst(|models| {
        let claimed: Vec<_> = models.distributions.iter().map(filtered).collect();
        models.chain_with(Method::Rejection, &claimed)
    });
    assert!(other < 1e-13, "{other}");
}

/// The distributions along another sequence of drafts, such as the best ones, are not those of a walk.
#[test]
fn a_walk_verified_by_distributions_along_other_drafts_is_detected() {
    for method in [Method::Rejection, Method::Block] {
        let mut seed = 0;
        let distance = worst(|models| {
            seed += 1;
            let q =
                walk(&mut Random::new(seed), models, |rng, vocab| probabilities(&rng.weights(vocab, false)));
            let claimed: Vec<Distribution> = (0..models.depth()).map(|i| q[&vec![0; i]].clone()).collect();
            enumerate(|source| {
                let (drafts, _) = walked(&q, models.depth(), source);
                models.verify_chain(method, &drafts, &claimed, source)
            })
        });
        println!("{method:?}: {distance:.3}");
        assert!(distance > 0.05, "{method:?}: {distance}");
    }
}

#[test]
fn a_draft_dropped_for_its_value_is_detected() {
    for method in [Method::Rejection, Method::Block] {
        let distance = worst(|models| {
            enumerate(|source| {
                let mut drafts = sample_chain(&models.distributions, source).unwrap();
                let kept = drafts
                    .iter()
                    .zip(&models.distributions)
                    .take_while(|(id, q)| q.probability(**id) >= ONE / 3);
                drafts.truncate(kept.count());
                models.verify_chain(method, &drafts, &models.distributions, source)
            })
        });
        println!("{method:?}: {distance:.3}");
        assert!((0.1..0.4).contains(&distance), "{method:?}: {distance}");
    }
}

#[test]
fn a_greedy_draft_verified_as_a_sampled_one_is_detected() {
    let best =
        |distribution: &Distribution| distribution.tokens().iter().rev().max_by_key(|t| t.1).unwrap().0;
    let mut max = 0f64;
    for i in 0..60 {
        let models = Models::random(&mut Random::new(12_000 + i), 3, 2);
        let drafts: Vec<u32> = models.distributions.iter().map(best).collect();
        let distribution = enumerate(|source| {
            models.verify_chain(Method::Rejection, &drafts, &models.distributions, source)
        });
        max = max.max(float(&models.distance(&distribution)));
    }
    println!("{max:.3}");
    assert!(max > 0.5, "{max}");
}

/// Drafts that are looked up are certain: they are accepted with probability p, and another token follows a
/// rejected one.
#[test]
fn a_draft_that_is_looked_up_and_comes_again_after_its_rejection_is_detected() {
    let key = |row| DrawKey { purpose: Purpose::Residual, depth: row + 1, row };
    let again = worst(|models| {
        looked_up(models, |drafts, target, source| {
            let p = |row| target(row).unwrap();
            let rejected = |row: &usize| !source.accept(key(*row), p(*row).probability(drafts[*row]), ONE);
            let accepted = (0..drafts.len()).find(rejected).unwrap_or(drafts.len());
            (accepted, source.pick(key(accepted), p(accepted).tokens()).unwrap())
        })
    });
    let sampled = worst(|models| {
        let uniform = [probabilities(&[1; 3]), probabilities(&[1; 3])];
        looked_up(models, |drafts, target, source| rejection(drafts, &uniform, target, source).unwrap())
    });
    println!("{again:.3} with the rejected draft again, {sampled:.3} as if sampled");
    assert!(again > 0.1 && sampled > 0.1, "{again} {sampled}");
}

#[test]
fn rejection_residual_after_block_verification_is_detected() {
    // Block verification decides, then the next token comes from the residual of rejection.
    let distance = worst(|models| {
        enumerate(|source| {
            let drafts = sample_chain(&models.distributions, source).unwrap();
            let mut source = RejectionResidual { source, models, drafts: &drafts };
            models.verify_chain(Method::Block, &drafts, &models.distributions, &mut source)
        })
    });
    println!("{distance:.4}");
    assert!((0.003..0.03).contains(&distance), "{distance}");
}

/// Picks the token after a rejected draft from `max(p - q, 0)`.
struct RejectionResidual<'a> {
    source: &'a mut Enumerator,
    models: &'a Models,
    drafts: &'a [u32],
}

impl RandomSource for RejectionResidual<'_> {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        self.source.accept(key, s, n)
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let Some(q) = self.models.distributions.get(key.row) else { return self.source.pick(key, weights) };
        let p = self.models.p(&self.drafts[..key.row]);
        let over =
            p.tokens().iter().map(|&(id, p)| (id, p.saturating_sub(q.probability(id)))).filter(|t| t.1 > 0);
        let over: Vec<(u32, u64)> = over.collect();
        self.source.pick(key, if over.is_empty() { p.tokens() } else { &over })
    }
}

#[test]
fn siblings_not_verified_in_sampling_order_are_detected() {
    let mut max = 0f64;
    for i in 0..25 {
        let mut rng = Random::new(13_000 + i);
        let (p, q) = (probabilities(&rng.weights(4, true)), probabilities(&rng.weights(4, false)));
        let models = Models::new(4, 1, || p.clone(), || q.clone());
        let distribution = enumerate(|source| {
            let (mut tokens, parents) =
                sample_levels(9, &[2], &models.distributions, Siblings::Distinct, source).unwrap();
            tokens[1..].sort_by_key(|&id| std::cmp::Reverse(q.probability(id)));
            models.verify_tree(&tokens, &parents, Siblings::Distinct, source)
        });
        max = max.max(float(&models.distance(&distribution)));
    }
    println!("{max:.3}");
    assert!((0.15..0.45).contains(&max), "{max}");
}

#[test]
fn a_chain_dropped_for_its_value_is_detected() {
    let distance = worst(|models| {
        enumerate(|source| {
            let (tokens, parents) = sample_chains(9, 2, &models.distributions, source).unwrap();
            // Both are verified only if the first is the less probable one.
            let q = |token: u32| models.distributions[0].probability(token);
            let kept = if q(tokens[1]) < q(tokens[3]) { 5 } else { 3 };
            models.verify_chains(&tokens[..kept], &parents[..kept], source)
        })
    });
    println!("{distance:.3}");
    assert!(distance > 0.02, "{distance}");
}

#[test]
fn chains_chosen_in_another_order_than_sampled_are_detected() {
    // Chains are sorted by their tokens, so among chains of equal class the selected one is not always the one
    // sampled first.
    let distance = worst(|models| {
        enumerate(|source| {
            let (tokens, parents) = sample_chains(9, 2, &models.distributions, source).unwrap();
            let mut chains: Vec<&[u32]> = tokens[1..].chunks(models.depth()).collect();
            chains.sort();
            let tokens = [&tokens[..1], &chains.concat()].concat();
            models.verify_chains(&tokens, &parents, source)
        })
    });
    println!("{distance:.3}");
    assert!(distance > 0.02, "{distance}");
}
