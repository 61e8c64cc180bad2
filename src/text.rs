//! People's side of tokens: tokenizer, chat template, streaming detokenising, stop strings.

use crate::Result;
use crate::weights::Folder;
use serde::Deserialize;

/// One turn of a conversation, as chat templates take it.
#[derive(Debug, Clone, PartialEq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Tokenizer and chat template of a target folder.
pub struct Text {}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`. `template`: the text of a template that
    /// overrides the folder's, with the name it is called by in errors.
    pub fn open(_folder: &Folder, _template: Option<(&str, String)>) -> Result<Self> {
        unimplemented!()
    }

    pub fn has_template(&self) -> bool {
        unimplemented!()
    }

    /// Raw text to ids: special tokens in the text are recognised, bos is added if the tokenizer's post-processor or
    /// `add_bos_token` says so.
    pub fn encode(&self, _text: &str) -> Result<Vec<u32>> {
        unimplemented!()
    }

    /// A conversation through the chat template, generation prompt added. `args` are template variables
    /// (`enable_thinking` is false unless given).
    pub fn encode_chat(
        &self,
        _messages: &[Message],
        _args: &[(String, serde_json::Value)],
    ) -> Result<Vec<u32>> {
        unimplemented!()
    }

    /// Ids to text, special tokens left out.
    pub fn decode(&self, _ids: &[u32]) -> Result<String> {
        unimplemented!()
    }

    /// A detokeniser for one answer.
    pub fn stream(&self, _stops: &[String]) -> Stream<'_> {
        unimplemented!()
    }
}

/// Tokens in, text out, piece by piece: never half a character, never text that may turn out to begin a stop string.
pub struct Stream<'a> {
    _text: &'a Text,
}

impl Stream<'_> {
    /// Takes the next token. Returns text that is now certain (maybe empty), and whether a stop string was completed:
    /// then the text ends just before it and nothing more may be pushed.
    pub fn push(&mut self, _id: u32) -> Result<(String, bool)> {
        unimplemented!()
    }

    /// The text held back so far; the answer is over.
    pub fn finish(self) -> String {
        unimplemented!()
    }
}
