//! `cuda/spec/siblings.cu`: trees whose siblings are sampled without replacement, and their verification by
//! recursive rejection sampling. [`crate::spec::verify`] defines both.

use super::SPAN_BYTES;
use super::check::{Check, args};
use super::rejection::{Rows, check_states};
use super::verify::VerifyOutput;
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static SAMPLE: Kernel = Kernel { file: "siblings", name: "sample_siblings", threads: 512, max_shared: 0 };
static VERIFY: Kernel = Kernel { file: "siblings", name: "verify_tree", threads: 512, max_shared: 0 };

/// The kernels that sample and verify one tree per sequence.
///
/// Only sequences whose method is `rejection` and that sample a tree of at least two rows take part. The
/// buffers of other sequences are left unchanged.
#[derive(Debug, Clone, Copy)]
pub struct Siblings {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of the drafter's block, 1 to 64.
    pub block: usize,
    /// Rows of a tree, anchor included, 1 to 64.
    pub max_verify_rows: usize,
    /// Tokens, 1 to 2^26.
    pub vocab: usize,
}

/// Trees of a fixed shape whose tokens are sampled.
#[derive(Debug, Clone, Copy)]
pub struct SampledTrees<'a> {
    /// `[sequences][max_verify_rows]` u32: the anchor, then the drafts; `u32::MAX` for padding and for a
    /// draft whose distribution is invalid.
    pub tokens: &'a Buffer,
    /// `[sequences][max_verify_rows]` u32: the row that each row follows, an earlier row of the same
    /// sequence.
    pub parents: &'a Buffer,
    /// `[sequences]` `Span`: the number of rows of each sequence.
    pub spans: &'a Buffer,
}

impl Siblings {
    fn check(
        &self,
        check: &Check,
        trees: SampledTrees<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Siblings { sequences, block, max_verify_rows, vocab } = *self;
        check.blocks(sequences, block)?;
        check.blocks(sequences, max_verify_rows)?;
        check.vocab(vocab)?;
        check.at_least("tokens", trees.tokens, sequences * max_verify_rows * 4)?;
        check.at_least("parents", trees.parents, sequences * max_verify_rows * 4)?;
        check.aligned("spans", trees.spans, sequences * SPAN_BYTES)?;
        drafter.check(check, "the drafter's", sequences * block, vocab)?;
        check_states(check, sequences, states, tables)
    }

    /// The last arguments of all kernels of sampled trees.
    pub(super) fn sizes(&self) -> [usize; 3] {
        [self.vocab, self.block, self.max_verify_rows]
    }

    /// Launches a kernel that samples trees: the one of this file or of [`super::chains`].
    pub(super) fn sample_by(
        &self,
        kernel: &'static Kernel,
        device: &dyn Device,
        trees: SampledTrees<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        self.check(&Check(kernel.name), trees, drafter, states, tables)?;
        let SampledTrees { tokens, parents, spans } = trees;
        let buffers = [tokens, drafter.distributions, drafter.logits, parents, spans, states, tables];
        let grid = [self.max_verify_rows as u32, self.sequences as u32, 1];
        device.launch(kernel, grid, 0, &args(buffers, self.sizes()))
    }

    /// Checks the arguments of a kernel that verifies trees, the one of this file or of [`super::chains`].
    /// Returns the arguments that both begin with.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub(super) fn verify_buffers<'a>(
        &self,
        check: &Check,
        output: VerifyOutput<'a>,
        trees: SampledTrees<'a>,
        target: Rows<'a>,
        drafter: Rows<'a>,
        states: &'a Buffer,
        tables: &'a Buffer,
    ) -> Result<Vec<&'a Buffer>> {
        let rows = self.max_verify_rows;
        self.check(check, trees, drafter, states, tables)?;
        output.check(check, self.sequences, rows)?;
        target.check(check, "the target's", self.sequences * rows, self.vocab)?;
        let mut buffers = output.buffers().to_vec();
        buffers.extend([target.distributions, target.logits, drafter.distributions, drafter.logits]);
        buffers.extend([trees.tokens, trees.parents, trees.spans, states, tables]);
        Ok(buffers)
    }

    /// Samples `trees.tokens` from the distributions of `drafter` `[sequences][block]`: rows of depth `d`
    /// from its row `d`, siblings in the order of their rows, each without the tokens of earlier siblings. If
    /// no token is left, a row gets the token of the sibling before it.
    ///
    /// `states` `[sequences]` [`super::round::Sequence`]: method, seed, stream, anchor, length and rounds.
    /// `tables`: [`super::sample::tables`], sealed.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn sample(
        &self,
        device: &dyn Device,
        trees: SampledTrees<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        self.sample_by(&SAMPLE, device, trees, drafter, states, tables)
    }

    /// Verifies the trees; `output.path` is `[sequences][max_verify_rows]`. `target`
    /// `[sequences][max_verify_rows]`: row j holds the distribution after the drafts on the path to row j.
    /// Everything else as for [`Siblings::sample`].
    ///
    /// # Errors
    /// As [`Siblings::sample`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn verify(
        &self,
        device: &dyn Device,
        output: VerifyOutput<'_>,
        trees: SampledTrees<'_>,
        target: Rows<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let check = Check(VERIFY.name);
        let buffers = self.verify_buffers(&check, output, trees, target, drafter, states, tables)?;
        device.launch(&VERIFY, [self.sequences as u32, 1, 1], 0, &args(buffers, self.sizes()))
    }
}
