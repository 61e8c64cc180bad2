//! Converts prompts (texts, conversations, token ids) to checked token ids. Every prompt has a name, which
//! errors use.

use crate::checkpoint::pair::Pair;
use crate::spec::sampling::SamplingParams;
use crate::text::message::Message;
use crate::text::tokenizer::Text;
use crate::{Error, Result};
use serde_json::Value;

/// One prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Its name in errors, such as `the prompt` or `FILE line 3`.
    pub name: String,
    /// Its text, conversation or token ids.
    pub content: Content,
    /// What the user says after each answer, of a prompt with several turns. The content is then the
    /// conversation up to the first answer.
    pub turns: Vec<String>,
    /// Tools for the chat template, a JSON list.
    pub tools: Option<Value>,
    /// Settings of its own.
    pub settings: Settings,
    /// The `id` field of its line, any JSON value; null without one.
    pub id: Value,
    /// The `category` field of its line, any JSON value; null without one.
    pub category: Value,
}

impl Prompt {
    /// A prompt without settings of its own.
    pub fn new(name: impl Into<String>, content: impl Into<Content>) -> Prompt {
        Prompt {
            name: name.into(),
            content: content.into(),
            turns: Vec::new(),
            tools: None,
            settings: Settings::default(),
            id: Value::Null,
            category: Value::Null,
        }
    }
}

/// Settings of one prompt, which replace those of the run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Settings {
    /// Maximum tokens of the answer.
    pub max_tokens: Option<usize>,
    /// As [`SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// As [`SamplingParams::top_k`].
    pub top_k: Option<usize>,
    /// As [`SamplingParams::top_p`].
    pub top_p: Option<f64>,
    /// As [`SamplingParams::min_p`].
    pub min_p: Option<f64>,
    /// As [`SamplingParams::seed`].
    pub seed: Option<u64>,
    /// Stop strings.
    pub stop: Option<Vec<String>>,
}

impl Settings {
    /// `sampling` with the settings of the prompt. A seed of its own makes the random numbers independent of
    /// the prompt's place in the run.
    pub fn sampling(&self, sampling: SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(sampling.temperature),
            top_k: self.top_k.unwrap_or(sampling.top_k),
            top_p: self.top_p.unwrap_or(sampling.top_p),
            min_p: self.min_p.unwrap_or(sampling.min_p),
            seed: self.seed.unwrap_or(sampling.seed),
            stream: if self.seed.is_some() { 0 } else { sampling.stream },
        }
    }
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

/// Converts prompts to token ids of a target.
pub struct PromptEncoder<'a> {
    /// The pair whose target the prompts are for.
    pub pair: &'a Pair,
    /// The target's tokenizer and chat template. Without them only prompts of token ids can be encoded.
    pub text: Option<&'a Text>,
    /// Encode texts as they are, even if the model has a chat template.
    pub raw: bool,
    /// A system message to put before every conversation. One without text is none.
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
    /// [`Error::Usage`] for a prompt that is empty, too long or refused by the template, and for given token
    /// ids that the target does not have; [`Error::Option`] for messages without a template, with `raw`, or
    /// with a system message besides `system`; [`Error::Model`] for a tokenizer that is absent or has token
    /// ids that the target does not have.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let (name, ids) = (&prompt.name, self.ids(prompt)?);
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
            Some(id) if matches!(prompt.content, Content::Tokens(_)) => Err(Error::Usage(format!(
                "{name} holds token id {id}, expected ids from 0 to {}, which the target has",
                vocab - 1
            ))),
            Some(id) => Err(Error::Model(format!(
                "{name} holds token id {id}, but the target has {vocab} rows: its tokenizer belongs to another model"
            ))),
            None => Ok(ids),
        }
    }

    fn ids(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let Prompt { name, content, tools, .. } = prompt;
        let named = |e: Error| match e {
            Error::Usage(what) => Error::Usage(format!("{name}: {what}")),
            other => other,
        };
        let system = self.system.filter(|text| !text.trim().is_empty());
        if let Content::Tokens(ids) = content {
            let unused = match () {
                _ if tools.is_some() => {
                    return Err(Error::Usage(format!("{name} has token ids and tools, {AS_THEY_ARE}")));
                }
                _ if system.is_some() => "system",
                _ if !self.variables.is_empty() => "template_arg",
                _ => return Ok(ids.clone()),
            };
            return Err(Error::option(unused, format!("is set, but {name} has token ids, {AS_THEY_ARE}")));
        }
        let folder = &self.pair.target.folder;
        let text = self.text.ok_or_else(|| Text::missing(folder))?;
        // Conversations and tools are for the template.
        let needs = match (content, tools) {
            (_, Some(_)) => Some("tools"),
            (Content::Chat(_), _) if prompt.turns.is_empty() => Some("messages"),
            (Content::Chat(_), _) => Some("turns"),
            _ => None,
        };
        match needs {
            Some(what) if self.raw => {
                let problem = format!("is set, but {name} has {what}, which need a chat template");
                return Err(Error::option("raw", problem));
            }
            Some(what) if !text.has_template() => {
                return Err(without_template(&format!("{name} has {what}, which need"), &folder.described()));
            }
            _ => (),
        }
        let mut messages = match content {
            Content::Text(prompt) if prompt.is_empty() => {
                return Err(Error::Usage(format!("{name} is empty, expected at least one token")));
            }
            Content::Text(prompt) if self.raw || !text.has_template() => {
                return text.encode(prompt).map_err(named);
            }
            Content::Text(content) => vec![Message::new("user", content)],
            Content::Chat(messages) => messages.clone(),
            Content::Tokens(ids) => return Ok(ids.clone()),
        };
        if let Some(content) = system {
            if messages.iter().any(|m| m.role() == "system") {
                let problem = format!("is set, but {name} has a system message of its own");
                return Err(Error::option("system", problem));
            }
            messages.insert(0, Message::new("system", content));
        }
        text.encode_chat(&messages, tools.as_ref(), self.variables).map_err(named)
    }
}

/// Why nothing else can be combined with token ids.
const AS_THEY_ARE: &str = "which are used as they are, without a chat template";

/// The [`Error::Option`] for an absent chat template. `folder` is the target's folder. `what_needs` is a
/// subject and the word "needs" or "need".
pub fn without_template(what_needs: &str, folder: &str) -> Error {
    Error::option("chat_template", format!("is absent and {folder} has none, but {what_needs} one"))
}
