//! `cuda/model/norm.cu`: RMSNorm, either split between the kernels that write and read the residual stream,
//! or complete in one kernel.

use super::check::{Check, or_null, u32s};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static RESIDUAL: Kernel = Kernel { file: "norm", name: "residual_norm", threads: 256, max_shared: 0 };
static FULL: Kernel = Kernel { file: "norm", name: "full_norm", threads: 256, max_shared: 0 };

/// Columns per partial sum of squares.
pub const PART: usize = 128;

/// The norm of rows of the residual stream.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// Rows, 1 to 65535.
    pub rows: usize,
    /// Hidden size, a multiple of 32, at most 65536.
    pub hidden: usize,
}

impl Norm {
    /// Partial sums of squares per row.
    pub fn parts(&self) -> usize {
        self.hidden.div_ceil(PART)
    }

    /// Bytes that [`Norm::launch`] must move, with or without `add`.
    pub fn bytes(&self, add: bool) -> u64 {
        let row = self.hidden * if add { 14 } else { 6 } + self.parts() * 4;
        (self.rows * row + self.hidden * 4) as u64
    }

    /// Bytes that [`Norm::full`] must move.
    pub fn full_bytes(&self) -> u64 {
        (self.rows * self.hidden * 6 + self.hidden * 4) as u64
    }

    /// The norm without the division by the root mean square: `x[r] += add[r]` if there is an `add`, then
    /// `y[r] = bf16(gain x[r])` and `sumsq[r][p]`, the sum of squares of 128 columns of `x[r]` from column
    /// `128 p` on. The linear kernel that reads `y` divides its results by the root mean square.
    ///
    /// `y` `[rows][hidden]` bf16, `sumsq` `[rows][parts]` f32, `x` and `add` `[rows][hidden]` f32, `gain`
    /// `[hidden]` f32.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        y: &Buffer,
        sumsq: &Buffer,
        x: &Buffer,
        add: Option<&Buffer>,
        gain: &Buffer,
    ) -> Result<()> {
        let (rows, hidden, parts) = (self.rows, self.hidden, self.parts());
        let check = self.check("residual_norm", y, x, gain)?;
        check.at_least("sumsq", sumsq, rows * parts * 4)?;
        check.optional("add", add, rows * hidden * 4)?;
        let mut args = vec![y.into(), sumsq.into(), x.into(), or_null(add), gain.into()];
        args.extend(u32s([hidden, parts]));
        device.launch(&RESIDUAL, [parts.div_ceil(8) as u32, rows as u32, 1], 0, &args)
    }

    /// The complete norm: `y[r] = bf16(gain x[r] / sqrt(mean of x[r]^2 + eps))`. Shapes as in
    /// [`Norm::launch`].
    ///
    /// # Errors
    /// As [`Norm::launch`].
    pub fn full(&self, device: &dyn Device, y: &Buffer, x: &Buffer, gain: &Buffer, eps: f32) -> Result<()> {
        self.check("full_norm", y, x, gain)?;
        let mut args = vec![y.into(), x.into(), gain.into()];
        args.extend(u32s([self.hidden, self.parts()]));
        args.push(eps.into());
        device.launch(&FULL, [self.rows as u32, 1, 1], 0, &args)
    }

    fn check(&self, kernel: &'static str, y: &Buffer, x: &Buffer, gain: &Buffer) -> Result<Check> {
        let Norm { rows, hidden } = *self;
        let check = Check(kernel);
        check.that(
            (1..=65535).contains(&rows) && (32..=65536).contains(&hidden) && hidden.is_multiple_of(32),
            format_args!("{rows} rows of {hidden} columns"),
            "1 to 65535 rows of a multiple of 32 columns, up to 65536",
        )?;
        check.aligned("y", y, rows * hidden * 2)?;
        check.aligned("x", x, rows * hidden * 4)?;
        check.aligned("gain", gain, hidden * 4)?;
        Ok(check)
    }
}
