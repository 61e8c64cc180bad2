//! `cuda/spec/rules.cu`: drafts drawn at random and judged by [`crate::spec::verify::rejection`] and [`crate::spec::verify::block`].

use super::round::{Sequence, check_shape};
use super::verify::Verdict;
use super::{aligned, at_least};
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::spec::verify::VerifyMethod;
use crate::{Error, Result};

static DISTRIBUTION: Kernel = Kernel { file: "rules", name: "row_distribution", threads: 512, max_shared: 0 };
static DRAW: Kernel = Kernel { file: "rules", name: "sample_drafts", threads: 512, max_shared: 0 };
static JUDGE: Kernel = Kernel { file: "rules", name: "verify_drafts", threads: 512, max_shared: 0 };

/// Bytes of a row's distribution: what turns its logits into [`crate::spec::verify::Distribution`].
pub const DISTRIBUTION_BYTES: usize = 48;

/// Bytes of the sampler's [`super::sample::tables`] that these kernels look at: the two for weights.
pub(super) const TABLE_BYTES: usize = 2048;

/// The kernels for `sequences` sequences (at most 1024) in blocks of `block` rows (at most 64), over `vocab` tokens (at
/// most 2^26), with the rows' best given for `blocks` blocks of ids.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub sequences: usize,
    pub block: usize,
    pub vocab: usize,
    pub blocks: usize,
}

/// Rows of logits, as many of each sequence as a block's or a verification's, and the distributions that a launch makes of them or
/// has made.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// `[sequences][rows][vocab]` f32
    pub logits: &'a Buffer,
    /// `[sequences][rows]` of [`DISTRIBUTION_BYTES`]
    pub distributions: &'a Buffer,
}

/// What only [`Rules::judge`] needs.
#[derive(Debug, Clone, Copy)]
pub struct VerifyInputs<'a> {
    /// Rows of a sequence in the verification, 1 to 64: those behind a block's are not looked at.
    pub wide: usize,
    /// `[sequences][wide]` u32: the anchor and the drafts.
    pub tokens: &'a Buffer,
    /// `[sequences]` `Span`s (cuda/common/rows.cuh), of which the number of rows counts.
    pub spans: &'a Buffer,
    /// `[sequences][block]` u64, undefined.
    pub partial: &'a Buffer,
    /// `[sequences]` u32, zero; they are zero again afterwards.
    pub counters: &'a Buffer,
}

impl Rules {
    /// Bytes that [`Rules::distribution`] must move without top-k and top-p: the logits once for the sum of their weights, once
    /// for what rounding leaves over.
    pub fn distribution_bytes(&self) -> u64 {
        let row = self.blocks * 8 + self.vocab * 8 + TABLE_BYTES + DISTRIBUTION_BYTES;
        (self.sequences * self.block * row) as u64
    }

    /// Bytes that [`Rules::draw`] must move.
    pub fn draw_bytes(&self) -> u64 {
        let draft = self.vocab * 4 + TABLE_BYTES + DISTRIBUTION_BYTES + 4;
        (self.sequences * (self.block - 1) * draft) as u64
    }

    /// Bytes that [`Rules::judge`] must move where a rejection's draft falls, and where a block's shares are all
    /// between 0 and 1: then the distributions of its rows but the first and the last are added up, and the token
    /// is of one more at least.
    pub fn judge_bytes(&self, rule: VerifyMethod) -> u64 {
        let rows = match rule {
            VerifyMethod::Match => return 0,
            VerifyMethod::Rejection => 2,
            VerifyMethod::Block => 2 * self.block.saturating_sub(2) + 1,
        };
        (self.sequences
            * (rows * self.vocab * 4 + 2 * (self.block - 1) * DISTRIBUTION_BYTES + self.block * 8))
            as u64
    }

    fn check(&self, kernel: &str) -> Result<()> {
        let Rules { sequences, block, vocab, blocks } = *self;
        check_shape(kernel, sequences, block)?;
        if !(1..=1 << 26).contains(&vocab) || !(1..=vocab).contains(&blocks) {
            return Err(Error::Internal(format!(
                "kernel {kernel}: {vocab} tokens in {blocks} blocks; possible are 1 to 2^26 tokens"
            )));
        }
        Ok(())
    }

    fn rows(&self, kernel: &str, what: &str, rows: Rows<'_>, of_each: usize) -> Result<()> {
        let count = self.sequences * of_each;
        aligned(kernel, what, rows.logits, count * self.vocab * 4)?;
        aligned(kernel, "distributions", rows.distributions, count * DISTRIBUTION_BYTES)
    }

    fn common(&self, kernel: &str, sequences: &Buffer, tables: &Buffer) -> Result<()> {
        aligned(kernel, "sequences", sequences, self.sequences * Sequence::BYTES)?;
        aligned(kernel, "tables", tables, TABLE_BYTES)
    }

    /// Makes `rows.distributions` of `rows.logits`, by the settings in `settings` `[sequences]` [`Sequence`]: none for rows that
    /// are damaged or without a sequence. `best` `[sequences][block][blocks]` u64 as [`super::sample::Sample::launch`]
    /// has it, `table` `[sequences][block]` `Row`s (cuda/common/rows.cuh), of which the sequence counts; `tables`
    /// [`super::sample::tables`], sealed.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits; else what the device says.
    pub fn distribution(
        &self,
        device: &dyn Device,
        rows: Rows<'_>,
        best: &Buffer,
        table: &Buffer,
        settings: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Rules { sequences, block, vocab, blocks } = *self;
        self.check("row_distribution")?;
        self.rows("row_distribution", "logits", rows, block)?;
        self.common("row_distribution", settings, tables)?;
        aligned("row_distribution", "best", best, sequences * block * blocks * 8)?;
        aligned("row_distribution", "rows", table, sequences * block * 16)?;
        let mut args = vec![
            rows.distributions.into(),
            best.into(),
            rows.logits.into(),
            table.into(),
            settings.into(),
            tables.into(),
        ];
        args.extend([sequences, blocks, vocab].map(|n| (n as u32).into()));
        device.launch(&DISTRIBUTION, [(sequences * block) as u32, 1, 1], 0, &args)
    }

    /// Draws `drafts` `[sequences][block]` u32, from row 1 of each block on, as [`crate::spec::verify::draw`] does: the token of
    /// row j from the row's own distribution, `u32::MAX` where it has none. `states` `[sequences]` [`Sequence`]: rule, seed,
    /// stream, length and rounds. Rows without a sequence or under the rule `match` are left as they are. `table` and
    /// `tables` as [`Rules::distribution`].
    ///
    /// # Errors
    /// As [`Rules::distribution`].
    pub fn draw(
        &self,
        device: &dyn Device,
        drafts: &Buffer,
        rows: Rows<'_>,
        table: &Buffer,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Rules { sequences, block, vocab, .. } = *self;
        self.check("sample_drafts")?;
        self.rows("sample_drafts", "logits", rows, block)?;
        self.common("sample_drafts", states, tables)?;
        at_least("sample_drafts", "drafts", drafts, sequences * block * 4)?;
        aligned("sample_drafts", "rows", table, sequences * block * 16)?;
        let mut args = vec![
            drafts.into(),
            rows.distributions.into(),
            rows.logits.into(),
            table.into(),
            states.into(),
            tables.into(),
        ];
        args.extend([sequences, vocab, block].map(|n| (n as u32).into()));
        device.launch(&DRAW, [(sequences * block) as u32, 1, 1], 0, &args)
    }

    /// The verdict on the chains of sequences that have drafts and whose rule is not `match`; what there is of others is
    /// left as it is. `target`'s row j comes after the anchor and j drafts, `drafter`'s row j is what the draft in place
    /// j was drawn from; `states` and `tables` as [`Rules::draw`].
    ///
    /// # Errors
    /// As [`Rules::distribution`].
    #[allow(clippy::too_many_arguments)] // all of a verdict's inputs
    pub fn judge(
        &self,
        device: &dyn Device,
        verdict: Verdict<'_>,
        target: Rows<'_>,
        drafter: Rows<'_>,
        judged: VerifyInputs<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Rules { sequences, block, vocab, .. } = *self;
        self.check("verify_drafts")?;
        check_shape("verify_drafts", sequences, judged.wide)?;
        verdict.check("verify_drafts", sequences, judged.wide)?;
        self.rows("verify_drafts", "the target's logits", target, judged.wide)?;
        self.rows("verify_drafts", "the drafter's logits", drafter, block)?;
        self.common("verify_drafts", states, tables)?;
        at_least("verify_drafts", "tokens", judged.tokens, sequences * judged.wide * 4)?;
        aligned("verify_drafts", "spans", judged.spans, sequences * 8)?;
        aligned("verify_drafts", "partial", judged.partial, sequences * block * 8)?;
        at_least("verify_drafts", "counters", judged.counters, sequences * 4)?;
        let args = [
            verdict.accepted.into(),
            verdict.next.into(),
            verdict.path.into(),
            target.distributions.into(),
            target.logits.into(),
            drafter.distributions.into(),
            drafter.logits.into(),
            judged.tokens.into(),
            judged.spans.into(),
            states.into(),
            tables.into(),
            judged.partial.into(),
            judged.counters.into(),
            (vocab as u32).into(),
            (block as u32).into(),
            (judged.wide as u32).into(),
        ];
        device.launch(&JUDGE, [block as u32, sequences as u32, 1], 0, &args)
    }
}
