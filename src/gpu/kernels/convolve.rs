//! `cuda/model/convolve.cu`: the convolution before a sublayer of a DFlash2 drafter, along the rows of each
//! block, with the projection to the coefficients of both convolutions. [`super::project`] has the one after it.

use super::check::{Check, u32s};
use super::linear::{Input, Kernels, Launch, PASS, Shape, input_bytes, kernels};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device};

static KERNELS: Kernels =
    kernels("convolve", ["convolve_8", "convolve_16", "convolve_32", "convolve_64", "convolve_128"], None);

/// The convolutions before and after a sublayer: row `t` of a block becomes the sum over taps `o` of
/// `base[o] + dynamic[t][o]` times row `t - o` of the same block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Convolve {
    /// Rows, a multiple of `block`.
    pub rows: usize,
    /// Channels: the hidden size, a multiple of 32.
    pub hidden: usize,
    /// Rows that a row reads: 1, 2, 4 or 8.
    pub taps: usize,
    /// Channels that share a dynamic coefficient: a multiple of 4 that divides `hidden`.
    pub group: usize,
    /// Rows of a block, 1 to 64.
    pub block: usize,
}

impl Convolve {
    /// Shape of the projection to the dynamic coefficients of both convolutions.
    pub fn shape(&self) -> Shape {
        Shape { n: 2 * self.taps * self.groups(), k: self.hidden }
    }

    fn groups(&self) -> usize {
        self.hidden / self.group
    }

    /// The packed row of a row of the projection: `[side][tap][group]` becomes `[group][side][tap]`, so that a
    /// CUDA block has all coefficients of its groups.
    pub fn packed_row(taps: usize, groups: usize, row: usize) -> usize {
        row % groups * 2 * taps + row / groups
    }

    /// Bytes of the dynamic coefficients of one row.
    pub fn dynamic_bytes(&self) -> usize {
        self.taps * self.groups() * 4
    }

    /// Bytes that [`Convolve::launch`] must move: the weights, the rows read and written, `base`, `dynamic`.
    pub fn bytes(&self) -> u64 {
        let inputs = self.launches().map(|(_, rows)| input_bytes(self.shape(), rows, true)).sum::<u64>();
        let row = self.hidden * 2 + self.dynamic_bytes();
        inputs + (self.rows * row + self.taps * self.hidden * 4) as u64
    }

    /// First row and number of rows of each launch: whole blocks, at most [`PASS`] rows, so that a CUDA block has
    /// all rows that a row reads.
    pub(super) fn launches(&self) -> impl Iterator<Item = (usize, usize)> {
        let (rows, block) = (self.rows, self.block.clamp(1, PASS));
        let at_once = PASS / block * block;
        (0..rows).step_by(at_once).map(move |first| (first, at_once.min(rows - first)))
    }

    /// Checks sizes, and the buffers that both kernels read or write: `dynamic` `[rows][taps][hidden / group]` f32
    /// and `base` `[taps][hidden]` f32.
    pub(super) fn check(&self, check: &Check, dynamic: &Buffer, base: &Buffer) -> Result<()> {
        let Convolve { rows, hidden, taps, group, block } = *self;
        check.that(
            matches!(taps, 1 | 2 | 4 | 8)
                && group > 0
                && group.is_multiple_of(4)
                && hidden.is_multiple_of(group)
                && (1..=64).contains(&block)
                && rows.is_multiple_of(block),
            format_args!("{taps} taps, {group} of {hidden} channels, {rows} rows in blocks of {block}"),
            "1, 2, 4 or 8 taps, groups of a multiple of 4, whole blocks of 1 to 64 rows",
        )?;
        check.aligned("dynamic", dynamic, rows * self.dynamic_bytes())?;
        check.aligned("base", base, taps * hidden * 4)
    }

    /// The last arguments of both kernels, for the rows from `first` on.
    pub(super) fn args(&self, first: usize, dynamic: &Buffer, base: &Buffer) -> Result<Vec<Arg>> {
        let dynamic = from_row(dynamic, first, self.dynamic_bytes())?;
        let mut args = vec![(&dynamic).into(), base.into()];
        args.extend(u32s([self.taps, self.group, self.block]));
        Ok(args)
    }

    /// Writes `out` `[rows][hidden]` bf16, the convolution of `input.x` with the first of both kernels, and
    /// `dynamic` `[rows][taps][hidden / group]` f32, the coefficients of the second. `out` is to be divided by the
    /// root mean square of its row as `input.x` is, so `input.sumsq` belongs to both. The weights are packed by
    /// [`Convolve::packed_row`]. `base` `[taps][hidden]` f32.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        input: &Input,
        out: &Buffer,
        dynamic: &Buffer,
        base: &Buffer,
    ) -> Result<()> {
        let Convolve { rows, hidden, .. } = *self;
        let check = Check("convolve");
        self.check(&check, dynamic, base)?;
        check.aligned("out", out, rows * hidden * 2)?;
        let Some(sumsq) = input.sumsq else {
            return check.that(false, "no sums of squares", "those of the rows");
        };
        for (first, count) in self.launches() {
            let x = from_row(input.x, first, hidden * 2)?;
            let sumsq = from_row(sumsq, first, hidden.div_ceil(128) * 4)?;
            let out = from_row(out, first, hidden * 2)?;
            let input = Input { x: &x, sumsq: Some(&sumsq), ..*input };
            let mut args: Vec<Arg> = vec![(&out).into()];
            args.extend(self.args(first, dynamic, base)?);
            Launch::new(&KERNELS, self.shape(), count, &input).run(device, &args)?;
        }
        Ok(())
    }
}

/// The part of a buffer from a row on, with rows of `bytes` bytes.
pub(super) fn from_row(buffer: &Buffer, row: usize, bytes: usize) -> Result<Buffer> {
    buffer.slice(row * bytes, buffer.bytes().saturating_sub(row * bytes))
}
