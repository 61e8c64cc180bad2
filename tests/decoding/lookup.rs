//! Drafts without a drafter: tokens looked up in the text so far, on the CPU and on devices.

use crate::device_verification::same_as_alone;
use crate::support::distribution;
use crate::support::kernel::on_gpu;
use crate::support::requests::{self, AcceptAll, answer, keep_going, run_together, seeded, spec, tiny};
use crate::support::{self, exhaustive};

use dflash::checkpoint::pair::{DraftSource, Lookup, Pair};
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::Target;
use dflash::engine::generate::{Decoder, Request};
use dflash::engine::lossless::check;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::spec::config::VerifyMethod;
use dflash::spec::lookup::drafts;

/// A tiny target whose drafts are looked up. Its greedy text soon repeats.
fn pair(lookup: Lookup) -> Pair {
    let (target, drafter) = tiny();
    let written = support::write_pair(&target, &drafter);
    Pair::open(support::disk(&written.target), DraftSource::Lookup(lookup)).unwrap()
}

/// A prompt with and one without a repetition.
const PROMPTS: [&[u32]; 2] = [&[0, 1, 2, 3, 3, 0, 1, 2], &[3, 1]];

#[test]
fn rounds_emit_the_tokens_of_ar_decoding_and_accept_repetitions() {
    for lookup in [Lookup::NGRAM, Lookup::SUFFIX] {
        let pair = pair(lookup);
        let target = Target::load(&pair.target).unwrap();
        let mut on_cpu = Sequences::new(&target, None, 1, 128).with_lookup(Some(lookup));
        on_gpu(|device| {
            let models = Models::load(device, &pair, 128).unwrap();
            let mut batch = Batch::new(device, &models, BatchConfig::new(1, 8, 128)).unwrap();
            let mut accepted = 0;
            for (i, prompt) in PROMPTS.into_iter().enumerate() {
                let temperature = if (i == 0) == (lookup == Lookup::NGRAM) { 0.0 } else { 0.7 };
                let request = seeded(prompt, 40, 8, temperature, i as u64);
                let report = check(&mut batch, &request, || Ok(AcceptAll)).unwrap().unwrap();
                assert_eq!((&report.identical, report.compared), (&Ok(()), 39), "{lookup:?}, request {i}");
                let ar = requests::run(&mut on_cpu, &Request { block: 1, ..request.clone() });
                let on_cpu = requests::run(&mut on_cpu, &request);
                assert_eq!(on_cpu.tokens, ar.tokens, "{lookup:?}, request {i}");
                // Every round verifies the drafts of the definition, and accepts those that are the answer.
                for outcome in [on_cpu, requests::run(&mut batch, &request)] {
                    let (mut at, text) = (prompt.len() + 1, [prompt, &outcome.tokens].concat());
                    for (drafted, produced) in outcome.drafted.iter().zip(&outcome.accepted) {
                        let drafts = drafts(lookup, &text[..at], 7);
                        let same = drafts.iter().zip(&text[at..]).take_while(|(a, b)| a == b).count();
                        assert_eq!(*drafted, drafts.len(), "{lookup:?}, request {i}, at {at}");
                        // The text of the last round may be cut.
                        if at + 7 < text.len() {
                            assert_eq!(*produced, same + 1, "{lookup:?}, request {i}, at {at}");
                        }
                        at += produced;
                        accepted += same;
                    }
                }
                // The keys and values of a prompt are used again.
                assert_eq!(batch.admit(0, &request, true).unwrap(), Some(prompt.len() - 1));
                batch.release(0, 0).unwrap();
            }
            println!("{lookup:?}: {accepted} drafts accepted");
            assert!(accepted > 40, "{lookup:?}: {accepted} drafts accepted");
        });
    }
}

/// Answers have the target's distribution with every method: on the CPU, and on devices because their answers
/// equal the CPU's.
#[test]
fn drafts_that_are_certain_keep_the_targets_distribution() {
    let pair = pair(Lookup::NGRAM);
    let target = Target::load(&pair.target).unwrap();
    for method in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
        let kind = spec(method, 0.0, None);
        let one = |seed| Request { spec: kind.clone(), ..seeded(PROMPTS[0], 3, 4, 2.0, seed) };
        let requests: Vec<Request> = (0..400).map(one).collect();
        let expected = distribution::distribution(&target, PROMPTS[0], &requests[0].sampling, 3);
        let mut decoder = Sequences::new(&target, None, 8, 64).with_lookup(pair.draft.lookup());
        let theirs = run_together(&mut decoder, &requests, keep_going);
        let tokens = theirs.iter().map(|outcome| outcome.tokens.clone());
        distribution::check(&kind, &expected, tokens);
        let mut rounds = theirs.iter().flat_map(|outcome| outcome.drafted.iter().zip(&outcome.accepted));
        assert!(rounds.any(|(drafted, produced)| *drafted == 3 && *produced > 1));
        on_gpu(|device| {
            let models = Models::load(device, &pair, 64).unwrap();
            let config = BatchConfig { draft_probs: true, ..BatchConfig::new(8, 4, 64) };
            let mut batch = Batch::new(device, &models, config).unwrap();
            let count = if exhaustive() { 400 } else { 24 };
            let ours = run_together(&mut batch, &requests[..count], keep_going);
            let same = ours.iter().zip(&theirs).filter(|(a, b)| answer(a) == answer(b)).count();
            println!("{method:?}: {same} of {count} answers equal the CPU's");
            // Because kernels round, a few draws near a boundary have a different outcome.
            assert!(10 * same >= 9 * count, "{method:?}: {same} of {count}");
        });
    }
}

#[test]
fn a_batch_of_lookups_answers_as_each_alone() {
    let pair = pair(Lookup::SUFFIX);
    on_gpu(|device| {
        let models = Models::load(device, &pair, 128).unwrap();
        let kinds = [(VerifyMethod::Match, 0.0), (VerifyMethod::Rejection, 1.0), (VerifyMethod::Block, 0.8)];
        let requests: Vec<Request> = (0..9)
            .map(|i| {
                let (method, temperature) = kinds[i % 3];
                let request = seeded(PROMPTS[i % 2], 12, [8, 3, 1, 5][i % 4], temperature, i as u64);
                Request { spec: spec(method, 0.0, None), ..request }
            })
            .collect();
        let config = BatchConfig { draft_probs: true, ..BatchConfig::new(4, 8, 128) };
        let accepted = same_as_alone(device, &models, config, &requests, &[usize::MAX; 9], |_| true);
        assert!(accepted > 10, "{accepted} drafts accepted");
    });
}
