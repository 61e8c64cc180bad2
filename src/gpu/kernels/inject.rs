//! `cuda/model/inject.cu`: the target's features, gathered and projected to the drafter's hidden size.

use super::at_least;
use super::linear::{Gather, Input, Launch, Needs, Shape, input_bytes, kernels, prefill};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static KERNELS: [Kernel; 5] =
    kernels("inject", ["inject_8", "inject_16", "inject_32", "inject_64", "inject_128"]);
static PREFILL: [Kernel; 2] = prefill(["prefill_inject", "prefill_inject_wgmma"]);

/// `v = features[gather[m]] W^T`, of which `y = bf16(gain * v)` and the sums of squares are kept.
#[derive(Debug, Clone, Copy)]
pub struct Inject {
    pub rows: usize,
    /// Outputs: the drafter's hidden size, a multiple of 64.
    pub n: usize,
    /// Inputs: tapped layers times the target's hidden size, a multiple of 32.
    pub k: usize,
    /// Rows of features there are.
    pub feature_rows: usize,
}

impl Inject {
    pub fn shape(&self) -> Shape {
        Shape { n: self.n, k: self.k }
    }

    /// Bytes a launch must move: weights per pass, features, `y`, sums of squares and row numbers.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape(), self.rows, false)
            + (self.rows * (self.n * 2 + self.shape().parts() * 4 + 4)) as u64
    }

    /// `input.x` are the features `[feature_rows][k]` bf16, `gather` `[rows]` u32 the feature row of each row (one that
    /// does not exist gives zeros), `y` `[rows][n]` bf16, `sumsq` `[rows][ceil(n / 128)]` f32, `gain` `[n]` f32.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a shape is not as stated; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        input: &Input,
        gather: &Buffer,
        y: &Buffer,
        sumsq: &Buffer,
        gain: &Buffer,
    ) -> Result<()> {
        let Inject { rows, n, feature_rows, .. } = *self;
        let needs = Needs("inject");
        needs.that(n.is_multiple_of(64), "a multiple of 64", &format!("{n} outputs"))?;
        needs.that(
            input.sumsq.is_none(),
            "none: its results are not scaled",
            "sums of squares of the input",
        )?;
        let there = (1..1 << 31).contains(&feature_rows);
        needs.that(there, "1 to 2^31", &format!("{feature_rows} rows of features"))?;
        needs.buffer("y", y, rows * n * 2)?;
        at_least("inject", "sumsq", sumsq, rows * self.shape().parts() * 4)?;
        needs.buffer("gain", gain, n * 4)?;
        let gather = Some(Gather { rows: gather, of: feature_rows });
        let launch = Launch {
            kernels: &KERNELS,
            prefill: Some(&PREFILL),
            shape: self.shape(),
            rows,
            input,
            gather,
            first_block: 0,
        };
        launch.run(device, &[y.into(), sumsq.into(), gain.into()])
    }
}
