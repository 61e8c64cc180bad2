//! One decoder layer of target and drafter: a mixer of positions (attention or Gated DeltaNet), then an MLP
//! (dense or a mixture of experts). Each reads the normed residual stream and is added to it (docs/dflash.md
//! 3.4).

use crate::Result;
use crate::checkpoint::config::{Attention as Mask, Stack};
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::delta_net::DeltaNet;
use crate::cpu::dflash2::Convolution;
use crate::cpu::model::{Cache, LayerCache};
use crate::cpu::moe::{Mlp, Moe};
use crate::cpu::ops::{self, Kv, Matrix};
use crate::spec::tree::Tree;

/// Is called with the name and the values of intermediate results, for tests.
pub(super) type Probe<'a> = &'a mut dyn FnMut(&'static str, &[f32]);

/// Where the rows of a pass are: at positions `at..`, at those of a tree whose anchor is at `at`, or all at
/// the depth of a beam.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) at: usize,
    pub(super) tree: Option<&'a Tree>,
    pub(super) beam: Option<&'a Beam>,
}

impl Span<'_> {
    /// Positions `at..`.
    pub(super) fn chain(at: usize) -> Span<'static> {
        Span { at, tree: None, beam: None }
    }
}

/// The rows of one level of a beam search. All are at position `at + depth`, and each follows `depth` rows of
/// earlier levels. The rows of all levels have slots in the order in which they run.
pub(super) struct Beam {
    pub(super) depth: usize,
    /// `[rows][depth]`: the slots of the rows that each row follows.
    pub(super) paths: Vec<Vec<usize>>,
    /// The slot of the first row of this level.
    pub(super) first: usize,
}

impl Beam {
    /// Most levels. The keys and values of slot `i` are kept at position `at + LEVELS + i`.
    pub(super) const LEVELS: usize = 16;
}

pub(super) struct Layer {
    pub(super) input_norm: Vec<f32>, // [hidden]
    pub(super) mixer: Mixer,
    post_norm: Vec<f32>, // [hidden]
    mlp: LayerMlp,
    /// Of mixer and MLP; only drafters have them.
    pub(super) convolutions: Option<[Convolution; 2]>,
}

pub(super) enum Mixer {
    Attention(Box<Attention>),
    DeltaNet(Box<DeltaNet>),
}

enum LayerMlp {
    Dense(Box<Mlp>),
    Moe(Box<Moe>),
}

pub(super) struct Attention {
    q: Matrix, // [heads * head_dim][hidden]; of a chain twice as many columns; with output gates [heads][2][head_dim][hidden]: queries, then gates
    pub(super) k: Matrix, // [kv_heads * head_dim][hidden]
    pub(super) v: Matrix, // [kv_heads * head_dim][hidden]
    o: Matrix, // [hidden][heads * head_dim]
    qk_norm: Option<[Vec<f32>; 2]>, // [head_dim] each
}

/// Buffers of a pass, which its layers share.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) y: Vec<f32>,    // [rows][hidden]: normed input of a sublayer
    pub(super) q: Vec<f32>,    // [rows][heads * head_dim]
    pub(super) k: Vec<f32>,    // [rows][kv_heads * head_dim]
    pub(super) v: Vec<f32>,    // [rows][kv_heads * head_dim]
    pub(super) a: Vec<f32>,    // [rows][heads * head_dim]: attention's output
    pub(super) z: Vec<f32>,    // [rows][hidden]: a sublayer's output
    pub(super) gate: Vec<f32>, // [rows][intermediate]; in attention [rows][heads * head_dim]: output gates
    pub(super) up: Vec<f32>,   // [rows][intermediate]
}

pub(super) fn matrix(file: &Checkpoint, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
    Ok(Matrix::new(file.tensor(name, &[rows, cols])?))
}

/// The gain `[len]` of a norm of this stack.
pub(super) fn gain(file: &Checkpoint, name: &str, len: usize, stack: &Stack) -> Result<Vec<f32>> {
    let mut gain = ops::to_f32(&file.tensor(name, &[len])?);
    if stack.norm_offset {
        gain.iter_mut().for_each(|w| *w += 1.0);
    }
    Ok(gain)
}

impl Layer {
    /// Reads layer `i`, whose tensors' names begin with `prefix`. `inputs`: the columns of q, k and v.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(super) fn load(file: &Checkpoint, prefix: &str, i: usize, s: &Stack, inputs: usize) -> Result<Layer> {
        let norm = |name: &str| gain(file, &format!("{prefix}.{name}.weight"), s.hidden, s);
        let part = |name: &str| format!("{prefix}.{name}");
        Ok(Layer {
            input_norm: norm("input_layernorm")?,
            mixer: match s.delta_net(i) {
                None => Mixer::Attention(Attention::load(file, &part("self_attn"), s, inputs)?.into()),
                Some(shape) => Mixer::DeltaNet(DeltaNet::load(file, &part("linear_attn"), shape, s)?.into()),
            },
            post_norm: norm("post_attention_layernorm")?,
            mlp: match &s.moe {
                None => LayerMlp::Dense(Mlp::load(file, &part("mlp"), s.hidden, s.intermediate)?.into()),
                Some(shape) => LayerMlp::Moe(Moe::load(file, &part("mlp"), shape, s)?.into()),
            },
            convolutions: None,
        })
    }

    /// Runs the layer over `x` `[rows][hidden]` in place. It is layer `i` of the cache. Attention writes the
    /// rows' keys and values before it attends. The rows of a tree follow the positions before `span.at` and
    /// the rows of their own paths.
    pub(super) fn forward(
        &self,
        stack: &Stack,
        cache: &mut Cache,
        i: usize,
        span: Span,
        x: &mut [f32],
        probe: Probe,
    ) {
        ops::rms_norm(x, &self.input_norm, stack.eps, &mut cache.scratch.y);
        self.forward_normed(stack, cache, i, span, x, probe);
    }

    /// As [`Layer::forward`], with the mixer's input already in the scratch's `y`.
    pub(super) fn forward_normed(
        &self,
        stack: &Stack,
        cache: &mut Cache,
        i: usize,
        span: Span,
        x: &mut [f32],
        probe: Probe,
    ) {
        let Cache { layers, rope, scratch: s, .. } = cache;
        let [mixer, mlp] = self.convolutions.as_ref().map_or([None; 2], |both| both.each_ref().map(Some));
        let dynamic = mixer.map(|convolution| (convolution, convolution.before(&mut s.y)));
        match (&self.mixer, &mut layers[i]) {
            (Mixer::Attention(attention), LayerCache::Kv(kv)) => {
                attention.forward(stack, stack.attention[i], kv, rope, span, s);
            }
            (Mixer::DeltaNet(delta_net), LayerCache::State(state)) => {
                delta_net.forward(&s.y, x.len() / stack.hidden, span.tree, state, &mut s.z, probe);
            }
            _ => unreachable!("the cache of another model"),
        }
        if let Some((convolution, dynamic)) = dynamic {
            convolution.after(&dynamic, &mut s.z);
        }
        probe("mixer", &s.z);
        ops::add(x, &s.z);

        ops::rms_norm(x, &self.post_norm, stack.eps, &mut s.y);
        let dynamic = mlp.map(|convolution| (convolution, convolution.before(&mut s.y)));
        match &self.mlp {
            LayerMlp::Dense(mlp) => mlp.forward(&s.y, &mut s.gate, &mut s.up, &mut s.z),
            LayerMlp::Moe(moe) => moe.forward(s, probe),
        }
        if let Some((convolution, dynamic)) = dynamic {
            convolution.after(&dynamic, &mut s.z);
        }
        probe("mlp", &s.z);
        ops::add(x, &s.z);
    }
}

impl Attention {
    fn load(file: &Checkpoint, prefix: &str, s: &Stack, inputs: usize) -> Result<Attention> {
        let matrix = |name: &str, rows, cols| matrix(file, &format!("{prefix}.{name}.weight"), rows, cols);
        let norm = |name: &str| gain(file, &format!("{prefix}.{name}.weight"), s.head_dim, s);
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        Ok(Attention {
            q: matrix("q_proj", s.query_rows(), inputs)?,
            k: matrix("k_proj", kv, inputs)?,
            v: matrix("v_proj", kv, inputs)?,
            o: matrix("o_proj", s.hidden, q)?,
            qk_norm: match s.qk_norm {
                true => Some([norm("q_norm")?, norm("k_norm")?]),
                false => None,
            },
        })
    }

    /// Writes the output for the rows of `s.y` to `s.z`, and their keys and values to `kv`.
    fn forward(&self, stack: &Stack, mask: Mask, kv: &mut Kv, rope: &[f32], span: Span, s: &mut Scratch) {
        let rows = s.y.len() / self.q.cols;
        ops::linear(&s.y, rows, [(&self.q, &mut s.q), (&self.k, &mut s.k), (&self.v, &mut s.v)]);
        if stack.output_gate {
            let dim = stack.head_dim;
            s.gate.clear();
            s.q.chunks(2 * dim).for_each(|head| s.gate.extend_from_slice(&head[dim..]));
            (0..rows * stack.heads)
                .for_each(|head| s.q.copy_within(2 * head * dim..(2 * head + 1) * dim, head * dim));
            s.q.truncate(s.gate.len());
        }
        let norm = self.qk_norm.as_ref().map(|[norm, _]| &norm[..]);
        norm_and_rope(stack, norm, rope, span, &mut s.q, stack.heads);
        self.write_kv(stack, kv, rope, span, s);
        match (span.tree, span.beam) {
            (Some(tree), _) => tree_attention(stack, mask, kv, span.at, tree, s),
            (None, Some(beam)) => beam_attention(stack, mask, kv, span.at, beam, s),
            (None, None) => {
                let visible = |row: usize| visible(mask, span.at + row, span.at + rows);
                ops::attention(&s.q, stack.heads, kv, &visible, &mut s.a);
            }
        }
        if stack.output_gate {
            ops::sigmoid_gate(&mut s.a, &s.gate);
        }
        ops::linear(&s.a, rows, [(&self.o, &mut s.z)]);
    }

    /// Writes keys and values of the pass's rows, projected to `s.k` and `s.v`, at positions `span.at..`. The
    /// rows of a tree are stored in row order and those of a beam in its slots, but RoPE uses each row's
    /// position on its path.
    pub(super) fn write_kv(&self, stack: &Stack, kv: &mut Kv, rope: &[f32], span: Span, s: &mut Scratch) {
        let norm = self.qk_norm.as_ref().map(|[_, norm]| &norm[..]);
        norm_and_rope(stack, norm, rope, span, &mut s.k, stack.kv_heads);
        kv.write(span.at + span.beam.map_or(0, |beam| Beam::LEVELS + beam.first), &s.k, &s.v);
    }
}

/// Applies the per-head RMSNorm, if there is one, and then RoPE to `x` `[rows][heads * head_dim]`
/// (docs/dflash.md 3.4).
fn norm_and_rope(stack: &Stack, norm: Option<&[f32]>, rope: &[f32], span: Span, x: &mut [f32], heads: usize) {
    if let Some(norm) = norm {
        ops::rms_norm_in_place(x, norm, stack.eps);
    }
    let width = stack.rope.rotary_dims;
    for (row, x) in x.chunks_mut(heads * stack.head_dim).enumerate() {
        let in_beam = span.beam.map_or(row, |beam| beam.depth);
        let position = span.at + span.tree.map_or(in_beam, |tree| tree.depths[row] as usize);
        ops::rope(x, heads, stack.head_dim, &rope[position * width..][..width], width);
    }
}

/// Attention of a tree's rows. For each row, the keys and values of its path are written to consecutive
/// positions, so that each sum has the same bits as in autoregressive decoding. The keys and values of the
/// tree are restored at the end.
fn tree_attention(stack: &Stack, mask: Mask, kv: &mut Kv, at: usize, tree: &Tree, s: &mut Scratch) {
    let width = stack.kv_heads * stack.head_dim;
    let mut output = Vec::new();
    s.a.clear();
    for (row, q) in s.q.chunks(stack.heads * stack.head_dim).enumerate() {
        let mut end = at;
        for row in tree.path(row) {
            kv.write(end, &s.k[row * width..][..width], &s.v[row * width..][..width]);
            end += 1;
        }
        ops::attention(q, stack.heads, kv, &|_| visible(mask, end - 1, end), &mut output);
        s.a.extend_from_slice(&output);
    }
    kv.write(at, &s.k, &s.v);
}

/// As [`tree_attention`], for the rows of a beam: their paths are copied from the slots of earlier levels.
fn beam_attention(stack: &Stack, mask: Mask, kv: &mut Kv, at: usize, beam: &Beam, s: &mut Scratch) {
    let end = at + beam.depth + 1;
    let mut output = Vec::new();
    s.a.clear();
    for (row, q) in s.q.chunks(stack.heads * stack.head_dim).enumerate() {
        let slots = beam.paths[row].iter().copied().chain([beam.first + row]);
        slots.enumerate().for_each(|(depth, slot)| kv.copy(at + Beam::LEVELS + slot, at + depth));
        ops::attention(q, stack.heads, kv, &|_| visible(mask, end - 1, end), &mut output);
        s.a.extend_from_slice(&output);
    }
}

/// The keys that the query at `position` attends to when keys `0..end` exist (docs/dflash.md 3.6).
fn visible(mask: Mask, position: usize, end: usize) -> std::ops::Range<usize> {
    let last = match (mask.causal, mask.window) {
        (true, _) => position + 1,
        (false, Some(window)) => end.min(position.saturating_add(window)),
        (false, None) => end,
    };
    (position + 1).saturating_sub(mask.window.unwrap_or(usize::MAX))..last
}
