//! Which token is emitted: the sampling law, its randomness, and the rules that judge drafts. The one definition
//! that every device is held to; knows no device and no model.

use crate::Result;

/// How one request samples. `temperature` 0 is greedy and ignores the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    /// Keep the k best, 0 = all.
    pub top_k: usize,
    /// Smallest prefix of that mass, 1 = all.
    pub top_p: f64,
    /// Keep weights of at least this share of the best one's, 0 = all.
    pub min_p: f64,
    /// Philox key.
    pub seed: u64,
    /// Request stream id: which prompt of a run this is, never a batch slot.
    pub stream: u32,
}

impl Sampling {
    /// Refuses NaN, negative and out-of-range values, naming the flag.
    pub fn check(&self) -> Result<()> {
        unimplemented!()
    }

    /// The token for absolute position `position`, given the target's f32 logits `[vocab]` for it. A fixed function
    /// of logits, settings, seed, stream and position: plain and speculative decoding call it alike.
    /// `None` if the row holds a NaN or nothing but `-inf`.
    pub fn choose(&self, _logits: &[f32], _position: u32) -> Option<u32> {
        unimplemented!()
    }
}

/// Index of the largest value, lowest index on ties; `-0.0` equals `0.0`. `None` as in [`Sampling::choose`].
pub fn argmax(_logits: &[f32]) -> Option<u32> {
    unimplemented!()
}
