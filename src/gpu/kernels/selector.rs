//! `cuda/spec/selector.cu`: the candidate selector of DFlash2 drafters, except for the projection of the rows,
//! which [`super::head`] multiplies.

use super::ROW_BYTES;
use super::check::{Check, args};
use super::round::Sequence;
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};
use std::ops::Range;

static CANDIDATES: Kernel =
    Kernel { file: "selector", name: "selector_candidates", threads: 512, max_shared: 0 };
static WALK: Kernel = Kernel { file: "selector", name: "selector_walk", threads: 512, max_shared: 0 };

/// The most candidates of a row.
pub const MAX_CANDIDATES: usize = 64;

/// The selector of drafts for the rows of each sequence's block, from row 1 on.
#[derive(Debug, Clone, Copy)]
pub struct Selector {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of a block, 2 to 64.
    pub block: usize,
    /// Tokens, 1 to 2^26.
    pub vocab: usize,
    /// Blocks of 128 ids for which the LM head gives the best logit.
    pub blocks: usize,
    /// Candidates of a row, 1 to [`MAX_CANDIDATES`].
    pub candidates: usize,
    /// Columns of the codebooks, a multiple of 32.
    pub rank: usize,
}

/// What the kernels of a selector pass to each other, and their results; `[sequences][block]` each.
#[derive(Clone, Copy)]
pub struct SelectorRows<'a> {
    /// `[candidates]` u32, the best first; `u32::MAX` beyond the last and before the first launch.
    pub candidates: &'a Buffer,
    /// `[candidates]` f32: their logits.
    pub logits: &'a Buffer,
    /// `[vocab]` f32: the scores of the candidates, and -inf for all other tokens, also before the first launch.
    pub scores: &'a Buffer,
}

/// The codebooks of a selector, each `[vocab][rank]` bf16, sealed.
#[derive(Clone, Copy)]
pub struct Codebooks<'a> {
    /// Of the token before.
    pub predecessor: &'a Buffer,
    /// Of the candidate.
    pub successor: &'a Buffer,
}

impl Selector {
    /// Bytes that [`Selector::find`] must move: the best keys, the blocks of the candidates, the list.
    pub fn find_bytes(&self) -> u64 {
        let row = self.blocks * 8 + self.candidates * (128 * 4 + 4 + 8) + ROW_BYTES;
        (self.sequences * (self.block - 1) * row) as u64
    }

    /// Bytes that [`Selector::walk`] must move for `depths` depths: the projected row, a row of the first
    /// codebook, and for each candidate a row of the second, its id, its logit and its score.
    pub fn walk_bytes(&self, depths: usize) -> u64 {
        let row = self.rank * 6 + self.candidates * (self.rank * 2 + 12) + 12;
        (self.sequences * (depths * row + Sequence::BYTES)) as u64
    }

    fn check(&self, check: &Check, rows: SelectorRows<'_>, codebooks: Codebooks<'_>) -> Result<()> {
        let Selector { sequences, block, vocab, blocks, candidates, rank } = *self;
        check.blocks(sequences, block)?;
        check.best(vocab, blocks, false)?;
        check.that(
            block > 1
                && (1..=MAX_CANDIDATES).contains(&candidates)
                && rank.is_multiple_of(32)
                && (32..=1 << 16).contains(&rank),
            format_args!("{candidates} candidates of rank {rank} in blocks of {block}"),
            format_args!("1 to {MAX_CANDIDATES}, a multiple of 32, and at least 2 rows"),
        )?;
        let count = sequences * block;
        check.at_least("candidates", rows.candidates, count * candidates * 4)?;
        check.at_least("their logits", rows.logits, count * candidates * 4)?;
        check.aligned("scores", rows.scores, count * vocab * 4)?;
        check.aligned("predecessor", codebooks.predecessor, vocab * rank * 2)?;
        check.aligned("successor", codebooks.successor, vocab * rank * 2)
    }

    /// Finds the candidates of all rows from 1 on: the tokens with the best `logits` `[sequences][block][vocab]`
    /// f32, of equal ones the lowest ids. Resets the scores of the old ones to -inf. Invalid rows and rows
    /// without a sequence have none.
    ///
    /// `best` `[sequences][block][blocks]` u64: see [`super::head::Head::launch`]; it must belong to `logits`.
    /// `row_table` `[sequences][block]` `Row`: the sequence of each row.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn find(
        &self,
        device: &dyn Device,
        rows: SelectorRows<'_>,
        best: &Buffer,
        logits: &Buffer,
        row_table: &Buffer,
        codebooks: Codebooks<'_>,
    ) -> Result<()> {
        let Selector { sequences, block, vocab, blocks, candidates, rank } = *self;
        let (check, count) = (Check(CANDIDATES.name), sequences * block);
        self.check(&check, rows, codebooks)?;
        check.aligned("best", best, count * blocks * 8)?;
        check.aligned("logits", logits, count * vocab * 4)?;
        check.aligned("rows", row_table, count * ROW_BYTES)?;
        let of_rows = [rows.candidates, rows.logits, rows.scores, best, logits, row_table];
        let buffers = of_rows.into_iter().chain([codebooks.predecessor, codebooks.successor]);
        let args = args(buffers, [blocks, vocab, block, candidates, rank]);
        device.launch(&CANDIDATES, [(block - 1) as u32, sequences as u32, 1], 0, &args)
    }

    /// Scores the candidates of the rows of these `depths`, one after the other, by the token before each: the
    /// anchor, the draft of the row before, or in a tree and within a launch the best token of the row before.
    /// Writes `best` `[sequences][block]` u64, the best score and its token as one block of
    /// [`super::head::Head::launch`], 0 without candidates, and `drafts` `[sequences][block]` u32, that token, or
    /// `u32::MAX` for an invalid row.
    ///
    /// `weights` `[sequences][block][rank]` f32: the projected rows. `sequences` `[sequences]` [`Sequence`]:
    /// anchor and shape.
    ///
    /// # Errors
    /// As [`Selector::find`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn walk(
        &self,
        device: &dyn Device,
        depths: Range<usize>,
        rows: SelectorRows<'_>,
        best: &Buffer,
        drafts: &Buffer,
        weights: &Buffer,
        codebooks: Codebooks<'_>,
        sequences: &Buffer,
    ) -> Result<()> {
        let Selector { block, vocab, candidates, rank, .. } = *self;
        let (check, count) = (Check(WALK.name), self.sequences * block);
        self.check(&check, rows, codebooks)?;
        check.that(
            depths.start > 0 && depths.start < depths.end && depths.end <= block,
            format_args!("depths {depths:?} of {block} rows"),
            "at least one, from 1 on",
        )?;
        check.aligned("best", best, count * 8)?;
        check.at_least("drafts", drafts, count * 4)?;
        check.aligned("weights", weights, count * rank * 4)?;
        check.aligned("sequences", sequences, self.sequences * Sequence::BYTES)?;
        let outputs = [rows.scores, best, drafts, rows.candidates, rows.logits, weights];
        let buffers = outputs.into_iter().chain([codebooks.predecessor, codebooks.successor, sequences]);
        let args = args(buffers, [vocab, block, candidates, rank, depths.start, depths.end]);
        device.launch(&WALK, [self.sequences as u32, 1, 1], 0, &args)
    }
}
