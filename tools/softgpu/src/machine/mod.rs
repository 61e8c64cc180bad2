//! Runs kernels: blocks, warps and lanes, in an order that a schedule decides, with checks of every access.
#![allow(clippy::needless_range_loop, reason = "loops over the lanes of several rows become vector code")]

mod access;
mod atomic;
mod block;
mod counters;
mod exec;
mod fault;
mod global;
mod host;
mod lanes;
mod math;
mod schedule;
mod shared;
mod tensor;
mod values;
mod warp;

pub use counters::Counters;
pub use fault::{Cause, Fault};
pub use lanes::Vectors;

use crate::card::Card;
use crate::memory::Memory;
use crate::ptx::Kernel;
use std::sync::Arc;

/// A kernel launch.
#[derive(Clone, Debug)]
pub struct Launch {
    pub kernel: Arc<Kernel>,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The parameters, at the offsets of [`Kernel::params`].
    pub params: Vec<u8>,
    /// Whether it may overlap the launch before it, up to `griddepcontrol.wait`.
    pub dependent: bool,
}

/// The order of additions in tensor core products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sums {
    /// One after the other, by ascending k, each rounded.
    #[default]
    Ascending,
    /// In pairs.
    Pairwise,
    /// Aligned to the largest exponent and cut off, as tensor cores do.
    Aligned,
}

/// Which checks are made, beside those of bounds, alignment and bytes that were never written, which always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Races in shared memory, between blocks and between launches.
    pub races: bool,
}

impl Default for Checks {
    fn default() -> Checks {
        Checks { races: true }
    }
}

/// How kernels are run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The order of blocks, warps and lanes: 0 in order; 1 reversed, with dependent launches before their predecessors as far
    /// as they may; from 2 on random, by seed.
    pub schedule: u64,
    pub sums: Sums,
    /// Whether results of approximate instructions are moved by up to their documented error.
    pub perturb: bool,
    pub checks: Checks,
    /// The widest vectors that the host may use.
    pub vectors: Vectors,
}

/// Runs launches in stream order. A launch with [`Launch::dependent`] may overlap the one before it. The counters are those of
/// each launch.
///
/// # Errors
/// The first [`Fault`]. Memory stays as it was then.
pub fn run(
    chain: &[Launch],
    memory: &Memory,
    card: &Card,
    options: &Options,
) -> Result<Vec<Counters>, Fault> {
    schedule::run(chain, &memory.snapshot(), card, options)
}
