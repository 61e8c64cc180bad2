//! `cuda/spec/lookup.cu`: drafts looked up in a sequence's tokens, as [`crate::spec::lookup`] defines them.

use super::check::{Check, args, or_null, u32s};
use super::rejection::DISTRIBUTION_BYTES;
use super::round::Sequence;
use crate::Result;
use crate::checkpoint::pair;
use crate::gpu::device::{Buffer, Device, Kernel};

static LOOKUP: Kernel = Kernel { file: "lookup", name: "lookup", threads: 512, max_shared: 0 };

/// Looks up the drafts of each sequence.
#[derive(Debug, Clone, Copy)]
pub struct Lookup {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of a block, the anchor's and the drafts', 1 to 64.
    pub block: usize,
    /// Positions of a sequence, 1 to 2^31.
    pub positions: usize,
    /// The lengths of matches.
    pub lengths: pair::Lookup,
}

impl Lookup {
    /// Writes `drafts` `[sequences][block]` u32, from row 1 of each block on, and `kept` `[sequences]` u32:
    /// `block`, or 1 without drafts. With `distributions` `[sequences][block]` of
    /// [`super::rejection::DISTRIBUTION_BYTES`], also those of the drafts. `history` `[sequences][positions]`
    /// u32: the tokens up to the anchor. `sequences` `[sequences]` [`Sequence`].
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        drafts: &Buffer,
        kept: &Buffer,
        distributions: Option<&Buffer>,
        history: &Buffer,
        sequences: &Buffer,
    ) -> Result<()> {
        let Lookup { sequences: count, block, positions, lengths } = *self;
        let check = Check("lookup");
        check.blocks(count, block)?;
        check.that(
            (1..=1 << 31).contains(&positions) && (1..=lengths.most).contains(&lengths.least),
            format_args!("{positions} positions, matches of {} to {}", lengths.least, lengths.most),
            "1 to 2^31 positions, matches of at least 1",
        )?;
        check.at_least("drafts", drafts, count * block * 4)?;
        check.at_least("kept", kept, count * 4)?;
        check.optional("distributions", distributions, count * block * DISTRIBUTION_BYTES)?;
        check.at_least("history", history, count * positions * 4)?;
        check.aligned("sequences", sequences, count * Sequence::BYTES)?;
        let mut args = args([drafts, kept], []);
        args.extend([or_null(distributions), history.into(), sequences.into()]);
        args.extend(u32s([block, positions, lengths.least, lengths.most]));
        device.launch(&LOOKUP, [count as u32, 1, 1], 0, &args)
    }
}
