//! `cuda/spec/chains.cu`: several chains of drafts, as [`crate::spec::verify::sample_chains`] has them, and the best of them judged by
//! [`crate::spec::verify::multi_draft_block_verify`].

use super::rules::{DISTRIBUTION_BYTES, Rows};
use super::siblings::{Drawn, Siblings};
use super::verify::Verdict;
use super::{aligned, at_least};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

static DRAW: Kernel = Kernel { file: "chains", name: "sample_chains", threads: 512, max_shared: 0 };
static CLASSES: Kernel = Kernel { file: "chains", name: "chain_classes", threads: 512, max_shared: 0 };
static JUDGE: Kernel = Kernel { file: "chains", name: "verify_chains", threads: 512, max_shared: 0 };

/// Bytes of what [`Chains::judge`] knows of the classes of a row's tokens.
pub const CLASSES_BYTES: usize = 512;

/// The kernels for trees of such sizes, of chains one behind the other: a row whose parent is 0 begins one, and all have as
/// many drafts as the first. Sequences whose rule is `block` and that draw a tree, of two rows or more, take part; what
/// there is of others is left as it is.
#[derive(Debug, Clone, Copy)]
pub struct Chains(pub Siblings);

/// What only [`Chains::judge`] needs.
#[derive(Debug, Clone, Copy)]
pub struct Workspace<'a> {
    /// `[sequences][wide]` of [`CLASSES_BYTES`], undefined.
    pub classes: &'a Buffer,
    /// `[sequences][block]` u64, undefined.
    pub partial: &'a Buffer,
    /// `[sequences]` u32, zero; they are zero again afterwards.
    pub counters: &'a Buffer,
}

impl Chains {
    /// Draws `trees.tokens`: the drafts of row `i` of each chain from row `i` of `drafter`, `[sequences][block]`. `states`
    /// and `tables` as for [`Siblings::draw`].
    ///
    /// # Errors
    /// As [`Siblings::draw`].
    pub fn draw(
        &self,
        device: &dyn Device,
        trees: Drawn<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
    ) -> Result<()> {
        let Siblings { sequences, wide, .. } = self.0;
        self.0.check("sample_chains", trees, drafter, states, tables)?;
        let mut args: Vec<Arg> =
            vec![trees.tokens.into(), drafter.distributions.into(), drafter.logits.into()];
        args.extend([trees.parents, trees.spans, states, tables].map(Arg::from));
        args.extend(self.0.sizes());
        device.launch(&DRAW, [wide as u32, sequences as u32, 1], 0, &args)
    }

    /// The verdict on such chains, its path `[sequences][wide]`, in two launches. `target` `[sequences][wide]`: row j's
    /// logits and distribution come after the drafts on the way to row j, and are the same where those are; the rest as
    /// [`Chains::draw`].
    ///
    /// # Errors
    /// As [`Siblings::draw`].
    #[allow(clippy::too_many_arguments)] // all of a verdict's inputs
    pub fn judge(
        &self,
        device: &dyn Device,
        verdict: Verdict<'_>,
        trees: Drawn<'_>,
        target: Rows<'_>,
        drafter: Rows<'_>,
        states: &Buffer,
        tables: &Buffer,
        work: Workspace<'_>,
    ) -> Result<()> {
        const NAME: &str = "verify_chains";
        let Siblings { sequences, block, wide, vocab } = self.0;
        self.0.check(NAME, trees, drafter, states, tables)?;
        verdict.check(NAME, sequences, wide)?;
        aligned(NAME, "the target's logits", target.logits, sequences * wide * vocab * 4)?;
        aligned(
            NAME,
            "the target's distributions",
            target.distributions,
            sequences * wide * DISTRIBUTION_BYTES,
        )?;
        aligned(NAME, "classes", work.classes, sequences * wide * CLASSES_BYTES)?;
        aligned(NAME, "partial", work.partial, sequences * block * 8)?;
        at_least(NAME, "counters", work.counters, sequences * 4)?;
        let distributions = [target.distributions, target.logits, drafter.distributions, drafter.logits];
        let of_trees = [trees.parents, trees.spans, states, tables];
        let buffers = [work.classes].into_iter().chain(distributions).chain(of_trees);
        let args: Vec<Arg> = buffers.map(Arg::from).chain(self.0.sizes()).collect();
        device.launch(&CLASSES, [wide as u32, sequences as u32, 1], 0, &args)?;

        let given = [verdict.accepted, verdict.next, verdict.path]
            .into_iter()
            .chain(distributions)
            .chain([trees.tokens]);
        let buffers = given.chain(of_trees).chain([work.classes, work.partial, work.counters]);
        let args: Vec<Arg> = buffers.map(Arg::from).chain(self.0.sizes()).collect();
        device.launch(&JUDGE, [block as u32, sequences as u32, 1], 0, &args)
    }
}
