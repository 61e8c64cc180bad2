//! `cuda/spec/sample.cu`: the token each row chooses, as [`crate::spec::sampling::SamplingParams::choose`] has it.

use super::round::Sequence;
use super::{aligned, at_least};
use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::spec::rng::{TABLES, Tables};
use crate::{Error, Result};

static SAMPLE: Kernel = Kernel { file: "sample", name: "sample", threads: 512, max_shared: 0 };

/// Ids that one block of a race looks at.
const SLICE: usize = 8192;

/// The race's tables, `thi`, `tlo`, `rlog` and three words of padding, as the kernel wants them in memory.
pub fn tables() -> Vec<u8> {
    let Tables { thi, tlo, rlog } = &*TABLES;
    let words = thi.iter().chain(tlo).chain(rlog).chain(&[0; 3]);
    words.flat_map(|word| word.to_le_bytes()).collect()
}

/// The token that each of `rows` rows (at most 65535) chooses among `vocab` (at most 2^26). Rows belong to `sequences`
/// sequences; `blocks` is how many blocks of ids the rows' best are given for.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub rows: usize,
    pub vocab: usize,
    pub blocks: usize,
    pub sequences: usize,
}

/// What a launch needs beyond the rows' best where some sequence has a temperature.
#[derive(Debug, Clone, Copy)]
pub struct Races<'a> {
    /// `[rows][vocab]` f32; read for rows with a temperature only.
    pub logits: &'a Buffer,
    /// `[sequences]` [`Sequence`]
    pub sequences: &'a Buffer,
    /// [`tables`], sealed.
    pub tables: &'a Buffer,
    /// [`Sample::workspace`] bytes, undefined.
    pub partial: &'a Buffer,
    /// `[rows]` u32, zero; they are zero again afterwards.
    pub counters: &'a Buffer,
}

impl Sample {
    fn slices(&self) -> usize {
        self.vocab.div_ceil(SLICE)
    }

    /// Bytes of [`Races::partial`].
    pub fn workspace(&self) -> usize {
        self.rows * self.slices() * 16
    }

    /// Bytes a greedy launch must move.
    pub fn bytes(&self) -> u64 {
        (self.rows * (self.blocks * 8 + 16 + 4)) as u64
    }

    /// Bytes a launch must move whose rows all have a temperature, and neither top-k nor top-p.
    pub fn race_bytes(&self) -> u64 {
        let slice = self.blocks * 8 + tables().len() + 128;
        self.bytes() + (self.rows * (self.vocab * 4 + self.slices() * slice)) as u64
    }

    /// `choice` `[rows]` u32: the chosen token, `u32::MAX` for a row without a sequence and for a damaged one. `best`
    /// `[rows][blocks]` u64: per block of ids the largest `ascending(logit) << 32 | !id`, all ones where a logit is NaN
    /// or +inf; it must be what `logits` say. `table` `[rows]`: `Row`s (cuda/common/rows.cuh), of which sequence and position
    /// count: the noise is that of the position after. Without `races` every row is greedy.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        choice: &Buffer,
        best: &Buffer,
        table: &Buffer,
        races: Option<Races<'_>>,
    ) -> Result<()> {
        let Sample { rows, vocab, blocks, sequences } = *self;
        if !(1..=65535).contains(&rows)
            || !(1..=1 << 26).contains(&vocab)
            || !(1..=vocab).contains(&blocks)
            || sequences == 0
        {
            return Err(Error::Internal(format!(
                "kernel sample: {rows} rows, {vocab} tokens in {blocks} blocks, {sequences} sequences; possible are 1 \
                 to 65535 rows and 1 to 2^26 tokens"
            )));
        }
        at_least("sample", "choice", choice, rows * 4)?;
        aligned("sample", "best", best, rows * blocks * 8)?;
        aligned("sample", "rows", table, rows * 16)?;
        let mut slices = 1;
        let mut pointers = [Arg::Null, Arg::Null, Arg::Null, Arg::Null, Arg::Null];
        if let Some(races) = races {
            aligned("sample", "logits", races.logits, rows * vocab * 4)?;
            aligned("sample", "sequences", races.sequences, sequences * Sequence::BYTES)?;
            aligned("sample", "tables", races.tables, tables().len())?;
            aligned("sample", "partial", races.partial, self.workspace())?;
            at_least("sample", "counters", races.counters, rows * 4)?;
            slices = self.slices();
            pointers =
                [races.logits, races.sequences, races.tables, races.partial, races.counters].map(Arg::from);
        }
        let [logits, states, tables, partial, counters] = pointers;
        let numbers = [sequences, blocks, vocab].map(|n| Arg::U32(n as u32));
        let mut args =
            vec![choice.into(), best.into(), logits, table.into(), states, tables, partial, counters];
        args.extend(numbers);
        device.launch(&SAMPLE, [slices as u32, rows as u32, 1], 0, &args)
    }
}
