//! How the drafts of a request are made and verified: one type that has only the legal combinations.
//!
//! | method | chain | tree | draft length |
//! | --- | --- | --- | --- |
//! | [`Exact`](SpecConfig::Exact) | best tokens, or coupled samples | best-first | any policy |
//! | [`Rejection`](SpecConfig::Rejection) | samples | fixed shape, distinct siblings | chains: any policy |
//! | [`Block`](SpecConfig::Block) | samples | several chains | chains: any policy |
//!
//! Two combinations do not exist. A best-first tree has no coupled samples, because it is built from the
//! drafter's best tokens. A sampled tree has no draft-length policy: its shape depends on its size, so how
//! often a row is accepted in trees of one size does not predict the acceptance in trees of another size.

use crate::checkpoint::pair::{DraftSource, Pair};
use crate::spec::draft_length::DraftLengthPolicy;
use crate::spec::sampling::SamplingParams;
use crate::spec::tree::MAX_TREE_ROWS;
use crate::{Error, Result};

/// Which drafts are accepted ([`crate::spec::verify`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VerifyMethod {
    /// Exact verification: accepts the tokens that autoregressive decoding emits with the same seed.
    #[default]
    Match,
    /// Rejection sampling token by token: the output has the target's distribution.
    Rejection,
    /// Verification of whole blocks: the output has the target's distribution.
    Block,
}

impl VerifyMethod {
    /// Its name in options and records.
    pub fn name(self) -> &'static str {
        match self {
            VerifyMethod::Match => "match",
            VerifyMethod::Rejection => "rejection",
            VerifyMethod::Block => "block",
        }
    }
}

/// How the drafts of a request are made and verified. Every variant is a legal combination;
/// [`SpecConfig::check`] checks the numbers in it.
///
/// The default is the method of the DFlash paper: chains of the drafter's best tokens, verified exactly.
///
/// ```
/// use dflash::spec::config::{BlockDrafts, ExactDrafts, SpecConfig};
/// use dflash::spec::draft_length::DraftLengthPolicy;
/// use dflash::spec::sampling::SamplingParams;
///
/// let tree = SpecConfig::Exact {
///     drafts: ExactDrafts::BestFirstTree { rows: 32 },
///     length: DraftLengthPolicy::CostModel,
/// };
/// let chains = SpecConfig::Block {
///     drafts: BlockDrafts::Chains { rows: 64 },
///     sampling: SamplingParams { temperature: 0.8, ..SamplingParams::default() },
/// };
/// assert_eq!((tree.tree_rows(), chains.tree_rows()), (Some(32), Some(64)));
/// assert!(!tree.samples_drafts() && chains.samples_drafts());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum SpecConfig {
    /// Exact verification ([`VerifyMethod::Match`]): the output is the token sequence of autoregressive
    /// decoding.
    Exact {
        /// The kind of drafts.
        drafts: ExactDrafts,
        /// How many drafts a round verifies.
        length: DraftLengthPolicy,
    },
    /// Rejection sampling ([`VerifyMethod::Rejection`]): the output has the target's distribution.
    Rejection {
        /// The shape of the drafts.
        drafts: RejectionDrafts,
        /// How drafts are sampled from the drafter's logits. At temperature 0 they are the best tokens. Its
        /// seed and stream are ignored; those of the request are used.
        sampling: SamplingParams,
    },
    /// Block verification ([`VerifyMethod::Block`]): the output has the target's distribution.
    Block {
        /// The shape of the drafts.
        drafts: BlockDrafts,
        /// As in [`SpecConfig::Rejection`].
        sampling: SamplingParams,
    },
}

/// The drafts of [`SpecConfig::Exact`].
#[derive(Debug, Clone, PartialEq)]
pub enum ExactDrafts {
    /// A chain of the drafter's best tokens.
    Chain,
    /// A chain sampled by [`SamplingParams::choose`] from the drafter's logits with the noise that the
    /// target's tokens use, so that similar distributions choose the same token (Daliri et al., arXiv
    /// 2408.07978). The seed and stream of these parameters are ignored; those of the request are used.
    CoupledChain(SamplingParams),
    /// The best-first tree of the drafter's best tokens ([`crate::spec::tree::Tree::best_first`]).
    BestFirstTree {
        /// Maximum rows, the anchor included: 2 to [`MAX_TREE_ROWS`].
        rows: usize,
    },
}

/// The drafts of [`SpecConfig::Rejection`].
#[derive(Debug, Clone, PartialEq)]
pub enum RejectionDrafts {
    /// A chain.
    Chain {
        /// How many drafts a round verifies.
        length: DraftLengthPolicy,
    },
    /// A tree of the shape [`crate::spec::tree::shape`], with siblings sampled without replacement.
    Tree {
        /// Maximum rows, the anchor included: 2 to [`MAX_TREE_ROWS`].
        rows: usize,
    },
}

/// The drafts of [`SpecConfig::Block`].
#[derive(Debug, Clone, PartialEq)]
pub enum BlockDrafts {
    /// A chain.
    Chain {
        /// How many drafts a round verifies.
        length: DraftLengthPolicy,
    },
    /// Several chains ([`crate::spec::tree::chains`]). One is selected and verified.
    Chains {
        /// Maximum rows, the anchor included: 2 to [`MAX_TREE_ROWS`].
        rows: usize,
    },
}

impl Default for SpecConfig {
    fn default() -> SpecConfig {
        SpecConfig::Exact { drafts: ExactDrafts::Chain, length: DraftLengthPolicy::Full }
    }
}

impl SpecConfig {
    /// Checks the numbers: rows of trees, thresholds, sampling parameters.
    ///
    /// # Errors
    /// [`Error::Option`]. Its name is `tree`, `threshold`, `confidence`, or `draft_` and the name of a field of
    /// [`SamplingParams`].
    pub fn check(&self) -> Result<()> {
        if let Some(rows) = self.tree_rows().filter(|rows| !(2..=MAX_TREE_ROWS).contains(rows)) {
            return Err(Error::option("tree", format!("is {rows}, expected 2 to {MAX_TREE_ROWS}")));
        }
        if let DraftLengthPolicy::Threshold(p) = self.draft_length()
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(Error::option("threshold", format!("is {p}, expected more than 0 and at most 1")));
        }
        if let Some(p) = self.draft_length().min_confidence()
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(Error::option("confidence", format!("is {p}, expected more than 0 and at most 1")));
        }
        match self.draft_sampling().map(SamplingParams::check) {
            Some(Err(Error::Option { name, problem })) => Err(Error::Option {
                name: match name {
                    "top_p" => "draft_top_p",
                    "min_p" => "draft_min_p",
                    _ => "draft_temperature",
                },
                problem,
            }),
            checked => checked.unwrap_or(Ok(())),
        }
    }

    /// Checks that the drafts of `pair`, if it has any, can be those that this configuration needs.
    ///
    /// # Errors
    /// [`Error::Option`] named `confidence` if there is no confidence head; with [`DraftSource::Lookup`] also
    /// trees, coupled drafts and draft lengths that adapt.
    pub fn check_drafter(&self, pair: &Pair) -> Result<()> {
        let length = self.draft_length();
        let option = match self {
            _ if length.min_confidence().is_some() => "confidence",
            SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(_), .. } => "coupled",
            _ if self.tree_rows().is_some() => "tree",
            _ if length.adapts() => "adaptive",
            _ => return Ok(()),
        };
        let problem = match &pair.draft {
            DraftSource::Lookup(lookup) => {
                format!("needs a drafter, but drafts are those of {}", lookup.name())
            }
            DraftSource::Drafter(drafter)
                if option == "confidence"
                    && drafter.config.walk().is_none_or(|walk| walk.confidence.is_none()) =>
            {
                let file = drafter.folder.described_file("config.json");
                format!("needs a drafter with a confidence head, {file} has none")
            }
            _ => return Ok(()),
        };
        Err(Error::option(option, problem))
    }

    /// The verification method.
    pub fn method(&self) -> VerifyMethod {
        match self {
            SpecConfig::Exact { .. } => VerifyMethod::Match,
            SpecConfig::Rejection { .. } => VerifyMethod::Rejection,
            SpecConfig::Block { .. } => VerifyMethod::Block,
        }
    }

    /// Maximum rows of a round's tree, the anchor included; `None` for a chain. A tree is at most as deep as
    /// a block is long.
    pub fn tree_rows(&self) -> Option<usize> {
        match *self {
            SpecConfig::Exact { drafts: ExactDrafts::BestFirstTree { rows }, .. }
            | SpecConfig::Rejection { drafts: RejectionDrafts::Tree { rows }, .. }
            | SpecConfig::Block { drafts: BlockDrafts::Chains { rows }, .. } => Some(rows),
            _ => None,
        }
    }

    /// How many drafts a round verifies. Sampled trees are always verified in full.
    pub fn draft_length(&self) -> DraftLengthPolicy {
        match *self {
            SpecConfig::Exact { length, .. }
            | SpecConfig::Rejection { drafts: RejectionDrafts::Chain { length }, .. }
            | SpecConfig::Block { drafts: BlockDrafts::Chain { length }, .. } => length,
            _ => DraftLengthPolicy::Full,
        }
    }

    /// How drafts are sampled; `None` if the configuration always drafts the drafter's best tokens.
    pub fn draft_sampling(&self) -> Option<&SamplingParams> {
        match self {
            SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(sampling), .. }
            | SpecConfig::Rejection { sampling, .. }
            | SpecConfig::Block { sampling, .. } => Some(sampling),
            SpecConfig::Exact { .. } => None,
        }
    }

    /// The same configuration with these sampling parameters for drafts. It has no effect if drafts are not
    /// sampled.
    pub fn with_draft_sampling(mut self, params: SamplingParams) -> SpecConfig {
        match &mut self {
            SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(sampling), .. }
            | SpecConfig::Rejection { sampling, .. }
            | SpecConfig::Block { sampling, .. } => *sampling = params,
            SpecConfig::Exact { .. } => {}
        }
        self
    }

    /// The sampling parameters for the drafts of a request: those of [`SpecConfig::draft_sampling`] (greedy
    /// if it is `None`) with the request's seed and stream.
    pub fn draft_params(&self, request: &SamplingParams) -> SamplingParams {
        let SamplingParams { seed, stream, .. } = *request;
        SamplingParams { seed, stream, ..self.draft_sampling().cloned().unwrap_or_default() }
    }

    /// Whether drafts are sampled. If so, the draft length must be chosen before they are known. Coupled
    /// samples at temperature 0 are not random: they are the best tokens.
    pub fn samples_drafts(&self) -> bool {
        match self {
            SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(sampling), .. } => {
                sampling.temperature != 0.0
            }
            SpecConfig::Exact { .. } => false,
            SpecConfig::Rejection { .. } | SpecConfig::Block { .. } => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(config: SpecConfig) -> String {
        config.check().unwrap_err().to_string()
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_the_option_name() {
        let sampling = SamplingParams::default();
        for rows in [0, 1, 65, usize::MAX] {
            let drafts = RejectionDrafts::Tree { rows };
            assert_eq!(
                sentence(SpecConfig::Rejection { drafts, sampling: sampling.clone() }),
                format!("tree is {rows}, expected 2 to 64")
            );
        }
        for p in [0.0, -1.0, 1.5, f64::NAN] {
            let length = DraftLengthPolicy::Threshold(p);
            let expected = format!("threshold is {p}, expected more than 0 and at most 1");
            assert_eq!(sentence(SpecConfig::Exact { drafts: ExactDrafts::Chain, length }), expected);
        }
        let negative = SamplingParams { temperature: -1.0, ..sampling };
        let drafts = ExactDrafts::CoupledChain(negative);
        let coupled = SpecConfig::Exact { drafts, length: DraftLengthPolicy::Full };
        assert_eq!(sentence(coupled), "draft_temperature is -1, expected 0 (greedy) or 0.0001 to 10000");
        assert_eq!(SpecConfig::default().check(), Ok(()));
    }
}
