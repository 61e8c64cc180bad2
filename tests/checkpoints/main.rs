//! Model folders: reading them, loading them, and refusing invalid ones.

#[path = "../support/mod.rs"]
mod support;

mod broken_checkpoints;
mod checkpoints;
mod load;
mod refusals;
mod spoiled;
