//! `cuda/tree.cu`: draft trees from a drafter's choices, as [`crate::tree::Tree::best_first`] has them.

use super::round::{Sequence, check_shape};
use super::{aligned, at_least};
use crate::device::{Buffer, Device, Kernel};
use crate::tree::MOST_ROWS;
use crate::{Error, Result};

static BUILD: Kernel = Kernel { file: "tree", name: "tree_build", threads: 32, max_shared: 0 };

/// Trees of up to `rows` rows, the anchor counted (1 to 64), for `sequences` sequences (at most 1024) from blocks of
/// `block` drafted rows (at most 64), of each of which the `most` (1 to 63) best choices are known.
#[derive(Debug, Clone, Copy)]
pub struct TreeBuild {
    pub sequences: usize,
    pub block: usize,
    pub rows: usize,
    pub most: usize,
}

/// Where trees go; padding beyond a sequence's rows is `u32::MAX` in tokens and rows, and 0 elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Trees<'a> {
    /// `[sequences][rows]` u32: the anchor, then the drafts. Where a draft's row is damaged, the tree has two rows, and
    /// the second token is `u32::MAX`.
    pub tokens: &'a Buffer,
    /// `[sequences][rows]` u32: the row that a row follows, of the same sequence.
    pub parents: &'a Buffer,
    /// `[sequences][rows]` u64: bit `j`: row `j` is on the way to this one, or is this one.
    pub masks: &'a Buffer,
    /// `[sequences][rows]` `Row` (cuda/rows.cuh) of the pass that verifies: positions by depth, slots by row.
    pub table: &'a Buffer,
    /// `[sequences]` `Span`
    pub spans: &'a Buffer,
}

impl TreeBuild {
    /// Bytes a launch must move where all trees are full.
    pub fn bytes(&self) -> u64 {
        let TreeBuild { sequences, block, rows, most } = *self;
        (sequences * ((block - 1) * (most * 4 + 4) + rows * 36 + 40)) as u64
    }

    /// `choices` `[sequences][block][most]` (token, cost) and `counts` `[sequences][block]` as
    /// [`super::choices::Choices::launch`] leaves them; row `j` of a block are the choices for the `j`-th token behind the
    /// anchor, row 0 is not read. `sequences` `[sequences]` [`Sequence`]: how deep a tree may be is as many rows as a
    /// block may have.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        trees: Trees<'_>,
        choices: &Buffer,
        counts: &Buffer,
        sequences: &Buffer,
    ) -> Result<()> {
        const NAME: &str = "tree_build";
        let TreeBuild { sequences: count, block, rows, most } = *self;
        check_shape(NAME, count, block)?;
        if !(1..=MOST_ROWS).contains(&rows) || !(1..MOST_ROWS).contains(&most) {
            return Err(Error::Internal(format!(
                "kernel {NAME}: trees of {rows} rows from {most} choices each; possible are 1 to 64 from 1 to 63"
            )));
        }
        at_least(NAME, "tokens", trees.tokens, count * rows * 4)?;
        at_least(NAME, "parents", trees.parents, count * rows * 4)?;
        aligned(NAME, "masks", trees.masks, count * rows * 8)?;
        aligned(NAME, "table", trees.table, count * rows * 16)?;
        aligned(NAME, "spans", trees.spans, count * 8)?;
        aligned(NAME, "choices", choices, count * block * most * 8)?;
        at_least(NAME, "counts", counts, count * block * 4)?;
        aligned(NAME, "sequences", sequences, count * Sequence::BYTES)?;
        let args = [
            trees.tokens.into(),
            trees.parents.into(),
            trees.masks.into(),
            trees.table.into(),
            trees.spans.into(),
            choices.into(),
            counts.into(),
            sequences.into(),
            (block as u32).into(),
            (rows as u32).into(),
            (most as u32).into(),
        ];
        device.launch(&BUILD, [count as u32, 1, 1], 0, &args)
    }
}
