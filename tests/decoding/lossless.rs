//! DFlash equals autoregressive decoding bit for bit, in tokens and in the logits that chose them, for all
//! block sizes, batches, slots and sampling settings, on a device. And
//! `--check-lossless`, with which users check it.

use crate::support;
use crate::support::kernel;
use crate::support::program;

use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::Dtype;
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::{Decoder, Emitted, Flow, Prefill, Request, TokenSink, generate};
use dflash::engine::lossless::{Report, check};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::Device;
use dflash::spec::sampling::SamplingParams;
use kernel::{Random, on_gpu};
use serde_json::{Value, json};

/// Positions of a sequence: two pages, which are the first split of attention, and part of the next split.
const POSITIONS: usize = 160;

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

fn open(written: &support::Pair) -> Pair {
    Pair::open(support::disk(&written.target), Some(support::disk(&written.drafter))).unwrap()
}

/// Heads of 64 in groups of 2, sums over K in three slices, a drafter with a window. With this vocabulary and
/// seed the drafter is often right.
fn narrow() -> support::Pair {
    let target = support::Target {
        intermediate: 768,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        vocab: 3,
        seed: 21,
        max_positions: POSITIONS,
        ..Default::default()
    };
    let drafter = support::Drafter {
        intermediate: 32,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        taps: vec![0],
        block: 16,
        sliding: vec![true, false],
        window: Some(7),
        ..Default::default()
    };
    support::write_pair(&target, &drafter)
}

/// Heads of 128, three per KV head, no q/k norm, an LM head that is not tied.
fn wide(vocab: usize) -> support::Pair {
    let target = support::Target {
        llama: true,
        hidden: 192,
        intermediate: 160,
        layers: 2,
        heads: 3,
        kv_heads: 1,
        head_dim: 128,
        vocab,
        seed: 26,
        tied: false,
        dtype: Dtype::Bf16,
        ..Default::default()
    };
    let drafter = support::Drafter {
        intermediate: 96,
        layers: 1,
        heads: 2,
        kv_heads: 2,
        head_dim: 128,
        taps: vec![0],
        block: 16,
        ..Default::default()
    };
    support::write_pair(&target, &drafter)
}

/// Greedy, and every sampling filter, alone and together.
fn samplings() -> Vec<SamplingParams> {
    let greedy = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, stream: 0 };
    let all = SamplingParams { temperature: 0.9, ..greedy.clone() };
    vec![
        greedy,
        all.clone(),
        SamplingParams { top_k: 2, stream: 1, ..all.clone() },
        SamplingParams { top_p: 0.8, seed: 8, ..all.clone() },
        SamplingParams { min_p: 0.3, temperature: 1.4, ..all.clone() },
        SamplingParams { top_k: 40, top_p: 0.95, min_p: 0.01, stream: 2, ..all },
    ]
}

/// The answer of autoregressive decoding, and the bits of the logits that chose each token but the first.
struct Answer {
    request: Request,
    tokens: Vec<u32>,
    logits: Vec<Vec<u32>>,
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// Autoregressive decoding of one sequence, in rounds of one row, up to `max` tokens or the end of the
/// context.
fn autoregressive(
    device: &dyn Device,
    models: &Models,
    prompt: &[u32],
    sampling: &SamplingParams,
    max: usize,
) -> Answer {
    let mut batch = Batch::new(device, models, BatchConfig::new(1, 1, POSITIONS)).unwrap();
    batch.keep_logits();
    let max_tokens = max.min(POSITIONS - prompt.len());
    let sampling = sampling.clone();
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        stop_ids: vec![],
        block: 1,
        spec: Default::default(),
    };
    batch.admit(0, &request, false).unwrap().unwrap();
    let first = batch.prefill(0).unwrap().next.expect("the prompt fits one chunk");
    let (mut tokens, mut logits, mut out) = (vec![first], vec![vec![]], [Emitted::default()]);
    while tokens.len() < max_tokens {
        batch.round(&mut out).unwrap();
        assert_eq!((out[0].tokens.len(), out[0].produced), (1, 1));
        tokens.extend(&out[0].tokens);
        logits.push(bits(&batch.logits(0, 0).unwrap()));
    }
    Answer { request, tokens, logits }
}

/// Answers to prompts of several lengths: they cross the border of a page, of a split or of the context, or
/// none of these.
fn answers(device: &dyn Device, models: &Models, vocab: usize, max: usize) -> Vec<Answer> {
    let mut random = Random::new(1);
    let lengths = [3, 64 - max / 2, 128 - max / 2, POSITIONS - max / 2, 64, 127];
    let answer = |(length, sampling): (usize, &SamplingParams)| {
        let prompt: Vec<u32> = (0..length).map(|_| random.below(vocab) as u32).collect();
        autoregressive(device, models, &prompt, sampling, max)
    };
    lengths.into_iter().zip(&samplings()).map(answer).collect()
}

/// A running request whose answer is known: `answers[answer]`.
struct Client {
    answer: usize,
    block: usize,
    /// Number of tokens up to the stop id or the budget, and the number after which the test releases the
    /// slot.
    end: usize,
    leaves_after: usize,
    received: usize,
    prefilling: bool,
}

/// What the requests of a run have covered.
#[derive(Debug, Default)]
struct Coverage {
    rounds: usize,
    rows: usize,
    /// Rows that were accepted drafts.
    accepted: usize,
    left_early: usize,
    /// Slot, block and index of every complete answer.
    ended: Vec<(usize, usize, usize)>,
}

impl Coverage {
    /// Whether every slot, block and answer has had a complete answer, a slot was released early, and, with
    /// `guessing`, drafts were accepted.
    fn enough(&self, slots: usize, blocks: &[usize], answers: usize, guessing: bool) -> bool {
        (0..slots).all(|slot| self.ended.iter().any(|ended| ended.0 == slot))
            && blocks.iter().all(|block| self.ended.iter().any(|ended| ended.1 == *block))
            && (0..answers).all(|answer| self.ended.iter().any(|ended| ended.2 == answer))
            && self.left_early > 0
            && (self.accepted > 0 || !guessing)
    }
}

/// Requests are admitted and released in random order, in any slot, until enough is covered. Every token and
/// every bit of its logits must equal those of autoregressive decoding alone.
fn run_clients(
    device: &dyn Device,
    models: &Models,
    config: BatchConfig,
    answers: &[Answer],
    guessing: bool,
) -> Coverage {
    let blocks: Vec<usize> = [1, 2, 7, 16].into_iter().filter(|block| *block <= config.block).collect();
    let mut random = Random::new((config.sequences * 100 + config.block) as u64);
    let mut batch = Batch::new(device, models, config).unwrap();
    batch.keep_logits();
    let mut clients: Vec<Option<Client>> = (0..config.sequences).map(|_| None).collect();
    let mut out = vec![Emitted::default(); config.sequences];
    let (mut covered, mut admitted) = (Coverage::default(), 0);
    while !covered.enough(config.sequences, &blocks, answers.len(), guessing) {
        assert!(covered.rounds < 1000, "not everything is covered: {covered:?}");
        for (slot, place) in clients.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            if random.below(4) == 0 {
                continue;
            }
            let (answer, block) = (admitted % answers.len(), blocks[random.below(blocks.len())]);
            let tokens = &answers[answer].tokens;
            let (mut request, mut end) = (Request { block, ..answers[answer].request.clone() }, tokens.len());
            let mut leaves_after = end;
            match random.below(8) {
                0 => (end, request.max_tokens) = (1 + leaves_after / 2, 1 + leaves_after / 2),
                1 => {
                    let stop = tokens[random.below(end)];
                    end = tokens.iter().position(|token| *token == stop).unwrap() + 1;
                    request.stop_ids = vec![stop];
                }
                2 | 3 => leaves_after = random.below(end),
                _ => {}
            }
            if batch.admit(slot, &request, false).unwrap().is_some() {
                *place = Some(Client {
                    answer,
                    block,
                    end,
                    leaves_after: leaves_after.min(end),
                    received: 0,
                    prefilling: true,
                });
                admitted += 1;
            }
        }
        for (slot, place) in clients.iter_mut().enumerate() {
            if let Some(client) = place.as_mut().filter(|client| client.prefilling)
                && let Some(first) = batch.prefill(slot).unwrap().next
            {
                assert_eq!(first, answers[client.answer].tokens[0], "the first token in slot {slot}");
                (client.prefilling, client.received) = (false, 1);
                release_if_done(&mut batch, slot, place, &mut covered);
            }
        }
        if clients.iter().flatten().all(|client| client.prefilling) {
            continue;
        }
        batch.round(&mut out).unwrap();
        covered.rounds += 1;
        for (slot, place) in clients.iter_mut().enumerate() {
            let Some(client) = place else { continue };
            let Answer { request, tokens, logits } = &answers[client.answer];
            for (row, token) in out[slot].tokens.iter().enumerate().take(client.end - client.received) {
                let what = format!(
                    "round {} of {config:?}: slot {slot}, row {row} of a block of {}, token {} after a prompt of {}, {:?}",
                    covered.rounds,
                    client.block,
                    client.received + 1,
                    request.prompt.len(),
                    request.sampling
                );
                let own = bits(&batch.logits(slot, row).unwrap());
                let other = own.iter().zip(&logits[client.received]).filter(|(a, b)| a != b).count();
                assert_eq!(other, 0, "logits that differ: {what}");
                assert_eq!(*token, tokens[client.received], "{what}");
                client.received += 1;
                covered.rows += 1;
                covered.accepted += usize::from(row > 0);
            }
            release_if_done(&mut batch, slot, place, &mut covered);
        }
    }
    covered
}

/// Releases the slot once its client has received enough.
fn release_if_done(batch: &mut Batch, slot: usize, place: &mut Option<Client>, covered: &mut Coverage) {
    let Some(client) = place.take_if(|client| client.received >= client.leaves_after) else { return };
    match client.received == client.end {
        true => covered.ended.push((slot, client.block, client.answer)),
        false => covered.left_early += 1,
    }
    batch.release(slot, client.received).unwrap();
}

/// Runs clients in batches of (sequences, block), with answers of up to `max` tokens.
fn run_batches(device: &dyn Device, pair: &Pair, max: usize, configs: &[(usize, usize)], guessing: bool) {
    let models = Models::load(device, pair, POSITIONS).unwrap();
    let answers = answers(device, &models, pair.target.config.vocab, max);
    for &(sequences, block) in configs {
        // One page too few, so that a request sometimes waits.
        let all = BatchConfig::new(sequences, block, POSITIONS);
        let config = BatchConfig { pages: all.pages - usize::from(sequences > 1), ..all };
        let covered = run_clients(device, &models, config, &answers, guessing);
        println!(
            "{sequences} x {block}: {} rounds, {} rows, {} accepted drafts; {} complete answers, {} released early",
            covered.rounds,
            covered.rows,
            covered.accepted,
            covered.ended.len(),
            covered.left_early
        );
    }
}

#[test]
fn batches_of_a_narrow_pair_equal_ar_decoding_bit_for_bit() {
    let pair = open(&narrow());
    // Every number of sequences and every block occurs once, here or in the wide pair's configs.
    let mut configs = vec![(1, 7), (3, 16)];
    if support::exhaustive() {
        configs = vec![(1, 2), (1, 7), (1, 16), (3, 2), (3, 7), (3, 16), (8, 2), (8, 7), (8, 16)];
    }
    on_gpu(|device| run_batches(device, &pair, 12, &configs, true));
}

#[test]
fn batches_of_a_wide_pair_equal_ar_decoding_bit_for_bit() {
    let pair = open(&wide(4));
    on_gpu(|device| match support::exhaustive() {
        true => run_batches(device, &pair, 12, &[(1, 16), (3, 2), (8, 7)], true),
        false => run_batches(device, &pair, 8, &[(8, 2)], true),
    });
    // A vocabulary larger than one block of the LM head, as the demo pair's; no draft is right.
    if support::exhaustive() {
        let pair = open(&wide(301));
        on_gpu(|device| run_batches(device, &pair, 6, &[(3, 16)], false));
    }
}

#[test]
fn a_batch_of_the_demo_pair_equals_ar_decoding_bit_for_bit() {
    on_gpu(|device| run_batches(device, &demo(), 4, &[(3, 16)], false));
}

// ---- the check ----

/// Interrupts after so many tokens.
struct LimitedSink(usize);

impl TokenSink for LimitedSink {
    fn token(&mut self, _id: u32, _drafted: bool) -> dflash::Result<Flow> {
        self.0 -= 1;
        Ok(if self.0 == 0 { Flow::Interrupt } else { Flow::Continue })
    }
}

fn checked(decoder: &mut dyn Decoder, request: &Request) -> Report {
    check(decoder, request, || Ok(LimitedSink(1000))).unwrap().expect("not interrupted")
}

fn request(prompt: &[u32], max_tokens: usize, sampling: SamplingParams) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        stop_ids: vec![],
        block: 16,
        spec: Default::default(),
    }
}

/// The report's counts are those of [`generate`], wherever an answer ends.
fn counts_are_those_of_the_rounds(decoder: &mut dyn Decoder, vocab: usize) {
    let mut random = Random::new(3);
    let prompt: Vec<u32> = (0..POSITIONS - 8).map(|_| random.below(vocab) as u32).collect();
    for (i, sampling) in samplings()[..2].iter().enumerate() {
        let short = request(&prompt[..5], 14, sampling.clone());
        let answer = generate(decoder, &short, &mut LimitedSink(1000)).unwrap();
        let requests = [
            Request { stop_ids: vec![answer.tokens[9]], ..short.clone() },
            Request { max_tokens: 1, ..short.clone() },
            Request { max_tokens: 2, ..short.clone() },
            request(&prompt, 14, sampling.clone()),
            Request { block: 7, ..short.clone() },
            short,
        ];
        // Every second one with each sampling; exhaustive: all.
        let step = if support::exhaustive() { 1 } else { 2 };
        for request in requests.into_iter().skip(i % step).step_by(step) {
            let outcome = generate(decoder, &request, &mut LimitedSink(1000)).unwrap();
            let rounds = outcome.accepted.len();
            let expected = Report {
                tokens: outcome.tokens.len(),
                rounds,
                compared: outcome.tokens.len() - 1,
                rejected: rounds + outcome.drafted.iter().sum::<usize>()
                    - outcome.accepted.iter().sum::<usize>(),
                identical: Ok(()),
            };
            assert_eq!(checked(decoder, &request), expected, "{request:?}");
        }
    }
}

#[test]
fn a_lossless_decoder_passes_wherever_its_answers_end() {
    let pair = open(&narrow());
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    counts_are_those_of_the_rounds(&mut Sequences::new(&target, Some(&drafter), 1, POSITIONS), 3);
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(device, &models, BatchConfig::new(2, 16, POSITIONS)).unwrap();
        counts_are_those_of_the_rounds(&mut batch, 3);
    });
}

/// A decoder that changes tokens and logits. `token` and `logits` get the number of the run, from 1, and the
/// index of the token, from 0.
struct AlteringDecoder<'a> {
    decoder: &'a mut dyn Decoder,
    /// Requests so far.
    runs: usize,
    /// Tokens of the answer before the last round, and after it.
    received: [usize; 2],
    token: &'a dyn Fn(usize, usize, u32) -> u32,
    logits: &'a dyn Fn(usize, usize, &mut [f32]),
}

impl Decoder for AlteringDecoder<'_> {
    fn vocab(&self) -> usize {
        self.decoder.vocab()
    }
    fn context(&self) -> usize {
        self.decoder.context()
    }
    fn slots(&self) -> usize {
        self.decoder.slots()
    }
    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> dflash::Result<Option<usize>> {
        self.runs += 1;
        self.decoder.admit(slot, request, keep)
    }
    fn prefill(&mut self, slot: usize) -> dflash::Result<Prefill> {
        let mut prefill = self.decoder.prefill(slot)?;
        prefill.next = prefill.next.map(|first| (self.token)(self.runs, 0, first));
        self.received = [0, 1];
        Ok(prefill)
    }
    fn round(&mut self, out: &mut [Emitted]) -> dflash::Result<()> {
        self.decoder.round(out)?;
        self.received = [self.received[1], self.received[1] + out[0].tokens.len()];
        for (row, token) in out[0].tokens.iter_mut().enumerate() {
            *token = (self.token)(self.runs, self.received[0] + row, *token);
        }
        Ok(())
    }
    fn release(&mut self, slot: usize, tokens: usize) -> dflash::Result<()> {
        self.decoder.release(slot, tokens)
    }
    fn keep_logits(&mut self) {
        self.decoder.keep_logits();
    }
    fn logits(&mut self, slot: usize, row: usize) -> dflash::Result<Vec<f32>> {
        let mut logits = self.decoder.logits(slot, row)?;
        (self.logits)(self.runs, self.received[0] + row, &mut logits);
        Ok(logits)
    }
}

#[test]
fn every_difference_is_found_and_described() {
    let pair = open(&narrow());
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    let mut unaltered = Sequences::new(&target, Some(&drafter), 1, POSITIONS);
    let request = request(&[2, 0, 1], 12, samplings().swap_remove(1));
    let answer = generate(&mut unaltered, &request, &mut LimitedSink(1000)).unwrap().tokens;
    type Token<'a> = &'a dyn Fn(usize, usize, u32) -> u32;
    type Logits<'a> = &'a dyn Fn(usize, usize, &mut [f32]);
    let mut find = |token: Token, logits: Logits| {
        let altering =
            &mut AlteringDecoder { decoder: &mut unaltered, runs: 0, received: [0; 2], token, logits };
        let report = checked(altering, &request);
        let error = report.identical.expect_err("a difference");
        assert_eq!(error.exit_code(), 6);
        (error.to_string(), report.compared, altering.runs)
    };
    let (same_tokens, same_logits): (Token, Logits) = (&|_, _, token| token, &|_, _, _| ());

    // One bit of one logit, for each token but the first, in the run with drafts only.
    for place in 1..12 {
        let seen = std::cell::Cell::new([0.0; 2]);
        let flip = |run: usize, at: usize, logits: &mut [f32]| {
            if (run, at) == (2, place) {
                let flipped = f32::from_bits(logits[1].to_bits() ^ 1);
                seen.set([logits[1], flipped]);
                logits[1] = flipped;
            }
        };
        let found = find(same_tokens, &flip);
        let [own, flipped] = seen.get();
        let expected = format!(
            "token {} (position {}) was chosen from different logits: 1 of 3 differ, the first that of id 1: {own} in \
             autoregressive decoding, {flipped} in DFlash",
            place + 1,
            place + 3
        );
        assert_eq!(found, (expected, place, 3));
    }
    // A zero's sign counts as a difference. If there are many differences, the first is reported.
    let zeros = |run: usize, at: usize, logits: &mut [f32]| {
        if at == 4 || run == 2 && at > 6 {
            logits.fill(if run == 2 { -0.0 } else { 0.0 });
        }
    };
    let expected = "token 5 (position 7) was chosen from different logits: 3 of 3 differ, the first that of id 0: 0 in \
                    autoregressive decoding, -0 in DFlash";
    assert_eq!(find(same_tokens, &zeros), (expected.into(), 4, 3));

    // The logits of a row, permuted.
    let shift = |run: usize, at: usize, logits: &mut [f32]| {
        if run == 2 && at == 2 {
            logits.rotate_left(1);
        }
    };
    assert!(
        find(same_tokens, &shift)
            .0
            .starts_with("token 3 (position 5) was chosen from different logits: 3 of 3 differ")
    );

    // A token that its logits did not choose; the first token, which has no logits.
    for place in [0, 1, 7] {
        let other =
            |run: usize, at: usize, token: u32| if (run, at) == (2, place) { (token + 1) % 3 } else { token };
        let expected = format!(
            "after {place} equal tokens autoregressive decoding goes on with {}, and DFlash goes on with {}",
            answer[place],
            (answer[place] + 1) % 3
        );
        assert_eq!(find(&other, same_logits), (expected, place, 2));
    }

    // Autoregressive decoding whose logits differ in every run.
    let unrepeatable = |run: usize, at: usize, logits: &mut [f32]| {
        if at == 5 {
            logits[0] = run as f32;
        }
    };
    let expected = "autoregressive decoding does not repeat itself: token 6 (position 8) was chosen from different logits when it ran again";
    assert_eq!(find(same_tokens, &unrepeatable), (expected.into(), 5, 3));
}

#[test]
fn logits_beyond_the_end_of_an_answer_are_not_compared() {
    let pair = open(&narrow());
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    let mut unaltered = Sequences::new(&target, Some(&drafter), 1, POSITIONS);
    let request = request(&[2, 0, 1], 12, samplings().swap_remove(0));
    let beyond = std::cell::Cell::new(0);
    let logits = |run: usize, at: usize, logits: &mut [f32]| {
        if run == 2 && at >= 12 {
            beyond.set(beyond.get() + 1);
            logits[0] = -7.0;
        }
    };
    let mut altering = AlteringDecoder {
        decoder: &mut unaltered,
        runs: 0,
        received: [0; 2],
        token: &|_, _, token| token,
        logits: &logits,
    };
    let report = checked(&mut altering, &request);
    assert_eq!((report.identical, report.compared), (Ok(()), 11));
    assert!(beyond.get() > 0, "no round went beyond the answer");
}

#[test]
fn an_interrupted_check_gives_no_report() {
    let pair = open(&narrow());
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    let mut decoder = Sequences::new(&target, Some(&drafter), 1, POSITIONS);
    let request = request(&[2, 0, 1], 12, samplings().swap_remove(0));
    for limits in [[3, 1000], [1000, 1], [1000, 4]] {
        let mut runs = limits.into_iter();
        let report = check(&mut decoder, &request, || Ok(LimitedSink(runs.next().unwrap()))).unwrap();
        assert_eq!(report, None, "{limits:?}");
    }
    assert_eq!(checked(&mut decoder, &request).identical, Ok(()));
}

// ---- --check-lossless ----

const PROMPT: &str = "def read_config(filename):";

#[test]
fn check_lossless_counts_what_it_compared() {
    let dir = tempfile::tempdir().unwrap();
    let lines = ["import os", "class A:\n"].map(|p| json!({"prompt": p}).to_string()).join("\n");
    let file = program::write(dir.path(), "p.jsonl", lines);
    let runs: [(&str, &str, &[&str]); 3] = [
        ("cpu", "30", &[]),
        ("cpu", "30", &["--temperature", "0.8", "--seed", "3", "--block", "7"]),
        ("cuda", "5", &["--temperature", "0.8", "--seed", "3", "--ctx", "64"]),
    ];
    for (device, tokens, more) in runs {
        let with = |first: &[&'static str]| -> Vec<&str> {
            let args = ["--device", device, "--prompts", &file, "-n", tokens];
            first.iter().chain(&args).chain(more).copied().collect()
        };
        let expected = program::run(with(&["--json"])).json();
        let table = program::run(with(&["--check-lossless"]));
        // A device first prints its memory plan.
        let received = table.err.lines().skip(if device == "cpu" { 0 } else { 13 });
        // Random weights accept hardly any draft, which is noted.
        let received = received.filter(|line| !line.starts_with("the drafter's drafts are not accepted"));
        let received = received.collect::<Vec<_>>().join("\n");
        assert_eq!((table.code, received.as_str()), (0, if more.is_empty() { "" } else { "seed 3" }));
        let rows: Vec<Vec<&str>> = table.out.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0].join(" "), "prompt tokens rounds rows compared identical");
        assert_eq!(rows.iter().skip(1).map(|row| row[0]).collect::<Vec<_>>(), ["1", "2", "all"]);
        assert!(rows.iter().skip(1).all(|row| row.len() == 5 && row[4] == "yes"), "{}", table.out);

        let report = program::run(with(&["--check-lossless", "--json"])).json().remove(0);
        let fields = [
            "tokens",
            "rounds",
            "compared",
            "rejected",
            "identical",
            "difference",
            "prompts",
            "seed",
            "device",
            "target",
            "draft",
            "verify",
            "tree",
            "adaptive",
            "threshold",
            "confidence",
            "coupled",
            "draft_temperature",
        ];
        assert_eq!(report.as_object().unwrap().keys().collect::<Vec<_>>(), fields);
        assert_eq!((&report["identical"], &report["difference"]), (&json!(true), &Value::Null));
        assert_eq!((&report["device"], &report["draft"]), (&expected[0]["device"], &expected[0]["draft"]));
        let parts = report["prompts"].as_array().unwrap();
        for ((part, record), row) in parts.iter().zip(&expected).zip(&rows[1..]) {
            let (tokens, rounds) = (record["tokens"].as_array().unwrap().len(), &record["rounds"]);
            assert_eq!((&part["tokens"], &part["rounds"]), (&json!(tokens), rounds));
            assert_eq!((&part["compared"], &part["identical"]), (&json!(tokens - 1), &json!(true)));
            assert_eq!(row[1..4], [tokens.to_string(), rounds.to_string(), (tokens - 1).to_string()]);
        }
        for (i, field) in ["tokens", "rounds", "compared", "rejected"].into_iter().enumerate() {
            let sum = parts.iter().map(|part| part[field].as_u64().unwrap()).sum::<u64>();
            assert_eq!(report[field], sum, "{field}");
            assert!(i == 3 || rows[3][i + 1] == sum.to_string(), "{field}: {}", table.out);
        }
    }
}

#[test]
fn check_lossless_reads_prompts_and_ends_at_stop_strings() {
    let dir = tempfile::tempdir().unwrap();
    let file = program::write(dir.path(), "prompt.txt", PROMPT);
    let args = ["--check-lossless", "-n", "40", "--stop", "if "];
    let table = program::run([PROMPT].iter().chain(&args)).done();
    assert_eq!(program::run(["-f", file.as_str()].iter().chain(&args)).done(), table);
    assert_eq!(program::with_stdin(&args, PROMPT.as_bytes()).out, table);
    let record = program::run(["--json", PROMPT, "-n", "40", "--stop", "if "]).json().remove(0);
    let tokens = record["tokens"].as_array().unwrap().len();
    assert_eq!(record["finish_reason"], "stop");
    assert!(table.lines().last().unwrap().trim_start().starts_with(&format!("all  {tokens:6} ")), "{table}");
}

#[test]
fn check_lossless_is_refused_where_it_compares_nothing() {
    for (args, sentence) in [
        ("--draft none x", "--check-lossless needs a drafter, but --draft is none"),
        (
            "--block 1 x",
            "--block is 1, which is autoregressive decoding: --check-lossless expects at least 2",
        ),
        ("-n 1 x", "--max-tokens is 1, which leaves --check-lossless no round: expected at least 2"),
        ("--compare x", "the argument '--check-lossless' cannot be used with '--compare'"),
        ("--chat", "the argument '--check-lossless' cannot be used with '--chat'"),
        ("--plan", "the argument '--check-lossless' cannot be used with '--plan'"),
        ("--stream-json x", "the argument '--check-lossless' cannot be used with '--stream-json'"),
        ("--show-accept x", "the argument '--check-lossless' cannot be used with '--show-accept'"),
        ("--batch 2 --prompts x", "the argument '--check-lossless' cannot be used with '--batch <N>'"),
    ] {
        let run = program::run(["--check-lossless"].into_iter().chain(args.split(' ')));
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{args}");
        assert_eq!(run.err, format!("dflash-gen: {sentence}\n"), "{args}");
    }
}
