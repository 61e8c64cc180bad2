//! Rounds on a device: sequences in slots, their pages, one captured graph that is every round, results read from a ring.
//!
//! All that changes from round to round lives in device memory (`cuda/state.cuh`), so the host enqueues rounds without
//! knowing what came of the last one, and reads behind.

use crate::config::DrafterConfig;
use crate::device::{Buffer, Device, Graph};
use crate::engine::{Backend, Decoder, Emitted, Prefill, Request};
use crate::kernels::head::Head;
use crate::kernels::round::{Finish, Record, Ring, Round, STOP_IDS, Sequence, Tables};
use crate::kernels::sample::{self, Races, Sample};
use crate::kernels::verify::{Verdict, Verify};
use crate::load::Loader;
use crate::memory::Room;
use crate::model::{Cache, Injection, PAGE, Pass, Row, Scratch, Sizes, Stack, Vocabulary};
use crate::pair::Pair;
use crate::rules::Rule;
use crate::verify::Sampling;
use crate::{Error, Result, profile};
use std::time::{Duration, Instant};

mod pretend;

pub use pretend::Still;

/// Rows of a prompt that go through a model together.
const CHUNK: usize = 512;
/// Rounds that may be enqueued before their results are read.
const AHEAD: usize = 2;

/// A pair's weights on a device.
pub struct Models {
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
        let Some(model) = &pair.drafter else { return Ok(Models { target, vocabulary, drafter: None }) };
        let c = &model.config;
        loader.turn_to(&model.weights);
        let stack = Stack::load(loader, "", &c.stack, positions)?;
        let injection = Injection::load(loader, c.stack.hidden, c.taps.len())?;
        done("drafter weights");
        Ok(Models { target, vocabulary, drafter: Some((c.clone(), stack, injection)) })
    }

    fn taps(&self) -> &[usize] {
        self.drafter.as_ref().map_or(&[], |(config, ..)| &config.taps)
    }
}

/// What a round's kernels leave for each other, `rows` = sequences x block.
struct Work {
    states: Buffer,       // [sequences] Sequence
    drafting: Buffer,     // [sequences] Sequence: the settings that drafts are drawn with
    clock: Buffer,        // [2] u32
    live: Buffer,         // of clock
    draft_tokens: Buffer, // [rows] u32
    draft_rows: Buffer,   // [2][rows] Row
    pending: Buffer,      // [rows] u32
    draft_spans: Buffer,  // [sequences]
    verify_rows: Buffer,  // [rows] Row
    verify_spans: Buffer, // [sequences]
    drafts: Buffer,       // [rows] u32
    tokens: Buffer,       // [rows] u32
    choices: Buffer,      // [rows] u32
    features: Buffer,     // [rows][taps][hidden] bf16
    best: Buffer,         // [rows][blocks] u64
    logits: Buffer,       // [rows][vocab] f32
    tables: Buffer,       // the sampler's
    partial: Buffer,      // the sampler's
    counters: Buffer,     // [rows] u32
    accepted: Buffer,     // [sequences] u32
    next: Buffer,         // [sequences] u32
    path: Buffer,         // [rows] u32
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
    room: Room,
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
        room: Room,
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
    room: Room,
    cache: Cache,
    scratch: Scratch,
    draft: Option<(Cache, Scratch)>,
    work: Work,
    prompt: Prompt,
    ring: Ring,
    graphs: Vec<(Shape, Graph)>,
    free: Vec<u32>,
    slots: Vec<Slot>,
    /// Rounds enqueued, and those of them that were read, from 1 on.
    enqueued: u32,
    read: u32,
    /// Rows of a block in the round enqueued last.
    block: usize,
    watched: bool,
}

/// Which round: a graph each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The first so many slots take part.
    pub sequences: usize,
    /// Blocks of several rows; else plain steps.
    pub drafting: bool,
    /// With the sampler's races, and logits that can be read.
    pub sampled: bool,
    /// With drafts drawn by the noise of the target's tokens; needs the two above.
    pub coupled: bool,
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
    coupled: bool,
    /// As it is to be when the prompt is done.
    state: Option<Sequence>,
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

    fn sampled(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.sampling.temperature != 0.0)
    }
}

impl<'a> Batch<'a> {
    /// Room for the sequences, and their rounds, captured. A block of one row is plain decoding: no drafter runs.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little; else what the device says.
    pub fn new(device: &'a dyn Device, models: &'a Models, room: Room) -> Result<Batch<'a>> {
        let Room { sequences, block, pages, positions } = room;
        let (stack, vocabulary) = (&models.target.config, &models.vocabulary);
        let (rows, vocab, taps) = (sequences * block, vocabulary.vocab, models.taps().len());
        let sequence_pages = positions.div_ceil(PAGE);
        let cache = |config| Cache::new(device, config, pages, sequences, sequence_pages);
        let target_cache = cache(stack)?;
        let sizes = Sizes {
            sequences,
            block,
            chunk: CHUNK,
            injected: 0,
            head: Some(vocabulary.shape()),
            features: None,
        };
        let scratch = Scratch::new(device, stack, &target_cache, sizes)?;
        let draft = models.drafter.as_ref().filter(|_| block > 1).map(|(_, stack, _)| {
            let cache = cache(&stack.config)?;
            let sizes = Sizes { injected: rows, features: Some(taps * stack.config.hidden), ..sizes };
            let scratch = Scratch::new(device, &stack.config, &cache, sizes)?;
            Ok::<_, Error>((cache, scratch))
        });
        let sample = Sample { rows, vocab, blocks: vocabulary.shape().blocks(), sequences };
        let zeros = |bytes: usize, what| {
            let buffer = device.allocate(bytes, what)?;
            device.fill(&buffer, 0)?;
            Ok::<_, Error>(buffer)
        };
        let get = |bytes: usize| device.allocate(bytes.max(16), "a round's tables");
        let clock = zeros(8, "the round's number")?;
        let features = |rows: usize| zeros((rows * taps * stack.hidden * 2).max(16), "features");
        let tables = get(sample::tables().len())?;
        device.upload(&tables, &sample::tables())?;
        device.seal(&tables);
        let work = Work {
            states: zeros(sequences * Sequence::BYTES, "the state of sequences")?,
            drafting: zeros(sequences * Sequence::BYTES, "the settings of drafts")?,
            live: clock.slice(4, 4)?,
            clock,
            draft_tokens: get(rows * 4)?,
            draft_rows: get(2 * rows * Row::BYTES)?,
            pending: get(rows * 4)?,
            draft_spans: get(sequences * 8)?,
            verify_rows: get(rows * Row::BYTES)?,
            verify_spans: get(sequences * 8)?,
            drafts: zeros(rows * 4, "drafts")?,
            tokens: get(rows * 4)?,
            choices: get(rows * 4)?,
            features: features(rows)?,
            best: device.allocate(rows * sample.blocks * 8, "the best logits")?,
            logits: device.allocate(rows * vocab * 4, "logits")?,
            tables,
            partial: device.allocate(sample.workspace(), "partial races")?,
            counters: zeros(rows * 4, "counters of races")?,
            accepted: get(sequences * 4)?,
            next: get(sequences * 4)?,
            path: zeros(rows * 4, "paths")?,
        };
        let numbers: Vec<u8> = (0..CHUNK as u32).flat_map(u32::to_le_bytes).collect();
        let prompt = Prompt {
            tokens: get(CHUNK * 4)?,
            rows: get(CHUNK * Row::BYTES)?,
            span: get(8)?.slice(0, 8)?,
            features: features(CHUNK)?,
            gather: get(CHUNK * 4)?,
        };
        device.upload(&prompt.gather, &numbers)?;
        let ring = Ring::new(device, Round { sequences, block }, AHEAD + 1)?;
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
            block,
            watched: false,
        };
        for shape in batch.shapes() {
            let graph = batch.capture(shape)?;
            batch.graphs.push((shape, graph));
        }
        Ok(batch)
    }

    /// Every round there is: for 1, 2, 4... sequences and for all.
    fn shapes(&self) -> Vec<Shape> {
        let all = self.room.sequences;
        let counts = (0..).map(|i| 1 << i).take_while(|&count| count < all).chain([all]);
        let kinds = [(false, false), (false, true), (true, false), (true, true)];
        let shape = |sequences| {
            let plain =
                kinds.map(|(drafting, sampled)| Shape { sequences, drafting, sampled, coupled: false });
            let coupled = Shape { sequences, drafting: true, sampled: true, coupled: true };
            [coupled].into_iter().chain(plain)
        };
        counts.flat_map(shape).filter(|shape| !shape.drafting || self.draft.is_some()).collect()
    }

    fn round_of(&self, shape: Shape) -> Round {
        Round { sequences: shape.sequences, block: if shape.drafting { self.room.block } else { 1 } }
    }

    /// The round, top to bottom.
    fn launch(&self, shape: Shape) -> Result<()> {
        let (device, models, w) = (self.device, self.models, &self.work);
        let round = self.round_of(shape);
        let Round { sequences, block } = round;
        let (rows, vocabulary) = (sequences * block, &models.vocabulary);
        let tables = Tables {
            draft_tokens: &w.draft_tokens,
            draft_rows: &w.draft_rows,
            features: &w.pending,
            draft_spans: &w.draft_spans,
            verify_rows: &w.verify_rows,
            verify_spans: &w.verify_spans,
            clock: &w.clock,
        };
        let mask = models.drafter.as_ref().map_or(0, |(config, ..)| config.mask_token);
        round.begin(device, tables, &w.states, &w.path, block, mask)?;
        let sample = Sample { rows, vocab: vocabulary.vocab, blocks: vocabulary.shape().blocks(), sequences };
        let pass = Pass {
            sequences,
            block,
            injected: 0,
            table: &w.verify_rows,
            spans: &w.verify_spans,
            masks: None,
            prompt: None,
            live: Some(&w.live),
            taps: None,
        };
        let live = Some(&w.live);

        // Draft: what the last round left for the drafter, then the block.
        let drafting = shape.drafting;
        if let (true, Some((config, stack, injection)), Some((cache, s))) =
            (drafting, &models.drafter, &self.draft)
        {
            injection.run(device, s, rows, &w.features, &w.pending, false, live)?;
            vocabulary.embed(device, s, &w.draft_tokens, rows, config.embedding_scale)?;
            let pass = Pass { injected: rows, table: &w.draft_rows, spans: &w.draft_spans, ..pass };
            stack.run(device, s, cache, &pass)?;
            let head = Head {
                rows,
                vocab: vocabulary.vocab,
                k: stack.config.hidden,
                multiplier: config.output_multiplier,
                softcap: config.softcap,
            };
            // The target's logits take their place.
            let logits = shape.coupled.then_some(&w.logits);
            vocabulary.head(device, stack, s, rows, head, live, &w.best, logits)?;
            // A draft is chosen by the noise of its own position, but the sampler takes that of the one after: it gets
            // each row the row before. What the first of a block chooses is not looked at.
            let before = rows - usize::from(shape.coupled);
            let table = w.draft_rows.slice(before * Row::BYTES, rows * Row::BYTES)?;
            let races = shape.coupled.then(|| Races { sequences: &w.drafting, ..self.races() });
            sample.launch(device, &w.drafts, &w.best, &table, races)?;
        }

        // Verify.
        round.tokens(device, &w.tokens, &w.drafts, &w.states)?;
        vocabulary.embed(device, &self.scratch, &w.tokens, rows, 1.0)?;
        let taps = drafting.then_some((models.taps(), &w.features));
        models.target.run(device, &self.scratch, &self.cache, &Pass { taps, ..pass })?;
        self.head(0, rows, live, shape.sampled)?;
        sample.launch(device, &w.choices, &w.best, &w.verify_rows, shape.sampled.then(|| self.races()))?;
        let verdict = Verdict { accepted: &w.accepted, next: &w.next, path: &w.path };
        let verify = Verify { sequences, block };
        verify.launch(device, verdict, &w.choices, &w.tokens, None, &w.verify_spans)?;
        round.finish(device, &w.states, &self.ring, &w.clock, verdict, &w.tokens, None)
    }

    /// The target's head over rows `first..first + rows` of its scratch.
    fn head(&self, first: usize, rows: usize, live: Option<&Buffer>, keep: bool) -> Result<()> {
        let (target, vocabulary, w) = (&self.models.target, &self.models.vocabulary, &self.work);
        let (vocab, k) = (vocabulary.vocab, target.config.hidden);
        let head = Head { rows, vocab, k, multiplier: 1.0, softcap: None };
        let logits = keep.then_some(&w.logits);
        vocabulary.head(self.device, target, &self.scratch, first, head, live, &w.best, logits)
    }

    fn races(&self) -> Races<'_> {
        let w = &self.work;
        Races {
            logits: &w.logits,
            sequences: &w.states,
            tables: &w.tables,
            partial: &w.partial,
            counters: &w.counters,
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
        let end = self.context().min(pages.len() * PAGE);
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
            sampling: request.sampling.clone(),
            stop_ids,
            finish: Finish::Running,
            rounds: 0,
            drafted: 0,
            accepted: 0,
            rule: Rule::Match,
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
        let races = sampled.then(|| self.races());
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
            live: None,
            taps: drafting.then_some((models.taps(), &p.features)),
        };
        models.target.run(device, &self.scratch, &self.cache, &pass)?;
        if let (true, Some((_, stack, injection)), Some((cache, s))) =
            (drafting, &models.drafter, &self.draft)
        {
            injection.run(device, s, count, &p.features, &p.gather, true, None)?;
            put(&p.rows, &rows(false, 0..draft_end))?;
            stack.remember(device, s, cache, &p.rows, count)?;
            put(&p.rows, &rows(true, held..usize::MAX))?;
        }
        Ok(())
    }

    /// Enqueues a round of all sequences that run. At most two may be enqueued whose results nobody has read.
    fn enqueue(&mut self) -> Result<()> {
        let running = |slot: &Slot| matches!(slot.phase, Phase::Running { .. });
        let taking_part = || self.slots.iter().filter(|slot| running(slot));
        let highest = self.slots.iter().rposition(running).map_or(0, |slot| slot + 1);
        let drafting = taking_part().any(Slot::drafts);
        let coupled = taking_part().any(|slot| slot.coupled);
        let sampled = self.watched || coupled || taking_part().any(Slot::sampled);
        let fits = |shape: &Shape| {
            let kind = (shape.drafting, shape.sampled, shape.coupled);
            shape.sequences >= highest && kind == (drafting, sampled, coupled)
        };
        let Some((shape, graph)) = self.graphs.iter().find(|(shape, _)| fits(shape)) else {
            return Err(Error::Internal(format!("no round for {highest} sequences was captured")));
        };
        self.device.replay(graph)?;
        self.block = self.round_of(*shape).block;
        self.enqueued += 1;
        Ok(())
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

    /// The round of all slots, with drafts where there is a drafter.
    ///
    /// # Errors
    /// [`Error::Internal`] where there is none, which is a bug.
    pub fn largest(&self, sampled: bool) -> Result<&Graph> {
        let found = self.graphs.iter().rfind(|(shape, _)| shape.sampled == sampled);
        found.map(|(_, graph)| graph).ok_or_else(|| Error::Internal("no round was captured".into()))
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

    fn join(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        let Some(Slot { phase: Phase::Idle, .. }) = self.slots.get(slot) else {
            return Err(Error::Internal(format!("slot {slot} of {} is not free", self.slots.len())));
        };
        let (prompt, block, drafting) = (&request.prompt, request.block, &request.drafting);
        if block > 1 && drafting.rule != Rule::Match {
            return Err(Error::Unsupported(
                "only the device cpu judges drafts by other rules than match".into(),
            ));
        }
        if block > self.room.block {
            return Err(Error::Internal(format!("a block of {block} rows in rounds of {}", self.room.block)));
        }
        let positions = request.positions();
        let positions = positions.min(self.context());
        let pages = positions.div_ceil(PAGE);
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
        let Sampling { seed, stream, .. } = request.sampling;
        let draws = Sampling { seed, stream, ..drafting.sampling.clone() };
        let coupled = state.draft_end > 0 && draws.temperature != 0.0;
        let to = self.work.drafting.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        self.device.upload(&to, &Sequence { sampling: draws, ..waiting }.to_bytes()?)?;
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
        (own.tokens, own.prompt, own.coupled) = (prompt.clone(), prompt.len(), coupled);
        (own.state, own.phase) = (Some(state), Phase::Filling { at });
        Ok(Some(at))
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let _range = profile::range("prefill");
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
        let _range = profile::range("round");
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
                let Record { tokens, judged, .. } = self.record(self.read, slot)?;
                if tokens.is_empty() {
                    return Err(Error::Internal(format!(
                        "round {} emitted nothing for the sequence in slot {slot}",
                        self.read
                    )));
                }
                // All that was there before the round has its features in the drafter's pages now.
                let own = &mut self.slots[slot];
                let drafted = own.state.as_ref().map_or(0, |state| state.rows_at(own.held) - 1);
                if let Some(state) = &own.state
                    && state.draft_end > 0
                {
                    own.drafted = own.drafted.max(own.held.min(state.draft_end as usize));
                }
                own.held += tokens.len();
                own.tokens.extend(&tokens);
                *emitted = Emitted { tokens, judged: judged as usize, drafted };
            }
        }
        Ok(())
    }

    fn leave(&mut self, slot: usize, tokens: usize) -> Result<()> {
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
        let bytes = self.models.vocabulary.vocab * 4;
        let mut logits = vec![0; bytes];
        let from = self.work.logits.slice((slot * self.block + row) * bytes, bytes)?;
        self.device.download(&from, &mut logits)?;
        Ok(logits.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::emulator::Emulator;
    use crate::engine::{Flow, Listener, resume};
    use crate::weights::{DEMO_DRAFTER, DEMO_TARGET};

    struct Silent;

    impl Listener for Silent {
        fn token(&mut self, _: u32, _: bool) -> Result<Flow> {
            Ok(Flow::Continue)
        }
    }

    /// Otherwise drafting would change what plain steps wrote, and so the answers that follow.
    #[test]
    fn a_drafter_that_catches_up_leaves_the_targets_pages_alone() {
        let (device, pair) = (Emulator::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
        let models = Models::load(&device, &pair, 128).unwrap();
        let mut batch = Batch::new(&device, &models, Room::new(1, 16, 128)).unwrap();
        let request = |prompt: &[u32], block| {
            let sampling =
                Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
            Request {
                prompt: prompt.to_vec(),
                max_tokens: 3,
                sampling,
                stop_ids: vec![],
                block,
                drafting: Default::default(),
            }
        };
        let mut said: Vec<u32> = (0..66).map(|i| 300 + i).collect();
        said.extend(resume(&mut batch, &request(&said, 1), &mut Silent).unwrap().tokens);
        let held = batch.slots[0].held;
        assert_eq!((held, batch.slots[0].drafted), (68, 0));

        // Bits that no pass would write.
        let stack = &pair.target.config.stack;
        let (layers, row) = (stack.attention.len(), stack.head_dim * 2);
        let buffer = |batch: &Batch, layer: usize| batch.cache.keys[layer].clone();
        let pages = |batch: &Batch, layer| {
            let mut bytes = vec![0; buffer(batch, layer).bytes()];
            device.download(&buffer(batch, layer), &mut bytes).unwrap();
            bytes
        };
        let marked: Vec<Vec<u8>> =
            (0..layers).map(|i| pages(&batch, i).iter().map(|byte| byte ^ 1).collect()).collect();
        (0..layers).for_each(|i| device.upload(&buffer(&batch, i), &marked[i]).unwrap());
        said.push(7);
        assert_eq!(batch.join(0, &request(&said, 16), true), Ok(Some(0)));
        assert!(batch.prefill(0).unwrap().next.is_some());
        for (layer, marked) in marked.iter().enumerate() {
            let now = pages(&batch, layer);
            for (at, head) in (0..said.len()).flat_map(|at| (0..stack.kv_heads).map(move |head| (at, head))) {
                let page = batch.slots[0].pages[at / PAGE] as usize;
                let begin = ((page * stack.kv_heads + head) * PAGE + at % PAGE) * row;
                let kept = now[begin..begin + row] == marked[begin..begin + row];
                assert_eq!(kept, at < held, "layer {layer}, head {head}, position {at}");
            }
        }
    }
}
