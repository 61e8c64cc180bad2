//! Target and drafter in plain f32. The `cpu` device runs them, and the kernels are tested against them. Read
//! this file beside docs/dflash.md, sections 3 and 4 (arXiv 2602.06036). The arithmetic is in
//! [`crate::cpu::ops`].

mod chain;
mod synthetic;

use crate::checkpoint::config::{Attention, DrafterConfig, Stack, TargetConfig};
use crate::checkpoint::pair::Model;
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::dflash2::{Convolution, Selector};
use crate::cpu::markov::{MarkovHead, Walk};
use crate::cpu::ops::{self, Kv, Matrix};
use crate::spec::tree::{Tree, compaction_moves};
use crate::{Error, Result};
use chain::ChainNorms;

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
    /// Of attention and MLP; only drafters have them.
    convolutions: Option<[Convolution; 2]>,
}

impl Layer {
    /// `inputs`: the columns of q, k and v.
    fn load(file: &Checkpoint, prefix: &str, s: &Stack, inputs: usize) -> Result<Layer> {
        let vector = |name: &str, len| {
            Ok::<_, Error>(ops::to_f32(&file.tensor(&format!("{prefix}.{name}.weight"), &[len])?))
        };
        let matrix = |name: &str, rows, cols| matrix(file, &format!("{prefix}.{name}.weight"), rows, cols);
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        Ok(Layer {
            input_norm: vector("input_layernorm", s.hidden)?,
            q: matrix("self_attn.q_proj", q, inputs)?,
            k: matrix("self_attn.k_proj", kv, inputs)?,
            v: matrix("self_attn.v_proj", kv, inputs)?,
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
            convolutions: None,
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
    /// An empty cache with a capacity of `positions` positions. All memory that grows with the positions is
    /// reserved here, so that running out of memory is an error and not an abort.
    ///
    /// # Errors
    /// [`Error::Memory`] if the allocation fails.
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

    /// Grows the capacity to `positions` positions in total and keeps the cached ones.
    ///
    /// # Errors
    /// [`Error::Memory`] if the allocation fails.
    pub fn grow(&mut self, positions: usize) -> Result<()> {
        let table = positions * 2 * self.frequencies.len();
        self.rope
            .try_reserve_exact(table.saturating_sub(self.rope.len()))
            .map_err(|_| Error::Memory(format!("no memory for the RoPE table of {positions} positions")))?;
        self.layers.iter_mut().try_for_each(|kv| kv.grow(positions, self.len))
    }

    /// Number of cached positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops positions `len..`.
    pub fn crop(&mut self, len: usize) {
        assert!(len <= self.len);
        self.len = len;
    }

    /// Keeps only the rows in `path` of those written at positions `at..`. Moves them to consecutive
    /// positions from `at` on, in the order of `path`.
    pub(crate) fn keep(&mut self, at: usize, path: &[usize]) {
        for kv in &mut self.layers {
            compaction_moves(path).for_each(|(from, to)| kv.copy(at + from, at + to));
        }
        self.crop(at + path.len());
    }

    /// Extends the RoPE table to positions `0..end`. Angles are f32 products, as in the reference
    /// implementation.
    fn extend_rope(&mut self, end: usize) {
        let width = 2 * self.frequencies.len();
        for position in self.rope.len() / width.max(1)..end {
            let angle = |f: &f64| (position as f32 * *f as f32) as f64;
            self.rope.extend(self.frequencies.iter().map(|f| (angle(f).cos() * self.magnitude) as f32));
            self.rope.extend(self.frequencies.iter().map(|f| (angle(f).sin() * self.magnitude) as f32));
        }
    }
}

/// Applies the per-head RMSNorm, if there is one, and then RoPE to `x` `[rows][heads * head_dim]`. The
/// positions are `at..`, or those of a tree whose anchor is at `at` (docs/dflash.md 3.4).
fn norm_and_rope(
    stack: &Stack,
    norm: Option<&[f32]>,
    rope: &[f32],
    at: usize,
    tree: Option<&Tree>,
    x: &mut [f32],
    heads: usize,
) {
    if let Some(norm) = norm {
        ops::rms_norm_in_place(x, norm, stack.eps);
    }
    let width = stack.rope.rotary_dims;
    for (row, x) in x.chunks_mut(heads * stack.head_dim).enumerate() {
        let position = at + tree.map_or(row, |tree| tree.depths[row] as usize);
        ops::rope(x, heads, stack.head_dim, &rope[position * width..][..width], width);
    }
}

/// Writes `k` and `v` of the pass's rows for layer `i` at positions `at..`. The rows of a tree are stored in
/// row order, but RoPE uses each row's position on its path.
fn write_kv(stack: &Stack, layer: &Layer, cache: &mut Cache, i: usize, at: usize, tree: Option<&Tree>) {
    let Cache { layers, rope, scratch: Scratch { k, v, .. }, .. } = cache;
    let norm = layer.qk_norm.as_ref().map(|[_, norm]| &norm[..]);
    norm_and_rope(stack, norm, rope, at, tree, k, stack.kv_heads);
    layers[i].write(at, k, v);
}

/// Attention of a tree's rows. For each row, the keys and values of its path are written to consecutive
/// positions, so that each sum has the same bits as in autoregressive decoding. The keys and values of the
/// tree are restored at the end.
fn tree_attention(stack: &Stack, cache: &mut Cache, i: usize, at: usize, tree: &Tree) {
    let Cache { layers, scratch: s, .. } = cache;
    let (kv, width) = (&mut layers[i], stack.kv_heads * stack.head_dim);
    let mut output = Vec::new();
    s.a.clear();
    for (row, q) in s.q.chunks(stack.heads * stack.head_dim).enumerate() {
        let mut end = at;
        for row in tree.path(row) {
            kv.write(end, &s.k[row * width..][..width], &s.v[row * width..][..width]);
            end += 1;
        }
        ops::attention(q, stack.heads, kv, &|_| visible(stack.attention[i], end - 1, end), &mut output);
        s.a.extend_from_slice(&output);
    }
    kv.write(at, &s.k, &s.v);
}

/// The keys that the query at `position` attends to when keys `0..end` exist (docs/dflash.md 3.6).
fn visible(attention: Attention, position: usize, end: usize) -> std::ops::Range<usize> {
    let last = match (attention.causal, attention.window) {
        (true, _) => position + 1,
        (false, Some(window)) => end.min(position.saturating_add(window)),
        (false, None) => end,
    };
    (position + 1).saturating_sub(attention.window.unwrap_or(usize::MAX))..last
}

/// Runs layer `i` over `x` `[rows][hidden]` in place (docs/dflash.md 3.4; the target is the same with causal
/// attention).
///
/// Rows are at positions `at..`. The layer writes their keys and values before it attends. The rows of a tree
/// attend to the positions before `at` and to their own paths.
fn forward_layer(
    stack: &Stack,
    layer: &Layer,
    cache: &mut Cache,
    i: usize,
    at: usize,
    tree: Option<&Tree>,
    x: &mut [f32],
) {
    ops::rms_norm(x, &layer.input_norm, stack.eps, &mut cache.scratch.y);
    forward_normed(stack, layer, cache, i, at, tree, x);
}

/// As [`forward_layer`], with the input of attention already in the scratch's `y`.
fn forward_normed(
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
    let [attention, mlp] = layer.convolutions.as_ref().map_or([None; 2], |both| both.each_ref().map(Some));
    let dynamic = attention.map(|convolution| (convolution, convolution.before(&mut s.y)));
    ops::linear(&s.y, rows, [(&layer.q, &mut s.q), (&layer.k, &mut s.k), (&layer.v, &mut s.v)]);
    let norm = layer.qk_norm.as_ref().map(|[norm, _]| &norm[..]);
    norm_and_rope(stack, norm, &cache.rope, at, tree, &mut s.q, stack.heads);
    write_kv(stack, layer, cache, i, at, tree);

    match tree {
        None => {
            let (s, attention) = (&mut cache.scratch, stack.attention[i]);
            let visible = |row: usize| visible(attention, at + row, at + rows);
            ops::attention(&s.q, stack.heads, &cache.layers[i], &visible, &mut s.a);
        }
        Some(tree) => tree_attention(stack, cache, i, at, tree),
    }
    let s = &mut cache.scratch;
    ops::linear(&s.a, rows, [(&layer.o, &mut s.z)]);
    if let Some((convolution, dynamic)) = dynamic {
        convolution.after(&dynamic, &mut s.z);
    }
    ops::add(x, &s.z);

    ops::rms_norm(x, &layer.post_norm, stack.eps, &mut s.y);
    let dynamic = mlp.map(|convolution| (convolution, convolution.before(&mut s.y)));
    ops::linear(&s.y, rows, [(&layer.gate, &mut s.gate), (&layer.up, &mut s.up)]);
    ops::swiglu(&mut s.gate, &s.up);
    ops::linear(&s.gate, rows, [(&layer.down, &mut s.z)]);
    if let Some((convolution, dynamic)) = dynamic {
        convolution.after(&dynamic, &mut s.z);
    }
    ops::add(x, &s.z);
}

// ---- the target ----

/// A Qwen3 or Llama causal language model.
pub struct Target {
    /// Its `config.json`.
    pub config: TargetConfig,
    embedding: Matrix,    // [vocab][hidden]
    head: Option<Matrix>, // [vocab][hidden]; None: tied to the embedding
    norm: Vec<f32>,       // [hidden]
    layers: Vec<Layer>,
}

impl Target {
    /// Builds the model. The matrices stay in the mapped checkpoint; norm weights are copied.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for random weights; otherwise as [`Checkpoint::tensor`].
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
            norm: ops::to_f32(&file.tensor("model.norm.weight", &[s.hidden])?),
            layers: (0..s.attention.len())
                .map(|i| Layer::load(file, &format!("model.layers.{i}"), s, s.hidden))
                .collect::<Result<_>>()?,
            config,
        })
    }

    /// Embedding rows of `tokens` times `scale`, `[tokens][hidden]`.
    pub fn embed(&self, tokens: &[u32], scale: f32) -> Vec<f32> {
        embed(&self.embedding, tokens, scale)
    }

    /// Writes logits `[rows][vocab]` to `out`, from rows `[rows][hidden]` after the final norm.
    pub fn logits(&self, normed: &[f32], out: &mut Vec<f32>) {
        let rows = normed.len() / self.config.stack.hidden;
        ops::linear(normed, rows, [(self.head.as_ref().unwrap_or(&self.embedding), out)]);
    }

    /// Runs `tokens` at positions `cache.len()..`. Fills `features` `[tokens][taps * hidden]`, the residual
    /// stream after each tapped layer, in list order (docs/dflash.md 3.1). Returns the last `last` rows after
    /// the final norm, `[last][hidden]`.
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

    /// Runs a tree whose anchor is at position `cache.len()`. Returns all rows after the final norm,
    /// `[rows][hidden]`. Each row has the same bits as if [`Target::forward`] ran its path. The keys and
    /// values of row `i` are stored at position `cache.len() + i`, whatever the row's depth.
    pub fn forward_tree(
        &self,
        tree: &Tree,
        cache: &mut Cache,
        taps: &[usize],
        features: &mut Vec<f32>,
    ) -> Vec<f32> {
        self.run(&tree.tokens, Some(tree), cache, taps, features, tree.rows())
    }

    /// [`Target::forward`] for a chain or, with a tree, [`Target::forward_tree`].
    pub(crate) fn run(
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
        cache.extend_rope(at + tokens.len());
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
        ops::rms_norm(&x[(tokens.len() - last) * s.hidden..], &self.norm, s.eps, &mut normed);
        normed
    }
}

/// Rows of an embedding table `[vocab][hidden]` times `scale`, `[tokens][hidden]`.
fn embed(table: &Matrix, tokens: &[u32], scale: f32) -> Vec<f32> {
    let mut x = vec![0.0; tokens.len() * table.cols];
    for (token, row) in tokens.iter().zip(x.chunks_mut(table.cols)) {
        table.row(*token as usize, scale, row);
    }
    x
}

// ---- the drafter ----

/// A drafter of one block per round, or of a chain of tokens. Embedding and head are the target's, or its own, as
/// its plan says.
pub struct Drafter {
    /// Its plan.
    pub config: DrafterConfig,
    embedding: Option<Matrix>, // [vocab][hidden]; None: the target's
    head: Option<Matrix>,      // [own_head][hidden]; None: the target's
    markov: Option<MarkovHead>,
    selector: Option<Selector>,
    chain: Option<ChainNorms>,
    fc: Matrix,            // [hidden][taps * hidden]
    hidden_norm: Vec<f32>, // [hidden]
    norm: Vec<f32>,        // [hidden]
    layers: Vec<Layer>,
}

impl Drafter {
    /// Builds the drafter as [`Target::load`] does the target.
    ///
    /// # Errors
    /// As [`Target::load`].
    pub fn load(model: &Model<DrafterConfig>) -> Result<Drafter> {
        let (config, file) = (model.config.clone(), &model.weights);
        file.need_files()?;
        let s = &config.stack;
        let own = |rows: Option<usize>, name| rows.map(|rows| matrix(file, name, rows, s.hidden)).transpose();
        Ok(Drafter {
            embedding: own(config.own_embedding.then_some(config.vocab), "embed_tokens.weight")?,
            head: own(config.own_head, "lm_head.weight")?,
            markov: match config.walk {
                Some(walk) => {
                    let outputs = config.own_head.unwrap_or(config.vocab);
                    Some(MarkovHead::load(file, walk, s.hidden, config.vocab, outputs)?)
                }
                None => None,
            },
            selector: match config.selector {
                Some(plan) => Some(Selector::load(file, plan, s.hidden, config.vocab)?),
                None => None,
            },
            chain: match config.chain {
                Some(plan) => Some(ChainNorms::load(file, plan, s.hidden, config.taps.len())?),
                None => None,
            },
            fc: matrix(file, "fc.weight", s.hidden, config.taps.len() * s.hidden)?,
            hidden_norm: {
                let name =
                    if config.chain.is_some() { "layers.0.hidden_norm.weight" } else { "hidden_norm.weight" };
                ops::to_f32(&file.tensor(name, &[s.hidden])?)
            },
            norm: ops::to_f32(&file.tensor("norm.weight", &[s.hidden])?),
            layers: (0..s.attention.len())
                .map(|i| {
                    let inputs = if config.chain.is_some() { 2 * s.hidden } else { s.hidden };
                    let layer = Layer::load(file, &format!("layers.{i}"), s, inputs)?;
                    let Some(plan) = config.convolution else { return Ok(layer) };
                    let load =
                        |name: &str| Convolution::load(file, &format!("layers.{i}.{name}"), plan, s.hidden);
                    let convolutions = Some([load("attention_conv")?, load("mlp_conv")?]);
                    Ok(Layer { convolutions, ..layer })
                })
                .collect::<Result<_>>()?,
            config,
        })
    }

    /// Length of one position's feature: taps x hidden.
    pub(crate) fn feature_len(&self) -> usize {
        self.fc.cols
    }

    /// `c = hidden_norm(fc(feature))` `[rows][hidden]`, from features `[rows][taps * hidden]` (docs/dflash.md
    /// 3.2).
    pub fn context(&self, features: &[f32]) -> Vec<f32> {
        let s = &self.config.stack;
        let (mut projected, mut c) = (Vec::new(), Vec::new());
        ops::linear(features, features.len() / self.fc.cols, [(&self.fc, &mut projected)]);
        ops::rms_norm(&projected, &self.hidden_norm, s.eps, &mut c);
        c
    }

    /// Appends the features `[rows][taps * hidden]` of positions `cache.len()..` to the drafter's context.
    /// Each layer computes keys and values directly from `c`, without its input norm (docs/dflash.md 3.2, 4).
    /// The caller must inject all positions before the anchor before it drafts.
    pub fn inject(&self, features: &[f32], cache: &mut Cache) {
        if features.is_empty() {
            return;
        }
        let s = &self.config.stack;
        let c = self.context(features);
        let (at, rows) = (cache.len, c.len() / s.hidden);
        cache.extend_rope(at + rows);
        for (i, layer) in self.layers.iter().enumerate() {
            let Scratch { k, v, .. } = &mut cache.scratch;
            ops::linear(&c, rows, [(&layer.k, k), (&layer.v, v)]);
            write_kv(s, layer, cache, i, at, None);
        }
        cache.len = at + rows;
    }

    /// One pass over `[anchor, mask x (rows - 1)]` at positions `cache.len()..`. Returns the rows after the
    /// final norm, `[rows][hidden]`. The block's own keys and values are dropped afterwards. `each` is called
    /// with every layer's number and output (for tests).
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
        let table = self.embedding.as_ref().unwrap_or(&target.embedding);
        let mut x = embed(table, &tokens, self.config.embedding_scale);
        let at = cache.len;
        cache.extend_rope(at + rows);
        for (i, layer) in self.layers.iter().enumerate() {
            forward_layer(s, layer, cache, i, at, None, &mut x);
            each(i, &x);
        }
        ops::rms_norm_in_place(&mut x, &self.norm, s.eps);
        x
    }

    /// [`Drafter::hidden`] of the rows that predict the drafts of a round: `[drafts][hidden]`, row `i` for
    /// position `cache.len() + i + 1`.
    pub fn predict(&self, target: &Target, anchor: u32, drafts: usize, cache: &mut Cache) -> Vec<f32> {
        let first = self.config.first_row();
        let mut hidden = self.hidden(target, anchor, first + drafts, cache, |_, _| ());
        hidden.drain(..first * self.config.stack.hidden);
        hidden
    }

    /// A walk over the rows of a block, which corrects their logits; `None` if rows do not depend on each
    /// other's drafts.
    pub fn walk(&self, anchor: u32) -> Option<Walk<'_>> {
        self.markov.as_ref().map(|head| head.walk(anchor))
    }

    /// Chooses the candidates of a row that follows the token `previous`, if the drafter has a candidate
    /// selector; arguments as for [`Selector::select`].
    pub fn select(&self, previous: u32, hidden: &[f32], logits: &mut [f32]) {
        if let Some(selector) = &self.selector {
            selector.select(previous, hidden, logits);
        }
    }

    /// Adds the bias of a walk, `[outputs of the head]`, to a row's logits `[vocab]`.
    pub fn add_bias(&self, bias: &[f32], logits: &mut [f32]) {
        match &self.config.ids {
            None => ops::add(logits, bias),
            Some(ids) => ids.iter().zip(bias).for_each(|(id, bias)| logits[*id as usize] += bias),
        }
    }

    /// Writes logits `[rows][vocab]` of the target's vocabulary to `out`, from rows `[rows][hidden]` after
    /// the final norm: the head, then multiplier and softcap (docs/dflash.md 3.5). Ids that the drafter does
    /// not have get -inf.
    pub fn logits(&self, target: &Target, normed: &[f32], out: &mut Vec<f32>) {
        match &self.head {
            Some(head) => ops::linear(normed, normed.len() / head.cols, [(head, out)]),
            None => target.logits(normed, out),
        }
        let cap = self.config.softcap;
        for logit in out.iter_mut() {
            *logit *= self.config.output_multiplier;
            if let Some(cap) = cap {
                *logit = cap * (*logit / cap).tanh();
            }
        }
        let (vocab, common) = (target.config.vocab, self.config.vocab.min(target.config.vocab));
        match &self.config.ids {
            None => out.chunks_mut(vocab).for_each(|row| row[common..].fill(f32::NEG_INFINITY)),
            Some(ids) => {
                let own = std::mem::take(out);
                out.resize(own.len() / ids.len() * vocab, f32::NEG_INFINITY);
                for (row, own) in out.chunks_mut(vocab).zip(own.chunks(ids.len())) {
                    ids.iter().zip(own).for_each(|(id, logit)| row[*id as usize] = *logit);
                }
            }
        }
    }
}
