//! `cuda/model/project.cu`: the output projections of attention and MLP, added to the residual stream.

use super::check::{Check, args, or_null};
use super::convolve::{Convolve, from_row};
use super::linear::{Input, Kernels, Launch, Shape, check_unscaled, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device};

static KERNELS: Kernels = kernels(
    "project",
    ["project_8", "project_16", "project_32", "project_64", "project_128"],
    Some(["prefill_project", "prefill_project_wgmma"]),
);

/// `x += in W^T`, then `y = bf16(gain * x)` and the sums of squares of `x` for the next norm.
#[derive(Debug, Clone, Copy)]
pub struct Project {
    /// Rows, at least 1.
    pub rows: usize,
    /// Outputs: the hidden size, a multiple of 32.
    pub n: usize,
    /// Inputs, a multiple of 32.
    pub k: usize,
}

/// The buffers of [`Project`] besides its input.
pub struct ProjectBuffers<'a> {
    /// The residual stream, `[rows][n]` f32, updated in place.
    pub x: &'a Buffer,
    /// Output, `[rows][n]` bf16.
    pub y: &'a Buffer,
    /// Output, `[rows][ceil(n / 128)]` f32: sums of `x^2` over 128 columns each.
    pub sumsq: &'a Buffer,
    /// Weight of the next norm, `[n]` f32.
    pub gain: &'a Buffer,
    /// Output for the drafter's features, `[rows][pitch]` bf16, and `pitch`, a multiple of 4: `bf16(x)` is
    /// written to the first `n` columns of each row.
    pub features: Option<(&'a Buffer, usize)>,
}

static CONVOLVED: Kernels = kernels(
    "project",
    [
        "project_convolved_8",
        "project_convolved_16",
        "project_convolved_32",
        "project_convolved_64",
        "project_convolved_128",
    ],
    None,
);

impl Project {
    /// Shape of the weights.
    pub fn shape(&self) -> Shape {
        Shape { n: self.n, k: self.k }
    }

    /// Bytes a launch must move, without features: weights per pass, inputs, `x` read and written, `y`.
    pub fn bytes(&self) -> u64 {
        input_bytes(self.shape(), self.rows, false)
            + (self.rows * (self.n * 10 + self.shape().parts() * 4)) as u64
    }

    /// `input.x` `[rows][k]` bf16, not scaled by a norm: `input.sumsq` must be `None`.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, input: &Input, buffers: &ProjectBuffers) -> Result<()> {
        let Project { rows, n, .. } = *self;
        let &ProjectBuffers { x, y, sumsq, gain, features } = buffers;
        let check = Check("project");
        check_unscaled(&check, self.shape(), rows, input, [y, sumsq, gain])?;
        check.aligned("x", x, rows * n * 4)?;
        if let Some((features, pitch)) = features {
            check.that(
                pitch >= n && pitch.is_multiple_of(4) && u32::try_from(pitch).is_ok(),
                format_args!("a pitch of {pitch} features"),
                format_args!("a multiple of 4, at least {n}"),
            )?;
            check.aligned("features", features, (rows.saturating_sub(1) * pitch + n) * 2)?;
        }
        let mut args = args([x, y, sumsq, gain], []);
        args.extend([or_null(features.map(|f| f.0)), Arg::U32(features.map_or(0, |f| f.1 as u32))]);
        Launch::new(&KERNELS, self.shape(), rows, input).run(device, &args)
    }

    /// As [`Project::launch`] without features, with the second convolution of `convolve` on the results:
    /// `x += conv(in W^T)`. `dynamic` as [`Convolve::launch`] wrote it. `base` `[taps][n]` f32.
    ///
    /// # Errors
    /// As [`Project::launch`].
    pub fn launch_convolved(
        &self,
        device: &dyn Device,
        input: &Input,
        buffers: &ProjectBuffers,
        convolve: Convolve,
        dynamic: &Buffer,
        base: &Buffer,
    ) -> Result<()> {
        let Project { rows, n, k } = *self;
        let &ProjectBuffers { x, y, sumsq, gain, features } = buffers;
        let check = Check("project_convolved");
        check_unscaled(&check, self.shape(), rows, input, [y, sumsq, gain])?;
        check.aligned("x", x, rows * n * 4)?;
        convolve.check(&check, dynamic, base)?;
        check.that(
            (convolve.rows, convolve.hidden) == (rows, n) && features.is_none(),
            format_args!("a convolution of {} rows and {} channels", convolve.rows, convolve.hidden),
            format_args!("{rows} rows of {n}, without features"),
        )?;
        for (first, count) in convolve.launches() {
            let from = |buffer, bytes| from_row(buffer, first, bytes);
            let rows = [from(x, n * 4)?, from(y, n * 2)?, from(sumsq, self.shape().parts() * 4)?];
            let mut args = args(rows.iter().chain([gain]), []);
            args.extend([Arg::Null, Arg::U32(0)]);
            args.extend(convolve.args(first, dynamic, base)?);
            let input = Input { x: &from(input.x, k * 2)?, ..*input };
            Launch::new(&CONVOLVED, self.shape(), count, &input).run(device, &args)?;
        }
        Ok(())
    }
}
