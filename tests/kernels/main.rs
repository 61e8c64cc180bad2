//! Kernels on every device: against f64 or the host definition, five schedules, poisoned memory.

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod attention_tree;
mod chains;
mod cuda;
mod decide;
mod device_trees;
mod emulator;
mod graphs;
mod judge;
mod layer;
mod linear;
mod linear_bits;
mod norm;
mod pack;
mod passes;
mod prefill;
mod read;
mod rounds;
mod siblings;
mod wgmma;
