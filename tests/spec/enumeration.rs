//! The rules that judge drafts emit the target's distribution, by enumeration: no sampling. Each known mistake has a test that the
//! enumeration catches it.

use crate::support::enumeration;

use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::rng::{DrawKey, Purpose, RandomSource};
use dflash::spec::verify::{Siblings, match_chain, match_tree, sample_chain, sample_chains};
use enumeration::*;
use num_rational::BigRational;
use std::collections::HashSet;

// ---- every rule emits the target's distribution ----

#[test]
fn token_by_token_emits_the_targets_law_exactly() {
    for (i, models) in models(90, 1).enumerate() {
        let distribution = models.chain(Rule::Rejection);
        assert_eq!(models.distance(&distribution), ratio(0, 1), "model {i}");
        // A prefix is accepted with the product of what both distributions share.
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

/// What block verification accepts on average: the sum of q w over all prefixes, w in exact fractions.
fn shares(models: &Models) -> BigRational {
    let mut sum = ratio(0, 1);
    for length in 1..=models.depth() {
        for tokens in sequences(models.vocab, length) {
            let (mut w, mut q) = (ratio(1, 1), ratio(1, 1));
            for (i, &token) in tokens.iter().enumerate() {
                let drawn = ratio(models.distributions[i].probability(token), ONE);
                q *= &drawn;
                if q == ratio(0, 1) {
                    break;
                }
                w = (w * ratio(models.p(&tokens[..i]).probability(token), ONE) / drawn).min(ratio(1, 1));
            }
            sum += q * w;
        }
    }
    sum
}

#[test]
fn block_verification_emits_the_targets_law_up_to_rounding_and_accepts_no_fewer() {
    let mut worst = ratio(0, 1);
    for (i, models) in models(90, 2).enumerate() {
        let distribution = models.chain(Rule::Block);
        let distance = models.distance(&distribution);
        assert!(distance <= rounding(&models), "model {i}: {}", float(&distance));
        worst = worst.max(distance);
        near(&(accepted(&distribution) - shares(&models)), 0.0, 1e-13);
        assert!(
            accepted(&distribution) + rounding(&models) >= accepted(&models.chain(Rule::Rejection)),
            "model {i}"
        );
    }
    println!("largest distance {:e}", float(&worst));
}

#[test]
fn block_verification_emits_the_targets_law_exactly_where_nothing_is_rounded() {
    let mut gains = 0;
    for i in 0..60 {
        let (vocab, depth) = SHAPES[i as usize % SHAPES.len()];
        let (mut p, mut q) = (Random::new(3000 + i), Random::new(4000 + i));
        let models = Models::new(vocab, depth, || p.dyadic(vocab), || q.powers(vocab));
        let distribution = models.chain(Rule::Block);
        assert_eq!(models.distance(&distribution), ratio(0, 1), "model {i}");
        assert_eq!(accepted(&distribution), shares(&models), "model {i}");
        let by_token = accepted(&models.chain(Rule::Rejection));
        assert!(accepted(&distribution) >= by_token, "model {i}");
        gains += u32::from(accepted(&distribution) > by_token);
    }
    assert!(gains > 10, "block verification is a rule of its own: {gains}");
}

#[test]
fn drafts_that_were_not_drawn_are_judged_as_by_match_whatever_the_rule() {
    for (i, mut models) in models(40, 5).enumerate() {
        let drafts: Vec<u32> = (0..models.depth()).map(|d| (i + d) as u32 % models.vocab as u32).collect();
        models.distributions = drafts.iter().map(|&id| one_hot(id)).collect();
        let matched = enumerate(|coin| {
            let word = |row| DrawKey { purpose: Purpose::Residual, depth: row + 1, row };
            let sample = |row: usize| coin.pick(word(row), models.p(&drafts[..row]).tokens());
            let (accepted, next) = match_chain(&drafts, sample).unwrap();
            [&drafts[..accepted], &[next]].concat()
        });
        assert_eq!(models.distance(&matched), ratio(0, 1));
        assert_eq!(models.chain(Rule::Rejection), matched, "model {i}");
        let by_block = models.chain(Rule::Block);
        assert!(models.distance(&by_block) <= rounding(&models));
        near(&(accepted(&by_block) - accepted(&matched)), 0.0, 1e-13);
    }
}

#[test]
fn a_chain_may_end_after_a_draft_for_what_that_is() {
    for (i, models) in models(40, 6).enumerate() {
        for rule in [Rule::Rejection, Rule::Block] {
            let distribution = enumerate(|coin| {
                let mut drafts = sample_chain(&models.distributions, coin).unwrap();
                let last =
                    drafts.iter().zip(&models.distributions).position(|(&id, q)| q.probability(id) < ONE / 3);
                drafts.truncate(last.map_or(drafts.len(), |at| at + 1));
                models.judged(rule, &drafts, &models.distributions, coin)
            });
            assert!(models.distance(&distribution) <= rounding(&models), "model {i}, {rule:?}");
        }
    }
}

const TREES: [(usize, &[usize]); 6] =
    [(3, &[2]), (4, &[3]), (2, &[2, 2]), (3, &[2, 1]), (2, &[3, 1, 1]), (3, &[1, 2])];

#[test]
fn trees_of_drawn_drafts_emit_the_targets_law() {
    let mut worst = ratio(0, 1);
    for i in 0..48 {
        let (vocab, widths) = TREES[i as usize % TREES.len()];
        let models = Models::random(&mut Random::new(7000 + i), vocab, widths.len());
        for siblings in [Siblings::Independent, Siblings::Distinct] {
            let distribution = models.tree(widths, siblings);
            let distance = models.distance(&distribution);
            // Of up to three siblings, two leave a rounded distribution.
            assert!(
                distance <= rounding(&models) * ratio(2, 1),
                "model {i}, {siblings:?}: {}",
                float(&distance)
            );
            worst = worst.max(distance);
        }
        // A tree that is a chain is judged as one.
        let chain: Vec<usize> = vec![1; widths.len()];
        for siblings in [Siblings::Independent, Siblings::Distinct] {
            assert_eq!(models.tree(&chain, siblings), models.chain(Rule::Rejection), "model {i}");
        }
    }
    println!("largest distance {:e}", float(&worst));
}

#[test]
fn independent_draws_may_be_judged_as_distinct_ones() {
    // A token seen before is passed over.
    for i in 0..30 {
        let (vocab, widths) = TREES[i as usize % TREES.len()];
        let models = Models::random(&mut Random::new(8000 + i), vocab, widths.len());
        let distribution = enumerate(|coin| {
            let (tokens, parents) =
                draw_tree(9, widths, &models.distributions, Siblings::Independent, coin).unwrap();
            models.judged_tree(&tokens, &parents, Siblings::Distinct, coin)
        });
        assert!(models.distance(&distribution) <= rounding(&models) * ratio(2, 1), "model {i}");
    }
}

#[test]
fn match_emits_the_targets_law_on_any_fixed_tree() {
    let mut rng = Random::new(9);
    for i in 0..40 {
        let (vocab, depth) = SHAPES[i % SHAPES.len()];
        let models = Models::random(&mut rng, vocab, depth);
        // Rows hang from any earlier one that leaves room below; some stand twice.
        let (mut tokens, mut parents) = (vec![0u32], vec![0u32]);
        for _ in 0..rng.below(7) {
            let parent = rng.below(tokens.len());
            if way(&tokens, &parents, parent).len() < depth {
                tokens.push(rng.below(vocab) as u32);
                parents.push(parent as u32);
            }
        }
        let distribution = enumerate(|coin| {
            let word = |row| DrawKey { purpose: Purpose::Residual, depth: 0, row };
            let sample = |row: usize| coin.pick(word(row), models.p(&way(&tokens, &parents, row)).tokens());
            let (path, next) = match_tree(&tokens, &parents, sample).unwrap();
            path[1..].iter().map(|&row| tokens[row]).chain([next]).collect()
        });
        assert_eq!(models.distance(&distribution), ratio(0, 1), "tree {i}");
        // It accepts what the target's distribution has of the tree.
        let nodes: HashSet<Vec<u32>> = (1..tokens.len()).map(|row| way(&tokens, &parents, row)).collect();
        // Of rows that stand twice the first has the way on, so only trees without such accept it all.
        if nodes.len() == tokens.len() - 1 {
            assert_eq!(accepted(&distribution), nodes.iter().map(|way| models.plain(way)).sum(), "tree {i}");
        }
    }
}

#[test]
fn the_best_of_several_chains_emits_the_targets_law() {
    let (mut worst, mut gains, mut losses) = (ratio(0, 1), 0, 0);
    for i in 0..48u64 {
        let (vocab, depth, count) =
            [(2, 2, 2), (3, 2, 2), (2, 2, 3), (2, 3, 2), (4, 1, 3), (3, 1, 3)][i as usize % 6];
        let models = Models::random(&mut Random::new(15_000 + i), vocab, depth);
        let distribution = models.best(count);
        let distance = models.distance(&distribution);
        assert!(
            distance <= rounding(&models) * ratio(2 * count as u64, 1),
            "model {i}: {}",
            float(&distance)
        );
        worst = worst.max(distance);
        let one = models.chain(Rule::Block);
        assert_eq!(models.best(1), one, "model {i}: the best of one is that one");
        let gain = float(&(accepted(&distribution) - accepted(&one)));
        gains += u32::from(gain > 1e-9);
        losses += u32::from(gain < -1e-9);
    }
    println!("largest distance {:e}; better than one chain {gains} times, worse {losses}", float(&worst));
    assert!(gains > losses);
}

#[test]
fn where_the_drafter_is_the_target_several_chains_stand_as_one_does() {
    for i in 0..12 {
        let mut random = Random::new(16_000 + i);
        let (vocab, depth, count) = [(2, 2, 2), (3, 2, 2), (2, 2, 3), (4, 1, 3)][i as usize % 4];
        let row = random.row(vocab);
        let models = Models::new(vocab, depth, || row.clone(), || row.clone());
        let missing = ratio(depth as u64, 1) - accepted(&models.best(count));
        assert!(missing <= rounding(&models) * ratio(2 * count as u64, 1), "model {i}: {}", float(&missing));
    }
}

// ---- known mistakes are caught ----

/// The largest distance from the target's distribution among 30 models of three tokens and two drafts, without zeros.
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
fn a_law_that_the_drafts_were_not_drawn_from_is_caught() {
    // Drawn from the best two tokens, judged as if from all three.
    let filtered = |distribution: &Distribution| {
        let least = distribution.tokens().iter().rev().min_by_key(|t| t.1).unwrap().0;
        distribution.without(least).unwrap()
    };
    for rule in [Rule::Rejection, Rule::Block] {
        let distance = worst(|models| {
            let drawn = Models {
                distributions: models.distributions.iter().map(filtered).collect(),
                ..models.clone()
            };
            drawn.chain_with(rule, &models.distributions)
        });
        println!("{rule:?}: {distance:.3}");
        assert!((0.15..0.45).contains(&distance), "{rule:?}: {distance}");
    }
    // The other way round nothing is lost under rejection: what the filter leaves is drawn by its distribution, and what it does
    // not leave is passed over.
    let other = worst(|models| {
        let claimed: Vec<_> = models.distributions.iter().map(filtered).collect();
        models.chain_with(Rule::Rejection, &claimed)
    });
    assert!(other < 1e-13, "{other}");
}

#[test]
fn a_draft_dropped_for_what_it_is_is_caught() {
    for rule in [Rule::Rejection, Rule::Block] {
        let distance = worst(|models| {
            enumerate(|coin| {
                let mut drafts = sample_chain(&models.distributions, coin).unwrap();
                let kept = drafts
                    .iter()
                    .zip(&models.distributions)
                    .take_while(|(id, q)| q.probability(**id) >= ONE / 3);
                drafts.truncate(kept.count());
                models.judged(rule, &drafts, &models.distributions, coin)
            })
        });
        println!("{rule:?}: {distance:.3}");
        assert!((0.1..0.4).contains(&distance), "{rule:?}: {distance}");
    }
}

#[test]
fn the_drafters_best_token_judged_by_its_probability_is_caught() {
    let best =
        |distribution: &Distribution| distribution.tokens().iter().rev().max_by_key(|t| t.1).unwrap().0;
    let mut most = 0f64;
    for i in 0..60 {
        let models = Models::random(&mut Random::new(12_000 + i), 3, 2);
        let drafts: Vec<u32> = models.distributions.iter().map(best).collect();
        let distribution =
            enumerate(|coin| models.judged(Rule::Rejection, &drafts, &models.distributions, coin));
        most = most.max(float(&models.distance(&distribution)));
    }
    println!("{most:.3}");
    assert!(most > 0.5, "{most}");
}

#[test]
fn a_residual_without_its_share_is_caught() {
    // Block verification's own decision, and then the residual of rejection.
    let distance = worst(|models| {
        enumerate(|coin| {
            let drafts = sample_chain(&models.distributions, coin).unwrap();
            let mut coin = Spoiled { coin, models, drafts: &drafts };
            models.judged(Rule::Block, &drafts, &models.distributions, &mut coin)
        })
    });
    println!("{distance:.4}");
    assert!((0.003..0.03).contains(&distance), "{distance}");
}

/// Picks what follows a rejected draft from `max(p - q, 0)`.
struct Spoiled<'a> {
    coin: &'a mut Enumerator,
    models: &'a Models,
    drafts: &'a [u32],
}

impl RandomSource for Spoiled<'_> {
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool {
        self.coin.accept(word, s, n)
    }

    fn pick(&mut self, word: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let Some(q) = self.models.distributions.get(word.row) else { return self.coin.pick(word, weights) };
        let p = self.models.p(&self.drafts[..word.row]);
        let over =
            p.tokens().iter().map(|&(id, p)| (id, p.saturating_sub(q.probability(id)))).filter(|t| t.1 > 0);
        let over: Vec<(u32, u64)> = over.collect();
        self.coin.pick(word, if over.is_empty() { p.tokens() } else { &over })
    }
}

#[test]
fn siblings_out_of_the_order_they_were_drawn_in_are_caught() {
    let mut most = 0f64;
    for i in 0..25 {
        let mut rng = Random::new(13_000 + i);
        let (p, q) = (probabilities(&rng.weights(4, true)), probabilities(&rng.weights(4, false)));
        let models = Models::new(4, 1, || p.clone(), || q.clone());
        let distribution = enumerate(|coin| {
            let (mut tokens, parents) =
                draw_tree(9, &[2], &models.distributions, Siblings::Distinct, coin).unwrap();
            tokens[1..].sort_by_key(|&id| std::cmp::Reverse(q.probability(id)));
            models.judged_tree(&tokens, &parents, Siblings::Distinct, coin)
        });
        most = most.max(float(&models.distance(&distribution)));
    }
    println!("{most:.3}");
    assert!((0.15..0.45).contains(&most), "{most}");
}

#[test]
fn a_chain_dropped_for_what_it_is_is_caught() {
    let distance = worst(|models| {
        enumerate(|coin| {
            let (tokens, parents) = sample_chains(9, 2, &models.distributions, coin).unwrap();
            // Both are judged only where the first is the less likely.
            let q = |token: u32| models.distributions[0].probability(token);
            let kept = if q(tokens[1]) < q(tokens[3]) { 5 } else { 3 };
            models.judged_best(&tokens[..kept], &parents[..kept], coin)
        })
    });
    println!("{distance:.3}");
    assert!(distance > 0.02, "{distance}");
}

#[test]
fn a_choice_by_other_classes_than_its_laws_is_caught() {
    // Chains of one class are put in an order of their tokens, so that not the first has the next draft.
    let distance = worst(|models| {
        enumerate(|coin| {
            let (tokens, parents) = sample_chains(9, 2, &models.distributions, coin).unwrap();
            let mut chains: Vec<&[u32]> = tokens[1..].chunks(models.depth()).collect();
            chains.sort();
            let tokens = [&tokens[..1], &chains.concat()].concat();
            models.judged_best(&tokens, &parents, coin)
        })
    });
    println!("{distance:.3}");
    assert!(distance > 0.02, "{distance}");
}
