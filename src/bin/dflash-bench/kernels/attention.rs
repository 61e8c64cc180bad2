//! The attention kernels at a model's shapes.

use super::linear::in_pages;
use super::values::{BenchFixtures, Drawn, below, close, ends, halves_of};
use super::{Case, PROMPT, Ready, blocks, groups, trees};
use dflash::Result;
use dflash::checkpoint::config;
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::PAGE;
use dflash::gpu::kernels::attention::{Attention, Layer, Mask, Paged, Prefill, Workspace};
use dflash::spec::tree::Tree;
use serde_json::json;

/// Weights are rounded to bf16 before they meet the values, and the output once more: 1.95e-3 at most, each.
const BOUND: f64 = 3e-3;

/// For each of `rows` and `contexts`: the target's attention of blocks, of AR steps and of trees, the drafter's of
/// blocks, and the target's of a prompt's chunk. Once for each rule that layers have.
pub fn cases(pair: &Pair, rows: &[usize], contexts: &[usize]) -> Vec<Case> {
    let target = &pair.target.config.stack;
    let mut all = vec![];
    for &context in contexts {
        for &rows in rows {
            for (batch, block) in groups(pair, rows) {
                for rule in rules(target) {
                    all.push(attention("attention", target, rule, batch, block, context));
                }
            }
            if let Some((batch, rows)) = trees::shape(pair, rows) {
                for rule in rules(target) {
                    all.push(tree(target, rule, trees::drawn(pair, batch, rows), rows, context));
                }
            }
            let (batch, block) = blocks(pair, rows);
            let drafter = pair.drafter.as_ref().map(|drafter| &drafter.config.stack);
            for (c, rule) in drafter.iter().flat_map(|c| rules(c).into_iter().map(move |rule| (c, rule))) {
                let name = if rule.causal { "drafter attention, causal" } else { "drafter attention" };
                all.push(attention(name, c, rule, batch, block, context));
            }
        }
        for rule in rules(target) {
            all.push(prompt(target, rule, context));
        }
    }
    all
}

fn rules(c: &config::Stack) -> Vec<config::Attention> {
    let mut rules: Vec<config::Attention> = vec![];
    for rule in &c.attention {
        if !rules.contains(rule) {
            rules.push(*rule);
        }
    }
    rules
}

fn layer(c: &config::Stack, rule: config::Attention, pages: usize, pages_per_sequence: usize) -> Layer {
    Layer {
        heads: c.heads,
        kv_heads: c.kv_heads,
        head_dim: c.head_dim,
        pages,
        pages_per_sequence,
        window: rule.window.unwrap_or(0),
        scale: 1.0 / (c.head_dim as f32).sqrt(),
    }
}

/// Sequences of equal length, and what the host knows of them.
#[derive(Clone)]
struct Sequences {
    layer: Layer,
    rule: config::Attention,
    count: usize,
    rows: usize,
    context: usize,
    /// Of each sequence, where rows are trees.
    trees: Vec<Tree>,
    /// Of each sequence, one after the other.
    pages: Vec<usize>,
    q: Drawn,
    k: Drawn,
    v: Drawn,
    table: Buffer,
    spans: Buffer,
    out: Buffer,
}

impl Sequences {
    /// And the copies of its keys and values.
    fn new(
        desk: &BenchFixtures,
        layer: Layer,
        rule: config::Attention,
        (count, rows, context): (usize, usize, usize),
    ) -> Result<(Sequences, Vec<[Buffer; 2]>)> {
        let mut pages: Vec<usize> = (0..layer.pages).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, below(i, i + 1));
        }
        let elements = layer.pages * layer.kv_heads * PAGE * layer.head_dim;
        let (k, keys) = desk.cold(elements, 1.0, elements * 4, "keys")?;
        let (v, values) = desk.cold(elements, 1.0, elements * 4, "values")?;
        let queries = count * rows * layer.heads * layer.head_dim;
        let sequences = Sequences {
            q: desk.halves(queries, 1.0, "queries")?,
            k,
            v,
            table: desk.words(pages.iter().map(|page| *page as u32))?,
            spans: desk.words((0..count).flat_map(|_| [context as u32, rows as u32]))?,
            out: desk.output(queries * 2)?,
            layer,
            rule,
            count,
            rows,
            context,
            trees: vec![],
            pages,
        };
        Ok((sequences, keys.into_iter().zip(values).map(|(k, v)| [k, v]).collect()))
    }

    fn paged<'a>(&'a self, [k, v]: &'a [Buffer; 2]) -> Paged<'a> {
        Paged { k, v, table: &self.table, spans: &self.spans }
    }

    fn sees(&self, sequence: usize, row: usize, slot: usize) -> bool {
        if let Some(tree) = self.trees.get(sequence) {
            return sees_in(tree, self.context, self.rule.window, row, slot);
        }
        let (position, window) = (self.context + row, self.layer.window);
        let ahead = if self.rule.causal { slot <= position } else { window == 0 || slot < position + window };
        ahead && (window == 0 || slot + window > position)
    }

    /// softmax(q K^T / sqrt(head_dim)) V, some rows and heads of it.
    fn check(&self, device: &dyn Device) -> Result<()> {
        let found = halves_of(device, &self.out)?;
        let Layer { heads, kv_heads, head_dim, pages_per_sequence, scale, .. } = self.layer;
        let mut pairs = vec![];
        for (i, row) in ends(self.count * self.rows).into_iter().enumerate() {
            let head = [0, heads - 1, heads / 2][i];
            let first = (row * heads + head) * head_dim;
            let (sequence, own) = (row / self.rows, row % self.rows);
            let element = |values: &Drawn, slot: usize, d: usize| {
                let page = self.pages[sequence * pages_per_sequence + slot / PAGE];
                let group = head / (heads / kv_heads);
                f64::from(values.at(in_pages(page, group, kv_heads, slot, d, head_dim)))
            };
            let seen: Vec<usize> =
                (0..self.context + self.rows).filter(|slot| self.sees(sequence, own, *slot)).collect();
            let score = |slot: &usize| {
                let dot: f64 =
                    (0..head_dim).map(|d| f64::from(self.q.at(first + d)) * element(&self.k, *slot, d)).sum();
                dot * f64::from(scale)
            };
            let scores: Vec<f64> = seen.iter().map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..head_dim {
                let mixed =
                    seen.iter().zip(&weights).map(|(slot, weight)| weight * element(&self.v, *slot, d));
                pairs.push((found[first + d], mixed.sum::<f64>() / sum));
            }
        }
        close("out", &pairs, BOUND)
    }

    /// Two for each dim of a query and a key that it sees, and two for the value.
    fn flops(rule: config::Attention, c: &config::Stack, count: usize, rows: usize, context: usize) -> f64 {
        let seen = |row: usize| {
            let position = context + row;
            let window = rule.window.unwrap_or(usize::MAX);
            let end = if rule.causal {
                position + 1
            } else {
                (context + rows).min(position.saturating_add(window))
            };
            end - (position + 1).saturating_sub(window)
        };
        let seen: usize = (0..rows).map(seen).sum();
        4.0 * (c.heads * c.head_dim * count) as f64 * seen as f64
    }
}

/// Whether a row of a tree sees a slot: those before the tree, its ancestors' and its own, as far as a window of
/// positions reaches.
fn sees_in(tree: &Tree, context: usize, window: Option<usize>, row: usize, slot: usize) -> bool {
    let position = |row: usize| context + tree.depths[row] as usize;
    let (there, at) = match slot.checked_sub(context) {
        Some(other) => (tree.masks[row] >> other & 1 == 1, position(other)),
        None => (true, slot),
    };
    there && window.is_none_or(|window| at + window > position(row))
}

fn parameters(rows: usize, context: usize, batch: usize, rule: config::Attention) -> serde_json::Value {
    let mut parameters = json!({ "rows": rows, "context": context, "batch": batch });
    if let Some(window) = rule.window {
        parameters["window"] = window.into();
    }
    parameters
}

fn attention(
    name: &str,
    c: &config::Stack,
    rule: config::Attention,
    batch: usize,
    block: usize,
    context: usize,
) -> Case {
    let each = (context + block).div_ceil(PAGE);
    let layer = layer(c, rule, batch * each, each);
    let kernel = Attention { layer, sequences: batch, block, capacity: each * PAGE };
    let drafter = name != "attention";
    Case {
        name: name.into(),
        parameters: parameters(batch * block, context, batch, rule),
        bytes: kernel.bytes(&vec![(context, block); batch]),
        flops: Sequences::flops(rule, c, batch, block, context),
        make: Box::new(move |desk| {
            let device = desk.device;
            let (sequences, copies) = Sequences::new(desk, layer, rule, (batch, block, context))?;
            let workspace = workspace(desk, &kernel)?;
            let count = copies.len();
            let own = sequences.clone();
            let launch = move |copy: usize| {
                let mask = if drafter && !rule.causal { Mask::Block } else { Mask::Chain };
                let (q, paged) = (&own.q.buffer, own.paged(&copies[copy]));
                kernel.launch(device, &own.out, q, paged, mask, &workspace)
            };
            Ok(Ready::new(count, launch, move || sequences.check(device)))
        }),
    }
}

fn tree(c: &config::Stack, rule: config::Attention, trees: Vec<Tree>, rows: usize, context: usize) -> Case {
    let (batch, each) = (trees.len(), (context + rows).div_ceil(PAGE));
    let layer = layer(c, rule, batch * each, each);
    let kernel = Attention { layer, sequences: batch, block: rows, capacity: each * PAGE };
    let seen = |tree: &Tree| {
        let of_row =
            |row| (0..context + rows).filter(|slot| sees_in(tree, context, rule.window, row, *slot)).count();
        (0..rows).map(of_row).sum::<usize>()
    };
    let seen: usize = trees.iter().map(seen).sum();
    Case {
        name: "attention of a tree".into(),
        parameters: parameters(batch * rows, context, batch, rule),
        bytes: kernel.bytes(&vec![(context, rows); batch]) + (batch * rows * 8) as u64,
        flops: 4.0 * (c.heads * c.head_dim) as f64 * seen as f64,
        make: Box::new(move |desk| {
            let device = desk.device;
            let (mut sequences, copies) = Sequences::new(desk, layer, rule, (batch, rows, context))?;
            sequences.trees = trees.clone();
            let words = trees.iter().flat_map(|tree| &tree.masks).flat_map(|mask| mask.to_le_bytes());
            let masks = desk.bytes(&words.collect::<Vec<u8>>())?;
            let workspace = workspace(desk, &kernel)?;
            let count = copies.len();
            let own = sequences.clone();
            let launch = move |copy: usize| {
                let (q, paged) = (&own.q.buffer, own.paged(&copies[copy]));
                kernel.launch(device, &own.out, q, paged, Mask::Tree(&masks), &workspace)
            };
            Ok(Ready::new(count, launch, move || sequences.check(device)))
        }),
    }
}

fn workspace(desk: &BenchFixtures, kernel: &Attention) -> Result<Workspace> {
    let counters = desk.device.allocate(kernel.counter_bytes()?, "counters of attention")?;
    desk.device.fill(&counters, 0)?;
    Ok(Workspace { partials: desk.output(kernel.partial_bytes()?)?, counters })
}

fn prompt(c: &config::Stack, rule: config::Attention, context: usize) -> Case {
    let pages = (context + PROMPT).div_ceil(PAGE);
    let kernel = Prefill { layer: layer(c, rule, pages, pages), rows: PROMPT };
    Case {
        name: "prompt attention".into(),
        parameters: parameters(PROMPT, context, 1, rule),
        bytes: kernel.bytes(context, PROMPT),
        flops: Sequences::flops(rule, c, 1, PROMPT, context),
        make: Box::new(move |desk| {
            let device = desk.device;
            let (sequences, copies) = Sequences::new(desk, kernel.layer, rule, (1, PROMPT, context))?;
            let count = copies.len();
            let own = sequences.clone();
            let launch =
                move |copy: usize| kernel.launch(device, &own.out, &own.q.buffer, own.paged(&copies[copy]));
            Ok(Ready::new(count, launch, move || sequences.check(device)))
        }),
    }
}
