//! Tests of the kernels: results against f64 or the host's definition, equal bits under several schedules, poisoned
//! memory, garbage inputs.

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod attention_tree;
mod chains;
mod convolve;
mod cuda;
mod delta_net;
mod graphs;
mod heads;
mod layer_traffic;
mod linear;
mod linear_bits;
mod lookup;
mod markov;
mod norm;
mod pack;
mod pairs;
mod passes;
mod planted;
mod prefill;
mod read;
mod rejection;
mod rounds;
mod sampler;
mod selector;
mod siblings;
mod trees;
mod verify;
