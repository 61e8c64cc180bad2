//! `cuda/perf/read.cu`: only reads memory. Its bytes per second are the read ceiling that other kernels are
//! compared with.

use super::check::{Check, args};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static READ: Kernel = Kernel { file: "read", name: "read_all", threads: 256, max_shared: 0 };

/// Chunks of 16 bytes that a CUDA block reads before it skips to its next run.
const RUN: usize = 2048;

/// A read of a whole buffer.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    /// Bytes to read, a multiple of 16, below 64 GiB.
    pub bytes: usize,
    /// CUDA blocks, at least 1.
    pub blocks: usize,
}

impl Read {
    /// Maximum CUDA blocks that have something to read.
    pub fn max_blocks(bytes: usize) -> usize {
        (bytes / 16).div_ceil(RUN)
    }

    /// Bytes a launch must move.
    pub fn bytes(&self) -> u64 {
        (self.bytes + self.blocks * 4) as u64
    }

    /// Writes `out` `[blocks]` u32: the sum mod 2^32 of the u32 words that each block read. They add up to
    /// the sum of all words of `from`.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, out: &Buffer, from: &Buffer) -> Result<()> {
        let Read { bytes, blocks } = *self;
        let check = Check("read_all");
        let chunks = bytes / 16;
        check.that(
            (1..=u32::MAX as usize - RUN).contains(&chunks) && bytes.is_multiple_of(16) && blocks > 0,
            format_args!("{bytes} bytes on {blocks} blocks"),
            "a multiple of 16 below 64 GiB on at least one block",
        )?;
        check.at_least("out", out, blocks * 4)?;
        check.aligned("from", from, bytes)?;
        device.launch(&READ, [blocks as u32, 1, 1], 0, &args([out, from], [chunks]))
    }
}
