//! Generations on the CPU. Tokens and first-round values of the embedded pair against the recorded outputs of
//! the reference implementation; speculative against autoregressive decoding, with equal tokens and equal
//! bits for every block size, sampling setting and end of the answer; and what a slot keeps between requests.

use crate::support::{self, exhaustive};

use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{
    Decoder, Emitted, Finish, Flow, Outcome, Request, TokenSink, generate, resume,
};
use dflash::spec::sampling::{SamplingParams, argmax};
use safetensors::SafeTensors;
use serde_json::Value;
use std::sync::LazyLock;

struct Models(Target, Drafter);

fn open(target: Folder, drafter: Folder) -> Models {
    let pair = Pair::open(target, Some(drafter)).unwrap();
    Models(Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap())
}

static DEMO: LazyLock<Models> = LazyLock::new(|| open(DEMO_TARGET, DEMO_DRAFTER));

/// A held-out prompt and the reference implementation's answer.
struct Reference {
    prompt: Vec<u32>,
    /// 128 greedy tokens.
    answer: Vec<u32>,
    /// Tokens per round.
    lengths: Vec<usize>,
    /// The distance of the two best logits at every token.
    margins: Vec<f64>,
}

static REFERENCES: LazyLock<Vec<Reference>> = LazyLock::new(|| {
    let oracle: Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let reference = |p: &Value| {
        let list = |name: &str| p[name].as_array().unwrap().iter();
        let ids = |name: &str| -> Vec<u32> { list(name).map(|v| v.as_u64().unwrap() as u32).collect() };
        let prompt = ids("prompt_ids");
        Reference {
            answer: ids("output_ids")[prompt.len()..].to_vec(),
            lengths: ids("acceptance_lengths").into_iter().map(|n| n as usize).collect(),
            margins: list("margins").map(|m| m.as_f64().unwrap()).collect(),
            prompt,
        }
    };
    let reference: Vec<Reference> = oracle["prompts"].as_array().unwrap().iter().map(reference).collect();
    assert_eq!(reference.len(), 40);
    reference
});

/// Records what it receives, and replies `then` to token number `after`; 0: never.
struct Until {
    after: usize,
    then: Flow,
    received: Vec<u32>,
    drafted: Vec<bool>,
    rounds: Vec<(usize, usize)>,
}

impl Until {
    fn new(after: usize, then: Flow) -> Until {
        Until { after, then, received: vec![], drafted: vec![], rounds: vec![] }
    }
}

impl TokenSink for Until {
    fn token(&mut self, id: u32, drafted: bool) -> dflash::Result<Flow> {
        self.received.push(id);
        self.drafted.push(drafted);
        Ok(if self.received.len() == self.after { self.then } else { Flow::Continue })
    }

    fn round(&mut self, accepted: usize, kept: usize) -> dflash::Result<()> {
        self.rounds.push((accepted, kept));
        Ok(())
    }
}

fn alone<'a>(target: &'a Target, drafter: Option<&'a Drafter>) -> Sequences<'a> {
    Sequences::new(target, drafter, 1, usize::MAX)
}

fn run_for(models: &Models, request: &Request, sink: &mut Until) -> Outcome {
    let drafter = Some(&models.1).filter(|_| request.block > 1);
    ops::on_threads(None, || generate(&mut alone(&models.0, drafter), request, sink)).unwrap()
}

fn run(models: &Models, request: &Request) -> Outcome {
    run_for(models, request, &mut Until::new(0, Flow::Continue))
}

fn greedy(prompt: &[u32], max_tokens: usize, block: usize) -> Request {
    sampled(prompt, max_tokens, block, 0.0, 0)
}

fn sampled(prompt: &[u32], max_tokens: usize, block: usize, temperature: f32, seed: u64) -> Request {
    let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed, stream: 0 };
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        stop_ids: vec![0],
        block,
        spec: Default::default(),
    }
}

#[test]
fn a_decoder_with_a_context_of_0_runs_rounds_without_drafts() {
    let mut decoder = Sequences::new(&DEMO.0, Some(&DEMO.1), 1, 0);
    let mut emitted = [Emitted::default()];
    ops::on_threads(None, || {
        decoder.admit(0, &greedy(&[1], 4, 16), false)?;
        decoder.prefill(0)?;
        decoder.round(&mut emitted)
    })
    .unwrap();
    assert_eq!((emitted[0].tokens.len(), emitted[0].drafted), (1, 0));
}

// ---- against the reference implementation ----

#[test]
fn greedy_tokens_and_accepted_lengths_equal_the_reference() {
    let mut cut_by_a_near_tie = 0;
    for (i, reference) in REFERENCES.iter().enumerate() {
        let got = run(&DEMO, &greedy(&reference.prompt, 128, 16));
        if let Some(first) = (0..128).find(|i| got.tokens.get(*i) != reference.answer.get(*i)) {
            let margin = reference.margins[first];
            assert!(margin < 2e-3, "prompt {i}: token {first} differs, margin {margin}");
            cut_by_a_near_tie += 1;
            continue;
        }
        assert_eq!(got.finish, Finish::Length);
        // The reference runs one more round if a round meets the budget exactly.
        assert_eq!(got.accepted[..], reference.lengths[..got.accepted.len()], "prompt {i}");
        assert!(
            1 + got.accepted.iter().sum::<usize>() >= 128
                && got.accepted.len() + 1 >= reference.lengths.len()
        );
    }
    println!("{cut_by_a_near_tie} of 40 comparisons ended at a near tie");
    assert!(cut_by_a_near_tie <= 2);
}

/// `|got - recorded| / |recorded|` of a recorded tensor.
fn apart(file: &SafeTensors, name: &str, got: &[f32]) -> f64 {
    let recorded = file.tensor(&format!("round0.{name}")).unwrap();
    assert_eq!(recorded.dtype(), safetensors::Dtype::F32);
    let values = recorded.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f64);
    assert_eq!(values.len(), got.len(), "{name}");
    let difference: f64 = got.iter().zip(values.clone()).map(|(a, b)| (*a as f64 - b).powi(2)).sum();
    (difference / values.map(|b| b * b).sum::<f64>()).sqrt()
}

fn integers(file: &SafeTensors, name: &str) -> Vec<u32> {
    let recorded = file.tensor(&format!("round0.{name}")).unwrap();
    assert_eq!(recorded.dtype(), safetensors::Dtype::I64);
    recorded.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
}

/// The norm-wise distance is below 3e-6. The largest seen was 9e-7.
#[test]
fn first_round_values_equal_the_reference_implementation() {
    let bytes = include_bytes!("../data/oracle.safetensors");
    let file = SafeTensors::deserialize(bytes).unwrap();
    let Models(target, drafter) = &*DEMO;
    let prompt = &REFERENCES[0].prompt;
    let taps = &drafter.config.taps;
    let mut checks = vec![];

    let mut cache = Cache::new(&target.config.stack, 200).unwrap();
    let (mut features, mut logits) = (vec![], vec![]);
    let normed = target.forward(prompt, &mut cache, taps, &mut features, 1);
    target.logits(&normed, &mut logits);
    let anchor = argmax(&logits).unwrap();
    checks.push(("prefill_last_logits", apart(&file, "prefill_last_logits", &logits)));
    checks.push(("context_features", apart(&file, "context_features", &features)));

    checks.push(("drafter_context", apart(&file, "drafter_context", &drafter.context(&features))));
    let mut context = Cache::new(&drafter.config.stack, 200).unwrap();
    drafter.inject(&features, &mut context);
    // The positions of the keys in the reference: context rows, then the block's.
    let positions: Vec<u32> = (0..context.len() as u32 + 16).collect();
    assert_eq!(integers(&file, "draft_position_ids"), positions);
    let mut block = vec![drafter.config.mask_token; 16];
    block[0] = anchor;
    let embedded = target.embed(&block, drafter.config.embedding_scale);
    checks.push(("draft_noise_embedding", apart(&file, "draft_noise_embedding", &embedded)));
    let names = ["drafter_layer_0_output", "drafter_layer_1_output", "drafter_layer_2_output"];
    let hidden = drafter.hidden(target, anchor, 16, &mut context, |i, x| {
        checks.push((names[i], apart(&file, names[i], x)));
    });
    checks.push(("drafter_hidden", apart(&file, "drafter_hidden", &hidden)));
    drafter.logits(target, &hidden[target.config.stack.hidden..], &mut logits);
    checks.push(("draft_logits", apart(&file, "draft_logits", &logits)));
    let drafts: Vec<u32> = logits.chunks(target.config.vocab).map(|row| argmax(row).unwrap()).collect();
    assert_eq!(drafts, integers(&file, "draft_tokens"));

    block[1..].copy_from_slice(&drafts);
    assert_eq!(block, integers(&file, "verify_input_ids"));
    let normed = target.forward(&block, &mut cache, taps, &mut features, 16);
    target.logits(&normed, &mut logits);
    checks.push(("verify_logits", apart(&file, "verify_logits", &logits)));
    checks.push(("verify_features", apart(&file, "verify_features", &features)));

    assert_eq!(checks.len(), 11);
    for (name, distance) in checks {
        println!("{name}: {distance:.1e}");
        assert!(distance < 3e-6, "{name} is {distance:.1e} from the reference implementation's");
    }
}

// ---- speculative against autoregressive decoding ----

#[test]
fn greedy_output_equals_ar_output() {
    // Every second prompt, and sampled the others; exhaustive: all.
    for (i, reference) in REFERENCES.iter().enumerate().step_by(if exhaustive() { 1 } else { 2 }) {
        let ar = run(&DEMO, &greedy(&reference.prompt, 24, 1));
        assert_eq!(ar.accepted, [1; 23]);
        let blocks: &[usize] = if i % 4 == 0 { &[16, 2, 5, 11] } else { &[16] };
        for block in blocks {
            let got = run(&DEMO, &greedy(&reference.prompt, 24, *block));
            assert_eq!(got.tokens, ar.tokens, "prompt {i}, block {block}");
            assert_eq!(got.finish, ar.finish);
            assert!(got.accepted.iter().all(|a| (1..=*block).contains(a)));
        }
    }
}

#[test]
fn sampled_output_equals_ar_output() {
    let (first, step) = if exhaustive() { (0, 1) } else { (1, 2) };
    for (i, reference) in REFERENCES.iter().enumerate().skip(first).step_by(step) {
        let settings = [(0.7, i as u64), (1.0, 0xdead_beef_0000_0000 + i as u64)];
        // One of the two for each prompt; exhaustive: both.
        for (temperature, seed) in settings.into_iter().skip(i / 2 % step).step_by(step) {
            let request = |block| sampled(&reference.prompt, 32, block, temperature, seed);
            let ar = run(&DEMO, &request(1));
            let blocks: &[usize] = if i % 8 < 2 { &[16, 2, 5, 11] } else { &[16] };
            for block in blocks {
                let got = run(&DEMO, &request(*block));
                let what = format!("prompt {i}, block {block}, temperature {temperature}, seed {seed}");
                assert_eq!((got.tokens, got.finish), (ar.tokens.clone(), ar.finish), "{what}");
            }
        }
    }
}

#[test]
fn filtered_output_equals_ar_output() {
    for (i, reference) in REFERENCES.iter().enumerate().step_by(7) {
        for (top_k, top_p, min_p) in [(20, 0.9, 0.05), (3, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.2)] {
            let request = |block| {
                let mut request = sampled(&reference.prompt[90..], 20, block, 1.2, 5);
                request.sampling =
                    SamplingParams { top_k, top_p, min_p, stream: i as u32, ..request.sampling };
                request
            };
            let ar = run(&DEMO, &request(1));
            for block in [5, 16] {
                let got = run(&DEMO, &request(block));
                assert_eq!(got.tokens, ar.tokens, "prompt {i}, block {block}, {top_k} {top_p} {min_p}");
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The bits of logits, features, and all later rows that read the keys and values do not depend on how many
/// rows a pass has.
#[test]
fn verified_rows_equal_ar_steps_bit_for_bit() {
    let Models(target, drafter) = &*DEMO;
    let taps = &drafter.config.taps;
    for reference in REFERENCES.iter().step_by(13) {
        let tokens = [&reference.prompt[..], &reference.answer].concat();
        // Logits and features of tokens 100 to 180, in passes of these lengths.
        let run = |prefill: usize, lengths: &[usize]| {
            let mut cache = Cache::new(&target.config.stack, 200).unwrap();
            let (mut logits, mut features, mut at) = (vec![], vec![], 0);
            for length in std::iter::repeat_n(&prefill, 100 / prefill).chain(lengths) {
                let (mut l, mut f) = (vec![], vec![]);
                // Rows that are cropped afterwards must have no effect.
                target.forward(&[7; 9], &mut cache, &[], &mut f, 1);
                cache.crop(at);
                let normed = target.forward(&tokens[at..at + length], &mut cache, taps, &mut f, *length);
                target.logits(&normed, &mut l);
                at += length;
                if at > 100 {
                    logits.extend(bits(&l));
                    features.extend(bits(&f));
                }
            }
            assert_eq!(at, 180);
            (logits, features)
        };
        let ar = ops::on_threads(None, || run(50, &[1; 80]));
        for (prefill, lengths) in [
            (50, &[16; 5][..]),
            (100, &[16; 5]),
            (20, &[2; 40]),
            (1, &[5; 16]),
            (25, &[3, 13, 1, 16, 16, 15, 7, 9]),
        ] {
            let got = ops::on_threads(None, || run(prefill, lengths));
            assert!(got == ar, "passes of {prefill} and {lengths:?} differ from single steps");
        }
    }
}

// ---- one request after another on one sequence ----

/// Runs the request on a used sequence and on a fresh one, which must give the same answer. Returns the
/// number of kept positions.
fn kept_with_the_answer_of_a_fresh_start(
    sequence: &mut Sequences,
    models: &Models,
    request: &Request,
) -> usize {
    let quiet = || Until::new(0, Flow::Continue);
    let got = ops::on_threads(None, || resume(sequence, request, &mut quiet())).unwrap();
    let fresh = &mut alone(&models.0, Some(&models.1));
    let fresh = ops::on_threads(None, || generate(fresh, request, &mut quiet())).unwrap();
    let same = |outcome: &Outcome| (outcome.tokens.clone(), outcome.finish, outcome.accepted.clone());
    assert_eq!(same(&got), same(&fresh), "after {} tokens kept", got.kept);
    assert_eq!(fresh.kept, 0);
    got.kept
}

#[test]
fn a_sequence_keeps_the_prefix_it_shares_with_the_next_prompt() {
    let all = [[16, 16], [1, 1], [16, 1], [1, 16], [5, 16]];
    for (i, (reference, blocks)) in REFERENCES.iter().step_by(9).zip(all).enumerate() {
        // One temperature for each; exhaustive: both.
        let both = [0.0, 0.8];
        for &temperature in if exhaustive() { &both[..] } else { &both[i % 2..][..1] } {
            let request = |prompt: &[u32], block| sampled(prompt, 16, block, temperature, 3);
            let first = request(&reference.prompt, blocks[0]);
            let answer = run(&DEMO, &first).tokens;
            let history = [&reference.prompt[..], &answer].concat();
            let (prompt, n) = (reference.prompt.len(), history.len());
            let other = |at: usize| {
                let mut tokens = history.clone();
                tokens[at] = (tokens[at] + 1) % 2048;
                tokens
            };
            let nexts = [
                ([&history[..], &[17, 200, 45]].concat(), n - 1), // the answer's last token has not been run
                (history.clone(), n - 1),
                (reference.prompt.clone(), prompt - 1),
                (history[..prompt / 2].to_vec(), prompt / 2 - 1),
                (other(prompt + 3), prompt + 3),
                (other(70), 70),
                (other(0), 0),
                (history[..1].to_vec(), 0),
            ];
            // Every second one, in turn; exhaustive: all.
            let step = if exhaustive() { 1 } else { 2 };
            for (next, same) in nexts.into_iter().skip(i % step).step_by(step) {
                let mut sequence = alone(&DEMO.0, Some(&DEMO.1));
                let mut run =
                    |request: &Request| kept_with_the_answer_of_a_fresh_start(&mut sequence, &DEMO, request);
                assert_eq!(run(&first), 0);
                // After AR decoding the drafter has no context, so the whole prompt runs again.
                let expected = if blocks == [1, 16] { 0 } else { same };
                let kept = run(&request(&next, blocks[1]));
                // One more if the budget cut a round, which ran beyond the answer.
                let beyond = usize::from(kept == n && blocks[0] > 1 && next.len() > n);
                assert_eq!(kept, expected + beyond, "blocks {blocks:?}");
                // Then the first request again, on the same sequence.
                run(&first);
                run(&request(&next, blocks[1]));
            }
        }
    }
}

#[test]
fn a_drafter_catches_up_from_the_end_of_its_context() {
    let reference = &REFERENCES[5];
    let mut sequence = alone(&DEMO.0, Some(&DEMO.1));
    let mut history = reference.prompt.clone();
    let mut drafted = 0;
    for (turn, block) in [16, 1, 1, 16, 7, 1, 16].into_iter().enumerate() {
        let request = sampled(&history, 20, block, 0.5, 9);
        let kept = kept_with_the_answer_of_a_fresh_start(&mut sequence, &DEMO, &request);
        // All but the three new tokens and the answer's last token; with drafts, at most what the drafter's
        // context held after its last turn.
        let last = if turn == 0 { 0 } else { history.len() - 4 };
        let expected = if block > 1 { last.min(drafted) } else { last };
        // A round that the budget cut has run at least one more token. Up to a block of features waits for
        // the drafter, and autoregressive decoding drops them.
        let waiting = if expected == drafted { 16 } else { 0 };
        let range = expected.saturating_sub(waiting)..=expected + 1;
        assert!(range.contains(&kept), "turn {turn}: {kept} kept, expected {expected}");
        history.extend(run(&DEMO, &request).tokens);
        drafted = if block > 1 { history.len() - 1 } else { drafted };
        history.extend([300, 40 + turn as u32, 5]);
    }
}

#[test]
fn interrupted_prompts_and_answers_are_kept() {
    let prompt = REFERENCES[0].prompt.repeat(3);
    for block in [1, 16] {
        let request = greedy(&prompt, 30, block);
        let mut sequence = alone(&DEMO.0, Some(&DEMO.1));
        let mut cut = AtPrefill(2, vec![]);
        let outcome = ops::on_threads(None, || generate(&mut sequence, &request, &mut cut)).unwrap();
        assert_eq!((outcome.finish, outcome.tokens.len()), (Finish::Interrupted, 0));
        let kept = kept_with_the_answer_of_a_fresh_start(&mut sequence, &DEMO, &request);
        assert_eq!(kept, cut.1[1]);
        // Within a round, so that the sequence holds more than the answer.
        for after in [1, 4, 5, 9] {
            let mut sink = Until::new(after, Flow::Interrupt);
            let outcome = ops::on_threads(None, || resume(&mut sequence, &request, &mut sink)).unwrap();
            let next = [&prompt[..], &outcome.tokens, &[9, 9, 9]].concat();
            let next = greedy(&next, 12, block);
            let kept = kept_with_the_answer_of_a_fresh_start(&mut sequence, &DEMO, &next);
            assert!(kept + 1 >= prompt.len() + after, "{kept} of {} tokens kept", prompt.len() + after);
        }
    }
}

/// Random conversations, beyond the drafter's context and to the end of the target's.
#[test]
fn any_requests_in_a_row_are_answered_as_fresh_ones() {
    let (target, drafter) = support::small();
    let target = support::Target { max_positions: 120, eos: vec![], ..target };
    let (mut kept, mut turns) = (0, 0);
    for draft_limit in [120, 40, 33] {
        let drafter = support::Drafter { max_positions: draft_limit, ..drafter.clone() };
        let pair = support::write_pair(&target, &drafter);
        let models = open(support::disk(&pair.target), support::disk(&pair.drafter));
        for seed in 0..12 {
            let mut random = support::Random::new(seed);
            let mut sequence = alone(&models.0, Some(&models.1));
            let mut history: Vec<u32> = vec![3];
            for _ in 0..12 {
                match random.below(4) {
                    0 => history.truncate(1 + random.below(history.len())),
                    1 => {
                        let at = random.below(history.len());
                        history[at] = random.below(40) as u32;
                    }
                    _ => {}
                }
                history.extend((0..random.below(12)).map(|_| random.below(40) as u32));
                history.truncate(119);
                let (block, max_tokens) = ([1, 2, 5, 8][random.below(4)], 1 + random.below(40));
                let temperature = [0.0, 1.0][random.below(2)];
                let request = sampled(&history, max_tokens, block, temperature, seed);
                let request = Request { stop_ids: vec![random.below(40) as u32], ..request };
                kept += kept_with_the_answer_of_a_fresh_start(&mut sequence, &models, &request);
                turns += 1;
                history.extend(run(&models, &request).tokens);
            }
        }
    }
    assert!(kept > 10 * turns, "only {kept} tokens kept in {turns} turns");
}

/// [`generate`] starts from nothing, even if the slot holds the same prompt; only [`resume`] keeps a prefix.
#[test]
fn generate_keeps_nothing_of_the_request_before() {
    let prompt = &REFERENCES[2].prompt;
    for block in [1, 16] {
        let request = sampled(prompt, 12, block, 0.8, 4);
        let mut sequence = alone(&DEMO.0, Some(&DEMO.1));
        let quiet = || Until::new(0, Flow::Continue);
        let first = ops::on_threads(None, || generate(&mut sequence, &request, &mut quiet())).unwrap();
        let second = ops::on_threads(None, || generate(&mut sequence, &request, &mut quiet())).unwrap();
        let third = ops::on_threads(None, || resume(&mut sequence, &request, &mut quiet())).unwrap();
        assert_eq!([first.kept, second.kept, third.kept], [0, 0, prompt.len() - 1], "block {block}");
        for again in [&second, &third] {
            assert_eq!((&again.tokens, &again.accepted), (&first.tokens, &first.accepted), "block {block}");
        }
    }
}

// ---- how an answer ends ----

#[test]
fn a_stop_id_ends_the_answer_anywhere_in_a_block() {
    let mut within = 0;
    for reference in REFERENCES.iter().step_by(11) {
        for at in [0, 1, 5, 9, 14, 33] {
            let stop = reference.answer[at];
            let end = reference.answer.iter().position(|t| *t == stop).unwrap() + 1;
            for block in [1, 5, 16] {
                let request = Request { stop_ids: vec![2047, stop], ..greedy(&reference.prompt, 40, block) };
                let mut sink = Until::new(0, Flow::Continue);
                let got = run_for(&DEMO, &request, &mut sink);
                assert_eq!((&got.tokens[..], got.finish), (&reference.answer[..end], Finish::Stop));
                assert_eq!(sink.received, got.tokens);
                within += sink.rounds.last().is_some_and(|(accepted, kept)| kept < accepted) as usize;
            }
        }
    }
    assert!(within > 3, "only {within} stop ids were within a round");
}

#[test]
fn budgets_cut_the_answer_to_the_token() {
    let mut cut = 0;
    for reference in REFERENCES.iter().step_by(13) {
        for block in [1, 2, 5, 16] {
            for budget in [0, 1, 2, block.max(2) - 1, block, block + 1, 2 * block + 3] {
                let mut sink = Until::new(0, Flow::Continue);
                let got = run_for(&DEMO, &greedy(&reference.prompt, budget, block), &mut sink);
                assert_eq!((&got.tokens[..], got.finish), (&reference.answer[..budget], Finish::Length));
                assert_eq!(sink.received, got.tokens);
                // The first token comes from the prefill. All tokens of a round but its last are drafts.
                let (accepted, kept): (Vec<usize>, Vec<usize>) = sink.rounds.into_iter().unzip();
                assert_eq!(accepted, got.accepted);
                assert_eq!(kept.iter().sum::<usize>(), budget.saturating_sub(1));
                let drafted: Vec<bool> = std::iter::once(false)
                    .chain(accepted.iter().zip(&kept).flat_map(|(a, k)| (0..*k).map(move |i| i + 1 < *a)))
                    .collect();
                assert_eq!(sink.drafted, drafted[..budget]);
                cut += accepted.last().is_some_and(|a| a > kept.last().unwrap()) as usize;
            }
        }
    }
    assert!(cut > 3, "only {cut} budgets ended within a round");
}

#[test]
fn interruption_and_stopping_leave_a_prefix() {
    let reference = &REFERENCES[3];
    for block in [1, 16] {
        for after in 1..=24 {
            for (then, finish) in [(Flow::Interrupt, Finish::Interrupted), (Flow::Stop, Finish::Stop)] {
                let mut sink = Until::new(after, then);
                let got = run_for(&DEMO, &greedy(&reference.prompt, 24, block), &mut sink);
                assert_eq!(
                    (&got.tokens[..], got.finish),
                    (&reference.answer[..after], finish),
                    "block {block}"
                );
                assert_eq!(sink.received, got.tokens);
                let kept: usize = sink.rounds.iter().map(|(_, kept)| kept).sum();
                assert_eq!((sink.rounds.len(), kept), (got.accepted.len(), after - 1));
            }
        }
    }
}

struct AtPrefill(usize, Vec<usize>);

impl TokenSink for AtPrefill {
    fn prefill(&mut self, done: usize) -> Flow {
        self.1.push(done);
        if self.1.len() == self.0 { Flow::Interrupt } else { Flow::Continue }
    }

    fn token(&mut self, _: u32, _: bool) -> dflash::Result<Flow> {
        Ok(Flow::Continue)
    }
}

#[test]
fn a_prompt_can_be_interrupted() {
    let request = greedy(&REFERENCES[0].prompt.repeat(3), 4, 16);
    let run = |after| {
        let mut sink = AtPrefill(after, vec![]);
        let mut sequence = alone(&DEMO.0, Some(&DEMO.1));
        let outcome = generate(&mut sequence, &request, &mut sink).unwrap();
        (outcome, sink.1)
    };
    let (whole, steps) = run(0);
    assert_eq!((whole.tokens.len(), steps.last()), (4, Some(&request.prompt.len())));
    assert!(steps.len() > 2 && steps.is_sorted());
    for after in 1..=steps.len() {
        let (cut, received) = run(after);
        assert_eq!((cut.tokens, cut.finish, cut.accepted), (vec![], Finish::Interrupted, vec![]));
        assert_eq!(received, steps[..after]);
    }
}

#[test]
fn answers_end_with_the_context() {
    let (target, drafter) = support::small();
    // The target's limit, and the drafter's: below, at and above it.
    for (limit, draft_limit) in [(40, 256), (40, 40), (40, 33), (40, 12), (9, 9)] {
        let target = support::Target { max_positions: limit, vocab: 5, ..target.clone() };
        let drafter = support::Drafter { max_positions: draft_limit, ..drafter.clone() };
        let pair = support::write_pair(&target, &drafter);
        let models = open(support::disk(&pair.target), support::disk(&pair.drafter));
        for length in (1..limit).filter(|n| n % 3 == 0 || *n < 4 || *n + 10 > limit) {
            let prompt: Vec<u32> = (0..length as u32).map(|i| (i * i + i / 3) % 5).collect();
            for temperature in [0.0, 1.0] {
                let request = |max_tokens, block| Request {
                    stop_ids: vec![],
                    ..sampled(&prompt, max_tokens, block, temperature, length as u64)
                };
                let ar = run(&models, &request(1000, 1));
                assert_eq!((ar.tokens.len(), ar.finish), (limit - length, Finish::Context));
                for block in [2, 5, 8, 16] {
                    let got = run(&models, &request(1000, block));
                    assert_eq!((&got.tokens, got.finish), (&ar.tokens, Finish::Context), "block {block}");
                    let exact = run(&models, &request(limit - length, block));
                    assert_eq!((&exact.tokens, exact.finish), (&ar.tokens, Finish::Length));
                    let less = run(&models, &request(limit - length - 1, block));
                    assert_eq!(less.tokens, ar.tokens[..limit - length - 1]);
                }
            }
        }
        for length in [0, limit, limit + 1] {
            let request = sampled(&vec![1; length], 5, 8, 0.0, 0);
            let mut quiet = Until::new(0, Flow::Continue);
            let error = generate(&mut alone(&models.0, Some(&models.1)), &request, &mut quiet).unwrap_err();
            assert_eq!(error.exit_code(), 2, "a prompt of {length} tokens in a context of {limit}: {error}");
        }
    }
}
