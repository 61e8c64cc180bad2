//! `--adaptive`: what controllers say is what rounds draft, on the CPU and on devices, and none of it changes what is
//! emitted under the rule `match`, nor the distribution of what other rules emit.

use crate::support;
use crate::support::crowd;
use crate::support::distribution;
use crate::support::program;
use crate::support::random;

use crowd::{Silent, go_on, held, open, request, seeded, tiny, together};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::cpu::decoder::{Sequence, Sequences};
use dflash::cpu::model::{Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Decoder, Outcome, Request, generate};
use dflash::engine::lossless;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models as OnDevice};
use dflash::gpu::emulator::Emulator;
use dflash::spec::draft_length::{Controller, Costs, DraftLengthPolicy, Fixed};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::{SpecConfig, VerifyMethod};
use random::Random;
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

fn costs(draft: f64, verify: impl Fn(usize) -> f64) -> Costs {
    Costs { draft, verify: (1..=64).map(verify).collect() }
}

/// The path of a chain whose first `accepted` drafts stood.
fn chain_of(accepted: usize) -> u64 {
    u64::MAX >> (63 - accepted)
}

// ---- on the CPU ----

struct Models(Target, Drafter);

fn load(pair: Pair) -> Models {
    Models(Target::load(&pair.target).unwrap(), Drafter::load(&pair.drafter.unwrap()).unwrap())
}

/// `vocab` of few tokens: random drafts are often right; of many: never.
fn drawn(vocab: usize) -> Models {
    let (target, drafter) = support::small();
    let written = support::write_pair(&support::Target { vocab, ..target }, &drafter);
    load(Pair::open(support::disk(&written.target), Some(support::disk(&written.drafter))).unwrap())
}

fn alone(decoder: &mut dyn Decoder, request: &Request) -> Outcome {
    generate(decoder, request, &mut Silent).unwrap()
}

fn run(models: &Models, tree: Option<usize>, goal: &DraftLengthPolicy, request: &Request) -> Outcome {
    let sequences = Sequences::new(&models.0, Some(&models.1), 1, usize::MAX);
    let request = Request { drafting: SpecConfig { tree, ..Default::default() }, ..request.clone() };
    ops::install(|| generate(&mut sequences.adaptive(goal), &request, &mut Silent)).unwrap()
}

#[test]
fn no_goal_changes_what_is_emitted() {
    let (demo, few, many) = (load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()), drawn(4), drawn(90));
    let cheap = DraftLengthPolicy::CostModel(costs(0.1, |_| 1.0));
    let dear = DraftLengthPolicy::CostModel(costs(0.1, |rows| 0.5 + 0.5 * rows as f64));
    let stairs = DraftLengthPolicy::CostModel(costs(0.3, |rows| rows.div_ceil(5) as f64));
    let often = DraftLengthPolicy::Threshold(0.4);
    let prompts = held();
    let (mut cut, mut plain_steps) = (0, 0);
    for (models, prompt, tokens) in
        [(&demo, &prompts[3][..], 90), (&few, &[1, 3, 2], 200), (&many, &[5, 6], 200)]
    {
        for temperature in [0.0, 0.8] {
            let request = seeded(prompt, tokens, models.1.config.block, temperature, 3);
            let plain = run(models, None, &DraftLengthPolicy::Full, &Request { block: 1, ..request.clone() });
            for tree in [None, Some(30)] {
                let whole = run(models, tree, &DraftLengthPolicy::Full, &request);
                for goal in [&cheap, &dear, &stairs, &often] {
                    let got = run(models, tree, goal, &request);
                    assert_eq!((&got.tokens, got.finish), (&plain.tokens, plain.finish));
                    // And the same rounds again: no clock has a say.
                    assert_eq!(got.drafted, run(models, tree, goal, &request).drafted);
                    let all: usize = got.drafted.iter().sum();
                    cut += usize::from(all < whole.drafted.iter().sum());
                    plain_steps += got.drafted.iter().filter(|drafts| **drafts == 0).count();
                }
            }
        }
    }
    println!("{cut} {plain_steps}");
    assert!(cut > 30 && plain_steps > 500, "{cut} of 48 runs drafted less, {plain_steps} AR steps");
}

/// Of a chain and of a tree exactly the paths that the drafter gives that probability, whatever came of earlier ones.
#[test]
fn a_threshold_cuts_chains_and_trees_at_paths_below_it() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    for least in [0.02, 0.3, 0.99, 1.0] {
        let (goal, mut sizes) = (DraftLengthPolicy::Threshold(least), vec![]);
        for tree in [None, Some(64), Some(6)] {
            let mut sequence = Sequence::new(&models.0, Some(&models.1)).adaptive(&goal);
            let drafting = SpecConfig { tree, ..Default::default() };
            let asked = Request { drafting, ..request(&held()[4], 120, 16, 0.0) };
            sequence.start(&asked).unwrap();
            while sequence.prefill().unwrap().next.is_none() {}
            let mut out = vec![];
            while out.len() < 60 {
                let grown = sequence.draft_tree(16, tree.unwrap_or(64)).unwrap();
                let likely = |row: &usize| (f64::from(grown.costs[*row]) / -65536.0).exp2() >= least;
                let expected = match tree {
                    Some(_) => (1..grown.rows()).filter(likely).count(),
                    // The first child of a row is its best one.
                    None => {
                        let child = |row: usize| {
                            (row + 1..grown.rows()).find(|child| grown.parents[*child] as usize == row)
                        };
                        std::iter::successors(child(0), |row| child(*row)).filter(likely).count()
                    }
                };
                assert_eq!(sequence.round(&mut out).unwrap(), expected, "{tree:?} at least {least}");
                sizes.push(expected);
            }
        }
        // Rounds that verified nothing are followed by others that do.
        println!("at least {least}: {sizes:?}");
        let again = sizes.windows(2).any(|pair| pair[0] == 0 && pair[1] > 0);
        assert!(least != 0.99 || again, "{sizes:?}");
    }
}

#[test]
fn a_drafter_that_is_never_right_is_left_alone_for_the_most_part() {
    let models = drawn(1000);
    let cheap = costs(0.3, |rows| 1.0 + 0.02 * rows as f64);
    for tree in [None, Some(16)] {
        let got = run(
            &models,
            tree,
            &DraftLengthPolicy::CostModel(cheap.clone()),
            &seeded(&[7, 8, 9], 240, 8, 1.0, 2),
        );
        let steps: Vec<f64> =
            got.drafted.iter().map(|d| if *d > 0 { cheap.round(*d) } else { 1.02 }).collect();
        let (drafted, each) =
            (steps.iter().filter(|s| **s > 1.02).count(), steps.iter().sum::<f64>() / 240.0);
        assert!((5..30).contains(&drafted) && each < 1.1, "{drafted} rounds drafted, {each} a token");
    }
}

/// After AR steps the drafter's context has no holes: it drafts what it would have, had it drafted all along.
#[test]
fn a_drafter_that_was_left_alone_catches_up() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let prompt = &held()[4];
    let begin = || {
        let mut sequence = Sequence::new(&models.0, Some(&models.1));
        sequence.start(&seeded(prompt, 120, 16, 0.0, 0)).unwrap();
        while sequence.prefill().unwrap().next.is_none() {}
        sequence
    };
    let (mut idle, mut busy) = (begin(), begin());
    let (mut plainly, mut drafted) = (vec![], vec![]);
    while drafted.len() < 80 {
        busy.round(&mut drafted).unwrap();
    }
    while plainly.len() < drafted.len() {
        idle.draft(1).unwrap();
        idle.verify(&[], &mut plainly).unwrap();
    }
    assert_eq!(plainly, drafted);
    assert_eq!(idle.lengths(), busy.lengths());
    assert_eq!(idle.draft(16).unwrap(), busy.draft(16).unwrap());
}

// ---- drafts that are drawn, on the CPU ----

fn draws(rule: VerifyMethod) -> SpecConfig {
    SpecConfig {
        rule,
        sampling: SamplingParams { temperature: 1.0, ..SpecConfig::default().sampling },
        tree: None,
    }
}

/// Sizes that earlier rounds chose, of whole generations long enough to have them; AR steps among them.
#[test]
fn rounds_of_drawn_drafts_that_adapt_have_the_targets_law() {
    const TOKENS: usize = 12;
    let models = drawn(4);
    let dear = DraftLengthPolicy::CostModel(costs(0.2, |rows| 1.0 + 0.12 * rows as f64));
    let often = DraftLengthPolicy::Threshold(0.25);
    ops::install(|| {
        for (rule, goal) in
            [VerifyMethod::Rejection, VerifyMethod::Block].into_iter().flat_map(|r| [(r, &dear), (r, &often)])
        {
            let mut asked = Request { drafting: draws(rule), ..request(&[1, 2, 3], TOKENS, 6, 1.0) };
            (asked.sampling.top_k, asked.drafting.sampling.top_k) = (2, 3);
            let distribution = distribution::distribution(&models.0, &asked.prompt, &asked.sampling, TOKENS);
            let mut sequences = Sequences::new(&models.0, Some(&models.1), 1, usize::MAX).adaptive(goal);
            let mut sizes = [0; 6];
            let answer = |seed| {
                let sampling = SamplingParams { seed, ..asked.sampling.clone() };
                let got = alone(&mut sequences, &Request { sampling, ..asked.clone() });
                got.drafted.iter().skip(4).for_each(|drafts| sizes[*drafts] += 1);
                got.tokens
            };
            distribution::check(&rule, &distribution, (0..3000).map(answer));
            println!("rounds from the fifth on, by their drafts: {sizes:?}");
            assert!(sizes[1..].iter().filter(|rounds| **rounds > 200).count() > 1, "{sizes:?}");
        }
    });
}

#[test]
fn coupled_drafts_that_adapt_change_no_token() {
    let models = drawn(4);
    let asked = Request { drafting: draws(VerifyMethod::Match), ..request(&[1, 2, 3], 200, 16, 1.0) };
    let answer = |goal: &DraftLengthPolicy, asked: &Request| {
        alone(&mut Sequences::new(&models.0, Some(&models.1), 1, usize::MAX).adaptive(goal), asked)
    };
    let (plain, whole) = (Request { block: 1, ..asked.clone() }, answer(&DraftLengthPolicy::Full, &asked));
    for goal in [
        DraftLengthPolicy::CostModel(costs(0.2, |rows| 1.0 + 0.12 * rows as f64)),
        DraftLengthPolicy::Threshold(0.3),
    ] {
        let got = answer(&goal, &asked);
        assert_eq!(got.tokens, answer(&DraftLengthPolicy::Full, &plain).tokens);
        let first = |outcome: &Outcome| outcome.accepted[..4].to_vec();
        assert_eq!(first(&got), first(&whole), "the drafts are the coupled ones");
        assert!(got.drafted[4..].iter().all(|drafts| *drafts < 12), "{goal:?}: {:?}", got.drafted);
    }
}

/// The least that a threshold leaves is one draft a round: what is drawn is never left alone for ever.
#[test]
fn drawn_drafts_under_any_threshold_go_on() {
    let models = drawn(90);
    let (goal, mut asked) = (DraftLengthPolicy::Threshold(1.0), request(&[5, 6], 60, 8, 1.0));
    for rule in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
        asked.drafting = draws(rule);
        let got =
            alone(&mut Sequences::new(&models.0, Some(&models.1), 1, usize::MAX).adaptive(&goal), &asked);
        assert_eq!(
            (&got.drafted[..4], got.drafted[4..].iter().all(|drafts| *drafts == 1)),
            (&[7; 4][..], true)
        );
    }
}

/// Trees that are drawn are whole.
#[test]
fn drawn_trees_do_not_adapt() {
    let models = drawn(4);
    let goal = DraftLengthPolicy::Threshold(1.0);
    for (rule, drafts) in [(VerifyMethod::Rejection, 11), (VerifyMethod::Block, 9)] {
        let asked =
            Request { drafting: SpecConfig { tree: Some(12), ..draws(rule) }, ..request(&[1], 40, 4, 1.0) };
        let got =
            alone(&mut Sequences::new(&models.0, Some(&models.1), 1, usize::MAX).adaptive(&goal), &asked);
        assert!(got.drafted.iter().all(|drafted| *drafted == drafts), "{rule:?}: {:?}", got.drafted);
    }
}

// ---- on devices ----

/// On the emulator, for a pair of so many tokens: of few, drafts are often right; of many, never.
fn on_device(vocab: usize, room: BatchConfig, then: impl FnOnce(&mut Batch)) {
    let (target, drafter) = tiny();
    let pair = open(&support::write_pair(&support::Target { vocab, ..target }, &drafter));
    let device = Emulator::new();
    let models = OnDevice::load(&device, &pair, room.positions).unwrap();
    then(&mut Batch::new(&device, &models, room).unwrap());
}

fn room(sequences: usize, tree: usize) -> BatchConfig {
    BatchConfig { adaptive: true, ..BatchConfig::new(sequences, 16, 256).with_trees(tree) }
}

fn with_tree(request: &Request, rows: usize) -> Request {
    let tree = (rows > 0).then_some(rows);
    Request { drafting: SpecConfig { tree, ..request.drafting.clone() }, ..request.clone() }
}

/// Says so, and then that all may be drafted.
struct Script {
    sizes: VecDeque<usize>,
    /// (verified, stood) of its rounds
    heard: Rc<RefCell<Vec<(usize, u64)>>>,
}

impl Controller for Script {
    fn drafts(&mut self, most: usize) -> usize {
        self.sizes.pop_front().unwrap_or(most)
    }

    fn judged(&mut self, verified: usize, stood: u64) {
        self.heard.borrow_mut().push((verified, stood));
    }
}

/// Anything, and often nothing. What it is told of must be what it asked for, in order.
struct Wild {
    random: Random,
    asked: VecDeque<usize>,
}

impl Controller for Wild {
    fn drafts(&mut self, most: usize) -> usize {
        let drafts = [0, self.random.below(most + 1), most][self.random.below(3)];
        if drafts > 0 {
            self.asked.push_back(drafts);
        }
        assert!(self.asked.len() <= 2, "{:?}", self.asked);
        drafts
    }

    fn judged(&mut self, verified: usize, _: u64) {
        // Where positions end there may be fewer than the host knew of.
        let asked = self.asked.pop_front().unwrap();
        assert!(verified <= asked, "{verified} of {asked}");
    }
}

fn wild(seed: u64) -> Box<dyn Controller> {
    Box::new(Wild { random: Random::new(seed), asked: VecDeque::new() })
}

#[test]
fn rounds_on_a_device_verify_what_controllers_say_each_in_its_round() {
    on_device(4, room(2, 64), |batch| {
        let mut random = Random::new(21);
        let (mut scripts, mut requests, mut plain) = (vec![], vec![], vec![]);
        for (i, tree) in [64, 0, 40, 64, 0].into_iter().enumerate() {
            let most = if tree > 0 { tree - 1 } else { 15 };
            let sizes = [0, 1, 15, 16, 31, 32, most];
            let script: VecDeque<usize> = (0..60)
                .map(|_| [sizes[random.below(7)].min(most), random.below(most + 1)][random.below(2)])
                .collect();
            scripts.push(script);
            let asked = request(&[1 + i as u32 % 3, 2, 3], 40 + 11 * i, 16, [0.0, 0.9][i % 2]);
            plain.push(alone(batch, &Request { block: 1, ..asked.clone() }));
            requests.push(with_tree(&asked, tree));
        }
        // Sequences join in the order of the list.
        let left = RefCell::new(VecDeque::from(scripts.clone()));
        let heard: Vec<Rc<RefCell<Vec<_>>>> = scripts.iter().map(|_| Rc::default()).collect();
        let ears = RefCell::new(VecDeque::from(heard.clone()));
        batch.control(move || {
            let sizes = left.borrow_mut().pop_front().unwrap();
            Box::new(Script { sizes, heard: ears.borrow_mut().pop_front().unwrap() })
        });
        let got = together(batch, &requests, go_on);
        for (i, (got, plain)) in got.iter().zip(&plain).enumerate() {
            assert_eq!((&got.tokens, got.finish), (&plain.tokens, plain.finish), "request {i}");
            let script: Vec<usize> = scripts[i].iter().copied().take(got.drafted.len()).collect();
            assert_eq!(got.drafted, script, "request {i}");
            // What came of each round with drafts, and nothing else, is what its controller hears.
            let rounds = got.drafted.iter().zip(&got.accepted).filter(|(drafts, _)| **drafts > 0);
            let heard = heard[i].borrow();
            assert_eq!(heard.len(), rounds.clone().count(), "request {i}");
            for ((drafts, tokens), (verified, stood)) in rounds.zip(heard.iter()) {
                assert_eq!(
                    (verified, stood.count_ones() as usize, stood & 1),
                    (drafts, *tokens, 1),
                    "request {i}"
                );
                let is_tree = requests[i].drafting.tree.is_some();
                let (within, chain) = (*stood <= chain_of(*drafts), *stood == chain_of(tokens - 1));
                assert!(within && (is_tree || chain), "request {i}: {stood:b} of {drafts}");
            }
            assert!(got.accepted.iter().any(|tokens| *tokens > 2), "request {i}: {:?}", got.accepted);
        }
    });
}

#[test]
fn controllers_of_any_kind_leave_a_batchs_answers_alone() {
    for vocab in [4, 90] {
        on_device(vocab, room(3, 64), |batch| {
            let mut requests = vec![];
            for (i, tree) in [0, 64, 17, 0, 33, 0].into_iter().enumerate() {
                let asked = seeded(&[1, 2, 3, i as u32 % 4], 16 + 5 * i, 16, [0.0, 0.8][i % 2], i as u64);
                requests.push(with_tree(&asked, tree));
            }
            // One of no drafts, and one of drawn ones.
            requests[3].block = 1;
            requests[5].drafting.sampling.temperature = 1.0;
            let plainly =
                |request: &Request| Request { block: 1, drafting: SpecConfig::default(), ..request.clone() };
            let plain: Vec<Outcome> = requests.iter().map(|asked| alone(batch, &plainly(asked))).collect();
            let next = Cell::new(0);
            let kinds = move || -> Box<dyn Controller> {
                next.set(next.get() + 1);
                match next.get() % 3 {
                    0 => Box::new(Fixed),
                    _ => wild(next.get()),
                }
            };
            let modelled = together(batch, &requests, go_on);
            batch.control(kinds);
            for got in [modelled, together(batch, &requests, go_on)] {
                for (i, (got, plain)) in got.iter().zip(&plain).enumerate() {
                    assert_eq!(
                        (&got.tokens, got.finish),
                        (&plain.tokens, plain.finish),
                        "{vocab}: request {i}"
                    );
                }
            }
        });
    }
}

#[test]
fn every_token_comes_of_plain_decodings_logits_whatever_rounds_draft() {
    for (vocab, tree) in [(4, 0), (4, 64), (90, 0)] {
        on_device(vocab, room(1, tree), |batch| {
            batch.control(|| wild(5));
            for temperature in [0.0, 0.7] {
                let asked = with_tree(&request(&[3, 1, 2], 60, 16, temperature), tree);
                let report = lossless::check(batch, &asked, || Ok(Silent)).unwrap().unwrap();
                assert_eq!(
                    (report.identical, report.compared),
                    (Ok(()), 59),
                    "{vocab} tokens, trees of {tree}"
                );
            }
        });
    }
}

/// AR steps leave no holes: the drafter drafts what it would have, had it drafted all along.
#[test]
fn a_drafter_that_follows_on_a_device_drafts_what_it_would_have() {
    on_device(4, room(1, 0), |batch| {
        let asked = request(&[2, 1, 3, 3], 150, 16, 0.9);
        batch.control(|| Box::new(Fixed));
        let busy = alone(batch, &asked);
        let brought = |rounds: std::ops::Range<usize>| busy.accepted[rounds].iter().sum::<usize>();
        assert!(busy.accepted.iter().filter(|tokens| **tokens > 1).count() > 10, "{:?}", busy.accepted);
        let rounds = busy.accepted.len();
        for (first, last) in [(0, 1), (0, 7), (3, 4), (5, 20), (1, rounds / 2)] {
            // Drafts as before, but for these rounds; as many AR steps as they brought tokens.
            let script = [vec![15; first], vec![0; brought(first..last)]].concat();
            batch.control(move || Box::new(Script { sizes: script.clone().into(), heard: Rc::default() }));
            let paused = alone(batch, &asked);
            assert_eq!(paused.tokens, busy.tokens);
            let ones = vec![1; brought(first..last)];
            let expected = [&busy.accepted[..first], &ones, &busy.accepted[last..]].concat();
            assert_eq!(paused.accepted, expected, "rounds {first} to {last}");
        }
    });
}

#[test]
fn on_a_device_a_drafter_that_is_never_right_is_left_alone_and_tried_again() {
    for tree in [0, 64] {
        on_device(1000, room(1, tree), |batch| {
            let asked = with_tree(&request(&[7, 8, 9], 120, 16, 0.0), tree);
            let got = alone(batch, &asked);
            assert_eq!(got.tokens, alone(batch, &Request { block: 1, ..asked.clone() }).tokens);
            assert_eq!(got.accepted, [1; 119]);
            let drafted: Vec<usize> = (0..119).filter(|round| got.drafted[*round] > 0).collect();
            // Twelve rounds and one on its way; trials after 16 and 32 AR steps, each with one on its way.
            assert_eq!(drafted, [&(0..13).collect::<Vec<_>>()[..], &[29, 63]].concat());
        });
    }
    // One that is right later on: it is left alone, tried, waited for, and kept.
    on_device(4, room(1, 0), |batch| {
        let got = alone(batch, &request(&[1, 2], 80, 16, 0.0));
        let drafted: Vec<bool> = got.drafted.iter().map(|drafts| *drafts > 0).collect();
        let expected =
            [vec![true; 13], vec![false; 16], vec![true, false], vec![true; drafted.len() - 31]].concat();
        assert_eq!(drafted, expected, "{:?}", got.accepted);
        assert!(drafted.len() > 31 && got.accepted[29] > 1, "{:?}", got.accepted);
    });
}

/// Any size, by what came of the rounds that it has heard of.
struct ByPast {
    past: u64,
    rounds: u64,
    sizes: Rc<Cell<[usize; 5]>>,
}

impl Controller for ByPast {
    fn drafts(&mut self, most: usize) -> usize {
        self.rounds += 1;
        let drafts = Random::new(self.past.wrapping_mul(64) + self.rounds).below(most + 1);
        let mut sizes = self.sizes.get();
        sizes[drafts] += 1;
        self.sizes.set(sizes);
        drafts
    }

    fn judged(&mut self, verified: usize, stood: u64) {
        self.past = self.past.wrapping_mul(1031) + stood * 8 + verified as u64;
    }
}

/// Chains of both rules in the same rounds, which other chains and AR steps share.
#[test]
fn drawn_drafts_of_a_batch_whose_sizes_adapt_have_the_targets_law() {
    const RUNS: u64 = 700;
    let (target, drafter) = tiny();
    let pair = open(&support::write_pair(&target, &drafter));
    let target = Target::load(&pair.target).unwrap();
    let room = BatchConfig { draft_probs: true, adaptive: true, ..BatchConfig::new(32, 5, 64) };
    let device = Emulator::new();
    let models = OnDevice::load(&device, &pair, 64).unwrap();
    let mut batch = Batch::new(&device, &models, room).unwrap();
    let sizes = Rc::new(Cell::new([0; 5]));
    let (told, next) = (sizes.clone(), Cell::new(0));
    batch.control(move || {
        next.set(next.get() + 1);
        Box::new(ByPast { past: next.get(), rounds: 0, sizes: told.clone() })
    });
    let prompt = [1, 2, 3];
    let kinds = [draws(VerifyMethod::Rejection), draws(VerifyMethod::Block), SpecConfig::default()];
    let one = |i: u64| {
        let kind = kinds[if i.is_multiple_of(20) { 2 } else { i as usize % 2 }].clone();
        let mut one = Request { drafting: kind, ..seeded(&prompt, 4, 5, 1.0, i) };
        one.sampling.top_k = 3;
        one
    };
    let requests: Vec<Request> = (0..RUNS).map(one).collect();
    let outcomes = together(&mut batch, &requests, go_on);
    println!("rounds by their drafts: {:?}", sizes.get());
    assert!(sizes.get().iter().all(|rounds| *rounds > 100), "{:?}", sizes.get());
    let distribution = distribution::distribution(&target, &prompt, &requests[0].sampling, 4);
    let drawn =
        requests.iter().zip(&outcomes).filter(|(request, _)| request.drafting.rule != VerifyMethod::Match);
    distribution::check(&"both rules", &distribution, drawn.map(|(_, outcome)| outcome.tokens.clone()));
}

/// The room's own controllers, of what pays and of what stands often enough: an answer's rounds are its own.
#[test]
fn rules_that_adapt_answer_in_a_batch_as_alone() {
    for (vocab, threshold) in [(90, None), (4, Some(0.3))] {
        let room = BatchConfig { draft_probs: true, threshold, ..room(3, 20) };
        on_device(vocab, room, |batch| {
            let kinds = [
                draws(VerifyMethod::Rejection),
                draws(VerifyMethod::Block),
                draws(VerifyMethod::Match),
                SpecConfig::default(),
            ];
            let mut requests: Vec<Request> = (0..8)
                .map(|i| {
                    let asked = seeded(&[1, 2, 3, i as u32 % 4], 24 + 2 * i, 8, 1.0, i as u64);
                    Request { drafting: kinds[i % 4].clone(), ..asked }
                })
                .collect();
            // A tree of the best tokens, one that is drawn and does not adapt, and autoregressive decoding.
            requests[3].drafting.tree = Some(20);
            requests[4].drafting.tree = Some(20);
            requests[7].block = 1;
            let all = together(batch, &requests, go_on);
            let mut sizes = std::collections::BTreeSet::new();
            for (i, (request, got)) in requests.iter().zip(&all).enumerate() {
                let own = alone(batch, request);
                assert_eq!((&got.tokens, &got.drafted), (&own.tokens, &own.drafted), "request {i}");
                if request.drafting.rule != VerifyMethod::Match && request.drafting.tree.is_none() {
                    sizes.extend(got.drafted.iter().copied());
                }
            }
            println!("{threshold:?}: {sizes:?}");
            assert!(all[4].drafted.iter().all(|drafts| *drafts == 19), "{:?}", all[4].drafted);
            assert!(sizes.len() > 1 && sizes.contains(&0) == threshold.is_none(), "{threshold:?}: {sizes:?}");
        });
    }
}

/// As the controller that a room's threshold stands for says, two rounds ahead; and never a AR step.
#[test]
fn on_a_device_a_threshold_is_what_has_stood_so_often() {
    for (tree, threshold) in [(0, 0.2), (0, 1.0), (64, 0.2)] {
        on_device(4, BatchConfig { threshold: Some(threshold), ..room(1, tree) }, |batch| {
            let asked = with_tree(&request(&[1, 2], 150, 16, 0.8), tree);
            let got = alone(batch, &asked);
            assert_eq!(got.tokens, alone(batch, &Request { block: 1, ..asked.clone() }).tokens);
            assert!(got.drafted[9..].iter().all(|drafts| (1..12).contains(drafts)), "{:?}", got.drafted);
            if tree == 0 {
                let (mut again, mut heard) = (DraftLengthPolicy::Threshold(threshold).controller(true), 0);
                for (round, drafts) in got.drafted.iter().enumerate() {
                    for heard in heard..round.saturating_sub(1) {
                        again.judged(got.drafted[heard], chain_of(got.accepted[heard] - 1));
                    }
                    heard = heard.max(round.saturating_sub(1));
                    assert_eq!(again.drafts(15), *drafts, "round {round}");
                }
                assert!(got.drafted.iter().any(|drafts| *drafts > 1), "{:?}", got.drafted);
            }
        });
    }
}

// ---- the flag ----

const PROMPT: &str = "def read_lines(path):\n    with open(path) as file:\n        ";

#[test]
fn adaptive_rounds_give_the_same_text_and_are_recorded() {
    for (sampling, tree) in
        [(&["--temperature", "0"][..], &[][..]), (&["--temperature", "1", "--seed", "4"], &["--tree", "40"])]
    {
        let record = |args: &[&str]| {
            let args = [&[PROMPT, "-n", "120", "--json"], sampling, args].concat();
            program::run(args).json().remove(0)
        };
        let plain = record(&["--draft", "none"]);
        let whole = record(tree);
        let adaptive = record(&[tree, &["--adaptive"]].concat());
        assert_eq!((&adaptive["tokens"], &whole["tokens"]), (&plain["tokens"], &plain["tokens"]));
        let told = |record: &Value| record["adaptive"].as_bool();
        assert_eq!((told(&adaptive), told(&whole), told(&plain)), (Some(true), Some(false), None));
        let sum = |record: &Value| -> u64 {
            record["drafted"].as_array().unwrap().iter().map(|drafts| drafts.as_u64().unwrap()).sum()
        };
        assert!(0 < sum(&adaptive) && sum(&adaptive) < sum(&whole), "{} of {}", sum(&adaptive), sum(&whole));
    }
    let args = [PROMPT, "-n", "60", "--adaptive", "--check-lossless", "--json"];
    assert_eq!(program::run(args).json()[0]["identical"], true);
}

#[test]
fn adaptive_rounds_on_the_emulator_give_the_same_text() {
    let args = [PROMPT, "-n", "14", "--json", "--device", "emulator", "-q", "--ctx", "128"];
    let tokens = |more: &[&str]| program::run([&args, more].concat()).json().remove(0);
    let (plain, adaptive) = (tokens(&["--draft", "none"]), tokens(&["--tree", "40", "--adaptive"]));
    assert_eq!(adaptive["tokens"], plain["tokens"]);
    assert_eq!((&adaptive["adaptive"], &adaptive["device"]), (&Value::Bool(true), &Value::from("emulator")));
    let checked = [&args[..], &["--adaptive", "--check-lossless"]].concat();
    assert_eq!(program::run(checked).json()[0]["identical"], true);
}

/// The probability in the flag is what rounds go by: certainty leaves hardly any of the drafts that the CPU looks at, and
/// one of those that are drawn.
#[test]
fn the_probability_of_the_flag_decides_sizes() {
    let drafted = |args: &[&str]| -> Vec<u64> {
        let args = [&[PROMPT, "--json", "-q", "--temperature", "1", "--seed", "4"], args].concat();
        let record = program::run(args).json().remove(0);
        record["drafted"].as_array().unwrap().iter().map(|drafts| drafts.as_u64().unwrap()).collect()
    };
    let on_cpu = |flag| drafted(&["-n", "60", "--device", "cpu", flag]).iter().sum::<u64>();
    let [all, some, none] = ["--adaptive=0.0001", "--adaptive=0.1", "--adaptive=1"].map(on_cpu);
    assert!(all > some + 20 && some > none + 15, "{all} {some} {none}");
    let device = ["-n", "24", "--device", "emulator", "--ctx", "128", "--block", "8"];
    let rounds = drafted(&[&device[..], &["--adaptive=1", "--verify", "block"]].concat());
    assert!(rounds.len() > 8 && rounds[8..].iter().all(|drafts| *drafts == 1), "{rounds:?}");
}

#[test]
fn what_cannot_adapt_is_refused_in_a_sentence() {
    for (args, code, part) in [
        (
            &["--block", "1"][..],
            2,
            "--block is 1, which is autoregressive decoding: --adaptive expects at least 2",
        ),
        (&["--draft", "none"], 2, "--adaptive needs a drafter, but --draft is none"),
        (
            &["--verify", "block", "--tree", "9"],
            2,
            "--adaptive with --tree expects --verify match, but with --verify block",
        ),
        (&["--verify", "rejection", "--tree", "9"], 2, "trees are drawn at random"),
        (&["--coupled", "--tree", "9"], 2, "--tree is for the drafter's best tokens, but with --coupled"),
    ] {
        let run = program::run([&[PROMPT, "--adaptive"], args].concat());
        let lines = run.err.lines().count();
        assert!(
            run.code == code && run.out.is_empty() && lines == 1 && run.err.contains(part),
            "{args:?}: {run:?}"
        );
    }
    let bounds = "expected more than 0 and at most 1";
    for (value, part) in [
        ("0", bounds),
        ("-0.5", bounds),
        ("1.0001", bounds),
        ("inf", bounds),
        ("NaN", bounds),
        ("often", "invalid value 'often' for '--adaptive[=<P>]': expected a number"),
        ("", "--adaptive"),
    ] {
        let run = program::run([PROMPT, &format!("--adaptive={value}")]);
        let lines = run.err.lines().count();
        assert!(
            run.code == 2 && run.out.is_empty() && lines == 1 && run.err.contains(part),
            "{value}: {run:?}"
        );
    }
    assert_eq!(
        program::run([PROMPT, "--adaptive=0"]).err,
        format!("dflash-gen: --adaptive is 0, {bounds}\n")
    );
}
