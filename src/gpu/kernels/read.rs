//! `cuda/perf/read.cu`: reading memory and nothing else, the measure of every other kernel's bytes per second.

use super::{aligned, at_least};
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::{Error, Result};

static READ: Kernel = Kernel { file: "read", name: "read_all", threads: 256, max_shared: 0 };

/// Pieces of 16 bytes that a block takes at a turn.
const RUN: usize = 2048;

/// Reads `bytes` bytes, a multiple of 16, on `blocks` blocks.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    pub bytes: usize,
    pub blocks: usize,
}

impl Read {
    /// The most blocks that have something to read.
    pub fn most_blocks(bytes: usize) -> usize {
        (bytes / 16).div_ceil(RUN)
    }

    /// Bytes a launch must move.
    pub fn bytes(&self) -> u64 {
        (self.bytes + self.blocks * 4) as u64
    }

    /// `out` `[blocks]` u32: the sum mod 2^32 of the words that each block read. Together they are the sum
    /// of all words of `from`, `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits; else what the device says.
    pub fn launch(&self, device: &dyn Device, out: &Buffer, from: &Buffer) -> Result<()> {
        let Read { bytes, blocks } = *self;
        let pieces = u32::try_from(bytes / 16).ok().filter(|pieces| *pieces <= u32::MAX - RUN as u32);
        let (Some(pieces), true, true) = (pieces, bytes > 0 && bytes.is_multiple_of(16), blocks > 0) else {
            return Err(Error::Internal(format!(
                "kernel read_all: {bytes} bytes on {blocks} blocks; possible are multiples of 16 below 64 GiB and \
                 at least one block"
            )));
        };
        at_least("read_all", "out", out, blocks * 4)?;
        aligned("read_all", "from", from, bytes)?;
        device.launch(&READ, [blocks as u32, 1, 1], 0, &[out.into(), from.into(), pieces.into()])
    }
}
