//! What a launch has to do, from its grid and parameters: blocks with work, and units of work in them.

use crate::gpu::device::{Arg, Launch};
use crate::gpu::kernels::PAGE;
use crate::gpu::kernels::attention::{split_of, split_start};
use crate::spec::sampling::SamplingParams;

/// What a round's launches work on, as far as their parameters do not say it.
#[derive(Debug, Clone)]
pub struct Point {
    /// Positions of each sequence before the round.
    pub context: usize,
    /// Rows that the round verifies of each sequence.
    pub rows: usize,
    /// The most rows of a path: those of a block.
    pub depth: usize,
    /// How each sequence samples.
    pub sampling: SamplingParams,
}

/// Quantities of a launch that its counters are proportional to.
pub const QUANTITIES: [&str; 6] = ["block", "unit", "merge", "part", "more", "store"];

/// The work of a launch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Work {
    /// The kernel and, after a `+`, the branch that it takes: `sample+race`, `head_8+row` for a single row.
    pub variant: String,
    /// For each of [`QUANTITIES`]:
    ///
    /// - blocks with work;
    /// - units over all blocks: groups of 32 inputs (linear kernels), tiles of 64 keys (attention), pairs of a
    ///   packed row and a split (merge of attention), blocks of 128 ids (samplers, candidates), groups of 128
    ///   columns (embedding), depths (walk of a selector), rows of the round (others);
    /// - blocks that finish what one or several blocks have computed: in linear kernels epilogues, one for each
    ///   128 rows of weights;
    /// - results of several blocks that these merge, in linear kernels of 128 rows each;
    /// - epilogues that store logits (linear kernels), tiles of the round's own rows, which have masks
    ///   (attention), listed blocks of ids (samplers);
    /// - results that blocks store for another block or for the next kernel to merge (linear kernels,
    ///   attention).
    pub quantities: [f64; QUANTITIES.len()],
    /// Blocks that return at once.
    pub idle: f64,
    /// Bytes that come from memory: weights, keys and values. All other bytes were written shortly before, or
    /// are small.
    pub memory_bytes: f64,
    /// Bytes of weights that a block loads, and prefetches into L2, before it waits for the previous kernel.
    pub early_bytes: f64,
    /// Bytes from memory that a block has in flight on their way to registers or shared memory.
    pub in_flight: f64,
    /// Bytes of weights behind them that a block has in flight to L2, on cards where launches may overlap.
    pub prefetch: f64,
    /// Hand-overs between blocks that follow each other, and the bytes that the receivers read in turn.
    pub hand_overs: [f64; 2],
    /// The quantities that only the last of these blocks work on.
    pub at_the_end: &'static [usize],
}

impl Work {
    /// The work of `launch` at `point`.
    pub fn of(launch: &Launch, point: &Point) -> Work {
        match launch.kernel.file {
            "qkv" | "project" | "swiglu" | "head" | "inject" | "convolve" => linear(launch),
            "attention" | "drafter_attention" => attention(launch, point),
            "sample" => sample(launch, &point.sampling),
            "selector" => selector(launch),
            _ => other(launch, point),
        }
    }

    /// Blocks with work.
    pub fn blocks(&self) -> f64 {
        self.quantities[0]
    }

    /// The work of the last blocks alone, or all other work.
    #[must_use]
    pub fn part(&self, at_the_end: bool) -> Work {
        let mut part = self.clone();
        for (i, quantity) in part.quantities.iter_mut().enumerate() {
            *quantity *= f64::from(self.at_the_end.contains(&i) == at_the_end);
        }
        part
    }
}

fn all_blocks(launch: &Launch) -> f64 {
    launch.grid.iter().map(|&n| f64::from(n)).product()
}

/// The number at the end of a kernel's name: rows of a block.
fn rows_in_name(launch: &Launch) -> usize {
    let digits = launch.kernel.name.rsplit(|c: char| !c.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(1)
}

fn linear(launch: &Launch) -> Work {
    let (numbers, name) = (launch.numbers(), launch.kernel.name);
    let [rows, n, k, slice, _, first_block] = [0, 1, 2, 3, 4, 5].map(|i| numbers[i]);
    let [columns, splits, passes] = launch.grid.map(f64::from);
    let (groups, tiles) = ((k / 32) as f64, columns * passes);
    // Epilogues run for each 128 rows of weights, of which a block has one or two halves.
    let halves = passes * (n.div_ceil(128) - first_block) as f64;
    let parts = if splits > 1.0 { halves * splits } else { 0.0 };
    // As `Staging` of `linear.cuh`: bytes of a group of 32 inputs, groups on their way to registers, and to
    // L2. Short slices are prefetched whole.
    let rows_of_block = if rows_in_name(launch) < 64 { 128 } else { 256 };
    let group = (rows_of_block * 64) as f64;
    let (loads, prefetch) = if rows_in_name(launch) < 128 { (4, 0) } else { (1, 8) };
    let logits = launch.kernel.file == "head" && !matches!(launch.args[14], Arg::Null);
    Work {
        variant: format!("{name}{}", if rows == 1 { "+row" } else { "" }),
        quantities: [tiles * splits, tiles * groups, halves, parts, if logits { halves } else { 0.0 }, parts],
        memory_bytes: passes * ((n.next_multiple_of(16) - first_block * 128) * k * 2) as f64,
        early_bytes: group * if slice <= 24 { slice } else { loads + prefetch } as f64,
        in_flight: group * loads as f64,
        prefetch: group * prefetch as f64,
        // Sums of f32.
        hand_overs: if parts > 0.0 {
            [1.0, splits * (rows_of_block * rows_in_name(launch) * 4) as f64]
        } else {
            [0.0; 2]
        },
        at_the_end: &[2, 3],
        ..Work::default()
    }
}

/// A split kernel of `attention.cuh`, or the kernel that merges its splits.
fn attention(launch: &Launch, point: &Point) -> Work {
    let (numbers, name) = (launch.numbers(), launch.kernel.name);
    let merges = name.contains("merge");
    let [block, heads, kv_heads] = [0, 1, 2].map(|i| numbers[i]);
    let [capacity, window] = if merges { [3, 4] } else { [5, 6] }.map(|i| numbers[i]);
    let in_tile = if merges { numbers[5] } else { rows_in_name(launch) };
    let (tree, full) = (name.starts_with("attention_tree"), launch.kernel.file == "drafter_attention");
    let group = heads / kv_heads;
    let tiles = (block * group).div_ceil(in_tile);
    let copies = (launch.grid[1] as usize / tiles * kv_heads) as f64;
    let (mut own, mut merged, mut slots) = ([0.0; QUANTITIES.len()], [0.0; QUANTITIES.len()], 0);
    for tile in 0..tiles {
        // As `RowTile::init` and `attend` of `attention.cuh`.
        let first_row = tile * in_tile / group;
        let last_row = ((tile * in_tile + in_tile - 1) / group).min(block - 1);
        let context = point.context.min(capacity - 1);
        let (low, end) = match (tree, full) {
            (true, _) => (context, context + block.min(point.depth)),
            (_, true) => (context + first_row + 1, context + block),
            _ => (context + first_row + 1, context + last_row + 1),
        };
        let end = end.min(capacity);
        let from = if window == 0 { 0 } else { low.saturating_sub(window).min(end - 1) };
        let (first, last) = (split_of(from), split_of(end - 1));
        let tail = context / PAGE * PAGE;
        for split in first..=last {
            let begin = split_start(split).max(from / PAGE * PAGE);
            let stop = split_start(split + 1).min(end);
            own[0] += 1.0;
            own[1] += (stop - begin).div_ceil(PAGE) as f64;
            if stop > tail {
                own[4] += (stop - tail.max(begin)).div_ceil(PAGE) as f64;
            }
        }
        if first < last {
            let (splits, rows) = (last - first + 1, in_tile.min(block * group - tile * in_tile));
            own[5] += splits as f64;
            merged[0] += rows.div_ceil(4) as f64;
            merged[1] += (rows * splits) as f64;
        }
        slots = slots.max(end - from);
    }
    let quantities = if merges { merged } else { own }.map(|quantity| quantity * copies);
    let idle = all_blocks(launch) - quantities[0];
    let variant = name.to_string();
    if merges {
        return Work { variant, quantities, idle, ..Work::default() };
    }
    let head_dim = match &launch.args[3] {
        Arg::Buffer(keys) => keys.bytes() / (numbers[3] * kv_heads * PAGE * 2).max(1),
        _ => 0,
    };
    Work {
        variant,
        quantities,
        idle,
        memory_bytes: copies * (slots * head_dim * 4) as f64,
        // Two tiles of keys and values.
        in_flight: 2.0 * (4 * PAGE * head_dim) as f64,
        ..Work::default()
    }
}

/// `cuda/spec/sample.cu`: which blocks work depends on the filters.
fn sample(launch: &Launch, sampling: &SamplingParams) -> Work {
    let [slices, rows, _] = launch.grid.map(f64::from);
    let ids = launch.numbers()[1] as f64;
    let greedy = matches!(launch.args[2], Arg::Null);
    let (branch, blocks, merges, more) = match (greedy, sampling.top_k) {
        (true, _) => ("", rows, 0.0, 0.0),
        (_, 0) => ("+race", slices * rows, rows, 0.0),
        (_, top_k) => ("+top-k", rows, 0.0, rows * top_k as f64),
    };
    Work {
        variant: format!("sample{branch}"),
        quantities: [blocks, blocks * ids, merges, merges * slices, more, 0.0],
        idle: all_blocks(launch) - blocks,
        hand_overs: [if merges > 0.0 { 1.0 } else { 0.0 }, 0.0],
        at_the_end: if merges > 0.0 { &[2, 3] } else { &[] },
        ..Work::default()
    }
}

/// `cuda/spec/selector.cu`: units are blocks of 128 ids, or depths.
fn selector(launch: &Launch) -> Work {
    let (blocks, numbers) = (all_blocks(launch), launch.numbers());
    let (units, of_depth) = match numbers[..] {
        [keys, ..] if launch.kernel.name == "selector_candidates" => (keys, 0),
        [_, _, candidates, rank, first, end, ..] => (end - first, (candidates + 1) * rank * 2),
        _ => (0, 0),
    };
    Work {
        variant: launch.kernel.name.to_string(),
        quantities: [blocks, blocks * units as f64, 0.0, 0.0, 0.0, 0.0],
        // A depth needs the rows of the codebooks that the one before has selected.
        memory_bytes: blocks * (units * of_depth) as f64,
        in_flight: of_depth as f64,
        ..Work::default()
    }
}

fn other(launch: &Launch, point: &Point) -> Work {
    let (blocks, numbers) = (all_blocks(launch), launch.numbers());
    let rows = f64::from(launch.grid[1]);
    let [units, merges, more] = match launch.kernel.name {
        "embedding" => [(numbers[0] / 128) as f64, 0.0, 0.0],
        "choices" => [numbers[0] as f64, rows, rows * numbers[2] as f64],
        _ => [point.rows as f64, 0.0, 0.0],
    };
    let parts = merges * f64::from(launch.grid[0]);
    Work {
        variant: launch.kernel.name.to_string(),
        quantities: [blocks, blocks * units, merges, parts, more, 0.0],
        hand_overs: [if merges > 0.0 { 1.0 } else { 0.0 }, 0.0],
        at_the_end: if merges > 0.0 { &[2, 3, 4] } else { &[] },
        ..Work::default()
    }
}
