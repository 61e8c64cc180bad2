//! Speculative decoding as mathematics: exact enumeration, sampling, draft lengths.

#[path = "../support/mod.rs"]
mod support;

mod control;
mod enumeration;
mod enumeration_shapes;
mod enumeration_sizes;
mod enumeration_words;
mod enumeration_worked;
mod sampling;
