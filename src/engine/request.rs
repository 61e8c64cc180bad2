//! What to generate, and what came of it.

use crate::spec::config::SpecConfig;
use crate::spec::sampling::SamplingParams;
use crate::{Error, Result};
use std::time::Duration;

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Maximum tokens of the answer.
    pub max_tokens: usize,
    /// How the target's tokens are sampled.
    pub sampling: SamplingParams,
    /// Ids that end the answer; the one that ended it is its last token. Empty: none does.
    pub stop_ids: Vec<u32>,
    /// Rows of a block: the anchor and `block - 1` drafts. 1 is autoregressive decoding.
    pub block: usize,
    /// How drafts are made and verified; autoregressive decoding does not read it.
    pub spec: SpecConfig,
}

impl Request {
    /// The maximum number of positions that it needs: prompt, answer and a block.
    pub fn positions(&self) -> usize {
        self.prompt.len().saturating_add(self.max_tokens).saturating_add(self.block)
    }

    /// Checks the parameters against their ranges, and the prompt against a target of `vocab` tokens and a
    /// context of `context` positions.
    ///
    /// # Errors
    /// [`Error::Usage`], or [`Error::Model`] for a token that the target does not have.
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
    /// `max_tokens` reached.
    Length,
    /// The model's context is full.
    Context,
    /// The caller ended it.
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

/// What came of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Token ids of the answer.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens that each round produced, the bonus token included. The last round counts whole even where a
    /// stop or the budget cuts it, as the reference implementation records it (docs/dflash.md 5.1, older
    /// form).
    pub accepted: Vec<usize>,
    /// Drafts that each of these rounds verified, all nodes of a tree counted.
    pub drafted: Vec<usize>,
    /// Tokens of the prompt that the decoder held already ([`crate::engine::generate::resume`]).
    pub kept: usize,
    /// From the start to the first token, other sequences' rounds included.
    pub prefill: Duration,
    /// From the first token to the end.
    pub decode: Duration,
}

impl Outcome {
    /// An empty answer.
    pub(super) fn new(finish: Finish) -> Outcome {
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
