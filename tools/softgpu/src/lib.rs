//! A GPU in software: a PTX interpreter behind the CUDA driver API.

pub mod card;
pub mod memory;
