//! The flags that say how drafts are made and verified, shared by every program that generates, and their
//! translation into a [`SpecConfig`].

use crate::checkpoint::config::{Overrides, Slots};
use crate::cli::terminal::{number, whole};
use crate::spec::config::{BlockDrafts, ExactDrafts, RejectionDrafts, SpecConfig, VerifyMethod};
use crate::spec::draft_length::DraftLengthPolicy;
use crate::spec::sampling::SamplingParams;
use crate::{Error, Result};
use clap::ValueEnum;
use clap::builder::{EnumValueParser, TypedValueParser};

/// To be flattened into a program's own flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SpecFlags {
    /// Which drafts are accepted
    #[arg(long, default_value = "match", help_heading = "Generation")]
    #[arg(value_parser = EnumValueParser::<Method>::new().map(VerifyMethod::from))]
    pub verify: VerifyMethod,
    /// Sample drafts with the noise that the target's tokens are sampled with; the text stays the same. With
    /// --verify match
    #[arg(long, help_heading = "Generation")]
    pub coupled: bool,
    /// Sample drafts at this temperature; 0: the drafter's best tokens. With --coupled, and with --verify
    /// rejection or block [default: as --temperature]
    #[arg(long, value_name = "T", help_heading = "Generation")]
    #[arg(value_parser = number::<f32>, allow_negative_numbers = true)]
    pub draft_temperature: Option<f32>,
    /// Draft a tree instead of a chain: up to N rows a round, the anchor and N - 1 drafts. Several drafts may
    /// compete for one position; --block says how many positions there are. With --verify match it is the
    /// best tree for the drafter's probabilities, and the text stays the same; with rejection a tree of fixed
    /// shape whose siblings are sampled without replacement; with block several chains, of which one is
    /// selected
    #[arg(long, value_name = "N", help_heading = "Generation", verbatim_doc_comment)]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub tree: Option<usize>,
    /// Choose how many drafts each round verifies: as many as save time, given how many were accepted so far
    /// and, on the CPU, the drafter's probabilities; none if drafting does not save time. With P: the drafts
    /// that are accepted with at least this probability. With --verify match the text stays the same; trees
    /// need --verify match
    #[arg(long, value_name = "P", num_args = 0..=1, require_equals = true)]
    #[arg(help_heading = "Generation", verbatim_doc_comment, value_parser = number::<f64>)]
    pub adaptive: Option<Option<f64>>,
    /// Verify the drafts before the first whose confidence is below P, as the drafter's confidence head
    /// estimates it. For DSpark drafters. With --verify match the text stays the same; trees need --verify
    /// match
    #[arg(long, value_name = "P", conflicts_with = "adaptive", help_heading = "Generation")]
    #[arg(verbatim_doc_comment, value_parser = number::<f32>, allow_negative_numbers = true)]
    pub confidence: Option<f32>,
}

/// The flags that say what the config of a drafter does not say. To be flattened into a program's own flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DrafterFlags {
    /// Layers of the target whose outputs the drafter reads, in its order, instead of the target_layer_ids of
    /// its config.json
    #[arg(long, value_name = "1,9,...", value_delimiter = ',', value_parser = whole::<usize>)]
    #[arg(help_heading = "Models", allow_negative_numbers = true)]
    pub taps: Option<Vec<usize>>,
    /// Which position a row of the drafter's block predicts, instead of what its config says: its own
    /// (fill-in) or the next one (anchor-first)
    #[arg(long, value_enum, value_name = "SLOTS", help_heading = "Models", hide_possible_values = true)]
    pub slots: Option<SlotsName>,
}

/// [`Slots`] as a flag's value.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum SlotsName {
    /// Its own position
    FillIn,
    /// The next position
    AnchorFirst,
}

impl DrafterFlags {
    /// The overrides that the flags give.
    pub fn overrides(&self) -> Overrides {
        let slots = self.slots.map(|slots| match slots {
            SlotsName::FillIn => Slots::FillIn,
            SlotsName::AnchorFirst => Slots::AnchorFirst,
        });
        Overrides { taps: self.taps.clone(), slots }
    }

    /// Refuses the flags if no drafter is loaded: `without` is what `--draft` is instead
    /// ([`crate::cli::models::without_drafter`]).
    ///
    /// # Errors
    /// [`Error::Usage`] with the flag.
    pub fn need_drafter(&self, without: Option<&str>) -> Result<()> {
        let given = [(self.taps.is_some(), "--taps"), (self.slots.is_some(), "--slots")];
        match (without, given.iter().find(|(given, _)| *given)) {
            (Some(draft), Some((_, flag))) => {
                Err(Error::Usage(format!("{flag} needs a drafter, but --draft is {draft}")))
            }
            _ => Ok(()),
        }
    }
}

/// [`VerifyMethod`] as a flag's value.
#[derive(Clone, Copy, ValueEnum)]
enum Method {
    /// Drafts that equal the token that autoregressive decoding emits with the same seed
    Match,
    /// Token by token, with the probability that keeps the target's distribution
    Rejection,
    /// Whole blocks, with the probability that keeps the target's distribution
    Block,
}

impl From<Method> for VerifyMethod {
    fn from(method: Method) -> VerifyMethod {
        match method {
            Method::Match => VerifyMethod::Match,
            Method::Rejection => VerifyMethod::Rejection,
            Method::Block => VerifyMethod::Block,
        }
    }
}

impl SpecFlags {
    /// Translates the flags for a target that samples with `sampling`: the one place that says which flags go
    /// together.
    ///
    /// # Errors
    /// [`Error::Usage`] for flags that cannot go together; [`Error::Option`] for numbers out of range.
    pub fn config(&self, sampling: &SamplingParams) -> Result<SpecConfig> {
        let wrong = |sentence: String| Err(Error::Usage(sentence));
        let length = match (self.adaptive, self.confidence) {
            (None, None) => DraftLengthPolicy::Full,
            (None, Some(p)) => DraftLengthPolicy::Confidence(p),
            (Some(None), _) => DraftLengthPolicy::CostModel,
            (Some(Some(p)), _) => DraftLengthPolicy::Threshold(p),
        };
        let name = self.verify.name();
        let params = self.draft_params(sampling);
        let config = match (self.verify, self.coupled, self.tree) {
            (VerifyMethod::Rejection | VerifyMethod::Block, true, _) => {
                return wrong(format!(
                    "--coupled needs --verify match, but --verify is {name}, which samples drafts with noise of their own"
                ));
            }
            (VerifyMethod::Match, false, _) if self.draft_temperature.is_some() => {
                return wrong(
                    "--draft-temperature needs --coupled or --verify rejection or block: match drafts the best tokens"
                        .into(),
                );
            }
            (VerifyMethod::Match, true, Some(_)) => {
                return wrong(
                    "--tree is for the drafter's best tokens, but with --coupled drafts are sampled".into(),
                );
            }
            (VerifyMethod::Rejection | VerifyMethod::Block, _, Some(_)) if self.adaptive.is_some() => {
                return wrong(format!(
                    "--adaptive with --tree needs --verify match, but --verify is {name}: how often a row of a sampled \
                     tree is accepted depends on the size of the tree"
                ));
            }
            (VerifyMethod::Rejection | VerifyMethod::Block, _, Some(_)) if self.confidence.is_some() => {
                return wrong(format!(
                    "--confidence with --tree needs --verify match, but --verify is {name}"
                ));
            }
            (VerifyMethod::Match, true, None) => {
                SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(params), length }
            }
            (VerifyMethod::Match, false, None) => SpecConfig::Exact { drafts: ExactDrafts::Chain, length },
            (VerifyMethod::Match, false, Some(rows)) => {
                SpecConfig::Exact { drafts: ExactDrafts::BestFirstTree { rows }, length }
            }
            (VerifyMethod::Rejection, false, None) => {
                SpecConfig::Rejection { drafts: RejectionDrafts::Chain { length }, sampling: params }
            }
            (VerifyMethod::Rejection, false, Some(rows)) => {
                SpecConfig::Rejection { drafts: RejectionDrafts::Tree { rows }, sampling: params }
            }
            (VerifyMethod::Block, false, None) => {
                SpecConfig::Block { drafts: BlockDrafts::Chain { length }, sampling: params }
            }
            (VerifyMethod::Block, false, Some(rows)) => {
                SpecConfig::Block { drafts: BlockDrafts::Chains { rows }, sampling: params }
            }
        };
        config.check()?;
        Ok(config)
    }

    /// How drafts are sampled for a target that samples with `sampling`: with the same filters, at
    /// `--draft-temperature`.
    pub fn draft_params(&self, sampling: &SamplingParams) -> SamplingParams {
        let temperature = self.draft_temperature.unwrap_or(sampling.temperature);
        SamplingParams { temperature, ..sampling.clone() }
    }

    /// Refuses flags about drafts where nothing is drafted: `--draft` is none (`no_drafter`), or `--block` is
    /// 1.
    ///
    /// # Errors
    /// [`Error::Usage`]
    pub fn need_drafter(&self, no_drafter: bool, block: Option<usize>) -> Result<()> {
        let sampled = match self.verify {
            VerifyMethod::Match => self.coupled.then_some("--coupled"),
            VerifyMethod::Rejection => Some("--verify rejection"),
            VerifyMethod::Block => Some("--verify block"),
        };
        let (tree, adaptive) = (self.tree.map(|_| "--tree"), self.adaptive.map(|_| "--adaptive"));
        let mut flags =
            [sampled, tree, adaptive, self.confidence.map(|_| "--confidence")].into_iter().flatten();
        flags.try_for_each(|flag| needs_drafter(flag, no_drafter, block))
    }
}

/// Refuses `flag` where nothing is drafted. Arguments as for [`SpecFlags::need_drafter`].
///
/// # Errors
/// [`Error::Usage`]
pub fn needs_drafter(flag: &str, no_drafter: bool, block: Option<usize>) -> Result<()> {
    if no_drafter {
        return Err(Error::Usage(format!("{flag} needs a drafter, but --draft is none")));
    }
    match block {
        Some(1) => Err(Error::Usage(format!(
            "--block is 1, which is autoregressive decoding: {flag} expects at least 2"
        ))),
        _ => Ok(()),
    }
}
