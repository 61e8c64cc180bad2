//! One turn of a conversation, in the form of OpenAI's API and of chat templates.

use crate::checkpoint::json::Field;
use crate::error::excerpt;
use crate::{Error, Result};
use serde_json::{Map, Value};

/// One turn of a conversation, as chat templates read it: a JSON object with a `role`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

/// Fields of a message that hold a text and go to the template as they are.
const TEXTS: [&str; 5] = ["name", "tool_call_id", "reasoning_content", "thinking", "reasoning"];
/// Names of the reasoning before an answer. The first one that a message has counts.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Message {
    /// A message with a text. `role`: `system`, `user`, `assistant`, or another role that the template
    /// supports.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        let fields = [("role", role.into()), ("content", Value::String(content.into()))];
        Message(fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect())
    }

    /// Its role.
    pub fn role(&self) -> &str {
        self.0["role"].as_str().unwrap_or_default()
    }

    /// A message of an OpenAI history. `name` is its name in errors.
    ///
    /// `content` is a text, a list of text parts, which are joined by line breaks, or null or absent beside
    /// `tool_calls`. The arguments of a call may be JSON in a text, as in the API; templates expect the
    /// object. Other fields: `name`, `tool_call_id`, and the reasoning before an answer as
    /// `reasoning_content`, `thinking` or `reasoning`. As in Hugging Face, templates find the reasoning under
    /// the first two names, and fields that are null are dropped. Unknown fields are dropped if they are
    /// empty.
    ///
    /// # Errors
    /// [`Error::Usage`] for a value that is not such an object.
    pub fn from_json(name: &str, value: &Value) -> Result<Message> {
        Message::parse(&Field { file: name, name: "the message".into(), value })
    }

    /// As [`Message::from_json`].
    pub(crate) fn parse(field: &Field) -> Result<Message> {
        Message::read(field).map_err(as_usage)
    }

    fn read(field: &Field) -> Result<Message> {
        let prefix = format!("{}.", field.name);
        let fields = field.object(&prefix)?;
        let mut message = Map::new();
        fields.need("role")?.string()?;
        let calls = fields.get("tool_calls").filter(|calls| !calls.is_neutral(""));
        if calls.is_none() {
            fields.need("content")?;
        }
        for (name, value) in fields.map {
            let field = Field { file: fields.file, name: format!("{prefix}{name}"), value };
            let value = match name.as_str() {
                _ if value.is_null() => continue,
                "role" => value.clone(),
                "content" => text(&field)?.into(),
                "tool_calls" => field.array()?.iter().map(call).collect::<Result<Vec<_>>>()?.into(),
                name if TEXTS.contains(&name) => field.string()?.into(),
                _ if field.is_neutral("") => continue,
                _ => {
                    let known = format!("role, content, tool_calls, {}", TEXTS.join(", "));
                    return Err(unknown(&field, &known));
                }
            };
            message.insert(name.clone(), value);
        }
        if let Some(reasoning) = REASONING.iter().find_map(|name| message.get(*name)).cloned() {
            message.entry("thinking").or_insert_with(|| reasoning.clone());
            message.insert("reasoning_content".into(), reasoning);
        }
        Ok(Message(message))
    }

    /// A message of a ShareGPT conversation: `{"from": "human", "value": TEXT}`.
    pub(crate) fn parse_sharegpt(field: &Field) -> Result<Message> {
        let prefix = format!("{}.", field.name);
        let fields = field.object(&prefix)?;
        let from = fields.need("from")?;
        let role = match from.string()? {
            "human" | "user" => "user",
            "gpt" | "chatgpt" | "assistant" | "model" | "bing" | "bard" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            _ => return Err(from.wrong("human, gpt, system or tool")),
        };
        Ok(Message::new(role, fields.need("value")?.string()?))
    }
}

/// The text of a `content`: a text, or the texts of its parts.
fn text(field: &Field) -> Result<String> {
    if field.value.is_string() {
        return Ok(field.string()?.into());
    }
    let parts = field.array().map_err(|_| field.wrong("a text or a list of text parts"))?;
    let part = |part: Field| {
        let prefix = format!("{}.", part.name);
        let fields = part.object(&prefix)?;
        match fields.need("type")? {
            kind if kind.value == "text" => Ok(fields.need("text")?.string()?.to_string()),
            kind => Err(kind.wrong("\"text\": this engine reads no other content")),
        }
    };
    Ok(parts.into_iter().map(part).collect::<Result<Vec<_>>>()?.join("\n"))
}

/// A call of a tool, with its arguments as an object.
fn call(field: &Field) -> Result<Value> {
    field.object("")?;
    let mut call = field.value.clone();
    for at in ["/arguments", "/function/arguments"] {
        if let Some(arguments) = call.pointer_mut(at)
            && let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str)
        {
            *arguments = object;
        }
    }
    Ok(call)
}

/// The error for a field that nothing reads.
pub(crate) fn unknown(field: &Field, known: &str) -> Error {
    Error::Usage(format!("{}: {} is not a known field, expected {known}", field.file, excerpt(&field.name)))
}

/// Faults of input are [`Error::Usage`], although the readers of fields are made for model files.
pub(crate) fn as_usage(error: Error) -> Error {
    match error {
        Error::Model(what) => Error::Usage(what),
        other => other,
    }
}
