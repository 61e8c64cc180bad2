//! How much a round drafts and verifies: fixed, cut where the drafter is in doubt, or as much as pays. Counts and
//! costs come in, a number of drafts goes out; there is no clock here, and nothing that a controller says changes
//! which tokens the rule `match` emits: they depend on no draft.

use crate::config::{DrafterConfig, TargetConfig};
use crate::floor::{Card, draft_pass, target_pass};
use crate::tree::MOST_ROWS;
use crate::{Error, Result};

/// Says how large rounds of one sequence are. Rounds come in order: each is asked for, drafted and judged, before the
/// next.
pub trait Controller {
    /// Drafts that the next round may run, of `most` that it could; 0: a plain step, for which the drafter does not
    /// run.
    fn drafts(&mut self, most: usize) -> usize;

    /// How many of the drafts to verify, the first ones. `costs` of their paths, `-log2` of the probability that the
    /// drafter gives them in units of 2^-16 bits, parents before children. Only for drafts that are a function of the
    /// drafter's law: to leave out a *sampled* one because of what it is would bend what is emitted.
    fn cut(&mut self, costs: &[u32]) -> usize {
        costs.len()
    }

    /// A round in which the drafter ran is over: of `verified` drafts `accepted` stood, one below another.
    fn judged(&mut self, verified: usize, accepted: usize);
}

/// The same for every round.
pub struct Fixed(pub usize);

impl Controller for Fixed {
    fn drafts(&mut self, most: usize) -> usize {
        self.0.min(most)
    }

    fn judged(&mut self, _: usize, _: usize) {}
}

/// Verifies the drafts whose paths the drafter gives at least this probability: 0 to 1.
pub struct Confident(pub f64);

impl Controller for Confident {
    fn drafts(&mut self, most: usize) -> usize {
        most
    }

    fn cut(&mut self, costs: &[u32]) -> usize {
        costs.iter().take_while(|cost| probability(**cost, 1.0) >= self.0).count()
    }

    fn judged(&mut self, _: usize, _: usize) {}
}

/// Of a path of that cost, if every bit of it counts `weight`.
fn probability(cost: u32, weight: f64) -> f64 {
    (-weight * f64::from(cost) / 65536.0).exp2()
}

// ---- what rounds cost ----

/// Where a verification pass begins to take more: products are computed in tiles of that many rows.
const EDGES: [usize; 3] = [16, 32, 64];

/// What the passes of a round take, in one unit: milliseconds, or any other.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// The drafter's pass, and whatever else only a round with drafts has.
    pub draft: f64,
    /// A verification pass over 1, 2, ... [`MOST_ROWS`] rows; the first is a plain step.
    pub verify: Vec<f64>,
}

impl Costs {
    /// From passes that were measured: (rows, cost), ascending, at least one of them within each tile of
    /// [1, 16, 32, 64] rows. Linear between those of one tile and flat beyond them, because between tiles costs jump.
    ///
    /// # Errors
    /// [`Error::Usage`]: rows that do not ascend from 1 to 64, a cost that is no positive number, a tile without any.
    pub fn measured(draft: f64, grid: &[(usize, f64)]) -> Result<Costs> {
        let wrong = |what: String| Err(Error::Usage(what));
        if let Some((rows, _)) = grid.iter().find(|(rows, _)| !(1..=MOST_ROWS).contains(rows)) {
            return wrong(format!("a pass of {rows} rows has a cost, expected 1 to {MOST_ROWS} rows"));
        }
        if let Some(pair) = grid.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            return wrong(format!("a pass of {} rows follows one of {}", pair[1].0, pair[0].0));
        }
        let costs = grid.iter().map(|(_, cost)| *cost);
        if let Some(cost) = costs.chain([draft]).find(|cost| !(*cost > 0.0 && cost.is_finite())) {
            return wrong(format!("a pass costs {cost}, expected more than 0"));
        }
        let mut verify = Vec::new();
        let mut first = 1;
        for edge in EDGES {
            let tile: Vec<_> = grid.iter().filter(|(rows, _)| (first..=edge).contains(rows)).collect();
            let Some((last, _)) = tile.last() else {
                return wrong(format!("no pass of {first} to {edge} rows has a cost"));
            };
            for rows in first..=edge {
                let near = rows.clamp(tile[0].0, *last);
                let above = tile.iter().position(|(rows, _)| *rows >= near).unwrap_or(0);
                let ((low, from), (high, to)) = (tile[above.saturating_sub(1)], tile[above]);
                let share = if high > low { (near - low) as f64 / (high - low) as f64 } else { 1.0 };
                verify.push(from + share * (to - from));
            }
            first = edge + 1;
        }
        Ok(Costs { draft, verify })
    }

    /// The least that they can be on a card, in milliseconds ([`crate::floor`]), for one sequence of `context`
    /// positions and blocks of `block` rows.
    pub fn modelled(
        card: &Card,
        target: &TargetConfig,
        drafter: &DrafterConfig,
        context: usize,
        block: usize,
    ) -> Costs {
        let verify = |rows| target_pass(target, context, 1, rows).ms(card);
        Costs {
            draft: draft_pass(target, drafter, context, 1, block).ms(card),
            verify: (1..=MOST_ROWS).map(verify).collect(),
        }
    }

    /// A plain step.
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

/// Drafts for each sequence of a batch, so that all of them together emit the most tokens in a time: `survival[b][i]`
/// is the probability that draft `i` of sequence `b` stands, never more than the one before; `cost(n)` that of a
/// round with `n` drafts in all. Of equals the fewest, and of equally probable ones the first of each sequence first.
pub fn share(survival: &[Vec<f64>], cost: impl Fn(usize) -> f64) -> Vec<usize> {
    let each = survival.iter().enumerate();
    let mut order: Vec<(f64, usize, usize)> =
        each.flat_map(|(b, all)| all.iter().enumerate().map(move |(i, stands)| (*stands, i, b))).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let mut tokens = survival.len() as f64;
    let (mut best, mut least) = (0, cost(0) / tokens);
    for (n, (stands, ..)) in (1..).zip(&order) {
        tokens += stands;
        let each = cost(n) / tokens;
        if each < least {
            (best, least) = (n, each);
        }
    }
    let mut drafts = vec![0; survival.len()];
    order[..best].iter().for_each(|(_, _, b)| drafts[*b] += 1);
    drafts
}

// ---- what is accepted ----

/// How often drafts stand, position by position, of those whose predecessors stood: what was counted, which fades,
/// and a guess that weighs as much as two of them: one half, and behind the first position what holds for the one
/// before. Were it one half everywhere, positions that are no longer drafted would never be found to pay again.
#[derive(Debug, Clone, Default)]
pub struct Positions {
    /// (stood, came to be judged)
    counts: Vec<(f64, f64)>,
}

/// What is left of a count after a round.
const FADE: f64 = 0.98;

impl Positions {
    /// A chain of `verified` drafts, of which `accepted` stood.
    pub fn judged(&mut self, verified: usize, accepted: usize) {
        if self.counts.len() < verified {
            self.counts.resize(verified, (0.0, 0.0));
        }
        for (i, (stood, judged)) in self.counts.iter_mut().enumerate() {
            let reached = i <= accepted && i < verified;
            *stood = *stood * FADE + f64::from(i < accepted);
            *judged = *judged * FADE + f64::from(reached);
        }
    }

    /// The probability that each of the first `most` drafts of a chain stands.
    pub fn survival(&self, most: usize) -> Vec<f64> {
        let (mut stands, mut guess) = (1.0, 0.5);
        let counts = self.counts.iter().copied().chain(std::iter::repeat((0.0, 0.0)));
        let next = |(stood, judged): (f64, f64)| {
            guess = (stood + 2.0 * guess) / (judged + 2.0);
            stands *= guess;
            stands
        };
        counts.take(most).map(next).collect()
    }
}

// ---- what pays ----

/// Rounds of a request before anything is made of what it accepts.
const FROZEN: usize = 4;

/// Rows that a round may have more or fewer than the one before, so that sizes do not jump to and fro.
const STEP: usize = 16;

/// As many drafts of a chain as pay, by what is accepted at each position. Known before the round's drafts are: for
/// devices whose rounds are on their way before the host has read the last one.
pub struct ByPosition {
    costs: Costs,
    positions: Positions,
    rounds: usize,
    last: usize,
}

impl ByPosition {
    pub fn new(costs: Costs) -> ByPosition {
        ByPosition { costs, positions: Positions::default(), rounds: 0, last: 0 }
    }
}

impl Controller for ByPosition {
    fn drafts(&mut self, most: usize) -> usize {
        let wanted = match self.rounds {
            0..FROZEN => most,
            // A plain step is not for this controller to take: it would learn nothing more.
            _ => {
                let (best, _) = self.costs.cheapest(&self.positions.survival(most));
                best.clamp(self.last.saturating_sub(STEP), self.last + STEP).max(1)
            }
        };
        self.last = wanted.min(most);
        self.last
    }

    fn judged(&mut self, verified: usize, accepted: usize) {
        self.positions.judged(verified, accepted);
        self.rounds += 1;
    }
}

/// As many drafts of a chain or a tree as pay, by how sure the drafter is of this round's: a bit of a path's cost
/// counts as much as makes the number expected to stand the number that does.
pub struct ByConfidence {
    costs: Costs,
    weight: f64,
    expected: f64,
}

/// By how much a round whose expectation is wrong by all of it changes the weight of a bit.
const LEARN: f64 = 0.1;

impl ByConfidence {
    pub fn new(costs: Costs) -> ByConfidence {
        ByConfidence { costs, weight: 1.0, expected: 0.0 }
    }

    /// What a bit counts: more than 1 where the drafter is too sure.
    pub fn weight(&self) -> f64 {
        self.weight
    }
}

impl Controller for ByConfidence {
    fn drafts(&mut self, most: usize) -> usize {
        most
    }

    fn cut(&mut self, costs: &[u32]) -> usize {
        let survival: Vec<f64> = costs.iter().map(|cost| probability(*cost, self.weight)).collect();
        let (drafts, _) = self.costs.cheapest(&survival);
        self.expected = survival[..drafts].iter().sum();
        drafts
    }

    fn judged(&mut self, _: usize, accepted: usize) {
        // Nothing of the outcome may be below the line: what is expected rightly must leave the weight alone on
        // average.
        let wrong = (self.expected - accepted as f64) / (1.0 + self.expected);
        self.weight = (self.weight * (LEARN * wrong).exp()).clamp(0.25, 4.0);
    }
}

/// A controller whose drafts are left out where they do not pay, and tried again from time to time.
pub struct WherePays<C> {
    inner: C,
    costs: Costs,
    /// Tokens and costs of the rounds with drafts; the older, the less they count.
    tokens: f64,
    spent: f64,
    rounds: usize,
    /// Rounds in a row that drafting did not pay, while it is on; that it did, altogether.
    poor: usize,
    paid: usize,
    /// Plain steps up to the next trial; none: drafting is on.
    wait: Option<usize>,
    /// Plain steps before a trial.
    interval: usize,
}

/// Below this many times plain decoding's rate drafting does not pay; a trial must bring more.
const PAYS: f64 = 1.03;
const PAYS_AGAIN: f64 = 1.08;
/// Poor rounds in a row that end it.
const POOR: usize = 8;
/// Plain steps before the first trial, and before any: twice as many after each that fails.
const INTERVALS: (usize, usize) = (16, 256);
/// Paying rounds after which the next interval is the first one again.
const SETTLED: usize = 64;
/// What is left of a round's tokens and costs after another one; after a trial, which stands for all the rounds
/// between.
const MEMORY: f64 = 0.9;
const MEMORY_OF_TRIALS: f64 = 0.5;

impl<C> WherePays<C> {
    pub fn new(inner: C, costs: Costs) -> WherePays<C> {
        let (tokens, spent, interval) = (0.0, 0.0, INTERVALS.0);
        WherePays { inner, costs, tokens, spent, rounds: 0, poor: 0, paid: 0, wait: None, interval }
    }

    /// Whether rounds draft, trials aside.
    pub fn is_on(&self) -> bool {
        self.wait.is_none()
    }

    /// Tokens for the cost of a plain step; 1 in plain decoding.
    pub fn gain(&self) -> f64 {
        if self.spent > 0.0 { self.tokens / self.spent * self.costs.plain() } else { 1.0 }
    }
}

impl<C: Controller> Controller for WherePays<C> {
    fn drafts(&mut self, most: usize) -> usize {
        match &mut self.wait {
            // Where nothing could be drafted anyway, no trial is lost.
            _ if most == 0 => 0,
            Some(wait) if *wait > 0 => {
                *wait -= 1;
                0
            }
            _ => self.inner.drafts(most),
        }
    }

    fn cut(&mut self, costs: &[u32]) -> usize {
        self.inner.cut(costs)
    }

    fn judged(&mut self, verified: usize, accepted: usize) {
        self.inner.judged(verified, accepted);
        let memory = if self.is_on() { MEMORY } else { MEMORY_OF_TRIALS };
        // A round's weight is what it costs, so that gains are rates.
        let norm = 1.0 - memory;
        let first = self.rounds == 0;
        let mix = |old: f64, new: f64| if first { new } else { memory * old + norm * new };
        self.tokens = mix(self.tokens, accepted as f64 + 1.0);
        self.spent = mix(self.spent, self.costs.round(verified));
        self.rounds += 1;
        let gain = self.gain();
        match self.wait {
            None => {
                let poor = gain < PAYS && self.rounds > FROZEN;
                self.poor = if poor { self.poor + 1 } else { 0 };
                self.paid += usize::from(!poor);
                if self.paid >= SETTLED {
                    self.interval = INTERVALS.0;
                }
                if self.poor == POOR {
                    self.wait = Some(self.interval);
                }
            }
            Some(_) => {
                self.interval = (2 * self.interval).min(INTERVALS.1);
                let again = gain >= PAYS_AGAIN;
                (self.poor, self.paid) = (0, 0);
                self.wait = (!again).then_some(self.interval);
            }
        }
    }
}
