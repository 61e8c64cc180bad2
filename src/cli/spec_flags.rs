//! The flags that say how drafts are made and which of them stand, the same for every program that generates, and what
//! follows from them.

use crate::checkpoint::pair::Pair;
use crate::cli::terminal::{number, whole};
use crate::cpu::decoder::Cpu;
use crate::engine::stats::SpecRecord;
use crate::gpu::batch_config::BatchConfig;
use crate::perf::roofline::Card;
use crate::spec::draft_length::{Costs, DraftLengthPolicy};
use crate::spec::sampling::SamplingParams;
use crate::spec::tree::MOST_ROWS;
use crate::spec::verify::{SpecConfig, VerifyMethod};
use crate::{Error, Result};

/// What --adaptive takes a CPU for, whichever it is, so that a run's rounds can be had again: some cores of a server.
const CORES: Card = Card { name: "cpu", bandwidth: 20.0, tflops: 0.1, memory: f64::INFINITY };

/// To be flattened into a program's own.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SpecFlags {
    /// Which drafts stand
    #[arg(long, value_enum, default_value_t = VerifyMethod::Match, help_heading = "Generation")]
    pub verify: VerifyMethod,
    /// Draw drafts by the noise that the target's tokens are chosen by; the text stays what it is. With --verify match
    #[arg(long, help_heading = "Generation")]
    pub coupled: bool,
    /// Draw drafts at this temperature; 0: the drafter's best tokens. With --coupled, and with --verify rejection or
    /// block [default: as --temperature]
    #[arg(long, value_name = "T", help_heading = "Generation")]
    #[arg(value_parser = number::<f32>, allow_negative_numbers = true)]
    pub draft_temperature: Option<f32>,
    /// Draft a tree instead of a chain: up to N tokens a round, 1 from the target and N - 1 drafts, of which several may
    /// be rivals for a position; --block says how many positions. With --verify match, the best tree there is, and the text
    /// is the same; with rejection, one of a fixed shape whose rivals are drawn one without the other; with block, several
    /// chains, of which the best is judged
    #[arg(long, value_name = "N", help_heading = "Generation", verbatim_doc_comment)]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub tree: Option<usize>,
    /// Verify as many drafts a round as pay, by what has been accepted and, on the CPU, how sure the drafter is of its best
    /// tokens, and none where drafting does not pay; or, with P, those that stand with at least this probability, by the
    /// same. With --verify match the text is the same; trees need it
    #[arg(long, value_name = "P", num_args = 0..=1, require_equals = true)]
    #[arg(help_heading = "Generation", verbatim_doc_comment, value_parser = number::<f64>)]
    pub adaptive: Option<Option<f64>>,
}

impl SpecFlags {
    /// What can be told wrong before any file is looked at. `plain`: there is no drafter, because `--draft` is none; `block`
    /// as given.
    ///
    /// # Errors
    /// [`Error::Usage`] for flags that cannot go together.
    pub fn check(&self, plain: bool, block: Option<usize>) -> Result<()> {
        if self.coupled && self.verify != VerifyMethod::Match {
            return Err(Error::Usage(format!(
                "--coupled is for --verify match, but --verify is {}, which draws drafts by chances of their own",
                self.verify.name()
            )));
        }
        if self.drawn().is_none() && self.draft_temperature.is_some() {
            return Err(Error::Usage(
                "--draft-temperature needs --coupled or --verify rejection or block: match drafts best tokens".into(),
            ));
        }
        let tree = self.tree.map(|_| "--tree");
        let adaptive = self.adaptive.map(|_| "--adaptive");
        for flag in [self.drawn(), tree, adaptive].into_iter().flatten() {
            needs_drafter(flag, plain, block)?;
        }
        if let Some(rows) = self.tree.filter(|rows| !(2..=MOST_ROWS).contains(rows)) {
            return Err(Error::Usage(format!("--tree is {rows}, expected 2 to {MOST_ROWS}")));
        }
        if let Some(least) = self.threshold().filter(|least| !(*least > 0.0 && *least <= 1.0)) {
            return Err(Error::Usage(format!("--adaptive is {least}, expected more than 0 and at most 1")));
        }
        match (tree, self.drawn()) {
            (Some(tree), Some(drawn)) if self.coupled => Err(Error::Usage(format!(
                "{tree} is for the drafter's best tokens, but with {drawn} drafts are drawn at random"
            ))),
            (Some(tree), Some(drawn)) if adaptive.is_some() => Err(Error::Usage(format!(
                "--adaptive with {tree} expects --verify match, but with {drawn} trees are drawn at random, and how \
                 often a row stands depends on their size"
            ))),
            _ => Ok(()),
        }
    }

    /// The probability in `--adaptive=P`.
    fn threshold(&self) -> Option<f64> {
        self.adaptive.flatten()
    }

    /// The flag that asks for drafts other than the drafter's best tokens.
    pub fn drawn(&self) -> Option<&'static str> {
        match self.verify {
            VerifyMethod::Match => self.coupled.then_some("--coupled"),
            VerifyMethod::Rejection => Some("--verify rejection"),
            VerifyMethod::Block => Some("--verify block"),
        }
    }

    /// `room` for such rounds on a device.
    pub fn room(&self, room: BatchConfig) -> BatchConfig {
        let room = BatchConfig { adaptive: self.adaptive.is_some(), threshold: self.threshold(), ..room };
        BatchConfig {
            draft_probs: self.verify != VerifyMethod::Match,
            ..room.with_trees(self.tree.unwrap_or(0))
        }
    }

    /// Drafts for a target that samples so: the same filters, and `--draft-temperature`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a temperature that there is not.
    pub fn drafting(&self, sampling: &SamplingParams) -> Result<SpecConfig> {
        if self.drawn().is_none() {
            return Ok(SpecConfig { tree: self.tree, ..SpecConfig::default() });
        }
        let temperature = self.draft_temperature.unwrap_or(sampling.temperature);
        let sampling = SamplingParams { temperature, ..sampling.clone() };
        let wrong = |_| {
            Error::Usage(format!(
                "--draft-temperature is {temperature}, expected 0 (best tokens) or 0.0001 to 10000"
            ))
        };
        sampling.check().map_err(wrong)?;
        Ok(SpecConfig { rule: self.verify, sampling, tree: self.tree })
    }

    /// The pair on the CPU, drafting so: up to `sequences` together, of `context` positions each.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub fn cpu(&self, pair: &Pair, sequences: usize, context: usize) -> Result<Cpu> {
        let goal = match (self.adaptive, &pair.drafter) {
            (Some(Some(least)), _) => DraftLengthPolicy::Threshold(least),
            (Some(None), Some(drafter)) => {
                let (target, drafter) = (&pair.target.config, &drafter.config);
                DraftLengthPolicy::CostModel(Costs::modelled(&CORES, target, drafter, 0, 1, drafter.block))
            }
            _ => DraftLengthPolicy::Full,
        };
        Ok(Cpu::load(pair, sequences, context)?.adaptive(goal))
    }

    /// What records say of requests that draft: `drafting` as [`SpecFlags::drafting`] has it.
    pub fn record(&self, drafting: &SpecConfig) -> SpecRecord {
        // As it was typed: 0.3 is another number in 64 bits.
        let temperature = drafting.sampling.temperature.to_string().parse().ok();
        SpecRecord {
            verify: Some(drafting.rule.name().into()),
            tree: self.tree,
            adaptive: Some(self.adaptive.is_some()),
            threshold: self.threshold(),
            coupled: Some(self.coupled),
            draft_temperature: temperature.filter(|_| self.drawn().is_some()),
        }
    }
}

/// Refuses `flag` where nothing is drafted. `plain` and `block` as for [`SpecFlags::check`].
///
/// # Errors
/// [`Error::Usage`]
pub fn needs_drafter(flag: &str, plain: bool, block: Option<usize>) -> Result<()> {
    if plain {
        return Err(Error::Usage(format!("{flag} needs a drafter, but --draft is none")));
    }
    match block {
        Some(1) => Err(Error::Usage(format!(
            "--block is 1, which is autoregressive decoding: {flag} expects at least 2"
        ))),
        _ => Ok(()),
    }
}
