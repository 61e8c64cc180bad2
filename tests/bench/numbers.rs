//! The arithmetic of benchmarks: the roofline of a pair on a card, and statistics.

use crate::support;

use dflash::checkpoint::config::{Attention, DrafterConfig, TargetConfig};
use dflash::checkpoint::folder::PUBLISHED;
use dflash::perf::roofline::{
    CARDS, Card, draft_pass, drafter_bytes, fc_bytes, head_bytes, layer_bytes, target_bytes, target_pass,
};
use dflash::perf::statistics::{Interval, Pairing, Summary, Verdict, Work, quantile, rates, ratio};

fn configs(name: &str) -> (TargetConfig, DrafterConfig) {
    let (_, target, drafter) = PUBLISHED.into_iter().find(|pair| pair.0 == name).unwrap();
    (TargetConfig::open(&target).unwrap(), DrafterConfig::open(&drafter).unwrap())
}

/// Within half a percent, because expected values are rounded.
#[track_caller]
fn near(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 0.005, "{found}, expected {expected}");
}

fn bandwidth(gigabytes: f64) -> Card {
    Card { name: "", bandwidth: gigabytes, tflops: 989.0, memory: 141.0 }
}

// ---- roofline ----

#[test]
fn bytes_of_the_qwen3_pairs() {
    // MB of qkv, o, gate_up, down; MB of lm_head; MB of fc; GB of a pass of the target, and of the drafter.
    for (name, layer, head, fc, passes) in [
        ("qwen3-8b", [50.3, 33.6, 201.3, 100.7], 1245.0, 168.0, [15.14, 3.34]),
        ("qwen3-4b", [31.5, 21.0, 99.6, 49.8], 778.0, 65.5, [8.04, 1.85]),
    ] {
        let (target, drafter) = configs(name);
        for stack in [&target.stack, &drafter.stack] {
            for ((_, bytes), expected) in layer_bytes(stack).into_iter().zip(layer) {
                near(bytes / 1e6, expected);
            }
        }
        near(head_bytes(&target) / 1e6, head);
        near(fc_bytes(&drafter) / 1e6, fc);
        near(target_bytes(&target, 1) / 1e9, passes[0]);
        near(drafter_bytes(&target, &drafter) / 1e9, passes[1]);
        let at = |context| target_pass(&target, context, 1, 1).bytes;
        assert_eq!(at(1001) - at(1000), 147_456.0);
        let at = |context| draft_pass(&target, &drafter, context, 1, 16).bytes;
        assert_eq!(at(1001) - at(1000), 20_480.0);
    }
}

#[test]
fn least_times_of_the_qwen3_pairs_on_an_h200() {
    // ms of an AR step and of a round at 4.8, 4.3 and 4.1 TB/s; tok/s at 4.1 TB/s for acceptance lengths 4,
    // 6, 8.
    for (name, steps, rounds, rates) in [
        ("qwen3-8b", [3.15, 3.52, 3.69], [3.85, 4.30, 4.51], [888.0, 1331.0, 1775.0]),
        ("qwen3-4b", [1.68, 1.87, 1.96], [2.06, 2.30, 2.41], [1657.0, 2486.0, 3314.0]),
    ] {
        let (target, drafter) = configs(name);
        let step = target_pass(&target, 0, 1, 1);
        let (draft, verify) = (draft_pass(&target, &drafter, 0, 1, 16), target_pass(&target, 0, 1, 16));
        for (i, card) in [4800.0, 4300.0, 4100.0].map(bandwidth).iter().enumerate() {
            assert!([step, draft, verify].iter().all(|pass| pass.is_bound_by_memory(card)));
            let round = draft.ms(card) + verify.ms(card);
            near(step.ms(card), steps[i]);
            near(round, rounds[i]);
            if i == 2 {
                rates
                    .iter()
                    .zip([4.0, 6.0, 8.0])
                    .for_each(|(rate, tokens)| near(tokens / round * 1e3, *rate));
            }
        }
    }
}

#[test]
fn keys_and_values_count_per_sequence_within_the_window() {
    let (mut target, _) = configs("qwen3-8b");
    let bytes = |target: &TargetConfig, context, batch| target_pass(target, context, batch, 1).bytes;
    let weights = target_bytes(&target, 1);
    // The context is read and one position is written.
    assert_eq!(bytes(&target, 1000, 3) - weights, 3.0 * 1001.0 * 147_456.0);
    target.stack.attention[0] = Attention { causal: true, window: Some(100) };
    assert_eq!(bytes(&target, 1000, 3) - weights, 3.0 * (1001.0 * 147_456.0 - 900.0 * 4096.0));
    assert_eq!(bytes(&target, 100, 1) - weights, 101.0 * 147_456.0);
}

#[test]
fn operations_are_the_bound_for_many_rows() {
    let (target, drafter) = configs("qwen3-8b");
    let card = Card::named("h200").unwrap();
    // Two operations for each weight of a product, plus attention.
    let parameters = 36.0 * 192_937_984.0 + 151_936.0 * 4096.0;
    let attention = 36.0 * 4.0 * 4096.0 * 16.0 * (1000.0 + 16.0);
    assert_eq!(target_pass(&target, 1000, 1, 16).flops, 2.0 * 16.0 * parameters + attention);
    // The drafter's layers, the keys and values of injected features, and fc over five taps.
    let parameters =
        5.0 * (192_937_984.0 + 2.0 * 1024.0 * 4096.0) + 5.0 * 4096.0 * 4096.0 + 151_936.0 * 4096.0;
    let attention = 5.0 * 4.0 * 4096.0 * 16.0 * (1000.0 + 16.0);
    assert_eq!(draft_pass(&target, &drafter, 1000, 1, 16).flops, 2.0 * 16.0 * parameters + attention);
    let few = target_pass(&target, 0, 1, 16);
    assert_eq!(few.ms(&card), few.bytes / 4800e6);
    let many = target_pass(&target, 0, 64, 16);
    assert!(few.is_bound_by_memory(&card) && !many.is_bound_by_memory(&card));
    assert_eq!(many.ms(&card), many.flops / 989e9);
}

#[test]
fn cards_have_several_spellings() {
    assert_eq!(Card::named("rtx 4090").unwrap().bandwidth, 1008.0);
    assert_eq!(Card::named("H100SXM").unwrap().name, "H100-SXM");
    assert_eq!(Card::named("H100"), None);
    // Operations per byte, and GB: all cards use the same units.
    for card in CARDS {
        let intensity = card.tflops * 1e3 / card.bandwidth;
        assert!((70.0..450.0).contains(&intensity), "{card:?}");
        assert!((20.0..200.0).contains(&card.memory), "{card:?}");
        assert_eq!(Card::named(card.name), Some(card));
    }
}

// ---- statistics ----
//
// Expected values: numpy 2.4.6, scipy 1.17.1 (`pip install numpy scipy`). Quantiles are `numpy.quantile(x,
// q)`, the bootstrap is a loop over the same random indices with `numpy.median`; scipy's own is
//   scipy.stats.bootstrap((a, b), lambda u, v, axis: np.median(v, axis) / np.median(u, axis), paired=P,
//       n_resamples=200000, confidence_level=.99, method='percentile', rng=1, vectorized=True)

const BEFORE: [f64; 10] = [10.1, 10.3, 9.9, 10.0, 10.2, 10.4, 9.8, 10.15, 10.05, 10.25];
const AFTER: [f64; 10] = [9.0, 9.35, 8.8, 9.1, 9.15, 9.6, 8.7, 9.2, 9.05, 9.3];

fn alone(samples: &[f64]) -> Vec<&[f64]> {
    samples.chunks(1).collect()
}

#[track_caller]
fn equals(found: Interval, expected: (f64, f64, f64), within: f64) {
    let close = |a: f64, b: f64| (a - b).abs() <= within;
    let all = close(found.ratio, expected.0) && close(found.low, expected.1) && close(found.high, expected.2);
    assert!(all, "{found:?}, expected {expected:?}");
}

#[test]
fn quantiles_equal_numpy() {
    let samples = [3.1, 2.9, 3.3, 8.25, 3.05, 2.7, 3.0, 3.2, 2.95, 3.15, 3.6];
    let s = Summary::of(&samples).unwrap();
    let found = [s.mean, s.median, s.p10, s.p90, s.p99];
    let expected = [3.563636363636364, 3.1, 2.9, 3.6, 7.785000000000002];
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{s:?}");
    let found = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0].map(|q| quantile(&[4.0, 1.0, 3.0, 2.0], q).unwrap());
    let expected = [1.0, 1.3, 1.75, 2.5, 3.7, 4.0];
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
    assert_eq!((quantile(&[7.0], 0.9), quantile(&[], 0.5), Summary::of(&[])), (Some(7.0), None, None));
}

#[test]
fn bootstraps_equal_numpy_and_are_near_scipy() {
    let (before, after) = (alone(&BEFORE), alone(&AFTER));
    let apart = ratio(&before, &after, Pairing::Unpaired).unwrap();
    equals(apart, (0.9012345679012346, 0.8712871287128714, 0.9301745635910224), 1e-12);
    equals(apart, (0.9012345679012346, 0.8704156479217604, 0.9301745635910224), 0.002);
    let together = ratio(&before, &after, Pairing::Paired).unwrap();
    equals(together, (0.9012345679012346, 0.888888888888889, 0.9099999999999999), 1e-12);
    let before: [&[f64]; 6] = [
        &[10.0, 10.1, 10.05],
        &[11.0, 11.1, 11.2],
        &[9.5, 9.6],
        &[10.4, 10.5, 10.45],
        &[12.0, 12.1, 12.05, 12.2],
        &[9.8, 9.9, 9.7],
    ];
    let after: [&[f64]; 6] = [
        &[10.2, 10.3],
        &[11.3, 11.4, 11.2],
        &[9.7, 9.9],
        &[10.6, 10.5],
        &[12.3, 12.2, 12.4],
        &[9.9, 10.1, 10.0],
    ];
    let apart = ratio(&before, &after, Pairing::Unpaired).unwrap();
    equals(apart, (1.0071942446043165, 0.8416492047026279, 1.232354509562632), 1e-12);
    let together = ratio(&before, &after, Pairing::Paired).unwrap();
    equals(together, (1.0071942446043165, 0.971153846153846, 1.041860465116279), 1e-12);
    // Samples of a round are correlated: taken one by one they give too narrow an interval.
    let (flat_before, flat_after) = (before.concat(), after.concat());
    let flat = ratio(&alone(&flat_before), &alone(&flat_after), Pairing::Unpaired).unwrap();
    assert!(flat.high - flat.low < 0.8 * (apart.high - apart.low), "{flat:?} {apart:?}");
}

// A ratio of sums: the same loop, and scipy's bootstrap((tokens, ar, others, fast), S, paired=True, ..)
// with
//   S = lambda a, p, b, f, axis=-1: (b.sum(axis) / f.sum(axis)) / (a.sum(axis) / p.sum(axis))
#[test]
fn rates_of_tasks_equal_numpy_and_are_near_scipy() {
    let tokens = [128.0, 128.0, 57.0, 128.0, 96.0, 128.0, 31.0, 128.0];
    let ar = [1.31, 1.29, 0.62, 1.35, 1.02, 1.28, 0.37, 1.33];
    let fast = [0.41, 0.52, 0.21, 0.36, 0.47, 0.33, 0.19, 0.44];
    let tasks = |amounts: [f64; 8], times: [f64; 8]| -> Vec<Work> {
        amounts.iter().zip(times).map(|(&amount, time)| Work { amount, time }).collect()
    };
    let before = tasks(tokens, ar);
    let same = rates(&before, &tasks(tokens, fast)).unwrap();
    equals(same, (2.924914675767918, 2.3783783783783785, 3.519856317689531), 1e-12);
    equals(same, (2.924914675767918, 2.387596899224806, 3.503676470588236), 0.02);
    let others = [128.0, 128.0, 60.0, 128.0, 96.0, 120.0, 31.0, 128.0];
    let other = rates(&before, &tasks(others, fast)).unwrap();
    equals(other, (2.9071664071042775, 2.3831478993265973, 3.44839896233463), 1e-12);
    equals(other, (2.9071664071042775, 2.3962898717116765, 3.4430342904849076), 0.02);

    let work = |amount: f64, time: f64| Work { amount, time };
    let good = [work(3.0, 2.0)];
    equals(rates(&good, &[work(3.0, 1.0)]).unwrap(), (2.0, 2.0, 2.0), 0.0);
    assert_eq!((rates(&[], &[]), rates(&good, &[good[0]; 2])), (None, None));
    for bad in [work(0.0, 1.0), work(1.0, 0.0), work(f64::NAN, 1.0), work(1.0, f64::INFINITY)] {
        assert_eq!((rates(&good, &[bad]), rates(&[bad], &good)), (None, None), "{bad:?}");
    }
}

#[test]
fn intervals_cover_the_truth_at_their_level() {
    // Pairs of 15 and 25 samples with medians of 1 and 1.1, from a skewed distribution.
    let mut state = 7u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as f64 + 0.5) / (1u64 << 31) as f64
    };
    let mut draw = |count: usize, median: f64| -> Vec<f64> {
        (0..count).map(|_| median * (0.9 - 0.1 * uniform().ln() / 2f64.ln())).collect()
    };
    let mut covered = 0;
    let pairs = if support::exhaustive() { 300 } else { 60 };
    for _ in 0..pairs {
        let (before, after) = (draw(15, 1.0), draw(25, 1.1));
        let found = ratio(&alone(&before), &alone(&after), Pairing::Unpaired).unwrap();
        covered += usize::from(found.low <= 1.1 && 1.1 <= found.high);
    }
    // 99 % of 300 are 297, give or take 2.
    assert!(covered * 100 >= pairs * 96, "{covered} of {pairs}");
}

#[test]
fn incomparable_samples_have_no_ratio() {
    let one: [&[f64]; 1] = [&[1.0]];
    for (before, after) in [
        (&one[..], &[][..]),
        (&[], &one),
        (&one, &[&[0.0][..]]),
        (&one, &[&[f64::NAN][..]]),
        (&one, &[&[f64::INFINITY][..]]),
        (&one, &[&[1.0][..], &[]]),
    ] {
        assert_eq!(ratio(before, after, Pairing::Unpaired), None, "{before:?} {after:?}");
    }
    let two: [&[f64]; 2] = [&[1.0], &[2.0]];
    assert_eq!(ratio(&one, &two, Pairing::Paired), None);
    assert!(ratio(&one, &two, Pairing::Unpaired).is_some());
}

#[test]
fn verdicts_need_size_and_certainty() {
    let verdict = |ratio, low, high| Interval { ratio, low, high }.verdict(0.01);
    assert_eq!(verdict(1.05, 1.03, 1.08), Verdict::Faster);
    assert_eq!(verdict(0.95, 0.9, 0.99), Verdict::Slower);
    assert_eq!(verdict(1.0, 0.995, 1.004), Verdict::Same);
    // Certain but small; large but uncertain; neither.
    assert_eq!(verdict(1.005, 1.001, 1.009), Verdict::Same);
    assert_eq!(verdict(1.009, 1.001, 1.02), Verdict::Unclear);
    assert_eq!(verdict(1.05, 0.99, 1.1), Verdict::Unclear);
    assert_eq!(verdict(0.95, 0.9, 1.001), Verdict::Unclear);
    assert_eq!(verdict(1.0, 0.98, 1.02), Verdict::Unclear);
    let slower = Interval { ratio: 1.05, low: 1.03, high: 1.08 }.inverse();
    equals(slower, (1.0 / 1.05, 1.0 / 1.08, 1.0 / 1.03), 1e-15);
    assert_eq!(slower.verdict(0.01), Verdict::Slower);
}
