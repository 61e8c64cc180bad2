//! `cuda/spec/verify.cu`: which drafts stand, as [`crate::spec::verify::match_chain`] and [`crate::spec::verify::match_tree`] have it.

use super::round::check_shape;
use super::{aligned, at_least};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

static VERIFY: Kernel = Kernel { file: "verify", name: "verify", threads: 32, max_shared: 0 };

/// The verdict on `sequences` blocks of `block` rows (at most 64).
#[derive(Debug, Clone, Copy)]
pub struct Verify {
    pub sequences: usize,
    pub block: usize,
}

/// Where a verdict goes.
#[derive(Debug, Clone, Copy)]
pub struct Verdict<'a> {
    /// `[sequences]` u32: drafts that stand.
    pub accepted: &'a Buffer,
    /// `[sequences]` u32: the token after them; `u32::MAX` where its row is damaged or the sequence takes no part.
    pub next: &'a Buffer,
    /// `[sequences][block]` u32: rows of the block on the way there, 0 first; `u32::MAX` beyond `accepted + 1` of them.
    pub path: &'a Buffer,
}

impl Verdict<'_> {
    pub(super) fn check(&self, kernel: &str, sequences: usize, block: usize) -> Result<()> {
        at_least(kernel, "accepted", self.accepted, sequences * 4)?;
        at_least(kernel, "next", self.next, sequences * 4)?;
        at_least(kernel, "path", self.path, sequences * block * 4)
    }
}

impl Verify {
    /// Bytes a launch must move, trees' parents counted.
    pub fn bytes(&self) -> u64 {
        (self.sequences * (self.block * 16 + 16)) as u64
    }

    /// `choices` and `tokens` `[sequences][block]` u32: what the target chose at each row, and the anchor and the drafts;
    /// `parents` `[sequences][block]` u32: the row that a draft follows, none for chains; `spans` `[sequences]`: `Span`s
    /// (cuda/common/rows.cuh), of which the number of rows counts.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a size outside the limits; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        verdict: Verdict<'_>,
        choices: &Buffer,
        tokens: &Buffer,
        parents: Option<&Buffer>,
        spans: &Buffer,
    ) -> Result<()> {
        let Verify { sequences, block } = *self;
        check_shape("verify", sequences, block)?;
        verdict.check("verify", sequences, block)?;
        at_least("verify", "choices", choices, sequences * block * 4)?;
        at_least("verify", "tokens", tokens, sequences * block * 4)?;
        aligned("verify", "spans", spans, sequences * 8)?;
        if let Some(parents) = parents {
            at_least("verify", "parents", parents, sequences * block * 4)?;
        }
        let args = [
            verdict.accepted.into(),
            verdict.next.into(),
            verdict.path.into(),
            choices.into(),
            tokens.into(),
            parents.map_or(Arg::Null, Arg::from),
            spans.into(),
            (block as u32).into(),
        ];
        device.launch(&VERIFY, [sequences as u32, 1, 1], 0, &args)
    }
}
