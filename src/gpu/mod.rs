//! Devices that run the CUDA kernels, and both models on them.
//!
//! [`device`] is the interface, which [`cuda`], `emulator` and [`dry_run`] implement. [`kernels`] launches
//! single kernels, [`model`] the layers of a model, [`decoder`] the rounds of a batch whose capacity is a
//! [`batch_config`]. [`loader`] fills weights. [`memory`] and [`graph_listing`] tell what all of this
//! allocates and launches, without a device; [`nvtx`] tells profilers.

pub mod batch_config;
pub mod cuda;
pub mod decoder;
pub mod device;
pub mod dry_run;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod graph_listing;
pub mod kernels;
pub mod loader;
pub mod memory;
pub mod model;
pub mod nvtx;
