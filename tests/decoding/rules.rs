//! `--verify` and drafts that are drawn, on the CPU engine: the distribution of whole generations against the target's, which the
//! target's own logits give exactly; what must not show in an answer; and the flags.

use crate::support;
use crate::support::crowd;
use crate::support::distribution;
use crate::support::program;

use crowd::{Silent, go_on, run, together};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET};
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
use serde_json::Value;

struct Models(Target, Drafter);

fn load(pair: &Pair) -> Models {
    Models(Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter.as_ref().unwrap()).unwrap())
}

fn demo() -> Models {
    load(&Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap())
}

/// Four tokens, so that whatever is drafted is often accepted and often not.
fn tiny() -> Models {
    let (target, drafter) = crowd::tiny();
    load(&crowd::open(&support::write_pair(&target, &drafter)))
}

impl Models {
    fn slots(&self, slots: usize) -> Sequences<'_> {
        Sequences::new(&self.0, Some(&self.1), slots, usize::MAX)
    }

    /// Holds `runs` answers to `request`, of as many seeds, against the target's distribution. Returns the drafts accepted per round.
    fn check(&self, request: &Request, runs: u64) -> f64 {
        let distribution =
            distribution::distribution(&self.0, &request.prompt, &request.sampling, request.max_tokens);
        let (mut decoder, what) = (self.slots(1), &request.spec);
        let mut accepted = Vec::new();
        let answer = |seed| {
            let sampling = SamplingParams { seed, ..request.sampling.clone() };
            let request = Request { sampling, ..request.clone() };
            let outcome = resume(&mut decoder, &request, &mut Silent).unwrap();
            accepted.extend(outcome.accepted);
            outcome.tokens
        };
        distribution::check(what, &distribution, (0..runs).map(answer));
        let mean = (accepted.iter().sum::<usize>() - accepted.len()) as f64 / accepted.len() as f64;
        println!("{what:?}: {mean:.3} drafts a round");
        mean
    }
}

fn drafting(rule: VerifyMethod, temperature: f32) -> SpecConfig {
    crowd::spec(rule, temperature, None)
}

fn tree(rule: VerifyMethod, temperature: f32, rows: usize) -> SpecConfig {
    crowd::spec(rule, temperature, Some(rows))
}

fn request(prompt: &[u32], max_tokens: usize, block: usize, spec: SpecConfig) -> Request {
    Request { spec, ..crowd::request(prompt, max_tokens, block, 1.0) }
}

const PROMPTS: [&str; 3] =
    ["import os\nimport sys\n\ndef main(", "class Reader:\n    def __init__(self, ", "for i in range("];

fn tokens(text: &str) -> Vec<u32> {
    Text::open(&DEMO_TARGET, None).unwrap().encode(text).unwrap()
}

#[test]
fn the_first_tokens_of_the_demo_pair_have_the_targets_law_under_every_rule() {
    let models = demo();
    // Where the target hesitates and the drafter is right at times: in the answer to a prompt of the reference's.
    let oracle: Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let said = oracle["prompts"][18]["output_ids"].as_array().unwrap().iter();
    let prompt: Vec<u32> = said.take(135).map(|id| id.as_u64().unwrap() as u32).collect();
    ops::install(|| {
        for how in [
            drafting(VerifyMethod::Match, 0.0),
            drafting(VerifyMethod::Match, 1.0),
            drafting(VerifyMethod::Rejection, 1.0),
            drafting(VerifyMethod::Block, 1.0),
            tree(VerifyMethod::Rejection, 1.0, 9),
            tree(VerifyMethod::Block, 1.0, 10),
        ] {
            // So few survivors that their joint distribution can be counted.
            let drawn = how.samples_drafts();
            let mut request = request(&prompt, 3, 4, crowd::with_top_k(&how, 4));
            request.sampling.top_k = 4;
            let stand = models.check(&request, 1000);
            assert!(stand > 0.2 || !drawn, "hardly a draft stands: {stand}");
        }
    });
}

#[test]
fn four_tokens_of_a_tiny_pair_have_the_targets_law_under_every_rule() {
    let models = tiny();
    ops::install(|| {
        for rule in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
            for temperature in [0.0, 0.5, 2.0] {
                // Trees have more siblings than there are tokens to draw.
                for tree in [None, Some(4), Some(9), Some(16)] {
                    let spec = crowd::with_top_k(&crowd::spec(rule, temperature, tree), 3);
                    models.check(&request(&[1, 2, 3], 4, 4, spec), 6000);
                }
            }
        }
    });
}

#[test]
fn drafts_that_are_the_best_tokens_stand_as_often_as_under_match() {
    let models = tiny();
    ops::install(|| {
        let mean = |rule| models.check(&request(&[3, 1], 5, 5, drafting(rule, 0.0)), 4000);
        let [by_match, by_token, by_block] =
            [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block].map(mean);
        assert!((by_match - by_token).abs() < 0.05, "{by_match} {by_token}");
        assert!((by_match - by_block).abs() < 0.05, "{by_match} {by_block}");
    });
}

#[test]
fn greedy_answers_are_the_targets_best_tokens_under_every_rule() {
    let models = demo();
    let greedy = |block, spec| Request { spec, ..crowd::request(&tokens(PROMPTS[0]), 60, block, 0.0) };
    ops::install(|| {
        let plain = run(&mut models.slots(1), &greedy(1, SpecConfig::default()));
        for rule in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
            for temperature in [0.0, 1.0] {
                for tree in [None, Some(12)] {
                    let how = crowd::spec(rule, temperature, tree);
                    let got = run(&mut models.slots(1), &greedy(8, how));
                    assert_eq!(got.tokens, plain.tokens, "{rule:?}, drafts at {temperature}, {tree:?}");
                }
            }
        }
    });
}

#[test]
fn coupled_drafts_change_no_token() {
    let models = demo();
    ops::install(|| {
        for text in PROMPTS {
            let prompt = tokens(text);
            let plain = run(&mut models.slots(1), &request(&prompt, 80, 1, SpecConfig::default()));
            let best = run(&mut models.slots(1), &request(&prompt, 80, 16, SpecConfig::default()));
            for temperature in [0.3, 1.0, 3.0] {
                let how = drafting(VerifyMethod::Match, temperature);
                let coupled = run(&mut models.slots(1), &request(&prompt, 80, 16, how));
                assert_eq!(coupled.tokens, plain.tokens, "{text:?}");
                assert_ne!(coupled.accepted, best.accepted, "{text:?}: other drafts");
            }
        }
    });
}

#[test]
fn devices_couple_drafts_as_the_cpu_does() {
    use dflash::engine::generate::Backend;
    let models = demo();
    let pair = Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    let device = Box::new(dflash::gpu::emulator::Emulator::new());
    let room = dflash::gpu::batch_config::BatchConfig::new(2, 8, 128);
    let backend = DeviceBackend::load("emulator", device, &pair, room, &mut |_, _| ()).unwrap();
    let mut decoder = backend.decoder().unwrap();
    let stood = |outcome: &Outcome| outcome.accepted.iter().sum::<usize>();
    let (mut by_device, mut by_cpu, mut best) = (0usize, 0usize, 0usize);
    for text in &PROMPTS[..2] {
        let prompt = tokens(text);
        let with = |block, how| request(&prompt, 20, block, how);
        let plain = run(&mut *decoder, &with(1, SpecConfig::default()));
        for temperature in [0.5, 1.5] {
            let coupled = with(8, drafting(VerifyMethod::Match, temperature));
            let got = run(&mut *decoder, &coupled);
            assert_eq!(got.tokens, plain.tokens, "{text:?}");
            by_device += stood(&got);
            by_cpu += stood(&ops::install(|| run(&mut models.slots(1), &coupled)));
        }
        best += 2 * stood(&run(&mut *decoder, &with(8, SpecConfig::default())));
        // Drafts of a greedy answer too, and those of others in the same rounds.
        let mut greedy = with(8, drafting(VerifyMethod::Match, 1.0));
        greedy.sampling.temperature = 0.0;
        let alone = run(&mut *decoder, &greedy);
        let cold = Request { block: 1, ..greedy.clone() };
        assert_eq!(alone.tokens, run(&mut *decoder, &cold).tokens, "{text:?}");
        let others = with(8, SpecConfig::default());
        let both = together(&mut *decoder, &[greedy, others], go_on);
        assert_eq!([&both[0].tokens, &both[1].tokens], [&alone.tokens, &plain.tokens], "{text:?}");
    }
    assert!(by_device.abs_diff(by_cpu) <= 2, "{by_device} {by_cpu} {best}");
    assert!(by_device > best, "{by_device} {by_cpu} {best}");
}

#[test]
fn the_same_noise_chooses_alike_as_often_as_published() {
    // Daliri et al.: the sum of 1 / sum_j max(p_j / p_i, q_j / q_i) over i, at least (1 - d) / (1 + d) at distance d.
    let rows: [([f32; 4], [f32; 4]); 3] = [
        ([1.0, 0.25, -0.5, -3.0], [0.0, 1.0, -0.5, -1.0]),
        ([2.0, 2.0, 2.0, 2.0], [2.0, 1.5, 1.0, 0.5]),
        ([3.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0]),
    ];
    for (p, q) in rows {
        let sampling =
            SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 5, stream: 1 };
        let share = |row: &[f32]| {
            let weights = sampling.survivors(row).unwrap();
            let total: u64 = weights.iter().map(|&(_, w)| w).sum();
            weights.iter().map(|&(_, w)| w as f64 / total as f64).collect::<Vec<f64>>()
        };
        let (a, b) = (share(&p), share(&q));
        let one = |i: usize| 1.0 / (0..4).map(|j| (a[j] / a[i]).max(b[j] / b[i])).sum::<f64>();
        let expected: f64 = (0..4).map(one).sum();
        let apart = (0..4).map(|i| (a[i] - b[i]).abs()).sum::<f64>() / 2.0;
        assert!(expected >= (1.0 - apart) / (1.0 + apart) && expected <= 1.0 - apart);
        let positions = 1 << 17;
        let same = (0..positions).filter(|&at| sampling.choose(&p, at) == sampling.choose(&q, at)).count();
        let found = same as f64 / f64::from(positions);
        // Four standard deviations are 0.0055.
        assert!((found - expected).abs() < 0.0055, "{found} instead of {expected}");
        // Two draws of noise of their own are alike less often.
        let strange = SamplingParams { stream: 2, ..sampling.clone() };
        let same = (0..positions).filter(|&at| sampling.choose(&p, at) == strange.choose(&q, at)).count();
        assert!((same as f64 / f64::from(positions)) < found - 0.05);
    }
}

#[test]
fn answers_of_drawn_drafts_are_the_seeds_and_not_the_slots_or_the_others() {
    let models = demo();
    ops::install(|| {
        for (rule, tree) in [VerifyMethod::Rejection, VerifyMethod::Block]
            .into_iter()
            .flat_map(|r| [(r, None), (r, Some(12))])
        {
            let of = |i: u32| {
                let prompt: Vec<u32> = tokens(PROMPTS[i as usize % 2]);
                let how = crowd::spec(rule, 1.0, tree);
                let mut one = request(&prompt, 20 + i as usize, 8, how);
                one.sampling.stream = i;
                one
            };
            let requests: Vec<Request> = (0..4).map(of).collect();
            let alone: Vec<_> = requests.iter().map(|one| run(&mut models.slots(1), one)).collect();
            let crowd = together(&mut models.slots(3), &requests, go_on);
            for (i, (a, b)) in alone.iter().zip(&crowd).enumerate() {
                assert_eq!((&a.tokens, &a.accepted), (&b.tokens, &b.accepted), "request {i}");
            }
            // Prompts of the same words sample from streams of their own, and other seeds are other answers.
            assert_ne!(alone[0].tokens, alone[2].tokens[..20]);
            let mut seed = requests[0].clone();
            seed.sampling.seed += 1;
            assert_ne!(run(&mut models.slots(1), &seed).tokens, alone[0].tokens);
        }
    });
}

#[test]
fn every_round_has_words_of_its_own_number_and_its_anchors_position() {
    let Models(target, drafter) = &tiny();
    let vocab = target.config.vocab;
    for (rule, most) in
        [VerifyMethod::Rejection, VerifyMethod::Block].into_iter().flat_map(|r| [(r, None), (r, Some(11))])
    {
        let request = request(&[1, 2, 3], 40, 5, crowd::spec(rule, 1.5, most));
        let own = &request.sampling;
        let (seed, stream) = (own.seed, own.stream);
        // The engine's loop again, as short as it can be.
        let room = |stack| Cache::new(stack, 64).unwrap();
        let (mut cache, mut context) = (room(&target.config.stack), room(&drafter.config.stack));
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
            let mut dice = PhiloxStream { seed, stream, round, anchor: at as u32 };
            let drawn = match (rule, most) {
                (_, None) => sample_chains(anchor, 1, &distributions, &mut dice).unwrap(),
                (VerifyMethod::Block, Some(most)) => {
                    let (count, depth) = chains(most, 4);
                    distributions.truncate(depth);
                    sample_chains(anchor, count, &distributions, &mut dice).unwrap()
                }
                (_, Some(most)) => {
                    let parents = shape(most, 4).parents;
                    (
                        sample_tree(anchor, &parents, &distributions, Siblings::Distinct, &mut dice).unwrap(),
                        parents,
                    )
                }
            };
            let tree = Tree::sampled(&drawn.0, &drawn.1);
            let normed = target.forward_tree(&tree, &mut cache, &drafter.config.taps, &mut features);
            target.logits(&normed, &mut logits);
            let distribution = |row: usize| own.probabilities(&logits[row * vocab..][..vocab]);
            let (tokens, parents) = (&tree.tokens[..], &tree.parents[..]);
            let chain = |(accepted, next): (usize, u32)| ((0..=accepted).collect::<Vec<usize>>(), next);
            let judged = match (rule, most) {
                (VerifyMethod::Rejection, None) => {
                    rejection(&tokens[1..], &distributions, distribution, &mut dice).map(chain)
                }
                (_, None) => block_verify(&tokens[1..], &distributions, distribution, &mut dice).map(chain),
                (VerifyMethod::Block, _) => {
                    multi_draft_block_verify(tokens, &distributions, distribution, &mut dice)
                }
                _ => recursive_rejection(
                    tokens,
                    parents,
                    &distributions,
                    Siblings::Distinct,
                    distribution,
                    &mut dice,
                ),
            };
            let (path, next) = judged.unwrap();
            // The cache as a chain leaves it, by another pass over what stood.
            let stood: Vec<u32> = path.iter().map(|&row| tokens[row]).collect();
            cache.crop(at);
            features.clear();
            target.forward(&stood, &mut cache, &drafter.config.taps, &mut features, 1);
            out.extend(&stood[1..]);
            out.push(next);
        }
        let got = ops::install(|| run(&mut Sequences::new(target, Some(drafter), 1, usize::MAX), &request));
        assert_eq!(got.tokens, out[..40], "{rule:?}, {most:?}");
    }
}

#[test]
fn a_block_of_one_row_is_plain_decoding_whatever_the_rule() {
    let models = tiny();
    ops::install(|| {
        let plain = run(&mut models.slots(1), &request(&[1, 2], 40, 1, SpecConfig::default()));
        for rule in [VerifyMethod::Rejection, VerifyMethod::Block] {
            let got = run(&mut models.slots(1), &request(&[1, 2], 40, 1, drafting(rule, 1.0)));
            assert_eq!(got.tokens, plain.tokens);
        }
    });
}

/// More of them than a controller's bits are.
#[test]
fn a_block_of_a_hundred_drafts_stands_whole() {
    let (target, drafter) = crowd::tiny();
    let target = support::Target { vocab: 1, ..target };
    let drafter = support::Drafter { block: 101, mask_token: 0, ..drafter };
    let models = load(&crowd::open(&support::write_pair(&target, &drafter)));
    ops::install(|| {
        for rule in [VerifyMethod::Match, VerifyMethod::Rejection, VerifyMethod::Block] {
            let got = run(&mut models.slots(1), &request(&[0], 103, 101, drafting(rule, 1.0)));
            assert_eq!((got.accepted, got.tokens.len()), (vec![101, 101], 103), "{rule:?}");
        }
    });
}

#[test]
fn drawn_trees_get_less_deep_where_positions_end() {
    let (target, mut drafter) = crowd::tiny();
    drafter.max_positions = 24;
    let Models(target, drafter) = load(&crowd::open(&support::write_pair(&target, &drafter)));
    ops::install(|| {
        for rule in [VerifyMethod::Rejection, VerifyMethod::Block] {
            let (mut cut, mut none) = (0, 0);
            for most in [2, 3, 7, 16, 64] {
                let mut sequence = Sequence::new(&target, Some(&drafter));
                sequence.start(&request(&[1, 2, 3], 40, 6, tree(rule, 1.0, most))).unwrap();
                sequence.prefill().unwrap();
                let mut out = Vec::new();
                while out.len() < 36 {
                    let rows = sequence.rows();
                    let drafts = sequence.round(&mut out).unwrap();
                    let whole = match rule {
                        VerifyMethod::Block => {
                            let (count, depth) = chains(most, rows.max(2) - 1);
                            count * depth
                        }
                        _ => most - 1,
                    };
                    assert_eq!(drafts, if rows > 1 { whole } else { 0 }, "{rule:?} {most}, {rows} rows");
                    cut += usize::from((2..6).contains(&rows));
                    none += usize::from(rows == 1);
                }
            }
            assert!(cut > 0 && none > 5, "{rule:?}: {cut} {none}");
        }
    });
}

#[test]
fn drafts_that_somebody_else_made_have_no_law() {
    let models = tiny();
    let mut sequence = Sequence::new(&models.0, Some(&models.1));
    sequence.start(&request(&[1, 2], 10, 4, drafting(VerifyMethod::Block, 1.0))).unwrap();
    sequence.prefill().unwrap();
    let error = sequence.verify(&[1, 1, 1], &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "drafts without the distributions that they were sampled from");
    let error = sequence.verify_tree(&Tree::sampled(&[1, 1, 1], &[0, 0, 0]), &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "drafts without the distributions that they were sampled from");
}

// ---- flags ----

fn record(args: &[&str]) -> Value {
    program::run([&["--json", "import os\n", "-n", "40", "--seed", "3"], args].concat()).json().remove(0)
}

#[test]
fn verify_chooses_the_rule_and_the_record_names_it() {
    let hot = ["--temperature", "1"];
    let matched = record(&hot);
    for (rule, other) in [("match", false), ("rejection", true), ("block", true)] {
        let args = [&hot[..], &["--verify", rule]].concat();
        let got = record(&args);
        assert_eq!((&got["verify"], &got["device"]), (&Value::from(rule), &Value::from("cpu")));
        assert_eq!(got["tokens"] != matched["tokens"], other, "{rule}");
        assert_eq!(record(&args)["tokens"], got["tokens"], "the seed gives {rule}'s text again");
        // Greedy, all are the same.
        assert_eq!(record(&["--verify", rule])["tokens"], record(&[])["tokens"]);
        if other {
            let cold = record(&[&args[..], &["--draft-temperature", "0.3"]].concat());
            assert_ne!(cold["tokens"], got["tokens"], "--draft-temperature does something");
            let same = record(&[&args[..], &["--draft-temperature", "1"]].concat());
            assert_eq!(same["tokens"], got["tokens"], "by default it is --temperature");
        }
    }
    for rule in ["rejection", "block"] {
        let args = [&hot[..], &["--verify", rule]].concat();
        let (chain, tree) = (record(&args), record(&[&args[..], &["--tree", "20", "--block", "8"]].concat()));
        assert_eq!((&tree["verify"], &tree["tree"]), (&Value::from(rule), &Value::from(20)));
        assert_ne!(tree["tokens"], chain["tokens"], "{rule}");
        let drafted = tree["drafted"].as_array().unwrap();
        // Four chains of 4 fit, or all rows of a shape.
        assert_eq!(drafted[0], if rule == "block" { 16 } else { 19 });
    }
    for (rule, more) in [("rejection", &[][..]), ("block", &[]), ("block", &["--tree", "9"])] {
        let args = [&hot[..], &["--verify", rule, "--device", "emulator"], more].concat();
        let got = record(&args);
        assert_eq!((&got["verify"], &got["device"]), (&Value::from(rule), &Value::from("emulator")));
        assert_eq!(record(&args)["tokens"], got["tokens"], "the seed gives {rule}'s text again");
    }
    let coupled = record(&[&hot[..], &["--coupled"]].concat());
    assert_eq!(coupled["tokens"], matched["tokens"]);
    assert_ne!(coupled["accepted"], matched["accepted"]);
    let best = record(&[&hot[..], &["--coupled", "--draft-temperature", "0"]].concat());
    assert_eq!(best["accepted"], matched["accepted"]);
}

#[test]
fn flags_that_cannot_go_together_are_refused() {
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
