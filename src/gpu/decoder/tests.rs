use super::*;
use crate::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use crate::checkpoint::pair::Pair;
use crate::cpu;
use crate::engine::generate::{Flow, TokenSink, resume};
use crate::gpu::device::Buffer;
use crate::spec::config::ExactDrafts;
use crate::spec::draft_length::DraftLengthPolicy;
use crate::spec::sampling::SamplingParams;
use crate::test_gpu::TestGpu;
use serde_json::Value;
use std::path::{Path, PathBuf};

struct Silent;

impl TokenSink for Silent {
    fn token(&mut self, _: u32, _: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

/// Rewriting the keys and values that AR steps wrote could change later answers.
#[test]
fn a_prefill_for_the_drafter_keeps_the_targets_cached_kv() {
    let (device, pair) = (TestGpu::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let models = Models::load(&device, &pair, 128).unwrap();
    let mut batch = Batch::new(&device, &models, BatchConfig::new(1, 16, 128)).unwrap();
    let request = |prompt: &[u32], block| {
        let sampling =
            SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
        Request {
            prompt: prompt.to_vec(),
            max_tokens: 3,
            sampling,
            stop_ids: vec![],
            block,
            spec: Default::default(),
        }
    };
    let mut tokens: Vec<u32> = (0..66).map(|i| 300 + i).collect();
    tokens.extend(resume(&mut batch, &request(&tokens, 1), &mut Silent).unwrap().tokens);
    let held = batch.slots[0].held;
    assert_eq!((held, batch.slots[0].drafted), (68, 0));

    // Flip bits, so that a rewritten position is visible.
    let stack = &pair.target.config.stack;
    let (layers, row) = (stack.attention.len(), stack.head_dim * 2);
    let buffer = |batch: &Batch, layer: usize| batch.ctx.cache.keys[layer].clone();
    let pages = |batch: &Batch, layer| {
        let mut bytes = vec![0; buffer(batch, layer).bytes()];
        device.download(&buffer(batch, layer), &mut bytes).unwrap();
        bytes
    };
    let marked: Vec<Vec<u8>> =
        (0..layers).map(|i| pages(&batch, i).iter().map(|byte| byte ^ 1).collect()).collect();
    (0..layers).for_each(|i| device.upload(&buffer(&batch, i), &marked[i]).unwrap());
    tokens.push(7);
    assert_eq!(batch.admit(0, &request(&tokens, 16), true), Ok(Some(0)));
    assert!(batch.prefill(0).unwrap().next.is_some());
    for (layer, marked) in marked.iter().enumerate() {
        let now = pages(&batch, layer);
        for (at, head) in (0..tokens.len()).flat_map(|at| (0..stack.kv_heads).map(move |head| (at, head))) {
            let page = batch.pages.of(0)[at / PAGE] as usize;
            let begin = ((page * stack.kv_heads + head) * PAGE + at % PAGE) * row;
            let kept = now[begin..begin + row] == marked[begin..begin + row];
            assert_eq!(kept, at < held, "layer {layer}, head {head}, position {at}");
        }
    }
}

struct Script(std::vec::IntoIter<usize>);

impl Controller for Script {
    fn drafts(&mut self, max: usize) -> usize {
        self.0.next().unwrap_or(max)
    }

    fn observe(&mut self, _: usize, _: u64) {}
}

/// A round replays the smallest graph with enough rows for every sequence. If no sequence drafts, it is one
/// without drafts.
#[test]
fn a_round_is_as_large_as_its_largest_sequence_needs() {
    let (device, pair) = (TestGpu::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let models = Models::load(&device, &pair, 128).unwrap();
    let config = BatchConfig { adaptive: true, ..BatchConfig::new(2, 16, 128).with_trees(64) };
    let mut batch = Batch::new(&device, &models, config).unwrap();
    let scripts = [vec![63, 0, 15, 16, 0, 32, 3], vec![0, 0, 3, 31, 15, 0, 4]];
    let next = std::cell::Cell::new(0);
    batch.set_controllers(move || {
        next.set(next.get() + 1);
        Box::new(Script(scripts[next.get() - 1].clone().into_iter()))
    });
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
    let drafts = ExactDrafts::BestFirstTree { rows: 64 };
    let spec = SpecConfig::Exact { drafts, length: DraftLengthPolicy::Full };
    let request =
        Request { prompt: vec![300, 301], max_tokens: 100, sampling, stop_ids: vec![], block: 16, spec };
    for slot in 0..2 {
        assert_eq!(batch.admit(slot, &request, false), Ok(Some(0)));
        assert!(batch.prefill(slot).unwrap().next.is_some());
    }
    let mut rows = vec![];
    let mut out = vec![Emitted::default(); 2];
    for round in 0..6 {
        batch.enqueue().unwrap();
        rows.push(batch.rows);
        if round > 0 {
            batch.round(&mut out).unwrap();
        }
    }
    assert_eq!(rows, [64, 1, 16, 32, 16, 64]);
}

/// Rows up to the size of the next captured pass cost nothing extra, and the controllers' cost table has
/// these sizes.
#[test]
fn adaptive_controllers_fill_the_captured_passes() {
    let (device, pair) = (TestGpu::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let models = Models::load(&device, &pair, 128).unwrap();
    let config = BatchConfig { adaptive: true, ..BatchConfig::new(1, 16, 128).with_trees(64) };
    let batch = Batch::new(&device, &models, config).unwrap();
    let spec = SpecConfig::Exact { drafts: ExactDrafts::Chain, length: DraftLengthPolicy::CostModel };
    let mut controller = batch.controller(&spec, DraftShape::Chain);
    let mut rows = vec![];
    for _ in 0..12 {
        let drafts = controller.drafts(63);
        controller.observe(drafts, 0b11);
        rows.push(drafts + 1);
    }
    // The size falls from the maximum by at most 16 rows per round to the smallest pass. There it verifies
    // more drafts than would pay off if each row had a cost.
    assert_eq!(rows[..7], [64, 64, 64, 64, 48, 32, 16]);
    assert!(rows[7..].iter().all(|rows| (9..17).contains(rows)), "{rows:?}");
}

/// Drafters with a Markov head: a vanilla, an rnn and a gated one.
const WALKS: [&str; 3] = ["dspark-deepspec", "dspark-deepspec-rnn", "dspark-speculators"];
/// Drafters that draft one token after the other.
const CHAINS: [&str; 3] = ["eagle3-deepspec", "eagle3-flat", "eagle3-speculators"];
/// How far a chain's logits may be from the CPU's, relative to their norm.
const CHAIN_NEAR: f64 = 2e-2;
/// Drafters with convolutions and a candidate selector.
const DFLASH2: [&str; 2] = ["dflash2-zlab", "dflash2-speculators"];

fn drafters() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/drafters")
}

fn open(name: &str) -> Pair {
    let folder = |name: &str| Folder::Disk(drafters().join(name));
    Pair::open(folder("target"), Some(folder(name))).unwrap()
}

fn words<T>(device: &TestGpu, buffer: &Buffer, from: impl Fn([u8; 4]) -> T) -> Vec<T> {
    let mut bytes = vec![0; buffer.bytes()];
    device.download(buffer, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|word| from(*word)).collect()
}

/// Relative to their norm, the drafter's logits differ from the CPU's by the rounding of bf16 activations.
/// Tokens outside a reduced vocabulary have -inf. With a Markov head the logits of a row are those after the
/// drafts of the rows before. With a selector they are the scores of the candidates, and another candidate is one
/// whose logit is about that of the last.
#[test]
fn draft_logits_of_every_layout_equal_the_cpus() {
    for name in ["dflash-speculators", "dflash-deepspec"].into_iter().chain(WALKS).chain(DFLASH2) {
        let (device, pair) = (TestGpu::new(), open(name));
        let models = Models::load(&device, &pair, 128).unwrap();
        // With a buffer of its own for the drafter's logits.
        let config = BatchConfig { draft_probs: true, ..BatchConfig::new(1, 8, 128) };
        let mut batch = Batch::new(&device, &models, config).unwrap();
        let prompt: Vec<u32> = (1..30).map(|i| i * 61 % 512).collect();
        // Rounds with sampled drafts keep the logits.
        let sampling = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        let spec = SpecConfig::Exact {
            drafts: ExactDrafts::CoupledChain(sampling.clone()),
            length: DraftLengthPolicy::Full,
        };
        let request =
            Request { prompt: prompt.clone(), max_tokens: 30, sampling, stop_ids: vec![], block: 8, spec };
        batch.keep_logits();
        batch.admit(0, &request, false).unwrap();
        let anchor = batch.prefill(0).unwrap().next.unwrap();
        batch.round(&mut [Emitted::default()]).unwrap();
        let (vocab, buffers) = (pair.target.config.vocab, &batch.ctx.buffers);
        let found = words(&device, &buffers.draft_logits, f32::from_le_bytes).split_off(vocab);
        let drafts = words(&device, &buffers.drafts, u32::from_le_bytes);

        let target = cpu::model::Target::load(&pair.target).unwrap();
        let drafter = cpu::model::Drafter::load(pair.drafter().unwrap()).unwrap();
        let cache = |stack| cpu::model::Cache::new(stack, 64).unwrap();
        let (mut own, mut context) = (cache(&target.config.stack), cache(&drafter.config.stack));
        let (mut features, mut expected) = (vec![], vec![]);
        target.forward(&prompt, &mut own, &drafter.config.taps, &mut features, 1);
        drafter.inject(&features, &mut context);
        let hidden = drafter.predict(&target, anchor, 7, &mut context);
        drafter.logits(&target, &hidden, &mut expected);
        if let (Some(mut walk), Some(buffers)) = (drafter.walk(anchor), &buffers.walk) {
            let confidences = words(&device, &buffers.confidence, f32::from_le_bytes);
            let width = drafter.config.stack.hidden;
            for (row, hidden) in hidden.chunks(width).enumerate() {
                drafter.add_bias(&walk.bias(hidden), &mut expected[row * vocab..][..vocab]);
                let (confidence, found) = (walk.confidence(hidden).unwrap(), confidences[row + 1]);
                assert!((found - confidence).abs() < 1e-2, "{name}: {found}, expected {confidence}");
                walk.follow(drafts[row + 1]);
            }
        }
        let logits = expected.clone();
        let width = drafter.config.stack.hidden;
        for (row, scores) in expected.chunks_mut(vocab).enumerate() {
            let previous = if row > 0 { drafts[row] } else { anchor };
            drafter.select(previous, &hidden[row * width..][..width], scores);
        }
        for (row, (found, expected)) in found.chunks(vocab).zip(expected.chunks(vocab)).enumerate() {
            let (mut apart, mut norm) = (0.0, 0.0);
            let logits = &logits[row * vocab..][..vocab];
            let candidates = |scores: &[f32]| scores.iter().filter(|score| score.is_finite()).count();
            assert_eq!(candidates(found), candidates(expected), "{name}: draft {row}");
            let last = (0..vocab).filter(|&id| expected[id].is_finite()).map(|id| logits[id]);
            let last = last.fold(f32::INFINITY, f32::min);
            for (id, (a, b)) in found.iter().zip(expected).enumerate() {
                if a.is_finite() != b.is_finite() {
                    let apart = (logits[id] - last).abs();
                    assert!(
                        drafter.config.selector().is_some() && apart < 0.05,
                        "{name}: token {id}: {apart}"
                    );
                } else if a.is_finite() {
                    apart += f64::from(a - b).powi(2);
                    norm += f64::from(*b).powi(2);
                }
            }
            let relative = (apart / norm).sqrt();
            println!("{name}: draft {row}: {relative:.1e}");
            assert!(relative < 1e-2, "{name}: draft {row} is {relative:.1e} from the CPU's");
        }
    }
}

/// In every round of an answer and of one that keeps its beginning, a chain's logits differ from the CPU's by the
/// rounding of bf16 activations. The CPU computes them anew from the text so far and follows the device's drafts.
#[test]
fn logits_of_a_chain_equal_the_cpus_in_every_round() {
    for name in CHAINS {
        let (device, pair) = (TestGpu::new(), open(name));
        let models = Models::load(&device, &pair, 128).unwrap();
        let config = BatchConfig { draft_probs: true, ..BatchConfig::new(1, 6, 128) };
        let mut batch = Batch::new(&device, &models, config).unwrap();
        batch.keep_logits();
        let target = cpu::model::Target::load(&pair.target).unwrap();
        let drafter = cpu::model::Drafter::load(pair.drafter().unwrap()).unwrap();
        let (vocab, mut worst, mut accepted) = (pair.target.config.vocab, 0f64, 0);
        let first: Vec<u32> = (1..30).map(|i| i * 61 % 512).collect();
        let mut text = vec![];
        for (kept, rounds) in [(0, 5), (33, 2)] {
            let sampling = SamplingParams { temperature: 0.5, ..SamplingParams::default() };
            let drafts = ExactDrafts::CoupledChain(sampling.clone());
            let spec = SpecConfig::Exact { drafts, length: DraftLengthPolicy::Full };
            text = if kept > 0 { [&text[..kept], &[7, 300]].concat() } else { first.clone() };
            let request =
                Request { prompt: text.clone(), max_tokens: 60, sampling, stop_ids: vec![], block: 6, spec };
            // The pair of the last common position has another token now.
            assert_eq!(batch.admit(0, &request, true).unwrap(), Some(kept.saturating_sub(1)));
            text.push(batch.prefill(0).unwrap().next.unwrap());
            for round in 0..rounds {
                let mut emitted = [Emitted::default()];
                batch.round(&mut emitted).unwrap();
                let drafts = words(&device, &batch.ctx.buffers.drafts, u32::from_le_bytes);
                let found = words(&device, &batch.ctx.buffers.draft_logits, f32::from_le_bytes);
                let cache = |stack| cpu::model::Cache::new(stack, 128).unwrap();
                let (mut own, mut context) = (cache(&target.config.stack), cache(&drafter.config.stack));
                let (before, anchor) = (&text[..text.len() - 1], text[text.len() - 1]);
                let (mut features, mut expected) = (vec![], vec![]);
                target.forward(before, &mut own, &drafter.config.taps, &mut features, 1);
                drafter.absorb(&target, before, &mut features, &mut context);
                let mut chain = drafter.chain(&target, &features, &mut context).unwrap();
                for (row, found) in found.chunks(vocab).enumerate().skip(1) {
                    chain.step(if row > 1 { drafts[row - 1] } else { anchor }, &mut expected);
                    let (mut apart, mut norm) = (0.0, 0.0);
                    for (a, b) in found.iter().zip(&expected) {
                        assert_eq!(a.is_finite(), b.is_finite(), "{name}: round {round}, draft {row}");
                        if b.is_finite() {
                            apart += f64::from(a - b).powi(2);
                            norm += f64::from(*b).powi(2);
                        }
                    }
                    let relative = (apart / norm).sqrt();
                    worst = worst.max(relative);
                    assert!(
                        relative < CHAIN_NEAR,
                        "{name}: {kept}, round {round}, draft {row}: {relative:.1e}"
                    );
                }
                accepted += emitted[0].tokens.len() - 1;
                text.extend(&emitted[0].tokens);
            }
            batch.release(0, text.len() - request.prompt.len()).unwrap();
        }
        println!("{name}: at most {worst:.1e} from the CPU's, {accepted} drafts accepted");
        assert!(accepted > 0, "{name}: no round follows accepted drafts");
    }
}

/// In the recorded rounds of the reference implementations, the kernels draft the same tokens, except where
/// their logits or scores are nearly equal.
#[test]
fn drafts_of_a_walk_equal_the_references() {
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    for name in WALKS.into_iter().chain(DFLASH2).chain(CHAINS) {
        let (device, pair) = (TestGpu::new(), open(name));
        let models = Models::load(&device, &pair, 128).unwrap();
        let mut batch = Batch::new(&device, &models, BatchConfig::new(1, 8, 128)).unwrap();
        batch.keep_logits();
        let file = |file: &str| std::fs::read(drafters().join(name).join(file)).unwrap();
        let (json, tensors) = (file("oracle.json"), file("oracle.safetensors"));
        let json: Value = serde_json::from_slice(&json).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&tensors).unwrap();
        let (mut equal, mut all) = (0, 0);
        for (r, round) in json["prompts"][0]["rounds"].as_array().unwrap().iter().enumerate() {
            let (committed, at) =
                (ids(&json["prompts"][0]["committed"]), round["anchor_position"].as_u64().unwrap() as usize);
            let request = Request {
                prompt: committed[..at].to_vec(),
                max_tokens: 30,
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                stop_ids: vec![],
                block: 8,
                spec: Default::default(),
            };
            batch.admit(0, &request, false).unwrap();
            assert_eq!(
                batch.prefill(0).unwrap().next,
                Some(committed[at]),
                "{name}: the anchor of round {r}"
            );
            batch.round(&mut [Emitted::default()]).unwrap();
            batch.release(0, 0).unwrap();
            let found = words(&device, &batch.ctx.buffers.drafts, u32::from_le_bytes);
            let words = |name: &str| -> Option<Vec<[u8; 4]>> {
                let find = |prefix: &str| tensors.tensor(&format!("{prefix}p0.r{r}.{name}"));
                let tensor = find("").or_else(|_| find("chain.")).ok()?;
                Some(tensor.data().as_chunks::<4>().0.to_vec())
            };
            let floats = |name: &str| -> Option<Vec<f32>> {
                Some(words(name)?.into_iter().map(f32::from_le_bytes).collect())
            };
            // The logits after the walk; of a selector the scores of its candidates, or the logarithms of their
            // probabilities.
            let probabilities = || floats("q_temperature_1").map(|q| q.into_iter().map(f32::ln).collect());
            let corrected = floats("corrected").or_else(|| floats("scores"));
            let corrected: Vec<f32> = match pair.drafter().unwrap().config.chain() {
                Some(_) => floats("logits").unwrap(),
                None => corrected.or_else(probabilities).unwrap(),
            };
            let candidates = words("candidates");
            let candidates: Option<Vec<u32>> =
                candidates.map(|ids| ids.into_iter().map(u32::from_le_bytes).collect());
            let (recorded, plan) = (ids(&round["drafts"]), &pair.drafter().unwrap().config);
            let outputs = corrected.len() / recorded.len();
            let logits = floats("logits").unwrap();
            let largest = |row: &[f32]| row.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
            let column = |row: usize, id: u32| match (&plan.ids, &candidates) {
                (Some(own), _) => own.binary_search(&id).unwrap(),
                (_, Some(all)) => all[row * outputs..][..outputs].binary_search(&id).unwrap(),
                (None, None) => id as usize,
            };
            all += recorded.len();
            for (i, (&found, &recorded)) in found[1..].iter().zip(&recorded).enumerate() {
                if found != recorded {
                    let row = &corrected[i * outputs..][..outputs];
                    let margin = row[column(i, recorded)] - row[column(i, found)];
                    let scale = largest(if candidates.is_some() { &logits } else { row });
                    assert!(
                        margin < scale * 0.02,
                        "{name}: round {r}, draft {i}: {found}, not {recorded}: {margin}"
                    );
                    // The drafts after it follow another token.
                    break;
                }
                equal += 1;
            }
        }
        println!("{name}: {equal} of {all} drafts are equal");
        assert!(equal * 10 >= all * 8, "{name}: {equal} of {all}");
    }
}
