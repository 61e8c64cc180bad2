//! Trees drawn and judged on a device, decision for decision against `sample_tree` and `recursive` of `src/spec/verify.rs`.

use crate::support::drawn;
use crate::support::kernel;

use dflash::gpu::device::Device;
use dflash::gpu::emulator::Emulator;
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, Rows};
use dflash::gpu::kernels::round::Form;
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::siblings::{SampledTrees, Siblings};
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::Distribution;
use dflash::spec::rng::{DrawKey, PhiloxStream, Purpose};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree::shape;
use drawn::*;
use kernel::*;

#[test]
fn trees_are_drawn_and_judged_as_the_rules_say() {
    let mut random = Random::new(1);
    let shrink = if cfg!(feature = "sanitize") { 20 } else { 1 };
    let mut seen = Seen::default();
    for (vocab, block, wide, batches) in [
        (1, 4, 5, 5),
        (2, 4, 8, 30),
        (3, 5, 16, 40),
        (17, 6, 16, 40),
        (130, 16, 64, 10),
        (257, 8, 12, 20),
        (2048, 4, 9, 10),
        (9001, 3, 6, 4),
        (32000, 3, 6, 2),
    ] {
        for i in 0..(batches / shrink).max(1) {
            let batch = batch(&mut random, VerifyMethod::Rejection, (vocab, block, wide), 8);
            every_device_in_turn(i, |device| seen.add(batch.check(device, &format!("batch {i}"))));
        }
    }
    println!("{seen:?}");
    if shrink == 1 {
        let Seen { stood: [none, one, two, more], places, none_of, repeats, damaged, .. } = seen;
        assert!(none > 100 && one > 50 && two > 20 && more > 50, "{none} {one} {two} {more}");
        assert!(places.iter().all(|&n| n > 20), "{places:?}");
        assert!(none_of > 50 && repeats > 100 && damaged > 20, "{none_of} {repeats} {damaged}");
    }
}

#[test]
fn trees_are_the_same_under_every_schedule() {
    same_under_every_schedule(VerifyMethod::Rejection);
}

#[test]
fn laws_that_are_alike_let_the_first_of_siblings_stand() {
    every_device(|device| {
        let mut random = Random::new(4);
        let (vocab, block, wide) = (257, 8, 16);
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
                rule: VerifyMethod::Rejection,
                length: 70,
                rounds: 3,
                sampling: how.clone(),
                drafting: how,
                parents: shape(wide, block - 1).parents,
            };
            let batch = Batch {
                kind: VerifyMethod::Rejection,
                vocab,
                block,
                wide,
                requests: vec![request],
                target: row.repeat(wide),
                drafter: row.repeat(block),
                tokens: vec![None; wide],
            };
            let seen = batch.check(device, "alike");
            assert_eq!((seen.places[0] > 3, seen.places[1..].iter().sum::<usize>()), (true, 0));
        }
    });
}

/// What is beyond `q` of `p`, and the distribution it makes.
fn beyond(p: &Distribution, q: &Distribution) -> (Vec<(u32, u64)>, Distribution) {
    let over = p.tokens().iter().map(|&(id, w)| (id, w.saturating_sub(q.probability(id))));
    let over: Vec<(u32, u64)> = over.filter(|&(_, w)| w > 0).collect();
    let most = over.iter().map(|&(_, w)| w).max().unwrap();
    let rounding_token = over.iter().find(|&&(_, w)| w == most).unwrap().0;
    (over.clone(), Distribution::new(over, rounding_token).unwrap())
}

#[test]
fn the_last_units_between_siblings_count() {
    // The first sibling always falls, and what is left of both distributions is nearly all on the same tokens: on one, or on two
    // that weigh the same, of which the lower takes what rounding leaves. After the second sibling, which the target never
    // emits, what is left is a handful of units, those tokens' among them.
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
        let (p, q) = (beyond(&p, &q).1, q.without(7).unwrap());
        let (rest, _) = beyond(&p, &q);
        let total: u64 = rest.iter().map(|&(_, w)| w).sum();
        assert!(total < 1 << 20 && heavy.iter().any(|&id| rest.iter().any(|r| r.0 == id as u32)), "{rest:?}");
        let bits = |rounds: u32| {
            let dice = PhiloxStream { seed: how.seed, stream: how.stream, round: rounds + 1, anchor: 9 };
            dice.bits(DrawKey { purpose: Purpose::Residual, depth: 1, row: 0 })
        };
        let unit = |rounds: u32| ((u128::from(bits(rounds)) * u128::from(total)) >> 64) as u64;
        // The last unit of each token and the first of the next.
        let mut ends = Vec::new();
        let mut end = 0;
        for &(_, w) in &rest {
            end += w;
            ends.extend([end - 1, end % total]);
        }
        let found: Vec<u32> =
            ends.iter().map(|&goal| (0..1 << 25).find(|&rounds| unit(rounds) == goal).unwrap()).collect();
        let request = |&rounds: &u32| Request {
            rule: VerifyMethod::Rejection,
            length: 9,
            rounds,
            sampling: how.clone(),
            drafting: how.clone(),
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
                kind: VerifyMethod::Rejection,
                vocab: 7 * stride + 1,
                block: 2,
                wide: 3,
                requests: found.iter().map(request).collect(),
                target: apart(&target).repeat(3 * sequences),
                drafter: apart(&drafter).repeat(2 * sequences),
                tokens: drafts.repeat(sequences),
            };
            every_device(|device| {
                let seen = batch.check(device, "units");
                assert_eq!(seen.stood, [sequences, 0, 0, 0]);
                tried += sequences;
            });
        }
    }
    assert!(tried >= 3 * 3 * 6, "{tried}");
}

#[test]
fn garbage_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(12);
        for i in 0..40 {
            let (vocab, sequences) = ([1, 7, 300, 3001][i % 4], 3);
            let (block, wide) = ([1, 4, 16][i % 3], [1, 5, 12, 64][i / 3 % 4]);
            let kernels = Siblings { sequences, block, max_verify_rows: wide, vocab };
            let mut noise = |bytes: usize| {
                // Small words too, which pass for ids, rows, rules and counts.
                let word =
                    |_| random.next() as u32 >> if random.below(2) == 0 { 0 } else { 20 + random.below(12) };
                let words: Vec<u32> = (0..bytes / 4).map(word).collect();
                words
            };
            let [tokens, parents, path] = [(); 3].map(|()| upload(device, &noise(sequences * wide * 4)));
            let [accepted, next] = [(); 2].map(|()| upload(device, &noise(sequences * 4)));
            let spans = upload(device, &noise(sequences * 8));
            let mut states = noise(sequences * 128);
            // Its rule is the last word, its form the upper half of the eighth; let some be those that take part.
            for words in states.chunks_mut(32).skip(i % 2) {
                (words[31], words[7]) =
                    (VerifyMethod::Rejection as u32, words[7] & 0xffff | (Form::SampledTree as u32) << 16);
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
            kernels.verify(device, verdict, trees, target, drafter, &states, &tables).unwrap();
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
        kernels.sample(&device, trees, rows, &states, &tables).unwrap_err().to_string()
    };
    let message = draw(kernels, SampledTrees { parents: &small, ..trees }, rows);
    assert_eq!(message, "kernel sample_siblings: parents has 48 bytes, needs 64");
    let message = draw(Siblings { max_verify_rows: 65, ..kernels }, trees, rows);
    assert!(message.contains("2 sequences in blocks of 65 rows"), "{message}");
    let message = draw(Siblings { vocab: 0, ..kernels }, trees, rows);
    assert_eq!(message, "kernel sample_siblings: 0 tokens; expected 1 to 2^26");
    let message = draw(kernels, trees, Rows { distributions: &small, ..rows });
    assert_eq!(message, "kernel sample_siblings: the drafter's distributions has 48 bytes, needs 384");
    let [accepted, next, path] = [8, 8, 60].map(get);
    let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
    let judge = |verdict, target| {
        kernels.verify(&device, verdict, trees, target, rows, &states, &tables).unwrap_err().to_string()
    };
    assert_eq!(judge(verdict, rows), "kernel verify_tree: path has 60 bytes, needs 64");
    let path = get(64);
    let message = judge(VerifyOutput { path: &path, ..verdict }, Rows { logits: &small, ..rows });
    assert_eq!(message, "kernel verify_tree: the target's logits has 48 bytes, needs 2560");
}
