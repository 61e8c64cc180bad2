//! The weights of a pair on a device.

use crate::checkpoint::config::{DrafterConfig, TargetConfig};
use crate::checkpoint::drafter as plan;
use crate::checkpoint::pair::{DraftSource, Pair};
use crate::gpu::chain::Chain;
use crate::gpu::device::Device;
use crate::gpu::kernels::linear::Shape;
use crate::gpu::loader::Loader;
use crate::gpu::markov::MarkovHead;
use crate::gpu::model::{EmbeddingTable, FeatureProjection, LmHead, Transformer, Vocabulary};
use crate::gpu::selector::Selector;
use crate::{Error, Result};

/// A target and, if the pair has one, its drafter, loaded on a device.
pub struct Models {
    pub(super) config: TargetConfig,
    pub(super) target: Transformer,
    pub(super) vocabulary: Vocabulary,
    pub(super) draft: DraftSource<Drafter>,
}

/// How the drafts of a round depend on each other.
pub(super) enum Dependence {
    Independent,
    /// Corrects the logits of a block's rows by the drafts before them.
    Walk(MarkovHead),
    /// Chooses the drafts among the best tokens of the rows, by the drafts before them.
    Select(Selector),
    /// Drafts one token after the other.
    Chain(Chain),
}

/// A drafter.
pub(super) struct Drafter {
    /// Its plan.
    pub config: DrafterConfig,
    /// `None`: it uses the target's.
    embedding: Option<EmbeddingTable>,
    /// `None`: it uses the target's.
    head: Option<LmHead>,
    /// How the drafts of a round depend on each other.
    pub dependence: Dependence,
    pub layers: Transformer,
    pub projection: FeatureProjection,
}

impl Models {
    /// Loads both models for sequences of up to `positions` positions.
    ///
    /// # Errors
    /// As [`Models::load_with`].
    pub fn load(device: &dyn Device, pair: &Pair, positions: usize) -> Result<Models> {
        Models::load_with(device, pair, positions, &mut |_, _| ())
    }

    /// As [`Models::load`]. Calls `progress` with the bytes loaded so far and the total.
    ///
    /// # Errors
    /// As [`Transformer::load`] and [`Loader::run`].
    pub fn load_with(
        device: &dyn Device,
        pair: &Pair,
        positions: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Models> {
        let mut loader = Loader::new(device, &pair.target.weights);
        let models = Models::list(&mut loader, pair, positions, &mut |_| ())?;
        loader.run(progress)?;
        Ok(models)
    }

    /// Allocates both models and lists their tensors in `loader`. Calls `done` after each group of
    /// allocations, with the name of the group.
    pub(crate) fn list<'a>(
        loader: &mut Loader<'a>,
        pair: &'a Pair,
        positions: usize,
        done: &mut dyn FnMut(&'static str),
    ) -> Result<Models> {
        let config = &pair.target.config;
        if config.family.is_moe() {
            let file = pair.target.folder.described_file("config.json");
            return Err(Error::Unsupported(format!("{file}: the kernels do not run {} yet", config.family)));
        }
        let target = Transformer::load(loader, "model.", &config.stack, None, positions)?;
        done("target weights");
        let vocabulary = Vocabulary::load(loader, config)?;
        done("vocabulary");
        let draft = pair.draft.as_ref().try_map(|model| {
            let drafter = model.config.clone();
            loader.switch_to(&model.weights);
            let (hidden, taps) = (drafter.stack.hidden, drafter.taps.len());
            let (layers, projection) = match drafter.chain() {
                Some(_) => (
                    Transformer::load_pairs(loader, &drafter.stack, positions)?,
                    FeatureProjection::load_unnormed(loader, hidden, taps)?,
                ),
                None => (
                    Transformer::load(loader, "", &drafter.stack, drafter.convolution, positions)?,
                    FeatureProjection::load(loader, hidden, taps)?,
                ),
            };
            let embedding = match drafter.own_embedding {
                true => Some(EmbeddingTable::load(loader, "embed_tokens.weight", drafter.vocab, hidden)?),
                false => None,
            };
            let head = match drafter.own_head {
                Some(rows) => {
                    let shape = Shape { n: rows, k: hidden };
                    Some(LmHead::load(loader, "lm_head.weight", shape, drafter.ids.as_deref(), config.vocab)?)
                }
                None => None,
            };
            let dependence = match drafter.dependence {
                plan::Dependence::Independent => Dependence::Independent,
                plan::Dependence::Walk(plan) => {
                    let head = head.as_ref().unwrap_or(&vocabulary.head);
                    Dependence::Walk(MarkovHead::load(loader, plan, hidden, head)?)
                }
                plan::Dependence::Select(plan) => {
                    Dependence::Select(Selector::load(loader, plan, hidden, config.vocab)?)
                }
                plan::Dependence::Chain(plan) => Dependence::Chain(Chain::load(loader, &drafter, plan)?),
            };
            done("drafter weights");
            Ok(Drafter { config: drafter, embedding, head, dependence, layers, projection })
        })?;
        Ok(Models { config: config.clone(), target, vocabulary, draft })
    }

    /// The drafter, if there is one.
    pub(super) fn drafter(&self) -> Option<&Drafter> {
        self.draft.drafter()
    }

    /// The embedding table that the drafter uses.
    pub(super) fn draft_embedding(&self) -> &EmbeddingTable {
        let own = self.drafter().and_then(|drafter| drafter.embedding.as_ref());
        own.unwrap_or(&self.vocabulary.embedding)
    }

    /// The LM head that the drafter uses.
    pub(super) fn draft_head(&self) -> &LmHead {
        let own = self.drafter().and_then(|drafter| drafter.head.as_ref());
        own.unwrap_or(&self.vocabulary.head)
    }

    /// Whether the drafter drafts one token after the other.
    pub(super) fn is_chain(&self) -> bool {
        self.drafter().is_some_and(|drafter| drafter.config.chain().is_some())
    }

    /// The target's layers whose outputs the drafter reads; empty without a drafter.
    pub(super) fn taps(&self) -> &[usize] {
        self.drafter().map_or(&[], |drafter| &drafter.config.taps)
    }
}
