//! Drafters in published layouts against drafts that their reference implementations recorded
//! (`tests/data/drafters/README.md`): features, logits, drafts and rounds; misreadings of a layout, which the
//! comparison must notice; and decoding with them on every device.

use crate::device_verification::same_as_alone;
use crate::eagle3::EAGLE3;
use crate::support::distribution;
use crate::support::kernel::on_gpu;
use crate::support::requests::{
    self, AcceptAll, answer, keep_going, request, run, run_together, seeded, spec, with_length,
};
use crate::support::{self, exhaustive};

use dflash::checkpoint::config::{DrafterConfig, Layout, Slots};
use dflash::checkpoint::drafter::{Convolution, Dependence, Selector};
use dflash::checkpoint::pair::{DraftSource, Pair};
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Cache, Drafter, Target};
use dflash::engine::generate::{Decoder, Outcome, Request};
use dflash::engine::lossless::check;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::graph_listing::{of_round, outline};
use dflash::gpu::memory::MemoryPlan;
use dflash::perf::roofline::drafter_bytes;
use dflash::spec::config::{SpecConfig, VerifyMethod};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::sampling::argmax;
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// Drafters without a walk.
const FOLDERS: [&str; 2] = ["dflash-speculators", "dflash-deepspec"];
/// Drafters with a walk: a vanilla, an rnn and a gated Markov head.
const WALKS: [&str; 3] = ["dspark-deepspec", "dspark-deepspec-rnn", "dspark-speculators"];
/// Drafters with convolutions and a candidate selector.
const DFLASH2: [&str; 2] = ["dflash2-zlab", "dflash2-speculators"];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/drafters").join(name)
}

pub fn open(name: &str) -> Pair {
    Pair::open(support::disk(&folder("target")), Some(support::disk(&folder(name)))).unwrap()
}

/// What a reference implementation recorded for one drafter.
pub struct Oracle {
    pub json: Value,
    tensors: Vec<u8>,
}

/// A recorded prompt.
pub struct Prompt {
    pub prompt: Vec<u32>,
    pub committed: Vec<u32>,
    pub rounds: Vec<Round>,
}

pub struct Round {
    pub anchor_position: usize,
    pub drafts: Vec<u32>,
    pub accepted: usize,
}

impl Oracle {
    pub fn open(name: &str) -> Oracle {
        let json = fs::read(folder(name).join("oracle.json")).unwrap();
        let tensors = fs::read(folder(name).join("oracle.safetensors")).unwrap();
        Oracle { json: serde_json::from_slice(&json).unwrap(), tensors }
    }

    pub fn prompts(&self) -> Vec<Prompt> {
        let ids = |value: &Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let round = |round: &Value| Round {
            anchor_position: round["anchor_position"].as_u64().unwrap() as usize,
            drafts: ids(&round["drafts"]),
            accepted: round["accepted"].as_u64().unwrap() as usize,
        };
        let prompt = |prompt: &Value| Prompt {
            prompt: ids(&prompt["prompt"]),
            committed: ids(&prompt["committed"]),
            rounds: prompt["rounds"].as_array().unwrap().iter().map(round).collect(),
        };
        self.json["prompts"].as_array().unwrap().iter().map(prompt).collect()
    }

    pub fn tensor(&self, name: &str) -> Vec<f32> {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The values of a tensor, f32 or i32; `None` if nothing was recorded under this name.
    pub fn find(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let data = file.tensor(name).ok()?;
        let words = data.data().as_chunks::<4>().0.iter();
        Some(match data.dtype() {
            safetensors::Dtype::F32 => words.map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            safetensors::Dtype::I32 => words.map(|bytes| i32::from_le_bytes(*bytes) as f32).collect(),
            other => panic!("{name} is {other:?}"),
        })
    }
}

/// Largest differences from the recorded values, and the number of rounds whose drafts differ.
#[derive(Debug, Default)]
pub struct Differences {
    pub features: f32,
    pub hidden: f32,
    pub logits: f32,
    /// Of logits after the walk, of confidences, and of candidates, their scores and probabilities.
    pub walk: f32,
    pub drafts: usize,
    pub rounds: usize,
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Repeats all recorded rounds with this pair on the CPU.
fn compare(pair: &Pair, oracle: &Oracle) -> Differences {
    let (target, drafter) =
        (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
    let (plan, vocab) = (&drafter.config, target.config.vocab);
    let mut all = Differences::default();
    for (p, recorded) in oracle.prompts().iter().enumerate() {
        let mut features = Vec::new();
        let mut cache = Cache::new(&target.config.stack, 256).unwrap();
        target.forward(&recorded.committed, &mut cache, &plan.taps, &mut features, 1);
        let taps = largest_difference(&features, &oracle.tensor(&format!("p{p}.taps")));
        all.features = all.features.max(taps);
        let width = features.len() / recorded.committed.len();
        for (r, round) in recorded.rounds.iter().enumerate() {
            let at = round.anchor_position;
            let mut context = Cache::new(&plan.stack, 256).unwrap();
            drafter.inject(&features[..at * width], &mut context);
            let (anchor, count) = (recorded.committed[at], round.drafts.len());
            let hidden = drafter.predict(&target, anchor, count, &mut context);
            let reference = oracle.tensor(&format!("p{p}.r{r}.hidden"));
            let first = reference.len() - hidden.len();
            all.hidden = all.hidden.max(largest_difference(&hidden, &reference[first..]));
            let mut logits = Vec::new();
            drafter.logits(&target, &hidden, &mut logits);
            let of_the_drafter = |logits: &[f32], reference: &[f32]| {
                let finite: Vec<f32> = logits.iter().copied().filter(|logit| logit.is_finite()).collect();
                match finite.len() == reference.len() {
                    true => largest_difference(&finite, reference),
                    false => f32::INFINITY,
                }
            };
            let reference = oracle.tensor(&format!("p{p}.r{r}.logits"));
            all.logits = all.logits.max(of_the_drafter(&logits, &reference));
            let (mut drafts, mut confidences, mut previous) = (vec![], vec![], anchor);
            let mut walk = drafter.walk(anchor);
            for (row, hidden) in logits.chunks_mut(vocab).zip(hidden.chunks(plan.stack.hidden)) {
                if let Some(walk) = &mut walk {
                    confidences.push(walk.confidence(hidden).unwrap());
                    drafter.add_bias(&walk.bias(hidden), row);
                }
                drafter.select(previous, hidden, row);
                previous = argmax(row).unwrap();
                drafts.push(previous);
                walk.iter_mut().for_each(|walk| walk.follow(previous));
            }
            if let (Some(ids), Some(_)) = (oracle.find(&format!("p{p}.r{r}.candidates")), plan.selector()) {
                let kept = |row: &[f32]| -> Vec<f32> {
                    (0..row.len()).filter(|id| row[*id].is_finite()).map(|id| id as f32).collect()
                };
                let candidates: Vec<f32> = logits.chunks(vocab).flat_map(kept).collect();
                let apart = match (oracle.find(&format!("p{p}.r{r}.scores")), candidates == ids) {
                    (_, false) => f32::INFINITY,
                    (Some(scores), _) => of_the_drafter(&logits, &scores),
                    (None, _) => {
                        let softmax = |row: &[f32]| -> Vec<f32> {
                            let sum: f32 = row.iter().map(|score| score.exp()).sum();
                            row.iter().map(|score| score.exp() / sum).collect()
                        };
                        let q: Vec<f32> = logits.chunks(vocab).flat_map(softmax).collect();
                        largest_difference(&q, &oracle.tensor(&format!("p{p}.r{r}.q_temperature_1")))
                    }
                };
                all.walk = all.walk.max(apart);
            }
            all.drafts += usize::from(drafts != round.drafts);
            if walk.is_some() {
                let corrected = oracle.tensor(&format!("p{p}.r{r}.corrected"));
                let probability = |logit: &f32| 1.0 / (1.0 + (-logit).exp());
                let recorded = oracle.tensor(&format!("p{p}.r{r}.confidence_logits"));
                let recorded: Vec<f32> = recorded.iter().map(probability).collect();
                let apart =
                    of_the_drafter(&logits, &corrected).max(largest_difference(&confidences, &recorded));
                all.walk = all.walk.max(apart);
            }
            all.rounds += 1;
        }
    }
    println!("{all:?}");
    all
}

#[test]
fn drafts_and_logits_equal_the_reference_implementations() {
    for name in FOLDERS.into_iter().chain(WALKS).chain(DFLASH2) {
        let found = compare(&open(name), &Oracle::open(name));
        assert_eq!((found.drafts, found.rounds), (0, 18), "{name}");
        let largest =
            [found.features, found.hidden, found.logits, found.walk].into_iter().fold(0.0, f32::max);
        assert!(largest < 1e-4, "{name}: {found:?}");
    }
}

#[test]
fn plans_say_slots_taps_and_vocabulary() {
    let plans = FOLDERS.map(|name| open(name).drafter().unwrap().config.clone());
    let of = |i: usize| (plans[i].identity.layout, plans[i].slots, plans[i].block, &plans[i].taps[..]);
    assert_eq!(of(0), (Layout::Speculators, Slots::FillIn, 8, &[1, 3, 4][..]));
    assert_eq!(of(1), (Layout::DeepSpec, Slots::AnchorFirst, 8, &[1, 2, 3, 4, 5][..]));
    let ids = plans[0].ids.as_ref().unwrap();
    assert!(plans[0].own_head == Some(256) && ids.len() == 256 && ids.is_sorted() && ids[255] < 512);
    // DeepSpec's copies equal the target's.
    assert_eq!((plans[1].own_head, plans[1].own_embedding, &plans[1].ids), (None, false, &None));
}

/// Greedy rounds of the decoder emit the recorded tokens and accept the recorded numbers of drafts.
#[test]
fn greedy_rounds_accept_what_the_reference_accepts() {
    for name in FOLDERS.into_iter().chain(WALKS).chain(DFLASH2) {
        let pair = open(name);
        let (target, drafter) =
            (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
        for recorded in Oracle::open(name).prompts() {
            let answer = &recorded.committed[recorded.prompt.len()..];
            let mut decoder = Sequences::new(&target, Some(&drafter), 1, 256);
            let outcome = run(&mut decoder, &request(&recorded.prompt, answer.len(), 8, 0.0));
            assert_eq!(outcome.tokens, answer, "{name}");
            let emitted: Vec<usize> = recorded.rounds.iter().map(|round| round.accepted + 1).collect();
            assert_eq!(outcome.accepted, emitted, "{name}");
        }
    }
}

/// Both spellings of the codebooks' names are read. Devices refuse sizes that their kernels do not have.
#[test]
fn dflash2_drafters_are_read_and_checked() {
    let pair = open("dflash2-zlab");
    let plan = &pair.drafter().unwrap().config;
    assert_eq!((plan.identity.layout, plan.slots, plan.block), (Layout::ZLab, Slots::FillIn, 8));
    assert_eq!(plan.convolution, Some(Convolution { taps: 2, group: 16 }));
    assert_eq!(plan.selector(), Some(Selector { rank: 32, candidates: 16 }));
    // A pass reads four kernel projections [16][64] and the selector's [32][64], in bf16.
    let plain = DrafterConfig { convolution: None, dependence: Dependence::Independent, ..plan.clone() };
    let [more, less] = [plan, &plain].map(|plan| drafter_bytes(&pair.target.config, plan));
    assert_eq!(more - less, 2.0 * (4.0 * 16.0 + 32.0) * 64.0);
    let copy = tempfile::tempdir().unwrap();
    fs::copy(folder("dflash2-zlab").join("config.json"), copy.path().join("config.json")).unwrap();
    let bytes = fs::read(folder("dflash2-zlab").join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = |name: String| if name.ends_with("_codebook") { name + ".weight" } else { name };
    let tensors = file.tensors().into_iter().map(|(stored, tensor)| (name(stored), tensor));
    safetensors::serialize_to_file(tensors, None, &copy.path().join("model.safetensors")).unwrap();
    let pair = Pair::open(support::disk(&folder("target")), Some(support::disk(copy.path()))).unwrap();
    assert_eq!(compare(&pair, &Oracle::open("dflash2-zlab")).drafts, 0);
    // Each of the two layers has a convolution more before attention and MLP.
    let nodes = of_round(&pair, BatchConfig::new(1, 8, 128), false).unwrap();
    let draft = outline(&nodes).into_iter().find(|section| section.name == "draft").unwrap();
    let layers: Vec<_> = draft.groups.iter().filter(|group| !group.layers.is_empty()).collect();
    assert_eq!((layers.len(), layers[0].nodes.len(), layers[0].layers.clone()), (1, 7, 0..2));
    let planned = |pair: &Pair| MemoryPlan::new(pair, BatchConfig::new(1, 8, 128)).map(|_| ());
    planned(&pair).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(copy.path().join("config.json")).unwrap()).unwrap();
    for (field, value, expected) in [
        ("conv_kernel_size", 3, "1, 2, 4 or 8"),
        ("conv_group_size", 2, "a multiple of 4"),
        ("selector_rank", 40, "a multiple of 32"),
        ("selector_top_k", 65, "at most 64"),
    ] {
        let mut config = config.clone();
        config["dflash_config"][field] = value.into();
        fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
        let (target, drafter) = (support::disk(&folder("target")), support::disk(copy.path()));
        let refused = planned(&Pair::with_random_weights(target, Some(drafter)).unwrap()).unwrap_err();
        let expected =
            format!("the kernels cannot run this drafter: {field} is {value}, expected {expected}");
        assert_eq!(refused.to_string(), expected);
    }
}

// ---- misreadings ----

/// Each misreading of a layout moves logits by far more than the tolerance, or changes drafts.
#[test]
fn misreadings_of_a_layout_are_noticed() {
    type Change = fn(&mut dflash::checkpoint::config::DrafterConfig);
    let mistakes: [(&str, &str, Change); 15] = [
        ("taps one layer late", "dflash-speculators", |plan| plan.taps.iter_mut().for_each(|tap| *tap += 1)),
        ("taps one layer late", "dflash-deepspec", |plan| plan.taps.iter_mut().for_each(|tap| *tap += 1)),
        ("taps in reverse order", "dflash-speculators", |plan| plan.taps.reverse()),
        ("anchor first", "dflash-speculators", |plan| plan.slots = Slots::AnchorFirst),
        ("fill in", "dflash-deepspec", |plan| plan.slots = Slots::FillIn),
        ("d2t not applied", "dflash-speculators", |plan| plan.ids = Some((0..256).collect())),
        ("the target's head", "dflash-speculators", |plan| (plan.own_head, plan.ids) = (None, None)),
        ("another RoPE base", "dflash-deepspec", |plan| plan.stack.rope.theta = 1e4),
        ("no Markov head", "dspark-deepspec", |plan| plan.dependence = Dependence::Independent),
        ("the slots of DeepSpec", "dspark-speculators", |plan| plan.slots = Slots::AnchorFirst),
        ("no convolution", "dflash2-zlab", |plan| plan.convolution = None),
        ("no convolution", "dflash2-speculators", |plan| plan.convolution = None),
        ("no selector", "dflash2-zlab", |plan| plan.dependence = Dependence::Independent),
        ("taps one layer late", "dflash2-speculators", |plan| plan.taps.iter_mut().for_each(|tap| *tap += 1)),
        ("no norm of heads", "dflash-speculators", |plan| plan.stack.qk_norm = false),
    ];
    for (mistake, name, change) in mistakes {
        let mut pair = open(name);
        let DraftSource::Drafter(drafter) = &mut pair.draft else { unreachable!() };
        change(&mut drafter.config);
        let found = compare(&pair, &Oracle::open(name));
        assert!(
            found.drafts > 0 && found.drafts * 2 > found.rounds || found.logits > 0.1,
            "{mistake}: {found:?}"
        );
    }
}

/// Copies of embedding and head that differ from the target's are used. The last token occurs nowhere, so the
/// drafts stay the same.
#[test]
fn an_own_embedding_and_head_are_used_if_they_differ_from_the_targets() {
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(folder("dflash-deepspec").join(file), copy.path().join(file)).unwrap();
    }
    let path = copy.path().join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let (start, unused) = {
        let (size, header) = SafeTensors::read_metadata(&file).unwrap();
        let tensors = header.tensors();
        let begin = |name: &str| 8 + size + tensors[name].data_offsets.0;
        let recorded = Oracle::open("dflash-deepspec").prompts();
        let used = |id: u32| recorded.iter().any(|prompt| prompt.committed.contains(&id));
        let unused = (2..512).find(|&id| !used(id)).unwrap();
        ([begin("embed_tokens.weight"), begin("lm_head.weight")], unused as usize)
    };
    for start in start {
        file[start + unused * 128] ^= 1;
    }
    fs::write(&path, file).unwrap();
    let pair = Pair::open(support::disk(&folder("target")), Some(support::disk(copy.path()))).unwrap();
    let plan = &pair.drafter().unwrap().config;
    assert_eq!((plan.own_head, plan.own_embedding, &plan.ids), (Some(512), true, &None));
    let found = compare(&pair, &Oracle::open("dflash-deepspec"));
    assert_eq!(found.drafts, 0);
    on_gpu(|device| {
        let tokens = |pair: &Pair| {
            let models = Models::load(device, pair, 128).unwrap();
            let mut batch = Batch::new(device, &models, BatchConfig::new(1, 8, 128)).unwrap();
            run(&mut batch, &request(&Oracle::open("dflash-deepspec").prompts()[0].prompt, 16, 8, 0.0))
                .accepted
        };
        assert_eq!(tokens(&pair), tokens(&open("dflash-deepspec")));
    });
}

// ---- devices ----

/// Chains, trees and every verification method in one batch, and each alone. With each layout every second kind
/// runs, and every fourth also alone, so that each kind does with one of them; exhaustive: all.
#[test]
fn a_batch_of_all_kinds_answers_as_each_alone_in_every_layout() {
    let eagle3 = EAGLE3.into_iter().skip(if exhaustive() { 0 } else { 2 });
    for (turn, name) in FOLDERS.into_iter().chain(WALKS).chain(DFLASH2).chain(eagle3).enumerate() {
        let (pair, oracle) = (open(name), Oracle::open(name));
        let chains = pair.drafter().unwrap().config.chain().is_some();
        on_gpu(|device| {
            let models = Models::load(device, &pair, 128).unwrap();
            let prompts = oracle.prompts();
            let kinds = [
                (spec(VerifyMethod::Match, 0.0, None), 8, 0.0),
                (spec(VerifyMethod::Match, 1.0, None), 8, 0.8),
                (spec(VerifyMethod::Match, 0.0, Some(12)), 8, 0.0),
                (spec(VerifyMethod::Rejection, 1.0, None), 8, 1.0),
                (spec(VerifyMethod::Rejection, 1.0, Some(9)), 8, 1.0),
                (spec(VerifyMethod::Block, 1.0, None), 8, 0.7),
                (spec(VerifyMethod::Block, 1.0, Some(12)), 8, 0.7),
                (spec(VerifyMethod::Match, 0.0, None), 5, 0.0),
            ];
            // A device runs no trees of a drafter that drafts one token after the other.
            let chosen = |i: usize, spec: &SpecConfig| match chains {
                true => spec.tree_rows().is_none() && (exhaustive() || i % 2 == turn % 2),
                false => exhaustive() || i % 3 == turn % 3,
            };
            let requests: Vec<Request> =
                (kinds.into_iter().enumerate().filter(|(i, kind)| chosen(*i, &kind.0)))
                    .map(|(i, (spec, block, temperature))| {
                        let prompt = &prompts[i % prompts.len()].prompt;
                        Request { spec, ..seeded(prompt, 6, block, temperature, i as u64) }
                    })
                    .collect();
            let trees = if chains { 0 } else { 12 };
            let config = BatchConfig { draft_probs: true, ..BatchConfig::new(3, 8, 128).with_trees(trees) };
            let alone = |i: usize| exhaustive() || i == turn % 2;
            let accepted = same_as_alone(device, &models, config, &requests, &[usize::MAX; 8], alone);
            assert!(accepted > 2, "{name}: {accepted} drafts accepted");
        });
    }
}

/// Through the kernels, tokens equal those of AR decoding bit for bit, and about as many drafts are accepted
/// as the reference accepts in f32.
#[test]
fn rounds_of_every_layout_are_lossless_and_accept_as_the_reference() {
    for (turn, name) in FOLDERS.into_iter().chain(WALKS).chain(DFLASH2).chain(EAGLE3).enumerate() {
        let (pair, oracle) = (open(name), Oracle::open(name));
        let chains = pair.drafter().unwrap().config.chain().is_some();
        on_gpu(|device| {
            let models = Models::load(device, &pair, 128).unwrap();
            let (mut accepted, mut recorded_accepted) = (0, 0);
            // One prompt as a chain, with every second layout as a tree too; exhaustive: all.
            let prompts = if exhaustive() { 3 } else { 1 };
            for recorded in oracle.prompts().into_iter().take(prompts) {
                let tokens = recorded.committed.len() - recorded.prompt.len();
                let trees = !chains && (exhaustive() || turn % 2 == 0);
                for tree in [None, Some(16)].into_iter().take(if trees { 2 } else { 1 }) {
                    let config = BatchConfig::new(1, 8, 128).with_trees(tree.unwrap_or(0));
                    let mut batch = Batch::new(device, &models, config).unwrap();
                    let spec = spec(VerifyMethod::Match, 0.0, tree);
                    let request = Request { spec, ..request(&recorded.prompt, tokens, 8, 0.0) };
                    let report = check(&mut batch, &request, || Ok(AcceptAll)).unwrap().unwrap();
                    assert_eq!((&report.identical, report.compared), (&Ok(()), tokens - 1), "{name}");
                    if tree.is_none() {
                        // All rounds have 7 drafts.
                        accepted += report.rounds * 7 - report.rejected;
                        recorded_accepted +=
                            recorded.rounds.iter().map(|round| round.accepted).sum::<usize>();
                    }
                }
            }
            println!("{name}: {accepted} drafts accepted, {recorded_accepted} by the reference");
            assert!(accepted * 10 >= recorded_accepted * 9, "{name}: {accepted} of {recorded_accepted}");
        });
    }
}

/// With a walk, chains and trees of every method emit the tokens of AR decoding or follow its distribution:
/// the distribution of a draft is that given the drafts before it.
#[test]
fn walks_are_lossless_with_every_method() {
    for name in WALKS.into_iter().chain(["dflash2-zlab"]) {
        let pair = open(name);
        let (target, drafter) =
            (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
        let prompt = &Oracle::open(name).prompts()[1].prompt;
        let mut decoder = Sequences::new(&target, Some(&drafter), 1, 256);
        for (temperature, tree) in [(0.0, None), (0.8, None), (0.0, Some(20)), (0.8, Some(20))] {
            let own = spec(VerifyMethod::Match, if tree.is_none() { temperature } else { 0.0 }, tree);
            let drafted = Request { spec: own, ..request(prompt, 30, 8, temperature) };
            let ar = run(&mut decoder, &Request { spec: Default::default(), block: 1, ..drafted.clone() });
            let outcome = run(&mut decoder, &drafted);
            assert_eq!(outcome.tokens, ar.tokens, "{name} {temperature} {tree:?}");
            assert!(outcome.accepted.len() < 25, "{name}: {:?}", outcome.accepted);
        }
        // The target is sure of most tokens; a high temperature spreads the answers.
        let prompt = &prompt[..4];
        let trees = [(VerifyMethod::Rejection, Some(9)), (VerifyMethod::Block, Some(9))];
        let chains = [(VerifyMethod::Rejection, None), (VerifyMethod::Block, None)];
        let kinds = chains.into_iter().chain(trees.into_iter().filter(|_| name == "dspark-speculators"));
        for (method, tree) in kinds {
            let spec = spec(method, 4.0, tree);
            let own = |seed| {
                let mut request = Request { spec: spec.clone(), ..seeded(prompt, 2, 4, 4.0, seed) };
                request.sampling.top_k = 6;
                request
            };
            let requests: Vec<Request> = (0..if exhaustive() { 500 } else { 250 }).map(own).collect();
            let expected = distribution::distribution(&target, prompt, &requests[0].sampling, 2);
            let mut decoder = Sequences::new(&target, Some(&drafter), 8, 256);
            let answers = run_together(&mut decoder, &requests, keep_going);
            distribution::check(&spec, &expected, answers.into_iter().map(|outcome| outcome.tokens));
        }
    }
}

/// The confidence head cuts drafts before the first of too low a confidence, on the CPU and on devices, and exact
/// verification emits the tokens of AR decoding with any cut.
#[test]
fn confidences_cut_drafts_and_keep_the_tokens() {
    for name in WALKS {
        let (pair, oracle) = (open(name), Oracle::open(name));
        let (target, drafter) =
            (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
        let recorded = &oracle.prompts()[0];
        let tokens = recorded.committed.len() - recorded.prompt.len();
        let first: Vec<f32> =
            oracle.tensor("p0.r0.confidence_logits").iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
        let cuts = |decoder: &mut dyn Decoder, least, tree| {
            let spec =
                with_length(&spec(VerifyMethod::Match, 0.0, tree), DraftLengthPolicy::Confidence(least));
            run(decoder, &Request { spec, ..request(&recorded.prompt, tokens, 8, 0.0) })
        };
        let ar = request(&recorded.prompt, tokens, 1, 0.0);
        let mut decoder = Sequences::new(&target, Some(&drafter), 1, 256);
        let expected = run(&mut decoder, &ar).tokens;
        let mut partly = Vec::new();
        for least in [0.23, 0.275, 0.35, 0.46, 0.9] {
            let kept = first.iter().take_while(|confidence| **confidence >= least).count();
            for tree in [None, Some(20)] {
                let cut = cuts(&mut decoder, least, tree);
                assert_eq!(cut.tokens, expected, "{name}, from {least} on");
                let as_expected =
                    if tree.is_none() { cut.drafted[0] == kept } else { (cut.drafted[0] > 0) == (kept > 0) };
                assert!(as_expected, "{name}, from {least} on: {:?}", cut.drafted);
            }
            if kept < 7 && kept > 0 && partly.len() < 2 || exhaustive() {
                partly.push((least, kept));
            }
        }
        assert!(partly.len() > 1, "{name}: {first:?}");
        on_gpu(|device| {
            let models = Models::load(device, &pair, 128).unwrap();
            let mut batch = Batch::new(device, &models, BatchConfig::new(1, 8, 128)).unwrap();
            let expected = run(&mut batch, &ar).tokens;
            for &(least, kept) in &partly {
                let cut = cuts(&mut batch, least, None);
                assert_eq!((&cut.tokens, cut.drafted[0]), (&expected, kept), "{name}, from {least} on");
            }
        });
    }
}

/// With a walk, sampled rounds on a device have the answers of the CPU, and so the target's distribution.
#[test]
fn sampled_walks_answer_as_on_the_cpu() {
    for (turn, name) in WALKS.into_iter().chain(DFLASH2).chain(EAGLE3).enumerate() {
        let (pair, prompt) = (open(name), &Oracle::open(name).prompts()[1].prompt[..4]);
        let (target, drafter) =
            (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
        let kinds = [
            spec(VerifyMethod::Rejection, 1.0, None),
            spec(VerifyMethod::Block, 1.0, None),
            spec(VerifyMethod::Match, 1.0, None),
            spec(VerifyMethod::Rejection, 1.0, Some(9)),
            spec(VerifyMethod::Block, 1.0, Some(9)),
            with_length(&spec(VerifyMethod::Rejection, 1.0, None), DraftLengthPolicy::Confidence(0.4)),
            with_length(&spec(VerifyMethod::Block, 1.0, None), DraftLengthPolicy::Confidence(0.3)),
            with_length(&spec(VerifyMethod::Match, 0.0, Some(9)), DraftLengthPolicy::Confidence(0.3)),
        ];
        let kinds = match pair.drafter().unwrap().config.dependence {
            Dependence::Walk(_) => &kinds[..],
            Dependence::Chain(_) => &kinds[..3],
            _ => &kinds[..5],
        };
        let trees = kinds.iter().find_map(|kind| kind.tree_rows()).unwrap_or(0);
        // Every second kind, with each layout the others; exhaustive: all.
        let chosen = |(i, _): &(usize, &SpecConfig)| exhaustive() || i % 2 == turn % 2;
        let kinds: Vec<_> = kinds.iter().enumerate().filter(chosen).map(|(_, kind)| kind).collect();
        let requests: Vec<Request> = (0..if exhaustive() { 200 } else { 12 })
            .map(|seed: u64| {
                let spec = kinds[seed as usize % kinds.len()].clone();
                Request { spec, ..seeded(prompt, 4, 5, 1.0, seed) }
            })
            .collect();
        on_gpu(|device| {
            let models = Models::load(device, &pair, 128).unwrap();
            let config = BatchConfig { draft_probs: true, ..BatchConfig::new(8, 5, 128).with_trees(trees) };
            let mut batch = Batch::new(device, &models, config).unwrap();
            let answers = run_together(&mut batch, &requests, keep_going);
            let mut on_cpu = Sequences::new(&target, Some(&drafter), 8, 128);
            let theirs = run_together(&mut on_cpu, &requests, keep_going);
            let same = |(a, b): &(&Outcome, &Outcome)| answer(a) == answer(b) && a.drafted == b.drafted;
            let same = answers.iter().zip(&theirs).filter(same).count();
            println!("{name}: {same} of {} answers equal the CPU's", requests.len());
            // Because kernels round, a few draws near a boundary have a different outcome.
            assert!(10 * same >= 8 * requests.len(), "{name}: {same}");
        });
    }
}

/// Drafts are sampled from a reduced vocabulary, but answers have the target's distribution over all tokens: on
/// the CPU, and on devices because their answers equal the CPU's, and if exhaustive also by their counts.
#[test]
fn answers_of_a_reduced_vocabulary_have_the_targets_distribution() {
    let tiny = requests::tiny();
    for (turn, anchor_first) in [false, true].into_iter().enumerate() {
        let written = support::write_pair(&tiny.0, &tiny.1);
        support::reduce_vocabulary(&written, &tiny.0, &tiny.1, &[0, 2, 3], anchor_first);
        let pair = requests::open(&written);
        let plan = &pair.drafter().unwrap().config;
        assert_eq!((plan.own_head, plan.ids.as_deref()), (Some(3), Some(&[0, 2, 3][..])));
        let (target, drafter) =
            (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap());
        let kinds = [(VerifyMethod::Rejection, None), (VerifyMethod::Block, None)]
            .into_iter()
            .chain([(VerifyMethod::Rejection, Some(9)), (VerifyMethod::Block, Some(9))])
            .map(|(method, tree)| spec(method, 1.0, tree));
        // On the CPU a chain and a tree with each layout; exhaustive: all.
        for (_, kind) in kinds.enumerate().filter(|(i, _)| exhaustive() || (i + i / 2) % 2 == turn) {
            let one = |seed| Request { spec: kind.clone(), ..seeded(&[1, 2, 3], 3, 4, 1.0, seed) };
            let requests: Vec<Request> = (0..300).map(one).collect();
            let expected = distribution::distribution(&target, &[1, 2, 3], &requests[0].sampling, 3);
            let mut decoder = Sequences::new(&target, Some(&drafter), 8, 64);
            let answers = run_together(&mut decoder, &requests, keep_going);
            distribution::check(&kind, &expected, answers.into_iter().map(|outcome| outcome.tokens));
        }
        on_gpu(|device| {
            let models = Models::load(device, &pair, 64).unwrap();
            let config = BatchConfig { draft_probs: true, ..BatchConfig::new(32, 4, 64).with_trees(9) };
            let mut batch = Batch::new(device, &models, config).unwrap();
            let kinds = [
                spec(VerifyMethod::Rejection, 1.0, None),
                spec(VerifyMethod::Block, 1.0, None),
                spec(VerifyMethod::Rejection, 1.0, Some(9)),
                spec(VerifyMethod::Block, 1.0, Some(9)),
            ];
            let one = |seed: u64| {
                let spec = kinds[seed as usize % 4].clone();
                Request { spec, ..seeded(&[1, 2, 3], 3, 4, 1.0, seed) }
            };
            let requests: Vec<Request> = (0..if exhaustive() { 270 } else { 24 }).map(one).collect();
            let answers = run_together(&mut batch, &requests, keep_going);
            let mut on_cpu = Sequences::new(&target, Some(&drafter), 8, 64);
            let theirs = run_together(&mut on_cpu, &requests, keep_going);
            let same = answers.iter().zip(&theirs).filter(|(a, b)| answer(a) == answer(b)).count();
            println!("{same} of {} answers equal the CPU's", requests.len());
            // Because kernels round, a few draws near a boundary have a different outcome.
            assert!(10 * same >= 9 * requests.len(), "{same}");
            if exhaustive() {
                let expected = distribution::distribution(&target, &[1, 2, 3], &requests[0].sampling, 3);
                distribution::check(&kinds, &expected, answers.into_iter().map(|outcome| outcome.tokens));
            }
        });
    }
}
