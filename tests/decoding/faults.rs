//! Errors and early ends on a device, at every point of an answer. Afterwards the decoder answers the next
//! request as a fresh one does, and at the end all device memory is free.

use crate::support;
use crate::support::program;
use crate::support::requests;
use crate::support::software_gpu;

use crate::support::test_gpu::TestGpu;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::engine::generate::{
    Decoder, Emitted, Finish, Flow, Outcome, Prefill, Request, generate_all, resume,
};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::{Error, Result};
use program::{command, flags, run_pair, write};
use requests::*;
use serde_json::{Value, json};
use std::io::Read;
use std::process::Stdio;

/// Runs `test` with a tiny pair on a GPU. Its memory must be free afterwards.
fn on_gpu_with(
    (target, drafter): (support::Target, support::Drafter),
    positions: usize,
    test: impl FnOnce(&TestGpu, &Models),
) {
    let pair = support::write_pair(&target, &drafter);
    with_pair(&pair, positions, test);
}

fn with_pair(pair: &support::Pair, positions: usize, test: impl FnOnce(&TestGpu, &Models)) {
    let device = TestGpu::new();
    let models = Models::load(&device, &open(pair), positions).unwrap();
    test(&device, &models);
    drop(models);
    let left = device.allocated();
    assert_eq!((left.buffers, left.bytes), (0, 0));
}

fn batch<'a>(device: &'a TestGpu, models: &'a Models, slots: usize, positions: usize) -> Batch<'a> {
    Batch::new(device, models, BatchConfig::new(slots, 16, positions)).unwrap()
}

fn prompt(seed: u64, length: usize) -> Vec<u32> {
    let mut random = support::Random::new(seed);
    (0..length).map(|_| random.below(4) as u32).collect()
}

/// The request's outcome, or the error that ended it, with a sink that replies as `reply` does.
fn attempt(
    decoder: &mut dyn Decoder,
    request: &Request,
    reply: impl FnMut(usize, Event) -> Result<Flow>,
) -> Result<Outcome> {
    let mut recorder = BatchRecorder::new(1, reply);
    generate_all(decoder, std::slice::from_ref(request), &mut recorder)?;
    Ok(recorder.outcomes.remove(0).unwrap())
}

/// A prompt whose greedy answer has a round of at least `min_tokens` tokens that is not its last round, and
/// that answer.
fn long_round(decoder: &mut dyn Decoder, tokens: usize, min_tokens: usize) -> (Vec<u32>, Outcome) {
    let runs = (0..40).map(|seed| {
        let prompt = prompt(seed, 7);
        let outcome = run(decoder, &request(&prompt, tokens, 16, 0.0));
        (prompt, outcome)
    });
    let long = |outcome: &Outcome| outcome.accepted.iter().rev().skip(1).any(|&n| n >= min_tokens);
    let found = runs.into_iter().find(|(_, outcome)| long(outcome));
    found.expect("a prompt whose answer has a long round")
}

// ---- limits ----

#[test]
fn budgets_end_an_answer_anywhere_in_a_round() {
    on_gpu_with(tiny(), 128, |device, models| {
        let mut single = batch(device, models, 1, 128);
        let most = if exhaustive() { 30 } else { 20 };
        let (prompt, whole) = long_round(&mut single, most, 6);
        let ar = run(&mut single, &request(&prompt, most, 1, 0.0));
        assert_eq!(whole.tokens, ar.tokens);
        let mut within = 0;
        for budget in 0..=most {
            for block in if budget % 3 == 0 { vec![5, 16] } else { vec![16] } {
                let got = run(&mut single, &request(&prompt, budget, block, 0.0));
                assert_eq!((&got.tokens[..], got.finish), (&ar.tokens[..budget], Finish::Length));
                // The last round is recorded in full.
                let produced: usize = got.accepted.iter().sum();
                assert!(produced + 1 >= budget, "{produced} tokens produced for a budget of {budget}");
                if block == 16 {
                    assert!(whole.accepted.starts_with(&got.accepted), "budget {budget}");
                    within += usize::from(produced + 1 > budget);
                }
                assert_eq!(single.free_pages(), 2);
            }
        }
        assert!(within >= 5, "only {within} budgets ended within a round");
    });
}

/// A token depends on the tokens before it, the seed and its position, and not on whether a prefill or a round
/// produced it.
#[test]
fn a_prompt_with_part_of_its_answer_gives_the_rest() {
    on_gpu_with(tiny(), 128, |device, models| {
        let mut single = batch(device, models, 1, 128);
        for (seed, temperature) in [(1, 0.0), (2, 0.8), (3, 2.0)] {
            let prompt = prompt(seed, 9);
            let whole = run(&mut single, &request(&prompt, 16, 16, temperature)).tokens;
            // After an odd or an even number of tokens; exhaustive: after each.
            for n in (1..16).filter(|n| exhaustive() || n % 2 == seed as usize % 2) {
                let longer = [&prompt[..], &whole[..n]].concat();
                let rest = run(&mut single, &request(&longer, 16 - n, 16, temperature)).tokens;
                assert_eq!(rest, whole[n..], "after {n} tokens at temperature {temperature}");
            }
        }
    });
}

/// In a round of the demo pair with 16 tokens, almost all of which occur only once in the answer.
#[test]
fn stop_ids_end_an_answer_anywhere_in_a_round_and_in_the_list() {
    let oracle: serde_json::Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let prompt = oracle["prompts"][19]["prompt_ids"].as_array().unwrap();
    let prompt: Vec<u32> = prompt.iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let device = TestGpu::new();
    let pair = dflash::checkpoint::pair::Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    let models = Models::load(&device, &pair, 192).unwrap();
    let mut single = batch(&device, &models, 1, 192);
    let ar = request(&prompt, 18, 16, 0.0);
    let whole = run(&mut single, &ar);
    assert_eq!(whole.accepted[0], 16);
    let (mut tried, mut places) = (0, 0);
    // At every second token; exhaustive: at every one.
    for (at, stop) in whole.tokens[..17].iter().enumerate().step_by(if exhaustive() { 1 } else { 2 }) {
        tried += 1;
        if whole.tokens[..at].contains(stop) {
            continue;
        }
        // The device checks the first 11 stop ids. For the others the host drops the tokens after the stop
        // id.
        let place = [0, 11, 10, 19, 5, 13][places % 6];
        let mut stop_ids: Vec<u32> = (5000..5020).collect();
        stop_ids[place] = *stop;
        // Keeps the prompt, which is long.
        let got = resume(&mut single, &Request { stop_ids, ..ar.clone() }, &mut AcceptAll).unwrap();
        assert_eq!((&got.tokens[..], got.finish), (&whole.tokens[..=at], Finish::Stop), "place {place}");
        assert_eq!(got.accepted, &[16][..usize::from(at > 0)]);
        assert_eq!(single.free_pages(), 3);
        places += 1;
    }
    assert!(places + 2 >= tried, "only {places} of {tried} tokens are new at their position");

    // For the first 11, the device itself ends its round at the stop id.
    let new = |at: &usize| !whole.tokens[..*at].contains(&whole.tokens[*at]);
    let at = (5..16).find(new).unwrap();
    for (place, max_tokens, emitted) in [(0, 18, at), (10, 18, at), (11, 18, 16), (11, at + 1, at)] {
        let mut stop_ids: Vec<u32> = (5000..5020).collect();
        stop_ids[place] = whole.tokens[at];
        let request = Request { stop_ids, max_tokens, ..ar.clone() };
        assert_eq!(single.admit(0, &request, false), Ok(Some(0)));
        while single.prefill(0).unwrap().next.is_none() {}
        let mut out = [Emitted::default()];
        single.round(&mut out).unwrap();
        let expected = Emitted { tokens: whole.tokens[1..=emitted].to_vec(), produced: 16, drafted: 15 };
        assert_eq!(out[0], expected, "place {place}, at most {max_tokens}");
        single.release(0, at + 1).unwrap();
    }
}

#[test]
fn the_context_ends_an_answer_anywhere_in_a_round() {
    // The context is the batch's, the target's, or ends within a page; the drafter's is as long, or shorter.
    for (positions, limit, draft_limit) in [(64, 256, 256), (256, 70, 256), (70, 256, 60), (256, 70, 40)] {
        let (target, drafter) = tiny();
        let target = support::Target { max_positions: limit, ..target };
        let drafter = support::Drafter { max_positions: draft_limit, ..drafter };
        let context = positions.min(limit);
        on_gpu_with((target, drafter), positions, |device, models| {
            let mut single = batch(device, models, 1, positions);
            assert_eq!(single.context(), context);
            let all = prompt(3, context + 1);
            // More numbers of positions left at one end than at the others.
            let lefts = match positions {
                _ if exhaustive() => vec![1, 2, 3, 8, 16, 17, 33],
                70 => vec![1, 2, 3, 8, 16, 17],
                _ => vec![1, 8, 17],
            };
            for left in lefts {
                let prompt = &all[..context - left];
                let ar = run(&mut single, &request(prompt, 60, 1, 0.0));
                assert_eq!((ar.tokens.len(), ar.finish), (left, Finish::Context));
                // One of the two blocks at each; exhaustive: both.
                let blocks = [2, 16].into_iter().filter(|block| exhaustive() || left % 2 == block / 16);
                for block in blocks {
                    let got = run(&mut single, &request(prompt, 60, block, 0.0));
                    assert_eq!((&got.tokens, got.finish), (&ar.tokens, Finish::Context), "{left} left");
                    // If the token budget ends there too, the budget is the reported reason.
                    let got = run(&mut single, &request(prompt, left, block, 0.0));
                    assert_eq!((&got.tokens, got.finish), (&ar.tokens, Finish::Length), "{left} left");
                }
            }
            for length in [context, context + 1] {
                let error =
                    attempt(&mut single, &request(&all[..length], 3, 16, 0.0), keep_going).unwrap_err();
                let sentence = format!(
                    "the prompt has {length} tokens, but the context holds {context}, the answer included"
                );
                assert_eq!((error.to_string(), error.exit_code()), (sentence, 2));
            }
            let one = run(&mut single, &request(&all[..1], 10, 16, 0.0));
            let ar = run(&mut single, &request(&all[..1], 10, 1, 0.0));
            assert_eq!((&one.tokens, one.tokens.len(), one.finish), (&ar.tokens, 10, Finish::Length));
            assert_eq!(single.free_pages(), positions.div_ceil(64));
        });
    }
}

// ---- pages ----

#[test]
fn requests_wait_for_pages_and_those_that_never_fit_are_refused() {
    on_gpu_with(tiny(), 256, |device, models| {
        let config = BatchConfig { pages: 3, ..BatchConfig::new(3, 16, 256) };
        let mut three = Batch::new(device, models, config).unwrap();
        // Two pages each: only one runs at a time.
        let requests: Vec<Request> = (0..4).map(|i| request(&prompt(i, 60), 12, 16, 0.0)).collect();
        let mut running = 0;
        let (mut first, mut over) = (vec![false; 4], vec![false; 4]);
        let outcomes = run_together(&mut three, &requests, |i, event| {
            first[i] = true;
            over[i] |= event == Event::Token(12);
            running = running.max((0..4).filter(|&i| first[i] && !over[i]).count());
            keep_going(i, event)
        });
        assert_eq!(running, 1, "sequences ran together in too few pages");
        let mut single = batch(device, models, 1, 256);
        for (outcome, request) in outcomes.iter().zip(&requests) {
            assert_eq!(answer(outcome), answer(&run(&mut single, request)));
        }
        let huge = request(&prompt(9, 150), 60, 16, 0.0);
        let sentence = "a sequence of 226 positions needs 4 pages of keys and values, but there are 3";
        // Alone, and while other requests run.
        for before in [0, 1, 2] {
            let list = [&requests[..before], std::slice::from_ref(&huge)].concat();
            let mut recorder = BatchRecorder::new(list.len(), keep_going);
            let error = generate_all(&mut three, &list, &mut recorder).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.exit_code()), (sentence, 5));
            assert_eq!(three.free_pages(), 3, "pages are free after a refusal");
            assert_eq!(answer(&run(&mut three, &requests[3])), answer(&outcomes[3]));
        }
    });
}

/// Runs an admitted sequence to its end: its tokens, and the logits of all but the first.
fn logits(batch: &mut Batch, slot: usize, request: &Request) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut out = vec![Emitted::default(); batch.slots()];
    let (mut tokens, mut logits) = (vec![batch.prefill(slot).unwrap().next.unwrap()], vec![]);
    while tokens.len() < request.max_tokens {
        batch.round(&mut out).unwrap();
        for (row, token) in out[slot].tokens.iter().enumerate() {
            tokens.push(*token);
            logits.push(batch.logits(slot, row).unwrap());
        }
    }
    (tokens, logits)
}

/// The device does not know yet that the released sequence has ended: its rounds in flight may still write.
#[test]
fn pages_of_a_released_sequence_belong_to_the_next() {
    on_gpu_with(tiny(), 128, |device, models| {
        let config = BatchConfig { pages: 2, ..BatchConfig::new(2, 16, 128) };
        let mut two = Batch::new(device, models, config).unwrap();
        let mut single = batch(device, models, 1, 128);
        two.keep_logits();
        single.keep_logits();
        for block in [1, 16] {
            // The first sequence would still write to pages that now hold the second one's prompt.
            let first = request(&prompt(1, 9), 110, block, 0.0);
            let second = request(&prompt(2, 100), 26, block, 0.0);
            assert_eq!(two.admit(0, &first, false), Ok(Some(0)));
            two.prefill(0).unwrap();
            two.round(&mut [Emitted::default(), Emitted::default()]).unwrap();
            assert_eq!(two.admit(1, &second, false), Ok(None));
            two.release(0, 1).unwrap();
            assert_eq!(two.admit(1, &second, false), Ok(Some(0)));
            assert_eq!(single.admit(0, &second, false), Ok(Some(0)));
            let alone = logits(&mut single, 0, &second);
            assert!(
                logits(&mut two, 1, &second) == alone,
                "other logits: the released sequence wrote to the pages, block {block}"
            );
            single.release(0, 26).unwrap();
            two.release(1, 26).unwrap();
            // Nothing of the first one is kept.
            assert_eq!(two.admit(0, &first, true), Ok(Some(0)));
            two.release(0, 0).unwrap();
        }
    });
}

#[test]
fn a_decoder_dropped_with_a_round_in_flight_frees_its_memory() {
    on_gpu_with(tiny(), 128, |device, models| {
        let before = device.allocated();
        for rounds in 0..3 {
            let mut two = batch(device, models, 2, 128);
            let mut out = vec![Emitted::default(); 2];
            for slot in 0..2 {
                assert_eq!(two.admit(slot, &request(&prompt(1, 9), 60, 16, 0.0), false), Ok(Some(0)));
                assert!(matches!(two.prefill(slot), Ok(Prefill { done: 9, next: Some(_) })));
            }
            for _ in 0..rounds {
                two.round(&mut out).unwrap();
                assert!(out.iter().all(|emitted| !emitted.tokens.is_empty()));
            }
            drop(two);
            let now = device.allocated();
            assert_eq!((now.buffers, now.bytes), (before.buffers, before.bytes), "after {rounds} rounds");
        }
    });
}

// ---- ends by the sink ----

#[test]
fn a_sink_can_end_an_answer_or_fail_at_every_token() {
    on_gpu_with(tiny(), 128, |device, models| {
        let mut single = batch(device, models, 1, 128);
        let (prompt, whole) = long_round(&mut single, 20, 6);
        let whole_request = request(&prompt, 20, 16, 0.0);
        let next = request(&prompt[2..], 9, 16, 0.8);
        let expected = run(&mut batch(device, models, 1, 128), &next);
        for at in [Event::Prompt(prompt.len())].into_iter().chain((1..=20).map(Event::Token)) {
            // One of the three ends at every second token; exhaustive: all.
            let runs = |end: usize| match at {
                Event::Token(n) => n % 6 == 2 * end || exhaustive(),
                Event::Prompt(_) => true,
            };
            for (end, flow) in [Flow::Stop, Flow::Interrupt].into_iter().enumerate() {
                if !runs(end) {
                    continue;
                }
                let reply = |_, event| Ok(if event == at { flow } else { Flow::Continue });
                let got = attempt(&mut single, &whole_request, reply).unwrap();
                let (tokens, finish) = match (at, flow) {
                    (Event::Prompt(_), _) => (0, Finish::Interrupted),
                    (Event::Token(n), Flow::Stop) => (n, Finish::Stop),
                    (Event::Token(n), _) => (n, Finish::Interrupted),
                };
                assert_eq!((&got.tokens[..], got.finish), (&whole.tokens[..tokens], finish), "{at:?}");
                assert!(whole.accepted.starts_with(&got.accepted));
                assert_eq!(single.free_pages(), 2);
                assert_eq!(answer(&run(&mut single, &next)), answer(&expected), "after {flow:?} at {at:?}");
            }
            if matches!(at, Event::Token(_)) && runs(2) {
                let broken = Error::Internal("a full disk".into());
                let reply = |_, event| if event == at { Err(broken.clone()) } else { Ok(Flow::Continue) };
                assert_eq!(attempt(&mut single, &whole_request, reply).unwrap_err(), broken);
                assert_eq!(single.free_pages(), 2, "pages are free after an error");
                assert_eq!(answer(&run(&mut single, &next)), answer(&expected), "after an error at {at:?}");
            }
        }
    });
}

/// After an answer that ended within a round, the slot keeps as many positions as after AR decoding, and they
/// are correct: the next answer has the same tokens and rounds as on a new decoder.
#[test]
fn a_conversation_continues_after_an_answer_ended_at_any_token() {
    on_gpu_with(tiny(), 128, |device, models| {
        let (mut single, mut fresh) = (batch(device, models, 1, 128), batch(device, models, 1, 128));
        let (prompt, whole) = long_round(&mut single, 16, 6);
        let first = request(&prompt, 16, 16, 0.0);
        for n in (1..=16).step_by(if exhaustive() { 1 } else { 3 }) {
            let next = [&prompt[..], &whole.tokens[..n], &[2, 0, 1]].concat();
            // One of the two blocks after each token; exhaustive: both.
            for block in [1, 16].into_iter().filter(|block| exhaustive() || n % 2 == block % 2) {
                let reply = |_, event| Ok(if event == Event::Token(n) { Flow::Stop } else { Flow::Continue });
                let cut = attempt(&mut single, &first, reply).unwrap();
                assert_eq!(cut.tokens, whole.tokens[..n]);
                let next = request(&next, 8, block, 0.0);
                let got = resume(&mut single, &next, &mut AcceptAll).unwrap();
                assert_eq!(answer(&got), answer(&run(&mut fresh, &next)), "after {n} tokens, block {block}");
                // All but the last token; with drafts, only what the drafter's cache held before the last
                // round.
                let seen = cut.accepted.iter().rev().skip(1).sum::<usize>();
                let kept = if block > 1 { seen } else { n - 1 };
                assert_eq!(got.kept, prompt.len() + kept, "after {n} tokens, block {block}");
            }
        }
    });
}

#[test]
fn a_sink_can_end_a_prompt_after_every_chunk() {
    let (target, drafter) = tiny();
    let target = support::Target { max_positions: 640, ..target };
    let drafter = support::Drafter { max_positions: 640, ..drafter };
    on_gpu_with((target, drafter), 640, |device, models| {
        let mut single = batch(device, models, 1, 640);
        let next = request(&prompt(2, 70), 9, 16, 0.0);
        let expected = run(&mut single, &next);
        let long = request(&prompt(1, 520), 9, 16, 0.0);
        let mut chunks = vec![];
        let outcome = attempt(&mut single, &long, |_, event| {
            chunks.extend(matches!(event, Event::Prompt(_)).then_some(event));
            Ok(Flow::Continue)
        });
        let whole = outcome.unwrap();
        assert_eq!(chunks, [Event::Prompt(512), Event::Prompt(520)]);
        for (at, kept) in chunks.into_iter().zip([512, 519]) {
            let reply = |_, event| Ok(if event == at { Flow::Interrupt } else { Flow::Continue });
            let got = attempt(&mut single, &long, reply).unwrap();
            assert_eq!((got.tokens, got.finish, got.accepted), (vec![], Finish::Interrupted, vec![]));
            assert_eq!(answer(&run(&mut single, &next)), answer(&expected), "after an end at {at:?}");
            // Or the same prompt again, after a part of it has run.
            attempt(&mut single, &long, reply).unwrap();
            let again = resume(&mut single, &long, &mut AcceptAll).unwrap();
            assert_eq!((answer(&again), again.kept), (answer(&whole), kept));
        }
    });
}

#[test]
fn an_interrupted_batch_frees_its_pages_and_runs_others() {
    on_gpu_with(tiny(), 128, |device, models| {
        let settings = [(5, 16, 0.0), (12, 16, 0.7), (8, 5, 0.0), (2, 1, 1.0), (9, 16, 0.0)];
        let request = |(i, (tokens, block, temperature))| request(&prompt(i, 11), tokens, block, temperature);
        let requests: Vec<Request> = (0..).zip(settings).map(request).collect();
        let mut three = batch(device, models, 3, 128);
        let expected = run_together(&mut three, &requests, keep_going);
        let all: usize = expected.iter().map(|outcome| outcome.tokens.len()).sum();
        assert_eq!(all, 5 + 12 + 8 + 2 + 9);
        for limit in (1..12).step_by(if exhaustive() { 1 } else { 3 }).chain([20, 29, all]) {
            let mut received = 0;
            let mut recorder = BatchRecorder::new(5, |_, event| {
                received += usize::from(matches!(event, Event::Token(_)));
                Ok(if received == limit { Flow::Interrupt } else { Flow::Continue })
            });
            generate_all(&mut three, &requests, &mut recorder).unwrap();
            assert_eq!(recorder.tokens_received(), limit, "tokens are delivered after an interruption");
            let begun =
                || recorder.outcomes.iter().zip(&expected).filter_map(|(o, e)| Some((o.as_ref()?, e)));
            assert!(begun().any(|(outcome, _)| outcome.finish == Finish::Interrupted));
            for (outcome, whole) in begun() {
                assert_eq!(outcome.tokens, whole.tokens[..outcome.tokens.len()]);
            }
            assert_eq!(three.free_pages(), 3 * 2);
            if limit % 2 == 1 && !exhaustive() {
                continue;
            }
            let again = run_together(&mut three, &requests, keep_going);
            assert!(again.iter().map(answer).eq(expected.iter().map(answer)), "after {limit} tokens");
        }
    });
}

// ---- invalid logits ----

/// The logit of token 3 overflows if one feature is large. If the feature is smaller, the logit selects token
/// 3 or has no effect.
#[test]
fn overflowing_logits_are_an_error_and_the_decoder_stays_usable() {
    let (target, drafter) = tiny();
    let (mut invalid, mut valid) = ([0; 2], 0);
    // Until every kind has occurred; exhaustive: all.
    for feature in 0..8 {
        if invalid.iter().all(|&n| n > 0) && valid > 3 && !exhaustive() {
            break;
        }
        let pair = support::write_pair(&target, &drafter);
        let mut tensors = support::target_tensors(&target);
        let head = tensors.iter_mut().find(|t| t.name == "lm_head.weight").unwrap();
        head.values[3 * 64..].fill(0.0);
        head.values[3 * 64 + feature] = 3e38;
        support::write_tensors(&pair.target, &tensors, target.dtype, 1);
        with_pair(&pair, 128, |device, models| {
            let mut two = batch(device, models, 2, 128);
            let mut single = batch(device, models, 1, 128);
            let requests = (0..6).map(|seed| request(&prompt(seed, 6), 12, [1, 16][seed as usize % 2], 0.0));
            for request in requests.chain([request(&[0], 1, 16, 0.0)]) {
                let mut received = 0;
                let result = attempt(&mut two, &request, |_, event| {
                    received += usize::from(matches!(event, Event::Token(_)));
                    Ok(Flow::Continue)
                });
                assert_eq!(two.free_pages(), 4);
                let Err(error) = result else {
                    assert_eq!(answer(&result.unwrap()), answer(&run(&mut single, &request)));
                    valid += 1;
                    continue;
                };
                // The drafter's logits come from the same LM head.
                let models =
                    if request.block > 1 && received > 0 { ["target", "drafter"] } else { ["target"; 2] };
                let place = match received {
                    0 => format!(" for position {}", request.prompt.len()),
                    _ => String::new(),
                };
                let sentence = |model| {
                    format!(
                        "the {model}'s logits{place} hold a NaN or infinity, or nothing but -inf: its weights or its \
                         config are damaged"
                    )
                };
                assert!(models.map(sentence).contains(&error.to_string()), "{error}");
                assert_eq!(error.exit_code(), 3);
                invalid[usize::from(received > 0)] += 1;
            }
        });
    }
    println!("invalid in the prompt and later: {invalid:?}, valid: {valid}");
    assert!(invalid.iter().all(|&n| n > 0) && valid > 3);
}

#[test]
fn overflowing_draft_logits_are_an_error() {
    let (target, drafter) = tiny();
    let pair = support::write_pair(&target, &drafter);
    let mut tensors = support::drafter_tensors(&target, &drafter);
    tensors.iter_mut().find(|t| t.name == "norm.weight").unwrap().values.fill(3e38);
    support::write_tensors(&pair.drafter, &tensors, drafter.dtype, 1);
    with_pair(&pair, 128, |device, models| {
        let mut single = batch(device, models, 1, 128);
        let ar = request(&prompt(1, 6), 12, 1, 0.0);
        let expected = run(&mut single, &ar);
        let error = attempt(&mut single, &request(&prompt(1, 6), 12, 16, 0.0), keep_going).unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.exit_code()),
            (
                "the drafter's logits hold a NaN or infinity, or nothing but -inf: its weights or its config are damaged",
                3
            )
        );
        assert_eq!(answer(&run(&mut single, &ar)), answer(&expected));
    });
}

// ---- through the program ----

/// A file of prompts of tokens 2 and 3, the only ones of the tiny vocabulary with a text.
fn write_prompts(dir: &std::path::Path) -> String {
    let prompts = ["! !!  !", " ", "!!!!", "  ! !  !! !", "! "];
    let lines = prompts.map(|prompt| json!({ "prompt": prompt }).to_string() + "\n");
    write(dir, "prompts.jsonl", lines.concat())
}

#[test]
fn a_nan_weight_is_named_on_the_device() {
    let (target, drafter) = tiny();
    for of_target in [true, false] {
        let pair = support::write_pair(&target, &drafter);
        let (dir, mut tensors) = match of_target {
            true => (&pair.target, support::target_tensors(&target)),
            false => (&pair.drafter, support::drafter_tensors(&target, &drafter)),
        };
        let tensor = tensors.iter_mut().find(|t| t.name.ends_with("layers.0.mlp.up_proj.weight")).unwrap();
        tensor.values[70] = f32::NAN;
        let name = tensor.name.clone();
        support::write_tensors(dir, &tensors, target.dtype, 1);
        let run = run_pair(&pair, &["--device", "cuda", "-q", "--raw", "!"]);
        assert_eq!((run.code, run.out.as_str()), (3, ""), "{run:?}");
        assert_eq!(run.err.lines().count(), 1, "{run:?}");
        let file = dir.join("model.safetensors").display().to_string();
        assert!([&name, &file, "NaN"].iter().all(|part| run.err.contains(*part)), "{run:?}");
    }
}

/// The stop strings end the answers early.
#[test]
fn positions_default_to_8192_or_the_request_or_the_flag() {
    let (target, drafter) = tiny();
    let pair = support::write_pair(&support::Target { max_positions: 20_000, ..target }, &drafter);
    let max = usize::MAX.to_string();
    let args = ["--raw", "!", "--temperature", "1", "--seed", "1", "--stop", "!", "--stop", " "];
    let first_line = |more: &[&str]| {
        let run = run_pair(&pair, &[&args[..], &["--device", "cuda"], more].concat());
        assert_eq!(run.code, 0, "{more:?}: {run:?}");
        run.err.lines().next().unwrap().to_string()
    };
    // Prompt, answer and a block.
    for (more, positions) in [
        (&["-n", "100"][..], 8192),
        (&["-n", "9000"], 9017),
        (&["-n", &max], 20_000),
        (&["-n", "9000", "--ctx", "100"], 100),
    ] {
        let expected = format!("memory for 1 sequence of {positions} positions in blocks of 16:");
        assert_eq!(first_line(more), expected, "{more:?}");
    }
    // The CPU has the model's positions, or fewer with the flag.
    for (more, ctx) in [(&[][..], 20_000), (&["--ctx", "9"][..], 9)] {
        let prompt = "!".repeat(ctx);
        let run = run_pair(&pair, &[&["--raw", &prompt, "-n", "1"], more].concat());
        let sentence = format!(
            "dflash-gen: the prompt has {ctx} tokens, but the context holds {ctx}, the answer included\n"
        );
        assert_eq!((run.code, run.err), (2, sentence));
        assert_eq!(run_pair(&pair, &[&args[..], &["-n", &max], more].concat()).code, 0);
    }
}

#[test]
fn batches_print_what_single_sequences_print() {
    let pair = support::write_pair(&tiny().0, &tiny().1);
    let file = write_prompts(pair.root.path());
    let args = ["--raw", "-n", "16", "--temperature", "0.7", "--seed", "5", "-q"];
    for (device, named) in [("cpu", "cpu"), ("cuda", "softgpu")] {
        let with = |more: &[&str]| {
            run_pair(&pair, &[&args[..], &["--device", device, "--prompts", &file], more].concat()).done()
        };
        let timeless = |text: &str| -> Vec<Value> {
            let record = |line: &str| {
                let mut record: Value = serde_json::from_str(line).unwrap();
                record.as_object_mut().unwrap().remove("seconds");
                record
            };
            text.lines().map(record).collect()
        };
        let by_index = |text: &str| {
            let mut events = timeless(text);
            events.sort_by_key(|event| event["index"].as_u64().unwrap());
            events
        };
        let texts = with(&[]);
        assert!(texts.lines().count() >= 5, "{texts:?}");
        let (records, events) = (timeless(&with(&["--json"])), by_index(&with(&["--stream-json"])));
        assert_eq!(records.len(), 5);
        assert!(records.iter().all(|record| record["device"] == named && record["draft"] != Value::Null));
        for count in if device == "cpu" || exhaustive() { vec!["2", "3"] } else { vec!["3"] } {
            assert_eq!(with(&["--batch", count]), texts, "--batch {count} on {device}");
            assert_eq!(timeless(&with(&["--batch", count, "--json"])), records);
            let unsorted = with(&["--batch", count, "--stream-json"]);
            assert_eq!(by_index(&unsorted), events);
            assert_ne!(timeless(&unsorted), events, "the answers of a batch did not run together");
        }
        // A context that ends the answers.
        let short = timeless(&with(&["--batch", "3", "--json", "--ctx", "15", "--ignore-eos"]));
        let ends = |record: &Value| {
            let left = 15 - record["prompt_tokens"].as_u64().unwrap() as usize;
            (
                record["tokens"].as_array().unwrap().len(),
                left,
                record["finish_reason"].as_str() == Some("context"),
            )
        };
        assert!(short.iter().map(ends).all(|(tokens, left, context)| tokens == left && context), "{short:?}");
    }
}

#[test]
fn an_absent_device_is_refused_and_auto_names_its_choice() {
    let pair = support::write_pair(&tiny().0, &tiny().1);
    let with = |device: &str, gpus: &str| {
        let more = ["--raw", "!", "-n", "3", "--json", "--device", device];
        let args = flags(&pair).into_iter().chain(more.map(String::from));
        software_gpu::run_any(&[("SOFTGPU_DEVICES", gpus)], args)
    };
    let first =
        |run: &program::Run| run.err.lines().find(|line| line.starts_with("device: ")).map(String::from);
    let (auto, asked) = (with("auto", "1"), with("cuda", "1"));
    assert_eq!(first(&auto).as_deref(), Some("device: cuda, software GPU (h200)"));
    let (auto, asked) = (auto.json().remove(0), asked.json().remove(0));
    assert_eq!((&auto["device"], &auto["tokens"]), (&json!("softgpu"), &asked["tokens"]));
    let (auto, asked) = (with("auto", "0"), with("cuda", "0"));
    let why = "the driver sees no GPU";
    assert_eq!(
        (asked.code, asked.out, asked.err),
        (4, String::new(), format!("dflash-gen: device cuda: {why}\n"))
    );
    assert_eq!(first(&auto), Some(format!("device: cpu: {why}")));
    assert_eq!(auto.json()[0]["device"], "cpu");
}

/// Five answers of `tokens` tokens, three at a time: the pair and the arguments.
fn long(tokens: &str) -> (support::Pair, Vec<String>) {
    let (target, drafter) = tiny();
    let target = support::Target { max_positions: 100_000, ..target };
    let pair = support::write_pair(&target, &drafter);
    let file = write_prompts(pair.root.path());
    let more = ["--raw", "-q", "--ignore-eos", "-n", tokens, "--batch", "3", "--prompts", &file];
    let args = flags(&pair).into_iter().chain(more.map(String::from)).collect();
    (pair, args)
}

#[cfg(target_os = "linux")]
#[test]
fn a_closed_pipe_ends_a_batch_on_the_device_quietly() {
    // Records are written at the end of answers.
    for (form, tokens) in [(&[][..], "3000"), (&["--json"], "5"), (&["--stream-json"], "3000")] {
        let (_pair, args) = long(tokens);
        let mut command =
            command(args.iter().map(String::as_str).chain(["--device", "cuda"]).chain(form.iter().copied()));
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut child = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        reader.read_exact(&mut [0; 10]).unwrap();
        drop(reader);
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""), "{form:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_in_a_batch_prints_the_tokens_so_far() {
    let (_pair, args) = long("3000");
    for device in ["cpu", "cuda"] {
        for form in [&[][..], &["--stream-json"]] {
            let with = |more: &[&str]| {
                command(
                    args.iter().map(String::as_str).chain(["--device", device]).chain(more.iter().copied()),
                )
            };
            let mut child = with(form)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut out = child.stdout.take().unwrap();
            let mut bytes = vec![0; 20];
            out.read_exact(&mut bytes).unwrap();
            program::interrupt(&child);
            out.read_to_end(&mut bytes).unwrap();
            let (code, output) = (child.wait().unwrap().code(), String::from_utf8(bytes).unwrap());
            assert_eq!(code, Some(130), "{output:?}");
            if form.is_empty() {
                // The three running answers, each up to its last token.
                assert_eq!(output.lines().count(), 3, "{output:?}");
                continue;
            }
            let events: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let (done, parts): (Vec<_>, Vec<_>) = events.iter().partition(|event| event["event"] == "done");
            assert!(!done.is_empty() && done.iter().all(|record| record["finish_reason"] == "interrupted"));
            for record in done {
                let of = parts.iter().filter(|event| event["index"] == record["index"]);
                let tokens: Vec<&Value> = of.flat_map(|event| event["tokens"].as_array().unwrap()).collect();
                assert!(tokens.iter().copied().eq(record["tokens"].as_array().unwrap()));
            }
        }
    }
}
