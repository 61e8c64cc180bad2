//! Prompts from the command line, a file, stdin or JSON lines, as requests. Each is checked under its own
//! name.

use crate::job::{Action, Job, Source};
use crate::note;
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::stop_ids::StopIds;
use dflash::engine::request::Request;
use dflash::spec::sampling::SamplingParams;
use dflash::text::message::Message;
use dflash::text::prompt_files;
use dflash::text::prompts::{Content, Prompt, PromptEncoder, without_template};
use dflash::text::tokenizer::{self, Stream, Text};
use dflash::{Error, Result};
use serde_json::Value;
use std::io::{self, IsTerminal};
use std::path::Path;

fn prompts(job: &Job) -> Result<Vec<Prompt>> {
    let file = |path| Ok(vec![Prompt::new(prompt_files::name(path), prompt_files::read(path)?)]);
    match &job.source {
        Source::Text(prompt) => Ok(vec![Prompt::new("the prompt", prompt.clone())]),
        Source::File(path) => file(path),
        Source::Lines(path) => {
            let lines = prompt_files::lines(path, job.prompt_key.as_deref())?;
            if !lines.unused.is_empty() && !job.quiet {
                let (file, fields) = (prompt_files::name(path), lines.unused.join(", "));
                note(&format!("{file}: these fields are not used: {fields}"));
            }
            Ok(lines.prompts)
        }
        Source::Stdin if io::stdin().is_terminal() => Err(Error::Usage(
            "no prompt: expected PROMPT, -f FILE, --prompts FILE.jsonl, or text on stdin".into(),
        )),
        Source::Stdin => file(Path::new("-")),
    }
}

/// What all requests of a run share.
pub struct Inputs<'a> {
    pub job: &'a Job,
    pub pair: &'a Pair,
    /// The tokenizer and chat template; `None` if the target has none.
    pub text: Option<&'a Text>,
    pub block: usize,
}

/// A request, and what the output says of its prompt.
pub struct Task {
    pub request: Request,
    pub stop: Vec<String>,
    pub prompt: Prompt,
    /// Index of the prompt in the run.
    pub index: usize,
    /// Which turn of its prompt it is, from 1; `None` for prompts without turns.
    pub turn: Option<usize>,
}

impl<'a> Inputs<'a> {
    /// The requests of all prompts, of their first turns, and the most positions that one of them or a later
    /// turn needs. Everything that can be wrong with any of them is found before the first one runs, except
    /// that the answers may leave later turns too little of the context.
    pub fn tasks(&self) -> Result<(Vec<Task>, usize)> {
        let job = self.job;
        if let Some(text) = self.text
            && !text.has_template()
            && (job.system.is_some() || !job.variables.is_empty())
        {
            let flag = if job.system.is_some() { "--system" } else { "--template-arg" };
            return Err(without_template(&format!("{flag} needs"), &self.pair.target.folder.described()));
        }
        self.stream(&job.stop)?;
        let (mut tasks, mut longest) = (Vec::new(), 0);
        for (index, prompt) in prompts(job)?.into_iter().enumerate() {
            if !prompt.turns.is_empty() && job.batch > 1 {
                return Err(Error::Usage(format!(
                    "--batch is {}, but {} has turns, which run one after another: expected 1",
                    job.batch, prompt.name
                )));
            }
            let turns = prompt.turns.len() + 1;
            let task = self.task(prompt, index, (turns > 1).then_some(1))?;
            let mut positions = task.request.positions();
            if turns > 1 {
                // Each answer is at most as long as a request allows.
                let mut whole = task.prompt.clone();
                let later = std::mem::take(&mut whole.turns);
                later.into_iter().for_each(|turn| add_turn(&mut whole, "", turn));
                let prompt = self.encoder()?.encode(&whole)?;
                let max_tokens = task.request.max_tokens.saturating_mul(turns);
                positions = Request { prompt, max_tokens, ..task.request.clone() }.positions();
            }
            longest = longest.max(positions);
            tasks.push(task);
        }
        Ok((tasks, longest))
    }

    /// The next turn of the task's prompt, after the answer `tokens`; `None` after the last one.
    pub fn next_turn(&self, task: &Task, tokens: &[u32]) -> Result<Option<Task>> {
        if task.prompt.turns.is_empty() {
            return Ok(None);
        }
        let (mut prompt, mut answer) = (task.prompt.clone(), String::new());
        if let Some(mut stream) = self.stream(&task.stop)? {
            for id in tokens {
                answer += &stream.push(*id)?.0;
            }
            answer += &stream.finish();
        }
        let turn = prompt.turns.remove(0);
        add_turn(&mut prompt, &answer, turn);
        self.task(prompt, task.index, task.turn.map(|turn| turn + 1)).map(Some)
    }

    /// A detokenizer for an answer; `None` without a tokenizer.
    pub fn stream(&self, stop: &[String]) -> Result<Option<Stream<'a>>> {
        tokenizer::stream(self.text, stop, &self.pair.target.folder)
    }

    /// The token ids that end an answer with these stop strings.
    pub fn stop_ids(&self, stop: &[String]) -> Result<StopIds> {
        self.job.stop_flags.ids(&self.pair.target.config, self.text, stop)
    }

    fn encoder(&self) -> Result<PromptEncoder<'a>> {
        let Inputs { job, pair, text, .. } = *self;
        let (raw, system, context) = (job.raw, job.system.as_deref(), job.context(pair)?);
        Ok(PromptEncoder { pair, text, raw, system, variables: &job.variables, context })
    }

    fn task(&self, prompt: Prompt, index: usize, turn: Option<usize>) -> Result<Task> {
        let (job, settings) = (self.job, &prompt.settings);
        let stream = u32::try_from(index).map_err(|_| Error::Usage("there are too many prompts".into()))?;
        let sampling = settings.sampling(SamplingParams { stream, ..job.sampling.clone() });
        let stop = settings.stop.clone().unwrap_or_else(|| job.stop.clone());
        self.stream(&stop).map_err(|e| match e {
            Error::Option { problem, .. } if settings.stop.is_some() => {
                Error::Usage(format!("{}: stop {problem}", prompt.name))
            }
            other => other,
        })?;
        let stop_ids = self.stop_ids(&stop)?.ids();
        let request = job.request(self.encoder()?.encode(&prompt)?, sampling, self.block, stop_ids);
        let request = Request { max_tokens: settings.max_tokens.unwrap_or(job.max_tokens), ..request };
        let least = match job.action {
            Action::Compare => ("--compare", 1),
            Action::CheckLossless => ("--check-lossless", 2),
            _ => ("", 0),
        };
        if request.max_tokens < least.1 {
            return Err(Error::Usage(format!(
                "{}: max_tokens is {}, but {} expects at least {}",
                prompt.name, request.max_tokens, least.0, least.1
            )));
        }
        Ok(Task { request, stop, prompt, index, turn })
    }
}

/// Appends an answer and the user's next turn to the conversation of a prompt.
fn add_turn(prompt: &mut Prompt, answer: &str, turn: String) {
    if let Content::Chat(messages) = &mut prompt.content {
        messages.extend([Message::new("assistant", answer), Message::new("user", turn)]);
    }
}

impl Task {
    /// Its name in tables: the number of its prompt, and of its turn.
    pub fn label(&self) -> String {
        let turn = self.turn.map_or(String::new(), |turn| format!(".{turn}"));
        format!("{}{turn}", self.index + 1)
    }

    /// Adds what a record says of its prompt.
    pub fn describe(&self, record: &mut Value) {
        record["id"] = self.prompt.id.clone();
        record["category"] = self.prompt.category.clone();
        record["turn"] = self.turn.into();
    }
}
