//! The chain of an EAGLE-3 drafter on a device: the launches that make the inputs of its layer, pairs of the feature
//! of a position and the token after it. [`crate::gpu::model`] runs the layer.

use crate::checkpoint::drafter::DrafterConfig;
use crate::checkpoint::eagle3::Chain as Plan;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::pairs::{Drafted, NormalizeTaps, PairOutput, Pairs};
use crate::gpu::loader::Loader;
use crate::gpu::model::{EmbeddingTable, Row, Scratch, Transformer};
use crate::{Error, Result};

/// The weights of a chain besides its layer, `fc` and its vocabulary.
pub struct Chain {
    plan: Plan,
    taps: usize,
    embedding_scale: f32,
    feature_gain: Buffer,      // [hidden] f32
    all_gain: Option<Buffer>,  // [taps * hidden] f32: of the norm over all taps of a position
    tap_gains: Option<Buffer>, // [taps][hidden] f32: of the norms over each
}

/// The tables of a chain's passes.
pub struct ChainBuffers {
    /// `[sequences][block]` [`Row`] of the pairs of the pending features, or `[sequences]` of those of a step.
    pub table: Buffer,
    /// `[sequences]` (context, rows) u32 of the pairs that predict drafts.
    pub spans: Buffer,
}

/// The drafter's other parts, which the launches of a chain read and write.
#[derive(Clone, Copy)]
pub struct ChainModel<'a> {
    /// The layer.
    pub layers: &'a Transformer,
    /// Its activations.
    pub scratch: &'a Scratch,
    /// The embedding that the drafter uses.
    pub embedding: &'a EmbeddingTable,
}

impl Chain {
    /// Allocates the weights and lists them in `loader`.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn load(loader: &mut Loader, config: &DrafterConfig, plan: Plan) -> Result<Chain> {
        let (hidden, taps) = (config.stack.hidden, config.taps.len());
        let each: Vec<String> = (0..taps).map(|tap| format!("fc_norm.{tap}.weight")).collect();
        Ok(Chain {
            plan,
            taps,
            embedding_scale: config.embedding_scale,
            feature_gain: loader.vector("layers.0.hidden_norm.weight", hidden)?,
            all_gain: match plan.norm_before_fc {
                true => Some(loader.vector("input_norm.weight", taps * hidden)?),
                false => None,
            },
            tap_gains: match plan.norm_taps {
                true => Some(loader.vectors(&each, hidden)?),
                false => None,
            },
        })
    }

    /// Allocates the tables for rounds of up to `sequences` sequences with blocks of `block` rows.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn buffers(&self, device: &dyn Device, sequences: usize, block: usize) -> Result<ChainBuffers> {
        let get = |bytes: usize| device.allocate(bytes.max(16), "a chain's tables");
        Ok(ChainBuffers { table: get(sequences * block * Row::BYTES)?, spans: get(sequences * 8)? })
    }

    fn pairs<'a>(&'a self, of: &ChainModel<'a>) -> Pairs<'a> {
        let (stack, embedding) = (&of.layers.config, of.embedding);
        Pairs {
            hidden: stack.hidden,
            vocab: embedding.vocab,
            packed: embedding.packed,
            norm_before_residual: self.plan.norm_before_residual,
            scale: self.embedding_scale,
            eps: stack.eps,
            embeddings: &embedding.table,
            token_gain: of.layers.outer_gains()[0],
            feature_gain: &self.feature_gain,
        }
    }

    /// The norms of the rows `gather` `[rows]` of `features` before `fc`, in place, if there are any. A row must not
    /// be normed twice.
    ///
    /// # Errors
    /// The device's error.
    pub fn normalize(
        &self,
        device: &dyn Device,
        of: &ChainModel<'_>,
        rows: usize,
        features: &Buffer,
        gather: &Buffer,
    ) -> Result<()> {
        let (all, each) = (self.all_gain.as_ref(), self.tap_gains.as_ref());
        if all.is_none() && each.is_none() {
            return Ok(());
        }
        let stack = &of.layers.config;
        let norms = NormalizeTaps { taps: self.taps, hidden: stack.hidden, all, each, eps: stack.eps };
        norms.launch(device, rows, features, gather)
    }

    /// Writes the pairs of `rows` positions of a prompt, whose projected features are in the scratch's `y`. `tokens`
    /// `[rows + 1]` u32.
    ///
    /// # Errors
    /// The device's error.
    pub fn prompt(
        &self,
        device: &dyn Device,
        of: &ChainModel<'_>,
        rows: usize,
        tokens: &Buffer,
    ) -> Result<()> {
        self.pairs(of).prompt(device, rows, memory(of.scratch)?, &of.scratch.y, tokens)
    }

    /// Writes the pairs of the pending features of `sequences` sequences, whose projected features are in the
    /// scratch's `y`, with their tables and the residual stream. Arguments as for [`Pairs::extend`].
    ///
    /// # Errors
    /// The device's error.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn extend(
        &self,
        device: &dyn Device,
        of: &ChainModel<'_>,
        [sequences, block]: [usize; 2],
        b: &ChainBuffers,
        tokens: &Buffer,
        gather: &Buffer,
        rows: &Buffer,
        states: &Buffer,
    ) -> Result<()> {
        let out = out(of.scratch, b)?;
        let features = &of.scratch.y;
        self.pairs(of).extend(device, sequences, block, out, features, tokens, gather, rows, states)
    }

    /// Writes the pairs that predict the drafts of `depth`, at least 2, with their tables and the residual stream.
    /// `rows` `[sequences][block]` [`Row`] of the drafts.
    ///
    /// # Errors
    /// The device's error.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn step(
        &self,
        device: &dyn Device,
        of: &ChainModel<'_>,
        [sequences, block]: [usize; 2],
        depth: usize,
        b: &ChainBuffers,
        drafted: Drafted<'_>,
        rows: &Buffer,
    ) -> Result<()> {
        let out_gain = self.plan.norm_output.then_some(of.layers.outer_gains()[1]);
        let out = out(of.scratch, b)?;
        self.pairs(of).step(device, sequences, block, depth, out, out_gain, drafted, rows)
    }
}

fn memory(s: &Scratch) -> Result<&Buffer> {
    s.pairs.as_ref().ok_or_else(|| Error::Internal("no memory for pairs".into()))
}

fn out<'a>(s: &'a Scratch, b: &'a ChainBuffers) -> Result<PairOutput<'a>> {
    Ok(PairOutput { pairs: memory(s)?, table: &b.table, spans: &b.spans, x: &s.x })
}
