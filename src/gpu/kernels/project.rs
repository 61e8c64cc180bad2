//! `cuda/model/project.cu`: output projections of attention and MLP, into the residual stream.

use super::at_least;
use super::linear::{Input, Launch, Needs, Shape, input_bytes, kernels, or_null, prefill};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static KERNELS: [Kernel; 5] =
    kernels("project", ["project_8", "project_16", "project_32", "project_64", "project_128"]);
static PREFILL: [Kernel; 2] = prefill(["prefill_project", "prefill_project_wgmma"]);

/// `x += in W^T`, then `y = bf16(gain * x)` and sums of squares of `x` for the next norm.
#[derive(Debug, Clone, Copy)]
pub struct Project {
    pub rows: usize,
    /// Outputs: the hidden size, a multiple of 64.
    pub n: usize,
    /// Inputs, a multiple of 32.
    pub k: usize,
}

/// What [`Project`] writes.
pub struct Projected<'a> {
    /// The residual stream, `[rows][n]` f32, updated in place.
    pub x: &'a Buffer,
    /// `[rows][n]` bf16.
    pub y: &'a Buffer,
    /// `[rows][ceil(n / 128)]` f32: sums of `x^2` over 128 columns each.
    pub sumsq: &'a Buffer,
    /// Weight of the next norm, `[n]` f32.
    pub gain: &'a Buffer,
    /// `[rows][pitch]` bf16, of which a row's first `n` get `bf16(x)`, and `pitch`, a multiple of 4.
    pub features: Option<(&'a Buffer, usize)>,
}

impl Project {
    pub fn shape(&self) -> Shape {
        Shape { n: self.n, k: self.k }
    }

    /// Bytes a launch must move, without features: weights per pass, inputs, `x` read and written, `y`.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape(), self.rows, false)
            + (self.rows * (self.n * 10 + self.shape().parts() * 4)) as u64
    }

    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a shape is not as stated; else what the device says.
    pub fn launch(&self, device: &dyn Device, input: &Input, out: &Projected) -> Result<()> {
        let Project { rows, n, .. } = *self;
        let needs = Needs("project");
        needs.that(n.is_multiple_of(64), "a multiple of 64", &format!("{n} outputs"))?;
        needs.that(
            input.sumsq.is_none(),
            "none: its results are not scaled",
            "sums of squares of the input",
        )?;
        needs.buffer("x", out.x, rows * n * 4)?;
        needs.buffer("y", out.y, rows * n * 2)?;
        at_least("project", "sumsq", out.sumsq, rows * self.shape().parts() * 4)?;
        needs.buffer("gain", out.gain, n * 4)?;
        if let Some((features, pitch)) = out.features {
            needs.that(
                pitch >= n && pitch.is_multiple_of(4) && u32::try_from(pitch).is_ok(),
                &format!("a multiple of 4 from {n} on"),
                &format!("features {pitch} apart"),
            )?;
            needs.buffer("features", features, (rows.saturating_sub(1) * pitch + n) * 2)?;
        }
        let args = [
            out.x.into(),
            out.y.into(),
            out.sumsq.into(),
            out.gain.into(),
            or_null(out.features.map(|f| f.0)),
            (out.features.map_or(0, |f| f.1) as u32).into(),
        ];
        let launch = Launch {
            kernels: &KERNELS,
            prefill: Some(&PREFILL),
            shape: self.shape(),
            rows,
            input,
            gather: None,
            first_block: 0,
        };
        launch.run(device, &args)
    }
}
