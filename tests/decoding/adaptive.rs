//! `--adaptive`: rounds draft as many tokens as their controllers say, on the CPU and on devices. The draft
//! length never changes the tokens emitted under `match`, nor the distribution of the tokens that the other
//! methods emit.

use crate::support;
use crate::support::distribution;
use crate::support::program;
use crate::support::random;
use crate::support::requests;

use crate::support::test_gpu::TestGpu;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::{Sequence, Sequences};
use dflash::cpu::model::{Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Decoder, Outcome, Request, generate};
use dflash::engine::lossless;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models as DeviceBackend};
use dflash::spec::config::{SpecConfig, VerifyMethod};
use dflash::spec::draft_length::{Controller, Costs, DraftLengthPolicy, Fixed};
use dflash::spec::sampling::SamplingParams;
use random::Random;
use requests::{AcceptAll, keep_going, open, reference_prompts, request, run_together, seeded, tiny};
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

fn costs(draft: f64, verify: impl Fn(usize) -> f64) -> Costs {
    Costs { draft, verify: (1..=64).map(verify).collect() }
}

/// The path bits of a chain whose first `accepted` drafts were accepted.
fn chain_of(accepted: usize) -> u64 {
    u64::MAX >> (63 - accepted)
}

// ---- on the CPU ----

struct Models(Target, Drafter);

fn load(pair: Pair) -> Models {
    Models(Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap())
}

/// A pair with random weights. With a small `vocab` its drafts are often right, with a large one never.
fn random_models(vocab: usize) -> Models {
    let (target, drafter) = support::small();
    let written = support::write_pair(&support::Target { vocab, ..target }, &drafter);
    load(Pair::open(support::disk(&written.target), Some(support::disk(&written.drafter))).unwrap())
}

fn alone(decoder: &mut dyn Decoder, request: &Request) -> Outcome {
    generate(decoder, request, &mut AcceptAll).unwrap()
}

/// A draft-length policy, and the cost model of its rounds.
type Policy = (DraftLengthPolicy, Costs);

fn cost_model(costs: Costs) -> Policy {
    (DraftLengthPolicy::CostModel, costs)
}

fn threshold(min_probability: f64) -> Policy {
    (DraftLengthPolicy::Threshold(min_probability), costs(0.0, |_| 1.0))
}

fn full() -> Policy {
    (DraftLengthPolicy::Full, costs(0.0, |_| 1.0))
}

fn sequences<'a>(models: &'a Models, policy: &Policy) -> Sequences<'a> {
    Sequences::new(&models.0, Some(&models.1), 1, usize::MAX).with_costs(&policy.1)
}

/// The request with the policy's draft length, where its drafts have one.
fn adapting(policy: &Policy, request: &Request) -> Request {
    Request { spec: requests::with_length(&request.spec, policy.0), ..request.clone() }
}

fn run(models: &Models, tree: Option<usize>, policy: &Policy, request: &Request) -> Outcome {
    let request = Request { spec: requests::spec(VerifyMethod::Match, 0.0, tree), ..request.clone() };
    ops::on_threads(None, || {
        generate(&mut sequences(models, policy), &adapting(policy, &request), &mut AcceptAll)
    })
    .unwrap()
}

#[test]
fn no_policy_changes_the_tokens() {
    let (demo, few, many) =
        (load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()), random_models(4), random_models(90));
    let cheap = cost_model(costs(0.1, |_| 1.0));
    let dear = cost_model(costs(0.1, |rows| 0.5 + 0.5 * rows as f64));
    let stairs = cost_model(costs(0.3, |rows| rows.div_ceil(5) as f64));
    let often = threshold(0.4);
    let prompts = reference_prompts();
    let (mut cut, mut ar_steps) = (0, 0);
    for (models, prompt, tokens) in
        [(&demo, &prompts[3][..], 90), (&few, &[1, 3, 2], 200), (&many, &[5, 6], 200)]
    {
        for temperature in [0.0, 0.8] {
            let request = seeded(prompt, tokens, models.1.config.block, temperature, 3);
            let ar = run(models, None, &full(), &Request { block: 1, ..request.clone() });
            for tree in [None, Some(30)] {
                let whole = run(models, tree, &full(), &request);
                for policy in [&cheap, &dear, &stairs, &often] {
                    let got = run(models, tree, policy, &request);
                    assert_eq!((&got.tokens, got.finish), (&ar.tokens, ar.finish));
                    // A second run has the same rounds: their sizes do not depend on measured time.
                    assert_eq!(got.drafted, run(models, tree, policy, &request).drafted);
                    let all: usize = got.drafted.iter().sum();
                    cut += usize::from(all < whole.drafted.iter().sum());
                    ar_steps += got.drafted.iter().filter(|drafts| **drafts == 0).count();
                }
            }
        }
    }
    println!("{cut} {ar_steps}");
    assert!(cut > 30 && ar_steps > 500, "{cut} of 48 runs drafted less, {ar_steps} AR steps");
}

/// A round verifies exactly the paths of a chain or tree to which the drafter gives at least the threshold,
/// whatever earlier rounds accepted.
#[test]
fn a_threshold_cuts_chains_and_trees_at_paths_below_it() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    for min_probability in [0.02, 0.3, 0.99, 1.0] {
        let (policy, mut sizes) = (threshold(min_probability), vec![]);
        for tree in [None, Some(64), Some(6)] {
            let mut sequence = Sequence::new(&models.0, Some(&models.1));
            let spec = requests::spec(VerifyMethod::Match, 0.0, tree);
            let asked = Request { spec, ..request(&reference_prompts()[4], 120, 16, 0.0) };
            sequence.start(&adapting(&policy, &asked)).unwrap();
            while sequence.prefill().unwrap().next.is_none() {}
            let mut out = vec![];
            while out.len() < 60 {
                let grown = sequence.draft_tree(16, tree.unwrap_or(64)).unwrap();
                let probable =
                    |row: &usize| (f64::from(grown.costs[*row]) / -65536.0).exp2() >= min_probability;
                let expected = match tree {
                    Some(_) => (1..grown.rows()).filter(probable).count(),
                    // The first child of a row is its most probable one.
                    None => {
                        let child = |row: usize| {
                            (row + 1..grown.rows()).find(|child| grown.parents[*child] as usize == row)
                        };
                        std::iter::successors(child(0), |row| child(*row)).filter(probable).count()
                    }
                };
                assert_eq!(
                    sequence.round(&mut out).unwrap(),
                    expected,
                    "{tree:?} at least {min_probability}"
                );
                sizes.push(expected);
            }
        }
        // A round without drafts does not end drafting.
        println!("at least {min_probability}: {sizes:?}");
        let again = sizes.windows(2).any(|pair| pair[0] == 0 && pair[1] > 0);
        assert!(min_probability != 0.99 || again, "{sizes:?}");
    }
}

#[test]
fn a_drafter_that_is_never_right_rarely_drafts() {
    let models = random_models(1000);
    let cheap = costs(0.3, |rows| 1.0 + 0.02 * rows as f64);
    for tree in [None, Some(16)] {
        let got = run(&models, tree, &cost_model(cheap.clone()), &seeded(&[7, 8, 9], 240, 8, 1.0, 2));
        let steps: Vec<f64> =
            got.drafted.iter().map(|d| if *d > 0 { cheap.round(*d) } else { 1.02 }).collect();
        let (drafted, each) =
            (steps.iter().filter(|s| **s > 1.02).count(), steps.iter().sum::<f64>() / 240.0);
        assert!((5..30).contains(&drafted) && each < 1.1, "{drafted} rounds drafted, {each} a token");
    }
}

/// After AR steps the drafter's context is complete: it drafts the same tokens as after rounds with drafts.
#[test]
fn a_drafter_catches_up_after_ar_steps() {
    let models = load(Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let prompt = &reference_prompts()[4];
    let begin = || {
        let mut sequence = Sequence::new(&models.0, Some(&models.1));
        sequence.start(&seeded(prompt, 120, 16, 0.0, 0)).unwrap();
        while sequence.prefill().unwrap().next.is_none() {}
        sequence
    };
    let (mut idle, mut busy) = (begin(), begin());
    let (mut autoregressive, mut drafted) = (vec![], vec![]);
    while drafted.len() < 80 {
        busy.round(&mut drafted).unwrap();
    }
    while autoregressive.len() < drafted.len() {
        idle.draft(1).unwrap();
        idle.verify(&[], &mut autoregressive).unwrap();
    }
    assert_eq!(autoregressive, drafted);
    assert_eq!(idle.lengths(), busy.lengths());
    assert_eq!(idle.draft(16).unwrap(), busy.draft(16).unwrap());
}

// ---- sampled drafts, on the CPU ----

fn sampled_chain(method: VerifyMethod) -> SpecConfig {
    requests::spec(method, 1.0, None)
}

/// Generations long enough that earlier rounds choose the draft lengths of later ones; some of these are AR
/// steps.
#[test]
fn sampled_chains_that_adapt_have_the_targets_distribution() {
    const TOKENS: usize = 10;
    let models = random_models(4);
    let runs = if requests::exhaustive() { 3000 } else { 1500 };
    let dear = cost_model(costs(0.2, |rows| 1.0 + 0.12 * rows as f64));
    let often = threshold(0.25);
    ops::on_threads(None, || {
        for (method, policy) in
            [VerifyMethod::Rejection, VerifyMethod::Block].into_iter().flat_map(|r| [(r, &dear), (r, &often)])
        {
            let spec = requests::with_top_k(&sampled_chain(method), 3);
            let mut asked = adapting(policy, &Request { spec, ..request(&[1, 2, 3], TOKENS, 6, 1.0) });
            asked.sampling.top_k = 2;
            let distribution = distribution::distribution(&models.0, &asked.prompt, &asked.sampling, TOKENS);
            let mut sequences = sequences(&models, policy);
            let mut sizes = [0; 6];
            let answer = |seed| {
                let sampling = SamplingParams { seed, ..asked.sampling.clone() };
                let got = alone(&mut sequences, &Request { sampling, ..asked.clone() });
                got.drafted.iter().skip(4).for_each(|drafts| sizes[*drafts] += 1);
                got.tokens
            };
            distribution::check(&method, &distribution, (0..runs).map(answer));
            println!("rounds from the fifth on, by number of drafts: {sizes:?}");
            assert!(sizes[1..].iter().filter(|rounds| **rounds > runs / 15).count() > 1, "{sizes:?}");
        }
    });
}

#[test]
fn coupled_drafts_that_adapt_change_no_token() {
    let models = random_models(4);
    let asked = Request { spec: sampled_chain(VerifyMethod::Match), ..request(&[1, 2, 3], 200, 16, 1.0) };
    let answer =
        |policy: &Policy, asked: &Request| alone(&mut sequences(&models, policy), &adapting(policy, asked));
    let (ar, whole) = (Request { block: 1, ..asked.clone() }, answer(&full(), &asked));
    for policy in [cost_model(costs(0.2, |rows| 1.0 + 0.12 * rows as f64)), threshold(0.3)] {
        let got = answer(&policy, &asked);
        assert_eq!(got.tokens, answer(&full(), &ar).tokens);
        let first = |outcome: &Outcome| outcome.accepted[..4].to_vec();
        assert_eq!(first(&got), first(&whole), "the drafts are the coupled ones");
        assert!(got.drafted[4..].iter().all(|drafts| *drafts < 12), "{policy:?}: {:?}", got.drafted);
    }
}

/// A threshold leaves at least one draft per round: sampled drafts never stop.
#[test]
fn sampled_drafts_continue_under_any_threshold() {
    let models = random_models(90);
    let (policy, mut asked) = (threshold(1.0), request(&[5, 6], 60, 8, 1.0));
    for method in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
        asked.spec = sampled_chain(method);
        let got = alone(&mut sequences(&models, &policy), &adapting(&policy, &asked));
        assert_eq!(
            (&got.drafted[..4], got.drafted[4..].iter().all(|drafts| *drafts == 1)),
            (&[7; 4][..], true)
        );
    }
}

/// Sampled trees always have their full size.
#[test]
fn sampled_trees_do_not_adapt() {
    let models = random_models(4);
    let policy = threshold(1.0);
    for (method, drafts) in [(VerifyMethod::Rejection, 11), (VerifyMethod::Block, 9)] {
        let asked = Request { spec: requests::spec(method, 1.0, Some(12)), ..request(&[1], 40, 4, 1.0) };
        let got = alone(&mut sequences(&models, &policy), &adapting(&policy, &asked));
        assert!(got.drafted.iter().all(|drafted| *drafted == drafts), "{method:?}: {:?}", got.drafted);
    }
}

// ---- on devices ----

/// Runs `then` with a batch on a device. The pair has random weights and this vocabulary: drafts are often
/// right with 4 tokens, never with many.
fn on_device(vocab: usize, config: BatchConfig, then: impl FnOnce(&mut Batch)) {
    let (target, drafter) = tiny();
    let pair = open(&support::write_pair(&support::Target { vocab, ..target }, &drafter));
    let device = TestGpu::new();
    let models = DeviceBackend::load(&device, &pair, config.positions).unwrap();
    then(&mut Batch::new(&device, &models, config).unwrap());
}

fn config(sequences: usize, tree: usize) -> BatchConfig {
    BatchConfig { adaptive: true, ..BatchConfig::new(sequences, 16, 256).with_trees(tree) }
}

fn with_tree(request: &Request, rows: usize) -> Request {
    let tree = (rows > 0).then_some(rows);
    Request { spec: requests::spec(VerifyMethod::Match, 0.0, tree), ..request.clone() }
}

/// A controller that follows a script, then allows all drafts.
struct Script {
    sizes: VecDeque<usize>,
    /// (verified drafts, accepted path bits) of its rounds
    observed: Rc<RefCell<Vec<(usize, u64)>>>,
}

impl Controller for Script {
    fn drafts(&mut self, max: usize) -> usize {
        self.sizes.pop_front().unwrap_or(max)
    }

    fn observe(&mut self, verified: usize, accepted: u64) {
        self.observed.borrow_mut().push((verified, accepted));
    }
}

/// A controller that chooses randomly, and often no drafts. It checks that the results it observes are those
/// of the rounds it asked for, in order.
struct RandomController {
    random: Random,
    asked: VecDeque<usize>,
}

impl Controller for RandomController {
    fn drafts(&mut self, max: usize) -> usize {
        let drafts = [0, self.random.below(max + 1), max][self.random.below(3)];
        if drafts > 0 {
            self.asked.push_back(drafts);
        }
        assert!(self.asked.len() <= 2, "{:?}", self.asked);
        drafts
    }

    fn observe(&mut self, verified: usize, _: u64) {
        // At the last positions a round may verify fewer than the host allowed.
        let asked = self.asked.pop_front().unwrap();
        assert!(verified <= asked, "{verified} of {asked}");
    }
}

fn random_controller(seed: u64) -> Box<dyn Controller> {
    Box::new(RandomController { random: Random::new(seed), asked: VecDeque::new() })
}

#[test]
fn device_rounds_verify_what_their_controllers_say() {
    on_device(4, config(2, 64), |batch| {
        let mut random = Random::new(21);
        let (mut scripts, mut requests, mut ar) = (vec![], vec![], vec![]);
        for (i, tree) in [64, 0, 40, 64, 0].into_iter().enumerate() {
            let max = if tree > 0 { tree - 1 } else { 15 };
            let sizes = [0, 1, 15, 16, 31, 32, max];
            let script: VecDeque<usize> = (0..60)
                .map(|_| [sizes[random.below(7)].min(max), random.below(max + 1)][random.below(2)])
                .collect();
            scripts.push(script);
            let asked = request(&[1 + i as u32 % 3, 2, 3], 24 + 7 * i, 16, [0.0, 0.9][i % 2]);
            ar.push(alone(batch, &Request { block: 1, ..asked.clone() }));
            requests.push(with_tree(&asked, tree));
        }
        // Requests are admitted in the order of the list.
        let left = RefCell::new(VecDeque::from(scripts.clone()));
        let observed: Vec<Rc<RefCell<Vec<_>>>> = scripts.iter().map(|_| Rc::default()).collect();
        let observers = RefCell::new(VecDeque::from(observed.clone()));
        batch.set_controllers(move || {
            let sizes = left.borrow_mut().pop_front().unwrap();
            Box::new(Script { sizes, observed: observers.borrow_mut().pop_front().unwrap() })
        });
        let got = run_together(batch, &requests, keep_going);
        for (i, (got, ar)) in got.iter().zip(&ar).enumerate() {
            assert_eq!((&got.tokens, got.finish), (&ar.tokens, ar.finish), "request {i}");
            let script: Vec<usize> = scripts[i].iter().copied().take(got.drafted.len()).collect();
            assert_eq!(got.drafted, script, "request {i}");
            // A controller observes the results of its rounds with drafts, and nothing else.
            let rounds = got.drafted.iter().zip(&got.accepted).filter(|(drafts, _)| **drafts > 0);
            let observed = observed[i].borrow();
            assert_eq!(observed.len(), rounds.clone().count(), "request {i}");
            for ((drafts, tokens), (verified, accepted)) in rounds.zip(observed.iter()) {
                assert_eq!(
                    (verified, accepted.count_ones() as usize, accepted & 1),
                    (drafts, *tokens, 1),
                    "request {i}"
                );
                let is_tree = requests[i].spec.tree_rows().is_some();
                let (within, chain) = (*accepted <= chain_of(*drafts), *accepted == chain_of(tokens - 1));
                assert!(within && (is_tree || chain), "request {i}: {accepted:b} of {drafts}");
            }
            assert!(got.accepted.iter().any(|tokens| *tokens > 2), "request {i}: {:?}", got.accepted);
        }
    });
}

#[test]
fn no_controller_changes_the_answers_of_a_batch() {
    // With few tokens drafts are often accepted; exhaustive: also with many.
    for vocab in [4, 90].into_iter().take(if requests::exhaustive() { 2 } else { 1 }) {
        on_device(vocab, config(3, 64), |batch| {
            let mut requests = vec![];
            for (i, tree) in [0, 64, 17, 0, 33, 0].into_iter().enumerate() {
                let tokens = if requests::exhaustive() { 16 + 5 * i } else { 10 + 2 * i };
                let asked = seeded(&[1, 2, 3, i as u32 % 4], tokens, 16, [0.0, 0.8][i % 2], i as u64);
                requests.push(with_tree(&asked, tree));
            }
            // One without drafts, and one with coupled drafts.
            requests[3].block = 1;
            requests[5].spec = sampled_chain(VerifyMethod::Match);
            let autoregressive =
                |request: &Request| Request { block: 1, spec: SpecConfig::default(), ..request.clone() };
            let ar: Vec<Outcome> =
                requests.iter().map(|asked| alone(batch, &autoregressive(asked))).collect();
            let next = Cell::new(0);
            let kinds = move || -> Box<dyn Controller> {
                next.set(next.get() + 1);
                match next.get() % 3 {
                    0 => Box::new(Fixed),
                    _ => random_controller(next.get()),
                }
            };
            let policy = cost_model(costs(0.0, |_| 1.0));
            let adaptive: Vec<Request> = requests.iter().map(|asked| adapting(&policy, asked)).collect();
            let modelled = run_together(batch, &adaptive, keep_going);
            batch.set_controllers(kinds);
            for got in [modelled, run_together(batch, &requests, keep_going)] {
                for (i, (got, ar)) in got.iter().zip(&ar).enumerate() {
                    assert_eq!((&got.tokens, got.finish), (&ar.tokens, ar.finish), "{vocab}: request {i}");
                }
            }
        });
    }
}

#[test]
fn logits_equal_those_of_ar_decoding_for_any_draft_length() {
    for (vocab, tree) in [(4, 0), (4, 64), (90, 0)] {
        on_device(vocab, config(1, tree), |batch| {
            batch.set_controllers(|| random_controller(5));
            // One of the two temperatures for each; exhaustive: both.
            let other = if tree > 0 { 0.0 } else { 0.7 };
            for temperature in if requests::exhaustive() { vec![0.0, 0.7] } else { vec![other] } {
                let asked = with_tree(&request(&[3, 1, 2], 45, 16, temperature), tree);
                let report = lossless::check(batch, &asked, || Ok(AcceptAll)).unwrap().unwrap();
                assert_eq!(
                    (report.identical, report.compared),
                    (Ok(()), 44),
                    "{vocab} tokens, trees of {tree}"
                );
            }
        });
    }
}

/// After AR steps the drafter's context is complete: it drafts the same tokens as after rounds with drafts.
#[test]
fn a_drafter_that_follows_ar_steps_on_a_device_drafts_the_same() {
    on_device(4, config(1, 0), |batch| {
        let asked = request(&[2, 1, 3, 3], 64, 16, 0.9);
        batch.set_controllers(|| Box::new(Fixed));
        let busy = alone(batch, &asked);
        let produced = |rounds: std::ops::Range<usize>| busy.accepted[rounds].iter().sum::<usize>();
        assert!(busy.accepted.iter().filter(|tokens| **tokens > 1).count() > 7, "{:?}", busy.accepted);
        let rounds = busy.accepted.len();
        for (first, last) in [(0, 1), (3, 4), (5, 12), (1, rounds / 2)] {
            // The same script, except that AR steps replace these rounds: one step for each token they produced.
            let script = [vec![15; first], vec![0; produced(first..last)]].concat();
            batch.set_controllers(move || {
                Box::new(Script { sizes: script.clone().into(), observed: Rc::default() })
            });
            let paused = alone(batch, &asked);
            assert_eq!(paused.tokens, busy.tokens);
            let ones = vec![1; produced(first..last)];
            let expected = [&busy.accepted[..first], &ones, &busy.accepted[last..]].concat();
            assert_eq!(paused.accepted, expected, "rounds {first} to {last}");
        }
    });
}

#[test]
fn device_drafting_that_does_not_pay_stops_and_is_tried_again() {
    let policy = cost_model(costs(0.0, |_| 1.0));
    let mut ar = None;
    for tree in [0, 64] {
        on_device(1000, config(1, tree), |batch| {
            let asked = with_tree(&request(&[7, 8, 9], 70, 16, 0.0), tree);
            let got = alone(batch, &adapting(&policy, &asked));
            let step = Request { block: 1, ..asked.clone() };
            assert_eq!(&got.tokens, ar.get_or_insert_with(|| alone(batch, &step).tokens));
            assert_eq!(got.accepted, [1; 69]);
            let drafted: Vec<usize> = (0..69).filter(|round| got.drafted[*round] > 0).collect();
            // Twelve rounds and one in flight; trials after 16 and 32 AR steps, each observed one round late.
            assert_eq!(drafted, [&(0..13).collect::<Vec<_>>()[..], &[29, 63]].concat());
        });
    }
    // A drafter whose drafts become right later: drafting stops, one round tries again, and drafting continues
    // once its result is known.
    on_device(4, config(1, 0), |batch| {
        let got = alone(batch, &adapting(&policy, &request(&[1, 2], 80, 16, 0.0)));
        let drafted: Vec<bool> = got.drafted.iter().map(|drafts| *drafts > 0).collect();
        let expected =
            [vec![true; 13], vec![false; 16], vec![true, false], vec![true; drafted.len() - 31]].concat();
        assert_eq!(drafted, expected, "{:?}", got.accepted);
        assert!(drafted.len() > 31 && got.accepted[29] > 1, "{:?}", got.accepted);
    });
}

/// A controller whose draft lengths are a random function of the results it has observed.
struct ByPast {
    past: u64,
    rounds: u64,
    sizes: Rc<Cell<[usize; 5]>>,
}

impl Controller for ByPast {
    fn drafts(&mut self, max: usize) -> usize {
        self.rounds += 1;
        let drafts = Random::new(self.past.wrapping_mul(64) + self.rounds).below(max + 1);
        let mut sizes = self.sizes.get();
        sizes[drafts] += 1;
        self.sizes.set(sizes);
        drafts
    }

    fn observe(&mut self, verified: usize, accepted: u64) {
        self.past = self.past.wrapping_mul(1031) + accepted * 8 + verified as u64;
    }
}

/// Chains of both sampling methods in the same rounds, together with greedy chains and AR steps.
#[test]
fn adaptive_sampled_chains_have_the_targets_distribution() {
    // Short runs have 2 tokens to choose from, about equally probable, so that few answers fill the cells.
    let (runs, temperature, top_k) = if requests::exhaustive() { (700, 1.0, 3) } else { (135, 3.0, 2) };
    let (target, drafter) = tiny();
    let pair = open(&support::write_pair(&target, &drafter));
    let target = Target::load(&pair.target).unwrap();
    let config = BatchConfig { draft_probs: true, adaptive: true, ..BatchConfig::new(32, 5, 64) };
    let device = TestGpu::new();
    let models = DeviceBackend::load(&device, &pair, 64).unwrap();
    let mut batch = Batch::new(&device, &models, config).unwrap();
    let sizes = Rc::new(Cell::new([0; 5]));
    let (recorded, next) = (sizes.clone(), Cell::new(0));
    batch.set_controllers(move || {
        next.set(next.get() + 1);
        Box::new(ByPast { past: next.get(), rounds: 0, sizes: recorded.clone() })
    });
    let prompt = [1, 2, 3];
    let kinds =
        [sampled_chain(VerifyMethod::Rejection), sampled_chain(VerifyMethod::Block), SpecConfig::default()];
    let one = |i: u64| {
        let kind = kinds[if i.is_multiple_of(20) { 2 } else { i as usize % 2 }].clone();
        let mut one = Request { spec: kind, ..seeded(&prompt, 4, 5, temperature, i) };
        one.sampling.top_k = top_k;
        one
    };
    let requests: Vec<Request> = (0..runs).map(one).collect();
    let outcomes = run_together(&mut batch, &requests, keep_going);
    println!("rounds by number of drafts: {:?}", sizes.get());
    assert!(sizes.get().iter().all(|rounds| *rounds > runs as usize / 14), "{:?}", sizes.get());
    let distribution = distribution::distribution(&target, &prompt, &requests[0].sampling, 4);
    let sampled =
        requests.iter().zip(&outcomes).filter(|(request, _)| request.spec.method() != VerifyMethod::Match);
    distribution::check(&"both methods", &distribution, sampled.map(|(_, outcome)| outcome.tokens.clone()));
}

/// With the engine's controllers, by cost and by threshold, a request's rounds do not depend on the batch.
#[test]
fn adaptive_requests_answer_in_a_batch_as_alone() {
    for (vocab, policy) in [(90, cost_model(costs(0.0, |_| 1.0))), (4, threshold(0.3))] {
        let config = BatchConfig { draft_probs: true, adaptive: true, ..BatchConfig::new(3, 8, 128) };
        on_device(vocab, config.with_trees(12), |batch| {
            let kinds = [
                sampled_chain(VerifyMethod::Rejection),
                sampled_chain(VerifyMethod::Block),
                sampled_chain(VerifyMethod::Match),
                SpecConfig::default(),
            ];
            let mut requests: Vec<Request> = (0..8)
                .map(|i| {
                    // Drafting that never pays stops after 13 rounds: of all, or of the first two chains.
                    let tokens = match i {
                        _ if requests::exhaustive() => 24 + 2 * i,
                        0 | 1 => 17 + i,
                        _ => 6 + i / 2,
                    };
                    let asked = seeded(&[1, 2, 3, i as u32 % 4], tokens, 8, 1.0, i as u64);
                    adapting(&policy, &Request { spec: kinds[i % 4].clone(), ..asked })
                })
                .collect();
            // A best-first tree, a sampled tree, which does not adapt, and autoregressive decoding.
            requests[3] = adapting(&policy, &with_tree(&requests[3], 12));
            requests[4].spec = requests::spec(VerifyMethod::Rejection, 1.0, Some(12));
            requests[7].block = 1;
            let all = run_together(batch, &requests, keep_going);
            let mut sizes = std::collections::BTreeSet::new();
            for (i, (request, got)) in requests.iter().zip(&all).enumerate() {
                // Every fourth one, with each policy others; exhaustive: all.
                if requests::exhaustive() || i % 4 == vocab / 90 * 3 {
                    let own = alone(batch, request);
                    assert_eq!((&got.tokens, &got.drafted), (&own.tokens, &own.drafted), "request {i}");
                }
                if request.spec.method() != VerifyMethod::Match && request.spec.tree_rows().is_none() {
                    sizes.extend(got.drafted.iter().copied());
                }
            }
            println!("{:?}: {sizes:?}", policy.0);
            assert!(all[4].drafted.iter().all(|drafts| *drafts == 11), "{:?}", all[4].drafted);
            let steps = policy.0 == DraftLengthPolicy::CostModel;
            assert!(sizes.len() > 1 && sizes.contains(&0) == steps, "{:?}: {sizes:?}", policy.0);
        });
    }
}

/// Draft lengths are those of the threshold's controller, which observes results two rounds late; no round is
/// an AR step.
#[test]
fn a_device_threshold_drafts_positions_accepted_often_enough() {
    let mut ar = None;
    for (tree, min_probability) in [(0, 0.2), (0, 1.0), (64, 0.2)] {
        on_device(4, config(1, tree), |batch| {
            let asked = with_tree(&request(&[1, 2], 60, 16, 0.8), tree);
            let (policy, costs) = threshold(min_probability);
            let got = alone(batch, &adapting(&threshold(min_probability), &asked));
            let step = Request { block: 1, ..asked.clone() };
            assert_eq!(&got.tokens, ar.get_or_insert_with(|| alone(batch, &step).tokens));
            assert!(got.drafted[9..].iter().all(|drafts| (1..12).contains(drafts)), "{:?}", got.drafted);
            if tree == 0 {
                let (mut again, mut observed) = (policy.controller(&costs, true), 0);
                for (round, drafts) in got.drafted.iter().enumerate() {
                    for observed in observed..round.saturating_sub(1) {
                        again.observe(got.drafted[observed], chain_of(got.accepted[observed] - 1));
                    }
                    observed = observed.max(round.saturating_sub(1));
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
        let ar = record(&["--draft", "none"]);
        let whole = record(tree);
        let adaptive = record(&[tree, &["--adaptive"]].concat());
        assert_eq!((&adaptive["tokens"], &whole["tokens"]), (&ar["tokens"], &ar["tokens"]));
        let recorded = |record: &Value| record["adaptive"].as_bool();
        assert_eq!((recorded(&adaptive), recorded(&whole), recorded(&ar)), (Some(true), Some(false), None));
        let sum = |record: &Value| -> u64 {
            record["drafted"].as_array().unwrap().iter().map(|drafts| drafts.as_u64().unwrap()).sum()
        };
        assert!(0 < sum(&adaptive) && sum(&adaptive) < sum(&whole), "{} of {}", sum(&adaptive), sum(&whole));
    }
    let args = [PROMPT, "-n", "60", "--adaptive", "--check-lossless", "--json"];
    assert_eq!(program::run(args).json()[0]["identical"], true);
}

#[test]
fn adaptive_rounds_on_a_device_give_the_same_text() {
    let args = [PROMPT, "-n", "14", "--json", "--device", "cuda", "-q", "--ctx", "128"];
    let tokens = |more: &[&str]| program::run([&args, more].concat()).json().remove(0);
    let (ar, adaptive) = (tokens(&["--draft", "none"]), tokens(&["--tree", "40", "--adaptive"]));
    assert_eq!(adaptive["tokens"], ar["tokens"]);
    assert_eq!((&adaptive["adaptive"], &adaptive["device"]), (&Value::Bool(true), &Value::from("softgpu")));
    let checked = [&args[..], &["--adaptive", "--check-lossless"]].concat();
    assert_eq!(program::run(checked).json()[0]["identical"], true);
}

/// The flag's probability is the threshold of the rounds: 1 leaves hardly any greedy drafts on the CPU, which
/// knows their probabilities, and one sampled draft per round on a device.
#[test]
fn the_flags_probability_decides_draft_lengths() {
    let drafted = |args: &[&str]| -> Vec<u64> {
        let args = [&[PROMPT, "--json", "-q", "--temperature", "1", "--seed", "4"], args].concat();
        let record = program::run(args).json().remove(0);
        record["drafted"].as_array().unwrap().iter().map(|drafts| drafts.as_u64().unwrap()).collect()
    };
    let on_cpu = |flag| drafted(&["-n", "60", "--device", "cpu", flag]).iter().sum::<u64>();
    let [all, some, none] = ["--adaptive=0.0001", "--adaptive=0.1", "--adaptive=1"].map(on_cpu);
    assert!(all > some + 20 && some > none + 15, "{all} {some} {none}");
    let device = ["-n", "24", "--device", "cuda", "--ctx", "128", "--block", "8"];
    let rounds = drafted(&[&device[..], &["--adaptive=1", "--verify", "block"]].concat());
    assert!(rounds.len() > 8 && rounds[8..].iter().all(|drafts| *drafts == 1), "{rounds:?}");
}

#[test]
fn options_that_cannot_adapt_are_refused_in_one_line() {
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
            "--adaptive with --tree needs --verify match, but --verify is block",
        ),
        (&["--verify", "rejection", "--tree", "9"], 2, "how often a row of a sampled tree is accepted"),
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
