//! Draft trees: several candidates for a position, verified in one pass.
//!
//! The nodes of a tree are the rows of a verification pass, the anchor first. They come from one pass of the
//! drafter, whose rows are independent of each other, so any token of one row can follow any token of the
//! previous row. The tree determines how many drafts are accepted. It affects neither which tokens exact
//! verification emits nor the distribution that the other methods emit.
//!
//! Scores are integers and ties are broken by a fixed order, so every device builds the same tree from the
//! same logits, whatever the order of its reductions.

use crate::spec::rng::TABLES;
use crate::spec::sampling::argmax;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Maximum rows of a tree, the anchor included: the ancestors of a row are the bits of one 64-bit word.
pub const MAX_TREE_ROWS: usize = 64;

/// The rows of a verification pass, parents before children; row 0 is the anchor. Each field is `[rows]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The anchor, then the drafts.
    pub tokens: Vec<u32>,
    /// The row that each row follows; 0 for the anchor.
    pub parents: Vec<u32>,
    /// Number of drafts on the path to each row: its position relative to the anchor's.
    pub depths: Vec<u32>,
    /// Attention masks: bit `j` of a row's mask says that row `j` is an ancestor of the row or the row
    /// itself.
    pub masks: Vec<u64>,
    /// Cost of the path to each row: the sum of [`Choice::cost`]. 0 for the anchor.
    pub costs: Vec<u32>,
}

impl Tree {
    /// A tree of the anchor alone.
    pub fn new(anchor: u32) -> Tree {
        Tree { tokens: vec![anchor], parents: vec![0], depths: vec![0], masks: vec![1], costs: vec![0] }
    }

    /// The tree of sampled `tokens` and their `parents`, `[rows]` each, as in
    /// [`crate::spec::verify::sample_tree`], with at most [`MAX_TREE_ROWS`] rows. The costs are 0.
    pub fn sampled(tokens: &[u32], parents: &[u32]) -> Tree {
        let mut tree = Tree::new(tokens[0]);
        for (&token, &parent) in tokens.iter().zip(parents).skip(1) {
            tree.push(parent as usize, token, 0);
        }
        tree
    }

    /// Appends a token as a child of row `parent` and returns its row. The tree must have less than
    /// [`MAX_TREE_ROWS`] rows.
    pub(crate) fn push(&mut self, parent: usize, token: u32, cost: u32) -> usize {
        let row = self.rows();
        assert!(parent < row && row < MAX_TREE_ROWS);
        self.tokens.push(token);
        self.costs.push(cost);
        self.parents.push(parent as u32);
        self.depths.push(self.depths[parent] + 1);
        self.masks.push(self.masks[parent] | 1 << row);
        row
    }

    /// Number of rows, the anchor included.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Number of drafts on the longest path.
    pub fn deepest(&self) -> usize {
        self.depths.iter().max().map_or(0, |&depth| depth as usize)
    }

    /// The rows on the path to `row`, the anchor first and `row` last.
    pub fn path(&self, row: usize) -> impl Iterator<Item = usize> {
        let mask = self.masks[row];
        (0..=row).filter(move |ancestor| mask >> ancestor & 1 == 1)
    }

    /// The tree of the most probable prefixes, best first, until it has `rows` rows or `choices` is exhausted
    /// (DDTree, arXiv 2604.12989).
    ///
    /// Among all trees of that size it has the largest sum of the path probabilities of its nodes, by the
    /// drafter's probabilities. `choices[d]` has the candidates for the token at depth `d + 1`, best first;
    /// if each list has `rows - 1` candidates, or all candidates, no better prefix is missed. Among equal
    /// costs the shallower prefix wins, then the one with the better ranks from the anchor on.
    pub fn best_first(anchor: u32, choices: &[Vec<Choice>], rows: usize) -> Tree {
        let (mut tree, rows) = (Tree::new(anchor), rows.min(MAX_TREE_ROWS));
        // (cost, depth, ranks from the anchor on `[depth]`, parent)
        let mut heap = BinaryHeap::new();
        let entry = |before: u32, mut ranks: Vec<usize>, rank: usize, parent: usize| {
            let choice = choices.get(ranks.len())?.get(rank)?;
            ranks.push(rank);
            Some(Reverse((before + choice.cost, ranks.len(), ranks, parent)))
        };
        heap.extend(entry(0, vec![], 0, 0));
        while tree.rows() < rows
            && let Some(Reverse((cost, depth, mut ranks, parent))) = heap.pop()
        {
            let choices = &choices[depth - 1];
            let rank = ranks[depth - 1];
            let row = tree.push(parent, choices[rank].token, cost);
            heap.extend(entry(cost, ranks.clone(), 0, row));
            ranks.pop();
            heap.extend(entry(cost - choices[rank].cost, ranks, rank + 1, parent));
        }
        tree
    }

    /// Keeps the first `rows` rows, at least the anchor. The result is a tree, because parents come before
    /// children.
    pub fn truncate(&mut self, rows: usize) {
        let rows = rows.max(1);
        self.tokens.truncate(rows);
        self.parents.truncate(rows);
        self.depths.truncate(rows);
        self.masks.truncate(rows);
        self.costs.truncate(rows);
    }
}

/// A candidate of the drafter for a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The token's id.
    pub token: u32,
    /// `-log2` of its probability in units of 2^-16: 0 to 58 << 16 for vocabularies up to 2^26. Costs add up
    /// along a path.
    pub cost: u32,
}

/// The factor on a logit's distance from the best logit: 65536 log2(e), for temperature 1.
const SCALE: f32 = (65536.0 * std::f64::consts::LOG2_E) as f32;

/// The `count` best tokens of the drafter's logits `[vocab]`, by (logit descending, id ascending). `None` as
/// in [`argmax`].
///
/// Only tokens with a positive weight at temperature 1
/// ([`survivors`](crate::spec::sampling::SamplingParams::survivors)) are returned, so there may be fewer than
/// `count`.
pub fn choices(logits: &[f32], count: usize) -> Option<Vec<Choice>> {
    let max = logits[argmax(logits)? as usize];
    let mut kept = Vec::new();
    let mut total = 0;
    for (token, &logit) in (0u32..).zip(logits) {
        let weight = TABLES.weight(max, logit, SCALE);
        if weight > 0 {
            total += weight;
            kept.push((token, logit));
        }
    }
    // `argmax` has excluded NaN. Adding 0.0 turns -0.0 into 0.0.
    let best = |a: &(u32, f32), b: &(u32, f32)| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0));
    if count < kept.len() {
        kept.select_nth_unstable_by(count, best);
        kept.truncate(count);
    }
    kept.sort_unstable_by(best);
    let log_total = bits(total);
    // The exponent of `Tables::weight`. It needs no upper bound here, because the weight is positive.
    let cost = |logit: f32| ((max - logit) * SCALE).round_ties_even() as u32 + log_total;
    Some(kept.into_iter().map(|(token, logit)| Choice { token, cost: cost(logit) }).collect())
}

/// `log2(total / 2^32)` in units of 2^-16, rounded to nearest up to the error of the table. `total` is the
/// sum of a row's weights, at least 2^32.
fn bits(total: u64) -> u32 {
    let zeros = total.leading_zeros();
    // `Tables::time(u)` is -log2(u / 2^32) in units of 2^-27. Here `u` has the leading 32 bits of `total`.
    let neg_log = TABLES.time(((total << zeros) >> 32) as u32);
    ((32 - zeros) << 16) - ((neg_log + (1 << 10)) >> 11) as u32
}

// ---- shapes of sampled trees ----

/// The shape of a tree for [`crate::spec::verify::sample_tree`], with up to `rows` rows and up to `depth`
/// drafts on a path. Its tokens are 0.
///
/// It depends only on `rows` and `depth`. It is the best tree if the acceptance of a draft depends only on
/// its place among its siblings, as in [`typical_cost`].
pub fn shape(rows: usize, depth: usize) -> Tree {
    let siblings: Vec<Choice> =
        (0..MAX_TREE_ROWS as u32).map(|place| Choice { token: 0, cost: typical_cost(place) }).collect();
    Tree::best_first(0, &vec![siblings; depth], rows)
}

/// The assumed cost of a draft, as in [`Choice`], by its place among its siblings, from 0.
///
/// Given that the row before it is accepted, the first sibling is accepted with probability 1/2, and the
/// second, third, ... with 1/10, 1/20, ... These are about the frequencies of recursive rejection on the demo
/// pair at temperatures 0.7 and 1, which are similar at most depths.
pub fn typical_cost(place: u32) -> u32 {
    bits(u64::from(if place == 0 { 2 } else { 10 * place }) << 32)
}

/// The shape of the chains of [`crate::spec::verify::sample_chains`] in a tree of up to `rows` rows: (number
/// of chains, drafts of each chain). `depth` is the maximum drafts of a chain. There is at least one chain if
/// `rows` is at least 2.
///
/// There are about as many chains as each has drafts, and at least two if there are two or more drafts in
/// all. The demo pair accepts most with this shape, in trees of 16, 32 and 64 rows at temperatures 0.7 and 1.
/// If `depth` makes the chains shorter, there are more of them.
pub fn chains(rows: usize, depth: usize) -> (usize, usize) {
    let drafts = rows.saturating_sub(1);
    let depth = depth.min((drafts / drafts.isqrt().max(2)).max(1));
    (drafts / depth.max(1), depth)
}

/// The copies that move the rows of an accepted path `[num_accepted + 1]`, 0 first, to consecutive KV cache
/// slots: (from, to) in rows, ascending by `to`. In this order every slot is read before it is overwritten.
/// Rows that are in place already are left out.
pub fn compaction_moves(path: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    path.iter().enumerate().map(|(to, from)| (*from, to)).filter(|(from, to)| from != to)
}
