//! Model folders: reading them, loading them, and refusing invalid ones.

#[path = "../support/mod.rs"]
mod support;

mod checkpoints;
mod cli_errors;
mod corrupted_files;
mod drafters;
mod hub;
mod invalid_checkpoints;
mod load;
mod targets;
mod variants;
