//! A GPU in software: runs CUDA programs without a card.
//!
//! [`ptx`] turns PTX text into kernels, [`machine`] runs them.

pub mod card;
pub mod machine;
pub mod memory;
pub mod ptx;
