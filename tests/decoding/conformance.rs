//! Tests that pin down a DFlash implementation, after arXiv 2602.06036 and its reference implementation (see
//! `docs/dflash.md`). Values are compared with `support/dense.rs`, an independent model in f64 without
//! caches.

use crate::support;
use crate::support::dense;
use crate::support::requests;

use dflash::checkpoint::config::DrafterConfig;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{Checkpoint, Dtype};
use dflash::cpu::decoder::Sequence;
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::cpu::ops;
use dflash::engine::generate::{Decoder, Emitted, Finish, Outcome, Prefill, Request, generate};
use requests::{AcceptAll, seeded};
use serde_json::json;
use support::Random;

/// Bound of the norm-wise distance between f32 and f64 through a whole random model. The largest seen is
/// 7e-7.
const CLOSE: f64 = 2e-6;

fn open(target: Folder, drafter: Folder) -> (Target, Drafter) {
    let pair = Pair::open(target, Some(drafter)).unwrap();
    (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap())
}

fn load(pair: &support::Pair) -> (Target, Drafter) {
    open(support::disk(&pair.target), support::disk(&pair.drafter))
}

fn write(target: &support::Target, drafter: &support::Drafter) -> (Target, Drafter) {
    load(&support::write_pair(target, drafter))
}

fn random_tokens(seed: u64, vocab: usize, count: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.below(vocab) as u32).collect()
}

fn random_values(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.signed()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The features and the final-normed row of every token, with the tokens run in pieces of these lengths.
fn forward(target: &Target, tokens: &[u32], taps: &[usize], pieces: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let mut cache = Cache::new(&target.config.stack, tokens.len()).unwrap();
    let (mut features, mut normed) = (vec![], vec![]);
    let mut at = 0;
    for piece in pieces {
        let mut new = vec![];
        normed.extend(target.forward(&tokens[at..at + piece], &mut cache, taps, &mut new, *piece));
        features.extend(new);
        at += piece;
    }
    assert_eq!(at, tokens.len());
    (features, normed)
}

// ---- the target ----

#[test]
fn target_equals_a_dense_f64_model() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 });
    let base = support::Target::default();
    let cases = [
        base.clone(),
        support::Target {
            llama: true,
            tied: false,
            rope_scaling: llama3,
            dtype: Dtype::F16,
            shards: 3,
            ..base.clone()
        },
        support::Target {
            heads: 8,
            kv_heads: 1,
            head_dim: 128,
            dtype: Dtype::F32,
            shards: 2,
            ..base.clone()
        },
        support::Target {
            heads: 8,
            kv_heads: 2,
            head_dim: 64,
            hidden: 51,
            intermediate: 33,
            tied: false,
            ..base.clone()
        },
        support::Target { heads: 3, kv_heads: 3, head_dim: 80, layers: 3, rope_theta: 1e6, ..base.clone() },
        support::Target {
            llama: true,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            layers: 2,
            ..base.clone()
        },
        support::Target {
            llama: true,
            hidden: 7,
            intermediate: 1,
            heads: 5,
            kv_heads: 5,
            head_dim: 2,
            vocab: 3,
            rope_scaling: yarn,
            ..base.clone()
        },
        support::Target {
            hidden: 16,
            layers: 2,
            rope_scaling: json!({ "rope_type": "linear", "factor": 3.0 }),
            seed: 9,
            ..base.clone()
        },
    ];
    let taps = [0, 1];
    let mut worst: f64 = 0.0;
    for spec in &cases {
        let (target, _) = write(spec, &support::Drafter { taps: vec![0], ..Default::default() });
        let oracle = dense::Target::new(spec);
        worst = worst.max(compare_target(&target, &oracle, spec.vocab, &taps));
    }

    // Sliding layers, which `write_pair` does not write for targets.
    let pair = support::write_pair(&base, &support::Drafter::default());
    support::edit_json(&pair.target, "config.json", |config| {
        config["use_sliding_window"] = true.into();
        config["sliding_window"] = 9.into();
        config["layer_types"] =
            json!(["full_attention", "sliding_attention", "sliding_attention", "full_attention"]);
    });
    let mut oracle = dense::Target::new(&base);
    oracle.windows = vec![None, Some(9), Some(9), None];
    worst = worst.max(compare_target(&load(&pair).0, &oracle, base.vocab, &taps));
    println!("largest distance {worst:.1e}");
}

fn compare_target(target: &Target, oracle: &dense::Target, vocab: usize, taps: &[usize]) -> f64 {
    let tokens = random_tokens(5, vocab, 83);
    let states = oracle.states(&tokens);
    let (features, normed) = forward(target, &tokens, taps, &[83]);
    let mut logits = vec![];
    target.logits(&normed, &mut logits);
    let apart = [
        dense::distance(features.clone(), dense::features(&states, taps).into_iter().flatten()),
        dense::distance(logits, oracle.logits(states.last().unwrap()).into_iter().flatten()),
    ];
    let stack = &target.config.stack;
    assert!(
        apart.iter().all(|d| *d < CLOSE),
        "features and logits are {apart:?} from the oracle's: {stack:?}"
    );
    for pieces in [&[1; 83][..], &[64, 19], &[3, 16, 1, 2, 16, 16, 16, 13], &[15, 17, 51]] {
        let (f, n) = forward(target, &tokens, taps, pieces);
        assert_eq!(bits(&f), bits(&features), "features depend on the pieces {pieces:?}: {stack:?}");
        assert_eq!(bits(&n), bits(&normed), "outputs depend on the pieces {pieces:?}: {stack:?}");
    }
    apart[0].max(apart[1])
}

// ---- parameters ----

#[test]
fn parameters_follow_the_formula() {
    let folders = support::write_pair(&Default::default(), &Default::default());
    for folder in [DEMO_DRAFTER, Folder::Disk(folders.drafter.clone())] {
        let d = DrafterConfig::open(&folder).unwrap();
        let s = &d.stack;
        let (l, h, ff, n) = (s.attention.len(), s.hidden, s.intermediate, d.taps.len());
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let formula = l * (2 * h * q + 2 * h * kv + 2 * s.head_dim + 3 * h * ff + 2 * h) + n * h * h + 2 * h;
        let file = Checkpoint::open(&folder).unwrap();
        let stored: usize = file.list().iter().map(|(.., shape)| shape.iter().product::<usize>()).sum();
        assert_eq!((stored, support::parameters(&d.tensors())), (formula, formula as u64));
        assert_eq!(file.list().len(), 11 * l + 3);
    }
}

// ---- context ----

#[test]
fn context_in_pieces_equals_context_at_once() {
    let sliding = support::Drafter { sliding: vec![true, false], window: Some(4), ..Default::default() };
    for spec in [support::Drafter::default(), sliding] {
        let (target, drafter) = write(&Default::default(), &spec);
        let width = drafter.config.taps.len() * drafter.config.stack.hidden;
        let features = random_values(3, 20 * width);
        let run = |pieces: &[usize]| {
            let mut cache = Cache::new(&drafter.config.stack, 32).unwrap();
            let mut at = 0;
            for piece in pieces {
                drafter.inject(&features[at * width..(at + piece) * width], &mut cache);
                at += piece;
            }
            assert_eq!(cache.len(), 20);
            bits(&drafter.hidden(&target, 7, 8, &mut cache, |_, _| ()))
        };
        let whole = run(&[20]);
        assert_eq!(run(&[2, 1, 17]), whole);
        assert_eq!(run(&[1; 20]), whole);
        assert_eq!(run(&[16, 0, 4]), whole);
    }
}

// ---- blocks ----

#[test]
fn drafter_passes_equal_one_training_pass_over_all_blocks() {
    let base = support::Drafter::default();
    let sliding = |window, is_causal, layers: Vec<bool>| support::Drafter {
        layers: layers.len(),
        sliding: layers,
        window: Some(window),
        is_causal,
        ..base.clone()
    };
    let dflash = |value| support::Drafter { dflash: value, ..base.clone() };
    let rope = |value| support::Drafter { rope_scaling: value, rope_theta: 5e5, ..base.clone() };
    let cases = [
        ("full", base.clone()),
        ("full, causal", support::Drafter { is_causal: Some(true), ..base.clone() }),
        ("sliding, causal by default", sliding(5, None, vec![true, true])),
        ("sliding and full", sliding(6, None, vec![true, false, true])),
        ("sliding, not causal", sliding(5, Some(false), vec![true, true])),
        ("sliding, window 1", sliding(1, Some(false), vec![true])),
        ("window beyond the sequence", sliding(500, Some(false), vec![true, true])),
        ("input scale", dflash(json!({ "input_embedding_scale": 2.5 }))),
        (
            "multiplier and softcap",
            dflash(json!({ "output_multiplier": 0.3, "final_logit_softcapping": 2.0 })),
        ),
        ("half of the head rotated", dflash(json!({ "partial_rotary_factor": 0.5 }))),
        ("linear", rope(json!({ "rope_type": "linear", "factor": 2.0 }))),
        ("yarn", rope(json!({ "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 48 }))),
        (
            "llama3",
            rope(
                json!({ "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48 }),
            ),
        ),
        (
            "f16, one KV head",
            support::Drafter {
                heads: 8,
                kv_heads: 1,
                head_dim: 64,
                dtype: Dtype::F16,
                shards: 2,
                ..base.clone()
            },
        ),
        (
            "f32, taps in another order",
            support::Drafter { taps: vec![2, 0, 1], dtype: Dtype::F32, block: 16, ..base.clone() },
        ),
    ];
    let spec = support::Target::default();
    let oracle_target = dense::Target::new(&spec);
    let tokens = random_tokens(11, spec.vocab, 40);
    let states = oracle_target.states(&tokens);
    let blocks: Vec<(usize, u32)> =
        [1, 2, 5, 15, 16, 17, 31, 39].into_iter().map(|a| (a, tokens[a])).collect();
    let mut worst: f64 = 0.0;
    for (name, draft) in cases {
        let (target, drafter) = write(&spec, &draft);
        let oracle = dense::Drafter::new(&spec, &draft);
        let rows = draft.block;
        let pass = oracle.blocks(&oracle_target, &dense::features(&states, &draft.taps), &blocks, rows);
        let (features, _) = forward(&target, &tokens, &draft.taps, &[40]);
        let width = features.len() / tokens.len();
        for (b, (anchor, token)) in blocks.iter().enumerate() {
            let part = b * rows..(b + 1) * rows;
            let mut check = |what: &str, got: &[f32], expected: &[Vec<f64>]| {
                let apart = dense::distance(got.iter().copied(), expected.iter().flatten().copied());
                assert!(apart < CLOSE, "{name}, anchor {anchor}, {what}: {apart:.1e} from the training pass");
                worst = worst.max(apart);
            };
            let mut cache = Cache::new(&drafter.config.stack, 64).unwrap();
            drafter.inject(&features[..anchor * width], &mut cache);
            let mut layers = vec![];
            let hidden = drafter.hidden(&target, *token, rows, &mut cache, |_, x| layers.push(x.to_vec()));
            for (i, layer) in layers.iter().enumerate() {
                check(&format!("layer {i}"), layer, &pass.layers[i][part.clone()]);
            }
            let mut logits = vec![];
            drafter.logits(&target, &hidden, &mut logits);
            check("logits", &logits, &pass.logits[part]);
            assert_eq!(layers.len(), draft.layers);
            assert_eq!(cache.len(), *anchor, "the block's own keys stay out of the context");
        }
    }
    println!("largest distance {worst:.1e}");
}

// ---- masks ----

struct Block {
    target: Target,
    drafter: Drafter,
    /// `[positions][width]`
    features: Vec<f32>,
    width: usize,
}

impl Block {
    fn new(spec: &support::Drafter, positions: usize) -> Block {
        let (target, drafter) = write(&Default::default(), spec);
        let width = drafter.config.taps.len() * drafter.config.stack.hidden;
        Block { features: random_values(17, positions * width), target, drafter, width }
    }

    /// The rows of a block after features `0..s`. The value of feature `changed` differs. Features `s..held`
    /// were in the cache and have been cropped.
    fn rows(&self, s: usize, held: usize, changed: Option<usize>, anchor: u32, rows: usize) -> Vec<Vec<u32>> {
        let mut features = self.features[..held * self.width].to_vec();
        if let Some(at) = changed {
            features[at * self.width..][..self.width].iter_mut().for_each(|v| *v = 0.5 - *v);
        }
        let mut cache = Cache::new(&self.drafter.config.stack, 64).unwrap();
        self.drafter.inject(&features, &mut cache);
        cache.crop(s);
        let hidden = self.drafter.hidden(&self.target, anchor, rows, &mut cache, |_, _| ());
        hidden.chunks(self.drafter.config.stack.hidden).map(bits).collect()
    }
}

#[test]
fn a_block_attends_to_exactly_the_features_before_its_anchor() {
    let block = Block::new(&support::Drafter::default(), 24);
    let s = 13;
    let rows = block.rows(s, s, None, 5, 8);
    for later in s..24 {
        assert_eq!(block.rows(s, 24, Some(later), 5, 8), rows, "feature {later} is not before the anchor");
    }
    for earlier in 0..s {
        let other = block.rows(s, s, Some(earlier), 5, 8);
        assert!(rows.iter().zip(&other).all(|(a, b)| a != b), "some row does not see feature {earlier}");
    }
    let other = block.rows(s, s, None, 6, 8);
    assert!(rows.iter().zip(&other).all(|(a, b)| a != b), "some row does not see the anchor");
}

#[test]
fn a_window_counts_the_token_itself() {
    for is_causal in [None, Some(false)] {
        let window = 5;
        let spec = support::Drafter {
            layers: 1,
            sliding: vec![true],
            window: Some(window),
            is_causal,
            ..Default::default()
        };
        let block = Block::new(&spec, 13);
        let s = 13;
        let rows = block.rows(s, s, None, 5, 8);
        for feature in 0..s {
            let other = block.rows(s, s, Some(feature), 5, 8);
            for r in 0..8 {
                let sees = feature + window > s + r;
                assert_eq!(rows[r] != other[r], sees, "row {r}, feature {feature} of {s}");
            }
        }
        // The anchor is a key too: rows 0 to W - 1 attend to it.
        let other = block.rows(s, s, None, 6, 8);
        for r in 0..8 {
            assert_eq!(rows[r] != other[r], r < window, "row {r} and the anchor");
        }
    }
}

// ---- taps ----

#[test]
fn a_tap_is_the_residual_stream_after_its_layer() {
    // Channel 0 of every embedding is so large that normed rows are (sqrt(h), 0, ..) whatever the layers add.
    // Layer i adds a known constant to channel 1 + i only.
    let spec = support::Target { dtype: Dtype::F32, tied: false, ..Default::default() };
    let draft = support::Drafter { taps: vec![2, 0, 1], ..Default::default() };
    let pair = support::write_pair(&spec, &draft);
    let mut tensors = support::target_tensors(&spec);
    for t in &mut tensors {
        let layer = t.name.split('.').nth(2).and_then(|i| i.parse::<usize>().ok());
        let cols = t.shape[t.shape.len() - 1];
        if t.name.ends_with("norm.weight") {
            t.values.fill(1.0);
        } else if t.name.starts_with("model.embed")
            || t.name.contains("gate_proj")
            || t.name.contains("up_proj")
        {
            t.values.fill(0.0);
            let large = if t.name.starts_with("model.embed") { 1e4 } else { 1.0 };
            t.values.iter_mut().step_by(cols).for_each(|v| *v = large);
        } else if t.name.contains("v_proj") || t.name.contains("down_proj") {
            t.values.fill(0.0);
            if t.name.contains("down_proj") {
                t.values[(1 + layer.unwrap()) * cols] = 1.0 + layer.unwrap() as f32;
            }
        }
    }
    support::write_tensors(&pair.target, &tensors, spec.dtype, 1);
    let (target, drafter) = load(&pair);
    let (features, _) = forward(&target, &[3, 50, 96], &drafter.config.taps, &[3]);
    let hidden = spec.hidden;
    // silu(8) * 8 of the first gate, times the layer's factor
    let unit = 8.0 / (1.0 + (-8f32).exp()) * 8.0;
    assert_eq!(features.len(), 3 * 3 * hidden);
    for (at, tapped) in features.chunks(hidden).enumerate() {
        let tap = draft.taps[at % 3];
        for (channel, got) in tapped.iter().enumerate().skip(1) {
            let expected = if channel <= tap + 1 { channel as f32 * unit } else { 0.0 };
            assert!(
                (got - expected).abs() <= 1e-3 * expected,
                "tap {tap}, channel {channel}: {got}, not {expected}"
            );
        }
    }
}

// ---- the loop ----

/// A decoder that checks after the prompt and after every round that both models hold exactly the positions
/// before the anchor. `script` replaces the drafter: it returns the drafts for a block at (anchor position,
/// rows).
struct CheckedDecoder<'a> {
    sequence: Sequence<'a>,
    vocab: usize,
    context: usize,
    drafter: bool,
    held: usize,
    script: Option<&'a (dyn Fn(usize, usize) -> Vec<u32> + Sync)>,
}

impl<'a> CheckedDecoder<'a> {
    fn new(pair: &'a (Target, Drafter), speculative: bool) -> CheckedDecoder<'a> {
        let sequence = Sequence::new(&pair.0, speculative.then_some(&pair.1));
        let config = &pair.0.config;
        let (vocab, context) = (config.vocab, config.stack.max_positions);
        CheckedDecoder { sequence, vocab, context, drafter: speculative, held: 0, script: None }
    }

    fn check(&self) {
        assert_eq!(self.sequence.lengths(), Some((self.held, self.drafter.then_some(self.held))));
    }
}

impl Decoder for CheckedDecoder<'_> {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn slots(&self) -> usize {
        1
    }

    fn admit(&mut self, _: usize, request: &Request, _: bool) -> dflash::Result<Option<usize>> {
        self.drafter &= request.block > 1;
        self.sequence.start(request).map(Some)
    }

    fn prefill(&mut self, _: usize) -> dflash::Result<Prefill> {
        let prefill = self.sequence.prefill()?;
        self.held = prefill.done;
        self.check();
        Ok(prefill)
    }

    fn round(&mut self, out: &mut [Emitted]) -> dflash::Result<()> {
        let mut tokens = vec![];
        let drafted = match self.script {
            Some(script) => {
                let drafts = script(self.held, self.sequence.rows());
                self.sequence.verify(&drafts, &mut tokens)?;
                drafts.len()
            }
            None => self.sequence.round(&mut tokens)?,
        };
        self.held += tokens.len();
        self.check();
        out[0] = Emitted { produced: tokens.len(), tokens, drafted };
        Ok(())
    }

    fn release(&mut self, _: usize, _: usize) -> dflash::Result<()> {
        Ok(())
    }

    fn keep_logits(&mut self) {}

    fn logits(&mut self, _: usize, _: usize) -> dflash::Result<Vec<f32>> {
        unreachable!("these tests do not read logits")
    }
}

fn run(mut decoder: CheckedDecoder, request: &Request) -> Outcome {
    ops::on_threads(None, || generate(&mut decoder, request, &mut AcceptAll)).unwrap()
}

/// A pair with so few tokens that an untrained drafter is often right.
fn guessable_pair(seed: u64) -> (support::Target, support::Drafter) {
    let vocab = 2 + seed as usize % 3;
    let target =
        support::Target { vocab, hidden: 32, intermediate: 40, tied: false, seed, ..Default::default() };
    let drafter = support::Drafter { taps: vec![1, 2], seed: seed + 100, ..Default::default() };
    (target, drafter)
}

#[test]
fn greedy_rounds_equal_a_loop_without_caches() {
    let mut seen = [0; 9];
    for seed in 0..12 {
        let (spec, mut draft) = guessable_pair(seed);
        if seed % 2 == 1 {
            (draft.sliding, draft.window) = (vec![true, false], Some(7));
        }
        let pair = write(&spec, &draft);
        let (target, drafter) = (dense::Target::new(&spec), dense::Drafter::new(&spec, &draft));
        let prompt = random_tokens(seed, spec.vocab, 1 + 2 * seed as usize);

        let mut tokens = prompt.clone();
        let mut accepted = vec![];
        tokens.push(dense::argmax(target.logits(target.states(&tokens).last().unwrap()).last().unwrap()));
        while tokens.len() < prompt.len() + 33 {
            let s = tokens.len() - 1;
            let features = dense::features(&target.states(&tokens[..s]), &draft.taps);
            let drafts = drafter.blocks(&target, &features, &[(s, tokens[s])], draft.block).logits;
            let drafts: Vec<u32> = drafts[1..].iter().map(|row| dense::argmax(row)).collect();
            let states = target.states(&[&tokens[..], &drafts].concat());
            let own: Vec<u32> =
                target.logits(states.last().unwrap())[s..].iter().map(|row| dense::argmax(row)).collect();
            let right = drafts.iter().zip(&own).take_while(|(draft, own)| draft == own).count();
            tokens.extend(&own[..=right]);
            accepted.push(right + 1);
            seen[right + 1] += 1;
        }

        let got = run(CheckedDecoder::new(&pair, true), &seeded(&prompt, 33, draft.block, 0.0, 0));
        assert_eq!(got.tokens, tokens[prompt.len()..prompt.len() + 33], "seed {seed}");
        assert_eq!(got.accepted, accepted, "seed {seed}");
    }
    println!("rounds by length: {seen:?}");
    assert!(seen[1..=5].iter().all(|n| *n > 0), "too few kinds of rounds: {seen:?}");
}

// ---- forced drafts ----

#[test]
fn forced_drafts_decide_the_rounds_and_never_the_tokens() {
    let pair = write(&Default::default(), &Default::default());
    let prompt = random_tokens(1, 97, 5);
    for (temperature, seed) in [(0.0, 0), (1.0, 7)] {
        let ar = run(CheckedDecoder::new(&pair, false), &seeded(&prompt, 60, 1, temperature, seed));
        assert_eq!((ar.tokens.len(), ar.accepted.len()), (60, 59));
        // The right token at a position; any token beyond the end.
        let at = |position: usize| ar.tokens.get(position - prompt.len()).copied().unwrap_or(0);
        for block in [2, 5, 8, 16] {
            let count = |right: usize| {
                let script = |s: usize, rows: usize| {
                    (1..rows).map(|r| if r <= right { at(s + r) } else { (at(s + r) + 1) % 97 }).collect()
                };
                let decoder = CheckedDecoder { script: Some(&script), ..CheckedDecoder::new(&pair, true) };
                let got = run(decoder, &seeded(&prompt, 60, block, temperature, seed));
                assert_eq!(got.tokens, ar.tokens, "block {block}, {right} drafts right");
                let whole = got.accepted.len() - usize::from(right > 0); // the last round may go beyond the known tokens
                assert!(got.accepted[..whole].iter().all(|a| *a == right + 1), "{:?}", got.accepted);
            };
            (0..block).for_each(count);
        }
    }
}

// ---- the distribution of sampled tokens ----

#[test]
fn sampled_tokens_have_the_targets_distribution_for_any_drafts() {
    let (spec, draft) = guessable_pair(2);
    let spec = support::Target { layers: 2, ..spec };
    let draft = support::Drafter { taps: vec![0], layers: 1, block: 4, ..draft };
    let pair = write(&spec, &draft);
    let oracle = dense::Target::new(&spec);
    let prompt = [2, 0, 3];
    let distribution = |prefix: &[u32]| -> Vec<f64> {
        let logits = oracle.logits(oracle.states(&[&prompt, prefix].concat()).last().unwrap()).pop().unwrap();
        let weights: Vec<f64> = logits.iter().map(|l| (l / 1.5).exp()).collect();
        weights.iter().map(|w| w / weights.iter().sum::<f64>()).collect()
    };
    // The first of three tokens comes from the prefill, the second from row 0, the third from row 1 or a new
    // round.
    let mut exact = vec![];
    for a in 0..4 {
        for b in 0..4 {
            exact.extend(
                distribution(&[a, b])
                    .iter()
                    .map(|p| p * distribution(&[])[a as usize] * distribution(&[a])[b as usize]),
            );
        }
    }
    let argmax = None;
    let least_likely: &(dyn Fn(usize, usize) -> Vec<u32> + Sync) = &|_, rows| {
        let best = distribution(&[]);
        let worst = (0..4).min_by(|a, b| best[*a].total_cmp(&best[*b])).unwrap();
        vec![worst as u32; rows - 1]
    };
    let turning: &(dyn Fn(usize, usize) -> Vec<u32> + Sync) =
        &|s, rows| (0..rows - 1).map(|r| ((s + r) % 4) as u32).collect();
    let samples = if requests::exhaustive() { 6000 } else { 3000 };
    for (kind, script) in
        [("argmax", argmax), ("least likely", Some(least_likely)), ("adversarial", Some(turning))]
    {
        let mut counts = vec![0.0; 64];
        let mut accepted = 0;
        for i in 0..samples {
            // Each kind has its own seeds; otherwise all kinds would sample the same tokens.
            let seed = (1000 * kind.len() as u64) << 32 | i;
            let got = run(
                CheckedDecoder { script, ..CheckedDecoder::new(&pair, true) },
                &seeded(&prompt, 3, 4, 1.5, seed),
            );
            counts[got.tokens.iter().fold(0, |cell, t| cell * 4 + *t as usize)] += 1.0;
            accepted += got.accepted[0] - 1;
        }
        // Cells with an expected count below five are merged.
        let (mut chi, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
        for (count, p) in counts.iter().zip(&exact) {
            let expected = p * samples as f64;
            if expected < 5.0 {
                rest = (rest.0 + count, rest.1 + expected);
            } else {
                chi += (count - expected) * (count - expected) / expected;
                cells += 1;
            }
        }
        if rest.1 > 0.0 {
            chi += (rest.0 - rest.1) * (rest.0 - rest.1) / rest.1;
            cells += 1;
        }
        // Wilson and Hilferty's approximation of the 99.9 % quantile.
        let df = (cells - 1) as f64;
        let bound = df * (1.0 - 2.0 / (9.0 * df) + 3.09 * (2.0 / (9.0 * df)).sqrt()).powi(3);
        println!("{kind}: chi-square {chi:.1} of {df} degrees, bound {bound:.1}; {accepted} drafts accepted");
        assert!(cells > 20 && chi < bound, "{kind}: {chi} of {df} degrees of freedom");
        assert!(accepted > 0, "{kind}: no draft was ever accepted");
    }
}

// ---- cache lengths ----

#[test]
fn both_models_hold_all_positions_before_the_anchor() {
    let (spec, draft) = guessable_pair(1);
    let pair = write(&spec, &draft);
    let block = draft.block;
    for length in [1, 2, 16, 17, 64, 65] {
        let prompt = random_tokens(length as u64, spec.vocab, length);
        let whole = run(CheckedDecoder::new(&pair, false), &seeded(&prompt, 40, 1, 0.8, 2)).tokens;
        assert_eq!(whole.len(), 40);
        for budget in [0, 1, 2, block - 1, block, block + 1, 40] {
            let got = run(CheckedDecoder::new(&pair, true), &seeded(&prompt, budget, block, 0.8, 2));
            assert_eq!((&got.tokens[..], got.finish), (&whole[..budget], Finish::Length));
        }
        for stop in 0..spec.vocab as u32 {
            let request = Request { stop_ids: vec![stop], ..seeded(&prompt, 40, block, 0.8, 2) };
            let got = run(CheckedDecoder::new(&pair, true), &request);
            let end = whole.iter().position(|t| *t == stop).map_or(40, |i| i + 1);
            assert_eq!(got.tokens, whole[..end]);
            assert_eq!(got.finish, if whole[end - 1] == stop { Finish::Stop } else { Finish::Length });
        }
    }
    // The embedded pair too: its drafter is right for long stretches.
    let demo = open(DEMO_TARGET, DEMO_DRAFTER);
    for length in [1, 20] {
        let prompt = random_tokens(4, 2048, length);
        let ar = run(CheckedDecoder::new(&demo, false), &seeded(&prompt, 40, 1, 0.0, 0));
        let got = run(CheckedDecoder::new(&demo, true), &seeded(&prompt, 40, 16, 0.0, 0));
        assert_eq!(got.tokens, ar.tokens);
    }
}

#[test]
fn beyond_the_drafters_last_position_it_holds_no_context() {
    let (spec, draft) = guessable_pair(1);
    let pair = write(&spec, &support::Drafter { max_positions: 40, ..draft.clone() });
    let mut sequence = Sequence::new(&pair.0, Some(&pair.1));
    let prompt = random_tokens(3, spec.vocab, 20);
    let mut tokens = vec![];
    sequence.start(&seeded(&prompt, 60, draft.block, 0.8, 2)).unwrap();
    sequence.prefill().unwrap();
    while let Some((target, drafter)) = sequence.lengths()
        && target < 70
    {
        // The last round with drafts may end beyond the limit; the next one drops the drafter's context.
        assert!(drafter.is_none_or(|length| length == target && length < 40 + draft.block));
        assert!(drafter.is_some() || target >= 39);
        sequence.round(&mut tokens).unwrap();
    }
    assert_eq!(sequence.lengths().unwrap().1, None);
}
