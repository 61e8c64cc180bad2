//! Whole generations: speculative against autoregressive decoding, batches, devices, reference outputs.

#[path = "../support/mod.rs"]
mod support;

mod adaptive;
mod api;
mod arithmetic;
mod conformance;
mod coupled;
mod device;
mod device_verification;
mod drafters;
mod eagle3;
mod faults;
mod generation;
mod lookup;
mod lossless;
mod smollm2;
mod soak;
mod targets;
mod trees;
mod verification;
