//! Both models in plain f32 on the CPU: the reference that the kernels are tested against.

pub mod decoder;
mod delta_net;
pub mod dflash2;
pub mod kv_cache;
mod layer;
pub mod markov;
pub mod model;
mod moe;
pub mod ops;
pub(crate) mod simd;
