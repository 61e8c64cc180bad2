//! Rounds on a device: sequences in slots, their pages, one captured graph that is every round, results read from a ring.
//!
//! All that changes from round to round lives in device memory (`cuda/state.cuh`), so the host enqueues rounds without
//! knowing what came of the last one, and reads behind.

use crate::config::DrafterConfig;
use crate::device::{Buffer, Device, Graph};
use crate::engine::{Decoder, Flow, Request, Start};
use crate::kernels::head::Head;
use crate::kernels::round::{Finish, Record, Ring, Round, Sequence, Tables};
use crate::kernels::sample::{self, Races, Sample};
use crate::kernels::verify::{Verdict, Verify};
use crate::load::Loader;
use crate::model::{Cache, Injection, PAGE, Pass, Row, Scratch, Sizes, Stack, Vocabulary};
use crate::pair::Pair;
use crate::{Error, Result};
use std::time::{Duration, Instant};

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
    clock: Buffer,        // [2] u32
    live: Buffer,         // of clock
    draft_tokens: Buffer, // [rows] u32
    draft_rows: Buffer,   // [2][rows] Row
    block_rows: Buffer,   // of draft_rows
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

/// Sequences that run together on a device. Each has a slot and its own pages; none of it shows in what another emits.
pub struct Batch<'a> {
    device: &'a dyn Device,
    models: &'a Models,
    round: Round,
    cache: Cache,
    scratch: Scratch,
    draft: Option<(Cache, Scratch)>,
    work: Work,
    prompt: Prompt,
    ring: Ring,
    /// Without and with the sampler's races.
    graphs: Vec<Graph>,
    free: Vec<u32>,
    slots: Vec<Slot>,
    enqueued: u32,
}

#[derive(Default)]
struct Slot {
    pages: Vec<u32>,
    sampled: bool,
    taken: bool,
}

impl<'a> Batch<'a> {
    /// Room for `sequences` sequences in blocks of up to `block` rows (1: plain decoding, no drafter runs), with `pages`
    /// pages of 64 positions between them, of which each may have enough for `positions`. Captures the round.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little; else what the device says.
    pub fn new(
        device: &'a dyn Device,
        models: &'a Models,
        sequences: usize,
        block: usize,
        pages: usize,
        positions: usize,
    ) -> Result<Batch<'a>> {
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
        let draft_rows = get(2 * rows * Row::BYTES)?;
        let features = |rows: usize| {
            let buffer = device.allocate((rows * taps * stack.hidden * 2).max(16), "features")?;
            device.fill(&buffer, 0)?;
            Ok::<_, Error>(buffer)
        };
        let tables = get(sample::tables().len())?;
        device.upload(&tables, &sample::tables())?;
        device.seal(&tables);
        let work = Work {
            states: zeros(sequences * Sequence::BYTES, "the state of sequences")?,
            live: clock.slice(4, 4)?,
            clock,
            draft_tokens: get(rows * 4)?,
            block_rows: draft_rows.slice(rows * Row::BYTES, rows * Row::BYTES)?,
            draft_rows,
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
        let round = Round { sequences, block };
        let ring = Ring::new(device, round, AHEAD + 1)?;
        let mut batch = Batch {
            device,
            models,
            round,
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
        };
        for sampled in [false, true] {
            let graph = device.capture(&mut || batch.launch(sampled))?;
            batch.graphs.push(graph);
        }
        Ok(batch)
    }

    /// The round, top to bottom.
    fn launch(&self, sampled: bool) -> Result<()> {
        let (device, models, w) = (self.device, self.models, &self.work);
        let Round { sequences, block } = self.round;
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
        self.round.begin(device, tables, &w.states, &w.path, None, mask)?;
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
        if let (Some((config, stack, injection)), Some((cache, s))) = (&models.drafter, &self.draft) {
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
            vocabulary.head(device, stack, s, rows, head, live, &w.best, None)?;
            sample.launch(device, &w.drafts, &w.best, &w.block_rows, None)?;
        }

        // Verify.
        self.round.tokens(device, &w.tokens, &w.drafts, &w.states)?;
        vocabulary.embed(device, &self.scratch, &w.tokens, rows, 1.0)?;
        let taps = self.draft.as_ref().map(|_| (models.taps(), &w.features));
        models.target.run(device, &self.scratch, &self.cache, &Pass { taps, ..pass })?;
        self.head(0, rows, live, sampled)?;
        sample.launch(device, &w.choices, &w.best, &w.verify_rows, sampled.then(|| self.races()))?;
        let verdict = Verdict { accepted: &w.accepted, next: &w.next, path: &w.path };
        let verify = Verify { sequences, block };
        verify.launch(device, verdict, &w.choices, &w.tokens, None, &w.verify_spans)?;
        self.round.finish(device, &w.states, &self.ring, &w.clock, verdict, &w.tokens)
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

    /// Puts a request into a free slot: takes pages, runs the prompt, and returns the token that follows it, with which the
    /// sequence takes part in the rounds enqueued from now on. `limits` may leave the request's budget and stop ids to the
    /// device. `None`: `progress` did not want to go on, and the slot is free again.
    ///
    /// # Errors
    /// [`Error::Memory`] where there are too few free pages; [`Error::Model`] where the target's logits are damaged.
    pub fn join(
        &mut self,
        slot: usize,
        request: &Request,
        limits: Limits,
        progress: &mut dyn FnMut(usize) -> Flow,
    ) -> Result<Option<u32>> {
        let Some(Slot { taken: false, .. }) = self.slots.get(slot) else {
            return Err(Error::Internal(format!("slot {slot} of {} is not free", self.slots.len())));
        };
        let context = self.models.target.config.max_positions;
        let wanted = request.prompt.len().saturating_add(request.max_tokens).saturating_add(self.round.block);
        let pages = wanted.min(context).div_ceil(PAGE);
        if pages > self.free.len() || pages > self.cache.sequence_pages {
            return Err(Error::Memory(format!(
                "a sequence of {} positions needs {pages} pages of keys and values, but {} are free and one may have {}",
                wanted.min(context),
                self.free.len(),
                self.cache.sequence_pages
            )));
        }
        let taken = self.free.split_off(self.free.len() - pages);
        self.slots[slot] = Slot { pages: taken, sampled: request.sampling.temperature != 0.0, taken: true };
        let joined = self.fill(slot, request, limits, progress);
        if !matches!(joined, Ok(Some(_))) {
            self.leave(slot)?;
        }
        joined
    }

    fn fill(
        &self,
        slot: usize,
        request: &Request,
        limits: Limits,
        progress: &mut dyn FnMut(usize) -> Flow,
    ) -> Result<Option<u32>> {
        let (device, models) = (self.device, self.models);
        let (pages, prompt) = (&self.slots[slot].pages, &request.prompt);
        // What a sequence does not have it shall not reach.
        let mut row = pages.clone();
        row.resize(self.cache.sequence_pages, u32::MAX);
        let bytes: Vec<u8> = row.iter().flat_map(|page| page.to_le_bytes()).collect();
        for cache in [Some(&self.cache), self.draft.as_ref().map(|(cache, _)| cache)].into_iter().flatten() {
            device.upload(&cache.table.slice(slot * bytes.len(), bytes.len())?, &bytes)?;
        }
        let end = models.target.config.max_positions.min(pages.len() * PAGE);
        let draft_end = match (&models.drafter, request.block) {
            (Some((_, stack, _)), 2..) if self.draft.is_some() => stack.config.max_positions.min(end),
            _ => 0,
        };
        let mut state = Sequence {
            active: false,
            length: prompt.len() as u32,
            anchor: 0,
            pending: 0,
            budget: limits.budget,
            end: end as u32,
            draft_end: draft_end as u32,
            block: request.block as u32,
            sampling: request.sampling.clone(),
            stop_ids: limits.stop_ids,
            finish: Finish::Running,
            rounds: 0,
            drafted: 0,
            accepted: 0,
        };
        let at = self.work.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        device.upload(&at, &state.to_bytes()?)?;

        for (first, chunk) in prompt.chunks(CHUNK).enumerate().map(|(i, chunk)| (i * CHUNK, chunk)) {
            self.chunk(slot, first, chunk, draft_end)?;
            if progress(first + chunk.len()) != Flow::Continue {
                return Ok(None);
            }
        }

        // The row of the last token chooses what follows.
        let last = (prompt.len() - 1) % CHUNK;
        let sampled = self.slots[slot].sampled;
        self.head(last, 1, None, sampled)?;
        let vocabulary = &models.vocabulary;
        let sample = Sample {
            rows: 1,
            vocab: vocabulary.vocab,
            blocks: vocabulary.shape().blocks(),
            sequences: self.round.sequences,
        };
        let row = self.prompt.rows.slice(last * Row::BYTES, Row::BYTES)?;
        let races = sampled.then(|| self.races());
        sample.launch(device, &self.work.choices, &self.work.best, &row, races)?;
        let mut first = [0; 4];
        device.download(&self.work.choices.slice(0, 4)?, &mut first)?;
        let first = u32::from_le_bytes(first);
        if first == u32::MAX {
            return Err(damaged("target", prompt.len()));
        }
        (state.active, state.anchor) = (true, first);
        device.upload(&at, &state.to_bytes()?)?;
        Ok(Some(first))
    }

    /// Runs a chunk of a prompt through the target, and its features into the drafter's cache.
    fn chunk(&self, slot: usize, first: usize, tokens: &[u32], draft_end: usize) -> Result<()> {
        let (device, models, p) = (self.device, self.models, &self.prompt);
        let count = tokens.len();
        let row = |i: usize, query: bool, end: usize| {
            let at = (first + i) as u32;
            let there = first + i < end;
            Row {
                sequence: if there { slot as u32 } else { Row::NONE },
                position: at,
                slot: if there { at } else { Row::NONE },
                query: if query { i as u32 } else { Row::NONE },
            }
        };
        let rows = |query, end| (0..count).flat_map(|i| row(i, query, end).to_bytes()).collect::<Vec<u8>>();
        let put = |to: &Buffer, bytes: &[u8]| device.upload(&to.slice(0, bytes.len())?, bytes);
        put(&p.tokens, &tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>())?;
        put(&p.rows, &rows(true, usize::MAX))?;
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
            put(&p.rows, &rows(false, draft_end))?;
            stack.remember(device, s, cache, &p.rows, count)?;
            put(&p.rows, &rows(true, usize::MAX))?;
        }
        Ok(())
    }

    /// Takes the sequence in `slot` out of the rounds enqueued from now on and gives its pages back.
    ///
    /// # Errors
    /// What the device says.
    pub fn leave(&mut self, slot: usize) -> Result<()> {
        self.device.upload(&self.work.states.slice(slot * Sequence::BYTES, 4)?, &[0; 4])?;
        let slot = std::mem::take(&mut self.slots[slot]);
        self.free.extend(slot.pages);
        Ok(())
    }

    /// Enqueues a round and returns its number. At most two may be enqueued whose results nobody has read.
    ///
    /// # Errors
    /// What the device says.
    pub fn enqueue(&mut self) -> Result<u32> {
        let sampled = self.slots.iter().any(|slot| slot.sampled);
        self.device.replay(&self.graphs[usize::from(sampled)])?;
        self.enqueued += 1;
        Ok(self.enqueued)
    }

    /// What round `round` did for the sequence in `slot`; waits for it.
    ///
    /// # Errors
    /// [`Error::Model`] where the logits of the target or the drafter were damaged; what a kernel did wrong.
    pub fn record(&self, round: u32, slot: usize) -> Result<Record> {
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

    /// The launches of a round.
    pub fn graph(&self, sampled: bool) -> &Graph {
        &self.graphs[usize::from(sampled)]
    }

    /// Pages that no sequence has.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }
}

/// What the device ends a sequence by, besides its context.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Tokens it may emit after the one that follows the prompt.
    pub budget: u32,
    pub stop_ids: Vec<u32>,
}

fn damaged(model: &str, position: usize) -> Error {
    let place = if position > 0 { format!(" for position {position}") } else { String::new() };
    Error::Model(format!(
        "the {model}'s logits{place} hold a NaN or infinity, or nothing but -inf: its weights or its config are damaged"
    ))
}

/// A batch of one, as the engine's loop wants it. Which tokens count is that loop's business: the device goes on.
pub struct Single<'a> {
    batch: Batch<'a>,
    /// The oldest round on its way.
    first: u32,
    running: bool,
}

impl<'a> Single<'a> {
    /// For blocks of up to `block` rows and sequences of up to `positions` positions.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn new(
        device: &'a dyn Device,
        models: &'a Models,
        block: usize,
        positions: usize,
    ) -> Result<Single<'a>> {
        let batch = Batch::new(device, models, 1, block, positions.div_ceil(PAGE), positions)?;
        Ok(Single { batch, first: 0, running: false })
    }

    fn stop(&mut self) -> Result<()> {
        if std::mem::take(&mut self.running) {
            self.batch.leave(0)?;
            self.batch.device.synchronize()?;
        }
        Ok(())
    }
}

impl Decoder for Single<'_> {
    fn vocab(&self) -> usize {
        self.batch.models.vocabulary.vocab
    }

    fn context(&self) -> usize {
        self.batch.models.target.config.max_positions
    }

    fn rows_at(&self, position: usize) -> usize {
        let end = self.batch.models.drafter.as_ref().map_or(0, |(_, stack, _)| stack.config.max_positions);
        end.saturating_sub(position).max(1)
    }

    fn start(&mut self, request: &Request, progress: &mut dyn FnMut(usize) -> Flow) -> Result<Start> {
        self.stop()?;
        let limits = Limits { budget: u32::MAX, stop_ids: vec![] };
        let next = self.batch.join(0, request, limits, progress)?;
        self.running = next.is_some();
        if self.running {
            self.first = self.batch.enqueue()?;
        }
        Ok(Start { kept: 0, next })
    }

    fn round(&mut self, _rows: usize, out: &mut Vec<u32>) -> Result<()> {
        if !self.running {
            return Err(Error::Internal("a round before the start of its sequence".into()));
        }
        // The next round is on its way before this one is read.
        self.batch.enqueue()?;
        let record = self.batch.record(self.first, 0)?;
        self.first += 1;
        out.extend(record.tokens);
        Ok(())
    }
}
