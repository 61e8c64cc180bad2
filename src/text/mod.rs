//! Conversion of text to token ids and back.
//!
//! | module | owns |
//! | --- | --- |
//! | [`tokenizer`] | text to ids, ids to text token by token |
//! | [`chat_template`] | a conversation to one text, by the model's jinja template |
//! | [`message`] | one turn of a conversation |
//! | [`prompt_files`] | prompts from files and stdin |
//! | [`prompts`] | prompts to checked token ids |
//! | `jinja` | the jinja of templates, as Python's jinja2 has it |
//! | `decoding` | token strings to bytes, as `tokenizer.json` specifies |
//! | `special_tokens` | the special tokens that the tokenizer's other files name |
//! | `stop_strings` | ends a streamed text before the first stop string |
//! | [`untrusted`] | runs code on untrusted input on a large stack and turns panics into errors |

pub mod chat_template;
mod decoding;
mod jinja;
pub mod message;
pub mod prompt_files;
pub mod prompts;
mod special_tokens;
mod stop_strings;
pub mod tokenizer;
pub mod untrusted;
