//! `cuda/model/head.cu`: the LM head, and the best logit of every 128.

use super::check::{Check, or_null};
use super::linear::{Input, Kernels, Launch, Shape, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Buffer, Device};

static KERNELS: Kernels = kernels("head", ["head_8", "head_16", "head_32", "head_64", "head_128"], None);

/// `logit = softcap(multiplier * rstd * (in W^T))`, and per row and block of 128 the best of them.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// Rows, at least 1.
    pub rows: usize,
    /// Outputs: tokens.
    pub vocab: usize,
    /// Inputs: the hidden size, a multiple of 32.
    pub k: usize,
    /// 1 leaves logits unchanged.
    pub multiplier: f32,
    /// `cap * tanh(logit / cap)` after the multiplier.
    pub softcap: Option<f32>,
}

impl Head {
    /// Shape of the weights.
    pub fn shape(&self) -> Shape {
        Shape { n: self.vocab, k: self.k }
    }

    /// Bytes a launch must move: weights per pass, inputs, the best of every block, and the logits if they
    /// are `kept`.
    pub fn bytes(&self, kept: bool) -> u64 {
        let logits = if kept { self.vocab * 4 } else { 0 };
        input_bytes(self.shape(), self.rows, true) + (self.rows * (self.shape().blocks() * 8 + logits)) as u64
    }

    /// Writes `best` `[rows][ceil(vocab / 128)]` u64 and, if there is a buffer, `logits` `[rows][vocab]` f32.
    ///
    /// An entry of `best` has the bits of the block's best logit in its upper half, mapped to an integer of
    /// the same order (negative ones inverted, others with the top bit set, -0 as 0), and the inverted id in
    /// its lower half: the larger entry is the larger logit and, for equal logits, the lower id. All ones:
    /// one of the 128 is NaN or +inf.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        input: &Input,
        best: &Buffer,
        logits: Option<&Buffer>,
    ) -> Result<()> {
        let Head { rows, vocab, multiplier, softcap, .. } = *self;
        let check = Check("head");
        check.aligned("best", best, rows * self.shape().blocks() * 8)?;
        check.optional("logits", logits, rows * vocab * 4)?;
        let args = [or_null(logits), best.into(), multiplier.into(), softcap.unwrap_or(0.0).into()];
        Launch::new(&KERNELS, self.shape(), rows, input).run(device, &args)
    }
}
