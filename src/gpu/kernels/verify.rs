//! `cuda/spec/verify.cu`: verification by the method `match`. It accepts drafts as long as they equal the
//! token that the target chose in their place, as [`match_chain`](crate::spec::verify::match_chain) and
//! [`match_tree`](crate::spec::verify::match_tree) define it.

use super::SPAN_BYTES;
use super::check::{Check, or_null, u32s};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static VERIFY: Kernel = Kernel { file: "verify", name: "verify", threads: 32, max_shared: 0 };

/// Verification of one chain or tree per sequence.
#[derive(Debug, Clone, Copy)]
pub struct Verify {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows per sequence, anchor included, 1 to 64.
    pub block: usize,
}

/// The result of a verification, the same for all methods.
#[derive(Debug, Clone, Copy)]
pub struct VerifyOutput<'a> {
    /// `[sequences]` u32: number of accepted drafts.
    pub accepted: &'a Buffer,
    /// `[sequences]` u32: the token after the accepted drafts (correction or bonus token); `u32::MAX` if its
    /// row is invalid or the sequence does not take part.
    pub next: &'a Buffer,
    /// `[sequences][block]` u32: the rows from the anchor (row 0) to the last accepted draft, `accepted + 1`
    /// of them, then `u32::MAX`.
    pub path: &'a Buffer,
}

impl<'a> VerifyOutput<'a> {
    pub(super) fn check(&self, check: &Check, sequences: usize, block: usize) -> Result<()> {
        check.at_least("accepted", self.accepted, sequences * 4)?;
        check.at_least("next", self.next, sequences * 4)?;
        check.at_least("path", self.path, sequences * block * 4)
    }

    /// The buffers in the order of the kernels' arguments.
    pub(super) fn buffers(&self) -> [&'a Buffer; 3] {
        [self.accepted, self.next, self.path]
    }
}

impl Verify {
    /// Bytes a launch must move, parents included.
    pub fn bytes(&self) -> u64 {
        (self.sequences * (self.block * 16 + 16)) as u64
    }

    /// Verifies the drafts. `choices` `[sequences][block]` u32: the target's choice at each row. `tokens`
    /// `[sequences][block]` u32: the anchor and the drafts. `parents` `[sequences][block]` u32: the parent
    /// row of each draft; `None` for chains. `spans` `[sequences]` `Span`: the number of rows of each
    /// sequence.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        output: VerifyOutput<'_>,
        choices: &Buffer,
        tokens: &Buffer,
        parents: Option<&Buffer>,
        spans: &Buffer,
    ) -> Result<()> {
        let Verify { sequences, block } = *self;
        let check = Check("verify");
        check.blocks(sequences, block)?;
        output.check(&check, sequences, block)?;
        check.at_least("choices", choices, sequences * block * 4)?;
        check.at_least("tokens", tokens, sequences * block * 4)?;
        check.aligned("spans", spans, sequences * SPAN_BYTES)?;
        if let Some(parents) = parents {
            check.at_least("parents", parents, sequences * block * 4)?;
        }
        let mut args: Vec<_> = output.buffers().map(Into::into).to_vec();
        args.extend([choices.into(), tokens.into(), or_null(parents), spans.into()]);
        args.extend(u32s([block]));
        device.launch(&VERIFY, [sequences as u32, 1, 1], 0, &args)
    }
}
