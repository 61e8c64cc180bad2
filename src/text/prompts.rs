//! Converts prompts (texts, conversations, and files of them) to checked token ids. Every prompt has a name,
//! which errors use.

use crate::checkpoint::pair::Pair;
use crate::error::one_line;
use crate::text::tokenizer::{Message, Text};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// One prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its name in errors, such as `the prompt` or `FILE line 3`.
    pub name: String,
    /// Its text, conversation or token ids.
    pub content: Content,
    /// The `category` field of its line, any JSON value; null without one.
    pub category: Value,
}

/// The content of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// One text: a user's message if the model has a chat template, else a text that the answer continues.
    Text(String),
    /// A conversation. It needs a chat template.
    Chat(Vec<Message>),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
}

impl From<&str> for Content {
    fn from(text: &str) -> Content {
        Content::Text(text.into())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Content {
        Content::Text(text)
    }
}

impl From<Vec<Message>> for Content {
    fn from(messages: Vec<Message>) -> Content {
        Content::Chat(messages)
    }
}

impl From<Vec<u32>> for Content {
    fn from(ids: Vec<u32>) -> Content {
        Content::Tokens(ids)
    }
}

/// Reads a text file. A byte order mark at its start is dropped.
///
/// # Errors
/// [`Error::Usage`] if it cannot be read or is not UTF-8.
pub fn read(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| Error::Usage(format!("{name} cannot be read: {e}")))?;
    let text = utf8(bytes, &name)?;
    Ok(text.strip_prefix('\u{feff}').map(String::from).unwrap_or(text))
}

/// Converts bytes to text. `name` says in errors where they come from.
///
/// # Errors
/// [`Error::Usage`] if they are not UTF-8.
pub fn utf8(bytes: Vec<u8>, name: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        Error::Usage(format!(
            "{name} is not UTF-8: byte {} is not part of a character",
            e.utf8_error().valid_up_to()
        ))
    })
}

/// One line of a file of prompts. Other fields are ignored.
#[derive(serde::Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    #[serde(default)]
    category: Value,
}

/// Reads the prompts of a JSON lines file, at least one. A line is an object, `{"prompt": TEXT}` or
/// `{"messages": [...]}`, and may have a `category`. Blank lines are skipped.
///
/// # Errors
/// As [`read`]; [`Error::Usage`] for a line that is not such an object, with its number, and for a file
/// without prompts.
pub fn lines(path: &Path) -> Result<Vec<Prompt>> {
    let text = read(path)?;
    let mut prompts = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let name = format!("{} line {number}", path.display());
        let expected = "expected {\"prompt\": TEXT} or {\"messages\": [...]}";
        let Line { prompt, messages, category } = serde_json::from_str(line).map_err(|e| {
            // Each line is parsed as a document of its own, so serde's "line 1" would mislead.
            let what = one_line(&e.to_string().replace(" at line 1 column ", " at column "));
            Error::Usage(format!("{name}: {what}: {expected}"))
        })?;
        let content = match (prompt, messages) {
            (Some(prompt), None) => Content::Text(prompt),
            (None, Some(messages)) => Content::Chat(messages),
            (Some(_), Some(_)) => {
                return Err(Error::Usage(format!("{name} has both prompt and messages: {expected}")));
            }
            (None, None) => {
                return Err(Error::Usage(format!("{name} has neither prompt nor messages: {expected}")));
            }
        };
        prompts.push(Prompt { name, content, category });
    }
    match prompts.is_empty() {
        true => Err(Error::Usage(format!("{} has no prompts", path.display()))),
        false => Ok(prompts),
    }
}

/// Converts prompts to token ids of a target.
pub struct PromptEncoder<'a> {
    /// The pair whose target the prompts are for.
    pub pair: &'a Pair,
    /// The target's tokenizer and chat template.
    pub text: &'a Text,
    /// Encode texts as they are, even if the model has a chat template.
    pub raw: bool,
    /// A system message to put before every conversation.
    pub system: Option<&'a str>,
    /// Variables for the chat template: (name, value).
    pub variables: &'a [(String, Value)],
    /// Maximum positions of a sequence, prompt and answer together.
    pub context: usize,
}

impl PromptEncoder<'_> {
    /// The prompt's token ids: at least one, fewer than the context, each below the target's vocabulary size.
    ///
    /// # Errors
    /// [`Error::Usage`] for a prompt that is empty, too long or refused by the template; [`Error::Option`]
    /// for messages without a template, with `raw`, or with a system message besides `system`;
    /// [`Error::Model`] for token ids that the target does not have.
    pub fn encode(&self, prompt: Prompt) -> Result<Vec<u32>> {
        let (name, ids) = (prompt.name.clone(), self.ids(prompt)?);
        let vocab = self.pair.target.config.vocab;
        if ids.is_empty() {
            return Err(Error::Usage(format!("{name} gives no tokens, expected at least one")));
        }
        if ids.len() >= self.context {
            return Err(Error::Usage(format!(
                "{name} has {} tokens, but the context holds {}, the answer included",
                ids.len(),
                self.context
            )));
        }
        match ids.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::Model(format!(
                "{name} holds token id {id}, but the target has {vocab} rows: its tokenizer belongs to another model"
            ))),
            None => Ok(ids),
        }
    }

    fn ids(&self, Prompt { name, content, .. }: Prompt) -> Result<Vec<u32>> {
        let named = |e: Error| match e {
            Error::Usage(what) => Error::Usage(format!("{name}: {what}")),
            other => other,
        };
        let mut messages = match content {
            Content::Tokens(ids) => return Ok(ids),
            Content::Text(prompt) if prompt.is_empty() => {
                return Err(Error::Usage(format!("{name} is empty, expected at least one token")));
            }
            Content::Text(prompt) if self.raw || !self.text.has_template() => {
                return self.text.encode(&prompt).map_err(named);
            }
            Content::Text(content) => vec![Message { role: "user".into(), content }],
            Content::Chat(_) if self.raw => {
                let problem = format!("is set, but {name} has messages, which need a chat template");
                return Err(Error::option("raw", problem));
            }
            Content::Chat(_) if !self.text.has_template() => {
                let folder = self.pair.target.folder.described();
                return Err(without_template(&format!("{name} has messages, which need"), &folder));
            }
            Content::Chat(messages) => messages,
        };
        if let Some(content) = self.system {
            if messages.iter().any(|m| m.role == "system") {
                let problem = format!("is set, but {name} has a system message of its own");
                return Err(Error::option("system", problem));
            }
            messages.insert(0, Message { role: "system".into(), content: content.into() });
        }
        self.text.encode_chat(&messages, None, self.variables).map_err(named)
    }
}

/// The [`Error::Option`] for an absent chat template. `folder` is the target's folder. `what_needs` is a
/// subject and the word "needs" or "need".
pub fn without_template(what_needs: &str, folder: &str) -> Error {
    Error::option("chat_template", format!("is absent and {folder} has none, but {what_needs} one"))
}
