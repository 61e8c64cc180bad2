//! The lossless check: whether a request's answer with drafts equals that of autoregressive decoding.
//! [`check_lossless`] compares tokens; [`check`] also compares the logits that chose each token, bit for bit,
//! on any [`Decoder`].

use crate::engine::decoder::{Decoder, Emitted, Prefill};
use crate::engine::generate::{Flow, TokenSink, generate};
use crate::engine::request::{Finish, Outcome, Request};
use crate::{Error, Result};

/// Checks that a speculative answer has the same tokens as that of autoregressive decoding to the same
/// request, and ended for the same reason.
///
/// # Errors
/// [`Error::Lossless`] with the first difference.
pub fn check_lossless(autoregressive: &Outcome, speculative: &Outcome) -> Result<()> {
    let pairs = autoregressive.tokens.iter().zip(&speculative.tokens);
    let at = pairs.take_while(|(a, b)| a == b).count();
    let next = |outcome: &Outcome| match outcome.tokens.get(at) {
        Some(id) => format!("goes on with {id}"),
        None => format!("ends there ({})", outcome.finish.name()),
    };
    let lengths = [autoregressive.tokens.len(), speculative.tokens.len()];
    if lengths == [at, at] && autoregressive.finish == speculative.finish {
        return Ok(());
    }
    Err(Error::Lossless(format!(
        "after {at} equal tokens autoregressive decoding {}, and DFlash {}",
        next(autoregressive),
        next(speculative)
    )))
}

/// The result of [`check`].
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Number of tokens of the answer with drafts.
    pub tokens: usize,
    /// Number of rounds that produced them.
    pub rounds: usize,
    /// Number of rows whose logits `[vocab]` were compared: one for every token of the answer but the first,
    /// up to the first difference.
    pub compared: usize,
    /// Number of verified rows that produced no token: those after the last accepted draft of a round, and
    /// those of a tree that are not on the accepted path. Autoregressive decoding has no logits to compare
    /// them with.
    pub rejected: usize,
    /// `Ok`, or the first difference as [`Error::Lossless`].
    pub identical: Result<()>,
}

/// Runs `request` by autoregressive decoding and then with its own block size, alone on `decoder`, and
/// compares the runs. Both must give the same tokens and end for the same reason, and every token must come
/// from the same logits, bit for bit.
///
/// `sink` makes a sink for each run. Returns `None` if a sink interrupts. The decoder goes on keeping logits
/// ([`Decoder::keep_logits`]).
///
/// The first token belongs to no round. Both runs get it from the prefill, so only the token is compared. The
/// logits of each row are kept as a hash of 64 bits. Keeping logits changes two things on a device: greedy rounds
/// also write their logits, and no round is enqueued ahead.
///
/// # Errors
/// As [`generate`]. A difference is not an error; the report has it.
pub fn check<S: TokenSink>(
    decoder: &mut dyn Decoder,
    request: &Request,
    mut sink: impl FnMut() -> Result<S>,
) -> Result<Option<Report>> {
    decoder.keep_logits();
    let autoregressive = Request { block: 1, ..request.clone() };
    let mut hashes = Vec::new();
    let expected =
        observe(decoder, &autoregressive, &mut sink()?, &mut |_, _, logits| hashes.push(hash(&logits)))?;
    if expected.finish == Finish::Interrupted {
        return Ok(None);
    }

    let (mut compared, mut differs, mut different_logits) = (0, false, None);
    let mut compare = |at: usize, token: u32, logits: Vec<f32>| {
        // Nothing is compared after the first difference, or after the end of the expected answer.
        if let (false, Some(expected_token)) = (differs, expected.tokens.get(at)) {
            compared += usize::from(at > 0);
            if hash(&logits) != hashes[at] {
                different_logits = Some((at, logits));
            }
            differs = different_logits.is_some() || token != *expected_token;
        }
    };
    let speculative = observe(decoder, request, &mut sink()?, &mut compare)?;
    if speculative.finish == Finish::Interrupted {
        return Ok(None);
    }
    let identical = match different_logits {
        None => check_lossless(&expected, &speculative),
        Some((at, logits)) => {
            // Only hashes were kept, so autoregressive decoding runs again up to this token.
            let up_to = Request { max_tokens: at + 1, stop_ids: vec![], ..autoregressive };
            let mut expected = Vec::new();
            observe(decoder, &up_to, &mut NullSink, &mut |_, _, logits| expected = logits)?;
            let repeats = hash(&expected) == hashes[at];
            Err(difference(at, request.prompt.len() + at, repeats, &expected, &logits))
        }
    };
    let rounds = speculative.drafted.iter().zip(&speculative.accepted);
    Ok(Some(Report {
        tokens: speculative.tokens.len(),
        rounds: speculative.accepted.len(),
        compared,
        rejected: rounds.map(|(drafted, produced)| drafted + 1 - produced).sum(),
        identical,
    }))
}

/// The error for different logits. `at` is the index of the token in the answer, and `position` its position
/// in the sequence. `repeats`: autoregressive decoding gave the same logits in both of its runs.
fn difference(at: usize, position: usize, repeats: bool, expected: &[f32], found: &[f32]) -> Error {
    let pairs = || expected.iter().zip(found).enumerate().filter(|(_, (a, b))| a.to_bits() != b.to_bits());
    let token = format!("token {} (position {position})", at + 1);
    Error::Lossless(match pairs().next() {
        Some((id, (a, b))) if repeats => format!(
            "{token} was chosen from different logits: {} of {} differ, the first that of id {id}: {a} in autoregressive decoding, {b} in \
             DFlash",
            pairs().count(),
            expected.len()
        ),
        _ => format!(
            "autoregressive decoding does not repeat itself: {token} was chosen from different logits when it ran again"
        ),
    })
}

/// A hash of all bits of a row's logits. Two rows that differ in exactly one logit always have different
/// hashes.
fn hash(logits: &[f32]) -> u64 {
    let mix = |hash: u64, logit: &f32| {
        (hash.rotate_left(27) ^ u64::from(logit.to_bits())).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    };
    logits.iter().fold(0, mix)
}

/// Called with each emitted token: its index, its id, and the logits that it was chosen from, empty for the
/// first. Rounds may emit more tokens than the answer has.
type Observer<'a> = dyn FnMut(usize, u32, Vec<f32>) + 'a;

fn observe(
    decoder: &mut dyn Decoder,
    request: &Request,
    sink: &mut dyn TokenSink,
    observer: &mut Observer,
) -> Result<Outcome> {
    generate(&mut Observed { decoder, slot: 0, tokens: 0, observer }, request, sink)
}

struct NullSink;

impl TokenSink for NullSink {
    fn token(&mut self, _id: u32, _drafted: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

/// A decoder of one sequence that reports every emitted token to an observer.
struct Observed<'a> {
    decoder: &'a mut dyn Decoder,
    slot: usize,
    tokens: usize,
    observer: &'a mut Observer<'a>,
}

impl Decoder for Observed<'_> {
    fn vocab(&self) -> usize {
        self.decoder.vocab()
    }

    fn context(&self) -> usize {
        self.decoder.context()
    }

    fn slots(&self) -> usize {
        self.decoder.slots()
    }

    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        self.slot = slot;
        self.decoder.admit(slot, request, keep)
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let prefill = self.decoder.prefill(slot)?;
        if let Some(first) = prefill.next {
            (self.observer)(0, first, Vec::new());
            self.tokens = 1;
        }
        Ok(prefill)
    }

    fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
        self.decoder.round(out)?;
        for (row, token) in out[self.slot].tokens.iter().enumerate() {
            (self.observer)(self.tokens, *token, self.decoder.logits(self.slot, row)?);
            self.tokens += 1;
        }
        Ok(())
    }

    fn release(&mut self, slot: usize, tokens: usize) -> Result<()> {
        self.decoder.release(slot, tokens)
    }

    fn keep_logits(&mut self) {
        self.decoder.keep_logits();
    }

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        self.decoder.logits(slot, row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_first_difference_of_two_answers_is_reported() {
        let outcome = |tokens: &[u32], finish| Outcome { tokens: tokens.to_vec(), ..Outcome::new(finish) };
        let expected = outcome(&[5, 6, 7], Finish::Length);
        // Rounds and times may differ.
        let same = Outcome { accepted: vec![2], decode: Duration::from_secs(1), ..expected.clone() };
        assert_eq!(check_lossless(&expected, &same), Ok(()));
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
            let error = check_lossless(&expected, &other).unwrap_err();
            assert_eq!((error.exit_code(), error.to_string().as_str()), (6, sentence));
        }
    }
}
