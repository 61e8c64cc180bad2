//! Sequences that take turns on the CPU: the `cpu` device. What a round is, in the plainest form: the devices' rounds
//! (`rounds.rs`) emit what these do, but for the rounding of their kernels.

use crate::checkpoint::pair::Pair;
use crate::cpu::model::{Cache, Drafter, Target};
use crate::engine::generate::{Backend, Decoder, Emitted, Prefill, Request};
use crate::spec::draft_length::{Controller, DraftLengthPolicy, Fixed};
use crate::spec::sampling::{SamplingParams, judge, walk};
use crate::spec::tree::{self, Tree};
use crate::spec::verify::{self, Distribution, PhiloxStream, Siblings, SpecConfig, VerifyMethod};
use crate::{Error, Result};

/// Rows of a prompt that go through a model together.
const CHUNK: usize = 64;

// ---- the device ----

/// The `cpu` device: a pair in plain f32.
pub struct Cpu {
    target: Target,
    drafter: Option<Drafter>,
    slots: usize,
    context: usize,
    goal: DraftLengthPolicy,
}

impl Cpu {
    /// For `slots` sequences of up to `context` positions. Weights stay where the checkpoints have them.
    ///
    /// # Errors
    /// What is wrong with a tensor, by its name.
    pub fn load(pair: &Pair, slots: usize, context: usize) -> Result<Cpu> {
        let drafter = pair.drafter.as_ref().map(Drafter::load).transpose()?;
        Ok(Cpu {
            target: Target::load(&pair.target)?,
            drafter,
            slots,
            context,
            goal: DraftLengthPolicy::Full,
        })
    }

    /// As [`Sequences::adaptive`].
    pub fn adaptive(self, goal: DraftLengthPolicy) -> Cpu {
        Cpu { goal, ..self }
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn decoder(&self) -> Result<Box<dyn Decoder + '_>> {
        let drafter = self.drafter.as_ref();
        let sequences = Sequences::new(&self.target, drafter, self.slots, self.context);
        Ok(Box::new(sequences.adaptive(&self.goal)))
    }
}

// ---- a sequence ----

/// One sequence on the CPU: the target's cache, the drafter's, and what the next round starts from.
pub struct Sequence<'a> {
    target: &'a Target,
    drafter: Option<&'a Drafter>,
    /// Positions it may have.
    context: usize,
    /// What its rounds are as large as.
    goal: &'a DraftLengthPolicy,
    state: Option<State>,
}

struct State {
    prompt: Vec<u32>,
    block: usize,
    tokens: Vec<u32>,       // [s]: what the target's cache holds
    cache: Cache,           // target: positions 0..s
    context: Option<Cache>, // drafter: of positions 0..s the first; none before it was needed
    features: Vec<f32>, // [pending][taps * hidden]: the positions after them that the drafter has not seen
    drafting: bool, // the drafter follows: its context and the pending positions are 0..s; else autoregressive decoding
    anchor: Option<u32>, // the token at position s, on which the target has not been run; none before the prompt has
    sampling: SamplingParams,
    how: SpecConfig, // drafts are made and judged; seed and stream are the request's here too
    round: u32,      // of this request, from 1 on
    distributions: Vec<Distribution>, // [drafts]: what the drafts of this round were drawn from, by rules that ask for it
    logits: Vec<f32>,                 // [rows][vocab] of the last verification
    path: Vec<usize>,                 // the rows of it that stood, 0 first
    controller: Box<dyn Controller + Send>,
}

impl<'a> Sequence<'a> {
    /// A fresh sequence; without a drafter it decodes plainly.
    pub fn new(target: &'a Target, drafter: Option<&'a Drafter>) -> Sequence<'a> {
        let context = target.config.stack.max_positions;
        Sequence { target, drafter, context, goal: &DraftLengthPolicy::Full, state: None }
    }

    /// As [`Sequences::adaptive`].
    pub fn adaptive(self, goal: &'a DraftLengthPolicy) -> Sequence<'a> {
        Sequence { goal, ..self }
    }

    /// Positions that (target, drafter) hold, the drafter's pending ones counted: both equal the anchor's position
    /// after every round (dflash.md 4). None before the start; the drafter's is none in autoregressive decoding.
    pub fn lengths(&self) -> Option<(usize, Option<usize>)> {
        let state = self.state.as_ref()?;
        Some((state.cache.len(), self.drafter.filter(|_| state.drafting).map(|d| state.drafted(d))))
    }

    /// Brings the drafter's context up to date and drafts for a block of `rows`: `rows - 1` tokens, or none without a
    /// drafter.
    pub fn draft(&mut self, rows: usize) -> Result<Vec<u32>> {
        let (state, _) = started(&mut self.state)?;
        let SpecConfig { rule, sampling, .. } = state.how.clone();
        if rule == VerifyMethod::Match {
            return self.drafted(rows, |logits, position| sampling.choose(logits, position));
        }
        let distributions = self.drafted(rows, |logits, _| sampling.probabilities(logits))?;
        let (state, _) = started(&mut self.state)?;
        let drafts = verify::draw(&distributions, &mut state.dice());
        state.distributions = distributions;
        drafts.ok_or_else(|| Error::Internal("a distribution without tokens".into()))
    }

    /// As [`Sequence::draft`], but a tree of up to `most` rows: under the rule `match` the best that the block's drafts
    /// and their rivals make, else one of a fixed shape, drawn.
    pub fn draft_tree(&mut self, rows: usize, most: usize) -> Result<Tree> {
        let (state, anchor) = started(&mut self.state)?;
        let SpecConfig { rule, sampling, .. } = state.how.clone();
        if rule != VerifyMethod::Match {
            let mut distributions = self.drafted(rows, |logits, _| sampling.probabilities(logits))?;
            let (state, _) = started(&mut self.state)?;
            let tree = drawn(rule, anchor, most, &mut distributions, &mut state.dice());
            state.distributions = distributions;
            return tree.ok_or_else(|| Error::Internal("a distribution without tokens".into()));
        }
        let choices = self.drafted(rows, |logits, _| tree::choices(logits, most.saturating_sub(1)))?;
        let (_, anchor) = started(&mut self.state)?;
        Ok(Tree::best_first(anchor, &choices, most))
    }

    /// What `of` makes of the drafter's logits for each of a block's rows behind the anchor, and of their positions.
    fn drafted<T>(&mut self, rows: usize, of: impl Fn(&[f32], u32) -> Option<T>) -> Result<Vec<T>> {
        let (state, anchor) = started(&mut self.state)?;
        state.distributions.clear();
        let (Some(drafter), Some(context), true) = (self.drafter, &mut state.context, state.drafting) else {
            return Ok(Vec::new());
        };
        if rows < 2 {
            // Past the drafter's last position nothing is drafted any more, and nothing need be kept for it.
            if state.cache.len() + 1 >= drafter.config.stack.max_positions {
                (state.context, state.features, state.drafting) = (None, Vec::new(), false);
            }
            return Ok(Vec::new());
        }
        drafter.inject(&state.features, context);
        state.features.clear();
        let hidden = drafter.hidden(self.target, anchor, rows, context, |_, _| ());
        let mut logits = Vec::new();
        drafter.logits(self.target, &hidden[self.target.config.stack.hidden..], &mut logits);
        let rows = logits.chunks(self.target.config.vocab).zip(state.cache.len() as u32 + 1..);
        rows.map(|(logits, at)| of(logits, at).ok_or_else(|| damaged("drafter", at as usize))).collect()
    }

    /// Runs the target over the anchor and `drafts`, whoever made them, and appends to `out` those that it accepts and
    /// its own next token, the new anchor. Rules other than `match` only judge what [`Sequence::draft`] has drawn.
    pub fn verify(&mut self, drafts: &[u32], out: &mut Vec<u32>) -> Result<()> {
        let (_, anchor) = started(&mut self.state)?;
        self.verify_rows(&[&[anchor], drafts].concat(), None, out)
    }

    /// As [`Sequence::verify`], of a tree that begins with the anchor.
    pub fn verify_tree(&mut self, tree: &Tree, out: &mut Vec<u32>) -> Result<()> {
        self.verify_rows(&tree.tokens, Some(tree), out)
    }

    fn verify_rows(&mut self, block: &[u32], tree: Option<&Tree>, out: &mut Vec<u32>) -> Result<()> {
        let (state, _) = started(&mut self.state)?;
        let (target, s) = (self.target, state.cache.len());
        let vocab = target.config.vocab;
        let drafts = &block[1..];
        if state.how.rule != VerifyMethod::Match
            && tree.map_or(drafts.len(), Tree::deepest) != state.distributions.len()
        {
            return Err(Error::Internal("drafts without the distributions that they were drawn from".into()));
        }
        let mut dice = state.dice();
        // Until this round is judged, the cache holds what may not belong to the sequence.
        state.anchor = None;

        let taps = match (state.drafting, self.drafter) {
            (true, Some(drafter)) => &drafter.config.taps[..],
            _ => &[],
        };
        let mut features = Vec::new();
        let normed = target.run(block, tree, &mut state.cache, taps, &mut features, block.len());
        target.logits(&normed, &mut state.logits);
        let (sampling, logits) = (&state.sampling, &state.logits);
        let row = |row: usize| &logits[row * vocab..][..vocab];
        let choose = |at: usize| {
            let depth = tree.map_or(at, |tree| tree.depths[at] as usize);
            sampling.choose(row(at), (s + depth + 1) as u32)
        };
        let distribution = |at: usize| sampling.probabilities(row(at));
        let chain = |(accepted, next): (usize, u32)| ((0..=accepted).collect(), next);
        let verdict = match (tree, state.how.rule) {
            (Some(tree), VerifyMethod::Match) => walk(block, &tree.parents, choose),
            (Some(tree), VerifyMethod::Rejection) => {
                let siblings = Siblings::Distinct;
                verify::recursive(
                    block,
                    &tree.parents,
                    &state.distributions,
                    siblings,
                    distribution,
                    &mut dice,
                )
            }
            (Some(_), VerifyMethod::Block) => {
                verify::multi_draft_block_verify(block, &state.distributions, distribution, &mut dice)
            }
            (_, VerifyMethod::Rejection) if !drafts.is_empty() => {
                verify::rejection(drafts, &state.distributions, distribution, &mut dice).map(chain)
            }
            (_, VerifyMethod::Block) if !drafts.is_empty() => {
                verify::block(drafts, &state.distributions, distribution, &mut dice).map(chain)
            }
            // Where nothing was drafted, all rules decode plainly.
            _ => judge(drafts, choose).map(chain),
        };
        let (path, next) = verdict.ok_or_else(|| damaged("target", s + 1))?;
        state.round += 1;

        state.cache.keep(s, &path);
        let width = features.len() / block.len();
        path.iter().for_each(|row| state.features.extend_from_slice(&features[row * width..][..width]));
        state.tokens.extend(path.iter().map(|row| block[*row]));
        state.anchor = Some(next);
        out.extend(path[1..].iter().map(|row| block[*row]));
        out.push(next);
        state.path = path;
        Ok(())
    }

    /// Takes a request, of whose prompt the first tokens need not be run again where the sequence has them: how many.
    pub fn start(&mut self, request: &Request) -> Result<usize> {
        let (prompt, target) = (&request.prompt, self.target);
        let last = self.drafter.map_or(0, |drafter| drafter.config.stack.max_positions);
        let drafter = self.drafter.filter(|_| request.block > 1 && prompt.len() + 1 < last);
        let state = match &mut self.state {
            Some(state) => state,
            none => none.insert(State {
                prompt: Vec::new(),
                block: 1,
                tokens: Vec::new(),
                cache: Cache::new(&target.config.stack, 0)?,
                context: None,
                features: Vec::new(),
                drafting: false,
                anchor: None,
                sampling: request.sampling.clone(),
                how: request.drafting.clone(),
                round: 1,
                distributions: Vec::new(),
                logits: Vec::new(),
                path: Vec::new(),
                controller: Box::new(Fixed),
            }),
        };
        (state.drafting, state.anchor) = (drafter.is_some(), None);
        (state.sampling, state.block) = (request.sampling.clone(), request.block);
        let SamplingParams { seed, stream, .. } = request.sampling;
        let SpecConfig { sampling, .. } = request.drafting.clone();
        state.how = SpecConfig { sampling: SamplingParams { seed, stream, ..sampling }, ..request.drafting };
        (state.round, state.distributions) = (1, Vec::new());
        state.prompt.clone_from(prompt);
        let how = &state.how;
        // What was drawn must be verified whatever it is. How many siblings the shape of a drawn tree has depends on its
        // size, so that its rows say nothing of those of another.
        let drawn = how.rule != VerifyMethod::Match || how.sampling.temperature != 0.0;
        state.controller = match how.tree {
            Some(_) if how.rule != VerifyMethod::Match => Box::new(Fixed),
            tree => self.goal.controller(drawn && tree.is_none()),
        };
        if let (Some(drafter), None) = (drafter, &state.context) {
            state.context = Some(Cache::new(&drafter.config.stack, 0)?);
        }

        // The last token is run again, for its logits; a drafter that was left behind, by autoregressive decoding, needs the
        // features of all that it has not seen.
        let same = state.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let seen = drafter.map_or(usize::MAX, |drafter| state.drafted(drafter));
        let kept = same.min(seen).min(prompt.len().saturating_sub(1));
        state.crop(kept, self.drafter);
        let positions = request.positions();
        // A tree's rows take more room than the positions they stand for.
        let room = positions.min(target.config.stack.max_positions) + request.drafting.tree.unwrap_or(0);
        state.cache.grow(room)?;
        if let (Some(drafter), Some(context)) = (drafter, &mut state.context) {
            context.grow(positions.min(drafter.config.stack.max_positions))?;
            drafter.inject(&state.features, context);
        }
        state.features.clear();
        Ok(kept)
    }

    /// Runs the next part of the prompt.
    pub fn prefill(&mut self) -> Result<Prefill> {
        let (target, drafter) = (self.target, self.drafter);
        let Some(state) = self.state.as_mut().filter(|state| state.anchor.is_none()) else {
            return Err(Error::Internal("a prompt before the start of its sequence".into()));
        };
        let drafter = drafter.filter(|_| state.drafting);
        let (at, length) = (state.cache.len(), state.prompt.len());
        let end = length.min(at + CHUNK);
        let taps = drafter.map_or(&[][..], |d| &d.config.taps);
        let chunk = &state.prompt[at..end];
        let rows = usize::from(end == length);
        let normed = target.forward(chunk, &mut state.cache, taps, &mut state.features, rows);
        state.tokens.extend_from_slice(chunk);
        if let (Some(drafter), Some(context)) = (drafter, &mut state.context) {
            drafter.inject(&state.features, context);
            state.features.clear();
        }
        if end == length {
            target.logits(&normed, &mut state.logits);
            let first = state.sampling.choose(&state.logits, length as u32);
            state.anchor = Some(first.ok_or_else(|| damaged("target", length))?);
        }
        Ok(Prefill { done: end, next: state.anchor })
    }

    /// Rows of the next block, anchor included: as many as the request asks for, but a block ends where the drafter's
    /// positions do, and before the context's last one, whose token is never run.
    pub fn rows(&self) -> usize {
        let (at, block) = self.state.as_ref().map_or((0, 1), |state| (state.cache.len(), state.block));
        let last = self.drafter.map_or(0, |drafter| drafter.config.stack.max_positions);
        block.min(last.saturating_sub(at)).min((self.context - 1).saturating_sub(at)).max(1)
    }

    /// A round: appends to `out` what [`Sequence::verify`] does of the drafter's own drafts, and says how many they were.
    pub fn round(&mut self, out: &mut Vec<u32>) -> Result<usize> {
        let rows = self.rows();
        let tree = self.state.as_ref().and_then(|state| state.how.tree);
        let most = if rows < 2 { 0 } else { tree.unwrap_or(rows) - 1 };
        let (allowed, looks) =
            self.ask(|controller| (controller.drafts(most).min(most), controller.needs_draft_probs()))?;
        if allowed == 0 {
            self.draft(1)?;
            self.verify(&[], out)?;
            return Ok(0);
        }
        let drafts = if tree.is_some() {
            let mut tree = self.draft_tree(rows, allowed + 1)?;
            if looks {
                tree.truncate(self.ask(|controller| controller.truncate(&tree.costs[1..]))? + 1);
            }
            self.verify_tree(&tree, out)?;
            tree.rows() - 1
        } else {
            let drafts = self.draft_some(rows, allowed, looks)?;
            self.verify(&drafts, out)?;
            drafts.len()
        };
        let (state, _) = started(&mut self.state)?;
        // A whole block may have more rows than there are bits.
        let stood =
            state.path.iter().fold(0, |stood, row| stood | 1u64.checked_shl(*row as u32).unwrap_or(0));
        self.ask(|controller| controller.judged(drafts, stood))?;
        Ok(drafts)
    }

    /// The first `allowed` drafts for a block of `rows`, of which the controller then cuts some where it looks. The drafter
    /// sees the whole block, as in its training, however few of its drafts are asked for.
    fn draft_some(&mut self, rows: usize, allowed: usize, looks: bool) -> Result<Vec<u32>> {
        if !looks {
            let mut drafts = self.draft(rows)?;
            drafts.truncate(allowed);
            let (state, _) = started(&mut self.state)?;
            state.distributions.truncate(allowed);
            return Ok(drafts);
        }
        let mut drafts = self.drafted(rows, |logits, _| Some(*tree::choices(logits, 1)?.first()?))?;
        drafts.truncate(allowed);
        let mut cost = 0;
        let costs: Vec<u32> = drafts.iter().map(|draft| (cost += draft.cost, cost).1).collect();
        drafts.truncate(self.ask(|controller| controller.truncate(&costs))?);
        Ok(drafts.iter().map(|draft| draft.token).collect())
    }

    /// What the controller answers.
    fn ask<T>(&mut self, question: impl FnOnce(&mut dyn Controller) -> T) -> Result<T> {
        let (state, _) = started(&mut self.state)?;
        Ok(question(&mut *state.controller))
    }
}

impl State {
    /// The chances of this round.
    fn dice(&self) -> PhiloxStream {
        let SamplingParams { seed, stream, .. } = self.sampling;
        PhiloxStream { seed, stream, round: self.round, anchor: self.cache.len() as u32 }
    }

    /// Positions that the drafter holds or that wait for it.
    fn drafted(&self, drafter: &Drafter) -> usize {
        self.context.as_ref().map_or(0, |context| context.len() + self.features.len() / drafter.feature())
    }

    /// Forgets positions `len..`, in both models.
    fn crop(&mut self, len: usize, drafter: Option<&Drafter>) {
        self.tokens.truncate(len);
        self.cache.crop(len);
        if let (Some(drafter), Some(context)) = (drafter, &mut self.context) {
            context.crop(context.len().min(len));
            self.features.truncate((len - context.len()) * drafter.feature());
        }
    }
}

/// A tree of up to `most` rows that is drawn from `distributions`; those that it is not deep enough for are dropped.
fn drawn(
    rule: VerifyMethod,
    anchor: u32,
    most: usize,
    distributions: &mut Vec<Distribution>,
    dice: &mut PhiloxStream,
) -> Option<Tree> {
    if rule == VerifyMethod::Block {
        let (count, depth) = tree::chains(most, distributions.len());
        distributions.truncate(depth);
        let (tokens, parents) = verify::sample_chains(anchor, count, distributions, dice)?;
        return Some(Tree::drawn(&tokens, &parents));
    }
    let mut tree = tree::shape(most, distributions.len());
    distributions.truncate(tree.deepest());
    tree.tokens = verify::sample_tree(anchor, &tree.parents, distributions, Siblings::Distinct, dice)?;
    Some(tree)
}

/// The state and its anchor.
fn started(state: &mut Option<State>) -> Result<(&mut State, u32)> {
    let started = state.as_mut().and_then(|state| state.anchor.map(|anchor| (state, anchor)));
    started.ok_or_else(|| Error::Internal("a round before the start of its sequence".into()))
}

fn damaged(model: &str, position: usize) -> Error {
    Error::Model(format!(
        "the {model}'s logits for position {position} hold a NaN or infinity, or nothing but -inf: its weights or its \
         config are damaged"
    ))
}

/// Sequences that take turns on the CPU.
pub struct Sequences<'a> {
    all: Vec<Sequence<'a>>,
    running: Vec<bool>,
}

impl<'a> Sequences<'a> {
    /// `slots` fresh ones of up to `context` positions; without a drafter they decode plainly.
    pub fn new(
        target: &'a Target,
        drafter: Option<&'a Drafter>,
        slots: usize,
        context: usize,
    ) -> Sequences<'a> {
        let context = context.min(target.config.stack.max_positions);
        let sequence = || Sequence { target, drafter, context, goal: &DraftLengthPolicy::Full, state: None };
        Sequences { all: (0..slots).map(|_| sequence()).collect(), running: vec![false; slots] }
    }

    /// Rounds of requests that join from now on are as large as `goal` says, but for trees that are drawn at random, which
    /// are whole.
    pub fn adaptive(mut self, goal: &'a DraftLengthPolicy) -> Sequences<'a> {
        self.all = self.all.into_iter().map(|sequence| sequence.adaptive(goal)).collect();
        self
    }
}

impl Decoder for Sequences<'_> {
    fn vocab(&self) -> usize {
        self.all[0].target.config.vocab
    }

    fn context(&self) -> usize {
        self.all[0].context
    }

    fn slots(&self) -> usize {
        self.all.len()
    }

    fn join(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
        if !keep {
            self.all[slot].state = None;
        }
        self.all[slot].start(request).map(Some)
    }

    fn prefill(&mut self, slot: usize) -> Result<Prefill> {
        let prefill = self.all[slot].prefill()?;
        self.running[slot] = prefill.next.is_some();
        Ok(prefill)
    }

    fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
        for ((sequence, running), emitted) in self.all.iter_mut().zip(&self.running).zip(out) {
            *emitted = Emitted::default();
            if *running {
                emitted.drafted = sequence.round(&mut emitted.tokens)?;
                emitted.judged = emitted.tokens.len();
            }
        }
        Ok(())
    }

    fn leave(&mut self, slot: usize, _tokens: usize) -> Result<()> {
        self.running[slot] = false;
        Ok(())
    }

    fn watch(&mut self) {}

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        let vocab = self.vocab();
        let state = self.all[slot].state.as_ref();
        let row = state.and_then(|state| state.logits.chunks(vocab).nth(*state.path.get(row)?));
        row.map(<[f32]>::to_vec).ok_or_else(|| Error::Internal(format!("slot {slot} has no such logits")))
    }
}
