//! `cuda/model/head.cu`: the LM head with the best logit of every 128.

use super::linear::{Input, Launch, Needs, Shape, input_bytes, kernels, or_null};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static KERNELS: [Kernel; 5] = kernels("head", ["head_8", "head_16", "head_32", "head_64", "head_128"]);

/// `logit = softcap(multiplier * rstd * (in W^T))`, and per row and block of 128 the best of them.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    pub rows: usize,
    pub vocab: usize,
    /// Inputs, a multiple of 32.
    pub k: usize,
    /// 1 changes nothing.
    pub multiplier: f32,
    /// `cap * tanh(logit / cap)` after the multiplier.
    pub softcap: Option<f32>,
}

impl Head {
    pub fn shape(&self) -> Shape {
        Shape { n: self.vocab, k: self.k }
    }

    /// Bytes a launch must move: weights per pass, inputs, the best of every block; the logits where they are `kept`.
    pub fn bytes(&self, kept: bool) -> u64 {
        let logits = if kept { self.vocab * 4 } else { 0 };
        input_bytes(self.shape(), self.rows, true) + (self.rows * (self.shape().blocks() * 8 + logits)) as u64
    }

    /// `best` `[rows][ceil(vocab / 128)]` u64, `logits` `[rows][vocab]` f32 or not kept.
    ///
    /// A number of `best` is the best logit's bits as an integer of the same order (negative ones inverted, others with
    /// the top bit set, -0 as 0) in the upper half and the inverse of its id in the lower: the larger number is the
    /// larger logit, of equal ones the lower id. All ones: one of the 128 is NaN or +inf.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a shape is not as stated; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        input: &Input,
        best: &Buffer,
        logits: Option<&Buffer>,
    ) -> Result<()> {
        let Head { rows, vocab, multiplier, softcap, .. } = *self;
        let needs = Needs("head");
        needs.buffer("best", best, rows * self.shape().blocks() * 8)?;
        needs.optional("logits", logits, rows * vocab * 4)?;
        let args = [or_null(logits), best.into(), multiplier.into(), softcap.unwrap_or(0.0).into()];
        let launch = Launch {
            kernels: &KERNELS,
            prefill: None,
            shape: self.shape(),
            rows,
            input,
            gather: None,
            first_block: 0,
        };
        launch.run(device, &args)
    }
}
