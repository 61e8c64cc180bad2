//! The traits that a device implements: [`Backend`] and [`Decoder`].

use crate::Result;
use crate::engine::request::Request;

/// A pair of models loaded on one device.
pub trait Backend {
    /// The device's name in records.
    fn name(&self) -> &'static str;

    /// Makes a decoder with the capacity that the backend was loaded with.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is too little memory.
    fn decoder(&self) -> Result<Box<dyn Decoder + '_>>;
}

/// Sequences that run together on one device, each in a slot. Sequences never affect each other's output.
///
/// A sequence is admitted to a slot, prefilled in chunks, and then takes part in every round until it is
/// released.
pub trait Decoder {
    /// Vocabulary size: token ids are `0..vocab`.
    fn vocab(&self) -> usize;

    /// Maximum positions of a sequence, prompt and answer together.
    fn context(&self) -> usize;

    /// Number of sequences that can run together.
    fn slots(&self) -> usize;

    /// Admits a request to a free slot.
    ///
    /// Returns how many tokens of its prompt need not run: with `keep`, the prefix whose KV cache the slot's
    /// last sequence left there; without it, none. Returns `None` if the request has to wait until other
    /// sequences are released.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the request would not fit even alone.
    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>>;

    /// Runs the next chunk of the slot's prompt.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if the target's logits are not finite; errors of the device.
    fn prefill(&mut self, slot: usize) -> Result<Prefill>;

    /// Runs a round of all sequences whose prefill is complete: drafts, verifies, and writes to `out`
    /// `[slots]` what each emitted (docs/dflash.md 5.1). A sequence that has just completed its prefill may
    /// have to wait for the next round.
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    fn round(&mut self, out: &mut [Emitted]) -> Result<()>;

    /// Ends the sequence in `slot`. Its answer is the first `tokens` tokens that it emitted. Its KV cache
    /// stays, as far as a later prompt can reuse it, until the memory is needed.
    ///
    /// # Errors
    /// Errors of the device.
    fn release(&mut self, slot: usize, tokens: usize) -> Result<()>;

    /// Makes every later round keep its logits for [`Decoder::logits`]. No round is then enqueued ahead.
    fn keep_logits(&mut self);

    /// The target's logits `[vocab]` that the last round chose token `row` of `slot` from, counted from 0.
    /// Needs [`Decoder::keep_logits`].
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the round emitted no such token; errors of the device.
    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>>;
}

/// Progress of a prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefill {
    /// Number of prompt tokens in the KV cache.
    pub done: usize,
    /// The first token of the answer, once the whole prompt has run.
    pub next: Option<u32>,
}

/// What a round emitted for a sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emitted {
    /// The accepted drafts and the bonus token, which is the new anchor. May be cut where the request ends.
    pub tokens: Vec<u32>,
    /// Number of tokens that the round produced, before any cut.
    pub produced: usize,
    /// Number of drafts that the target verified, on all branches of a tree.
    pub drafted: usize,
}
