//! Both models in plain f32 on the CPU: the reference that the kernels are tested against.

pub mod decoder;
pub mod dflash2;
pub mod kv_cache;
pub mod markov;
pub mod model;
pub mod ops;
pub(crate) mod simd;
