//! Prompts: from the command line, a file, stdin or JSON lines to requests, each checked under its own name.

use crate::args::Args;
use dflash::engine::Request;
use dflash::pair::Pair;
use dflash::text::{Message, Text, one_line};
use dflash::verify::Sampling;
use dflash::{Error, Result};
use serde_json::Value;
use std::io::{self, IsTerminal, Read};
use std::path::Path;

/// The text of a file that the user named. A byte order mark, which some editors write, is not part of it.
pub fn read(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| Error::Usage(format!("{name} cannot be read: {e}")))?;
    let text = utf8(bytes, &name)?;
    Ok(text.strip_prefix('\u{feff}').map(String::from).unwrap_or(text))
}

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
}

enum Prompt {
    Text(String),
    Chat(Vec<Message>),
}

/// Every prompt with the name it goes by in errors.
fn prompts(args: &Args) -> Result<Vec<(String, Prompt)>> {
    let one = |name: &str, text| Ok(vec![(name.to_string(), Prompt::Text(text))]);
    if let Some(prompt) = &args.prompt {
        return one("the prompt", prompt.clone());
    }
    if let Some(path) = &args.file {
        return one(&path.display().to_string(), read(path)?);
    }
    let Some(path) = &args.prompts else {
        if io::stdin().is_terminal() {
            return Err(Error::Usage(
                "no prompt: expected PROMPT, -f FILE, --prompts FILE.jsonl, or text on stdin".into(),
            ));
        }
        let mut bytes = Vec::new();
        io::stdin()
            .read_to_end(&mut bytes)
            .map_err(|e| Error::Usage(format!("stdin cannot be read: {e}")))?;
        return one("stdin", utf8(bytes, "stdin")?);
    };
    let text = read(path)?;
    let mut prompts = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let name = format!("{} line {number}", path.display());
        let expected = "expected {\"prompt\": TEXT} or {\"messages\": [...]}";
        let line: Line = serde_json::from_str(line).map_err(|e| {
            // Each line is a document of its own, so "line 1" would mislead.
            let what = one_line(&e.to_string().replace(" at line 1 column ", " at column "));
            Error::Usage(format!("{name}: {what}: {expected}"))
        })?;
        prompts.push(match (line.prompt, line.messages) {
            (Some(prompt), None) => (name, Prompt::Text(prompt)),
            (None, Some(messages)) => (name, Prompt::Chat(messages)),
            (Some(_), Some(_)) => {
                return Err(Error::Usage(format!("{name} has both prompt and messages: {expected}")));
            }
            (None, None) => {
                return Err(Error::Usage(format!("{name} has neither prompt nor messages: {expected}")));
            }
        });
    }
    match prompts.is_empty() {
        true => Err(Error::Usage(format!("{} holds no prompt", path.display()))),
        false => Ok(prompts),
    }
}

/// `--template-arg`: the value is JSON if it parses as such, else text.
pub fn template_args(args: &Args) -> Result<Vec<(String, Value)>> {
    let pair = |arg: &String| match arg.split_once('=') {
        Some((name, value)) if !name.is_empty() => {
            Ok((name.to_string(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
        }
        _ => Err(Error::Usage(format!("--template-arg is {arg:?}, expected NAME=VALUE"))),
    };
    args.template_arg.iter().map(pair).collect()
}

/// Everything that can be wrong with any prompt is found before the first one runs.
pub fn requests(
    args: &Args,
    pair: &Pair,
    text: &Text,
    sampling: &Sampling,
    block: usize,
) -> Result<Vec<Request>> {
    text.stream(&args.stop)?;
    let folder = pair.target.folder.name();
    let variables = template_args(args)?;
    if !text.has_template() && (args.system.is_some() || !variables.is_empty()) {
        let flag = if args.system.is_some() { "--system" } else { "--template-arg" };
        return Err(without_template(&format!("{flag} needs"), &folder));
    }
    let (context, vocab) = (args.context(pair)?, pair.target.config.vocab);
    let mut requests = Vec::new();
    for (stream, (name, prompt)) in (0..).zip(prompts(args)?) {
        let ids = ids(args, text, &folder, &variables, &name, prompt)?;
        if ids.is_empty() {
            return Err(Error::Usage(format!("{name} gives no tokens, expected at least one")));
        }
        if ids.len() >= context {
            return Err(Error::Usage(format!(
                "{name} has {} tokens, but the context holds {context}, the answer included",
                ids.len()
            )));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Model(format!(
                "{name} holds token id {id}, but the target has {vocab} rows: its tokenizer belongs to another model"
            )));
        }
        let stop_ids = if args.ignore_eos { vec![] } else { pair.target.config.eos.clone() };
        let sampling = Sampling { stream, ..sampling.clone() };
        let (max_tokens, drafting) = (args.max_tokens, args.drafting(&sampling)?);
        requests.push(Request { prompt: ids, max_tokens, sampling, stop_ids, block, drafting });
    }
    Ok(requests)
}

pub fn without_template(who_needs: &str, folder: &str) -> Error {
    Error::Usage(format!(
        "{who_needs} a chat template, and {folder} has none: --chat-template FILE gives one"
    ))
}

/// One prompt's tokens.
fn ids(
    args: &Args,
    text: &Text,
    folder: &str,
    variables: &[(String, Value)],
    name: &str,
    prompt: Prompt,
) -> Result<Vec<u32>> {
    let named = |e: Error| match e {
        Error::Usage(what) => Error::Usage(format!("{name}: {what}")),
        other => other,
    };
    let mut messages = match prompt {
        Prompt::Text(prompt) if prompt.is_empty() => {
            return Err(Error::Usage(format!("{name} is empty, expected at least one token")));
        }
        Prompt::Text(prompt) if args.raw || !text.has_template() => {
            return text.encode(&prompt).map_err(named);
        }
        Prompt::Text(content) => vec![Message { role: "user".into(), content }],
        Prompt::Chat(_) if args.raw => {
            return Err(Error::Usage(format!(
                "{name} has messages, which need a chat template, but --raw is given"
            )));
        }
        Prompt::Chat(_) if !text.has_template() => {
            return Err(without_template(&format!("{name} has messages, which need"), folder));
        }
        Prompt::Chat(messages) => messages,
    };
    if let Some(content) = &args.system {
        if messages.iter().any(|m| m.role == "system") {
            return Err(Error::Usage(format!("{name} has a system message, and --system gives another")));
        }
        messages.insert(0, Message { role: "system".into(), content: content.clone() });
    }
    text.encode_chat(&messages, variables).map_err(named)
}
