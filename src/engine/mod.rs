//! The life of a request on any device: prefill, rounds, stopping, and what is reported.

pub mod generate;
pub mod lossless;
pub mod stats;
