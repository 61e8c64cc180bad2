//! `cuda/spec/choices.cu`: the tokens that a drafter holds best for each row, as [`crate::spec::tree::choices`] has them.

use super::sample;
use super::{aligned, at_least};
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::{Error, Result};

static CHOICES: Kernel = Kernel { file: "choices", name: "choices", threads: 512, max_shared: 0 };

/// The `most` (1 to 63) best tokens of each of `rows` rows among `vocab` (at most 2^26); `blocks` is how many blocks of
/// ids the rows' best are given for.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    pub rows: usize,
    pub vocab: usize,
    pub blocks: usize,
    pub most: usize,
}

impl Choices {
    /// Bytes a launch must move: the logits once to select, once to collect; what lies behind 2048 digits is read again.
    pub fn bytes(&self) -> u64 {
        (self.rows * (self.blocks * 8 + self.vocab * 8 + sample::tables().len() + self.most * 8 + 20)) as u64
    }

    /// `choices` `[rows][most]` (token, cost) u32 each, best first, `u32::MAX` behind the last; `counts` `[rows]` u32: how
    /// many there are, `u32::MAX` for a damaged row and 0 for one without a sequence. `best` `[rows][blocks]` u64 and
    /// `table` `[rows]` `Row` as in [`sample::Sample::launch`]; `logits` `[rows][vocab]` f32; `tables`:
    /// [`sample::tables`], sealed.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
    #[allow(clippy::too_many_arguments)] // what a kernel takes
    pub fn launch(
        &self,
        device: &dyn Device,
        choices: &Buffer,
        counts: &Buffer,
        best: &Buffer,
        logits: &Buffer,
        table: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Choices { rows, vocab, blocks, most } = *self;
        if !(1..1 << 31).contains(&rows)
            || !(1..=1 << 26).contains(&vocab)
            || !(1..=vocab).contains(&blocks)
            || !(1..=63).contains(&most)
        {
            return Err(Error::Internal(format!(
                "kernel choices: {most} of {vocab} tokens in {blocks} blocks for {rows} rows; possible are 1 to 63 of 1 \
                 to 2^26"
            )));
        }
        aligned("choices", "choices", choices, rows * most * 8)?;
        at_least("choices", "counts", counts, rows * 4)?;
        aligned("choices", "best", best, rows * blocks * 8)?;
        aligned("choices", "logits", logits, rows * vocab * 4)?;
        aligned("choices", "rows", table, rows * 16)?;
        aligned("choices", "tables", tables, sample::tables().len())?;
        let args = [
            choices.into(),
            counts.into(),
            best.into(),
            logits.into(),
            table.into(),
            tables.into(),
            (blocks as u32).into(),
            (vocab as u32).into(),
            (most as u32).into(),
        ];
        device.launch(&CHOICES, [rows as u32, 1, 1], 0, &args)
    }
}
