//! Memory of a model's passes: the KV cache, the activations and the workspaces.

use super::PAGE;
use super::layer::{convolve, delta_net};
use crate::Result;
use crate::checkpoint::config;
use crate::checkpoint::drafter::Convolution as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::attention::{self, Attention};
use crate::gpu::kernels::delta_net::{DeltaNet, LayerState, StateHeader};
use crate::gpu::kernels::linear::{self, Shape};
use crate::gpu::kernels::plain::Plain;

/// The keys and values of a model, in pages of [`PAGE`] positions, and the recurrent states of its Gated
/// DeltaNet layers. A page belongs to one sequence.
pub struct KvCache {
    pub(crate) keys: Vec<Buffer>, // per layer with attention [pages][kv_heads][PAGE][head_dim] bf16
    pub(crate) values: Vec<Buffer>, // as keys
    pub(crate) states: Option<States>,
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
    /// Allocates `pages` pages for `sequences` sequences of at most `sequence_pages` pages each, and the
    /// states of sequences whose rounds have at most `block` rows. The page table is left undefined.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the device has too little memory.
    pub fn new(
        device: &dyn Device,
        c: &config::Stack,
        pages: usize,
        sequences: usize,
        sequence_pages: usize,
        block: usize,
    ) -> Result<KvCache> {
        let bytes = pages * c.kv_heads * PAGE * c.head_dim * 2;
        let with_attention = c.attention.len() - c.delta_net_layers();
        let per_layer =
            |what| (0..with_attention).map(|_| device.allocate(bytes, what)).collect::<Result<Vec<Buffer>>>();
        let states = c.delta_net.as_ref().map(|shape| {
            let kernel = delta_net(c, shape, sequences, block);
            let layers = (0..c.delta_net_layers()).map(|_| kernel.allocate(device));
            let states = States {
                kernel,
                layers: layers.collect::<Result<_>>()?,
                headers: device.allocate(sequences * StateHeader::BYTES, "recurrent states")?,
            };
            device.fill(&states.headers, 0)?;
            Ok::<_, crate::Error>(states)
        });
        Ok(KvCache {
            keys: per_layer("keys")?,
            values: per_layer("values")?,
            states: states.transpose()?,
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

    /// How the attention kernels see a layer of a model of config `c` and its keys and values.
    pub(super) fn attention(&self, c: &config::Stack, window: Option<usize>) -> attention::Layer {
        attention::Layer {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            pages: self.pages,
            pages_per_sequence: self.sequence_pages,
            window: window.unwrap_or(0),
            scale: 1.0 / (c.head_dim as f32).sqrt(),
        }
    }
}

/// The recurrent states of a model.
pub struct States {
    /// How its layers are launched.
    pub(crate) kernel: DeltaNet,
    pub(crate) layers: Vec<LayerState>, // per Gated DeltaNet layer
    pub(crate) headers: Buffer,         // [sequences] StateHeader
}

impl States {
    /// The header of a sequence, after all enqueued passes.
    ///
    /// # Errors
    /// The device's error.
    pub(crate) fn header(&self, device: &dyn Device, sequence: usize) -> Result<StateHeader> {
        let mut bytes = [0; StateHeader::BYTES];
        device.download(&self.headers.slice(sequence * bytes.len(), bytes.len())?, &mut bytes)?;
        Ok(StateHeader::from_bytes(&bytes))
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
    /// The input of q, k and v of a drafter's layer that runs over pairs, `[injected + rows][2 * hidden]`
    /// bf16: see [`crate::gpu::chain`]. `None`: it is `y`.
    pub pairs: Option<Buffer>,
    pub(super) queries: Buffer,  // [rows][heads][head_dim] bf16
    pub(super) attended: Buffer, // [rows][widest output of a mixer] bf16
    pub(super) gated: Option<GatedBuffers>,
    pub(super) inner: Buffer, // [rows][intermediate] bf16
    pub(super) convolution: Option<ConvolutionBuffers>,
    pub(super) linear: linear::Workspace,
    pub(super) partials: Buffer, // of attention
    pub(super) rows: usize,
}

/// Activations of layers whose projections other kernels process.
pub(super) struct GatedBuffers {
    pub(super) projected: Buffer, // [rows][Plain::pitch of the layer's projection] f32
    pub(super) gates: Buffer,     // as queries
}

/// Activations of layers with convolutions, for the rows of a round.
pub(super) struct ConvolutionBuffers {
    pub(super) normed: Buffer, // [rows][hidden] bf16: a norm's output before the convolution
    pub(super) dynamic: Buffer, // [rows][taps][hidden / group] f32: coefficients of the convolution after a sublayer
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
    /// Injected rows of a round, before the pass's own ([`super::Pass::injected`]).
    pub injected: usize,
    /// Shape of the LM head, if it runs after the pass.
    pub head: Option<Shape>,
    /// Inputs of the feature projection (taps x hidden), if it runs before the pass.
    pub features: Option<usize>,
    /// The convolutions of the layers, if they have any.
    pub convolution: Option<Plan>,
    /// Whether q, k and v read pairs ([`Scratch::pairs`]).
    pub pairs: bool,
}

impl Scratch {
    /// Allocates the memory for passes through a model of config `c` and its `cache`.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the device has too little memory.
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
        let [qkv, others @ ..] = c.shapes();
        let qkv = Shape { k: qkv.k * if sizes.pairs { 2 } else { 1 }, ..qkv };
        let of_layers = [qkv].into_iter().chain(others).chain(c.delta_net_shapes().into_iter().flatten());
        let mut launches: Vec<_> = of_layers.map(|shape| (shape, round + injected)).collect();
        launches.extend(sizes.head.map(|head| (head, round)));
        launches.extend(sizes.features.map(|k| (Shape { n: c.hidden, k }, injected)));
        let convolve = sizes.convolution.map(|plan| convolve(plan, c.hidden, sequences, block));
        launches.extend(convolve.map(|convolve| (convolve.shape(), round)));
        let layer = cache.attention(c, None);
        let attention = Attention { layer, sequences, block, capacity: cache.capacity() };
        let get = |bytes: usize, what| device.allocate(bytes, what);
        // Attention writes only the rows of a sequence's span, and the output projection reads every row of
        // the pass. Its results for padding are not used, but it must not read memory that was never written.
        let outputs = c.delta_net_shapes().map_or(0, |[_, out]| out.k).max(c.heads * c.head_dim);
        let attended = get(rows * outputs * 2, "attention's output")?;
        device.fill(&attended, 0)?;
        let gated = c.output_gate.then(|| {
            let pitches = c.shapes().into_iter().take(1).chain(c.delta_net_shapes().map(|[first, _]| first));
            let pitch = pitches.map(Plain::pitch).max().unwrap_or(0);
            let gates = get(rows * c.heads * c.head_dim * 2, "output gates")?;
            Ok::<_, crate::Error>(GatedBuffers { projected: get(rows * pitch * 4, "projections")?, gates })
        });
        Ok(Scratch {
            x: get(rows * c.hidden * 4, "the residual stream")?,
            y: get(all * c.hidden * 2, "activations")?,
            sumsq: get(all * parts * 4, "sums of squares")?,
            pairs: sizes
                .pairs
                .then(|| get(all * c.hidden * 4, "pairs of tokens and features"))
                .transpose()?,
            queries: get(rows * c.heads * c.head_dim * 2, "queries")?,
            attended,
            gated: gated.transpose()?,
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

    /// The input of q, k and v, and the sums of squares that it is scaled by. Pairs are not scaled.
    pub(super) fn qkv_input(&self) -> (&Buffer, Option<&Buffer>) {
        self.pairs.as_ref().map_or((&self.y, Some(&self.sumsq)), |pairs| (pairs, None))
    }

    /// `y` and `sumsq` from row `first` on.
    pub(crate) fn slices_from(&self, hidden: usize, first: usize) -> Result<(Buffer, Buffer)> {
        let (y, sums) = (first * hidden * 2, first * hidden.div_ceil(128) * 4);
        Ok((self.y.slice(y, self.y.bytes() - y)?, self.sumsq.slice(sums, self.sumsq.bytes() - sums)?))
    }
}
