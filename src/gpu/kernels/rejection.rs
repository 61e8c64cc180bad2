//! `cuda/spec/rejection.cu`: the distributions of rows, drafts sampled from them, and verification of chains by
//! the methods `rejection` and `block`, as [`crate::spec::verify`] defines them.

use super::check::{Check, args};
use super::round::Sequence;
use super::verify::VerifyOutput;
use super::{ROW_BYTES, RowStep, SPAN_BYTES};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::spec::config::VerifyMethod;

static DISTRIBUTION: Kernel =
    Kernel { file: "rejection", name: "row_distribution", threads: 512, max_shared: 0 };
static SAMPLE: Kernel = Kernel { file: "rejection", name: "sample_drafts", threads: 512, max_shared: 0 };
static VERIFY: Kernel = Kernel { file: "rejection", name: "verify_drafts", threads: 512, max_shared: 0 };

/// Bytes of a row's distribution: the parameters that turn its logits into a
/// [`crate::spec::distribution::Distribution`]. Probabilities are not stored; kernels compute them from the
/// logits.
pub const DISTRIBUTION_BYTES: usize = 48;

/// Bytes of the sampler's [`super::sample::tables`] that these kernels read: the two tables for weights.
pub(super) const TABLE_BYTES: usize = 2048;

/// Rejection sampling on blocks of rows, one chain of drafts per sequence.
#[derive(Debug, Clone, Copy)]
pub struct RejectionSampler {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of a block, 1 to 64: the anchor's, then one per draft.
    pub block: usize,
    /// Tokens, 1 to 2^26.
    pub vocab: usize,
    /// Blocks of ids for which the LM head gives the best logit: columns of `best`.
    pub blocks: usize,
    /// Whether these blocks are of the ids of a reduced vocabulary, else of 128 consecutive ids.
    pub reduced: bool,
}

/// Rows of logits and their distributions: the drafter's for a block, or the target's for a verification.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// `[sequences][rows][vocab]` f32.
    pub logits: &'a Buffer,
    /// `[sequences][rows]` of [`DISTRIBUTION_BYTES`]; [`RejectionSampler::distributions`] writes them.
    pub distributions: &'a Buffer,
}

/// The inputs of [`RejectionSampler::verify`] besides distributions.
#[derive(Debug, Clone, Copy)]
pub struct VerifyInputs<'a> {
    /// Rows per sequence in the verification, 1 to 64. Rows beyond a block's are not read.
    pub max_verify_rows: usize,
    /// `[sequences][max_verify_rows]` u32: the anchor and the drafts.
    pub tokens: &'a Buffer,
    /// `[sequences]` `Span`: the number of rows of each sequence.
    pub spans: &'a Buffer,
    /// `[sequences][block]` u64, scratch.
    pub partial: &'a Buffer,
    /// `[sequences]` u32 counters.
    pub counters: &'a Buffer,
}

impl Rows<'_> {
    /// Checks that there are `count` rows. `whose` names the model: "the target's" or "the drafter's".
    pub(super) fn check(&self, check: &Check, whose: &str, count: usize, vocab: usize) -> Result<()> {
        check.aligned(&format!("{whose} logits"), self.logits, count * vocab * 4)?;
        check.aligned(&format!("{whose} distributions"), self.distributions, count * DISTRIBUTION_BYTES)
    }
}

/// Checks the arguments that all of these kernels share: the sequences' states and the sampler's tables.
pub(super) fn check_states(check: &Check, sequences: usize, states: &Buffer, tables: &Buffer) -> Result<()> {
    check.aligned("sequences", states, sequences * Sequence::BYTES)?;
    check.aligned("tables", tables, TABLE_BYTES)
}

impl RejectionSampler {
    /// Bytes that [`RejectionSampler::distributions`] must move without top-k and top-p: the logits twice,
    /// once to add up their weights and once to find the rounding remainder.
    pub fn distribution_bytes(&self) -> u64 {
        let row = self.blocks * 8 + self.vocab * 8 + TABLE_BYTES + DISTRIBUTION_BYTES;
        (self.sequences * self.block * row) as u64
    }

    /// Bytes that [`RejectionSampler::sample`] must move: the logits of each draft once.
    pub fn sample_bytes(&self) -> u64 {
        let draft = self.vocab * 4 + TABLE_BYTES + DISTRIBUTION_BYTES + 4;
        (self.sequences * (self.block - 1) * draft) as u64
    }

    /// Bytes that [`RejectionSampler::verify`] must move. For `rejection`, if it rejects a draft: two rows of
    /// logits. For `block`, if all its acceptance probabilities are between 0 and 1: both models' rows for
    /// all drafts but the first, and at least one more row to sample the next token.
    pub fn verify_bytes(&self, method: VerifyMethod) -> u64 {
        let rows = match method {
            VerifyMethod::Match => return 0,
            VerifyMethod::Rejection => 2,
            VerifyMethod::Block => 2 * self.block.saturating_sub(2) + 1,
        };
        let per_row = 2 * (self.block - 1) * DISTRIBUTION_BYTES + self.block * 8;
        (self.sequences * (rows * self.vocab * 4 + per_row)) as u64
    }

    fn check(&self, kernel: &'static str, states: &Buffer, tables: &Buffer) -> Result<Check> {
        let check = Check(kernel);
        check.blocks(self.sequences, self.block)?;
        check.best(self.vocab, self.blocks, self.reduced)?;
        check_states(&check, self.sequences, states, tables)?;
        Ok(check)
    }

    /// Computes the rows of `step` of `rows.distributions` `[sequences][block]` from `rows.logits`. Invalid
    /// rows and rows without a sequence are marked as having no distribution.
    ///
    /// `best` `[sequences][block][blocks]` u64: see [`super::head::Head::launch`]. `row_table`
    /// `[sequences][block]` `Row`: the sequence of each row. `settings` `[sequences]` [`Sequence`]: the
    /// sampling parameters. `tables`: [`super::sample::tables`], sealed.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn distributions(
        &self,
        device: &dyn Device,
        step: RowStep,
        rows: Rows<'_>,
        best: &Buffer,
        row_table: &Buffer,
        settings: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let RejectionSampler { sequences, block, vocab, blocks, reduced } = *self;
        let (check, count) = (self.check(DISTRIBUTION.name, settings, tables)?, sequences * block);
        rows.check(&check, "the rows'", count, vocab)?;
        check.aligned("best", best, count * blocks * 8)?;
        check.aligned("rows", row_table, count * ROW_BYTES)?;
        let buffers = [rows.distributions, best, rows.logits, row_table, settings, tables];
        let args = args(buffers, [sequences, blocks, vocab, usize::from(reduced), step.first, step.step]);
        device.launch(&DISTRIBUTION, [check.step(count, step)?, 1, 1], 0, &args)
    }

    /// Samples `drafts` `[sequences][block]` u32, from row 1 of each block on: each from the distribution of
    /// its row, `u32::MAX` if the row has none. Rows without a sequence and the rows of sequences that verify
    /// by `match` are left unchanged. So are rows that `step` leaves out.
    ///
    /// `states` `[sequences]` [`Sequence`]: method, seed, stream, length and rounds. `rows`, `row_table` and
    /// `tables` as for [`RejectionSampler::distributions`].
    ///
    /// # Errors
    /// As [`RejectionSampler::distributions`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn sample(
        &self,
        device: &dyn Device,
        step: RowStep,
        drafts: &Buffer,
        rows: Rows<'_>,
        row_table: &Buffer,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let RejectionSampler { sequences, block, vocab, .. } = *self;
        let (check, count) = (self.check(SAMPLE.name, states, tables)?, sequences * block);
        rows.check(&check, "the rows'", count, vocab)?;
        check.at_least("drafts", drafts, count * 4)?;
        check.aligned("rows", row_table, count * ROW_BYTES)?;
        let buffers = [drafts, rows.distributions, rows.logits, row_table, states, tables];
        let args = args(buffers, [sequences, vocab, block, step.first, step.step]);
        device.launch(&SAMPLE, [check.step(count, step)?, 1, 1], 0, &args)
    }

    /// Verifies the chains of sequences that have drafts and whose method is `rejection` or `block`. The
    /// output of other sequences is left unchanged.
    ///
    /// `target` `[sequences][max_verify_rows]`: row j holds the distribution after the anchor and j drafts.
    /// `drafter` `[sequences][block]`: draft j was sampled from row j. `states` and `tables` as for
    /// [`RejectionSampler::sample`].
    ///
    /// # Errors
    /// As [`RejectionSampler::distributions`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn verify(
        &self,
        device: &dyn Device,
        output: VerifyOutput<'_>,
        target: Rows<'_>,
        drafter: Rows<'_>,
        inputs: VerifyInputs<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let RejectionSampler { sequences, block, vocab, .. } = *self;
        let VerifyInputs { max_verify_rows, tokens, spans, partial, counters } = inputs;
        let check = self.check(VERIFY.name, states, tables)?;
        check.blocks(sequences, max_verify_rows)?;
        output.check(&check, sequences, max_verify_rows)?;
        target.check(&check, "the target's", sequences * max_verify_rows, vocab)?;
        drafter.check(&check, "the drafter's", sequences * block, vocab)?;
        check.at_least("tokens", tokens, sequences * max_verify_rows * 4)?;
        check.aligned("spans", spans, sequences * SPAN_BYTES)?;
        check.aligned("partial", partial, sequences * block * 8)?;
        check.at_least("counters", counters, sequences * 4)?;
        let distributions = [target.distributions, target.logits, drafter.distributions, drafter.logits];
        let buffers = output.buffers().into_iter().chain(distributions);
        let args = args(
            buffers.chain([tokens, spans, states, tables, partial, counters]),
            [vocab, block, max_verify_rows],
        );
        device.launch(&VERIFY, [block as u32, sequences as u32, 1], 0, &args)
    }
}
