//! Hybrid and MoE targets against what transformers computed from the same files
//! (`tests/data/targets/README.md`), and their rounds against AR decoding: states after any number of
//! accepted rows, chains, trees, batches, prompts in chunks, conversations.

use crate::support;
use crate::support::kernel::{on_gpu, set_schedule};
use crate::support::requests::{AcceptAll, answer, keep_going, request, run, run_together, seeded, spec};

use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::{Sequence, Sequences};
use dflash::cpu::model::{Cache, Drafter, RESIDUAL, Target};
use dflash::engine::generate::{Request, resume};
use dflash::engine::lossless::check;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models as DeviceModels};
use dflash::gpu::memory::MemoryPlan;
use dflash::spec::config::VerifyMethod;
use dflash::spec::tree::Tree;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use support::Random;

/// The folder of each target, and other layouts of the same numbers in it.
const TARGETS: [(&str, &[&str]); 4] = [
    ("qwen3_5", &["published"]),
    ("qwen3_moe", &["stacked"]),
    ("qwen3_5_moe", &["published"]),
    ("qwen3_next", &[]),
];
const PROMPTS: [&str; 3] = ["p5", "p17", "p70"];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/targets").join(name)
}

fn load(folder: &Path) -> Target {
    Target::load(&Pair::open(support::disk(folder), None).unwrap().target).unwrap()
}

/// What transformers computed for one target.
struct Reference(Vec<u8>);

impl Reference {
    fn open(name: &str) -> Reference {
        Reference(fs::read(folder(name).join("expected.safetensors")).unwrap())
    }

    /// The values of a tensor, f32 or i32; `None` if nothing was recorded under this name.
    fn find(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let data = file.tensor(name).ok()?;
        let words = data.data().as_chunks::<4>().0.iter();
        Some(match data.dtype() {
            safetensors::Dtype::F32 => words.map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            safetensors::Dtype::I32 => words.map(|bytes| i32::from_le_bytes(*bytes) as f32).collect(),
            other => panic!("{name} is {other:?}"),
        })
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.tensor(name).iter().map(|id| *id as u32).collect()
    }
}

fn logits(target: &Target, normed: &[f32]) -> Vec<f32> {
    let mut all = Vec::new();
    target.logits(normed, &mut all);
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// An empty cache with room for the longest test.
fn cache(target: &Target) -> Cache {
    Cache::new(&target.config.stack, 256).unwrap()
}

// ---- against the reference ----

/// The largest difference from each kind of recorded values.
fn differences(target: &Target, reference: &Reference) -> HashMap<String, f32> {
    let stack = &target.config.stack;
    let layers = stack.attention.len();
    let mut all = HashMap::new();
    let mut note = |what: &str, found: &[f32], expected: &[f32]| {
        assert_eq!(found.len(), expected.len(), "{what}");
        let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let worst = all.entry(what.to_string()).or_insert(0.0);
        *worst = apart.max(*worst);
    };
    for prompt in PROMPTS {
        let expected = |what: &str| reference.tensor(&format!("{prompt}.{what}"));
        let ids = reference.ids(&format!("{prompt}.ids"));
        let mut kept = cache(target);
        let mut seen: HashMap<(usize, &str), Vec<f32>> = HashMap::new();
        let normed = target.run(&ids, None, &mut kept, ids.len(), &mut |layer, name, values| {
            seen.insert((layer, name), values.to_vec());
        });
        let rows: Vec<usize> = expected("positions").iter().map(|at| *at as usize).collect();
        let at_rows = |values: &[f32], rows: &[usize]| -> Vec<f32> {
            let width = values.len() / ids.len();
            rows.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
        };
        let last = [ids.len() - 1];
        note("logits", &at_rows(&logits(target, &normed), &rows), &expected("logits"));
        let of = |name: &str, rows: &[usize]| -> Vec<f32> {
            (0..layers).flat_map(|layer| at_rows(&seen[&(layer, name)], rows)).collect()
        };
        let hidden = [at_rows(&target.embed(&ids, 1.0), &last), of(RESIDUAL, &last), at_rows(&normed, &last)];
        note("hidden", &hidden.concat(), &expected("hidden"));
        note("mixer", &of("mixer", &last), &expected("mixer"));
        note("mlp", &of("mlp", &last), &expected("mlp"));
        if stack.moe.is_some() {
            note("router", &of("router", &rows), &expected("router_logits"));
            note("experts", &of("experts", &rows), &expected("experts"));
            note("weights", &of("weights", &rows), &expected("expert_weights"));
        }
        let Some(first) = (0..layers).find(|layer| stack.delta_net(*layer).is_some()) else { continue };
        let [state, window] = kept.recurrent_state(first).unwrap();
        note("state", &state, &expected(&format!("state.{first}")));
        note("window", &window, &expected(&format!("conv.{first}")));
        for (ours, theirs) in
            [("q", "q"), ("k", "k"), ("v", "v"), ("log decay", "g"), ("beta", "beta"), ("core", "core")]
        {
            if let Some(expected) = reference.find(&format!("{prompt}.delta.{first}.{theirs}")) {
                note(ours, &seen[&(first, ours)], &expected);
            }
        }
    }
    all
}

#[test]
fn every_layer_equals_the_reference_in_every_layout() {
    for (name, layouts) in TARGETS {
        let reference = Reference::open(name);
        for layout in [""].iter().chain(layouts) {
            let target = load(&folder(name).join(layout));
            let found = differences(&target, &reference);
            println!("{name}/{layout}: {found:?}");
            // Logits, hidden states, outputs of mixers and MLPs; of Gated DeltaNet and of experts.
            let stack = &target.config.stack;
            let [delta_net, moe] = [stack.delta_net.is_some(), stack.moe.is_some()].map(usize::from);
            assert_eq!(found.len(), 4 + 8 * delta_net + 3 * moe, "{name}: {found:?}");
            assert!(found.values().all(|apart| *apart < 1e-4), "{name}/{layout}: {found:?}");
        }
    }
}

/// 24 tokens of each prompt, decoded one row at a time after the prompt, equal those of the reference.
#[test]
fn greedy_tokens_equal_the_reference() {
    for (name, layouts) in TARGETS {
        let reference = Reference::open(name);
        for layout in [""].iter().chain(layouts) {
            let target = load(&folder(name).join(layout));
            for prompt in PROMPTS {
                let ids = reference.ids(&format!("{prompt}.ids"));
                let found = run(&mut Sequences::new(&target, None, 1, 256), &request(&ids, 24, 1, 0.0));
                let expected = reference.ids(&format!("{prompt}.greedy"));
                assert_eq!(found.tokens, expected, "{name}/{layout}, {prompt}");
            }
        }
    }
}

// ---- the state ----

/// A prompt of this many tokens.
fn prompt(len: usize) -> Vec<u32> {
    let mut random = Random::new(len as u64);
    (0..len).map(|_| 1 + random.below(511) as u32).collect()
}

/// Recurrent states and inputs of the convolution of all layers.
fn states(target: &Target, cache: &Cache) -> Vec<Vec<u32>> {
    let layers = 0..target.config.stack.attention.len();
    layers.filter_map(|layer| cache.recurrent_state(layer)).flatten().map(|part| bits(&part)).collect()
}

/// After a pass of 16 rows that keeps `n` rows, states and logits are those of `n` AR steps, for every `n`.
#[test]
fn states_after_n_accepted_rows_equal_n_ar_steps_bit_for_bit() {
    for (name, _) in TARGETS {
        let target = load(&folder(name));
        let (first, block, next) = (prompt(21), prompt(16), prompt(3));
        let forward = |tokens: &[u32], cache: &mut Cache| {
            logits(&target, &target.forward(tokens, cache, &[], &mut vec![], tokens.len()))
        };
        let mut ar = cache(&target);
        forward(&first, &mut ar);
        for n in 0..=block.len() {
            let mut speculative = cache(&target);
            forward(&first, &mut speculative);
            forward(&block, &mut speculative);
            speculative.crop(first.len() + n);
            assert!(states(&target, &speculative) == states(&target, &ar), "{name}: {n} rows");
            let after = forward(&next, &mut speculative);
            let mut steps = cache(&target);
            forward(&first, &mut steps);
            for token in &block[..n] {
                forward(&[*token], &mut steps);
            }
            let expected: Vec<f32> = next.iter().flat_map(|token| forward(&[*token], &mut steps)).collect();
            assert!(bits(&after) == bits(&expected), "{name}: logits after {n} rows");
            if n < block.len() {
                forward(&block[n..n + 1], &mut ar);
            }
        }
    }
}

/// A prompt in chunks of any size leaves the same states and gives the same logits.
#[test]
fn prompts_in_chunks_equal_one_pass_bit_for_bit() {
    for (name, _) in TARGETS {
        let target = load(&folder(name));
        let tokens = prompt(131);
        let run = |chunk: usize| {
            let (mut kept, mut all) = (cache(&target), Vec::new());
            for chunk in tokens.chunks(chunk) {
                let normed = target.forward(chunk, &mut kept, &[], &mut vec![], chunk.len());
                all.extend(logits(&target, &normed));
            }
            (bits(&all), states(&target, &kept))
        };
        let whole = run(131);
        for chunk in [1, 7, 64] {
            assert!(run(chunk) == whole, "{name}: chunks of {chunk}");
        }
    }
}

/// A cache goes back into its last pass or to nothing. From nothing it starts as a fresh one does.
#[test]
fn a_cropped_cache_never_has_another_state() {
    for (name, _) in TARGETS {
        let target = load(&folder(name));
        let recurrent = target.config.stack.delta_net.is_some();
        let tokens = prompt(40);
        let mut kept = cache(&target);
        let forward = |tokens: &[u32], cache: &mut Cache| {
            bits(&logits(&target, &target.forward(tokens, cache, &[], &mut vec![], 1)))
        };
        let fresh = forward(&tokens[..9], &mut cache(&target));
        forward(&tokens[..30], &mut kept);
        forward(&tokens[30..], &mut kept);
        for (wanted, possible) in [(40, 40), (33, 33), (30, 30), (29, if recurrent { 0 } else { 29 }), (0, 0)]
        {
            assert_eq!(kept.longest_crop(wanted), possible, "{name}");
        }
        kept.crop(33);
        kept.crop(0);
        assert!(forward(&tokens[..9], &mut kept) == fresh, "{name}: not from an empty state");
    }
}

// ---- rounds ----

/// A target and a random drafter for it.
struct Models {
    target: Target,
    drafter: Drafter,
    _files: tempfile::TempDir,
}

fn models(name: &str) -> Models {
    let (pair, files) = pair(name);
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    Models { target: Target::load(&pair.target).unwrap(), drafter, _files: files }
}

fn pair(name: &str) -> (Pair, tempfile::TempDir) {
    let files = tempfile::tempdir().unwrap();
    let config = Pair::open(support::disk(&folder(name)), None).unwrap().target.config;
    let layers = config.stack.attention.len();
    let target = support::Target { hidden: 64, vocab: 512, layers, ..support::Target::default() };
    // In two targets these are layers of both kinds.
    let drafter = support::Drafter {
        intermediate: 96,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        taps: vec![0, layers - 2],
        block: 16,
        ..support::Drafter::default()
    };
    support::write_drafter(files.path(), &target, &drafter);
    (Pair::open(support::disk(&folder(name)), Some(support::disk(files.path()))).unwrap(), files)
}

/// Runs the prompt of a request.
fn prefilled<'a>(models: &'a Models, request: &Request) -> (Sequence<'a>, u32) {
    let mut sequence = Sequence::new(&models.target, Some(&models.drafter));
    sequence.start(request).unwrap();
    loop {
        if let Some(first) = sequence.prefill().unwrap().next {
            return (sequence, first);
        }
    }
}

/// Greedy tokens after a prompt and the bits of the logits that chose all but the first of them.
fn ar(models: &Models, request: &Request, len: usize) -> (Vec<u32>, Vec<Vec<u32>>) {
    let (mut sequence, first) = prefilled(models, request);
    let (mut tokens, mut rows) = (vec![first], vec![]);
    while tokens.len() < len {
        sequence.verify(&[], &mut tokens).unwrap();
        rows.push(bits(sequence.logits(0).unwrap()));
    }
    (tokens, rows)
}

/// A tree with the path `right`, and beside each of its drafts a wrong sibling that has a child, in row order
/// before or after the draft.
fn bushy_tree(anchor: u32, right: &[u32], wrong_first: bool) -> Tree {
    let (mut tokens, mut parents, mut at) = (vec![anchor], vec![0], 0);
    for token in right {
        let wrong = (token + 1) % 512;
        let push = |tokens: &mut Vec<u32>, parents: &mut Vec<u32>, token: u32, parent: u32| {
            tokens.push(token);
            parents.push(parent);
            tokens.len() as u32 - 1
        };
        let sibling = |tokens: &mut Vec<u32>, parents: &mut Vec<u32>| {
            let node = push(tokens, parents, wrong, at);
            push(tokens, parents, *token, node);
        };
        if wrong_first {
            sibling(&mut tokens, &mut parents);
        }
        let next = push(&mut tokens, &mut parents, *token, at);
        if !wrong_first {
            sibling(&mut tokens, &mut parents);
        }
        at = next;
    }
    Tree::sampled(&tokens, &parents)
}

/// Rounds whose drafts are right for 0, 1, 2, ... tokens emit the tokens of AR decoding from logits with the
/// same bits: chains of 16 rows, and trees with branches before and after the accepted path, in turn.
#[test]
fn rounds_with_any_number_of_accepted_drafts_equal_ar_decoding() {
    for (name, _) in TARGETS {
        let models = models(name);
        let request = request(&prompt(30), 160, 16, 0.0);
        let (expected, rows) = ar(&models, &request, 160);
        for kind in 0..3 {
            let (mut sequence, first) = prefilled(&models, &request);
            let mut tokens = vec![first];
            for round in 0.. {
                let (at, right) = (tokens.len(), [3, 0, 7, 1, 15, 2, 5, 0, 10][round % 9]);
                if at + 17 > expected.len() {
                    break;
                }
                let accepted = &expected[at..at + right];
                match kind {
                    0 => {
                        let mut drafts = accepted.to_vec();
                        drafts.extend((right..15).map(|i| (expected[at + i] + 1) % 512));
                        sequence.verify(&drafts, &mut tokens).unwrap();
                    }
                    _ => {
                        let tree = bushy_tree(*tokens.last().unwrap(), accepted, kind == 1);
                        sequence.verify_tree(&tree, &mut tokens).unwrap();
                    }
                }
                assert_eq!(tokens.len(), at + right + 1, "{name}: kind {kind}, round {round}");
                for row in 0..=right {
                    let found = bits(sequence.logits(row).unwrap());
                    assert!(found == rows[at - 1 + row], "{name}: kind {kind}, round {round}, row {row}");
                }
            }
            assert_eq!(tokens, expected[..tokens.len()], "{name}: kind {kind}");
        }
    }
}

/// With drafts of a drafter: chains, coupled chains with many accepted drafts, and trees.
#[test]
fn drafters_decode_every_target_losslessly() {
    for (name, _) in TARGETS {
        let models = models(name);
        let mut accepted = 0;
        for (spec, temperature) in [
            (spec(VerifyMethod::Match, 0.0, None), 0.0),
            (spec(VerifyMethod::Match, 6.0, None), 6.0),
            (spec(VerifyMethod::Match, 0.0, Some(24)), 0.0),
        ] {
            let mut decoder = Sequences::new(&models.target, Some(&models.drafter), 1, 256);
            let request = Request { spec, ..seeded(&prompt(70), 40, 16, temperature, 5) };
            let report = check(&mut decoder, &request, || Ok(AcceptAll)).unwrap().unwrap();
            assert_eq!((report.tokens, report.compared, &report.identical), (40, 39, &Ok(())), "{name}");
            accepted += report.tokens - 1 - report.rounds;
        }
        assert!(accepted > 10, "{name}: {accepted} drafts accepted");
    }
}

/// Rejection and block verification emit other tokens than AR decoding, but each of them is chosen from the
/// logits of one pass over all tokens.
#[test]
fn every_verification_method_leaves_the_state_of_the_emitted_tokens() {
    for (name, _) in TARGETS {
        let models = models(name);
        let mut accepted = 0;
        for (method, tree) in [
            (VerifyMethod::Rejection, None),
            (VerifyMethod::Rejection, Some(20)),
            (VerifyMethod::Block, None),
            (VerifyMethod::Block, Some(20)),
        ] {
            let spec = spec(method, 6.0, tree);
            let request = Request { spec, ..seeded(&prompt(20), 100, 16, 6.0, 4) };
            let (mut sequence, first) = prefilled(&models, &request);
            let (mut tokens, mut rows) = (vec![first], vec![]);
            for _ in 0..6 {
                let before = tokens.len();
                sequence.round(&mut tokens).unwrap();
                rows.extend((0..tokens.len() - before).map(|row| bits(sequence.logits(row).unwrap())));
            }
            accepted += rows.len() - 6;
            let all = [&request.prompt[..], &tokens].concat();
            let normed = models.target.forward(&all, &mut cache(&models.target), &[], &mut vec![], all.len());
            let expected = logits(&models.target, &normed);
            let expected = expected.chunks(512).skip(request.prompt.len());
            assert!(
                rows.iter().zip(expected).all(|(row, expected)| *row == bits(expected)),
                "{name}: {method:?}"
            );
        }
        assert!(accepted > 10, "{name}: {accepted} drafts accepted");
    }
}

#[test]
fn a_batch_answers_as_each_alone() {
    for (name, _) in TARGETS {
        let models = models(name);
        let coupled = spec(VerifyMethod::Match, 6.0, None);
        let requests: Vec<Request> = (0..5)
            .map(|i| Request {
                spec: if i == 3 { spec(VerifyMethod::Match, 0.0, Some(16)) } else { coupled.clone() },
                ..seeded(&prompt(3 + 30 * i), 12 + i, if i == 1 { 1 } else { 16 }, 6.0, i as u64)
            })
            .collect();
        let decoder = |slots| Sequences::new(&models.target, Some(&models.drafter), slots, 256);
        let together = run_together(&mut decoder(2), &requests, keep_going);
        for (request, together) in requests.iter().zip(&together) {
            assert_eq!(answer(&run(&mut decoder(1), request)), answer(together), "{name}");
        }
    }
}

/// A turn runs only its new tokens if the history is unchanged. If an earlier token differs, a recurrent
/// state has nothing to go on from, and everything runs again. The answer is always that of a fresh start.
#[test]
fn conversations_keep_the_state_of_an_unchanged_history() {
    for (name, _) in TARGETS {
        let models = models(name);
        let recurrent = models.target.config.stack.delta_net.is_some();
        let fresh = || Sequences::new(&models.target, Some(&models.drafter), 1, 256);
        let mut decoder = fresh();
        let mut history = prompt(37);
        for turn in 0..5 {
            let block = [16, 16, 1, 1, 16][turn];
            let spec = spec(VerifyMethod::Match, 6.0, None);
            let request = Request { spec, ..seeded(&history, 14, block, 6.0, turn as u64) };
            let found = resume(&mut decoder, &request, &mut AcceptAll).unwrap();
            assert_eq!(answer(&found), answer(&run(&mut fresh(), &request)), "{name}: turn {turn}");
            // The last token of an answer has not run, and the budget may have cut a round.
            if (1..=3).contains(&turn) {
                assert!(found.kept + 4 >= history.len(), "{name}: kept {}", found.kept);
            }
            history.extend(&found.tokens);
            history.extend(prompt(3));
        }
        history[20] ^= 1;
        let request = request(&history, 8, 16, 0.0);
        let found = resume(&mut decoder, &request, &mut AcceptAll).unwrap();
        assert_eq!(found.kept, if recurrent { 0 } else { 20 }, "{name}");
        assert_eq!(answer(&found), answer(&run(&mut fresh(), &request)), "{name}: edited history");
    }
}

// ---- experts ----

/// A copy of qwen3_moe, whose bytes of some tensors are edited.
fn edited_moe(chosen: usize, edit: impl Fn(&mut dyn FnMut(&str, &dyn Fn(&mut [u8])))) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    fs::copy(folder("qwen3_moe").join("config.json"), copy.path().join("config.json")).unwrap();
    support::edit_json(copy.path(), "config.json", |config| config["num_experts_per_tok"] = chosen.into());
    let mut file = fs::read(folder("qwen3_moe").join("model.safetensors")).unwrap();
    let (size, header) = SafeTensors::read_metadata(&file).unwrap();
    edit(&mut |name, edit| {
        let (begin, end) = header.tensors()[name].data_offsets;
        edit(&mut file[8 + size + begin..8 + size + end]);
    });
    fs::write(copy.path().join("model.safetensors"), file).unwrap();
    copy
}

/// The experts of each row in layer 0 and the output of its experts.
fn first_experts(copy: &tempfile::TempDir, chosen: usize) -> Vec<(Vec<usize>, Vec<f32>)> {
    let target = load(copy.path());
    let mut seen = HashMap::new();
    target.run(&prompt(50), None, &mut cache(&target), 1, &mut |layer, name, values| {
        if layer == 0 {
            seen.insert(name, values.to_vec());
        }
    });
    let ids = seen["experts"].chunks(chosen).map(|row| row.iter().map(|id| *id as usize).collect());
    ids.zip(seen["mlp"].chunks(64).map(<[f32]>::to_vec)).collect()
}

/// Two equal rows of the router: the lower expert is chosen first.
#[test]
fn of_equal_router_logits_the_lower_expert_is_chosen() {
    // Experts 8 to 15 get the router's rows of experts 0 to 7.
    let router = |bytes: &mut [u8]| bytes.copy_within(..bytes.len() / 2, bytes.len() / 2);
    let copy = |chosen| edited_moe(chosen, |edit| edit("model.layers.0.mlp.gate.weight", &router));
    for (row, _) in first_experts(&copy(4), 4) {
        assert!(row[0] < 8 && row[2] < 8 && row[1] == row[0] + 8 && row[3] == row[2] + 8, "{row:?}");
    }
    for (row, _) in first_experts(&copy(1), 1) {
        assert!(row[0] < 8, "{row:?}");
    }
}

/// Experts 0 and 2 are equal but for the sign of their outputs, which are so large that the output of expert
/// 1 is lost beside either. So it is lost where the sum is in ascending order, and remains where the last
/// rank is last.
#[test]
fn expert_outputs_are_added_in_ascending_order() {
    let at = |expert: usize, part: &str| format!("model.layers.0.mlp.experts.{expert}.{part}_proj.weight");
    let copy = edited_moe(3, |edit| {
        edit("model.layers.0.mlp.gate.weight", &|bytes| {
            // [16][64] in bf16. Expert 1 has half the logit of experts 0 and 2, the others have 0.
            let row = 64 * 2;
            bytes.copy_within(..row, 2 * row);
            bytes.copy_within(..row, row);
            bytes[row..2 * row].as_chunks_mut::<2>().0.iter_mut().for_each(|x| scale(x, -1, false));
            bytes[3 * row..].fill(0);
        });
        for part in ["gate", "up", "down"] {
            let source = std::cell::RefCell::new(Vec::new());
            edit(&at(0, part), &|bytes| source.replace(bytes.to_vec()).clear());
            edit(&at(2, part), &|bytes| bytes.copy_from_slice(&source.borrow()));
        }
        for (expert, negative) in [(0, false), (2, true)] {
            let larger = |bytes: &mut [u8]| {
                bytes.as_chunks_mut::<2>().0.iter_mut().for_each(|x| scale(x, 60, negative));
            };
            edit(&at(expert, "down"), &larger);
        }
    });
    let rows = first_experts(&copy, 3);
    let of_rank: Vec<_> = rows.iter().filter(|(ids, _)| ids == &[0, 2, 1]).collect();
    assert!(of_rank.len() > 10, "{} rows", of_rank.len());
    for (ids, output) in of_rank {
        assert!(output.iter().all(|x| *x == 0.0), "{ids:?}: {output:?}");
    }
}

/// Multiplies a bf16 by a power of two, and by -1.
fn scale(x: &mut [u8; 2], power: i32, negative: bool) {
    let sign = if negative { -1.0 } else { 1.0 };
    *x = half::bf16::from_f32(half::bf16::from_le_bytes(*x).to_f32() * 2f32.powi(power) * sign).to_le_bytes();
}

// ---- devices ----

/// The targets that devices run.
const ON_DEVICES: [&str; 1] = ["qwen3_5"];

#[test]
fn devices_refuse_mixtures_of_experts_by_name() {
    for ((name, _), family) in TARGETS.iter().zip(["Qwen3.5", "Qwen3-MoE", "Qwen3.5-MoE", "Qwen3-Next"]) {
        let pair = Pair::open(support::disk(&folder(name)), None).unwrap();
        let plan = MemoryPlan::new(&pair, BatchConfig::new(1, 1, 128));
        if ON_DEVICES.contains(name) {
            assert!(plan.unwrap().lines.iter().any(|line| line.what == "recurrent states"));
            continue;
        }
        let refused = plan.unwrap_err().to_string();
        assert!(refused.ends_with(&format!("config.json: the kernels do not run {family} yet")), "{refused}");
    }
}

/// The reference computes in f32, devices with bf16 activations: where its best logits are closer than this, they may
/// choose the other token. Logits are about 10; the one case seen is at 0.007.
const NEAR: f32 = 0.02;

/// Chains, coupled chains with accepted drafts, and trees: tokens and logits.
#[test]
fn device_rounds_equal_ar_decoding_bit_for_bit() {
    on_gpu(|device| {
        for (name, (turn, (spec, temperature))) in ON_DEVICES.iter().flat_map(|name| {
            let cases = [
                (spec(VerifyMethod::Match, 0.0, None), 0.0),
                (spec(VerifyMethod::Match, 6.0, None), 6.0),
                (spec(VerifyMethod::Match, 0.0, Some(24)), 6.0),
            ];
            cases.into_iter().enumerate().map(move |case| (*name, case))
        }) {
            set_schedule(turn);
            let (pair, _files) = pair(name);
            let models = DeviceModels::load(device, &pair, 256).unwrap();
            let config = BatchConfig::new(1, 16, 192).with_trees(if turn == 2 { 24 } else { 0 });
            let mut batch = Batch::new(device, &models, config).unwrap();
            let request = Request { spec, ..seeded(&prompt(70), 24, 16, temperature, 5) };
            let report = check(&mut batch, &request, || Ok(AcceptAll)).unwrap().unwrap();
            assert_eq!(
                (report.tokens, report.compared, &report.identical),
                (24, 23, &Ok(())),
                "{name}, {turn}"
            );
            let accepted = report.tokens - 1 - report.rounds;
            println!("{name}, {turn}: {accepted} drafts accepted in {} rounds", report.rounds);
            assert!(turn != 1 || accepted > 2, "{name}: {accepted} drafts accepted");
        }
    });
}

/// Three requests share two slots, so that one starts where another has left its state. Each answers as alone.
#[test]
fn a_device_batch_answers_as_each_request_alone() {
    on_gpu(|device| {
        for name in ON_DEVICES {
            let (pair, _files) = pair(name);
            let models = DeviceModels::load(device, &pair, 256).unwrap();
            let decoder = |slots| Batch::new(device, &models, BatchConfig::new(slots, 16, 128)).unwrap();
            let request = |i: usize, block| Request {
                spec: spec(VerifyMethod::Match, 6.0, None),
                ..seeded(&prompt(3 + 30 * i), 9 + 3 * i, block, 6.0, i as u64)
            };
            let requests = [request(1, 16), request(0, 16), request(2, 1)];
            let together = run_together(&mut decoder(2), &requests, keep_going);
            // In one slot, one after the other.
            let mut alone = decoder(1);
            for (request, together) in requests.iter().zip(&together) {
                assert_eq!(answer(&run(&mut alone, request)), answer(together), "{name}");
            }
        }
    });
}

/// A turn goes on from the state before the last round of the turn before. After an edit, and where the drafter lacks
/// features of earlier positions, everything runs again.
#[test]
fn device_conversations_keep_the_state_of_an_unchanged_history() {
    on_gpu(|device| {
        for name in ON_DEVICES {
            let (pair, _files) = pair(name);
            let models = DeviceModels::load(device, &pair, 256).unwrap();
            let fresh = || Batch::new(device, &models, BatchConfig::new(1, 16, 192)).unwrap();
            let (mut batch, mut history) = (fresh(), prompt(37));
            for (turn, block) in [16, 16, 1, 1, 16].into_iter().enumerate() {
                let spec = spec(VerifyMethod::Match, 6.0, None);
                if turn == 4 {
                    history[20] ^= 1;
                }
                let request = Request { spec, ..seeded(&history, 9, block, 6.0, turn as u64) };
                let found = resume(&mut batch, &request, &mut AcceptAll).unwrap();
                assert_eq!(answer(&found), answer(&run(&mut fresh(), &request)), "{name}: turn {turn}");
                println!("{name}, turn {turn}: {} of {} kept", found.kept, history.len());
                match turn {
                    0 | 4 => assert_eq!(found.kept, 0, "{name}: turn {turn}"),
                    _ => assert!(
                        found.kept + 3 + 16 >= history.len(),
                        "{name}: turn {turn}: kept {}",
                        found.kept
                    ),
                }
                history.extend(&found.tokens);
                history.extend(prompt(3));
            }
        }
    });
}

#[test]
fn greedy_tokens_of_devices_equal_the_reference_except_near_ties() {
    on_gpu(|device| {
        for name in ON_DEVICES {
            let (reference, mut same, mut all) = (Reference::open(name), 0, 0);
            let pair = Pair::open(support::disk(&folder(name)), None).unwrap();
            let models = DeviceModels::load(device, &pair, 256).unwrap();
            for prompt in PROMPTS {
                let ids = reference.ids(&format!("{prompt}.ids"));
                let mut batch = Batch::new(device, &models, BatchConfig::new(1, 1, 128)).unwrap();
                let found = run(&mut batch, &request(&ids, 24, 1, 0.0)).tokens;
                let expected = reference.ids(&format!("{prompt}.greedy"));
                let equal = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
                println!("{name}, {prompt}: {equal} of {}", expected.len());
                if equal < expected.len() {
                    let top = &reference.tensor(&format!("{prompt}.top2"))[2 * equal..][..2];
                    assert!(top[0] - top[1] < NEAR, "{name}, {prompt}: token {equal} differs at {top:?}");
                }
                (same, all) = (same + equal, all + expected.len());
            }
            assert!(3 * same > 2 * all, "{name}: {same} of {all} tokens before near ties");
        }
    });
}
