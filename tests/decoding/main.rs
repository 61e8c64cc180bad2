//! Whole generations: speculative against autoregressive decoding, batches, devices, reference outputs.

#[path = "../support/mod.rs"]
mod support;

mod adaptive;
mod api;
mod arithmetic;
mod conformance;
mod device;
mod device_rules;
mod faults;
mod generation;
mod lossless;
mod rules;
mod soak;
mod trees;
