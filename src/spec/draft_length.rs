//! How many drafts a round verifies: all that fit, the number that makes a token cheapest, or those that are
//! accepted often enough.
//!
//! A [`Controller`] gets counts and costs and returns a number of drafts. It measures no time, so the same
//! request has the same rounds in every run. The number of drafts does not change which tokens exact
//! verification emits. Under rejection and block verification the output keeps the target's distribution if
//! the number is fixed before the round's drafts are sampled.

use crate::checkpoint::config::{DrafterConfig, TargetConfig};
use crate::perf::roofline::{Card, draft_pass, target_pass};
use crate::spec::tree::MAX_TREE_ROWS;

/// How many drafts each round of a request verifies.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum DraftLengthPolicy {
    /// All that fit: the whole block or tree.
    #[default]
    Full,
    /// The number that makes a token cheapest, by the decoder's [`Costs`]. While drafting does not pay,
    /// rounds are AR steps.
    CostModel,
    /// The longest prefix of drafts that are each accepted with at least this probability, above 0 and at
    /// most 1.
    Threshold(f64),
    /// The drafts before the first whose confidence is below this, above 0 and at most 1. The confidence is
    /// the drafter's own estimate of the probability that a draft is accepted if those before it are. It
    /// depends only on these, so the output keeps the target's distribution under every method.
    Confidence(f32),
}

impl DraftLengthPolicy {
    /// Makes a controller for one sequence on a decoder with these costs.
    ///
    /// With `ahead`, the number of drafts is fixed before the drafts are known. Devices need this because
    /// they enqueue rounds ahead, and sampled drafts need it for the output's distribution.
    pub fn controller(self, costs: &Costs, ahead: bool) -> Box<dyn Controller + Send> {
        let costs = costs.clone();
        match (self, ahead) {
            (DraftLengthPolicy::Full | DraftLengthPolicy::Confidence(_), _) => Box::new(Fixed),
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

    /// Whether a controller chooses the number from the results of earlier rounds.
    pub fn adapts(self) -> bool {
        matches!(self, DraftLengthPolicy::CostModel | DraftLengthPolicy::Threshold(_))
    }

    /// The least confidence of a draft that is verified; `None`: any.
    pub fn min_confidence(self) -> Option<f32> {
        match self {
            DraftLengthPolicy::Confidence(least) => Some(least),
            _ => None,
        }
    }

    /// How many drafts to verify; `survival` and `costs` as in [`Costs::cheapest`].
    fn drafts(self, costs: &Costs, survival: &[f64]) -> usize {
        match self {
            DraftLengthPolicy::Full | DraftLengthPolicy::Confidence(_) => survival.len(),
            DraftLengthPolicy::CostModel => costs.cheapest(survival).0,
            DraftLengthPolicy::Threshold(least) => survival.iter().take_while(|p| **p >= least).count(),
        }
    }
}

/// Chooses the number of drafts of each round of one sequence, from the results of earlier rounds.
///
/// Rounds are requested in order and observed in order. A device enqueues its next round before the host has
/// read the last one, so a round may be requested before earlier ones are observed.
pub trait Controller {
    /// Requests a round. Returns its number of drafts, at most `max`. 0 makes it an AR step, which is not
    /// observed.
    fn drafts(&mut self, max: usize) -> usize;

    /// Whether [`Controller::truncate`] must be called with the probabilities of a round's drafts before they
    /// are verified.
    ///
    /// Such a controller works only on the CPU, which knows the drafts before it verifies them, and only with
    /// drafts that are not sampled: dropping a *sampled* draft because of its probability would bias the
    /// output.
    fn needs_draft_probs(&self) -> bool {
        false
    }

    /// How many of the drafts to verify, counted from the first. `costs` `[drafts]` has the cost of the path
    /// to each draft: `-log2` of the path's probability by the drafter, in units of 2^-16, parents before
    /// children. If [`Controller::needs_draft_probs`], it is called in every round that has drafts, and each
    /// of these rounds is observed before the next one is requested.
    fn truncate(&mut self, costs: &[u32]) -> usize {
        costs.len()
    }

    /// Reports the result of the oldest requested round with drafts that has not been observed yet. The round
    /// verified `verified` drafts, in rows 1, 2, ... after the anchor. Bit `i` of `accepted` is set if row
    /// `i` is on the accepted path; bit 0, the anchor's, is always set.
    fn observe(&mut self, verified: usize, accepted: u64);
}

/// The controller that always uses the maximum number of drafts.
pub struct Fixed;

impl Controller for Fixed {
    fn drafts(&mut self, max: usize) -> usize {
        max
    }

    fn observe(&mut self, _: usize, _: u64) {}
}

/// Number of accepted drafts, from the bits of [`Controller::observe`].
fn num_accepted(accepted: u64) -> usize {
    (accepted >> 1).count_ones() as usize
}

/// The probability of a path of this cost, with the cost multiplied by `weight`.
fn probability(cost: u32, weight: f64) -> f64 {
    (-weight * f64::from(cost) / 65536.0).exp2()
}

// ---- what rounds cost ----

/// Times of the passes of a round, all in the same unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The drafter's pass, and all other work that only a round with drafts has.
    pub draft: f64,
    /// A verification pass over 1, 2, ... [`MAX_TREE_ROWS`] rows. The first is an AR step.
    pub verify: Vec<f64>,
}

impl Costs {
    /// The roofline times on a card, in milliseconds ([`crate::perf::roofline`]), for `batch` sequences of
    /// `context` positions that all have the same number of rows in a round, and blocks of `block` rows.
    pub fn from_roofline(
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
            verify: (1..=MAX_TREE_ROWS).map(verify).collect(),
        }
    }

    /// The costs if verification passes exist only in these `sizes` (rows, ascending): a number of rows costs
    /// as much as the smallest pass that is large enough, or else the largest pass.
    pub fn of_sizes(self, sizes: &[usize]) -> Costs {
        let cost = |rows: usize| {
            let size = sizes.iter().find(|size| **size >= rows).or(sizes.last()).unwrap_or(&rows);
            self.verify[(size - 1).min(self.verify.len() - 1)]
        };
        Costs { draft: self.draft, verify: (1..=self.verify.len()).map(cost).collect() }
    }

    /// The cost of an AR step.
    pub fn ar_step(&self) -> f64 {
        self.verify[0]
    }

    /// The cost of a round that drafts and verifies `drafts` drafts. More rows than the table has cost as
    /// much as its last pass.
    pub fn round(&self, drafts: usize) -> f64 {
        self.draft + self.verify[drafts.min(self.verify.len() - 1)]
    }

    /// The number of drafts that makes a token cheapest, from 0 on, and the cost per token. `survival[i]` is
    /// the probability that draft `i` is accepted. The smallest number wins ties. All numbers are tried,
    /// because costs have steps at which a local search would stop.
    pub fn cheapest(&self, survival: &[f64]) -> (usize, f64) {
        let (mut best, mut tokens) = ((0, self.round(0)), 1.0);
        for (i, p) in survival.iter().enumerate() {
            tokens += p;
            let per_token = self.round(i + 1) / tokens;
            if per_token < best.1 {
                best = (i + 1, per_token);
            }
        }
        best
    }
}

// ---- how often rows are accepted ----

/// Estimates how often each row after the anchor is accepted, over the rounds that verified it.
///
/// The estimate is a ratio of counts that decay exponentially, plus a prior with the weight of two rounds.
/// The prior of the first row is 1/2. The prior of a later row continues the estimate of the row before it
/// geometrically, as if each draft were accepted with the same probability given that the one before it is.
/// The estimate of a row that is not verified returns to the prior, so that the row is tried again.
///
/// Row `i` of a chain is its `i`-th draft. The first rows of a best-first tree are the smaller best-first
/// trees, so the rows that it accepts also tell what a smaller tree would have accepted.
#[derive(Debug, Clone, Default)]
pub struct Positions {
    /// (times accepted, times verified) of each row, from row 1 on
    counts: Vec<(f64, f64)>,
}

/// Factor on all counts in each round.
const COUNT_DECAY: f64 = 0.98;

impl Positions {
    /// Counts a round. The arguments are those of [`Controller::observe`].
    pub fn observe(&mut self, verified: usize, accepted: u64) {
        if self.counts.len() < verified {
            self.counts.resize(verified, (0.0, 0.0));
        }
        for (i, (hits, count)) in self.counts.iter_mut().enumerate() {
            let is_verified = i < verified;
            let hit = is_verified && accepted.checked_shr(i as u32 + 1).is_some_and(|bits| bits & 1 > 0);
            *hits = *hits * COUNT_DECAY + f64::from(hit);
            *count = *count * COUNT_DECAY + f64::from(is_verified);
        }
    }

    /// The probabilities `[rows]` that each of the first `rows` drafts is accepted.
    pub fn survival(&self, rows: usize) -> Vec<f64> {
        let mut previous: f64 = 1.0;
        let counts = self.counts.iter().copied().chain(std::iter::repeat((0.0, 0.0)));
        let next = |(i, (hits, count)): (usize, (f64, f64))| {
            let prior = if i == 0 { 0.5 } else { previous.powf((i + 1) as f64 / i as f64) };
            previous = (hits + 2.0 * prior) / (count + 2.0);
            previous
        };
        counts.take(rows).enumerate().map(next).collect()
    }
}

// ---- controllers ----

/// Number of rounds at the start of a request that have the maximum number of drafts.
const WARMUP_ROUNDS: usize = 4;

/// Maximum change of the number of drafts from one round to the next, so that it does not oscillate.
const MAX_STEP: usize = 16;

/// Chooses the number of drafts by how often each row has been accepted. The number is known before the
/// round's drafts are. It is for devices, which enqueue rounds before the host has read the last one, and for
/// sampled drafts.
pub struct ByPosition {
    policy: DraftLengthPolicy,
    costs: Costs,
    positions: Positions,
    /// Observed rounds.
    rounds: usize,
    /// Number of drafts of the last requested round.
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
        // `observe` has 64 bits, one of them for the anchor.
        let max = max.min(MAX_TREE_ROWS - 1);
        let wanted = match self.rounds {
            0..WARMUP_ROUNDS => max,
            // At least one draft: AR steps are not observed, so the estimates would never change again.
            _ => {
                let best = self.policy.drafts(&self.costs, &self.positions.survival(max));
                best.clamp(self.last.saturating_sub(MAX_STEP), self.last + MAX_STEP).max(1)
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

/// Chooses the number of drafts by the drafter's probabilities in this round.
///
/// The cost model needs probabilities that are calibrated. So each path's cost is multiplied by a weight,
/// which is adjusted until the expected number of accepted drafts equals the actual one on average. A
/// threshold is compared with the drafter's unweighted probability, so that a round that verifies nothing
/// does not influence the next one.
pub struct ByConfidence {
    policy: DraftLengthPolicy,
    costs: Costs,
    /// Factor on the cost of a path.
    weight: f64,
    /// Expected number of accepted drafts of the current round.
    expected: f64,
}

/// Factor on the relative error of a round's expectation in the change of the weight's logarithm.
const LEARNING_RATE: f64 = 0.1;

impl ByConfidence {
    /// A controller of a new sequence.
    pub fn new(policy: DraftLengthPolicy, costs: Costs) -> ByConfidence {
        ByConfidence { policy, costs, weight: 1.0, expected: 0.0 }
    }

    /// The factor on the cost of a path: more than 1 if the drafter is overconfident.
    pub fn weight(&self) -> f64 {
        self.weight
    }
}

impl Controller for ByConfidence {
    fn drafts(&mut self, max: usize) -> usize {
        max.min(MAX_TREE_ROWS - 1)
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
        // The divisor must not depend on the outcome, so that a correct expectation does not change the
        // weight on average.
        let error = (self.expected - num_accepted(accepted) as f64) / (1.0 + self.expected);
        self.weight = (self.weight * (LEARNING_RATE * error).exp()).clamp(0.25, 4.0);
    }
}

/// Turns drafting off while it does not pay, and tries it again in a trial round from time to time. While
/// drafting is on, and in trials, `C` chooses the number of drafts.
pub struct CostGated<C> {
    inner: C,
    costs: Costs,
    /// Exponential moving averages of the tokens and the costs of rounds with drafts.
    tokens: f64,
    spent: f64,
    /// Observed rounds.
    rounds: usize,
    /// While drafting is on: consecutive rounds that did not pay, and the total of rounds that did.
    unpaid: usize,
    paid: usize,
    drafting: Drafting,
    /// AR steps before the next trial.
    interval: usize,
}

/// Whether rounds draft.
#[derive(Clone, Copy, PartialEq)]
enum Drafting {
    On,
    /// `wait` more AR steps, then a trial.
    Off {
        wait: usize,
    },
    /// A trial round drafts. Other rounds are AR steps until it is observed.
    Trial,
}

/// The [gain](CostGated::gain) from which on drafting pays.
const MIN_GAIN: f64 = 1.03;
/// The gain that a trial must reach to turn drafting on.
const MIN_TRIAL_GAIN: f64 = 1.08;
/// Consecutive rounds that do not pay after which drafting is turned off.
const MAX_UNPAID: usize = 8;
/// AR steps before the first trial, and their maximum. The interval doubles after each trial. It is reset
/// once [`RESET_AFTER`] rounds have paid.
const INTERVALS: (usize, usize) = (16, 256);
/// Rounds since the last trial that must pay before the interval is reset.
const RESET_AFTER: usize = 64;
/// Factor on the averages in each round.
const AVERAGE_DECAY: f64 = 0.9;
/// Factor on the averages in a trial. It is smaller, because a trial represents all rounds since the last
/// one.
const TRIAL_DECAY: f64 = 0.5;

impl<C> CostGated<C> {
    /// A controller of a new sequence. Drafting is on at first.
    pub fn new(inner: C, costs: Costs) -> CostGated<C> {
        let (tokens, spent, interval) = (0.0, 0.0, INTERVALS.0);
        let drafting = Drafting::On;
        CostGated { inner, costs, tokens, spent, rounds: 0, unpaid: 0, paid: 0, drafting, interval }
    }

    /// Whether drafting is on. It is off during a trial.
    pub fn is_on(&self) -> bool {
        self.drafting == Drafting::On
    }

    /// Average number of tokens for the cost of an AR step. 1 is as fast as AR decoding.
    pub fn gain(&self) -> f64 {
        if self.spent > 0.0 { self.tokens / self.spent * self.costs.ar_step() } else { 1.0 }
    }
}

impl<C: Controller> Controller for CostGated<C> {
    fn drafts(&mut self, max: usize) -> usize {
        let drafts = match &mut self.drafting {
            // A round that cannot draft is not a trial and does not count as a wait.
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
        let decay = if self.is_on() { AVERAGE_DECAY } else { TRIAL_DECAY };
        // Tokens and costs are averaged separately, so that the gain is a ratio of averages.
        let first = self.rounds == 0;
        let average = |old: f64, new: f64| if first { new } else { decay * old + (1.0 - decay) * new };
        self.tokens = average(self.tokens, num_accepted(accepted) as f64 + 1.0);
        self.spent = average(self.spent, self.costs.round(verified));
        self.rounds += 1;
        let gain = self.gain();
        match self.drafting {
            Drafting::On => {
                let unpaid = gain < MIN_GAIN && self.rounds > WARMUP_ROUNDS;
                self.unpaid = if unpaid { self.unpaid + 1 } else { 0 };
                self.paid += usize::from(!unpaid);
                if self.paid >= RESET_AFTER {
                    self.interval = INTERVALS.0;
                }
                if self.unpaid == MAX_UNPAID {
                    self.drafting = Drafting::Off { wait: self.interval };
                }
            }
            Drafting::Trial => {
                self.interval = (2 * self.interval).min(INTERVALS.1);
                let pays = gain >= MIN_TRIAL_GAIN;
                (self.unpaid, self.paid) = (0, 0);
                let wait = self.interval;
                self.drafting = if pays { Drafting::On } else { Drafting::Off { wait } };
            }
            // This round was requested before drafting was turned off. The state does not change.
            Drafting::Off { .. } => {}
        }
    }
}
