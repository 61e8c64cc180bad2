//! `--compare`: every prompt by autoregressive decoding and by DFlash: both rates, and whether the tokens are
//! identical.

use crate::inputs::Task;
use crate::output::{Output, StopOnly};
use crate::{INTERRUPTED_EXIT, Session, note};
use dflash::engine::generate::generate;
use dflash::engine::lossless::check_lossless;
use dflash::engine::request::{Finish, Request};
use dflash::engine::stats;
use dflash::{Error, Result};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::Duration;

impl Session<'_> {
    /// Runs both in turn, prompt by prompt, after a short warm-up of both. The first difference is the error,
    /// after all prompts have run.
    pub fn compare(&self, tasks: Vec<Task>) -> Result<u8> {
        let (inputs, job) = (self.inputs, self.inputs.job);
        let mut decoder = self.backend.decoder()?;
        let mut one = |task: &Task, block: usize, max_tokens: usize| {
            let request = Request { block, max_tokens, ..task.request.clone() };
            let mut stop = StopOnly(inputs.stream(&task.stop)?);
            generate(&mut *decoder, &request, &mut stop)
        };
        let mut out = Output::default();
        let first = tasks[0].request.clone();
        for block in [1, first.block] {
            one(&tasks[0], block, first.max_tokens.min(16))?;
        }
        if !job.json() {
            out.line("prompt  tokens     AR tok/s  dflash tok/s  ratio   tau  identical")?;
        }
        let (mut rows, mut accepted) = (Vec::new(), Vec::new());
        let (mut tokens, mut ar_time, mut dflash_time, mut all_identical) =
            (0, Duration::ZERO, Duration::ZERO, Ok(()));
        let mut tasks = VecDeque::from(tasks);
        while let Some(task) = tasks.pop_front() {
            let ar = one(&task, 1, task.request.max_tokens)?;
            let dflash = one(&task, task.request.block, task.request.max_tokens)?;
            if ar.finish == Finish::Interrupted || dflash.finish == Finish::Interrupted {
                return Ok(INTERRUPTED_EXIT);
            }
            if out.gone {
                return all_identical.map(|()| 0);
            }
            let identical = check_lossless(&ar, &dflash)
                .map_err(|e| Error::Lossless(format!("prompt {}: {e}", task.label())));
            let row = Row {
                tokens: ar.tokens.len(),
                ar: stats::rate(&ar),
                dflash: stats::rate(&dflash),
                tau: stats::tau(&dflash.accepted),
                identical: identical.is_ok(),
            };
            if job.json() {
                let mut object = row.json();
                task.describe(&mut object);
                rows.push(object);
            } else {
                out.line(&row.line(&task.label()))?;
            }
            if let Some(next) = inputs.next_turn(&task, &ar.tokens)? {
                tasks.push_front(next);
            }
            self.watch_acceptance(&dflash);
            all_identical = all_identical.and(identical);
            tokens += ar.tokens.len();
            ar_time += ar.prefill + ar.decode;
            dflash_time += dflash.prefill + dflash.decode;
            accepted.extend(dflash.accepted);
        }
        let rate = |time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let all = Row {
            tokens,
            ar: rate(ar_time),
            dflash: rate(dflash_time),
            tau: stats::tau(&accepted),
            identical: all_identical.is_ok(),
        };
        if job.json() {
            out.line(&self.of_all(all.json(), rows, &first).to_string())?;
        } else {
            out.line(&all.line("all"))?;
        }
        if first.sampling.temperature > 0.0 && !job.json() && !job.quiet {
            note(&format!("seed {}", first.sampling.seed));
        }
        all_identical.map(|()| 0)
    }
}

/// A line of `--compare`.
struct Row {
    tokens: usize,
    /// Tokens per second of autoregressive decoding, and of DFlash.
    ar: f64,
    dflash: f64,
    tau: Option<f64>,
    identical: bool,
}

impl Row {
    fn line(&self, name: &str) -> String {
        let Row { tokens, ar, dflash, .. } = self;
        let tau = self.tau.map_or("-".into(), |tau| format!("{tau:.2}"));
        let (ratio, word) = (dflash / ar, if self.identical { "yes" } else { "NO" });
        format!("{name:>6}  {tokens:6}  {ar:11.0}  {dflash:12.0}  {ratio:5.2}  {tau:>4}  {word}")
    }

    fn json(&self) -> Value {
        json!({
            "tokens": self.tokens, "plain_tokens_per_s": self.ar, "dflash_tokens_per_s": self.dflash,
            "ratio": self.dflash / self.ar, "tau": self.tau, "identical": self.identical,
        })
    }
}
