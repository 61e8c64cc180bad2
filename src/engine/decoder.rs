//! What a device does for sequences: the traits [`Backend`] and [`Decoder`].

use crate::Result;
use crate::engine::request::Request;

/// A pair of models loaded on one device.
pub trait Backend {
    /// The device's name in records.
    fn name(&self) -> &'static str;

    /// A new decoder with the capacity that the backend was made for.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] where there is too little.
    fn decoder(&self) -> Result<Box<dyn Decoder + '_>>;
}

/// Sequences that run together on one device, each in a slot. Sequences never affect each other's output.
///
/// A sequence is admitted to a slot, prefilled in parts, and then takes part in every round until it is
/// released.
pub trait Decoder {
    /// Number of token ids that the target has rows for: `0..vocab`.
    fn vocab(&self) -> usize;

    /// Maximum positions of a sequence, prompt and answer together.
    fn context(&self) -> usize;

    /// Number of sequences that can run together.
    fn slots(&self) -> usize;

    /// Admits a request to a free slot.
    ///
    /// Returns how many tokens of its prompt need not be run: with `keep` those that the slot's last sequence
    /// left there, without it none. Returns `None` if the request has to wait until other sequences are
    /// released.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if it would not fit even alone.
    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>>;

    /// Runs the next part of the slot's prompt.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if the target's logits are not finite; errors of the device.
    fn prefill(&mut self, slot: usize) -> Result<Prefill>;

    /// Runs a round of all sequences whose prompts are done: drafts, verifies, and writes to `out[slot]` what
    /// each emitted (docs/dflash.md 5.1). A sequence that was just admitted may have to wait for the next
    /// round.
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    fn round(&mut self, out: &mut [Emitted]) -> Result<()>;

    /// Ends the sequence in `slot`; the first `tokens` tokens of its answer count. What can be kept of it
    /// stays until the memory is needed.
    ///
    /// # Errors
    /// Errors of the device.
    fn release(&mut self, slot: usize, tokens: usize) -> Result<()>;

    /// From now on every round leaves its logits for [`Decoder::logits`], and no round is enqueued ahead.
    fn watch(&mut self);

    /// The logits `[vocab]` that the last round's token number `row` of `slot` was chosen by. Needs
    /// [`Decoder::watch`].
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the round emitted no such token; errors of the device.
    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>>;
}

/// Progress of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens that the sequence holds.
    pub done: usize,
    /// The token that follows the prompt, once all of it is done.
    pub next: Option<u32>,
}

/// What a round emitted for a sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emitted {
    /// Accepted drafts and the target's own next token, the new anchor. May be cut where the request ends.
    pub tokens: Vec<u32>,
    /// Number of tokens that the round produced, before any cut.
    pub produced: usize,
    /// Drafts that the target verified, all branches counted.
    pub drafted: usize,
}
