//! Draft trees: several candidates for a position, verified in one pass.
//!
//! A tree is the rows of a verification pass, the anchor first. Its nodes come from one pass of the drafter,
//! whose rows are independent of each other, so any token of a row can follow any token of the row before.
//! The tree decides how many drafts are accepted. Under exact verification it never decides which tokens are
//! emitted, and under the other methods never their distribution.
//!
//! Scores are integers and every tie has an order, so a device builds the same tree from the same logits,
//! whatever the order of its reductions.

use crate::spec::rng::TABLES;
use crate::spec::sampling::argmax;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Maximum rows of a tree, the anchor included: the ancestors of a row are the bits of one word.
pub const MOST_ROWS: usize = 64;

/// The rows of a verification pass, parents before children; row 0 is the anchor. Each field is `[rows]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The anchor, then the drafts.
    pub tokens: Vec<u32>,
    /// The row that each row follows; the anchor has 0, its own.
    pub parents: Vec<u32>,
    /// Number of rows before it on its path: its position relative to the anchor's.
    pub depths: Vec<u32>,
    /// Bit `j`: row `j` is an ancestor of this row, or is this row.
    pub masks: Vec<u64>,
    /// Cost of its path: the sum of the costs of its choices. The anchor has 0.
    pub costs: Vec<u32>,
}

impl Tree {
    /// The anchor alone.
    pub fn new(anchor: u32) -> Tree {
        Tree { tokens: vec![anchor], parents: vec![0], depths: vec![0], masks: vec![1], costs: vec![0] }
    }

    /// The tree of tokens and parents as [`crate::spec::verify::sample_tree`] has them, `[rows]` each, at
    /// most [`MOST_ROWS`]. Sampled drafts have no costs: they are 0.
    pub fn sampled(tokens: &[u32], parents: &[u32]) -> Tree {
        let mut tree = Tree::new(tokens[0]);
        for (&token, &parent) in tokens.iter().zip(parents).skip(1) {
            tree.push(parent as usize, token, 0);
        }
        tree
    }

    /// Appends a token as a child of row `parent` and returns its row. Callers stop at [`MOST_ROWS`].
    fn push(&mut self, parent: usize, token: u32, cost: u32) -> usize {
        let row = self.rows();
        assert!(parent < row && row < MOST_ROWS);
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
    /// Of all trees of that size it has the greatest sum over its nodes of the probability of their path, as
    /// the drafter estimates it. `choices[d]` are the candidates for the `d`-th token after the anchor; if
    /// each holds `rows - 1`, or all there are, no better prefix is missed. Between equal costs the shallower
    /// prefix wins, then the one with the better ranks from the anchor on.
    pub fn best_first(anchor: u32, choices: &[Vec<Choice>], rows: usize) -> Tree {
        let (mut tree, rows) = (Tree::new(anchor), rows.min(MOST_ROWS));
        // (cost, ranks from the anchor on, parent); as many ranks as the prefix is deep.
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

    /// Keeps the first `rows` rows, at least the anchor. The result is a tree, because parents come first.
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
    /// `-log2` of its probability in units of 2^-16 bits, 0 to 66 bits. Costs add up along a path.
    pub cost: u32,
}

/// Factor of a logit's distance from the best: 65536 log2(e), for the drafter's own temperature, 1.
const SCALE: f32 = (65536.0 * std::f64::consts::LOG2_E) as f32;

/// The `count` best tokens of the drafter's logits `[vocab]`, by (logit descending, id ascending). `None` as
/// in [`argmax`].
///
/// All have a positive weight in the distribution that [`crate::spec::sampling::SamplingParams::survivors`]
/// gives at temperature 1; there may be fewer than `count` of those.
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
    let of_row = bits(total);
    // As in `Tables::weight`; its bound is not reached, because the weight is positive.
    let cost = |logit: f32| ((max - logit) * SCALE).round_ties_even() as u32 + of_row;
    Some(kept.into_iter().map(|(token, logit)| Choice { token, cost: cost(logit) }).collect())
}

/// `log2(total / 2^32)` in units of 2^-16, rounded to nearest but for the table's last digits. `total` is the
/// sum of a row's weights, at least 2^32.
fn bits(total: u64) -> u32 {
    let zeros = total.leading_zeros();
    // A variate's time is a logarithm: -log2(u / 2^32), here of the leading 32 bits, in units of 2^-27.
    let less = TABLES.time(((total << zeros) >> 32) as u32);
    ((32 - zeros) << 16) - ((less + (1 << 10)) >> 11) as u32
}

// ---- shapes of sampled trees ----

/// The shape of a tree for [`crate::spec::verify::sample_tree`], of up to `rows` rows and `depth` drafts on a
/// path. Its tokens are 0.
///
/// It is a function of these two alone: the best tree if every first sibling is accepted equally often, and
/// every second, and so on.
pub fn shape(rows: usize, depth: usize) -> Tree {
    let siblings: Vec<Choice> =
        (0..MOST_ROWS as u32).map(|place| Choice { token: 0, cost: typical(place) }).collect();
    Tree::best_first(0, &vec![siblings; depth], rows)
}

/// The cost of a draft, as in [`Choice`], by its place among its siblings.
///
/// The first is accepted in one of two cases in which the row before them is, the second, third, ... in one
/// of 10, 20, ... That is about what recursive rejection gives on the demo pair at temperatures 0.7 and 1, at
/// most depths alike.
pub fn typical(place: u32) -> u32 {
    bits(u64::from(if place == 0 { 2 } else { 10 * place }) << 32)
}

/// How many chains [`crate::spec::verify::sample_chains`] samples for a tree of up to `rows` rows, at least
/// one, and of how many drafts each, at most `depth`.
///
/// About as many chains as each has drafts, and at least two where there are two drafts: the demo pair
/// accepts most with that, in trees of 16, 32 and 64 rows at temperatures 0.7 and 1. There are more where
/// `depth` leaves rows over, and there is one for two rows.
pub fn chains(rows: usize, depth: usize) -> (usize, usize) {
    let drafts = rows.saturating_sub(1);
    let depth = depth.min((drafts / drafts.isqrt().max(2)).max(1));
    (drafts / depth.max(1), depth)
}

/// The copies that bring the rows of an accepted path, `[accepted + 1]` and 0 first, to consecutive slots:
/// (from, to) in rows, ascending by `to`. In that order every slot is read before it is written. Rows already
/// in place are left out.
pub fn moves(path: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    path.iter().enumerate().map(|(to, from)| (*from, to)).filter(|(from, to)| from != to)
}
