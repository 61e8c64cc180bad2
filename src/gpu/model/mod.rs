//! The layers of target and drafter on a device, as ordered lists of launches: a prompt chunk, a draft pass,
//! a verification pass. This module knows shapes and order; it knows neither sequences nor text, and its
//! callers fill the tables of a pass.
//!
//! A layer is six launches: qkv, attention, the merge of its splits (none where one split has all positions),
//! output projection, gate and up, down. Gated attention has one more, between projection and attention, for
//! the heads; a Gated DeltaNet layer has five: projection, recurrence, output projection, gate and up, down.
//! One with convolutions has one more before qkv and before gate and up; those after the sublayers are fused.
//! Only the first RMS norm of a pass is a launch. The others are fused: the kernel that writes the residual
//! stream also writes the next linear layer's input, scaled by the norm's gain, and partial sums of squares.
//! The next linear kernel scales its output by these sums (`cuda/model/epilogues.cuh`).

mod buffers;
mod layer;
mod vocabulary;

use crate::checkpoint::config;
use crate::checkpoint::drafter::Convolution as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::attention::{Attention, Mask, Paged, Prefill};
use crate::gpu::kernels::delta_net::{PassRows, Weights};
use crate::gpu::kernels::heads::{Heads, HeadsBuffers};
use crate::gpu::kernels::linear::{Input, PrefillKernel, Shape};
use crate::gpu::kernels::norm::Norm;
use crate::gpu::kernels::plain::Plain;
use crate::gpu::kernels::project::{Project, ProjectBuffers};
use crate::gpu::kernels::qkv::{Qkv, QkvBuffers};
use crate::gpu::kernels::swiglu::Swiglu;
use crate::gpu::loader::Loader;
use crate::{Error, Result};
use layer::{Layer, Mixer, check, check_convolution, convolve};

pub use crate::gpu::kernels::PAGE;
pub use buffers::{KvCache, Scratch, ScratchSizes};
pub use vocabulary::{EmbeddingTable, FeatureProjection, LmHead, Vocabulary};

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

/// One pass through a model.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Sequences that take part.
    pub sequences: usize,
    /// Rows of each sequence.
    pub block: usize,
    /// Rows of projected features before the pass's own rows in `table`, `y` and `sumsq`. The caller has
    /// written them, and every layer only computes their keys and values. Of pairs ([`Scratch::pairs`]) only
    /// the number counts: any row of `table` may have a query.
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

    /// The rows as the recurrence takes them.
    fn of_states(&self) -> PassRows<'_> {
        let Pass { sequences, block, spans, masks, prompt, .. } = *self;
        PassRows { sequences, block, spans, masks, prompt }
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
    rope: Buffer,       // [positions][rotated dims] f32
    positions: usize,
    inputs: usize, // columns of q, k and v: the hidden size, or twice that of pairs
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
        Transformer::load_with(loader, prefix, config, convolution, config.hidden, positions)
    }

    /// As [`Transformer::load`], of a drafter whose q, k and v read [`Scratch::pairs`].
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load_pairs(loader: &mut Loader, config: &config::Stack, positions: usize) -> Result<Transformer> {
        Transformer::load_with(loader, "", config, None, 2 * config.hidden, positions)
    }

    fn load_with(
        loader: &mut Loader,
        prefix: &str,
        config: &config::Stack,
        convolution: Option<Plan>,
        inputs: usize,
        positions: usize,
    ) -> Result<Transformer> {
        check(config)?;
        convolution.map_or(Ok(()), check_convolution)?;
        let layers = (0..config.attention.len()).map(|i| {
            let prefix = format!("{prefix}layers.{i}");
            Layer::load(loader, &prefix, i, config, inputs, convolution)
        });
        Ok(Transformer {
            layers: layers.collect::<Result<_>>()?,
            final_gain: loader.gain(&format!("{prefix}norm.weight"), config.hidden, config.norm_offset)?,
            rope: loader.rope_table(&config.rope, config.rope.rotary_dims, positions)?,
            positions,
            inputs,
            config: config.clone(),
            convolution,
        })
    }

    /// Gains of the first layer's input norm and of the final norm, `[hidden]` f32 each.
    pub(crate) fn outer_gains(&self) -> [&Buffer; 2] {
        [&self.layers[0].input_gain, &self.final_gain]
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
        if s.pairs.is_none() {
            self.norm(rows).launch(device, normed, &sumsq, &s.x, None, &self.layers[0].input_gain)?;
        }
        let (qkv_input, qkv_sumsq) = s.qkv_input();
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
            let normed_rows = |weights| input(weights, &s.y, Some(&s.sumsq));
            let out_shape = match &layer.mixer {
                Mixer::Attention(attention) if c.output_gate => {
                    self.gated_heads(device, &normed_rows(&attention.qkv), i, s, cache, pass.table, rows)?;
                    self.attend(device, i, s, cache, pass)?;
                    c.shapes()[1]
                }
                Mixer::Attention(attention) => {
                    let buffers = self.qkv_buffers(i, s, cache, pass.table)?;
                    self.qkv(all, false, s, cache).launch(
                        device,
                        &input(&attention.qkv, qkv_input, qkv_sumsq),
                        &buffers,
                    )?;
                    self.attend(device, i, s, cache, pass)?;
                    c.shapes()[1]
                }
                Mixer::DeltaNet(weights) => {
                    self.delta_net(device, &normed_rows(&weights.projection), i, s, cache, pass)?
                }
            };
            let (next, next_y) =
                self.layers.get(i + 1).map_or((&self.final_gain, &y), |next| (&next.input_gain, normed));
            let out = |gain, y| ProjectBuffers { x: &s.x, y, sumsq: &sumsq, gain, features: None };
            let down = c.shapes()[3];
            project(0, out_shape, &input(&layer.o, &s.attended, None), &out(&layer.post_gain, normed))?;
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
    /// [`FeatureProjection::run`] left in `s.y` and `s.sumsq`, or for rows of `s.pairs`. `table` `[rows]`
    /// [`Row`]. `prompt`: uses the prefill kernels. `num_active` as [`Pass::num_active`].
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
        let (x, sumsq) = s.qkv_input();
        for i in 0..self.layers.len() {
            let input = Input {
                weights: &self.attention(i)?.qkv,
                x,
                sumsq,
                eps: self.config.eps,
                prefill_kernel: prompt.then(|| PrefillKernel::of(device)),
                num_active,
                workspace: &s.linear,
            };
            self.qkv(rows, true, s, cache).launch(device, &input, &self.qkv_buffers(i, s, cache, table)?)?;
        }
        Ok(())
    }

    /// Ends a pass of a model with recurrent states, which it must do before the next one: the next pass of a
    /// sequence follows its accepted rows. `accepted` `[sequences][block]` u32: the accepted rows of each
    /// sequence, of a round;
    /// `None` after a prompt chunk, whose rows are all accepted.
    ///
    /// # Errors
    /// As [`Transformer::run`].
    pub fn advance(
        &self,
        device: &dyn Device,
        cache: &KvCache,
        pass: &Pass,
        accepted: Option<&Buffer>,
    ) -> Result<()> {
        let Some(states) = &cache.states else { return Ok(()) };
        states.kernel.advance(device, &states.headers, &pass.of_states(), accepted)
    }

    /// The attention of layer `i`.
    fn attention(&self, i: usize) -> Result<&layer::Attention> {
        match &self.layers[i].mixer {
            Mixer::Attention(attention) => Ok(attention),
            Mixer::DeltaNet(_) => Err(Error::Internal(format!("layer {i} has no attention"))),
        }
    }

    /// Queries, keys, values and output gates of `rows` rows of layer `i`.
    #[allow(clippy::too_many_arguments)]
    fn gated_heads(
        &self,
        device: &dyn Device,
        input: &Input,
        i: usize,
        s: &Scratch,
        cache: &KvCache,
        table: &Buffer,
        rows: usize,
    ) -> Result<()> {
        let (c, shape, index) = (&self.config, self.config.shapes()[0], self.layers[i].index);
        let gated = s.gated.as_ref().ok_or_else(|| Error::Internal("no memory for output gates".into()))?;
        let Some([q_gain, k_gain]) = &self.attention(i)?.head_gains else {
            return Err(Error::Internal("gated attention without norms of its heads".into()));
        };
        Plain { rows, shape }.launch(device, input, &gated.projected)?;
        let heads = Heads {
            rows,
            pitch: Plain::pitch(shape),
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            rotary_dims: c.rope.rotary_dims,
            query_rows: s.rows,
            pages: cache.pages,
            sequences: cache.sequences,
            sequence_pages: cache.sequence_pages,
            positions: self.positions,
            eps: c.eps,
        };
        let buffers = HeadsBuffers {
            input: &gated.projected,
            rows: table,
            queries: &s.queries,
            gates: &gated.gates,
            keys: &cache.keys[index],
            values: &cache.values[index],
            table: &cache.table,
            gains: [q_gain, k_gain],
            rope: &self.rope,
        };
        heads.launch(device, &buffers)
    }

    /// The Gated DeltaNet of layer `i`. Returns the shape of its output projection.
    fn delta_net(
        &self,
        device: &dyn Device,
        input: &Input,
        i: usize,
        s: &Scratch,
        cache: &KvCache,
        pass: &Pass,
    ) -> Result<Shape> {
        let layer = &self.layers[i];
        let parts = (&layer.mixer, self.config.delta_net_shapes(), &s.gated, &cache.states);
        let (Mixer::DeltaNet(weights), Some([shape, out]), Some(gated), Some(states)) = parts else {
            return Err(Error::Internal(format!("layer {i} has no memory for recurrent states")));
        };
        Plain { rows: pass.rows(), shape }.launch(device, input, &gated.projected)?;
        let of_layer = Weights {
            convolution: &weights.convolution,
            a_log: &weights.a_log,
            dt_bias: &weights.dt_bias,
            norm: &weights.norm,
        };
        let (state, rows) = (&states.layers[layer.index], pass.of_states());
        let (from, to) = (&gated.projected, &s.attended);
        states.kernel.launch(device, to, from, state, &states.headers, &of_layer, &rows)?;
        Ok(out)
    }

    fn qkv(&self, rows: usize, keys_only: bool, s: &Scratch, cache: &KvCache) -> Qkv {
        let c = &self.config;
        Qkv {
            rows,
            k: self.inputs,
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
    ) -> Result<QkvBuffers<'a>> {
        let (gains, index) = (self.attention(layer)?.head_gains.as_ref(), self.layers[layer].index);
        Ok(QkvBuffers {
            rows: table,
            queries: &s.queries,
            keys: &cache.keys[index],
            values: &cache.values[index],
            table: &cache.table,
            q_gain: gains.map(|g| &g[0]),
            k_gain: gains.map(|g| &g[1]),
            rope: &self.rope,
        })
    }

    fn attend(&self, device: &dyn Device, i: usize, s: &Scratch, cache: &KvCache, pass: &Pass) -> Result<()> {
        let (c, attention) = (&self.config, self.config.attention[i]);
        let layer = cache.attention(c, attention.window);
        let index = self.layers[i].index;
        let (k, v, spans) = (&cache.keys[index], &cache.values[index], pass.spans);
        let gates = s.gated.as_ref().map(|gated| &gated.gates);
        if let Some(sequence) = pass.prompt {
            let width = cache.sequence_pages * 4;
            let table = cache.table.slice(sequence * width, width)?;
            let prefill = Prefill { layer, rows: pass.rows() };
            return prefill.launch(
                device,
                &s.attended,
                &s.queries,
                Paged { k, v, table: &table, spans, gates },
            );
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
            Paged { k, v, table: &cache.table, spans, gates },
            mask,
            &s.partials,
        )
    }
}

impl config::Stack {
    /// The shapes of the linear kernels of a layer with attention: qkv with output gates, o, gate_up, down.
    pub fn shapes(&self) -> [Shape; 4] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            Shape { n: self.query_rows() + 2 * kv, k: self.hidden },
            Shape { n: self.hidden, k: q },
            Shape { n: 2 * self.intermediate, k: self.hidden },
            Shape { n: self.hidden, k: self.intermediate },
        ]
    }
    /// The shapes of the projections of a Gated DeltaNet layer: q, k, v, z, b and a together; the output.
    pub fn delta_net_shapes(&self) -> Option<[Shape; 2]> {
        let shape = self.delta_net.as_ref()?;
        let n = shape.channels() + shape.values() + 2 * shape.value_heads;
        Some([Shape { n, k: self.hidden }, Shape { n: self.hidden, k: shape.values() }])
    }
}
