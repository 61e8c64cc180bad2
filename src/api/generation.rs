//! One answer, token by token. A round runs when a token is requested and none is ready.

use crate::engine::generate::{Decoder, Emitted, Finish, Outcome, Prefill, Request};
use crate::engine::stats;
use crate::text::tokenizer::Stream;
use crate::{Error, Result};
use std::collections::VecDeque;
use std::time::Instant;

/// One token of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The token's id.
    pub id: u32,
    /// The text that this token completes. It may be empty, and it may include text of earlier tokens: a
    /// character can take several tokens, and text that may begin a stop string is held back. The texts of
    /// all tokens together are the answer.
    pub text: String,
    /// The round that emitted it, from 1 on. The first token comes from the prefill: round 0.
    pub round: usize,
    /// Whether this token is an accepted draft. Other tokens are sampled from the target.
    pub accepted: bool,
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The answer, without special tokens and without the stop string. Empty without a tokenizer.
    pub text: String,
    /// Number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// Token ids, why the answer ended, tokens and drafts per round, and times. While the request is still
    /// running, [`Outcome::finish`] is [`Finish::Interrupted`].
    pub outcome: Outcome,
}

impl Completion {
    /// The answer's token ids, including a stop id that ended it.
    pub fn tokens(&self) -> &[u32] {
        &self.outcome.tokens
    }

    /// Why the answer ended.
    pub fn finish(&self) -> Finish {
        self.outcome.finish
    }

    /// Number of rounds after the prefill. Each has one pass of the target.
    pub fn rounds(&self) -> usize {
        self.outcome.accepted.len()
    }

    /// Acceptance length: mean number of tokens per round, bonus token included. `None` without rounds.
    pub fn tau(&self) -> Option<f64> {
        stats::tau(&self.outcome.accepted)
    }

    /// Tokens of the answer per second of prefill and decoding together.
    pub fn tokens_per_second(&self) -> f64 {
        stats::rate(&self.outcome)
    }
}

/// A decoder that belongs to one answer, or one that a session lends to it.
pub(crate) enum DecoderRef<'a> {
    Owned(Box<dyn Decoder + 'a>),
    Borrowed(&'a mut (dyn Decoder + 'a)),
}

impl<'a> DecoderRef<'a> {
    fn get(&mut self) -> &mut (dyn Decoder + 'a) {
        match self {
            DecoderRef::Owned(decoder) => &mut **decoder,
            DecoderRef::Borrowed(decoder) => *decoder,
        }
    }
}

/// The decoder's slot that answers use.
const SLOT: usize = 0;

/// An answer that is being generated: an iterator over its [`Token`]s.
///
/// Tokens become available as rounds produce them. Dropping the iterator ends the answer. An error ends it
/// too and is the last item.
///
/// ```
/// use dflash::{Engine, Finish, Models, Params};
///
/// # fn main() -> dflash::Result<()> {
/// let engine = Engine::open(Models::demo())?;
/// let mut answer = engine.generate("def f(x):", Params::default().max_tokens(20))?;
/// let first = answer.next().unwrap()?;
/// assert_eq!((first.round, first.accepted), (0, false));
/// let whole = answer.finish()?;
/// assert_eq!((whole.tokens().len(), whole.finish()), (20, Finish::Length));
/// # Ok(())
/// # }
/// ```
pub struct Generation<'a> {
    decoder: DecoderRef<'a>,
    request: Request,
    /// `None` without a tokenizer, and once the answer has ended.
    stream: Option<Stream<'a>>,
    /// [`Request::limit`].
    limit: (usize, Finish),
    phase: Phase,
    /// Items that the iterator has not returned yet. An error is the last one.
    ready: VecDeque<Result<Token>>,
    /// What a round emits, `[slots]`.
    emitted: Vec<Emitted>,
    completion: Completion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The request has no slot yet.
    Waiting,
    Prefill,
    Rounds,
    /// The answer has ended and the slot is free.
    Done,
}

impl<'a> Generation<'a> {
    /// `keep`: whether to reuse the decoder's KV cache for the prefix that the prompt shares with it.
    pub(crate) fn start(
        mut decoder: DecoderRef<'a>,
        request: Request,
        stream: Option<Stream<'a>>,
        keep: bool,
    ) -> Result<Generation<'a>> {
        let (context, slots) = (decoder.get().context(), decoder.get().slots());
        let limit = request.limit(context);
        let completion = Completion {
            text: String::new(),
            prompt_tokens: request.prompt.len(),
            outcome: Outcome::new(Finish::Interrupted),
        };
        let mut generation = Generation {
            decoder,
            request,
            stream,
            limit,
            phase: Phase::Waiting,
            ready: VecDeque::new(),
            emitted: vec![Emitted::default(); slots],
            completion,
        };
        if let Some(finish) = generation.request.end(&[], limit) {
            generation.end(finish)?;
            return Ok(generation);
        }
        let Generation { decoder, request, completion, .. } = &mut generation;
        let Some(kept) = decoder.get().admit(SLOT, request, keep)? else {
            return Err(Error::Internal("the only request of a decoder has to wait for memory".into()));
        };
        completion.outcome.kept = kept;
        generation.phase = Phase::Prefill;
        Ok(generation)
    }

    /// Runs the answer to its end.
    ///
    /// # Errors
    /// What the device reports; [`Error::Model`] if the weights are damaged.
    pub fn finish(mut self) -> Result<Completion> {
        loop {
            self.ready.drain(..).try_for_each(|item| item.map(drop))?;
            if self.phase == Phase::Done {
                break;
            }
            self.step()?;
        }
        let text = std::mem::take(&mut self.completion.text);
        Ok(Completion { text, ..self.completion.clone() })
    }

    /// The answer so far, including tokens of the last round that the iterator has not returned yet.
    pub fn so_far(&self) -> &Completion {
        &self.completion
    }

    /// Runs the whole prefill on the first call, and one round on each later call.
    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        match self.phase {
            Phase::Prefill => {
                let first = loop {
                    if let Prefill { next: Some(first), .. } = self.decoder.get().prefill(SLOT)? {
                        break first;
                    }
                };
                self.phase = Phase::Rounds;
                let end = self.take(&[first], 1)?;
                self.completion.outcome.prefill += start.elapsed();
                end.map_or(Ok(()), |finish| self.end(finish))
            }
            Phase::Rounds => {
                self.decoder.get().round(&mut self.emitted)?;
                let Emitted { tokens, produced, drafted } = std::mem::take(&mut self.emitted[SLOT]);
                let mut end = None;
                if !tokens.is_empty() {
                    self.completion.outcome.accepted.push(produced);
                    self.completion.outcome.drafted.push(drafted);
                    end = self.take(&tokens, produced)?;
                }
                self.completion.outcome.decode += start.elapsed();
                end.map_or(Ok(()), |finish| self.end(finish))
            }
            Phase::Waiting | Phase::Done => Ok(()),
        }
    }

    /// Appends a round's tokens one by one until the answer ends. `produced` is the number of tokens of the
    /// round before any cut; all but the last of them are accepted drafts.
    fn take(&mut self, tokens: &[u32], produced: usize) -> Result<Option<Finish>> {
        for (i, &id) in tokens.iter().enumerate() {
            let (text, stopped) = self.stream.as_mut().map_or(Ok(Default::default()), |s| s.push(id))?;
            let outcome = &mut self.completion.outcome;
            outcome.tokens.push(id);
            self.completion.text += &text;
            let round = outcome.accepted.len();
            self.ready.push_back(Ok(Token { id, text, round, accepted: i + 1 < produced }));
            let end =
                if stopped { Some(Finish::Stop) } else { self.request.end(&outcome.tokens, self.limit) };
            if end.is_some() {
                return Ok(end);
            }
        }
        Ok(None)
    }

    /// Ends the answer. The text that was held back is added to its last token.
    fn end(&mut self, finish: Finish) -> Result<()> {
        let rest = self.stream.take().map(Stream::finish).unwrap_or_default();
        self.completion.text += &rest;
        if let Some(Ok(last)) = self.ready.back_mut() {
            last.text += &rest;
        }
        self.completion.outcome.finish = finish;
        self.release()
    }

    /// Frees the slot.
    fn release(&mut self) -> Result<()> {
        let admitted = matches!(self.phase, Phase::Prefill | Phase::Rounds);
        self.phase = Phase::Done;
        match admitted {
            true => self.decoder.get().release(SLOT, self.completion.outcome.tokens.len()),
            false => Ok(()),
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        // On a device a round may return no tokens, because its results are read later.
        while self.ready.is_empty() && self.phase != Phase::Done {
            if let Err(error) = self.step() {
                // The first error is the one to report, after the tokens that precede it.
                let _ = self.release();
                self.ready.push_back(Err(error));
            }
        }
        self.ready.pop_front()
    }
}

impl std::iter::FusedIterator for Generation<'_> {}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        // A session goes on with the decoder, so its slot must be free. `drop` cannot return the error; the
        // decoder reports it again when it is used next.
        let _ = self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::config::SpecConfig;
    use crate::spec::sampling::SamplingParams;

    /// A decoder whose rounds emit three tokens, and whose `release` fails.
    struct FailsToRelease;

    impl Decoder for FailsToRelease {
        fn vocab(&self) -> usize {
            10
        }
        fn context(&self) -> usize {
            10
        }
        fn slots(&self) -> usize {
            1
        }
        fn admit(&mut self, _slot: usize, _request: &Request, _keep: bool) -> Result<Option<usize>> {
            Ok(Some(0))
        }
        fn prefill(&mut self, _slot: usize) -> Result<Prefill> {
            Ok(Prefill { done: 1, next: Some(1) })
        }
        fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
            out[0] = Emitted { tokens: vec![2, 3, 4], produced: 3, drafted: 2 };
            Ok(())
        }
        fn release(&mut self, _slot: usize, _tokens: usize) -> Result<()> {
            Err(Error::Internal("release".into()))
        }
        fn keep_logits(&mut self) {}
        fn logits(&mut self, _slot: usize, _row: usize) -> Result<Vec<f32>> {
            Ok(vec![])
        }
    }

    #[test]
    fn an_error_at_the_end_of_an_answer_is_the_last_item() {
        let start = || {
            let request = Request {
                prompt: vec![0],
                max_tokens: 3,
                sampling: SamplingParams::default(),
                stop_ids: vec![],
                block: 3,
                spec: SpecConfig::default(),
            };
            let decoder = DecoderRef::Owned(Box::new(FailsToRelease));
            Generation::start(decoder, request, None, false).unwrap()
        };
        let error = Error::Internal("release".into());
        let items: Vec<_> = start().map(|item| item.map(|token| token.id)).collect();
        assert_eq!(items, [Ok(1), Ok(2), Ok(3), Err(error.clone())]);
        // `finish` reports the error too, if the iterator has not returned it yet.
        for taken in 0..4 {
            let mut answer = start();
            (0..taken).for_each(|_| assert!(answer.next().unwrap().is_ok()));
            assert_eq!(answer.finish(), Err(error.clone()), "after {taken} tokens");
        }
    }
}
