//! Rules that judge drafts drawn at random: token by token, by blocks, over trees. They accept with probabilities built
//! from two laws, the target's and the one a draft was drawn from, and emit the target's law; the tokens are not those
//! of plain decoding with the same seed, as the rule `match` of [`crate::verify`] emits them.
//!
//! All is integer, so that a device can decide alike: probabilities are multiples of 2^-48, and every chance is a call
//! of a [`Coin`]. [`Dice`] are Philox words; a test's coin takes every branch in turn and sums up exact probabilities.
//!
//! Losslessness needs one thing of the caller: the laws given here are those the drafts were drawn from. A draft that
//! was not drawn, such as the drafter's best token, has the law of temperature 0: all of it on that token. To judge it
//! by the drafter's probability would be wrong. And a draft that was drawn must not be dropped for what it is; a chain
//! may end after it.

use crate::verify::{Sampling, philox};
use std::borrow::Cow;

/// Probability 1.
pub const ONE: u64 = 1 << 48;

/// The law of a row in units of 2^-48: `(id, probability)` of the tokens that have any, ids ascending. They add up to
/// [`ONE`] exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probabilities(Vec<(u32, u64)>);

impl Probabilities {
    /// From weights, ids ascending; what rounding leaves over goes to `heir`. `None` where they add up to nothing or to
    /// 2^64, or where the heir is not among them.
    ///
    /// With the sum `Z` shifted up to 64 bits and `R = floor(2^112 / Z)`, which is above 2^48 and at most 2^49, a
    /// weight, shifted alike, becomes the upper half of its product with `R`: one division a row, and nothing
    /// overflows, whatever the vocabulary. Each is short by less than 2 units, so the heir gets less than two a token.
    pub fn new(mut weights: Vec<(u32, u64)>, heir: u32) -> Option<Probabilities> {
        let total = weights.iter().try_fold(0u64, |sum, &(_, w)| sum.checked_add(w)).filter(|&z| z > 0)?;
        let up = total.leading_zeros();
        let inverse = ((1u128 << 112) / u128::from(total << up)) as u64;
        let mut left = ONE;
        for (_, w) in &mut weights {
            *w = high(*w << up, inverse);
            left -= *w;
        }
        let at = weights.binary_search_by_key(&heir, |&(id, _)| id).ok()?;
        weights[at].1 += left;
        weights.retain(|&(_, p)| p > 0);
        Some(Probabilities(weights))
    }

    /// From weights that are left of a law: the heir is the heaviest, of several the lowest.
    fn of_rest(weights: Vec<(u32, u64)>) -> Option<Probabilities> {
        let heir = weights.iter().rev().max_by_key(|&&(_, w)| w)?.0;
        Probabilities::new(weights, heir)
    }

    /// The tokens and their probabilities, ids ascending.
    pub fn tokens(&self) -> &[(u32, u64)] {
        &self.0
    }

    /// The probability of a token.
    pub fn of(&self, id: u32) -> u64 {
        self.0.binary_search_by_key(&id, |&(id, _)| id).map_or(0, |at| self.0[at].1)
    }

    /// The law of another draw, without that token. `None` if there is no other.
    pub fn without(&self, id: u32) -> Option<Probabilities> {
        Probabilities::of_rest(self.0.iter().copied().filter(|&(other, _)| other != id).collect())
    }

    /// `max(weight * self - other, 0)`, of the tokens where it is not 0; `weight` in units of 2^-48, products rounded
    /// down.
    fn beyond(&self, weight: u64, other: &Probabilities) -> Vec<(u32, u64)> {
        let over = |&(id, p): &(u32, u64)| (id, times(weight, p).saturating_sub(other.of(id)));
        self.0.iter().map(over).filter(|&(_, w)| w > 0).collect()
    }
}

/// `floor(a b / 2^64)`
fn high(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 64) as u64
}

/// `floor(a b / 2^48)` of two that are at most [`ONE`].
fn times(a: u64, b: u64) -> u64 {
    ((u128::from(a) * u128::from(b)) >> 48) as u64
}

/// Which drafts stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Rule {
    /// Those that are what plain decoding emits with the same seed
    #[default]
    Match,
    /// Token by token, so that the law is the target's
    Rejection,
    /// Whole blocks, so that the law is the target's
    Block,
}

impl Rule {
    /// The word in `--verify` and in records.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Match => "match",
            Rule::Rejection => "rejection",
            Rule::Block => "block",
        }
    }
}

/// How a request's drafts are made and judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Drafting {
    pub rule: Rule,
    /// What drafts are drawn with from the drafter's logits. Seed and stream are the request's. At temperature 0 they
    /// are the drafter's best tokens. Else, under [`Rule::Match`], they are what [`Sampling::choose`] makes of the
    /// drafter's logits with the very noise that the target's tokens are chosen by: laws that are alike then choose
    /// alike (Daliri et al., arXiv 2408.07978). Under the other rules they are drawn from words of their own.
    pub sampling: Sampling,
    /// Rounds verify a tree of up to so many rows, the anchor counted, 2 to [`crate::tree::MOST_ROWS`]; at most as deep as
    /// a block is. Under [`Rule::Match`] it is [`crate::tree::Tree::best_first`] of the drafter's best tokens; under
    /// [`Rule::Rejection`] [`crate::tree::shape`], of distinct siblings; under [`Rule::Block`] several chains,
    /// [`crate::tree::chains`]. None: a chain.
    pub tree: Option<usize>,
}

impl Default for Drafting {
    /// Chains of the drafter's best tokens, judged by [`Rule::Match`].
    fn default() -> Drafting {
        let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
        Drafting { rule: Rule::Match, sampling, tree: None }
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
pub struct Word {
    pub purpose: Purpose,
    /// Of the token in question: its position less the anchor's.
    pub depth: usize,
    /// The row that the purpose speaks of; the anchor's is 0.
    pub row: usize,
}

/// Where chances come from.
pub trait Coin {
    /// True with probability `s / n`, and always where `s` is not less than `n`.
    fn accept(&mut self, word: Word, s: u64, n: u64) -> bool;

    /// An id, with the probability of its share of the weights; `None` where they add up to 0. They are given by
    /// ascending ids, and add up to less than 2^64.
    fn pick(&mut self, word: Word, weights: &[(u32, u64)]) -> Option<u32>;
}

/// Philox words of one round of a request. Chances are right to 2^-64 each.
///
/// The round is part of every counter: drafts and tests beyond the point where a round stopped have had a say in where
/// it did, so that the next one must not meet their words again. A batch slot is in none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dice {
    pub seed: u64,
    /// The request's.
    pub stream: u32,
    /// Of the request, from 1 on: words with a 0 belong to the rule `match`.
    pub round: u32,
    /// The anchor's position.
    pub anchor: u32,
}

impl Dice {
    /// The counter of a chance. Rows are fewer than 2^24.
    pub fn counter(&self, word: Word) -> [u32; 4] {
        let position = self.anchor.wrapping_add(word.depth as u32);
        [position, ((word.purpose as u32) << 24) | word.row as u32, self.stream, self.round]
    }

    /// The chance's random 64 bits.
    pub fn bits(&self, word: Word) -> u64 {
        let drawn = philox(self.counter(word), [self.seed as u32, (self.seed >> 32) as u32]);
        (u64::from(drawn[0]) << 32) | u64::from(drawn[1])
    }
}

impl Coin for Dice {
    fn accept(&mut self, word: Word, s: u64, n: u64) -> bool {
        s >= n || high(self.bits(word), n) < s
    }

    fn pick(&mut self, word: Word, weights: &[(u32, u64)]) -> Option<u32> {
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

/// How the children of a node are drawn from the law of their depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// Each from the whole law, whatever the others are (SpecInfer, arXiv 2305.09781).
    Independent,
    /// Each without those before it (Sequoia, arXiv 2402.12374).
    Distinct,
}

/// Draws a chain, a token from each law. `None` never, with laws.
pub fn draw(laws: &[Probabilities], coin: &mut impl Coin) -> Option<Vec<u32>> {
    let one = |(i, law): (usize, &Probabilities)| coin.pick(word(Purpose::Draft, i + 1, i + 1), &law.0);
    laws.iter().enumerate().map(one).collect()
}

/// Draws a tree of a given shape: `parents` `[rows]` as [`crate::verify::walk`] takes them, the anchor's row first; rows
/// of depth `d + 1` from `laws[d]`, siblings in the order of their rows. Returns the tokens. Where
/// [`Siblings::Distinct`] runs out of tokens a row repeats the sibling before it, and [`recursive`] passes it over: so
/// the shape depends on nothing that is drawn. `None` where a row follows no earlier one, or no law is so deep.
pub fn draw_shape(
    anchor: u32,
    parents: &[u32],
    laws: &[Probabilities],
    siblings: Siblings,
    coin: &mut impl Coin,
) -> Option<Vec<u32>> {
    struct Row<'a> {
        token: u32,
        depth: usize,
        /// Of its next child.
        law: Option<Cow<'a, Probabilities>>,
        /// The child before that.
        child: Option<u32>,
    }
    let law = |depth: usize| laws.get(depth).map(Cow::Borrowed);
    let mut rows = vec![Row { token: anchor, depth: 0, law: law(0), child: None }];
    for &parent in parents.iter().skip(1) {
        let own = rows.len();
        let parent = rows.get_mut(parent as usize)?;
        let depth = parent.depth + 1;
        let token = match parent.law.take() {
            None => parent.child?,
            Some(from) => {
                let token = coin.pick(word(Purpose::Draft, depth, own), &from.0)?;
                parent.law = next_law(from, token, siblings);
                token
            }
        };
        parent.child = Some(token);
        rows.push(Row { token, depth, law: law(depth), child: None });
    }
    Some(rows.iter().map(|row| row.token).collect())
}

/// The law of the sibling after one that was drawn from `law`.
fn next_law(law: Cow<Probabilities>, drawn: u32, siblings: Siblings) -> Option<Cow<Probabilities>> {
    match siblings {
        Siblings::Independent => Some(law),
        Siblings::Distinct => law.without(drawn).map(Cow::Owned),
    }
}

fn word(purpose: Purpose, depth: usize, row: usize) -> Word {
    Word { purpose, depth, row }
}

// ---- rules ----

/// Judges a chain token by token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a draft stands
/// with probability `min(1, p / q)`; in place of the first that falls comes a token of the law `max(p - q, 0)`.
/// `drafts[i]` was drawn from `laws[i]`, and there may be more laws than drafts; `target(row)` is the target's law after
/// the first `row` drafts, asked for only where those stand. Returns how many stand and the token after them; `None` as
/// soon as `target` says so.
///
/// Lossless: a token is emitted as an accepted draft with probability `min(p, q)`, and in place of a fallen one, which
/// a draft is with probability `1 - sum min(p, q) = sum max(p - q, 0)`, with `max(p - q, 0)`: together `p`.
pub fn rejection(
    drafts: &[u32],
    laws: &[Probabilities],
    mut target: impl FnMut(usize) -> Option<Probabilities>,
    coin: &mut impl Coin,
) -> Option<(usize, u32)> {
    for (row, (&draft, law)) in drafts.iter().zip(laws).enumerate() {
        let child = [(row + 1, draft)];
        if let Verdict::Token(token) = node(target(row)?, law, &child, Siblings::Independent, row, row, coin)?
        {
            return Some((row, token));
        }
    }
    let g = drafts.len();
    Some((g, coin.pick(word(Purpose::Residual, g + 1, g), &target(g)?.0)?))
}

/// Judges a tree of [`draw_shape`] from the root down, the siblings of a node in the order they were drawn in: recursive
/// rejection. `laws[d]` is what the drafts of depth `d + 1` were drawn from; `target(row)` the target's law after the
/// drafts on the way to `row`. Returns the rows of the walk, 0 first, and the token that follows them; `None` as soon
/// as `target` says so.
///
/// Lossless: one step of [`rejection`] leaves the law `max(p - q, 0)` to be emitted, and the next sibling is a draw
/// from a known law that does not depend on how the step went; so the steps follow each other. That is why the order
/// of siblings matters. Laws between two siblings are rounded: the law that is emitted is the target's to `2 V 2^-48`
/// for every sibling after the first.
pub fn recursive(
    tokens: &[u32],
    parents: &[u32],
    laws: &[Probabilities],
    siblings: Siblings,
    mut target: impl FnMut(usize) -> Option<Probabilities>,
    coin: &mut impl Coin,
) -> Option<(Vec<usize>, u32)> {
    let mut path = vec![0];
    let mut row = 0;
    loop {
        let (p, depth) = (target(row)?, path.len() - 1);
        let Some(law) = laws.get(depth) else {
            return Some((path, coin.pick(word(Purpose::Residual, depth + 1, row), &p.0)?));
        };
        let children: Vec<(usize, u32)> = (row + 1..tokens.len())
            .filter(|&child| parents[child] as usize == row)
            .map(|child| (child, tokens[child]))
            .collect();
        match node(p, law, &children, siblings, depth, row, coin)? {
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
    mut p: Probabilities,
    law: &Probabilities,
    children: &[(usize, u32)],
    siblings: Siblings,
    depth: usize,
    row: usize,
    coin: &mut impl Coin,
) -> Option<Verdict> {
    let (mut q, mut rest) = (Some(Cow::Borrowed(law)), Vec::new());
    for &(child, token) in children {
        let Some(from) = q else { break };
        // A token that this law cannot draw is no draft of it: a sibling seen before, passed over.
        let chance = from.of(token);
        if chance > 0 {
            if !rest.is_empty() {
                p = Probabilities::of_rest(rest)?;
            }
            if coin.accept(word(Purpose::Accept, depth + 1, child), p.of(token), chance) {
                return Some(Verdict::Child(child));
            }
            rest = p.beyond(ONE, &from);
        }
        q = if chance > 0 { next_law(from, token, siblings) } else { Some(from) };
    }
    // Where nothing is beyond, both laws are the same, and no draft falls.
    let weights = if rest.is_empty() { &p.0 } else { &rest };
    Some(Verdict::Token(coin.pick(word(Purpose::Residual, depth + 1, row), weights)?))
}

/// Judges a chain as a block (Sun et al., arXiv 2403.10444): accepts at least as many as [`rejection`] on average, and
/// as many as any rule can that judges one chain. Arguments and result as there, but that the target is also asked
/// about drafts that need not stand.
///
/// `w[i]`, in units of 2^-48, is `min(1, w[i - 1] p / q)` along the chain: the share of the drafts' first `i` that is
/// to be emitted. From the longest to the shortest, an independent test decides whether it is these that stand; it
/// makes up for what longer ones have emitted already. After them comes a token of the law `max(w p - q, 0)`.
/// Rounding down costs `2 V 2^-48` a row.
pub fn block(
    drafts: &[u32],
    laws: &[Probabilities],
    mut target: impl FnMut(usize) -> Option<Probabilities>,
    coin: &mut impl Coin,
) -> Option<(usize, u32)> {
    let (mut shares, mut rows) = (vec![ONE], vec![target(0)?]);
    for (i, (draft, law)) in drafts.iter().zip(laws).enumerate() {
        let (p, q) = (u128::from(rows[i].of(*draft)), u128::from(law.of(*draft)));
        let share = (u128::from(shares[i]) * p).checked_div(q).unwrap_or(0).min(ONE.into()) as u64;
        // No longer chain can be emitted.
        if share == 0 {
            break;
        }
        shares.push(share);
        rows.push(target(i + 1)?);
    }
    let whole = drafts.len();
    for (row, (p, &w)) in rows.iter().zip(&shares).enumerate().rev() {
        let (s, n) = match laws.get(row).filter(|_| row < whole) {
            None => (w, ONE),
            Some(_) if w == ONE => (ONE, ONE),
            Some(law) => {
                let kept: u64 = p.0.iter().map(|&(id, p)| times(w, p).min(law.of(id))).sum();
                (w - kept, ONE - kept)
            }
        };
        if row > 0 && !coin.accept(word(Purpose::Accept, row, row), s, n) {
            continue;
        }
        let rest = laws.get(row).filter(|_| row < whole).map_or(Vec::new(), |law| p.beyond(w, law));
        let weights = if rest.is_empty() { &p.0 } else { &rest };
        return Some((row, coin.pick(word(Purpose::Residual, row + 1, row), weights)?));
    }
    None
}

// ---- the best of several chains ----

/// Draws `count` chains for [`best_block`], all of them after the anchor, one behind the other: row `1 + c g + i` has
/// draft `i` of chain `c`, where `g` is the number of laws. Returns the tokens, and the parents that [`draw_shape`] would take.
pub fn draw_chains(
    anchor: u32,
    count: usize,
    laws: &[Probabilities],
    coin: &mut impl Coin,
) -> Option<(Vec<u32>, Vec<u32>)> {
    let (mut tokens, mut parents) = (vec![anchor], vec![0]);
    for _ in 0..count {
        for (i, law) in laws.iter().enumerate() {
            let row = tokens.len();
            tokens.push(coin.pick(word(Purpose::Draft, i + 1, row), &law.0)?);
            parents.push(if i == 0 { 0 } else { row as u32 - 1 });
        }
    }
    Some((tokens, parents))
}

/// Judges the chains of [`draw_chains`] (Thomas and Pal, arXiv 2602.16961): takes the one with the greatest `p / q` at
/// the first draft, of those alike there the greatest at the next, and so on, the lower id where they tie; and judges it
/// by [`block`], as drawn from the law that such a choice has. Arguments and result as of [`recursive`]. Lossless, up to
/// rounding, because the order is strict, and the same in the choice and in its law. Several chains may be worse than
/// one: where `q` is `p`, choosing bends it.
pub fn best_block(
    tokens: &[u32],
    laws: &[Probabilities],
    mut target: impl FnMut(usize) -> Option<Probabilities>,
    coin: &mut impl Coin,
) -> Option<(Vec<usize>, u32)> {
    let g = laws.len();
    let mut firsts: Vec<usize> = (1..tokens.len()).step_by(g.max(1)).collect();
    let count = firsts.len();
    let (mut chosen, mut below) = (Vec::new(), 0);
    let mut rows = vec![target(0)?];
    for (i, law) in laws.iter().enumerate() {
        let (bent, mut ranks) = best_law(&rows[i], law, count, below)?;
        let at = ranks.iter().position(|rank| firsts.iter().any(|first| tokens[first + i] == rank.id))?;
        let best = ranks.swap_remove(at);
        firsts.retain(|first| tokens[first + i] == best.id);
        below = best.below;
        chosen.push((best.id, bent));
        rows.push(target(firsts.first()? + i)?);
    }
    let (drafts, laws): (Vec<u32>, Vec<Probabilities>) = chosen.into_iter().unzip();
    let (accepted, next) = block(&drafts, &laws, |row| rows.get(row).cloned(), coin)?;
    // Of chains that are the same the first.
    let path = (0..accepted).filter_map(|i| Some(firsts.first()? + i));
    Some(([0].into_iter().chain(path).collect(), next))
}

/// A token in the order of choice.
struct Rank {
    id: u32,
    /// Once it is chosen: of a chain that is no better than the chosen one so far, the probability that it is worse.
    below: u64,
}

/// The law of the best of `count` draws from `q`, of which each is out of the running with probability `below`, and the
/// tokens, best first. With `a` and `b` the probabilities that a draw is no better, and worse, than a token, that is the
/// best with probability `a^count - b^count = (a - b) (a^(count - 1) + ... + b^(count - 1))`, where `a - b` is its part
/// of `q`.
fn best_law(
    p: &Probabilities,
    q: &Probabilities,
    count: usize,
    below: u64,
) -> Option<(Probabilities, Vec<Rank>)> {
    let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
    let mut order = q.0.clone();
    order.sort_by(|&(a, qa), &(b, qb)| product(p.of(b), qa).cmp(&product(p.of(a), qb)).then(a.cmp(&b)));
    let (mut weights, mut ranks, mut better) = (Vec::new(), Vec::new(), 0);
    for (id, share) in order {
        let no_better = below + times(ONE - below, ONE - better);
        better += share;
        let worse = below + times(ONE - below, ONE - better);
        let (mut sum, mut power) = (0, ONE);
        for _ in 0..count {
            // Horner's scheme: what there is times `a`, and the next power of `b`.
            sum = times(sum, no_better) + power;
            power = times(power, worse);
        }
        weights.push((id, times(share, sum)));
        ranks.push(Rank { id, below: ((u128::from(worse) << 48) / u128::from(no_better)) as u64 });
    }
    weights.sort_unstable();
    Some((Probabilities::of_rest(weights)?, ranks))
}
