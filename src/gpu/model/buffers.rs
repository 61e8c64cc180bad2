//! Memory of a model's passes: the KV cache, the activations and the workspaces.

use super::PAGE;
use super::layer::convolve;
use crate::Result;
use crate::checkpoint::config;
use crate::checkpoint::drafter::Convolution as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::attention::{self, Attention};
use crate::gpu::kernels::linear::{self, Shape};

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
    /// The input of q, k and v of a drafter's layer that runs over pairs, `[injected + rows][2 * hidden]` bf16:
    /// see [`crate::gpu::chain`]. `None`: it is `y`.
    pub pairs: Option<Buffer>,
    pub(super) queries: Buffer,  // [rows][heads][head_dim] bf16
    pub(super) attended: Buffer, // as queries
    pub(super) inner: Buffer,    // [rows][intermediate] bf16
    pub(super) convolution: Option<ConvolutionBuffers>,
    pub(super) linear: linear::Workspace,
    pub(super) partials: Buffer, // of attention
    pub(super) rows: usize,
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
    /// Injected rows of a round, before the pass's own ([`Pass::injected`]).
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
        let [qkv, others @ ..] = c.shapes();
        let qkv = Shape { k: qkv.k * if sizes.pairs { 2 } else { 1 }, ..qkv };
        let mut launches: Vec<_> =
            [qkv].iter().chain(&others).map(|&shape| (shape, round + injected)).collect();
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
            pairs: sizes
                .pairs
                .then(|| get(all * c.hidden * 4, "pairs of tokens and features"))
                .transpose()?,
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
