//! Draft trees: several guesses for a position, verified in one pass. A tree is rows of a pass, the anchor first; its
//! nodes come from one pass of the drafter, whose rows know nothing of each other, so that any row's tokens can
//! follow any of the row before. What a tree holds decides how many drafts are accepted; under the rule `match` never which
//! tokens are emitted, and under others never their distribution.
//!
//! Scores are integers, and every tie has an order: a device that builds the same tree from the same logits draws the
//! same tree, whatever the order of its reductions.

use crate::spec::sampling::{TABLES, argmax};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rows of a tree at most, the anchor counted: a row's ancestors are bits of one word.
pub const MOST_ROWS: usize = 64;

/// Rows of a verification pass, parents before children; row 0 is the anchor. `[rows]` each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The anchor, then the drafts.
    pub tokens: Vec<u32>,
    /// The row that a row follows; the anchor's is 0, its own.
    pub parents: Vec<u32>,
    /// How many rows are before it on its path: its position is the anchor's and this.
    pub depths: Vec<u32>,
    /// Bit `j`: row `j` is on the way to this one, or is this one.
    pub masks: Vec<u64>,
    /// Of the path: the sum of its choices' costs. The anchor's is 0.
    pub costs: Vec<u32>,
}

impl Tree {
    /// No drafts yet.
    pub fn new(anchor: u32) -> Tree {
        Tree { tokens: vec![anchor], parents: vec![0], depths: vec![0], masks: vec![1], costs: vec![0] }
    }

    /// Tokens and parents as [`crate::spec::verify::sample_tree`] has them, `[rows]` each and at most [`MOST_ROWS`]. What was drawn
    /// has no costs: they are 0.
    pub fn drawn(tokens: &[u32], parents: &[u32]) -> Tree {
        let mut tree = Tree::new(tokens[0]);
        for (&token, &parent) in tokens.iter().zip(parents).skip(1) {
            tree.push(parent as usize, token, 0);
        }
        tree
    }

    /// Hangs a token from row `parent`; its own row. Those that build trees end them at [`MOST_ROWS`].
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

    /// Rows, the anchor counted.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Drafts on the longest path.
    pub fn deepest(&self) -> usize {
        self.depths.iter().max().map_or(0, |&depth| depth as usize)
    }

    /// Rows on the way to `row`, the anchor first and `row` last.
    pub fn path(&self, row: usize) -> impl Iterator<Item = usize> {
        let mask = self.masks[row];
        (0..=row).filter(move |ancestor| mask >> ancestor & 1 == 1)
    }

    /// The most probable prefixes, best first, until the tree has `rows` rows or `choices` no more (DDTree, arXiv
    /// 2604.12989): of all trees of that size it has the greatest sum over its nodes of the probability of their
    /// path, as the drafter sees it. `choices[d]` are those for the `d`-th token behind the anchor; where each holds
    /// `rows - 1`, or all there are, no better one is missed. Between equal costs: the less deep, then the better
    /// ranks from the anchor on.
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

    /// The tree of its first `rows` rows, at least the anchor: closed, because parents come first.
    pub fn truncate(&mut self, rows: usize) {
        let rows = rows.max(1);
        self.tokens.truncate(rows);
        self.parents.truncate(rows);
        self.depths.truncate(rows);
        self.masks.truncate(rows);
        self.costs.truncate(rows);
    }
}

/// One of the tokens that the drafter holds best for a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub token: u32,
    /// `-log2` of its probability in units of 2^-16 bits: 0 to 66 bits. The sum along a path is the path's.
    pub cost: u32,
}

/// What a logit's distance from the best is multiplied with: 65536 log2(e), the drafter's own temperature.
const SCALE: f32 = (65536.0 * std::f64::consts::LOG2_E) as f32;

/// The `count` best tokens of the drafter's logits `[vocab]`, by (logit descending, id ascending), all of positive
/// weight in the distribution that [`crate::spec::sampling::SamplingParams::survivors`] is of at temperature 1: fewer where there are fewer.
/// `None` as in [`argmax`].
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
    // No NaN is here, argmax has looked; what is added makes 0.0 of -0.0.
    let best = |a: &(u32, f32), b: &(u32, f32)| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0));
    if count < kept.len() {
        kept.select_nth_unstable_by(count, best);
        kept.truncate(count);
    }
    kept.sort_unstable_by(best);
    let of_row = bits(total);
    // As in `Tables::weight`; its bound is not met, because the weight is positive.
    let cost = |logit: f32| ((max - logit) * SCALE).round_ties_even() as u32 + of_row;
    Some(kept.into_iter().map(|(token, logit)| Choice { token, cost: cost(logit) }).collect())
}

/// `log2(total / 2^32)` in units of 2^-16, for the `total` of a row's weights, which is at least 2^32: to nearest,
/// but for the table's last digits.
fn bits(total: u64) -> u32 {
    let zeros = total.leading_zeros();
    // A variate's time is a logarithm: -log2(u / 2^32), here of the leading 32 bits, in units of 2^-27.
    let less = TABLES.time(((total << zeros) >> 32) as u32);
    ((32 - zeros) << 16) - ((less + (1 << 10)) >> 11) as u32
}

// ---- shapes of trees that are drawn at random ----

/// The shape of a tree that [`crate::spec::verify::sample_tree`] draws, of up to `rows` rows and `depth` drafts one behind the
/// other: a function of these two alone, the best tree where all drafts of a place among siblings stand equally often.
/// Its tokens are 0.
pub fn shape(rows: usize, depth: usize) -> Tree {
    let siblings: Vec<Choice> =
        (0..MOST_ROWS as u32).map(|place| Choice { token: 0, cost: typical(place) }).collect();
    Tree::best_first(0, &vec![siblings; depth], rows)
}

/// What a draft costs, as [`Choice`] has it, by its place among its siblings: the first stands in one of two cases in
/// which the row before them does, the second, third, .. in one of 10, 20, .. That is about what recursive rejection
/// makes of the demo pair's at temperatures 0.7 and 1, at most depths alike.
pub fn typical(place: u32) -> u32 {
    bits(u64::from(if place == 0 { 2 } else { 10 * place }) << 32)
}

/// How many chains [`crate::spec::verify::sample_chains`] draws for a tree of up to `rows` rows, at least one, and of how many
/// drafts, at most `depth`. About as many as each has drafts, and two at least where there are two drafts: so the demo pair
/// accepts most, in trees of 16, 32 and 64 rows at temperatures 0.7 and 1. More where rows are left over because `depth` ends
/// them, and one for two rows.
pub fn chains(rows: usize, depth: usize) -> (usize, usize) {
    let drafts = rows.saturating_sub(1);
    let depth = depth.min((drafts / drafts.isqrt().max(2)).max(1));
    (drafts / depth.max(1), depth)
}

/// What brings the rows of an accepted path, `[accepted + 1]` and 0 first, to the slots behind each other: (from, to)
/// in rows, ascending. A slot is read before it is written where they are done in order. Rows that stand right are
/// left out.
pub fn moves(path: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    path.iter().enumerate().map(|(to, from)| (*from, to)).filter(|(from, to)| from != to)
}
