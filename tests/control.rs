//! How much a round drafts: the arithmetic of costs and acceptance against brute force, controllers over scripted and
//! random acceptance, and that none of it changes what is emitted.

#[path = "support/crowd.rs"]
mod crowd;
#[path = "support/kernel.rs"]
mod kernel;
#[path = "support/program.rs"]
mod program;
mod support;

use crowd::{Silent, go_on, held, open, request, seeded, tiny, together};
use dflash::config::{DrafterConfig, TargetConfig};
use dflash::control::{ByConfidence, ByPosition, Controller, Costs, Positions, WherePays};
use dflash::cpu;
use dflash::emulator::Emulator;
use dflash::engine::{Outcome, Request, generate};
use dflash::floor::{Card, draft_pass, target_pass};
use dflash::lossless;
use dflash::memory::Room;
use dflash::pair::Pair;
use dflash::reference::{Drafter, Target};
use dflash::rounds::{Batch, Models as OnDevice};
use dflash::rules::Drafting;
use dflash::sequences::{Sequence, Sequences};
use dflash::weights::{DEMO_DRAFTER, DEMO_TARGET, PUBLISHED};
use kernel::Random;
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

fn costs(draft: f64, verify: impl Fn(usize) -> f64) -> Costs {
    Costs { draft, verify: (1..=64).map(verify).collect() }
}

/// The path of a chain whose first `accepted` drafts stood.
fn chain_of(accepted: usize) -> u64 {
    u64::MAX >> (63 - accepted)
}

/// The same for every round.
struct Fixed(usize);

impl Controller for Fixed {
    fn drafts(&mut self, most: usize) -> usize {
        self.0.min(most)
    }

    fn judged(&mut self, _: usize, _: u64) {}
}

fn unit(random: &mut Random) -> f64 {
    f64::from(random.unit())
}

#[track_caller]
fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-9 * expected.abs().max(1.0), "{found}, expected {expected}");
}

// ---- costs ----

#[test]
fn the_worked_example_drafts_seven() {
    let costs = costs(1.2, |m| 10.0 + 0.05 * m as f64 + 0.03 * (m.max(4) - 4).pow(2) as f64);
    let mut stands = 1.0;
    let survival: Vec<f64> = [0.86, 0.80, 0.76, 0.73, 0.70, 0.68, 0.66, 0.64]
        .iter()
        .map(|accepted| {
            stands *= accepted;
            stands
        })
        .collect();
    // Rows m count the anchor, too; without drafts there is no drafter.
    let expected = [10.05, 6.0753, 4.4545, 3.7123, 3.325, 3.1238, 3.0296, 3.0039, 3.0258];
    assert_eq!((costs.plain() * 1e4).round() / 1e4, expected[0]);
    for n in 1..=8 {
        let each = costs.round(n) / (1.0 + survival[..n].iter().sum::<f64>());
        assert_eq!((each * 1e4).round() / 1e4, expected[n], "{n} drafts");
    }
    let (drafts, each) = costs.cheapest(&survival);
    assert_eq!((drafts, (each * 1e4).round() / 1e4), (7, 3.0039));
}

/// Every size by itself, in plain sums.
fn by_brute_force(costs: &Costs, survival: &[f64]) -> (usize, f64) {
    let each = |n: usize| (costs.draft + costs.verify[n]) / (1.0 + survival[..n].iter().sum::<f64>());
    let all = (0..=survival.len()).map(|n| (n, each(n)));
    all.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap()
}

#[test]
fn the_cheapest_size_is_the_cheapest_of_all_and_where_costs_are_convex_the_first_that_does_not_pay_ends_it() {
    let mut random = Random::new(1);
    for _ in 0..3000 {
        let n = 1 + random.below(40);
        let mut survival: Vec<f64> = (0..n).map(|_| unit(&mut random)).collect();
        survival.sort_by(|a, b| b.total_cmp(a));
        let mut steps: Vec<f64> = (0..64).map(|_| unit(&mut random) * 0.4).collect();
        steps.sort_by(f64::total_cmp);
        let first = 0.5 + 4.5 * unit(&mut random);
        let convex = costs(unit(&mut random), |rows| first + steps[..rows].iter().sum::<f64>());
        let best = convex.cheapest(&survival);
        let expected = by_brute_force(&convex, &survival);
        near(best.1, expected.1);
        // Adding drafts until the next one does not pay.
        let (mut tokens, mut stop) = (1.0, 0);
        while stop < n && convex.round(stop + 1) / (tokens + survival[stop]) < convex.round(stop) / tokens {
            tokens += survival[stop];
            stop += 1;
        }
        assert_eq!(best.0, stop);
        // Any costs at all.
        let verify = (0..64).map(|_| 0.1 + unit(&mut random)).collect();
        let wild = Costs { draft: unit(&mut random), verify };
        near(wild.cheapest(&survival).1, by_brute_force(&wild, &survival).1);
    }
}

#[test]
fn on_a_staircase_the_best_size_fills_a_tile() {
    let mut random = Random::new(2);
    let mut edges = [0; 3];
    for _ in 0..500 {
        let second = 1.0 + unit(&mut random);
        let heights = [1.0, second, second + unit(&mut random)];
        let stairs = costs(0.2, |rows| heights[[16, 32, 64].iter().position(|edge| rows <= *edge).unwrap()]);
        let (mut stands, keep) = (1.0, 0.8 + 0.2 * unit(&mut random));
        let survival: Vec<f64> = (0..63)
            .map(|_| {
                stands *= keep;
                stands
            })
            .collect();
        let (drafts, each) = stairs.cheapest(&survival);
        near(each, by_brute_force(&stairs, &survival).1);
        let edge = [16, 32, 64].iter().position(|edge| drafts + 1 == *edge).expect("a tile's last row");
        edges[edge] += 1;
    }
    assert!(edges.iter().all(|times| *times > 10), "{edges:?}");
    // Of equals the fewest, and none where nothing stands.
    let flat = costs(1.0, |_| 1.0);
    assert_eq!(flat.cheapest(&[0.0; 20]).0, 0);
    assert_eq!(flat.cheapest(&[0.5, 0.0, 0.0]).0, 1);
    assert_eq!(flat.cheapest(&[]), (0, 2.0));
}

#[test]
fn modelled_costs_are_the_floor_of_the_passes() {
    let (_, target, drafter) = PUBLISHED.into_iter().find(|pair| pair.0 == "qwen3-8b").unwrap();
    let (target, drafter) = (TargetConfig::open(&target).unwrap(), DrafterConfig::open(&drafter).unwrap());
    let card = Card::named("H200").unwrap();
    let costs = Costs::modelled(&card, &target, &drafter, 1000, 1, 16);
    assert_eq!(costs.draft, draft_pass(&target, &drafter, 1000, 1, 16).ms(&card));
    for rows in [1, 2, 16, 17, 64] {
        assert_eq!(costs.verify[rows - 1], target_pass(&target, 1000, 1, rows).ms(&card));
    }
    assert_eq!(costs.plain(), costs.verify[0]);
    // Bound by memory: a round of 64 rows costs little more than one of 16.
    assert!(costs.round(63) < 1.01 * costs.round(15));
    // Of so many sequences that products decide, it is what is verified that costs.
    let many = Costs::modelled(&card, &target, &drafter, 1000, 64, 16);
    assert_eq!(many.verify[31], target_pass(&target, 1000, 64, 32).ms(&card));
    assert_eq!(many.draft, draft_pass(&target, &drafter, 1000, 64, 16).ms(&card));
    assert!(many.round(63) > 2.0 * many.round(15));
}

#[test]
fn where_passes_are_of_few_sizes_a_row_costs_what_the_next_one_does() {
    let sized = |sizes: &[usize]| costs(0.5, |rows| rows as f64).of_sizes(sizes).verify;
    let all = sized(&[1, 1, 16, 32, 64]);
    let expected = |rows: usize| [1, 16, 32, 64].into_iter().find(|size| *size >= rows).unwrap() as f64;
    assert_eq!(all, (1..=64).map(expected).collect::<Vec<_>>());
    // What is never verified has a cost all the same.
    assert_eq!(sized(&[1, 5])[1..], [5.0; 63]);
    assert_eq!(sized(&[])[..3], [1.0, 2.0, 3.0]);
}

// ---- acceptance ----

#[test]
fn positions_begin_at_one_half_and_follow_what_is_counted() {
    let mut positions = Positions::default();
    let survival = |positions: &Positions, expected: &[f64]| {
        let found = positions.survival(expected.len());
        found.iter().zip(expected).for_each(|(found, expected)| near(*found, *expected));
    };
    survival(&positions, &[0.5, 0.25, 0.125]);
    // Of three drafts the first stood; a fourth there was not.
    positions.judged(3, 0b11);
    let a: f64 = 2.0 / 3.0;
    let b = 2.0 * a.powi(2) / 3.0;
    let c = 2.0 * b.powf(1.5) / 3.0;
    survival(&positions, &[a, b, c, c.powf(4.0 / 3.0)]);
    // A tree's second row, where the first and the third did not: what came before fades, for every row.
    positions.judged(2, 0b101);
    let a: f64 = (0.98 + 1.0) / (1.98 + 2.0);
    let b: f64 = (1.0 + 2.0 * a.powi(2)) / (1.98 + 2.0);
    let c = 2.0 * b.powf(1.5) / (0.98 + 2.0);
    survival(&positions, &[a, b, c]);
    positions.judged(0, 1);
    survival(&positions, &[(0.98 * 0.98 + 1.0) / (1.98 * 0.98 + 2.0)]);
    assert!(positions.survival(0).is_empty());
    // Bits of rows that were not verified, and rows beyond the bits.
    let mut garbage = Positions::default();
    garbage.judged(1, u64::MAX);
    survival(&garbage, &[2.0 / 3.0, 4.0 / 9.0]);
    garbage.judged(100, u64::MAX);
    let survival = garbage.survival(100);
    assert!(survival[62] > 0.9 && survival[63] < 0.7, "{survival:?}");
}

/// What is asked for fewer rows is what those alone would bring.
#[test]
fn positions_of_a_tree_foretell_every_smaller_one() {
    let mut random = Random::new(8);
    let parents: Vec<usize> =
        (0..40).map(|row: usize| if row == 0 { 0 } else { random.below(row) }).collect();
    let (mut positions, mut brought) = (Positions::default(), vec![0.0; 40]);
    let rounds = 4000;
    for _ in 0..rounds {
        // Walks down from the anchor, to each child with the same chance, or ends.
        let (mut stood, mut at) = (1u64, 0);
        loop {
            let children: Vec<usize> = (at + 1..40).filter(|row| parents[*row] == at).collect();
            let Some(next) = children.get(random.below(children.len() + 1)) else { break };
            (stood, at) = (stood | 1 << next, *next);
        }
        positions.judged(39, stood);
        (1..40).for_each(|row| {
            brought[row] += f64::from((stood & ((2 << row) - 2)).count_ones()) / rounds as f64
        });
    }
    let survival = positions.survival(39);
    for rows in 1..40 {
        let expected: f64 = survival[..rows].iter().sum();
        assert!((expected - brought[rows]).abs() < 0.35, "{rows} rows: {expected}, {}", brought[rows]);
    }
    assert!(brought[39] > 1.0 && brought[5] < brought[39] - 0.3, "{brought:?}");
}

#[test]
fn positions_find_the_acceptance_they_are_shown() {
    let mut random = Random::new(3);
    let truth = [0.9, 0.8, 0.5, 0.7, 0.2];
    let mut positions = Positions::default();
    let mut mean = [0.0; 5];
    for round in 0..6000 {
        let accepted = truth.iter().take_while(|p| unit(&mut random) < **p).count();
        positions.judged(5, chain_of(accepted));
        if round >= 1000 {
            positions.survival(5).iter().zip(&mut mean).for_each(|(s, mean)| *mean += s / 5000.0);
        }
    }
    let mut stands = 1.0;
    for (mean, accepted) in mean.iter().zip(truth) {
        stands *= accepted;
        // The guess counts as much as two of about fifty rounds.
        assert!((mean - stands).abs() < 0.04, "{mean}, expected about {stands}");
    }
}

// ---- controllers ----

/// Costs of the paths of a chain whose drafts have these probabilities.
fn chain(probabilities: &[f64]) -> Vec<u32> {
    let mut bits = 0.0;
    let cost = |p: &f64| {
        bits -= p.log2();
        (bits * 65536.0).round() as u32
    };
    probabilities.iter().map(cost).collect()
}

#[test]
fn by_position_waits_and_then_drafts_what_pays_a_tile_at_a_time() {
    // Every row costs a tenth of a step.
    let table = costs(0.5, |rows| 1.0 + 0.1 * rows as f64);
    let mut controller = ByPosition::new(table.clone());
    let mut positions = Positions::default();
    for round in 0..200 {
        let drafts = controller.drafts(15);
        let (best, _) = table.cheapest(&positions.survival(15));
        assert_eq!(drafts, if round < 4 { 15 } else { best.max(1) }, "round {round}");
        let accepted = [0, 3, 1, 2][round % 4].min(drafts);
        controller.judged(drafts, chain_of(accepted));
        positions.judged(drafts, chain_of(accepted));
    }
    assert!((2..8).contains(&controller.drafts(15)));
    assert_eq!(controller.drafts(1), 1);
    // From all to few and back, never more than 16 rows at once.
    let mut controller = ByPosition::new(table);
    let mut sizes = vec![];
    for round in 0..400 {
        let drafts = controller.drafts(63);
        sizes.push(drafts);
        controller.judged(drafts, chain_of(if (10..100).contains(&round) { 0 } else { drafts }));
    }
    assert!(sizes.windows(2).skip(4).all(|pair| pair[0].abs_diff(pair[1]) <= 16), "{sizes:?}");
    assert_eq!((sizes[..4].to_vec(), sizes[99], sizes[399]), (vec![63; 4], 1, 63), "{sizes:?}");
}

/// A drafter whose sureness is `bias` times too much in bits, and its rounds.
fn sure(random: &mut Random, bias: f64, depth: usize) -> (Vec<u32>, usize) {
    let real: Vec<f64> = (0..depth).map(|_| 0.3 + 0.7 * unit(random)).collect();
    let accepted = real.iter().take_while(|p| unit(random) < **p).count();
    let said: Vec<f64> = real.iter().map(|p| p.powf(1.0 / bias)).collect();
    (chain(&said), accepted)
}

#[test]
fn confidence_is_weighed_by_what_came_of_it() {
    let mut random = Random::new(4);
    let table = costs(0.3, |rows| 1.0 + 0.05 * rows as f64);
    for bias in [0.5, 1.0, 2.0, 3.0] {
        let mut controller = ByConfidence::new(table.clone());
        let mut mean = 0.0;
        for round in 0..4000 {
            assert_eq!(controller.drafts(15), 15);
            let (paths, accepted) = sure(&mut random, bias, 15);
            let drafts = controller.cut(&paths);
            let weight = controller.weight();
            let survival: Vec<f64> =
                paths.iter().map(|cost| (-weight * f64::from(*cost) / 65536.0).exp2()).collect();
            assert_eq!(drafts, by_brute_force(&table, &survival).0);
            controller.judged(drafts, chain_of(accepted.min(drafts)));
            mean += if round < 1000 { 0.0 } else { controller.weight() / 3000.0 };
        }
        assert!((mean / bias - 1.0).abs() < 0.15, "{mean} for {bias}");
    }
    let mut hopeless = ByConfidence::new(table);
    for _ in 0..2000 {
        let drafts = hopeless.cut(&chain(&[0.99; 15]));
        hopeless.judged(drafts, 1);
    }
    assert_eq!(hopeless.weight(), 4.0);
}

/// Runs `rounds` rounds, of which round `i` would accept `accepts(i)` of up to 15 drafts, and is judged when `late` more
/// have been asked for: which rounds drafted, and what all cost in plain steps per token.
fn play(
    controller: &mut WherePays<Fixed>,
    costs: &Costs,
    rounds: usize,
    late: usize,
    accepts: impl Fn(usize) -> usize,
) -> (Vec<usize>, f64) {
    let (mut drafted, mut tokens, mut spent, mut waiting) = (vec![], 0, 0.0, VecDeque::new());
    for round in 0..rounds + late {
        if waiting.len() > late || round >= rounds {
            match waiting.pop_front() {
                Some((drafts, accepted)) if drafts > 0 => controller.judged(drafts, chain_of(accepted)),
                _ => {}
            }
        }
        if round >= rounds {
            continue;
        }
        let drafts = controller.drafts(15);
        let accepted = accepts(round).min(drafts);
        waiting.push_back((drafts, accepted));
        if drafts > 0 {
            drafted.push(round);
        }
        tokens += accepted + 1;
        spent += if drafts > 0 { costs.round(drafts) } else { costs.plain() };
    }
    waiting
        .into_iter()
        .filter(|(drafts, _)| *drafts > 0)
        .for_each(|(d, a)| controller.judged(d, chain_of(a)));
    (drafted, spent / tokens as f64 / costs.plain())
}

#[test]
fn drafting_ends_where_it_does_not_pay_and_is_tried_ever_more_rarely() {
    let table = costs(0.2, |_| 1.0);
    for late in 0..4 {
        let mut controller = WherePays::new(Fixed(15), table.clone());
        let (drafted, each) = play(&mut controller, &table, 4000, late, |_| 0);
        // Four rounds before anything is made of them, then eight poor ones, and those that were on their way; then trials
        // after 16, 32, ... 256 plain steps, whose verdict is waited for.
        let mut expected: Vec<usize> = (0..12 + late).collect();
        let (mut at, mut interval, mut waited) = (11 + late, 16, 0);
        loop {
            at += waited + interval + 1;
            if at >= 4000 {
                break;
            }
            expected.push(at);
            (interval, waited) = ((2 * interval).min(256), late);
        }
        assert_eq!(drafted, expected, "{late} late");
        assert!(!controller.is_on() && each < 1.01, "{each}");
        // What then pays is found within the longest interval, and kept.
        let (drafted, each) = play(&mut controller, &table, 1000, late, |_| 9);
        assert!(controller.is_on() && drafted[0] <= 256, "{}", drafted[0]);
        assert_eq!(drafted.len(), 1000 - drafted[0] - late);
        assert!(each < 0.5, "{each}");
        // A plain step where nothing could be drafted is no trial, and no poor round.
        assert_eq!((controller.drafts(0), controller.is_on()), (0, true));
    }
}

#[test]
fn drafting_that_pays_is_never_left_out_and_a_bad_stretch_costs_little() {
    let table = costs(0.2, |_| 1.0);
    let mut controller = WherePays::new(Fixed(15), table.clone());
    let (drafted, _) = play(&mut controller, &table, 2000, 1, |round| [0, 0, 3, 0][round % 4]);
    assert_eq!(drafted.len(), 2000);
    assert!(controller.gain() > 1.2);
    // Eight times in turn: good stretches are drafted for the most part, bad ones are not.
    let mut controller = WherePays::new(Fixed(15), table.clone());
    for turn in 0..8 {
        let (bad, each) = play(&mut controller, &table, 600, 1, |_| 0);
        assert!(bad.len() < 60 && each < 1.05, "turn {turn}: {} rounds, {each}", bad.len());
        let (good, each) = play(&mut controller, &table, 600, 1, |_| 7);
        assert!(good.len() > 340 && each < 0.5, "turn {turn}: {} rounds, {each}", good.len());
    }
}

#[test]
fn what_pays_a_little_more_and_a_little_less_does_not_go_to_and_fro() {
    // A round costs 1.2 steps: one draft of two rounds pays, one of six does not.
    let table = costs(0.2, |_| 1.0);
    for (seed, pays) in [(1, false), (2, true), (3, false), (4, true)] {
        let mut random = Random::new(seed);
        let stands: Vec<usize> =
            (0..5000).map(|_| usize::from(unit(&mut random) < if pays { 0.5 } else { 0.16 })).collect();
        let mut controller = WherePays::new(Fixed(15), table.clone());
        let (mut turns, mut on) = (0, true);
        for stands in &stands {
            let drafts = controller.drafts(15);
            if drafts > 0 {
                controller.judged(drafts, chain_of(*stands));
            }
            turns += usize::from(controller.is_on() != on);
            on = controller.is_on();
        }
        assert!(turns < if pays { 12 } else { 40 }, "{turns} turns, pays: {pays}");
    }
}

// ---- on the CPU ----

struct Models(Target, Drafter);

fn load(pair: Pair) -> Models {
    Models(Target::load(&pair.target).unwrap(), Drafter::load(&pair.drafter.unwrap()).unwrap())
}

/// `vocab` of few tokens: random drafts are often right; of many: never.
fn drawn(vocab: usize) -> Models {
    let (target, drafter) = support::small();
    let written = support::write_pair(&support::Target { vocab, ..target }, &drafter);
    load(Pair::open(support::disk(&written.target), Some(support::disk(&written.drafter))).unwrap())
}

fn run(models: &Models, tree: Option<usize>, costs: Option<&Costs>, request: &Request) -> Outcome {
    let sequences = Sequences::new(&models.0, Some(&models.1), 1, usize::MAX);
    let request = Request { drafting: Drafting { tree, ..Default::default() }, ..request.clone() };
    cpu::install(|| generate(&mut sequences.adaptive(costs), &request, &mut Silent)).unwrap()
}

#[test]
fn no_costs_change_what_is_emitted() {
    let (demo, few, many) = (load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()), drawn(4), drawn(90));
    let cheap = costs(0.1, |_| 1.0);
    let dear = costs(0.1, |rows| 0.5 + 0.5 * rows as f64);
    let stairs = costs(0.3, |rows| rows.div_ceil(5) as f64);
    let prompts = held();
    let (mut cut, mut plain_steps) = (0, 0);
    for (models, prompt, tokens) in
        [(&demo, &prompts[3][..], 90), (&few, &[1, 3, 2], 200), (&many, &[5, 6], 200)]
    {
        for temperature in [0.0, 0.8] {
            let request = seeded(prompt, tokens, models.1.config.block, temperature, 3);
            let plain = run(models, None, None, &Request { block: 1, ..request.clone() });
            for tree in [None, Some(30)] {
                let whole = run(models, tree, None, &request);
                for costs in [&cheap, &dear, &stairs] {
                    let got = run(models, tree, Some(costs), &request);
                    assert_eq!((&got.tokens, got.finish), (&plain.tokens, plain.finish));
                    // And the same rounds again: no clock has a say.
                    assert_eq!(got.drafted, run(models, tree, Some(costs), &request).drafted);
                    let all: usize = got.drafted.iter().sum();
                    cut += usize::from(all < whole.drafted.iter().sum());
                    plain_steps += got.drafted.iter().filter(|drafts| **drafts == 0).count();
                }
            }
        }
    }
    assert!(cut > 18 && plain_steps > 500, "{cut} of 36 runs drafted less, {plain_steps} plain steps");
}

#[test]
fn a_drafter_that_is_never_right_is_left_alone_for_the_most_part() {
    let models = drawn(1000);
    let cheap = costs(0.3, |rows| 1.0 + 0.02 * rows as f64);
    for tree in [None, Some(16)] {
        let got = run(&models, tree, Some(&cheap), &seeded(&[7, 8, 9], 240, 8, 1.0, 2));
        let steps: Vec<f64> =
            got.drafted.iter().map(|d| if *d > 0 { cheap.round(*d) } else { 1.02 }).collect();
        let (drafted, each) =
            (steps.iter().filter(|s| **s > 1.02).count(), steps.iter().sum::<f64>() / 240.0);
        assert!((5..30).contains(&drafted) && each < 1.1, "{drafted} rounds drafted, {each} a token");
    }
}

/// After plain steps the drafter's context has no holes: it drafts what it would have, had it drafted all along.
#[test]
fn a_drafter_that_was_left_alone_catches_up() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let prompt = &held()[4];
    let begin = || {
        let mut sequence = Sequence::new(&models.0, Some(&models.1));
        sequence.start(&seeded(prompt, 120, 16, 0.0, 0)).unwrap();
        while sequence.prefill().unwrap().next.is_none() {}
        sequence
    };
    let (mut idle, mut busy) = (begin(), begin());
    let (mut plainly, mut drafted) = (vec![], vec![]);
    while drafted.len() < 80 {
        busy.round(&mut drafted).unwrap();
    }
    while plainly.len() < drafted.len() {
        idle.draft(1).unwrap();
        idle.verify(&[], &mut plainly).unwrap();
    }
    assert_eq!(plainly, drafted);
    assert_eq!(idle.lengths(), busy.lengths());
    assert_eq!(idle.draft(16).unwrap(), busy.draft(16).unwrap());
}

// ---- on devices ----

/// On the emulator, for a pair of so many tokens: of few, drafts are often right; of many, never.
fn on_device(vocab: usize, room: Room, then: impl FnOnce(&mut Batch)) {
    let (target, drafter) = tiny();
    let pair = open(&support::write_pair(&support::Target { vocab, ..target }, &drafter));
    let device = Emulator::new();
    let models = OnDevice::load(&device, &pair, room.positions).unwrap();
    then(&mut Batch::new(&device, &models, room).unwrap());
}

fn room(sequences: usize, tree: usize) -> Room {
    Room { adaptive: true, ..Room::new(sequences, 16, 256).with_trees(tree) }
}

fn with_tree(request: &Request, rows: usize) -> Request {
    let tree = (rows > 0).then_some(rows);
    Request { drafting: Drafting { tree, ..request.drafting.clone() }, ..request.clone() }
}

fn alone(batch: &mut Batch, request: &Request) -> Outcome {
    generate(batch, request, &mut Silent).unwrap()
}

/// Says so, and then that all may be drafted.
struct Script {
    sizes: VecDeque<usize>,
    /// (verified, stood) of its rounds
    heard: Rc<RefCell<Vec<(usize, u64)>>>,
}

impl Controller for Script {
    fn drafts(&mut self, most: usize) -> usize {
        self.sizes.pop_front().unwrap_or(most)
    }

    fn judged(&mut self, verified: usize, stood: u64) {
        self.heard.borrow_mut().push((verified, stood));
    }
}

/// Anything, and often nothing. What it is told of must be what it asked for, in order.
struct Wild {
    random: Random,
    asked: VecDeque<usize>,
}

impl Controller for Wild {
    fn drafts(&mut self, most: usize) -> usize {
        let drafts = [0, self.random.below(most + 1), most][self.random.below(3)];
        if drafts > 0 {
            self.asked.push_back(drafts);
        }
        assert!(self.asked.len() <= 2, "{:?}", self.asked);
        drafts
    }

    fn judged(&mut self, verified: usize, _: u64) {
        // Where positions end there may be fewer than the host knew of.
        let asked = self.asked.pop_front().unwrap();
        assert!(verified <= asked, "{verified} of {asked}");
    }
}

fn wild(seed: u64) -> Box<dyn Controller> {
    Box::new(Wild { random: Random::new(seed), asked: VecDeque::new() })
}

#[test]
fn rounds_on_a_device_verify_what_controllers_say_each_in_its_round() {
    on_device(4, room(2, 64), |batch| {
        let mut random = Random::new(21);
        let (mut scripts, mut requests, mut plain) = (vec![], vec![], vec![]);
        for (i, tree) in [64, 0, 40, 64, 0].into_iter().enumerate() {
            let most = if tree > 0 { tree - 1 } else { 15 };
            let sizes = [0, 1, 15, 16, 31, 32, most];
            let script: VecDeque<usize> = (0..60)
                .map(|_| [sizes[random.below(7)].min(most), random.below(most + 1)][random.below(2)])
                .collect();
            scripts.push(script);
            let asked = request(&[1 + i as u32 % 3, 2, 3], 40 + 11 * i, 16, [0.0, 0.9][i % 2]);
            plain.push(alone(batch, &Request { block: 1, ..asked.clone() }));
            requests.push(with_tree(&asked, tree));
        }
        // Sequences join in the order of the list.
        let left = RefCell::new(VecDeque::from(scripts.clone()));
        let heard: Vec<Rc<RefCell<Vec<_>>>> = scripts.iter().map(|_| Rc::default()).collect();
        let ears = RefCell::new(VecDeque::from(heard.clone()));
        batch.control(move || {
            let sizes = left.borrow_mut().pop_front().unwrap();
            Box::new(Script { sizes, heard: ears.borrow_mut().pop_front().unwrap() })
        });
        let got = together(batch, &requests, go_on);
        for (i, (got, plain)) in got.iter().zip(&plain).enumerate() {
            assert_eq!((&got.tokens, got.finish), (&plain.tokens, plain.finish), "request {i}");
            let script: Vec<usize> = scripts[i].iter().copied().take(got.drafted.len()).collect();
            assert_eq!(got.drafted, script, "request {i}");
            // What came of each round with drafts, and nothing else, is what its controller hears.
            let rounds = got.drafted.iter().zip(&got.accepted).filter(|(drafts, _)| **drafts > 0);
            let heard = heard[i].borrow();
            assert_eq!(heard.len(), rounds.clone().count(), "request {i}");
            for ((drafts, tokens), (verified, stood)) in rounds.zip(heard.iter()) {
                assert_eq!(
                    (verified, stood.count_ones() as usize, stood & 1),
                    (drafts, *tokens, 1),
                    "request {i}"
                );
                let is_tree = requests[i].drafting.tree.is_some();
                let (within, chain) = (*stood <= chain_of(*drafts), *stood == chain_of(tokens - 1));
                assert!(within && (is_tree || chain), "request {i}: {stood:b} of {drafts}");
            }
            assert!(got.accepted.iter().any(|tokens| *tokens > 2), "request {i}: {:?}", got.accepted);
        }
    });
}

#[test]
fn controllers_of_any_kind_leave_a_batchs_answers_alone() {
    for vocab in [4, 90] {
        on_device(vocab, room(3, 64), |batch| {
            let mut requests = vec![];
            for (i, tree) in [0, 64, 17, 0, 33, 0].into_iter().enumerate() {
                let asked = seeded(&[1, 2, 3, i as u32 % 4], 16 + 5 * i, 16, [0.0, 0.8][i % 2], i as u64);
                requests.push(with_tree(&asked, tree));
            }
            // One of no drafts, and one of drawn ones.
            requests[3].block = 1;
            requests[5].drafting.sampling.temperature = 1.0;
            let plainly =
                |request: &Request| Request { block: 1, drafting: Drafting::default(), ..request.clone() };
            let plain: Vec<Outcome> = requests.iter().map(|asked| alone(batch, &plainly(asked))).collect();
            let next = Cell::new(0);
            let kinds = move || -> Box<dyn Controller> {
                next.set(next.get() + 1);
                match next.get() % 3 {
                    0 => Box::new(Fixed(usize::MAX)),
                    _ => wild(next.get()),
                }
            };
            let modelled = together(batch, &requests, go_on);
            batch.control(kinds);
            for got in [modelled, together(batch, &requests, go_on)] {
                for (i, (got, plain)) in got.iter().zip(&plain).enumerate() {
                    assert_eq!(
                        (&got.tokens, got.finish),
                        (&plain.tokens, plain.finish),
                        "{vocab}: request {i}"
                    );
                }
            }
        });
    }
}

#[test]
fn every_token_comes_of_plain_decodings_logits_whatever_rounds_draft() {
    for (vocab, tree) in [(4, 0), (4, 64), (90, 0)] {
        on_device(vocab, room(1, tree), |batch| {
            batch.control(|| wild(5));
            for temperature in [0.0, 0.7] {
                let asked = with_tree(&request(&[3, 1, 2], 60, 16, temperature), tree);
                let report = lossless::check(batch, &asked, || Ok(Silent)).unwrap().unwrap();
                assert_eq!(
                    (report.identical, report.compared),
                    (Ok(()), 59),
                    "{vocab} tokens, trees of {tree}"
                );
            }
        });
    }
}

/// Plain steps leave no holes: the drafter drafts what it would have, had it drafted all along.
#[test]
fn a_drafter_that_follows_on_a_device_drafts_what_it_would_have() {
    on_device(4, room(1, 0), |batch| {
        let asked = request(&[2, 1, 3, 3], 150, 16, 0.9);
        batch.control(|| Box::new(Fixed(usize::MAX)));
        let busy = alone(batch, &asked);
        let brought = |rounds: std::ops::Range<usize>| busy.accepted[rounds].iter().sum::<usize>();
        assert!(busy.accepted.iter().filter(|tokens| **tokens > 1).count() > 10, "{:?}", busy.accepted);
        let rounds = busy.accepted.len();
        for (first, last) in [(0, 1), (0, 7), (3, 4), (5, 20), (1, rounds / 2)] {
            // Drafts as before, but for these rounds; as many plain steps as they brought tokens.
            let script = [vec![15; first], vec![0; brought(first..last)]].concat();
            batch.control(move || Box::new(Script { sizes: script.clone().into(), heard: Rc::default() }));
            let paused = alone(batch, &asked);
            assert_eq!(paused.tokens, busy.tokens);
            let ones = vec![1; brought(first..last)];
            let expected = [&busy.accepted[..first], &ones, &busy.accepted[last..]].concat();
            assert_eq!(paused.accepted, expected, "rounds {first} to {last}");
        }
    });
}

#[test]
fn on_a_device_a_drafter_that_is_never_right_is_left_alone_and_tried_again() {
    for tree in [0, 64] {
        on_device(1000, room(1, tree), |batch| {
            let asked = with_tree(&request(&[7, 8, 9], 120, 16, 0.0), tree);
            let got = alone(batch, &asked);
            assert_eq!(got.tokens, alone(batch, &Request { block: 1, ..asked.clone() }).tokens);
            assert_eq!(got.accepted, [1; 119]);
            let drafted: Vec<usize> = (0..119).filter(|round| got.drafted[*round] > 0).collect();
            // Twelve rounds and one on its way; trials after 16 and 32 plain steps, each with one on its way.
            assert_eq!(drafted, [&(0..13).collect::<Vec<_>>()[..], &[29, 63]].concat());
        });
    }
    // One that is right later on: it is left alone, tried, waited for, and kept.
    on_device(4, room(1, 0), |batch| {
        let got = alone(batch, &request(&[1, 2], 80, 16, 0.0));
        let drafted: Vec<bool> = got.drafted.iter().map(|drafts| *drafts > 0).collect();
        let expected =
            [vec![true; 13], vec![false; 16], vec![true, false], vec![true; drafted.len() - 31]].concat();
        assert_eq!(drafted, expected, "{:?}", got.accepted);
        assert!(drafted.len() > 31 && got.accepted[29] > 1, "{:?}", got.accepted);
    });
}

// ---- the flag ----

const PROMPT: &str = "def read_lines(path):\n    with open(path) as file:\n        ";

#[test]
fn adaptive_rounds_give_the_same_text_and_are_recorded() {
    for (sampling, tree) in
        [(&["--temperature", "0"][..], &[][..]), (&["--temperature", "1", "--seed", "4"], &["--tree", "40"])]
    {
        let record = |args: &[&str]| {
            let args = [&[PROMPT, "-n", "120", "--json"], sampling, args].concat();
            program::run(args).json().remove(0)
        };
        let plain = record(&["--draft", "none"]);
        let whole = record(tree);
        let adaptive = record(&[tree, &["--adaptive"]].concat());
        assert_eq!((&adaptive["tokens"], &whole["tokens"]), (&plain["tokens"], &plain["tokens"]));
        let told = |record: &Value| record["adaptive"].as_bool();
        assert_eq!((told(&adaptive), told(&whole), told(&plain)), (Some(true), Some(false), None));
        let sum = |record: &Value| -> u64 {
            record["drafted"].as_array().unwrap().iter().map(|drafts| drafts.as_u64().unwrap()).sum()
        };
        assert!(0 < sum(&adaptive) && sum(&adaptive) < sum(&whole), "{} of {}", sum(&adaptive), sum(&whole));
    }
    let args = [PROMPT, "-n", "60", "--adaptive", "--check-lossless", "--json"];
    assert_eq!(program::run(args).json()[0]["identical"], true);
}

#[test]
fn adaptive_rounds_on_the_emulator_give_the_same_text() {
    let args = [PROMPT, "-n", "14", "--json", "--device", "emulator", "-q", "--ctx", "128"];
    let tokens = |more: &[&str]| program::run([&args, more].concat()).json().remove(0);
    let (plain, adaptive) = (tokens(&["--draft", "none"]), tokens(&["--tree", "40", "--adaptive"]));
    assert_eq!(adaptive["tokens"], plain["tokens"]);
    assert_eq!((&adaptive["adaptive"], &adaptive["device"]), (&Value::Bool(true), &Value::from("emulator")));
    let checked = [&args[..], &["--adaptive", "--check-lossless"]].concat();
    assert_eq!(program::run(checked).json()[0]["identical"], true);
}

#[test]
fn what_cannot_adapt_is_refused_in_a_sentence() {
    for (args, code, part) in [
        (&["--block", "1"][..], 2, "--block is 1, which is plain decoding: --adaptive expects at least 2"),
        (&["--draft", "none"], 2, "--adaptive needs a drafter, but --draft is none"),
        (&["--verify", "block"], 2, "--adaptive is for the drafter's best tokens, but with --verify block"),
        (&["--coupled", "--device", "emulator"], 2, "--adaptive is for the drafter's best tokens"),
    ] {
        let run = program::run([&[PROMPT, "--adaptive"], args].concat());
        let lines = run.err.lines().count();
        assert!(
            run.code == code && run.out.is_empty() && lines == 1 && run.err.contains(part),
            "{args:?}: {run:?}"
        );
    }
}
