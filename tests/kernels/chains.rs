//! Several chains per sequence, sampled and verified on a device. Every decision and every overlap must equal
//! those of `sample_chains` and `multi_draft_block_verify` of `src/spec/verify.rs`.

use crate::support::kernel;
use crate::support::sampled_trees;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows, VerifyInputs};
use dflash::gpu::kernels::round::DraftShape;
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::siblings::{SampledTrees, Siblings};
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use kernel::*;
use sampled_trees::*;

/// Parents of `count` chains of `each` drafts.
fn parents(count: usize, each: usize) -> Vec<u32> {
    let parent = |i: usize| if i.is_multiple_of(each) { 0 } else { i as u32 };
    [0].into_iter().chain((0..count * each).map(parent)).collect()
}

/// Compares every decision on random batches of many sizes. Most of the batches run only with
/// `DFLASH_EXHAUSTIVE=1`.
#[test]
fn sampled_and_verified_chains_equal_the_reference() {
    let mut random = Random::new(1);
    let (mut turn, mut coverage) = (0, Coverage::default());
    for (vocab, block, max_verify_rows, few, all) in [
        (1, 4, 7, 2, 5),
        (2, 4, 10, 5, 30),
        (3, 5, 16, 8, 50),
        (5, 64, 64, 1, 10),
        (17, 6, 16, 8, 50),
        (40, 2, 64, 1, 10),
        (130, 16, 64, 1, 10),
        (257, 8, 13, 2, 20),
        (2048, 4, 10, 1, 10),
        (9001, 3, 7, 1, 4),
        (32000, 3, 5, 1, 2),
    ] {
        // Launches cost by rows and logits.
        let small = max_verify_rows < 64 && vocab * max_verify_rows < 2000;
        let sequences = if small || exhaustive() { 8 } else { 3 };
        for i in 0..cases(few, all) {
            let sizes = (vocab, block, max_verify_rows);
            let batch = batch(&mut random, VerifyMethod::Block, sizes, sequences);
            on_gpu_in_turn(turn, |device| coverage.add(batch.check(device, &format!("batch {i}"))));
            turn += 1;
        }
    }
    println!("{coverage:?}");
    let part = if exhaustive() { 1 } else { 6 };
    let Coverage { accepted: [none, one, two, more], siblings_before, repeats, invalid, overlaps, .. } =
        coverage;
    assert!(none > 50 / part && one > 50 / part && two > 20 / part && more > 50 / part);
    assert!(siblings_before.iter().all(|&n| n > 20 / part));
    assert!(repeats > 100 / part && invalid > 20 / part && overlaps > 300 / part);
}

#[test]
fn chains_are_the_same_under_every_schedule() {
    same_under_every_schedule(VerifyMethod::Block);
}

/// A batch of one sequence. All drafts are sampled from one row of logits and verified with `target` of that
/// row.
fn alone(
    random: &mut Random,
    (vocab, block): (usize, usize),
    parents: Vec<u32>,
    target: impl Fn(&[f32]) -> Vec<f32>,
) -> Batch {
    let how =
        SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: random.next(), stream: 9 };
    let (row, max_verify_rows) = (random.normals(vocab, 2.0), parents.len());
    let request = Request {
        method: VerifyMethod::Block,
        length: 70,
        rounds: random.below(1000) as u32,
        sampling: how.clone(),
        draft_sampling: how,
        parents,
    };
    Batch {
        method: VerifyMethod::Block,
        vocab,
        block,
        max_verify_rows,
        requests: vec![request],
        target: target(&row).repeat(max_verify_rows),
        drafter: row.repeat(block),
        tokens: vec![None; max_verify_rows],
    }
}

#[test]
fn equal_distributions_accept_the_whole_first_chain() {
    on_gpu(|device| {
        let mut random = Random::new(4);
        for (count, each) in [(9, 7), (3, 5), (63, 1), (1, 15)] {
            let batch = alone(&mut random, (257, 16), parents(count, each), <[f32]>::to_vec);
            let coverage = batch.check(device, "equal");
            assert_eq!((coverage.accepted.iter().sum::<usize>(), coverage.siblings_before[0]), (1, each));
            let all = batch.run(device);
            assert_eq!(all.accepted, [each as u32]);
            assert_eq!(all.path[..=each], (0..=each as u32).collect::<Vec<_>>());
        }
    });
}

#[test]
fn more_chains_raise_the_acceptance() {
    // The target gives probability 0 to two thirds of the tokens. The more chains, the less often all of them
    // start with such a token.
    on_gpu(|device| {
        let mut random = Random::new(5);
        let masked = |row: &[f32]| {
            row.iter().enumerate().map(|(id, x)| if id % 3 > 0 { f32::NEG_INFINITY } else { *x }).collect()
        };
        let (mut accepted, count) = ([0; 2], cases(20, 40));
        for i in 0..count {
            for (at, chains) in [1, 8].into_iter().enumerate() {
                let batch = alone(&mut random, (90, 4), parents(chains, 2), masked);
                let coverage = batch.check(device, &format!("{chains} chains, {i}"));
                accepted[at] += coverage.accepted[1..].iter().sum::<usize>();
            }
        }
        println!("{accepted:?} of {count}");
        assert!(accepted[1] > accepted[0] + count * 3 / 20, "{accepted:?}");
    });
}

#[test]
fn one_chain_is_verified_as_by_verify_drafts() {
    on_gpu(|device| {
        let (mut random, mut accepted, count) = (Random::new(6), 0, cases(18, 30));
        for i in 0..count {
            let (vocab, block) = ([3, 40, 257][i % 3], [2, 4, 9][i / 3 % 3]);
            let mut batch = batch(&mut random, VerifyMethod::Block, (vocab, block, block), 6);
            for request in &mut batch.requests {
                (request.method, request.parents) = (VerifyMethod::Block, parents(1, block - 1));
            }
            batch.tokens.fill(None);
            let outcome = batch.run(device);
            accepted += outcome.accepted.iter().sum::<u32>();

            // The same drafts through the kernel for one chain per sequence.
            let sequences = batch.requests.len();
            let target = batch.distributions(device, &batch.target, block, |r| &r.sampling);
            let drafter = batch.distributions(device, &batch.drafter, block, |r| &r.draft_sampling);
            let state = |r: &Request| r.state(DraftShape::Chain, &r.sampling);
            let states = upload(device, &batch.requests.iter().flat_map(state).collect::<Vec<u8>>());
            let kernels =
                RejectionSampler { sequences, block, vocab, blocks: vocab.div_ceil(128), reduced: false };
            let spans: Vec<u32> = batch.requests.iter().flat_map(|r| [r.length, block as u32]).collect();
            let [tokens, spans] = [&outcome.tokens, &spans].map(|words| upload(device, words));
            let partial = poisoned::<u64>(device, sequences * block);
            let counters = upload(device, &vec![0u32; sequences]);
            let inputs = VerifyInputs {
                max_verify_rows: block,
                tokens: &tokens,
                spans: &spans,
                partial: &partial,
                counters: &counters,
            };
            let [accepted, next] = [(); 2].map(|()| poisoned::<u32>(device, sequences));
            let path = poisoned::<u32>(device, sequences * block);
            let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            let [target, drafter] =
                [&target, &drafter].map(|(logits, distributions)| Rows { logits, distributions });
            let tables = constant(device, &tables());
            kernels.verify(device, output, target, drafter, inputs, &states, &tables).unwrap();
            for (at, rows) in outcome.tokens.chunks(block).enumerate() {
                // Results that depend on a draft without a distribution are not used.
                let invalid = outcome.next[at] == NONE || rows.contains(&NONE);
                let of = |buffer: &Buffer| download::<u32>(device, buffer)[at];
                if !invalid {
                    assert_eq!(
                        (of(&accepted), of(&next)),
                        (outcome.accepted[at], outcome.next[at]),
                        "{i} {at}"
                    );
                    let path = &download::<u32>(device, &path)[at * block..][..block];
                    assert_eq!(path, &outcome.path[at * block..][..block], "{i} {at}");
                }
            }
        }
        assert!(accepted as usize > count * 10 / 3, "{accepted}");
    });
}

#[test]
fn garbage_stays_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(12);
        for i in 0..60 {
            let (vocab, sequences) = ([1, 7, 300, 3001][i % 4], 3);
            let (block, max_verify_rows) = ([1, 4, 16][i % 3], [1, 5, 12, 64][i / 3 % 4]);
            let kernels = Chains(Siblings { sequences, block, max_verify_rows, vocab });
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
            let counters = upload(device, &vec![0u32; sequences]);
            let spans = upload(device, &noise(sequences * 8));
            let (classes, partial) =
                (noise(sequences * max_verify_rows * CLASSES_BYTES), noise(sequences * block * 8));
            let (classes, partial) = (upload(device, &classes), upload(device, &partial));
            let mut states = noise(sequences * 128);
            // The method is the last word of a state, and the form the upper half of the eighth. With these,
            // all sequences take part; in every second batch all but the first.
            for words in states.chunks_mut(32).skip(i % 2) {
                (words[31], words[7]) =
                    (VerifyMethod::Block as u32, words[7] & 0xffff | (DraftShape::SampledTree as u32) << 16);
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
            let work = Workspace { classes: &classes, partial: &partial, counters: &counters };
            kernels.verify(device, output, trees, target, drafter, &states, &tables, work).unwrap();
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
        Chains(kernels).sample(&device, trees, rows, &states, &tables).unwrap_err().to_string()
    };
    let message = sample(kernels, SampledTrees { parents: &small, ..trees }, rows);
    assert_eq!(message, "kernel sample_chains: parents has 48 bytes, needs 64");
    let message = sample(Siblings { max_verify_rows: 65, ..kernels }, trees, rows);
    assert!(message.contains("2 sequences in blocks of 65 rows"), "{message}");
    let [accepted, next, path, classes, partial, counters] = [8, 8, 64, 16 * CLASSES_BYTES, 64, 8].map(get);
    let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
    let work = Workspace { classes: &classes, partial: &partial, counters: &counters };
    let verify = |output, target, work| {
        let verified = Chains(kernels).verify(&device, output, trees, target, rows, &states, &tables, work);
        verified.unwrap_err().to_string()
    };
    let message = verify(VerifyOutput { path: &small, ..output }, rows, work);
    assert_eq!(message, "kernel verify_chains: path has 48 bytes, needs 64");
    let message = verify(output, Rows { logits: &small, ..rows }, work);
    assert_eq!(message, "kernel verify_chains: the target's logits has 48 bytes, needs 2560");
    let message = verify(output, rows, Workspace { classes: &small, ..work });
    assert_eq!(message, "kernel verify_chains: classes has 48 bytes, needs 8192");
    let message = verify(output, rows, Workspace { partial: &small, ..work });
    assert_eq!(message, "kernel verify_chains: partial has 48 bytes, needs 64");
}
