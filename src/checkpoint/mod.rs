//! Model folders on disk: `config.json`, safetensors shards, and target and drafter opened together.

pub mod config;
pub(crate) mod json;
pub mod pair;
pub mod safetensors;
