//! `cuda/spec/chains.cu`: several chains of drafts per sequence, and multi-draft block verification, which
//! selects one of them. [`crate::spec::verify`] defines both.

use super::check::{Check, args};
use super::rejection::Rows;
use super::siblings::{SampledTrees, Siblings};
use super::verify::VerifyOutput;
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static SAMPLE: Kernel = Kernel { file: "chains", name: "sample_chains", threads: 512, max_shared: 0 };
static CLASSES: Kernel = Kernel { file: "chains", name: "chain_classes", threads: 512, max_shared: 0 };
static VERIFY: Kernel = Kernel { file: "chains", name: "verify_chains", threads: 512, max_shared: 0 };

/// Bytes of a row's classes: 64 u64. A class has the tokens with about the same ratio of target to drafter
/// probability. Entry c is the drafter's probability of all classes up to c.
pub const CLASSES_BYTES: usize = 512;

/// The kernels for trees that consist of chains, one after the other. A row whose parent is row 0 begins a
/// chain. All chains have as many drafts as the first.
///
/// Only sequences whose method is `block` and that sample a tree of at least two rows take part. The buffers
/// of other sequences are left unchanged.
#[derive(Debug, Clone, Copy)]
pub struct Chains(
    /// The sizes and their limits.
    pub Siblings,
);

/// Scratch memory of [`Chains::verify`].
#[derive(Debug, Clone, Copy)]
pub struct Workspace<'a> {
    /// `[sequences][max_verify_rows]` of [`CLASSES_BYTES`].
    pub classes: &'a Buffer,
    /// `[sequences][block]` u64.
    pub partial: &'a Buffer,
    /// `[sequences]` u32 counters.
    pub counters: &'a Buffer,
}

impl Chains {
    /// Samples `trees.tokens`: draft `i` of every chain from row `i` of `drafter` `[sequences][block]`,
    /// independently. `states` and `tables` as for [`Siblings::sample`].
    ///
    /// # Errors
    /// As [`Siblings::sample`].
    pub fn sample(
        &self,
        device: &dyn Device,
        trees: SampledTrees<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        self.0.sample_by(&SAMPLE, device, trees, drafter, states, tables)
    }

    /// Verifies the chains in two launches; `output.path` is `[sequences][max_verify_rows]`. `target`
    /// `[sequences][max_verify_rows]`: row j holds the distribution after the drafts on the path to row j.
    /// Rows after the same drafts must have the same logits. Everything else as for [`Chains::sample`].
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
        workspace: Workspace<'_>,
    ) -> Result<()> {
        let Siblings { sequences, block, max_verify_rows, .. } = self.0;
        let Workspace { classes, partial, counters } = workspace;
        let check = Check(VERIFY.name);
        let mut buffers = self.0.verify_buffers(&check, output, trees, target, drafter, states, tables)?;
        check.aligned("classes", classes, sequences * max_verify_rows * CLASSES_BYTES)?;
        check.aligned("partial", partial, sequences * block * 8)?;
        check.at_least("counters", counters, sequences * 4)?;
        let distributions = [target.distributions, target.logits, drafter.distributions, drafter.logits];
        let of_classes = [classes].into_iter().chain(distributions);
        let of_classes = of_classes.chain([trees.parents, trees.spans, states, tables]);
        let grid = [max_verify_rows as u32, sequences as u32, 1];
        device.launch(&CLASSES, grid, 0, &args(of_classes, self.0.sizes()))?;
        buffers.extend([classes, partial, counters]);
        device.launch(&VERIFY, [block as u32, sequences as u32, 1], 0, &args(buffers, self.0.sizes()))
    }
}
