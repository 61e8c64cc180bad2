//! `cuda/spec/siblings.cu`: trees whose siblings are drawn without replacement, as [`crate::spec::verify::sample_tree`] has them, and
//! judged by [`crate::spec::verify::recursive_rejection`].

use super::round::{Sequence, check_shape};
use super::rules::{DISTRIBUTION_BYTES, Rows, TABLE_BYTES};
use super::verify::Verdict;
use super::{aligned, at_least};
use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::{Error, Result};

static DRAW: Kernel = Kernel { file: "siblings", name: "sample_siblings", threads: 512, max_shared: 0 };
static JUDGE: Kernel = Kernel { file: "siblings", name: "verify_tree", threads: 512, max_shared: 0 };

/// The kernels for `sequences` sequences (at most 1024), over `vocab` tokens (at most 2^26): trees of up to `wide` rows,
/// the anchor counted, from blocks of `block` rows of the drafter (each at most 64).
///
/// Sequences whose rule is `rejection` and that draw a tree, of two rows or more, take part; what there is of others is
/// left as it is.
#[derive(Debug, Clone, Copy)]
pub struct Siblings {
    pub sequences: usize,
    pub block: usize,
    pub wide: usize,
    pub vocab: usize,
}

/// Trees that are drawn in a shape that is there before.
#[derive(Debug, Clone, Copy)]
pub struct Drawn<'a> {
    /// `[sequences][wide]` u32: the anchor, then the drafts; `u32::MAX`: padding, or a draft whose distribution is damaged.
    pub tokens: &'a Buffer,
    /// `[sequences][wide]` u32: the row that a row follows, an earlier one of the same sequence.
    pub parents: &'a Buffer,
    /// `[sequences]` `Span`s (cuda/common/rows.cuh), of which the number of rows counts.
    pub spans: &'a Buffer,
}

impl Siblings {
    pub(super) fn check(
        &self,
        kernel: &str,
        trees: Drawn<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Siblings { sequences, block, wide, vocab } = *self;
        check_shape(kernel, sequences, block)?;
        check_shape(kernel, sequences, wide)?;
        if !(1..=1 << 26).contains(&vocab) {
            return Err(Error::Internal(format!("kernel {kernel}: {vocab} tokens; possible are 1 to 2^26")));
        }
        at_least(kernel, "tokens", trees.tokens, sequences * wide * 4)?;
        at_least(kernel, "parents", trees.parents, sequences * wide * 4)?;
        aligned(kernel, "spans", trees.spans, sequences * 8)?;
        aligned(kernel, "the drafter's logits", drafter.logits, sequences * block * vocab * 4)?;
        aligned(
            kernel,
            "the drafter's distributions",
            drafter.distributions,
            sequences * block * DISTRIBUTION_BYTES,
        )?;
        aligned(kernel, "sequences", states, sequences * Sequence::BYTES)?;
        aligned(kernel, "tables", tables, TABLE_BYTES)
    }

    /// The three sizes that all kernels of drawn trees take last.
    pub(super) fn sizes(&self) -> impl Iterator<Item = Arg> {
        [self.vocab, self.block, self.wide].into_iter().map(|n| (n as u32).into())
    }

    /// Draws `trees.tokens`, row by row from the distributions of `drafter`, `[sequences][block]`: the rows of depth `d` from row
    /// `d`'s, siblings in the order of their rows and each without those before it. A row for which no token is left
    /// repeats the one before. `states` `[sequences]` [`Sequence`]: rule, seed, stream, anchor, length and rounds; `tables`
    /// [`super::sample::tables`], sealed.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits; else what the device says.
    pub fn draw(
        &self,
        device: &dyn Device,
        trees: Drawn<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        self.check("sample_siblings", trees, drafter, states, tables)?;
        let mut args = vec![
            trees.tokens.into(),
            drafter.distributions.into(),
            drafter.logits.into(),
            trees.parents.into(),
            trees.spans.into(),
            states.into(),
            tables.into(),
        ];
        args.extend(self.sizes());
        device.launch(&DRAW, [self.wide as u32, self.sequences as u32, 1], 0, &args)
    }

    /// The verdict on such trees, its path `[sequences][wide]`. `target` `[sequences][wide]`: row j's logits and distribution come
    /// after the drafts on the way to row j; the rest as [`Siblings::draw`].
    ///
    /// # Errors
    /// As [`Siblings::draw`].
    #[allow(clippy::too_many_arguments)] // all of a verdict's inputs
    pub fn judge(
        &self,
        device: &dyn Device,
        verdict: Verdict<'_>,
        trees: Drawn<'_>,
        target: Rows<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Siblings { sequences, wide, vocab, .. } = *self;
        self.check("verify_tree", trees, drafter, states, tables)?;
        verdict.check("verify_tree", sequences, wide)?;
        aligned("verify_tree", "the target's logits", target.logits, sequences * wide * vocab * 4)?;
        aligned(
            "verify_tree",
            "the target's distributions",
            target.distributions,
            sequences * wide * DISTRIBUTION_BYTES,
        )?;
        let mut args = vec![
            verdict.accepted.into(),
            verdict.next.into(),
            verdict.path.into(),
            target.distributions.into(),
            target.logits.into(),
            drafter.distributions.into(),
            drafter.logits.into(),
            trees.tokens.into(),
            trees.parents.into(),
            trees.spans.into(),
            states.into(),
            tables.into(),
        ];
        args.extend(self.sizes());
        device.launch(&JUDGE, [sequences as u32, 1, 1], 0, &args)
    }
}
