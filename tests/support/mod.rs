//! Helpers of the test programs. Each program uses some of them.

#![allow(dead_code, unused_imports)]

pub mod attention;
pub mod bench;
pub mod checkpoint;
pub mod costs;
pub mod counters;
pub mod dense;
pub mod distribution;
pub mod enumeration;
pub mod kernel;
pub mod layer;
pub mod library;
pub mod program;
pub mod random;
pub mod report;
pub mod requests;
pub mod sampled_trees;
pub mod software_gpu;
pub mod test_gpu;
pub mod text;

pub use checkpoint::*;

/// Whether tests run every case they have: `DFLASH_EXHAUSTIVE=1` in the environment. Otherwise the slowest
/// tests run a part of their random cases.
pub fn exhaustive() -> bool {
    std::env::var_os("DFLASH_EXHAUSTIVE").is_some_and(|value| value == "1")
}
