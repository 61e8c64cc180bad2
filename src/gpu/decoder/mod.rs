//! The decoder of a device: sequences in slots, one captured graph per kind of round, and a ring of results.
//!
//! All state that changes from round to round is in device memory (`cuda/common/state.cuh`), so a round's
//! launches are always the same. The host enqueues rounds without knowing the results of the last one and
//! reads them later.

use crate::checkpoint::pair::Pair;
use crate::engine::generate::{Decoder, Emitted, Prefill, Request};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::device::{Device, Graph, Kernel};
use crate::gpu::dry_run::DryRunDevice;
use crate::gpu::kernels::round::{DraftShape, Finish, Record, STOP_IDS, Sequence};
use crate::gpu::kernels::sample::Sample;
use crate::gpu::kernels::{PAGE, RowStep};
use crate::gpu::loader::Loader;
use crate::gpu::model::Row;
use crate::gpu::nvtx;
use crate::perf::roofline::{CARDS, Card};
use crate::spec::config::{SpecConfig, VerifyMethod};
use crate::spec::draft_length::{Controller, Costs, Fixed};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

mod backend;
mod models;
mod pages;
mod prompt;
mod round_buffers;
mod round_graph;
mod synthetic;
#[cfg(test)]
mod tests;

pub use backend::{DeviceBackend, Loading};
pub use models::Models;
use pages::PageAllocator;
use prompt::{CHUNK, Chunk, PromptBuffers};
use round_graph::RoundContext;
pub use round_graph::{DrafterMode, RoundShape};
pub use synthetic::FrozenBatch;

/// Maximum rounds enqueued before their results are read.
const AHEAD: usize = 2;
/// How long a wait for a round's result keeps a core busy: longer than a round takes on a GPU. The software GPU
/// needs the cores itself, so there the wait only sleeps.
const SPIN: Duration = Duration::from_millis(20);
/// After that the wait sleeps this long between two looks.
const PAUSE: Duration = Duration::from_micros(50);

/// Sequences that run together on a device, each in a slot and with its own pages. They never affect each
/// other's output.
///
/// A sequence gets the pages of all its positions, prompt and answer, when it is admitted, so a round never
/// waits for memory. A request that needs more pages than are available waits until other sequences end.
pub struct Batch<'a> {
    ctx: RoundContext<'a>,
    prompt: PromptBuffers,
    graphs: Vec<(RoundShape, Graph)>,
    pages: PageAllocator,
    slots: Vec<Slot>,
    /// Number of the round that was enqueued last, from 1 on.
    enqueued: u32,
    /// Number of the round that was read last.
    read: u32,
    /// Rows per sequence in the round that was enqueued last.
    rows: usize,
    /// Every round keeps its logits, and the next one is enqueued only after the host has read them.
    keeps_logits: bool,
    /// Costs of the captured rounds, for draft lengths; `None` if the batch is not adaptive or has no
    /// drafter.
    costs: Option<Costs>,
    /// Makes the controllers of admitted sequences; `None`: their draft-length policy does.
    controllers: Option<Controllers<'a>>,
}

/// Makes the controller of a sequence.
type Controllers<'a> = Box<dyn Fn() -> Box<dyn Controller> + 'a>;

/// How many drafts a sequence's rounds verify.
struct DraftLength {
    controller: Box<dyn Controller>,
    /// Drafts that the controller allowed for each round not yet read, the oldest first.
    allowed: VecDeque<usize>,
    /// Maximum rows to verify, as last written to the device's state of the sequence.
    rows: usize,
}

impl Default for DraftLength {
    fn default() -> DraftLength {
        DraftLength { controller: Box::new(Fixed), allowed: VecDeque::new(), rows: 0 }
    }
}

#[derive(Default)]
struct Slot {
    /// Prompt and answer as far as the host has read them. They stay after the sequence ends.
    tokens: Vec<u32>,
    /// The target's pages hold keys and values of the first `held` tokens.
    held: usize,
    /// The drafter's pages hold keys and values of the features of the first `drafted` tokens.
    drafted: usize,
    /// Tokens of the prompt.
    prompt: usize,
    /// The drafts are sampled. Otherwise they are the drafter's best tokens.
    sampled_drafts: bool,
    /// The device's state of the sequence at the end of its prompt.
    state: Option<Sequence>,
    draft_length: DraftLength,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Phase {
    /// No sequence. Pages and tokens of the last one stay, so that the next one can reuse a common prefix.
    #[default]
    Idle,
    /// The prompt runs from token `at` on, which may be before [`Slot::held`].
    Prefill { at: usize },
    /// Takes part in rounds, from number `first` on.
    Running { first: u32 },
}

impl Slot {
    fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    fn drafts(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.draft_end > 0)
    }

    fn sampled(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.sampling.temperature != 0.0)
    }

    /// An upper bound of the drafts of the next round. The sequence may be longer than the host knows,
    /// because the host has not read the rounds in flight.
    fn max_drafts(&self) -> usize {
        let Some(state) = &self.state else { return 0 };
        let left = |end: u32| (end as usize).saturating_sub(self.held);
        let block = (state.block as usize).min(left(state.draft_end)).min(left(state.end).saturating_sub(1));
        match state.form {
            _ if block < 2 => 0,
            DraftShape::Chain => block - 1,
            DraftShape::BestFirst | DraftShape::SampledTree => state.rows as usize - 1,
        }
    }
}

impl<'a> Batch<'a> {
    /// Allocates the batch and captures its rounds. With blocks of one row every round is an AR step, and no
    /// drafter runs.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory; otherwise the device's error.
    pub fn new(device: &'a dyn Device, models: &'a Models, config: BatchConfig) -> Result<Batch<'a>> {
        let ctx = RoundContext::new(device, models, config, CHUNK, AHEAD + 1)?;
        let prompt = PromptBuffers::new(device, models.taps().len(), models.target.config.hidden)?;
        let graph = |shape| Ok((shape, ctx.capture(shape)?));
        let graphs = ctx.shapes().into_iter().map(graph).collect::<Result<_>>()?;
        let mut batch = Batch {
            ctx,
            prompt,
            graphs,
            pages: PageAllocator::new(config.pages, config.sequences),
            slots: (0..config.sequences).map(|_| Slot::default()).collect(),
            enqueued: 0,
            read: 0,
            rows: 1,
            keeps_logits: false,
            costs: None,
            controllers: None,
        };
        batch.costs = batch.round_costs();
        Ok(batch)
    }

    /// The kernels of a pair's prompts and rounds, without a device.
    ///
    /// # Errors
    /// As [`crate::gpu::memory::MemoryPlan::new`].
    pub fn kernels(pair: &Pair, config: BatchConfig) -> Result<Vec<&'static Kernel>> {
        config.check()?;
        let device = DryRunDevice::new();
        let mut loader = Loader::new(&device, &pair.target.weights);
        let models = Models::list(&mut loader, pair, config.positions, &mut |_| ())?;
        let batch = Batch::new(&device, &models, config)?;
        let (tokens, draft_end) = ([0], batch.ctx.drafter().map_or(0, |_| 1));
        let chunk = Chunk { slot: 0, first: 0, tokens: &tokens, next: Some(0), held: 0, draft_end };
        batch.prompt.run(&batch.ctx, chunk)?;
        Ok(device.kernels())
    }

    /// The costs of the captured rounds of an adaptive batch with a drafter: the roofline of the device's
    /// card, or of an H200 if the card is unknown.
    fn round_costs(&self) -> Option<Costs> {
        let RoundContext { device, models, config, .. } = &self.ctx;
        let drafter = models.drafter().filter(|_| config.adaptive)?;
        let card = Card::of_driver(&device.properties().name).unwrap_or(CARDS[0]);
        let BatchConfig { sequences, block, .. } = *config;
        let costs = Costs::from_roofline(&card, &models.config, &drafter.config, 0, sequences, block);
        let mut sizes: Vec<usize> = self.graphs.iter().map(|(shape, _)| shape.rows).collect();
        sizes.sort_unstable();
        Some(costs.of_sizes(&sizes))
    }

    /// Gives every sequence that is admitted from now on a controller made by `make` instead of its
    /// draft-length policy.
    ///
    /// Sequences with sampled trees are an exception: their rounds always have the full size. The number of
    /// siblings depends on the size of a tree, so acceptance at one size does not predict that at another.
    pub fn set_controllers(&mut self, make: impl Fn() -> Box<dyn Controller> + 'a) {
        self.controllers = Some(Box::new(make));
    }

    /// The controller of a new sequence.
    fn controller(&self, spec: &SpecConfig, form: DraftShape) -> Box<dyn Controller> {
        match (&self.controllers, &self.costs) {
            _ if form == DraftShape::SampledTree => Box::new(Fixed),
            (Some(make), _) => make(),
            (None, Some(costs)) => spec.draft_length().controller(costs, true),
            (None, None) => Box::new(Fixed),
        }
    }

    /// Captures the round of that shape again. The graph does not depend on when it is captured, because
    /// everything that changes between rounds is in device memory.
    ///
    /// # Errors
    /// The device's error.
    pub fn capture(&self, shape: RoundShape) -> Result<Graph> {
        self.ctx.capture(shape)
    }

    /// The captured rounds, in order of size.
    pub fn graphs(&self) -> &[(RoundShape, Graph)] {
        &self.graphs
    }

    /// The largest round: all slots, with drafts if there is a drafter. `sampled`: samples the target's
    /// tokens and, in a batch with [`BatchConfig::draft_probs`], the drafts.
    ///
    /// # Errors
    /// [`Error::Internal`] if no such round was captured, which is a bug.
    pub fn largest(&self, sampled: bool) -> Result<&Graph> {
        let kind = |shape: &RoundShape| (shape.sampled, shape.sampled_drafts);
        let drafts = self.ctx.draft.is_some() || self.ctx.buffers.lookup.is_some();
        let sampled_drafts = sampled && self.ctx.config.draft_probs && drafts;
        let found = self.graphs.iter().rfind(|(shape, _)| kind(shape) == (sampled, sampled_drafts));
        found.map(|(_, graph)| graph).ok_or_else(|| Error::Internal("no round was captured".into()))
    }

    /// Pages that are free or belong to a sequence that has ended.
    pub fn free_pages(&self) -> usize {
        self.pages.available(|slot| self.slots[slot].phase == Phase::Idle)
    }

    /// Gives an idle slot `count` pages, and takes them from other idle slots if needed. False if too few are
    /// available.
    fn take_pages(&mut self, slot: usize, count: usize) -> bool {
        let slots = &self.slots;
        let Some(evicted) = self.pages.resize(slot, count, |slot| slots[slot].phase == Phase::Idle) else {
            return false;
        };
        evicted.into_iter().for_each(|slot| self.slots[slot] = Slot::default());
        true
    }

    /// Uploads the page table of `slot`. Returns the device state that the sequence has at the end of its
    /// prompt, except for the anchor.
    fn begin(&self, slot: usize, request: &Request) -> Result<Sequence> {
        let (ctx, pages) = (&self.ctx, self.pages.of(slot));
        // The entries after the sequence's pages are out of range, so that kernels never access another
        // sequence's page.
        let mut row = pages.to_vec();
        row.resize(ctx.cache.sequence_pages, u32::MAX);
        let bytes: Vec<u8> = row.iter().flat_map(|page| page.to_le_bytes()).collect();
        for cache in ctx.caches() {
            ctx.device.upload(&cache.table.slice(slot * bytes.len(), bytes.len())?, &bytes)?;
        }
        // The rows of a tree use slots after the last position.
        let tree = request.spec.tree_rows().unwrap_or(0);
        let end = self.context().min((pages.len() * PAGE).saturating_sub(tree));
        let draft_end = match (ctx.drafter(), &ctx.buffers.lookup, request.block) {
            (Some((drafter, ..)), _, 2..) => drafter.layers.config.max_positions.min(end),
            (None, Some(_), 2..) => end,
            _ => 0,
        };
        let mut stop_ids = request.stop_ids.clone();
        stop_ids.truncate(STOP_IDS);
        Ok(Sequence {
            active: true,
            length: request.prompt.len() as u32,
            anchor: 0,
            pending: 0,
            budget: request.max_tokens.saturating_sub(1).min(u32::MAX as usize) as u32,
            end: end as u32,
            draft_end: draft_end as u32,
            block: request.block as u32,
            rows: request.spec.tree_rows().unwrap_or(request.block) as u32,
            form: match (request.spec.tree_rows(), request.spec.method()) {
                (None, _) => DraftShape::Chain,
                (Some(_), VerifyMethod::Match) => DraftShape::BestFirst,
                (Some(_), VerifyMethod::Rejection | VerifyMethod::Block) => DraftShape::SampledTree,
            },
            sampling: request.sampling.clone(),
            stop_ids,
            min_confidence: request.spec.draft_length().min_confidence().unwrap_or(0.0),
            finish: Finish::Running,
            rounds: 0,
            drafted: 0,
            accepted: 0,
            verify_method: request.spec.method(),
        })
    }

    /// Writes the tokens of the sequence in `slot` from position `at` on, in a batch that looks up drafts. Tokens
    /// beyond the last position are dropped.
    fn write_history(&self, slot: usize, at: usize, tokens: &[u32]) -> Result<()> {
        let (ctx, positions) = (&self.ctx, self.ctx.config.positions);
        let Some(lookup) = &ctx.buffers.lookup else { return Ok(()) };
        let tokens = &tokens[..tokens.len().min(positions.saturating_sub(at))];
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        match bytes.len() {
            0 => Ok(()),
            length => ctx.device.upload(&lookup.history.slice((slot * positions + at) * 4, length)?, &bytes),
        }
    }

    /// The token after a prompt, chosen at row `last` of its last chunk.
    fn first_token(&self, slot: usize, last: usize) -> Result<u32> {
        let (ctx, buffers, sampled) = (&self.ctx, &self.ctx.buffers, self.slots[slot].sampled());
        let vocabulary = &ctx.models.vocabulary;
        ctx.target_head(last, 1, None, sampled)?;
        let (vocab, blocks) = (vocabulary.vocab, vocabulary.shape().blocks());
        let sample = Sample { rows: 1, vocab, blocks, reduced: false, sequences: ctx.config.sequences };
        let row = self.prompt.rows.slice(last * Row::BYTES, Row::BYTES)?;
        sample.launch(
            ctx.device,
            RowStep::ALL,
            &buffers.choices,
            &buffers.best,
            &row,
            sampled.then(|| buffers.sampler_inputs()),
        )?;
        let mut first = [0; 4];
        ctx.device.download(&buffers.choices.slice(0, 4)?, &mut first)?;
        match u32::from_le_bytes(first) {
            u32::MAX => Err(invalid_logits("target", self.slots[slot].prompt)),
            first => Ok(first),
        }
    }

    /// Makes row `last` of the last chunk's features the pending feature of the sequence in `slot`, as after a round
    /// of one row. A chain needs it with the token after the prompt.
    fn keep_last_feature(&self, slot: usize, last: usize) -> Result<()> {
        let RoundContext { device, models, buffers, .. } = &self.ctx;
        let bytes = models.taps().len() * models.target.config.hidden * 2;
        // Rounds address features and paths by the number of rows of the round before.
        let row = slot * self.rows;
        let from = self.prompt.features.slice(last * bytes, bytes)?;
        device.copy(&buffers.features.slice(row * bytes, bytes)?, &from)?;
        device.fill(&buffers.path.slice(row * 4, 4)?, 0)
    }

    /// Enqueues a round of all running sequences. The caller keeps at most [`AHEAD`] rounds enqueued and
    /// unread.
    fn enqueue(&mut self) -> Result<()> {
        let mut rows = 1;
        for slot in 0..self.slots.len() {
            rows = rows.max(self.set_rows(slot)?);
        }
        let running = || self.slots.iter().filter(|slot| slot.is_running());
        let highest = self.slots.iter().rposition(Slot::is_running).map_or(0, |slot| slot + 1);
        let drafter = match running().any(Slot::drafts) {
            false => DrafterMode::Idle,
            true if rows == 1 && self.ctx.config.adaptive => DrafterMode::CatchUp,
            true => DrafterMode::Draft,
        };
        let sampled_drafts = drafter == DrafterMode::Draft && running().any(|slot| slot.sampled_drafts);
        let sampled = self.keeps_logits || sampled_drafts || running().any(Slot::sampled);
        // The graphs are in order of size, so the first that fits is the smallest.
        let fits = |shape: &RoundShape| {
            let kind = (shape.drafter, shape.sampled, shape.sampled_drafts);
            shape.sequences >= highest && shape.rows >= rows && kind == (drafter, sampled, sampled_drafts)
        };
        let Some((shape, graph)) = self.graphs.iter().find(|(shape, _)| fits(shape)) else {
            return Err(Error::Internal(format!(
                "no round for {highest} sequences of {rows} rows was captured"
            )));
        };
        self.ctx.device.replay(graph)?;
        self.rows = shape.rows;
        self.enqueued += 1;
        Ok(())
    }

    /// Asks the controller of the sequence in `slot` for the number of drafts of the next round. Returns the
    /// maximum rows to verify: 1 if the slot has no running sequence or the sequence does not draft. The
    /// device gets a changed maximum by a write enqueued after the earlier rounds, so the host does not wait.
    fn set_rows(&mut self, slot: usize) -> Result<usize> {
        let entry = &mut self.slots[slot];
        if !(entry.is_running() && entry.drafts()) {
            return Ok(1);
        }
        let (max_drafts, length) = (entry.max_drafts(), &mut entry.draft_length);
        let drafts = length.controller.drafts(max_drafts).min(max_drafts);
        length.allowed.push_back(drafts);
        // `max_drafts` is an estimate, because the length after the enqueued rounds is not known here. So if
        // the controller asks for all of them, the device gets the full size and applies the exact limits.
        let all = entry.state.as_ref().map_or(1, |state| state.rows as usize);
        let rows = if drafts < max_drafts { drafts + 1 } else { all };
        if length.rows != rows {
            let at = slot * Sequence::BYTES + Sequence::ROWS_OFFSET;
            self.ctx.device.fill(&self.ctx.buffers.states.slice(at, 1)?, rows as u8)?;
            length.rows = rows;
        }
        Ok(drafts + 1)
    }

    /// Waits for the result of round `round` for the sequence in `slot`.
    fn record(&self, round: u32, slot: usize) -> Result<Record> {
        let begin = Instant::now();
        let spin = if self.ctx.device.properties().software { Duration::ZERO } else { SPIN };
        let record = loop {
            if let Some(record) = self.ctx.ring.read(round, slot)? {
                break record;
            }
            if begin.elapsed() > Duration::from_secs(1) {
                // After a failed kernel there is no record. Waiting for the device reports the failure.
                self.ctx.device.synchronize()?;
                break self.ctx.ring.read(round, slot)?.ok_or_else(|| {
                    Error::Internal(format!("round {round} ended without a record for slot {slot}"))
                })?;
            }
            if begin.elapsed() < spin {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(PAUSE);
            }
        };
        match record.finish {
            Finish::InvalidTarget => Err(invalid_logits("target", 0)),
            Finish::InvalidDrafter => Err(invalid_logits("drafter", 0)),
            _ => Ok(record),
        }
    }
}

/// The error for invalid logits; `position` 0: unknown.
fn invalid_logits(model: &str, position: usize) -> Error {
    let place = if position > 0 { format!(" for position {position}") } else { String::new() };
    Error::Model(format!(
        "the {model}'s logits{place} hold a NaN or infinity, or nothing but -inf: its weights or its config are damaged"
    ))
}

impl Decoder for Batch<'_> {
    fn vocab(&self) -> usize {
        self.ctx.models.vocabulary.vocab
    }

    fn context(&self) -> usize {
        self.ctx.models.target.config.max_positions.min(self.ctx.config.positions)
    }

    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        let Some(Slot { phase: Phase::Idle, .. }) = self.slots.get(slot) else {
            return Err(Error::Internal(format!("slot {slot} of {} is not free", self.slots.len())));
        };
        let (prompt, block, spec) = (&request.prompt, request.block, &request.spec);
        let (config, tree) = (self.ctx.config, spec.tree_rows().unwrap_or(0));
        let (method, adaptive) = (spec.method(), spec.draft_length().adapts());
        if block > config.block
            || tree > config.tree
            || (method != VerifyMethod::Match && !config.draft_probs)
            || (adaptive && !config.adaptive)
        {
            let (method, length) = (method.name(), if adaptive { "adaptive" } else { "full" });
            return Err(Error::Internal(format!(
                "the batch was not made for a request with blocks of {block} rows, trees of {tree}, verification by \
                 {method} and {length} draft lengths"
            )));
        }
        let positions = request.positions().min(self.context());
        let pages = (positions + tree).div_ceil(PAGE);
        if pages > config.pages {
            return Err(Error::Memory(format!(
                "a sequence of {positions} positions needs {pages} pages of keys and values, but there are {}",
                config.pages
            )));
        }
        if !self.take_pages(slot, pages) {
            return Ok(None);
        }
        let state = self.begin(slot, request)?;

        // Both states are uploaded inactive. Sampling of the first token already reads their settings.
        let (device, buffers) = (self.ctx.device, &self.ctx.buffers);
        let inactive = Sequence { active: false, ..state.clone() };
        let to = buffers.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        device.upload(&to, &inactive.to_bytes()?)?;
        self.write_history(slot, 0, prompt)?;
        let sampling = spec.draft_params(&request.sampling);
        let sampled_drafts = state.draft_end > 0 && spec.samples_drafts();
        let to = buffers.draft_states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        device.upload(&to, &Sequence { sampling, ..inactive }.to_bytes()?)?;
        let controller = self.controller(spec, state.form);

        let entry = &self.slots[slot];
        let common = entry.tokens[..entry.held].iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // The last token always runs, for its logits.
        let mut held = if keep { common.min(prompt.len() - 1) } else { 0 };
        if let Some(states) = self.ctx.cache.states.as_ref().filter(|_| held > 0) {
            // The prompt goes on from a state. There is one for each position from that before the last round's rows
            // on; those whose features the drafter lacks run again.
            if self.ctx.draft.is_some() && entry.drafted < state.draft_end as usize {
                held = held.min(entry.drafted);
            }
            held = if states.header(device, slot)?.length <= held { held } else { 0 };
        }
        let entry = &mut self.slots[slot];
        entry.held = held;
        // The pair of the last common position may have another token.
        let common = if self.ctx.models.is_chain() { held.saturating_sub(1) } else { held };
        entry.drafted = entry.drafted.min(common);
        // The prompt runs from the first token whose features the drafter lacks; from `held` on if the
        // drafter has all that its positions allow.
        let at = match state.draft_end as usize {
            end if self.ctx.draft.is_some() && entry.drafted < end => entry.drafted,
            _ => entry.held,
        };
        entry.draft_length = DraftLength { controller, allowed: VecDeque::new(), rows: state.rows as usize };
        (entry.tokens, entry.prompt, entry.sampled_drafts) = (prompt.clone(), prompt.len(), sampled_drafts);
        (entry.state, entry.phase) = (Some(state), Phase::Prefill { at });
        Ok(Some(at))
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let _range = nvtx::range("prefill");
        let Some(Slot { phase: Phase::Prefill { at }, state: Some(state), .. }) = self.slots.get(slot) else {
            return Err(Error::Internal(format!("slot {slot} has no prompt to run")));
        };
        let (first, mut state) = (*at, state.clone());
        let entry = &self.slots[slot];
        let end = entry.prompt.min(first + CHUNK);
        let (tokens, held, draft_end) = (&entry.tokens[first..end], entry.held, state.draft_end as usize);
        let after = entry.tokens.get(end).copied();
        self.prompt.run(&self.ctx, Chunk { slot, first, tokens, next: after, held, draft_end })?;
        let next = match end == entry.prompt {
            true => Some(self.first_token(slot, end - first - 1)?),
            false => None,
        };
        if let Some(next) = next {
            state.anchor = next;
            if draft_end > 0 && self.ctx.models.is_chain() {
                self.keep_last_feature(slot, end - first - 1)?;
                state.pending = 1;
            }
            let to = self.ctx.buffers.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
            self.ctx.device.upload(&to, &state.to_bytes()?)?;
            self.write_history(slot, end, &[next])?;
        }
        let entry = &mut self.slots[slot];
        entry.held = entry.held.max(end);
        if draft_end > 0 {
            entry.drafted = entry.drafted.max(end.min(draft_end));
        }
        entry.phase = match next {
            Some(_) => Phase::Running { first: self.enqueued + 1 },
            None => Phase::Prefill { at: end },
        };
        entry.tokens.extend(next);
        Ok(Prefill { done: end, next })
    }

    fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
        let _range = nvtx::range("round");
        out.iter_mut().for_each(|emitted| *emitted = Emitted::default());
        if !self.slots.iter().any(Slot::is_running) {
            return Err(Error::Internal("a round of no sequences".into()));
        }
        // A round that was enqueued before all running sequences were admitted has no results. It is skipped.
        let mut has_results = false;
        while !has_results {
            // The next round is enqueued before this one is read, so the device never waits for the host.
            let ahead = if self.keeps_logits { 1 } else { AHEAD as u32 };
            while self.enqueued < self.read + ahead {
                self.enqueue()?;
            }
            self.read += 1;
            for (slot, emitted) in out.iter_mut().enumerate() {
                let Phase::Running { first } = self.slots[slot].phase else { continue };
                if first > self.read {
                    continue;
                }
                has_results = true;
                let Record { tokens, acceptance_length, drafted, path, .. } = self.record(self.read, slot)?;
                if tokens.is_empty() {
                    return Err(Error::Internal(format!(
                        "round {} emitted nothing for the sequence in slot {slot}",
                        self.read
                    )));
                }
                // The round has injected the features of all earlier positions.
                let entry = &mut self.slots[slot];
                if let Some(state) = &entry.state
                    && state.draft_end > 0
                {
                    entry.drafted = entry.drafted.max(entry.held.min(state.draft_end as usize));
                }
                if entry.draft_length.allowed.pop_front().is_some_and(|drafts| drafts > 0) {
                    entry.draft_length.controller.observe(drafted as usize, path);
                }
                entry.held += tokens.len();
                entry.tokens.extend(&tokens);
                let (produced, drafted) = (acceptance_length as usize, drafted as usize);
                *emitted = Emitted { tokens, produced, drafted };
            }
        }
        Ok(())
    }

    fn release(&mut self, slot: usize, tokens: usize) -> Result<()> {
        let Some(entry) = self.slots.get_mut(slot).filter(|entry| entry.phase != Phase::Idle) else {
            return Err(Error::Internal(format!("no sequence is in slot {slot}")));
        };
        // The last token of the answer counts as not held, because a round may not have run it.
        entry.held = entry.held.min(entry.prompt + tokens.saturating_sub(1));
        entry.drafted = entry.drafted.min(entry.held);
        entry.tokens.truncate(entry.held);
        (entry.state, entry.phase) = (None, Phase::Idle);
        self.ctx.device.upload(&self.ctx.buffers.states.slice(slot * Sequence::BYTES, 4)?, &[0; 4])
    }

    fn keep_logits(&mut self) {
        self.keeps_logits = true;
    }

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        let (device, buffers) = (self.ctx.device, &self.ctx.buffers);
        let mut on_path = [0; 4];
        device.download(&buffers.path.slice((slot * self.rows + row) * 4, 4)?, &mut on_path)?;
        let row = u32::from_le_bytes(on_path) as usize;
        if row >= self.rows {
            return Err(Error::Internal(format!("slot {slot} has no such logits")));
        }
        let bytes = self.ctx.models.vocabulary.vocab * 4;
        let mut logits = vec![0; bytes];
        device.download(&buffers.logits.slice((slot * self.rows + row) * bytes, bytes)?, &mut logits)?;
        Ok(logits.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}
