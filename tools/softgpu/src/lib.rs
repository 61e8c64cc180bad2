//! A GPU in software: runs CUDA programs without a card.
//!
//! | module | owns |
//! | --- | --- |
//! | [`ptx`] | PTX text to kernels: a new opcode starts in `ptx/decode.rs` |
//! | [`machine`] | execution, schedules, checks of every access, counters |
//! | [`memory`] | the global address space |
//! | [`card`], [`settings`] | the GPUs that it can be, and the variables that choose |
//! | `driver` | the CUDA driver API, in the cdylib that takes the place of `libcuda.so.1` |

pub mod card;
mod driver;
pub mod machine;
pub mod memory;
pub mod ptx;
pub mod settings;
