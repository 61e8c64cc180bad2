//! Target and drafter in plain f32. The `cpu` device runs them, and the kernels are tested against them. Read
//! this file beside docs/dflash.md, sections 3 and 4 (arXiv 2602.06036). The arithmetic is in
//! [`crate::cpu::ops`].

mod eagle3;
mod synthetic;

use crate::checkpoint::config::{DrafterConfig, Stack, TargetConfig};
use crate::checkpoint::drafter;
use crate::checkpoint::pair::Model;
use crate::cpu::delta_net::State;
use crate::cpu::dflash2::{Convolution, Selector};
use crate::cpu::layer::{Layer, Mixer, Scratch, Span, gain, matrix};
use crate::cpu::markov::{MarkovHead, Walk};
use crate::cpu::ops::{self, Kv, Matrix};
use crate::spec::tree::{Tree, compaction_moves};
use crate::{Error, Result};
pub use eagle3::ChainDraft;
use eagle3::ChainNorms;

// ---- what a model keeps of a sequence ----

/// One model's keys, values and recurrent states for one sequence, positions `0..len`, and the buffers of a
/// pass.
pub struct Cache {
    pub(super) layers: Vec<LayerCache>,
    len: usize,
    /// Number of positions that the recurrent states include.
    committed: usize,
    /// The rows of the last pass that are the positions from `committed` on, in their order.
    pending: Vec<usize>,
    /// `[positions][rotary_dims]`: cosines, then sines; grows with the positions used.
    pub(super) rope: Vec<f32>,
    frequencies: Vec<f64>,
    magnitude: f64,
    pub(super) scratch: Scratch,
}

/// What one layer keeps of a sequence.
pub(super) enum LayerCache {
    /// Attention: keys and values of every position.
    Kv(Kv),
    /// Gated DeltaNet: a state of fixed size.
    State(State),
}

impl Cache {
    /// An empty cache with a capacity of `positions` positions. All memory that grows with the positions is
    /// reserved here, so that running out of memory is an error and not an abort.
    ///
    /// # Errors
    /// [`Error::Memory`] if the allocation fails.
    pub fn new(stack: &Stack, positions: usize) -> Result<Cache> {
        let (frequencies, magnitude) = stack.rope.frequencies();
        let layer = |i| match stack.delta_net(i) {
            None => Kv::new(stack.kv_heads, stack.head_dim, 0).map(LayerCache::Kv),
            Some(shape) => State::new(shape).map(LayerCache::State),
        };
        let mut cache = Cache {
            layers: (0..stack.attention.len()).map(layer).collect::<Result<_>>()?,
            len: 0,
            committed: 0,
            pending: Vec::new(),
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
        self.layers.iter_mut().try_for_each(|layer| match layer {
            LayerCache::Kv(kv) => kv.grow(positions, self.len),
            LayerCache::State(_) => Ok(()),
        })
    }

    fn states(&mut self) -> impl Iterator<Item = &mut State> {
        self.layers.iter_mut().filter_map(|layer| match layer {
            LayerCache::State(state) => Some(state),
            LayerCache::Kv(_) => None,
        })
    }

    /// Number of cached positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is cached.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most positions, at most `len`, that [`Cache::crop`] can keep. A recurrent state has no earlier
    /// positions than those of the last pass, so it keeps these or none.
    pub fn longest_crop(&self, len: usize) -> usize {
        let recurrent = self.layers.iter().any(|layer| matches!(layer, LayerCache::State(_)));
        if recurrent && len < self.committed { 0 } else { len }
    }

    /// Drops positions `len..`; `len` is one that [`Cache::longest_crop`] returns.
    pub fn crop(&mut self, len: usize) {
        assert!(len <= self.len && self.longest_crop(len) == len);
        if len < self.committed {
            self.states().for_each(State::reset);
            self.committed = 0;
        }
        self.pending.truncate(len - self.committed);
        self.len = len;
    }

    /// Keeps only the rows in `path` of the last pass, which were written at positions `at..`. Moves them to
    /// consecutive positions from `at` on, in the order of `path`.
    pub(crate) fn keep(&mut self, at: usize, path: &[usize]) {
        for layer in &mut self.layers {
            if let LayerCache::Kv(kv) = layer {
                compaction_moves(path).for_each(|(from, to)| kv.copy(at + from, at + to));
            }
        }
        self.pending = path.to_vec();
        self.len = at + path.len();
    }

    /// Moves the recurrent states to the end of the sequence, so that the rows of a pass can follow.
    fn commit(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        self.states().for_each(|state| state.commit(&pending));
        self.committed = self.len;
    }

    /// The recurrent state `[value_heads][key_dim][value_dim]` of layer `i` at the end of the sequence, and
    /// the last inputs of its convolution `[3][channels]`; `None` if the layer is attention (for tests).
    pub fn recurrent_state(&self, i: usize) -> Option<[Vec<f32>; 2]> {
        let LayerCache::State(state) = &self.layers[i] else { return None };
        let mut state = state.clone();
        state.commit(&self.pending);
        Some(state.parts().map(<[f32]>::to_vec))
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

// ---- the target ----

/// A causal language model.
pub struct Target {
    /// Its `config.json`.
    pub config: TargetConfig,
    embedding: Matrix,    // [vocab][hidden]
    head: Option<Matrix>, // [vocab][hidden]; None: tied to the embedding
    norm: Vec<f32>,       // [hidden]
    layers: Vec<Layer>,
}

impl Target {
    /// Builds the model. The matrices stay in the mapped checkpoint, but for those whose rows are reordered;
    /// norm weights are copied.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for random weights; [`Error::Memory`]; otherwise as
    /// [`Checkpoint::tensor`](crate::checkpoint::safetensors::Checkpoint::tensor).
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
            norm: gain(file, "model.norm.weight", s.hidden, s)?,
            layers: (0..s.attention.len())
                .map(|i| Layer::load(file, &format!("model.layers.{i}"), i, s, s.hidden))
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
        self.run(tokens, None, cache, last, &mut self.tapped(tokens.len(), taps, features))
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
        let rows = tree.rows();
        self.run(&tree.tokens, Some(tree), cache, rows, &mut self.tapped(rows, taps, features))
    }

    /// Fills `features` from the residual streams that [`Target::run`] reports.
    fn tapped<'a>(
        &self,
        rows: usize,
        taps: &'a [usize],
        features: &'a mut Vec<f32>,
    ) -> impl FnMut(usize, &'static str, &[f32]) + 'a {
        let hidden = self.config.stack.hidden;
        features.resize(rows * taps.len() * hidden, 0.0);
        move |i, name, x| {
            for (j, _) in taps.iter().enumerate().filter(|(_, tap)| **tap == i && name == RESIDUAL) {
                for (row, x) in x.chunks(hidden).enumerate() {
                    features[(row * taps.len() + j) * hidden..][..hidden].copy_from_slice(x);
                }
            }
        }
    }

    /// Runs a chain of `tokens`, or a tree of them, as [`Target::forward`] and [`Target::forward_tree`] do.
    /// Calls `each` with the number of a layer and the name and the values of intermediate results,
    /// `[rows][..]`, last the residual stream after the layer, [`RESIDUAL`].
    pub fn run(
        &self,
        tokens: &[u32],
        tree: Option<&Tree>,
        cache: &mut Cache,
        last: usize,
        each: &mut dyn FnMut(usize, &'static str, &[f32]),
    ) -> Vec<f32> {
        let s = &self.config.stack;
        let at = cache.len;
        cache.commit();
        cache.extend_rope(at + tokens.len());
        let mut x = self.embed(tokens, 1.0);
        for (i, layer) in self.layers.iter().enumerate() {
            let probe = &mut |name, values: &[f32]| each(i, name, values);
            layer.forward(s, cache, i, Span { tree, ..Span::chain(at) }, &mut x, probe);
            each(i, RESIDUAL, &x);
        }
        cache.len = at + tokens.len();
        cache.pending = (0..tokens.len()).collect();
        let mut normed = Vec::new();
        ops::rms_norm(&x[(tokens.len() - last) * s.hidden..], &self.norm, s.eps, &mut normed);
        normed
    }
}

/// The name of the residual stream after a layer in [`Target::run`].
pub const RESIDUAL: &str = "residual";

/// Rows of an embedding table `[vocab][hidden]` times `scale`, `[tokens][hidden]`.
fn embed(table: &Matrix, tokens: &[u32], scale: f32) -> Vec<f32> {
    let mut x = vec![0.0; tokens.len() * table.cols];
    for (token, row) in tokens.iter().zip(x.chunks_mut(table.cols)) {
        table.row(*token as usize, scale, row);
    }
    x
}

// ---- the drafter ----

/// How the drafts of a round depend on each other.
enum Dependence {
    Independent,
    Walk(MarkovHead),
    Select(Selector),
    Chain(ChainNorms),
}

/// A drafter of one block per round, or of a chain of tokens. Embedding and head are the target's, or its
/// own, as its plan says.
pub struct Drafter {
    /// Its plan.
    pub config: DrafterConfig,
    embedding: Option<Matrix>, // [vocab][hidden]; None: the target's
    head: Option<Matrix>,      // [own_head][hidden]; None: the target's
    dependence: Dependence,
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
            dependence: match config.dependence {
                drafter::Dependence::Independent => Dependence::Independent,
                drafter::Dependence::Walk(walk) => {
                    let outputs = config.own_head.unwrap_or(config.vocab);
                    Dependence::Walk(MarkovHead::load(file, walk, s.hidden, config.vocab, outputs)?)
                }
                drafter::Dependence::Select(plan) => {
                    Dependence::Select(Selector::load(file, plan, s.hidden, config.vocab)?)
                }
                drafter::Dependence::Chain(plan) => {
                    Dependence::Chain(ChainNorms::load(file, plan, s.hidden, config.taps.len())?)
                }
            },
            fc: matrix(file, "fc.weight", s.hidden, config.taps.len() * s.hidden)?,
            hidden_norm: {
                let name = if config.chain().is_some() {
                    "layers.0.hidden_norm.weight"
                } else {
                    "hidden_norm.weight"
                };
                ops::to_f32(&file.tensor(name, &[s.hidden])?)
            },
            norm: ops::to_f32(&file.tensor("norm.weight", &[s.hidden])?),
            layers: (0..s.attention.len())
                .map(|i| {
                    let inputs = if config.chain().is_some() { 2 * s.hidden } else { s.hidden };
                    let mut layer = Layer::load(file, &format!("layers.{i}"), i, s, inputs)?;
                    let Some(plan) = config.convolution else { return Ok(layer) };
                    let load =
                        |name: &str| Convolution::load(file, &format!("layers.{i}.{name}"), plan, s.hidden);
                    layer.convolutions = Some([load("attention_conv")?, load("mlp_conv")?]);
                    Ok(layer)
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
        let Cache { layers, rope, scratch, .. } = cache;
        for (layer, kept) in self.layers.iter().zip(layers) {
            let (Mixer::Attention(layer), LayerCache::Kv(kv)) = (&layer.mixer, kept) else { continue };
            ops::linear(&c, rows, [(&layer.k, &mut scratch.k), (&layer.v, &mut scratch.v)]);
            layer.write_kv(s, kv, rope, Span::chain(at), scratch);
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
            layer.forward(s, cache, i, Span::chain(at), &mut x, &mut |_, _| ());
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
        if let Dependence::Walk(head) = &self.dependence { Some(head.walk(anchor)) } else { None }
    }

    /// Chooses the candidates of a row that follows the token `previous`, if the drafter has a candidate
    /// selector; arguments as for [`Selector::select`].
    pub fn select(&self, previous: u32, hidden: &[f32], logits: &mut [f32]) {
        if let Dependence::Select(selector) = &self.dependence {
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
