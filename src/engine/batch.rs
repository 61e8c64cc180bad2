//! The loop that runs many requests in the slots of a decoder: admit, prefill in parts, rounds, release.

use crate::engine::decoder::{Decoder, Emitted, Prefill};
use crate::engine::request::{Finish, Outcome, Request};
use crate::engine::sink::{Flow, TokenSink, TokenSinks};
use crate::{Error, Result};
use std::time::Instant;

/// A request in a slot.
struct RunningRequest<'a> {
    index: usize,
    request: &'a Request,
    /// Tokens that may be emitted: `max_tokens`, or what the context holds.
    limit: usize,
    outcome: Outcome,
    clock: Instant,
    /// Its prompt is not done.
    prefilling: bool,
}

/// Runs the requests; with `keep`, slots may reuse what they hold of a prompt.
pub(super) fn run(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    keep: bool,
    sinks: &mut dyn TokenSinks,
) -> Result<()> {
    let (vocab, context) = (decoder.vocab(), decoder.context());
    requests.iter().try_for_each(|request| request.check(vocab, context))?;
    let mut slots: Vec<Option<RunningRequest>> = (0..decoder.slots()).map(|_| None).collect();
    let end = serve(decoder, requests, keep, sinks, &mut slots);
    if end.is_err() {
        // The caller gets the first error, and a decoder that is usable for other requests.
        for (slot, running) in slots.iter().enumerate() {
            if let Some(running) = running {
                let _ = decoder.release(slot, running.outcome.tokens.len());
            }
        }
    }
    end
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
        for (slot, place) in slots.iter_mut().enumerate() {
            while flow == Flow::Continue
                && place.is_none()
                && let Some(&(index, request)) = waiting.peek()
            {
                let limit = request.max_tokens.min(context - request.prompt.len());
                let finish = if limit < request.max_tokens { Finish::Context } else { Finish::Length };
                let outcome = Outcome::new(finish);
                if limit == 0 {
                    flow = sinks.done(index, outcome)?;
                } else {
                    let Some(kept) = decoder.admit(slot, request, keep)? else { break };
                    let outcome = Outcome { kept, ..outcome };
                    let clock = Instant::now();
                    *place = Some(RunningRequest { index, request, limit, outcome, clock, prefilling: true });
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

        // One part of every prompt that is not done, then a round of the other sequences.
        for (slot, place) in slots.iter_mut().enumerate() {
            if flow == Flow::Continue
                && let Some(running) = place
                && running.prefilling
                && running.prefill(decoder, slot, sinks)?
                && let Some(running) = place.take()
            {
                flow = running.end(decoder, slot, sinks)?;
            }
        }
        if flow == Flow::Continue && slots.iter().flatten().any(|running| !running.prefilling) {
            decoder.round(&mut emitted)?;
            for (slot, place) in slots.iter_mut().enumerate() {
                if flow == Flow::Continue
                    && let Some(running) = place
                    && running.round(&emitted[slot], sinks)?
                    && let Some(running) = place.take()
                {
                    flow = running.end(decoder, slot, sinks)?;
                }
            }
        }
        if flow != Flow::Continue {
            for (slot, place) in slots.iter_mut().enumerate() {
                if let Some(mut running) = place.take() {
                    running.outcome.finish = Finish::Interrupted;
                    running.end(decoder, slot, sinks)?;
                }
            }
            return Ok(());
        }
    }
}

impl RunningRequest<'_> {
    /// Runs a part of the prompt; true when the answer is over.
    fn prefill(
        &mut self,
        decoder: &mut dyn Decoder,
        slot: usize,
        sinks: &mut dyn TokenSinks,
    ) -> Result<bool> {
        let Prefill { done, next } = decoder.prefill(slot)?;
        let sink = sinks.sink(self.index)?;
        if sink.prefill(done) != Flow::Continue {
            self.outcome.finish = Finish::Interrupted;
            return Ok(true);
        }
        let Some(first) = next else { return Ok(false) };
        self.outcome.prefill = self.clock.elapsed();
        self.prefilling = false;
        self.take(&[first], 1, sink)
    }

    /// Moves a round's tokens into the answer; true when it is over.
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

    /// Takes tokens one by one; true when the answer is over. All but the last of the `produced` tokens were
    /// drafted.
    fn take(&mut self, tokens: &[u32], produced: usize, sink: &mut dyn TokenSink) -> Result<bool> {
        for (i, id) in tokens.iter().enumerate() {
            self.outcome.tokens.push(*id);
            let finish = match sink.token(*id, i + 1 < produced)? {
                Flow::Interrupt => Finish::Interrupted,
                Flow::Stop => Finish::Stop,
                Flow::Continue if self.request.stop_ids.contains(id) => Finish::Stop,
                Flow::Continue if self.outcome.tokens.len() == self.limit => return Ok(true),
                Flow::Continue => continue,
            };
            self.outcome.finish = finish;
            return Ok(true);
        }
        Ok(false)
    }

    /// Releases the slot and delivers the outcome.
    fn end(mut self, decoder: &mut dyn Decoder, slot: usize, sinks: &mut dyn TokenSinks) -> Result<Flow> {
        match self.prefilling {
            true => self.outcome.prefill = self.clock.elapsed(),
            false => self.outcome.decode = self.clock.elapsed() - self.outcome.prefill,
        }
        decoder.release(slot, self.outcome.tokens.len())?;
        sinks.done(self.index, self.outcome)
    }
}
