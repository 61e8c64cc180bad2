//! Target and drafter in plain f32: the `cpu` device, and the oracle that the kernels are held against. Read it beside
//! dflash.md sections 3 to 5 (arXiv 2602.06036); the arithmetic underneath is in `cpu.rs`.

use crate::config::{Attention, DrafterConfig, Stack, TargetConfig};
use crate::control::{ByConfidence, Controller, Costs, WherePays};
use crate::cpu::{self, Kv, Matrix};
use crate::engine::{Backend, Decoder, Emitted, Prefill, Request};
use crate::pair::{Model, Pair};
use crate::rules::{self, Dice, Drafting, Probabilities, Rule};
use crate::tree::{self, Tree};
use crate::verify::{Sampling, judge, walk};
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// Rows of a prompt that go through a model together.
const CHUNK: usize = 64;

// ---- one decoder layer, shared by target and drafter ----

struct Layer {
    input_norm: Vec<f32>,           // [hidden]
    q: Matrix,                      // [heads * head_dim][hidden]
    k: Matrix,                      // [kv_heads * head_dim][hidden]
    v: Matrix,                      // [kv_heads * head_dim][hidden]
    o: Matrix,                      // [hidden][heads * head_dim]
    qk_norm: Option<[Vec<f32>; 2]>, // [head_dim] each
    post_norm: Vec<f32>,            // [hidden]
    gate: Matrix,                   // [intermediate][hidden]
    up: Matrix,                     // [intermediate][hidden]
    down: Matrix,                   // [hidden][intermediate]
}

impl Layer {
    fn load(file: &Checkpoint, prefix: &str, s: &Stack) -> Result<Layer> {
        let vector = |name: &str, len| {
            Ok::<_, Error>(cpu::to_f32(&file.tensor(&format!("{prefix}.{name}.weight"), &[len])?))
        };
        let matrix = |name: &str, rows, cols| matrix(file, &format!("{prefix}.{name}.weight"), rows, cols);
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        Ok(Layer {
            input_norm: vector("input_layernorm", s.hidden)?,
            q: matrix("self_attn.q_proj", q, s.hidden)?,
            k: matrix("self_attn.k_proj", kv, s.hidden)?,
            v: matrix("self_attn.v_proj", kv, s.hidden)?,
            o: matrix("self_attn.o_proj", s.hidden, q)?,
            qk_norm: match s.qk_norm {
                true => {
                    Some([vector("self_attn.q_norm", s.head_dim)?, vector("self_attn.k_norm", s.head_dim)?])
                }
                false => None,
            },
            post_norm: vector("post_attention_layernorm", s.hidden)?,
            gate: matrix("mlp.gate_proj", s.intermediate, s.hidden)?,
            up: matrix("mlp.up_proj", s.intermediate, s.hidden)?,
            down: matrix("mlp.down_proj", s.hidden, s.intermediate)?,
        })
    }
}

fn matrix(file: &Checkpoint, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
    Ok(Matrix::new(file.tensor(name, &[rows, cols])?))
}

/// One model's keys and values for one sequence, positions `0..len`, and the buffers of a pass.
pub struct Cache {
    layers: Vec<Kv>,
    len: usize,
    /// `[positions][rotary_dims]`: cosines, then sines; grows with the positions used.
    rope: Vec<f32>,
    frequencies: Vec<f64>,
    magnitude: f64,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    y: Vec<f32>,    // [rows][hidden]: normed input of a sublayer
    q: Vec<f32>,    // [rows][heads * head_dim]
    k: Vec<f32>,    // [rows][kv_heads * head_dim]
    v: Vec<f32>,    // [rows][kv_heads * head_dim]
    a: Vec<f32>,    // [rows][heads * head_dim]: attention's output
    z: Vec<f32>,    // [rows][hidden]: a sublayer's output
    gate: Vec<f32>, // [rows][intermediate]
    up: Vec<f32>,   // [rows][intermediate]
}

impl Cache {
    /// Room for `positions`. What grows with them is asked for here, so that too little memory is an error and not an
    /// abort.
    pub fn new(stack: &Stack, positions: usize) -> Result<Cache> {
        let (frequencies, magnitude) = stack.rope.frequencies();
        let kv = |_| Kv::new(stack.kv_heads, stack.head_dim, 0);
        let mut cache = Cache {
            layers: stack.attention.iter().map(kv).collect::<Result<_>>()?,
            len: 0,
            rope: Vec::new(),
            frequencies,
            magnitude,
            scratch: Scratch::default(),
        };
        cache.grow(positions)?;
        Ok(cache)
    }

    /// Room for `positions` in all; those held stay.
    pub fn grow(&mut self, positions: usize) -> Result<()> {
        let rotations = positions * 2 * self.frequencies.len();
        self.rope
            .try_reserve_exact(rotations.saturating_sub(self.rope.len()))
            .map_err(|_| Error::Memory(format!("no memory for the rotations of {positions} positions")))?;
        self.layers.iter_mut().try_for_each(|kv| kv.grow(positions, self.len))
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets positions `len..`.
    pub fn crop(&mut self, len: usize) {
        assert!(len <= self.len);
        self.len = len;
    }

    /// Of rows written at positions `at..` keeps those of `path`, as positions `at..` in its order, and forgets the others.
    fn keep(&mut self, at: usize, path: &[usize]) {
        for kv in &mut self.layers {
            tree::moves(path).for_each(|(from, to)| kv.copy(at + from, at + to));
        }
        self.crop(at + path.len());
    }

    /// Makes cosines and sines up to position `end`. Angles are f32 products, as in the reference implementation.
    fn rotate_to(&mut self, end: usize) {
        let width = 2 * self.frequencies.len();
        for position in self.rope.len() / width.max(1)..end {
            let angle = |f: &f64| (position as f32 * *f as f32) as f64;
            self.rope.extend(self.frequencies.iter().map(|f| (angle(f).cos() * self.magnitude) as f32));
            self.rope.extend(self.frequencies.iter().map(|f| (angle(f).sin() * self.magnitude) as f32));
        }
    }
}

/// `x` `[rows][heads * head_dim]`, normed if there is a norm, and rotated to positions `at..`, or to those of a tree whose
/// anchor is at `at` (dflash.md 3.4).
fn rotate(
    stack: &Stack,
    norm: Option<&[f32]>,
    rope: &[f32],
    at: usize,
    tree: Option<&Tree>,
    x: &mut [f32],
    heads: usize,
) {
    if let Some(norm) = norm {
        cpu::rms_norm_in_place(x, norm, stack.eps);
    }
    let width = stack.rope.rotary_dims;
    for (row, x) in x.chunks_mut(heads * stack.head_dim).enumerate() {
        let position = at + tree.map_or(row, |tree| tree.depths[row] as usize);
        cpu::rope(x, heads, stack.head_dim, &rope[position * width..][..width], width);
    }
}

/// `k` and `v` of the pass's rows for layer `i`, written at positions `at..`: a tree's beside each other, though `k` is
/// rotated to where the row stands on its path.
fn write_kv(stack: &Stack, layer: &Layer, cache: &mut Cache, i: usize, at: usize, tree: Option<&Tree>) {
    let Cache { layers, rope, scratch: Scratch { k, v, .. }, .. } = cache;
    let norm = layer.qk_norm.as_ref().map(|[_, norm]| &norm[..]);
    rotate(stack, norm, rope, at, tree, k, stack.kv_heads);
    layers[i].write(at, k, v);
}

/// Attention of a tree's rows. Every row's ancestors are brought to the positions that they have on its path, so that
/// each of its sums is the one that plain decoding forms, bit for bit. Leaves keys and values as they were before.
fn tree_attention(stack: &Stack, cache: &mut Cache, i: usize, at: usize, tree: &Tree) {
    let Cache { layers, scratch: s, .. } = cache;
    let (kv, width) = (&mut layers[i], stack.kv_heads * stack.head_dim);
    let mut own = Vec::new();
    s.a.clear();
    for (row, q) in s.q.chunks(stack.heads * stack.head_dim).enumerate() {
        let mut end = at;
        for row in tree.path(row) {
            kv.write(end, &s.k[row * width..][..width], &s.v[row * width..][..width]);
            end += 1;
        }
        cpu::attention(q, stack.heads, kv, &|_| visible(stack.attention[i], end - 1, end), &mut own);
        s.a.extend_from_slice(&own);
    }
    kv.write(at, &s.k, &s.v);
}

/// The keys that the query at `position` sees when keys `0..end` exist (dflash.md 3.6).
fn visible(rule: Attention, position: usize, end: usize) -> std::ops::Range<usize> {
    let last = match (rule.causal, rule.window) {
        (true, _) => position + 1,
        (false, Some(window)) => end.min(position.saturating_add(window)),
        (false, None) => end,
    };
    (position + 1).saturating_sub(rule.window.unwrap_or(usize::MAX))..last
}

/// Layer `i` over `x` [rows][hidden] in place: rows stand at positions `at..`, keys `0..at+rows` exist once it has
/// written its own (dflash.md 3.4; the target is the same with causal attention). A tree's rows see what is before `at`,
/// and their own paths.
fn forward_layer(
    stack: &Stack,
    layer: &Layer,
    cache: &mut Cache,
    i: usize,
    at: usize,
    tree: Option<&Tree>,
    x: &mut [f32],
) {
    let rows = x.len() / stack.hidden;
    let s = &mut cache.scratch;
    cpu::rms_norm(x, &layer.input_norm, stack.eps, &mut s.y);
    cpu::linear(&s.y, rows, [(&layer.q, &mut s.q), (&layer.k, &mut s.k), (&layer.v, &mut s.v)]);
    let norm = layer.qk_norm.as_ref().map(|[norm, _]| &norm[..]);
    rotate(stack, norm, &cache.rope, at, tree, &mut s.q, stack.heads);
    write_kv(stack, layer, cache, i, at, tree);

    match tree {
        None => {
            let (s, rule) = (&mut cache.scratch, stack.attention[i]);
            let visible = |row: usize| visible(rule, at + row, at + rows);
            cpu::attention(&s.q, stack.heads, &cache.layers[i], &visible, &mut s.a);
        }
        Some(tree) => tree_attention(stack, cache, i, at, tree),
    }
    let s = &mut cache.scratch;
    cpu::linear(&s.a, rows, [(&layer.o, &mut s.z)]);
    cpu::add(x, &s.z);

    cpu::rms_norm(x, &layer.post_norm, stack.eps, &mut s.y);
    cpu::linear(&s.y, rows, [(&layer.gate, &mut s.gate), (&layer.up, &mut s.up)]);
    cpu::swiglu(&mut s.gate, &s.up);
    cpu::linear(&s.gate, rows, [(&layer.down, &mut s.z)]);
    cpu::add(x, &s.z);
}

// ---- the target ----

/// A Qwen3 or Llama causal language model.
pub struct Target {
    pub config: TargetConfig,
    embedding: Matrix,    // [vocab][hidden]
    head: Option<Matrix>, // [vocab][hidden]; none: the embedding
    norm: Vec<f32>,       // [hidden]
    layers: Vec<Layer>,
}

impl Target {
    /// Weights stay where the checkpoint has them.
    pub fn load(model: &Model<TargetConfig>) -> Result<Target> {
        let (config, file) = (model.config.clone(), &model.weights);
        file.need_files()?;
        let s = &config.stack;
        Ok(Target {
            embedding: matrix(file, "model.embed_tokens.weight", config.vocab, s.hidden)?,
            head: match config.tied {
                true => None,
                false => Some(matrix(file, "lm_head.weight", config.vocab, s.hidden)?),
            },
            norm: cpu::to_f32(&file.tensor("model.norm.weight", &[s.hidden])?),
            layers: (0..s.attention.len())
                .map(|i| Layer::load(file, &format!("model.layers.{i}"), s))
                .collect::<Result<_>>()?,
            config,
        })
    }

    /// Raw embedding rows times `scale`, `[tokens][hidden]`.
    pub fn embed(&self, tokens: &[u32], scale: f32) -> Vec<f32> {
        let hidden = self.config.stack.hidden;
        let mut x = vec![0.0; tokens.len() * hidden];
        for (token, row) in tokens.iter().zip(x.chunks_mut(hidden)) {
            self.embedding.row(*token as usize, scale, row);
        }
        x
    }

    /// `[rows][vocab]` from final-normed rows `[rows][hidden]`.
    pub fn logits(&self, normed: &[f32], out: &mut Vec<f32>) {
        let rows = normed.len() / self.config.stack.hidden;
        cpu::linear(normed, rows, [(self.head.as_ref().unwrap_or(&self.embedding), out)]);
    }

    /// Runs `tokens` at positions `cache.len()..`. Fills `features` `[tokens][taps * hidden]`, the residual stream
    /// after each tapped layer, in list order (dflash.md 3.1). Returns the final-normed last rows, `[last][hidden]`.
    pub fn forward(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        taps: &[usize],
        features: &mut Vec<f32>,
        last: usize,
    ) -> Vec<f32> {
        self.run(tokens, None, cache, taps, features, last)
    }

    /// Runs a tree whose anchor is at position `cache.len()`: [`Target::forward`] of each of its paths, bit for bit, for all
    /// rows at once. Row `i`'s keys and values are left at position `cache.len() + i`, whatever its depth.
    pub fn forward_tree(
        &self,
        tree: &Tree,
        cache: &mut Cache,
        taps: &[usize],
        features: &mut Vec<f32>,
    ) -> Vec<f32> {
        self.run(&tree.tokens, Some(tree), cache, taps, features, tree.rows())
    }

    fn run(
        &self,
        tokens: &[u32],
        tree: Option<&Tree>,
        cache: &mut Cache,
        taps: &[usize],
        features: &mut Vec<f32>,
        last: usize,
    ) -> Vec<f32> {
        let s = &self.config.stack;
        let at = cache.len;
        cache.rotate_to(at + tokens.len());
        features.resize(tokens.len() * taps.len() * s.hidden, 0.0);
        let mut x = self.embed(tokens, 1.0);
        for (i, layer) in self.layers.iter().enumerate() {
            forward_layer(s, layer, cache, i, at, tree, &mut x);
            for (j, _) in taps.iter().enumerate().filter(|(_, tap)| **tap == i) {
                for (row, x) in x.chunks(s.hidden).enumerate() {
                    features[(row * taps.len() + j) * s.hidden..][..s.hidden].copy_from_slice(x);
                }
            }
        }
        cache.len = at + tokens.len();
        let mut normed = Vec::new();
        cpu::rms_norm(&x[(tokens.len() - last) * s.hidden..], &self.norm, s.eps, &mut normed);
        normed
    }
}

// ---- the drafter ----

/// A DFlash drafter. Embedding and head are the target's.
pub struct Drafter {
    pub config: DrafterConfig,
    fc: Matrix,            // [hidden][taps * hidden]
    hidden_norm: Vec<f32>, // [hidden]
    norm: Vec<f32>,        // [hidden]
    layers: Vec<Layer>,
}

impl Drafter {
    /// Weights stay where the checkpoint has them.
    pub fn load(model: &Model<DrafterConfig>) -> Result<Drafter> {
        let (config, file) = (model.config.clone(), &model.weights);
        file.need_files()?;
        let s = &config.stack;
        Ok(Drafter {
            fc: matrix(file, "fc.weight", s.hidden, config.taps.len() * s.hidden)?,
            hidden_norm: cpu::to_f32(&file.tensor("hidden_norm.weight", &[s.hidden])?),
            norm: cpu::to_f32(&file.tensor("norm.weight", &[s.hidden])?),
            layers: (0..s.attention.len())
                .map(|i| Layer::load(file, &format!("layers.{i}"), s))
                .collect::<Result<_>>()?,
            config,
        })
    }

    /// `c = hidden_norm(fc(feature))` for features `[rows][taps * hidden]`: `[rows][hidden]` (dflash.md 3.2).
    pub fn context(&self, features: &[f32]) -> Vec<f32> {
        let s = &self.config.stack;
        let (mut projected, mut c) = (Vec::new(), Vec::new());
        cpu::linear(features, features.len() / self.fc.cols, [(&self.fc, &mut projected)]);
        cpu::rms_norm(&projected, &self.hidden_norm, s.eps, &mut c);
        c
    }

    /// Appends committed positions `cache.len()..` to the context: keys and values of every layer straight from `c`,
    /// with no input norm (dflash.md 3.2, 4). The context must end where the next block begins.
    pub fn inject(&self, features: &[f32], cache: &mut Cache) {
        if features.is_empty() {
            return;
        }
        let s = &self.config.stack;
        let c = self.context(features);
        let (at, rows) = (cache.len, c.len() / s.hidden);
        cache.rotate_to(at + rows);
        for (i, layer) in self.layers.iter().enumerate() {
            let Scratch { k, v, .. } = &mut cache.scratch;
            cpu::linear(&c, rows, [(&layer.k, k), (&layer.v, v)]);
            write_kv(s, layer, cache, i, at, None);
        }
        cache.len = at + rows;
    }

    /// One pass over `[anchor, mask x (rows - 1)]` at positions `cache.len()..`: final-normed rows `[rows][hidden]`.
    /// The block's own keys and values are dropped again. `each` sees every layer's output (for tests).
    pub fn hidden(
        &self,
        target: &Target,
        anchor: u32,
        rows: usize,
        cache: &mut Cache,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Vec<f32> {
        let s = &self.config.stack;
        let mut tokens = vec![self.config.mask_token; rows];
        tokens[0] = anchor;
        let mut x = target.embed(&tokens, self.config.embedding_scale);
        let at = cache.len;
        cache.rotate_to(at + rows);
        for (i, layer) in self.layers.iter().enumerate() {
            forward_layer(s, layer, cache, i, at, None, &mut x);
            each(i, &x);
        }
        cpu::rms_norm_in_place(&mut x, &self.norm, s.eps);
        x
    }

    /// Logits of final-normed rows through the target's head, multiplier and softcap (dflash.md 3.5).
    pub fn logits(&self, target: &Target, normed: &[f32], out: &mut Vec<f32>) {
        target.logits(normed, out);
        let cap = self.config.softcap;
        for logit in out.iter_mut() {
            *logit *= self.config.output_multiplier;
            if let Some(cap) = cap {
                *logit = cap * (*logit / cap).tanh();
            }
        }
    }
}

// ---- the device ----

/// The `cpu` device: a pair in plain f32.
pub struct Cpu {
    target: Target,
    drafter: Option<Drafter>,
    slots: usize,
    context: usize,
    tree: Option<usize>,
    costs: Option<Costs>,
}

impl Cpu {
    /// For `slots` sequences of up to `context` positions. Weights stay where the checkpoints have them.
    ///
    /// # Errors
    /// What is wrong with a tensor, by its name.
    pub fn load(pair: &Pair, slots: usize, context: usize) -> Result<Cpu> {
        let drafter = pair.drafter.as_ref().map(Drafter::load).transpose()?;
        Ok(Cpu { target: Target::load(&pair.target)?, drafter, slots, context, tree: None, costs: None })
    }

    /// As [`Sequences::with_trees`].
    pub fn with_trees(self, rows: Option<usize>) -> Cpu {
        Cpu { tree: rows, ..self }
    }

    /// As [`Sequences::adaptive`].
    pub fn adaptive(self, costs: Option<Costs>) -> Cpu {
        Cpu { costs, ..self }
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn decoder(&self) -> Result<Box<dyn Decoder + '_>> {
        let drafter = self.drafter.as_ref();
        let sequences = Sequences::new(&self.target, drafter, self.slots, self.context);
        Ok(Box::new(sequences.with_trees(self.tree).adaptive(self.costs.as_ref())))
    }
}

// ---- a sequence ----

/// One sequence on the CPU: the target's cache, the drafter's, and what the next round starts from.
pub struct Sequence<'a> {
    target: &'a Target,
    drafter: Option<&'a Drafter>,
    /// Positions it may have.
    context: usize,
    /// Rows of a round's tree; none: chains.
    tree: Option<usize>,
    /// What passes cost; none: rounds are as large as they can be.
    costs: Option<&'a Costs>,
    state: Option<State>,
}

struct State {
    prompt: Vec<u32>,
    block: usize,
    tokens: Vec<u32>,       // [s]: what the target's cache holds
    cache: Cache,           // target: positions 0..s
    context: Option<Cache>, // drafter: of positions 0..s the first; none before it was needed
    features: Vec<f32>, // [pending][taps * hidden]: the positions after them that the drafter has not seen
    drafting: bool, // the drafter follows: its context and the pending positions are 0..s; else plain decoding
    anchor: Option<u32>, // the token at position s, on which the target has not been run; none before the prompt has
    sampling: Sampling,
    how: Drafting, // drafts are made and judged; seed and stream are the request's here too
    round: u32,    // of this request, from 1 on
    laws: Vec<Probabilities>, // [drafts]: what the drafts of this round were drawn from, by rules that ask for it
    logits: Vec<f32>,         // [rows][vocab] of the last verification
    path: Vec<usize>,         // the rows of it that stood, 0 first
    controller: Option<Box<dyn Controller + Send>>,
}

impl<'a> Sequence<'a> {
    /// A fresh sequence; without a drafter it decodes plainly.
    pub fn new(target: &'a Target, drafter: Option<&'a Drafter>) -> Sequence<'a> {
        let context = target.config.stack.max_positions;
        Sequence { target, drafter, context, tree: None, costs: None, state: None }
    }

    /// As [`Sequences::with_trees`].
    pub fn with_trees(self, rows: Option<usize>) -> Sequence<'a> {
        Sequence { tree: rows, ..self }
    }

    /// As [`Sequences::adaptive`].
    pub fn adaptive(self, costs: Option<&'a Costs>) -> Sequence<'a> {
        Sequence { costs, ..self }
    }

    /// Positions that (target, drafter) hold, the drafter's pending ones counted: both equal the anchor's position
    /// after every round (dflash.md 4). None before the start; the drafter's is none in plain decoding.
    pub fn lengths(&self) -> Option<(usize, Option<usize>)> {
        let state = self.state.as_ref()?;
        Some((state.cache.len, self.drafter.filter(|_| state.drafting).map(|d| state.drafted(d))))
    }

    /// Brings the drafter's context up to date and drafts for a block of `rows`: `rows - 1` tokens, or none without a
    /// drafter.
    pub fn draft(&mut self, rows: usize) -> Result<Vec<u32>> {
        let (state, _) = started(&mut self.state)?;
        let Drafting { rule, sampling } = state.how.clone();
        if rule == Rule::Match {
            return self.drafted(rows, |logits, position| sampling.choose(logits, position));
        }
        let laws = self.drafted(rows, |logits, _| sampling.probabilities(logits))?;
        let (state, _) = started(&mut self.state)?;
        let drafts = rules::draw(&laws, &mut state.dice());
        state.laws = laws;
        drafts.ok_or_else(|| Error::Internal("a law without tokens".into()))
    }

    /// As [`Sequence::draft`], but the best tree of up to `most` rows that the block's drafts and their rivals make.
    pub fn draft_tree(&mut self, rows: usize, most: usize) -> Result<Tree> {
        let choices = self.drafted(rows, |logits, _| tree::choices(logits, most.saturating_sub(1)))?;
        let (_, anchor) = started(&mut self.state)?;
        Ok(Tree::best_first(anchor, &choices, most))
    }

    /// What `of` makes of the drafter's logits for each of a block's rows behind the anchor, and of their positions.
    fn drafted<T>(&mut self, rows: usize, of: impl Fn(&[f32], u32) -> Option<T>) -> Result<Vec<T>> {
        let (state, anchor) = started(&mut self.state)?;
        state.laws.clear();
        let (Some(drafter), Some(context), true) = (self.drafter, &mut state.context, state.drafting) else {
            return Ok(Vec::new());
        };
        if rows < 2 {
            // Past the drafter's last position nothing is drafted any more, and nothing need be kept for it.
            if state.cache.len + 1 >= drafter.config.stack.max_positions {
                (state.context, state.features, state.drafting) = (None, Vec::new(), false);
            }
            return Ok(Vec::new());
        }
        drafter.inject(&state.features, context);
        state.features.clear();
        let hidden = drafter.hidden(self.target, anchor, rows, context, |_, _| ());
        let mut logits = Vec::new();
        drafter.logits(self.target, &hidden[self.target.config.stack.hidden..], &mut logits);
        let rows = logits.chunks(self.target.config.vocab).zip(state.cache.len as u32 + 1..);
        rows.map(|(logits, at)| of(logits, at).ok_or_else(|| damaged("drafter", at as usize))).collect()
    }

    /// Runs the target over the anchor and `drafts`, whoever made them, and appends to `out` those that it accepts and
    /// its own next token, the new anchor. Rules other than `match` only judge what [`Sequence::draft`] has drawn.
    pub fn verify(&mut self, drafts: &[u32], out: &mut Vec<u32>) -> Result<()> {
        let (_, anchor) = started(&mut self.state)?;
        self.verify_rows(&[&[anchor], drafts].concat(), None, out)
    }

    /// As [`Sequence::verify`], of a tree that begins with the anchor.
    pub fn verify_tree(&mut self, tree: &Tree, out: &mut Vec<u32>) -> Result<()> {
        self.verify_rows(&tree.tokens, Some(tree), out)
    }

    fn verify_rows(&mut self, block: &[u32], tree: Option<&Tree>, out: &mut Vec<u32>) -> Result<()> {
        let (state, _) = started(&mut self.state)?;
        let (target, s) = (self.target, state.cache.len);
        let vocab = target.config.vocab;
        let drafts = &block[1..];
        if tree.is_none() && state.how.rule != Rule::Match && drafts.len() != state.laws.len() {
            return Err(Error::Internal("drafts without the laws that they were drawn from".into()));
        }
        let mut dice = state.dice();
        // Until this round is judged, the cache holds what may not belong to the sequence.
        state.anchor = None;

        let taps = match (state.drafting, self.drafter) {
            (true, Some(drafter)) => &drafter.config.taps[..],
            _ => &[],
        };
        let mut features = Vec::new();
        let normed = target.run(block, tree, &mut state.cache, taps, &mut features, block.len());
        target.logits(&normed, &mut state.logits);
        let (sampling, logits) = (&state.sampling, &state.logits);
        let row = |row: usize| &logits[row * vocab..][..vocab];
        let choose = |at: usize| {
            let depth = tree.map_or(at, |tree| tree.depths[at] as usize);
            sampling.choose(row(at), (s + depth + 1) as u32)
        };
        let law = |at: usize| sampling.probabilities(row(at));
        let chain = |(accepted, next): (usize, u32)| ((0..=accepted).collect(), next);
        let verdict = match (tree, state.how.rule) {
            (Some(tree), _) => walk(block, &tree.parents, choose),
            (_, Rule::Rejection) if !drafts.is_empty() => {
                rules::rejection(drafts, &state.laws, law, &mut dice).map(chain)
            }
            (_, Rule::Block) if !drafts.is_empty() => {
                rules::block(drafts, &state.laws, law, &mut dice).map(chain)
            }
            // Where nothing was drafted, all rules decode plainly.
            _ => judge(drafts, choose).map(chain),
        };
        let (path, next) = verdict.ok_or_else(|| damaged("target", s + 1))?;
        state.round += 1;

        state.cache.keep(s, &path);
        let width = features.len() / block.len();
        path.iter().for_each(|row| state.features.extend_from_slice(&features[row * width..][..width]));
        state.tokens.extend(path.iter().map(|row| block[*row]));
        state.anchor = Some(next);
        out.extend(path[1..].iter().map(|row| block[*row]));
        out.push(next);
        state.path = path;
        Ok(())
    }

    /// Takes a request, of whose prompt the first tokens need not be run again where the sequence has them: how many.
    pub fn start(&mut self, request: &Request) -> Result<usize> {
        let (prompt, target) = (&request.prompt, self.target);
        let last = self.drafter.map_or(0, |drafter| drafter.config.stack.max_positions);
        let drafter = self.drafter.filter(|_| request.block > 1 && prompt.len() + 1 < last);
        let state = match &mut self.state {
            Some(state) => state,
            none => none.insert(State {
                prompt: Vec::new(),
                block: 1,
                tokens: Vec::new(),
                cache: Cache::new(&target.config.stack, 0)?,
                context: None,
                features: Vec::new(),
                drafting: false,
                anchor: None,
                sampling: request.sampling.clone(),
                how: request.drafting.clone(),
                round: 1,
                laws: Vec::new(),
                logits: Vec::new(),
                path: Vec::new(),
                controller: None,
            }),
        };
        (state.drafting, state.anchor) = (drafter.is_some(), None);
        (state.sampling, state.block) = (request.sampling.clone(), request.block);
        let Sampling { seed, stream, .. } = request.sampling;
        let Drafting { rule, sampling } = request.drafting.clone();
        state.how = Drafting { rule, sampling: Sampling { seed, stream, ..sampling } };
        (state.round, state.laws) = (1, Vec::new());
        state.prompt.clone_from(prompt);
        state.controller = self.costs.map(|costs| {
            let sizes = ByConfidence::new(costs.clone());
            Box::new(WherePays::new(sizes, costs.clone())) as Box<dyn Controller + Send>
        });
        if let (Some(drafter), None) = (drafter, &state.context) {
            state.context = Some(Cache::new(&drafter.config.stack, 0)?);
        }

        // The last token is run again, for its logits; a drafter that was left behind, by plain decoding, needs the
        // features of all that it has not seen.
        let same = state.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let seen = drafter.map_or(usize::MAX, |drafter| state.drafted(drafter));
        let kept = same.min(seen).min(prompt.len().saturating_sub(1));
        state.crop(kept, self.drafter);
        let positions = request.positions();
        state.cache.grow(positions.min(target.config.stack.max_positions))?;
        let positions = prompt.len().saturating_add(request.max_tokens).saturating_add(request.block);
        // A tree's rows take more room than the positions they stand for.
        let room = positions.min(target.config.stack.max_positions) + self.tree.unwrap_or(0);
        state.cache.grow(room)?;
        if let (Some(drafter), Some(context)) = (drafter, &mut state.context) {
            context.grow(positions.min(drafter.config.stack.max_positions))?;
            drafter.inject(&state.features, context);
        }
        state.features.clear();
        Ok(kept)
    }

    /// Runs the next part of the prompt.
    pub fn prefill(&mut self) -> Result<Prefill> {
        let (target, drafter) = (self.target, self.drafter);
        let Some(state) = self.state.as_mut().filter(|state| state.anchor.is_none()) else {
            return Err(Error::Internal("a prompt before the start of its sequence".into()));
        };
        let drafter = drafter.filter(|_| state.drafting);
        let (at, length) = (state.cache.len, state.prompt.len());
        let end = length.min(at + CHUNK);
        let taps = drafter.map_or(&[][..], |d| &d.config.taps);
        let chunk = &state.prompt[at..end];
        let rows = usize::from(end == length);
        let normed = target.forward(chunk, &mut state.cache, taps, &mut state.features, rows);
        state.tokens.extend_from_slice(chunk);
        if let (Some(drafter), Some(context)) = (drafter, &mut state.context) {
            drafter.inject(&state.features, context);
            state.features.clear();
        }
        if end == length {
            target.logits(&normed, &mut state.logits);
            let first = state.sampling.choose(&state.logits, length as u32);
            state.anchor = Some(first.ok_or_else(|| damaged("target", length))?);
        }
        Ok(Prefill { done: end, next: state.anchor })
    }

    /// Rows of the next block, anchor included: as many as the request asks for, but a block ends where the drafter's
    /// positions do, and before the context's last one, whose token is never run.
    pub fn rows(&self) -> usize {
        let (at, block) = self.state.as_ref().map_or((0, 1), |state| (state.cache.len, state.block));
        let last = self.drafter.map_or(0, |drafter| drafter.config.stack.max_positions);
        block.min(last.saturating_sub(at)).min((self.context - 1).saturating_sub(at)).max(1)
    }

    /// A round: appends to `out` what [`Sequence::verify`] does of the drafter's own drafts, and says how many they were.
    pub fn round(&mut self, out: &mut Vec<u32>) -> Result<usize> {
        let rows = self.rows();
        let most = if rows < 2 { 0 } else { self.tree.unwrap_or(rows) - 1 };
        let allowed = self.ask(|controller| controller.drafts(most))?.unwrap_or(most);
        if allowed == 0 {
            self.draft(1)?;
            self.verify(&[], out)?;
            return Ok(0);
        }
        let before = out.len();
        let drafts = if self.tree.is_some() {
            let mut tree = self.draft_tree(rows, allowed + 1)?;
            if let Some(kept) = self.ask(|controller| controller.cut(&tree.costs[1..]))? {
                tree.truncate(kept + 1);
            }
            self.verify_tree(&tree, out)?;
            tree.rows() - 1
        } else if self.costs.is_none() {
            let drafts = self.draft(rows)?;
            self.verify(&drafts, out)?;
            drafts.len()
        } else {
            // The drafter sees the whole block, as in its training, however few of its drafts are asked for.
            let mut drafts = self.drafted(rows, |logits, _| Some(*tree::choices(logits, 1)?.first()?))?;
            drafts.truncate(allowed);
            let mut cost = 0;
            let costs: Vec<u32> = drafts.iter().map(|draft| (cost += draft.cost, cost).1).collect();
            if let Some(kept) = self.ask(|controller| controller.cut(&costs))? {
                drafts.truncate(kept);
            }
            let tokens: Vec<u32> = drafts.iter().map(|draft| draft.token).collect();
            self.verify(&tokens, out)?;
            tokens.len()
        };
        let accepted = out.len() - before - 1;
        self.ask(|controller| controller.judged(drafts, accepted))?;
        Ok(drafts)
    }

    /// What the controller answers; none without one.
    fn ask<T>(&mut self, question: impl FnOnce(&mut dyn Controller) -> T) -> Result<Option<T>> {
        let (state, _) = started(&mut self.state)?;
        Ok(state.controller.as_deref_mut().map(|controller| question(controller)))
    }
}

impl State {
    /// The chances of this round.
    fn dice(&self) -> Dice {
        let Sampling { seed, stream, .. } = self.sampling;
        Dice { seed, stream, round: self.round, anchor: self.cache.len as u32 }
    }

    /// Positions that the drafter holds or that wait for it.
    fn drafted(&self, drafter: &Drafter) -> usize {
        self.context.as_ref().map_or(0, |context| context.len + self.features.len() / drafter.fc.cols)
    }

    /// Forgets positions `len..`, in both models.
    fn crop(&mut self, len: usize, drafter: Option<&Drafter>) {
        self.tokens.truncate(len);
        self.cache.crop(len);
        if let (Some(drafter), Some(context)) = (drafter, &mut self.context) {
            context.crop(context.len.min(len));
            self.features.truncate((len - context.len) * drafter.fc.cols);
        }
    }
}

/// The state and its anchor.
fn started(state: &mut Option<State>) -> Result<(&mut State, u32)> {
    let started = state.as_mut().and_then(|state| state.anchor.map(|anchor| (state, anchor)));
    started.ok_or_else(|| Error::Internal("a round before the start of its sequence".into()))
}

fn damaged(model: &str, position: usize) -> Error {
    Error::Model(format!(
        "the {model}'s logits for position {position} hold a NaN or infinity, or nothing but -inf: its weights or its \
         config are damaged"
    ))
}

/// Sequences that take turns on the CPU.
pub struct Sequences<'a> {
    all: Vec<Sequence<'a>>,
    running: Vec<bool>,
}

impl<'a> Sequences<'a> {
    /// `slots` fresh ones of up to `context` positions; without a drafter they decode plainly.
    pub fn new(
        target: &'a Target,
        drafter: Option<&'a Drafter>,
        slots: usize,
        context: usize,
    ) -> Sequences<'a> {
        let context = context.min(target.config.stack.max_positions);
        let sequence = || Sequence { target, drafter, context, tree: None, costs: None, state: None };
        Sequences { all: (0..slots).map(|_| sequence()).collect(), running: vec![false; slots] }
    }

    /// Rounds that draft verify a tree of up to `rows` rows, the anchor counted, instead of a chain; as deep as a block is.
    /// 2 to [`tree::MOST_ROWS`]; none: chains.
    pub fn with_trees(mut self, rows: Option<usize>) -> Sequences<'a> {
        self.all = self.all.into_iter().map(|sequence| sequence.with_trees(rows)).collect();
        self
    }

    /// Rounds draft as much as pays where passes cost this much, and nothing where drafting does not; none: all they can.
    pub fn adaptive(mut self, costs: Option<&'a Costs>) -> Sequences<'a> {
        self.all = self.all.into_iter().map(|sequence| sequence.adaptive(costs)).collect();
        self
    }
}

impl Decoder for Sequences<'_> {
    fn vocab(&self) -> usize {
        self.all[0].target.config.vocab
    }

    fn context(&self) -> usize {
        self.all[0].context
    }

    fn slots(&self) -> usize {
        self.all.len()
    }

    fn join(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        if !keep {
            self.all[slot].state = None;
        }
        self.all[slot].start(request).map(Some)
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let prefill = self.all[slot].prefill()?;
        self.running[slot] = prefill.next.is_some();
        Ok(prefill)
    }

    fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
        for ((sequence, running), emitted) in self.all.iter_mut().zip(&self.running).zip(out) {
            *emitted = Emitted::default();
            if *running {
                emitted.drafted = sequence.round(&mut emitted.tokens)?;
                emitted.judged = emitted.tokens.len();
            }
        }
        Ok(())
    }

    fn leave(&mut self, slot: usize, _tokens: usize) -> Result<()> {
        self.running[slot] = false;
        Ok(())
    }

    fn watch(&mut self) {}

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        let vocab = self.vocab();
        let state = self.all[slot].state.as_ref();
        let row = state.and_then(|state| state.logits.chunks(vocab).nth(*state.path.get(row)?));
        row.map(<[f32]>::to_vec).ok_or_else(|| Error::Internal(format!("slot {slot} has no such logits")))
    }
}
