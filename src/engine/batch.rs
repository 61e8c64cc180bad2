//! The loop that runs many requests in the slots of a decoder: admit, chunked prefill, rounds, release.

use crate::engine::decoder::{Decoder, Emitted, Prefill};
use crate::engine::request::{Finish, Outcome, Request};
use crate::engine::sink::{Flow, TokenSink, TokenSinks};
use crate::{Error, Result};
use std::time::Instant;

/// A request in a slot.
struct RunningRequest<'a> {
    index: usize,
    request: &'a Request,
    /// [`Request::limit`].
    limit: (usize, Finish),
    outcome: Outcome,
    /// When it was admitted.
    start: Instant,
    /// Whether a part of its prompt has yet to run.
    prefilling: bool,
}

/// Runs the requests. With `keep`, a request may reuse the KV cache that its slot holds of its prompt.
pub(super) fn run(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    keep: bool,
    sinks: &mut dyn TokenSinks,
) -> Result<()> {
    let (vocab, context) = (decoder.vocab(), decoder.context());
    requests.iter().try_for_each(|request| request.check(vocab, context))?;
    let mut slots: Vec<Option<RunningRequest>> = (0..decoder.slots()).map(|_| None).collect();
    let result = serve(decoder, requests, keep, sinks, &mut slots);
    if result.is_err() {
        // Releases the slots, so that the decoder can run other requests. The caller gets the first error.
        for (slot, running) in slots.iter().enumerate() {
            if let Some(running) = running {
                let _ = decoder.release(slot, running.outcome.tokens.len());
            }
        }
    }
    result
}

fn serve<'a>(
    decoder: &mut dyn Decoder,
    requests: &'a [Request],
    keep: bool,
    sinks: &mut dyn TokenSinks,
    slots: &mut [Option<RunningRequest<'a>>],
) -> Result<()> {
    let context = decoder.context();
    let mut emitted = vec![Emitted::default(); slots.len()];
    let mut waiting = requests.iter().enumerate().peekable();
    loop {
        // Free slots admit waiting requests, in order.
        let mut flow = Flow::Continue;
        for (slot, entry) in slots.iter_mut().enumerate() {
            while flow == Flow::Continue
                && entry.is_none()
                && let Some(&(index, request)) = waiting.peek()
            {
                let limit = request.limit(context);
                if let Some(finish) = request.end(&[], limit) {
                    flow = sinks.done(index, Outcome::new(finish))?;
                } else {
                    let Some(kept) = decoder.admit(slot, request, keep)? else { break };
                    let outcome = Outcome { kept, ..Outcome::new(Finish::Interrupted) };
                    let start = Instant::now();
                    *entry = Some(RunningRequest { index, request, limit, outcome, start, prefilling: true });
                }
                waiting.next();
            }
        }
        if slots.iter().all(Option::is_none) {
            return match waiting.next() {
                Some((index, _)) if flow == Flow::Continue => Err(Error::Internal(format!(
                    "request {index} waits for memory, but no sequence holds any"
                ))),
                _ => Ok(()),
            };
        }

        // One chunk of every unfinished prompt, then a round of the other sequences.
        for (slot, entry) in slots.iter_mut().enumerate() {
            if flow == Flow::Continue
                && let Some(running) = entry
                && running.prefilling
                && running.prefill(decoder, slot, sinks)?
                && let Some(running) = entry.take()
            {
                flow = running.end(decoder, slot, sinks)?;
            }
        }
        if flow == Flow::Continue && slots.iter().flatten().any(|running| !running.prefilling) {
            decoder.round(&mut emitted)?;
            for (slot, entry) in slots.iter_mut().enumerate() {
                if flow == Flow::Continue
                    && let Some(running) = entry
                    && running.round(&emitted[slot], sinks)?
                    && let Some(running) = entry.take()
                {
                    flow = running.end(decoder, slot, sinks)?;
                }
            }
        }
        if flow != Flow::Continue {
            for (slot, entry) in slots.iter_mut().enumerate() {
                if let Some(running) = entry.take() {
                    running.end(decoder, slot, sinks)?;
                }
            }
            return Ok(());
        }
    }
}

impl RunningRequest<'_> {
    /// Runs the next chunk of the prompt. Returns whether the answer has ended.
    fn prefill(
        &mut self,
        decoder: &mut dyn Decoder,
        slot: usize,
        sinks: &mut dyn TokenSinks,
    ) -> Result<bool> {
        let Prefill { done, next } = decoder.prefill(slot)?;
        let sink = sinks.sink(self.index)?;
        if sink.prefill(done) != Flow::Continue {
            return Ok(true);
        }
        let Some(first) = next else { return Ok(false) };
        self.outcome.prefill = self.start.elapsed();
        self.prefilling = false;
        self.take(&[first], 1, sink)
    }

    /// Adds a round's tokens to the answer. Returns whether the answer has ended.
    fn round(&mut self, emitted: &Emitted, sinks: &mut dyn TokenSinks) -> Result<bool> {
        let Emitted { tokens, produced, drafted } = emitted;
        if tokens.is_empty() {
            return Ok(false);
        }
        let (before, sink) = (self.outcome.tokens.len(), sinks.sink(self.index)?);
        self.outcome.accepted.push(*produced);
        self.outcome.drafted.push(*drafted);
        let ended = self.take(tokens, *produced, sink)?;
        sink.round(*produced, self.outcome.tokens.len() - before)?;
        Ok(ended)
    }

    /// Adds tokens to the answer one by one. Returns whether the answer has ended. `produced` is the number
    /// of tokens of the round before any cut; all but the last of them are accepted drafts.
    fn take(&mut self, tokens: &[u32], produced: usize, sink: &mut dyn TokenSink) -> Result<bool> {
        for (i, id) in tokens.iter().enumerate() {
            self.outcome.tokens.push(*id);
            let end = match sink.token(*id, i + 1 < produced)? {
                Flow::Interrupt => Some(Finish::Interrupted),
                Flow::Stop => Some(Finish::Stop),
                Flow::Continue => self.request.end(&self.outcome.tokens, self.limit),
            };
            if let Some(finish) = end {
                self.outcome.finish = finish;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Releases the slot and delivers the outcome.
    fn end(mut self, decoder: &mut dyn Decoder, slot: usize, sinks: &mut dyn TokenSinks) -> Result<Flow> {
        match self.prefilling {
            true => self.outcome.prefill = self.start.elapsed(),
            false => self.outcome.decode = self.start.elapsed() - self.outcome.prefill,
        }
        decoder.release(slot, self.outcome.tokens.len())?;
        sinks.done(self.index, self.outcome)
    }
}
