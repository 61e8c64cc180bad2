//! Tokenizer, chat templates and streamed text.

#[path = "../support/mod.rs"]
mod support;

mod templates;
mod text;
