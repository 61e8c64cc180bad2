//! Trees and every verification method on devices: batches of many kinds of requests against each request
//! alone, answers against the target's distribution and the CPU's answers, ends of answers, refusals, and the
//! launches of a round.

use crate::support;
use crate::support::distribution;
use crate::support::kernel;
use crate::support::requests;

use crate::support::test_gpu::TestGpu;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Decoder, Finish, Flow, Outcome, Request};
use dflash::engine::lossless::check;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, DrafterMode, Models};
use dflash::gpu::device::{Device, Node};
use dflash::spec::config::{SpecConfig, VerifyMethod};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::rng::{DrawKey, PhiloxStream, RandomSource};
use dflash::spec::verify::{block_verify, rejection, sample_chain};
use kernel::{Random, on_gpu};
use requests::{AcceptAll, Event, keep_going, open, reference_prompts, run, run_together, seeded, tiny};

const POSITIONS: usize = 192;
const BLOCK: usize = 16;
const TREE: usize = 64;
/// Rounding on a device can change the outcome of a random draw only if it is closer to a boundary than this.
const NEAR: f64 = 0.01;

/// A batch with trees and all verification methods.
fn config(sequences: usize) -> BatchConfig {
    BatchConfig { draft_probs: true, ..BatchConfig::new(sequences, BLOCK, POSITIONS).with_trees(TREE) }
}

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

/// A pair with so few tokens that a random drafter is often right.
fn small(vocab: usize) -> Pair {
    let (target, drafter) = tiny();
    open(&support::write_pair(&support::Target { vocab, ..target }, &drafter))
}

fn sampled_chain(method: VerifyMethod, temperature: f32) -> SpecConfig {
    requests::spec(method, temperature, None)
}

fn tree(rows: usize) -> SpecConfig {
    requests::spec(VerifyMethod::Match, 0.0, Some(rows))
}

/// Siblings sampled without replacement (rejection), or several chains (block).
fn sampled_tree(method: VerifyMethod, rows: usize, temperature: f32) -> SpecConfig {
    requests::spec(method, temperature, Some(rows))
}

/// (speculation, block size, temperature) of every kind of request.
fn kinds() -> Vec<(SpecConfig, usize, f32)> {
    let ar = SpecConfig::default;
    vec![
        (tree(64), 16, 0.0),
        (sampled_chain(VerifyMethod::Block, 1.0), 16, 1.0),
        (ar(), 1, 0.0),
        (sampled_chain(VerifyMethod::Rejection, 1.0), 16, 1.0),
        (tree(5), 3, 0.9),
        (ar(), 16, 0.0),
        (sampled_chain(VerifyMethod::Match, 1.0), 9, 1.0),
        (tree(20), 16, 1.2),
        (sampled_chain(VerifyMethod::Rejection, 0.0), 7, 0.7),
        (ar(), 1, 1.0),
        (sampled_chain(VerifyMethod::Block, 0.5), 5, 1.3),
        (tree(64), 6, 1.0),
        (ar(), 4, 0.8),
        (sampled_chain(VerifyMethod::Match, 0.5), 16, 0.0),
        (sampled_chain(VerifyMethod::Rejection, 2.0), 16, 0.0),
        (sampled_chain(VerifyMethod::Block, 2.0), 2, 0.6),
        (sampled_chain(VerifyMethod::Block, 1.0), 1, 1.0),
        (sampled_tree(VerifyMethod::Rejection, 40, 1.0), 16, 1.0),
        (sampled_tree(VerifyMethod::Rejection, 7, 0.5), 6, 0.9),
        (sampled_tree(VerifyMethod::Block, 64, 1.0), 16, 1.1),
        (sampled_tree(VerifyMethod::Block, 9, 1.0), 3, 1.0),
    ]
}

fn request(
    prompt: &[u32],
    tokens: usize,
    (spec, block, temperature): (SpecConfig, usize, f32),
    seed: u64,
) -> Request {
    let mut request = seeded(prompt, tokens, block, temperature, seed);
    request.sampling.stream = seed as u32 % 5;
    Request { spec, ..request }
}

fn answer(outcome: &Outcome) -> (&[u32], Finish, &[usize], &[usize]) {
    (&outcome.tokens, outcome.finish, &outcome.accepted, &outcome.drafted)
}

/// The same request with autoregressive decoding.
fn autoregressive(request: &Request) -> Request {
    Request { block: 1, spec: SpecConfig::default(), ..request.clone() }
}

fn prompt(random: &mut Random, length: usize, vocab: usize) -> Vec<u32> {
    (0..length).map(|_| random.below(vocab) as u32).collect()
}

// ---- batches ----

/// Runs the requests together, request `i` for at most `stop_after[i]` tokens, and each that `runs_alone` also
/// alone: they must have the same tokens and rounds, and under `match` (every fourth of them; exhaustive: all)
/// the tokens of autoregressive decoding. Returns the number of accepted drafts.
pub fn same_as_alone(
    device: &dyn Device,
    models: &Models,
    config: BatchConfig,
    requests: &[Request],
    stop_after: &[usize],
    runs_alone: impl Fn(usize) -> bool,
) -> usize {
    let until = |i: usize, event| match event {
        Event::Token(n) if n == stop_after[i] => Ok(Flow::Stop),
        _ => Ok(Flow::Continue),
    };
    let mut batch = Batch::new(device, models, config).unwrap();
    let all = run_together(&mut batch, requests, until);
    assert_eq!(batch.free_pages(), config.pages, "all pages are free again");
    // The same batch config, so that a sequence alone has tables with the same strides.
    let mut solo = Batch::new(device, models, config).unwrap();
    let mut alone = |i: usize, request: &Request| {
        run_together(&mut solo, std::slice::from_ref(request), |_, event| until(i, event)).remove(0)
    };
    for (i, (request, own)) in requests.iter().zip(&all).enumerate() {
        let what = (&request.spec, request.block, request.sampling.temperature);
        if runs_alone(i) {
            assert_eq!(answer(own), answer(&alone(i, request)), "request {i}: {what:?}");
        }
        let like_ar = request.spec.method() == VerifyMethod::Match && request.block > 1;
        if like_ar && (i % 4 == 0 || requests::exhaustive()) {
            assert_eq!(own.tokens, alone(i, &autoregressive(request)).tokens, "request {i}: {what:?}");
        }
        let max = request.spec.tree_rows().unwrap_or(request.block) - 1;
        assert!(own.drafted.iter().all(|&drafted| drafted <= max), "request {i}: {:?}", own.drafted);
        assert!(own.drafted.iter().zip(&own.accepted).all(|(d, emitted)| emitted - 1 <= *d), "request {i}");
    }
    all.iter().flat_map(|own| &own.accepted).map(|emitted| emitted - 1).sum()
}

#[test]
fn a_batch_of_all_kinds_answers_as_each_alone() {
    const VOCAB: usize = 12;
    let pair = small(VOCAB);
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut random = Random::new(5);
        let mut requests = Vec::new();
        for (i, kind) in kinds().into_iter().enumerate() {
            let length = 1 + random.below(if i % 4 == 0 || requests::exhaustive() { 70 } else { 20 });
            let tokens = 5 + random.below(if requests::exhaustive() { 23 } else { 3 });
            requests.push(request(&prompt(&mut random, length, VOCAB), tokens, kind, i as u64));
        }
        for i in (1..requests.len()).rev() {
            requests.swap(i, random.below(i + 1));
        }
        let stop_after: Vec<usize> = requests.iter().map(|_| 3 + random.below(30)).collect();
        // With 7 pages, a slot sometimes waits.
        let config = BatchConfig { pages: 7, ..config(4) };
        let accepted = same_as_alone(device, &models, config, &requests, &stop_after, |i| {
            i % 3 == 0 || requests::exhaustive()
        });
        assert!(accepted > 20, "{accepted} drafts accepted");
    });
}

#[test]
fn a_batch_of_the_demo_pair_answers_as_each_alone() {
    let pair = demo();
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let prompts = reference_prompts();
        // Trees as large as the batch config allows.
        let small_tree = |(spec, block, temperature): (SpecConfig, usize, f32)| {
            (if spec.tree_rows().is_some() { tree(20) } else { spec }, block, temperature)
        };
        let requests: Vec<Request> = (kinds().into_iter().take(4).enumerate())
            .map(|(i, kind)| request(&prompts[3 * i][..20 + 9 * i], 5, small_tree(kind), i as u64))
            .collect();
        let accepted = same_as_alone(
            device,
            &models,
            BatchConfig { tree: 20, ..config(3) },
            &requests,
            &[usize::MAX; 4],
            |i| i < 2 || requests::exhaustive(),
        );
        assert!(accepted > 3, "{accepted} drafts accepted");
    });
}

#[test]
fn tree_tokens_come_from_the_logits_of_ar_decoding_bit_for_bit() {
    let (filtered, demo) = (small(12), demo());
    on_gpu(|device| {
        let mut random = Random::new(8);
        let (short, text) = (prompt(&mut random, 40, 12), reference_prompts()[5][..50].to_vec());
        for (pair, prompt, tokens, cases) in [
            (&filtered, short, 16, &[(64, 16, 0.0), (5, 4, 0.8), (20, 16, 1.0)][..]),
            (&demo, text, 8, &[(64, 16, 0.7)]),
        ] {
            let models = Models::load(device, pair, POSITIONS).unwrap();
            for &(rows, block, temperature) in cases {
                let mut batch = Batch::new(device, &models, config(1)).unwrap();
                let request = request(&prompt, tokens, (tree(rows), block, temperature), 3);
                let report = check(&mut batch, &request, || Ok(AcceptAll)).unwrap().unwrap();
                assert_eq!((&report.identical, report.compared), (&Ok(()), tokens - 1), "{rows} {block}");
                assert!(report.rounds < tokens - 1 && report.rejected > 0, "{report:?}");
            }
        }
    });
}

// ---- distributions ----

/// The random draws of a request, and the smallest distance so far of a draw from a boundary of its outcomes,
/// as a fraction of the whole range.
struct Margins {
    draws: PhiloxStream,
    smallest: f64,
}

impl Margins {
    fn observe(&mut self, key: DrawKey, bounds: impl IntoIterator<Item = u64>, of: u64) {
        let at = ((u128::from(self.draws.bits(key)) * u128::from(of)) >> 64) as u64;
        let nearest = bounds.into_iter().map(|bound| at.abs_diff(bound)).min();
        self.smallest =
            nearest.map_or(self.smallest, |nearest| self.smallest.min(nearest as f64 / of as f64));
    }
}

impl RandomSource for Margins {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        self.observe(key, [s], n);
        self.draws.accept(key, s, n)
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let mut sum = 0;
        let bounds: Vec<u64> = weights.iter().map(|&(_, w)| (sum += w, sum).1).collect();
        self.observe(key, bounds[..bounds.len() - 1].iter().copied(), sum);
        self.draws.pick(key, weights)
    }
}

/// Repeats the rounds of an answer with chains on the CPU, in a minimal implementation. Returns each round's
/// smallest margin.
fn margins(target: &Target, drafter: &Drafter, request: &Request) -> Vec<f64> {
    let (own, vocab, taps) = (&request.sampling, target.config.vocab, &drafter.config.taps);
    let new_cache = |stack| Cache::new(stack, request.positions() + BLOCK).unwrap();
    let (mut cache, mut context) = (new_cache(&target.config.stack), new_cache(&drafter.config.stack));
    let (mut features, mut logits, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let normed = target.forward(&request.prompt, &mut cache, taps, &mut features, 1);
    target.logits(&normed, &mut logits);
    let mut anchor = own.choose(&logits, request.prompt.len() as u32).unwrap();
    let mut emitted = 1;
    while emitted < request.max_tokens {
        let at = cache.len();
        drafter.inject(&features, &mut context);
        let hidden = drafter.hidden(target, anchor, request.block, &mut context, |_, _| ());
        drafter.logits(target, &hidden[target.config.stack.hidden..], &mut logits);
        let distribution = |row: &[f32]| request.spec.draft_sampling().unwrap().probabilities(row).unwrap();
        let distributions: Vec<_> = logits.chunks(vocab).map(distribution).collect();
        let round = all.len() as u32 + 1;
        let draws = PhiloxStream { seed: own.seed, stream: own.stream, round, anchor: at as u32 };
        let mut source = Margins { draws, smallest: 1.0 };
        let drafts = sample_chain(&distributions, &mut source).unwrap();
        features.clear();
        let rows = [&[anchor], &drafts[..]].concat();
        let normed = target.forward(&rows, &mut cache, taps, &mut features, rows.len());
        target.logits(&normed, &mut logits);
        let distribution = |row: usize| own.probabilities(&logits[row * vocab..][..vocab]);
        let verified = match request.spec.method() {
            VerifyMethod::Rejection => rejection(&drafts, &distributions, distribution, &mut source),
            _ => block_verify(&drafts, &distributions, distribution, &mut source),
        };
        let (accepted, next) = verified.unwrap();
        cache.crop(at + accepted + 1);
        features.truncate(features.len() / rows.len() * (accepted + 1));
        (anchor, emitted) = (next, emitted + accepted + 1);
        all.push(source.smallest);
    }
    all
}

/// Because kernels round, a few random draws near a boundary have a different outcome. Draws far from a
/// boundary never do.
#[test]
fn devices_sample_and_verify_as_the_cpu_except_at_near_ties() {
    const TOKENS: usize = 8;
    let pair = demo();
    let (target, drafter) =
        (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(
            device,
            &models,
            BatchConfig { draft_probs: true, ..BatchConfig::new(4, 8, POSITIONS) },
        )
        .unwrap();
        let prompts = reference_prompts();
        let kinds =
            [VerifyMethod::Rejection, VerifyMethod::Block].map(|method| (sampled_chain(method, 0.7), 8, 1.0));
        // Top-k 4, so that most draws are far from a boundary.
        let filtered = |i: u64| {
            let mut one = request(&prompts[2 * i as usize][..50], TOKENS, kinds[i as usize % 2].clone(), i);
            (one.sampling.top_k, one.spec) = (4, requests::with_top_k(&one.spec, 4));
            one
        };
        let count = if requests::exhaustive() { 12 } else { 4 };
        let requests: Vec<Request> = (0..count).map(filtered).collect();
        let own = run_together(&mut batch, &requests, keep_going);
        let theirs = ops::on_threads(None, || {
            run_together(&mut Sequences::new(&target, Some(&drafter), 4, POSITIONS), &requests, keep_going)
        });
        let (mut same, mut rounds) = (0, 0);
        for (i, ((own, cpu), request)) in own.iter().zip(&theirs).zip(&requests).enumerate() {
            assert_eq!(own.tokens[0], cpu.tokens[0], "request {i}");
            let mut begin = 1;
            let parted = (0..cpu.accepted.len()).find(|&round| {
                let end = (begin + cpu.accepted[round]).min(TOKENS);
                let alike = own.accepted.get(round) == Some(&cpu.accepted[round]);
                let alike = alike && own.tokens[begin..end] == cpu.tokens[begin..end];
                begin = end;
                !alike
            });
            same += usize::from(parted.is_none());
            rounds += parted.unwrap_or(cpu.accepted.len());
            if let Some(round) = parted {
                let margin = margins(&target, &drafter, request)[round];
                println!(
                    "request {i} differs from round {round} on, where a draw is {margin} from a boundary"
                );
                assert!(margin < NEAR, "request {i}: round {round} differs at a margin of {margin}");
            }
        }
        println!("{same} of {} answers equal the CPU's; {rounds} equal rounds", requests.len());
        assert!(4 * same >= 3 * requests.len(), "{same}");
    });
}

/// The accepted path of a tree leaves its features for the drafter. If they were wrong, acceptance would be
/// lower than on the CPU.
#[test]
fn device_trees_accept_as_many_as_cpu_trees() {
    let pair = demo();
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch =
            Batch::new(device, &models, BatchConfig::new(4, BLOCK, POSITIONS).with_trees(20)).unwrap();
        let prompts = reference_prompts();
        let of = |i: usize| request(&prompts[9 * i][..40], 16, (tree(20), 16, 0.0), 1);
        let requests: Vec<Request> = (0..4).map(of).collect();
        let own = run_together(&mut batch, &requests, keep_going);
        let mut on_cpu = Sequences::new(&target, Some(&drafter), 4, POSITIONS);
        let theirs = ops::on_threads(None, || run_together(&mut on_cpu, &requests, keep_going));
        let same = own.iter().zip(&theirs).filter(|(a, b)| answer(a) == answer(b)).count();
        let all: Vec<_> = own.iter().zip(&theirs).map(|(a, b)| (&a.accepted, &b.accepted)).collect();
        println!("{same} of 4: {all:?}");
        assert!(same >= 3, "{all:?}");
    });
}

/// Checks the distribution of three tokens, of many answers of each of the two kinds that run in one batch.
fn check_first_tokens(rows: usize, kinds: [SpecConfig; 2]) {
    let pair = small(4);
    let target = Target::load(&pair.target).unwrap();
    let prompt = [1, 2, 3];
    on_gpu(|device| {
        let models = Models::load(device, &pair, 64).unwrap();
        let config = BatchConfig { draft_probs: true, ..BatchConfig::new(32, 4, 64).with_trees(rows) };
        let mut batch = Batch::new(device, &models, config).unwrap();
        for spec in &kinds {
            let one = |seed| Request { spec: spec.clone(), ..seeded(&prompt, 3, 4, 1.0, seed) };
            let requests: Vec<Request> = (0..700).map(one).collect();
            let outcomes = run_together(&mut batch, &requests, keep_going);
            let distribution = distribution::distribution(&target, &prompt, &requests[0].sampling, 3);
            distribution::check(spec, &distribution, outcomes.into_iter().map(|outcome| outcome.tokens));
        }
    });
}

/// Sampled trees and chains, in rounds with best-first trees, have the answers of the CPU, and so the target's
/// distribution; exhaustive: also by their counts.
#[test]
fn sampled_answers_on_devices_equal_the_cpus_round_by_round() {
    if requests::exhaustive() {
        let methods = [VerifyMethod::Rejection, VerifyMethod::Block];
        check_first_tokens(0, methods.map(|method| sampled_chain(method, 1.0)));
        check_first_tokens(9, methods.map(|method| sampled_tree(method, 9, 1.0)));
    }
    let (pair, prompt) = (small(4), [1, 2, 3]);
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    on_gpu(|device| {
        let models = Models::load(device, &pair, 64).unwrap();
        let config = BatchConfig { draft_probs: true, ..BatchConfig::new(16, 4, 64).with_trees(9) };
        let mut batch = Batch::new(device, &models, config).unwrap();
        let [siblings, chains] = [(VerifyMethod::Rejection, 7), (VerifyMethod::Block, 9)]
            .map(|(method, rows)| sampled_tree(method, rows, 1.0));
        let kinds = [
            siblings,
            tree(9),
            sampled_tree(VerifyMethod::Rejection, 9, 2.0),
            sampled_chain(VerifyMethod::Block, 1.0),
            chains,
            sampled_chain(VerifyMethod::Rejection, 1.0),
        ];
        let one = |i: u64| Request {
            spec: kinds[i as usize % 6].clone(),
            ..seeded(&prompt, 3 + i as usize % 7, 4, 1.0, i)
        };
        let count = if requests::exhaustive() { 200 } else { 48 };
        let requests: Vec<Request> = (0..count).map(one).collect();
        let own = run_together(&mut batch, &requests, keep_going);
        let mut on_cpu = Sequences::new(&target, Some(&drafter), 1, 64);
        let theirs =
            ops::on_threads(None, || requests.iter().map(|one| run(&mut on_cpu, one)).collect::<Vec<_>>());
        let same = own.iter().zip(&theirs).filter(|(a, b)| answer(a) == answer(b)).count();
        let accepted: usize = own.iter().flat_map(|own| &own.accepted).map(|emitted| emitted - 1).sum();
        println!("{same} of {count} answers equal the CPU's, {accepted} drafts accepted");
        // Because kernels round, a few draws near a boundary have a different outcome.
        assert!(10 * same >= 9 * requests.len() && 4 * accepted > 5 * requests.len(), "{same} {accepted}");
    });
}

// ---- ends ----

/// Checks the number of drafts of every round against the positions that are left.
fn check_draft_counts(request: &Request, outcome: &Outcome, end: usize, draft_end: usize) {
    let mut length = request.prompt.len();
    for (&drafted, &emitted) in outcome.drafted.iter().zip(&outcome.accepted) {
        let rows = request.block.min(draft_end.saturating_sub(length)).min(end - 1 - length).max(1);
        match request.spec.tree_rows() {
            None => assert_eq!(drafted, rows - 1, "at {length}: {request:?}"),
            Some(max) => {
                assert!((drafted > 0) == (rows > 1) && drafted < max, "{drafted} at {length}: {request:?}");
                assert!(emitted <= rows, "{emitted} of {rows} at {length}: {request:?}");
            }
        }
        length += emitted;
    }
}

/// Answers that end at the target's last position, in a batch. The drafter's last position is before, at or
/// after it.
#[test]
fn answers_and_drafts_reach_their_models_last_positions() {
    const VOCAB: usize = 6;
    let (target, drafter) = tiny();
    // Exactly a page of positions, and fewer.
    for (end, draft_end) in [(64, 52), (59, 59)] {
        let target = support::Target { vocab: VOCAB, max_positions: end, ..target.clone() };
        let drafter = support::Drafter { max_positions: draft_end, ..drafter.clone() };
        let pair = open(&support::write_pair(&target, &drafter));
        on_gpu(|device| {
            let models = Models::load(device, &pair, POSITIONS).unwrap();
            let mut batch = Batch::new(device, &models, config(3)).unwrap();
            let mut random = Random::new(end as u64);
            let near = draft_end.min(end - 8);
            let lengths =
                [near - 7, end - 9, near - 1, end - 5, near + 1, end - 3, end - 1, near - 4, end - 2];
            let mut requests = Vec::new();
            for (i, kind) in kinds().into_iter().enumerate() {
                // Each kind with one of the two ends; in exhaustive runs with both.
                if !requests::exhaustive() && (i % 2 == 0) != (end == 64) {
                    continue;
                }
                let length = lengths[i % lengths.len()];
                requests.push(request(&prompt(&mut random, length, VOCAB), 1000, kind, i as u64));
            }
            let all = run_together(&mut batch, &requests, keep_going);
            for (request, own) in requests.iter().zip(&all) {
                assert_eq!((own.finish, own.tokens.len()), (Finish::Context, end - request.prompt.len()));
                check_draft_counts(request, own, end, draft_end);
                // Every fourth one; exhaustive: all.
                let compared = requests::exhaustive() || request.sampling.seed / 2 % 4 == 0;
                if request.spec.method() == VerifyMethod::Match && compared {
                    assert_eq!(own.tokens, run(&mut batch, &autoregressive(request)).tokens, "{request:?}");
                }
            }
        });
    }
}

#[test]
fn answers_of_one_and_two_tokens() {
    let pair = small(12);
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(device, &models, config(3)).unwrap();
        // Every second kind; exhaustive: all.
        for kind in kinds().into_iter().step_by(if requests::exhaustive() { 1 } else { 2 }) {
            let of = |tokens| request(&[3, 1, 4, 1, 5], tokens, kind.clone(), 2);
            let all = run_together(&mut batch, &[1, 2, 3].map(of), keep_going);
            let [one, two, more] = &all[..] else { panic!("three answers") };
            assert_eq!((one.finish, one.accepted.len()), (Finish::Length, 0));
            assert_eq!((two.finish, two.accepted.len()), (Finish::Length, 1));
            assert_eq!(
                (&one.tokens[..], &two.tokens[..]),
                (&more.tokens[..1], &more.tokens[..2]),
                "{kind:?}"
            );
            // The first round does not depend on the token budget.
            assert_eq!((two.accepted[0], two.drafted[0]), (more.accepted[0], more.drafted[0]), "{kind:?}");
        }
    });
}

#[test]
fn a_stop_id_among_the_accepted_drafts_ends_the_answer() {
    let pair = small(6);
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    let mut on_cpu = Sequences::new(&target, Some(&drafter), 1, POSITIONS);
    on_gpu(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(device, &models, config(2)).unwrap();
        for kind in
            [tree(64), sampled_chain(VerifyMethod::Block, 1.0), sampled_chain(VerifyMethod::Rejection, 1.0)]
        {
            // An accepted draft, followed by another, whose token does not occur earlier in the answer.
            let inside = |own: &Outcome| {
                let mut begin = 1;
                own.accepted.iter().find_map(|&emitted| {
                    let new = |&at: &usize| at < 6 && !own.tokens[..at].contains(&own.tokens[at]);
                    let found = (begin..(begin + emitted).saturating_sub(2)).find(new);
                    begin += emitted;
                    found
                })
            };
            // The CPU's answers are mostly the same.
            let of = |seed| request(&[1, 2, 3, 4], 6, (kind.clone(), 16, 1.0), seed);
            let likely = (0..40).map(of).filter(|request| inside(&run(&mut on_cpu, request)).is_some());
            let found = likely.into_iter().find_map(|request| {
                let own = run(&mut batch, &request);
                inside(&own).map(|at| (request, own, at))
            });
            let (request, own, at) = found.expect("an accepted draft");
            let stop = Request { stop_ids: vec![4000, own.tokens[at]], ..request };
            let beside = self::request(&[5, 0, 1], 24, (tree(20), 16, 0.0), 1);
            let both = run_together(&mut batch, &[stop, beside], keep_going);
            assert_eq!((&both[0].tokens[..], both[0].finish), (&own.tokens[..=at], Finish::Stop), "{kind:?}");
            // The round is recorded in full.
            let rounds = both[0].accepted.len();
            assert_eq!(both[0].accepted, own.accepted[..rounds], "{kind:?}");
            assert_eq!(both[1].tokens.len(), 24);
        }
    });
}

#[test]
fn a_batch_refuses_requests_outside_its_config() {
    let (pair, device) = (small(12), TestGpu::new());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    let of = |block: usize, spec: &SpecConfig| request(&[1, 2, 3], 5, (spec.clone(), block, 1.0), 1);
    let chains = BatchConfig::new(1, 8, POSITIONS);
    let refused = |config: BatchConfig, request: Request| {
        let mut batch = Batch::new(&device, &models, config).unwrap();
        let error = batch.admit(0, &request, false).unwrap_err();
        assert_eq!(batch.free_pages(), config.pages);
        // It still serves other requests.
        run(&mut batch, &of(8, &SpecConfig::default()));
        (error.exit_code(), error.to_string())
    };
    let sentence = |block, tree, method| {
        format!(
            "the batch was not made for a request with blocks of {block} rows, trees of {tree}, verification by \
             {method} and full draft lengths"
        )
    };
    assert_eq!(refused(chains, of(9, &SpecConfig::default())), (1, sentence(9, 0, "match")));
    assert_eq!(refused(chains, of(8, &tree(2))), (1, sentence(8, 2, "match")));
    assert_eq!(refused(chains.with_trees(20), of(8, &tree(21))), (1, sentence(8, 21, "match")));
    let adaptive = requests::with_length(&SpecConfig::default(), DraftLengthPolicy::CostModel);
    let (code, error) = refused(chains, of(8, &adaptive));
    assert_eq!((code, error), (1, sentence(8, 0, "match").replace("full", "adaptive")));
    assert_eq!(
        refused(chains, of(8, &sampled_chain(VerifyMethod::Rejection, 1.0))),
        (1, sentence(8, 0, "rejection"))
    );
    assert_eq!(
        refused(chains.with_trees(20), of(8, &sampled_chain(VerifyMethod::Block, 1.0))),
        (1, sentence(8, 0, "block"))
    );
}

/// A sequence takes exactly the pages of its positions and of the rows of its tree.
#[test]
fn trees_take_exactly_their_pages() {
    const VOCAB: usize = 12;
    let (pair, device) = (small(VOCAB), TestGpu::new());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    let mut random = Random::new(1);
    // Prompt, answer and block are 64 positions: one page, and with a tree a second one.
    let prompt = prompt(&mut random, 46, VOCAB);
    let of = |spec: SpecConfig| request(&prompt, 10, (spec, 8, 1.0), 4);
    let alone = BatchConfig { pages: 1, ..BatchConfig::new(1, 8, 64) };
    let expected = run(&mut Batch::new(&device, &models, alone).unwrap(), &of(SpecConfig::default()));
    for (rows, pages) in [(2, 2), (64, 2)] {
        // Too few pages for two sequences, and enough; exhaustive: both for each tree.
        for available in [3, 4] {
            if !requests::exhaustive() && (rows == 2) != (available == 4) {
                continue;
            }
            let config = BatchConfig { pages: available, ..BatchConfig::new(3, 8, 64).with_trees(64) };
            let mut batch = Batch::new(&device, &models, config).unwrap();
            assert_eq!(batch.admit(0, &of(tree(rows)), false), Ok(Some(0)));
            assert_eq!(batch.free_pages(), config.pages - pages);
            // Admitted only if there are pages.
            let second = batch.admit(1, &of(tree(rows)), false).unwrap();
            assert_eq!(second.is_some(), config.pages >= 2 * pages);
            batch.release(0, 0).unwrap();
            if second.is_some() {
                batch.release(1, 0).unwrap();
            }
            // Requests that wait for pages get them.
            let requests = [of(tree(rows)), of(SpecConfig::default()), of(tree(rows))];
            for own in run_together(&mut batch, &requests, keep_going) {
                assert_eq!(own.tokens, expected.tokens);
            }
            assert_eq!(batch.free_pages(), config.pages);
        }
    }
    let config = BatchConfig { pages: 1, ..BatchConfig::new(1, 8, 64).with_trees(64) };
    let error = Batch::new(&device, &models, config).unwrap().admit(0, &of(tree(2)), false).unwrap_err();
    let sentence = "a sequence of 64 positions needs 2 pages of keys and values, but there are 1";
    assert_eq!((error.exit_code(), error.to_string().as_str()), (5, sentence));
}

// ---- launches ----

#[test]
fn a_round_adds_2_launches_for_trees_4_for_sampling_11_for_both() {
    let (pair, device) = (demo(), TestGpu::new());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    // As in tests/decoding/device.rs.
    let (ar, drafting) = (6 * 6 + 8, 6 * (6 + 3) + 13);
    for (trees, draft_probs) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = BatchConfig::new(2, BLOCK, POSITIONS).with_trees(if trees { TREE } else { 0 });
        let batch = Batch::new(&device, &models, BatchConfig { draft_probs, ..config }).unwrap();
        for (shape, graph) in batch.graphs() {
            let launches = graph.nodes.iter().filter(|node| matches!(node, Node::Launch(_))).count();
            assert_eq!(launches, graph.nodes.len(), "a round has no copies");
            let expected = match shape.drafter {
                DrafterMode::Draft => {
                    // choices and compact; tree_build replaces round_tokens.
                    let more = if trees { 2 } else { 0 };
                    // The drafter's and the target's distributions, sample, verify.
                    let for_sampling = if draft_probs && shape.sampled_drafts { 4 } else { 0 };
                    // Siblings have two kernels of their own (sample, verify), chains three.
                    drafting + more + for_sampling + if trees && for_sampling > 0 { 5 } else { 0 }
                }
                _ => ar,
            };
            assert_eq!(launches, expected, "{shape:?}, trees {trees}, draft_probs {draft_probs}");
            let rows = if shape.drafts() { config.max_verify_rows() } else { 1 };
            assert_eq!(shape.rows, rows, "{shape:?}");
        }
        assert_eq!(batch.graphs().len(), 2 * 5);
    }
}
