//! The sampling distribution and exact verification, against exact arithmetic, naive implementations and
//! statistics. Every seed is fixed, so a test passes always or never.

use crate::support::random;

use dflash::Error;
use dflash::spec::rng::{TABLES, philox};
use dflash::spec::sampling::{SamplingParams, argmax};
use dflash::spec::verify::match_chain;
use random::Random;

const UNFILTERED: SamplingParams =
    SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };

impl Random {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Rows with ties, signed zeros, masked tokens and outliers.
    fn logits(&mut self, vocab: usize) -> Vec<f32> {
        let kind = self.below(4);
        (0..vocab)
            .map(|_| match (kind, self.below(8)) {
                (0, _) => self.normal(3.0),
                (1, 0) => f32::NEG_INFINITY,
                (1, _) => self.below(4) as f32 * 0.5,
                (2, _) => self.pick(&[0.0, -0.0, 1.0]),
                (_, 0) => -1e30,
                (_, 1) => f32::NEG_INFINITY,
                _ => self.normal(20.0),
            })
            .collect()
    }
}

fn crc32(words: &[u32]) -> u32 {
    let step = |crc: u32, _| crc >> 1 ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
    !words.iter().flat_map(|w| w.to_le_bytes()).fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(byte), step))
}

/// A chi-square test that fails one correct row of counts in ten thousand. Cells with an expected count below
/// 10 are merged; the bound is Wilson and Hilferty's for 3.72 standard deviations.
fn assert_sampled_from(distribution: &[f64], counts: &[u64], what: &str) {
    let draws = counts.iter().sum::<u64>() as f64;
    let (mut rare, mut cells) = ((0.0, 0.0), Vec::new());
    for (&p, &n) in distribution.iter().zip(counts) {
        assert!(p > 0.0 || n == 0, "{what}: sampled a token of probability 0");
        match p * draws {
            e if e < 10.0 => rare = (rare.0 + e, rare.1 + n as f64),
            e => cells.push((e, n as f64)),
        }
    }
    if rare.0 >= 10.0 {
        cells.push(rare);
    } else {
        assert!(rare.1 < 40.0, "{what}: {} samples of tokens with an expected count of {}", rare.1, rare.0);
    }
    let chi2: f64 = cells.iter().map(|(e, n)| (n - e) * (n - e) / e).sum();
    let dof = (cells.len() - 1).max(1) as f64;
    let bound = dof * (1.0 - 2.0 / (9.0 * dof) + 3.72 * (2.0 / (9.0 * dof)).sqrt()).powi(3);
    assert!(
        chi2 < bound,
        "{what}: chi-square {chi2:.1} of at most {bound:.1}, {counts:?} for {distribution:?}"
    );
}

/// The weights of all tokens without filters, zeros included.
fn weights(sampling: &SamplingParams, logits: &[f32]) -> Vec<u64> {
    let mut all = vec![0; logits.len()];
    let open = SamplingParams { top_k: 0, top_p: 1.0, min_p: 0.0, ..sampling.clone() };
    open.survivors(logits).unwrap().into_iter().for_each(|(id, w)| all[id as usize] = w);
    all
}

/// A naive implementation of the filters: sort all tokens, truncate, compare sums as exact fractions.
fn naive_survivors(sampling: &SamplingParams, logits: &[f32]) -> Vec<(u32, u64)> {
    let weight = weights(sampling, logits);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap()); // stable: equal logits stay in id order
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let total: u128 = order.iter().map(|&x| u128::from(weight[x])).sum();
    let share = (sampling.top_p * 2f64.powi(32)).round() as u128;
    let short =
        |n: &usize| order[..*n].iter().map(|&x| u128::from(weight[x]) << 32).sum::<u128>() < total * share;
    let prefix = (0..=order.len()).find(|n| !short(n)).unwrap();
    order.truncate(prefix.max(1));
    let share = (sampling.min_p * 2f64.powi(32)).round() as u128;
    let max = u128::from(weight[order[0]]);
    order.retain(|&x| weight[x] > 0 && u128::from(weight[x]) << 32 >= max * share);
    order.sort();
    order.into_iter().map(|x| (x as u32, weight[x])).collect()
}

#[test]
fn philox_gives_the_known_answers() {
    let of = |c, k| philox(c, k);
    // Random123's vectors.
    assert_eq!(of([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(of([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
    assert_eq!(of(pi, [0xa4093822, 0x299f31d0]), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    // Computed in Python.
    let key = [0xDEADBEEF, 0x12345678];
    assert_eq!(of([5, 0, 42, 0], key), [0x106340bf, 0xd3452928, 0xc0fe0c42, 0x259e6cb0]);
    assert_eq!(of([5, 1, 42, 0], key), [0xe6aaac54, 0xc698c46f, 0x7912694d, 0xee68a0f1]);
    assert_eq!(of([6, 0, 42, 0], key), [0x6e2e45c8, 0xfdccfab2, 0xf9572a7b, 0xdb3485ca]);
}

#[test]
fn table_checksums_match_and_no_value_is_near_a_rounding_tie() {
    let t = &*TABLES;
    assert_eq!(crc32(&[0x34333231, 0x38373635]), 0x9AE0DAAF); // of "12345678", as zlib computes it
    assert_eq!((crc32(&t.thi), crc32(&t.tlo), crc32(&t.rlog)), (0x539def7a, 0xb92570b9, 0x99f334d7));
    let sum = |table: &[u32]| table.iter().map(|&x| u64::from(x)).sum::<u64>();
    assert_eq!((sum(&t.thi), sum(&t.tlo), t.rlog[0]), (397102106376, 549015127377, 1 << 27));
    assert_eq!((&t.thi[..3], t.thi[255]), (&[2147483648, 2141676973, 2135885998][..], 1076653033));
    assert_eq!((&t.tlo[..3], t.tlo[255]), (&[2147483648, 2147460935, 2147438222][..], 2141699624));

    let margin = |x: f64| (x - x.floor() - 0.5).abs();
    for i in 1..256 {
        assert!(margin((31.0 - f64::from(i) / 256.0).exp2()) > 2f64.powi(-10));
        assert!(margin((31.0 - f64::from(i) / 65536.0).exp2()) > 2f64.powi(-10));
    }
    for i in 1..4096 {
        assert!(margin((1.0 - (1.0 + f64::from(i) / 4096.0).log2()) * 2f64.powi(27)) > 2f64.powi(-17));
    }
}

#[test]
fn race_times_are_logarithms() {
    let t = &*TABLES;
    assert_eq!([0, 1, 2, !0].map(|u| t.time(u)), [31 << 27, 31 << 27, 31 << 27, 1]);
    let mut rng = Random::new(1);
    for u in (0..30).flat_map(|bits| (0..200).map(move |_| bits)).map(|bits| rng.next() as u32 >> bits | 2) {
        let exact = (32.0 - f64::from(u).log2()) * 2f64.powi(27);
        // One unit of rounding each for table and product, and the chord's error.
        assert!((t.time(u) as f64 - exact).abs() < 3.5, "u {u:#x}: {} for {exact}", t.time(u));
    }
    let mut last = 0;
    for u in (0..100_000).chain((100_000..=u32::MAX).step_by(9973)).map(|u| !u) {
        assert!(t.time(u) >= last, "time falls as u falls to {u:#x}");
        last = t.time(u);
    }
}

#[test]
fn weights_are_the_worked_examples() {
    let of = |temperature, row: &[f32]| weights(&SamplingParams { temperature, ..UNFILTERED }, row);
    let p = [1.0, 0.25, -0.5, -3.0];
    assert_eq!(of(1.0, &p), [4294967296, 2028806333, 958333631, 78664944]);
    assert_eq!(of(1.0, &[0.0, 1.0, -0.5, -1.0]), [1580037892, 4294967296, 958333631, 581260151]);
    assert_eq!(of(0.5, &p), [4294967296, 958333631, 213834704, 1440796]);
}

#[test]
fn weights_fall_with_the_logit_and_end_at_zero() {
    let mut last = u64::MAX;
    for t in 0..34 << 16 {
        let weight = TABLES.weight(0.0, -(t as f32), 1.0);
        assert!(weight <= last && (weight > 0) == (t <= 32 << 16), "exponent {t}: {weight} after {last}");
        last = weight;
    }
    for (max, logit) in [(0.0, f32::NEG_INFINITY), (f32::MAX, f32::MIN), (0.0, -1e30)] {
        assert_eq!(TABLES.weight(max, logit, 1e9), 0);
    }
    assert_eq!(TABLES.weight(0.0, -0.0, 1e9), 1 << 32);
}

#[test]
fn weights_are_softmax() {
    let mut rng = Random::new(2);
    for temperature in [0.3f32, 0.7, 1.0, 1.5, 100.0] {
        for _ in 0..10 {
            let spread = 0.5 + 7.5 * rng.unit();
            let row: Vec<f32> = (0..5000).map(|_| rng.normal(spread)).collect();
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let exact: Vec<f64> = row
                .iter()
                .map(|&l| ((f64::from(l) - f64::from(max)) / f64::from(temperature)).exp())
                .collect();
            let weight = weights(&SamplingParams { temperature, ..UNFILTERED }, &row);
            let (z, zw) = (exact.iter().sum::<f64>(), weight.iter().sum::<u64>() as f64);
            let tv: f64 =
                exact.iter().zip(&weight).map(|(e, &w)| (e / z - w as f64 / zw).abs()).sum::<f64>() / 2.0;
            assert!(tv < 2e-6, "total variation {tv} at temperature {temperature}, spread {spread}");
        }
    }
}

#[test]
fn filters_keep_the_tokens_of_their_definition() {
    let mut rng = Random::new(3);
    for case in 0..6000 {
        let vocab = [1, 2, 3, 7, 40, 300][rng.below(6)];
        let row = rng.logits(vocab);
        let sampling = SamplingParams {
            temperature: rng.pick(&[1e-4, 1e-3, 0.5, 1.0, 2.0, 100.0, 1e4]),
            top_k: rng.pick(&[0, 0, 1, 2, 5, vocab, 1000]),
            top_p: rng.pick(&[1.0, 1.0, 1e-12, 0.25, 0.5, 0.75, 0.9, 1.0 - 1e-9, 1.0 - 1e-12]),
            min_p: rng.pick(&[0.0, 0.0, 1e-12, 0.05, 0.5, 1.0 - 1e-12]),
            ..UNFILTERED
        };
        sampling.check().unwrap();
        match sampling.survivors(&row) {
            None => assert!(row.iter().all(|&l| l == f32::NEG_INFINITY)),
            Some(kept) => {
                assert_eq!(
                    kept,
                    naive_survivors(&sampling, &row),
                    "case {case}: {sampling:?}, {vocab} tokens"
                );
                assert_eq!(kept.iter().map(|&(_, w)| w).max(), Some(1 << 32), "case {case}: the best is in");
                let token = sampling.choose(&row, case).unwrap();
                assert!(
                    kept.iter().any(|&(id, _)| id == token),
                    "case {case}: sampled a token that was filtered out"
                );
            }
        }
    }
}

#[test]
fn ties_at_a_boundary_go_to_the_lower_id() {
    let ids = |s: SamplingParams, row: &[f32]| {
        s.survivors(row).unwrap().iter().map(|&(id, _)| id).collect::<Vec<_>>()
    };
    let row = [1.0, 2.0, 1.0, 2.0, 1.0];
    assert_eq!(ids(SamplingParams { top_k: 1, ..UNFILTERED }, &row), [1]);
    assert_eq!(ids(SamplingParams { top_k: 3, ..UNFILTERED }, &row), [0, 1, 3]);
    assert_eq!(ids(SamplingParams { top_k: 4, ..UNFILTERED }, &row), [0, 1, 2, 3]);
    let zeros = [-0.0, 0.0, -0.0, 0.0];
    assert_eq!(ids(SamplingParams { top_k: 2, ..UNFILTERED }, &zeros), [0, 1]);
    assert_eq!(ids(SamplingParams { top_p: 0.5, ..UNFILTERED }, &zeros), [0, 1]);
    assert_eq!(ids(SamplingParams { top_p: 0.5 + 1e-9, ..UNFILTERED }, &zeros), [0, 1, 2]);
    assert_eq!(ids(SamplingParams { top_p: 1e-12, ..UNFILTERED }, &zeros), [0]);
    assert_eq!(ids(SamplingParams { min_p: 1.0 - 1e-12, ..UNFILTERED }, &row), [1, 3]);
    // top-p applies to the tokens that top-k left: 1 of 2, not 1 of 4
    assert_eq!(ids(SamplingParams { top_k: 2, top_p: 0.5, ..UNFILTERED }, &zeros), [0]);
    assert_eq!([argmax(&row), argmax(&zeros), argmax(&[-1.0, -0.0, 0.0])], [Some(1), Some(0), Some(1)]);
}

#[test]
fn rows_without_a_finite_maximum_give_none() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for row in [&[0.0, nan, 1.0][..], &[nan, -inf], &[-inf, nan], &[1.0, inf], &[-inf; 5], &[], &[1.0, -nan]]
    {
        assert_eq!(argmax(row), None, "{row:?}");
        for temperature in [0.0, 1e-3, 1.0, 100.0] {
            let s = SamplingParams { temperature, top_k: 2, top_p: 0.5, ..UNFILTERED };
            assert_eq!((s.choose(row, 0), s.survivors(row)), (None, None), "{row:?}");
        }
    }
    for temperature in [0.0, 1e-3, 100.0] {
        assert_eq!(SamplingParams { temperature, ..UNFILTERED }.choose(&[-inf, f32::MIN, -inf], 9), Some(1));
    }
}

#[test]
fn sampling_params_out_of_range_are_refused_by_name() {
    let refused = |s: SamplingParams, name: &str| {
        let Err(Error::Option { name: found, .. }) = s.check() else { panic!("{s:?} was not refused") };
        assert_eq!(found, name);
    };
    for temperature in [f32::NAN, -1.0, -f32::MIN_POSITIVE, f32::INFINITY, 0.9e-4, 1.1e4] {
        refused(SamplingParams { temperature, ..UNFILTERED }, "temperature");
    }
    for top_p in [f64::NAN, 0.0, -0.5, 1.0 + 1e-9, f64::INFINITY] {
        refused(SamplingParams { top_p, ..UNFILTERED }, "top_p");
    }
    for min_p in [f64::NAN, -1e-9, 1.0, 2.0] {
        refused(SamplingParams { min_p, ..UNFILTERED }, "min_p");
    }
    for temperature in [0.0, -0.0, 1e-4, 1.0, 1e4] {
        SamplingParams { temperature, top_k: usize::MAX, top_p: 1e-300, ..UNFILTERED }.check().unwrap();
    }
}

#[test]
fn unchecked_sampling_params_out_of_range_do_not_panic() {
    for x in [f32::NAN, f32::INFINITY, -1.0, 1e-45] {
        let s = SamplingParams { temperature: x, top_p: x.into(), min_p: x.into(), ..UNFILTERED };
        s.choose(&[0.0, 1.0, -3e38, 3e38], 0);
    }
}

#[test]
fn temperature_zero_is_argmax() {
    let mut rng = Random::new(4);
    for case in 0..500 {
        let row = rng.logits(50);
        let s = SamplingParams {
            temperature: 0.0,
            top_k: 3,
            top_p: 0.1,
            min_p: 0.9,
            seed: rng.next(),
            stream: case,
        };
        let best = (0..50u32).rev().filter(|&x| row[x as usize] > f32::NEG_INFINITY).max_by(|&a, &b| {
            row[a as usize].partial_cmp(&row[b as usize]).unwrap() // the last of equals, so the lowest id
        });
        assert_eq!((s.choose(&row, case), argmax(&row)), (best, best), "{row:?}");
    }
}

/// A naive implementation of the race: one Philox word per survivor, ratios as exact fractions, from the
/// highest id down.
fn naive_race(s: &SamplingParams, kept: &[(u32, u64)], position: u32) -> u32 {
    let key = [(s.seed & 0xffff_ffff) as u32, (s.seed >> 32) as u32];
    let mut best = (u128::MAX >> 64, 1, 0);
    for &(id, w) in kept.iter().rev() {
        let word = philox([position, 0x0500_0000 + id / 4, s.stream, 0], key)[(id % 4) as usize];
        let (l, w) = (u128::from(TABLES.time(word)), u128::from(w));
        if l * best.1 <= best.0 * w {
            best = (l, w, id);
        }
    }
    best.2
}

#[test]
fn choose_is_the_integer_race_over_survivors() {
    let mut rng = Random::new(5);
    for case in 0..4000 {
        let vocab = [1, 3, 8, 33, 1000][rng.below(5)];
        let row = rng.logits(vocab);
        let s = SamplingParams {
            temperature: rng.pick(&[0.2, 1.0, 5.0]),
            top_k: rng.pick(&[0, 2, 6]),
            top_p: rng.pick(&[1.0, 0.8]),
            seed: rng.next(),
            stream: rng.next() as u32,
            ..UNFILTERED
        };
        let Some(kept) = s.survivors(&row) else { continue };
        let position = rng.next() as u32;
        assert_eq!(s.choose(&row, position), Some(naive_race(&s, &kept, position)), "case {case}");
    }
}

#[test]
fn equal_ratios_go_to_the_lower_id() {
    let (mut seen, mut ties) = (std::collections::HashMap::new(), 0);
    for id in 0..40_000 {
        let word = philox([0, 0x0500_0000 + id / 4, UNFILTERED.stream, 0], [1, 0])[id as usize % 4];
        if let Some(lower) = seen.insert(TABLES.time(word), id) {
            let mut row = vec![f32::NEG_INFINITY; 40_000];
            (row[lower as usize], row[id as usize]) = (0.5, 0.5);
            assert_eq!(UNFILTERED.choose(&row, 0), Some(lower), "{lower} and {id} take equally long");
            ties += 1;
        }
    }
    assert!(ties > 0, "no two ids had equal times");
}

/// How many of the 2^32 words have a time of at least `bound`. Times decrease as words increase.
fn slower(bound: u64) -> u64 {
    let (mut few, mut many) = (0, 1u64 << 32);
    while few < many {
        let middle = (few + many) / 2;
        if TABLES.time(middle as u32) >= bound { few = middle + 1 } else { many = middle }
    }
    few
}

/// The probability that id 1 of weight `w` beats id 0 of weight 2^32: exact over the words of id 0, a fine
/// quadrature over the words of id 1. Only the highest of these can win.
fn win_probability(w: u64) -> f64 {
    let step = (w / 16384).max(1);
    let reach = (w * 32).min(1 << 32);
    let wins: f64 = (0..reach / step)
        .map(|i| {
            let time = u128::from(TABLES.time(!((i * step + step / 2) as u32)));
            // id 0 loses if its time * w > time * 2^32, strictly
            let bound = ((time << 32) / u128::from(w) + 1).min(1 << 40) as u64;
            slower(bound) as f64 * step as f64
        })
        .sum();
    wins / 2f64.powi(64)
}

#[test]
fn the_race_of_two_is_won_in_proportion_to_weight() {
    for (share, tolerance) in
        [(1.0, 1e-4), (0.5, 1e-4), (1e-2, 1e-4), (1e-4, 1e-4), (1e-5, 5e-4), (1e-6, 5e-3), (1e-7, 5e-2)]
    {
        let w = (share * 2f64.powi(32)) as u64;
        let exact = w as f64 / (w as f64 + 2f64.powi(32));
        let got = win_probability(w);
        assert!((got / exact - 1.0).abs() < tolerance, "probability ratio {share}: {got:e} for {exact:e}");
    }
}

#[test]
fn flat_rows_of_large_vocabularies_are_sampled_evenly() {
    const V: usize = 150_000;
    let row = vec![0.0; V];
    let mut halves = [0; 2];
    (0..600).for_each(|p| halves[UNFILTERED.choose(&row, p).unwrap() as usize / (V / 2)] += 1);
    assert_sampled_from(&[0.5, 0.5], &halves, "halves of a flat row");
}

#[test]
fn samples_follow_the_exact_distribution() {
    let inf = f32::NEG_INFINITY;
    let rows: [&[f32]; 6] = [
        &[1.0, 0.25, -0.5, -3.0],
        &[4.0, 0.0, -2.0, -5.0, -5.0],
        &[0.0, -0.0, 0.0],
        &[inf, 1.0, inf, 1.0, 0.5, inf, -1.0],
        &[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        &[2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0],
    ];
    let filters = [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (4, 0.9, 0.1)];
    for (r, row) in rows.iter().enumerate() {
        for temperature in [0.3, 1.0, 3.0] {
            for (top_k, top_p, min_p) in filters {
                let s = SamplingParams { temperature, top_k, top_p, min_p, seed: 77 + r as u64, stream: 3 };
                let mut distribution = vec![0.0; row.len()];
                for (id, _) in naive_survivors(&s, row) {
                    distribution[id as usize] = (f64::from(row[id as usize]) / f64::from(temperature)).exp();
                }
                let z: f64 = distribution.iter().sum();
                distribution.iter_mut().for_each(|p| *p /= z);
                let mut counts = vec![0; row.len()];
                (0..60_000).for_each(|position| counts[s.choose(row, position).unwrap() as usize] += 1);
                assert_sampled_from(&distribution, &counts, &format!("{s:?} on {row:?}"));
            }
        }
    }
}

#[test]
fn a_million_samples_follow_the_exact_distribution() {
    let row = [1.0f32, 0.25, -0.5, -3.0, -6.0];
    let z: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
    let distribution: Vec<f64> = row.iter().map(|&l| f64::from(l).exp() / z).collect();
    let mut counts = [0; 5];
    (0..1_000_000).for_each(|position| counts[UNFILTERED.choose(&row, position).unwrap() as usize] += 1);
    assert_sampled_from(&distribution, &counts, "a million draws");
}

/// If seeds, streams or neighbouring positions shared noise, pairs of samples would be dependent.
#[test]
fn samples_at_other_positions_streams_and_seeds_are_independent() {
    let row = [0.5f32, 0.0, -0.5];
    let z: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
    let distribution: Vec<f64> = (0..9).map(|i| f64::from(row[i / 3] + row[i % 3]).exp() / (z * z)).collect();
    let base = SamplingParams { seed: 5, stream: 9, ..UNFILTERED };
    let other = |f: &dyn Fn(&mut SamplingParams)| {
        let mut s = base.clone();
        f(&mut s);
        s
    };
    let partners = [
        ("next position", base.clone(), 1),
        ("position 4 on", base.clone(), 4),
        ("next stream", other(&|s| s.stream += 1), 0),
        ("next seed", other(&|s| s.seed += 1), 0),
        ("seed's upper half", other(&|s| s.seed += 1 << 32), 0),
    ];
    for (what, partner, step) in partners {
        let mut counts = [0; 9];
        for i in 0..60_000 {
            let (p, q) = (i * (step + 1), i * (step + 1) + step);
            let (a, b) = (base.choose(&row, p).unwrap(), partner.choose(&row, q).unwrap());
            counts[(a * 3 + b) as usize] += 1;
        }
        assert_sampled_from(&distribution, &counts, what);
    }
    // ids 4 apart use the same word of neighbouring groups
    let mut wide = [f32::NEG_INFINITY; 9];
    (wide[0], wide[4], wide[8]) = (row[0], row[1], row[2]);
    let mut counts = [0; 9];
    (0..60_000).for_each(|p| counts[base.choose(&wide, p).unwrap() as usize] += 1);
    let distribution: Vec<f64> = wide.iter().map(|&l| f64::from(l).exp() / z).collect();
    assert_sampled_from(&distribution, &counts, "groups");
}

#[test]
fn a_sample_depends_only_on_its_arguments() {
    let mut rng = Random::new(6);
    let rows: Vec<Vec<f32>> = (0..300).map(|_| (0..500).map(|_| rng.normal(2.0)).collect()).collect();
    let s =
        SamplingParams { top_k: 100, top_p: 0.95, min_p: 0.001, seed: rng.next(), stream: 7, ..UNFILTERED };
    let draw = |i: usize| s.choose(&rows[i], i as u32);
    let forward: Vec<_> = (0..300).map(draw).collect();
    let mut backward: Vec<_> = (0..300).rev().map(draw).collect();
    backward.reverse();
    assert_eq!(forward, backward);
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..300).map(draw).collect::<Vec<_>>())).collect();
        threads.into_iter().for_each(|t| assert_eq!(t.join().unwrap(), forward));
    });
    // A masked tail, or a constant added to every logit, changes neither weights nor noise.
    let longer: Vec<f32> = rows[0].iter().copied().chain([f32::NEG_INFINITY; 13]).collect();
    assert_eq!(s.choose(&longer, 0), forward[0]);
    let short = [0.5, 1.0, -2.0, 0.25];
    for position in 0..1000 {
        assert_eq!(UNFILTERED.choose(&short, position), UNFILTERED.choose(&short.map(|l| l + 8.0), position));
    }
}

#[test]
fn greedy_chains_equal_the_ar_loop() {
    let mut rng = Random::new(7);
    for _ in 0..300 {
        let vocab = 2 + rng.below(5);
        // the target's next token after (last, last but one), a random table
        let table: Vec<u32> = (0..vocab * vocab).map(|_| rng.below(vocab) as u32).collect();
        let next = |out: &[u32]| table[out[out.len() - 1] as usize * vocab + out[out.len() - 2] as usize];
        let mut ar = vec![0, 0];
        (0..40).for_each(|_| ar.push(next(&ar)));
        let mut out = vec![0, 0];
        while out.len() < ar.len() {
            let block = rng.below(8);
            let draft: Vec<u32> = (0..block).map(|_| rng.below(vocab) as u32).collect();
            let rows: Vec<u32> = (0..=block).map(|j| next(&[&out, &draft[..j]].concat())).collect();
            let (a, y) = match_chain(&draft, |j| Some(rows[j])).unwrap();
            let expected = (0..block).find(|&j| draft[j] != rows[j]).unwrap_or(block);
            assert_eq!((a, y), (expected, rows[expected]));
            out.extend(&draft[..a]);
            out.push(y);
        }
        assert_eq!(out[..ar.len()], ar);
    }
}

#[test]
fn match_equals_ar_sampling_with_the_same_seed() {
    const V: usize = 5;
    let mut rng = Random::new(8);
    let (mut accepted, mut rounds) = (0, 0);
    for _ in 0..200 {
        let table: Vec<Vec<f32>> = (0..V * V).map(|_| rng.logits(V)).map(|mut r| (r[0] = 0.5, r).1).collect();
        let row = |out: &[u32]| &table[out[out.len() - 1] as usize * V + out[out.len() - 2] as usize];
        let s = SamplingParams {
            temperature: rng.pick(&[0.0, 0.3, 1.0, 2.0]),
            top_k: rng.pick(&[0, 3]),
            top_p: rng.pick(&[1.0, 0.9]),
            min_p: rng.pick(&[0.0, 0.05]),
            seed: rng.next(),
            stream: rng.next() as u32,
        };
        let sample = |out: &[u32]| s.choose(row(out), out.len() as u32);
        let mut ar = vec![0, 0];
        (0..60).for_each(|_| ar.push(sample(&ar).unwrap()));
        let (drafter, fixed) = (rng.below(4), rng.below(9));
        let mut out = vec![0, 0];
        while out.len() < ar.len() {
            let block = if drafter == 0 { fixed } else { rng.below(9) };
            let draft: Vec<u32> = (0..block)
                .map(|j| match drafter {
                    0 => argmax(row(&out)).unwrap(),
                    1 => rng.below(V) as u32,
                    // 2: the fourth draft is wrong; 3: all are right
                    2 if j == 3 => (ar.get(out.len() + j).unwrap_or(&0) + 1) % V as u32,
                    _ => *ar.get(out.len() + j).unwrap_or(&0),
                })
                .collect();
            let mut asked = 0;
            let (a, y) = match_chain(&draft, |j| {
                assert_eq!(j, asked, "rows are sampled in order, once");
                asked += 1;
                sample(&[&out, &draft[..j]].concat())
            })
            .unwrap();
            assert_eq!(asked, a + 1, "no row is sampled after the first mismatch");
            out.extend(&draft[..a]);
            out.push(y);
            (accepted, rounds) = (accepted + a, rounds + 1);
        }
        assert_eq!(out[..ar.len()], ar, "{s:?}, drafter {drafter}");
    }
    assert!(accepted > rounds, "{accepted} accepted drafts in {rounds} rounds");
}

#[test]
fn a_row_that_cannot_be_sampled_gives_none() {
    assert_eq!(match_chain(&[1, 2], |j| [Some(1), None][j.min(1)]), None);
    assert_eq!(match_chain(&[1, 2], |j| [Some(3), None][j]), Some((0, 3)));
    assert_eq!(match_chain(&[], |_| Some(4)), Some((0, 4)));
    assert_eq!(match_chain(&[], |_| None), None);
}
