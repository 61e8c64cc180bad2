//! Prompts from the command line, a file, stdin or JSON lines, as requests. Each is checked under its own
//! name.

use crate::job::{Job, Source};
use dflash::checkpoint::pair::Pair;
use dflash::engine::request::Request;
use dflash::spec::sampling::SamplingParams;
use dflash::text::prompts::{self, Content, Prompt, PromptEncoder, without_template};
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use serde_json::Value;
use std::io::{self, IsTerminal, Read};

fn prompts(source: &Source) -> Result<Vec<Prompt>> {
    let one = |name: &str, text| {
        Ok(vec![Prompt { name: name.into(), content: Content::Text(text), category: Value::Null }])
    };
    match source {
        Source::Text(prompt) => one("the prompt", prompt.clone()),
        Source::File(path) => one(&path.display().to_string(), prompts::read(path)?),
        Source::Lines(path) => prompts::lines(path),
        Source::Stdin if io::stdin().is_terminal() => Err(Error::Usage(
            "no prompt: expected PROMPT, -f FILE, --prompts FILE.jsonl, or text on stdin".into(),
        )),
        Source::Stdin => {
            let mut bytes = Vec::new();
            let read = io::stdin().read_to_end(&mut bytes);
            read.map_err(|e| Error::Usage(format!("stdin cannot be read: {e}")))?;
            one("stdin", prompts::utf8(bytes, "stdin")?)
        }
    }
}

/// The requests of all prompts. Everything that can be wrong with any of them is found before the first one
/// runs.
pub fn requests(job: &Job, pair: &Pair, text: &Text, block: usize) -> Result<Vec<Request>> {
    text.stream(&job.stop)?;
    if !text.has_template() && (job.system.is_some() || !job.variables.is_empty()) {
        let flag = if job.system.is_some() { "--system" } else { "--template-arg" };
        return Err(without_template(&format!("{flag} needs"), &pair.target.folder.described()));
    }
    let (raw, system, context) = (job.raw, job.system.as_deref(), job.context(pair)?);
    let stop_ids = job.stop_ids(pair, text)?.ids();
    let tokens = PromptEncoder { pair, text, raw, system, variables: &job.variables, context };
    let request = |(stream, prompt): (u32, Prompt)| {
        let sampling = SamplingParams { stream, ..job.sampling.clone() };
        Ok(job.request(tokens.encode(prompt)?, sampling, block, stop_ids.clone()))
    };
    (0..).zip(prompts(&job.source)?).map(request).collect()
}
