//! `cuda/spec/tree.cu`: builds draft trees from a drafter's choices, as
//! [`Tree::best_first`](crate::spec::tree::Tree::best_first) defines them, and the shapes of sampled trees.

use super::check::{Check, args, or_null, u32s};
use super::round::Sequence;
use super::{ROW_BYTES, SPAN_BYTES};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::spec::tree::MAX_TREE_ROWS;

static BUILD: Kernel = Kernel { file: "tree", name: "tree_build", threads: 32, max_shared: 0 };

/// Builds one tree per sequence.
#[derive(Debug, Clone, Copy)]
pub struct TreeBuild {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of the drafter's block, 1 to 64.
    pub block: usize,
    /// Rows of a tree, anchor included, 1 to 64.
    pub max_verify_rows: usize,
    /// Choices per row of a block, 1 to 63.
    pub per_row: usize,
}

/// The output. Padding after a sequence's rows is `u32::MAX` in `tokens` and in the fields of `table` except
/// position, and 0 elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Trees<'a> {
    /// `[sequences][max_verify_rows]` u32: the anchor, then the drafts. If a row of choices is invalid, the
    /// tree has two rows and its second token is `u32::MAX`.
    pub tokens: &'a Buffer,
    /// `[sequences][max_verify_rows]` u32: the parent of each row, a row of the same sequence.
    pub parents: &'a Buffer,
    /// `[sequences][max_verify_rows]` u64: bit `j` is set if row `j` is the row itself or one of its
    /// ancestors.
    pub masks: &'a Buffer,
    /// `[sequences][max_verify_rows]` `Row` of the verification pass: positions by depth, slots by row.
    pub table: &'a Buffer,
    /// `[sequences]` `Span` of the verification pass.
    pub spans: &'a Buffer,
}

impl TreeBuild {
    /// Bytes a launch must move if all trees are full.
    pub fn bytes(&self) -> u64 {
        let TreeBuild { sequences, block, max_verify_rows, per_row } = *self;
        (sequences * ((block - 1) * (per_row * 4 + 4) + max_verify_rows * 36 + 40)) as u64
    }

    /// Builds the trees.
    ///
    /// - `choices` `[sequences][block][per_row]` (token, cost) u32 and `counts` `[sequences][block]` u32:
    ///   written by [`super::choices::Choices::launch`]. Row `j` of a block has the choices for the `j`-th
    ///   token after the anchor; row 0 is not read.
    /// - `drafts` `[sequences][block]` u32: the drafts of sequences that draft chains; row 0 is not read. They
    ///   become a tree without branches.
    /// - `typical` `[per_row]` u32: [`crate::spec::tree::typical_cost`] of each place among siblings, for
    ///   sampled trees. Their drafts are set to `u32::MAX` and sampled later.
    /// - `sequences` `[sequences]` [`Sequence`]: the depth of a tree is at most the number of drafts of the
    ///   sequence's block.
    /// - `kept` `[sequences]` u32: the number of rows of a block, the anchor's included, whose drafts are used.
    ///   Without it all are.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn launch(
        &self,
        device: &dyn Device,
        trees: Trees<'_>,
        choices: &Buffer,
        counts: &Buffer,
        drafts: &Buffer,
        typical: &Buffer,
        sequences: &Buffer,
        kept: Option<&Buffer>,
    ) -> Result<()> {
        let TreeBuild { sequences: count, block, max_verify_rows: rows, per_row } = *self;
        let check = Check("tree_build");
        check.blocks(count, block)?;
        check.that(
            (1..=MAX_TREE_ROWS).contains(&rows) && (1..MAX_TREE_ROWS).contains(&per_row),
            format_args!("trees of {rows} rows from {per_row} choices each"),
            "1 to 64 rows from 1 to 63 choices",
        )?;
        check.at_least("tokens", trees.tokens, count * rows * 4)?;
        check.at_least("parents", trees.parents, count * rows * 4)?;
        check.aligned("masks", trees.masks, count * rows * 8)?;
        check.aligned("table", trees.table, count * rows * ROW_BYTES)?;
        check.aligned("spans", trees.spans, count * SPAN_BYTES)?;
        check.aligned("choices", choices, count * block * per_row * 8)?;
        check.at_least("counts", counts, count * block * 4)?;
        check.at_least("drafts", drafts, count * block * 4)?;
        check.at_least("typical", typical, per_row * 4)?;
        check.aligned("sequences", sequences, count * Sequence::BYTES)?;
        let Trees { tokens, parents, masks, table, spans } = trees;
        check.optional("kept", kept, count * 4)?;
        let buffers = [tokens, parents, masks, table, spans, choices, counts, drafts, typical, sequences];
        let mut args = args(buffers, []);
        args.push(or_null(kept));
        args.extend(u32s([block, rows, per_row]));
        device.launch(&BUILD, [count as u32, 1, 1], 0, &args)
    }
}
