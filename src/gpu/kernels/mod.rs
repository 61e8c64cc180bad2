//! Launchers, one file per kernel source in `cuda/`. A launcher documents a kernel's shapes and the bytes
//! that it must move, checks its arguments, and launches it.
//!
//! A launcher checks shapes, buffer sizes and alignment. It cannot check what buffers contain (row tables,
//! page numbers, token ids), so the kernels clamp those.
//!
//! Terms used by all files:
//!
//! - Shapes are row-major, outermost dimension first, followed by the element type: `[rows][hidden]` bf16.
//! - `Row` (16 bytes: sequence, position, slot, query) and `Span` (8 bytes: context, rows) are the structs of
//!   `cuda/common/rows.cuh`, all fields u32. A sequence's span is the number of cache slots filled before the
//!   pass and the number of its rows in the pass.
//! - `u32::MAX` means "none": padding, a row without a sequence, a token that could not be chosen.
//! - A row of logits is *invalid* if it holds a NaN or +inf, or nothing but -inf.
//! - A *sealed* buffer is constant: see [`Device::seal`](crate::gpu::device::Device::seal).
//! - *Counters* must be zero before the first launch; every launch leaves them at zero.
//! - *Bytes a launch must move* are the compulsory reads and writes: each input and each output once, unless
//!   the function says otherwise. `dflash-bench` divides them by the time of a launch.
#![deny(missing_docs)]

pub mod attention;
pub mod chains;
mod check;
pub mod choices;
pub mod compact;
pub mod convolve;
pub mod delta_net;
pub mod embedding;
pub mod head;
pub mod heads;
pub mod inject;
pub mod linear;
pub mod lookup;
pub mod markov;
pub mod norm;
pub mod pack;
pub mod pairs;
pub mod plain;
pub mod project;
pub mod qkv;
pub mod read;
pub mod rejection;
pub mod round;
pub mod sample;
pub mod selector;
pub mod siblings;
pub mod swiglu;
pub mod tree;
pub mod verify;

/// Tokens per page of the KV cache, and per tile of attention: `PAGE` of `cuda/common/rows.cuh`.
pub const PAGE: usize = 64;

/// The rows of larger buffers that a launch processes: `first`, `first + step`, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowStep {
    /// The first row.
    pub first: usize,
    /// The distance from one row to the next, at least 1.
    pub step: usize,
}

impl RowStep {
    /// All rows.
    pub const ALL: RowStep = RowStep { first: 0, step: 1 };
}

/// Maximum bytes of shared memory of a CUDA block, static and dynamic, in kernels for every GPU: that of the cards with
/// the least.
const MAX_SHARED: u32 = 99 << 10;

/// Bytes of a `Row`.
const ROW_BYTES: usize = 16;
/// Bytes of a `Span`.
const SPAN_BYTES: usize = 8;
