//! `cuda/model/inject.cu`: gathers the target's features and projects them to the drafter's hidden size.

use super::check::{Check, args};
use super::linear::{Gather, Input, Kernels, Launch, Shape, check_unscaled, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Buffer, Device};

static KERNELS: Kernels = kernels(
    "inject",
    ["inject_8", "inject_16", "inject_32", "inject_64", "inject_128"],
    Some(["prefill_inject", "prefill_inject_wgmma"]),
);

/// `v = features[gather[m]] W^T`. The kernel writes `y = bf16(gain * v)` and the sums of squares of `v`.
#[derive(Debug, Clone, Copy)]
pub struct Inject {
    /// Rows, at least 1.
    pub rows: usize,
    /// Outputs: the drafter's hidden size, a multiple of 32.
    pub n: usize,
    /// Inputs: tapped layers times the target's hidden size, a multiple of 32.
    pub k: usize,
    /// Rows of the feature buffer, 1 to 2^31 - 1.
    pub feature_rows: usize,
}

impl Inject {
    /// Shape of the weights.
    pub fn shape(&self) -> Shape {
        Shape { n: self.n, k: self.k }
    }

    /// Bytes a launch must move: weights per pass, features, `y`, sums of squares and row numbers.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape(), self.rows, false)
            + (self.rows * (self.n * 2 + self.shape().parts() * 4 + 4)) as u64
    }

    /// `input.x`: the features `[feature_rows][k]` bf16. `gather` `[rows]` u32: the feature row of each row;
    /// an index out of range gives zeros. Writes `y` `[rows][n]` bf16 and `sumsq` `[rows][ceil(n / 128)]`
    /// f32. `gain` `[n]` f32.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        input: &Input,
        gather: &Buffer,
        y: &Buffer,
        sumsq: &Buffer,
        gain: &Buffer,
    ) -> Result<()> {
        let Inject { rows, feature_rows, .. } = *self;
        let check = Check("inject");
        let limits = 1..1 << 31;
        check.that(
            limits.contains(&feature_rows),
            format_args!("{feature_rows} rows of features"),
            "1 to 2^31 - 1",
        )?;
        check_unscaled(&check, self.shape(), rows, input, [y, sumsq, gain])?;
        let gather = Some(Gather { rows: gather, of: feature_rows });
        let launch = Launch { gather, ..Launch::new(&KERNELS, self.shape(), rows, input) };
        launch.run(device, &args([y, sumsq, gain], []))
    }
}
