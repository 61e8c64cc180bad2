//! The rounds themselves: what they work in, which there are, and the launches of one, top to bottom.

use super::{Batch, Models};
use crate::gpu::device::{Buffer, Device, Graph};
use crate::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use crate::gpu::kernels::choices::Choices;
use crate::gpu::kernels::compact::Compact;
use crate::gpu::kernels::head::Head;
use crate::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows, VerifyInputs};
use crate::gpu::kernels::round::{Round, Sequence, Tables};
use crate::gpu::kernels::sample::{self, Sample, SamplerInputs};
use crate::gpu::kernels::siblings::{SampledTrees, Siblings};
use crate::gpu::kernels::tree::{TreeBuild, Trees};
use crate::gpu::kernels::verify::{Verify, VerifyOutput};
use crate::gpu::memory::BatchConfig;
use crate::gpu::model::{Cache, Pass, Row};
use crate::spec::tree;
use crate::{Error, Result};

/// What a round's kernels leave for each other. `drafted` = sequences x block, `rows` = sequences x rows that a round
/// verifies of each at most.
pub(super) struct RoundBuffers {
    pub states: Buffer,       // [sequences] Sequence
    pub drafting: Buffer,     // [sequences] Sequence: the settings that drafts are drawn with
    pub round_header: Buffer, // [3] u32
    pub num_active: Buffer,   // of round_header
    pub draft_tokens: Buffer, // [drafted] u32
    pub draft_rows: Buffer,   // [2][drafted] Row
    pub pending: Buffer,      // [drafted] u32
    pub draft_spans: Buffer,  // [sequences]
    pub verify_rows: Buffer,  // [rows] Row
    pub verify_spans: Buffer, // [sequences]
    pub drafts: Buffer,       // [drafted] u32
    pub tokens: Buffer,       // [rows] u32
    pub choices: Buffer,      // [rows] u32
    pub features: Buffer,     // [rows][taps][hidden] bf16
    pub best: Buffer,         // [rows][blocks] u64
    pub logits: Buffer,       // [rows][vocab] f32
    pub tables: Buffer,       // the sampler's
    pub partial: Buffer,      // the sampler's
    pub counters: Buffer,     // [rows] u32
    pub accepted: Buffer,     // [sequences] u32
    pub next: Buffer,         // [sequences] u32
    pub path: Buffer,         // [rows] u32
    pub trees: Option<TreeBuffers>,
    pub rules: Option<VerifyBuffers>,
}

/// What trees take besides.
pub(super) struct TreeBuffers {
    choices: Buffer, // [drafted][most] (token, cost) u32
    counts: Buffer,  // [drafted] u32
    typical: Buffer, // [most] u32
    parents: Buffer, // [rows] u32
    masks: Buffer,   // [rows] u64
    caches: Buffer,  // [layers][2] u64: where the target's keys and values are
}

/// What rules other than `match` take besides.
pub(super) struct VerifyBuffers {
    logits: Buffer,   // [drafted][vocab] f32: the drafter's
    drafters: Buffer, // [drafted] of DISTRIBUTION_BYTES
    targets: Buffer,  // [rows] of DISTRIBUTION_BYTES
    partial: Buffer,  // [drafted] u64
    counters: Buffer, // [sequences] u32
    classes: Buffer,  // [rows] of CLASSES_BYTES, where there are trees
}

impl RoundBuffers {
    pub fn new(
        device: &dyn Device,
        models: &Models,
        room: BatchConfig,
        cache: &Cache,
    ) -> Result<RoundBuffers> {
        let BatchConfig { sequences, block, .. } = room;
        let (hidden, taps) = (models.target.config.hidden, models.taps().len());
        let (vocab, blocks) = (models.vocabulary.vocab, models.vocabulary.shape().blocks());
        let (drafted, rows) = (sequences * block, sequences * room.max_verify_rows());
        let zeros = |bytes: usize, what| {
            let buffer = device.allocate(bytes.max(16), what)?;
            device.fill(&buffer, 0)?;
            Ok::<_, Error>(buffer)
        };
        let get = |bytes: usize| device.allocate(bytes.max(16), "a round's tables");
        let round_header = zeros(12, "the round's number")?;
        let tables = get(sample::tables().len())?;
        device.upload(&tables, &sample::tables())?;
        device.seal(&tables);
        let trees = (room.tree > 0).then(|| {
            let compact = compact(models, cache, sequences, room.max_verify_rows());
            let addresses = compact.caches(&cache.keys, &cache.values)?;
            let caches = get(addresses.len())?;
            device.upload(&caches.slice(0, addresses.len())?, &addresses)?;
            let costs: Vec<u8> =
                (0..most(room) as u32).flat_map(|i| tree::typical(i).to_le_bytes()).collect();
            let typical = get(costs.len())?;
            device.upload(&typical.slice(0, costs.len())?, &costs)?;
            Ok::<_, Error>(TreeBuffers {
                choices: device.allocate(drafted * most(room) * 8, "the drafter's choices")?,
                counts: get(drafted * 4)?,
                typical,
                parents: get(rows * 4)?,
                masks: get(rows * 8)?,
                caches,
            })
        });
        let rules = room.rules.then(|| {
            Ok::<_, Error>(VerifyBuffers {
                logits: device.allocate(drafted * vocab * 4, "the drafter's logits")?,
                drafters: get(drafted * DISTRIBUTION_BYTES)?,
                targets: get(rows * DISTRIBUTION_BYTES)?,
                partial: get(drafted * 8)?,
                counters: zeros(sequences * 4, "counters of verdicts")?,
                classes: get(if room.tree > 0 { rows * CLASSES_BYTES } else { 0 })?,
            })
        });
        let sample = Sample { rows, vocab, blocks, sequences };
        Ok(RoundBuffers {
            states: zeros(sequences * Sequence::BYTES, "the state of sequences")?,
            drafting: zeros(sequences * Sequence::BYTES, "the settings of drafts")?,
            num_active: round_header.slice(4, 4)?,
            round_header,
            draft_tokens: get(drafted * 4)?,
            draft_rows: get(2 * drafted * Row::BYTES)?,
            pending: get(drafted * 4)?,
            draft_spans: get(sequences * 8)?,
            verify_rows: get(rows * Row::BYTES)?,
            verify_spans: get(sequences * 8)?,
            drafts: zeros(drafted * 4, "drafts")?,
            tokens: get(rows * 4)?,
            choices: get(rows * 4)?,
            features: zeros(rows * taps * hidden * 2, "features")?,
            best: device.allocate(rows * blocks * 8, "the best logits")?,
            logits: device.allocate(rows * vocab * 4, "logits")?,
            tables,
            partial: device.allocate(sample.workspace(), "partial races")?,
            counters: zeros(rows * 4, "counters of races")?,
            accepted: get(sequences * 4)?,
            next: get(sequences * 4)?,
            path: zeros(rows * 4, "paths")?,
            trees: trees.transpose()?,
            rules: rules.transpose()?,
        })
    }

    pub fn races(&self) -> SamplerInputs<'_> {
        SamplerInputs {
            logits: &self.logits,
            sequences: &self.states,
            tables: &self.tables,
            partial: &self.partial,
            counters: &self.counters,
        }
    }
}

/// Moves accepted paths of `sequences` trees of `rows` rows in the target's cache.
fn compact(models: &Models, cache: &Cache, sequences: usize, rows: usize) -> Compact {
    let stack = &models.target.config;
    let Cache { pages, sequence_pages, .. } = *cache;
    let (layers, kv_heads, head_dim) = (stack.attention.len(), stack.kv_heads, stack.head_dim);
    Compact { sequences, rows, layers, kv_heads, head_dim, pages, sequence_pages }
}

/// Choices of each row that a tree may need.
fn most(room: BatchConfig) -> usize {
    room.tree.saturating_sub(1).max(1)
}

/// Which round: a graph each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The first so many slots take part.
    pub sequences: usize,
    /// Rows that are verified of each at most, anchor included; 1 where nothing is drafted.
    pub rows: usize,
    pub drafter: DrafterMode,
    /// With the sampler's races, and logits that can be read.
    pub sampled: bool,
    /// With drafts that are drawn: by the noise of the target's tokens, or, in a room with rules, by chances of their own;
    /// needs the one above.
    pub drawn: bool,
}

/// What the drafter does in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrafterMode {
    /// Nothing, and it falls behind.
    Idle,
    /// It takes in what the target has verified, so that it can draft later.
    CatchUp,
    Draft,
}

impl Shape {
    pub fn drafts(&self) -> bool {
        self.drafter == DrafterMode::Draft
    }
}

/// Where a pass over more rows takes longer: products are computed in tiles of so many.
const TILES: [usize; 2] = [16, 32];

impl Batch<'_> {
    /// Every round there is: for 1, 2, 4... sequences and for all.
    pub(super) fn shapes(&self) -> Vec<Shape> {
        let BatchConfig { sequences: all, adaptive, .. } = self.room;
        let counts = (0..).map(|i| 1 << i).take_while(|&count| count < all).chain([all]);
        let wide = self.room.max_verify_rows();
        let fewer = TILES.into_iter().filter(|&rows| adaptive && rows < wide);
        let mut kinds = vec![(1, DrafterMode::Idle)];
        if self.draft.is_some() {
            kinds.extend(adaptive.then_some((1, DrafterMode::CatchUp)));
            kinds.extend(fewer.chain([wide]).map(|rows| (rows, DrafterMode::Draft)));
        }
        let shape = |sequences| {
            let how = [(false, false), (true, false), (true, true)];
            let of = move |&(rows, drafter): &(usize, DrafterMode)| {
                how.map(|(sampled, drawn)| Shape { sequences, rows, drafter, sampled, drawn })
            };
            kinds.iter().flat_map(of).filter(|shape| shape.drafts() || !shape.drawn).collect::<Vec<_>>()
        };
        counts.flat_map(shape).collect()
    }

    /// The round of that shape, captured anew: at any time what it was at first, or a replay would not be the round.
    ///
    /// # Errors
    /// What the device says.
    pub fn capture(&self, shape: Shape) -> Result<Graph> {
        self.device.capture(&mut || self.launch(shape))
    }

    /// The rounds, captured.
    pub fn graphs(&self) -> &[(Shape, Graph)] {
        &self.graphs
    }

    /// The round of all slots, with drafts where there is a drafter: the drafter's best tokens, or drawn ones where rules
    /// are what the batch was made for.
    ///
    /// # Errors
    /// [`Error::Internal`] where there is none, which is a bug.
    pub fn largest(&self, sampled: bool) -> Result<&Graph> {
        let kind = |shape: &Shape| (shape.sampled, shape.drawn);
        let drawn = sampled && self.room.rules && self.draft.is_some();
        let found = self.graphs.iter().rfind(|(shape, _)| kind(shape) == (sampled, drawn));
        found.map(|(_, graph)| graph).ok_or_else(|| Error::Internal("no round was captured".into()))
    }

    /// The round, top to bottom.
    fn launch(&self, shape: Shape) -> Result<()> {
        let (device, models, w) = (self.device, self.models, &self.work);
        let Shape { sequences, rows: wide, sampled, .. } = shape;
        let (block, rows) = (self.room.block, sequences * wide);
        let round = Round { sequences, block, max_verify_rows: wide };
        let vocabulary = &models.vocabulary;
        let (vocab, blocks) = (vocabulary.vocab, vocabulary.shape().blocks());
        let tables = Tables {
            draft_tokens: &w.draft_tokens,
            draft_rows: &w.draft_rows,
            features: &w.pending,
            draft_spans: &w.draft_spans,
            verify_rows: &w.verify_rows,
            verify_spans: &w.verify_spans,
            round_header: &w.round_header,
        };
        let mask = models.drafter.as_ref().map_or(0, |(config, ..)| config.mask_token);
        round.begin(device, tables, &w.states, &w.path, shape.drafts(), mask)?;
        let trees = w.trees.as_ref().filter(|_| shape.drafts());
        let rules = w.rules.as_ref().filter(|_| shape.drawn);
        let rule = RejectionSampler { sequences, block, vocab, blocks };
        match shape.drafter {
            DrafterMode::Idle => {}
            DrafterMode::CatchUp => self.follow(sequences)?,
            DrafterMode::Draft => self.draft(shape, trees, rules)?,
        }

        // Verify.
        match trees {
            Some(growing) => self.grow(shape, growing, rules)?,
            None => round.tokens(device, &w.tokens, &w.drafts, &w.states, &w.verify_spans)?,
        }
        vocabulary.embed(device, &self.scratch, &w.tokens, rows, 1.0)?;
        let pass = Pass {
            sequences,
            block: wide,
            injected: 0,
            table: &w.verify_rows,
            spans: &w.verify_spans,
            masks: trees.map(|growing| &growing.masks),
            prompt: None,
            num_active: Some(&w.num_active),
            taps: (shape.drafter != DrafterMode::Idle).then_some((models.taps(), &w.features)),
        };
        models.target.run(device, &self.scratch, &self.cache, &pass)?;
        self.head(0, rows, pass.num_active, sampled)?;
        let sample = Sample { rows, vocab, blocks, sequences };
        sample.launch(device, &w.choices, &w.best, &w.verify_rows, sampled.then(|| w.races()))?;
        let verdict = VerifyOutput { accepted: &w.accepted, next: &w.next, path: &w.path };
        let (verify, parents) = (Verify { sequences, block: wide }, trees.map(|growing| &growing.parents));
        verify.launch(device, verdict, &w.choices, &w.tokens, parents, &w.verify_spans)?;
        if let Some(r) = rules {
            let target = Rows { logits: &w.logits, distributions: &r.targets };
            let every_row = RejectionSampler { block: wide, ..rule };
            every_row.distributions(device, target, &w.best, &w.verify_rows, &w.states, &w.tables)?;
            let judged = VerifyInputs {
                max_verify_rows: wide,
                tokens: &w.tokens,
                spans: &w.verify_spans,
                partial: &r.partial,
                counters: &r.counters,
            };
            rule.verify(device, verdict, target, r.drafter(), judged, &w.states, &w.tables)?;
            if let Some(growing) = trees {
                let (siblings, drawn) =
                    (Siblings { sequences, block, max_verify_rows: wide, vocab }, growing.drawn(w));
                siblings.verify(device, verdict, drawn, target, r.drafter(), &w.states, &w.tables)?;
                let work = Workspace { classes: &r.classes, partial: &r.partial, counters: &r.counters };
                let chains = Chains(siblings);
                chains.verify(device, verdict, drawn, target, r.drafter(), &w.states, &w.tables, work)?;
            }
        }
        if let Some(growing) = trees {
            let compact = compact(models, &self.cache, sequences, wide);
            compact.launch(device, &growing.caches, &self.cache.table, verdict, &w.verify_spans)?;
        }
        round.finish(device, &w.states, &self.ring, &w.round_header, verdict, &w.tokens, &w.verify_spans)
    }

    /// The drafter takes in what the last round left for it.
    fn follow(&self, sequences: usize) -> Result<()> {
        let (device, w, rows) = (self.device, &self.work, sequences * self.room.block);
        if let (Some((_, stack, injection)), Some((cache, s))) = (&self.models.drafter, &self.draft) {
            let num_active = Some(&w.num_active);
            injection.run(device, s, rows, &w.features, &w.pending, false, num_active)?;
            stack.write_context_kv(device, s, cache, &w.draft_rows, rows, false, num_active)?;
        }
        Ok(())
    }

    /// The drafter takes in what the last round left for it, and drafts.
    fn draft(&self, shape: Shape, trees: Option<&TreeBuffers>, rules: Option<&VerifyBuffers>) -> Result<()> {
        let (device, models, w) = (self.device, self.models, &self.work);
        let (Some((config, stack, injection)), Some((cache, s))) = (&models.drafter, &self.draft) else {
            return Err(Error::Internal("a round with drafts, but without a drafter".into()));
        };
        let (sequences, block, vocabulary) = (shape.sequences, self.room.block, &models.vocabulary);
        let (rows, vocab, blocks) = (sequences * block, vocabulary.vocab, vocabulary.shape().blocks());
        let num_active = Some(&w.num_active);
        injection.run(device, s, rows, &w.features, &w.pending, false, num_active)?;
        vocabulary.embed(device, s, &w.draft_tokens, rows, config.embedding_scale)?;
        let pass = Pass {
            sequences,
            block,
            injected: rows,
            table: &w.draft_rows,
            spans: &w.draft_spans,
            masks: None,
            prompt: None,
            num_active,
            taps: None,
        };
        stack.run(device, s, cache, &pass)?;
        let head = Head {
            rows,
            vocab,
            k: stack.config.hidden,
            multiplier: config.output_multiplier,
            softcap: config.softcap,
        };
        // Where no rule asks for them again, the target's logits take their place.
        let logits = rules.map_or(&w.logits, |r| &r.logits);
        let kept = (shape.drawn || trees.is_some()).then_some(logits);
        vocabulary.head(device, stack, s, rows, head, num_active, &w.best, kept)?;
        // A draft is chosen by the noise of its own position, but the sampler takes that of the one after: it gets each
        // row the row before. What the first of a block chooses is not looked at.
        let before = rows - usize::from(shape.drawn);
        let table = w.draft_rows.slice(before * Row::BYTES, rows * Row::BYTES)?;
        let races = shape.drawn.then(|| SamplerInputs { sequences: &w.drafting, logits, ..w.races() });
        let sample = Sample { rows, vocab, blocks, sequences };
        sample.launch(device, &w.drafts, &w.best, &table, races)?;
        let own = w.draft_rows.slice(rows * Row::BYTES, rows * Row::BYTES)?;
        if let Some(r) = rules {
            let rule = RejectionSampler { sequences, block, vocab, blocks };
            rule.distributions(device, r.drafter(), &w.best, &own, &w.drafting, &w.tables)?;
            rule.sample(device, &w.drafts, r.drafter(), &own, &w.states, &w.tables)?;
        }
        if let Some(growing) = trees {
            let choices = Choices { rows, vocab, blocks, per_row: most(self.room) };
            let (to, counts) = (&growing.choices, &growing.counts);
            choices.launch(device, to, counts, &w.best, logits, &own, &w.tables)?;
        }
        Ok(())
    }

    /// The trees of the round, and the tables of their verification.
    fn grow(&self, shape: Shape, growing: &TreeBuffers, rules: Option<&VerifyBuffers>) -> Result<()> {
        let (w, Shape { sequences, rows: wide, .. }) = (&self.work, shape);
        let (device, block) = (self.device, self.room.block);
        let trees = Trees {
            tokens: &w.tokens,
            parents: &growing.parents,
            masks: &growing.masks,
            table: &w.verify_rows,
            spans: &w.verify_spans,
        };
        let build = TreeBuild { sequences, block, max_verify_rows: wide, per_row: most(self.room) };
        let TreeBuffers { choices, counts, typical, .. } = growing;
        build.launch(device, trees, choices, counts, &w.drafts, typical, &w.states)?;
        match rules {
            Some(r) => {
                let siblings =
                    Siblings { sequences, block, max_verify_rows: wide, vocab: self.models.vocabulary.vocab };
                siblings.sample(device, growing.drawn(w), r.drafter(), &w.states, &w.tables)?;
                Chains(siblings).sample(device, growing.drawn(w), r.drafter(), &w.states, &w.tables)
            }
            None => Ok(()),
        }
    }

    /// The target's head over rows `first..first + rows` of its scratch.
    pub(super) fn head(
        &self,
        first: usize,
        rows: usize,
        num_active: Option<&Buffer>,
        keep: bool,
    ) -> Result<()> {
        let (target, vocabulary, w) = (&self.models.target, &self.models.vocabulary, &self.work);
        let (vocab, k) = (vocabulary.vocab, target.config.hidden);
        let head = Head { rows, vocab, k, multiplier: 1.0, softcap: None };
        let logits = keep.then_some(&w.logits);
        vocabulary.head(self.device, target, &self.scratch, first, head, num_active, &w.best, logits)
    }
}

impl TreeBuffers {
    fn drawn<'a>(&'a self, w: &'a RoundBuffers) -> SampledTrees<'a> {
        SampledTrees { tokens: &w.tokens, parents: &self.parents, spans: &w.verify_spans }
    }
}

impl VerifyBuffers {
    fn drafter(&self) -> Rows<'_> {
        Rows { logits: &self.logits, distributions: &self.drafters }
    }
}
