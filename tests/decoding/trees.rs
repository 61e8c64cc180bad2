//! Draft trees: the best-first search against brute force and a second algorithm; and rounds with trees,
//! which emit the tokens of autoregressive decoding, from the same logits bit for bit.

use crate::support;
use crate::support::kernel;
use crate::support::program;
use crate::support::requests;

use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::Dtype;
use dflash::cpu::decoder::{Sequence, Sequences};
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Finish, Outcome, Request, generate};
use dflash::engine::lossless::check;
use dflash::spec::config::VerifyMethod;
use dflash::spec::tree::{Choice, MAX_TREE_ROWS, Tree, choices, compaction_moves};
use kernel::Random;
use requests::{AcceptAll, reference_prompts, seeded};
use serde_json::Value;
use std::collections::HashSet;

// ---- building ----

/// The invariants of every tree.
#[track_caller]
fn check_invariants(tree: &Tree, max: usize) {
    let rows = tree.rows();
    assert!((1..=max).contains(&rows), "{rows} rows of {max}");
    assert_eq!((tree.parents.len(), tree.depths.len(), tree.masks.len()), (rows, rows, rows));
    assert_eq!((tree.parents[0], tree.depths[0], tree.masks[0], tree.costs[0]), (0, 0, 1, 0));
    assert_eq!(tree.costs.len(), rows);
    let mut seen = HashSet::new();
    for row in 1..rows {
        let parent = tree.parents[row] as usize;
        assert!(parent < row);
        assert_eq!(tree.depths[row], tree.depths[parent] + 1);
        assert_eq!(tree.masks[row], tree.masks[parent] | 1 << row);
        assert!(tree.costs[row] >= tree.costs[parent]);
        assert_eq!(tree.depths[row], tree.masks[row].count_ones() - 1);
        let path: Vec<usize> = tree.path(row).collect();
        assert_eq!((path[0], path.len(), *path.last().unwrap()), (0, tree.depths[row] as usize + 1, row));
        assert!(path.windows(2).all(|way| tree.parents[way[1]] as usize == way[0]));
        assert!(seen.insert((parent, tree.tokens[row])), "two siblings are token {}", tree.tokens[row]);
    }
}

/// The tokens from the anchor, exclusive, to each row.
fn prefixes(tree: &Tree) -> Vec<Vec<u32>> {
    let prefix = |row| tree.path(row).skip(1).map(|row| tree.tokens[row]).collect();
    (1..tree.rows()).map(prefix).collect()
}

/// Per depth up to `width` choices with ascending costs in `0..spread`. A small `spread` gives many ties.
fn random_choices(random: &mut Random, depth: usize, width: usize, spread: usize) -> Vec<Vec<Choice>> {
    let level = |random: &mut Random| {
        let mut costs: Vec<u32> = (0..random.below(width + 1)).map(|_| random.below(spread) as u32).collect();
        costs.sort_unstable();
        // Token ids do not follow the ranks.
        let first = random.below(1000) as u32;
        (0u32..).zip(costs).map(|(i, cost)| Choice { token: first + i * 7 % 64, cost }).collect()
    };
    (0..depth).map(|_| level(random)).collect()
}

/// (cost, depth, ranks) of every prefix, cheapest first.
fn all_prefixes(choices: &[Vec<Choice>]) -> Vec<(u32, usize, Vec<usize>)> {
    let (mut all, mut level) = (vec![], vec![(0, vec![])]);
    for (depth, choices) in choices.iter().enumerate() {
        let extend = |(cost, ranks): &(u32, Vec<usize>)| -> Vec<(u32, Vec<usize>)> {
            let child =
                |(rank, choice): (usize, &Choice)| (cost + choice.cost, [&ranks[..], &[rank]].concat());
            choices.iter().enumerate().map(child).collect()
        };
        level = level.iter().flat_map(extend).collect();
        all.extend(level.iter().map(|(cost, ranks)| (*cost, depth + 1, ranks.clone())));
    }
    all.sort_unstable();
    all
}

/// [`Tree::best_first`] in the form of the kernel, which many threads can run: depth by depth, it keeps the
/// best `rows - 1` children of the best `rows - 1` prefixes of the previous depth, and finally takes the best
/// of all. This is exact, because a prefix never costs more than its extensions. A prefix is identified by
/// its index among those of its depth in the order of ranks, so that a key of any depth fits one word.
fn by_levels(anchor: u32, choices: &[Vec<Choice>], rows: usize) -> Tree {
    let max = rows.clamp(1, MAX_TREE_ROWS) - 1;
    let mut all: Vec<Prefix> = Vec::new();
    let mut beam = vec![Prefix { cost: 0, depth: 0, order: 0, parent: 0, token: anchor }];
    let mut first = 0; // index in `all` of the beam's first prefix, from 1; 0: the anchor
    for choices in choices {
        // (cost, parent's order, rank) orders by cost, then by ranks from the anchor on.
        let children = beam.iter().enumerate().flat_map(|(parent, prefix)| {
            let child = move |(rank, choice): (usize, &Choice)| {
                (prefix.cost + choice.cost, prefix.order, rank, parent, choice.token)
            };
            choices.iter().take(max).enumerate().map(child)
        });
        let mut children: Vec<_> = children.collect();
        children.sort_unstable();
        children.truncate(max);
        let order = |own: &(u32, usize, usize, usize, u32)| {
            children.iter().filter(|other| (other.1, other.2) < (own.1, own.2)).count()
        };
        let depth = beam.first().map_or(0, |prefix| prefix.depth) + 1;
        let next = children.iter().map(|child| {
            let (cost, _, _, parent, token) = *child;
            Prefix { cost, depth, order: order(child), parent: first + parent, token }
        });
        beam = next.collect();
        first = all.len() + 1;
        all.extend(beam.iter().cloned());
    }
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_unstable_by_key(|&i| (all[i].cost, all[i].depth, all[i].order));
    order.truncate(max);
    let (mut tokens, mut parents, mut costs) = (vec![anchor], vec![0], vec![0]);
    // A parent's key is less than its children's, so its row is known before them.
    let mut row_of = vec![0; all.len() + 1];
    for i in order {
        row_of[i + 1] = tokens.len() as u32;
        tokens.push(all[i].token);
        parents.push(row_of[all[i].parent]);
        costs.push(all[i].cost);
    }
    Tree { costs, ..Tree::sampled(&tokens, &parents) }
}

/// A prefix of [`by_levels`].
#[derive(Clone)]
struct Prefix {
    cost: u32,
    depth: u32,
    /// Its index among the prefixes of its depth, in the order of ranks from the anchor on.
    order: usize,
    /// Index of its parent in the list of all, from 1; 0: the anchor.
    parent: usize,
    token: u32,
}

#[test]
fn the_worked_example_of_two_positions_is_built_and_compacted() {
    let distributions: [[f32; 3]; 2] = [[0.6, 0.25, 0.15], [0.5, 0.3, 0.2]];
    let choices: Vec<_> =
        distributions.iter().map(|distribution| choices(&distribution.map(f32::ln), 6).unwrap()).collect();
    let tree = Tree::best_first(9, &choices, 7);
    let of: [&[u32]; 6] = [&[0], &[0, 0], &[1], &[0, 1], &[2], &[1, 0]];
    assert_eq!(prefixes(&tree), of);
    assert_eq!(tree.tokens[0], 9);
    assert_eq!(tree.parents, [0, 0, 1, 0, 1, 0, 3]);
    assert_eq!(tree.depths, [0, 1, 2, 1, 2, 1, 2]);
    assert_eq!(tree.masks, [0b1, 0b11, 0b111, 0b1001, 0b10011, 0b100001, 0b1001001]);
    assert_eq!(by_levels(9, &choices, 7), tree);
    // The copies that compact the path 0, 3, 6.
    assert_eq!(compaction_moves(&[0, 3, 6]).collect::<Vec<_>>(), [(3, 1), (6, 2)]);
    assert_eq!(compaction_moves(&[0, 1, 2]).count(), 0);
}

#[test]
fn a_level_by_level_search_finds_the_same_trees_and_ties() {
    let mut random = Random::new(1);
    let (mut cut, mut ties) = (0, 0);
    for _ in 0..600 {
        let (depth, width, spread) = (random.below(16), 1 + random.below(20), 1 + random.below(30));
        let choices = random_choices(&mut random, depth, width, spread);
        let rows = 1 + random.below(MAX_TREE_ROWS);
        let tree = Tree::best_first(3, &choices, rows);
        check_invariants(&tree, rows);
        assert_eq!(by_levels(3, &choices, rows), tree, "{rows} rows of {choices:?}");
        cut += usize::from(tree.rows() < rows);
        ties += usize::from(spread < 4 && tree.rows() > 30);
    }
    assert!(cut > 50 && ties > 10, "{cut} ran out of choices, {ties} had many ties");
    // At most as many rows as a mask has bits, and at least the anchor.
    let many = vec![vec![Choice { token: 1, cost: 0 }, Choice { token: 2, cost: 9 }]; 100];
    assert_eq!(Tree::best_first(3, &many, 1000).rows(), MAX_TREE_ROWS);
    assert_eq!(by_levels(3, &many, 1000), Tree::best_first(3, &many, 1000));
    assert_eq!((Tree::best_first(3, &many, 0).rows(), by_levels(3, &many, 0).rows()), (1, 1));
}

#[test]
fn a_tree_holds_the_cheapest_prefixes_in_order_of_their_keys() {
    let mut random = Random::new(2);
    for _ in 0..400 {
        let (depth, spread) = (1 + random.below(4), 1 + random.below(12));
        let choices = random_choices(&mut random, depth, 5, spread);
        let rows = 1 + random.below(MAX_TREE_ROWS);
        let mut best = all_prefixes(&choices);
        best.truncate(rows - 1);
        let token = |(depth, rank): (usize, &usize)| choices[depth][*rank].token;
        let expected: Vec<Vec<u32>> =
            best.iter().map(|(_, _, ranks)| ranks.iter().enumerate().map(token).collect()).collect();
        let tree = Tree::best_first(3, &choices, rows);
        assert_eq!(prefixes(&tree), expected, "{choices:?}");
        assert_eq!(tree.costs[1..], best.iter().map(|(cost, ..)| *cost).collect::<Vec<_>>());
    }
}

/// The expected number of accepted drafts is the sum of the path probabilities; no tree of that size has a
/// greater one.
#[test]
fn no_tree_of_its_size_is_expected_to_accept_more() {
    let mut random = Random::new(3);
    for _ in 0..60 {
        let choices = random_choices(&mut random, 3, 2, 200_000);
        let all = all_prefixes(&choices);
        let nodes = 1 + random.below(4);
        let probability = |cost: u32| (-f64::from(cost) / 65536.0).exp2();
        let closed = |set: &[usize]| {
            let contains = |ranks: &[usize]| ranks.is_empty() || set.iter().any(|i| all[*i].2 == ranks);
            set.iter().all(|i| contains(&all[*i].2[..all[*i].2.len() - 1]))
        };
        let mut best: f64 = 0.0;
        for set in 0u32..1 << all.len() {
            let set: Vec<usize> = (0..all.len()).filter(|i| set >> i & 1 == 1).collect();
            if set.len() <= nodes && closed(&set) {
                best = best.max(set.iter().map(|i| probability(all[*i].0)).sum());
            }
        }
        let tree = Tree::best_first(0, &choices, nodes + 1);
        let chosen = &all[..tree.rows() - 1];
        let sum: f64 = chosen.iter().map(|(cost, ..)| probability(*cost)).sum();
        assert!((sum - best).abs() < 1e-9, "{sum}, but {best} can be had of {choices:?}");
    }
}

#[test]
fn a_truncated_tree_equals_the_smaller_best_first_tree() {
    let mut random = Random::new(4);
    for _ in 0..100 {
        let choices = random_choices(&mut random, 6, 8, 9);
        let whole = Tree::best_first(5, &choices, 40);
        for rows in 0..=40 {
            let mut cut = whole.clone();
            cut.truncate(rows);
            assert_eq!(cut, Tree::best_first(5, &choices, rows));
        }
    }
}

#[test]
fn costs_are_the_negative_log2_of_the_drafters_probabilities() {
    let mut random = Random::new(5);
    for vocab in [1, 2, 3, 97, 2048, 40_000] {
        for scale in [0.01, 1.0, 4.0, 30.0] {
            let mut logits: Vec<f32> = (0..vocab).map(|_| random.normal(scale)).collect();
            if vocab > 3 {
                logits[3] = f32::NEG_INFINITY;
                logits[vocab - 1] = logits[1];
            }
            let max = logits.iter().fold(f32::MIN, |a, b| a.max(*b));
            let total: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
            let whole = choices(&logits, vocab).unwrap();
            for choice in &whole {
                let exact = (total.log2()
                    - f64::from(logits[choice.token as usize] - max) * std::f64::consts::LOG2_E)
                    * 65536.0;
                // Covers two roundings, the relative error 1e-5 of the weights, and the error of f32 for large costs.
                let bound = 3.0 + exact * 4e-7;
                assert!((f64::from(choice.cost) - exact).abs() < bound, "{} for {exact}", choice.cost);
            }
            // All tokens with a weight above 0, by (logit descending, id ascending).
            let mut order: Vec<u32> =
                (0..vocab as u32).filter(|i| max - logits[*i as usize] < 22.0).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
            let tokens: Vec<u32> = whole.iter().map(|choice| choice.token).collect();
            assert_eq!(tokens[..order.len()], order);
            assert!(whole.iter().all(|c| max - logits[c.token as usize] < 22.3));
            for count in [0, 1, 2, 63] {
                assert_eq!(choices(&logits, count).unwrap(), whole[..count.min(whole.len())]);
            }
        }
    }
    // Exact costs: two bits for one of four equal tokens, none for a certain token.
    let cost = |logits: &[f32]| choices(logits, 9).unwrap().iter().map(|c| c.cost).collect::<Vec<_>>();
    assert_eq!(cost(&[5.0; 4]), [131_072; 4]);
    assert_eq!(cost(&[5.0; 1024])[..2], [655_360; 2]);
    assert_eq!(cost(&[-3.0]), [0]);
    assert_eq!(cost(&[-30.0, f32::NEG_INFINITY, 30.0]), [0]);
    let zeros: Vec<u32> = choices(&[-0.0, 0.0, -0.0], 9).unwrap().iter().map(|c| c.token).collect();
    assert_eq!(zeros, [0, 1, 2]);
    for invalid in [&[1.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 2], &[]] {
        assert_eq!(choices(invalid, 3), None);
    }
}

#[test]
fn moves_compact_a_path_and_never_read_what_they_wrote() {
    let mut random = Random::new(6);
    for _ in 0..500 {
        let rows = 1 + random.below(MAX_TREE_ROWS);
        let path: Vec<usize> = (0..rows).filter(|row| *row == 0 || random.below(3) == 0).collect();
        let mut slots: Vec<usize> = (0..rows).collect();
        let mut written = HashSet::new();
        for (from, to) in compaction_moves(&path) {
            assert!(!written.contains(&from) && from > to);
            slots[to] = slots[from];
            written.insert(to);
        }
        assert_eq!(slots[..path.len()], path);
    }
}

// ---- on the CPU ----

struct Models(Target, Drafter);

fn load(pair: Pair) -> Models {
    Models(Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap())
}

fn open(target: &support::Target, drafter: &support::Drafter) -> Models {
    let written = support::write_pair(target, drafter);
    load(Pair::open(support::disk(&written.target), Some(support::disk(&written.drafter))).unwrap())
}

/// A pair with so few tokens that a random drafter is often right and accepted paths leave the most probable
/// branch. `wide`: Llama, heads of 80.
fn guessable(wide: bool) -> Models {
    let (target, drafter) = support::small();
    let head_dim = if wide { 80 } else { 8 };
    let target = support::Target { llama: wide, vocab: 5, head_dim, seed: 3, ..target };
    let sliding = if wide { vec![] } else { vec![true; drafter.layers] };
    let window = (!wide).then_some(9);
    open(&target, &support::Drafter { head_dim, dtype: Dtype::Bf16, sliding, window, ..drafter })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A random tree of tokens below `vocab`: anything from a chain to a star.
fn random_tree(random: &mut Random, vocab: usize, rows: usize, depth: usize) -> Tree {
    let choices = random_choices(random, depth, 6, 4);
    let mut tree = Tree::best_first(random.below(vocab) as u32, &choices, rows);
    tree.tokens.iter_mut().for_each(|token| *token = random.below(vocab) as u32);
    tree
}

/// Keys, values, features and logits of every path are those of AR steps along it.
#[test]
fn tree_rows_have_the_bits_of_ar_decoding_along_their_paths() {
    let mut random = Random::new(7);
    for (Models(target, _), contexts) in [
        (guessable(false), vec![1, 2, 15, 16, 17, 47]),
        (guessable(true), vec![1, 13, 31]),
        (load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()), vec![9, 16]),
    ] {
        let stack = &target.config.stack;
        let (vocab, taps) = (target.config.vocab, [0, stack.attention.len() - 1]);
        for context in contexts {
            let prompt: Vec<u32> = (0..context).map(|_| random.below(vocab) as u32).collect();
            let fresh = || {
                let mut cache = Cache::new(stack, context + 2 * MAX_TREE_ROWS).unwrap();
                target.forward(&prompt, &mut cache, &taps, &mut vec![], 0);
                cache
            };
            let (rows, depth) = (2 + random.below(24), 1 + random.below(20));
            let tree = random_tree(&mut random, vocab, rows, depth);
            let (mut features, mut logits) = (vec![], vec![]);
            let normed =
                ops::on_threads(None, || target.forward_tree(&tree, &mut fresh(), &taps, &mut features));
            target.logits(&normed, &mut logits);
            let width = taps.len() * stack.hidden;
            for row in 0..tree.rows() {
                let (mut cache, mut own_features, mut own) = (fresh(), vec![], vec![]);
                for step in tree.path(row) {
                    let normed =
                        target.forward(&tree.tokens[step..=step], &mut cache, &taps, &mut own_features, 1);
                    target.logits(&normed, &mut own);
                }
                let place = format!("row {row} of {:?} after {context}", tree.parents);
                assert!(bits(&own) == bits(&logits[row * vocab..][..vocab]), "{place}: other logits");
                let features = &features[row * width..][..width];
                assert!(bits(&own_features) == bits(features), "{place}: other features");
            }
        }
    }
}

/// The request with trees of up to `rows` rows; `None`: with chains.
fn with_tree(rows: Option<usize>, request: Request) -> Request {
    Request { spec: requests::spec(VerifyMethod::Match, 0.0, rows), ..request }
}

fn decoder(models: &Models) -> Sequences<'_> {
    Sequences::new(&models.0, Some(&models.1), 1, usize::MAX)
}

fn run(models: &Models, rows: Option<usize>, request: &Request) -> Outcome {
    ops::on_threads(None, || {
        generate(&mut decoder(models), &with_tree(rows, request.clone()), &mut AcceptAll)
    })
    .unwrap()
}

/// A round with any tree leaves the caches as autoregressive decoding does. Later rounds, with trees, chains
/// and AR steps in turn, would otherwise emit other tokens.
#[test]
fn the_answer_is_that_of_ar_decoding_for_any_verified_tree() {
    let mut random = Random::new(8);
    let (mut turned, mut rounds) = (0, 0);
    for wide in [false, true] {
        let models = guessable(wide);
        for seed in 0..12 {
            let prompt: Vec<u32> = (0..1 + random.below(40)).map(|_| random.below(5) as u32).collect();
            let request = seeded(&prompt, 60, 16, [0.0, 1.0, 3.0][seed % 3], seed as u64);
            let ar = run(&models, None, &Request { block: 1, ..request.clone() });
            let mut sequence = Sequence::new(&models.0, Some(&models.1));
            sequence.start(&with_tree(Some(MAX_TREE_ROWS), request)).unwrap();
            let mut output = vec![loop {
                if let Some(first) = sequence.prefill().unwrap().next {
                    break first;
                }
            }];
            while output.len() < 60 {
                let before = output.len();
                let rows = 1 + random.below(MAX_TREE_ROWS);
                match random.below(4) {
                    0 => sequence.round(&mut output).map(|_| ()).unwrap(),
                    1 => sequence.verify(&[1, 2, 0][..random.below(4)], &mut output).unwrap(),
                    _ => {
                        // The right tokens are often in the tree, but never as the first child.
                        let mut tree = random_tree(&mut random, 5, rows, 9);
                        tree.tokens[0] = output[before - 1];
                        for row in 1..tree.rows() {
                            if let (true, Some(token)) =
                                (random.below(3) > 0, ar.tokens.get(before + tree.depths[row] as usize - 1))
                            {
                                tree.tokens[row] = *token;
                            }
                        }
                        sequence.verify_tree(&tree, &mut output).unwrap();
                        turned += usize::from(output.len() - before > 2);
                    }
                }
                rounds += 1;
                let upto = output.len().min(60);
                assert_eq!(output[..upto], ar.tokens[..upto]);
                let length = prompt.len() + output.len() - 1;
                assert_eq!(sequence.lengths(), Some((length, Some(length))));
            }
        }
    }
    assert!(turned > 100, "{turned} of {rounds} rounds went two rows deep or more");
}

/// A round gives the drafter the features of the accepted path in order: it drafts the same as after AR
/// steps.
#[test]
fn after_every_tree_the_drafter_drafts_as_after_ar_steps() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let prompt = &reference_prompts()[4];
    let begin = || {
        let mut sequence = Sequence::new(&models.0, Some(&models.1));
        sequence.start(&with_tree(Some(64), seeded(prompt, 120, 16, 0.0, 0))).unwrap();
        while sequence.prefill().unwrap().next.is_none() {}
        sequence
    };
    let (mut autoregressive, mut drafted) = (begin(), begin());
    let (mut steps, mut rounds) = (vec![], vec![]);
    while rounds.len() < 80 {
        drafted.round(&mut rounds).unwrap();
        while steps.len() < rounds.len() {
            autoregressive.verify(&[], &mut steps).unwrap();
        }
        assert_eq!(steps, rounds);
        assert_eq!(
            autoregressive.draft(16).unwrap(),
            drafted.draft(16).unwrap(),
            "after {} tokens",
            rounds.len()
        );
    }
}

#[test]
fn trees_emit_ar_tokens_and_accept_more_than_chains() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let prompts = reference_prompts();
    for temperature in [0.0, 0.7, 1.0] {
        let mut rounds = vec![0; 4];
        for (i, prompt) in prompts.iter().enumerate().step_by(9) {
            let request = seeded(prompt, 32, 16, temperature, i as u64);
            let ar = run(&models, None, &Request { block: 1, ..request.clone() });
            for (rounds, rows) in rounds.iter_mut().zip([None, Some(9), Some(32), Some(64)]) {
                let got = run(&models, rows, &request);
                assert_eq!((&got.tokens, got.finish), (&ar.tokens, ar.finish), "{rows:?}, prompt {i}");
                let max = rows.unwrap_or(16) - 1;
                assert!(got.drafted.iter().all(|drafted| *drafted == max), "{:?}", got.drafted);
                *rounds += got.accepted.len();
            }
            assert_eq!(ar.drafted, vec![0; ar.accepted.len()]);
        }
        assert!(rounds[2] < rounds[0] && rounds[3] < rounds[2], "{rounds:?} rounds at {temperature}");
    }
}

#[test]
fn logits_of_a_trees_path_equal_ar_decodings_bit_for_bit() {
    let demo = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let prompts = reference_prompts();
    for (models, prompt, tokens) in
        [(&demo, &prompts[5][..], 60), (&demo, &prompts[20][..40], 60), (&guessable(false), &[1, 4, 2], 150)]
    {
        for (rows, temperature, block) in
            [(8, 0.0, 16), (64, 0.0, 16), (33, 0.9, 16), (64, 1.0, 5), (20, 2.0, 2)]
        {
            let block = block.min(models.1.config.block);
            let request = with_tree(Some(rows), seeded(prompt, tokens, block, temperature, 5));
            let mut decoder = decoder(models);
            let report =
                ops::on_threads(None, || check(&mut decoder, &request, || Ok(AcceptAll))).unwrap().unwrap();
            assert_eq!((&report.identical, report.compared), (&Ok(()), tokens - 1));
            assert!(report.rejected > 0 && report.rounds < tokens - 1, "{report:?}");
        }
    }
}

/// Prompts of all lengths; the drafter's last position is below, at and above the target's.
#[test]
fn answers_with_trees_end_with_the_context() {
    let (target, drafter) = support::small();
    for (limit, draft_limit) in [(40, 256), (40, 40), (40, 12), (9, 9)] {
        let target = support::Target { max_positions: limit, vocab: 5, ..target.clone() };
        let models = open(&target, &support::Drafter { max_positions: draft_limit, ..drafter.clone() });
        for length in (1..limit).filter(|n| n % 3 == 0 || *n < 4 || *n + 10 > limit) {
            let prompt: Vec<u32> = (0..length as u32).map(|i| (i * i + i / 3) % 5).collect();
            for temperature in [0.0, 1.0] {
                let request = |block| seeded(&prompt, 1000, block, temperature, length as u64);
                let ar = run(&models, None, &request(1));
                for (block, rows) in [(2, 2), (8, 64), (16, 17)] {
                    let got = run(&models, Some(rows), &request(block.min(models.1.config.block)));
                    assert_eq!((&got.tokens, got.finish), (&ar.tokens, Finish::Context));
                }
            }
        }
    }
}

#[test]
fn the_best_branch_of_a_tree_is_the_greedy_chain() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let mut deepest = 0;
    for prompt in &reference_prompts()[..8] {
        let begin = || {
            let mut sequence = Sequence::new(&models.0, Some(&models.1));
            sequence.start(&with_tree(Some(64), seeded(prompt, 20, 16, 0.0, 0))).unwrap();
            while sequence.prefill().unwrap().next.is_none() {}
            sequence
        };
        let chain = begin().draft(16).unwrap();
        let tree = begin().draft_tree(16, 64).unwrap();
        check_invariants(&tree, 64);
        assert_eq!((chain.len(), tree.rows()), (15, 64));
        // No prefix of that depth is cheaper than the best token of each row.
        let along = |prefix: &Vec<u32>| *prefix == chain[..prefix.len()];
        let depth = prefixes(&tree).into_iter().filter(along).map(|prefix| prefix.len()).max();
        assert_eq!(depth, tree.depths.iter().max().map(|depth| *depth as usize));
        deepest = deepest.max(depth.unwrap());
    }
    assert!(deepest > 3, "no tree is deeper than {deepest}");
}

// ---- the flag ----

const PROMPT: &str = "def read_lines(path):\n    with open(path) as file:\n        ";

#[test]
fn trees_give_the_same_text_and_are_recorded() {
    for sampling in [&["--temperature", "0"][..], &["--temperature", "0.8", "--top-k", "30", "--seed", "4"]] {
        let record = |args: &[&str]| {
            let args = [&[PROMPT, "-n", "80", "--json"], sampling, args].concat();
            program::run(args).json().remove(0)
        };
        let (ar, chain, tree) = (record(&["--draft", "none"]), record(&[]), record(&["--tree", "40"]));
        assert_eq!((&tree["tokens"], &tree["text"]), (&ar["tokens"], &ar["text"]));
        assert_eq!((&tree["tree"], &chain["tree"], &ar["tree"]), (&40.into(), &Value::Null, &Value::Null));
        assert!(tree["tau"].as_f64() > chain["tau"].as_f64(), "{} and {}", tree["tau"], chain["tau"]);
        let drafted = tree["drafted"].as_array().unwrap();
        assert_eq!(drafted.len(), tree["accepted"].as_array().unwrap().len());
        assert!(drafted.iter().all(|drafted| *drafted == 39));
        // Trees are at most as deep as the block.
        let shallow = record(&["--tree", "40", "--block", "3"]);
        assert_eq!(shallow["tokens"], ar["tokens"]);
        assert!(shallow["accepted"].as_array().unwrap().iter().all(|accepted| accepted.as_u64() <= Some(3)));
    }
}

#[test]
fn checks_and_conversations_run_with_trees() {
    let args = [PROMPT, "-n", "60", "--tree", "24", "--check-lossless", "--json"];
    let report = program::run(args).json().remove(0);
    assert_eq!((&report["identical"], &report["compared"]), (&true.into(), &59.into()));
    // 59 tokens are accepted rows and bonus tokens; the last round may produce up to 23 more.
    let [rounds, rejected] = ["rounds", "rejected"].map(|field| report[field].as_u64().unwrap());
    assert!((rounds * 24 - 59 - 23..=rounds * 24 - 59).contains(&rejected), "{report}");
    let table = program::run([PROMPT, "-n", "60", "--tree", "24", "--compare"]).done();
    assert!(table.lines().last().unwrap().ends_with("yes"), "{table}");
    let output = |args: &[&str]| {
        let args = [&["--chat", "--device", "cpu", "-n", "30", "-q"], args].concat();
        program::with_stdin(&args, b"import os\n/set block 5\ndef f(\n/draft off\nclass A\n").done()
    };
    assert_eq!(output(&["--tree", "17"]), output(&[]));
}

#[test]
fn a_device_runs_trees_and_records_them() {
    let record = |args: &[&str]| {
        let args = [&[PROMPT, "-n", "12", "--json", "--device", "cuda"], args].concat();
        program::run(args).json().remove(0)
    };
    let (ar, tree) = (record(&["--draft", "none"]), record(&["--tree", "40"]));
    assert_eq!((&tree["tokens"], &tree["tree"]), (&ar["tokens"], &40.into()));
    assert!(tree["drafted"].as_array().unwrap().iter().all(|drafted| *drafted == 39), "{tree}");
    let checked = record(&["--tree", "24", "--check-lossless"]);
    assert_eq!((&checked["identical"], &checked["compared"]), (&true.into(), &11.into()));
}

#[test]
fn invalid_tree_options_are_refused_in_one_line() {
    for (args, code, part) in [
        (&["--tree", "1"][..], 2, "--tree is 1, expected 2 to 64"),
        (&["--tree", "65"], 2, "--tree is 65, expected 2 to 64"),
        (&["--tree", "0"], 2, "--tree is 0, expected 2 to 64"),
        (&["--tree", "-4"], 2, "expected a whole number"),
        (
            &["--tree", "9", "--block", "1"],
            2,
            "--block is 1, which is autoregressive decoding: --tree expects at least 2",
        ),
        (&["--tree", "9", "--draft", "none"], 2, "--tree needs a drafter, but --draft is none"),
    ] {
        let run = program::run([&[PROMPT], args].concat());
        let lines = run.err.lines().count();
        assert!(
            run.code == code && run.out.is_empty() && lines == 1 && run.err.contains(part),
            "{args:?}: {run:?}"
        );
    }
    let plan = program::run(["--plan", "--tree", "9", "--device", "cuda"]);
    assert!(plan.code == 0 && plan.out.contains("in blocks of 16 and trees of 9:"), "{plan:?}");
    // Sampled trees use their method's kernels at any temperature.
    for method in ["rejection", "block"] {
        let plan = program::run(["--plan", "--launches", "--tree", "9", "--verify", method]);
        let kernels = ["sample_siblings", "verify_tree", "sample_chains", "chain_classes", "verify_chains"];
        let config = "of 4096 positions in blocks of 16 and trees of 9, sampled";
        assert!(kernels.iter().chain([&config]).all(|part| plan.out.contains(part)), "{plan:?}");
    }
}
