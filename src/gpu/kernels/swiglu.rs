//! `cuda/model/swiglu.cu`: gate and up projections of the MLP with the activation between them.

use super::linear::{Input, Launch, Needs, Shape, input_bytes, kernels, prefill};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static KERNELS: [Kernel; 5] =
    kernels("swiglu", ["swiglu_8", "swiglu_16", "swiglu_32", "swiglu_64", "swiglu_128"]);
static PREFILL: [Kernel; 2] = prefill(["prefill_swiglu", "prefill_swiglu_wgmma"]);

/// `out = bf16(silu(gate) * up)`, gate and up the two halves of `rstd * (in W^T)`.
#[derive(Debug, Clone, Copy)]
pub struct Swiglu {
    pub rows: usize,
    /// Neurons, a multiple of 32.
    pub inner: usize,
    /// Inputs, a multiple of 32.
    pub k: usize,
}

impl Swiglu {
    pub fn shape(&self) -> Shape {
        Shape { n: self.inner * 2, k: self.k }
    }

    /// Packed row of neuron `i`'s gate and of its up: tiles of 8 and 8.
    pub fn places(i: usize) -> (usize, usize) {
        (i / 8 * 16 + i % 8, i / 8 * 16 + 8 + i % 8)
    }

    /// Bytes a launch must move: weights per pass, inputs, results.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape(), self.rows, true) + (self.rows * self.inner * 2) as u64
    }

    /// `out` `[rows][inner]` bf16; weights packed as [`Swiglu::places`] has it.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a shape is not as stated; else what the device says.
    pub fn launch(&self, device: &dyn Device, input: &Input, out: &Buffer) -> Result<()> {
        let Swiglu { rows, inner, .. } = *self;
        let needs = Needs("swiglu");
        needs.that(inner.is_multiple_of(32), "a multiple of 32", &format!("{inner} neurons"))?;
        needs.buffer("out", out, rows * inner * 2)?;
        let launch = Launch {
            kernels: &KERNELS,
            prefill: Some(&PREFILL),
            shape: self.shape(),
            rows,
            input,
            gather: None,
            first_block: 0,
        };
        launch.run(device, &[out.into()])
    }
}
