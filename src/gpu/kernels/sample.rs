//! `cuda/spec/sample.cu`: samples the next token of each row, as
//! [`SamplingParams::choose`](crate::spec::sampling::SamplingParams::choose) defines it.

use super::check::{Check, args, u32s};
use super::round::Sequence;
use super::{ROW_BYTES, RowStep};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::spec::rng::{TABLES, Tables};

static SAMPLE: Kernel = Kernel { file: "sample", name: "sample", threads: 512, max_shared: 0 };

/// Ids per CUDA block of a sampled row.
const SLICE: usize = 8192;

/// CUDA blocks that share a row of `vocab` ids.
pub(super) fn slices(vocab: usize) -> usize {
    vocab.div_ceil(SLICE)
}

/// The sampler's tables in the kernels' layout, u32 each: `thi`, `tlo`, `rlog` of [`Tables`], and three words
/// of padding.
pub fn tables() -> Vec<u8> {
    let Tables { thi, tlo, rlog } = &*TABLES;
    let words = thi.iter().chain(tlo).chain(rlog).chain(&[0; 3]);
    words.flat_map(|word| word.to_le_bytes()).collect()
}

/// Sampling of one token per row.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Rows, 1 to 65535.
    pub rows: usize,
    /// Tokens, 1 to 2^26.
    pub vocab: usize,
    /// Blocks of ids for which the LM head gives the best logit: columns of `best`.
    pub blocks: usize,
    /// Whether these blocks are of the ids of a reduced vocabulary, else of 128 consecutive ids.
    pub reduced: bool,
    /// Sequences that the rows belong to.
    pub sequences: usize,
}

/// The inputs of a launch besides `best`, needed if a sequence has a temperature above 0.
#[derive(Debug, Clone, Copy)]
pub struct SamplerInputs<'a> {
    /// `[rows][vocab]` f32; read only for rows with a temperature above 0.
    pub logits: &'a Buffer,
    /// `[sequences]` [`Sequence`].
    pub sequences: &'a Buffer,
    /// [`tables`], sealed.
    pub tables: &'a Buffer,
    /// [`Sample::workspace`] bytes, scratch.
    pub partial: &'a Buffer,
    /// `[rows]` u32 counters.
    pub counters: &'a Buffer,
}

impl Sample {
    fn slices(&self) -> usize {
        slices(self.vocab)
    }

    /// Bytes of [`SamplerInputs::partial`].
    pub fn workspace(&self) -> usize {
        self.rows * self.slices() * 16
    }

    /// Bytes a greedy launch must move.
    pub fn bytes(&self) -> u64 {
        (self.rows * (self.blocks * 8 + 16 + 4)) as u64
    }

    /// Bytes a launch must move if all rows have a temperature above 0, without top-k and top-p.
    pub fn sampled_bytes(&self) -> u64 {
        let slice = self.blocks * 8 + tables().len() + 128;
        self.bytes() + (self.rows * (self.vocab * 4 + self.slices() * slice)) as u64
    }

    /// Writes `choice` `[rows]` u32: the chosen token, `u32::MAX` for invalid rows and rows without a
    /// sequence.
    ///
    /// `best` `[rows][blocks]` u64: see [`super::head::Head::launch`]; it must belong to `logits`.
    /// `row_table` `[rows]` `Row`: the kernel reads sequence and position, and samples with the noise of the
    /// next position. Without `inputs` every row is greedy. Only the rows of `step` are written.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        step: RowStep,
        choice: &Buffer,
        best: &Buffer,
        row_table: &Buffer,
        inputs: Option<SamplerInputs<'_>>,
    ) -> Result<()> {
        let Sample { rows, vocab, blocks, reduced, sequences } = *self;
        let check = Check("sample");
        check.that(
            (1..=65535).contains(&rows) && sequences > 0,
            format_args!("{rows} rows of {sequences} sequences"),
            "1 to 65535 rows of at least one sequence",
        )?;
        check.best(vocab, blocks, reduced)?;
        check.at_least("choice", choice, rows * 4)?;
        check.aligned("best", best, rows * blocks * 8)?;
        check.aligned("rows", row_table, rows * ROW_BYTES)?;
        let (mut slices, count) = (1, check.step(rows, step)?);
        let mut pointers = [const { Arg::Null }; 5];
        if let Some(SamplerInputs { logits, sequences: states, tables: sealed, partial, counters }) = inputs {
            check.aligned("logits", logits, rows * vocab * 4)?;
            check.aligned("sequences", states, sequences * Sequence::BYTES)?;
            check.aligned("tables", sealed, tables().len())?;
            check.aligned("partial", partial, self.workspace())?;
            check.at_least("counters", counters, rows * 4)?;
            slices = self.slices();
            pointers = [logits, states, sealed, partial, counters].map(Arg::from);
        }
        let [logits, states, tables, partial, counters] = pointers;
        let mut args = args([choice, best], []);
        args.extend([logits, row_table.into(), states, tables, partial, counters]);
        args.extend(u32s([sequences, blocks, vocab, usize::from(reduced), step.first, step.step]));
        device.launch(&SAMPLE, [slices as u32, count, 1], 0, &args)
    }
}
