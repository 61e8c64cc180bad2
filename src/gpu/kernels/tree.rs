//! `cuda/spec/tree.cu`: draft trees from a drafter's choices, as [`crate::spec::tree::Tree::best_first`] has them.

use super::round::{Sequence, check_shape};
use super::{aligned, at_least};
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::spec::tree::MOST_ROWS;
use crate::{Error, Result};

static BUILD: Kernel = Kernel { file: "tree", name: "tree_build", threads: 32, max_shared: 0 };

/// Trees of up to `wide` rows, the anchor counted (1 to 64), for `sequences` sequences (at most 1024) from blocks of
/// `block` drafted rows (at most 64), of each of which the `most` (1 to 63) best choices are known.
#[derive(Debug, Clone, Copy)]
pub struct TreeBuild {
    pub sequences: usize,
    pub block: usize,
    pub wide: usize,
    pub most: usize,
}

/// Where trees go; padding beyond a sequence's rows is `u32::MAX` in tokens and rows, and 0 elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Trees<'a> {
    /// `[sequences][wide]` u32: the anchor, then the drafts. Where a draft's row is damaged, the tree has two rows, and
    /// the second token is `u32::MAX`.
    pub tokens: &'a Buffer,
    /// `[sequences][wide]` u32: the row that a row follows, of the same sequence.
    pub parents: &'a Buffer,
    /// `[sequences][wide]` u64: bit `j`: row `j` is on the way to this one, or is this one.
    pub masks: &'a Buffer,
    /// `[sequences][wide]` `Row` (cuda/common/rows.cuh) of the pass that verifies: positions by depth, slots by row.
    pub table: &'a Buffer,
    /// `[sequences]` `Span`
    pub spans: &'a Buffer,
}

impl TreeBuild {
    /// Bytes a launch must move where all trees are full.
    pub fn bytes(&self) -> u64 {
        let TreeBuild { sequences, block, wide, most } = *self;
        (sequences * ((block - 1) * (most * 4 + 4) + wide * 36 + 40)) as u64
    }

    /// `choices` `[sequences][block][most]` (token, cost) and `counts` `[sequences][block]` as
    /// [`super::choices::Choices::launch`] leaves them; row `j` of a block are the choices for the `j`-th token behind the
    /// anchor, row 0 is not read. `sequences` `[sequences]` [`Sequence`]: how deep a tree may be is as many rows as a
    /// block may have. `drafts` `[sequences][block]` u32, of those that draft chains: the drafts of a block, row 0 not read;
    /// their rows follow each other. `typical` `[most]` u32, of trees whose tokens are to be drawn:
    /// [`crate::spec::tree::typical`] of each place; their tokens are left `u32::MAX`.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
    #[allow(clippy::too_many_arguments)] // what a kernel takes
    pub fn launch(
        &self,
        device: &dyn Device,
        trees: Trees<'_>,
        choices: &Buffer,
        counts: &Buffer,
        drafts: &Buffer,
        typical: &Buffer,
        sequences: &Buffer,
    ) -> Result<()> {
        const NAME: &str = "tree_build";
        let TreeBuild { sequences: count, block, wide, most } = *self;
        check_shape(NAME, count, block)?;
        if !(1..=MOST_ROWS).contains(&wide) || !(1..MOST_ROWS).contains(&most) {
            return Err(Error::Internal(format!(
                "kernel {NAME}: trees of {wide} rows from {most} choices each; possible are 1 to 64 from 1 to 63"
            )));
        }
        at_least(NAME, "tokens", trees.tokens, count * wide * 4)?;
        at_least(NAME, "parents", trees.parents, count * wide * 4)?;
        aligned(NAME, "masks", trees.masks, count * wide * 8)?;
        aligned(NAME, "table", trees.table, count * wide * 16)?;
        aligned(NAME, "spans", trees.spans, count * 8)?;
        aligned(NAME, "choices", choices, count * block * most * 8)?;
        at_least(NAME, "counts", counts, count * block * 4)?;
        at_least(NAME, "drafts", drafts, count * block * 4)?;
        at_least(NAME, "typical", typical, most * 4)?;
        aligned(NAME, "sequences", sequences, count * Sequence::BYTES)?;
        let args = [
            trees.tokens.into(),
            trees.parents.into(),
            trees.masks.into(),
            trees.table.into(),
            trees.spans.into(),
            choices.into(),
            counts.into(),
            drafts.into(),
            typical.into(),
            sequences.into(),
            (block as u32).into(),
            (wide as u32).into(),
            (most as u32).into(),
        ];
        device.launch(&BUILD, [count as u32, 1, 1], 0, &args)
    }
}
