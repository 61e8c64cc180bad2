//! Answers on their way to stdout, as text, as events or as a record. The reader may close stdout at any
//! time.

use crate::inputs::Task;
use crate::job::Format;
use crate::{Session, interrupt};
use dflash::Result;
use dflash::cli::terminal;
use dflash::engine::generate::{Flow, TokenSink};
use dflash::engine::request::{Outcome, Request};
use dflash::text::tokenizer::Stream;
use serde_json::json;
use std::io::{self, IsTerminal};

/// Stdout. Every write is flushed, so that text appears as it is generated.
#[derive(Default)]
pub struct Output {
    /// The reader has closed stdout; what is written is dropped.
    pub gone: bool,
    /// Text that waits until earlier answers are written.
    held: Option<String>,
}

impl Output {
    /// Writes what waits; later text is written at once.
    pub fn release(&mut self) -> Result<()> {
        match self.held.take() {
            Some(text) => self.text(&text),
            None => Ok(()),
        }
    }

    pub fn text(&mut self, text: &str) -> Result<()> {
        if let Some(held) = &mut self.held {
            held.push_str(text);
            return Ok(());
        }
        if self.gone || text.is_empty() {
            return Ok(());
        }
        self.gone = !terminal::print(text)?;
        Ok(())
    }

    pub fn line(&mut self, text: &str) -> Result<()> {
        self.text(&format!("{text}\n"))
    }
}

/// One answer.
pub struct Writer<'a> {
    index: usize,
    /// `None` without a tokenizer: the text is then the token ids.
    stream: Option<Stream<'a>>,
    has_text: bool,
    /// The whole answer, for records.
    answer: String,
    out: Output,
    format: Format,
    /// Accepted drafts are coloured.
    colored: bool,
    /// Tokens and text since the last event.
    fresh: (Vec<u32>, String),
    rounds: usize,
    bar: Option<indicatif::ProgressBar>,
}

/// Prompts shorter than this need no progress bar.
const LONG_PROMPT: usize = 1024;

impl<'a> Writer<'a> {
    /// `first`: its text need not wait for earlier answers.
    pub fn new(
        session: &Session<'a>,
        index: usize,
        request: &Request,
        stop: &[String],
        first: bool,
    ) -> Result<Writer<'a>> {
        let job = session.inputs.job;
        let long = request.prompt.len() >= LONG_PROMPT && first && !job.quiet && io::stderr().is_terminal();
        let bar = long.then(|| {
            let style =
                indicatif::ProgressStyle::with_template("prompt {bar:40} {pos}/{len} tokens, {eta} left");
            let bar = indicatif::ProgressBar::new(request.prompt.len() as u64);
            style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
        });
        Ok(Writer {
            index,
            stream: session.inputs.stream(stop)?,
            has_text: session.inputs.text.is_some(),
            answer: String::new(),
            // Events carry the index of their request, so they need not wait.
            out: Output { gone: false, held: (!first && job.format != Format::Events).then(String::new) },
            format: job.format,
            colored: job.show_accepted,
            fresh: (Vec::new(), String::new()),
            rounds: 0,
            bar,
        })
    }

    fn piece(&mut self, text: &str, drafted: bool) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.answer += text;
        self.fresh.1 += text;
        match (self.format, self.colored && drafted) {
            (Format::Json | Format::Events, _) => Ok(()),
            (Format::Text, false) => self.out.text(text),
            (Format::Text, true) => self.out.text(&format!("\x1b[32m{text}\x1b[0m")),
        }
    }

    /// An event with what came since the last one; `accepted`: tokens of a round.
    fn event(&mut self, event: &str, accepted: Option<usize>) -> Result<()> {
        if self.format != Format::Events {
            return Ok(());
        }
        let (tokens, text) = std::mem::take(&mut self.fresh);
        let event = json!({
            "event": event, "index": self.index, "round": self.rounds, "tokens": tokens,
            "text": self.has_text.then_some(text),
            "accepted": accepted,
        });
        self.out.line(&event.to_string())
    }

    /// Writes the text that was held back for a stop string that did not come.
    fn rest(&mut self) -> Result<String> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let rest = self.stream.take().map(Stream::finish).unwrap_or_default();
        self.piece(&rest, false)?;
        Ok(rest)
    }

    /// All earlier answers are written.
    pub fn release(&mut self) -> Result<()> {
        self.out.release()
    }

    /// Ends the line, so that the error message starts a new one.
    pub fn fail(&mut self) {
        if self.format == Format::Text && !self.answer.is_empty() && !self.answer.ends_with('\n') {
            let _ = self.out.text("\n");
        }
    }

    /// Writes the rest of the text and ends its last line. Returns the answer, and whether the reader has
    /// closed stdout.
    pub fn close(mut self) -> Result<(String, bool)> {
        self.rest()?;
        if !self.answer.ends_with('\n') {
            self.out.text("\n")?;
        }
        Ok((self.answer, self.out.gone))
    }

    /// Writes the rest of the text, or the record. True if the reader has closed stdout.
    pub fn end(mut self, session: &Session<'a>, task: &Task, outcome: &Outcome) -> Result<bool> {
        if self.format == Format::Text {
            return Ok(self.close()?.1);
        }
        if !self.rest()?.is_empty() {
            self.event("rest", None)?;
        }
        let text = self.has_text.then(|| std::mem::take(&mut self.answer));
        let mut record = json!(session.record(&task.request, outcome, text));
        task.describe(&mut record);
        if self.format == Format::Events {
            record["event"] = "done".into();
            record["index"] = self.index.into();
        }
        self.out.line(&record.to_string())?;
        Ok(self.out.gone)
    }
}

impl TokenSink for Writer<'_> {
    fn prefill(&mut self, done: usize) -> Flow {
        if let Some(bar) = &self.bar {
            match bar.length() == Some(done as u64) {
                true => bar.finish_and_clear(),
                false => bar.set_position(done as u64),
            }
        }
        interrupt()
    }

    fn token(&mut self, id: u32, drafted: bool) -> Result<Flow> {
        self.fresh.0.push(id);
        let (text, stopped) = match &mut self.stream {
            Some(stream) => stream.push(id)?,
            None if self.answer.is_empty() => (id.to_string(), false),
            None => (format!(" {id}"), false),
        };
        self.piece(&text, drafted)?;
        if self.rounds == 0 {
            // The prefill's token, before the first round.
            self.event("prefill", None)?;
            self.rounds = 1;
        }
        Ok(match stopped {
            true => Flow::Stop,
            false if self.out.gone => Flow::Interrupt,
            false => interrupt(),
        })
    }

    fn round(&mut self, accepted: usize, _kept: usize) -> Result<()> {
        self.event("round", Some(accepted))?;
        self.rounds += 1;
        Ok(())
    }
}

/// Stops where the text stops, if there is text, and writes nothing.
pub struct StopOnly<'a>(pub Option<Stream<'a>>);

impl TokenSink for StopOnly<'_> {
    fn prefill(&mut self, _: usize) -> Flow {
        interrupt()
    }
    fn token(&mut self, id: u32, _: bool) -> Result<Flow> {
        let stopped = match &mut self.0 {
            Some(stream) => stream.push(id)?.1,
            None => false,
        };
        Ok(if stopped { Flow::Stop } else { interrupt() })
    }
}
