//! `cuda/model/plain.cu`: a linear layer whose results [`super::heads`] or [`super::delta_net`] processes.

use super::check::{Check, u32s};
use super::linear::{Input, Kernels, Launch, Shape, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Buffer, Device};

static KERNELS: Kernels = kernels(
    "plain",
    ["plain_8", "plain_16", "plain_32", "plain_64", "plain_128"],
    Some(["prefill_plain", "prefill_plain_wgmma"]),
);

/// `out = rstd * (in W^T)` in f32.
#[derive(Debug, Clone, Copy)]
pub struct Plain {
    /// Rows, at least 1.
    pub rows: usize,
    /// Shape of the weights.
    pub shape: Shape,
}

impl Plain {
    /// Columns of `out`: the outputs, rounded up to a multiple of 4.
    pub fn pitch(shape: Shape) -> usize {
        shape.n.next_multiple_of(4)
    }

    /// Bytes a launch must move: weights per pass, inputs, results.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape, self.rows, true) + (self.rows * self.shape.n * 4) as u64
    }

    /// Writes `out` `[rows][pitch]` f32.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, input: &Input, out: &Buffer) -> Result<()> {
        let pitch = Plain::pitch(self.shape);
        Check("plain").aligned("out", out, self.rows * pitch * 4)?;
        let [pitch] = u32s([pitch]);
        Launch::new(&KERNELS, self.shape, self.rows, input).run(device, &[out.into(), pitch])
    }
}
