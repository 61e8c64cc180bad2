//! The round on a device: which rounds are captured as graphs, and the launches of one, top to bottom.

use super::models::{Dependence, Drafter, Models};
use super::round_buffers::{RoundBuffers, TreeBuffers, VerifyBuffers, compact, tree_choices};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::chain::{Chain, ChainBuffers, ChainModel};
use crate::gpu::device::{Buffer, Device, Graph};
use crate::gpu::kernels::RowStep;
use crate::gpu::kernels::chains::{Chains, Workspace};
use crate::gpu::kernels::choices::Choices;
use crate::gpu::kernels::head::Head;
use crate::gpu::kernels::linear::Shape;
use crate::gpu::kernels::lookup::Lookup;
use crate::gpu::kernels::markov::DraftedRows;
use crate::gpu::kernels::pairs::Drafted;
use crate::gpu::kernels::rejection::{RejectionSampler, Rows, VerifyInputs};
use crate::gpu::kernels::round::{Ring, Round, Tables};
use crate::gpu::kernels::sample::{Sample, SamplerInputs};
use crate::gpu::kernels::siblings::Siblings;
use crate::gpu::kernels::tree::{TreeBuild, Trees};
use crate::gpu::kernels::verify::{Verify, VerifyOutput};
use crate::gpu::markov::WalkRows;
use crate::gpu::model::{KvCache, Pass, Row, Scratch, ScratchSizes};
use crate::gpu::selector::SelectedRows;
use crate::{Error, Result};

/// The kind of a round. One graph is captured for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundShape {
    /// Number of slots that take part, counted from slot 0.
    pub sequences: usize,
    /// Maximum rows to verify per sequence, the anchor included; 1 in rounds without drafts.
    pub rows: usize,
    /// What the drafter does.
    pub drafter: DrafterMode,
    /// Runs the sampler for sequences with a temperature and keeps the target's logits for the host.
    pub sampled: bool,
    /// Samples the drafts with the noise of the target's tokens (coupled). In a batch with
    /// [`BatchConfig::draft_probs`] also with independent draws. Needs `sampled`.
    pub sampled_drafts: bool,
}

/// What the drafter does in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrafterMode {
    /// Nothing. Its cache falls behind the target's.
    Idle,
    /// It injects the features of the last verification, so that it can draft in a later round.
    CatchUp,
    /// It catches up and drafts.
    Draft,
}

impl RoundShape {
    /// Whether the round has drafts.
    pub fn drafts(&self) -> bool {
        self.drafter == DrafterMode::Draft
    }
}

/// Rows per sequence of the smaller verification passes of an adaptive batch. The linear kernels get slower
/// beyond these numbers of rows.
const SMALLER_ROWS: [usize; 2] = [16, 32];

/// The device side of a batch: the models and all memory that rounds read and write.
pub(super) struct RoundContext<'a> {
    pub device: &'a dyn Device,
    pub models: &'a Models,
    pub config: BatchConfig,
    /// The target's KV cache.
    pub cache: KvCache,
    /// The target's scratch memory.
    pub scratch: Scratch,
    /// The drafter's; `None` if the batch never drafts.
    pub draft: Option<(KvCache, Scratch)>,
    pub buffers: RoundBuffers,
    pub ring: Ring,
}

impl<'a> RoundContext<'a> {
    /// Allocates everything, for prompt chunks of up to `chunk` rows and a ring that holds the results of
    /// `records` rounds.
    pub fn new(
        device: &'a dyn Device,
        models: &'a Models,
        config: BatchConfig,
        chunk: usize,
        records: usize,
    ) -> Result<RoundContext<'a>> {
        let BatchConfig { sequences, block, pages, .. } = config;
        let (target, max_verify_rows) = (&models.target.config, config.max_verify_rows());
        if models.is_chain() && config.tree > 0 {
            return Err(Error::Unsupported("EAGLE-3 trees run on the CPU, the kernels run chains".into()));
        }
        if models.draft.lookup().is_some() && config.tree > 0 {
            return Err(Error::Internal("trees of drafts that are looked up".into()));
        }
        let kv_cache =
            |stack| KvCache::new(device, stack, pages, sequences, config.sequence_pages(), max_verify_rows);
        let cache = kv_cache(target)?;
        let sizes = ScratchSizes {
            sequences,
            block: max_verify_rows,
            chunk,
            injected: 0,
            head: Some(models.vocabulary.shape()),
            features: None,
            convolution: None,
            pairs: false,
        };
        let scratch = Scratch::new(device, target, &cache, sizes)?;
        let draft = models.drafter().filter(|_| block > 1).map(|drafter| {
            let stack = &drafter.layers.config;
            let cache = kv_cache(stack)?;
            let features = Some(models.taps().len() * stack.hidden);
            let head = Some(models.draft_head().shape);
            let (injected, convolution) = (sequences * block, drafter.layers.convolution);
            // Only one pair of each sequence has a query.
            let (pairs, block) = (models.is_chain(), if models.is_chain() { 1 } else { block });
            let sizes = ScratchSizes { block, injected, head, features, convolution, pairs, ..sizes };
            let scratch = Scratch::new(device, stack, &cache, sizes)?;
            Ok::<_, Error>((cache, scratch))
        });
        let draft = draft.transpose()?;
        let buffers = RoundBuffers::new(device, models, config, &cache)?;
        let ring = Ring::new(device, Round { sequences, block, max_verify_rows }, records)?;
        Ok(RoundContext { device, models, config, cache, scratch, draft, buffers, ring })
    }

    /// The KV caches of the target and, if there is one, the drafter.
    pub fn caches(&self) -> impl Iterator<Item = &KvCache> {
        [Some(&self.cache), self.draft.as_ref().map(|(cache, _)| cache)].into_iter().flatten()
    }

    /// The drafter with its cache and scratch memory; `None` if the batch never drafts.
    pub fn drafter(&self) -> Option<(&Drafter, &KvCache, &Scratch)> {
        let (cache, scratch) = self.draft.as_ref()?;
        Some((self.models.drafter()?, cache, scratch))
    }

    /// The chain of the drafter, if it has one and the batch drafts.
    pub fn chain(&self) -> Option<(&Chain, ChainModel<'_>, &ChainBuffers)> {
        let (drafter, _, scratch) = self.drafter()?;
        let Dependence::Chain(chain) = &drafter.dependence else { return None };
        let embedding = self.models.draft_embedding();
        let of = ChainModel { layers: &drafter.layers, scratch, embedding };
        Some((chain, of, self.buffers.chain.as_ref()?))
    }

    /// Every kind of round that is captured: for 1, 2, 4... sequences and for all, in order of size.
    pub fn shapes(&self) -> Vec<RoundShape> {
        let sequences = self.config.sequences;
        let adaptive = self.config.adaptive;
        let counts = (0..).map(|i| 1 << i).take_while(|&count| count < sequences).chain([sequences]);
        let full = self.config.max_verify_rows();
        let smaller = SMALLER_ROWS.into_iter().filter(|&rows| adaptive && rows < full);
        let mut kinds = vec![(1, DrafterMode::Idle)];
        if self.draft.is_some() || self.buffers.lookup.is_some() {
            kinds.extend(adaptive.then_some((1, DrafterMode::CatchUp)));
            kinds.extend(smaller.chain([full]).map(|rows| (rows, DrafterMode::Draft)));
        }
        let of_count = |sequences| {
            let sampling = [(false, false), (true, false), (true, true)];
            let of_kind = move |&(rows, drafter): &(usize, DrafterMode)| {
                sampling.map(|(sampled, sampled_drafts)| RoundShape {
                    sequences,
                    rows,
                    drafter,
                    sampled,
                    sampled_drafts,
                })
            };
            let all = kinds.iter().flat_map(of_kind);
            all.filter(|shape| shape.drafts() || !shape.sampled_drafts).collect::<Vec<_>>()
        };
        counts.flat_map(of_count).collect()
    }

    /// Captures the launches of one round.
    pub fn capture(&self, shape: RoundShape) -> Result<Graph> {
        self.device.capture(&mut || self.launch(shape))
    }

    /// One round, top to bottom. Nothing here depends on the results of earlier rounds: all state is on the
    /// device.
    fn launch(&self, shape: RoundShape) -> Result<()> {
        let (device, models, b) = (self.device, self.models, &self.buffers);
        let RoundShape { sequences, rows, sampled, .. } = shape;
        let (block, total_rows) = (self.config.block, sequences * rows);
        let vocabulary = &models.vocabulary;
        let (vocab, blocks) = (vocabulary.vocab, vocabulary.shape().blocks());
        let num_active = Some(&b.num_active);
        let trees = b.trees.as_ref().filter(|_| shape.drafts());
        let probs = b.verify.as_ref().filter(|_| shape.sampled_drafts);

        // 1. Begin: makes the tables of the passes below (rows, spans, draft tokens) from the sequences'
        // states.
        let round = Round { sequences, block, max_verify_rows: rows };
        let tables = Tables {
            draft_tokens: &b.draft_tokens,
            draft_rows: &b.draft_rows,
            features: &b.pending,
            draft_spans: &b.draft_spans,
            verify_rows: &b.verify_rows,
            verify_spans: &b.verify_spans,
            round_header: &b.round_header,
        };
        let (mask, anchor_row) = models
            .drafter()
            .map_or((0, 0), |drafter| (drafter.config.mask_token, 1 - drafter.config.first_row()));
        round.begin(device, tables, &b.states, &b.path, shape.drafts(), mask, anchor_row)?;

        // 2. Draft: injects the features of the last verification and runs the drafter on the blocks.
        match shape.drafter {
            DrafterMode::Idle => {}
            DrafterMode::CatchUp => self.catch_up(sequences)?,
            DrafterMode::Draft => self.draft(shape, trees, probs)?,
        }

        // 3. The tokens to verify: builds trees and samples the tokens of sampled trees; copies the drafts of
        // chains.
        match trees {
            Some(trees) => self.build_trees(shape, trees, probs)?,
            None => {
                let (table, spans, kept) = (&b.verify_rows, &b.verify_spans, b.kept(shape.drafts()));
                round.tokens(device, &b.tokens, &b.drafts, table, spans, &b.states, kept)?;
            }
        }

        // 4. The target's pass over them. It keeps the tapped features for the drafter's next round.
        vocabulary.embedding.embed(device, &self.scratch, &b.tokens, total_rows, 1.0)?;
        let pass = Pass {
            sequences,
            block: rows,
            injected: 0,
            table: &b.verify_rows,
            spans: &b.verify_spans,
            masks: trees.map(|trees| &trees.masks),
            prompt: None,
            num_active,
            taps: (shape.drafter != DrafterMode::Idle).then_some((models.taps(), &b.features)),
        };
        models.target.run(device, &self.scratch, &self.cache, &pass)?;

        // 5. The target's token after each row: greedy, or sampled with the noise of its position.
        self.target_head(0, total_rows, num_active, sampled)?;
        let sample = Sample { rows: total_rows, vocab, blocks, reduced: false, sequences };
        let inputs = sampled.then(|| b.sampler_inputs());
        sample.launch(device, RowStep::ALL, &b.choices, &b.best, &b.verify_rows, inputs)?;

        // 6. Verify by `match`: accept the drafts that equal these tokens. The methods in 7 overwrite the
        // result for the sequences that use them.
        let result = VerifyOutput { accepted: &b.accepted, next: &b.next, path: &b.path };
        let verify = Verify { sequences, block: rows };
        let parents = trees.map(|trees| &trees.parents);
        verify.launch(device, result, &b.choices, &b.tokens, parents, &b.verify_spans)?;

        // 7. Verify by `rejection` and `block`, from the distributions of both models.
        if let Some(p) = probs {
            let target = Rows { logits: &b.logits, distributions: &p.target };
            let target_rows = RejectionSampler { sequences, block: rows, vocab, blocks, reduced: false };
            let (all, table) = (RowStep::ALL, &b.verify_rows);
            target_rows.distributions(device, all, target, &b.best, table, &b.states, &b.tables)?;
            let inputs = VerifyInputs {
                max_verify_rows: rows,
                tokens: &b.tokens,
                spans: &b.verify_spans,
                partial: &p.partial,
                counters: &p.counters,
            };
            let sampler = RejectionSampler { block, ..target_rows };
            sampler.verify(device, result, target, p.drafter(), inputs, &b.states, &b.tables)?;
            if let Some(trees) = trees {
                let (tokens, drafter) = (trees.sampled(b), p.drafter());
                let siblings = Siblings { sequences, block, max_verify_rows: rows, vocab };
                siblings.verify(device, result, tokens, target, drafter, &b.states, &b.tables)?;
                let workspace = Workspace { classes: &p.classes, partial: &p.partial, counters: &p.counters };
                let chains = Chains(siblings);
                chains.verify(device, result, tokens, target, drafter, &b.states, &b.tables, workspace)?;
            }
        }

        // 8. Move the keys and values of a tree's accepted path to their positions in the target's cache. Those
        // of a chain are already there.
        if let Some(trees) = trees {
            let compact = compact(models, &self.cache, sequences, rows);
            compact.launch(device, &trees.caches, &self.cache.table, result, &b.verify_spans)?;
        }

        // 9. Recurrent states: the next pass repeats the accepted rows.
        models.target.advance(device, &self.cache, &pass, Some(&b.path))?;

        // 10. Finish: update the sequences' states and write the records that the host reads.
        let history = b.lookup.as_ref().map(|lookup| (&lookup.history, self.config.positions));
        let (header, spans) = (&b.round_header, &b.verify_spans);
        round.finish(device, &b.states, &self.ring, header, result, &b.tokens, spans, history)
    }

    /// Injects the features of the last verification into the drafter's cache.
    fn catch_up(&self, sequences: usize) -> Result<()> {
        let (device, b, rows) = (self.device, &self.buffers, sequences * self.config.block);
        if let Some((drafter, cache, s)) = self.drafter() {
            self.project(sequences)?;
            let table = b.chain.as_ref().map_or(&b.draft_rows, |chain| &chain.table);
            drafter.layers.write_context_kv(device, s, cache, table, rows, false, Some(&b.num_active))?;
        }
        Ok(())
    }

    /// Projects the features of the last verification; for a chain makes pairs of them.
    fn project(&self, sequences: usize) -> Result<()> {
        let (device, b, block) = (self.device, &self.buffers, self.config.block);
        let (rows, num_active) = (sequences * block, Some(&b.num_active));
        let Some((drafter, _, s)) = self.drafter() else { return Ok(()) };
        if let Some((chain, of, _)) = self.chain() {
            chain.normalize(device, &of, rows, &b.features, &b.pending)?;
        }
        drafter.projection.run(device, s, rows, &b.features, &b.pending, false, num_active)?;
        if let Some((chain, of, own)) = self.chain() {
            let (tokens, sizes) = (&b.tokens, [sequences, block]);
            chain.extend(device, &of, sizes, own, tokens, &b.pending, &b.draft_rows, &b.states)?;
        }
        Ok(())
    }

    /// Catches up and drafts in one pass. The injected rows are the pending features, the others are the
    /// blocks.
    fn draft(
        &self,
        shape: RoundShape,
        trees: Option<&TreeBuffers>,
        probs: Option<&VerifyBuffers>,
    ) -> Result<()> {
        let (device, b) = (self.device, &self.buffers);
        if let (Some(lengths), Some(of)) = (self.models.draft.lookup(), &b.lookup) {
            let BatchConfig { block, positions, .. } = self.config;
            let lookup = Lookup { sequences: shape.sequences, block, positions, lengths };
            let distributions = probs.map(|probs| &probs.drafter);
            return lookup.launch(device, &b.drafts, &of.kept, distributions, &of.history, &b.states);
        }
        let Some((drafter, cache, s)) = self.drafter() else {
            return Err(Error::Internal("a round with drafts, but without a drafter".into()));
        };
        let (config, lm_head) = (&drafter.config, self.models.draft_head());
        let (sequences, block) = (shape.sequences, self.config.block);
        let (rows, vocab, blocks) = (sequences * block, lm_head.vocab, lm_head.shape.blocks());
        let reduced = lm_head.is_reduced();
        let num_active = Some(&b.num_active);

        // The pass, up to the final norm. A chain has a pass for each draft, below.
        self.project(sequences)?;
        let pass = Pass {
            sequences,
            block,
            injected: rows,
            table: &b.draft_rows,
            spans: &b.draft_spans,
            masks: None,
            prompt: None,
            num_active,
            taps: None,
        };
        let chain = self.chain();
        if chain.is_none() {
            self.models.draft_embedding().embed(device, s, &b.draft_tokens, rows, config.embedding_scale)?;
            drafter.layers.run(device, s, cache, &pass)?;
        }

        // The logits of row `i` are those of draft `i`; row 0 is not read.
        let Shape { n, k } = lm_head.shape;
        let head = Head {
            rows,
            vocab: n,
            k,
            multiplier: config.output_multiplier,
            softcap: config.softcap,
            ids: if reduced { n } else { config.vocab.min(n) },
        };
        let selector = match (&drafter.dependence, &b.selector) {
            (Dependence::Select(selector), Some(buffers)) => Some((selector, buffers)),
            _ => None,
        };
        let logits = &b.draft_logits;
        // A selector writes the scores of its candidates there. The target's pass has not written its logits yet.
        let to = if selector.is_some() { &b.logits } else { logits };
        let walks = b.walk.is_some() || selector.is_some();
        let kept = (shape.sampled_drafts || trees.is_some() || walks).then_some(to);
        if chain.is_none() {
            lm_head.run(device, &drafter.layers, s, rows, head, num_active, &b.best, kept, None)?;
        }
        // The best logits of the rows, for the kernels below.
        let (best, blocks, reduced) =
            selector.map_or((&b.best, blocks, reduced), |(_, buffers)| (&buffers.best, 1, true));

        // The draft of each row: greedy, or coupled. A coupled draft uses the noise of its own position. The
        // sampler uses the noise of the position after its row's, so where a row predicts its own position, it
        // gets the table shifted by one row.
        let first = rows - if shape.sampled_drafts { config.first_row() } else { 0 };
        let shifted = b.draft_rows.slice(first * Row::BYTES, rows * Row::BYTES)?;
        let table = b.draft_rows.slice(rows * Row::BYTES, rows * Row::BYTES)?;
        let inputs = SamplerInputs { sequences: &b.draft_states, logits, ..b.sampler_inputs() };
        let choose = |step| {
            let sample = Sample { rows, vocab, blocks, reduced, sequences };
            let inputs = shape.sampled_drafts.then_some(inputs);
            sample.launch(device, step, &b.drafts, best, &shifted, inputs)?;
            // For `rejection` and `block`: the drafter's distributions, and drafts sampled from them with
            // independent draws.
            let Some(p) = probs else { return Ok(()) };
            let sampler = RejectionSampler { sequences, block, vocab, blocks, reduced };
            sampler.distributions(device, step, p.drafter(), best, &table, &b.draft_states, &b.tables)?;
            sampler.sample(device, step, &b.drafts, p.drafter(), &table, &b.states, &b.tables)
        };
        let (y, sumsq) = s.slices_from(k, rows)?;
        let (y, sumsq, eps) = (&y, &sumsq, drafter.layers.config.eps);
        let (drafts, states, num_active) = (&b.drafts, &b.states, &b.num_active);
        match (&drafter.dependence, &b.walk, selector) {
            (.., Some((selector, buffers))) => {
                let (table, logits, best, scores) = (&table, &b.logits, &b.best, &b.draft_logits);
                let of = SelectedRows {
                    sequences,
                    block,
                    y,
                    sumsq,
                    eps,
                    table,
                    logits,
                    best,
                    scores,
                    drafts,
                    states,
                    num_active,
                };
                selector.find(device, buffers, lm_head, &of)?;
                if !shape.sampled_drafts {
                    selector.walk(device, 1..block, buffers, lm_head, &of)?;
                } else {
                    for depth in 1..block {
                        selector.walk(device, depth..depth + 1, buffers, lm_head, &of)?;
                        choose(RowStep { first: depth, step: block })?;
                    }
                }
            }
            (Dependence::Walk(markov), Some(walk), _) => {
                let drafted = DraftedRows { y, sumsq, eps, drafts, best };
                let of = WalkRows { sequences, block, rows: drafted, logits, states, num_active };
                for depth in 1..block {
                    markov.step(device, depth, walk, lm_head, &of)?;
                    choose(RowStep { first: depth, step: block })?;
                }
            }
            (Dependence::Chain(_), ..) => {
                let Some((chain, of, own)) = chain else {
                    return Err(Error::Internal("no memory for a chain".into()));
                };
                for depth in 1..block {
                    if depth > 1 {
                        let drafted = match shape.sampled_drafts {
                            true => Drafted::Tokens(drafts),
                            false => Drafted::Best(best, blocks),
                        };
                        chain.step(device, &of, [sequences, block], depth, own, drafted, &table)?;
                    }
                    // The first pass also writes the keys and values of the other pending pairs.
                    let injected = if depth == 1 { rows - sequences } else { 0 };
                    let (table, spans) = (&own.table, &own.spans);
                    drafter.layers.run(
                        device,
                        s,
                        cache,
                        &Pass { block: 1, injected, table, spans, ..pass },
                    )?;
                    let to = Some(RowStep { first: depth, step: block });
                    let head = Head { rows: sequences, ..head };
                    let layers = &drafter.layers;
                    lm_head.run(device, layers, s, injected, head, Some(num_active), best, kept, to)?;
                    if shape.sampled_drafts {
                        choose(RowStep { first: depth, step: block })?;
                    }
                }
                if !shape.sampled_drafts {
                    choose(RowStep::ALL)?;
                }
            }
            (Dependence::Independent, ..) => choose(RowStep::ALL)?,
            _ => return Err(Error::Internal("no memory for drafts that depend on others".into())),
        }

        // For trees: the most probable tokens of each row. Best-first trees are built from them.
        if let Some(trees) = trees {
            let choices = Choices { rows, vocab, blocks, reduced, per_row: tree_choices(self.config) };
            choices.launch(device, &trees.choices, &trees.counts, best, &table, inputs)?;
        }
        Ok(())
    }

    /// Builds the round's trees and the tables of their verification pass, and samples the tokens of sampled
    /// trees.
    fn build_trees(
        &self,
        shape: RoundShape,
        trees: &TreeBuffers,
        probs: Option<&VerifyBuffers>,
    ) -> Result<()> {
        let (b, RoundShape { sequences, rows, .. }) = (&self.buffers, shape);
        let (device, block) = (self.device, self.config.block);
        let out = Trees {
            tokens: &b.tokens,
            parents: &trees.parents,
            masks: &trees.masks,
            table: &b.verify_rows,
            spans: &b.verify_spans,
        };
        let build = TreeBuild { sequences, block, max_verify_rows: rows, per_row: tree_choices(self.config) };
        let (choices, typical, kept) = (&trees.choices, &trees.typical, b.kept(true));
        build.launch(device, out, choices, &trees.counts, &b.drafts, typical, &b.states, kept)?;
        if let Some(p) = probs {
            let siblings =
                Siblings { sequences, block, max_verify_rows: rows, vocab: self.models.vocabulary.vocab };
            siblings.sample(device, trees.sampled(b), p.drafter(), &b.states, &b.tables)?;
            Chains(siblings).sample(device, trees.sampled(b), p.drafter(), &b.states, &b.tables)?;
        }
        Ok(())
    }

    /// Runs the target's LM head over rows `first..first + rows` of its scratch memory. `keep` writes the
    /// logits.
    pub fn target_head(
        &self,
        first: usize,
        rows: usize,
        num_active: Option<&Buffer>,
        keep: bool,
    ) -> Result<()> {
        let (target, vocabulary, b) = (&self.models.target, &self.models.vocabulary, &self.buffers);
        let (vocab, k) = (vocabulary.vocab, target.config.hidden);
        let head = Head { rows, vocab, k, multiplier: 1.0, softcap: None, ids: vocab };
        let logits = keep.then_some(&b.logits);
        vocabulary.head.run(
            self.device,
            target,
            &self.scratch,
            first,
            head,
            num_active,
            &b.best,
            logits,
            None,
        )
    }
}
