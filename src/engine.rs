//! A request's life: prompt checks, prefill, rounds, and when to stop. Written once for every device; what a device
//! does for a sequence is the [`Decoder`] trait; [`Backend`] is the pair on a device, which hands them out. Plain
//! decoding is the same loop with blocks of one row.

use crate::verify::Sampling;
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Tokens to produce at most.
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Ids that end the answer; the one met is its last token. Empty: none.
    pub stop_ids: Vec<u32>,
    /// Rows of a block, anchor included; 1 = plain decoding.
    pub block: usize,
}

/// A pair loaded on one device.
pub trait Backend {
    /// The device's word in `--device` and in records.
    fn name(&self) -> &'static str;

    /// A fresh sequence.
    fn decoder(&self) -> Result<Box<dyn Decoder + '_>>;
}

/// One sequence on one device. It runs one request after another.
pub trait Decoder {
    /// Ids the target has rows for: `0..vocab`.
    fn vocab(&self) -> usize;

    /// Positions a sequence may have, prompt and answer together.
    fn context(&self) -> usize;

    /// Rows that a block may have whose anchor stands at `position`, by the drafter's own limits; at least 1.
    fn rows_at(&self, position: usize) -> usize;

    /// Runs the prompt. What the sequence holds already of its first tokens, from the request before, is kept and not
    /// run again, but for the last one, whose logits are needed; the answer is that of a fresh sequence. `progress`
    /// hears how many prompt tokens are done and may say stop.
    fn start(&mut self, request: &Request, progress: &mut dyn FnMut(usize) -> Flow) -> Result<Start>;

    /// One round: drafts `rows - 1` tokens, verifies them, and appends to `out` the accepted ones and the target's
    /// own next token, the new anchor (dflash.md 5.1). `rows` = 1 is a plain step.
    fn round(&mut self, rows: usize, out: &mut Vec<u32>) -> Result<()>;
}

/// What came of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Tokens of the prompt that were there before.
    pub kept: usize,
    /// The token that follows the prompt; none if it was stopped.
    pub next: Option<u32>,
}

/// What a listener wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// The answer is complete (a stop string was met).
    Stop,
    /// Somebody pressed Ctrl-C, or nobody reads any more.
    Interrupt,
}

/// Hears of a generation while it runs.
pub trait Listener {
    /// `done` of the prompt's tokens have been run.
    fn prefill(&mut self, _done: usize) -> Flow {
        Flow::Continue
    }
    /// The next token of the answer; `drafted`: the drafter proposed it and the target agreed.
    fn token(&mut self, id: u32, drafted: bool) -> Result<Flow>;
    /// A round is over: it produced `accepted` tokens (bonus included), of which `kept` belong to the answer.
    fn round(&mut self, _accepted: usize, _kept: usize) -> Result<()> {
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens` reached.
    Length,
    /// The model's context is full.
    Context,
    Interrupted,
}

impl Finish {
    /// The word in `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Context => "context",
            Finish::Interrupted => "interrupted",
        }
    }
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub finish: Finish,
    /// Tokens per round, bonus included, as judged: the last round counts whole even where a stop or the budget cuts
    /// it, as the reference implementation records it (dflash.md 5.1, older form).
    pub accepted: Vec<usize>,
    /// Tokens of the prompt that the decoder held already ([`Decoder::start`]).
    pub kept: usize,
    pub prefill: Duration,
    pub decode: Duration,
}

/// Runs one request to its end.
///
/// Losslessness: rounds differ between block sizes only in how many tokens they bring, never in which, and every
/// stopping rule below looks at tokens one by one; so the answer is a function of prompt, sampling and limits.
pub fn generate(
    decoder: &mut dyn Decoder,
    request: &Request,
    listener: &mut dyn Listener,
) -> Result<Outcome> {
    let context = decoder.context();
    let prompt = request.prompt.len();
    if prompt == 0 {
        return Err(Error::Usage("the prompt is empty: at least one token is needed".into()));
    }
    if prompt >= context {
        return Err(Error::Usage(format!(
            "the prompt has {prompt} tokens, but the context holds {context}, the answer included"
        )));
    }
    if let Some(id) = request.prompt.iter().find(|id| **id as usize >= decoder.vocab()) {
        return Err(Error::Model(format!(
            "the prompt holds token id {id}, but the target has {} rows: its tokenizer belongs to another model",
            decoder.vocab()
        )));
    }
    let room = request.max_tokens.min(context - prompt);
    let mut outcome = Outcome {
        tokens: Vec::new(),
        finish: if room < request.max_tokens { Finish::Context } else { Finish::Length },
        accepted: Vec::new(),
        kept: 0,
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
    };
    if room == 0 {
        return Ok(outcome);
    }

    let clock = Instant::now();
    let start = decoder.start(request, &mut |done| listener.prefill(done))?;
    outcome.prefill = clock.elapsed();
    outcome.kept = start.kept;
    let Some(first) = start.next else {
        outcome.finish = Finish::Interrupted;
        return Ok(outcome);
    };

    let clock = Instant::now();
    let mut batch = vec![first];
    let mut ended = take(&batch, request, room, listener, &mut outcome)?;
    while !ended {
        let anchor = prompt + outcome.tokens.len() - 1;
        // The last token of the context is never run, so a block ends before it.
        let rows = request.block.min(decoder.rows_at(anchor)).min(context - 1 - anchor).max(1);
        batch.clear();
        decoder.round(rows, &mut batch)?;
        outcome.accepted.push(batch.len());
        let before = outcome.tokens.len();
        ended = take(&batch, request, room, listener, &mut outcome)?;
        listener.round(batch.len(), outcome.tokens.len() - before)?;
    }
    outcome.decode = clock.elapsed();
    Ok(outcome)
}

/// Moves a round's tokens into the answer, one by one; true when it is over.
fn take(
    batch: &[u32],
    request: &Request,
    room: usize,
    listener: &mut dyn Listener,
    outcome: &mut Outcome,
) -> Result<bool> {
    for (i, id) in batch.iter().enumerate() {
        outcome.tokens.push(*id);
        let flow = listener.token(*id, i + 1 < batch.len())?;
        let finish = match flow {
            Flow::Interrupt => Some(Finish::Interrupted),
            Flow::Stop => Some(Finish::Stop),
            Flow::Continue if request.stop_ids.contains(id) => Some(Finish::Stop),
            Flow::Continue if outcome.tokens.len() == room => Some(outcome.finish),
            Flow::Continue => None,
        };
        if let Some(finish) = finish {
            outcome.finish = finish;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Holds a speculative answer against the plain one to the same request: same tokens, same end.
/// `Error::Lossless` says where they part.
pub fn check_lossless(plain: &Outcome, speculative: &Outcome) -> Result<()> {
    let pairs = plain.tokens.iter().zip(&speculative.tokens);
    let at = pairs.take_while(|(a, b)| a == b).count();
    let token = |outcome: &Outcome| match outcome.tokens.get(at) {
        Some(id) => format!("goes on with {id}"),
        None => format!("ends there ({})", outcome.finish.name()),
    };
    if at == plain.tokens.len() && at == speculative.tokens.len() && plain.finish == speculative.finish {
        return Ok(());
    }
    Err(Error::Lossless(format!(
        "after {at} equal tokens plain decoding {}, and DFlash {}",
        token(plain),
        token(speculative)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_part_are_no_lossless_ones() {
        let outcome = |tokens: &[u32], finish| Outcome {
            tokens: tokens.to_vec(),
            finish,
            accepted: vec![],
            kept: 0,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        };
        let plain = outcome(&[5, 6, 7], Finish::Length);
        // Rounds and times may differ, and do.
        let same = Outcome { accepted: vec![2], decode: Duration::from_secs(1), ..plain.clone() };
        assert_eq!(check_lossless(&plain, &same), Ok(()));
        for (other, sentence) in [
            (
                outcome(&[5, 9, 7], Finish::Length),
                "after 1 equal tokens plain decoding goes on with 6, and DFlash goes on with 9",
            ),
            (
                outcome(&[5, 6], Finish::Stop),
                "after 2 equal tokens plain decoding goes on with 7, and DFlash ends there (stop)",
            ),
            (
                outcome(&[5, 6, 7, 8], Finish::Length),
                "after 3 equal tokens plain decoding ends there (length), and DFlash goes on with 8",
            ),
            (
                outcome(&[5, 6, 7], Finish::Stop),
                "after 3 equal tokens plain decoding ends there (length), and DFlash ends there (stop)",
            ),
        ] {
            let error = check_lossless(&plain, &other).unwrap_err();
            assert_eq!((error.exit_code(), error.to_string().as_str()), (6, sentence));
        }
    }
}
