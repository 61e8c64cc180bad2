//! The launchers: for each file in `cuda/` its kernels, what a launch takes with every shape, and the bytes it must move.
//!
//! A launcher checks sizes before it launches; what is inside the buffers is checked by nobody, so kernels clamp it.

pub mod attention;
pub mod embedding;
pub mod head;
pub mod inject;
pub mod linear;
pub mod norm;
pub mod pack;
pub mod project;
pub mod qkv;
pub mod round;
pub mod sample;
pub mod swiglu;
pub mod verify;

use crate::device::Buffer;
use crate::{Error, Result};

/// Refuses a buffer that is smaller than a kernel will reach.
pub(crate) fn at_least(kernel: &str, what: &str, buffer: &Buffer, bytes: usize) -> Result<()> {
    if buffer.bytes() >= bytes {
        return Ok(());
    }
    Err(Error::Internal(format!("kernel {kernel}: {what} has {} bytes, needs {bytes}", buffer.bytes())))
}
