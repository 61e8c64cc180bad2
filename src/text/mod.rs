//! Text to token ids and back.
//!
//! | module | owns |
//! | --- | --- |
//! | [`tokenizer`] | text to ids, ids to text token by token |
//! | [`chat_template`] | a conversation to one text, by the model's jinja template |
//! | [`prompts`] | prompts, and files of prompts, to checked token ids |
//! | `decoding` | token strings to bytes, as `tokenizer.json` describes it |
//! | `stop_strings` | ends a growing text before the first stop string |
//! | `untrusted` | runs code on untrusted input: on a deep stack, panics turned into errors |

pub mod chat_template;
mod decoding;
pub mod prompts;
mod stop_strings;
pub mod tokenizer;
pub mod untrusted;
