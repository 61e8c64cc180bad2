//! Prompts from files: JSON lines to token ids, each checked under the name it has in errors.

use crate::checkpoint::pair::Pair;
use crate::text::tokenizer::{Message, Text, one_line};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// What is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// What it goes by in errors.
    pub name: String,
    pub content: Content,
    /// The line's "category", of whatever form; null without one.
    pub category: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Text(String),
    Chat(Vec<Message>),
}

/// The text of a file that the user named. A byte order mark, which some editors write, is not part of it.
///
/// # Errors
/// [`Error::Usage`] where it cannot be read or is not UTF-8.
pub fn read(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| Error::Usage(format!("{name} cannot be read: {e}")))?;
    let text = utf8(bytes, &name)?;
    Ok(text.strip_prefix('\u{feff}').map(String::from).unwrap_or(text))
}

/// # Errors
/// [`Error::Usage`] where the bytes of `name` are not UTF-8.
pub fn utf8(bytes: Vec<u8>, name: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        Error::Usage(format!(
            "{name} is not UTF-8: byte {} is not part of a character",
            e.utf8_error().valid_up_to()
        ))
    })
}

/// One line of `--prompts`; other fields are other programs' business.
#[derive(serde::Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    #[serde(default)]
    category: Value,
}

/// The prompts of `--prompts FILE.jsonl`, at least one: a JSON object per line, `{"prompt": TEXT}` or
/// `{"messages": [...]}`; blank lines do not count.
///
/// # Errors
/// [`Error::Usage`] with the line that is no such object.
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
            // Each line is a document of its own, so "line 1" would mislead.
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
        true => Err(Error::Usage(format!("{} holds no prompt", path.display()))),
        false => Ok(prompts),
    }
}

/// How prompts become tokens of a target.
pub struct Tokens<'a> {
    pub pair: &'a Pair,
    pub text: &'a Text,
    /// Take prompts as they are, though the model has a chat template.
    pub raw: bool,
    /// Put before every conversation.
    pub system: Option<&'a str>,
    /// Of the chat template.
    pub variables: &'a [(String, Value)],
    /// Positions that a sequence may have, prompt and answer together.
    pub context: usize,
}

impl Tokens<'_> {
    /// The prompt's token ids: at least one, fewer than the context, each below the target's vocabulary.
    ///
    /// # Errors
    /// [`Error::Usage`] for a prompt that does not go with the template, is empty or too long; [`Error::Model`] for ids
    /// that the target does not have.
    pub fn of(&self, prompt: Prompt) -> Result<Vec<u32>> {
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
            Content::Text(prompt) if prompt.is_empty() => {
                return Err(Error::Usage(format!("{name} is empty, expected at least one token")));
            }
            Content::Text(prompt) if self.raw || !self.text.has_template() => {
                return self.text.encode(&prompt).map_err(named);
            }
            Content::Text(content) => vec![Message { role: "user".into(), content }],
            Content::Chat(_) if self.raw => {
                return Err(Error::Usage(format!(
                    "{name} has messages, which need a chat template, but --raw is given"
                )));
            }
            Content::Chat(_) if !self.text.has_template() => {
                let folder = self.pair.target.folder.name();
                return Err(without_template(&format!("{name} has messages, which need"), &folder));
            }
            Content::Chat(messages) => messages,
        };
        if let Some(content) = self.system {
            if messages.iter().any(|m| m.role == "system") {
                return Err(Error::Usage(format!("{name} has a system message, and --system gives another")));
            }
            messages.insert(0, Message { role: "system".into(), content: content.into() });
        }
        self.text.encode_chat(&messages, self.variables).map_err(named)
    }
}

/// [`Error::Usage`]: `who_needs` a chat template, which the target in `folder` does not have.
pub fn without_template(who_needs: &str, folder: &str) -> Error {
    Error::Usage(format!(
        "{who_needs} a chat template, and {folder} has none: --chat-template FILE gives one"
    ))
}
