//! `cuda/model/norm.cu`: RMSNorm, split between producer and consumer of the residual stream, and whole.

use super::{aligned, at_least};
use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::{Error, Result};

static RESIDUAL: Kernel = Kernel { file: "norm", name: "residual_norm", threads: 256, max_shared: 0 };
static FULL: Kernel = Kernel { file: "norm", name: "full_norm", threads: 256, max_shared: 0 };

/// Columns that share one partial sum of squares.
pub const PART: usize = 128;

/// Rows of the residual stream made ready for a linear kernel. `rows` at most 65535, `hidden` a multiple of 64 and at
/// most 65536.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    pub rows: usize,
    pub hidden: usize,
}

impl Norm {
    /// Partial sums of squares per row.
    pub fn parts(&self) -> usize {
        self.hidden.div_ceil(PART)
    }

    /// Bytes that [`Norm::launch`] must move.
    pub fn bytes(&self, add: bool) -> u64 {
        let row = self.hidden * if add { 14 } else { 6 } + self.parts() * 4;
        (self.rows * row + self.hidden * 4) as u64
    }

    /// Bytes that [`Norm::full`] must move.
    pub fn full_bytes(&self) -> u64 {
        (self.rows * self.hidden * 6 + self.hidden * 4) as u64
    }

    /// `x[r] += add[r]` where there is an `add`, then `y[r] = bf16(gain x[r])` and, for the consumer to finish the norm
    /// with, `sumsq[r][p]`: the sum of squares of columns `128 p ..` of `x[r]`.
    ///
    /// `y` `[rows][hidden]` bf16, `sumsq` `[rows][parts]` f32, `x` and `add` `[rows][hidden]` f32, `gain` `[hidden]` f32.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
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
        self.check("residual_norm", y, x, gain)?;
        at_least("residual_norm", "sumsq", sumsq, rows * parts * 4)?;
        if let Some(add) = add {
            aligned("residual_norm", "add", add, rows * hidden * 4)?;
        }
        let args = [
            y.into(),
            sumsq.into(),
            x.into(),
            add.map_or(Arg::Null, Arg::from),
            gain.into(),
            (hidden as u32).into(),
            (parts as u32).into(),
        ];
        device.launch(&RESIDUAL, [parts.div_ceil(8) as u32, rows as u32, 1], 0, &args)
    }

    /// The whole norm: `y[r] = bf16(gain x[r] / sqrt(mean of x[r]^2 + eps))`. Shapes as in [`Norm::launch`].
    ///
    /// # Errors
    /// As [`Norm::launch`].
    pub fn full(&self, device: &dyn Device, y: &Buffer, x: &Buffer, gain: &Buffer, eps: f32) -> Result<()> {
        self.check("full_norm", y, x, gain)?;
        let (hidden, parts) = (self.hidden as u32, self.parts() as u32);
        let args = [y.into(), x.into(), gain.into(), hidden.into(), parts.into(), eps.into()];
        device.launch(&FULL, [self.rows as u32, 1, 1], 0, &args)
    }

    fn check(&self, kernel: &str, y: &Buffer, x: &Buffer, gain: &Buffer) -> Result<()> {
        let Norm { rows, hidden } = *self;
        if !(1..=65535).contains(&rows) || !(64..=65536).contains(&hidden) || !hidden.is_multiple_of(64) {
            return Err(Error::Internal(format!(
                "kernel {kernel}: {rows} rows of {hidden} columns; possible are 1 to 65535 rows of a multiple of 64 \
                 columns up to 65536"
            )));
        }
        aligned(kernel, "y", y, rows * hidden * 2)?;
        aligned(kernel, "x", x, rows * hidden * 4)?;
        aligned(kernel, "gain", gain, hidden * 4)
    }
}
