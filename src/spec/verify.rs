//! Rules that judge drafts drawn at random: token by token, by blocks, over trees. They accept with probabilities built
//! from two distributions, the target's and the one a draft was drawn from, and emit the target's distribution; the tokens are not those
//! of autoregressive decoding with the same seed, as the rule `match` of [`crate::spec::sampling`] emits them.
//!
//! All is integer, so that a device can decide alike: probabilities are multiples of 2^-48, and every chance is a call
//! of a [`RandomSource`]. [`PhiloxStream`] are Philox words; a test's coin takes every branch in turn and sums up exact probabilities.
//!
//! Losslessness needs one thing of the caller: the distributions given here are those the drafts were drawn from. A draft that
//! was not drawn, such as the drafter's best token, has the distribution of temperature 0: all of it on that token. To judge it
//! by the drafter's probability would be wrong. And a draft that was drawn must not be dropped for what it is; a chain
//! may end after it.

use crate::spec::sampling::{SamplingParams, philox};
use std::borrow::Cow;

/// Probability 1.
pub const ONE: u64 = 1 << 48;

/// The distribution of a row in units of 2^-48: `(id, probability)` of the tokens that have any, ids ascending. They add up to
/// [`ONE`] exactly, but for those that [`multi_draft_block_verify`] makes for itself and shows nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution(Vec<(u32, u64)>);

impl Distribution {
    /// From weights, ids ascending; what rounding leaves over goes to `rounding_token`. `None` where they add up to nothing or to
    /// 2^64, or where the rounding_token is not among them.
    ///
    /// With the sum `Z` shifted up to 64 bits and `R = floor(2^112 / Z)`, which is above 2^48 and at most 2^49, a
    /// weight, shifted alike, becomes the upper half of its product with `R`: one division a row, and nothing
    /// overflows, whatever the vocabulary. Each is short by less than 2 units, so the rounding_token gets less than two a token.
    pub fn new(mut weights: Vec<(u32, u64)>, rounding_token: u32) -> Option<Distribution> {
        let total = weights.iter().try_fold(0u64, |sum, &(_, w)| sum.checked_add(w)).filter(|&z| z > 0)?;
        let up = total.leading_zeros();
        let inverse = ((1u128 << 112) / u128::from(total << up)) as u64;
        let mut left = ONE;
        for (_, w) in &mut weights {
            *w = high(*w << up, inverse);
            left -= *w;
        }
        let at = weights.binary_search_by_key(&rounding_token, |&(id, _)| id).ok()?;
        weights[at].1 += left;
        weights.retain(|&(_, p)| p > 0);
        Some(Distribution(weights))
    }

    /// From weights that are left of a distribution: the rounding_token is the heaviest, of several the lowest.
    fn of_rest(weights: Vec<(u32, u64)>) -> Option<Distribution> {
        let rounding_token = weights.iter().rev().max_by_key(|&&(_, w)| w)?.0;
        Distribution::new(weights, rounding_token)
    }

    /// The tokens and their probabilities, ids ascending.
    pub fn tokens(&self) -> &[(u32, u64)] {
        &self.0
    }

    /// The probability of a token.
    pub fn of(&self, id: u32) -> u64 {
        self.0.binary_search_by_key(&id, |&(id, _)| id).map_or(0, |at| self.0[at].1)
    }

    /// The distribution of another draw, without that token. `None` if there is no other.
    pub fn without(&self, id: u32) -> Option<Distribution> {
        Distribution::of_rest(self.0.iter().copied().filter(|&(other, _)| other != id).collect())
    }

    /// `max(weight * self - other, 0)`, of the tokens where it is not 0; `weight` in units of 2^-48, products rounded
    /// down.
    fn beyond(&self, weight: u64, other: &Distribution) -> Vec<(u32, u64)> {
        let over = |&(id, p): &(u32, u64)| (id, times(weight, p).saturating_sub(other.of(id)));
        self.0.iter().map(over).filter(|&(_, w)| w > 0).collect()
    }
}

/// `floor(a b / 2^64)`
fn high(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// `floor(a b / 2^48)`, below 2^64.
fn times(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 48) as u64
}

/// `min(2^48, floor(a b / n))` of three that are at most [`ONE`]; 0 where `n` is 0.
fn ratio(a: u64, b: u64, n: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product.checked_div(n.into()).unwrap_or(0).min(ONE.into()) as u64
}

/// Which drafts stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VerifyMethod {
    /// Those that are what autoregressive decoding emits with the same seed
    #[default]
    Match,
    /// Token by token, so that the distribution is the target's
    Rejection,
    /// Whole blocks, so that the distribution is the target's
    Block,
}

impl VerifyMethod {
    /// The word in `--verify` and in records.
    pub fn name(self) -> &'static str {
        match self {
            VerifyMethod::Match => "match",
            VerifyMethod::Rejection => "rejection",
            VerifyMethod::Block => "block",
        }
    }
}

/// How a request's drafts are made and judged.
#[derive(Debug, Clone, PartialEq)]
pub struct SpecConfig {
    pub rule: VerifyMethod,
    /// What drafts are drawn with from the drafter's logits. Seed and stream are the request's. At temperature 0 they
    /// are the drafter's best tokens. Else, under [`VerifyMethod::Match`], they are what [`SamplingParams::choose`] makes of the
    /// drafter's logits with the very noise that the target's tokens are chosen by: distributions that are alike then choose
    /// alike (Daliri et al., arXiv 2408.07978). Under the other rules they are drawn from words of their own.
    pub sampling: SamplingParams,
    /// Rounds verify a tree of up to so many rows, the anchor counted, 2 to [`crate::spec::tree::MOST_ROWS`]; at most as deep as
    /// a block is. Under [`VerifyMethod::Match`] it is [`crate::spec::tree::Tree::best_first`] of the drafter's best tokens; under
    /// [`VerifyMethod::Rejection`] [`crate::spec::tree::shape`], of distinct siblings; under [`VerifyMethod::Block`] several chains,
    /// [`crate::spec::tree::chains`]. None: a chain.
    pub tree: Option<usize>,
}

impl Default for SpecConfig {
    /// Chains of the drafter's best tokens, judged by [`VerifyMethod::Match`].
    fn default() -> SpecConfig {
        let sampling =
            SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
        SpecConfig { rule: VerifyMethod::Match, sampling, tree: None }
    }
}

// ---- chances ----

/// What a chance decides: the top byte of a counter's second word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Which token a row drafts.
    Draft = 2,
    /// Whether the row's draft stands.
    Accept = 3,
    /// Which token follows the row, once no draft does.
    Residual = 4,
}

/// Names a chance within a round. No two of a round have the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    pub purpose: Purpose,
    /// Of the token in question: its position less the anchor's.
    pub depth: usize,
    /// The row that the purpose speaks of; the anchor's is 0.
    pub row: usize,
}

/// Where chances come from.
pub trait RandomSource {
    /// True with probability `s / n`, and always where `s` is not less than `n`.
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool;

    /// An id, with the probability of its share of the weights; `None` where they add up to 0. They are given by
    /// ascending ids, and add up to less than 2^64.
    fn pick(&mut self, word: DrawKey, weights: &[(u32, u64)]) -> Option<u32>;
}

/// Philox words of one round of a request. Chances are right to 2^-64 each.
///
/// The round is part of every counter: drafts and tests beyond the point where a round stopped have had a say in where
/// it did, so that the next one must not meet their words again. A batch slot is in none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhiloxStream {
    pub seed: u64,
    /// The request's.
    pub stream: u32,
    /// Of the request, from 1 on: words with a 0 belong to the rule `match`.
    pub round: u32,
    /// The anchor's position.
    pub anchor: u32,
}

impl PhiloxStream {
    /// The counter of a chance. Rows are fewer than 2^24.
    pub fn counter(&self, word: DrawKey) -> [u32; 4] {
        let position = self.anchor.wrapping_add(word.depth as u32);
        [position, ((word.purpose as u32) << 24) | word.row as u32, self.stream, self.round]
    }

    /// The chance's random 64 bits.
    pub fn bits(&self, word: DrawKey) -> u64 {
        let drawn = philox(self.counter(word), [self.seed as u32, (self.seed >> 32) as u32]);
        (u64::from(drawn[0]) << 32) | u64::from(drawn[1])
    }
}

impl RandomSource for PhiloxStream {
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool {
        s >= n || high(self.bits(word), n) < s
    }

    fn pick(&mut self, word: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        let mut at = high(self.bits(word), weights.iter().map(|&(_, w)| w).sum());
        for &(id, w) in weights {
            match at.checked_sub(w) {
                Some(beyond) => at = beyond,
                None => return Some(id),
            }
        }
        None
    }
}

// ---- drafts ----

/// How the children of a node are drawn from the distribution of their depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// Each from the whole distribution, whatever the others are (SpecInfer, arXiv 2305.09781).
    Independent,
    /// Each without those before it (Sequoia, arXiv 2402.12374).
    Distinct,
}

/// Draws a chain, a token from each distribution. `None` never, with distributions.
pub fn draw(distributions: &[Distribution], coin: &mut impl RandomSource) -> Option<Vec<u32>> {
    let one = |(i, distribution): (usize, &Distribution)| {
        coin.pick(word(Purpose::Draft, i + 1, i + 1), &distribution.0)
    };
    distributions.iter().enumerate().map(one).collect()
}

/// Draws a tree of a given shape: `parents` `[rows]` as [`crate::spec::sampling::walk`] takes them, the anchor's row first; rows
/// of depth `d + 1` from `distributions[d]`, siblings in the order of their rows. Returns the tokens. Where
/// [`Siblings::Distinct`] runs out of tokens a row repeats the sibling before it, and [`recursive`] passes it over: so
/// the shape depends on nothing that is drawn. `None` where a row follows no earlier one, or no distribution is so deep.
pub fn sample_tree(
    anchor: u32,
    parents: &[u32],
    distributions: &[Distribution],
    siblings: Siblings,
    coin: &mut impl RandomSource,
) -> Option<Vec<u32>> {
    struct Row<'a> {
        token: u32,
        depth: usize,
        /// Of its next child.
        distribution: Option<Cow<'a, Distribution>>,
        /// The child before that.
        child: Option<u32>,
    }
    let distribution = |depth: usize| distributions.get(depth).map(Cow::Borrowed);
    let mut rows = vec![Row { token: anchor, depth: 0, distribution: distribution(0), child: None }];
    for &parent in parents.iter().skip(1) {
        let own = rows.len();
        let parent = rows.get_mut(parent as usize)?;
        let depth = parent.depth + 1;
        let token = match parent.distribution.take() {
            None => parent.child?,
            Some(from) => {
                let token = coin.pick(word(Purpose::Draft, depth, own), &from.0)?;
                parent.distribution = next_law(from, token, siblings);
                token
            }
        };
        parent.child = Some(token);
        rows.push(Row { token, depth, distribution: distribution(depth), child: None });
    }
    Some(rows.iter().map(|row| row.token).collect())
}

/// The distribution of the sibling after one that was drawn from `distribution`.
fn next_law(distribution: Cow<Distribution>, drawn: u32, siblings: Siblings) -> Option<Cow<Distribution>> {
    match siblings {
        Siblings::Independent => Some(distribution),
        Siblings::Distinct => distribution.without(drawn).map(Cow::Owned),
    }
}

fn word(purpose: Purpose, depth: usize, row: usize) -> DrawKey {
    DrawKey { purpose, depth, row }
}

// ---- rules ----

/// Judges a chain token by token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a draft stands
/// with probability `min(1, p / q)`; in place of the first that falls comes a token of the distribution `max(p - q, 0)`.
/// `drafts[i]` was drawn from `distributions[i]`, and there may be more distributions than drafts; `target(row)` is the target's distribution after
/// the first `row` drafts, asked for only where those stand. Returns how many stand and the token after them; `None` as
/// soon as `target` says so.
///
/// Lossless: a token is emitted as an accepted draft with probability `min(p, q)`, and in place of a fallen one, which
/// a draft is with probability `1 - sum min(p, q) = sum max(p - q, 0)`, with `max(p - q, 0)`: together `p`.
pub fn rejection(
    drafts: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    coin: &mut impl RandomSource,
) -> Option<(usize, u32)> {
    for (row, (&draft, distribution)) in drafts.iter().zip(distributions).enumerate() {
        let child = [(row + 1, draft)];
        if let Verdict::Token(token) =
            node(target(row)?, distribution, &child, Siblings::Independent, row, row, coin)?
        {
            return Some((row, token));
        }
    }
    let g = drafts.len();
    Some((g, coin.pick(word(Purpose::Residual, g + 1, g), &target(g)?.0)?))
}

/// Judges a tree of [`sample_tree`] from the root down, the siblings of a node in the order they were drawn in: recursive
/// rejection. `distributions[d]` is what the drafts of depth `d + 1` were drawn from; `target(row)` the target's distribution after the
/// drafts on the way to `row`. Returns the rows of the walk, 0 first, and the token that follows them; `None` as soon
/// as `target` says so.
///
/// Lossless: one step of [`rejection`] leaves the distribution `max(p - q, 0)` to be emitted, and the next sibling is a draw
/// from a known distribution that does not depend on how the step went; so the steps follow each other. That is why the order
/// of siblings matters. Distributions between two siblings are rounded: the distribution that is emitted is the target's to `2 V 2^-48`
/// for every sibling after the first.
pub fn recursive(
    tokens: &[u32],
    parents: &[u32],
    distributions: &[Distribution],
    siblings: Siblings,
    mut target: impl FnMut(usize) -> Option<Distribution>,
    coin: &mut impl RandomSource,
) -> Option<(Vec<usize>, u32)> {
    let mut path = vec![0];
    let mut row = 0;
    loop {
        let (p, depth) = (target(row)?, path.len() - 1);
        let Some(distribution) = distributions.get(depth) else {
            return Some((path, coin.pick(word(Purpose::Residual, depth + 1, row), &p.0)?));
        };
        let children: Vec<(usize, u32)> = (row + 1..tokens.len())
            .filter(|&child| parents[child] as usize == row)
            .map(|child| (child, tokens[child]))
            .collect();
        match node(p, distribution, &children, siblings, depth, row, coin)? {
            Verdict::Child(child) => row = child,
            Verdict::Token(token) => return Some((path, token)),
        }
        path.push(row);
    }
}

enum Verdict {
    /// That row's draft stands.
    Child(usize),
    /// None does; this follows.
    Token(u32),
}

/// Judges the drafts `(row, token)` that follow `row`, which stands at `depth`.
fn node(
    mut p: Distribution,
    distribution: &Distribution,
    children: &[(usize, u32)],
    siblings: Siblings,
    depth: usize,
    row: usize,
    coin: &mut impl RandomSource,
) -> Option<Verdict> {
    let (mut q, mut rest) = (Some(Cow::Borrowed(distribution)), Vec::new());
    for &(child, token) in children {
        let Some(from) = q else { break };
        // A token that this distribution cannot draw is no draft of it: a sibling seen before, passed over.
        let chance = from.of(token);
        if chance > 0 {
            if !rest.is_empty() {
                p = Distribution::of_rest(rest)?;
            }
            if coin.accept(word(Purpose::Accept, depth + 1, child), p.of(token), chance) {
                return Some(Verdict::Child(child));
            }
            rest = p.beyond(ONE, &from);
        }
        q = if chance > 0 { next_law(from, token, siblings) } else { Some(from) };
    }
    // Where nothing is beyond, both distributions are the same, and no draft falls.
    let weights = if rest.is_empty() { &p.0 } else { &rest };
    Some(Verdict::Token(coin.pick(word(Purpose::Residual, depth + 1, row), weights)?))
}

/// Judges a chain as a block (Sun et al., arXiv 2403.10444): accepts at least as many as [`rejection`] on average, and
/// as many as any rule can that judges one chain. Arguments and result as there, but that the target is also asked
/// about drafts that need not stand.
///
/// `w[i]`, in units of 2^-48, is `min(1, w[i - 1] p / q)` along the chain: the share of the drafts' first `i` that is
/// to be emitted. From the longest to the shortest, an independent test decides whether it is these that stand; it
/// makes up for what longer ones have emitted already. After them comes a token of the distribution `max(w p - q, 0)`.
/// Rounding down costs `2 V 2^-48` a row.
pub fn block(
    drafts: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    coin: &mut impl RandomSource,
) -> Option<(usize, u32)> {
    let (mut shares, mut rows) = (vec![ONE], vec![target(0)?]);
    for (i, (draft, distribution)) in drafts.iter().zip(distributions).enumerate() {
        let share = ratio(shares[i], rows[i].of(*draft), distribution.of(*draft));
        // No longer chain can be emitted.
        if share == 0 {
            break;
        }
        shares.push(share);
        rows.push(target(i + 1)?);
    }
    let whole = drafts.len();
    for (row, (p, &w)) in rows.iter().zip(&shares).enumerate().rev() {
        let (s, n) = match distributions.get(row).filter(|_| row < whole) {
            None => (w, ONE),
            Some(_) if w == ONE => (ONE, ONE),
            Some(distribution) => {
                let kept: u64 = p.0.iter().map(|&(id, p)| times(w, p).min(distribution.of(id))).sum();
                (w - kept, ONE - kept)
            }
        };
        if row > 0 && !coin.accept(word(Purpose::Accept, row, row), s, n) {
            continue;
        }
        let rest = distributions
            .get(row)
            .filter(|_| row < whole)
            .map_or(Vec::new(), |distribution| p.beyond(w, distribution));
        let weights = if rest.is_empty() { &p.0 } else { &rest };
        return Some((row, coin.pick(word(Purpose::Residual, row + 1, row), weights)?));
    }
    None
}

// ---- the best of several chains ----

/// Draws `count` chains for [`multi_draft_block_verify`], all of them after the anchor, one behind the other: row `1 + c g + i` has
/// draft `i` of chain `c`, where `g` is the number of distributions. Returns the tokens, and the parents that [`sample_tree`] would take.
pub fn sample_chains(
    anchor: u32,
    count: usize,
    distributions: &[Distribution],
    coin: &mut impl RandomSource,
) -> Option<(Vec<u32>, Vec<u32>)> {
    let (mut tokens, mut parents) = (vec![anchor], vec![0]);
    for _ in 0..count {
        for (i, distribution) in distributions.iter().enumerate() {
            let row = tokens.len();
            tokens.push(coin.pick(word(Purpose::Draft, i + 1, row), &distribution.0)?);
            parents.push(if i == 0 { 0 } else { row as u32 - 1 });
        }
    }
    Some((tokens, parents))
}

/// Judges the chains of [`sample_chains`], after Thomas and Pal, arXiv 2602.16961: chooses one, draft by draft, and judges it
/// by [`block`] as drawn from the distribution that such a choice has. At each row those chains run that have had the drafts chosen
/// so far; of them the one with the highest [`class`] has the next draft, of several the first. Arguments and result as
/// of [`recursive`], where `distributions` are as many as a chain has drafts; the rows are those of the chain chosen last.
///
/// A chain's draws are its own, so that all there is to know of what it is, given the choices so far, is how likely it is
/// out of the running, `out`. The chain with the next draft `x` of class `b` is chain `c` with the probability that this
/// runs and draws `x`, times that of every earlier one being out or of a lower class, times that of every later one being
/// out or of no higher: in all `q(x)` times a sum that only `b` decides. Such distributions fall short of [`ONE`] by rounding, by
/// less than a unit a token and some two a chain, and have no rounding_token: `block` needs no more.
///
/// Lossless, up to rounding: append to each token the chain that it was chosen from. Of the chains before a draft that
/// distribution depends, but the target's does not; given the draft, both may have the same distribution of the chain, which cancels in
/// every ratio that `block` takes and adds up to 1 in everything that it sums. Where `q` is `p` all tokens are of one
/// class, and the distribution is `q`: a choice bends nothing there.
pub fn multi_draft_block_verify(
    tokens: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    coin: &mut impl RandomSource,
) -> Option<(Vec<usize>, u32)> {
    let g = distributions.len();
    let count = tokens.len().saturating_sub(1).checked_div(g).unwrap_or(0);
    let row = |chain: usize, draft: usize| 1 + chain * g + draft;
    let (mut running, mut out): (Vec<usize>, _) = ((0..count).collect(), vec![0; count]);
    let (mut winner, mut drafts, mut chosen, mut rows) = (0, vec![], vec![], vec![target(0)?]);
    for (i, distribution) in distributions.iter().enumerate() {
        let class_of = |id: u32| class(rows[i].of(id), distribution.of(id));
        // The drafter's mass below each class; the next entry's is that up to it.
        let mut below = [0; CLASSES + 1];
        distribution.0.iter().for_each(|&(id, q)| below[class_of(id) + 1] += q);
        (0..CLASSES).for_each(|class| below[class + 1] += below[class]);
        let shares: Vec<u64> = (0..CLASSES).map(|b| share_of(&out, below[b], below[b + 1])).collect();
        let bent = distribution.0.iter().map(|&(id, q)| (id, times(q, shares[class_of(id)])));
        chosen.push(Distribution(bent.filter(|&(_, p)| p > 0).collect()));

        let draft = |chain: usize| tokens[row(chain, i)];
        winner = *running.iter().rev().max_by_key(|&&chain| class_of(draft(chain)))?;
        let (id, up_to) = (draft(winner), below[class_of(draft(winner)) + 1]);
        running.retain(|&chain| draft(chain) == id);
        out[..winner].fill(ONE);
        out[winner] = 0;
        for out in &mut out[winner + 1..] {
            *out = ONE - ratio(ONE - *out, distribution.of(id), out_or(*out, up_to));
        }
        drafts.push(id);
        rows.push(target(row(winner, i))?);
    }
    let (accepted, next) = block(&drafts, &chosen, |row| rows.get(row).cloned(), coin)?;
    Some(([0].into_iter().chain((0..accepted).map(|i| row(winner, i))).collect(), next))
}

/// Classes of [`class`].
const CLASSES: usize = 64;

/// How much likelier a token is to the target, of which it has the probability `p`, than to the drafter, `q`: in halves
/// of an octave, 32 where they are alike. Logarithms are piecewise linear, from one power of two to the next. Any function
/// of the two makes [`multi_draft_block_verify`] lossless, and hardly any accepts more: on the demo pair octaves, halves and eighths
/// differ by 0.003 of a draft at most, and halves are best.
pub fn class(p: u64, q: u64) -> usize {
    let halves = |x: u64| {
        let zeros = x.leading_zeros();
        2 * (64 - zeros as i32) + (x.checked_shl(zeros).unwrap_or(0) >> 62 & 1) as i32
    };
    if p == 0 { 0 } else { (halves(p) - halves(q) + 32).clamp(0, CLASSES as i32 - 1) as usize }
}

/// That a chain is out, or else has what has this probability.
fn out_or(out: u64, likely: u64) -> u64 {
    out + times(ONE - out, likely)
}

/// What the probability of a token is multiplied with by a choice among chains that are out with these probabilities:
/// `below` and `up_to` are the drafter's mass below the token's class and up to it.
fn share_of(out: &[u64], below: u64, up_to: u64) -> u64 {
    let (mut sum, mut power) = (0, ONE);
    for &out in out {
        // Horner's scheme: what earlier chains have, where this one is no better; and this one's, where they are worse.
        sum = times(sum, out_or(out, up_to)) + times(power, ONE - out);
        power = times(power, out_or(out, below));
    }
    sum
}
