//! `cuda/model/pairs.cu`: the inputs of an EAGLE-3 drafter's layer, pairs of the feature of a position and the token
//! after it.

use super::check::{Check, args, or_null, u32s};
use super::round::Sequence;
use super::{ROW_BYTES, SPAN_BYTES};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

static NORMALIZE: Kernel = Kernel { file: "pairs", name: "normalize_taps", threads: 512, max_shared: 0 };
static EXTEND: Kernel = Kernel { file: "pairs", name: "extend_pairs", threads: 512, max_shared: 0 };
static STEP: Kernel = Kernel { file: "pairs", name: "step_pairs", threads: 512, max_shared: 0 };

/// Most columns of a norm.
const MAX_COLUMNS: usize = 1 << 16;

/// Norms of the taps of a position, in place: one over all taps together, then one over each.
#[derive(Debug, Clone, Copy)]
pub struct NormalizeTaps<'a> {
    /// Taps of a position.
    pub taps: usize,
    /// The target's hidden size, a multiple of 32.
    pub hidden: usize,
    /// `[taps * hidden]` f32: gain of the norm over all taps.
    pub all: Option<&'a Buffer>,
    /// `[taps][hidden]` f32: gains of the norms over each.
    pub each: Option<&'a Buffer>,
    /// Of the drafter's norms.
    pub eps: f32,
}

impl NormalizeTaps<'_> {
    /// Bytes that a launch over `rows` rows must move.
    pub fn bytes(&self, rows: usize) -> u64 {
        let (all, gains) = (self.taps * self.hidden, [self.all, self.each].into_iter().flatten().count());
        (rows * (all * 4 + 4) + gains * all * 4) as u64
    }

    /// Replaces rows of `features` `[feature_rows][taps][hidden]` bf16: those in `gather` `[rows]` u32, in which none
    /// may be twice. Others than rows of `features` are skipped.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, rows: usize, features: &Buffer, gather: &Buffer) -> Result<()> {
        let (check, all) = (Check(NORMALIZE.name), self.taps * self.hidden);
        check.that(
            self.hidden > 0 && self.hidden.is_multiple_of(32) && (1..=MAX_COLUMNS).contains(&all) && rows > 0,
            format_args!("{rows} rows of {} taps of {}", self.taps, self.hidden),
            format_args!("multiples of 32, at most {MAX_COLUMNS} together"),
        )?;
        check.aligned("features", features, all * 2)?;
        check.at_least("gather", gather, rows * 4)?;
        check.optional("all_gain", self.all, all * 4)?;
        check.optional("tap_gains", self.each, all * 4)?;
        let mut args: Vec<Arg> = [features, gather].map(Arg::from).to_vec();
        args.extend([or_null(self.all), or_null(self.each)]);
        args.extend(u32s([features.bytes() / (all * 2), self.taps, self.hidden]));
        args.push(self.eps.into());
        device.launch(&NORMALIZE, [rows as u32, 1, 1], 0, &args)
    }
}

/// `bf16[rms_norm(scale * E[token]; token_gain), rms_norm(feature; feature_gain)]`.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    /// The drafter's hidden size, a multiple of 32.
    pub hidden: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// The table is the packed weights of an LM head (see [`super::pack`]).
    pub packed: bool,
    /// The residual stream begins with the normed feature; else with the feature.
    pub norm_before_residual: bool,
    /// Factor of the embeddings.
    pub scale: f32,
    /// Of the norms.
    pub eps: f32,
    /// `[vocab][hidden]` bf16, or packed; sealed.
    pub embeddings: &'a Buffer,
    /// `[hidden]` f32, sealed.
    pub token_gain: &'a Buffer,
    /// `[hidden]` f32, sealed.
    pub feature_gain: &'a Buffer,
}

/// What the pairs of a round are written to.
#[derive(Debug, Clone, Copy)]
pub struct PairOutput<'a> {
    /// `[rows][2 * hidden]` bf16; zeros for padding.
    pub pairs: &'a Buffer,
    /// `[rows]` `Row` of the pairs, with the queries of those that predict a draft.
    pub table: &'a Buffer,
    /// `[sequences]` `Span` of the queries.
    pub spans: &'a Buffer,
    /// `[sequences][hidden]` f32: the residual stream of the queries.
    pub x: &'a Buffer,
}

/// The token of a pair's draft before.
#[derive(Debug, Clone, Copy)]
pub enum Drafted<'a> {
    /// `[sequences][block]` u32.
    Tokens(&'a Buffer),
    /// The best token: `[sequences][block][blocks]` u64, and the number of blocks. See
    /// [`super::head::Head::launch`].
    Best(&'a Buffer, usize),
}

impl Pairs<'_> {
    /// Bytes that a launch for `rows` pairs must move, without tables and the residual stream.
    pub fn bytes(&self, rows: usize) -> u64 {
        (rows * self.hidden * 8 + 2 * self.hidden * 4) as u64
    }

    fn check(&self, check: &Check, rows: usize, pairs: &Buffer) -> Result<()> {
        let Pairs { hidden, vocab, packed, .. } = *self;
        check.that(
            (32..=MAX_COLUMNS).contains(&hidden) && hidden.is_multiple_of(32),
            format_args!("pairs of {hidden} columns each"),
            format_args!("a multiple of 32, at most {MAX_COLUMNS}"),
        )?;
        check.vocab(vocab)?;
        let table_rows = if packed { vocab.next_multiple_of(16) } else { vocab };
        check.aligned("embeddings", self.embeddings, table_rows * hidden * 2)?;
        check.aligned("token_gain", self.token_gain, hidden * 4)?;
        check.aligned("feature_gain", self.feature_gain, hidden * 4)?;
        check.aligned("pairs", pairs, rows * hidden * 4)
    }

    fn args(&self) -> impl Iterator<Item = Arg> {
        let buffers = [self.embeddings, self.token_gain, self.feature_gain].map(Arg::from);
        let sizes =
            [self.hidden, self.vocab, usize::from(self.packed), usize::from(self.norm_before_residual)];
        buffers.into_iter().chain(u32s(sizes)).chain([self.scale.into(), self.eps.into()])
    }

    /// The pairs of the first `rows` positions of a prompt chunk, to `pairs` `[rows][2 * hidden]` bf16. `features`
    /// `[rows][hidden]` bf16; `tokens` `[rows + 1]` u32, of which the first is not read.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn prompt(
        &self,
        device: &dyn Device,
        rows: usize,
        pairs: &Buffer,
        features: &Buffer,
        tokens: &Buffer,
    ) -> Result<()> {
        let check = Check(EXTEND.name);
        check.that(rows > 0, "no rows", "at least one")?;
        self.check(&check, rows, pairs)?;
        check.aligned("features", features, rows * self.hidden * 2)?;
        check.at_least("tokens", tokens, (rows + 1) * 4)?;
        let mut args = vec![pairs.into(), Arg::Null, Arg::Null, Arg::Null, features.into(), tokens.into()];
        args.extend([Arg::Null, Arg::Null, Arg::Null]);
        args.extend(u32s([rows + 1, 1]));
        args.extend(self.args());
        device.launch(&EXTEND, [rows as u32, 1, 1], 0, &args)
    }

    /// The pairs of the pending features of `sequences` sequences, `block` rows of each. The last pair of a sequence
    /// has the anchor; it gets a query if the sequence drafts.
    ///
    /// `features` `[sequences][block][hidden]` bf16; `tokens` u32: those of the last verification; `gather`
    /// `[sequences][block]` u32: the row of `tokens` of each feature's position; `rows` `[2][sequences][block]`
    /// `Row`, as [`super::round::Round::begin`] wrote them; `states` `[sequences]` [`Sequence`].
    ///
    /// # Errors
    /// As [`Pairs::prompt`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn extend(
        &self,
        device: &dyn Device,
        sequences: usize,
        block: usize,
        out: PairOutput<'_>,
        features: &Buffer,
        tokens: &Buffer,
        gather: &Buffer,
        rows: &Buffer,
        states: &Buffer,
    ) -> Result<()> {
        let (check, count) = (Check(EXTEND.name), sequences * block);
        check.blocks(sequences, block)?;
        check.that(block > 1, format_args!("blocks of {block} rows"), "at least 2")?;
        self.check(&check, count, out.pairs)?;
        check.aligned("table", out.table, count * ROW_BYTES)?;
        check.aligned("spans", out.spans, sequences * SPAN_BYTES)?;
        check.aligned("x", out.x, sequences * self.hidden * 4)?;
        check.aligned("features", features, count * self.hidden * 2)?;
        check.at_least("gather", gather, count * 4)?;
        check.aligned("rows", rows, 2 * count * ROW_BYTES)?;
        check.aligned("sequences", states, sequences * Sequence::BYTES)?;
        let buffers = [out.pairs, out.table, out.spans, out.x, features, tokens, gather, rows, states];
        let mut args = args(buffers, [tokens.bytes() / 4, block]);
        args.extend(self.args());
        device.launch(&EXTEND, [count as u32, 1, 1], 0, &args)
    }

    /// The pair of each sequence that predicts the draft of `depth`, at least 2: of the draft before it and `out.x`,
    /// which the layer left for the pair before, or its norm with `out_gain` `[hidden]` f32. `rows`
    /// `[sequences][block]` `Row` of the drafts.
    ///
    /// # Errors
    /// As [`Pairs::prompt`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn step(
        &self,
        device: &dyn Device,
        sequences: usize,
        block: usize,
        depth: usize,
        out: PairOutput<'_>,
        out_gain: Option<&Buffer>,
        drafted: Drafted<'_>,
        rows: &Buffer,
    ) -> Result<()> {
        let check = Check(STEP.name);
        check.blocks(sequences, block)?;
        check.that(
            (2..block).contains(&depth),
            format_args!("depth {depth} of {block} rows"),
            "at least 2",
        )?;
        self.check(&check, sequences, out.pairs)?;
        check.aligned("table", out.table, sequences * ROW_BYTES)?;
        check.aligned("spans", out.spans, sequences * SPAN_BYTES)?;
        check.aligned("x", out.x, sequences * self.hidden * 4)?;
        check.optional("out_gain", out_gain, self.hidden * 4)?;
        check.aligned("rows", rows, sequences * block * ROW_BYTES)?;
        let (drafts, best, blocks) = match drafted {
            Drafted::Tokens(drafts) => (Some(drafts), None, 0),
            Drafted::Best(best, blocks) => (None, Some(best), blocks),
        };
        check.optional("drafts", drafts, sequences * block * 4)?;
        check.optional("best", best, sequences * block * blocks * 8)?;
        let mut args: Vec<Arg> = [out.pairs, out.table, out.spans, out.x].map(Arg::from).to_vec();
        args.extend([or_null(out_gain), or_null(drafts), or_null(best), rows.into()]);
        args.extend(u32s([blocks, block, depth]));
        args.extend(self.args());
        device.launch(&STEP, [sequences as u32, 1, 1], 0, &args)
    }
}
