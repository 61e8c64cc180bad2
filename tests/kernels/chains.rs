//! Several chains drawn on a device and the best of them judged, decision for decision and sum for sum against
//! `sample_chains` and `multi_draft_block_verify` of `src/spec/verify.rs`.

use crate::support::drawn;
use crate::support::kernel;

use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::emulator::Emulator;
use dflash::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows, VerifyInputs};
use dflash::gpu::kernels::round::Form;
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::siblings::{SampledTrees, Siblings};
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use drawn::*;
use kernel::*;

/// Parents of `count` chains of `each` drafts.
fn parents(count: usize, each: usize) -> Vec<u32> {
    let parent = |i: usize| if i.is_multiple_of(each) { 0 } else { i as u32 };
    [0].into_iter().chain((0..count * each).map(parent)).collect()
}

#[test]
fn chains_are_drawn_and_judged_as_the_rules_say() {
    let mut random = Random::new(1);
    let shrink = if cfg!(feature = "sanitize") { 20 } else { 1 };
    let mut seen = Seen::default();
    for (vocab, block, wide, batches) in [
        (1, 4, 7, 5),
        (2, 4, 10, 30),
        (3, 5, 16, 50),
        (5, 64, 64, 10),
        (17, 6, 16, 50),
        (40, 2, 64, 10),
        (130, 16, 64, 10),
        (257, 8, 13, 20),
        (2048, 4, 10, 10),
        (9001, 3, 7, 4),
        (32000, 3, 5, 2),
    ] {
        for i in 0..(batches / shrink).max(1) {
            let batch = batch(&mut random, VerifyMethod::Block, (vocab, block, wide), 8);
            every_device_in_turn(i, |device| seen.add(batch.check(device, &format!("batch {i}"))));
        }
    }
    println!("{seen:?}");
    if shrink == 1 {
        let Seen { stood: [none, one, two, more], places, repeats, damaged, sums, .. } = seen;
        assert!(none > 50 && one > 50 && two > 20 && more > 50, "{none} {one} {two} {more}");
        assert!(places.iter().all(|&n| n > 20), "{places:?}");
        assert!(repeats > 100 && damaged > 20 && sums > 300, "{repeats} {damaged} {sums}");
    }
}

#[test]
fn chains_are_the_same_under_every_schedule() {
    same_under_every_schedule(VerifyMethod::Block);
}

/// A batch of one sequence, of chains that are all drawn from one row and judged by `target`'s.
fn alone(
    random: &mut Random,
    (vocab, block): (usize, usize),
    parents: Vec<u32>,
    target: impl Fn(&[f32]) -> Vec<f32>,
) -> Batch {
    let how =
        SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: random.next(), stream: 9 };
    let (row, wide) = (random.normals(vocab, 2.0), parents.len());
    let request = Request {
        rule: VerifyMethod::Block,
        length: 70,
        rounds: random.below(1000) as u32,
        sampling: how.clone(),
        drafting: how,
        parents,
    };
    Batch {
        kind: VerifyMethod::Block,
        vocab,
        block,
        wide,
        requests: vec![request],
        target: target(&row).repeat(wide),
        drafter: row.repeat(block),
        tokens: vec![None; wide],
    }
}

#[test]
fn where_both_laws_are_alike_all_of_the_first_chain_stands() {
    every_device(|device| {
        let mut random = Random::new(4);
        for (count, each) in [(9, 7), (3, 5), (63, 1), (1, 15)] {
            let batch = alone(&mut random, (257, 16), parents(count, each), <[f32]>::to_vec);
            let seen = batch.check(device, "alike");
            assert_eq!((seen.stood.iter().sum::<usize>(), seen.places[0]), (1, each));
            let all = batch.run(device);
            assert_eq!(all.accepted, [each as u32]);
            assert_eq!(all.path[..=each], (0..=each as u32).collect::<Vec<_>>());
        }
    });
}

#[test]
fn of_several_chains_one_that_the_target_likes_stands() {
    // Some tokens never come of the target: with more chains it is less often that all of them begin with one.
    every_device(|device| {
        let mut random = Random::new(5);
        let hates = |row: &[f32]| {
            row.iter().enumerate().map(|(id, x)| if id % 3 > 0 { f32::NEG_INFINITY } else { *x }).collect()
        };
        let mut stood = [0; 2];
        for i in 0..40 {
            for (at, count) in [1, 8].into_iter().enumerate() {
                let batch = alone(&mut random, (90, 4), parents(count, 2), hates);
                stood[at] += usize::from(batch.run(device).accepted[0] > 0);
                batch.check(device, &format!("{count} chains, {i}"));
            }
        }
        println!("{stood:?} of 40");
        assert!(stood[1] > stood[0] + 6, "{stood:?}");
    });
}

#[test]
fn one_chain_is_judged_as_a_chain_is() {
    every_device(|device| {
        let (mut random, mut accepted) = (Random::new(6), 0);
        for i in 0..30 {
            let (vocab, block) = ([3, 40, 257][i % 3], [2, 4, 9][i / 3 % 3]);
            let mut batch = batch(&mut random, VerifyMethod::Block, (vocab, block, block), 6);
            for request in &mut batch.requests {
                (request.rule, request.parents) = (VerifyMethod::Block, parents(1, block - 1));
            }
            batch.tokens.fill(None);
            let own = batch.run(device);
            accepted += own.accepted.iter().sum::<u32>();

            // The same drafts as chains.
            let sequences = batch.requests.len();
            let target = batch.distributions(device, &batch.target, block, |r| &r.sampling);
            let drafter = batch.distributions(device, &batch.drafter, block, |r| &r.drafting);
            let state = |r: &Request| r.state(Form::Chain, &r.sampling);
            let states = upload(device, &batch.requests.iter().flat_map(state).collect::<Vec<u8>>());
            let kernels = RejectionSampler { sequences, block, vocab, blocks: vocab.div_ceil(128) };
            let spans: Vec<u32> = batch.requests.iter().flat_map(|r| [r.length, block as u32]).collect();
            let [tokens, spans] = [&own.tokens, &spans].map(|words| upload(device, words));
            let partial = poisoned::<u64>(device, sequences * block);
            let counters = upload(device, &vec![0u32; sequences]);
            let judged = VerifyInputs {
                max_verify_rows: block,
                tokens: &tokens,
                spans: &spans,
                partial: &partial,
                counters: &counters,
            };
            let [accepted, next] = [(); 2].map(|()| poisoned::<u32>(device, sequences));
            let path = poisoned::<u32>(device, sequences * block);
            let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            let [target, drafter] =
                [&target, &drafter].map(|(logits, distributions)| Rows { logits, distributions });
            let tables = constant(device, &tables());
            kernels.verify(device, verdict, target, drafter, judged, &states, &tables).unwrap();
            for (at, rows) in own.tokens.chunks(block).enumerate() {
                // What is said of a draft without a distribution does not matter, nor of rows that no draft leads to.
                let damaged = own.next[at] == NONE || rows.contains(&NONE);
                let of = |buffer: &Buffer| download::<u32>(device, buffer)[at];
                if !damaged {
                    assert_eq!((of(&accepted), of(&next)), (own.accepted[at], own.next[at]), "{i} {at}");
                    let path = &download::<u32>(device, &path)[at * block..][..block];
                    assert_eq!(path, &own.path[at * block..][..block], "{i} {at}");
                }
            }
        }
        assert!(accepted > 100, "{accepted}");
    });
}

#[test]
fn garbage_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(12);
        for i in 0..60 {
            let (vocab, sequences) = ([1, 7, 300, 3001][i % 4], 3);
            let (block, wide) = ([1, 4, 16][i % 3], [1, 5, 12, 64][i / 3 % 4]);
            let kernels = Chains(Siblings { sequences, block, max_verify_rows: wide, vocab });
            let mut noise = |bytes: usize| {
                // Small words too, which pass for ids, rows, rules and counts.
                let word =
                    |_| random.next() as u32 >> if random.below(2) == 0 { 0 } else { 20 + random.below(12) };
                let words: Vec<u32> = (0..bytes / 4).map(word).collect();
                words
            };
            let [tokens, parents, path] = [(); 3].map(|()| upload(device, &noise(sequences * wide * 4)));
            let [accepted, next, counters] = [(); 3].map(|()| upload(device, &noise(sequences * 4)));
            let spans = upload(device, &noise(sequences * 8));
            let (classes, partial) = (noise(sequences * wide * CLASSES_BYTES), noise(sequences * block * 8));
            let (classes, partial) = (upload(device, &classes), upload(device, &partial));
            let mut states = noise(sequences * 128);
            // Its rule is the last word, its form the upper half of the eighth; let some be those that take part.
            for words in states.chunks_mut(32).skip(i % 2) {
                (words[31], words[7]) =
                    (VerifyMethod::Block as u32, words[7] & 0xffff | (Form::SampledTree as u32) << 16);
            }
            let states = upload(device, &states);
            let (target, drafter) = (
                [noise(sequences * wide * vocab * 4), noise(sequences * wide * DISTRIBUTION_BYTES)],
                [noise(sequences * block * vocab * 4), noise(sequences * block * DISTRIBUTION_BYTES)],
            );
            let [target, drafter] = [target, drafter].map(|rows| rows.map(|words| upload(device, &words)));
            let tables = constant(device, &tables());
            let trees = SampledTrees { tokens: &tokens, parents: &parents, spans: &spans };
            let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            let [target, drafter] =
                [&target, &drafter].map(|[logits, distributions]| Rows { logits, distributions });
            let work = Workspace { classes: &classes, partial: &partial, counters: &counters };
            kernels.verify(device, verdict, trees, target, drafter, &states, &tables, work).unwrap();
            kernels.sample(device, trees, drafter, &states, &tables).unwrap();
        }
    });
}

#[test]
fn launches_refuse_what_does_not_fit() {
    let device = Emulator::new();
    let kernels = Siblings { sequences: 2, block: 4, max_verify_rows: 8, vocab: 40 };
    let get = |bytes: usize| device.allocate(bytes, "test").unwrap();
    let (logits, distributions) = (get(16 * 160), get(16 * DISTRIBUTION_BYTES));
    let rows = Rows { logits: &logits, distributions: &distributions };
    let (tokens, parents, spans) = (get(64), get(64), get(16));
    let trees = SampledTrees { tokens: &tokens, parents: &parents, spans: &spans };
    let (states, tables, small) = (get(256), get(2048), get(48));
    let draw = |kernels: Siblings, trees, rows| {
        Chains(kernels).sample(&device, trees, rows, &states, &tables).unwrap_err().to_string()
    };
    let message = draw(kernels, SampledTrees { parents: &small, ..trees }, rows);
    assert_eq!(message, "kernel sample_chains: parents has 48 bytes, needs 64");
    let message = draw(Siblings { max_verify_rows: 65, ..kernels }, trees, rows);
    assert!(message.contains("2 sequences in blocks of 65 rows"), "{message}");
    let [accepted, next, path, classes, partial, counters] = [8, 8, 64, 16 * CLASSES_BYTES, 64, 8].map(get);
    let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
    let work = Workspace { classes: &classes, partial: &partial, counters: &counters };
    let judge = |verdict, target, work| {
        let judged = Chains(kernels).verify(&device, verdict, trees, target, rows, &states, &tables, work);
        judged.unwrap_err().to_string()
    };
    let message = judge(VerifyOutput { path: &small, ..verdict }, rows, work);
    assert_eq!(message, "kernel verify_chains: path has 48 bytes, needs 64");
    let message = judge(verdict, Rows { logits: &small, ..rows }, work);
    assert_eq!(message, "kernel verify_chains: the target's logits has 48 bytes, needs 2560");
    let message = judge(verdict, rows, Workspace { classes: &small, ..work });
    assert_eq!(message, "kernel verify_chains: classes has 48 bytes, needs 8192");
    let message = judge(verdict, rows, Workspace { partial: &small, ..work });
    assert_eq!(message, "kernel verify_chains: partial has 48 bytes, needs 64");
}
