//! `cuda/model/markov.cu`: the Markov head of DSpark drafters, except for its matrices, which
//! [`super::head`] multiplies.

use super::check::{Check, args, u32s};
use super::round::Sequence;
use crate::Result;
use crate::checkpoint::drafter::MarkovKind;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

static INPUT: Kernel = Kernel { file: "markov", name: "markov_input", threads: 512, max_shared: 0 };
static LATENT: Kernel = Kernel { file: "markov", name: "markov_latent", threads: 512, max_shared: 0 };

/// One step of the walk over the rows of each sequence's block: the row of one depth.
#[derive(Debug, Clone, Copy)]
pub struct Markov {
    /// What is computed from the token before.
    pub kind: MarkovKind,
    /// Columns of its embedding, a multiple of 32.
    pub rank: usize,
    /// The drafter's hidden size, a multiple of 32.
    pub hidden: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of a block, 2 to 64.
    pub block: usize,
    /// Blocks of outputs for which the LM head gives the best logit: columns of `best`.
    pub blocks: usize,
}

/// What [`Markov::input`] reads of the drafter's rows, each `[sequences][block]`.
#[derive(Clone, Copy)]
pub struct DraftedRows<'a> {
    /// `[hidden]` bf16: the input of the LM head.
    pub y: &'a Buffer,
    /// `[ceil(hidden / 128)]` f32: its partial sums of squares.
    pub sumsq: &'a Buffer,
    /// Epsilon of the final norm.
    pub eps: f32,
    /// u32: the drafts of the rows before.
    pub drafts: &'a Buffer,
    /// `[blocks]` u64: the best logits of the rows before. See [`super::head::Head::launch`].
    pub best: &'a Buffer,
}

/// A confidence head and its output.
#[derive(Clone, Copy)]
pub struct Confidence<'a> {
    /// `[hidden]` or `[hidden + rank]` f32, sealed.
    pub weights: &'a Buffer,
    /// `[1]` f32, sealed.
    pub bias: &'a Buffer,
    /// `[sequences][block]` f32: the probability that the draft of a row is accepted if those before it are.
    pub out: &'a Buffer,
    /// `[sequences]` u32: the rows of a block before the first draft whose confidence is below
    /// [`Sequence::min_confidence`], the anchor's row included.
    pub kept: &'a Buffer,
}

impl Markov {
    /// Columns of the input: of the joint layer, or of the layer of the bias if there is none.
    pub fn inputs(&self) -> usize {
        match self.kind {
            MarkovKind::Vanilla => self.rank,
            MarkovKind::Gated => self.hidden + self.rank,
            MarkovKind::Rnn => 2 * self.rank + self.hidden,
        }
    }

    /// Bytes that [`Markov::input`] must move, without a confidence head and for chains.
    pub fn bytes(&self) -> u64 {
        let row = self.hidden * 2 + self.hidden.div_ceil(128) * 4;
        (self.sequences * (row + self.rank * 2 + self.inputs() * 2 + Sequence::BYTES)) as u64
    }

    fn check(&self, check: &Check, depth: usize) -> Result<()> {
        let Markov { rank, hidden, vocab, sequences, block, blocks, .. } = *self;
        check.blocks(sequences, block)?;
        check.best(vocab, blocks, true)?;
        let fits = |n: usize| n.is_multiple_of(32) && (32..=1 << 16).contains(&n);
        check.that(
            fits(rank) && fits(hidden) && (1..block).contains(&depth),
            format_args!("rank {rank}, hidden size {hidden} and depth {depth} of {block} rows"),
            "multiples of 32, and a depth from 1 on",
        )
    }

    /// Writes `input` `[sequences][inputs]` bf16 for the drafts of `depth`, and their confidences.
    ///
    /// `table` `[vocab][rank]` bf16, sealed. `state` `[sequences][rank]` f32: that of an rnn.
    /// `sequences` `[sequences]` [`Sequence`]: anchor and shape.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn input(
        &self,
        device: &dyn Device,
        depth: usize,
        input: &Buffer,
        table: &Buffer,
        state: &Buffer,
        rows: DraftedRows<'_>,
        sequences: &Buffer,
        confidence: Option<Confidence<'_>>,
    ) -> Result<()> {
        let Markov { kind, rank, hidden, vocab, block, blocks, .. } = *self;
        let (check, count) = (Check(INPUT.name), self.sequences * block);
        self.check(&check, depth)?;
        check.aligned("input", input, self.sequences * self.inputs() * 2)?;
        check.aligned("table", table, vocab * rank * 2)?;
        check.aligned("state", state, self.sequences * rank * 4)?;
        check.aligned("y", rows.y, count * hidden * 2)?;
        check.at_least("sumsq", rows.sumsq, count * hidden.div_ceil(128) * 4)?;
        check.at_least("drafts", rows.drafts, count * 4)?;
        check.aligned("best", rows.best, count * blocks * 8)?;
        check.aligned("sequences", sequences, self.sequences * Sequence::BYTES)?;
        let ([mut out, mut kept, mut weights, mut bias], mut weight_count) = ([const { Arg::Null }; 4], 0);
        if let Some(head) = confidence {
            weight_count = head.weights.bytes() / 4;
            check.that(
                weight_count == hidden || weight_count == hidden + rank,
                format_args!("a confidence head of {weight_count} inputs"),
                format_args!("{hidden} or {}", hidden + rank),
            )?;
            check.at_least("bias", head.bias, 4)?;
            check.at_least("confidence", head.out, count * 4)?;
            check.at_least("kept", head.kept, self.sequences * 4)?;
            [out, kept, weights, bias] = [head.out, head.kept, head.weights, head.bias].map(Arg::from);
        }
        let mut args = vec![input.into(), out, kept, table.into(), weights, bias];
        args.extend([rows.y, rows.sumsq, state, sequences, rows.drafts, rows.best].map(Arg::from));
        args.extend(u32s([kind as usize, rank, hidden, vocab, blocks, block, depth, weight_count]));
        args.push(rows.eps.into());
        device.launch(&INPUT, [self.sequences as u32, 1, 1], 0, &args)
    }

    /// Writes `latent` `[sequences][rank]` bf16 and the state of an rnn, from the results of the joint layer
    /// `[sequences][rank or 3 rank]` f32 and its `bias` `[rank or 3 rank]` f32. `input` and `state` as for
    /// [`Markov::input`]. Not for [`MarkovKind::Vanilla`].
    ///
    /// # Errors
    /// As [`Markov::input`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn latent(
        &self,
        device: &dyn Device,
        depth: usize,
        latent: &Buffer,
        state: &Buffer,
        input: &Buffer,
        joint: &Buffer,
        bias: &Buffer,
    ) -> Result<()> {
        let Markov { kind, rank, hidden, sequences, .. } = *self;
        let check = Check(LATENT.name);
        self.check(&check, depth)?;
        let outputs = if kind == MarkovKind::Rnn { 3 * rank } else { rank };
        check.that(kind != MarkovKind::Vanilla, "no joint layer", "one")?;
        check.aligned("latent", latent, sequences * rank * 2)?;
        check.aligned("state", state, sequences * rank * 4)?;
        check.aligned("input", input, sequences * self.inputs() * 2)?;
        check.aligned("joint", joint, sequences * outputs * 4)?;
        check.aligned("bias", bias, outputs * 4)?;
        let args = args([latent, state, input, joint, bias], [kind as usize, rank, hidden, depth]);
        device.launch(&LATENT, [sequences as u32, 1, 1], 0, &args)
    }
}
