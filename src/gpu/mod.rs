//! Devices that run the CUDA kernels, and both models on them.

pub mod cuda;
pub mod decoder;
pub mod device;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod graph_listing;
pub mod kernels;
pub mod loader;
pub mod memory;
pub mod model;
pub mod nvtx;
