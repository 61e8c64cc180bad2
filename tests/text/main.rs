//! Tokenizer, chat templates, streaming.

#[path = "../support/mod.rs"]
mod support;

mod templates;
mod text;
