//! Rounds on a device: sequences in slots, their pages, one captured graph that is every round, results read from a ring.
//!
//! All that changes from round to round lives in device memory (`cuda/common/state.cuh`), so the host enqueues rounds without
//! knowing what came of the last one, and reads behind.

use crate::checkpoint::config::{DrafterConfig, TargetConfig};
use crate::checkpoint::pair::Pair;
use crate::engine::generate::{Backend, Decoder, Emitted, Prefill, Request};
use crate::gpu::device::{Buffer, Device, Graph};
use crate::gpu::kernels::round::{Finish, Form, Record, Ring, Round, STOP_IDS, Sequence};
use crate::gpu::kernels::sample::Sample;
use crate::gpu::loader::Loader;
use crate::gpu::memory::BatchConfig;
use crate::gpu::model::{Cache, Injection, PAGE, Pass, Row, Scratch, Sizes, Stack, Vocabulary};
use crate::gpu::nvtx;
use crate::perf::roofline::{CARDS, Card};
use crate::spec::config::{SpecConfig, VerifyMethod};
use crate::spec::draft_length::{Controller, Costs, DraftLengthPolicy, Fixed};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

mod round_graph;
mod synthetic;
#[cfg(all(test, feature = "emulator"))]
mod tests;

use round_graph::RoundBuffers;
pub use round_graph::{DrafterMode, Shape};
pub use synthetic::FrozenBatch;

/// Rows of a prompt that go through a model together.
const CHUNK: usize = 512;
/// Rounds that may be enqueued before their results are read.
const AHEAD: usize = 2;

/// A pair's weights on a device.
pub struct Models {
    config: TargetConfig,
    target: Stack,
    vocabulary: Vocabulary,
    drafter: Option<(DrafterConfig, Stack, Injection)>,
}

impl Models {
    /// Loads both models for sequences of up to `positions` positions.
    ///
    /// # Errors
    /// As [`Models::load_with`].
    pub fn load(device: &dyn Device, pair: &Pair, positions: usize) -> Result<Models> {
        Models::load_with(device, pair, positions, &mut |_, _| ())
    }

    /// As [`Models::load`]; `progress` hears how many bytes of how many are done.
    ///
    /// # Errors
    /// As [`Stack::load`] and [`Loader::run`].
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

    /// Allocates both models and lists what is to be read into them. `done` hears after each group what it was.
    pub(crate) fn list<'a>(
        loader: &mut Loader<'a>,
        pair: &'a Pair,
        positions: usize,
        done: &mut dyn FnMut(&'static str),
    ) -> Result<Models> {
        let config = &pair.target.config;
        let target = Stack::load(loader, "model.", &config.stack, positions)?;
        done("target weights");
        let vocabulary = Vocabulary::load(loader, config)?;
        done("vocabulary");
        let Some(model) = &pair.drafter else {
            return Ok(Models { config: config.clone(), target, vocabulary, drafter: None });
        };
        let c = &model.config;
        loader.turn_to(&model.weights);
        let stack = Stack::load(loader, "", &c.stack, positions)?;
        let injection = Injection::load(loader, c.stack.hidden, c.taps.len())?;
        done("drafter weights");
        let drafter = Some((c.clone(), stack, injection));
        Ok(Models { config: config.clone(), target, vocabulary, drafter })
    }

    fn taps(&self) -> &[usize] {
        self.drafter.as_ref().map_or(&[], |(config, ..)| &config.taps)
    }
}

/// What a prompt's chunk takes.
struct Prompt {
    tokens: Buffer,   // [CHUNK] u32
    rows: Buffer,     // [CHUNK] Row
    span: Buffer,     // (context, rows) u32
    features: Buffer, // [CHUNK][taps][hidden] bf16
    gather: Buffer,   // [CHUNK] u32: 0, 1, 2...
}

/// The `cuda` and `emulator` devices: a pair's weights on one, and the room that decoders get there.
pub struct OnDevice {
    name: &'static str,
    device: Box<dyn Device>,
    models: Models,
    room: BatchConfig,
}

impl OnDevice {
    /// Loads the pair; `progress` hears how many bytes of how many are done. `name` is the device's word in `--device`.
    ///
    /// # Errors
    /// As [`Models::load_with`].
    pub fn load(
        name: &'static str,
        device: Box<dyn Device>,
        pair: &Pair,
        room: BatchConfig,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<OnDevice> {
        let models = Models::load_with(&*device, pair, room.positions, progress)?;
        Ok(OnDevice { name, device, models, room })
    }
}

impl Backend for OnDevice {
    fn name(&self) -> &'static str {
        self.name
    }

    fn decoder(&self) -> Result<Box<dyn Decoder + '_>> {
        Ok(Box::new(Batch::new(&*self.device, &self.models, self.room)?))
    }
}

/// Sequences that run together on a device. Each has a slot and its own pages; none of it shows in what another emits.
///
/// A sequence has the pages of all its positions, prompt and answer, before it begins: a round never waits for memory,
/// and who finds too few waits for others to leave.
pub struct Batch<'a> {
    device: &'a dyn Device,
    models: &'a Models,
    room: BatchConfig,
    cache: Cache,
    scratch: Scratch,
    draft: Option<(Cache, Scratch)>,
    work: RoundBuffers,
    prompt: Prompt,
    ring: Ring,
    graphs: Vec<(Shape, Graph)>,
    free: Vec<u32>,
    slots: Vec<Slot>,
    /// Rounds enqueued, and those of them that were read, from 1 on.
    enqueued: u32,
    read: u32,
    /// Rows of each sequence in the round enqueued last.
    rows: usize,
    watched: bool,
    /// What rounds cost here; none without a drafter or where rounds have one size.
    costs: Option<Costs>,
    /// Makes the controllers of sequences that are admitted, in place of their draft-length policy.
    controllers: Option<Controllers<'a>>,
}

/// Makes a sequence's controller.
type Controllers<'a> = Box<dyn Fn() -> Box<dyn Controller> + 'a>;

/// How large a sequence's rounds are.
struct Control {
    controller: Box<dyn Controller>,
    /// Drafts that it allowed each round that was not read yet, the oldest first.
    allowed: VecDeque<usize>,
    /// Rows that the device verifies at most, as it was told last.
    rows: usize,
}

impl Default for Control {
    fn default() -> Control {
        Control { controller: Box::new(Fixed), allowed: VecDeque::new(), rows: 0 }
    }
}

#[derive(Default)]
struct Slot {
    pages: Vec<u32>,
    /// Prompt and answer as far as they are known here, also of the last sequence: of these the target's pages hold the
    /// first `held`, of which the drafter's hold the features of the first `drafted`.
    tokens: Vec<u32>,
    held: usize,
    drafted: usize,
    prompt: usize,
    /// Its drafts are not the drafter's best tokens.
    drawn: bool,
    /// As it is to be when the prompt is done.
    state: Option<Sequence>,
    control: Control,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Phase {
    /// Nobody; what the last sequence left may be kept.
    #[default]
    Idle,
    /// The prompt runs from here on; the target's pages have all before `held`.
    Filling { at: usize },
    /// Takes part from this round on.
    Running { first: u32 },
}

impl Slot {
    fn drafts(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.draft_end > 0)
    }

    /// Drafts of a round at most, as far as the host knows how long the sequence is: it may be longer.
    fn most(&self) -> usize {
        let Some(state) = &self.state else { return 0 };
        let left = |end: u32| (end as usize).saturating_sub(self.held);
        let block = (state.block as usize).min(left(state.draft_end)).min(left(state.end).saturating_sub(1));
        match state.form {
            _ if block < 2 => 0,
            Form::Chain => block - 1,
            Form::BestFirst | Form::Drawn => state.rows as usize - 1,
        }
    }

    fn sampled(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.sampling.temperature != 0.0)
    }
}

impl<'a> Batch<'a> {
    /// Room for the sequences, and their rounds, captured. A block of one row is autoregressive decoding: no drafter runs.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little; else what the device says.
    pub fn new(device: &'a dyn Device, models: &'a Models, room: BatchConfig) -> Result<Batch<'a>> {
        let BatchConfig { sequences, block, pages, .. } = room;
        let (stack, vocabulary) = (&models.target.config, &models.vocabulary);
        let taps = models.taps().len();
        let cache = |config| Cache::new(device, config, pages, sequences, room.sequence_pages());
        let target_cache = cache(stack)?;
        let sizes = Sizes {
            sequences,
            block: room.max_verify_rows(),
            chunk: CHUNK,
            injected: 0,
            head: Some(vocabulary.shape()),
            features: None,
        };
        let scratch = Scratch::new(device, stack, &target_cache, sizes)?;
        let draft = models.drafter.as_ref().filter(|_| block > 1).map(|(_, stack, _)| {
            let cache = cache(&stack.config)?;
            let features = Some(taps * stack.config.hidden);
            let sizes = Sizes { block, injected: sequences * block, features, ..sizes };
            let scratch = Scratch::new(device, &stack.config, &cache, sizes)?;
            Ok::<_, Error>((cache, scratch))
        });
        let work = RoundBuffers::new(device, models, room, &target_cache)?;
        let get = |bytes: usize, what| device.allocate(bytes.max(16), what);
        let numbers: Vec<u8> = (0..CHUNK as u32).flat_map(u32::to_le_bytes).collect();
        let prompt = Prompt {
            tokens: get(CHUNK * 4, "a prompt's tables")?,
            rows: get(CHUNK * Row::BYTES, "a prompt's tables")?,
            span: get(8, "a prompt's tables")?.slice(0, 8)?,
            features: get(CHUNK * taps * stack.hidden * 2, "features")?,
            gather: get(CHUNK * 4, "a prompt's tables")?,
        };
        device.fill(&prompt.features, 0)?;
        device.upload(&prompt.gather, &numbers)?;
        let ring = Ring::new(device, Round { sequences, block, wide: room.max_verify_rows() }, AHEAD + 1)?;
        let mut batch = Batch {
            device,
            models,
            room,
            cache: target_cache,
            scratch,
            draft: draft.transpose()?,
            work,
            prompt,
            ring,
            graphs: Vec::new(),
            free: (0..pages as u32).rev().collect(),
            slots: (0..sequences).map(|_| Slot::default()).collect(),
            enqueued: 0,
            read: 0,
            rows: 1,
            watched: false,
            costs: None,
            controllers: None,
        };
        for shape in batch.shapes() {
            let graph = batch.capture(shape)?;
            batch.graphs.push((shape, graph));
        }
        if let (true, Some((drafter, ..))) = (room.adaptive, &models.drafter) {
            let card = Card::of_driver(&device.properties().name).unwrap_or(CARDS[0]);
            let costs = Costs::modelled(&card, &models.config, drafter, 0, sequences, block);
            let mut sizes: Vec<usize> = batch.graphs.iter().map(|(shape, _)| shape.rows).collect();
            sizes.sort_unstable();
            batch.costs = Some(costs.of_sizes(&sizes));
        }
        Ok(batch)
    }

    /// Sequences that are admitted from now on get a controller from `make` in place of their draft-length policy, except
    /// those with sampled trees, which are always whole.
    pub fn control(&mut self, make: impl Fn() -> Box<dyn Controller> + 'a) {
        self.controllers = Some(Box::new(make));
    }

    /// The controller of a request. The cost model uses the roofline of the device's card, or of an H200 where the card is
    /// unknown.
    fn controller(&self, spec: &SpecConfig, form: Form) -> Box<dyn Controller> {
        match (&self.controllers, &self.costs) {
            _ if form == Form::Drawn => Box::new(Fixed),
            (Some(make), _) => make(),
            (None, Some(costs)) => spec.draft_length().controller(costs, true),
            (None, None) => Box::new(Fixed),
        }
    }

    /// The sequence in `slot` as it is to be when its prompt, of which it has the pages, is done.
    fn begin(&self, slot: usize, request: &Request) -> Result<Sequence> {
        let (device, pages) = (self.device, &self.slots[slot].pages);
        // What a sequence does not have it shall not reach.
        let mut row = pages.clone();
        row.resize(self.cache.sequence_pages, u32::MAX);
        let bytes: Vec<u8> = row.iter().flat_map(|page| page.to_le_bytes()).collect();
        for cache in [Some(&self.cache), self.draft.as_ref().map(|(cache, _)| cache)].into_iter().flatten() {
            device.upload(&cache.table.slice(slot * bytes.len(), bytes.len())?, &bytes)?;
        }
        // A tree's rows lie behind the positions.
        let tree = request.spec.tree_rows().unwrap_or(0);
        let end = self.context().min((pages.len() * PAGE).saturating_sub(tree));
        let draft_end = match (&self.models.drafter, request.block) {
            (Some((_, stack, _)), 2..) if self.draft.is_some() => stack.config.max_positions.min(end),
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
                (None, _) => Form::Chain,
                (Some(_), VerifyMethod::Match) => Form::BestFirst,
                (Some(_), VerifyMethod::Rejection | VerifyMethod::Block) => Form::Drawn,
            },
            sampling: request.sampling.clone(),
            stop_ids,
            finish: Finish::Running,
            rounds: 0,
            drafted: 0,
            accepted: 0,
            rule: request.spec.method(),
        })
    }

    /// The token that follows a prompt whose last row is row `last` of the chunk that ran last.
    fn first_token(&self, slot: usize, last: usize) -> Result<u32> {
        let (device, vocabulary, sampled) =
            (self.device, &self.models.vocabulary, self.slots[slot].sampled());
        self.head(last, 1, None, sampled)?;
        let sample = Sample {
            rows: 1,
            vocab: vocabulary.vocab,
            blocks: vocabulary.shape().blocks(),
            sequences: self.room.sequences,
        };
        let row = self.prompt.rows.slice(last * Row::BYTES, Row::BYTES)?;
        let races = sampled.then(|| self.work.races());
        sample.launch(device, &self.work.choices, &self.work.best, &row, races)?;
        let mut first = [0; 4];
        device.download(&self.work.choices.slice(0, 4)?, &mut first)?;
        match u32::from_le_bytes(first) {
            u32::MAX => Err(damaged("target", self.slots[slot].prompt)),
            first => Ok(first),
        }
    }

    /// Runs a chunk of a prompt through the target, and its features into the drafter's cache. Positions before `held`
    /// leave features alone: the target's pages have them.
    fn chunk(&self, slot: usize, first: usize, tokens: &[u32], held: usize, draft_end: usize) -> Result<()> {
        let (device, models, p) = (self.device, self.models, &self.prompt);
        let count = tokens.len();
        let rows = |query: bool, stored: std::ops::Range<usize>| {
            let row = move |i: usize| {
                let (at, there) = ((first + i) as u32, stored.contains(&(first + i)));
                Row {
                    sequence: if query || there { slot as u32 } else { Row::NONE },
                    position: at,
                    slot: if there { at } else { Row::NONE },
                    query: if query { i as u32 } else { Row::NONE },
                }
            };
            (0..count).flat_map(move |i| row(i).to_bytes()).collect::<Vec<u8>>()
        };
        let put = |to: &Buffer, bytes: &[u8]| device.upload(&to.slice(0, bytes.len())?, bytes);
        put(&p.tokens, &tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>())?;
        put(&p.rows, &rows(true, held..usize::MAX))?;
        put(&p.span, &[(first as u32).to_le_bytes(), (count as u32).to_le_bytes()].concat())?;
        let drafting = draft_end > 0;
        models.vocabulary.embed(device, &self.scratch, &p.tokens, count, 1.0)?;
        let pass = Pass {
            sequences: 1,
            block: count,
            injected: 0,
            table: &p.rows,
            spans: &p.span,
            masks: None,
            prompt: Some(slot),
            num_active: None,
            taps: drafting.then_some((models.taps(), &p.features)),
        };
        models.target.run(device, &self.scratch, &self.cache, &pass)?;
        if let (true, Some((_, stack, injection)), Some((cache, s))) =
            (drafting, &models.drafter, &self.draft)
        {
            injection.run(device, s, count, &p.features, &p.gather, true, None)?;
            put(&p.rows, &rows(false, 0..draft_end))?;
            stack.write_context_kv(device, s, cache, &p.rows, count, true, None)?;
            put(&p.rows, &rows(true, held..usize::MAX))?;
        }
        Ok(())
    }

    /// Enqueues a round of all sequences that run. At most two may be enqueued whose results nobody has read.
    fn enqueue(&mut self) -> Result<()> {
        let mut rows = 1;
        for slot in 0..self.slots.len() {
            rows = rows.max(self.size(slot)?);
        }
        let running = |slot: &Slot| matches!(slot.phase, Phase::Running { .. });
        let taking_part = || self.slots.iter().filter(|slot| running(slot));
        let highest = self.slots.iter().rposition(running).map_or(0, |slot| slot + 1);
        let drafter = match taking_part().any(Slot::drafts) {
            false => DrafterMode::Idle,
            true if rows == 1 && self.room.adaptive => DrafterMode::CatchUp,
            true => DrafterMode::Draft,
        };
        let drawn = drafter == DrafterMode::Draft && taking_part().any(|slot| slot.drawn);
        let sampled = self.watched || drawn || taking_part().any(Slot::sampled);
        let fits = |shape: &Shape| {
            let kind = (shape.drafter, shape.sampled, shape.drawn);
            shape.sequences >= highest && shape.rows >= rows && kind == (drafter, sampled, drawn)
        };
        let Some((shape, graph)) = self.graphs.iter().find(|(shape, _)| fits(shape)) else {
            return Err(Error::Internal(format!(
                "no round for {highest} sequences of {rows} rows was captured"
            )));
        };
        self.device.replay(graph)?;
        self.rows = shape.rows;
        self.enqueued += 1;
        Ok(())
    }

    /// Rows that the next round verifies at most of the sequence in `slot`, 1 where there is none or it drafts nothing. The
    /// device hears of it in order, behind the rounds that are on their way, and nobody waits.
    fn size(&mut self, slot: usize) -> Result<usize> {
        let own = &mut self.slots[slot];
        if !(matches!(own.phase, Phase::Running { .. }) && own.drafts()) {
            return Ok(1);
        }
        let (most, control) = (own.most(), &mut own.control);
        let drafts = control.controller.drafts(most).min(most);
        control.allowed.push_back(drafts);
        // Where positions end, the device knows better.
        let all = own.state.as_ref().map_or(1, |state| state.rows as usize);
        let rows = if drafts < most { drafts + 1 } else { all };
        if control.rows != rows {
            let at = slot * Sequence::BYTES + Sequence::ROWS_AT;
            self.device.fill(&self.work.states.slice(at, 1)?, rows as u8)?;
            control.rows = rows;
        }
        Ok(drafts + 1)
    }

    /// What round `round` did for the sequence in `slot`; waits for it.
    fn record(&self, round: u32, slot: usize) -> Result<Record> {
        let clock = Instant::now();
        let record = loop {
            if let Some(record) = self.ring.read(round, slot)? {
                break record;
            }
            if clock.elapsed() > Duration::from_secs(1) {
                // A kernel that failed never writes; this says so.
                self.device.synchronize()?;
                break self.ring.read(round, slot)?.ok_or_else(|| {
                    Error::Internal(format!("round {round} ended without a record for slot {slot}"))
                })?;
            }
            std::hint::spin_loop();
        };
        match record.finish {
            Finish::DamagedTarget => Err(damaged("target", 0)),
            Finish::DamagedDrafter => Err(damaged("drafter", 0)),
            _ => Ok(record),
        }
    }

    /// Pages that no running sequence has.
    pub fn free_pages(&self) -> usize {
        let idle = self.slots.iter().filter(|slot| slot.phase == Phase::Idle);
        self.free.len() + idle.map(|slot| slot.pages.len()).sum::<usize>()
    }

    /// Gives a slot `count` pages, at the expense of what ended sequences left; false where there are too few.
    fn take_pages(&mut self, slot: usize, count: usize) -> bool {
        let own = self.slots[slot].pages.len();
        if count > self.free_pages() {
            return false;
        }
        for other in (0..self.slots.len()).filter(|&other| other != slot) {
            if own + self.free.len() >= count {
                break;
            }
            if self.slots[other].phase == Phase::Idle {
                self.free.extend(std::mem::take(&mut self.slots[other]).pages);
            }
        }
        let pages = &mut self.slots[slot].pages;
        while pages.len() < count
            && let Some(page) = self.free.pop()
        {
            pages.push(page);
        }
        self.free.extend(pages.drain(count..));
        true
    }
}

fn damaged(model: &str, position: usize) -> Error {
    let place = if position > 0 { format!(" for position {position}") } else { String::new() };
    Error::Model(format!(
        "the {model}'s logits{place} hold a NaN or infinity, or nothing but -inf: its weights or its config are damaged"
    ))
}

impl Decoder for Batch<'_> {
    fn vocab(&self) -> usize {
        self.models.vocabulary.vocab
    }

    fn context(&self) -> usize {
        self.models.target.config.max_positions.min(self.room.positions)
    }

    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        let Some(Slot { phase: Phase::Idle, .. }) = self.slots.get(slot) else {
            return Err(Error::Internal(format!("slot {slot} of {} is not free", self.slots.len())));
        };
        let (prompt, block, spec) = (&request.prompt, request.block, &request.spec);
        let (room, tree) = (self.room, spec.tree_rows().unwrap_or(0));
        let (method, adaptive) = (spec.method(), spec.draft_length() != DraftLengthPolicy::Full);
        if block > room.block
            || tree > room.tree
            || (method != VerifyMethod::Match && !room.rules)
            || (adaptive && !room.adaptive)
        {
            let (method, length) = (method.name(), if adaptive { "adaptive" } else { "full" });
            return Err(Error::Internal(format!(
                "the batch was not made for a request with blocks of {block}, trees of {tree}, the verification method \
                 {method} and {length} draft lengths"
            )));
        }
        let positions = request.positions().min(self.context());
        let pages = (positions + tree).div_ceil(PAGE);
        if pages > self.room.pages {
            return Err(Error::Memory(format!(
                "a sequence of {positions} positions needs {pages} pages of keys and values, but there are {}",
                self.room.pages
            )));
        }
        if !self.take_pages(slot, pages) {
            return Ok(None);
        }
        let state = self.begin(slot, request)?;
        // The first token's draw looks there too.
        let waiting = Sequence { active: false, ..state.clone() };
        let to = self.work.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        self.device.upload(&to, &waiting.to_bytes()?)?;
        let draws = spec.draft_params(&request.sampling);
        let drawn = state.draft_end > 0 && spec.samples_drafts();
        let to = self.work.drafting.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        self.device.upload(&to, &Sequence { sampling: draws, ..waiting }.to_bytes()?)?;
        let controller = self.controller(spec, state.form);
        let own = &mut self.slots[slot];
        let same = own.tokens[..own.held].iter().zip(prompt).take_while(|(a, b)| a == b).count();
        // The last token is run again, for its logits.
        own.held = if keep { same.min(prompt.len() - 1) } else { 0 };
        own.drafted = own.drafted.min(own.held);
        // The drafter needs features of what it has not seen, as far as it can go.
        let at = match state.draft_end as usize {
            end if own.drafted < end => own.drafted,
            _ => own.held,
        };
        own.control = Control { controller, allowed: VecDeque::new(), rows: state.rows as usize };
        (own.tokens, own.prompt, own.drawn) = (prompt.clone(), prompt.len(), drawn);
        (own.state, own.phase) = (Some(state), Phase::Filling { at });
        Ok(Some(at))
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let _range = nvtx::range("prefill");
        let Some(Slot { phase: Phase::Filling { at }, state: Some(state), .. }) = self.slots.get(slot) else {
            return Err(Error::Internal(format!("slot {slot} has no prompt to run")));
        };
        let (at, mut state) = (*at, state.clone());
        let own = &self.slots[slot];
        let end = own.prompt.min(at + CHUNK);
        let draft_end = state.draft_end as usize;
        self.chunk(slot, at, &own.tokens[at..end], own.held, draft_end)?;
        let next = match end == own.prompt {
            true => Some(self.first_token(slot, end - at - 1)?),
            false => None,
        };
        if let Some(first) = next {
            state.anchor = first;
            let to = self.work.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
            self.device.upload(&to, &state.to_bytes()?)?;
        }
        let own = &mut self.slots[slot];
        own.held = own.held.max(end);
        if draft_end > 0 {
            own.drafted = own.drafted.max(end.min(draft_end));
        }
        own.phase = match next {
            Some(_) => Phase::Running { first: self.enqueued + 1 },
            None => Phase::Filling { at: end },
        };
        own.tokens.extend(next);
        Ok(Prefill { done: end, next })
    }

    fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
        let _range = nvtx::range("round");
        out.iter_mut().for_each(|emitted| *emitted = Emitted::default());
        if !self.slots.iter().any(|slot| matches!(slot.phase, Phase::Running { .. })) {
            return Err(Error::Internal("a round of no sequences".into()));
        }
        let mut any = false;
        while !any {
            // The next round is on its way before this one is read.
            let ahead = if self.watched { 1 } else { AHEAD as u32 };
            while self.enqueued < self.read + ahead {
                self.enqueue()?;
            }
            self.read += 1;
            for (slot, emitted) in out.iter_mut().enumerate() {
                let Phase::Running { first } = self.slots[slot].phase else { continue };
                if first > self.read {
                    continue;
                }
                any = true;
                let Record { tokens, judged, drafted, stood, .. } = self.record(self.read, slot)?;
                if tokens.is_empty() {
                    return Err(Error::Internal(format!(
                        "round {} emitted nothing for the sequence in slot {slot}",
                        self.read
                    )));
                }
                // All that was there before the round has its features in the drafter's pages now.
                let own = &mut self.slots[slot];
                if let Some(state) = &own.state
                    && state.draft_end > 0
                {
                    own.drafted = own.drafted.max(own.held.min(state.draft_end as usize));
                }
                if own.control.allowed.pop_front().is_some_and(|drafts| drafts > 0) {
                    own.control.controller.observe(drafted as usize, stood);
                }
                own.held += tokens.len();
                own.tokens.extend(&tokens);
                *emitted = Emitted { tokens, produced: judged as usize, drafted: drafted as usize };
            }
        }
        Ok(())
    }

    fn release(&mut self, slot: usize, tokens: usize) -> Result<()> {
        let Some(own) = self.slots.get_mut(slot).filter(|own| own.phase != Phase::Idle) else {
            return Err(Error::Internal(format!("no sequence is in slot {slot}")));
        };
        // The answer's last token counts as not run, whether a round ran it or not.
        own.held = own.held.min(own.prompt + tokens.saturating_sub(1));
        own.drafted = own.drafted.min(own.held);
        own.tokens.truncate(own.held);
        (own.state, own.phase) = (None, Phase::Idle);
        self.device.upload(&self.work.states.slice(slot * Sequence::BYTES, 4)?, &[0; 4])
    }

    fn watch(&mut self) {
        self.watched = true;
    }

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        let mut on_path = [0; 4];
        let at = (slot * self.rows + row) * 4;
        self.device.download(&self.work.path.slice(at, 4)?, &mut on_path)?;
        let row = u32::from_le_bytes(on_path) as usize;
        if row >= self.rows {
            return Err(Error::Internal(format!("slot {slot} has no such logits")));
        }
        let bytes = self.models.vocabulary.vocab * 4;
        let mut logits = vec![0; bytes];
        let from = self.work.logits.slice((slot * self.rows + row) * bytes, bytes)?;
        self.device.download(&from, &mut logits)?;
        Ok(logits.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}
