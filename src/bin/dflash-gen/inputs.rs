//! Prompts: from the command line, a file, stdin or JSON lines to requests, each checked under its own name.

use crate::args::Args;
use dflash::checkpoint::pair::Pair;
use dflash::engine::generate::Request;
use dflash::spec::sampling::SamplingParams;
use dflash::text::prompts::{self, Content, Prompt, PromptEncoder, without_template};
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use serde_json::Value;
use std::io::{self, IsTerminal, Read};

fn prompts(args: &Args) -> Result<Vec<Prompt>> {
    let one = |name: &str, text| {
        Ok(vec![Prompt { name: name.into(), content: Content::Text(text), category: Value::Null }])
    };
    if let Some(prompt) = &args.prompt {
        return one("the prompt", prompt.clone());
    }
    if let Some(path) = &args.file {
        return one(&path.display().to_string(), prompts::read(path)?);
    }
    if let Some(path) = &args.prompts {
        return prompts::lines(path);
    }
    if io::stdin().is_terminal() {
        return Err(Error::Usage(
            "no prompt: expected PROMPT, -f FILE, --prompts FILE.jsonl, or text on stdin".into(),
        ));
    }
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(|e| Error::Usage(format!("stdin cannot be read: {e}")))?;
    one("stdin", prompts::utf8(bytes, "stdin")?)
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
    sampling: &SamplingParams,
    block: usize,
) -> Result<Vec<Request>> {
    text.stream(&args.stop)?;
    let variables = template_args(args)?;
    if !text.has_template() && (args.system.is_some() || !variables.is_empty()) {
        let flag = if args.system.is_some() { "--system" } else { "--template-arg" };
        return Err(without_template(&format!("{flag} needs"), &pair.target.folder.name()));
    }
    let (raw, system, context) = (args.raw, args.system.as_deref(), args.context(pair)?);
    let tokens = PromptEncoder { pair, text, raw, system, variables: &variables, context };
    let mut requests = Vec::new();
    for (stream, prompt) in (0..).zip(prompts(args)?) {
        let stop_ids = if args.ignore_eos { vec![] } else { pair.target.config.eos.clone() };
        let sampling = SamplingParams { stream, ..sampling.clone() };
        let (prompt, max_tokens, drafting) =
            (tokens.encode(prompt)?, args.max_tokens, args.drafts.drafting(&sampling)?);
        requests.push(Request { prompt, max_tokens, sampling, stop_ids, block, drafting });
    }
    Ok(requests)
}
