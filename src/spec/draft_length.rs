//! How many drafts a round verifies: all that it can, as many as are expected to pay, or those that are
//! accepted often enough.
//!
//! A [`Controller`] gets counts and costs and returns a number of drafts. It has no clock, so the same
//! request has the same rounds each time. Nothing that it returns changes which tokens exact verification
//! emits, since those depend on no draft. Under rejection and block verification the output keeps the
//! target's distribution for every length that is known before the round's drafts are sampled.

use crate::checkpoint::config::{DrafterConfig, TargetConfig};
use crate::perf::roofline::{Card, draft_pass, target_pass};
use crate::spec::tree::MOST_ROWS;

/// How many drafts each round of a request verifies.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum DraftLengthPolicy {
    /// All that fit: the block, or the tree.
    #[default]
    Full,
    /// As many as make a token cheapest, by the decoder's [`Costs`]. Where drafting does not pay, rounds are
    /// AR steps.
    CostModel,
    /// The first drafts that are each accepted with at least this probability, above 0 and up to 1.
    Threshold(f64),
}

impl DraftLengthPolicy {
    /// A controller for one sequence on a decoder with these costs.
    ///
    /// With `ahead` it fixes the number of drafts before it has seen any of them. Devices need that, because
    /// they enqueue rounds ahead, and so do drafts that are sampled.
    pub fn controller(self, costs: &Costs, ahead: bool) -> Box<dyn Controller + Send> {
        let costs = costs.clone();
        match (self, ahead) {
            (DraftLengthPolicy::Full, _) => Box::new(Fixed),
            (DraftLengthPolicy::CostModel, true) => {
                Box::new(CostGated::new(ByPosition::new(self, costs.clone()), costs))
            }
            (DraftLengthPolicy::CostModel, false) => {
                Box::new(CostGated::new(ByConfidence::new(self, costs.clone()), costs))
            }
            (DraftLengthPolicy::Threshold(_), true) => Box::new(ByPosition::new(self, costs)),
            (DraftLengthPolicy::Threshold(_), false) => Box::new(ByConfidence::new(self, costs)),
        }
    }

    /// How many drafts to verify; `survival` and `costs` as in [`Costs::cheapest`].
    fn drafts(self, costs: &Costs, survival: &[f64]) -> usize {
        match self {
            DraftLengthPolicy::Full => survival.len(),
            DraftLengthPolicy::CostModel => costs.cheapest(survival).0,
            DraftLengthPolicy::Threshold(least) => survival.iter().take_while(|p| **p >= least).count(),
        }
    }
}

/// Chooses the number of drafts of each round of one sequence, from the results of earlier rounds.
///
/// Rounds are requested in order and observed in order. A device enqueues its next round before the host has
/// read the last, so a round may be requested before earlier ones are observed.
pub trait Controller {
    /// The number of drafts of the next round, up to `max`. 0 makes it an AR step, which is not observed.
    fn drafts(&mut self, max: usize) -> usize;

    /// Whether [`Controller::truncate`] is to be called with the probabilities of a round's drafts before
    /// they are verified.
    ///
    /// Such a controller is only for the CPU, which knows the drafts by then, and only for drafts that are a
    /// function of the drafter's distribution: leaving out a *sampled* draft because of what it is would bias
    /// the output.
    fn needs_draft_probs(&self) -> bool {
        false
    }

    /// How many of the drafts to verify, counted from the first. `costs` are those of their paths: `-log2` of
    /// the probability that the drafter gives the path, in units of 2^-16 bits, parents before children. If
    /// `needs_draft_probs`, it is called in every round, and each round is observed before the next is
    /// requested.
    fn truncate(&mut self, costs: &[u32]) -> usize {
        costs.len()
    }

    /// The result of the oldest requested round with drafts that has not been observed. It verified
    /// `verified` drafts, in rows 1, 2, ... after the anchor. Bit `i` of `accepted` says that row `i` is on
    /// the accepted path; bit 0, the anchor's, is always set.
    fn observe(&mut self, verified: usize, accepted: u64);
}

/// Rounds are as large as they can be.
pub struct Fixed;

impl Controller for Fixed {
    fn drafts(&mut self, max: usize) -> usize {
        max
    }

    fn observe(&mut self, _: usize, _: u64) {}
}

/// Number of drafts among the accepted rows.
fn num_accepted(accepted: u64) -> usize {
    (accepted >> 1).count_ones() as usize
}

/// The probability of a path of this cost, if each bit of it counts `weight`.
fn probability(cost: u32, weight: f64) -> f64 {
    (-weight * f64::from(cost) / 65536.0).exp2()
}

// ---- what rounds cost ----

/// Times of the passes of a round, in any one unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The drafter's pass, and whatever else only a round with drafts has.
    pub draft: f64,
    /// A verification pass over 1, 2, ... [`MOST_ROWS`] rows; the first is an AR step.
    pub verify: Vec<f64>,
}

impl Costs {
    /// The roofline times on a card, in milliseconds ([`crate::perf::roofline`]), for `batch` sequences of
    /// `context` positions that do the same in each round, in blocks of `block` rows.
    pub fn modelled(
        card: &Card,
        target: &TargetConfig,
        drafter: &DrafterConfig,
        context: usize,
        batch: usize,
        block: usize,
    ) -> Costs {
        let verify = |rows| target_pass(target, context, batch, rows).ms(card);
        Costs {
            draft: draft_pass(target, drafter, context, batch, block).ms(card),
            verify: (1..=MOST_ROWS).map(verify).collect(),
        }
    }

    /// The costs where only passes of these sizes exist, ascending: a number of rows costs what the next
    /// larger pass does, or the largest.
    pub fn of_sizes(self, sizes: &[usize]) -> Costs {
        let cost = |rows: usize| {
            let size = sizes.iter().find(|size| **size >= rows).or(sizes.last()).unwrap_or(&rows);
            self.verify[(size - 1).min(self.verify.len() - 1)]
        };
        Costs { draft: self.draft, verify: (1..=self.verify.len()).map(cost).collect() }
    }

    /// An AR step.
    pub fn ar_step(&self) -> f64 {
        self.verify[0]
    }

    /// A round that drafts and verifies `drafts`. More rows than the table has cost what its last pass does.
    pub fn round(&self, drafts: usize) -> f64 {
        self.draft + self.verify[drafts.min(self.verify.len() - 1)]
    }

    /// The number of drafts that makes a token cheapest, and the cost of a token then. `survival[i]` is the
    /// probability that the `i`-th draft is accepted. The smallest number wins ties. All sizes are tried,
    /// because costs have steps at which a local search would stop.
    pub fn cheapest(&self, survival: &[f64]) -> (usize, f64) {
        let (mut best, mut tokens) = ((0, self.round(0)), 1.0);
        for (i, p) in survival.iter().enumerate() {
            tokens += p;
            let each = self.round(i + 1) / tokens;
            if each < best.1 {
                best = (i + 1, each);
            }
        }
        best
    }
}

// ---- how often rows are accepted ----

/// Estimates how often each row after the anchor is accepted, over the rounds that verified it.
///
/// The estimate is a count that fades, plus a prior that weighs as much as two rounds: one half for the first
/// row, and for each later row the value that it would have if the rows before were as good as each other. A
/// row that is no longer verified returns to the prior; otherwise nothing could find out that it pays again.
///
/// Row `i` of a chain is its `i`-th draft. A best-first tree starts with the smaller trees, so what it
/// accepts says what each of those would have accepted.
#[derive(Debug, Clone, Default)]
pub struct Positions {
    /// (times accepted, times verified), from row 1 on
    counts: Vec<(f64, f64)>,
}

/// What is left of a count after a round.
const FADE: f64 = 0.98;

impl Positions {
    /// Counts a round. Arguments as for [`Controller::observe`].
    pub fn observe(&mut self, verified: usize, accepted: u64) {
        if self.counts.len() < verified {
            self.counts.resize(verified, (0.0, 0.0));
        }
        for (i, (hits, count)) in self.counts.iter_mut().enumerate() {
            let is_there = i < verified;
            let hit = is_there && accepted.checked_shr(i as u32 + 1).is_some_and(|bits| bits & 1 > 0);
            *hits = *hits * FADE + f64::from(hit);
            *count = *count * FADE + f64::from(is_there);
        }
    }

    /// The probability that each of the first `rows` drafts is accepted.
    pub fn survival(&self, rows: usize) -> Vec<f64> {
        let mut before: f64 = 1.0;
        let counts = self.counts.iter().copied().chain(std::iter::repeat((0.0, 0.0)));
        let next = |(i, (hits, count)): (usize, (f64, f64))| {
            let prior = if i == 0 { 0.5 } else { before.powf((i + 1) as f64 / i as f64) };
            before = (hits + 2.0 * prior) / (count + 2.0);
            before
        };
        counts.take(rows).enumerate().map(next).collect()
    }
}

// ---- controllers ----

/// First rounds of a request, which are full whatever they accept.
const FROZEN: usize = 4;

/// Maximum change of the number of drafts from one round to the next, so that it does not oscillate.
const STEP: usize = 16;

/// Chooses the number of drafts by how often each row has been accepted. The number is known before the
/// round's drafts are: for devices, which enqueue rounds before the host has read the last one, and for
/// drafts that are sampled.
pub struct ByPosition {
    policy: DraftLengthPolicy,
    costs: Costs,
    positions: Positions,
    rounds: usize,
    last: usize,
}

impl ByPosition {
    /// A controller of a new sequence.
    pub fn new(policy: DraftLengthPolicy, costs: Costs) -> ByPosition {
        ByPosition { policy, costs, positions: Positions::default(), rounds: 0, last: 0 }
    }
}

impl Controller for ByPosition {
    fn drafts(&mut self, max: usize) -> usize {
        // `observe` has bits for so many.
        let max = max.min(MOST_ROWS - 1);
        let wanted = match self.rounds {
            0..FROZEN => max,
            // Never an AR step: it would learn nothing from one, and never draft again.
            _ => {
                let best = self.policy.drafts(&self.costs, &self.positions.survival(max));
                best.clamp(self.last.saturating_sub(STEP), self.last + STEP).max(1)
            }
        };
        self.last = wanted.min(max);
        self.last
    }

    fn observe(&mut self, verified: usize, accepted: u64) {
        self.positions.observe(verified, accepted);
        self.rounds += 1;
    }
}

/// Chooses the number of drafts by the probabilities that the drafter gives them in this round.
///
/// The cost model needs probabilities that are right on average. So a bit of a path's cost gets a weight,
/// which is adjusted until the expected number of accepted drafts equals the actual one. A threshold is
/// compared with the drafter's own probability, unweighted, so that a round that verifies nothing does not
/// influence the next.
pub struct ByConfidence {
    policy: DraftLengthPolicy,
    costs: Costs,
    weight: f64,
    expected: f64,
}

/// Relative change of the weight after a round whose expectation is wrong by all of it.
const LEARNING_RATE: f64 = 0.1;

impl ByConfidence {
    /// A controller of a new sequence.
    pub fn new(policy: DraftLengthPolicy, costs: Costs) -> ByConfidence {
        ByConfidence { policy, costs, weight: 1.0, expected: 0.0 }
    }

    /// The weight of a bit: more than 1 where the drafter is overconfident.
    pub fn weight(&self) -> f64 {
        self.weight
    }
}

impl Controller for ByConfidence {
    fn drafts(&mut self, max: usize) -> usize {
        max.min(MOST_ROWS - 1)
    }

    fn needs_draft_probs(&self) -> bool {
        true
    }

    fn truncate(&mut self, costs: &[u32]) -> usize {
        let survival: Vec<f64> = costs.iter().map(|cost| probability(*cost, self.weight)).collect();
        let drafts = self.policy.drafts(&self.costs, &survival);
        self.expected = survival[..drafts].iter().sum();
        drafts
    }

    fn observe(&mut self, _: usize, accepted: u64) {
        if matches!(self.policy, DraftLengthPolicy::Threshold(_)) {
            return;
        }
        // The divisor must not depend on the outcome: a right expectation must leave the weight alone on
        // average.
        let wrong = (self.expected - num_accepted(accepted) as f64) / (1.0 + self.expected);
        self.weight = (self.weight * (LEARNING_RATE * wrong).exp()).clamp(0.25, 4.0);
    }
}

/// Turns drafting off while it does not pay, and tries it again from time to time; while it is on, `C`
/// chooses the number of drafts.
pub struct CostGated<C> {
    inner: C,
    costs: Costs,
    /// Fading averages of the tokens and costs of rounds with drafts.
    tokens: f64,
    spent: f64,
    rounds: usize,
    /// While drafting is on: rounds in a row that did not pay, and rounds in all that did.
    poor: usize,
    paid: usize,
    drafting: Drafting,
    /// AR steps before a trial.
    interval: usize,
}

/// Whether rounds draft.
#[derive(Clone, Copy, PartialEq)]
enum Drafting {
    On,
    /// This many AR steps, then a trial.
    Off {
        wait: usize,
    },
    /// One round drafts, and no other until it is observed.
    Trial,
}

/// Drafting pays at this many times the AR rate; a trial must reach the second one.
const PAYS: f64 = 1.03;
const PAYS_AGAIN: f64 = 1.08;
/// Rounds in a row that do not pay before drafting is turned off.
const POOR: usize = 8;
/// AR steps before the first trial, and the maximum. The interval doubles after each trial until drafting has
/// paid for [`SETTLED`] rounds.
const INTERVALS: (usize, usize) = (16, 256);
/// Paying rounds since the last trial after which the interval is reset.
const SETTLED: usize = 64;
/// What is left of the averages after another round; and after a trial, which represents all the rounds
/// between.
const MEMORY: f64 = 0.9;
const MEMORY_OF_TRIALS: f64 = 0.5;

impl<C> CostGated<C> {
    /// Drafting is on at first.
    pub fn new(inner: C, costs: Costs) -> CostGated<C> {
        let (tokens, spent, interval) = (0.0, 0.0, INTERVALS.0);
        let drafting = Drafting::On;
        CostGated { inner, costs, tokens, spent, rounds: 0, poor: 0, paid: 0, drafting, interval }
    }

    /// Whether rounds draft, trials aside.
    pub fn is_on(&self) -> bool {
        self.drafting == Drafting::On
    }

    /// Tokens for the cost of an AR step; 1 is the rate of AR decoding.
    pub fn gain(&self) -> f64 {
        if self.spent > 0.0 { self.tokens / self.spent * self.costs.ar_step() } else { 1.0 }
    }
}

impl<C: Controller> Controller for CostGated<C> {
    fn drafts(&mut self, max: usize) -> usize {
        let drafts = match &mut self.drafting {
            // Where nothing could be drafted anyway, no trial is spent.
            _ if max == 0 => 0,
            Drafting::Trial => 0,
            Drafting::Off { wait } if *wait > 0 => {
                *wait -= 1;
                0
            }
            _ => self.inner.drafts(max),
        };
        if drafts > 0 && !self.is_on() {
            self.drafting = Drafting::Trial;
        }
        drafts
    }

    fn needs_draft_probs(&self) -> bool {
        self.inner.needs_draft_probs()
    }

    fn truncate(&mut self, costs: &[u32]) -> usize {
        self.inner.truncate(costs)
    }

    fn observe(&mut self, verified: usize, accepted: u64) {
        self.inner.observe(verified, accepted);
        let memory = if self.is_on() { MEMORY } else { MEMORY_OF_TRIALS };
        // Tokens and costs are averaged apart, so that gains are rates.
        let norm = 1.0 - memory;
        let first = self.rounds == 0;
        let mix = |old: f64, new: f64| if first { new } else { memory * old + norm * new };
        self.tokens = mix(self.tokens, num_accepted(accepted) as f64 + 1.0);
        self.spent = mix(self.spent, self.costs.round(verified));
        self.rounds += 1;
        let gain = self.gain();
        match self.drafting {
            Drafting::On => {
                let poor = gain < PAYS && self.rounds > FROZEN;
                self.poor = if poor { self.poor + 1 } else { 0 };
                self.paid += usize::from(!poor);
                if self.paid >= SETTLED {
                    self.interval = INTERVALS.0;
                }
                if self.poor == POOR {
                    self.drafting = Drafting::Off { wait: self.interval };
                }
            }
            Drafting::Trial => {
                self.interval = (2 * self.interval).min(INTERVALS.1);
                let again = gain >= PAYS_AGAIN;
                (self.poor, self.paid) = (0, 0);
                let wait = self.interval;
                self.drafting = if again { Drafting::On } else { Drafting::Off { wait } };
            }
            // It was enqueued before the round that turned drafting off; no trial can be due yet.
            Drafting::Off { .. } => {}
        }
    }
}
