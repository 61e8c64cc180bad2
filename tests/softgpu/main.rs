//! The shipped PTX on the software GPU (`tools/softgpu`), as users run it: `dflash-gen --device cuda`.
//!
//! `DFLASH_EXHAUSTIVE=1` runs every combination of the tests that have many.

#[path = "../support/mod.rs"]
mod support;

mod counters;
mod lossless;
mod refusals;
mod release;
