//! A request and its outcome.

use crate::spec::config::SpecConfig;
use crate::spec::sampling::SamplingParams;
use crate::{Error, Result};
use std::time::Duration;

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Maximum number of tokens of the answer.
    pub max_tokens: usize,
    /// How the target's tokens are sampled.
    pub sampling: SamplingParams,
    /// Token ids that end the answer. The one that ended it is its last token. Empty for no stop ids.
    pub stop_ids: Vec<u32>,
    /// Rows of a block: the anchor and `block - 1` drafts. 1 is autoregressive decoding.
    pub block: usize,
    /// How drafts are made and verified. Autoregressive decoding does not read it.
    pub spec: SpecConfig,
}

impl Request {
    /// The maximum number of positions that the request needs: prompt, answer and one block.
    pub fn positions(&self) -> usize {
        self.prompt.len().saturating_add(self.max_tokens).saturating_add(self.block)
    }

    /// The most tokens that the answer can have in a context of `context` positions, and why an answer with
    /// that many tokens ends. The prompt must be shorter than the context.
    pub(crate) fn limit(&self, context: usize) -> (usize, Finish) {
        match context - self.prompt.len() {
            left if left < self.max_tokens => (left, Finish::Context),
            _ => (self.max_tokens, Finish::Length),
        }
    }

    /// Whether the answer `tokens` ends, and why. `limit` is that of [`Request::limit`].
    pub(crate) fn end(&self, tokens: &[u32], limit: (usize, Finish)) -> Option<Finish> {
        match tokens.last() {
            Some(id) if self.stop_ids.contains(id) => Some(Finish::Stop),
            _ => (tokens.len() == limit.0).then_some(limit.1),
        }
    }

    /// Checks the parameters against their ranges, and the prompt against a target with a vocabulary of
    /// `vocab` tokens and a context of `context` positions.
    ///
    /// # Errors
    /// [`Error::Option`] for a parameter; [`Error::Usage`] for the prompt's length; [`Error::Model`] for a
    /// token id that the target does not have.
    pub fn check(&self, vocab: usize, context: usize) -> Result<()> {
        self.sampling.check()?;
        self.spec.check()?;
        let prompt = self.prompt.len();
        if prompt == 0 {
            return Err(Error::Usage("the prompt is empty: at least one token is needed".into()));
        }
        if prompt >= context {
            return Err(Error::Usage(format!(
                "the prompt has {prompt} tokens, but the context holds {context}, the answer included"
            )));
        }
        match self.prompt.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::Model(format!(
                "the prompt holds token id {id}, but the target has {vocab} rows: its tokenizer belongs to another model"
            ))),
            None => Ok(()),
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens` is reached.
    Length,
    /// The context is full.
    Context,
    /// The caller ended it, or it is still running.
    Interrupted,
}

impl Finish {
    /// Its name in records.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Context => "context",
            Finish::Interrupted => "interrupted",
        }
    }
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Token ids of the answer, including a stop id that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Number of tokens that each round produced, the bonus token included. The last round counts in full,
    /// even if a stop or the budget cuts it, as in the older form of the reference implementation
    /// (docs/dflash.md 5.1).
    pub accepted: Vec<usize>,
    /// Number of drafts that each of these rounds verified, on all branches of a tree.
    pub drafted: Vec<usize>,
    /// Number of prompt tokens that were in the KV cache already ([`crate::engine::generate::resume`]).
    pub kept: usize,
    /// Time from the admission to the first token, other sequences' rounds included.
    pub prefill: Duration,
    /// Time from the first token to the end.
    pub decode: Duration,
}

impl Outcome {
    /// An empty answer.
    pub(crate) fn new(finish: Finish) -> Outcome {
        Outcome {
            tokens: Vec::new(),
            finish,
            accepted: Vec::new(),
            drafted: Vec::new(),
            kept: 0,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        }
    }
}
