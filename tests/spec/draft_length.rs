//! Draft lengths: the arithmetic of costs and acceptance against brute force, and controllers under scripted
//! and random acceptance.

use crate::support::random;

use dflash::checkpoint::config::{DrafterConfig, TargetConfig};
use dflash::checkpoint::folder::PUBLISHED;
use dflash::perf::roofline::{Card, draft_pass, target_pass};
use dflash::spec::draft_length::{
    ByConfidence, ByPosition, Controller, CostGated, Costs, DraftLengthPolicy, Fixed, Positions,
};
use random::Random;
use std::collections::VecDeque;

fn costs(draft: f64, verify: impl Fn(usize) -> f64) -> Costs {
    Costs { draft, verify: (1..=64).map(verify).collect() }
}

/// Costs for policies that do not read them.
fn flat() -> Costs {
    costs(0.0, |_| 1.0)
}

/// The path bits of a chain whose first `accepted` drafts were accepted.
fn chain_of(accepted: usize) -> u64 {
    u64::MAX >> (63 - accepted)
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
    let mut all_accepted = 1.0;
    let survival: Vec<f64> = [0.86, 0.80, 0.76, 0.73, 0.70, 0.68, 0.66, 0.64]
        .iter()
        .map(|accepted| {
            all_accepted *= accepted;
            all_accepted
        })
        .collect();
    // Rows m include the anchor; a round without drafts does not run the drafter.
    let expected = [10.05, 6.0753, 4.4545, 3.7123, 3.325, 3.1238, 3.0296, 3.0039, 3.0258];
    assert_eq!((costs.ar_step() * 1e4).round() / 1e4, expected[0]);
    for n in 1..=8 {
        let per_token = costs.round(n) / (1.0 + survival[..n].iter().sum::<f64>());
        assert_eq!((per_token * 1e4).round() / 1e4, expected[n], "{n} drafts");
    }
    let (drafts, per_token) = costs.cheapest(&survival);
    assert_eq!((drafts, (per_token * 1e4).round() / 1e4), (7, 3.0039));
}

/// The cheapest length and its cost per token, by computing each length on its own.
fn by_brute_force(costs: &Costs, survival: &[f64]) -> (usize, f64) {
    let each = |n: usize| (costs.draft + costs.verify[n]) / (1.0 + survival[..n].iter().sum::<f64>());
    let all = (0..=survival.len()).map(|n| (n, each(n)));
    all.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap()
}

#[test]
fn the_cheapest_length_is_the_global_minimum() {
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
        // With convex costs, this is also where adding one more draft first does not pay.
        let (mut tokens, mut stop) = (1.0, 0);
        while stop < n && convex.round(stop + 1) / (tokens + survival[stop]) < convex.round(stop) / tokens {
            tokens += survival[stop];
            stop += 1;
        }
        assert_eq!(best.0, stop);
        // Arbitrary costs.
        let verify = (0..64).map(|_| 0.1 + unit(&mut random)).collect();
        let arbitrary = Costs { draft: unit(&mut random), verify };
        near(arbitrary.cheapest(&survival).1, by_brute_force(&arbitrary, &survival).1);
    }
}

#[test]
fn with_staircase_costs_the_best_length_fills_a_tile() {
    let mut random = Random::new(2);
    let mut edges = [0; 3];
    for _ in 0..500 {
        let second = 1.0 + unit(&mut random);
        let heights = [1.0, second, second + unit(&mut random)];
        let stairs = costs(0.2, |rows| heights[[16, 32, 64].iter().position(|edge| rows <= *edge).unwrap()]);
        let (mut all_accepted, keep) = (1.0, 0.8 + 0.2 * unit(&mut random));
        let survival: Vec<f64> = (0..63)
            .map(|_| {
                all_accepted *= keep;
                all_accepted
            })
            .collect();
        let (drafts, per_token) = stairs.cheapest(&survival);
        near(per_token, by_brute_force(&stairs, &survival).1);
        let edge = [16, 32, 64].iter().position(|edge| drafts + 1 == *edge).expect("a tile's last row");
        edges[edge] += 1;
    }
    assert!(edges.iter().all(|times| *times > 10), "{edges:?}");
    // Among equal costs the fewest drafts, and none if no draft is ever accepted.
    let flat = costs(1.0, |_| 1.0);
    assert_eq!(flat.cheapest(&[0.0; 20]).0, 0);
    assert_eq!(flat.cheapest(&[0.5, 0.0, 0.0]).0, 1);
    assert_eq!(flat.cheapest(&[]), (0, 2.0));
}

#[test]
fn modelled_costs_are_the_roofline_times_of_the_passes() {
    let (_, target, drafter) = PUBLISHED.into_iter().find(|pair| pair.0 == "qwen3-8b").unwrap();
    let (target, drafter) = (TargetConfig::open(&target).unwrap(), DrafterConfig::open(&drafter).unwrap());
    let card = Card::named("H200").unwrap();
    let costs = Costs::from_roofline(&card, &target, &drafter, 1000, 1, 16);
    assert_eq!(costs.draft, draft_pass(&target, &drafter, 1000, 1, 16).ms(&card));
    for rows in [1, 2, 16, 17, 64] {
        assert_eq!(costs.verify[rows - 1], target_pass(&target, 1000, 1, rows).ms(&card));
    }
    assert_eq!(costs.ar_step(), costs.verify[0]);
    // One sequence is bound by memory bandwidth: a round of 64 rows costs little more than one of 16.
    assert!(costs.round(63) < 1.01 * costs.round(15));
    // With 64 sequences arithmetic dominates: the cost follows the number of verified rows.
    let many = Costs::from_roofline(&card, &target, &drafter, 1000, 64, 16);
    assert_eq!(many.verify[31], target_pass(&target, 1000, 64, 32).ms(&card));
    assert_eq!(many.draft, draft_pass(&target, &drafter, 1000, 64, 16).ms(&card));
    assert!(many.round(63) > 2.0 * many.round(15));
}

#[test]
fn with_few_pass_sizes_a_row_costs_the_next_larger_pass() {
    let sized = |sizes: &[usize]| costs(0.5, |rows| rows as f64).of_sizes(sizes).verify;
    let all = sized(&[1, 1, 16, 32, 64]);
    let expected = |rows: usize| [1, 16, 32, 64].into_iter().find(|size| *size >= rows).unwrap() as f64;
    assert_eq!(all, (1..=64).map(expected).collect::<Vec<_>>());
    // Sizes beyond the largest pass have its cost.
    assert_eq!(sized(&[1, 5])[1..], [5.0; 63]);
    assert_eq!(sized(&[])[..3], [1.0, 2.0, 3.0]);
}

// ---- acceptance ----

#[test]
fn positions_start_at_one_half_and_follow_the_counts() {
    let mut positions = Positions::default();
    let survival = |positions: &Positions, expected: &[f64]| {
        let found = positions.survival(expected.len());
        found.iter().zip(expected).for_each(|(found, expected)| near(*found, *expected));
    };
    survival(&positions, &[0.5, 0.25, 0.125]);
    // The first of three drafts was accepted; there was no fourth.
    positions.observe(3, 0b11);
    let a: f64 = 2.0 / 3.0;
    let b = 2.0 * a.powi(2) / 3.0;
    let c = 2.0 * b.powf(1.5) / 3.0;
    survival(&positions, &[a, b, c, c.powf(4.0 / 3.0)]);
    // A tree whose path bits are 0b101. The older counts of every row decay.
    positions.observe(2, 0b101);
    let a: f64 = (0.98 + 1.0) / (1.98 + 2.0);
    let b: f64 = (1.0 + 2.0 * a.powi(2)) / (1.98 + 2.0);
    let c = 2.0 * b.powf(1.5) / (0.98 + 2.0);
    survival(&positions, &[a, b, c]);
    positions.observe(0, 1);
    survival(&positions, &[(0.98 * 0.98 + 1.0) / (1.98 * 0.98 + 2.0)]);
    assert!(positions.survival(0).is_empty());
    // Path bits of rows that were not verified are ignored. Rows beyond the 64 bits count as not accepted.
    let mut garbage = Positions::default();
    garbage.observe(1, u64::MAX);
    survival(&garbage, &[2.0 / 3.0, 4.0 / 9.0]);
    garbage.observe(100, u64::MAX);
    let survival = garbage.survival(100);
    assert!(survival[62] > 0.9 && survival[63] < 0.7, "{survival:?}");
}

/// The survival of a tree's rows predicts how many tokens each smaller tree would have given.
#[test]
fn positions_of_a_tree_predict_every_smaller_tree() {
    let mut random = Random::new(8);
    let parents: Vec<usize> =
        (0..40).map(|row: usize| if row == 0 { 0 } else { random.below(row) }).collect();
    let (mut positions, mut produced) = (Positions::default(), vec![0.0; 40]);
    let rounds = 4000;
    for _ in 0..rounds {
        // A random path from the anchor: each child, or the end, with equal probability.
        let (mut path, mut at) = (1u64, 0);
        loop {
            let children: Vec<usize> = (at + 1..40).filter(|row| parents[*row] == at).collect();
            let Some(next) = children.get(random.below(children.len() + 1)) else { break };
            (path, at) = (path | 1 << next, *next);
        }
        positions.observe(39, path);
        (1..40).for_each(|row| {
            produced[row] += f64::from((path & ((2 << row) - 2)).count_ones()) / rounds as f64
        });
    }
    let survival = positions.survival(39);
    for rows in 1..40 {
        let expected: f64 = survival[..rows].iter().sum();
        assert!((expected - produced[rows]).abs() < 0.35, "{rows} rows: {expected}, {}", produced[rows]);
    }
    assert!(produced[39] > 1.0 && produced[5] < produced[39] - 0.3, "{produced:?}");
}

#[test]
fn positions_estimate_the_acceptance_they_observe() {
    let mut random = Random::new(3);
    let truth = [0.9, 0.8, 0.5, 0.7, 0.2];
    let mut positions = Positions::default();
    let mut mean = [0.0; 5];
    for round in 0..6000 {
        let accepted = truth.iter().take_while(|p| unit(&mut random) < **p).count();
        positions.observe(5, chain_of(accepted));
        if round >= 1000 {
            positions.survival(5).iter().zip(&mut mean).for_each(|(s, mean)| *mean += s / 5000.0);
        }
    }
    let mut all_accepted = 1.0;
    for (mean, accepted) in mean.iter().zip(truth) {
        all_accepted *= accepted;
        // The prior counts as much as two of about fifty rounds.
        assert!((mean - all_accepted).abs() < 0.04, "{mean}, expected about {all_accepted}");
    }
}

// ---- controllers ----

/// The path costs of a chain whose drafts have these probabilities.
fn chain(probabilities: &[f64]) -> Vec<u32> {
    let mut bits = 0.0;
    let cost = |p: &f64| {
        bits -= p.log2();
        (bits * 65536.0).round() as u32
    };
    probabilities.iter().map(cost).collect()
}

#[test]
fn by_position_first_drafts_all_then_the_cheapest_length() {
    // Every row costs a tenth of an AR step.
    let table = costs(0.5, |rows| 1.0 + 0.1 * rows as f64);
    let mut controller = ByPosition::new(DraftLengthPolicy::CostModel, table.clone());
    let mut positions = Positions::default();
    for round in 0..200 {
        let drafts = controller.drafts(15);
        let (best, _) = table.cheapest(&positions.survival(15));
        assert_eq!(drafts, if round < 4 { 15 } else { best.max(1) }, "round {round}");
        let accepted = [0, 3, 1, 2][round % 4].min(drafts);
        controller.observe(drafts, chain_of(accepted));
        positions.observe(drafts, chain_of(accepted));
    }
    assert!((2..8).contains(&controller.drafts(15)));
    assert_eq!(controller.drafts(1), 1);
    // The length falls from all to few drafts and rises again, never by more than 16 rows at once.
    let mut controller = ByPosition::new(DraftLengthPolicy::CostModel, table);
    let mut sizes = vec![];
    for round in 0..400 {
        let drafts = controller.drafts(63);
        sizes.push(drafts);
        controller.observe(drafts, chain_of(if (10..100).contains(&round) { 0 } else { drafts }));
    }
    assert!(sizes.windows(2).skip(4).all(|pair| pair[0].abs_diff(pair[1]) <= 16), "{sizes:?}");
    assert_eq!((sizes[..4].to_vec(), sizes[99], sizes[399]), (vec![63; 4], 1, 63), "{sizes:?}");
}

/// A round of a drafter whose path costs, in bits, are too small by the factor `bias`: the costs it reports,
/// and the number of accepted drafts.
fn overconfident_round(random: &mut Random, bias: f64, depth: usize) -> (Vec<u32>, usize) {
    let real: Vec<f64> = (0..depth).map(|_| 0.3 + 0.7 * unit(random)).collect();
    let accepted = real.iter().take_while(|p| unit(random) < **p).count();
    let reported: Vec<f64> = real.iter().map(|p| p.powf(1.0 / bias)).collect();
    (chain(&reported), accepted)
}

#[test]
fn confidence_is_weighted_by_the_observed_acceptance() {
    let mut random = Random::new(4);
    let table = costs(0.3, |rows| 1.0 + 0.05 * rows as f64);
    for bias in [0.5, 1.0, 2.0, 3.0] {
        let mut controller = ByConfidence::new(DraftLengthPolicy::CostModel, table.clone());
        let mut mean = 0.0;
        for round in 0..4000 {
            assert_eq!(controller.drafts(15), 15);
            let (paths, accepted) = overconfident_round(&mut random, bias, 15);
            let drafts = controller.truncate(&paths);
            let weight = controller.weight();
            let survival: Vec<f64> =
                paths.iter().map(|cost| (-weight * f64::from(*cost) / 65536.0).exp2()).collect();
            assert_eq!(drafts, by_brute_force(&table, &survival).0);
            controller.observe(drafts, chain_of(accepted.min(drafts)));
            mean += if round < 1000 { 0.0 } else { controller.weight() / 3000.0 };
        }
        assert!((mean / bias - 1.0).abs() < 0.15, "{mean} for {bias}");
    }
    let mut never_right = ByConfidence::new(DraftLengthPolicy::CostModel, table);
    for _ in 0..2000 {
        let drafts = never_right.truncate(&chain(&[0.99; 15]));
        never_right.observe(drafts, 1);
    }
    assert_eq!(never_right.weight(), 4.0);
}

/// For each policy: a controller that chooses the length ahead, before drafting, and one that may read the
/// drafts' probabilities.
#[test]
fn controllers_that_decide_ahead_need_no_draft_probabilities() {
    let costs = costs(0.1, |_| 1.0);
    for (policy, ahead, needs_probs, max) in [
        (DraftLengthPolicy::Full, true, false, 100),
        (DraftLengthPolicy::Full, false, false, 100),
        (DraftLengthPolicy::CostModel, true, false, 63),
        (DraftLengthPolicy::CostModel, false, true, 63),
        (DraftLengthPolicy::Threshold(0.5), true, false, 63),
        (DraftLengthPolicy::Threshold(0.5), false, true, 63),
    ] {
        let mut controller = policy.controller(&costs, ahead);
        assert_eq!(
            (controller.needs_draft_probs(), controller.drafts(100)),
            (needs_probs, max),
            "{policy:?}, ahead: {ahead}"
        );
        assert_eq!((controller.drafts(7), controller.drafts(0)), (7, 0), "{policy:?}, ahead: {ahead}");
        let kept = controller.truncate(&[0, 100, 66 << 16]);
        assert_eq!(kept, if needs_probs { 2 } else { 3 }, "{policy:?}, ahead: {ahead}");
    }
}

#[test]
fn by_position_keeps_rows_above_the_threshold_and_at_least_one() {
    for min_probability in [1e-90, 0.2, 0.5, 0.8, 1.0] {
        let mut random = Random::new(31);
        let mut controller = DraftLengthPolicy::Threshold(min_probability).controller(&flat(), true);
        let mut positions = Positions::default();
        let mut sizes = vec![];
        // No draft is accepted for 300 rounds, then all, then a random number.
        for round in 0..900 {
            let drafts = controller.drafts(15);
            let survival = positions.survival(15);
            let enough = (0..15).find(|row| survival[*row] < min_probability).unwrap_or(15);
            assert_eq!(
                drafts,
                if round < 4 { 15 } else { enough.max(1) },
                "threshold {min_probability}, round {round}"
            );
            let accepted = [0, 15, random.below(16)][round / 300].min(drafts);
            controller.observe(drafts, chain_of(accepted));
            positions.observe(drafts, chain_of(accepted));
            sizes.push(drafts);
        }
        // At least one draft is verified in each round, so the length grows again when drafts are accepted.
        let expected =
            if min_probability < 1e-6 { (15, 15) } else { (1, if min_probability < 1.0 { 15 } else { 1 }) };
        assert_eq!((sizes[299], sizes[599]), expected, "threshold {min_probability}: {sizes:?}");
    }
    // A tree ends before the first row that is not accepted often enough, whatever follows.
    let mut controller = DraftLengthPolicy::Threshold(0.5).controller(&flat(), true);
    for _ in 0..4 {
        assert_eq!(controller.drafts(20), 20);
        controller.observe(20, 0b110111);
    }
    // The length changes step by step.
    assert_eq!([(); 2].map(|()| controller.drafts(20)), [4, 2]);
}

#[test]
fn by_confidence_verifies_paths_of_sufficient_probability() {
    let kept_drafts = |min_probability: f64, paths: &[u32]| {
        DraftLengthPolicy::Threshold(min_probability).controller(&flat(), false).truncate(paths)
    };
    // Path probabilities 1/2, 1/4, 1/8, ...: a path with exactly the threshold is kept.
    let halves = chain(&[0.5; 10]);
    for (min_probability, kept) in
        [(0.51, 0), (0.5, 1), (0.26, 1), (0.25, 2), (0.125, 3), (1e-9, 10), (1.0, 0)]
    {
        assert_eq!(kept_drafts(min_probability, &halves), kept, "threshold {min_probability}");
    }
    assert_eq!((kept_drafts(1.0, &[0, 0, 1, 0]), kept_drafts(0.5, &[])), (2, 0));
    // A tree keeps the rows before the first one below the threshold.
    assert_eq!(kept_drafts(0.25, &[1 << 16, 3 << 15, 2 << 16, (2 << 16) + 1, 2 << 16]), 3);
    // The results of past rounds do not change the decision.
    let mut controller = DraftLengthPolicy::Threshold(0.9).controller(&flat(), false);
    for round in 0..2000 {
        assert_eq!(controller.drafts(15), 15);
        let (paths, kept) = if round % 2 == 0 { (chain(&[0.8; 15]), 0) } else { (chain(&[0.99; 15]), 10) };
        assert_eq!(controller.truncate(&paths), kept, "round {round}");
        controller.observe(kept, 1);
    }
}

/// Runs `rounds` rounds. Round `i` accepts up to `accepts(i)` of 15 drafts, and its result is observed `delay`
/// rounds later. Returns which rounds drafted, and the cost per token in AR steps.
fn run_rounds(
    controller: &mut CostGated<Fixed>,
    costs: &Costs,
    rounds: usize,
    delay: usize,
    accepts: impl Fn(usize) -> usize,
) -> (Vec<usize>, f64) {
    let (mut drafted, mut tokens, mut spent, mut waiting) = (vec![], 0, 0.0, VecDeque::new());
    for round in 0..rounds + delay {
        if waiting.len() > delay || round >= rounds {
            match waiting.pop_front() {
                Some((drafts, accepted)) if drafts > 0 => controller.observe(drafts, chain_of(accepted)),
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
        spent += if drafts > 0 { costs.round(drafts) } else { costs.ar_step() };
    }
    waiting
        .into_iter()
        .filter(|(drafts, _)| *drafts > 0)
        .for_each(|(d, a)| controller.observe(d, chain_of(a)));
    (drafted, spent / tokens as f64 / costs.ar_step())
}

#[test]
fn drafting_that_does_not_pay_stops_and_is_tried_more_rarely() {
    let table = costs(0.2, |_| 1.0);
    for delay in 0..4 {
        let mut controller = CostGated::new(Fixed, table.clone());
        let (drafted, per_token) = run_rounds(&mut controller, &table, 4000, delay, |_| 0);
        // Drafting stops after four rounds of warm-up, eight poor rounds, and those already in flight. Trials
        // follow after 16, 32, ... 256 AR steps; each waits for the result of the one before.
        let mut expected: Vec<usize> = (0..12 + delay).collect();
        let (mut at, mut interval, mut waited) = (11 + delay, 16, 0);
        loop {
            at += waited + interval + 1;
            if at >= 4000 {
                break;
            }
            expected.push(at);
            (interval, waited) = ((2 * interval).min(256), delay);
        }
        assert_eq!(drafted, expected, "delay {delay}");
        assert!(!controller.is_on() && per_token < 1.01, "{per_token}");
        // Drafting that pays again is found within the longest interval, and continues.
        let (drafted, per_token) = run_rounds(&mut controller, &table, 1000, delay, |_| 9);
        assert!(controller.is_on() && drafted[0] <= 256, "{}", drafted[0]);
        assert_eq!(drafted.len(), 1000 - drafted[0] - delay);
        assert!(per_token < 0.5, "{per_token}");
        // An AR step where nothing can be drafted is neither a trial nor a poor round.
        assert_eq!((controller.drafts(0), controller.is_on()), (0, true));
    }
}

#[test]
fn drafting_that_pays_never_stops_and_bad_phases_cost_little() {
    let table = costs(0.2, |_| 1.0);
    let mut controller = CostGated::new(Fixed, table.clone());
    let (drafted, _) = run_rounds(&mut controller, &table, 2000, 1, |round| [0, 0, 3, 0][round % 4]);
    assert_eq!(drafted.len(), 2000);
    assert!(controller.gain() > 1.2);
    // Phases in which no draft is accepted and phases in which 7 are, eight times each: the controller drafts
    // in few rounds of the bad phases and in most rounds of the good ones.
    let mut controller = CostGated::new(Fixed, table.clone());
    for turn in 0..8 {
        let (bad, per_token) = run_rounds(&mut controller, &table, 600, 1, |_| 0);
        assert!(bad.len() < 60 && per_token < 1.05, "turn {turn}: {} rounds, {per_token}", bad.len());
        let (good, per_token) = run_rounds(&mut controller, &table, 600, 1, |_| 7);
        assert!(good.len() > 340 && per_token < 0.5, "turn {turn}: {} rounds, {per_token}", good.len());
    }
}

#[test]
fn drafting_near_break_even_does_not_oscillate() {
    // A round costs 1.2 AR steps: one accepted draft in two rounds pays, one in six does not.
    let table = costs(0.2, |_| 1.0);
    for (seed, pays) in [(1, false), (2, true), (3, false), (4, true)] {
        let mut random = Random::new(seed);
        let accepted: Vec<usize> =
            (0..5000).map(|_| usize::from(unit(&mut random) < if pays { 0.5 } else { 0.16 })).collect();
        let mut controller = CostGated::new(Fixed, table.clone());
        let (mut switches, mut on) = (0, true);
        for accepted in &accepted {
            let drafts = controller.drafts(15);
            if drafts > 0 {
                controller.observe(drafts, chain_of(*accepted));
            }
            switches += usize::from(controller.is_on() != on);
            on = controller.is_on();
        }
        assert!(switches < if pays { 12 } else { 40 }, "{switches} switches, pays: {pays}");
    }
}
