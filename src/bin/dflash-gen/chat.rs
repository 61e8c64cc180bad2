//! `--chat`: a conversation, line by line. One sequence keeps its keys and values from one answer to the
//! next. Each message renders and tokenises the whole conversation anew, so an answer equals that of a fresh
//! run of it.

use crate::args::Args;
use crate::inputs::Inputs;
use crate::output::Writer;
use crate::{INTERRUPTED, Session, note};
use clap::Parser;
use dflash::cli::terminal;
use dflash::engine::decoder::Decoder;
use dflash::engine::generate::resume;
use dflash::engine::request::{Finish, Outcome, Request};
use dflash::engine::stats;
use dflash::spec::sampling::SamplingParams;
use dflash::text::message::Message;
use dflash::text::prompt_files::{LIMIT, too_long, utf8};
use dflash::text::prompts::without_template;
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;

const HELP: &str = "\
/help                 this list
/exit                 end the program, as the end of input does
/clear                forget the conversation, not the system message
/system TEXT          put a system message before the conversation; without TEXT: none
/set NAME VALUE       temperature, top-p, top-k, min-p, seed, max-tokens or block; alone: show them
/stats                tokens, rates and acceptance length of the last answer and of all
/draft on|off         draft, or decode autoregressively: the text is the same
//TEXT                a message that begins with a slash
A line that ends with \\ goes on in the next. Ctrl-C ends the answer, between answers the program.";

/// The template of the demo pair, which was not trained on conversations: it continues the text.
pub fn demo_template() -> (String, String) {
    ("demo/chat.jinja".into(), include_str!("../../../demo/chat.jinja").into())
}

/// What can be found wrong before the weights are loaded. Returns the tokenizer and the chat template.
pub fn check<'a>(inputs: &Inputs<'a>) -> Result<&'a Text> {
    let folder = &inputs.pair.target.folder;
    let text = inputs.text.ok_or_else(|| Text::missing(folder))?;
    text.stream(&inputs.job.stop)?;
    inputs.stop_ids(&inputs.job.stop)?;
    match text.has_template() {
        true => text.check_template(&inputs.job.variables).map(|()| text),
        false => Err(without_template("--chat needs", &folder.described())),
    }
}

pub struct Chat<'a> {
    session: &'a Session<'a>,
    text: &'a Text,
    decoder: Box<dyn Decoder + 'a>,
    system: Option<String>,
    /// User and assistant in turn.
    messages: Vec<Message>,
    sampling: SamplingParams,
    max_tokens: usize,
    block: usize,
    drafting: bool,
    /// Statistics of the last answer.
    last: Option<String>,
    all: Totals,
}

/// Statistics of all answers.
#[derive(Default)]
struct Totals {
    tokens: usize,
    time: Duration,
    /// Tokens per round, of answers with a drafter.
    accepted: Vec<usize>,
    /// Positions of the conversation so far.
    positions: usize,
}

/// What follows a line of input.
#[derive(PartialEq)]
enum Then {
    GoOn,
    End,
}

impl<'a> Chat<'a> {
    pub fn new(session: &'a Session<'a>) -> Result<Chat<'a>> {
        let Inputs { job, pair, block, .. } = *session.inputs;
        Ok(Chat {
            session,
            text: check(session.inputs)?,
            decoder: session.backend.decoder()?,
            system: job.system.clone(),
            messages: Vec::new(),
            sampling: job.sampling.clone(),
            max_tokens: job.max_tokens,
            block,
            drafting: pair.drafts(),
            last: None,
            all: Totals::default(),
        })
    }

    /// Runs until the end of input, `/exit`, or the reader closes stdout. Wrong input is answered by a
    /// sentence, and the conversation goes on. Returns 0 or, with input that is not from a terminal, the exit
    /// code of the last message that failed.
    pub fn run(mut self) -> Result<u8> {
        let Inputs { job, pair, .. } = *self.session.inputs;
        if io::stdin().is_terminal() && !job.quiet {
            let demo = match job.is_demo && job.template.is_none() {
                true => " The demo pair is no assistant: it continues the Python that you begin.",
                false => "",
            };
            note(&format!("{}: /help lists the commands.{demo}", pair.target.folder.name()));
        }
        let mut code = 0;
        loop {
            let Some(bytes) = message()? else { return Ok(code) };
            let is_command = bytes.starts_with(b"/") && !bytes.starts_with(b"//");
            match utf8(bytes, "the message").and_then(|text| self.take(text)) {
                Ok(Then::GoOn) => {}
                Ok(Then::End) => return Ok(code),
                Err(error @ (Error::Usage(_) | Error::Option { .. } | Error::Memory(_))) => {
                    terminal::complain("dflash-gen", &error);
                    if !is_command && !io::stdin().is_terminal() {
                        code = error.exit_code();
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, text: String) -> Result<Then> {
        match text.strip_prefix('/') {
            _ if text.trim().is_empty() => Ok(Then::GoOn),
            Some(rest) if !rest.starts_with('/') => self.command(rest),
            slashed => {
                let content = slashed.map(String::from).unwrap_or(text);
                self.messages.push(Message::new("user", content));
                let before = self.messages.len();
                let then = self.answer();
                if self.messages.len() == before {
                    // There is no answer, and templates do not expect two messages of the user in a row.
                    self.messages.pop();
                }
                then
            }
        }
    }

    /// Answers the last message; the answer becomes part of the conversation.
    fn answer(&mut self) -> Result<Then> {
        let system = self.system.iter().map(|content| Message::new("system", content));
        let messages: Vec<Message> = system.chain(self.messages.iter().cloned()).collect();
        let session = self.session;
        let job = session.inputs.job;
        let prompt = self.text.encode_chat(&messages, None, &job.variables)?;
        let context = self.decoder.context();
        if prompt.is_empty() {
            return Err(Error::Usage("the conversation gives no tokens, expected at least one".into()));
        }
        if prompt.len() >= context {
            return Err(Error::Usage(format!(
                "the context is full: with this message, which is dropped, the conversation has {} tokens, and the \
                 context holds {context}, the answer included; /clear begins a new one",
                prompt.len()
            )));
        }
        let block = if self.drafting { self.block } else { 1 };
        let stop_ids = session.inputs.stop_ids(&job.stop)?.ids();
        let request = job.request(prompt, self.sampling.clone(), block, stop_ids);
        let request = Request { max_tokens: self.max_tokens, ..request };
        let mut writer = Writer::new(session, 0, &request, &job.stop, true)?;
        let outcome = resume(&mut *self.decoder, &request, &mut writer);
        let outcome = outcome.inspect_err(|_| writer.fail())?;
        if outcome.tokens.is_empty() {
            note("interrupted before the answer began: the message is dropped");
            return Ok(Then::GoOn);
        }
        let (content, gone) = writer.close()?;
        self.messages.push(Message::new("assistant", content));
        if gone {
            return Ok(Then::End);
        }
        if outcome.finish == Finish::Context {
            note(&format!(
                "the context of {context} tokens is full and ends the answer; /clear begins a new conversation"
            ));
        }
        self.count(&request, &outcome);
        if io::stderr().is_terminal()
            && !job.quiet
            && let Some(line) = &self.last
        {
            let dim = if job.dim { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
            note(&format!("{}{line}{}", dim.0, dim.1));
        }
        Ok(Then::GoOn)
    }

    fn count(&mut self, request: &Request, outcome: &Outcome) {
        let why = match outcome.finish {
            Finish::Stop => String::new(),
            Finish::Length => format!(", cut at max-tokens {}", request.max_tokens),
            Finish::Context => ", cut at the end of the context".into(),
            Finish::Interrupted => ", interrupted".into(),
        };
        self.session.watch_acceptance(outcome);
        self.last = Some(self.session.summary(request, outcome) + &why);
        self.all.tokens += outcome.tokens.len();
        self.all.time += outcome.prefill + outcome.decode;
        if request.block > 1 {
            self.all.accepted.extend(&outcome.accepted);
        }
        self.all.positions = request.prompt.len() + outcome.tokens.len();
    }

    fn command(&mut self, line: &str) -> Result<Then> {
        let (name, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = value.trim();
        let wrong = |what: String| Err(Error::Usage(what));
        match name {
            "help" | "exit" | "clear" | "stats" if !value.is_empty() => {
                return wrong(format!("/{name} takes no value, found {value:?}"));
            }
            "help" => note(HELP),
            "exit" => return Ok(Then::End),
            "clear" => {
                self.messages.clear();
                self.all.positions = 0;
            }
            "stats" => self.stats(),
            "system" => self.system = Some(value.to_string()).filter(|text| !text.is_empty()),
            "set" => self.set(value)?,
            "draft" => match value {
                "on" if !self.session.inputs.pair.drafts() => {
                    return wrong("/draft on needs a drafter, but --draft is none".into());
                }
                "on" | "off" => self.drafting = value == "on",
                _ => return wrong(format!("/draft is {value:?}, expected on or off")),
            },
            _ => return wrong(format!("there is no command /{name}: /help lists them")),
        }
        Ok(Then::GoOn)
    }

    /// `NAME VALUE`, checked as the flag of that name.
    fn set(&mut self, setting: &str) -> Result<()> {
        if setting.is_empty() {
            let SamplingParams { temperature, top_p, top_k, min_p, seed, .. } = self.sampling;
            note(&format!(
                "temperature {temperature}, top-p {top_p}, top-k {top_k}, min-p {min_p}, seed {seed}, max-tokens {}, \
                 block {}",
                self.max_tokens, self.block
            ));
            return Ok(());
        }
        let (name, value) = setting.split_once(char::is_whitespace).unwrap_or((setting, ""));
        let names = ["temperature", "top-p", "top-k", "min-p", "seed", "max-tokens", "block"];
        if !names.contains(&name) {
            return Err(Error::Usage(format!("/set is {name:?}, expected {}", names.join(", "))));
        }
        let flags = ["dflash-gen".into(), "--chat".into(), format!("--{name}={}", value.trim())];
        let args = Args::try_parse_from(flags).map_err(|error| terminal::sentence(&error))?;
        let job = args.resolve()?;
        let (sampling, new) = (&mut self.sampling, job.sampling.clone());
        match name {
            "temperature" => sampling.temperature = new.temperature,
            "top-p" => sampling.top_p = new.top_p,
            "top-k" => sampling.top_k = new.top_k,
            "min-p" => sampling.min_p = new.min_p,
            "seed" => sampling.seed = new.seed,
            "max-tokens" => self.max_tokens = job.max_tokens,
            _ => self.block = job.block(self.session.inputs.pair)?,
        }
        Ok(())
    }

    fn stats(&self) {
        let Some(last) = &self.last else {
            return note("no answer yet");
        };
        let Totals { tokens, time, accepted, positions } = &self.all;
        let time = time.as_secs_f64();
        let rate = *tokens as f64 / time.max(1e-9);
        let tau = stats::tau(accepted).map_or(String::new(), |tau| format!(", acceptance length {tau:.2}"));
        note(&format!("last answer: {last}"));
        note(&format!(
            "in all: {tokens} tokens in {time:.2} s, {rate:.0} tok/s{tau}; {positions} of {} positions in use",
            self.decoder.context()
        ));
    }
}

/// The next message or command, with its lines joined; `None` at the end of input. While it waits, Ctrl-C
/// ends the program.
fn message() -> Result<Option<Vec<u8>>> {
    INTERRUPTED.store(true, Ordering::Relaxed);
    let terminal = io::stdin().is_terminal();
    let mut message: Option<Vec<u8>> = None;
    loop {
        if terminal {
            let _ = write!(io::stderr(), "{}", if message.is_none() { "> " } else { "| " });
        }
        let mut line = Vec::new();
        let read = io::stdin().lock().take(LIMIT as u64 + 1).read_until(b'\n', &mut line);
        if read.map_err(|e| Error::Usage(format!("stdin cannot be read: {e}")))? == 0 {
            if terminal {
                note("");
            }
            break;
        }
        if message.as_ref().map_or(0, Vec::len) + line.len() > LIMIT {
            return Err(too_long("the message"));
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let (line, more) = line.strip_suffix(b"\\").map_or((line, false), |line| (line, true));
        match &mut message {
            Some(message) => message.extend([&b"\n"[..], line].concat()),
            none => *none = Some(line.into()),
        }
        if !more {
            break;
        }
    }
    INTERRUPTED.store(false, Ordering::Relaxed);
    Ok(message)
}
