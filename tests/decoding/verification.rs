//! The verification methods and sampled drafts on the CPU: the distribution of whole generations against the
//! target's exact distribution, what an answer must not depend on, and the flags.

use crate::support;
use crate::support::distribution;
use crate::support::program;
use crate::support::requests;

use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::{Sequence, Sequences};
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Outcome, Request, resume};
use dflash::gpu::decoder::DeviceBackend;
use dflash::spec::config::{SpecConfig, VerifyMethod};
use dflash::spec::rng::PhiloxStream;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree::{Tree, chains, shape};
use dflash::spec::verify::{
    Siblings, block_verify, multi_draft_block_verify, recursive_rejection, rejection, sample_chains,
    sample_tree,
};
use dflash::text::tokenizer::Text;
use requests::{AcceptAll, keep_going, run, run_together};
use serde_json::Value;

struct Models(Target, Drafter);

fn load(pair: &Pair) -> Models {
    Models(Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap())
}

fn demo() -> Models {
    load(&Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap())
}

/// A pair with four tokens, so that drafts are often accepted and often rejected.
fn tiny() -> Models {
    let (target, drafter) = requests::tiny();
    load(&requests::open(&support::write_pair(&target, &drafter)))
}

impl Models {
    fn slots(&self, slots: usize) -> Sequences<'_> {
        Sequences::new(&self.0, Some(&self.1), slots, usize::MAX)
    }

    /// Compares `runs` answers to `request`, with different seeds, with the target's distribution. Returns
    /// the mean number of drafts accepted per round.
    fn check(&self, request: &Request, runs: u64) -> f64 {
        let distribution =
            distribution::distribution(&self.0, &request.prompt, &request.sampling, request.max_tokens);
        let (mut decoder, what) = (self.slots(1), &request.spec);
        let mut accepted = Vec::new();
        let answer = |seed| {
            let sampling = SamplingParams { seed, ..request.sampling.clone() };
            let request = Request { sampling, ..request.clone() };
            let outcome = resume(&mut decoder, &request, &mut AcceptAll).unwrap();
            accepted.extend(outcome.accepted);
            outcome.tokens
        };
        distribution::check(what, &distribution, (0..runs).map(answer));
        let mean = (accepted.iter().sum::<usize>() - accepted.len()) as f64 / accepted.len() as f64;
        println!("{what:?}: {mean:.3} accepted drafts per round");
        mean
    }
}

fn chain_spec(method: VerifyMethod, temperature: f32) -> SpecConfig {
    requests::spec(method, temperature, None)
}

fn tree(method: VerifyMethod, temperature: f32, rows: usize) -> SpecConfig {
    requests::spec(method, temperature, Some(rows))
}

fn request(prompt: &[u32], max_tokens: usize, block: usize, spec: SpecConfig) -> Request {
    Request { spec, ..requests::request(prompt, max_tokens, block, 1.0) }
}

const PROMPTS: [&str; 3] =
    ["import os\nimport sys\n\ndef main(", "class Reader:\n    def __init__(self, ", "for i in range("];

fn tokens(text: &str) -> Vec<u32> {
    Text::open(&DEMO_TARGET, None).unwrap().encode(text).unwrap()
}

#[test]
fn demo_answers_have_the_targets_distribution() {
    let models = demo();
    // A point in a reference answer where the target is uncertain and the drafter is sometimes right.
    let oracle: Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let answer = oracle["prompts"][18]["output_ids"].as_array().unwrap().iter();
    let prompt: Vec<u32> = answer.take(135).map(|id| id.as_u64().unwrap() as u32).collect();
    ops::on_threads(None, || {
        for spec in [
            chain_spec(VerifyMethod::Match, 0.0),
            chain_spec(VerifyMethod::Match, 1.0),
            chain_spec(VerifyMethod::Rejection, 1.0),
            chain_spec(VerifyMethod::Block, 1.0),
            tree(VerifyMethod::Rejection, 1.0, 9),
            tree(VerifyMethod::Block, 1.0, 10),
        ] {
            // Top-k 4, so that the joint distribution has few cells.
            let samples = spec.samples_drafts();
            let mut request = request(&prompt, 3, 4, requests::with_top_k(&spec, 4));
            request.sampling.top_k = 4;
            // At a higher temperature, fewer answers fill the cells.
            let (runs, temperature) = if requests::exhaustive() { (1000, 1.0) } else { (250, 1.5) };
            request.sampling.temperature = temperature;
            let accepted = models.check(&request, runs);
            assert!(accepted > 0.2 || !samples, "hardly any draft is accepted: {accepted}");
        }
    });
}

#[test]
fn tiny_answers_have_the_targets_distribution() {
    let models = tiny();
    ops::on_threads(None, || {
        for method in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
            for temperature in [0.0, 0.5, 2.0] {
                // Larger trees have more siblings than there are tokens to sample.
                for tree in [None, Some(4), Some(9), Some(16)] {
                    let spec = requests::with_top_k(&requests::spec(method, temperature, tree), 3);
                    models.check(
                        &request(&[1, 2, 3], 4, 4, spec),
                        if requests::exhaustive() { 6000 } else { 1000 },
                    );
                }
            }
        }
    });
}

#[test]
fn greedy_drafts_are_accepted_as_often_as_under_match() {
    let models = tiny();
    ops::on_threads(None, || {
        let mean = |method| models.check(&request(&[3, 1], 5, 5, chain_spec(method, 0.0)), 4000);
        let [by_match, by_token, by_block] =
            [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block].map(mean);
        assert!((by_match - by_token).abs() < 0.05, "{by_match} {by_token}");
        assert!((by_match - by_block).abs() < 0.05, "{by_match} {by_block}");
    });
}

#[test]
fn greedy_answers_are_the_targets_best_tokens() {
    let models = demo();
    let greedy = |block, spec| Request { spec, ..requests::request(&tokens(PROMPTS[0]), 60, block, 0.0) };
    ops::on_threads(None, || {
        let ar = run(&mut models.slots(1), &greedy(1, SpecConfig::default()));
        for method in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
            for temperature in [0.0, 1.0] {
                for tree in [None, Some(12)] {
                    let spec = requests::spec(method, temperature, tree);
                    let got = run(&mut models.slots(1), &greedy(8, spec));
                    assert_eq!(got.tokens, ar.tokens, "{method:?}, drafts at {temperature}, {tree:?}");
                }
            }
        }
    });
}

#[test]
fn coupled_drafts_change_no_token() {
    let models = demo();
    ops::on_threads(None, || {
        for text in PROMPTS {
            let prompt = tokens(text);
            let ar = run(&mut models.slots(1), &request(&prompt, 80, 1, SpecConfig::default()));
            let best = run(&mut models.slots(1), &request(&prompt, 80, 16, SpecConfig::default()));
            for temperature in [0.3, 1.0, 3.0] {
                let spec = chain_spec(VerifyMethod::Match, temperature);
                let coupled = run(&mut models.slots(1), &request(&prompt, 80, 16, spec));
                assert_eq!(coupled.tokens, ar.tokens, "{text:?}");
                assert_ne!(coupled.accepted, best.accepted, "{text:?}: the drafts are not coupled");
            }
        }
    });
}

#[test]
fn devices_couple_drafts_as_the_cpu_does() {
    use dflash::engine::generate::Backend;
    let models = demo();
    let pair = Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    let device = Box::new(crate::support::test_gpu::TestGpu::new());
    let config = dflash::gpu::batch_config::BatchConfig::new(2, 8, 128);
    let backend = DeviceBackend::load("softgpu", device, &pair, config, &mut |_| ()).unwrap();
    let mut decoder = backend.decoder().unwrap();
    let rounds = |outcome: &Outcome| outcome.accepted.len();
    let (mut by_device, mut by_cpu, mut best) = (0usize, 0usize, 0usize);
    for text in &PROMPTS[..2] {
        let prompt = tokens(text);
        let with = |block, spec| request(&prompt, 14, block, spec);
        let best_match = run(&mut *decoder, &with(8, SpecConfig::default()));
        // One temperature for each; exhaustive: both.
        let first = text == &PROMPTS[0];
        let temperatures = [0.5, 1.5].into_iter().filter(|t| requests::exhaustive() || first == (*t < 1.0));
        for temperature in temperatures {
            best += rounds(&best_match);
            let coupled = with(8, chain_spec(VerifyMethod::Match, temperature));
            let got = run(&mut *decoder, &coupled);
            assert_eq!(got.tokens, best_match.tokens, "{text:?}");
            by_device += rounds(&got);
            by_cpu += rounds(&ops::on_threads(None, || run(&mut models.slots(1), &coupled)));
        }
        if !first {
            continue;
        }
        let ar = run(&mut *decoder, &with(1, SpecConfig::default()));
        assert_eq!(best_match.tokens, ar.tokens, "{text:?}");
        // Also coupled drafts of a greedy answer, alone and with another request in the same rounds.
        let mut greedy = with(8, chain_spec(VerifyMethod::Match, 1.0));
        greedy.sampling.temperature = 0.0;
        let alone = run(&mut *decoder, &greedy);
        let cold = Request { block: 1, ..greedy.clone() };
        assert_eq!(alone.tokens, run(&mut *decoder, &cold).tokens, "{text:?}");
        let others = with(8, SpecConfig::default());
        let both = run_together(&mut *decoder, &[greedy, others], keep_going);
        assert_eq!([&both[0].tokens, &both[1].tokens], [&alone.tokens, &ar.tokens], "{text:?}");
    }
    assert!(by_device.abs_diff(by_cpu) <= 2, "{by_device} {by_cpu} {best}");
    assert!(by_device < best, "{by_device} {by_cpu} {best}");
}

#[test]
fn coupled_choices_agree_as_often_as_published() {
    // Daliri et al.: the sum over i of 1 / sum_j max(p_j / p_i, q_j / q_i), at least (1 - d) / (1 + d) for
    // total variation distance d.
    let rows: [([f32; 4], [f32; 4]); 3] = [
        ([1.0, 0.25, -0.5, -3.0], [0.0, 1.0, -0.5, -1.0]),
        ([2.0, 2.0, 2.0, 2.0], [2.0, 1.5, 1.0, 0.5]),
        ([3.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0]),
    ];
    for (p, q) in rows {
        let sampling =
            SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 5, stream: 1 };
        let shares = |row: &[f32]| {
            let weights = sampling.survivors(row).unwrap();
            let total: u64 = weights.iter().map(|&(_, w)| w).sum();
            weights.iter().map(|&(_, w)| w as f64 / total as f64).collect::<Vec<f64>>()
        };
        let (a, b) = (shares(&p), shares(&q));
        let one = |i: usize| 1.0 / (0..4).map(|j| (a[j] / a[i]).max(b[j] / b[i])).sum::<f64>();
        let expected: f64 = (0..4).map(one).sum();
        let distance = (0..4).map(|i| (a[i] - b[i]).abs()).sum::<f64>() / 2.0;
        assert!(expected >= (1.0 - distance) / (1.0 + distance) && expected <= 1.0 - distance);
        let positions = 1 << 17;
        let same = (0..positions).filter(|&at| sampling.choose(&p, at) == sampling.choose(&q, at)).count();
        let found = same as f64 / f64::from(positions);
        // Four standard deviations are 0.0055.
        assert!((found - expected).abs() < 0.0055, "{found} instead of {expected}");
        // With independent noise they agree less often.
        let independent = SamplingParams { stream: 2, ..sampling.clone() };
        let same = (0..positions).filter(|&at| sampling.choose(&p, at) == independent.choose(&q, at)).count();
        assert!((same as f64 / f64::from(positions)) < found - 0.05);
    }
}

#[test]
fn answers_with_sampled_drafts_depend_on_the_seed_only() {
    let models = demo();
    ops::on_threads(None, || {
        for (method, tree) in [VerifyMethod::Rejection, VerifyMethod::Block]
            .into_iter()
            .flat_map(|r| [(r, None), (r, Some(12))])
        {
            let of = |i: u32| {
                let prompt: Vec<u32> = tokens(PROMPTS[i as usize % 2]);
                let spec = requests::spec(method, 1.0, tree);
                let mut one = request(&prompt, 20 + i as usize, 8, spec);
                one.sampling.stream = i;
                one
            };
            let requests: Vec<Request> = (0..4).map(of).collect();
            let alone: Vec<_> = requests.iter().map(|one| run(&mut models.slots(1), one)).collect();
            let batch = run_together(&mut models.slots(3), &requests, keep_going);
            for (i, (a, b)) in alone.iter().zip(&batch).enumerate() {
                assert_eq!((&a.tokens, &a.accepted), (&b.tokens, &b.accepted), "request {i}");
            }
            // Equal prompts have different streams; another seed gives another answer.
            assert_ne!(alone[0].tokens, alone[2].tokens[..20]);
            let mut seed = requests[0].clone();
            seed.sampling.seed += 1;
            assert_ne!(run(&mut models.slots(1), &seed).tokens, alone[0].tokens);
        }
    });
}

#[test]
fn every_round_draws_by_its_number_and_its_anchors_position() {
    let Models(target, drafter) = &tiny();
    let vocab = target.config.vocab;
    for (method, max) in
        [VerifyMethod::Rejection, VerifyMethod::Block].into_iter().flat_map(|r| [(r, None), (r, Some(11))])
    {
        let request = request(&[1, 2, 3], 40, 5, requests::spec(method, 1.5, max));
        let own = &request.sampling;
        let (seed, stream) = (own.seed, own.stream);
        // A minimal version of the engine's loop.
        let new_cache = |stack| Cache::new(stack, 64).unwrap();
        let (mut cache, mut context) = (new_cache(&target.config.stack), new_cache(&drafter.config.stack));
        let (mut features, mut logits) = (Vec::new(), Vec::new());
        let normed = target.forward(&request.prompt, &mut cache, &drafter.config.taps, &mut features, 1);
        target.logits(&normed, &mut logits);
        let mut out = vec![own.choose(&logits, 3).unwrap()];
        for round in 1.. {
            if out.len() >= 40 {
                break;
            }
            let (at, anchor) = (cache.len(), *out.last().unwrap());
            drafter.inject(&features, &mut context);
            let hidden = drafter.hidden(target, anchor, 5, &mut context, |_, _| ());
            drafter.logits(target, &hidden[target.config.stack.hidden..], &mut logits);
            let distribution =
                |row: &[f32]| request.spec.draft_sampling().unwrap().probabilities(row).unwrap();
            let mut distributions: Vec<_> = logits.chunks(vocab).map(distribution).collect();
            let mut draws = PhiloxStream { seed, stream, round, anchor: at as u32 };
            let (tokens, parents) = match (method, max) {
                (_, None) => sample_chains(anchor, 1, &distributions, &mut draws).unwrap(),
                (VerifyMethod::Block, Some(max)) => {
                    let (count, depth) = chains(max, 4);
                    distributions.truncate(depth);
                    sample_chains(anchor, count, &distributions, &mut draws).unwrap()
                }
                (_, Some(max)) => {
                    let parents = shape(max, 4).parents;
                    (
                        sample_tree(anchor, &parents, &distributions, Siblings::Distinct, &mut draws)
                            .unwrap(),
                        parents,
                    )
                }
            };
            let tree = Tree::sampled(&tokens, &parents);
            let normed = target.forward_tree(&tree, &mut cache, &drafter.config.taps, &mut features);
            target.logits(&normed, &mut logits);
            let distribution = |row: usize| own.probabilities(&logits[row * vocab..][..vocab]);
            let (tokens, parents) = (&tree.tokens[..], &tree.parents[..]);
            let chain = |(accepted, next): (usize, u32)| ((0..=accepted).collect::<Vec<usize>>(), next);
            let verified = match (method, max) {
                (VerifyMethod::Rejection, None) => {
                    rejection(&tokens[1..], &distributions, distribution, &mut draws).map(chain)
                }
                (_, None) => block_verify(&tokens[1..], &distributions, distribution, &mut draws).map(chain),
                (VerifyMethod::Block, _) => {
                    multi_draft_block_verify(tokens, &distributions, distribution, &mut draws)
                }
                _ => recursive_rejection(
                    tokens,
                    parents,
                    &distributions,
                    Siblings::Distinct,
                    distribution,
                    &mut draws,
                ),
            };
            let (path, next) = verified.unwrap();
            // A second pass over the accepted rows leaves the cache as a chain does.
            let accepted: Vec<u32> = path.iter().map(|&row| tokens[row]).collect();
            cache.crop(at);
            features.clear();
            target.forward(&accepted, &mut cache, &drafter.config.taps, &mut features, 1);
            out.extend(&accepted[1..]);
            out.push(next);
        }
        let got = ops::on_threads(None, || {
            run(&mut Sequences::new(target, Some(drafter), 1, usize::MAX), &request)
        });
        assert_eq!(got.tokens, out[..40], "{method:?}, {max:?}");
    }
}

#[test]
fn a_block_of_one_row_is_ar_decoding_under_every_method() {
    let models = tiny();
    ops::on_threads(None, || {
        let ar = run(&mut models.slots(1), &request(&[1, 2], 40, 1, SpecConfig::default()));
        for method in [VerifyMethod::Rejection, VerifyMethod::Block] {
            let got = run(&mut models.slots(1), &request(&[1, 2], 40, 1, chain_spec(method, 1.0)));
            assert_eq!(got.tokens, ar.tokens);
        }
    });
}

/// A round with more drafts than a controller's path has bits.
#[test]
fn a_block_of_a_hundred_drafts_can_be_accepted_whole() {
    let (target, drafter) = requests::tiny();
    let target = support::Target { vocab: 1, ..target };
    let drafter = support::Drafter { block: 101, mask_token: 0, ..drafter };
    let models = load(&requests::open(&support::write_pair(&target, &drafter)));
    ops::on_threads(None, || {
        for method in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
            let got = run(&mut models.slots(1), &request(&[0], 103, 101, chain_spec(method, 1.0)));
            assert_eq!((got.accepted, got.tokens.len()), (vec![101, 101], 103), "{method:?}");
        }
    });
}

#[test]
fn sampled_trees_are_less_deep_at_the_last_positions() {
    let (target, mut drafter) = requests::tiny();
    drafter.max_positions = 24;
    let Models(target, drafter) = load(&requests::open(&support::write_pair(&target, &drafter)));
    ops::on_threads(None, || {
        for method in [VerifyMethod::Rejection, VerifyMethod::Block] {
            let (mut cut, mut none) = (0, 0);
            for max in [2, 3, 7, 16, 64] {
                let mut sequence = Sequence::new(&target, Some(&drafter));
                sequence.start(&request(&[1, 2, 3], 40, 6, tree(method, 1.0, max))).unwrap();
                sequence.prefill().unwrap();
                let mut out = Vec::new();
                while out.len() < 36 {
                    let rows = sequence.rows();
                    let drafts = sequence.round(&mut out).unwrap();
                    let whole = match method {
                        VerifyMethod::Block => {
                            let (count, depth) = chains(max, rows.max(2) - 1);
                            count * depth
                        }
                        _ => max - 1,
                    };
                    assert_eq!(drafts, if rows > 1 { whole } else { 0 }, "{method:?} {max}, {rows} rows");
                    cut += usize::from((2..6).contains(&rows));
                    none += usize::from(rows == 1);
                }
            }
            assert!(cut > 0 && none > 5, "{method:?}: {cut} {none}");
        }
    });
}

#[test]
fn sampling_methods_refuse_drafts_without_distributions() {
    let models = tiny();
    let mut sequence = Sequence::new(&models.0, Some(&models.1));
    sequence.start(&request(&[1, 2], 10, 4, chain_spec(VerifyMethod::Block, 1.0))).unwrap();
    sequence.prefill().unwrap();
    let error = sequence.verify(&[1, 1, 1], &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "drafts without the distributions that they were sampled from");
    let error = sequence.verify_tree(&Tree::sampled(&[1, 1, 1], &[0, 0, 0]), &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "drafts without the distributions that they were sampled from");
}

// ---- flags ----

fn record(args: &[&str]) -> Value {
    let tokens = if args.contains(&"cuda") { "8" } else { "40" };
    program::run([&["--json", "import os\n", "-n", tokens, "--seed", "3"], args].concat()).json().remove(0)
}

#[test]
fn verify_selects_the_method_and_the_record_names_it() {
    let hot = ["--temperature", "1"];
    let (matched, greedy) = (record(&hot), record(&[]));
    for (method, other) in [("match", false), ("rejection", true), ("block", true)] {
        let args = [&hot[..], &["--verify", method]].concat();
        let got = record(&args);
        assert_eq!((&got["verify"], &got["device"]), (&Value::from(method), &Value::from("cpu")));
        assert_eq!(got["tokens"] != matched["tokens"], other, "{method}");
        assert_eq!(record(&args)["tokens"], got["tokens"], "the seed gives {method}'s text again");
        // Greedy answers do not depend on the method.
        assert_eq!(record(&["--verify", method])["tokens"], greedy["tokens"]);
        if other {
            let cold = record(&[&args[..], &["--draft-temperature", "0.3"]].concat());
            assert_ne!(cold["tokens"], got["tokens"], "--draft-temperature has no effect");
            let same = record(&[&args[..], &["--draft-temperature", "1"]].concat());
            assert_eq!(same["tokens"], got["tokens"], "by default it is --temperature");
        }
    }
    for method in ["rejection", "block"] {
        let args = [&hot[..], &["--verify", method]].concat();
        let (chain, tree) = (record(&args), record(&[&args[..], &["--tree", "20", "--block", "8"]].concat()));
        assert_eq!((&tree["verify"], &tree["tree"]), (&Value::from(method), &Value::from(20)));
        assert_ne!(tree["tokens"], chain["tokens"], "{method}");
        let drafted = tree["drafted"].as_array().unwrap();
        // Four chains of 4 drafts fit, or all rows of a tree.
        assert_eq!(drafted[0], if method == "block" { 16 } else { 19 });
    }
    for (method, more) in [("rejection", &[][..]), ("block", &[]), ("block", &["--tree", "9"])] {
        let args = [&hot[..], &["--verify", method, "--device", "cuda"], more].concat();
        let got = record(&args);
        assert_eq!((&got["verify"], &got["device"]), (&Value::from(method), &Value::from("softgpu")));
        // Two of the three; exhaustive: all.
        if method == "rejection" || !more.is_empty() || requests::exhaustive() {
            assert_eq!(record(&args)["tokens"], got["tokens"], "the seed gives {method}'s text again");
        }
    }
    let coupled = record(&[&hot[..], &["--coupled"]].concat());
    assert_eq!(coupled["tokens"], matched["tokens"]);
    assert_ne!(coupled["accepted"], matched["accepted"]);
    let best = record(&[&hot[..], &["--coupled", "--draft-temperature", "0"]].concat());
    assert_eq!(best["accepted"], matched["accepted"]);
}

#[test]
fn incompatible_flags_are_refused() {
    let cases: [(i32, &[&str], &str); 11] = [
        (
            2,
            &["--verify", "typical"],
            "invalid value 'typical' for '--verify <VERIFY>' [possible values: match, \
          rejection, block]",
        ),
        (
            2,
            &["--coupled", "--verify", "block"],
            "--coupled needs --verify match, but --verify is block, which samples drafts with noise of their own",
        ),
        (
            2,
            &["--draft-temperature", "1"],
            "--draft-temperature needs --coupled or --verify rejection or block: match \
          drafts the best tokens",
        ),
        (
            2,
            &["--verify", "block", "--draft-temperature", "-1"],
            "--draft-temperature is -1, expected 0 (greedy) \
          or 0.0001 to 10000",
        ),
        (
            2,
            &["--verify", "block", "--draft-temperature", "NaN"],
            "--draft-temperature is NaN, expected 0 \
          (greedy) or 0.0001 to 10000",
        ),
        (
            2,
            &["--verify", "rejection", "--draft", "none"],
            "--verify rejection needs a drafter, but --draft is none",
        ),
        (
            2,
            &["--coupled", "--block", "1"],
            "--block is 1, which is autoregressive decoding: --coupled expects at least 2",
        ),
        (
            2,
            &["--verify", "block", "--compare"],
            "--compare needs --verify match: what block emits has the distribution of \
          autoregressive decoding, not its tokens",
        ),
        (
            2,
            &["--verify", "rejection", "--check-lossless"],
            "--check-lossless needs --verify match: what rejection \
          emits has the distribution of autoregressive decoding, not its tokens",
        ),
        (
            2,
            &["--tree", "9", "--coupled"],
            "--tree is for the drafter's best tokens, but with --coupled drafts are sampled",
        ),
        (
            2,
            &["--adaptive", "--tree", "9", "--verify", "block"],
            "--adaptive with --tree needs --verify match, but --verify is block: how often a row of a sampled tree is \
          accepted depends on the size of the tree",
        ),
    ];
    for (code, args, sentence) in cases {
        let got = program::run([args, &["x"]].concat());
        assert_eq!((got.code, got.out.as_str()), (code, ""), "{args:?}: {got:?}");
        assert_eq!(got.err, format!("dflash-gen: {sentence}\n"), "{args:?}");
    }
}
