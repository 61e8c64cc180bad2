//! A GPU in software: runs CUDA programs without a card.
//!
//! [`ptx`] turns PTX text into kernels, [`machine`] runs them. The CUDA driver API on top of them is in the
//! cdylib of this crate, which takes the place of `libcuda.so.1`.

pub mod card;
mod driver;
pub mod machine;
pub mod memory;
pub mod ptx;
pub mod settings;
