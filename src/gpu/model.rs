//! The layers of target and drafter on a device, as ordered lists of launches: a prompt chunk, a draft pass,
//! a verification pass. This module knows shapes and order; it knows neither sequences nor text, and its
//! callers fill the tables of a pass.
//!
//! A layer is five launches: qkv, attention, output projection, gate and up, down. One with convolutions has one
//! more before qkv and before gate and up; those after the sublayers are fused. Only the first RMS norm of
//! a pass is a launch. The others are fused: the kernel that writes the residual stream also writes the next
//! linear layer's input, scaled by the norm's gain, and partial sums of squares. The next linear kernel
//! scales its output by these sums (`cuda/model/epilogues.cuh`).

use crate::checkpoint::config::{self, TargetConfig};
use crate::checkpoint::drafter::Convolution as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::attention::{self, Attention, MAX_GROUP, Mask, Paged, Prefill};
use crate::gpu::kernels::convolve::Convolve;
use crate::gpu::kernels::embedding::Embedding;
use crate::gpu::kernels::head::{Head, TargetIds};
use crate::gpu::kernels::inject::Inject;
use crate::gpu::kernels::linear::{self, Input, PrefillKernel, Shape};
use crate::gpu::kernels::norm::Norm;
use crate::gpu::kernels::project::{Project, ProjectBuffers};
use crate::gpu::kernels::qkv::{Qkv, QkvBuffers};
use crate::gpu::kernels::swiglu::Swiglu;
use crate::gpu::loader::{Loader, PackedRows};
use crate::{Error, Result};

pub use crate::gpu::kernels::PAGE;

/// One row of a pass: `Row` of `cuda/common/rows.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The sequence, as a row of the page table; [`Row::NONE`]: the row is padding.
    pub sequence: u32,
    /// Position of the token, for RoPE.
    pub position: u32,
    /// Cache slot of the sequence where the row's key and value are written; [`Row::NONE`]: they are not
    /// written.
    pub slot: u32,
    /// Row of the query buffer where the row's query is written; [`Row::NONE`]: it has no query.
    pub query: u32,
}

impl Row {
    /// Marks an absent field.
    pub const NONE: u32 = u32::MAX;
    /// Bytes of a row on the device.
    pub const BYTES: usize = 16;

    /// The row in device layout: four little-endian u32 in the order of the fields.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (to, word) in bytes.chunks_mut(4).zip([self.sequence, self.position, self.slot, self.query]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The weights of one decoder layer. "Packed" is the bf16 layout of [`crate::gpu::kernels::pack::Pack`].
struct Layer {
    qkv: Buffer,                     // packed: query heads, key heads, value heads
    o: Buffer,                       // packed
    gate_up: Buffer,                 // packed: tiles of 8 gates and 8 ups
    down: Buffer,                    // packed
    input_gain: Buffer,              // [hidden] f32
    post_gain: Buffer,               // [hidden] f32
    head_gains: Option<[Buffer; 2]>, // [head_dim] f32: q_norm and k_norm
    /// Of attention and MLP; only drafters have them.
    convolutions: Option<[Convolution; 2]>,
}

/// The weights of the convolutions before and after a sublayer.
struct Convolution {
    projection: Buffer, // packed by Convolve::packed_row
    base: [Buffer; 2],  // [taps][hidden] f32
}

impl Convolution {
    fn load(loader: &mut Loader, prefix: &str, plan: Plan, hidden: usize) -> Result<Convolution> {
        let [(base, shape), (projection, _)] = plan.tensors(prefix, hidden);
        let base = loader.tensor(&base, &shape)?;
        let (half, layer) = (base.bytes() / 2, convolve(plan, hidden, 1, 1).shape());
        let rows = PackedRows::Coefficients(plan.taps, hidden / plan.group);
        Ok(Convolution {
            projection: loader.packed(layer, &[(projection, layer.n, rows)])?,
            base: [base.slice(0, half)?, base.slice(half, half)?],
        })
    }
}

/// The launcher of a plan's convolutions over `sequences` blocks of `block` rows.
fn convolve(plan: Plan, hidden: usize, sequences: usize, block: usize) -> Convolve {
    Convolve { rows: sequences * block, hidden, taps: plan.taps, group: plan.group, block }
}

impl Layer {
    fn load(loader: &mut Loader, prefix: &str, c: &config::Stack, plan: Option<Plan>) -> Result<Layer> {
        let (hidden, inner, head) = (c.hidden, c.intermediate, c.head_dim);
        let (q, kv) = (c.heads * head, c.kv_heads * head);
        let [qkv, o, gate_up, down] = c.shapes();
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let part = |part, rows, place| (name(part), rows, place);
        let first = PackedRows::From(0);
        let queries = part("self_attn.q_proj", q, first);
        let keys = part("self_attn.k_proj", kv, PackedRows::From(q));
        let values = part("self_attn.v_proj", kv, PackedRows::From(q + kv));
        let (gates, ups) =
            (part("mlp.gate_proj", inner, PackedRows::Gates), part("mlp.up_proj", inner, PackedRows::Ups));
        let mut head_gain = |part| loader.vector(&name(part), head);
        Ok(Layer {
            head_gains: match c.qk_norm {
                true => Some([head_gain("self_attn.q_norm")?, head_gain("self_attn.k_norm")?]),
                false => None,
            },
            qkv: loader.packed(qkv, &[queries, keys, values])?,
            o: loader.packed(o, &[part("self_attn.o_proj", hidden, first)])?,
            gate_up: loader.packed(gate_up, &[gates, ups])?,
            down: loader.packed(down, &[part("mlp.down_proj", hidden, first)])?,
            input_gain: loader.vector(&name("input_layernorm"), hidden)?,
            post_gain: loader.vector(&name("post_attention_layernorm"), hidden)?,
            convolutions: match plan {
                Some(plan) => Some([
                    Convolution::load(loader, &format!("{prefix}.attention_conv"), plan, hidden)?,
                    Convolution::load(loader, &format!("{prefix}.mlp_conv"), plan, hidden)?,
                ]),
                None => None,
            },
        })
    }
}

/// The decoder layers and the final norm of the target or the drafter, without embedding and LM head.
pub struct Transformer {
    /// Shapes and constants.
    pub config: config::Stack,
    /// The convolutions of its layers, if they have any.
    pub convolution: Option<Plan>,
    layers: Vec<Layer>,
    final_gain: Buffer, // [hidden] f32
    rope: Buffer,       // [positions][head_dim] f32
    positions: usize,
}

impl Transformer {
    /// Allocates the weights and lists them in `loader`: tensors `{prefix}layers.{i}.*` and `{prefix}norm`.
    /// `convolution`: that of a DFlash2 drafter. The RoPE table covers `positions` positions.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a shape that the kernels do not support, named by its config field;
    /// otherwise as [`Loader::packed`].
    pub fn load(
        loader: &mut Loader,
        prefix: &str,
        config: &config::Stack,
        convolution: Option<Plan>,
        positions: usize,
    ) -> Result<Transformer> {
        check(config)?;
        convolution.map_or(Ok(()), check_convolution)?;
        let layers = (0..config.attention.len())
            .map(|i| Layer::load(loader, &format!("{prefix}layers.{i}"), config, convolution));
        Ok(Transformer {
            layers: layers.collect::<Result<_>>()?,
            final_gain: loader.vector(&format!("{prefix}norm.weight"), config.hidden)?,
            rope: loader.rope_table(&config.rope, config.head_dim, positions)?,
            positions,
            config: config.clone(),
            convolution,
        })
    }

    fn norm(&self, rows: usize) -> Norm {
        Norm { rows, hidden: self.config.hidden }
    }

    /// Runs the layers over `pass.rows()` rows of `s.x`. Afterwards `s.y` and `s.sumsq` hold the input of the
    /// LM head from row `pass.injected` on, with the final norm's gain applied.
    ///
    /// # Errors
    /// The device's error; [`Error::Internal`] if `s` or `cache` is too small for the pass.
    pub fn run(&self, device: &dyn Device, s: &Scratch, cache: &KvCache, pass: &Pass) -> Result<()> {
        let c = &self.config;
        let (rows, all) = (pass.rows(), pass.rows() + pass.injected);
        // Injected rows come before the pass's own.
        let (y, sumsq) = s.slices_from(c.hidden, pass.injected)?;
        let convolved = match (self.convolution, &s.convolution) {
            (None, _) => None,
            (Some(plan), Some(buffers)) => {
                Some((convolve(plan, c.hidden, pass.sequences, pass.block), buffers))
            }
            (Some(_), None) => return Err(Error::Internal("no memory for convolutions".into())),
        };
        // A convolution reads the norm's output from a buffer of its own and writes `y`.
        let normed = convolved.map_or(&y, |(_, buffers)| &buffers.normed);
        self.norm(rows).launch(device, normed, &sumsq, &s.x, None, &self.layers[0].input_gain)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let input = |weights, x, sumsq| Input {
                weights,
                x,
                sumsq,
                eps: c.eps,
                prefill_kernel: pass.prompt.map(|_| PrefillKernel::of(device)),
                num_active: pass.num_active,
                workspace: &s.linear,
            };
            // The convolutions of the attention (0) and of the MLP (1).
            let of = |sublayer: usize| {
                let both = layer.convolutions.as_ref()?;
                convolved.map(|(convolve, buffers)| (convolve, buffers, &both[sublayer]))
            };
            let before = |sublayer| match of(sublayer) {
                None => Ok(()),
                Some((convolve, buffers, weights)) => convolve.launch(
                    device,
                    &input(&weights.projection, normed, Some(&sumsq)),
                    &y,
                    &buffers.dynamic,
                    &weights.base[0],
                ),
            };
            let project = |sublayer, shape: Shape, input: &Input, buffers: &ProjectBuffers| {
                let project = Project { rows, n: shape.n, k: shape.k };
                match of(sublayer) {
                    None => project.launch(device, input, buffers),
                    Some((convolve, own, weights)) => {
                        let base = &weights.base[1];
                        project.launch_convolved(device, input, buffers, convolve, &own.dynamic, base)
                    }
                }
            };
            before(0)?;
            self.qkv(all, false, s, cache).launch(
                device,
                &input(&layer.qkv, &s.y, Some(&s.sumsq)),
                &self.qkv_buffers(i, s, cache, pass.table),
            )?;
            self.attend(device, i, s, cache, pass)?;
            let (next, next_y) =
                self.layers.get(i + 1).map_or((&self.final_gain, &y), |next| (&next.input_gain, normed));
            let out = |gain, y| ProjectBuffers { x: &s.x, y, sumsq: &sumsq, gain, features: None };
            let [_, o, _, down] = c.shapes();
            project(0, o, &input(&layer.o, &s.attended, None), &out(&layer.post_gain, normed))?;
            before(1)?;
            Swiglu { rows, inner: c.intermediate, k: c.hidden }.launch(
                device,
                &input(&layer.gate_up, &y, Some(&sumsq)),
                &s.inner,
            )?;
            let tap =
                pass.taps.and_then(|(taps, to)| Some((taps.iter().position(|&t| t == i)?, taps.len(), to)));
            let features = match tap {
                None => None,
                Some((index, taps, to)) => {
                    let skipped = index * c.hidden * 2;
                    Some((to.slice(skipped, to.bytes() - skipped)?, taps * c.hidden))
                }
            };
            let features = features.as_ref().map(|(buffer, pitch)| (buffer, *pitch));
            let out = ProjectBuffers { features, ..out(next, next_y) };
            project(1, down, &input(&layer.down, &s.inner, None), &out)?;
        }
        Ok(())
    }

    /// Writes the keys and values of every layer for `rows` rows of projected features, which
    /// [`FeatureProjection::run`] left in `s.y` and `s.sumsq`. `table` `[rows]` [`Row`]. `prompt`: uses the
    /// prefill kernels. `num_active` as [`Pass::num_active`].
    ///
    /// # Errors
    /// As [`Transformer::run`].
    #[allow(clippy::too_many_arguments)]
    pub fn write_context_kv(
        &self,
        device: &dyn Device,
        s: &Scratch,
        cache: &KvCache,
        table: &Buffer,
        rows: usize,
        prompt: bool,
        num_active: Option<&Buffer>,
    ) -> Result<()> {
        for (i, layer) in self.layers.iter().enumerate() {
            let input = Input {
                weights: &layer.qkv,
                x: &s.y,
                sumsq: Some(&s.sumsq),
                eps: self.config.eps,
                prefill_kernel: prompt.then(|| PrefillKernel::of(device)),
                num_active,
                workspace: &s.linear,
            };
            self.qkv(rows, true, s, cache).launch(device, &input, &self.qkv_buffers(i, s, cache, table))?;
        }
        Ok(())
    }

    fn qkv(&self, rows: usize, keys_only: bool, s: &Scratch, cache: &KvCache) -> Qkv {
        let c = &self.config;
        Qkv {
            rows,
            k: c.hidden,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            query_rows: s.rows,
            pages: cache.pages,
            sequences: cache.sequences,
            sequence_pages: cache.sequence_pages,
            positions: self.positions,
            keys_only,
        }
    }

    fn qkv_buffers<'a>(
        &'a self,
        layer: usize,
        s: &'a Scratch,
        cache: &'a KvCache,
        table: &'a Buffer,
    ) -> QkvBuffers<'a> {
        let gains = self.layers[layer].head_gains.as_ref();
        QkvBuffers {
            rows: table,
            queries: &s.queries,
            keys: &cache.keys[layer],
            values: &cache.values[layer],
            table: &cache.table,
            q_gain: gains.map(|g| &g[0]),
            k_gain: gains.map(|g| &g[1]),
            rope: &self.rope,
        }
    }

    fn attend(&self, device: &dyn Device, i: usize, s: &Scratch, cache: &KvCache, pass: &Pass) -> Result<()> {
        let (c, attention) = (&self.config, self.config.attention[i]);
        let layer = attention::Layer {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            pages: cache.pages,
            pages_per_sequence: cache.sequence_pages,
            window: attention.window.unwrap_or(0),
            scale: 1.0 / (c.head_dim as f32).sqrt(),
        };
        let (k, v, spans) = (&cache.keys[i], &cache.values[i], pass.spans);
        if let Some(sequence) = pass.prompt {
            let width = cache.sequence_pages * 4;
            let table = cache.table.slice(sequence * width, width)?;
            let prefill = Prefill { layer, rows: pass.rows() };
            return prefill.launch(device, &s.attended, &s.queries, Paged { k, v, table: &table, spans });
        }
        let mask = match (attention.causal, pass.masks) {
            (false, _) => Mask::Block,
            (true, None) => Mask::Chain,
            (true, Some(masks)) => Mask::Tree(masks),
        };
        let kernel =
            Attention { layer, sequences: pass.sequences, block: pass.block, capacity: cache.capacity() };
        kernel.launch(
            device,
            &s.attended,
            &s.queries,
            Paged { k, v, table: &cache.table, spans },
            mask,
            &s.partials,
        )
    }
}

impl config::Stack {
    /// The shapes of a layer's linear kernels: qkv, o, gate_up, down.
    pub fn shapes(&self) -> [Shape; 4] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            Shape { n: q + 2 * kv, k: self.hidden },
            Shape { n: self.hidden, k: q },
            Shape { n: 2 * self.intermediate, k: self.hidden },
            Shape { n: self.hidden, k: self.intermediate },
        ]
    }
}

/// Refuses shapes that the kernels do not support. The error names the field of the config.
fn check(c: &config::Stack) -> Result<()> {
    let needs = [
        (c.hidden.is_multiple_of(32), "hidden_size", c.hidden, "a multiple of 32"),
        (c.intermediate.is_multiple_of(32), "intermediate_size", c.intermediate, "a multiple of 32"),
        (c.head_dim == 64 || c.head_dim == 128, "head_dim", c.head_dim, "64 or 128"),
        (c.heads <= MAX_GROUP * c.kv_heads, "num_attention_heads", c.heads, "at most 32 per key/value head"),
        (c.rope.rotary_dims == c.head_dim, "the number of rotated dims", c.rope.rotary_dims, "all of a head"),
    ];
    for (holds, field, found, expected) in needs {
        if !holds {
            return Err(Error::Unsupported(format!(
                "the kernels cannot run this model: {field} is {found}, expected {expected}"
            )));
        }
    }
    Ok(())
}

/// As [`check`], for convolutions.
fn check_convolution(plan: Plan) -> Result<()> {
    let (field, found, expected) = match plan {
        Plan { taps: 1 | 2 | 4 | 8, group } if group.is_multiple_of(4) => return Ok(()),
        Plan { taps: 1 | 2 | 4 | 8, group } => ("conv_group_size", group, "a multiple of 4"),
        Plan { taps, .. } => ("conv_kernel_size", taps, "1, 2, 4 or 8"),
    };
    Err(Error::Unsupported(format!(
        "the kernels cannot run this drafter: {field} is {found}, expected {expected}"
    )))
}

/// The keys and values of a model, in pages of [`PAGE`] positions. A page belongs to one sequence.
pub struct KvCache {
    pub(crate) keys: Vec<Buffer>,   // per layer [pages][kv_heads][PAGE][head_dim] bf16
    pub(crate) values: Vec<Buffer>, // as keys
    /// The page table, `[sequences][sequence_pages]` u32: the pages of each sequence, in order of position.
    pub table: Buffer,
    /// Number of pages.
    pub pages: usize,
    /// Rows of the page table.
    pub sequences: usize,
    /// The most pages of one sequence.
    pub sequence_pages: usize,
}

impl KvCache {
    /// Allocates `pages` pages for `sequences` sequences of at most `sequence_pages` pages each. The page
    /// table is left undefined.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn new(
        device: &dyn Device,
        c: &config::Stack,
        pages: usize,
        sequences: usize,
        sequence_pages: usize,
    ) -> Result<KvCache> {
        let bytes = pages * c.kv_heads * PAGE * c.head_dim * 2;
        let per_layer = |what| {
            (0..c.attention.len()).map(|_| device.allocate(bytes, what)).collect::<Result<Vec<Buffer>>>()
        };
        Ok(KvCache {
            keys: per_layer("keys")?,
            values: per_layer("values")?,
            table: device.allocate(sequences * sequence_pages * 4, "the page table")?,
            pages,
            sequences,
            sequence_pages,
        })
    }

    /// The most positions of one sequence.
    pub fn capacity(&self) -> usize {
        self.sequence_pages * PAGE
    }
}

/// Activations and workspaces of a model's passes. All passes share them, because they run one after the
/// other.
pub struct Scratch {
    /// Residual stream `[rows][hidden]` f32.
    pub x: Buffer,
    /// Input of the next linear layer: `[injected + rows][hidden]` bf16.
    pub y: Buffer,
    /// Partial sums of squares of the residual stream, for the norm that `y` belongs to:
    /// `[injected + rows][ceil(hidden / 128)]` f32.
    pub sumsq: Buffer,
    queries: Buffer,  // [rows][heads][head_dim] bf16
    attended: Buffer, // as queries
    inner: Buffer,    // [rows][intermediate] bf16
    convolution: Option<ConvolutionBuffers>,
    linear: linear::Workspace,
    partials: Buffer, // of attention
    rows: usize,
}

/// Activations of layers with convolutions, for the rows of a round.
struct ConvolutionBuffers {
    normed: Buffer,  // [rows][hidden] bf16: a norm's output before the convolution
    dynamic: Buffer, // [rows][taps][hidden / group] f32: coefficients of the convolution after a sublayer
}

/// The largest passes that a [`Scratch`] supports.
#[derive(Debug, Clone, Copy)]
pub struct ScratchSizes {
    /// Sequences of a round.
    pub sequences: usize,
    /// Rows of each sequence in a round.
    pub block: usize,
    /// Rows of a prompt chunk.
    pub chunk: usize,
    /// Injected rows of a round, before the pass's own ([`Pass::injected`]).
    pub injected: usize,
    /// Shape of the LM head, if it runs after the pass.
    pub head: Option<Shape>,
    /// Inputs of the feature projection (taps x hidden), if it runs before the pass.
    pub features: Option<usize>,
    /// The convolutions of the layers, if they have any.
    pub convolution: Option<Plan>,
}

impl Scratch {
    /// Allocates the memory for passes through a model of config `c` and its `cache`.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn new(
        device: &dyn Device,
        c: &config::Stack,
        cache: &KvCache,
        sizes: ScratchSizes,
    ) -> Result<Scratch> {
        let ScratchSizes { sequences, block, chunk, injected, .. } = sizes;
        let round = sequences * block;
        let rows = round.max(chunk);
        let all = (round + injected).max(chunk);
        let parts = c.hidden.div_ceil(128);
        let mut launches: Vec<_> = c.shapes().iter().map(|&shape| (shape, round + injected)).collect();
        launches.extend(sizes.head.map(|head| (head, round)));
        launches.extend(sizes.features.map(|k| (Shape { n: c.hidden, k }, injected)));
        let convolve = sizes.convolution.map(|plan| convolve(plan, c.hidden, sequences, block));
        launches.extend(convolve.map(|convolve| (convolve.shape(), round)));
        let layer = attention::Layer {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            pages: cache.pages,
            pages_per_sequence: cache.sequence_pages,
            window: 0,
            scale: 1.0,
        };
        let attention = Attention { layer, sequences, block, capacity: cache.capacity() };
        let get = |bytes: usize, what| device.allocate(bytes, what);
        // Attention writes only the rows of a sequence's span, and the output projection reads every row of the
        // pass. Its results for padding are not used, but it must not read memory that was never written.
        let attended = get(rows * c.heads * c.head_dim * 2, "attention's output")?;
        device.fill(&attended, 0)?;
        Ok(Scratch {
            x: get(rows * c.hidden * 4, "the residual stream")?,
            y: get(all * c.hidden * 2, "activations")?,
            sumsq: get(all * parts * 4, "sums of squares")?,
            queries: get(rows * c.heads * c.head_dim * 2, "queries")?,
            attended,
            inner: get(rows * c.intermediate * 2, "activations of the MLP")?,
            convolution: match convolve {
                Some(convolve) => Some(ConvolutionBuffers {
                    normed: get(round * c.hidden * 2, "activations")?,
                    dynamic: get(round * convolve.dynamic_bytes(), "coefficients of convolutions")?,
                }),
                None => None,
            },
            linear: linear::Workspace::new(device, &launches)?,
            partials: get(attention.partial_bytes()?, "partial results of attention")?,
            rows,
        })
    }

    /// `y` and `sumsq` from row `first` on.
    pub(crate) fn slices_from(&self, hidden: usize, first: usize) -> Result<(Buffer, Buffer)> {
        let (y, sums) = (first * hidden * 2, first * hidden.div_ceil(128) * 4);
        Ok((self.y.slice(y, self.y.bytes() - y)?, self.sumsq.slice(sums, self.sumsq.bytes() - sums)?))
    }
}

/// One pass through a model.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Sequences that take part.
    pub sequences: usize,
    /// Rows of each sequence.
    pub block: usize,
    /// Rows of projected features before the pass's own rows in `table`, `y` and `sumsq`. The caller has
    /// written them, and every layer only computes their keys and values.
    pub injected: usize,
    /// `[injected + sequences * block]` [`Row`]. The query of a row is its index among the pass's own rows.
    pub table: &'a Buffer,
    /// `[sequences]` of (context, rows) u32: cache slots filled before the pass, and the number of rows that
    /// are not padding.
    pub spans: &'a Buffer,
    /// `[sequences][block]` u64: bit `i` is set if the row attends to row `i` of its tree. `None` for chains.
    pub masks: Option<&'a Buffer>,
    /// The sequence whose prompt chunk the rows are; `sequences` is 1. `None` for rounds.
    pub prompt: Option<usize>,
    /// One u32; if it is 0, the kernels return at once. `None`: they always run.
    pub num_active: Option<&'a Buffer>,
    /// Layers whose outputs the drafter reads, and the buffer for these outputs: `[rows][taps][hidden]` bf16.
    pub taps: Option<(&'a [usize], &'a Buffer)>,
}

impl Pass<'_> {
    /// The pass's own rows, without injected ones.
    pub fn rows(&self) -> usize {
        self.sequences * self.block
    }
}

/// An embedding table.
pub struct EmbeddingTable {
    table: Buffer, // [vocab][hidden] bf16, or the packed weights of a head
    packed: bool,
    vocab: usize,
    hidden: usize,
}

impl EmbeddingTable {
    /// Allocates the table `[vocab][hidden]` and lists it in `loader`.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load(loader: &mut Loader, name: &str, vocab: usize, hidden: usize) -> Result<EmbeddingTable> {
        Ok(EmbeddingTable { table: loader.table(name, vocab, hidden)?, packed: false, vocab, hidden })
    }

    /// Writes the embeddings of `tokens` `[rows]` u32, times `scale`, to `s.x`.
    ///
    /// # Errors
    /// The device's error.
    pub fn embed(
        &self,
        device: &dyn Device,
        s: &Scratch,
        tokens: &Buffer,
        rows: usize,
        scale: f32,
    ) -> Result<()> {
        let EmbeddingTable { packed, vocab, hidden, .. } = *self;
        Embedding { rows, hidden, vocab, packed, scale }.launch(device, &s.x, &self.table, tokens)
    }
}

/// An LM head of the target's vocabulary, or of a reduced one.
pub struct LmHead {
    weights: Buffer,     // packed
    ids: Option<Buffer>, // [shape.n] u32: the id of each output, if the vocabulary is reduced
    /// Outputs and hidden size.
    pub shape: Shape,
    /// Number of token ids: columns of the logits.
    pub vocab: usize,
}

impl LmHead {
    /// Allocates the head `[rows][hidden]` and lists it in `loader`. `ids` `[rows]`: the ids of its outputs,
    /// if they are not `0..vocab`.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load(
        loader: &mut Loader,
        name: &str,
        shape: Shape,
        ids: Option<&[u32]>,
        vocab: usize,
    ) -> Result<LmHead> {
        let weights = loader.packed(shape, &[(name.to_string(), shape.n, PackedRows::From(0))])?;
        let ids = ids.map(|ids| loader.numbers("ids of a reduced vocabulary", ids)).transpose()?;
        Ok(LmHead { weights, ids, shape, vocab })
    }

    /// Whether it has outputs for some ids only.
    pub fn is_reduced(&self) -> bool {
        self.ids.is_some()
    }

    /// Runs the head over rows `first..first + head.rows` of `s.y`, which a pass through `layers` left
    /// there. Writes `best` `[rows][shape.blocks()]` u64, the best logit of each 128 outputs (see
    /// [`Head::launch`]), and, if given, `logits` `[rows][vocab]` f32. A reduced vocabulary leaves the
    /// logits of other ids as they are.
    ///
    /// # Errors
    /// The device's error.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        device: &dyn Device,
        layers: &Transformer,
        s: &Scratch,
        first: usize,
        head: Head,
        num_active: Option<&Buffer>,
        best: &Buffer,
        logits: Option<&Buffer>,
    ) -> Result<()> {
        let (y, sumsq) = s.slices_from(self.shape.k, first)?;
        let input = Input {
            weights: &self.weights,
            x: &y,
            sumsq: Some(&sumsq),
            eps: layers.config.eps,
            prefill_kernel: None,
            num_active,
            workspace: &s.linear,
        };
        head.launch(device, &input, best, logits, self.target_ids())
    }

    /// The ids of a reduced vocabulary.
    pub(crate) fn target_ids(&self) -> Option<TargetIds<'_>> {
        self.ids.as_ref().map(|ids| TargetIds { ids, vocab: self.vocab })
    }
}

/// The target's embedding and LM head. A drafter uses them where it has none of its own.
pub struct Vocabulary {
    /// The embedding table.
    pub embedding: EmbeddingTable,
    /// The LM head.
    pub head: LmHead,
    /// Number of token ids.
    pub vocab: usize,
}

impl Vocabulary {
    /// Allocates both and lists them in `loader`.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load(loader: &mut Loader, config: &TargetConfig) -> Result<Vocabulary> {
        let (vocab, hidden) = (config.vocab, config.stack.hidden);
        let (table, shape) = ("model.embed_tokens.weight", Shape { n: vocab, k: hidden });
        let (embedding, head) = match config.tied {
            true => {
                let head = LmHead::load(loader, table, shape, None, vocab)?;
                let table = head.weights.clone();
                (EmbeddingTable { table, packed: true, vocab, hidden }, head)
            }
            false => {
                let embedding = EmbeddingTable::load(loader, table, vocab, hidden)?;
                (embedding, LmHead::load(loader, "lm_head.weight", shape, None, vocab)?)
            }
        };
        Ok(Vocabulary { embedding, head, vocab })
    }

    /// Shape of the LM head.
    pub fn shape(&self) -> Shape {
        self.head.shape
    }
}

/// The drafter's projection of the target's tapped layer outputs to its own hidden size (`fc` and
/// `hidden_norm`).
pub struct FeatureProjection {
    weights: Buffer, // packed
    gain: Buffer,    // [hidden] f32
    shape: Shape,
}

impl FeatureProjection {
    /// Allocates the weights and lists them in `loader`.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load(loader: &mut Loader, hidden: usize, taps: usize) -> Result<FeatureProjection> {
        let shape = Shape { n: hidden, k: taps * hidden };
        Ok(FeatureProjection {
            weights: loader.packed(shape, &[("fc.weight".to_string(), hidden, PackedRows::From(0))])?,
            gain: loader.vector("hidden_norm.weight", hidden)?,
            shape,
        })
    }

    /// Writes the first `rows` rows of `s.y` and `s.sumsq` from `features` `[feature_rows][taps][hidden]`
    /// bf16. `gather` `[rows]` u32: the row of `features` to read; an index out of range gives zeros.
    /// `prompt` and `num_active` as for [`Transformer::write_context_kv`].
    ///
    /// # Errors
    /// The device's error.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        device: &dyn Device,
        s: &Scratch,
        rows: usize,
        features: &Buffer,
        gather: &Buffer,
        prompt: bool,
        num_active: Option<&Buffer>,
    ) -> Result<()> {
        let Shape { n, k } = self.shape;
        let input = Input {
            weights: &self.weights,
            x: features,
            sumsq: None,
            eps: 0.0,
            prefill_kernel: prompt.then(|| PrefillKernel::of(device)),
            num_active,
            workspace: &s.linear,
        };
        let inject = Inject { rows, n, k, feature_rows: features.bytes() / (k * 2) };
        inject.launch(device, &input, gather, &s.y, &s.sumsq, &self.gain)
    }
}
