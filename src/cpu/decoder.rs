//! The `cpu` device. It runs the sequences of a batch one after the other, and each round in its simplest
//! form. The rounds of other devices ([`crate::gpu::decoder`]) emit the same tokens, up to the rounding of
//! their kernels.

use crate::checkpoint::pair::{DraftSource, Lookup, Pair};
use crate::cpu::model::{Cache, ChainDraft, Drafter, Target};
use crate::engine::decoder::{Backend, Decoder, Emitted, Prefill};
use crate::engine::request::Request;
use crate::perf::roofline::Card;
use crate::spec::config::SpecConfig;
use crate::spec::distribution::Distribution;
use crate::spec::draft_length::{Controller, Costs, Fixed};
use crate::spec::lookup;
use crate::spec::rng::PhiloxStream;
use crate::spec::sampling::{SamplingParams, argmax};
use crate::spec::tree::{self, Tree};
use crate::spec::verify::{self, Siblings};
use crate::{Error, Result};

/// Maximum rows of a prefill chunk.
const CHUNK: usize = 64;

/// The CPU that the cost model assumes: a few cores of a server. It is the same on every machine, so that
/// draft lengths are reproducible.
const ASSUMED_CPU: Card = Card { name: "cpu", bandwidth: 20.0, tflops: 0.1, memory: f64::INFINITY };

// ---- the device ----

/// The `cpu` device: a pair in plain f32.
pub struct Cpu {
    target: Target,
    draft: DraftSource<Drafter>,
    slots: usize,
    context: usize,
}

impl Cpu {
    /// Loads the pair for `slots` sequences of up to `context` positions. The matrices stay in the mapped
    /// checkpoints.
    ///
    /// # Errors
    /// As [`Target::load`].
    pub fn load(pair: &Pair, slots: usize, context: usize) -> Result<Cpu> {
        let draft = pair.draft.as_ref().try_map(Drafter::load)?;
        Ok(Cpu { target: Target::load(&pair.target)?, draft, slots, context })
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn decoder(&self) -> Result<Box<dyn Decoder + '_>> {
        let sequences = Sequences::new(&self.target, self.draft.drafter(), self.slots, self.context);
        Ok(Box::new(sequences.with_lookup(self.draft.lookup())))
    }
}

// ---- a sequence ----

/// One sequence on the CPU: the target's cache, the drafter's cache, and the state between rounds.
pub struct Sequence<'a> {
    target: &'a Target,
    drafter: Option<&'a Drafter>,
    /// Drafts without a drafter.
    lookup: Option<Lookup>,
    /// Maximum positions.
    context: usize,
    /// Costs of its rounds; `None` without a drafter.
    costs: Option<Costs>,
    state: Option<State>,
}

struct State {
    prompt: Vec<u32>,
    block: usize,
    tokens: Vec<u32>,       // [s]: tokens in the target's cache
    cache: Cache,           // target: positions 0..s
    context: Option<Cache>, // drafter: a prefix of positions 0..s; None until the first request that drafts
    features: Vec<f32>,     // [pending][taps * hidden]: the positions after that prefix, not yet injected
    drafting: bool, // the request drafts: prefix and pending positions together are 0..s; else AR decoding
    anchor: Option<u32>, // the token at position s, not run yet; None until the prompt is done
    sampling: SamplingParams,
    spec: SpecConfig,
    draft_sampling: SamplingParams, // how drafts are sampled, with the request's seed and stream
    round: u32,                     // of this request, from 1 on
    distributions: Vec<Distribution>, // [depth]: the distributions that this round's drafts were sampled from
    logits: Vec<f32>,               // [rows][vocab] of the last verification
    path: Vec<usize>,               // accepted rows of the last verification, 0 first
    controller: Box<dyn Controller + Send>,
}

impl<'a> Sequence<'a> {
    /// An empty sequence. Without a drafter it decodes autoregressively.
    pub fn new(target: &'a Target, drafter: Option<&'a Drafter>) -> Sequence<'a> {
        let context = target.config.stack.max_positions;
        let costs = drafter.map(|drafter| {
            Costs::from_roofline(&ASSUMED_CPU, &target.config, &drafter.config, 0, 1, drafter.config.block)
        });
        Sequence { target, drafter, lookup: None, context, costs, state: None }
    }

    /// Replaces the modelled costs of rounds.
    pub fn with_costs(self, costs: Costs) -> Sequence<'a> {
        Sequence { costs: Some(costs), ..self }
    }

    /// Cached positions of (target, drafter), where the drafter's include pending features. Both equal the
    /// anchor's position after every round (docs/dflash.md 4). `None` before the start. The drafter's are
    /// `None` in autoregressive decoding.
    pub fn lengths(&self) -> Option<(usize, Option<usize>)> {
        let state = self.state.as_ref()?;
        let drafter = self.drafter.filter(|_| state.drafting);
        Some((state.cache.len(), drafter.map(|drafter| state.drafter_positions(drafter))))
    }

    /// The target's logits `[vocab]` that the last verification chose its token `row` from, counted from 0.
    pub fn logits(&self, row: usize) -> Option<&[f32]> {
        let state = self.state.as_ref()?;
        state.logits.chunks(self.target.config.vocab).nth(*state.path.get(row)?)
    }

    /// Injects the pending features and drafts a chain for a round of `rows` rows: `rows - 1` tokens, or none
    /// without a drafter.
    ///
    /// # Errors
    /// [`Error::Model`] if the drafter's logits are not finite.
    pub fn draft(&mut self, rows: usize) -> Result<Vec<u32>> {
        let (state, anchor) = started(&mut self.state)?;
        if let Some(lookup) = self.lookup {
            let text = [&state.tokens[..], &[anchor]].concat();
            let drafts = lookup::drafts(lookup, &text, rows - 1);
            state.distributions = drafts.iter().map(|draft| Distribution::certain(*draft)).collect();
            return Ok(drafts);
        }
        let sampling = state.draft_sampling.clone();
        match state.spec {
            // Greedy parameters give the drafter's best token. Others give a coupled draft: the token that
            // the target's noise at this position selects.
            SpecConfig::Exact { .. } => self.map_draft_logits(rows, |logits, position| {
                let token = sampling.choose(logits, position)?;
                Some((token, token))
            }),
            // After a walk, the distribution of a row is that given the drafts sampled before it.
            SpecConfig::Rejection { .. } | SpecConfig::Block { .. } => {
                let (mut random, mut depth) = (state.random(), 0);
                let sampled = self.map_draft_logits(rows, |logits, _| {
                    let distribution = sampling.probabilities(logits)?;
                    depth += 1;
                    let token = verify::sample_draft(depth, &distribution, &mut random)?;
                    Some(((token, distribution), token))
                })?;
                let (state, _) = started(&mut self.state)?;
                let drafts;
                (drafts, state.distributions) = sampled.into_iter().unzip();
                Ok(drafts)
            }
        }
    }

    /// As [`Sequence::draft`], but drafts a tree of up to `max` rows: the best-first tree for exact
    /// verification, a tree of fixed shape with sampled tokens for the other methods.
    ///
    /// # Errors
    /// As [`Sequence::draft`].
    pub fn draft_tree(&mut self, rows: usize, max: usize) -> Result<Tree> {
        let (state, anchor) = started(&mut self.state)?;
        let sampling = state.draft_sampling.clone();
        if let SpecConfig::Exact { .. } = state.spec {
            let at = state.cache.len() + 1;
            if rows > 1
                && max > 1
                && let Some(tree) = self.with_chain(|chain| chain.tree(anchor, max, rows - 1, None))?
            {
                return tree.ok_or_else(|| invalid_logits("drafter", at));
            }
            let choices = self.map_draft_logits(rows, |logits, _| {
                let choices = tree::choices(logits, max.saturating_sub(1).max(1))?;
                let best = choices.first()?.token;
                Some((choices, best))
            })?;
            return Ok(Tree::best_first(anchor, &choices, max));
        }
        let mut distributions = self
            .map_draft_logits(rows, |logits, _| Some((sampling.probabilities(logits)?, argmax(logits)?)))?;
        let (state, _) = started(&mut self.state)?;
        let random = &mut state.random();
        let tree = match state.spec {
            SpecConfig::Block { .. } => {
                let (count, depth) = tree::chains(max, distributions.len());
                distributions.truncate(depth);
                let chains = verify::sample_chains(anchor, count, &distributions, random);
                chains.map(|(tokens, parents)| Tree::sampled(&tokens, &parents))
            }
            _ => {
                let shape = tree::shape(max, distributions.len());
                // The shape may be less deep than the block.
                distributions.truncate(shape.deepest());
                let siblings = Siblings::Distinct;
                let tokens = verify::sample_tree(anchor, &shape.parents, &distributions, siblings, random);
                tokens.map(|tokens| Tree { tokens, ..shape })
            }
        };
        state.distributions = distributions;
        tree.ok_or_else(empty_distribution)
    }

    /// What `draft` makes of the chain of this round; `None` if the drafter, if there is one, has no chain.
    fn with_chain<T>(&mut self, draft: impl FnOnce(ChainDraft) -> T) -> Result<Option<T>> {
        let (state, _) = started(&mut self.state)?;
        let (Some(drafter), Some(context), true) = (self.drafter, &mut state.context, state.drafting) else {
            return Ok(None);
        };
        if drafter.config.chain().is_none() {
            return Ok(None);
        }
        drafter.absorb(self.target, &state.tokens, &mut state.features, context);
        let drafts = drafter.chain(self.target, &state.features, context).map(draft);
        // The pairs of drafts have features that the drafter guessed.
        context.crop(state.cache.len());
        state.features.clear();
        Ok(drafts)
    }

    /// Runs the drafter for a round of `rows` rows. Calls `map` with the logits and the position of each
    /// draft, in order. It returns the result of the row and the token that a walk follows: the draft, or in
    /// a tree the best token, so that the distribution of a depth is the same for all its rows. Ends before
    /// the first draft whose confidence is too low.
    fn map_draft_logits<T>(
        &mut self,
        rows: usize,
        mut map: impl FnMut(&[f32], u32) -> Option<(T, u32)>,
    ) -> Result<Vec<T>> {
        let (state, anchor) = started(&mut self.state)?;
        state.distributions.clear();
        let (Some(drafter), Some(context), true) = (self.drafter, &mut state.context, state.drafting) else {
            return Ok(Vec::new());
        };
        if rows < 2 {
            // No drafts follow the drafter's last position, so its context is dropped there.
            if state.cache.len() + 1 >= drafter.config.stack.max_positions {
                (state.context, state.features, state.drafting) = (None, Vec::new(), false);
            }
            return Ok(Vec::new());
        }
        let mut map =
            |logits: &[f32], at: u32| map(logits, at).ok_or_else(|| invalid_logits("drafter", at as usize));
        let positions = (state.cache.len() as u32 + 1..).take(rows - 1);
        if drafter.config.chain().is_some() {
            let drafts = self.with_chain(|mut chain| {
                let (mut logits, mut previous) = (Vec::new(), anchor);
                let draft = |at| {
                    chain.step(previous, &mut logits);
                    let mapped;
                    (mapped, previous) = map(&logits, at)?;
                    Ok(mapped)
                };
                positions.map(draft).collect::<Result<_>>()
            })?;
            return drafts.unwrap_or(Ok(Vec::new()));
        }
        drafter.absorb(self.target, &state.tokens, &mut state.features, context);
        let least = state.spec.draft_length().min_confidence();
        let hidden = drafter.predict(self.target, anchor, rows - 1, context);
        let mut logits = Vec::new();
        drafter.logits(self.target, &hidden, &mut logits);
        let (mut walk, mut previous) = (drafter.walk(anchor), anchor);
        let width = drafter.config.stack.hidden;
        let rows = logits.chunks_mut(self.target.config.vocab).zip(hidden.chunks(width));
        let mut drafts = Vec::new();
        for ((logits, hidden), at) in rows.zip(positions) {
            if let Some(walk) = &mut walk {
                if walk.confidence(hidden).zip(least).is_some_and(|(confidence, least)| confidence < least) {
                    break;
                }
                drafter.add_bias(&walk.bias(hidden), logits);
            }
            drafter.select(previous, hidden, logits);
            let (mapped, token) = map(logits, at)?;
            walk.iter_mut().for_each(|walk| walk.follow(token));
            previous = token;
            drafts.push(mapped);
        }
        Ok(drafts)
    }

    /// Runs the target over the anchor and a chain of `drafts`. Appends the accepted drafts and the target's
    /// next token to `out`; that token becomes the anchor. Exact verification takes any drafts. The other
    /// methods take only those of the last [`Sequence::draft`].
    ///
    /// # Errors
    /// [`Error::Model`] if the target's logits are not finite. [`Error::Internal`] if the distributions that
    /// the drafts were sampled from are not known.
    pub fn verify(&mut self, drafts: &[u32], out: &mut Vec<u32>) -> Result<()> {
        let (_, anchor) = started(&mut self.state)?;
        self.verify_rows(&[&[anchor], drafts].concat(), None, out)
    }

    /// As [`Sequence::verify`], for a tree whose row 0 is the anchor.
    ///
    /// # Errors
    /// As [`Sequence::verify`].
    pub fn verify_tree(&mut self, tree: &Tree, out: &mut Vec<u32>) -> Result<()> {
        self.verify_rows(&tree.tokens, Some(tree), out)
    }

    fn verify_rows(&mut self, block: &[u32], tree: Option<&Tree>, out: &mut Vec<u32>) -> Result<()> {
        let (state, _) = started(&mut self.state)?;
        let (target, s) = (self.target, state.cache.len());
        let vocab = target.config.vocab;
        let drafts = &block[1..];
        let exact = matches!(state.spec, SpecConfig::Exact { .. });
        if !exact && tree.map_or(drafts.len(), Tree::deepest) != state.distributions.len() {
            return Err(Error::Internal(
                "drafts without the distributions that they were sampled from".into(),
            ));
        }
        let mut random = state.random();
        // The cache holds unverified tokens until the end of this function, so an error must end the
        // sequence.
        state.anchor = None;

        let taps = match (state.drafting, self.drafter) {
            (true, Some(drafter)) => &drafter.config.taps[..],
            _ => &[],
        };
        let mut features = Vec::new();
        let normed = match tree {
            Some(tree) => target.forward_tree(tree, &mut state.cache, taps, &mut features),
            None => target.forward(block, &mut state.cache, taps, &mut features, block.len()),
        };
        target.logits(&normed, &mut state.logits);
        let (sampling, logits, q) = (&state.sampling, &state.logits, &state.distributions);
        let row = |row: usize| &logits[row * vocab..][..vocab];
        let choose = |at: usize| {
            let depth = tree.map_or(at, |tree| tree.depths[at] as usize);
            sampling.choose(row(at), (s + depth + 1) as u32)
        };
        let p = |at: usize| sampling.probabilities(row(at));
        let chain = |(accepted, next): (usize, u32)| ((0..=accepted).collect(), next);
        let verified = match (&state.spec, tree) {
            (SpecConfig::Exact { .. }, Some(tree)) => verify::match_tree(block, &tree.parents, choose),
            (SpecConfig::Rejection { .. }, Some(tree)) => {
                let siblings = Siblings::Distinct;
                verify::recursive_rejection(block, &tree.parents, q, siblings, p, &mut random)
            }
            (SpecConfig::Block { .. }, Some(_)) => verify::multi_draft_block_verify(block, q, p, &mut random),
            (SpecConfig::Rejection { .. }, None) if !drafts.is_empty() => {
                verify::rejection(drafts, q, p, &mut random).map(chain)
            }
            (SpecConfig::Block { .. }, None) if !drafts.is_empty() => {
                verify::block_verify(drafts, q, p, &mut random).map(chain)
            }
            // A round without drafts is an AR step for every method.
            (_, None) => verify::match_chain(drafts, choose).map(chain),
        };
        let (path, next) = verified.ok_or_else(|| invalid_logits("target", s + 1))?;
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

    /// Starts a request. Returns the number of its first prompt tokens that are still cached and need not
    /// run.
    ///
    /// # Errors
    /// [`Error::Memory`] if its caches do not fit.
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
                spec: request.spec.clone(),
                draft_sampling: SamplingParams::default(),
                round: 1,
                distributions: Vec::new(),
                logits: Vec::new(),
                path: Vec::new(),
                controller: Box::new(Fixed),
            }),
        };
        (state.drafting, state.anchor) = (drafter.is_some(), None);
        (state.sampling, state.block) = (request.sampling.clone(), request.block);
        (state.spec, state.draft_sampling) =
            (request.spec.clone(), request.spec.draft_params(&request.sampling));
        (state.round, state.distributions) = (1, Vec::new());
        state.prompt.clone_from(prompt);
        // No sampled draft may be dropped because of its token, so their number is fixed before they are
        // sampled.
        state.controller = match &self.costs {
            Some(costs) => request.spec.draft_length().controller(costs, request.spec.samples_drafts()),
            None => Box::new(Fixed),
        };
        if let (Some(drafter), None) = (drafter, &state.context) {
            state.context = Some(Cache::new(&drafter.config.stack, 0)?);
        }

        // The last token always runs, for its logits. After autoregressive decoding the drafter's context may
        // be shorter than the target's cache; the missing positions run again, for their features.
        let mut common = state.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        if drafter.is_some_and(|drafter| drafter.config.chain().is_some()) {
            // The last common position's pair may hold another token after it.
            common = common.saturating_sub(1);
        }
        let drafted = drafter.map_or(usize::MAX, |drafter| state.drafter_positions(drafter));
        let kept = common.min(drafted).min(prompt.len().saturating_sub(1));
        let kept = state.cache.longest_crop(kept);
        state.crop(kept, self.drafter);
        let positions = request.positions();
        // The rows of a tree are stored one after the other, so they need more room than their positions.
        let capacity =
            positions.min(target.config.stack.max_positions) + request.spec.tree_rows().unwrap_or(0);
        state.cache.grow(capacity)?;
        if let (Some(drafter), Some(context)) = (drafter, &mut state.context) {
            let beam =
                drafter.config.chain().and(request.spec.tree_rows()).map_or(0, |_| ChainDraft::TREE_ROOM);
            context.grow(positions.min(drafter.config.stack.max_positions) + beam)?;
            drafter.absorb(target, &state.tokens, &mut state.features, context);
        } else {
            state.features.clear();
        }
        Ok(kept)
    }

    /// Runs the next chunk of the prompt.
    ///
    /// # Errors
    /// [`Error::Model`] if the target's logits are not finite.
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
            drafter.absorb(target, &state.tokens, &mut state.features, context);
        }
        if end == length {
            target.logits(&normed, &mut state.logits);
            let first = state.sampling.choose(&state.logits, length as u32);
            state.anchor = Some(first.ok_or_else(|| invalid_logits("target", length))?);
        }
        Ok(Prefill { done: end, next: state.anchor })
    }

    /// Rows of the next block, anchor included: as many as the request asks for. A block ends at the
    /// drafter's last position, and before the last position of the context, because its token is never run.
    pub fn rows(&self) -> usize {
        let (at, block) = self.state.as_ref().map_or((0, 1), |state| (state.cache.len(), state.block));
        let without = if self.lookup.is_some() { usize::MAX } else { 0 };
        let last = self.drafter.map_or(without, |drafter| drafter.config.stack.max_positions);
        block.min(last.saturating_sub(at)).min(self.context.saturating_sub(at + 1)).max(1)
    }

    /// Runs a round: drafts, verifies, and appends to `out` as [`Sequence::verify`] does. Returns the number
    /// of drafts.
    ///
    /// # Errors
    /// As [`Sequence::draft`] and [`Sequence::verify`].
    pub fn round(&mut self, out: &mut Vec<u32>) -> Result<usize> {
        let rows = self.rows();
        let tree = self.state.as_ref().and_then(|state| state.spec.tree_rows());
        let max = if rows < 2 { 0 } else { tree.unwrap_or(rows) - 1 };
        let (allowed, truncates) = self.with_controller(|controller| {
            (controller.drafts(max).min(max), controller.needs_draft_probs())
        })?;
        if allowed == 0 {
            self.draft(1)?;
            self.verify(&[], out)?;
            return Ok(0);
        }
        let drafts = if tree.is_some() {
            let mut tree = self.draft_tree(rows, allowed + 1)?;
            if truncates {
                tree.truncate(self.with_controller(|controller| controller.truncate(&tree.costs[1..]))? + 1);
            }
            self.verify_tree(&tree, out)?;
            tree.rows() - 1
        } else {
            let drafts = self.draft_up_to(rows, allowed, truncates)?;
            self.verify(&drafts, out)?;
            drafts.len()
        };
        let (state, _) = started(&mut self.state)?;
        // Rows from 64 on have no bit.
        let bit = |row: &usize| 1u64.checked_shl(*row as u32).unwrap_or(0);
        let accepted = state.path.iter().fold(0, |bits, row| bits | bit(row));
        self.with_controller(|controller| controller.observe(drafts, accepted))?;
        Ok(drafts)
    }

    /// Drafts a chain with a block of `rows` rows and keeps the first `allowed` drafts; the controller may
    /// truncate them further. The drafter always runs the whole block, as in its training.
    fn draft_up_to(&mut self, rows: usize, allowed: usize, truncates: bool) -> Result<Vec<u32>> {
        if !truncates {
            let mut drafts = self.draft(rows)?;
            drafts.truncate(allowed);
            let (state, _) = started(&mut self.state)?;
            state.distributions.truncate(allowed);
            return Ok(drafts);
        }
        let mut drafts = self.map_draft_logits(rows, |logits, _| {
            let best = *tree::choices(logits, 1)?.first()?;
            Some((best, best.token))
        })?;
        drafts.truncate(allowed);
        let mut cost = 0;
        let costs: Vec<u32> = drafts.iter().map(|draft| (cost += draft.cost, cost).1).collect();
        drafts.truncate(self.with_controller(|controller| controller.truncate(&costs))?);
        Ok(drafts.iter().map(|draft| draft.token).collect())
    }

    /// Calls `f` with the sequence's controller.
    fn with_controller<T>(&mut self, f: impl FnOnce(&mut dyn Controller) -> T) -> Result<T> {
        let (state, _) = started(&mut self.state)?;
        Ok(f(&mut *state.controller))
    }
}

impl State {
    /// The random draws of this round.
    fn random(&self) -> PhiloxStream {
        let SamplingParams { seed, stream, .. } = self.sampling;
        PhiloxStream { seed, stream, round: self.round, anchor: self.cache.len() as u32 }
    }

    /// Positions in the drafter's cache and of pending features.
    fn drafter_positions(&self, drafter: &Drafter) -> usize {
        self.context.as_ref().map_or(0, |context| context.len() + self.features.len() / drafter.feature_len())
    }

    /// Drops positions `len..` in both models.
    fn crop(&mut self, len: usize, drafter: Option<&Drafter>) {
        self.tokens.truncate(len);
        self.cache.crop(len);
        if let (Some(drafter), Some(context)) = (drafter, &mut self.context) {
            context.crop(context.len().min(len));
            self.features.truncate((len - context.len()) * drafter.feature_len());
        }
    }
}

/// The state and its anchor; an error before the prompt is done.
fn started(state: &mut Option<State>) -> Result<(&mut State, u32)> {
    let started = state.as_mut().and_then(|state| state.anchor.map(|anchor| (state, anchor)));
    started.ok_or_else(|| Error::Internal("a round before the start of its sequence".into()))
}

fn empty_distribution() -> Error {
    Error::Internal("a distribution without tokens".into())
}

fn invalid_logits(model: &str, position: usize) -> Error {
    Error::Model(format!(
        "the {model}'s logits for position {position} hold a NaN or infinity, or nothing but -inf: its weights or its \
         config are damaged"
    ))
}

// ---- sequences in slots ----

/// The CPU's decoder: the sequences in its slots run one after the other.
pub struct Sequences<'a> {
    all: Vec<Sequence<'a>>,
    running: Vec<bool>,
}

impl<'a> Sequences<'a> {
    /// `slots` empty sequences of up to `context` positions. Without a drafter they decode autoregressively.
    pub fn new(
        target: &'a Target,
        drafter: Option<&'a Drafter>,
        slots: usize,
        context: usize,
    ) -> Sequences<'a> {
        let context = context.min(target.config.stack.max_positions);
        let empty = |_| Sequence { context, ..Sequence::new(target, drafter) };
        Sequences { all: (0..slots).map(empty).collect(), running: vec![false; slots] }
    }

    /// Looks up drafts in the text so far. For sequences without a drafter.
    pub fn with_lookup(self, lookup: Option<Lookup>) -> Sequences<'a> {
        let all = self.all.into_iter().map(|sequence| Sequence { lookup, ..sequence }).collect();
        Sequences { all, ..self }
    }

    /// Replaces the modelled costs of rounds.
    pub fn with_costs(self, costs: &Costs) -> Sequences<'a> {
        let all = self.all.into_iter().map(|sequence| sequence.with_costs(costs.clone())).collect();
        Sequences { all, ..self }
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

    fn admit(&mut self, slot: usize, request: &Request, keep: bool) -> Result<Option<usize>> {
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
                emitted.produced = emitted.tokens.len();
            }
        }
        Ok(())
    }

    fn release(&mut self, slot: usize, _tokens: usize) -> Result<()> {
        self.running[slot] = false;
        Ok(())
    }

    fn keep_logits(&mut self) {}

    fn logits(&mut self, slot: usize, row: usize) -> Result<Vec<f32>> {
        let row = self.all[slot].logits(row);
        row.map(<[f32]>::to_vec).ok_or_else(|| Error::Internal(format!("slot {slot} has no such logits")))
    }
}
