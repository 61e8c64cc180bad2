//! Verification: which drafts the target accepts, and which token follows them.
//!
//! | method | accepts a draft | the output is |
//! | --- | --- | --- |
//! | exact: [`match_chain`], [`match_tree`] | if it is the target's own token | that of AR decoding, token for token |
//! | [`rejection`], [`recursive_rejection`] | with probability min(1, p/q) | distributed as the target's |
//! | [`block_verify`], [`multi_draft_block_verify`] | as part of a block | distributed as the target's |
//!
//! `p` is the target's distribution of the next token and `q` the one that the draft was sampled from. The
//! second and third kind sample the drafts ([`sample_chain`], [`sample_tree`], [`sample_chains`]). Their
//! output has the distribution of autoregressive decoding, but it is another sample: with the same seed the
//! tokens differ.
//!
//! All arithmetic is integer, so a device decides alike: probabilities are multiples of 2^-48 and every
//! random decision is a call of a [`RandomSource`].
//!
//! Losslessness needs one thing of the caller: the distributions given here must be those the drafts were
//! sampled from. A draft that was not sampled, such as the drafter's best token, has the distribution of
//! temperature 0, all of it on that token; verifying it by the drafter's probability would be wrong. And no
//! sampled draft may be dropped because of which token it is. A chain may be cut at a length that does not
//! depend on its tokens.

use crate::spec::distribution::{Distribution, ONE, ratio, times};
use crate::spec::rng::{DrawKey, Purpose, RandomSource};
use std::borrow::Cow;

// ---- exact verification ----

/// Verifies a chain of drafts exactly: samples the target at every row and accepts drafts while they are
/// equal.
///
/// Row `j` holds the target's logits after the drafts before `j`. `target_at(j)` samples it, and is called
/// only if all of those drafts are accepted. Returns how many drafts are accepted and the token that follows
/// them: a correction, or a bonus token if all are accepted. `None` as soon as `target_at` returns `None`.
/// Greedy verification is this method at temperature 0.
///
/// Lossless: by induction, a row is sampled only where the drafts before it are what autoregressive decoding
/// emits, and the token emitted there is the target's own sample, whose noise depends on its position and on
/// nothing else. So the output equals autoregressive decoding token for token, for every drafter and block
/// length. For a draft that is fixed before the noise is seen, no lossless method accepts more often.
/// Sources: the DFlash reference implementation (arXiv 2602.06036), and coupled sampling in Daliri et al.,
/// arXiv 2408.07978.
pub fn match_chain(drafts: &[u32], mut target_at: impl FnMut(usize) -> Option<u32>) -> Option<(usize, u32)> {
    for (row, &draft) in drafts.iter().enumerate() {
        let own = target_at(row)?;
        if own != draft {
            return Some((row, own));
        }
    }
    Some((drafts.len(), target_at(drafts.len())?))
}

/// Verifies a tree of drafts exactly, as [`match_chain`] does a chain.
///
/// `tokens` `[rows]`: the anchor, then the drafts. `parents` `[rows]`: the row that a draft follows, an
/// earlier one (row 0's is not read; a draft that follows no earlier row is unreachable). `target_at(row)`
/// samples the target's row after the drafts on the path to `row`. From row 0 on, the path continues with the
/// child that equals the target's token, the lowest row of several. Returns the rows of the path, 0 first,
/// and the token that follows them; `None` as soon as `target_at` returns `None`. A chain is the tree in
/// which each row follows the one before.
pub fn match_tree(
    tokens: &[u32],
    parents: &[u32],
    mut target_at: impl FnMut(usize) -> Option<u32>,
) -> Option<(Vec<usize>, u32)> {
    let mut path = vec![0];
    let mut row = 0;
    loop {
        let own = target_at(row)?;
        let mut children = (row + 1..tokens.len()).filter(|&child| parents[child] as usize == row);
        match children.find(|&child| tokens[child] == own) {
            Some(child) => row = child,
            None => return Some((path, own)),
        }
        path.push(row);
    }
}

// ---- sampling drafts ----

/// How the children of a node are sampled from the distribution of their depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// With replacement: each from the whole distribution (SpecInfer, arXiv 2305.09781).
    Independent,
    /// Without replacement: each without those before it (Sequoia, arXiv 2402.12374).
    Distinct,
}

/// Samples a chain, one token from each distribution; the first is the anchor's successor. `None` only for a
/// distribution without tokens, which [`Distribution::new`] does not make.
pub fn sample_chain(distributions: &[Distribution], random: &mut impl RandomSource) -> Option<Vec<u32>> {
    let one = |(i, distribution): (usize, &Distribution)| {
        random.pick(key(Purpose::Draft, i + 1, i + 1), distribution.tokens())
    };
    distributions.iter().enumerate().map(one).collect()
}

/// Samples the tokens of a tree of a given shape.
///
/// `parents` `[rows]` as [`match_tree`] takes them, the anchor's row first. Rows of depth `d + 1` are sampled
/// from `distributions[d]`, siblings in the order of their rows. Returns the tokens `[rows]`. Where
/// [`Siblings::Distinct`] runs out of tokens, a row repeats the sibling before it, and
/// [`recursive_rejection`] skips it: so the shape does not depend on anything sampled. `None` where a row
/// follows no earlier one, or is deeper than there are distributions.
pub fn sample_tree(
    anchor: u32,
    parents: &[u32],
    distributions: &[Distribution],
    siblings: Siblings,
    random: &mut impl RandomSource,
) -> Option<Vec<u32>> {
    struct Row<'a> {
        token: u32,
        depth: usize,
        /// What its next child is sampled from.
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
                let token = random.pick(key(Purpose::Draft, depth, own), from.tokens())?;
                parent.distribution = after_sibling(from, token, siblings);
                token
            }
        };
        parent.child = Some(token);
        rows.push(Row { token, depth, distribution: distribution(depth), child: None });
    }
    Some(rows.iter().map(|row| row.token).collect())
}

/// Samples `count` chains for [`multi_draft_block_verify`], each with one token from each distribution.
///
/// They all follow the anchor and lie one behind the other: row `1 + c g + i` has draft `i` of chain `c`,
/// where `g` is the number of distributions. Returns the tokens `[rows]` and their parents as [`sample_tree`]
/// takes them.
pub fn sample_chains(
    anchor: u32,
    count: usize,
    distributions: &[Distribution],
    random: &mut impl RandomSource,
) -> Option<(Vec<u32>, Vec<u32>)> {
    let (mut tokens, mut parents) = (vec![anchor], vec![0]);
    for _ in 0..count {
        for (i, distribution) in distributions.iter().enumerate() {
            let row = tokens.len();
            tokens.push(random.pick(key(Purpose::Draft, i + 1, row), distribution.tokens())?);
            parents.push(if i == 0 { 0 } else { row as u32 - 1 });
        }
    }
    Some((tokens, parents))
}

/// The distribution of the sibling after the one that was sampled from `distribution`.
fn after_sibling(
    distribution: Cow<Distribution>,
    sampled: u32,
    siblings: Siblings,
) -> Option<Cow<Distribution>> {
    match siblings {
        Siblings::Independent => Some(distribution),
        Siblings::Distinct => distribution.without(sampled).map(Cow::Owned),
    }
}

fn key(purpose: Purpose, depth: usize, row: usize) -> DrawKey {
    DrawKey { purpose, depth, row }
}

// ---- rejection sampling ----

/// Verifies a chain token by token (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a
/// draft is accepted with probability `min(1, p / q)`, and the first rejected draft is replaced by a token of
/// the distribution `max(p - q, 0)`.
///
/// `drafts[i]` was sampled from `distributions[i]`; there may be more distributions than drafts.
/// `target(row)` is the target's distribution after the first `row` drafts, asked for only if those are
/// accepted. Returns how many drafts are accepted and the token after them; `None` as soon as `target`
/// returns `None`.
///
/// Lossless: a token is emitted as an accepted draft with probability `min(p, q)`. A draft is rejected with
/// probability `1 - sum min(p, q) = sum max(p - q, 0)`, and then a token is emitted with `max(p - q, 0)`.
/// Together that is `p`.
pub fn rejection(
    drafts: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    random: &mut impl RandomSource,
) -> Option<(usize, u32)> {
    for (row, (&draft, distribution)) in drafts.iter().zip(distributions).enumerate() {
        let child = [(row + 1, draft)];
        let outcome =
            verify_children(target(row)?, distribution, &child, Siblings::Independent, row, row, random)?;
        if let Children::Rejected(token) = outcome {
            return Some((row, token));
        }
    }
    let g = drafts.len();
    Some((g, random.pick(key(Purpose::Residual, g + 1, g), target(g)?.tokens())?))
}

/// Verifies a tree of [`sample_tree`] by recursive rejection sampling, from the root down, the siblings of a
/// node in the order they were sampled in (SpecInfer, arXiv 2305.09781; without replacement Sequoia, arXiv
/// 2402.12374).
///
/// The drafts of depth `d + 1` were sampled from `distributions[d]`. `target(row)` is the target's
/// distribution after the drafts on the path to `row`. Returns the rows of the accepted path, 0 first, and
/// the token that follows them; `None` as soon as `target` returns `None`.
///
/// Lossless: a rejection in [`rejection`] leaves the distribution `max(p - q, 0)` to be emitted, and the next
/// sibling is a sample of a known distribution that does not depend on the outcome; so the steps can follow
/// each other. That is why the order of siblings matters. The distributions between two siblings are rounded:
/// for every sibling after the first, the emitted distribution is the target's to within `2 V 2^-48`.
pub fn recursive_rejection(
    tokens: &[u32],
    parents: &[u32],
    distributions: &[Distribution],
    siblings: Siblings,
    mut target: impl FnMut(usize) -> Option<Distribution>,
    random: &mut impl RandomSource,
) -> Option<(Vec<usize>, u32)> {
    let mut path = vec![0];
    let mut row = 0;
    loop {
        let (p, depth) = (target(row)?, path.len() - 1);
        let Some(distribution) = distributions.get(depth) else {
            return Some((path, random.pick(key(Purpose::Residual, depth + 1, row), p.tokens())?));
        };
        let children: Vec<(usize, u32)> = (row + 1..tokens.len())
            .filter(|&child| parents[child] as usize == row)
            .map(|child| (child, tokens[child]))
            .collect();
        match verify_children(p, distribution, &children, siblings, depth, row, random)? {
            Children::Accepted(child) => row = child,
            Children::Rejected(token) => return Some((path, token)),
        }
        path.push(row);
    }
}

/// What came of the children of a row.
enum Children {
    /// The draft in this row is accepted.
    Accepted(usize),
    /// All are rejected, and this token follows.
    Rejected(u32),
}

/// Verifies the drafts `(row, token)` that follow `row`, which is accepted and at `depth`.
fn verify_children(
    mut p: Distribution,
    distribution: &Distribution,
    children: &[(usize, u32)],
    siblings: Siblings,
    depth: usize,
    row: usize,
    random: &mut impl RandomSource,
) -> Option<Children> {
    let (mut q, mut residual) = (Some(Cow::Borrowed(distribution)), Vec::new());
    for &(child, token) in children {
        let Some(from) = q else { break };
        // A token that this distribution cannot give repeats an earlier sibling: it is skipped.
        let probability = from.probability(token);
        if probability > 0 {
            if !residual.is_empty() {
                p = Distribution::from_residual(residual)?;
            }
            if random.accept(key(Purpose::Accept, depth + 1, child), p.probability(token), probability) {
                return Some(Children::Accepted(child));
            }
            residual = p.residual(ONE, &from);
        }
        q = if probability > 0 { after_sibling(from, token, siblings) } else { Some(from) };
    }
    // The residual is empty only where both distributions are the same, and then no draft is rejected.
    let weights = if residual.is_empty() { p.tokens() } else { &residual };
    Some(Children::Rejected(random.pick(key(Purpose::Residual, depth + 1, row), weights)?))
}

// ---- block verification ----

/// Verifies a chain as a block (Sun et al., arXiv 2403.10444). It accepts at least as many drafts as
/// [`rejection`] on average, and as many as any method can that verifies one chain. Arguments and result as
/// there, except that `target` is also called for drafts that may be rejected.
///
/// `w[i] = min(1, w[i - 1] p / q)` along the chain, in units of 2^-48, is the fraction of the probability of
/// the first `i` drafts that is to be emitted. From the longest prefix to the shortest, an independent test
/// decides whether that prefix is accepted; it makes up for what longer prefixes have emitted already. After
/// the accepted prefix comes a token of the distribution `max(w p - q, 0)`. Rounding down costs `2 V 2^-48` a
/// row.
pub fn block_verify(
    drafts: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    random: &mut impl RandomSource,
) -> Option<(usize, u32)> {
    let (mut fractions, mut rows) = (vec![ONE], vec![target(0)?]);
    for (i, (draft, distribution)) in drafts.iter().zip(distributions).enumerate() {
        let fraction = ratio(fractions[i], rows[i].probability(*draft), distribution.probability(*draft));
        // No longer prefix can be accepted.
        if fraction == 0 {
            break;
        }
        fractions.push(fraction);
        rows.push(target(i + 1)?);
    }
    let whole = drafts.len();
    for (row, (p, &w)) in rows.iter().zip(&fractions).enumerate().rev() {
        let next = distributions.get(row).filter(|_| row < whole);
        let (s, n) = match next {
            None => (w, ONE),
            Some(_) if w == ONE => (ONE, ONE),
            Some(q) => {
                let kept: u64 = p.tokens().iter().map(|&(id, p)| times(w, p).min(q.probability(id))).sum();
                (w - kept, ONE - kept)
            }
        };
        if row > 0 && !random.accept(key(Purpose::Accept, row, row), s, n) {
            continue;
        }
        let residual = next.map_or(Vec::new(), |q| p.residual(w, q));
        let weights = if residual.is_empty() { p.tokens() } else { &residual };
        return Some((row, random.pick(key(Purpose::Residual, row + 1, row), weights)?));
    }
    None
}

/// Verifies the chains of [`sample_chains`], after Thomas and Pal, arXiv 2602.16961: selects one chain, draft
/// by draft, and verifies it by [`block_verify`] as sampled from the distribution that such a selection has.
///
/// At each row the chains that agree with all selected drafts so far are running. Of these, the one whose
/// next draft has the highest [`class`] is selected, the first of several. Arguments and result as of
/// [`recursive_rejection`], with as many `distributions` as a chain has drafts; the rows returned are those
/// of the chain selected last.
///
/// A chain's samples are its own, so all that matters of a chain, given the selections so far, is the
/// probability `out` that it is not running. The selected draft `x` of class `b` comes from chain `c` with
/// the probability that `c` runs and samples `x`, times that of every earlier chain being out or of a lower
/// class, times that of every later chain being out or of no higher class: in all `q(x)` times a sum that
/// depends on `b` alone. By rounding these distributions fall short of [`ONE`], by less than a unit a token
/// and about two a chain, and they have no rounding token: `block_verify` does not need more.
///
/// Lossless, up to rounding: append to each token the chain that it was selected from. The selection's
/// distribution depends on the chains of earlier drafts, but the target's does not. Given the draft, both may
/// have the same distribution over the chain, which cancels in every ratio that `block_verify` takes and adds
/// up to 1 in everything that it sums. Where `q` equals `p`, all tokens are of one class and the selection's
/// distribution is `q`: the selection changes nothing there.
pub fn multi_draft_block_verify(
    tokens: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    random: &mut impl RandomSource,
) -> Option<(Vec<usize>, u32)> {
    let g = distributions.len();
    let count = tokens.len().saturating_sub(1).checked_div(g).unwrap_or(0);
    let row = |chain: usize, draft: usize| 1 + chain * g + draft;
    let (mut running, mut out): (Vec<usize>, _) = ((0..count).collect(), vec![0; count]);
    let (mut winner, mut drafts, mut selected, mut rows) = (0, vec![], vec![], vec![target(0)?]);
    for (i, distribution) in distributions.iter().enumerate() {
        let class_of = |id: u32| class(rows[i].probability(id), distribution.probability(id));
        // The drafter's mass below each class; entry b + 1 is the mass up to class b.
        let mut below = [0; CLASSES + 1];
        distribution.tokens().iter().for_each(|&(id, q)| below[class_of(id) + 1] += q);
        (0..CLASSES).for_each(|class| below[class + 1] += below[class]);
        let factors: Vec<u64> =
            (0..CLASSES).map(|b| selection_factor(&out, below[b], below[b + 1])).collect();
        let weighted = distribution.tokens().iter().map(|&(id, q)| (id, times(q, factors[class_of(id)])));
        selected.push(Distribution::unnormalized(weighted));

        let draft = |chain: usize| tokens[row(chain, i)];
        winner = *running.iter().rev().max_by_key(|&&chain| class_of(draft(chain)))?;
        let (id, up_to) = (draft(winner), below[class_of(draft(winner)) + 1]);
        running.retain(|&chain| draft(chain) == id);
        out[..winner].fill(ONE);
        out[winner] = 0;
        for out in &mut out[winner + 1..] {
            *out = ONE - ratio(ONE - *out, distribution.probability(id), out_or(*out, up_to));
        }
        drafts.push(id);
        rows.push(target(row(winner, i))?);
    }
    let (accepted, next) = block_verify(&drafts, &selected, |row| rows.get(row).cloned(), random)?;
    Some(([0].into_iter().chain((0..accepted).map(|i| row(winner, i))).collect(), next))
}

/// Number of classes of [`class`].
const CLASSES: usize = 64;

/// How much more probable a token is for the target (`p`) than for the drafter (`q`), in half octaves: 32
/// where the two are alike, clamped to 0 to 63.
///
/// Logarithms are piecewise linear, from one power of two to the next. Any function of the two keeps
/// [`multi_draft_block_verify`] lossless, and finer ones hardly accept more: on the demo pair octaves, halves
/// and eighths differ by 0.003 of a draft at most, and halves are best.
pub fn class(p: u64, q: u64) -> usize {
    let halves = |x: u64| {
        let zeros = x.leading_zeros();
        2 * (64 - zeros as i32) + (x.checked_shl(zeros).unwrap_or(0) >> 62 & 1) as i32
    };
    if p == 0 { 0 } else { (halves(p) - halves(q) + 32).clamp(0, CLASSES as i32 - 1) as usize }
}

/// The probability that a chain is out, or else samples a token from a set of this probability.
fn out_or(out: u64, probability: u64) -> u64 {
    out + times(ONE - out, probability)
}

/// By what the selection among chains, which are out with these probabilities, multiplies the probability of
/// a token. `below` and `up_to` are the drafter's mass below the token's class and up to it.
fn selection_factor(out: &[u64], below: u64, up_to: u64) -> u64 {
    let (mut sum, mut power) = (0, ONE);
    for &out in out {
        // Horner's scheme: the earlier chains' part if this chain is no better, and this chain's if they are
        // worse.
        sum = times(sum, out_or(out, up_to)) + times(power, ONE - out);
        power = times(power, out_or(out, below));
    }
    sum
}
