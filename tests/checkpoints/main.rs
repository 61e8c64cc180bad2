//! Model folders: reading, loading, and refusing broken ones.

#[path = "../support/mod.rs"]
mod support;

mod broken_checkpoints;
mod checkpoints;
mod load;
mod refusals;
mod spoiled;
