//! Reads prompts from files and stdin: texts, and JSON lines of several kinds.

use crate::checkpoint::json::{self, Field, Fields};
use crate::error::{excerpt, one_line};
use crate::spec::sampling::SamplingParams;
use crate::text::message::{Message, as_usage, unknown};
use crate::text::prompts::{Content, Prompt, Settings};
use crate::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::io::Read;
use std::path::Path;

/// Maximum bytes of a text: far more than any context holds, and few enough to tokenise.
pub const LIMIT: usize = 128 << 20;

/// Reads a text file, or stdin if the path is `-`. A byte order mark at its start is dropped.
///
/// # Errors
/// [`Error::Usage`] if it cannot be read, is too large, or is not UTF-8.
pub fn read(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let most = LIMIT as u64 + 1;
    let read = match path.to_str() {
        Some("-") => std::io::stdin().take(most).read_to_end(&mut bytes),
        _ => std::fs::File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes)),
    };
    read.map_err(|e| Error::Usage(format!("{} cannot be read: {e}", name(path))))?;
    if bytes.len() > LIMIT {
        return Err(too_long(&name(path)));
    }
    utf8(bytes, &name(path))
}

/// The error for a text of more than [`LIMIT`] bytes.
pub fn too_long(name: &str) -> Error {
    Error::Usage(format!("{name} has more than {LIMIT} bytes, expected at most that"))
}

/// The name of a file in errors.
pub fn name(path: &Path) -> String {
    match path.to_str() {
        Some("-") => "stdin".into(),
        _ => path.display().to_string(),
    }
}

/// Converts bytes to text, without a byte order mark at its start. `name` says in errors where they come
/// from.
///
/// # Errors
/// [`Error::Usage`] if they are not UTF-8.
pub fn utf8(mut bytes: Vec<u8>, name: &str) -> Result<String> {
    let kind = json::other_kind(&bytes);
    let marked = bytes.len() - json::without_mark(&bytes).len();
    bytes.drain(..marked);
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to() + marked;
        Error::Usage(match kind {
            Some(kind) => format!("{name} is {kind}, expected UTF-8"),
            None => format!("{name} is not UTF-8: byte {at} is not part of a character"),
        })
    })
}

/// The prompts of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptFile {
    /// At least one prompt.
    pub prompts: Vec<Prompt>,
    /// Fields of a data set that do not change its prompts, such as reference answers; after 20 of them
    /// `...`.
    pub unused: Vec<String>,
}

/// What a line is expected to be.
const EXPECTED: &str =
    "expected {\"prompt\": TEXT}, {\"messages\": [...]}, {\"prompt_tokens\": [...]} or {\"turns\": [...]}";
/// Fields that hold a prompt. The last two are those of data sets.
const CONTENTS: [&str; 5] = ["prompt", "messages", "prompt_tokens", "turns", "conversations"];
/// Fields with the name of a prompt. A line has at most one of them.
const IDS: [&str; 3] = ["id", "question_id", "task_id"];
/// Most names of unused fields.
const SHOWN: usize = 20;
/// Other fields beside the prompt.
const OTHERS: [&str; 9] =
    ["tools", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "category"];

/// Reads the prompts of a file, or of stdin if the path is `-`: one JSON object per line, or one list of
/// objects. Blank lines are skipped.
///
/// An object has one of `prompt` (a text), `messages` (a conversation of [`Message`]s), `prompt_tokens`
/// (token ids), `turns` (a list of texts, which the user says in turn) and `conversations` (of ShareGPT:
/// `{"from": "human", "value": TEXT}`, perhaps beside `system`), or the field `key`, whose value may be any
/// of these. The answer at the end of a ShareGPT conversation is left out. The fields of [`Settings`],
/// `tools`, `id` (or `question_id`) and `category` may stand beside it. An object with `turns`,
/// `conversations` or `key` may have other fields, which are returned as unused.
///
/// # Errors
/// As [`read`]; [`Error::Usage`] for an object that is not as described, with its number, and for a file
/// without prompts.
pub fn lines(path: &Path, key: Option<&str>) -> Result<PromptFile> {
    let (text, file) = (read(path)?, name(path));
    if let Some(what) = json::other_kind(text.as_bytes()) {
        return Err(Error::Usage(format!("{file} is {what}, expected JSON lines")));
    }
    let one_line = |e: serde_json::Error| one_line(&e.to_string());
    let mut all = PromptFile { prompts: Vec::new(), unused: Vec::new() };
    if text.trim_start().starts_with('[') {
        let items: Vec<Object> = serde_json::from_str(&text)
            .map_err(|e| Error::Usage(format!("{file}: {}: {EXPECTED}", one_line(e))))?;
        for (number, Object(map)) in (1..).zip(items) {
            all.add(format!("{file} item {number}"), &map, key)?;
        }
    } else {
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let name = format!("{file} line {number}");
            let Object(map) = serde_json::from_str(line).map_err(|e| {
                // Each line is parsed as a document of its own, so serde's "line 1" would mislead.
                let what = one_line(e).replace(" at line 1 column ", " at column ");
                Error::Usage(format!("{name}: {what}: {EXPECTED}"))
            })?;
            all.add(name, &map, key)?;
        }
    }
    match all.prompts.is_empty() {
        true => Err(Error::Usage(format!("{file} has no prompts"))),
        false => Ok(all),
    }
}

impl PromptFile {
    fn add(&mut self, name: String, map: &Map<String, Value>, given: Option<&str>) -> Result<()> {
        let fields = Fields { file: &name, prefix: "", map };
        let present = |key: &&str| fields.get(key).is_some();
        let of = |keys: &'static [&'static str]| keys.iter().copied().filter(present).collect::<Vec<_>>();
        let two = |first: &str, second: &str| {
            Err(Error::Usage(format!("{name} has both {first} and {second}: {EXPECTED}")))
        };
        let key: &str = match (given, &of(&CONTENTS)[..]) {
            (Some(key), _) if !present(&key) => {
                return Err(Error::option("prompt_key", format!("is {key:?}, which {name} does not have")));
            }
            (Some(key), _) | (None, &[key]) => key,
            (None, []) => {
                let other = "or another field that `prompt_key` names";
                return Err(Error::Usage(format!(
                    "{name} has neither prompt nor messages: {EXPECTED}, {other}"
                )));
            }
            (None, [first, second, ..]) => return two(first, second),
        };
        let id = match of(&IDS)[..] {
            [] => Value::Null,
            [id] => map[id].clone(),
            [first, second, ..] => return two(first, second),
        };
        let known = [&[key][..], &IDS, &OTHERS].concat();
        for (other, value) in map {
            let field = Field { file: &name, name: other.clone(), value };
            match value {
                Value::Null => (),
                _ if known.contains(&other.as_str()) => (),
                _ if (key, &other[..]) == ("conversations", "system") => (),
                _ if given.is_none() && CONTENTS[..3].contains(&key) => {
                    return Err(unknown(&field, &known.join(", ")));
                }
                _ if self.unused.len() > SHOWN || self.unused.contains(&excerpt(other)) => (),
                _ if self.unused.len() == SHOWN => self.unused.push("...".into()),
                _ => self.unused.push(excerpt(other)),
            }
        }
        let category = map.get("category").cloned().unwrap_or_default();
        let (mut content, turns) =
            fields.need(key).and_then(|field| content(key, &field)).map_err(as_usage)?;
        if let (Some(system), Content::Chat(messages), "conversations") =
            (fields.get("system").filter(|field| !field.is_neutral("")), &mut content, key)
        {
            messages.insert(0, Message::new("system", system.string().map_err(as_usage)?));
        }
        let tools = tools(&fields).map_err(as_usage)?;
        let settings = settings(&fields).map_err(as_usage)?;
        self.prompts.push(Prompt { name, content, turns, tools, settings, id, category });
        Ok(())
    }
}

/// The content of a prompt and its later turns. A key that is no field of [`CONTENTS`] may hold any of them.
fn content(key: &str, field: &Field) -> Result<(Content, Vec<String>)> {
    let form = match field.value.as_array().map(|list| list.first()) {
        _ if CONTENTS.contains(&key) => key,
        None => "prompt",
        Some(Some(Value::Number(_))) => "prompt_tokens",
        Some(Some(Value::String(_))) => "turns",
        Some(_) => "conversations",
    };
    let messages = match form {
        "prompt" => return Ok((field.string()?.into(), Vec::new())),
        "prompt_tokens" => {
            let id = |id: &Field| Ok(id.integer(0, u32::MAX as usize)? as u32);
            return Ok((list(field, id)?.into(), Vec::new()));
        }
        "turns" => {
            let mut turns = list(field, |turn| Ok(turn.string()?.to_string()))?.into_iter();
            let first = turns.next().ok_or_else(|| field.wrong("at least one turn"))?;
            return Ok(match turns.len() {
                0 => (first.into(), Vec::new()),
                _ => (vec![Message::new("user", first)].into(), turns.collect()),
            });
        }
        "messages" => list(field, Message::parse)?,
        _ => {
            let is_sharegpt = |message: &Field| message.value.get("from").is_some();
            let mut messages = list(field, |message| match is_sharegpt(message) {
                true => Message::parse_sharegpt(message),
                false => Message::parse(message),
            })?;
            if field.array()?.iter().any(is_sharegpt) {
                let asked = messages.iter().rposition(|message| message.role() != "assistant");
                messages.truncate(asked.map_or(0, |last| last + 1));
            }
            messages
        }
    };
    match messages.is_empty() {
        true => Err(field.wrong("at least one message to answer")),
        false => Ok((messages.into(), Vec::new())),
    }
}

fn list<T>(field: &Field, item: impl Fn(&Field) -> Result<T>) -> Result<Vec<T>> {
    field.array()?.iter().map(item).collect()
}

fn tools(fields: &Fields) -> Result<Option<Value>> {
    let Some(field) = fields.get("tools").filter(|field| !field.is_neutral("") || field.value.is_object())
    else {
        return Ok(None);
    };
    // ShareGPT has them as JSON in a text.
    let parsed = field.value.as_str().and_then(|text| serde_json::from_str(text).ok());
    let field = Field { value: parsed.as_ref().unwrap_or(field.value), ..field };
    for tool in field.array()? {
        tool.object("")?;
    }
    Ok(Some(field.value.clone()).filter(|_| !field.is_neutral("")))
}

fn settings(fields: &Fields) -> Result<Settings> {
    let whole = |name: &str| fields.get(name).map(|field| field.integer(0, usize::MAX)).transpose();
    let number = |name: &str| fields.get(name).map(|field| field.number("a number", |_| true)).transpose();
    let stop = |field: Field| {
        let stops = match field.value {
            Value::String(stop) => vec![stop.clone()],
            _ => list(&field, |stop| Ok(stop.string()?.to_string()))?,
        };
        match stops.iter().any(String::is_empty) {
            true => Err(field.wrong("texts of at least one character")),
            false => Ok(stops),
        }
    };
    let settings = Settings {
        max_tokens: whole("max_tokens")?,
        temperature: number("temperature")?.map(|temperature| temperature as f32),
        top_k: whole("top_k")?,
        top_p: number("top_p")?,
        min_p: number("min_p")?,
        seed: whole("seed")?.map(|seed| seed as u64),
        stop: fields.get("stop").map(stop).transpose()?,
    };
    settings.sampling(SamplingParams::default()).check().map_err(|e| match e {
        Error::Option { name, problem } => Error::Usage(format!("{}: {name} {problem}", fields.file)),
        other => other,
    })?;
    Ok(settings)
}

/// A JSON object without repeated fields.
struct Object(Map<String, Value>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Object, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> std::result::Result<Object, A::Error> {
                let mut map = Map::new();
                while let Some((name, value)) = from.next_entry::<String, Value>()? {
                    if map.contains_key(&name) {
                        return Err(A::Error::custom(format!("duplicate field `{name}`")));
                    }
                    map.insert(name, value);
                }
                Ok(Object(map))
            }
        }
        from.deserialize_map(Fields)
    }
}
