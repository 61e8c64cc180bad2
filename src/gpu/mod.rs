//! Devices that run the CUDA kernels, and both models on them.
//!
//! | module | owns |
//! | --- | --- |
//! | [`device`] | the interface to a device; [`cuda`] and [`dry_run`] implement it |
//! | [`ptx`] | the kernels' PTX in the binary |
//! | `software` | what the software GPU has beyond the CUDA driver API |
//! | [`kernels`] | launchers of single kernels |
//! | [`model`] | the launches of a model's layers |
//! | [`markov`], [`selector`], [`chain`] | the launches of drafts that depend on those before |
//! | [`loader`] | weights from files to device memory |
//! | [`batch_config`] | the capacity of a batch |
//! | [`decoder`] | the sequences of a batch, and the captured round |
//! | [`memory`] | what all of this allocates, computed without a device |
//! | [`graph_listing`] | the launches of a round as a list, without a device |
//! | [`prediction`] | the time of each launch of a round on a card, computed from counters |
//! | [`nvtx`] | named ranges for profilers |

pub mod batch_config;
pub mod chain;
pub mod cuda;
pub mod decoder;
pub mod device;
pub mod dry_run;
pub mod graph_listing;
pub mod kernels;
pub mod loader;
pub mod markov;
pub mod memory;
pub mod model;
pub mod nvtx;
pub mod prediction;
pub mod ptx;
pub mod selector;
mod software;
