//! `cuda/spec/choices.cu`: a drafter's best tokens for each row, as [`crate::spec::tree::choices`] defines
//! them.

use super::ROW_BYTES;
use super::check::{Check, args};
use super::sample::{self, SamplerInputs};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static CHOICES: Kernel = Kernel { file: "choices", name: "choices", threads: 512, max_shared: 0 };

/// Selection of the best tokens of each row.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    /// Rows, 1 to 65535.
    pub rows: usize,
    /// Tokens, 1 to 2^26.
    pub vocab: usize,
    /// Blocks of ids for which the LM head gives the best logit: columns of `best`.
    pub blocks: usize,
    /// Whether these blocks are of the ids of a reduced vocabulary, else of 128 consecutive ids.
    pub reduced: bool,
    /// Tokens to find per row, 1 to 63.
    pub per_row: usize,
}

impl Choices {
    /// Bytes a launch must move: the logits once for the sum of their weights, and those of `per_row` blocks
    /// of 128 ids twice, to select and to collect. Further passes of the radix selection, which processes 11
    /// bits per pass, are not counted.
    pub fn bytes(&self) -> u64 {
        let slice = self.blocks * 8 + sample::tables().len();
        let blocks = self.blocks * 16 + 2 * self.per_row.min(self.blocks) * 512;
        let row = self.vocab * 4 + sample::slices(self.vocab) * slice + blocks + self.per_row * 8 + 20;
        (self.rows * row) as u64
    }

    /// Writes `choices` `[rows][per_row]` (token, cost) u32, best first, `u32::MAX` after the last. A cost is
    /// -log2 of the token's probability at temperature 1, in units of 2^-16. Writes `counts` `[rows]` u32:
    /// the number of choices, `u32::MAX` for an invalid row, 0 for a row without a sequence.
    ///
    /// `best` `[rows][blocks]` u64, `row_table` `[rows]` `Row` and `inputs` as for
    /// [`sample::Sample::launch`]; the kernel does not read `inputs.sequences`.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        choices: &Buffer,
        counts: &Buffer,
        best: &Buffer,
        row_table: &Buffer,
        inputs: SamplerInputs<'_>,
    ) -> Result<()> {
        let Choices { rows, vocab, blocks, reduced, per_row } = *self;
        let SamplerInputs { logits, tables, partial, counters, .. } = inputs;
        let check = Check("choices");
        check.that(
            (1..=65535).contains(&rows) && (1..=63).contains(&per_row),
            format_args!("{per_row} choices for {rows} rows"),
            "1 to 63 for 1 to 65535 rows",
        )?;
        check.best(vocab, blocks, reduced)?;
        check.aligned("choices", choices, rows * per_row * 8)?;
        check.at_least("counts", counts, rows * 4)?;
        check.aligned("best", best, rows * blocks * 8)?;
        check.aligned("logits", logits, rows * vocab * 4)?;
        check.aligned("rows", row_table, rows * ROW_BYTES)?;
        check.aligned("tables", tables, sample::tables().len())?;
        let slices = sample::slices(vocab);
        check.aligned("partial", partial, rows * slices * 8)?;
        check.at_least("counters", counters, rows * 4)?;
        let buffers = [choices, counts, best, logits, row_table, tables, partial, counters];
        let args = args(buffers, [blocks, vocab, per_row, usize::from(reduced)]);
        device.launch(&CHOICES, [slices as u32, rows as u32, 1], 0, &args)
    }
}
