//! Trees of any fixed shape, drawn without replacement and judged by recursive rejection, by enumeration: the target's distribution
//! is emitted whatever the shape, and a shape depends on nothing that is drawn.

use crate::support::enumeration;

use dflash::spec::distribution::Distribution;
use dflash::spec::rng::{DrawKey, PhiloxStream, RandomSource};
use dflash::spec::tree::{MOST_ROWS, chains, shape};
use dflash::spec::verify::{Siblings, recursive_rejection, sample_tree};
use enumeration::*;
use num_rational::BigRational;

/// Parents of a random tree: of its rows some stand level by level, as [`shape`] has them, some as they come.
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
    /// The distribution of a round of a tree of that shape.
    fn shaped(&self, parents: &[u32], siblings: Siblings) -> JointDistribution {
        enumerate(|coin| {
            let tokens = sample_tree(9, parents, &self.distributions, siblings, coin).unwrap();
            assert_eq!(tokens.len(), parents.len(), "rows depend on nothing drawn");
            self.judged_tree(&tokens, parents, siblings, coin)
        })
    }
}

/// How many rows follow the same one at most.
fn widest(parents: &[u32]) -> usize {
    let count = |row: usize| parents[1..].iter().filter(|&&parent| parent as usize == row).count();
    (0..parents.len()).map(count).max().unwrap()
}

#[test]
fn trees_of_any_shape_emit_the_targets_law() {
    let mut worst = ratio(0, 1);
    let (mut uneven, mut wide) = (0, 0);
    for i in 0..60 {
        let mut random = Random::new(20_000 + i);
        // As many branches as can be counted.
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
        assert_eq!(models.shaped(&[0, 0, 1], Siblings::Distinct), models.chain(Rule::Rejection));
    }
}

/// Draws as if by chance, and keeps the names of the chances.
struct Named(PhiloxStream, Vec<DrawKey>);

impl RandomSource for Named {
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool {
        self.1.push(word);
        self.0.accept(word, s, n)
    }

    fn pick(&mut self, word: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.1.push(word);
        self.0.pick(word, weights)
    }
}

#[test]
fn siblings_beyond_a_laws_tokens_are_repeats_that_never_stand() {
    let mut random = Random::new(22);
    let (mut repeats, mut stood) = (0, 0);
    for round in 0..400 {
        let (vocab, depth) = (1 + random.below(4), 1 + random.below(3));
        let rows = 2 + random.below(12);
        let parents = parents(&mut random, rows, depth);
        let models = Models::random(&mut random, vocab, depth);
        let mut coin = Named(PhiloxStream { seed: 3, stream: 1, round, anchor: 8 }, vec![]);
        let tokens = sample_tree(9, &parents, &models.distributions, Siblings::Distinct, &mut coin).unwrap();
        let target = |row: usize| Some(models.p(&way(&tokens, &parents, row)));
        let (path, _) = recursive_rejection(
            &tokens,
            &parents,
            &models.distributions,
            Siblings::Distinct,
            target,
            &mut coin,
        )
        .unwrap();
        for row in 1..tokens.len() {
            let depth = way(&tokens, &parents, row).len();
            let before: Vec<usize> = (1..row).filter(|&other| parents[other] == parents[row]).collect();
            let repeat = before.iter().any(|&other| tokens[other] == tokens[row]);
            assert!(
                models.distributions[depth - 1].probability(tokens[row]) > 0,
                "row {row} cannot be drawn"
            );
            assert_eq!(repeat, before.len() >= models.distributions[depth - 1].tokens().len(), "row {row}");
            assert!(!repeat || tokens[row] == tokens[*before.last().unwrap()]);
            assert!(!(repeat && path.contains(&row)), "row {row} stands");
            let drawn = coin.1.iter().any(|word| (word.purpose as u32, word.row) == (2, row));
            assert_eq!(drawn, !repeat, "row {row}");
            repeats += u32::from(repeat);
        }
        stood += path.len() - 1;
        // Nothing has been asked twice.
        for (i, word) in coin.1.iter().enumerate() {
            assert!(!coin.1[..i].contains(word), "{word:?}");
        }
    }
    assert!(repeats > 100 && stood > 100, "{repeats} {stood}");
}

#[test]
fn shapes_that_are_none_are_refused() {
    let models = Models::random(&mut Random::new(1), 3, 1);
    let draw = |parents: &[u32]| {
        let mut coin = PhiloxStream { seed: 1, stream: 1, round: 1, anchor: 1 };
        sample_tree(9, parents, &models.distributions, Siblings::Distinct, &mut coin)
    };
    assert!(draw(&[0, 0, 0]).is_some());
    assert_eq!(draw(&[0, 1]), None, "a row that follows itself");
    assert_eq!(draw(&[0, 2, 0]), None, "a row that follows a later one");
    assert_eq!(draw(&[0, u32::MAX]), None);
    assert_eq!(draw(&[0, 0, 1]), None, "there is one distribution");
}

#[test]
fn a_shape_has_the_rows_asked_for_and_more_rows_are_more_of_the_same() {
    for depth in 1..=16 {
        let most = shape(MOST_ROWS, depth);
        for rows in 1..=MOST_ROWS {
            let tree = shape(rows, depth);
            assert_eq!((tree.rows(), &tree.tokens), (rows, &vec![0; rows]));
            assert!(tree.deepest() <= depth);
            assert_eq!((&tree.parents[..], &tree.masks[..]), (&most.parents[..rows], &most.masks[..rows]));
        }
    }
}

#[test]
fn a_shape_is_the_best_where_siblings_stand_as_often_as_it_takes_them_to() {
    // By brute force: rows of up to three siblings, three deep. The first stands in 1 of 2 cases, others in 1 of 10 j.
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
                .filter(|&parent| way(parents, parents, parent as usize).len() < 3)
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
fn several_chains_fill_the_rows_that_there_are() {
    for rows in 2..=MOST_ROWS {
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
fn laws_of_other_siblings_are_caught() {
    // Distinct siblings, judged as independent ones.
    let mut most = 0f64;
    for i in 0..25 {
        let mut random = Random::new(24_000 + i);
        let (p, q): (Distribution, Distribution) =
            (probabilities(&random.weights(4, true)), probabilities(&random.weights(4, false)));
        let models = Models::new(4, 1, || p.clone(), || q.clone());
        let distribution = enumerate(|coin| {
            let tokens =
                sample_tree(9, &[0, 0, 0, 0], &models.distributions, Siblings::Distinct, coin).unwrap();
            models.judged_tree(&tokens, &[0, 0, 0, 0], Siblings::Independent, coin)
        });
        most = most.max(float(&models.distance(&distribution)));
    }
    println!("{most:.3}");
    assert!(most > 0.02, "{most}");
}
