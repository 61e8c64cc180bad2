//! A request's life: prompt checks, prefill, rounds, and when to stop; and many requests that take turns in the slots of a
//! decoder. Written once for every device; what a device does for sequences is the [`Decoder`] trait; [`Backend`] is the
//! pair on a device, which hands them out. Autoregressive decoding is the same loop with blocks of one row.

use crate::spec::sampling::SamplingParams;
use crate::spec::verify::SpecConfig;
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Tokens to produce at most.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Ids that end the answer; the one met is its last token. Empty: none.
    pub stop_ids: Vec<u32>,
    /// Rows of a block, anchor included; 1 = autoregressive decoding.
    pub block: usize,
    /// How drafts are made and judged; of no use to autoregressive decoding.
    pub drafting: SpecConfig,
}

impl Request {
    /// Positions that it may come to need: prompt, answer and a block.
    pub fn positions(&self) -> usize {
        self.prompt.len().saturating_add(self.max_tokens).saturating_add(self.block)
    }
}

/// A pair loaded on one device.
pub trait Backend {
    /// The device's word in `--device` and in records.
    fn name(&self) -> &'static str;

    /// Sequences of their own, as many as the backend was made for.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little.
    fn decoder(&self) -> Result<Box<dyn Decoder + '_>>;
}

/// Sequences that run together on one device, each in a slot. None of it shows in what another one emits.
pub trait Decoder {
    /// Ids the target has rows for: `0..vocab`.
    fn vocab(&self) -> usize;

    /// Positions a sequence may have, prompt and answer together.
    fn context(&self) -> usize;

    /// Sequences that can run together.
    fn slots(&self) -> usize;

    /// Puts a request into a slot that no sequence has. How many tokens of its prompt need not be run: with `keep` those
    /// that the slot's last sequence left there, without it none. None: it has to wait until others leave.
    ///
    /// # Errors
    /// [`Error::Memory`] where it would not fit alone.
    fn join(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>>;

    /// Runs the next part of the slot's prompt.
    ///
    /// # Errors
    /// [`Error::Model`] where the target's logits are damaged; what the device says.
    fn prefill(&mut self, slot: usize) -> Result<Prefill>;

    /// A round of all sequences whose prompts are done: drafts, verifies, and puts into `out[slot]` what each emitted
    /// (dflash.md 5.1). A sequence that has just joined may have to wait for the next one.
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    fn round(&mut self, out: &mut [Emitted]) -> Result<()>;

    /// Ends the sequence in `slot`, of whose answer the first `tokens` tokens count. What of it can be kept stays until
    /// the memory is needed.
    ///
    /// # Errors
    /// What the device says.
    fn leave(&mut self, slot: usize, tokens: usize) -> Result<()>;

    /// From now on every round leaves its logits to be read, and the next one is not begun before.
    fn watch(&mut self);

    /// Logits `[vocab]` of row `row` of the block of `slot` in the last round, of a decoder that is watched: those that
    /// chose the round's token number `row`.
    ///
    /// # Errors
    /// What the device says.
    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>>;
}

/// How far a prompt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens that the sequence holds.
    pub done: usize,
    /// The token that follows the prompt, once all of it is done.
    pub next: Option<u32>,
}

/// What a round did for a sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emitted {
    /// Accepted drafts and the target's own next token, the new anchor; at least up to where the request ends.
    pub tokens: Vec<u32>,
    /// How many they would be without an end.
    pub judged: usize,
    /// Drafts that the target ran, of all branches.
    pub drafted: usize,
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
pub trait TokenSink {
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
    /// Drafts that each of these rounds ran, a tree's nodes all counted.
    pub drafted: Vec<usize>,
    /// Tokens of the prompt that the decoder held already ([`resume`]).
    pub kept: usize,
    /// From the start to the first token, other sequences' rounds included.
    pub prefill: Duration,
    pub decode: Duration,
}

/// Hears of many generations while they run together. Requests go by their place in the list.
pub trait TokenSinks {
    /// Who hears of request `index`.
    fn of(&mut self, index: usize) -> Result<&mut dyn TokenSink>;

    /// Request `index` is done. Anything but [`Flow::Continue`] interrupts all others, those not yet begun without a word.
    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow>;
}

/// Runs one request to its end.
///
/// Losslessness: rounds differ between block sizes only in how many tokens they bring, never in which, and every
/// stopping rule below looks at tokens one by one; so the answer is a function of prompt, sampling and limits.
///
/// # Errors
/// [`Error::Usage`] for a prompt that is empty or does not fit; [`Error::Model`] for one of tokens that the target does
/// not have; else as the decoder's.
pub fn generate(
    decoder: &mut dyn Decoder,
    request: &Request,
    listener: &mut dyn TokenSink,
) -> Result<Outcome> {
    alone(decoder, request, false, listener)
}

/// As [`generate`], but what the decoder holds of the prompt's first tokens, from the request before, is not run again.
///
/// # Errors
/// As [`generate`].
pub fn resume(decoder: &mut dyn Decoder, request: &Request, listener: &mut dyn TokenSink) -> Result<Outcome> {
    alone(decoder, request, true, listener)
}

fn alone(
    decoder: &mut dyn Decoder,
    request: &Request,
    keep: bool,
    listener: &mut dyn TokenSink,
) -> Result<Outcome> {
    struct One<'a>(&'a mut dyn TokenSink, Option<Outcome>);
    impl TokenSinks for One<'_> {
        fn of(&mut self, _: usize) -> Result<&mut dyn TokenSink> {
            Ok(self.0)
        }
        fn done(&mut self, _: usize, outcome: Outcome) -> Result<Flow> {
            self.1 = Some(outcome);
            Ok(Flow::Continue)
        }
    }
    let mut one = One(listener, None);
    run(decoder, std::slice::from_ref(request), keep, &mut one)?;
    one.1.ok_or_else(|| Error::Internal("a request without an outcome".into()))
}

/// Runs many requests, as many together as the decoder has slots and memory for; who waits joins in the order of the list.
/// Each answer is the one that [`generate`] gives.
///
/// # Errors
/// As [`generate`]; what is wrong with any prompt is found before the first one runs, but that one never fits into the
/// memory there is, when its turn comes.
pub fn generate_all(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    listeners: &mut dyn TokenSinks,
) -> Result<()> {
    run(decoder, requests, false, listeners)
}

/// A request in a slot.
struct RunningRequest<'a> {
    index: usize,
    request: &'a Request,
    /// Tokens that may be emitted.
    room: usize,
    outcome: Outcome,
    clock: Instant,
    filling: bool,
}

fn run(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    keep: bool,
    listeners: &mut dyn TokenSinks,
) -> Result<()> {
    requests.iter().try_for_each(|request| check(decoder, request))?;
    let mut seats: Vec<Option<RunningRequest>> = (0..decoder.slots()).map(|_| None).collect();
    let end = serve(decoder, requests, keep, listeners, &mut seats);
    if end.is_err() {
        // The error is what the caller has to hear, and the decoder is to be of use to others.
        for (slot, seat) in seats.iter().enumerate() {
            if let Some(seat) = seat {
                let _ = decoder.leave(slot, seat.outcome.tokens.len());
            }
        }
    }
    end
}

fn serve<'a>(
    decoder: &mut dyn Decoder,
    requests: &'a [Request],
    keep: bool,
    listeners: &mut dyn TokenSinks,
    seats: &mut [Option<RunningRequest<'a>>],
) -> Result<()> {
    let context = decoder.context();
    let mut emitted = vec![Emitted::default(); seats.len()];
    let mut waiting = requests.iter().enumerate().peekable();
    loop {
        let mut flow = Flow::Continue;
        for (slot, place) in seats.iter_mut().enumerate() {
            while flow == Flow::Continue
                && place.is_none()
                && let Some(&(index, request)) = waiting.peek()
            {
                let room = request.max_tokens.min(context - request.prompt.len());
                let outcome = Outcome {
                    tokens: Vec::new(),
                    finish: if room < request.max_tokens { Finish::Context } else { Finish::Length },
                    accepted: Vec::new(),
                    drafted: Vec::new(),
                    kept: 0,
                    prefill: Duration::ZERO,
                    decode: Duration::ZERO,
                };
                if room == 0 {
                    flow = listeners.done(index, outcome)?;
                } else {
                    let Some(kept) = decoder.join(slot, request, keep)? else { break };
                    let outcome = Outcome { kept, ..outcome };
                    let clock = Instant::now();
                    *place = Some(RunningRequest { index, request, room, outcome, clock, filling: true });
                }
                waiting.next();
            }
        }
        if seats.iter().all(Option::is_none) {
            return match waiting.next() {
                Some((index, _)) if flow == Flow::Continue => {
                    Err(Error::Internal(format!("request {index} waits for memory that nobody has")))
                }
                _ => Ok(()),
            };
        }

        // A part of every prompt that is not done, then a round of the others.
        for (slot, place) in seats.iter_mut().enumerate() {
            if flow == Flow::Continue
                && let Some(seat) = place
                && seat.filling
                && seat.prefill(decoder, slot, listeners)?
                && let Some(seat) = place.take()
            {
                flow = seat.end(decoder, slot, listeners)?;
            }
        }
        if flow == Flow::Continue && seats.iter().flatten().any(|seat| !seat.filling) {
            decoder.round(&mut emitted)?;
            for (slot, place) in seats.iter_mut().enumerate() {
                if flow == Flow::Continue
                    && let Some(seat) = place
                    && seat.round(&emitted[slot], listeners)?
                    && let Some(seat) = place.take()
                {
                    flow = seat.end(decoder, slot, listeners)?;
                }
            }
        }
        if flow != Flow::Continue {
            for (slot, place) in seats.iter_mut().enumerate() {
                if let Some(mut seat) = place.take() {
                    seat.outcome.finish = Finish::Interrupted;
                    seat.end(decoder, slot, listeners)?;
                }
            }
            return Ok(());
        }
    }
}

fn check(decoder: &dyn Decoder, request: &Request) -> Result<()> {
    let (prompt, context) = (request.prompt.len(), decoder.context());
    if prompt == 0 {
        return Err(Error::Usage("the prompt is empty: at least one token is needed".into()));
    }
    if prompt >= context {
        return Err(Error::Usage(format!(
            "the prompt has {prompt} tokens, but the context holds {context}, the answer included"
        )));
    }
    match request.prompt.iter().find(|id| **id as usize >= decoder.vocab()) {
        Some(id) => Err(Error::Model(format!(
            "the prompt holds token id {id}, but the target has {} rows: its tokenizer belongs to another model",
            decoder.vocab()
        ))),
        None => Ok(()),
    }
}

impl RunningRequest<'_> {
    /// Runs a part of the prompt; true when the answer is over.
    fn prefill(
        &mut self,
        decoder: &mut dyn Decoder,
        slot: usize,
        listeners: &mut dyn TokenSinks,
    ) -> Result<bool> {
        let Prefill { done, next } = decoder.prefill(slot)?;
        let listener = listeners.of(self.index)?;
        if listener.prefill(done) != Flow::Continue {
            self.outcome.finish = Finish::Interrupted;
            return Ok(true);
        }
        let Some(first) = next else { return Ok(false) };
        self.outcome.prefill = self.clock.elapsed();
        self.filling = false;
        self.take(&[first], 1, listener)
    }

    /// Moves a round's tokens into the answer; true when it is over.
    fn round(&mut self, emitted: &Emitted, listeners: &mut dyn TokenSinks) -> Result<bool> {
        let Emitted { tokens, judged, drafted } = emitted;
        if tokens.is_empty() {
            return Ok(false);
        }
        let (before, listener) = (self.outcome.tokens.len(), listeners.of(self.index)?);
        self.outcome.accepted.push(*judged);
        self.outcome.drafted.push(*drafted);
        let ended = self.take(tokens, *judged, listener)?;
        listener.round(*judged, self.outcome.tokens.len() - before)?;
        Ok(ended)
    }

    /// Tokens one by one; true when the answer is over.
    fn take(&mut self, tokens: &[u32], judged: usize, listener: &mut dyn TokenSink) -> Result<bool> {
        for (i, id) in tokens.iter().enumerate() {
            self.outcome.tokens.push(*id);
            let finish = match listener.token(*id, i + 1 < judged)? {
                Flow::Interrupt => Finish::Interrupted,
                Flow::Stop => Finish::Stop,
                Flow::Continue if self.request.stop_ids.contains(id) => Finish::Stop,
                Flow::Continue if self.outcome.tokens.len() == self.room => return Ok(true),
                Flow::Continue => continue,
            };
            self.outcome.finish = finish;
            return Ok(true);
        }
        Ok(false)
    }

    fn end(mut self, decoder: &mut dyn Decoder, slot: usize, listeners: &mut dyn TokenSinks) -> Result<Flow> {
        match self.filling {
            true => self.outcome.prefill = self.clock.elapsed(),
            false => self.outcome.decode = self.clock.elapsed() - self.outcome.prefill,
        }
        decoder.leave(slot, self.outcome.tokens.len())?;
        listeners.done(self.index, self.outcome)
    }
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
        "after {at} equal tokens autoregressive decoding {}, and DFlash {}",
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
            drafted: vec![],
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
                "after 1 equal tokens autoregressive decoding goes on with 6, and DFlash goes on with 9",
            ),
            (
                outcome(&[5, 6], Finish::Stop),
                "after 2 equal tokens autoregressive decoding goes on with 7, and DFlash ends there (stop)",
            ),
            (
                outcome(&[5, 6, 7, 8], Finish::Length),
                "after 3 equal tokens autoregressive decoding ends there (length), and DFlash goes on with 8",
            ),
            (
                outcome(&[5, 6, 7], Finish::Stop),
                "after 3 equal tokens autoregressive decoding ends there (length), and DFlash ends there (stop)",
            ),
        ] {
            let error = check_lossless(&plain, &other).unwrap_err();
            assert_eq!((error.exit_code(), error.to_string().as_str()), (6, sentence));
        }
    }
}
