//! The launchers: for each file in `cuda/` its kernels, what a launch takes with every shape, and the bytes it must move.
//!
//! A launcher checks sizes before it launches; what is inside the buffers is checked by nobody, so kernels clamp it.

pub mod attention;
pub mod chains;
pub mod choices;
pub mod compact;
pub mod embedding;
pub mod head;
pub mod inject;
pub mod linear;
pub mod norm;
pub mod pack;
pub mod project;
pub mod qkv;
pub mod read;
pub mod round;
pub mod rules;
pub mod sample;
pub mod siblings;
pub mod swiglu;
pub mod tree;
pub mod verify;

use crate::gpu::device::Buffer;
use crate::{Error, Result};

/// Tokens in a page of keys and values, which is also the tile of attention: `PAGE` of `cuda/common/rows.cuh`.
pub const PAGE: usize = 64;

/// Refuses a buffer that is smaller than a kernel will reach.
pub(crate) fn at_least(kernel: &str, what: &str, buffer: &Buffer, bytes: usize) -> Result<()> {
    if buffer.bytes() >= bytes {
        return Ok(());
    }
    Err(Error::Internal(format!("kernel {kernel}: {what} has {} bytes, needs {bytes}", buffer.bytes())))
}

/// As [`at_least`], for what a kernel reaches 16 bytes at a time: a slice may begin anywhere.
pub(crate) fn aligned(kernel: &str, what: &str, buffer: &Buffer, bytes: usize) -> Result<()> {
    at_least(kernel, what, buffer, bytes)?;
    if buffer.address().is_multiple_of(16) {
        return Ok(());
    }
    let address = buffer.address();
    Err(Error::Internal(format!("kernel {kernel}: {what} at {address:#x}, not a multiple of 16 bytes")))
}
