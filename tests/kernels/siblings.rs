//! Trees sampled and verified on a device. Every decision must equal those of `sample_tree` and
//! `recursive_rejection` of `src/spec/verify.rs`.

use crate::support::kernel;
use crate::support::sampled_trees;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, Rows};
use dflash::gpu::kernels::round::DraftShape;
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::siblings::{SampledTrees, Siblings};
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::Distribution;
use dflash::spec::rng::{DrawKey, PhiloxStream, Purpose};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree::shape;
use kernel::*;
use sampled_trees::*;

/// Most of the random batches run only with `DFLASH_EXHAUSTIVE=1`.
#[test]
fn sampled_and_verified_trees_equal_the_reference() {
    let mut random = Random::new(1);
    let (mut turn, mut coverage) = (0, Coverage::default());
    for (vocab, block, max_verify_rows, few, all) in [
        (1, 4, 5, 2, 5),
        (2, 4, 8, 6, 30),
        (3, 5, 16, 8, 40),
        (17, 6, 16, 8, 40),
        (130, 16, 64, 1, 10),
        (257, 8, 12, 2, 20),
        (2048, 4, 9, 1, 10),
        (9001, 3, 6, 1, 4),
        (32000, 3, 6, 1, 2),
    ] {
        // Launches cost by rows and logits.
        let small = max_verify_rows < 64 && vocab * max_verify_rows < 2000;
        let sequences = if small || exhaustive() { 8 } else { 3 };
        for i in 0..cases(few, all) {
            let sizes = (vocab, block, max_verify_rows);
            let batch = batch(&mut random, VerifyMethod::Rejection, sizes, sequences);
            on_gpu_in_turn(turn, |device| coverage.add(batch.check(device, &format!("batch {i}"))));
            turn += 1;
        }
    }
    println!("{coverage:?}");
    let part = if exhaustive() { 1 } else { 6 };
    let Coverage { accepted: [none, one, two, more], siblings_before, .. } = coverage;
    let Coverage { all_rejected, repeats, invalid, .. } = coverage;
    assert!(none > 100 / part && one > 50 / part && two > 20 / part && more > 50 / part);
    assert!(siblings_before.iter().all(|&n| n > 20 / part));
    assert!(all_rejected > 50 / part && repeats > 100 / part && invalid > 20 / part);
}

#[test]
fn trees_are_the_same_under_every_schedule() {
    same_under_every_schedule(VerifyMethod::Rejection);
}

#[test]
fn equal_distributions_accept_the_first_sibling() {
    on_gpu(|device| {
        let mut random = Random::new(4);
        let (vocab, block, max_verify_rows) = (257, 8, 16);
        for temperature in [0.0, 1.0] {
            let row = random.normals(vocab, 2.0);
            let how = SamplingParams {
                temperature,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: random.next(),
                stream: 9,
            };
            let request = Request {
                method: VerifyMethod::Rejection,
                length: 70,
                rounds: 3,
                sampling: how.clone(),
                draft_sampling: how,
                parents: shape(max_verify_rows, block - 1).parents,
            };
            let batch = Batch {
                method: VerifyMethod::Rejection,
                vocab,
                block,
                max_verify_rows,
                requests: vec![request],
                target: row.repeat(max_verify_rows),
                drafter: row.repeat(block),
                tokens: vec![None; max_verify_rows],
            };
            let before = batch.check(device, "equal").siblings_before;
            assert_eq!((before[0] > 3, before[1..].iter().sum::<usize>()), (true, 0));
        }
    });
}

/// The residual max(p - q, 0) in units, and the distribution proportional to it.
fn residual(p: &Distribution, q: &Distribution) -> (Vec<(u32, u64)>, Distribution) {
    let over = p.tokens().iter().map(|&(id, w)| (id, w.saturating_sub(q.probability(id))));
    let over: Vec<(u32, u64)> = over.filter(|&(_, w)| w > 0).collect();
    let max = over.iter().map(|&(_, w)| w).max().unwrap();
    let rounding_token = over.iter().find(|&&(_, w)| w == max).unwrap().0;
    (over.clone(), Distribution::new(over, rounding_token).unwrap())
}

#[test]
fn every_unit_of_the_residual_between_siblings_is_sampled() {
    // The first sibling is always rejected. After that, nearly all of the probability of both p and q is on
    // the same tokens: one token, or two of equal weight, where the lower id takes the rounding remainder. The
    // second sibling has probability 0 in the target. After its rejection the residual is a few units, some of
    // them on those tokens.
    let none = f32::NEG_INFINITY;
    let half = |n: f32| -n * 2f32.ln();
    let how = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 11, stream: 5 };
    let mut tried = 0;
    for heavy in [&[2usize][..], &[2, 5], &[3, 4]] {
        let (mut target, mut drafter) = (vec![none; 8], vec![none; 8]);
        for &id in heavy {
            (target[id], drafter[id]) = (0.0, half(1.0));
        }
        drafter[7] = 0.0; // the first sibling
        (target[0], drafter[0]) = (half(31.0), half(32.0));
        (target[6], drafter[6]) = (half(30.0), half(32.0));
        drafter[1] = half(30.0); // the second
        let [p, q] = [&target, &drafter].map(|row| how.probabilities(row).unwrap());
        let (p, q) = (residual(&p, &q).1, q.without(7).unwrap());
        let (rest, _) = residual(&p, &q);
        let total: u64 = rest.iter().map(|&(_, w)| w).sum();
        assert!(total < 1 << 20 && heavy.iter().any(|&id| rest.iter().any(|r| r.0 == id as u32)), "{rest:?}");
        let bits = |rounds: u32| {
            let stream = PhiloxStream { seed: how.seed, stream: how.stream, round: rounds + 1, anchor: 9 };
            stream.bits(DrawKey { purpose: Purpose::Residual, depth: 1, row: 0 })
        };
        let unit = |rounds: u32| ((u128::from(bits(rounds)) * u128::from(total)) >> 64) as u64;
        // The last unit of each token and the first of the next one.
        let mut ends = Vec::new();
        let mut end = 0;
        for &(_, w) in &rest {
            end += w;
            ends.extend([end - 1, end % total]);
        }
        let found: Vec<u32> =
            ends.iter().map(|&end| (0..1 << 25).find(|&rounds| unit(rounds) == end).unwrap()).collect();
        let request = |&rounds: &u32| Request {
            method: VerifyMethod::Rejection,
            length: 9,
            rounds,
            sampling: how.clone(),
            draft_sampling: how.clone(),
            parents: vec![0, 0, 0],
        };
        for stride in [1, 4, 700] {
            let apart = |row: &[f32]| {
                let mut all = vec![none; 7 * stride + 1];
                row.iter().enumerate().for_each(|(i, &logit)| all[i * stride] = logit);
                all
            };
            let (drafts, sequences) = ([Some(7), Some(7 * stride as u32), Some(stride as u32)], found.len());
            let batch = Batch {
                method: VerifyMethod::Rejection,
                vocab: 7 * stride + 1,
                block: 2,
                max_verify_rows: 3,
                requests: found.iter().map(request).collect(),
                target: apart(&target).repeat(3 * sequences),
                drafter: apart(&drafter).repeat(2 * sequences),
                tokens: drafts.repeat(sequences),
            };
            on_gpu(|device| {
                let coverage = batch.check(device, "units");
                assert_eq!(coverage.accepted, [sequences, 0, 0, 0]);
                tried += sequences;
            });
        }
    }
    assert!(tried >= 3 * 3 * 6, "{tried}");
}

#[test]
fn garbage_stays_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(12);
        for i in 0..40 {
            let (vocab, sequences) = ([1, 7, 300, 3001][i % 4], 3);
            let (block, max_verify_rows) = ([1, 4, 16][i % 3], [1, 5, 12, 64][i / 3 % 4]);
            let kernels = Siblings { sequences, block, max_verify_rows, vocab };
            let mut noise = |bytes: usize| {
                // Half of the words are small, so that they can be valid ids, rows, methods and counts.
                let word =
                    |_| random.next() as u32 >> if random.below(2) == 0 { 0 } else { 20 + random.below(12) };
                let words: Vec<u32> = (0..bytes / 4).map(word).collect();
                words
            };
            let [tokens, parents, path] =
                [(); 3].map(|()| upload(device, &noise(sequences * max_verify_rows * 4)));
            let [accepted, next] = [(); 2].map(|()| upload(device, &noise(sequences * 4)));
            let spans = upload(device, &noise(sequences * 8));
            let mut states = noise(sequences * 128);
            // The method is the last word of a state, and the form the upper half of the eighth. With these,
            // all sequences take part; in every second batch all but the first.
            for words in states.chunks_mut(32).skip(i % 2) {
                (words[31], words[7]) = (
                    VerifyMethod::Rejection as u32,
                    words[7] & 0xffff | (DraftShape::SampledTree as u32) << 16,
                );
            }
            let states = upload(device, &states);
            let (target, drafter) = (
                [
                    noise(sequences * max_verify_rows * vocab * 4),
                    noise(sequences * max_verify_rows * DISTRIBUTION_BYTES),
                ],
                [noise(sequences * block * vocab * 4), noise(sequences * block * DISTRIBUTION_BYTES)],
            );
            let [target, drafter] = [target, drafter].map(|rows| rows.map(|words| upload(device, &words)));
            let tables = constant(device, &tables());
            let trees = SampledTrees { tokens: &tokens, parents: &parents, spans: &spans };
            let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            let [target, drafter] =
                [&target, &drafter].map(|[logits, distributions]| Rows { logits, distributions });
            kernels.verify(device, output, trees, target, drafter, &states, &tables).unwrap();
            kernels.sample(device, trees, drafter, &states, &tables).unwrap();
        }
    });
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let kernels = Siblings { sequences: 2, block: 4, max_verify_rows: 8, vocab: 40 };
    let get = |bytes: usize| device.allocate(bytes, "test").unwrap();
    let (logits, distributions) = (get(16 * 160), get(16 * DISTRIBUTION_BYTES));
    let rows = Rows { logits: &logits, distributions: &distributions };
    let (tokens, parents, spans) = (get(64), get(64), get(16));
    let trees = SampledTrees { tokens: &tokens, parents: &parents, spans: &spans };
    let (states, tables, small) = (get(256), get(2048), get(48));
    let sample = |kernels: Siblings, trees, rows| {
        kernels.sample(&device, trees, rows, &states, &tables).unwrap_err().to_string()
    };
    let message = sample(kernels, SampledTrees { parents: &small, ..trees }, rows);
    assert_eq!(message, "kernel sample_siblings: parents has 48 bytes, needs 64");
    let message = sample(Siblings { max_verify_rows: 65, ..kernels }, trees, rows);
    assert!(message.contains("2 sequences in blocks of 65 rows"), "{message}");
    let message = sample(Siblings { vocab: 0, ..kernels }, trees, rows);
    assert_eq!(message, "kernel sample_siblings: 0 tokens; expected 1 to 2^26");
    let message = sample(kernels, trees, Rows { distributions: &small, ..rows });
    assert_eq!(message, "kernel sample_siblings: the drafter's distributions has 48 bytes, needs 384");
    let [accepted, next, path] = [8, 8, 60].map(get);
    let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
    let verify = |output, target| {
        kernels.verify(&device, output, trees, target, rows, &states, &tables).unwrap_err().to_string()
    };
    assert_eq!(verify(output, rows), "kernel verify_tree: path has 60 bytes, needs 64");
    let path = get(64);
    let message = verify(VerifyOutput { path: &path, ..output }, Rows { logits: &small, ..rows });
    assert_eq!(message, "kernel verify_tree: the target's logits has 48 bytes, needs 2560");
}
