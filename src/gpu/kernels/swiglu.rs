//! `cuda/model/swiglu.cu`: the gate and up projections of the MLP, and the activation.

use super::check::Check;
use super::linear::{Input, Kernels, Launch, Shape, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Buffer, Device};

static KERNELS: Kernels = kernels(
    "swiglu",
    ["swiglu_8", "swiglu_16", "swiglu_32", "swiglu_64", "swiglu_128"],
    Some(["prefill_swiglu", "prefill_swiglu_wgmma"]),
);

/// `out = bf16(silu(gate) * up)`; gate and up are the two halves of `rstd * (in W^T)`.
#[derive(Debug, Clone, Copy)]
pub struct Swiglu {
    /// Rows, at least 1.
    pub rows: usize,
    /// Outputs: the intermediate size, a multiple of 32.
    pub inner: usize,
    /// Inputs: the hidden size, a multiple of 32.
    pub k: usize,
}

impl Swiglu {
    /// Shape of the weights, gate and up together.
    pub fn shape(&self) -> Shape {
        Shape { n: self.inner * 2, k: self.k }
    }

    /// Packed rows of the weights for gate `i` and up `i`. A tile of 16 rows has 8 gate rows, then the 8
    /// matching up rows.
    pub fn gate_up_rows(i: usize) -> (usize, usize) {
        (i / 8 * 16 + i % 8, i / 8 * 16 + 8 + i % 8)
    }

    /// Bytes a launch must move: weights per pass, inputs, results.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape(), self.rows, true) + (self.rows * self.inner * 2) as u64
    }

    /// Writes `out` `[rows][inner]` bf16. The weights are packed in the order of [`Swiglu::gate_up_rows`].
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, input: &Input, out: &Buffer) -> Result<()> {
        let Swiglu { rows, inner, .. } = *self;
        let check = Check("swiglu");
        check.that(inner.is_multiple_of(32), format_args!("{inner} neurons"), "a multiple of 32")?;
        check.aligned("out", out, rows * inner * 2)?;
        Launch::new(&KERNELS, self.shape(), rows, input).run(device, &[out.into()])
    }
}
