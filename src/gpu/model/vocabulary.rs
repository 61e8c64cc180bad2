//! What surrounds the layers: the embedding, the LM head, and the drafter's projection of features.

use super::{Scratch, Transformer};
use crate::Result;
use crate::checkpoint::config::TargetConfig;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::RowStep;
use crate::gpu::kernels::embedding::Embedding;
use crate::gpu::kernels::head::{Head, TargetIds};
use crate::gpu::kernels::inject::Inject;
use crate::gpu::kernels::linear::{Input, PrefillKernel, Shape};
use crate::gpu::loader::{Loader, PackedRows};

/// An embedding table.
pub struct EmbeddingTable {
    pub(crate) table: Buffer, // [vocab][hidden] bf16, or the packed weights of a head
    pub(crate) packed: bool,
    pub(crate) vocab: usize,
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
    /// logits of other ids as they are. With `to`, row `m` of the results is row `to.first + m * to.step` of both.
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
        to: Option<RowStep>,
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
        match to {
            None => head.launch(device, &input, best, logits, self.target_ids()),
            Some(to) => head.launch_to(device, &input, best, logits, self.target_ids(), to),
        }
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
        let gain = loader.vector("hidden_norm.weight", hidden)?;
        FeatureProjection::new(loader, hidden, taps, gain)
    }

    /// As [`FeatureProjection::load`], without a norm: the results are the projected features themselves.
    ///
    /// # Errors
    /// As [`Transformer::load`].
    pub fn load_unnormed(loader: &mut Loader, hidden: usize, taps: usize) -> Result<FeatureProjection> {
        let gain = loader.numbers("a gain of ones", &vec![1.0f32.to_bits(); hidden])?;
        FeatureProjection::new(loader, hidden, taps, gain)
    }

    fn new(loader: &mut Loader, hidden: usize, taps: usize, gain: Buffer) -> Result<FeatureProjection> {
        let shape = Shape { n: hidden, k: taps * hidden };
        let fc = ("fc.weight".to_string(), hidden, PackedRows::From(0));
        Ok(FeatureProjection { weights: loader.packed(shape, &[fc])?, gain, shape })
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
