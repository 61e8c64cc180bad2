//! Attention: against f64, and that a row's bits depend on its query and the keys it sees alone.

#[path = "support/kernel.rs"]
mod kernel;

use dflash::device::{Buffer, Device};
use dflash::emulator::{Emulator, Schedule};
use dflash::kernels::attention::{Attention, Layer, Mask, Paged, Prefill, Workspace, split_of, split_start};
use dflash::{Error, Result};
use kernel::*;

const PAGE: usize = 64;
/// Weights are rounded to bf16 before they meet the values, and the output once more: 2^-9 = 1.95e-3 at most, each.
/// Seen: 2.4e-3.
const BOUND: f64 = 3e-3;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    Chain,
    Tree,
    Block,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
    rule: Rule,
}

/// One sequence: its keys and values [context + rows][kv_heads][head_dim], queries [rows][heads][head_dim], bf16.
#[derive(Debug, Clone, Default)]
struct Sequence {
    context: usize,
    rows: usize,
    masks: Vec<u64>,
    q: Vec<u16>,
    k: Vec<u16>,
    v: Vec<u16>,
}

impl Sequence {
    fn new(shape: &Shape, context: usize, rows: usize, random: &mut Random) -> Sequence {
        let keys = (context + rows) * shape.kv_heads * shape.head_dim;
        let masks = match shape.rule {
            // Every row hangs on one before it, or on the context.
            Rule::Tree => (0..rows).fold(Vec::new(), |mut masks: Vec<u64>, row| {
                let parent = random.below(row + 1);
                masks.push(1 << row | if parent == row { 0 } else { masks[parent] });
                masks
            }),
            Rule::Chain => (0..rows).map(|row| u64::MAX >> (63 - row % 64)).collect(),
            Rule::Block => vec![low(rows); rows],
        };
        let q = random.bf16(rows * shape.heads * shape.head_dim, 1.0);
        Sequence { context, rows, masks, q, k: random.bf16(keys, 1.0), v: random.bf16(keys, 1.0) }
    }

    /// A tree in which row i + 1 follows row `parents[i]`; NONE: the context, as row 0 does.
    fn tree(shape: &Shape, context: usize, parents: &[usize], random: &mut Random) -> Sequence {
        let mut s = Sequence::new(shape, context, parents.len() + 1, random);
        s.masks = vec![1];
        for (i, &parent) in parents.iter().enumerate() {
            s.masks.push(1 << (i + 1) | s.masks.get(parent).copied().unwrap_or(0));
        }
        s
    }

    /// The rows on the way to `row`, and it.
    fn path(&self, row: usize) -> Vec<usize> {
        (0..self.rows).filter(|i| self.masks[row] >> i & 1 == 1).collect()
    }

    /// The chain of these rows, at consecutive slots behind the context.
    fn chain(&self, shape: &Shape, path: &[usize]) -> Sequence {
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let keys = |x: &[u16]| {
            let rows = path.iter().flat_map(|row| &x[(self.context + row) * narrow..][..narrow]);
            x[..self.context * narrow].iter().chain(rows).copied().collect::<Vec<u16>>()
        };
        Sequence {
            context: self.context,
            rows: path.len(),
            masks: (0..path.len()).map(|row| low(row + 1)).collect(),
            q: path.iter().flat_map(|row| &self.q[row * wide..][..wide]).copied().collect(),
            k: keys(&self.k),
            v: keys(&self.v),
        }
    }

    /// Row `row` alone, behind the rows before it as context.
    fn step(&self, shape: &Shape, row: usize) -> Sequence {
        let (at, width) = (self.context + row, shape.kv_heads * shape.head_dim);
        let cut = |x: &[u16]| x[..(at + 1) * width].to_vec();
        Sequence {
            context: at,
            rows: 1,
            masks: vec![1],
            q: self.q[row * shape.heads * shape.head_dim..][..shape.heads * shape.head_dim].to_vec(),
            k: cut(&self.k),
            v: cut(&self.v),
        }
    }

    fn position(&self, rule: Rule, slot: usize) -> usize {
        match rule {
            Rule::Tree if slot >= self.context => {
                self.context + self.masks[slot - self.context].count_ones() as usize - 1
            }
            _ => slot,
        }
    }

    /// dflash.md 3.6, and the mask of a tree.
    fn sees(&self, shape: &Shape, row: usize, slot: usize) -> bool {
        let (query, key) = (self.position(shape.rule, self.context + row), self.position(shape.rule, slot));
        let within = match shape.rule {
            Rule::Chain => slot <= self.context + row,
            Rule::Tree => slot < self.context || self.masks[row] >> (slot - self.context) & 1 == 1,
            Rule::Block => shape.window == 0 || key < query + shape.window,
        };
        within && (shape.window == 0 || key + shape.window > query)
    }

    /// softmax(q K^T / sqrt(head_dim)) V in f64, [rows][heads][head_dim].
    fn reference(&self, shape: &Shape) -> Vec<f32> {
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let (q, k, v) = (from_bf16(&self.q), from_bf16(&self.k), from_bf16(&self.v));
        let mut out = Vec::new();
        for row in 0..self.rows {
            let seen: Vec<usize> =
                (0..self.context + self.rows).filter(|&slot| self.sees(shape, row, slot)).collect();
            for head in 0..shape.heads {
                let query = &q[(row * shape.heads + head) * dim..][..dim];
                let at = |slot: usize| (slot * shape.kv_heads + head / group) * dim;
                let dot = |slot: usize| -> f64 {
                    query.iter().zip(&k[at(slot)..][..dim]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
                };
                let scores: Vec<f64> = seen.iter().map(|&slot| dot(slot) / (dim as f64).sqrt()).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                out.extend((0..dim).map(|d| {
                    let mixed: f64 =
                        seen.iter().zip(&weights).map(|(&slot, w)| w * f64::from(v[at(slot) + d])).sum();
                    (mixed / sum) as f32
                }));
            }
        }
        out
    }
}

fn low(bits: usize) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// A batch in device memory: pages in random order, NaN wherever no sequence has a key, garbage in unused table
/// entries.
struct Batch {
    layer: Layer,
    pages: [Buffer; 2],
    table: Buffer,
    spans: Buffer,
    masks: Buffer,
    q: Buffer,
    out: Buffer,
}

impl Batch {
    fn paged(&self) -> Paged<'_> {
        Paged { k: &self.pages[0], v: &self.pages[1], table: &self.table, spans: &self.spans }
    }
}

fn batch(
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

fn workspace(device: &dyn Device, attention: &Attention) -> Result<Workspace> {
    let counters = device.allocate(attention.counter_bytes()?, "counters")?;
    device.fill(&counters, 0)?;
    Ok(Workspace { partials: poisoned::<u8>(device, attention.partial_bytes()?), counters })
}

fn launch(
    device: &dyn Device,
    batch: &Batch,
    attention: &Attention,
    rule: Rule,
    space: &Workspace,
) -> Result<()> {
    let mask = match rule {
        Rule::Chain => Mask::Chain,
        Rule::Tree => Mask::Tree(&batch.masks),
        Rule::Block => Mask::Block,
    };
    attention.launch(device, &batch.out, &batch.q, batch.paged(), mask, space)
}

/// The outputs of the sequences' rows, [rows][heads][head_dim] each; asserts that the rest was left alone.
fn run(device: &dyn Device, shape: &Shape, block: usize, sequences: &[Sequence]) -> Vec<Vec<u16>> {
    let slots = sequences.iter().map(|s| s.context + s.rows).max().unwrap();
    run_with(device, shape, block, slots, sequences)
}

fn run_with(
    device: &dyn Device,
    shape: &Shape,
    block: usize,
    capacity: usize,
    sequences: &[Sequence],
) -> Vec<Vec<u16>> {
    let batch = batch(device, shape, block, capacity.div_ceil(PAGE), sequences);
    let attention = Attention { layer: batch.layer, sequences: sequences.len(), block, capacity };
    let space = workspace(device, &attention).unwrap();
    launch(device, &batch, &attention, shape.rule, &space).unwrap();
    assert!(bytes_of(device, &space.counters).iter().all(|&b| b == 0), "counters are to be zero again");
    let (out, width) = (download::<u16>(device, &batch.out), shape.heads * shape.head_dim);
    let of = |(s, out): (&Sequence, &[u16])| {
        let (rows, rest) = out.split_at(s.rows * width);
        assert!(rest.iter().all(|&x| x == POISON), "a row beyond the span was written");
        rows.to_vec()
    };
    sequences.iter().zip(out.chunks(block * width)).map(of).collect()
}

/// As [`run`], held against the reference.
fn check(device: &dyn Device, shape: &Shape, block: usize, sequences: &[Sequence]) -> Vec<Vec<u16>> {
    let out = run(device, shape, block, sequences);
    for (s, out) in sequences.iter().zip(&out).filter(|(s, _)| s.rows > 0) {
        let error = relative_error(&from_bf16(out), &s.reference(shape));
        assert!(error < BOUND, "error {error:.1e}: {shape:?}, context {}, {} rows", s.context, s.rows);
    }
    out
}

const CONTEXTS: [usize; 9] = [0, 1, 63, 64, 65, 127, 128, 129, 300];

fn shape(rule: Rule, head_dim: usize, heads: usize, kv_heads: usize, window: usize) -> Shape {
    Shape { heads, kv_heads, head_dim, window, rule }
}

#[test]
fn all_groups_and_head_sizes_equal_f64() {
    every_device(|device| {
        let mut random = Random::new(1);
        for head_dim in [64, 128] {
            // Groups of 1 to 8, no group, and one key/value head for all.
            for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1), (6, 1), (14, 2), (8, 1)] {
                for (rule, rows) in [(Rule::Chain, 1), (Rule::Chain, 3), (Rule::Block, 9), (Rule::Tree, 17)] {
                    let shape = shape(rule, head_dim, heads, kv_heads, 0);
                    let context = CONTEXTS[random.below(CONTEXTS.len())];
                    check(device, &shape, rows, &[Sequence::new(&shape, context, rows, &mut random)]);
                }
            }
        }
    });
}

#[test]
fn all_contexts_and_windows_equal_f64_in_a_ragged_batch() {
    every_device(|device| {
        let mut random = Random::new(2);
        for rule in [Rule::Chain, Rule::Tree, Rule::Block] {
            for window in [0, 1, 7, 64, 100] {
                for (head_dim, block) in [(64, 16), (128, 8)] {
                    let shape = shape(rule, head_dim, 2, 1, window);
                    let sequences: Vec<Sequence> = CONTEXTS
                        .iter()
                        .map(|&context| Sequence::new(&shape, context, random.below(block + 1), &mut random))
                        .collect();
                    check(device, &shape, block, &sequences);
                }
            }
        }
    });
}

#[test]
fn random_shapes_equal_f64() {
    every_device(|device| {
        let mut random = Random::new(16);
        for _ in 0..if cfg!(feature = "sanitize") { 30 } else { 150 } {
            let rule = [Rule::Chain, Rule::Tree, Rule::Block][random.below(3)];
            let (group, kv_heads) = (1 + random.below(8), 1 + random.below(2));
            let window = if random.below(2) == 0 { 0 } else { 1 + random.below(200) };
            let shape = shape(rule, [64, 128][random.below(2)], group * kv_heads, kv_heads, window);
            let block = 1 + random.below(if group > 4 { 12 } else { 24 });
            let mut sequence = || {
                let (context, rows) = (random.below(400), random.below(block + 1));
                Sequence::new(&shape, context, rows, &mut random)
            };
            let sequences = [sequence(), sequence()];
            check(device, &shape, block, &sequences);
        }
    });
}

#[test]
fn trees_and_blocks_of_64_rows_equal_f64() {
    every_device(|device| {
        let mut random = Random::new(3);
        for (rule, window) in [(Rule::Tree, 0), (Rule::Tree, 9), (Rule::Block, 20), (Rule::Chain, 30)] {
            // Eight tiles of 64 packed rows; seven, of which some hold heads of two rows' ends.
            for (heads, head_dim) in [(8, 64), (7, 128)] {
                let shape = shape(rule, head_dim, heads, 1, window);
                check(device, &shape, 64, &[Sequence::new(&shape, 100, 64, &mut random)]);
            }
        }
    });
}

#[test]
fn five_schedules_and_two_threads_give_equal_bits() {
    let mut random = Random::new(4);
    for (rule, head_dim, window) in [(Rule::Chain, 64, 0), (Rule::Tree, 128, 100), (Rule::Block, 64, 40)] {
        let shape = shape(rule, head_dim, 8, 2, window);
        let sequences: Vec<Sequence> =
            [(300, 16), (0, 0), (250, 13)].map(|(c, r)| Sequence::new(&shape, c, r, &mut random)).into();
        let test = |device: &dyn Device| to_bytes(&check(device, &shape, 16, &sequences).concat());
        let bytes = bits_of_every_device(test).remove(0);
        assert_written(&bytes, "out");
        let parallel = Emulator::new();
        parallel.set_threads(2);
        assert_eq!(test(&parallel), bytes);
    }
}

/// Two blocks at a time, so that the two splits of a kv head run side by side, each warp as far as it gets: the block
/// that merges must find all the other has left.
#[test]
fn merging_waits_for_all_warps_of_the_other_blocks() {
    let shape = shape(Rule::Chain, 64, 32, 8, 0);
    let mut random = Random::new(17);
    let sequences: Vec<Sequence> = (0..4).map(|_| Sequence::new(&shape, 192, 16, &mut random)).collect();
    let device = Emulator::new();
    let expected = run(&device, &shape, 16, &sequences);
    device.set_threads(2);
    for schedule in Schedule::ALL {
        device.set_schedule(schedule);
        for _ in 0..if cfg!(feature = "sanitize") { 1 } else { 3 } {
            assert!(run(&device, &shape, 16, &sequences) == expected, "{schedule:?}");
        }
    }
}

/// One step per row, each in a batch of its own.
fn steps(device: &dyn Device, shape: &Shape, s: &Sequence) -> Vec<u16> {
    let shape = Shape { rule: Rule::Chain, ..*shape };
    (0..s.rows).flat_map(|row| run(device, &shape, 1, &[s.step(&shape, row)]).concat()).collect()
}

#[test]
fn single_token_steps_equal_one_block_bit_for_bit() {
    every_device(|device| {
        let mut random = Random::new(5);
        // Borders of tiles at 64, of splits at 128, of groups of splits at 1024, of wider splits at 4096.
        let small = cfg!(feature = "sanitize");
        let far: &[usize] = if small { &[1019] } else { &[505, 1012, 1023, 2040, 4085] };
        let near = [0, 48, 63, 64, 112, 120, 127, 128, 250, 300];
        for (i, &context) in near.iter().chain(far).enumerate() {
            for window in if context > 300 { vec![0, 300] } else { vec![0, 7, 100] } {
                let head_dim = [64, 128][i % 2];
                let shape = shape(Rule::Chain, head_dim, 4, 1, window);
                let s = Sequence::new(&shape, context, 16, &mut random);
                let block = check(device, &shape, 16, std::slice::from_ref(&s)).concat();
                assert!(steps(device, &shape, &s) == block, "context {context}, window {window}");
                // The same keys and rows in blocks of 2 and of 7.
                for size in [2, 7] {
                    let mut again = Vec::new();
                    for first in (0..16).step_by(size) {
                        let width = shape.heads * head_dim;
                        let last = s.step(&shape, (first + size).min(16) - 1);
                        let rows = last.context + 1 - context - first;
                        let q = s.q[first * width..(first + rows) * width].to_vec();
                        let part = Sequence {
                            context: context + first,
                            rows,
                            masks: s.masks[..rows].to_vec(),
                            q,
                            ..last
                        };
                        again.extend(run(device, &shape, size, &[part]).concat());
                    }
                    assert!(again == block, "blocks of {size}: context {context}, window {window}");
                }
            }
        }
    });
}

#[test]
fn single_token_steps_equal_a_chain_of_64_in_a_tree_bit_for_bit() {
    every_device(|device| {
        let mut random = Random::new(6);
        for (context, heads, window) in [(100, 4, 0), (40, 3, 50)] {
            let chain = shape(Rule::Chain, 64, heads, 1, window);
            let s = Sequence::new(&chain, context, 64, &mut random);
            let tree = Shape { rule: Rule::Tree, ..chain };
            let block = check(device, &tree, 64, std::slice::from_ref(&s));
            assert!(steps(device, &chain, &s) == block[0]);
            assert!(run(device, &chain, 64, &[s]) == block);
        }
    });
}

const NONE: usize = usize::MAX;

/// The trees of a kind that have `rows` rows: chains with few branches; bushes; many short paths; many short ones and a
/// long one, whose keys lie the farther apart the deeper; and two that start at the context.
fn parents(kind: usize, rows: usize, random: &mut Random) -> Vec<usize> {
    let parent = |row: usize, random: &mut Random| match kind % 5 {
        0 if random.below(8) > 0 => row - 1,
        0 | 1 => random.below(row),
        2 => random.below(row.min(4)),
        3 if row.is_multiple_of(3) => row - 3,
        3 => row / 3 * 3,
        _ if row < 3 => NONE,
        _ => row - 2,
    };
    (1..rows).map(|row| parent(row, random)).collect()
}

/// The outputs of trees, which must be those of their paths as chains: one chain for each leaf, all in one launch.
fn as_chains(device: &dyn Device, shape: &Shape, s: &Sequence) -> Vec<u16> {
    let width = shape.heads * shape.head_dim;
    let is_leaf = |row: &usize| s.masks[row + 1..].iter().all(|mask| mask >> row & 1 == 0);
    let leaves: Vec<Vec<usize>> = (0..s.rows).filter(is_leaf).map(|leaf| s.path(leaf)).collect();
    let chains: Vec<Sequence> = leaves.iter().map(|path| s.chain(shape, path)).collect();
    let block = leaves.iter().map(Vec::len).max().unwrap_or(1);
    let found = run(device, &Shape { rule: Rule::Chain, ..*shape }, block, &chains);
    let mut out = vec![POISON; s.rows * width];
    for (path, found) in leaves.iter().zip(&found) {
        for (row, found) in path.iter().zip(found.chunks(width)) {
            out[row * width..][..width].copy_from_slice(found);
        }
    }
    assert_written(&to_bytes(&out), "a row of no path");
    out
}

/// Runs a batch of trees; each row must have the bits of its path as a chain.
fn trees_equal_chains(device: &dyn Device, shape: &Shape, block: usize, trees: &[Sequence]) {
    let found = check(device, shape, block, trees);
    for (s, found) in trees.iter().zip(&found).filter(|(s, _)| s.rows > 0) {
        let (expected, width) = (as_chains(device, shape, s), shape.heads * shape.head_dim);
        for (row, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
            let what = format!("{shape:?}, {} rows after {}: row {row}", s.rows, s.context);
            assert!(found == expected, "{what}, path {:?}, has other bits", s.path(row));
        }
    }
}

/// Borders of tiles and splits before, among and behind the rows of trees, and trees with all their rows on one page.
#[test]
fn every_row_of_a_tree_has_the_bits_of_its_path_as_a_chain() {
    every_device(|device| {
        let mut random = Random::new(20);
        let contexts: Vec<usize> =
            [0, 1, 47].into_iter().chain(55..66).chain(112..130).chain([191, 250]).collect();
        let turns = if cfg!(feature = "sanitize") { 12 } else { 3 * contexts.len() };
        for turn in 0..turns {
            let group = [1, 2, 4, 8, 3, 5][turn % 6];
            let kv_heads = 1 + random.below(2);
            let window = [0, 0, 1 + random.below(8), 1 + random.below(150)][random.below(4)];
            let shape = shape(Rule::Tree, [64, 128][turn / 6 % 2], group * kv_heads, kv_heads, window);
            let rows = if turn % 4 == 0 { 64 } else { 2 + random.below(24) };
            let context = contexts[turn * 5 % contexts.len()];
            let parents = parents(turn, rows, &mut random);
            trees_equal_chains(
                device,
                &shape,
                rows,
                &[Sequence::tree(&shape, context, &parents, &mut random)],
            );
        }
    });
}

#[test]
fn trees_of_a_ragged_batch_have_the_bits_of_chains() {
    every_device(|device| {
        let mut random = Random::new(21);
        for (head_dim, heads, window) in [(64, 4, 0), (128, 3, 0), (64, 1, 70), (128, 8, 5)] {
            let shape = shape(Rule::Tree, head_dim, heads, 1, window);
            let mut trees: Vec<Sequence> = [(63, 20), (0, 1), (120, 24), (64, 7), (190, 23)]
                .iter()
                .enumerate()
                .map(|(i, &(context, rows))| {
                    Sequence::tree(&shape, context, &parents(i, rows, &mut random), &mut random)
                })
                .collect();
            trees.insert(2, Sequence::new(&shape, 300, 0, &mut random));
            trees_equal_chains(device, &shape, 24, &trees);
        }
    });
}

/// A tree across the border of splits of 128 and of 512 slots, of which the deepest row is compared with a step of plain
/// decoding.
#[test]
fn a_tree_across_wider_splits_has_the_bits_of_plain_steps() {
    every_device(|device| {
        let mut random = Random::new(22);
        let contexts: &[usize] = if cfg!(feature = "sanitize") { &[1010] } else { &[1010, 4060, 4095, 4600] };
        for (turn, &context) in contexts.iter().enumerate() {
            let shape = shape(Rule::Tree, [64, 128][turn % 2], 4, 1, [0, 0, 300][turn % 3]);
            let s = Sequence::tree(&shape, context, &parents(4, 64, &mut random), &mut random);
            let found = run(device, &shape, 64, std::slice::from_ref(&s)).concat();
            let row = (0..64).max_by_key(|&row| s.masks[row].count_ones()).unwrap();
            let path = s.path(row);
            let width = shape.heads * shape.head_dim;
            let steps = steps(device, &shape, &s.chain(&shape, &path));
            for (row, step) in path.iter().zip(steps.chunks(width)) {
                assert!(&found[row * width..][..width] == step, "row {row} after {context}");
            }
        }
    });
}

/// Keys and values that are no numbers, one slot of a tree or of its last page at a time: rows that do not see it keep
/// their bits, and those that do give what a chain gives.
#[test]
fn rows_of_trees_see_nothing_of_other_paths() {
    every_device(|device| {
        let mut random = Random::new(23);
        for (turn, (context, window)) in [(60, 0), (100, 0), (127, 30), (64, 0)].into_iter().enumerate() {
            let shape = shape(Rule::Tree, [64, 128][turn % 2], 2, 1, window);
            let s = Sequence::tree(&shape, context, &parents(turn, 12, &mut random), &mut random);
            let clean = run(device, &shape, 12, std::slice::from_ref(&s)).concat();
            let slots = context.saturating_sub(3)..context + 12;
            for (slot, of_key) in slots.flat_map(|slot| [(slot, true), (slot, false)]) {
                let mut bad = s.clone();
                let x = if of_key { &mut bad.k } else { &mut bad.v };
                x[slot * shape.head_dim + 5] = 0x7fc0;
                let found = run(device, &shape, 12, std::slice::from_ref(&bad)).concat();
                assert!(found == as_chains(device, &shape, &bad), "slot {slot} after {context}, {of_key}");
                let width = 2 * shape.head_dim;
                for (row, (found, clean)) in found.chunks(width).zip(clean.chunks(width)).enumerate() {
                    let reached = from_bf16(found).iter().any(|x| x.is_nan());
                    assert_eq!(reached, s.sees(&shape, row, slot), "slot {slot} after {context}, row {row}");
                    assert!(reached || found == clean, "slot {slot} after {context}, row {row}");
                }
            }
        }
    });
}

/// Bits of rows that are not there, or have no slot because the capacity ends before them, name no keys.
#[test]
fn rows_of_trees_see_no_rows_that_are_not_there() {
    every_device(|device| {
        let mut random = Random::new(26);
        for (head_dim, context) in [(64, 70), (128, 50)] {
            let shape = shape(Rule::Tree, head_dim, 3, 1, 0);
            let s = Sequence::tree(&shape, context, &parents(1, 12, &mut random), &mut random);
            let clean = run(device, &shape, 12, std::slice::from_ref(&s)).concat();
            let mut more = s.clone();
            more.masks.iter_mut().for_each(|mask| *mask |= !low(12));
            assert!(run(device, &shape, 12, &[more]).concat() == clean, "{head_dim}");
            let mut fewer = s.clone();
            fewer.masks.iter_mut().for_each(|mask| *mask &= low(7));
            let found = run_with(device, &shape, 12, context + 7, &[s]).concat();
            assert!(found[..7 * 3 * head_dim] == clean[..7 * 3 * head_dim], "{head_dim}, room for 7 rows");
            assert!(found == run(device, &shape, 12, &[fewer]).concat(), "{head_dim}, rows behind these");
        }
    });
}

#[test]
fn trees_give_equal_bits_under_five_schedules_and_two_threads() {
    let mut random = Random::new(24);
    for (head_dim, heads, window) in [(128, 2, 0), (64, 8, 40)] {
        let shape = shape(Rule::Tree, head_dim, heads, 1, window);
        let mut trees = vec![Sequence::new(&shape, 10, 0, &mut random)];
        for (i, (context, rows)) in [(121, 30), (63, 16), (250, 9)].into_iter().enumerate() {
            trees.push(Sequence::tree(&shape, context, &parents(i + 1, rows, &mut random), &mut random));
        }
        let expected: Vec<u16> = trees
            .iter()
            .filter(|s| s.rows > 0)
            .flat_map(|s| as_chains(&Emulator::new(), &shape, s))
            .collect();
        let test = |device: &dyn Device| to_bytes(&run(device, &shape, 30, &trees).concat());
        assert!(five_schedules(|device| test(device)) == to_bytes(&expected));
        let parallel = Emulator::new();
        parallel.set_threads(2);
        assert!(test(&parallel) == to_bytes(&expected));
    }
}

/// An output that shrinks to nothing is a zero without a sign, in one split and in a block that has two.
#[test]
fn a_zero_is_the_same_zero_in_one_split_and_in_two() {
    every_device(|device| {
        let shape = shape(Rule::Chain, 64, 1, 1, 0);
        let mut s = Sequence::new(&shape, 120, 16, &mut Random::new(18));
        s.q = to_bf16(&vec![4.0; 16 * 64]);
        // The first tile leaves about -1e-38, which 2^-92 makes -0; the second adds nothing but -0.
        s.k = to_bf16(&[vec![0.0; 64 * 64], vec![2.0; 72 * 64]].concat());
        s.v = to_bf16(&[vec![-1e-40; 64 * 64], vec![-0.0; 72 * 64]].concat());
        let block = run(device, &shape, 16, std::slice::from_ref(&s)).concat();
        assert!(block.iter().all(|&x| x == 0));
        assert!(steps(device, &shape, &s) == block);
    });
}

#[test]
fn bits_are_the_same_in_any_batch_place_block_and_capacity() {
    every_device(|device| {
        let mut random = Random::new(7);
        for (rule, rows) in [(Rule::Chain, 5), (Rule::Tree, 5), (Rule::Block, 5)] {
            let shape = shape(rule, 64, 3, 1, 0);
            let s = Sequence::new(&shape, 130, rows, &mut random);
            let other = |context, random: &mut Random| Sequence::new(&shape, context, rows, random);
            let alone = run(device, &shape, rows, std::slice::from_ref(&s)).concat();
            for (block, place, capacity) in [(5, 0, 310), (6, 1, 500), (16, 2, 5000), (64, 1, 400)] {
                let mut sequences = vec![other(7, &mut random), other(300, &mut random)];
                sequences.insert(place, s.clone());
                let out = run_with(device, &shape, block, capacity, &sequences);
                assert!(out[place] == alone, "{rule:?} among blocks of {block}, place {place}");
            }
        }
    });
}

#[test]
fn rows_see_nothing_of_what_is_not_theirs() {
    every_device(|device| {
        let mut random = Random::new(8);
        for (rule, window) in
            [(Rule::Chain, 0), (Rule::Chain, 20), (Rule::Tree, 0), (Rule::Tree, 4), (Rule::Block, 3)]
        {
            for head_dim in [64, 128] {
                let shape = shape(rule, head_dim, 4, 2, window);
                let s = Sequence::new(&shape, 125, 8, &mut random);
                let clean = run(device, &shape, 8, std::slice::from_ref(&s)).concat();
                // One key, one value, or one element of either is no number: rows that do not see it keep their bits.
                for slot in [110, 124, 125, 127, 128, 130, 132] {
                    for (of_key, elements, bits) in
                        [(true, 1, 0x7fc0), (false, 1, 0x7fc0), (false, head_dim, 0xff80), (false, 1, 0x7f80)]
                    {
                        let mut bad = s.clone();
                        let at = (slot * 2 + 1) * head_dim + 3 * (head_dim - elements) / 4;
                        let x = if of_key { &mut bad.k } else { &mut bad.v };
                        x[at..at + elements].fill(bits);
                        let out = run(device, &shape, 8, &[bad]).concat();
                        for (i, (out, clean)) in out.chunks(head_dim).zip(clean.chunks(head_dim)).enumerate()
                        {
                            let (row, head) = (i / 4, i % 4);
                            let what = format!(
                                "{shape:?}, slot {slot}, row {row}, head {head}, key {of_key}, {bits:x}"
                            );
                            if head >= 2 && s.sees(&shape, row, slot) {
                                assert!(
                                    from_bf16(out).iter().any(|x| !x.is_finite()),
                                    "{what} does not see it"
                                );
                            } else {
                                assert!(out == clean, "{what} was reached");
                            }
                        }
                    }
                }
                // A query that is no number stays with its own row and head.
                let mut bad = s.clone();
                bad.q[(3 * 4 + 1) * head_dim] = 0x7fc0;
                let out = run(device, &shape, 8, &[bad]).concat();
                for (i, (out, clean)) in out.chunks(head_dim).zip(clean.chunks(head_dim)).enumerate() {
                    assert!(if i == 13 { from_bf16(out).iter().all(|x| x.is_nan()) } else { out == clean });
                }
            }
        }
    });
}

#[test]
fn any_length_page_and_mask_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(9);
        let odd = [0, 1, 63, 64, 200, 319, 320, 321, 1 << 31, (1 << 31) - 1, u32::MAX - 1, u32::MAX];
        for turn in 0..if cfg!(feature = "sanitize") { 12 } else { 60 } {
            let rule = [Rule::Chain, Rule::Tree, Rule::Block][turn % 3];
            let shape = shape(rule, [64, 128][turn % 2], 3, 1, [0, 1, 70, 1 << 31][turn % 4]);
            let sequences: Vec<Sequence> =
                (0..3).map(|_| Sequence::new(&shape, 50, 5, &mut random)).collect();
            let batch = batch(device, &shape, 5, 5, &sequences);
            let mut pick =
                || if random.below(3) == 0 { random.next() as u32 } else { odd[random.below(odd.len())] };
            let words = |n: usize, pick: &mut dyn FnMut() -> u32| {
                (0..n).flat_map(|_| pick().to_le_bytes()).collect::<Vec<u8>>()
            };
            device.upload(&batch.spans, &words(6, &mut pick)).unwrap();
            if turn < 6 {
                // Ends that are 0 again.
                let spans = [u32::MAX, 1, u32::MAX - 1, 2, u32::MAX - 4, 5];
                device.upload(&batch.spans, &to_bytes(&spans)).unwrap();
            }
            device.upload(&batch.masks, &words(30, &mut pick)).unwrap();
            if turn % 5 > 0 {
                device.upload(&batch.table, &words(15, &mut pick)).unwrap();
            }
            // A capacity that is no multiple of anything.
            let attention = Attention { layer: batch.layer, sequences: 3, block: 5, capacity: 311 };
            let space = workspace(device, &attention).unwrap();
            launch(device, &batch, &attention, rule, &space).unwrap();
            assert!(bytes_of(device, &space.counters).iter().all(|&b| b == 0));
            let prefill = Prefill { layer: batch.layer, rows: 15 };
            prefill.launch(device, &batch.out, &batch.q, batch.paged()).unwrap();
        }
    });
}

/// Prefill of `s` in chunks of these sizes.
fn prefill(device: &dyn Device, shape: &Shape, chunks: &[usize], s: &Sequence) -> Vec<u16> {
    let (mut out, mut at, width) = (Vec::new(), 0, shape.heads * shape.head_dim);
    for &rows in chunks {
        let whole = s.step(shape, at + rows - 1);
        let q = s.q[at * width..(at + rows) * width].to_vec();
        let part = Sequence { context: s.context + at, rows, masks: vec![0; rows], q, ..whole };
        let room = rows + 3;
        let batch = batch(device, shape, room, (part.context + rows).div_ceil(PAGE) + 1, &[part]);
        let prefill = Prefill { layer: batch.layer, rows: room };
        prefill.launch(device, &batch.out, &batch.q, batch.paged()).unwrap();
        let got = download::<u16>(device, &batch.out);
        assert!(got[rows * width..].iter().all(|&x| x == POISON), "a row beyond the span was written");
        out.extend(&got[..rows * width]);
        at += rows;
    }
    out
}

#[test]
fn prefill_equals_f64_and_its_bits_do_not_depend_on_chunks() {
    let mut random = Random::new(10);
    for (head_dim, heads, kv_heads, window, context) in
        [(64, 4, 1, 0, 0), (128, 3, 1, 0, 70), (64, 1, 1, 50, 0), (128, 8, 1, 64, 200), (64, 2, 2, 1, 63)]
    {
        let shape = shape(Rule::Chain, head_dim, heads, kv_heads, window);
        let s = Sequence::new(&shape, context, 150, &mut random);
        if !cfg!(feature = "sanitize") {
            bits_of_every_device(|device| to_bytes(&prefill(device, &shape, &[150], &s)));
        }
        every_device(|device| {
            let whole = prefill(device, &shape, &[150], &s);
            let error = relative_error(&from_bf16(&whole), &s.reference(&shape));
            assert!(error < BOUND, "error {error:.1e}: {shape:?}");
            assert!(prefill(device, &shape, &[1, 64, 17, 68], &s) == whole, "{shape:?}");
            // Where all keys are in one split, these are also the bits of single steps.
            if context == 0 {
                let few = Sequence { rows: if cfg!(feature = "sanitize") { 20 } else { 128 }, ..s.clone() };
                let rows = few.rows * heads * head_dim;
                assert!(steps(device, &shape, &few) == whole[..rows], "{shape:?}");
            }
        });
    }
}

#[test]
fn prefill_takes_chunks_of_512_rows() {
    every_device(|device| {
        let rows = if cfg!(feature = "sanitize") { 130 } else { 512 };
        let shape = shape(Rule::Chain, 64, 4, 1, 100);
        let s = Sequence::new(&shape, 10, rows, &mut Random::new(11));
        let out = prefill(device, &shape, &[rows], &s);
        assert!(relative_error(&from_bf16(&out), &s.reference(&shape)) < BOUND);
    });
}

#[test]
fn splits_cover_all_slots_in_order() {
    let mut slot = 0;
    for split in 0..200 {
        assert_eq!(split_start(split), slot);
        let next = split_start(split + 1);
        assert_eq!((split_of(slot), split_of(next - 1)), (split, split));
        slot = next;
    }
    assert_eq!([4096, 32768, 131_072].map(split_of), [32, 88, 136]);
}

/// Contexts of 128k and more, where all pages of the table are a few: keys repeat, and so does the reference.
#[test]
fn contexts_beyond_128k_equal_f64() {
    let device = Emulator::new();
    contexts_beyond_128k(&device, || Some(device.counts()["attention_64x16"].read as usize));
    if let Some(gpu) = gpu() {
        contexts_beyond_128k(gpu, || None);
    }
}

/// `read`: bytes read since the device was opened, where they are counted.
fn contexts_beyond_128k(device: &dyn Device, read: impl Fn() -> Option<usize>) {
    let mut before = 0;
    let context = if cfg!(feature = "sanitize") { 35_000 } else { 131_100 };
    let shape = shape(Rule::Chain, 64, 1, 1, 0);
    let mut random = Random::new(12);
    let few = Sequence::new(&shape, 5 * PAGE, 0, &mut random);
    let repeat = |x: &[u16]| x.iter().copied().cycle().take((context + 2) * 64).collect::<Vec<u16>>();
    let s = Sequence {
        context,
        rows: 2,
        masks: vec![1, 3],
        q: random.bf16(2 * 64, 1.0),
        k: repeat(&few.k),
        v: repeat(&few.v),
    };
    let per_sequence = (context + 2).div_ceil(PAGE);
    let mut b = batch(device, &shape, 2, per_sequence, std::slice::from_ref(&few));
    let table: Vec<u32> = download(device, &b.table);
    b.table = upload(device, &(0..per_sequence).map(|i| table[i % 5]).collect::<Vec<u32>>());
    b.spans = upload(device, &[context as u32, 2]);
    b.q = upload(device, &s.q);
    for (window, blocks) in [(0, split_of(context + 1) + 1), (1000, 2)] {
        b.layer.window = window;
        let attention = Attention { layer: b.layer, sequences: 1, block: 2, capacity: per_sequence * PAGE };
        let space = workspace(device, &attention).unwrap();
        launch(device, &b, &attention, Rule::Chain, &space).unwrap();
        let expected = s.reference(&Shape { window, ..shape });
        let error = relative_error(&from_bf16(&download(device, &b.out)), &expected);
        assert!(error < BOUND, "window {window}: error {error:.1e}");
        // Keys and values, a page number per thread and tile, parts; splits the window does not reach read the span.
        if let Some(read) = read() {
            let (bytes, seen) = (read - before, if window == 0 { context + 2 } else { window + 1 });
            let most = seen * (256 + 9) + blocks * 4096 + 140 * 1024;
            assert!(bytes < most, "{bytes} bytes read, window {window}");
            before = read;
        }
    }
}

#[test]
fn keys_and_values_are_read_once_without_bank_conflicts() {
    for (head_dim, rows) in [(64, 1), (128, 1), (64, 16), (128, 16)] {
        let device = Emulator::new();
        device.count_conflicts(true);
        let shape = shape(Rule::Chain, head_dim, 4, 1, 0);
        let s = Sequence::new(&shape, 255 - rows, rows, &mut Random::new(13));
        run(&device, &shape, rows, std::slice::from_ref(&s));
        let counts = device.counts();
        let (name, count) = counts.first_key_value().unwrap();
        assert_eq!(count.conflicts, 0, "{name}");
        let (keys, queries) = (255 * 2 * head_dim * 2, 2 * rows * 4 * head_dim * 2);
        let batch = batch(&device, &shape, rows, 4, std::slice::from_ref(&s));
        let attention = Attention { layer: batch.layer, sequences: 1, block: rows, capacity: 255 };
        assert_eq!(attention.bytes(&[(255 - rows, rows)]), (keys + queries) as u64);
        // Two splits: both read the queries, the last reads parts of 4 (head_dim + 2) bytes a row, and 128 threads of
        // each read 16 bytes of span and table.
        let (packed, most) = (rows * 4, 2 * 128 * 16);
        let parts = 2 * packed * (4 * head_dim + 8);
        assert_eq!(count.read as usize - most, keys + queries + parts, "{name}");
        let products = if rows == 1 { 1 } else { 4 } * 4 * 4 * (head_dim / 16 * 2 + 4 * head_dim / 32);
        assert_eq!(count.mma as usize, products, "{name}: tiles of 64 keys");
    }
}

/// What is gathered for one row is not multiplied for others, rows that do not reach a position do not gather it, and
/// both of a tree's pages are read once.
#[test]
fn trees_gather_only_what_their_rows_reach() {
    let shape = shape(Rule::Tree, 64, 4, 1, 0);
    // Four children of the context's last key, behind whole pages and in one; a chain of 20 rows, four of which reach
    // the 17th position.
    let cases = [(256, vec![NONE; 3], 1, 4), (300, vec![NONE; 3], 1, 4), (256, (0..19).collect(), 8, 24)];
    for (context, parents, sixteens, gathered) in cases {
        let rows = parents.len() + 1;
        let s = Sequence::tree(&shape, context, &parents, &mut Random::new(25));
        let count = |shape: &Shape| {
            let device = Emulator::new();
            run(&device, shape, rows, std::slice::from_ref(&s));
            device.counts().into_values().next().unwrap()
        };
        let (tree, chain) = (count(&shape), count(&Shape { rule: Rule::Chain, ..shape }));
        // Per 16 packed rows and 16 keys: 8 products of queries and keys, 4 warps' 2 of weights and values.
        let products = 16 * (context / 16 * sixteens + gathered);
        assert_eq!(tree.mma as usize, products, "{rows} rows after {context}");
        // On top come masks: two by every thread, one by 32 for each row, one for each packed row.
        let masks = tree.blocks as usize * (128 * 16 + rows * 32 * 8 + 64 * 8);
        assert!((tree.read as usize) < chain.read as usize + masks, "{} against {}", tree.read, chain.read);
    }
}

#[test]
fn shared_memory_is_free_of_conflicts_under_every_mask() {
    let counted = |what: &str, run: &dyn Fn(&Emulator)| {
        let device = Emulator::new();
        device.count_conflicts(true);
        run(&device);
        for (name, count) in device.counts() {
            assert!(count.shared > 0, "{name}");
            assert_eq!(count.conflicts, 0, "{name}: {what}, of {} accesses", count.shared);
        }
    };
    let mut random = Random::new(17);
    let few = if cfg!(feature = "sanitize") { 1 } else { 6 };
    for (head_dim, heads) in [(64, 3), (64, 1), (64, 8), (128, 1), (128, 4), (128, 5)].into_iter().take(few) {
        for (context, window) in [(70, 0), (255, 100), (1300, 0)] {
            for rule in [Rule::Chain, Rule::Tree, Rule::Block] {
                let shape = shape(rule, head_dim, heads, 1, window);
                for rows in [1, 7, 64] {
                    let mut s = Sequence::new(&shape, context, rows, &mut random);
                    // Keys of a path need not lie in banks of their own, but where they are neighbours.
                    s.masks = (1..=rows).map(low).collect();
                    let what = format!("{shape:?}, {rows} rows after {context}");
                    counted(&what, &|device| drop(run(device, &shape, rows, std::slice::from_ref(&s))));
                }
            }
            let shape = shape(Rule::Chain, head_dim, heads, 1, window);
            let s = Sequence::new(&shape, context, 130, &mut random);
            let what = format!("a prompt, {shape:?} after {context}");
            counted(&what, &|device| drop(prefill(device, &shape, &[1, 64, 65], &s)));
        }
    }
}

#[test]
fn a_graph_of_attention_can_be_replayed() {
    every_device(|device| {
        let mut random = Random::new(14);
        let shape = shape(Rule::Chain, 64, 4, 2, 0);
        let s = [Sequence::new(&shape, 1200, 4, &mut random), Sequence::new(&shape, 200, 3, &mut random)];
        let batch = batch(device, &shape, 4, 19, &s);
        let attention = Attention { layer: batch.layer, sequences: 2, block: 4, capacity: 19 * PAGE };
        let space = workspace(device, &attention).unwrap();
        let graph = device.capture(&mut || launch(device, &batch, &attention, shape.rule, &space)).unwrap();
        let mut first = None;
        for contexts in [[1200u32, 200], [100, 3], [1200, 200]] {
            device.fill(&batch.out, 0).unwrap();
            device.upload(&batch.spans, &to_bytes(&[contexts[0], 4, contexts[1], 3])).unwrap();
            device.replay(&graph).unwrap();
            let out = bytes_of(device, &batch.out);
            assert!(contexts[0] != 1200 || first.get_or_insert_with(|| out.clone()) == &out);
        }
    });
}

#[test]
fn shapes_the_kernels_do_not_have_are_refused() {
    let device = Emulator::new();
    let shape = shape(Rule::Tree, 64, 4, 2, 0);
    let s = [Sequence::new(&shape, 10, 2, &mut Random::new(15))];
    let batch = batch(&device, &shape, 2, 1, &s);
    let good = Attention { layer: batch.layer, sequences: 1, block: 2, capacity: 64 };
    let space = workspace(&device, &good).unwrap();
    launch(&device, &batch, &good, shape.rule, &space).unwrap();
    let refused = |attention: Attention, part: &str| {
        let error = launch(&device, &batch, &attention, shape.rule, &space).unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    let layer = |layer: Layer| Attention { layer, ..good };
    refused(layer(Layer { heads: 18, ..good.layer }), "18 heads of 64 on 2 key/value heads");
    refused(layer(Layer { heads: 5, ..good.layer }), "5 heads of 64 on 2");
    refused(layer(Layer { kv_heads: 0, ..good.layer }), "on 0 key/value heads");
    refused(layer(Layer { head_dim: 96, ..good.layer }), "heads of 96");
    refused(layer(Layer { head_dim: 128, ..good.layer }), "out has 1024 bytes, needs 2048");
    refused(layer(Layer { pages: 4, ..good.layer }), "k has 49152 bytes, needs 65536");
    refused(Attention { block: 65, ..good }, "1 to 64 rows");
    refused(Attention { block: 3, ..good }, "needs");
    refused(Attention { capacity: 65, ..good }, "1 to 64 slots");
    refused(Attention { sequences: 2, ..good }, "needs");
    let prefill = |layer: Layer, rows: usize| {
        let refused = Prefill { layer, rows }.launch(&device, &batch.out, &batch.q, batch.paged());
        refused.unwrap_err().to_string()
    };
    assert!(prefill(good.layer, 3).contains("kernel attention_prefill: out has 1024 bytes, needs 1536"));
    assert!(prefill(good.layer, 0).contains("0 rows"));
    assert!(prefill(Layer { head_dim: 80, ..good.layer }, 2).contains("heads of 80"));
    let vast = Layer { pages_per_sequence: 1 << 20, ..good.layer };
    refused(Attention { layer: vast, capacity: 1 << 26, ..good }, "67108864 slots, possible are 901120");
}
