//! The class of SmolLM2-135M: Llama, 9 heads of 64 on 3 key/value heads, hidden size 576, tied. Neither the
//! number of heads nor the hidden size is a multiple of a kernel's tile. Tokens and rounds are those of
//! `support/dense.rs`, on the CPU and through the kernels.

use crate::support;
use crate::support::dense;
use crate::support::kernel::{Random, on_gpu};
use crate::support::requests;

use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::Decoder;
use dflash::engine::lossless::check;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use requests::{AcceptAll, open, request, run};

/// Positions of a sequence.
const POSITIONS: usize = 96;
/// Tokens of an answer.
const TOKENS: usize = 14;
/// Kernels and the f64 model may choose other tokens if two logits are closer than this. The logits have a
/// standard deviation of about 2.
const NEAR: f64 = 0.02;

/// The shapes of SmolLM2-135M with 2 layers and a small vocabulary. A random drafter is often right if there
/// are few tokens.
fn smollm2(vocab: usize, seed: u64) -> (support::Target, support::Drafter) {
    let target = support::Target {
        llama: true,
        hidden: 576,
        intermediate: 1536,
        layers: 2,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab,
        tied: true,
        eos: vec![],
        rope_theta: 1e5,
        seed,
        ..Default::default()
    };
    let drafter = support::Drafter {
        intermediate: 1536,
        layers: 1,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        taps: vec![0],
        rope_theta: 1e5,
        ..Default::default()
    };
    (target, drafter)
}

/// The largest logit's id, and its distance to the next one.
fn best(logits: &[f64]) -> (u32, f64) {
    let best = dense::argmax(logits);
    let others = logits.iter().enumerate().filter(|(id, _)| *id != best as usize);
    (best, logits[best as usize] - others.fold(f64::NEG_INFINITY, |max, (_, logit)| max.max(*logit)))
}

/// The rounds of an answer, and the smallest distance of two logits between which the f64 model decided.
struct Compared {
    accepted: Vec<usize>,
    nearest: f64,
}

/// Compares an answer with the f64 model: each token is its best after the tokens before it, and each round
/// accepts the drafts that its drafter gets right.
fn compare(
    what: &str,
    spec: &support::Drafter,
    (target, drafter): &(dense::Target, dense::Drafter),
    prompt: &[u32],
    decoder: &mut dyn Decoder,
) -> Compared {
    let outcome = run(decoder, &request(prompt, TOKENS, spec.block, 0.0));
    let tokens = [prompt, &outcome.tokens].concat();
    let states = target.states(&tokens);
    let own: Vec<(u32, f64)> = target.logits(states.last().unwrap()).iter().map(|row| best(row)).collect();
    let (first, end) = (prompt.len(), tokens.len());
    let (expected, mut apart): (Vec<u32>, Vec<f64>) = own[first - 1..end - 1].iter().copied().unzip();
    assert_eq!(outcome.tokens, expected, "{what}");

    let anchors: Vec<(usize, u32)> = (first..end).map(|s| (s, tokens[s])).collect();
    let drafts = drafter.blocks(target, &dense::features(&states, &spec.taps), &anchors, spec.block).logits;
    let (mut s, mut accepted) = (first, vec![]);
    // The last rounds also verify tokens beyond the end of the answer.
    while s + spec.block < end {
        let block = &drafts[(s - first) * spec.block..][1..spec.block];
        let drafts: Vec<(u32, f64)> = block.iter().map(|row| best(row)).collect();
        let right = drafts.iter().zip(&own[s..]).take_while(|(draft, own)| draft.0 == own.0).count();
        apart.extend(drafts.iter().take(right + 1).map(|(_, apart)| *apart));
        accepted.push(right + 1);
        s += right + 1;
    }
    assert_eq!(outcome.accepted[..accepted.len()], accepted, "{what}");
    Compared { accepted, nearest: apart.into_iter().fold(f64::MAX, f64::min) }
}

#[test]
fn nine_heads_of_64_give_the_tokens_of_a_dense_f64_model() {
    // Drafts that are often right, in one page; varied tokens, across two pages.
    for (vocab, seed, length, guessing) in [(3, 16, 11, true), (301, 0, 55, false)] {
        let (spec, draft) = smollm2(vocab, seed);
        let oracle = (dense::Target::new(&spec), dense::Drafter::new(&spec, &draft));
        let pair = open(&support::write_pair(&spec, &draft));
        let mut random = Random::new(1);
        let prompt: Vec<u32> = (0..length).map(|_| random.below(vocab) as u32).collect();
        let target = Target::load(&pair.target).unwrap();
        let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
        let mut cpu = Sequences::new(&target, Some(&drafter), 1, POSITIONS);
        let Compared { accepted, nearest } = compare("cpu", &draft, &oracle, &prompt, &mut cpu);
        println!("{vocab} tokens: rounds of {accepted:?}, the nearest logits are {nearest:.3} apart");
        assert!(!guessing || accepted.iter().any(|&n| n > 1), "no draft was right");
        assert!(nearest > NEAR, "the kernels may decide otherwise where logits are {nearest} apart");
        on_gpu(|device| {
            let models = Models::load(device, &pair, POSITIONS).unwrap();
            let mut batch = Batch::new(device, &models, BatchConfig::new(1, draft.block, POSITIONS)).unwrap();
            compare(&device.properties().name, &draft, &oracle, &prompt, &mut batch);
        });
    }
}

#[test]
fn nine_heads_of_64_are_lossless_bit_for_bit() {
    let (spec, draft) = smollm2(3, 14);
    let pair = open(&support::write_pair(&spec, &draft));
    let mut random = Random::new(2);
    let prompt: Vec<u32> = (0..57).map(|_| random.below(spec.vocab) as u32).collect();
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(device, &models, BatchConfig::new(1, draft.block, POSITIONS)).unwrap();
        for temperature in if crate::support::exhaustive() { vec![0.0, 0.9] } else { vec![0.9] } {
            let request = request(&prompt, TOKENS, draft.block, temperature);
            let report = check(&mut batch, &request, || Ok(AcceptAll)).unwrap().expect("not interrupted");
            assert_eq!((report.tokens, report.compared), (TOKENS, TOKENS - 1), "{report:?}");
            assert_eq!(report.identical, Ok(()));
            assert!(report.rounds < TOKENS - 1, "no draft was right: {report:?}");
        }
    });
}
