//! `cuda/model/head.cu`: the LM head, and the best logit of each block of 128 ids.

use super::RowStep;
use super::check::{Check, or_null};
use super::linear::{Input, Kernels, Launch, Shape, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device};

static KERNELS: Kernels = kernels("head", ["head_8", "head_16", "head_32", "head_64", "head_128"], None);

/// `logit = softcap(multiplier * rstd * (in W^T))`, or -inf for outputs from `ids` on, and for each row the best
/// logit of each block of 128 outputs.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// Rows, at least 1.
    pub rows: usize,
    /// Outputs: tokens, or those of a reduced vocabulary.
    pub vocab: usize,
    /// Inputs: the hidden size, a multiple of 32.
    pub k: usize,
    /// Factor of the logits; 1 leaves them unchanged.
    pub multiplier: f32,
    /// The cap in `cap * tanh(logit / cap)`, applied after the multiplier; `None` for no softcap.
    pub softcap: Option<f32>,
    /// Outputs from this one on have the logit -inf; `vocab` if there are none.
    pub ids: usize,
}

/// A reduced vocabulary: the ids of a head's outputs.
#[derive(Debug, Clone, Copy)]
pub struct TargetIds<'a> {
    /// `[Head::vocab]` u32, ascending.
    pub ids: &'a Buffer,
    /// Number of ids: columns of the logits.
    pub vocab: usize,
}

impl Head {
    /// Shape of the weights.
    pub fn shape(&self) -> Shape {
        Shape { n: self.vocab, k: self.k }
    }

    /// Bytes a launch must move: weights per pass, inputs, `best`, and the logits if they are `kept`.
    pub fn bytes(&self, kept: bool) -> u64 {
        let logits = if kept { self.vocab * 4 } else { 0 };
        input_bytes(self.shape(), self.rows, true) + (self.rows * (self.shape().blocks() * 8 + logits)) as u64
    }

    /// Writes `best` `[rows][ceil(vocab / 128)]` u64 and, if there is a buffer, `logits` `[rows][vocab]` f32.
    /// With `target_ids`, `best` holds these ids, `logits` has a column for every id, and only the columns of
    /// these ids are written.
    ///
    /// The upper half of an entry of `best` has the bits of the block's best logit, mapped to an integer of
    /// the same order (negative logits inverted, others with the top bit set, -0 as 0). The lower half has
    /// the inverted id. So a larger entry has a larger logit or, for equal logits, a lower id. All ones: a
    /// logit of the block is NaN or +inf.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        input: &Input,
        best: &Buffer,
        logits: Option<&Buffer>,
        target_ids: Option<TargetIds<'_>>,
    ) -> Result<()> {
        self.launch_rows(device, input, best, logits, target_ids, None, false)
    }

    /// As [`Head::launch`], but the result of row `m` is row `to.first + m * to.step` of `best` and `logits`.
    ///
    /// # Errors
    /// As [`Head::launch`].
    pub fn launch_to(
        &self,
        device: &dyn Device,
        input: &Input,
        best: &Buffer,
        logits: Option<&Buffer>,
        target_ids: Option<TargetIds<'_>>,
        to: RowStep,
    ) -> Result<()> {
        self.launch_rows(device, input, best, logits, target_ids, Some(to), false)
    }

    /// As [`Head::launch_to`], but adds the result to that row of `logits`, which then holds the sum.
    ///
    /// # Errors
    /// As [`Head::launch`].
    pub fn add(
        &self,
        device: &dyn Device,
        input: &Input,
        best: &Buffer,
        logits: &Buffer,
        target_ids: Option<TargetIds<'_>>,
        to: RowStep,
    ) -> Result<()> {
        self.launch_rows(device, input, best, Some(logits), target_ids, Some(to), true)
    }

    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    fn launch_rows(
        &self,
        device: &dyn Device,
        input: &Input,
        best: &Buffer,
        logits: Option<&Buffer>,
        target_ids: Option<TargetIds<'_>>,
        to: Option<RowStep>,
        add: bool,
    ) -> Result<()> {
        let Head { rows, vocab, multiplier, softcap, ids, .. } = *self;
        let columns = target_ids.map_or(vocab, |reduced| reduced.vocab);
        let check = Check("head");
        let RowStep { first, step } = to.unwrap_or(RowStep { first: 0, step: 0 });
        let end = if step > 0 { first + rows.saturating_sub(1) * step + 1 } else { rows };
        check.aligned("best", best, end * self.shape().blocks() * 8)?;
        check.optional("logits", logits, end * columns * 4)?;
        let target_ids = target_ids.map(|reduced| reduced.ids);
        check.optional("target_ids", target_ids, vocab * 4)?;
        let (cap, ids, columns) = (softcap.unwrap_or(0.0), ids as u32, columns as u32);
        let (target_ids, args) = (or_null(target_ids), [or_null(logits), best.into(), multiplier.into()]);
        let [first, step, add] = [first, step, usize::from(add)].map(|n| Arg::U32(n as u32));
        let last = [target_ids, columns.into(), first, step, add];
        let args = [&args[..], &[cap.into(), ids.into()], &last].concat();
        Launch::new(&KERNELS, self.shape(), rows, input).run(device, &args)
    }
}
