//! Rounds of trees and of every rule on devices: many kinds of requests in one batch against each of them alone, answers
//! against the target's distribution and the CPU's, ends, refusals, and what a round launches.

use crate::support;
use crate::support::crowd;
use crate::support::distribution;
use crate::support::kernel;

use crowd::{Event, Silent, go_on, held, open, run, seeded, tiny, together};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Decoder, Finish, Flow, Outcome, Request};
use dflash::engine::lossless::check;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, DrafterMode, Models};
use dflash::gpu::device::{Device, Node};
use dflash::gpu::emulator::Emulator;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::{
    DrawKey, PhiloxStream, RandomSource, SpecConfig, VerifyMethod, block, draw, rejection,
};
use kernel::{Random, every_device};

const POSITIONS: usize = 192;
const BLOCK: usize = 16;
const TREE: usize = 64;
/// How near a chance has to be to go the other way on a device.
const NEAR: f64 = 0.01;

/// Of everything.
fn room(sequences: usize) -> BatchConfig {
    BatchConfig { draft_probs: true, ..BatchConfig::new(sequences, BLOCK, POSITIONS).with_trees(TREE) }
}

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

/// A pair of so few tokens that a random drafter is often right.
fn small(vocab: usize) -> Pair {
    let (target, drafter) = tiny();
    open(&support::write_pair(&support::Target { vocab, ..target }, &drafter))
}

fn draws(rule: VerifyMethod, temperature: f32) -> SpecConfig {
    let sampling = SamplingParams { temperature, ..SpecConfig::default().sampling };
    SpecConfig { rule, sampling, tree: None }
}

fn tree(rows: usize) -> SpecConfig {
    SpecConfig { tree: Some(rows), ..SpecConfig::default() }
}

/// Of siblings that are drawn without replacement, or of several chains.
fn drawn_tree(rule: VerifyMethod, rows: usize, temperature: f32) -> SpecConfig {
    SpecConfig { tree: Some(rows), ..draws(rule, temperature) }
}

/// How drafts are made and judged, rows of a block, temperature.
fn kinds() -> Vec<(SpecConfig, usize, f32)> {
    let plain = SpecConfig::default;
    vec![
        (tree(64), 16, 0.0),
        (draws(VerifyMethod::Block, 1.0), 16, 1.0),
        (plain(), 1, 0.0),
        (draws(VerifyMethod::Rejection, 1.0), 16, 1.0),
        (tree(5), 3, 0.9),
        (plain(), 16, 0.0),
        (draws(VerifyMethod::Match, 1.0), 9, 1.0),
        (tree(20), 16, 1.2),
        (draws(VerifyMethod::Rejection, 0.0), 7, 0.7),
        (plain(), 1, 1.0),
        (draws(VerifyMethod::Block, 0.5), 5, 1.3),
        (tree(64), 6, 1.0),
        (plain(), 4, 0.8),
        (draws(VerifyMethod::Match, 0.5), 16, 0.0),
        (draws(VerifyMethod::Rejection, 2.0), 16, 0.0),
        (draws(VerifyMethod::Block, 2.0), 2, 0.6),
        (draws(VerifyMethod::Block, 1.0), 1, 1.0),
        (drawn_tree(VerifyMethod::Rejection, 40, 1.0), 16, 1.0),
        (drawn_tree(VerifyMethod::Rejection, 7, 0.5), 6, 0.9),
        (drawn_tree(VerifyMethod::Block, 64, 1.0), 16, 1.1),
        (drawn_tree(VerifyMethod::Block, 9, 1.0), 3, 1.0),
    ]
}

fn request(
    prompt: &[u32],
    tokens: usize,
    (how, block, temperature): (SpecConfig, usize, f32),
    seed: u64,
) -> Request {
    let mut request = seeded(prompt, tokens, block, temperature, seed);
    request.sampling.stream = seed as u32 % 5;
    Request { drafting: how, ..request }
}

fn answer(outcome: &Outcome) -> (&[u32], Finish, &[usize], &[usize]) {
    (&outcome.tokens, outcome.finish, &outcome.accepted, &outcome.drafted)
}

/// The plain answer to the same request.
fn plainly(request: &Request) -> Request {
    Request { block: 1, drafting: SpecConfig::default(), ..request.clone() }
}

fn prompt(random: &mut Random, length: usize, vocab: usize) -> Vec<u32> {
    (0..length).map(|_| random.below(vocab) as u32).collect()
}

// ---- many together ----

/// Runs the requests together, request `i` for `leaves[i]` tokens at most, and each alone: same tokens, same rounds; and
/// under the rule `match` the tokens of autoregressive decoding. Returns the drafts that stood.
fn same_as_alone(
    device: &dyn Device,
    models: &Models,
    room: BatchConfig,
    requests: &[Request],
    leaves: &[usize],
) -> usize {
    let until = |i: usize, event| match event {
        Event::Token(n) if n == leaves[i] => Ok(Flow::Stop),
        _ => Ok(Flow::Continue),
    };
    let mut batch = Batch::new(device, models, room).unwrap();
    let all = together(&mut batch, requests, until);
    assert_eq!(batch.free_pages(), room.pages, "all pages are back");
    // The same room, so that a lone sequence's tables have the same strides; and another slot now and then.
    let mut solo = Batch::new(device, models, room).unwrap();
    let mut alone = |i: usize, request: &Request| {
        together(&mut solo, std::slice::from_ref(request), |_, event| until(i, event)).remove(0)
    };
    for (i, (request, own)) in requests.iter().zip(&all).enumerate() {
        let what = (&request.drafting, request.block, request.sampling.temperature);
        assert_eq!(answer(own), answer(&alone(i, request)), "request {i}: {what:?}");
        if request.drafting.rule == VerifyMethod::Match || request.block == 1 {
            assert_eq!(own.tokens, alone(i, &plainly(request)).tokens, "request {i}: {what:?}");
        }
        let most = request.drafting.tree.unwrap_or(request.block) - 1;
        assert!(own.drafted.iter().all(|&drafted| drafted <= most), "request {i}: {:?}", own.drafted);
        assert!(own.drafted.iter().zip(&own.accepted).all(|(d, judged)| judged - 1 <= *d), "request {i}");
    }
    all.iter().flat_map(|own| &own.accepted).map(|judged| judged - 1).sum()
}

#[test]
fn a_batch_of_all_kinds_answers_as_each_does_alone() {
    const VOCAB: usize = 12;
    let pair = small(VOCAB);
    every_device(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut random = Random::new(5);
        let mut requests = Vec::new();
        for (i, kind) in kinds().into_iter().enumerate() {
            let length = 1 + random.below(70);
            let tokens = 8 + random.below(20);
            requests.push(request(&prompt(&mut random, length, VOCAB), tokens, kind, i as u64));
        }
        for i in (1..requests.len()).rev() {
            requests.swap(i, random.below(i + 1));
        }
        let leaves: Vec<usize> = requests.iter().map(|_| 3 + random.below(40)).collect();
        // Now and then a slot waits for pages.
        let room = BatchConfig { pages: 10, ..room(6) };
        let stood = same_as_alone(device, &models, room, &requests, &leaves);
        assert!(stood > 40, "{stood} drafts stood");
    });
}

#[test]
fn a_batch_of_the_demo_pair_answers_as_each_does_alone() {
    let pair = demo();
    every_device(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let prompts = held();
        // As wide as the room is.
        let narrow = |(how, block, temperature): (SpecConfig, usize, f32)| {
            (SpecConfig { tree: how.tree.map(|rows| rows.min(20)), ..how }, block, temperature)
        };
        let requests: Vec<Request> = (kinds().into_iter().take(5).enumerate())
            .map(|(i, kind)| request(&prompts[3 * i][..20 + 9 * i], 7, narrow(kind), i as u64))
            .collect();
        let stood =
            same_as_alone(device, &models, BatchConfig { tree: 20, ..room(3) }, &requests, &[usize::MAX; 5]);
        assert!(stood > 8, "{stood} drafts stood");
    });
}

#[test]
fn tokens_of_trees_come_of_the_logits_of_plain_decoding_bit_for_bit() {
    let (few, demo) = (small(12), demo());
    every_device(|device| {
        let mut random = Random::new(8);
        let (short, text) = (prompt(&mut random, 40, 12), held()[5][..50].to_vec());
        for (pair, prompt, tokens, cases) in [
            (&few, short, 24, &[(64, 16, 0.0), (5, 4, 0.8), (20, 16, 1.0)][..]),
            (&demo, text, 10, &[(64, 16, 0.7)]),
        ] {
            let models = Models::load(device, pair, POSITIONS).unwrap();
            for &(rows, block, temperature) in cases {
                let mut batch = Batch::new(device, &models, room(1)).unwrap();
                let request = request(&prompt, tokens, (tree(rows), block, temperature), 3);
                let report = check(&mut batch, &request, || Ok(Silent)).unwrap().unwrap();
                assert_eq!((&report.identical, report.compared), (&Ok(()), tokens - 1), "{rows} {block}");
                assert!(report.rounds < tokens - 1 && report.rejected > 0, "{report:?}");
            }
        }
    });
}

// ---- distributions ----

/// That of three tokens, of many answers in the rounds of one room.
fn the_first_tokens_have_the_targets_law(rows: usize, kinds: [SpecConfig; 2]) {
    const RUNS: u64 = 700;
    let pair = small(4);
    let target = Target::load(&pair.target).unwrap();
    let prompt = [1, 2, 3];
    every_device(|device| {
        let models = Models::load(device, &pair, 64).unwrap();
        let room = BatchConfig { draft_probs: true, ..BatchConfig::new(32, 4, 64).with_trees(rows) };
        let mut batch = Batch::new(device, &models, room).unwrap();
        for how in &kinds {
            let one = |seed| Request { drafting: how.clone(), ..seeded(&prompt, 3, 4, 1.0, seed) };
            let requests: Vec<Request> = (0..RUNS).map(one).collect();
            let outcomes = together(&mut batch, &requests, go_on);
            let distribution = distribution::distribution(&target, &prompt, &requests[0].sampling, 3);
            distribution::check(how, &distribution, outcomes.into_iter().map(|outcome| outcome.tokens));
        }
    });
}

#[test]
fn the_first_tokens_of_chains_have_the_targets_law() {
    the_first_tokens_have_the_targets_law(
        0,
        [VerifyMethod::Rejection, VerifyMethod::Block].map(|rule| draws(rule, 1.0)),
    );
}

#[test]
fn the_first_tokens_of_trees_have_the_targets_law() {
    the_first_tokens_have_the_targets_law(
        9,
        [VerifyMethod::Rejection, VerifyMethod::Block].map(|rule| drawn_tree(rule, 9, 1.0)),
    );
}

/// Chances of a request, and the least distance of any so far from where it would have gone the other way.
struct Margins {
    dice: PhiloxStream,
    least: f64,
}

impl Margins {
    fn see(&mut self, word: DrawKey, bounds: impl IntoIterator<Item = u64>, of: u64) {
        let at = ((u128::from(self.dice.bits(word)) * u128::from(of)) >> 64) as u64;
        let nearest = bounds.into_iter().map(|bound| at.abs_diff(bound)).min();
        self.least = nearest.map_or(self.least, |nearest| self.least.min(nearest as f64 / of as f64));
    }
}

impl RandomSource for Margins {
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool {
        self.see(word, [s], n);
        self.dice.accept(word, s, n)
    }

    fn pick(&mut self, word: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let mut sum = 0;
        let bounds: Vec<u64> = weights.iter().map(|&(_, w)| (sum += w, sum).1).collect();
        self.see(word, bounds[..bounds.len() - 1].iter().copied(), sum);
        self.dice.pick(word, weights)
    }
}

/// The rounds of a chain's answer once more on the CPU, as short as they can be: the least margin of each.
fn margins(target: &Target, drafter: &Drafter, request: &Request) -> Vec<f64> {
    let (own, vocab, taps) = (&request.sampling, target.config.vocab, &drafter.config.taps);
    let room = |stack| Cache::new(stack, request.positions() + BLOCK).unwrap();
    let (mut cache, mut context) = (room(&target.config.stack), room(&drafter.config.stack));
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
        let distribution = |row: &[f32]| request.drafting.sampling.probabilities(row).unwrap();
        let distributions: Vec<_> = logits.chunks(vocab).map(distribution).collect();
        let round = all.len() as u32 + 1;
        let dice = PhiloxStream { seed: own.seed, stream: own.stream, round, anchor: at as u32 };
        let mut coin = Margins { dice, least: 1.0 };
        let drafts = draw(&distributions, &mut coin).unwrap();
        features.clear();
        let rows = [&[anchor], &drafts[..]].concat();
        let normed = target.forward(&rows, &mut cache, taps, &mut features, rows.len());
        target.logits(&normed, &mut logits);
        let distribution = |row: usize| own.probabilities(&logits[row * vocab..][..vocab]);
        let judged = match request.drafting.rule {
            VerifyMethod::Rejection => rejection(&drafts, &distributions, distribution, &mut coin),
            _ => block(&drafts, &distributions, distribution, &mut coin),
        };
        let (accepted, next) = judged.unwrap();
        cache.crop(at + accepted + 1);
        features.truncate(features.len() / rows.len() * (accepted + 1));
        (anchor, emitted) = (next, emitted + accepted + 1);
        all.push(coin.least);
    }
    all
}

/// Kernels round, so that a chance now and then goes the other way; never one that was far from it.
#[test]
fn devices_draw_and_judge_as_the_cpu_does_but_for_near_ties() {
    const TOKENS: usize = 12;
    let pair = demo();
    let (target, drafter) =
        (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter.as_ref().unwrap()).unwrap());
    every_device(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(
            device,
            &models,
            BatchConfig { draft_probs: true, ..BatchConfig::new(4, 8, POSITIONS) },
        )
        .unwrap();
        let prompts = held();
        let kinds = [VerifyMethod::Rejection, VerifyMethod::Block].map(|rule| (draws(rule, 0.7), 8, 1.0));
        // So few survivors that a chance has room on both sides.
        let few = |i: u64| {
            let mut one = request(&prompts[2 * i as usize][..50], TOKENS, kinds[i as usize % 2].clone(), i);
            (one.sampling.top_k, one.drafting.sampling.top_k) = (4, 4);
            one
        };
        let requests: Vec<Request> = (0..12).map(few).collect();
        let own = together(&mut batch, &requests, go_on);
        let theirs = ops::install(|| {
            together(&mut Sequences::new(&target, Some(&drafter), 4, POSITIONS), &requests, go_on)
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
                println!("request {i} parts in round {round}, where a chance is {margin} from the other way");
                assert!(margin < NEAR, "request {i}: round {round} differs at a margin of {margin}");
            }
        }
        println!("{same} of {} answers are the CPU's, after {rounds} equal rounds", requests.len());
        assert!(same >= 9, "{same}");
    });
}

/// A tree's path leaves the drafter its features: where it drafts as well as on the CPU, it has them.
#[test]
fn trees_on_devices_accept_what_the_cpus_do() {
    let pair = demo();
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter.as_ref().unwrap()).unwrap();
    every_device(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch =
            Batch::new(device, &models, BatchConfig::new(4, BLOCK, POSITIONS).with_trees(20)).unwrap();
        let prompts = held();
        let of = |i: usize| request(&prompts[9 * i][..60], 20, (tree(20), 16, 0.0), 1);
        let requests: Vec<Request> = (0..4).map(of).collect();
        let own = together(&mut batch, &requests, go_on);
        let mut on_cpu = Sequences::new(&target, Some(&drafter), 4, POSITIONS);
        let theirs = ops::install(|| together(&mut on_cpu, &requests, go_on));
        let same = own.iter().zip(&theirs).filter(|(a, b)| answer(a) == answer(b)).count();
        let all: Vec<_> = own.iter().zip(&theirs).map(|(a, b)| (&a.accepted, &b.accepted)).collect();
        println!("{same} of 4: {all:?}");
        assert!(same >= 3, "{all:?}");
    });
}

/// Rivals that are drawn, in rounds with chains that are drawn and with trees that are not.
#[test]
fn drawn_trees_on_devices_are_the_cpus_round_by_round() {
    let (pair, prompt) = (small(4), [1, 2, 3]);
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter.as_ref().unwrap()).unwrap();
    every_device(|device| {
        let models = Models::load(device, &pair, 64).unwrap();
        let room = BatchConfig { draft_probs: true, ..BatchConfig::new(16, 4, 64).with_trees(9) };
        let mut batch = Batch::new(device, &models, room).unwrap();
        let [siblings, chains] = [(VerifyMethod::Rejection, 7), (VerifyMethod::Block, 9)]
            .map(|(rule, rows)| drawn_tree(rule, rows, 1.0));
        let kinds = [
            siblings,
            tree(9),
            drawn_tree(VerifyMethod::Rejection, 9, 2.0),
            draws(VerifyMethod::Block, 1.0),
            chains,
        ];
        let one = |i: u64| Request {
            drafting: kinds[i as usize % 5].clone(),
            ..seeded(&prompt, 3 + i as usize % 7, 4, 1.0, i)
        };
        let requests: Vec<Request> = (0..200).map(one).collect();
        let own = together(&mut batch, &requests, go_on);
        let mut on_cpu = Sequences::new(&target, Some(&drafter), 1, 64);
        let theirs = ops::install(|| requests.iter().map(|one| run(&mut on_cpu, one)).collect::<Vec<_>>());
        let same = own.iter().zip(&theirs).filter(|(a, b)| answer(a) == answer(b)).count();
        let stood: usize = own.iter().flat_map(|own| &own.accepted).map(|judged| judged - 1).sum();
        println!("{same} of 200 answers are the CPU's, {stood} drafts stood");
        // Kernels round, so that a chance now and then goes the other way.
        assert!(same >= 188 && stood > 250, "{same} {stood}");
    });
}

// ---- ends ----

/// The drafts of every round of an answer, from what there is room for.
fn drafted_by_the_rules(request: &Request, outcome: &Outcome, end: usize, draft_end: usize) {
    let mut length = request.prompt.len();
    for (&drafted, &judged) in outcome.drafted.iter().zip(&outcome.accepted) {
        let rows = request.block.min(draft_end.saturating_sub(length)).min(end - 1 - length).max(1);
        match request.drafting.tree {
            None => assert_eq!(drafted, rows - 1, "at {length}: {request:?}"),
            Some(most) => {
                assert!((drafted > 0) == (rows > 1) && drafted < most, "{drafted} at {length}: {request:?}");
                assert!(judged <= rows, "{judged} of {rows} at {length}: {request:?}");
            }
        }
        length += judged;
    }
}

/// Answers that end with the target's last position, some of them beside others; the drafter's last one before, at and
/// behind it.
#[test]
fn answers_go_on_to_the_last_position_and_drafts_to_the_drafters_last() {
    const VOCAB: usize = 6;
    let (target, drafter) = tiny();
    // A page of positions, and fewer.
    for (end, draft_end) in [(64, 40), (59, 59)] {
        let target = support::Target { vocab: VOCAB, max_positions: end, ..target.clone() };
        let drafter = support::Drafter { max_positions: draft_end, ..drafter.clone() };
        let pair = open(&support::write_pair(&target, &drafter));
        every_device(|device| {
            let models = Models::load(device, &pair, POSITIONS).unwrap();
            let mut batch = Batch::new(device, &models, room(3)).unwrap();
            let mut random = Random::new(end as u64);
            let lengths = [33, end - 9, 39, end - 5, 41, end - 3, end - 1, 36, end - 2];
            let mut requests = Vec::new();
            for (i, kind) in kinds().into_iter().enumerate() {
                let length = lengths[i % lengths.len()];
                requests.push(request(&prompt(&mut random, length, VOCAB), 1000, kind, i as u64));
            }
            let all = together(&mut batch, &requests, go_on);
            for (request, own) in requests.iter().zip(&all) {
                assert_eq!((own.finish, own.tokens.len()), (Finish::Context, end - request.prompt.len()));
                drafted_by_the_rules(request, own, end, draft_end);
                if request.drafting.rule == VerifyMethod::Match {
                    assert_eq!(own.tokens, run(&mut batch, &plainly(request)).tokens, "{request:?}");
                }
            }
        });
    }
}

#[test]
fn answers_of_one_and_two_tokens() {
    let pair = small(12);
    every_device(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(device, &models, room(3)).unwrap();
        for kind in kinds() {
            let of = |tokens| request(&[3, 1, 4, 1, 5], tokens, kind.clone(), 2);
            let [one, two, more] = [1, 2, 9].map(|tokens| run(&mut batch, &of(tokens)));
            assert_eq!((one.finish, one.accepted.len()), (Finish::Length, 0));
            assert_eq!((two.finish, two.accepted.len()), (Finish::Length, 1));
            assert_eq!(
                (&one.tokens[..], &two.tokens[..]),
                (&more.tokens[..1], &more.tokens[..2]),
                "{kind:?}"
            );
            // What was judged says nothing of the budget.
            assert_eq!((two.accepted[0], two.drafted[0]), (more.accepted[0], more.drafted[0]), "{kind:?}");
        }
    });
}

#[test]
fn a_stop_id_in_the_middle_of_what_stood_is_the_answers_last_token() {
    let pair = small(6);
    every_device(|device| {
        let models = Models::load(device, &pair, POSITIONS).unwrap();
        let mut batch = Batch::new(device, &models, room(2)).unwrap();
        for kind in [tree(64), draws(VerifyMethod::Block, 1.0), draws(VerifyMethod::Rejection, 1.0)] {
            // A draft that stood, another one behind it, that is no token of the answer before.
            let inside = |own: &Outcome| {
                let mut begin = 1;
                own.accepted.iter().find_map(|&judged| {
                    let new = |&at: &usize| at < 6 && !own.tokens[..at].contains(&own.tokens[at]);
                    let found = (begin..(begin + judged).saturating_sub(2)).find(new);
                    begin += judged;
                    found
                })
            };
            let found = (0..40).find_map(|seed| {
                let request = request(&[1, 2, 3, 4], 6, (kind.clone(), 16, 1.0), seed);
                let own = run(&mut batch, &request);
                inside(&own).map(|at| (request, own, at))
            });
            let (request, own, at) = found.expect("a draft that stood");
            let stop = Request { stop_ids: vec![4000, own.tokens[at]], ..request };
            let beside = self::request(&[5, 0, 1], 24, (tree(20), 16, 0.0), 1);
            let both = together(&mut batch, &[stop, beside], go_on);
            assert_eq!((&both[0].tokens[..], both[0].finish), (&own.tokens[..=at], Finish::Stop), "{kind:?}");
            // The round counts whole.
            let rounds = both[0].accepted.len();
            assert_eq!(both[0].accepted, own.accepted[..rounds], "{kind:?}");
            assert_eq!(both[1].tokens.len(), 24);
        }
    });
}

#[test]
fn rooms_refuse_what_they_were_not_made_for() {
    let (pair, device) = (small(12), Emulator::new());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    let of = |block: usize, how: &SpecConfig| request(&[1, 2, 3], 5, (how.clone(), block, 1.0), 1);
    let chains = BatchConfig::new(1, 8, POSITIONS);
    let refused = |room: BatchConfig, request: Request| {
        let mut batch = Batch::new(&device, &models, room).unwrap();
        let error = batch.join(0, &request, false).unwrap_err();
        assert_eq!(batch.free_pages(), room.pages);
        // It is of use to others.
        run(&mut batch, &of(8, &SpecConfig::default()));
        (error.exit_code(), error.to_string())
    };
    let sentence = |block, tree, rule| {
        format!(
            "a request of blocks of {block}, trees of {tree} and the rule {rule} in rounds that were not made for it"
        )
    };
    assert_eq!(refused(chains, of(9, &SpecConfig::default())), (1, sentence(9, 0, "match")));
    assert_eq!(refused(chains, of(8, &tree(2))), (1, sentence(8, 2, "match")));
    assert_eq!(refused(chains.with_trees(20), of(8, &tree(21))), (1, sentence(8, 21, "match")));
    assert_eq!(
        refused(chains, of(8, &draws(VerifyMethod::Rejection, 1.0))),
        (1, sentence(8, 0, "rejection"))
    );
    assert_eq!(
        refused(chains.with_trees(20), of(8, &draws(VerifyMethod::Block, 1.0))),
        (1, sentence(8, 0, "block"))
    );
}

/// A sequence has the pages of its positions and of the rows of its tree, no more and no less.
#[test]
fn trees_take_their_pages_and_no_others() {
    const VOCAB: usize = 12;
    let (pair, device) = (small(VOCAB), Emulator::new());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    let mut random = Random::new(1);
    // Prompt, answer and block are 64 positions: a page, and with a tree another one.
    let prompt = prompt(&mut random, 30, VOCAB);
    let of = |how: SpecConfig| request(&prompt, 26, (how, 8, 1.0), 4);
    let alone = BatchConfig { pages: 1, ..BatchConfig::new(1, 8, 64) };
    let expected = run(&mut Batch::new(&device, &models, alone).unwrap(), &of(SpecConfig::default()));
    for (rows, pages) in [(2, 2), (64, 2)] {
        for room in [3, 4] {
            let room = BatchConfig { pages: room, ..BatchConfig::new(3, 8, 64).with_trees(64) };
            let mut batch = Batch::new(&device, &models, room).unwrap();
            assert_eq!(batch.join(0, &of(tree(rows)), false), Ok(Some(0)));
            assert_eq!(batch.free_pages(), room.pages - pages);
            // As long as there are pages.
            let second = batch.join(1, &of(tree(rows)), false).unwrap();
            assert_eq!(second.is_some(), room.pages >= 2 * pages);
            batch.leave(0, 0).unwrap();
            if second.is_some() {
                batch.leave(1, 0).unwrap();
            }
            // Who waits for pages gets them.
            let requests = [of(tree(rows)), of(SpecConfig::default()), of(tree(rows)), of(tree(rows))];
            for own in together(&mut batch, &requests, go_on) {
                assert_eq!(own.tokens, expected.tokens);
            }
            assert_eq!(batch.free_pages(), room.pages);
        }
    }
    let room = BatchConfig { pages: 1, ..BatchConfig::new(1, 8, 64).with_trees(64) };
    let error = Batch::new(&device, &models, room).unwrap().join(0, &of(tree(2)), false).unwrap_err();
    let sentence = "a sequence of 64 positions needs 2 pages of keys and values, but there are 1";
    assert_eq!((error.exit_code(), error.to_string().as_str()), (5, sentence));
}

// ---- launches ----

#[test]
fn trees_cost_two_launches_a_round_rules_four_and_both_eleven() {
    let (pair, device) = (demo(), Emulator::new());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    // As tests/device.rs counts them.
    let (plain, drafting) = (5 * 6 + 8, 5 * (6 + 3) + 13);
    for (trees, rules) in [(false, false), (true, false), (false, true), (true, true)] {
        let room = BatchConfig::new(2, BLOCK, POSITIONS).with_trees(if trees { TREE } else { 0 });
        let batch = Batch::new(&device, &models, BatchConfig { draft_probs: rules, ..room }).unwrap();
        for (shape, graph) in batch.graphs() {
            let launches = graph.nodes.iter().filter(|node| matches!(node, Node::Launch(_))).count();
            assert_eq!(launches, graph.nodes.len(), "a round copies nothing");
            let expected = match shape.drafter {
                DrafterMode::Draft => {
                    // choices and compact; tree_build comes in round_tokens' place.
                    let more = if trees { 2 } else { 0 };
                    // The drafter's distribution and the target's, draw and judge.
                    let of_rules = if rules && shape.sampled_drafts { 4 } else { 0 };
                    // Siblings and chains are drawn and judged by kernels of their own, two and three.
                    drafting + more + of_rules + if trees && of_rules > 0 { 5 } else { 0 }
                }
                _ => plain,
            };
            assert_eq!(launches, expected, "{shape:?}, trees {trees}, rules {rules}");
            let rows = if shape.drafts() { room.max_verify_rows() } else { 1 };
            assert_eq!(shape.rows, rows, "{shape:?}");
        }
        assert_eq!(batch.graphs().len(), 2 * 5);
    }
}
