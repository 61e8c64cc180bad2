//! Speculative decoding as mathematics: exact enumeration, sampling, draft lengths.

#[path = "../support/mod.rs"]
mod support;

mod draft_length;
mod enumeration;
mod enumeration_draws;
mod enumeration_examples;
mod enumeration_lengths;
mod enumeration_shapes;
mod sampling;
