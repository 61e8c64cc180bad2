//! The attention kernels at a model's shapes.

use super::linear::in_pages;
use super::values::{BenchFixtures, RandomArray, below, close, ends, halves_of};
use super::{Case, PROMPT, Ready, blocks, groups, trees};
use dflash::Result;
use dflash::checkpoint::config;
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::PAGE;
use dflash::gpu::kernels::attention::{Attention, Layer, Mask, Paged, Prefill};
use dflash::spec::tree::Tree;
use serde_json::json;

/// Bound of the relative error. Weights are rounded to bf16 before they are multiplied with values, and the
/// output is rounded once more: up to 1.95e-3 each.
const BOUND: f64 = 3e-3;

/// For each of `rows` and `contexts`: the target's attention for blocks, AR steps and trees, the drafter's
/// for blocks, and the target's for a chunk of a prompt. Once for each kind of attention that layers have
/// (causal or not, window).
pub fn cases(pair: &Pair, rows: &[usize], contexts: &[usize]) -> Vec<Case> {
    let target = &pair.target.config.stack;
    let mut all = vec![];
    for &context in contexts {
        for &rows in rows {
            for (batch, block) in groups(pair, rows) {
                for kind in kinds(target) {
                    all.push(attention("attention", target, kind, batch, block, context));
                }
            }
            if let Some((batch, rows)) = trees::shape(pair, rows) {
                for kind in kinds(target) {
                    all.push(tree(target, kind, trees::random_trees(pair, batch, rows), rows, context));
                }
            }
            let (batch, block) = blocks(pair, rows);
            let drafter = pair.drafter().map(|drafter| &drafter.config.stack);
            for (c, kind) in drafter.iter().flat_map(|c| kinds(c).into_iter().map(move |kind| (c, kind))) {
                let name = if kind.causal { "drafter attention, causal" } else { "drafter attention" };
                all.push(attention(name, c, kind, batch, block, context));
            }
        }
        for kind in kinds(target) {
            all.push(prompt(target, kind, context));
        }
    }
    all
}

fn kinds(c: &config::Stack) -> Vec<config::Attention> {
    let mut kinds: Vec<config::Attention> = vec![];
    for kind in &c.attention {
        if !kinds.contains(kind) {
            kinds.push(*kind);
        }
    }
    kinds
}

fn layer(c: &config::Stack, kind: config::Attention, pages: usize, pages_per_sequence: usize) -> Layer {
    Layer {
        heads: c.heads,
        kv_heads: c.kv_heads,
        head_dim: c.head_dim,
        pages,
        pages_per_sequence,
        window: kind.window.unwrap_or(0),
        scale: 1.0 / (c.head_dim as f32).sqrt(),
    }
}

/// Sequences of equal length on the device, and their values.
#[derive(Clone)]
struct Sequences {
    layer: Layer,
    kind: config::Attention,
    count: usize,
    rows: usize,
    context: usize,
    /// One per sequence, if rows are trees.
    trees: Vec<Tree>,
    /// The pages of each sequence, one sequence after the other.
    pages: Vec<usize>,
    q: RandomArray,
    k: RandomArray,
    v: RandomArray,
    table: Buffer,
    spans: Buffer,
    out: Buffer,
}

impl Sequences {
    /// Returns also the copies of the keys and values.
    fn new(
        fixtures: &BenchFixtures,
        layer: Layer,
        kind: config::Attention,
        (count, rows, context): (usize, usize, usize),
    ) -> Result<(Sequences, Vec<[Buffer; 2]>)> {
        let mut pages: Vec<usize> = (0..layer.pages).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, below(i, i + 1));
        }
        let elements = layer.pages * layer.kv_heads * PAGE * layer.head_dim;
        let (k, keys) = fixtures.cold(elements, 1.0, elements * 4, "keys")?;
        let (v, values) = fixtures.cold(elements, 1.0, elements * 4, "values")?;
        let queries = count * rows * layer.heads * layer.head_dim;
        let sequences = Sequences {
            q: fixtures.halves(queries, 1.0, "queries")?,
            k,
            v,
            table: fixtures.words(pages.iter().map(|page| *page as u32))?,
            spans: fixtures.words((0..count).flat_map(|_| [context as u32, rows as u32]))?,
            out: fixtures.output(queries * 2)?,
            layer,
            kind,
            count,
            rows,
            context,
            trees: vec![],
            pages,
        };
        Ok((sequences, keys.into_iter().zip(values).map(|(k, v)| [k, v]).collect()))
    }

    fn paged<'a>(&'a self, [k, v]: &'a [Buffer; 2]) -> Paged<'a> {
        Paged { k, v, table: &self.table, spans: &self.spans, gates: None }
    }

    fn attends(&self, sequence: usize, row: usize, slot: usize) -> bool {
        if let Some(tree) = self.trees.get(sequence) {
            return tree_attends(tree, self.context, self.kind.window, row, slot);
        }
        let (position, window) = (self.context + row, self.layer.window);
        let ahead = if self.kind.causal { slot <= position } else { window == 0 || slot < position + window };
        ahead && (window == 0 || slot + window > position)
    }

    /// Compares some rows and heads with softmax(q K^T / sqrt(head_dim)) V.
    fn check(&self, device: &dyn Device) -> Result<()> {
        let found = halves_of(device, &self.out)?;
        let Layer { heads, kv_heads, head_dim, pages_per_sequence, scale, .. } = self.layer;
        let mut pairs = vec![];
        for (i, row) in ends(self.count * self.rows).into_iter().enumerate() {
            let head = [0, heads - 1, heads / 2][i];
            let first = (row * heads + head) * head_dim;
            let (sequence, own) = (row / self.rows, row % self.rows);
            let element = |values: &RandomArray, slot: usize, d: usize| {
                let page = self.pages[sequence * pages_per_sequence + slot / PAGE];
                let group = head / (heads / kv_heads);
                f64::from(values.at(in_pages(page, group, kv_heads, slot, d, head_dim)))
            };
            let slots: Vec<usize> =
                (0..self.context + self.rows).filter(|slot| self.attends(sequence, own, *slot)).collect();
            let score = |slot: &usize| {
                let dot: f64 =
                    (0..head_dim).map(|d| f64::from(self.q.at(first + d)) * element(&self.k, *slot, d)).sum();
                dot * f64::from(scale)
            };
            let scores: Vec<f64> = slots.iter().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..head_dim {
                let mixed =
                    slots.iter().zip(&weights).map(|(slot, weight)| weight * element(&self.v, *slot, d));
                pairs.push((found[first + d], mixed.sum::<f64>() / sum));
            }
        }
        close("out", &pairs, BOUND)
    }

    /// Two operations for each dimension of a query and each key that it attends to, and two for the value.
    fn flops(kind: config::Attention, c: &config::Stack, count: usize, rows: usize, context: usize) -> f64 {
        let slots = |row: usize| {
            let position = context + row;
            let window = kind.window.unwrap_or(usize::MAX);
            let end = if kind.causal {
                position + 1
            } else {
                (context + rows).min(position.saturating_add(window))
            };
            end - (position + 1).saturating_sub(window)
        };
        let slots: usize = (0..rows).map(slots).sum();
        4.0 * (c.heads * c.head_dim * count) as f64 * slots as f64
    }
}

/// Whether a row of a tree attends to a slot: the slots before the tree, its ancestors' and its own, as far
/// as the window of positions reaches.
fn tree_attends(tree: &Tree, context: usize, window: Option<usize>, row: usize, slot: usize) -> bool {
    let position = |row: usize| context + tree.depths[row] as usize;
    let (visible, at) = match slot.checked_sub(context) {
        Some(other) => (tree.masks[row] >> other & 1 == 1, position(other)),
        None => (true, slot),
    };
    visible && window.is_none_or(|window| at + window > position(row))
}

fn parameters(rows: usize, context: usize, batch: usize, kind: config::Attention) -> serde_json::Value {
    let mut parameters = json!({ "rows": rows, "context": context, "batch": batch });
    if let Some(window) = kind.window {
        parameters["window"] = window.into();
    }
    parameters
}

fn attention(
    name: &str,
    c: &config::Stack,
    kind: config::Attention,
    batch: usize,
    block: usize,
    context: usize,
) -> Case {
    let each = (context + block).div_ceil(PAGE);
    let layer = layer(c, kind, batch * each, each);
    let kernel = Attention { layer, sequences: batch, block, capacity: each * PAGE };
    let drafter = name != "attention";
    Case {
        name: name.into(),
        parameters: parameters(batch * block, context, batch, kind),
        bytes: kernel.bytes(&vec![(context, block); batch]),
        flops: Sequences::flops(kind, c, batch, block, context),
        make: Box::new(move |fixtures| {
            let device = fixtures.device;
            let (sequences, copies) = Sequences::new(fixtures, layer, kind, (batch, block, context))?;
            let partials = fixtures.output(kernel.partial_bytes()?)?;
            let count = copies.len();
            let own = sequences.clone();
            let launch = move |copy: usize| {
                let mask = if drafter && !kind.causal { Mask::Block } else { Mask::Chain };
                let (q, paged) = (&own.q.buffer, own.paged(&copies[copy]));
                kernel.launch(device, &own.out, q, paged, mask, &partials)
            };
            Ok(Ready::new(count, launch, move || sequences.check(device)))
        }),
    }
}

fn tree(c: &config::Stack, kind: config::Attention, trees: Vec<Tree>, rows: usize, context: usize) -> Case {
    let (batch, each) = (trees.len(), (context + rows).div_ceil(PAGE));
    let layer = layer(c, kind, batch * each, each);
    let kernel = Attention { layer, sequences: batch, block: rows, capacity: each * PAGE };
    let slots = |tree: &Tree| {
        let of_row = |row| {
            (0..context + rows).filter(|slot| tree_attends(tree, context, kind.window, row, *slot)).count()
        };
        (0..rows).map(of_row).sum::<usize>()
    };
    let slots: usize = trees.iter().map(slots).sum();
    Case {
        name: "attention of a tree".into(),
        parameters: parameters(batch * rows, context, batch, kind),
        bytes: kernel.bytes(&vec![(context, rows); batch]) + (batch * rows * 8) as u64,
        flops: 4.0 * (c.heads * c.head_dim) as f64 * slots as f64,
        make: Box::new(move |fixtures| {
            let device = fixtures.device;
            let (mut sequences, copies) = Sequences::new(fixtures, layer, kind, (batch, rows, context))?;
            sequences.trees = trees.clone();
            let words = trees.iter().flat_map(|tree| &tree.masks).flat_map(|mask| mask.to_le_bytes());
            let masks = fixtures.bytes(&words.collect::<Vec<u8>>())?;
            let partials = fixtures.output(kernel.partial_bytes()?)?;
            let count = copies.len();
            let own = sequences.clone();
            let launch = move |copy: usize| {
                let (q, paged) = (&own.q.buffer, own.paged(&copies[copy]));
                kernel.launch(device, &own.out, q, paged, Mask::Tree(&masks), &partials)
            };
            Ok(Ready::new(count, launch, move || sequences.check(device)))
        }),
    }
}

fn prompt(c: &config::Stack, kind: config::Attention, context: usize) -> Case {
    let pages = (context + PROMPT).div_ceil(PAGE);
    let kernel = Prefill { layer: layer(c, kind, pages, pages), rows: PROMPT };
    Case {
        name: "prompt attention".into(),
        parameters: parameters(PROMPT, context, 1, kind),
        bytes: kernel.bytes(context, PROMPT),
        flops: Sequences::flops(kind, c, 1, PROMPT, context),
        make: Box::new(move |fixtures| {
            let device = fixtures.device;
            let (sequences, copies) = Sequences::new(fixtures, kernel.layer, kind, (1, PROMPT, context))?;
            let count = copies.len();
            let own = sequences.clone();
            let launch =
                move |copy: usize| kernel.launch(device, &own.out, &own.q.buffer, own.paged(&copies[copy]));
            Ok(Ready::new(count, launch, move || sequences.check(device)))
        }),
    }
}
