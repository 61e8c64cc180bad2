//! The capacity of a batch: how many sequences, their length, and the kinds of rounds that its memory and
//! graphs support.

use crate::checkpoint::pair::Pair;
use crate::gpu::kernels::PAGE;
use crate::gpu::kernels::attention::MAX_SLOTS;
use crate::spec::config::{SpecConfig, VerifyMethod};
use crate::spec::tree::MAX_TREE_ROWS;
use crate::{Error, Result};
use std::fmt;

/// The most rows of a pass over all sequences that the launchers accept.
const MAX_PASS_ROWS: usize = 65535;

/// The capacity of a [`Batch`](crate::gpu::decoder::Batch).
///
/// It decides every allocation and every captured graph, so a request cannot exceed it later.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchConfig {
    /// Sequences that run together: 1 to 1024.
    pub sequences: usize,
    /// Rows of a draft block, the anchor included: 1 to 64; 1 is autoregressive decoding.
    pub block: usize,
    /// Pages of the KV cache, [`PAGE`] positions each, shared by all sequences.
    pub pages: usize,
    /// The most positions of one sequence, prompt and answer together.
    pub positions: usize,
    /// The most rows of a draft tree, the anchor included, up to [`MAX_TREE_ROWS`]; 0: rounds verify only
    /// chains.
    pub tree: usize,
    /// Reserves the drafter's logits and the distributions of both models, which the verification methods
    /// `rejection` and `block` read. Without them every request must use `match`.
    pub draft_probs: bool,
    /// Captures rounds of several sizes, down to AR steps that keep the drafter's cache up to date, for
    /// requests whose draft length adapts. Without it every round has the full size.
    pub adaptive: bool,
}

impl BatchConfig {
    /// Chains only, verified by `match`, with enough pages for every sequence to have `positions` positions.
    pub fn new(sequences: usize, block: usize, positions: usize) -> BatchConfig {
        let pages = sequences.saturating_mul(positions.div_ceil(PAGE));
        BatchConfig { sequences, block, pages, positions, tree: 0, draft_probs: false, adaptive: false }
    }

    /// The same with trees of up to `rows` rows. The rows of a tree need cache slots after the sequence's
    /// last position, so every sequence gets pages for them too.
    pub fn with_trees(self, rows: usize) -> BatchConfig {
        let pages = self.sequences.saturating_mul(self.positions.saturating_add(rows).div_ceil(PAGE));
        BatchConfig { pages, tree: rows, ..self }
    }

    /// The same with the capacity that requests with this [`SpecConfig`] need.
    pub fn for_spec(self, spec: &SpecConfig) -> BatchConfig {
        BatchConfig {
            draft_probs: spec.method() != VerifyMethod::Match,
            adaptive: spec.draft_length().adapts(),
            ..self.with_trees(spec.tree_rows().unwrap_or(0))
        }
    }

    /// The most rows that a round verifies of one sequence, the anchor included.
    pub fn max_verify_rows(&self) -> usize {
        self.block.max(self.tree)
    }

    /// The most pages of one sequence.
    pub fn sequence_pages(&self) -> usize {
        self.positions.saturating_add(self.tree).div_ceil(PAGE)
    }

    /// [`BatchConfig::new`] for a pair. Sequences have `ctx` positions if it is given. Otherwise they have
    /// `needed` positions (those of the longest request), but at least 8192 and at most what the models
    /// allow.
    ///
    /// # Errors
    /// As [`Pair::context`].
    pub fn for_pair(
        pair: &Pair,
        sequences: usize,
        block: usize,
        ctx: Option<usize>,
        needed: usize,
    ) -> Result<BatchConfig> {
        let limit = pair.context(ctx)?;
        let positions = if ctx.is_some() { limit } else { limit.min(needed.max(8192)) };
        Ok(BatchConfig::new(sequences, block, positions))
    }

    /// Checks the sizes against the limits of the kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the size, its value and the limits.
    pub fn check(&self) -> Result<()> {
        let BatchConfig { sequences, block, positions, tree, .. } = *self;
        let refuse = |found: String, expected: String| {
            Err(Error::Unsupported(format!("the kernels cannot run {found}: expected {expected}")))
        };
        match (sequences, block, positions) {
            (0, ..) | (1025.., ..) => refuse(format!("a batch of {sequences}"), "1 to 1024".into()),
            (_, 0 | 65.., _) => refuse(format!("blocks of {block} rows"), "1 to 64".into()),
            _ if tree > MAX_TREE_ROWS => {
                refuse(format!("trees of {tree} rows"), format!("at most {MAX_TREE_ROWS}"))
            }
            _ if sequences * self.max_verify_rows() > MAX_PASS_ROWS => {
                let rows = self.max_verify_rows();
                let most = MAX_PASS_ROWS / rows;
                refuse(
                    format!("a batch of {sequences}"),
                    format!("at most {most} with {rows} rows per sequence"),
                )
            }
            _ if positions == 0 || positions > MAX_SLOTS - tree => {
                refuse(format!("a context of {positions}"), format!("1 to {} positions", MAX_SLOTS - tree))
            }
            _ => Ok(()),
        }
    }
}

/// A noun phrase for sentences such as "memory for ...".
impl fmt::Display for BatchConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BatchConfig { sequences, block, positions, .. } = self;
        let plural = if *sequences == 1 { "" } else { "s" };
        write!(f, "{sequences} sequence{plural} of {positions} positions in blocks of {block}")?;
        if self.tree > 0 { write!(f, " and trees of {}", self.tree) } else { Ok(()) }
    }
}
