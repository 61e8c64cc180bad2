//! Verification: which drafts the target accepts, and which token follows them.
//!
//! | method | accepts a draft | the output is |
//! | --- | --- | --- |
//! | exact: [`match_chain`], [`match_tree`] | if it is the target's token | that of AR decoding, token for token |
//! | [`rejection`], [`recursive_rejection`] | with probability min(1, p/q) | distributed as the target's |
//! | [`block_verify`], [`multi_draft_block_verify`] | as part of a block | distributed as the target's |
//!
//! `p` is the target's distribution of the next token and `q` the one that the draft was sampled from. The
//! methods of the second and third line need sampled drafts ([`sample_chain`], [`sample_tree`],
//! [`sample_chains`]). Their output has the distribution of autoregressive decoding, but it is another
//! sample: with the same seed the tokens differ.
//!
//! All arithmetic is integer, so every device takes the same decisions: probabilities are multiples of 2^-48,
//! and every random decision is a call of a [`RandomSource`].
//!
//! These methods are lossless under two conditions. First, the distributions passed to them are those that
//! the drafts were sampled from. A draft that was not sampled, such as the drafter's best token, has the
//! distribution of temperature 0 (probability 1 for that token); verifying it with the drafter's probability
//! would be wrong. Second, no sampled draft is dropped because of its token. A chain may be cut at a length
//! that does not depend on its tokens.

use crate::spec::distribution::{Distribution, ONE, ratio, times};
use crate::spec::rng::{DrawKey, Purpose, RandomSource};
use std::borrow::Cow;

// ---- exact verification ----

/// Verifies a chain of drafts exactly: samples the target's token at each row and accepts drafts until the
/// first one that differs from it.
///
/// `target_at(row)` returns the token that the target samples after the first `row` drafts. It is called only
/// if all of these drafts are accepted. Returns how many drafts are accepted and the bonus token. Returns
/// `None` as soon as `target_at` does. Greedy verification is this method at temperature 0.
///
/// Lossless, by induction: a row is sampled only if the drafts before it are what autoregressive decoding
/// emits, and the token emitted there is the target's own sample, with noise that does not depend on drafts
/// or rounds. So the output equals autoregressive decoding token for token, for every drafter and block
/// length. For a draft that does not depend on the noise, no lossless method accepts more often. Sources: the
/// DFlash reference implementation (arXiv 2602.06036), and coupled sampling in Daliri et al., arXiv
/// 2408.07978.
pub fn match_chain(drafts: &[u32], mut target_at: impl FnMut(usize) -> Option<u32>) -> Option<(usize, u32)> {
    for (row, &draft) in drafts.iter().enumerate() {
        let target_token = target_at(row)?;
        if target_token != draft {
            return Some((row, target_token));
        }
    }
    Some((drafts.len(), target_at(drafts.len())?))
}

/// Verifies a tree of drafts exactly, as [`match_chain`] does a chain.
///
/// `tokens` `[rows]` has the anchor, then the drafts. `parents` `[rows]` has the row that each draft follows:
/// an earlier one. Row 0's entry is not read, and a draft that follows no earlier row is unreachable.
/// `target_at(row)` returns the token that the target samples after the drafts on the path to `row`.
///
/// From row 0 on, the path continues with the child that equals the target's token, the lowest row if there
/// are several. Returns the rows of the accepted path, 0 first, and the bonus token. Returns `None` as soon
/// as `target_at` does. A chain is the tree in which each row follows the previous one.
pub fn match_tree(
    tokens: &[u32],
    parents: &[u32],
    mut target_at: impl FnMut(usize) -> Option<u32>,
) -> Option<(Vec<usize>, u32)> {
    let mut path = vec![0];
    let mut row = 0;
    loop {
        let target_token = target_at(row)?;
        let mut children = (row + 1..tokens.len()).filter(|&child| parents[child] as usize == row);
        match children.find(|&child| tokens[child] == target_token) {
            Some(child) => row = child,
            None => return Some((path, target_token)),
        }
        path.push(row);
    }
}

// ---- sampling drafts ----

/// How the children of a row are sampled from the distribution of their depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// With replacement: each from the whole distribution (SpecInfer, arXiv 2305.09781).
    Independent,
    /// Without replacement: each from the distribution without the earlier siblings (Sequoia, arXiv
    /// 2402.12374).
    Distinct,
}

/// Samples a chain, one token from each distribution. The first token follows the anchor. `None` only for a
/// distribution without tokens, which [`Distribution::new`] does not make.
pub fn sample_chain(distributions: &[Distribution], random: &mut impl RandomSource) -> Option<Vec<u32>> {
    let sample = |(i, distribution)| sample_draft(i + 1, distribution, random);
    distributions.iter().enumerate().map(sample).collect()
}

/// Samples draft `depth` of a chain, from 1 on. Its distribution may depend on the drafts before it. `None`
/// as in [`sample_chain`].
pub fn sample_draft(
    depth: usize,
    distribution: &Distribution,
    random: &mut impl RandomSource,
) -> Option<u32> {
    random.pick(key(Purpose::Draft, depth, depth), distribution.tokens())
}

/// Samples the tokens of a tree of a given shape.
///
/// `parents` `[rows]` is as in [`match_tree`]. Rows of depth `d + 1` are sampled from `distributions[d]`,
/// siblings in the order of their rows. Returns the tokens `[rows]`.
///
/// If [`Siblings::Distinct`] runs out of tokens, a row repeats the previous sibling, and
/// [`recursive_rejection`] skips it. So the shape does not depend on the sampled tokens. `None` if a row
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
        /// The distribution that its next child is sampled from; `None` if it has no tokens.
        distribution: Option<Cow<'a, Distribution>>,
        /// The token of its last sampled child.
        last_child: Option<u32>,
    }
    let distribution = |depth: usize| distributions.get(depth).map(Cow::Borrowed);
    let mut rows = vec![Row { token: anchor, depth: 0, distribution: distribution(0), last_child: None }];
    for &parent in parents.iter().skip(1) {
        let row = rows.len();
        let parent = rows.get_mut(parent as usize)?;
        let depth = parent.depth + 1;
        let token = match parent.distribution.take() {
            None => parent.last_child?,
            Some(from) => {
                let token = random.pick(key(Purpose::Draft, depth, row), from.tokens())?;
                parent.distribution = after_sibling(from, token, siblings);
                token
            }
        };
        parent.last_child = Some(token);
        rows.push(Row { token, depth, distribution: distribution(depth), last_child: None });
    }
    Some(rows.iter().map(|row| row.token).collect())
}

/// Samples `count` chains for [`multi_draft_block_verify`], each with one token from each distribution.
///
/// All chains follow the anchor, and their rows are stored one chain after another: row `1 + c g + i` has
/// draft `i` of chain `c`, where `g` is the number of distributions. Returns the tokens `[rows]` and the
/// parents `[rows]`, as in [`match_tree`].
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

/// The distribution of the next sibling, after `sampled` was sampled from `distribution`. `None` if it has no
/// tokens.
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
/// draft is accepted with probability `min(1, p / q)`, and the first rejected draft is replaced by a sample
/// from the distribution `max(p - q, 0)`, normalised.
///
/// `drafts[i]` was sampled from `distributions[i]`; there may be more distributions than drafts.
/// `target(row)` returns the target's distribution after the first `row` drafts. It is called only if these
/// drafts are accepted. Returns how many drafts are accepted and the token after them. Returns `None` as soon
/// as `target` does.
///
/// Lossless: a token is emitted as an accepted draft with probability `min(p, q)`. A draft is rejected with
/// probability `1 - sum min(p, q) = sum max(p - q, 0)`, so a token is emitted after a rejection with
/// probability `max(p - q, 0)`. The sum of both is `p`.
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

/// Verifies a tree of [`sample_tree`] by recursive rejection sampling, from the root down. The siblings of a
/// row are verified in the order in which they were sampled (with replacement: SpecInfer, arXiv 2305.09781;
/// without replacement: Sequoia, arXiv 2402.12374).
///
/// The drafts of depth `d + 1` were sampled from `distributions[d]`. `target(row)` returns the target's
/// distribution after the drafts on the path to `row`. Returns the rows of the accepted path, 0 first, and
/// the token that follows them. Returns `None` as soon as `target` does.
///
/// Lossless: after a rejection, as in [`rejection`], the token must be sampled from `max(p - q, 0)`. The next
/// sibling is a sample from a known distribution that does not depend on that rejection, so it can be
/// verified against `max(p - q, 0)` in the same way. This is why the order of siblings matters. The
/// distributions between two siblings are rounded: each sibling after the first changes the emitted
/// distribution by at most `2 V 2^-48`, where `V` is the vocabulary size.
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

/// The result of verifying the children of a row.
enum Children {
    /// The draft in this row is accepted.
    Accepted(usize),
    /// All are rejected, and this token is emitted.
    Rejected(u32),
}

/// Verifies `children`, the drafts `(row, token)` that follow the accepted row `row` at `depth`. `p` is the
/// target's distribution there, and `distribution` the one that the first child was sampled from.
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
        // A token of probability 0 repeats an earlier sibling. It is skipped.
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
    // The residual is empty only if both distributions are equal, and then no draft is rejected.
    let weights = if residual.is_empty() { p.tokens() } else { &residual };
    Some(Children::Rejected(random.pick(key(Purpose::Residual, depth + 1, row), weights)?))
}

// ---- block verification ----

/// Verifies a chain as a block (Sun et al., arXiv 2403.10444). On average it accepts at least as many drafts
/// as [`rejection`], and as many as any lossless method that verifies one chain. Arguments and result are
/// those of [`rejection`], except that `target` is also called after drafts that are rejected later.
///
/// `w[i] = min(1, w[i - 1] p / q)` along the chain, in units of 2^-48, is the fraction of the probability of
/// the first `i` drafts that is to be emitted. From the longest prefix to the shortest, an independent test
/// decides whether this prefix is accepted. The test compensates for what longer prefixes have emitted
/// already. The token after the accepted prefix is sampled from `max(w p - q, 0)`, normalised. Rounding down
/// changes the emitted distribution by at most `2 V 2^-48` per row, where `V` is the vocabulary size.
pub fn block_verify(
    drafts: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    random: &mut impl RandomSource,
) -> Option<(usize, u32)> {
    let (mut prefix_weights, mut rows) = (vec![ONE], vec![target(0)?]);
    for (i, (draft, distribution)) in drafts.iter().zip(distributions).enumerate() {
        let prefix_weight =
            ratio(prefix_weights[i], rows[i].probability(*draft), distribution.probability(*draft));
        // No prefix with this draft can be accepted.
        if prefix_weight == 0 {
            break;
        }
        prefix_weights.push(prefix_weight);
        rows.push(target(i + 1)?);
    }
    let length = drafts.len();
    for (row, (p, &w)) in rows.iter().zip(&prefix_weights).enumerate().rev() {
        let next = distributions.get(row).filter(|_| row < length);
        let (s, n) = match next {
            None => (w, ONE),
            Some(_) if w == ONE => (ONE, ONE),
            Some(q) => {
                let overlap: u64 = p.tokens().iter().map(|&(id, p)| times(w, p).min(q.probability(id))).sum();
                (w - overlap, ONE - overlap)
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
/// by draft, and verifies the selected drafts by [`block_verify`] against the distribution that the selection
/// has.
///
/// At each draft, the chains that agree with all drafts selected so far are *running*, and the others are
/// *eliminated*. Among the running chains, the one whose next draft has the highest [`class`] is selected,
/// or the first of several. Arguments and result are those of [`recursive_rejection`], with as many
/// `distributions` as a chain has drafts. The rows returned are those of the chain that was selected last.
///
/// Chains are sampled independently. So, given the selections so far, the only thing to know about a chain is
/// the probability that it is eliminated. The selected draft is `x` of class `b` from chain `c` if three
/// independent events occur: `c` is running and samples `x`; every earlier chain is eliminated or samples a
/// lower class; every later chain is eliminated or samples no higher class. Summed over the chains, the
/// probability of `x` is `q(x)` times a factor that depends only on `b`. Because of rounding, these
/// distributions add up to less than [`ONE`], by less than one unit per token and about two units per chain.
/// They have no rounding token, because `block_verify` does not need one.
///
/// Lossless, up to rounding: consider pairs of a token and the chain that it was selected from. The
/// selection's distribution depends on the chains of earlier drafts, but the target's does not. Given the
/// token, both may have the same distribution over the chains. It cancels in every ratio that `block_verify`
/// computes, and adds up to 1 in every sum. If `q` equals `p`, all tokens have the same class and the
/// selection's distribution is `q`, so the selection has no effect.
pub fn multi_draft_block_verify(
    tokens: &[u32],
    distributions: &[Distribution],
    mut target: impl FnMut(usize) -> Option<Distribution>,
    random: &mut impl RandomSource,
) -> Option<(Vec<usize>, u32)> {
    let g = distributions.len();
    let count = tokens.len().saturating_sub(1).checked_div(g).unwrap_or(0);
    let row = |chain: usize, draft: usize| 1 + chain * g + draft;
    let (mut running, mut eliminated): (Vec<usize>, _) = ((0..count).collect(), vec![0; count]);
    let (mut chosen, mut drafts, mut selected, mut rows) = (0, vec![], vec![], vec![target(0)?]);
    for (i, distribution) in distributions.iter().enumerate() {
        let class_of = |id: u32| class(rows[i].probability(id), distribution.probability(id));
        // The drafter's probability of all classes below each class; entry b + 1 is that of class b and
        // below.
        let mut mass_below = [0; CLASSES + 1];
        distribution.tokens().iter().for_each(|&(id, q)| mass_below[class_of(id) + 1] += q);
        (0..CLASSES).for_each(|class| mass_below[class + 1] += mass_below[class]);
        let factor = |class| selection_factor(&eliminated, mass_below[class], mass_below[class + 1]);
        let factors: Vec<u64> = (0..CLASSES).map(factor).collect();
        let weighted = distribution.tokens().iter().map(|&(id, q)| (id, times(q, factors[class_of(id)])));
        selected.push(Distribution::unnormalized(weighted));

        let draft = |chain: usize| tokens[row(chain, i)];
        chosen = *running.iter().rev().max_by_key(|&&chain| class_of(draft(chain)))?;
        let (id, mass_up_to) = (draft(chosen), mass_below[class_of(draft(chosen)) + 1]);
        running.retain(|&chain| draft(chain) == id);
        eliminated[..chosen].fill(ONE);
        eliminated[chosen] = 0;
        for own in &mut eliminated[chosen + 1..] {
            *own = ONE - ratio(ONE - *own, distribution.probability(id), eliminated_or(*own, mass_up_to));
        }
        drafts.push(id);
        rows.push(target(row(chosen, i))?);
    }
    let (accepted, next) = block_verify(&drafts, &selected, |row| rows.get(row).cloned(), random)?;
    Some(([0].into_iter().chain((0..accepted).map(|i| row(chosen, i))).collect(), next))
}

/// Number of values of [`class`].
const CLASSES: usize = 64;

/// How much more probable a token is for the target (`p`) than for the drafter (`q`): about
/// `32 + 2 log2(p / q)`, clamped to 0 to 63. It is 0 if `p` is 0.
///
/// Logarithms are piecewise linear between powers of two. Any function of `p` and `q` keeps
/// [`multi_draft_block_verify`] lossless, and finer classes hardly accept more: on the demo pair, steps of 1,
/// 1/2 and 1/8 of `log2(p / q)` differ by at most 0.003 accepted drafts, and 1/2 is best.
pub fn class(p: u64, q: u64) -> usize {
    let twice_log2 = |x: u64| {
        let zeros = x.leading_zeros();
        2 * (64 - zeros as i32) + (x.checked_shl(zeros).unwrap_or(0) >> 62 & 1) as i32
    };
    if p == 0 { 0 } else { (twice_log2(p) - twice_log2(q) + 32).clamp(0, CLASSES as i32 - 1) as usize }
}

/// The probability that a chain is eliminated, or is running and samples a token from a set of this
/// probability.
fn eliminated_or(eliminated: u64, probability: u64) -> u64 {
    eliminated + times(ONE - eliminated, probability)
}

/// The factor by which the selection multiplies the drafter's probability of a token. `eliminated` `[chains]`
/// has the probabilities that the chains are eliminated. `mass_below` is the drafter's probability of all
/// classes below the token's class, and `mass_up_to` that of its class and below.
fn selection_factor(eliminated: &[u64], mass_below: u64, mass_up_to: u64) -> u64 {
    let (mut sum, mut power) = (0, ONE);
    for &own in eliminated {
        // Horner's scheme: the part of the earlier chains if this chain has no higher class, plus the part of
        // this chain if all earlier ones have lower classes.
        sum = times(sum, eliminated_or(own, mass_up_to)) + times(power, ONE - own);
        power = times(power, eliminated_or(own, mass_below));
    }
    sum
}
