//! Helpers of attention tests: sequences, batches, launches and the reference in f64.

use crate::support::kernel::*;
use dflash::Result;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::attention::{Attention, Layer, Mask, Paged};

pub const PAGE: usize = 64;
/// Bound of the relative error. Weights are rounded to bf16 before the product with V, and so is the output:
/// at most 2^-9 = 1.95e-3 each. The largest error seen is 2.4e-3.
pub const BOUND: f64 = 3e-3;

/// Which keys a row attends to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaskMode {
    Chain,
    Tree,
    Block,
}

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: usize,
    pub mask: MaskMode,
}

/// One sequence: keys and values `[context + rows][kv_heads][head_dim]`, queries `[rows][heads][head_dim]`,
/// bf16; masks `[rows]`, bit i: the row attends to row i.
#[derive(Debug, Clone, Default)]
pub struct Sequence {
    pub context: usize,
    pub rows: usize,
    pub masks: Vec<u64>,
    pub q: Vec<u16>,
    pub k: Vec<u16>,
    pub v: Vec<u16>,
}

impl Sequence {
    pub fn new(shape: &Shape, context: usize, rows: usize, random: &mut Random) -> Sequence {
        let keys = (context + rows) * shape.kv_heads * shape.head_dim;
        let masks = match shape.mask {
            // Each row follows an earlier row, or the context.
            MaskMode::Tree => (0..rows).fold(Vec::new(), |mut masks: Vec<u64>, row| {
                let parent = random.below(row + 1);
                masks.push(1 << row | if parent == row { 0 } else { masks[parent] });
                masks
            }),
            MaskMode::Chain => (0..rows).map(|row| u64::MAX >> (63 - row % 64)).collect(),
            MaskMode::Block => vec![low(rows); rows],
        };
        let q = random.bf16(rows * shape.heads * shape.head_dim, 1.0);
        Sequence { context, rows, masks, q, k: random.bf16(keys, 1.0), v: random.bf16(keys, 1.0) }
    }

    /// A tree in which row i + 1 is a child of row `parents[i]`, or follows the context, as row 0 does, if
    /// that is [`NONE`].
    pub fn tree(shape: &Shape, context: usize, parents: &[usize], random: &mut Random) -> Sequence {
        let mut s = Sequence::new(shape, context, parents.len() + 1, random);
        s.masks = vec![1];
        for (i, &parent) in parents.iter().enumerate() {
            s.masks.push(1 << (i + 1) | s.masks.get(parent).copied().unwrap_or(0));
        }
        s
    }

    /// The path to `row`, including it.
    pub fn path(&self, row: usize) -> Vec<usize> {
        (0..self.rows).filter(|i| self.masks[row] >> i & 1 == 1).collect()
    }

    /// These rows as a chain, at consecutive slots after the context.
    pub fn chain(&self, shape: &Shape, path: &[usize]) -> Sequence {
        let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let keys = |x: &[u16]| {
            let rows = path.iter().flat_map(|row| &x[(self.context + row) * kv_width..][..kv_width]);
            x[..self.context * kv_width].iter().chain(rows).copied().collect::<Vec<u16>>()
        };
        Sequence {
            context: self.context,
            rows: path.len(),
            masks: (0..path.len()).map(|row| low(row + 1)).collect(),
            q: path.iter().flat_map(|row| &self.q[row * q_width..][..q_width]).copied().collect(),
            k: keys(&self.k),
            v: keys(&self.v),
        }
    }

    /// Row `row` alone; the rows before it are its context.
    pub fn step(&self, shape: &Shape, row: usize) -> Sequence {
        let (at, width) = (self.context + row, shape.kv_heads * shape.head_dim);
        let prefix = |x: &[u16]| x[..(at + 1) * width].to_vec();
        Sequence {
            context: at,
            rows: 1,
            masks: vec![1],
            q: self.q[row * shape.heads * shape.head_dim..][..shape.heads * shape.head_dim].to_vec(),
            k: prefix(&self.k),
            v: prefix(&self.v),
        }
    }

    /// The position of the token in a slot.
    pub fn position(&self, mask: MaskMode, slot: usize) -> usize {
        match mask {
            MaskMode::Tree if slot >= self.context => {
                self.context + self.masks[slot - self.context].count_ones() as usize - 1
            }
            _ => slot,
        }
    }

    /// Whether `row` attends to `slot`: `docs/dflash.md`, section 3.6, or the mask of a tree.
    pub fn attends(&self, shape: &Shape, row: usize, slot: usize) -> bool {
        let (query, key) = (self.position(shape.mask, self.context + row), self.position(shape.mask, slot));
        let within = match shape.mask {
            MaskMode::Chain => slot <= self.context + row,
            MaskMode::Tree => slot < self.context || self.masks[row] >> (slot - self.context) & 1 == 1,
            MaskMode::Block => shape.window == 0 || key < query + shape.window,
        };
        within && (shape.window == 0 || key + shape.window > query)
    }

    /// softmax(q K^T / sqrt(head_dim)) V in f64, `[rows][heads][head_dim]`.
    pub fn reference(&self, shape: &Shape) -> Vec<f32> {
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let (q, k, v) = (from_bf16(&self.q), from_bf16(&self.k), from_bf16(&self.v));
        let mut out = Vec::new();
        for row in 0..self.rows {
            let visible: Vec<usize> =
                (0..self.context + self.rows).filter(|&slot| self.attends(shape, row, slot)).collect();
            for head in 0..shape.heads {
                let query = &q[(row * shape.heads + head) * dim..][..dim];
                let at = |slot: usize| (slot * shape.kv_heads + head / group) * dim;
                let dot = |slot: usize| -> f64 {
                    query.iter().zip(&k[at(slot)..][..dim]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
                };
                let scores: Vec<f64> = visible.iter().map(|&slot| dot(slot) / (dim as f64).sqrt()).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                out.extend((0..dim).map(|d| {
                    let mixed: f64 =
                        visible.iter().zip(&weights).map(|(&slot, w)| w * f64::from(v[at(slot) + d])).sum();
                    (mixed / sum) as f32
                }));
            }
        }
        out
    }
}

/// The lowest `bits` bits set.
pub fn low(bits: usize) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// A batch in device memory: pages in random order, NaN wherever no sequence has a key, garbage in unused
/// entries of the page table.
pub struct Batch {
    pub layer: Layer,
    pub pages: [Buffer; 2],
    pub table: Buffer,
    pub spans: Buffer,
    pub masks: Buffer,
    pub q: Buffer,
    pub out: Buffer,
}

impl Batch {
    pub fn paged(&self) -> Paged<'_> {
        Paged { k: &self.pages[0], v: &self.pages[1], table: &self.table, spans: &self.spans, gates: None }
    }
}

pub fn batch(
    device: &dyn Device,
    shape: &Shape,
    block: usize,
    per_sequence: usize,
    sequences: &[Sequence],
) -> Batch {
    let mut random = Random::new(block as u64 * 977 + sequences.len() as u64);
    let (dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    let count = sequences.iter().map(|s| (s.context + s.rows).div_ceil(PAGE)).sum::<usize>() + 2;
    let mut free: Vec<u32> = (0..count as u32).collect();
    let mut table = vec![0u32; sequences.len() * per_sequence];
    table.iter_mut().for_each(|entry| *entry = random.next() as u32 | 1 << 20);
    let mut pages =
        [vec![POISON; count * kv_heads * PAGE * dim], vec![POISON; count * kv_heads * PAGE * dim]];
    let mut q = vec![POISON; sequences.len() * block * shape.heads * dim];
    let mut masks = vec![u64::MAX; sequences.len() * block];
    for (i, s) in sequences.iter().enumerate() {
        for slot in 0..s.context + s.rows {
            let entry = &mut table[i * per_sequence + slot / PAGE];
            if slot.is_multiple_of(PAGE) {
                *entry = free.swap_remove(random.below(free.len()));
            }
            for head in 0..kv_heads {
                for d in 0..dim {
                    let token = slot % PAGE;
                    let at = ((*entry as usize * kv_heads + head) * PAGE + token) * dim;
                    let at = at + ((d / 8) ^ (token & 7)) * 8 + d % 8;
                    let from = (slot * kv_heads + head) * dim + d;
                    (pages[0][at], pages[1][at]) = (s.k[from], s.v[from]);
                }
            }
        }
        q[i * block * shape.heads * dim..][..s.q.len()].copy_from_slice(&s.q);
        masks[i * block..][..s.rows].copy_from_slice(&s.masks[..s.rows]);
    }
    let spans: Vec<u32> = sequences.iter().flat_map(|s| [s.context as u32, s.rows as u32]).collect();
    Batch {
        layer: Layer {
            heads: shape.heads,
            kv_heads,
            head_dim: dim,
            pages: count,
            pages_per_sequence: per_sequence,
            window: shape.window,
            scale: (1.0 / (dim as f64).sqrt()) as f32,
        },
        pages: [upload(device, &pages[0]), upload(device, &pages[1])],
        table: upload(device, &table),
        spans: upload(device, &spans),
        masks: upload(device, &masks),
        out: poisoned::<u16>(device, q.len()),
        q: upload(device, &q),
    }
}

/// Memory for the partial results of a launch.
pub fn partials(device: &dyn Device, attention: &Attention) -> Result<Buffer> {
    Ok(poisoned::<u8>(device, attention.partial_bytes()?))
}

pub fn launch(
    device: &dyn Device,
    batch: &Batch,
    attention: &Attention,
    mask: MaskMode,
    partials: &Buffer,
) -> Result<()> {
    let mask = match mask {
        MaskMode::Chain => Mask::Chain,
        MaskMode::Tree => Mask::Tree(&batch.masks),
        MaskMode::Block => Mask::Block,
    };
    attention.launch(device, &batch.out, &batch.q, batch.paged(), mask, partials)
}

/// Runs attention. Returns the output of each sequence, `[rows][heads][head_dim]`. Asserts that no other row
/// was written.
pub fn run(device: &dyn Device, shape: &Shape, block: usize, sequences: &[Sequence]) -> Vec<Vec<u16>> {
    let slots = sequences.iter().map(|s| s.context + s.rows).max().unwrap();
    run_with(device, shape, block, slots, sequences)
}

/// Like [`run`], with a capacity in slots.
pub fn run_with(
    device: &dyn Device,
    shape: &Shape,
    block: usize,
    capacity: usize,
    sequences: &[Sequence],
) -> Vec<Vec<u16>> {
    let batch = batch(device, shape, block, capacity.div_ceil(PAGE), sequences);
    let attention = Attention { layer: batch.layer, sequences: sequences.len(), block, capacity };
    let partials = partials(device, &attention).unwrap();
    launch(device, &batch, &attention, shape.mask, &partials).unwrap();
    let (out, width) = (download::<u16>(device, &batch.out), shape.heads * shape.head_dim);
    let of = |(s, out): (&Sequence, &[u16])| {
        let (rows, rest) = out.split_at(s.rows * width);
        assert!(rest.iter().all(|&x| x == POISON), "a row after the span was written");
        rows.to_vec()
    };
    sequences.iter().zip(out.chunks(block * width)).map(of).collect()
}

/// Like [`run`]; compares the outputs with the reference.
pub fn check(device: &dyn Device, shape: &Shape, block: usize, sequences: &[Sequence]) -> Vec<Vec<u16>> {
    let out = run(device, shape, block, sequences);
    for (s, out) in sequences.iter().zip(&out).filter(|(s, _)| s.rows > 0) {
        let error = relative_error(&from_bf16(out), &s.reference(shape));
        assert!(error < BOUND, "error {error:.1e}: {shape:?}, context {}, {} rows", s.context, s.rows);
    }
    out
}

/// Context lengths around the borders of pages and splits.
pub const CONTEXTS: [usize; 9] = [0, 1, 63, 64, 65, 127, 128, 129, 300];

pub fn shape(mask: MaskMode, head_dim: usize, heads: usize, kv_heads: usize, window: usize) -> Shape {
    Shape { heads, kv_heads, head_dim, window, mask }
}

pub const NONE: usize = usize::MAX;

/// The outputs of AR steps: one launch per row, with the rows before it as context.
pub fn steps(device: &dyn Device, shape: &Shape, s: &Sequence) -> Vec<u16> {
    let shape = Shape { mask: MaskMode::Chain, ..*shape };
    (0..s.rows).flat_map(|row| run(device, &shape, 1, &[s.step(&shape, row)]).concat()).collect()
}
