//! Trees of any fixed shape, sampled without replacement and verified by recursive rejection. Enumeration shows
//! that they emit the target's distribution and that the shape does not depend on the sampled tokens.

use crate::support::enumeration;

use dflash::spec::distribution::Distribution;
use dflash::spec::rng::{DrawKey, PhiloxStream, RandomSource};
use dflash::spec::tree::{MAX_TREE_ROWS, chains, shape};
use dflash::spec::verify::{Siblings, recursive_rejection, sample_tree};
use enumeration::*;
use num_rational::BigRational;

/// Parents of a random tree. Its rows are ordered level by level, as by [`shape`], or in order of creation.
fn parents(random: &mut Random, rows: usize, depth: usize) -> Vec<u32> {
    let (mut parents, mut depths) = (vec![0u32], vec![0usize]);
    while parents.len() < rows {
        let parent = random.below(parents.len());
        if depths[parent] < depth {
            parents.push(parent as u32);
            depths.push(depths[parent] + 1);
        }
    }
    if random.below(2) == 0 {
        return parents;
    }
    let mut order: Vec<usize> = (0..rows).collect();
    order.sort_by_key(|&row| depths[row]);
    let place = |row: u32| order.iter().position(|&other| other == row as usize).unwrap() as u32;
    order.iter().map(|&row| place(parents[row])).collect()
}

impl Models {
    /// The distribution that a round with a tree of this shape emits.
    fn shaped(&self, parents: &[u32], siblings: Siblings) -> JointDistribution {
        enumerate(|source| {
            let tokens = sample_tree(9, parents, &self.distributions, siblings, source).unwrap();
            assert_eq!(tokens.len(), parents.len(), "the number of rows is fixed");
            self.verify_tree(&tokens, parents, siblings, source)
        })
    }
}

/// The largest number of siblings.
fn widest(parents: &[u32]) -> usize {
    let count = |row: usize| parents[1..].iter().filter(|&&parent| parent as usize == row).count();
    (0..parents.len()).map(count).max().unwrap()
}

#[test]
fn trees_of_any_shape_emit_the_targets_distribution() {
    let mut worst = ratio(0, 1);
    let (mut uneven, mut wide) = (0, 0);
    for i in 0..60 {
        let mut random = Random::new(20_000 + i);
        // Small enough to enumerate.
        let (vocab, rows, depth) = [(2, 7, 3), (3, 5, 2), (4, 4, 2), (3, 5, 3), (2, 6, 2)][i as usize % 5];
        let models = Models::random(&mut random, vocab, depth);
        let parents = parents(&mut random, rows, depth);
        for siblings in [Siblings::Distinct, Siblings::Independent] {
            let distance = models.distance(&models.shaped(&parents, siblings));
            let bound = rounding(&models) * ratio(widest(&parents).max(2) as u64 - 1, 1);
            assert!(distance <= bound, "model {i}, {parents:?}, {siblings:?}: {}", float(&distance));
            worst = worst.max(distance);
        }
        uneven += u32::from(!parents.is_sorted());
        wide += u32::from(widest(&parents) > 2);
    }
    println!("largest distance {:e}; {uneven} out of order, {wide} with three siblings", float(&worst));
    assert!(uneven > 5 && wide > 10, "{uneven} {wide}");
}

#[test]
fn a_shape_of_widths_is_the_tree_of_those_widths() {
    for i in 0..20 {
        let models = Models::random(&mut Random::new(21_000 + i), 3, 2);
        assert_eq!(
            models.shaped(&[0, 0, 0, 1, 2], Siblings::Distinct),
            models.tree(&[2, 1], Siblings::Distinct)
        );
        assert_eq!(models.shaped(&[0, 0, 1], Siblings::Distinct), models.chain(Method::Rejection));
    }
}

/// Random draws by Philox, with a record of their keys.
struct RecordKeys(PhiloxStream, Vec<DrawKey>);

impl RandomSource for RecordKeys {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        self.1.push(key);
        self.0.accept(key, s, n)
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.1.push(key);
        self.0.pick(key, weights)
    }
}

#[test]
fn siblings_beyond_the_support_are_repeats_never_accepted() {
    let mut random = Random::new(22);
    let (mut repeats, mut accepted_drafts) = (0, 0);
    for round in 0..400 {
        let (vocab, depth) = (1 + random.below(4), 1 + random.below(3));
        let rows = 2 + random.below(12);
        let parents = parents(&mut random, rows, depth);
        let models = Models::random(&mut random, vocab, depth);
        let mut source = RecordKeys(PhiloxStream { seed: 3, stream: 1, round, anchor: 8 }, vec![]);
        let tokens =
            sample_tree(9, &parents, &models.distributions, Siblings::Distinct, &mut source).unwrap();
        let target = |row: usize| Some(models.p(&path_to(&tokens, &parents, row)));
        let (path, _) = recursive_rejection(
            &tokens,
            &parents,
            &models.distributions,
            Siblings::Distinct,
            target,
            &mut source,
        )
        .unwrap();
        for row in 1..tokens.len() {
            let depth = path_to(&tokens, &parents, row).len();
            let before: Vec<usize> = (1..row).filter(|&other| parents[other] == parents[row]).collect();
            let repeat = before.iter().any(|&other| tokens[other] == tokens[row]);
            assert!(
                models.distributions[depth - 1].probability(tokens[row]) > 0,
                "row {row} has probability 0"
            );
            assert_eq!(repeat, before.len() >= models.distributions[depth - 1].tokens().len(), "row {row}");
            assert!(!repeat || tokens[row] == tokens[*before.last().unwrap()]);
            assert!(!(repeat && path.contains(&row)), "row {row} is accepted");
            let sampled = source.1.iter().any(|key| (key.purpose as u32, key.row) == (2, row));
            assert_eq!(sampled, !repeat, "row {row}");
            repeats += u32::from(repeat);
        }
        accepted_drafts += path.len() - 1;
        // No key is used twice.
        for (i, key) in source.1.iter().enumerate() {
            assert!(!source.1[..i].contains(key), "{key:?}");
        }
    }
    assert!(repeats > 100 && accepted_drafts > 100, "{repeats} {accepted_drafts}");
}

#[test]
fn invalid_shapes_are_refused() {
    let models = Models::random(&mut Random::new(1), 3, 1);
    let draw = |parents: &[u32]| {
        let mut source = PhiloxStream { seed: 1, stream: 1, round: 1, anchor: 1 };
        sample_tree(9, parents, &models.distributions, Siblings::Distinct, &mut source)
    };
    assert!(draw(&[0, 0, 0]).is_some());
    assert_eq!(draw(&[0, 1]), None, "a row that follows itself");
    assert_eq!(draw(&[0, 2, 0]), None, "a row that follows a later one");
    assert_eq!(draw(&[0, u32::MAX]), None);
    assert_eq!(draw(&[0, 0, 1]), None, "there is one distribution");
}

#[test]
fn a_shape_has_the_rows_asked_for_and_extends_smaller_shapes() {
    for depth in 1..=16 {
        let max = shape(MAX_TREE_ROWS, depth);
        for rows in 1..=MAX_TREE_ROWS {
            let tree = shape(rows, depth);
            assert_eq!((tree.rows(), &tree.tokens), (rows, &vec![0; rows]));
            assert!(tree.deepest() <= depth);
            assert_eq!((&tree.parents[..], &tree.masks[..]), (&max.parents[..rows], &max.masks[..rows]));
        }
    }
}

#[test]
fn a_shape_is_optimal_under_its_assumed_acceptance_rates() {
    // By brute force, up to depth three. The first sibling is accepted with probability 1/2, sibling j with
    // 1/(10 j).
    let rate = |place: usize| if place == 0 { 0.5 } else { 0.1 / place as f64 };
    let value = |parents: &[u32]| {
        let mut values = vec![1.0];
        for row in 1..parents.len() {
            let place = parents[1..row].iter().filter(|&&parent| parent == parents[row]).count();
            values.push(values[parents[row] as usize] * rate(place));
        }
        values.iter().sum::<f64>()
    };
    let mut all = vec![vec![0u32]];
    for rows in 2..=8 {
        let longer = |parents: &Vec<u32>| -> Vec<Vec<u32>> {
            (0..parents.len() as u32)
                .filter(|&parent| path_to(parents, parents, parent as usize).len() < 3)
                .map(|parent| [&parents[..], &[parent]].concat())
                .collect()
        };
        all = all.iter().flat_map(longer).collect();
        let best = all.iter().map(|parents| value(parents)).fold(0.0, f64::max);
        let found = value(&shape(rows, 3).parents);
        assert!((found - best).abs() < 1e-9, "{rows} rows: {found} of {best}");
    }
}

#[test]
fn several_chains_fill_the_available_rows() {
    for rows in 2..=MAX_TREE_ROWS {
        for deepest in 1..=15 {
            let (count, depth) = chains(rows, deepest);
            assert!(count >= 1 && (1..=deepest).contains(&depth), "{rows} {deepest}: {count} of {depth}");
            assert!(count * depth < rows, "{rows} {deepest}: {count} of {depth}");
            assert!((count + 1) * depth >= rows, "{rows} {deepest}: {count} of {depth}: another fits");
        }
    }
}

#[test]
fn chains_are_about_as_many_as_each_has_drafts() {
    let found = [2, 3, 8, 9, 10, 16, 31, 64].map(|rows| chains(rows, 15));
    assert_eq!(found, [(1, 1), (2, 1), (2, 3), (2, 4), (3, 3), (3, 5), (5, 6), (7, 9)]);
}

#[test]
fn wide_trees_accept_more_than_narrow_ones() {
    let mean = |models: &Models, parents: &[u32]| accepted(&models.shaped(parents, Siblings::Distinct));
    for i in 0..20 {
        let models = Models::random(&mut Random::new(23_000 + i), 3, 2);
        let slack: BigRational = rounding(&models);
        let narrow = mean(&models, &[0, 0, 1]);
        let wide = mean(&models, &[0, 0, 0, 1]);
        assert!(wide >= narrow.clone() - slack, "model {i}: {} {}", float(&wide), float(&narrow));
    }
}

#[test]
fn distinct_siblings_verified_as_independent_are_detected() {
    let mut max = 0f64;
    for i in 0..25 {
        let mut random = Random::new(24_000 + i);
        let (p, q): (Distribution, Distribution) =
            (probabilities(&random.weights(4, true)), probabilities(&random.weights(4, false)));
        let models = Models::new(4, 1, || p.clone(), || q.clone());
        let distribution = enumerate(|source| {
            let tokens =
                sample_tree(9, &[0, 0, 0, 0], &models.distributions, Siblings::Distinct, source).unwrap();
            models.verify_tree(&tokens, &[0, 0, 0, 0], Siblings::Independent, source)
        });
        max = max.max(float(&models.distance(&distribution)));
    }
    println!("{max:.3}");
    assert!(max > 0.02, "{max}");
}
