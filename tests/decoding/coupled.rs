//! Coupled drafts of a drafter whose logits equal the target's: the same noise at the same position chooses
//! the same token from the same logits, so verification accepts every draft, on the CPU and on every device.

use crate::support;
use crate::support::kernel;
use crate::support::requests;

use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::{Outcome, Request};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::spec::config::{SpecConfig, VerifyMethod};
use requests::{keep_going, run, run_together, seeded, tiny};

const POSITIONS: usize = 128;
const BLOCK: usize = 16;

/// A pair whose logits do not depend on the input: all tokens have one embedding, all layers add zero to the
/// residual stream, and both final norms have weight 1. Both models share the LM head, so every row of both
/// has the same logits.
fn constant_logits() -> support::Pair {
    let (target, drafter) = tiny();
    let target = support::Target { vocab: 97, tied: false, ..target };
    let pair = support::write_pair(&target, &drafter);
    let constant = |mut tensors: Vec<support::Raw>| {
        for tensor in &mut tensors {
            match tensor.name.as_str() {
                "model.norm.weight" | "norm.weight" => tensor.values.fill(1.0),
                "model.embed_tokens.weight" => {
                    let first = tensor.values[..target.hidden].to_vec();
                    tensor.values.chunks_mut(target.hidden).for_each(|row| row.copy_from_slice(&first));
                }
                name if name.contains("o_proj") || name.contains("down_proj") => tensor.values.fill(0.0),
                _ => {}
            }
        }
        tensors
    };
    let tensors = constant(support::target_tensors(&target));
    support::write_tensors(&pair.target, &tensors, target.dtype, target.shards);
    let tensors = constant(support::drafter_tensors(&target, &drafter));
    support::write_tensors(&pair.drafter, &tensors, drafter.dtype, drafter.shards);
    pair
}

/// Coupled requests with different seeds, prompt lengths and block sizes, so that a batch has blocks at many
/// positions.
fn coupled_requests() -> Vec<Request> {
    let one = |(i, block): (usize, usize)| {
        let prompt: Vec<u32> = (0..3 + 7 * i as u32).map(|token| token % 97).collect();
        let request = seeded(&prompt, 36 + i, block, 1.0, i as u64);
        Request { spec: requests::spec(VerifyMethod::Match, 1.0, None), ..request }
    };
    [BLOCK, 9, BLOCK, 2, BLOCK].into_iter().enumerate().map(one).collect()
}

#[track_caller]
fn assert_all_accepted(request: &Request, outcome: &Outcome, autoregressive: &Outcome) {
    let all: Vec<usize> = outcome.drafted.iter().map(|drafts| drafts + 1).collect();
    assert_eq!(outcome.accepted, all, "blocks of {}", request.block);
    assert!(outcome.drafted.iter().all(|drafts| *drafts == request.block - 1), "{:?}", outcome.drafted);
    assert_eq!(outcome.tokens, autoregressive.tokens, "blocks of {}", request.block);
}

fn autoregressive(request: &Request) -> Request {
    Request { block: 1, spec: SpecConfig::default(), ..request.clone() }
}

#[test]
fn coupled_drafts_of_equal_models_are_all_accepted_on_the_cpu() {
    let pair = requests::open(&constant_logits());
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    let mut decoder = Sequences::new(&target, Some(&drafter), 1, POSITIONS);
    for request in &coupled_requests() {
        let ar = run(&mut decoder, &autoregressive(request));
        assert!(ar.tokens.iter().any(|token| *token != ar.tokens[0]), "the target samples: {:?}", ar.tokens);
        assert_all_accepted(request, &run(&mut decoder, request), &ar);
    }
}

#[test]
fn coupled_drafts_of_equal_models_are_all_accepted_on_devices() {
    let pair = requests::open(&constant_logits());
    kernel::on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let all = coupled_requests();
        let mut steps = Batch::new(device, &models, BatchConfig::new(1, 1, POSITIONS)).unwrap();
        let ar: Vec<Outcome> = all.iter().map(|request| run(&mut steps, &autoregressive(request))).collect();
        // A batch with the drafter's probabilities samples coupled drafts from other buffers.
        for draft_probs in [false, true] {
            let config = BatchConfig { draft_probs, ..BatchConfig::new(3, BLOCK, POSITIONS) };
            let mut batch = Batch::new(device, &models, config).unwrap();
            let outcomes = run_together(&mut batch, &all, keep_going);
            for ((request, outcome), ar) in all.iter().zip(&outcomes).zip(&ar) {
                assert_all_accepted(request, outcome, ar);
            }
        }
    });
}
