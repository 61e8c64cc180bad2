//! Whether DFlash is lossless for a request, bit for bit: not only the same tokens, but each of them chosen by the same
//! logits as in autoregressive decoding. Runs on any [`Decoder`]; the rounds are those of [`generate`], overheard.

use crate::engine::generate::{
    Decoder, Emitted, Finish, Flow, Outcome, Prefill, Request, TokenSink, check_lossless, generate,
};
use crate::{Error, Result};

/// What was held against autoregressive decoding.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Tokens of the answer with drafts.
    pub tokens: usize,
    /// Rounds that brought them.
    pub rounds: usize,
    /// Rows whose logits `[vocab]` were compared: one for every token of the answer but the first, up to a difference.
    pub compared: usize,
    /// Rows behind the last accepted draft of a round: no token came of them, and autoregressive decoding has none to hold against
    /// them; nor of a tree's rows beside its path.
    pub rejected: usize,
    /// [`Error::Lossless`]: the first difference.
    pub identical: Result<()>,
}

/// Runs `request` plainly and then in its own blocks, alone on `decoder`, which is watched from now on: it must give the
/// same tokens and the same end, and every token must come of the same logits, bit for bit. `listener` makes one for each
/// run. None where it interrupts.
///
/// The first token is no round's: both runs have it from the same pass over the prompt, and only the token is compared.
/// Of a row's logits a hash of 64 bits is kept. Watched rounds are not quite those of an unwatched decoder: greedy ones write
/// their logits, too.
///
/// # Errors
/// As [`generate`]. A difference is none: it is in the report.
pub fn check<L: TokenSink>(
    decoder: &mut dyn Decoder,
    request: &Request,
    mut listener: impl FnMut() -> Result<L>,
) -> Result<Option<Report>> {
    decoder.watch();
    let plainly = Request { block: 1, ..request.clone() };
    let mut hashes = Vec::new();
    let plain =
        overhear(decoder, &plainly, &mut listener()?, &mut |_, _, logits| hashes.push(hash(&logits)))?;
    if plain.finish == Finish::Interrupted {
        return Ok(None);
    }

    let (mut compared, mut parted, mut other) = (0, false, None);
    let mut compare = |at: usize, token: u32, logits: Vec<f32>| {
        // Behind a difference all may differ; behind the answer's end is nothing to compare with.
        if let (false, Some(expected)) = (parted, plain.tokens.get(at)) {
            compared += usize::from(at > 0);
            if hash(&logits) != hashes[at] {
                other = Some((at, logits));
            }
            parted = other.is_some() || token != *expected;
        }
    };
    let drafted = overhear(decoder, request, &mut listener()?, &mut compare)?;
    if drafted.finish == Finish::Interrupted {
        return Ok(None);
    }
    let identical = match other {
        None => check_lossless(&plain, &drafted),
        Some((at, logits)) => {
            // Once more up to there: nobody keeps the logits of a whole answer.
            let upto = Request { max_tokens: at + 1, stop_ids: vec![], ..plainly };
            let mut own = Vec::new();
            overhear(decoder, &upto, &mut Silent, &mut |_, _, logits| own = logits)?;
            Err(difference(at, request.prompt.len() + at, hash(&own) == hashes[at], &own, &logits))
        }
    };
    Ok(Some(Report {
        tokens: drafted.tokens.len(),
        rounds: drafted.accepted.len(),
        compared,
        rejected: drafted.drafted.iter().zip(&drafted.accepted).map(|(d, judged)| d + 1 - judged).sum(),
        identical,
    }))
}

/// `at`: the token's place in the answer, from 0. `repeats`: autoregressive decoding gave the same logits twice.
fn difference(at: usize, position: usize, repeats: bool, plain: &[f32], drafted: &[f32]) -> Error {
    let pairs = || plain.iter().zip(drafted).enumerate().filter(|(_, (a, b))| a.to_bits() != b.to_bits());
    let token = format!("token {} (position {position})", at + 1);
    Error::Lossless(match pairs().next() {
        Some((id, (a, b))) if repeats => format!(
            "{token} came of other logits: {} of {} differ, the first that of id {id}: {a} in autoregressive decoding, {b} in \
             DFlash",
            pairs().count(),
            plain.len()
        ),
        _ => format!(
            "autoregressive decoding does not repeat itself: {token} came of other logits when it ran again"
        ),
    })
}

/// Two rows that differ in one logit always have different hashes.
fn hash(logits: &[f32]) -> u64 {
    let mix = |hash: u64, logit: &f32| {
        (hash.rotate_left(27) ^ u64::from(logit.to_bits())).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    };
    logits.iter().fold(0, mix)
}

/// Hears each token of an answer: its place from 0, its id, and the logits it came of, none for the first. Rounds may bring
/// more than the answer takes.
type Ear<'a> = dyn FnMut(usize, u32, Vec<f32>) + 'a;

fn overhear(
    decoder: &mut dyn Decoder,
    request: &Request,
    listener: &mut dyn TokenSink,
    ear: &mut Ear,
) -> Result<Outcome> {
    generate(&mut Overheard { decoder, slot: 0, tokens: 0, ear }, request, listener)
}

struct Silent;

impl TokenSink for Silent {
    fn token(&mut self, _id: u32, _drafted: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

/// A watched decoder of one sequence; whatever it emits is told to somebody else, too.
struct Overheard<'a> {
    decoder: &'a mut dyn Decoder,
    slot: usize,
    tokens: usize,
    ear: &'a mut Ear<'a>,
}

impl Decoder for Overheard<'_> {
    fn vocab(&self) -> usize {
        self.decoder.vocab()
    }

    fn context(&self) -> usize {
        self.decoder.context()
    }

    fn slots(&self) -> usize {
        self.decoder.slots()
    }

    fn join(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        self.slot = slot;
        self.decoder.join(slot, request, keep)
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let prefill = self.decoder.prefill(slot)?;
        if let Some(first) = prefill.next {
            (self.ear)(0, first, Vec::new());
            self.tokens = 1;
        }
        Ok(prefill)
    }

    fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
        self.decoder.round(out)?;
        for (row, token) in out[self.slot].tokens.iter().enumerate() {
            (self.ear)(self.tokens, *token, self.decoder.logits(self.slot, row)?);
            self.tokens += 1;
        }
        Ok(())
    }

    fn leave(&mut self, slot: usize, tokens: usize) -> Result<()> {
        self.decoder.leave(slot, tokens)
    }

    fn watch(&mut self) {
        self.decoder.watch();
    }

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        self.decoder.logits(slot, row)
    }
}
