//! Speculative decoding as mathematics: no device, no model.

pub mod draft_length;
pub mod sampling;
pub mod tree;
pub mod verify;
