//! `--check-lossless`: every prompt by autoregressive decoding and by DFlash, compared token for token and
//! logit for logit.

use crate::inputs::Task;
use crate::output::{Output, StopOnly};
use crate::{INTERRUPTED_EXIT, Session, note};
use dflash::engine::generate::{Flow, TokenSink};
use dflash::engine::lossless::{Report, check};
use dflash::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::IsTerminal;

/// Counts tokens on a progress bar, and keeps them.
struct Counting<'a>(StopOnly<'a>, &'a ProgressBar, &'a RefCell<Vec<u32>>);

impl TokenSink for Counting<'_> {
    fn prefill(&mut self, done: usize) -> Flow {
        self.0.prefill(done)
    }
    fn token(&mut self, id: u32, drafted: bool) -> Result<Flow> {
        self.1.inc(1);
        self.2.borrow_mut().push(id);
        self.0.token(id, drafted)
    }
}

impl Session<'_> {
    /// Prints a line or an object for each prompt. The first difference is the error, after all prompts have
    /// run.
    pub fn check_lossless(&self, tasks: Vec<Task>) -> Result<u8> {
        let (inputs, job) = (self.inputs, self.inputs.job);
        let mut decoder = self.backend.decoder()?;
        let mut out = Output::default();
        if !job.json() {
            out.line("prompt  tokens  rounds  rows compared  identical")?;
        }
        let shown = !job.quiet && std::io::stderr().is_terminal();
        let bar = if shown { ProgressBar::no_length() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{msg}: {pos} tokens, {per_sec}") {
            bar.set_style(style);
        }
        let mut all = Report { tokens: 0, rounds: 0, compared: 0, rejected: 0, identical: Ok(()) };
        let mut rows = Vec::new();
        let (first, count) = (tasks[0].request.clone(), tasks.len());
        let answer = RefCell::default();
        let mut tasks = VecDeque::from(tasks);
        while let Some(task) = tasks.pop_front() {
            let number = task.label();
            bar.reset();
            bar.set_message(format!("prompt {number} of {count}"));
            let sink = || {
                answer.take();
                Ok(Counting(StopOnly(inputs.stream(&task.stop)?), &bar, &answer))
            };
            let Some(mut report) = check(&mut *decoder, &task.request, sink)? else {
                bar.finish_and_clear();
                return Ok(INTERRUPTED_EXIT);
            };
            // The first token is the prefill's.
            let found = self.watch.borrow_mut().add_rounds(report.rounds, report.tokens.saturating_sub(1));
            if let (Some(line), false) = (found, job.quiet) {
                bar.suspend(|| note(&line));
            }
            report.identical = report.identical.map_err(|e| Error::Lossless(format!("prompt {number}: {e}")));
            if job.json() {
                let mut row = object(&report);
                task.describe(&mut row);
                rows.push(row);
            } else {
                bar.suspend(|| out.line(&line(&number, &report)))?;
            }
            if let Some(next) = inputs.next_turn(&task, &answer.take())? {
                tasks.push_front(next);
            }
            all = Report {
                tokens: all.tokens + report.tokens,
                rounds: all.rounds + report.rounds,
                compared: all.compared + report.compared,
                rejected: all.rejected + report.rejected,
                identical: all.identical.and(report.identical),
            };
            if out.gone {
                break;
            }
        }
        bar.finish_and_clear();
        if job.json() {
            out.line(&self.of_all(object(&all), rows, &first).to_string())?;
        } else {
            out.line(&line("all", &all))?;
            if first.sampling.temperature > 0.0 && !job.quiet {
                note(&format!("seed {}", first.sampling.seed));
            }
        }
        all.identical.map(|()| 0)
    }
}

fn line(name: &str, report: &Report) -> String {
    let Report { tokens, rounds, compared, .. } = report;
    let word = if report.identical.is_ok() { "yes" } else { "NO" };
    format!("{name:>6}  {tokens:6}  {rounds:6}  {compared:13}  {word}")
}

fn object(report: &Report) -> Value {
    let difference = report.identical.as_ref().err().map(Error::to_string);
    json!({
        "tokens": report.tokens, "rounds": report.rounds, "compared": report.compared, "rejected": report.rejected,
        "identical": difference.is_none(), "difference": difference,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_and_object_name_a_difference() {
        let identical = Err(Error::Lossless("prompt 3: token 5".into()));
        let report = Report { tokens: 12, rounds: 4, compared: 5, rejected: 40, identical };
        assert_eq!(line("3", &report), "     3      12       4              5  NO");
        let expected = json!({
            "tokens": 12, "rounds": 4, "compared": 5, "rejected": 40, "identical": false,
            "difference": "prompt 3: token 5",
        });
        assert_eq!(object(&report), expected);
    }
}
