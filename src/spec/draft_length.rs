//! How much a round drafts and verifies: all it can, as much as pays, or what stands often enough. Counts and costs come
//! in, a number of drafts goes out; there is no clock here, and nothing that a controller says changes which tokens the
//! rule `match` emits: they depend on no draft. The distribution of what other rules emit is the target's for any size that is
//! known before the round's drafts are drawn.

use crate::checkpoint::config::{DrafterConfig, TargetConfig};
use crate::perf::roofline::{Card, draft_pass, target_pass};
use crate::spec::tree::MOST_ROWS;

/// Says how large rounds of one sequence are, by what came of earlier ones. They are asked for in order, and judged in
/// order, but a device has its next round on its way before the host has read the last: rounds may be asked for before
/// those in front of them are judged.
pub trait Controller {
    /// Drafts that the next round may run, of `most` that it could; 0: a AR step, which is never judged.
    fn drafts(&mut self, most: usize) -> usize;

    /// Whether it looks at a round's drafts before they are verified. Only the CPU, which knows them then, may be given one
    /// that does, and only for drafts that are a function of the drafter's distribution: to leave out a *sampled* one because of
    /// what it is would bend what is emitted.
    fn needs_draft_probs(&self) -> bool {
        false
    }

    /// How many of the drafts to verify, the first ones. `costs` of their paths, `-log2` of the probability that the
    /// drafter gives them in units of 2^-16 bits, parents before children. Asked where it looks, and then every round is
    /// judged before the next is asked for.
    fn truncate(&mut self, costs: &[u32]) -> usize {
        costs.len()
    }

    /// The first round that was asked for and is not judged is over: it verified `verified` drafts, rows 1, 2, ... behind
    /// the anchor, and bit `i` of `stood` says that row `i` is on the accepted path; the anchor, bit 0, always is.
    fn judged(&mut self, verified: usize, stood: u64);
}

/// Rounds are as large as they can be.
pub struct Fixed;

impl Controller for Fixed {
    fn drafts(&mut self, most: usize) -> usize {
        most
    }

    fn judged(&mut self, _: usize, _: u64) {}
}

/// Drafts among the rows that stood.
fn accepted(stood: u64) -> usize {
    (stood >> 1).count_ones() as usize
}

/// Of a path of that cost, if every bit of it counts `weight`.
fn probability(cost: u32, weight: f64) -> f64 {
    (-weight * f64::from(cost) / 65536.0).exp2()
}

// ---- what rounds cost ----

/// What the passes of a round take, in one unit: milliseconds, or any other.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The drafter's pass, and whatever else only a round with drafts has.
    pub draft: f64,
    /// A verification pass over 1, 2, ... [`MOST_ROWS`] rows; the first is a AR step.
    pub verify: Vec<f64>,
}

impl Costs {
    /// The least that they can be on a card, in milliseconds ([`crate::perf::roofline`]), for `batch` sequences of `context`
    /// positions that do the same together, in blocks of `block` rows.
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

    /// Where passes are of few sizes, ascending: a row costs what the next larger pass does, or the largest.
    pub fn of_sizes(self, sizes: &[usize]) -> Costs {
        let cost = |rows: usize| {
            let size = sizes.iter().find(|size| **size >= rows).or(sizes.last()).unwrap_or(&rows);
            self.verify[(size - 1).min(self.verify.len() - 1)]
        };
        Costs { draft: self.draft, verify: (1..=self.verify.len()).map(cost).collect() }
    }

    /// A AR step.
    pub fn plain(&self) -> f64 {
        self.verify[0]
    }

    /// A round that drafts and verifies `drafts`. What is more than the table has costs what its last pass does.
    pub fn round(&self, drafts: usize) -> f64 {
        self.draft + self.verify[drafts.min(self.verify.len() - 1)]
    }

    /// How many drafts to verify, so that a token costs the least, and that cost: `survival[i]` is the probability
    /// that the `i`-th draft stands. Of equals the fewest. All sizes are tried, because costs have steps at which a
    /// search would stop.
    pub fn cheapest(&self, survival: &[f64]) -> (usize, f64) {
        let (mut best, mut tokens) = ((0, self.round(0)), 1.0);
        for (i, stands) in survival.iter().enumerate() {
            tokens += stands;
            let each = self.round(i + 1) / tokens;
            if each < best.1 {
                best = (i + 1, each);
            }
        }
        best
    }
}

// ---- what is accepted ----

/// How often each row behind the anchor stands, of the rounds that verified it: what was counted, which fades, and a guess
/// that weighs as much as two rounds: one half for the first row, and then as if each row before had been as good as
/// the others. Rows that are no longer verified come back to the guess, or they would never be found to pay again.
///
/// For a chain row `i` is its `i`-th draft. A best-first tree begins with the smaller ones, so that what it accepts says
/// what each of them would have.
#[derive(Debug, Clone, Default)]
pub struct Positions {
    /// (stood, was verified), of row 1 on
    counts: Vec<(f64, f64)>,
}

/// What is left of a count after a round.
const FADE: f64 = 0.98;

impl Positions {
    /// A round of `verified` drafts; `stood` as for [`Controller::judged`].
    pub fn judged(&mut self, verified: usize, stood: u64) {
        if self.counts.len() < verified {
            self.counts.resize(verified, (0.0, 0.0));
        }
        for (i, (stand, count)) in self.counts.iter_mut().enumerate() {
            let is_there = i < verified;
            let stands = is_there && stood.checked_shr(i as u32 + 1).is_some_and(|bits| bits & 1 > 0);
            *stand = *stand * FADE + f64::from(stands);
            *count = *count * FADE + f64::from(is_there);
        }
    }

    /// The probability that each of the first `most` drafts stands.
    pub fn survival(&self, most: usize) -> Vec<f64> {
        let mut before: f64 = 1.0;
        let counts = self.counts.iter().copied().chain(std::iter::repeat((0.0, 0.0)));
        let next = |(i, (stood, verified)): (usize, (f64, f64))| {
            let guess = if i == 0 { 0.5 } else { before.powf((i + 1) as f64 / i as f64) };
            before = (stood + 2.0 * guess) / (verified + 2.0);
            before
        };
        counts.take(most).enumerate().map(next).collect()
    }
}

// ---- what is verified ----

/// What rounds are to be as large as.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum DraftLengthPolicy {
    /// They can be.
    #[default]
    Full,
    /// Pays where passes cost this much; where drafting does not pay, rounds are AR steps.
    CostModel(Costs),
    /// The first drafts of which each stands with at least this probability, above 0 and up to 1.
    Threshold(f64),
}

impl DraftLengthPolicy {
    /// A sequence's controller. One that knows sizes `ahead` does not look at the drafts: on devices, and for drafts that
    /// are drawn at random.
    pub fn controller(&self, ahead: bool) -> Box<dyn Controller + Send> {
        match (self, ahead) {
            (DraftLengthPolicy::Full, _) => Box::new(Fixed),
            (DraftLengthPolicy::CostModel(costs), true) => {
                Box::new(CostGated::new(ByPosition::new(self.clone()), costs.clone()))
            }
            (DraftLengthPolicy::CostModel(costs), false) => {
                Box::new(CostGated::new(ByConfidence::new(self.clone()), costs.clone()))
            }
            (DraftLengthPolicy::Threshold(_), true) => Box::new(ByPosition::new(self.clone())),
            (DraftLengthPolicy::Threshold(_), false) => Box::new(ByConfidence::new(self.clone())),
        }
    }

    /// How many drafts to verify; `survival` as for [`Costs::cheapest`].
    fn size(&self, survival: &[f64]) -> usize {
        match self {
            DraftLengthPolicy::Full => survival.len(),
            DraftLengthPolicy::CostModel(costs) => costs.cheapest(survival).0,
            DraftLengthPolicy::Threshold(least) => {
                survival.iter().take_while(|stands| *stands >= least).count()
            }
        }
    }
}

/// Rounds of a request before anything is made of what it accepts.
const FROZEN: usize = 4;

/// Rows that a round may have more or fewer than the one before, so that sizes do not jump to and fro.
const STEP: usize = 16;

/// As many drafts of a chain or a tree as the goal says, by how often each row stands. Known before the round's drafts
/// are: for devices, whose rounds are on their way before the host has read the last one, and for drafts that are drawn.
pub struct ByPosition {
    goal: DraftLengthPolicy,
    positions: Positions,
    rounds: usize,
    last: usize,
}

impl ByPosition {
    pub fn new(goal: DraftLengthPolicy) -> ByPosition {
        ByPosition { goal, positions: Positions::default(), rounds: 0, last: 0 }
    }
}

impl Controller for ByPosition {
    fn drafts(&mut self, most: usize) -> usize {
        // It hears of so many.
        let most = most.min(MOST_ROWS - 1);
        let wanted = match self.rounds {
            0..FROZEN => most,
            // A AR step is not for this controller to take: it would learn nothing more, and never draft again.
            _ => {
                let best = self.goal.size(&self.positions.survival(most));
                best.clamp(self.last.saturating_sub(STEP), self.last + STEP).max(1)
            }
        };
        self.last = wanted.min(most);
        self.last
    }

    fn judged(&mut self, verified: usize, stood: u64) {
        self.positions.judged(verified, stood);
        self.rounds += 1;
    }
}

/// As many drafts of a chain or a tree as the goal says, by how sure the drafter is of this round's. What pays must be
/// right in sum: a bit of a path's cost counts as much as makes the number expected to stand the number that does. A
/// probability that each must have is the drafter's own, so that a round which verifies nothing says nothing of the next.
pub struct ByConfidence {
    goal: DraftLengthPolicy,
    weight: f64,
    expected: f64,
}

/// By how much a round whose expectation is wrong by all of it changes the weight of a bit.
const LEARN: f64 = 0.1;

impl ByConfidence {
    pub fn new(goal: DraftLengthPolicy) -> ByConfidence {
        ByConfidence { goal, weight: 1.0, expected: 0.0 }
    }

    /// What a bit counts: more than 1 where the drafter is too sure.
    pub fn weight(&self) -> f64 {
        self.weight
    }
}

impl Controller for ByConfidence {
    fn drafts(&mut self, most: usize) -> usize {
        most.min(MOST_ROWS - 1)
    }

    fn needs_draft_probs(&self) -> bool {
        true
    }

    fn truncate(&mut self, costs: &[u32]) -> usize {
        let survival: Vec<f64> = costs.iter().map(|cost| probability(*cost, self.weight)).collect();
        let drafts = self.goal.size(&survival);
        self.expected = survival[..drafts].iter().sum();
        drafts
    }

    fn judged(&mut self, _: usize, stood: u64) {
        if matches!(self.goal, DraftLengthPolicy::Threshold(_)) {
            return;
        }
        // Nothing of the outcome may be below the line: what is expected rightly must leave the weight alone on
        // average.
        let wrong = (self.expected - accepted(stood) as f64) / (1.0 + self.expected);
        self.weight = (self.weight * (LEARN * wrong).exp()).clamp(0.25, 4.0);
    }
}

/// A controller whose drafts are left out where they do not pay, and tried again from time to time.
pub struct CostGated<C> {
    inner: C,
    costs: Costs,
    /// Tokens and costs of the rounds with drafts; the older, the less they count.
    tokens: f64,
    spent: f64,
    rounds: usize,
    /// Rounds in a row that drafting did not pay, while it is on; that it did, altogether.
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
    /// So many AR steps, then a trial.
    Off {
        wait: usize,
    },
    /// One round drafts, and until it is judged no other.
    Trial,
}

/// Below this many times autoregressive decoding's rate drafting does not pay; a trial must bring more.
const PAYS: f64 = 1.03;
const PAYS_AGAIN: f64 = 1.08;
/// Poor rounds in a row that end it.
const POOR: usize = 8;
/// AR steps before the first trial, and before any: twice as many after each, until drafting has paid for long.
const INTERVALS: (usize, usize) = (16, 256);
/// Paying rounds since the last trial after which the next interval is the first one again.
const SETTLED: usize = 64;
/// What is left of a round's tokens and costs after another one; after a trial, which stands for all the rounds
/// between.
const MEMORY: f64 = 0.9;
const MEMORY_OF_TRIALS: f64 = 0.5;

impl<C> CostGated<C> {
    pub fn new(inner: C, costs: Costs) -> CostGated<C> {
        let (tokens, spent, interval) = (0.0, 0.0, INTERVALS.0);
        let drafting = Drafting::On;
        CostGated { inner, costs, tokens, spent, rounds: 0, poor: 0, paid: 0, drafting, interval }
    }

    /// Whether rounds draft, trials aside.
    pub fn is_on(&self) -> bool {
        self.drafting == Drafting::On
    }

    /// Tokens for the cost of a AR step; 1 in autoregressive decoding.
    pub fn gain(&self) -> f64 {
        if self.spent > 0.0 { self.tokens / self.spent * self.costs.plain() } else { 1.0 }
    }
}

impl<C: Controller> Controller for CostGated<C> {
    fn drafts(&mut self, most: usize) -> usize {
        let drafts = match &mut self.drafting {
            // Where nothing could be drafted anyway, no trial is lost.
            _ if most == 0 => 0,
            Drafting::Trial => 0,
            Drafting::Off { wait } if *wait > 0 => {
                *wait -= 1;
                0
            }
            _ => self.inner.drafts(most),
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

    fn judged(&mut self, verified: usize, stood: u64) {
        self.inner.judged(verified, stood);
        let memory = if self.is_on() { MEMORY } else { MEMORY_OF_TRIALS };
        // A round's weight is what it costs, so that gains are rates.
        let norm = 1.0 - memory;
        let first = self.rounds == 0;
        let mix = |old: f64, new: f64| if first { new } else { memory * old + norm * new };
        self.tokens = mix(self.tokens, accepted(stood) as f64 + 1.0);
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
            // On its way when the one before ended drafting: long over before there is a trial.
            Drafting::Off { .. } => {}
        }
    }
}
