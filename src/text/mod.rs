//! Text to token ids and back: tokenizer, chat templates, prompt files.

pub(crate) mod chat_template;
pub mod prompts;
pub mod tokenizer;
