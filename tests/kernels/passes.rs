//! Whole passes through the kernels against the CPU models: prefill chunks, AR steps, verification and draft
//! passes, on the demo pair and on a random pair with other heads.

use crate::support;
use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::model::{self, Drafter, Target};
use dflash::gpu::device::{Buffer, Device, Node};
use dflash::gpu::kernels::head::Head;
use dflash::gpu::loader::Loader;
use dflash::gpu::model::{
    FeatureProjection, KvCache, PAGE, Pass, Row, Scratch, ScratchSizes, Transformer, Vocabulary,
};
use kernel::*;

/// Bound of the relative error. Activations are rounded to bf16 about ten times per layer, 2^-9 each. The
/// largest error seen is 7.3e-3.
const BOUND: f64 = 1.5e-2;
const POSITIONS: usize = 256;
const CHUNK: usize = 48;

/// Both models of a pair, on the CPU and on a device.
struct Rig<'a> {
    device: &'a dyn Device,
    target: Target,
    drafter: Drafter,
    stack: Transformer,
    vocabulary: Vocabulary,
    cache: KvCache,
    scratch: Scratch,
    injection: FeatureProjection,
    draft_stack: Transformer,
    draft_cache: KvCache,
    draft_scratch: Scratch,
}

/// Fills the page table in descending order, so that a page's number is not its index.
fn fill_table(device: &dyn Device, cache: &KvCache) {
    let pages: Vec<u32> = (0..cache.pages as u32).rev().collect();
    device.upload(&cache.table, &to_bytes(&pages)).unwrap();
}

impl Rig<'_> {
    fn new<'a>(device: &'a dyn Device, pair: &Pair, sequences: usize, block: usize) -> Rig<'a> {
        let drafter_model = pair.drafter().unwrap();
        let (t, d) = (&pair.target.config, &drafter_model.config);
        let (taps, hidden) = (d.taps.len(), t.stack.hidden);
        let mut loader = Loader::new(device, &pair.target.weights);
        let stack = Transformer::load(&mut loader, "model.", &t.stack, None, POSITIONS).unwrap();
        let vocabulary = Vocabulary::load(&mut loader, t).unwrap();
        loader.switch_to(&drafter_model.weights);
        let draft_stack = Transformer::load(&mut loader, "", &d.stack, None, POSITIONS).unwrap();
        let injection = FeatureProjection::load(&mut loader, hidden, taps).unwrap();
        loader.run(&mut |_, _| ()).unwrap();
        let pages = POSITIONS / PAGE;
        let cache = KvCache::new(device, &t.stack, sequences * pages, sequences, pages, block).unwrap();
        let draft_cache = KvCache::new(device, &d.stack, sequences * pages, sequences, pages, block).unwrap();
        fill_table(device, &cache);
        fill_table(device, &draft_cache);
        let sizes = ScratchSizes {
            sequences,
            block,
            chunk: CHUNK,
            injected: 0,
            head: Some(vocabulary.shape()),
            features: None,
            convolution: None,
            pairs: false,
        };
        let draft_sizes =
            ScratchSizes { injected: sequences * block, features: Some(taps * hidden), ..sizes };
        Rig {
            scratch: Scratch::new(device, &t.stack, &cache, sizes).unwrap(),
            draft_scratch: Scratch::new(device, &d.stack, &draft_cache, draft_sizes).unwrap(),
            target: Target::load(&pair.target).unwrap(),
            drafter: Drafter::load(drafter_model).unwrap(),
            stack,
            vocabulary,
            cache,
            injection,
            draft_stack,
            draft_cache,
            device,
        }
    }

    fn features(&self, rows: usize) -> Buffer {
        let taps = self.drafter.config.taps.len();
        poisoned::<u16>(self.device, rows * taps * self.target.config.stack.hidden)
    }

    /// Logits of `rows` rows of the last pass, from row `first` on.
    fn logits(&self, stack: &Transformer, scratch: &Scratch, first: usize, rows: usize) -> Vec<f32> {
        let vocab = self.vocabulary.vocab;
        let best = poisoned::<u64>(self.device, rows * vocab.div_ceil(128));
        let logits = poisoned::<f32>(self.device, rows * vocab);
        let head = Head { rows, vocab, k: stack.config.hidden, multiplier: 1.0, softcap: None, ids: vocab };
        self.vocabulary
            .head
            .run(self.device, stack, scratch, first, head, None, &best, Some(&logits), None)
            .unwrap();
        download(self.device, &logits)
    }

    /// A target pass of `sequence`: `tokens` at positions `at..`, as a prompt chunk or as a block. Returns
    /// the features and, for a block, the logits of all rows.
    fn target_pass(&self, sequence: usize, at: usize, tokens: &[u32], prompt: bool) -> (Vec<u16>, Vec<f32>) {
        let table = rows_at(sequence, at, tokens.len());
        self.pass_of(&table, at, tokens, None, prompt.then_some(sequence))
    }

    /// Like [`Rig::target_pass`], for a tree of sequence 0 with these masks.
    fn tree_pass(&self, at: usize, tokens: &[u32], masks: &[u64]) -> (Vec<u16>, Vec<f32>) {
        let mut table = rows_at(0, at, tokens.len());
        for (row, mask) in table.chunks_mut(Row::BYTES).zip(masks) {
            row[4..8].copy_from_slice(&(at as u32 + mask.count_ones() - 1).to_le_bytes());
        }
        self.pass_of(&table, at, tokens, Some(masks), None)
    }

    fn pass_of(
        &self,
        table: &[u8],
        at: usize,
        tokens: &[u32],
        masks: Option<&[u64]>,
        prompt: Option<usize>,
    ) -> (Vec<u16>, Vec<f32>) {
        let (device, rows) = (self.device, tokens.len());
        let features = self.features(rows);
        let table = upload(device, table);
        let spans = upload(device, &[at as u32, rows as u32]);
        let masks = masks.map(|masks| upload(device, masks));
        self.vocabulary.embedding.embed(device, &self.scratch, &upload(device, tokens), rows, 1.0).unwrap();
        let pass = Pass {
            sequences: 1,
            block: rows,
            injected: 0,
            table: &table,
            spans: &spans,
            masks: masks.as_ref(),
            prompt,
            num_active: None,
            taps: Some((&self.drafter.config.taps, &features)),
        };
        self.stack.run(device, &self.scratch, &self.cache, &pass).unwrap();
        let logits = match prompt {
            Some(_) => vec![],
            None => self.logits(&self.stack, &self.scratch, 0, rows),
        };
        (download(device, &features), logits)
    }

    /// Features and logits of the CPU model for `tokens` from position `at` on.
    fn expected(&self, tokens: &[u32], at: usize) -> (Vec<f32>, Vec<f32>) {
        let mut cache = model::Cache::new(&self.target.config.stack, tokens.len()).unwrap();
        let (mut features, mut logits) = (vec![], vec![]);
        let taps = &self.drafter.config.taps;
        let normed = self.target.forward(tokens, &mut cache, taps, &mut features, tokens.len() - at);
        self.target.logits(&normed, &mut logits);
        (features[features.len() / tokens.len() * at..].to_vec(), logits)
    }
}

/// The row table of one sequence at positions `at..`, with query rows in order.
fn rows_at(sequence: usize, at: usize, rows: usize) -> Vec<u8> {
    let row = |i: usize| Row {
        sequence: sequence as u32,
        position: (at + i) as u32,
        slot: (at + i) as u32,
        query: i as u32,
    };
    (0..rows).flat_map(|i| row(i).to_bytes()).collect()
}

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

fn tokens(pair: &Pair, count: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.below(pair.target.config.vocab) as u32).collect()
}

fn opened(written: support::Pair) -> (support::Pair, Pair) {
    let pair = Pair::open(support::disk(&written.target), Some(support::disk(&written.drafter))).unwrap();
    (written, pair)
}

/// A random pair with heads of 128, groups of 3 and 1, a target without q/k norm, an untied head and odd
/// sizes.
fn random_pair() -> (support::Pair, Pair) {
    let target = support::Target {
        llama: true,
        hidden: 160,
        intermediate: 160,
        layers: 3,
        heads: 3,
        kv_heads: 1,
        head_dim: 128,
        vocab: 301,
        tied: false,
        dtype: dflash::checkpoint::safetensors::Dtype::Bf16,
        ..support::Target::default()
    };
    let drafter = support::Drafter {
        intermediate: 96,
        heads: 2,
        kv_heads: 2,
        head_dim: 128,
        taps: vec![1, 0],
        dtype: dflash::checkpoint::safetensors::Dtype::Bf16,
        ..support::Drafter::default()
    };
    opened(support::write_pair(&target, &drafter))
}

/// The heads and the hidden size of SmolLM2-135M: 9 heads of 64 on 3 KV heads, 4.5 blocks of 128 columns.
fn nine_heads() -> (support::Pair, Pair) {
    let target = support::Target {
        llama: true,
        hidden: 576,
        intermediate: 96,
        layers: 2,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 301,
        ..support::Target::default()
    };
    let drafter = support::Drafter {
        intermediate: 96,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        taps: vec![0],
        ..support::Drafter::default()
    };
    opened(support::write_pair(&target, &drafter))
}

fn close(what: &str, out: &[f32], reference: &[f32]) {
    let error = relative_error(out, reference);
    assert!(error < BOUND, "{what}: error {error:.2e}, expected below {BOUND:.0e}");
}

fn chunks_and_blocks_equal_the_reference(device: &dyn Device, pair: &Pair) {
    let rig = Rig::new(device, pair, 1, 16);
    let tokens = tokens(pair, 116, 1);
    let mut features = vec![];
    for at in (0..100).step_by(CHUNK) {
        let chunk = &tokens[at..(at + CHUNK).min(100)];
        features.extend(rig.target_pass(0, at, chunk, true).0);
    }
    let (more, logits) = rig.target_pass(0, 100, &tokens[100..], false);
    features.extend(more);
    let (expected, _) = rig.expected(&tokens, 0);
    close("features", &from_bf16(&features), &expected);
    close("logits", &logits, &rig.expected(&tokens, 100).1);
}

#[test]
fn chunks_and_blocks_of_the_demo_target_equal_the_reference() {
    let pair = &demo();
    on_gpu(|device| chunks_and_blocks_equal_the_reference(device, pair));
}

#[test]
fn chunks_and_blocks_of_a_random_target_equal_the_reference() {
    for pair in [random_pair().1, nine_heads().1] {
        on_gpu(|device| chunks_and_blocks_equal_the_reference(device, &pair));
    }
}

fn steps_equal_blocks_bit_for_bit(device: &dyn Device, pair: &Pair) {
    let tokens = tokens(pair, 80, 2);
    // Contexts that end just before the end of a page.
    for (context, block) in [(57, 16), (62, 7), (60, 2)] {
        let rig = Rig::new(device, pair, 1, 16);
        rig.target_pass(0, 0, &tokens[..CHUNK], true);
        rig.target_pass(0, CHUNK, &tokens[CHUNK..context], true);
        let (features, logits) = rig.target_pass(0, context, &tokens[context..context + block], false);
        for i in 0..block {
            let (step_features, row) = rig.target_pass(0, context + i, &tokens[context + i..][..1], false);
            assert_eq!(to_bytes(&row), to_bytes(&logits[i * row.len()..][..row.len()]), "row {i} of {block}");
            assert_eq!(
                step_features,
                features[i * step_features.len()..][..step_features.len()],
                "features of row {i} of {block}"
            );
        }
    }
}

#[test]
fn ar_steps_equal_a_verification_block_bit_for_bit() {
    let pair = &demo();
    on_gpu(|device| steps_equal_blocks_bit_for_bit(device, pair));
    let pair = &random_pair().1;
    on_gpu(|device| steps_equal_blocks_bit_for_bit(device, pair));
}

/// Compares every row of a tree with its path as a chain. About a third of the rows are children of the row
/// before them, the others of a random row.
fn trees_equal_chains_bit_for_bit(device: &dyn Device, pair: &Pair) {
    let mut random = Random::new(4);
    // Paths that cross the end of a page and of a split.
    for (context, rows) in [(57, 16), (62, 9), (121, 16)] {
        let rig = Rig::new(device, pair, 1, 16);
        let tokens = tokens(pair, context + rows, context as u64);
        for (i, chunk) in tokens[..context].chunks(CHUNK).enumerate() {
            rig.target_pass(0, i * CHUNK, chunk, true);
        }
        let tokens = &tokens[context..];
        let mut masks = vec![1u64];
        for row in 1..rows {
            let parent = if random.below(3) == 0 { row - 1 } else { random.below(row) };
            masks.push(masks[parent] | 1 << row);
        }
        let (features, logits) = rig.tree_pass(context, tokens, &masks);
        // The path of each leaf, as a chain, has every row of the tree.
        let is_leaf = |row: &usize| masks.iter().filter(|mask| *mask >> row & 1 == 1).count() == 1;
        for leaf in (0..rows).filter(is_leaf) {
            let path: Vec<usize> = (0..rows).filter(|row| masks[leaf] >> row & 1 == 1).collect();
            let path_tokens: Vec<u32> = path.iter().map(|&row| tokens[row]).collect();
            let (features_of_path, logits_of_path) = rig.target_pass(0, context, &path_tokens, false);
            let (width, vocab) = (features_of_path.len() / path.len(), logits_of_path.len() / path.len());
            for (at, &row) in path.iter().enumerate() {
                let what = format!("row {row} of {rows} after {context}, on the path to {leaf}");
                let (own, chain) = (&logits[row * vocab..][..vocab], &logits_of_path[at * vocab..][..vocab]);
                assert_eq!(to_bytes(chain), to_bytes(own), "{what}");
                let chain = &features_of_path[at * width..][..width];
                assert_eq!(chain, &features[row * width..][..width], "features, {what}");
            }
        }
    }
}

#[test]
fn every_row_of_a_tree_equals_its_path_as_a_chain_bit_for_bit() {
    let pair = &demo();
    on_gpu(|device| trees_equal_chains_bit_for_bit(device, pair));
    let pair = &random_pair().1;
    on_gpu(|device| trees_equal_chains_bit_for_bit(device, pair));
}

fn draft_equals_the_reference(device: &dyn Device, pair: &Pair) {
    let (block, known, pending) = (8, 40, 3);
    let rig = Rig::new(device, pair, 1, block);
    let d = &rig.drafter.config;
    let length = known + pending;
    let tokens = tokens(pair, length + 1, 3);
    let (features, _) = rig.expected(&tokens[..length], 0);
    let features = to_bf16(&features);
    let width = features.len() / length;

    // The features of the prompt; then those of the last round, followed by the rows of the block.
    let numbers: Vec<u32> = (0..known as u32).collect();
    let prompt = upload(device, &features[..known * width]);
    let (s, cache) = (&rig.draft_scratch, &rig.draft_cache);
    rig.injection.run(device, s, known, &prompt, &upload(device, &numbers), true, None).unwrap();
    let mut table = rows_at(0, 0, known);
    table.chunks_mut(Row::BYTES).for_each(|row| row[12..].fill(0xff));
    rig.draft_stack.write_context_kv(device, s, cache, &upload(device, &table), known, true, None).unwrap();

    let last = upload(device, &features[known * width..]);
    let gather: Vec<u32> =
        (0..block as u32).map(|i| if i < pending as u32 { i } else { Row::NONE }).collect();
    rig.injection.run(device, s, block, &last, &upload(device, &gather), false, None).unwrap();
    let none = Row { sequence: Row::NONE, position: 0, slot: Row::NONE, query: Row::NONE };
    let mut table = rows_at(0, known, pending);
    table.chunks_mut(Row::BYTES).for_each(|row| row[12..].fill(0xff));
    table.extend((pending..block).flat_map(|_| none.to_bytes()));
    table.extend(rows_at(0, length, block));
    let mut ids = vec![d.mask_token; block];
    ids[0] = tokens[length];
    rig.vocabulary.embedding.embed(device, s, &upload(device, &ids), block, d.embedding_scale).unwrap();
    let pass = Pass {
        sequences: 1,
        block,
        injected: block,
        table: &upload(device, &table),
        spans: &upload(device, &[length as u32, block as u32]),
        masks: None,
        prompt: None,
        num_active: None,
        taps: None,
    };
    rig.draft_stack.run(device, s, cache, &pass).unwrap();
    let logits = rig.logits(&rig.draft_stack, s, block, block);

    let mut context = model::Cache::new(&d.stack, length + block).unwrap();
    let (mut expected, widened) = (vec![], from_bf16(&features));
    rig.drafter.inject(&widened, &mut context);
    let hidden = rig.drafter.hidden(&rig.target, tokens[length], block, &mut context, |_, _| ());
    rig.target.logits(&hidden, &mut expected);
    close("draft", &logits, &expected);
}

#[test]
fn drafts_of_the_demo_drafter_equal_the_reference() {
    let pair = &demo();
    on_gpu(|device| draft_equals_the_reference(device, pair));
}

#[test]
fn drafts_of_a_random_drafter_equal_the_reference() {
    for pair in [random_pair().1, nine_heads().1] {
        on_gpu(|device| draft_equals_the_reference(device, &pair));
    }
}

#[test]
fn a_pass_is_six_launches_per_layer_and_one() {
    let pair = demo();
    let device = &TestGpu::new();
    let rig = Rig::new(device, &pair, 1, 16);
    let table = upload(device, &rows_at(0, 0, 16));
    let spans = upload(device, &[0u32, 16]);
    let pass = Pass {
        sequences: 1,
        block: 16,
        injected: 0,
        table: &table,
        spans: &spans,
        masks: None,
        prompt: None,
        num_active: None,
        taps: None,
    };
    let graph = device.capture(&mut || rig.stack.run(device, &rig.scratch, &rig.cache, &pass)).unwrap();
    let launches = graph.nodes.iter().filter(|node| matches!(node, Node::Launch(_))).count();
    assert_eq!((launches, graph.nodes.len()), (1 + 6 * 6, 1 + 6 * 6));
}
