//! `cuda/model/attention.cu` and `cuda/model/drafter_attention.cu`: attention over paged keys and values.
//!
//! Keys and values of one layer lie in two buffers `[pages][kv_heads][64][head_dim]` bf16, chunks permuted as
//! `page_offset` of `cuda/common/rows.cuh` has it; a sequence's pages are named by its row of the page table. Queries and
//! outputs are `[rows][heads][head_dim]` bf16; kv head of head h is h / (heads / kv_heads).

use super::{PAGE, aligned, at_least};
use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::{Error, Result};

const fn kernel(file: &'static str, name: &'static str, head_dim: usize, rows: usize) -> Kernel {
    Kernel { file, name, threads: 128, max_shared: shared_bytes(head_dim, rows) }
}

const fn tree(name: &'static str, head_dim: usize, rows: usize) -> Kernel {
    let max_shared = shared_bytes(head_dim, rows) + tree_bytes(head_dim, rows);
    Kernel { file: "attention", name, threads: 128, max_shared }
}

/// Per head size 64 and 128, blocks of 16, 32 and 64 packed rows.
static ATTENTION: [[Kernel; 3]; 2] = [
    [
        kernel("attention", "attention_64x16", 64, 16),
        kernel("attention", "attention_64x32", 64, 32),
        kernel("attention", "attention_64x64", 64, 64),
    ],
    [
        kernel("attention", "attention_128x16", 128, 16),
        kernel("attention", "attention_128x32", 128, 32),
        kernel("attention", "attention_128x64", 128, 64),
    ],
];
static TREE: [[Kernel; 3]; 2] = [
    [
        tree("attention_tree_64x16", 64, 16),
        tree("attention_tree_64x32", 64, 32),
        tree("attention_tree_64x64", 64, 64),
    ],
    [
        tree("attention_tree_128x16", 128, 16),
        tree("attention_tree_128x32", 128, 32),
        tree("attention_tree_128x64", 128, 64),
    ],
];
static DRAFTER: [[Kernel; 3]; 2] = [
    [
        kernel("drafter_attention", "drafter_attention_64x16", 64, 16),
        kernel("drafter_attention", "drafter_attention_64x32", 64, 32),
        kernel("drafter_attention", "drafter_attention_64x64", 64, 64),
    ],
    [
        kernel("drafter_attention", "drafter_attention_128x16", 128, 16),
        kernel("drafter_attention", "drafter_attention_128x32", 128, 32),
        kernel("drafter_attention", "drafter_attention_128x64", 128, 64),
    ],
];
static PREFILL: [Kernel; 2] = [
    kernel("attention", "attention_prefill_64", 64, 64),
    kernel("attention", "attention_prefill_128", 128, 64),
];

const SPLITS_PER_GROUP: usize = 8;
/// Factors of that many groups of splits fit the memory of the smallest block's keys.
const MAX_GROUPS: usize = 64;
/// Positions that a sequence can have.
pub const MOST_SLOTS: usize = split_start(MAX_GROUPS * SPLITS_PER_GROUP);

/// Shared memory of a block, as `Attention` in `cuda/model/attention.cuh` lays it out.
const fn shared_bytes(head_dim: usize, rows: usize) -> u32 {
    let queries = rows * head_dim * 2;
    let keys_and_values = 4 * PAGE * head_dim * 2;
    let weights = rows * PAGE * 2;
    let maxima_and_sums = 2 * 4 * rows * 4;
    let views = rows * 16;
    let spoiled = PAGE * head_dim / 8;
    (queries + keys_and_values + weights + maxima_and_sums + views + spoiled) as u32
}

/// What a tree's block has on top: the spoiled values of a second tile, and the paths of its rows.
const fn tree_bytes(head_dim: usize, rows: usize) -> u32 {
    (PAGE * head_dim / 8 + rows * 64) as u32
}

/// First slot of a split, as `split_start` in `cuda/model/attention.cuh`: 128 slots each below 4096, 512 below 32768, 2048
/// beyond.
pub const fn split_start(split: usize) -> usize {
    match split {
        0..=32 => split * 128,
        33..=88 => 4096 + (split - 32) * 512,
        _ => 32768 + (split - 88) * 2048,
    }
}

/// The split a slot is in.
pub fn split_of(slot: usize) -> usize {
    match slot {
        0..4096 => slot / 128,
        4096..32768 => 32 + (slot - 4096) / 512,
        _ => 88 + (slot - 32768) / 2048,
    }
}

/// Keys, values and heads of a layer, and how far its rows see.
#[derive(Debug, Clone, Copy)]
pub struct Layer {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Pages in the key buffer and in the value buffer.
    pub pages: usize,
    pub pages_per_sequence: usize,
    /// Positions a row sees, itself included; 0: all.
    pub window: usize,
    /// Of scores, 1/sqrt(head_dim) as a rule.
    pub scale: f32,
}

/// Where the sequences of a pass have their keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Paged<'a> {
    /// `[pages][kv_heads][64][head_dim]` bf16, those of this pass's rows included.
    pub k: &'a Buffer,
    /// As `k`.
    pub v: &'a Buffer,
    /// `[sequences][pages_per_sequence]` u32.
    pub table: &'a Buffer,
    /// `[sequences]` of (context, rows) u32.
    pub spans: &'a Buffer,
}

/// How a row sees the other rows of its pass; all of them lie behind the context.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// Itself and those before it.
    Chain,
    /// `[sequences][block]` u64: bit i of a row's word says that it sees row i. A row has the bits of its ancestors
    /// and its own, and stands at position context + number of bits - 1; parents come before their children. Its
    /// output has the bits it would have in a chain of just these rows.
    Tree(&'a Buffer),
    /// All rows: the drafter's block. A window reaches to both sides.
    Block,
}

/// Where the parts of a result wait to be merged; one for all layers and graphs of a shape.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// [`Attention::partial_bytes`].
    pub partials: Buffer,
    /// [`Attention::counter_bytes`], zeros at the start and after every launch.
    pub counters: Buffer,
}

/// Attention of single tokens, chains, trees and drafter blocks. A row's bits depend on its query and on the keys it
/// sees, in order of their positions, alone.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    pub layer: Layer,
    pub sequences: usize,
    /// Rows per sequence in q and out, 1 to 64; of which a sequence's span may use fewer.
    pub block: usize,
    /// Slots a launch can reach in each sequence: contexts plus rows. Longer sequences are cut.
    pub capacity: usize,
}

impl Attention {
    fn group(&self) -> usize {
        self.layer.heads / self.layer.kv_heads
    }

    /// Which of the three block sizes, and its packed rows.
    fn variant(&self) -> (usize, usize) {
        match self.block * self.group() {
            0..=16 => (0, 16),
            17..=32 => (1, 32),
            _ => (2, 64),
        }
    }

    fn grid(&self) -> [usize; 3] {
        let tiles = (self.block * self.group()).div_ceil(self.variant().1);
        [split_of(self.capacity - 1) + 1, self.layer.kv_heads, self.sequences * tiles]
    }

    /// Bytes of [`Workspace::partials`].
    ///
    /// # Errors
    /// [`Error::Internal`] for a shape the kernels do not have.
    pub fn partial_bytes(&self) -> Result<usize> {
        self.check()?;
        let [splits, heads, tiles] = self.grid();
        Ok(splits * heads * tiles * self.variant().1 * (self.layer.head_dim + 2) * 4)
    }

    /// Bytes of [`Workspace::counters`].
    ///
    /// # Errors
    /// As [`Attention::partial_bytes`].
    pub fn counter_bytes(&self) -> Result<usize> {
        self.check()?;
        let [splits, heads, tiles] = self.grid();
        Ok((splits.div_ceil(SPLITS_PER_GROUP) + 1) * heads * tiles * 4)
    }

    /// Bytes a launch must move for sequences of these (context, rows): queries and outputs, and the keys and values
    /// that some row sees, once.
    pub fn bytes(&self, spans: &[(usize, usize)]) -> u64 {
        spans.iter().map(|&(context, rows)| self.layer.bytes(context, rows)).sum()
    }

    fn check(&self) -> Result<()> {
        self.layer.check("attention")?;
        let Attention { sequences, block, capacity, .. } = *self;
        let room = self.layer.pages_per_sequence * PAGE;
        if !(1..=64).contains(&block) || sequences == 0 || capacity == 0 || capacity > room {
            return Err(Error::Internal(format!(
                "kernel attention: {sequences} sequences of {block} rows, {capacity} slots; possible are 1 to 64 rows \
                 and 1 to {room} slots"
            )));
        }
        if self.grid()[0] > MAX_GROUPS * SPLITS_PER_GROUP {
            return Err(Error::Internal(format!(
                "kernel attention: {capacity} slots, possible are {MOST_SLOTS}"
            )));
        }
        Ok(())
    }

    /// `out`, `q` `[sequences * block][heads][head_dim]` bf16. Rows beyond a span's are not written.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or the kernels do not have the shape; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        out: &Buffer,
        q: &Buffer,
        paged: Paged,
        mask: Mask,
        workspace: &Workspace,
    ) -> Result<()> {
        let (rows, layer) = (self.sequences * self.block, &self.layer);
        let (partials, counters) = (self.partial_bytes()?, self.counter_bytes()?);
        layer.check_buffers("attention", self.sequences, rows, [out, q], paged)?;
        aligned("attention", "workspace", &workspace.partials, partials)?;
        at_least("attention", "counters", &workspace.counters, counters)?;
        let mut args: Vec<Arg> = vec![out.into(), (&workspace.partials).into(), (&workspace.counters).into()];
        args.extend([q, paged.k, paged.v, paged.table, paged.spans].map(Arg::from));
        let kernels = match mask {
            Mask::Block => &DRAFTER,
            Mask::Chain => &ATTENTION,
            Mask::Tree(masks) => {
                aligned("attention", "masks", masks, rows * 8)?;
                args.push(masks.into());
                &TREE
            }
        };
        args.extend([self.block, layer.heads, layer.kv_heads, layer.pages].map(|n| Arg::U32(n as u32)));
        args.extend([layer.pages_per_sequence, self.capacity, layer.window].map(|n| Arg::U32(n as u32)));
        args.push(layer.factor().into());
        let kernel = &kernels[layer.head_dim / 128][self.variant().0];
        device.launch(kernel, self.grid().map(|n| n as u32), kernel.max_shared, &args)
    }
}

/// Causal attention of a chunk of one sequence's prompt. The bits do not depend on how a prompt is cut into chunks,
/// but they are not those of [`Attention`] where a row sees more than one split.
#[derive(Debug, Clone, Copy)]
pub struct Prefill {
    pub layer: Layer,
    /// Rows in q and out, of which the span may use fewer.
    pub rows: usize,
}

impl Prefill {
    /// Bytes a launch must move for a chunk of `rows` rows after `context` others: as [`Attention::bytes`].
    pub fn bytes(&self, context: usize, rows: usize) -> u64 {
        self.layer.bytes(context, rows)
    }

    /// `out`, `q` `[rows][heads][head_dim]` bf16; `paged` of one sequence. Rows beyond the span's are not written.
    ///
    /// # Errors
    /// As [`Attention::launch`].
    pub fn launch(&self, device: &dyn Device, out: &Buffer, q: &Buffer, paged: Paged) -> Result<()> {
        let (rows, layer) = (self.rows, &self.layer);
        layer.check("attention_prefill")?;
        layer.check_buffers("attention_prefill", 1, rows, [out, q], paged)?;
        let mut args: Vec<Arg> = [out, q, paged.k, paged.v, paged.table, paged.spans].map(Arg::from).to_vec();
        args.extend([rows, layer.heads, layer.kv_heads, layer.pages].map(|n| Arg::U32(n as u32)));
        args.extend([layer.pages_per_sequence, layer.window].map(|n| Arg::U32(n as u32)));
        args.push(layer.factor().into());
        let tiles = (rows * (layer.heads / layer.kv_heads)).div_ceil(64);
        let kernel = &PREFILL[layer.head_dim / 128];
        device.launch(kernel, [tiles as u32, layer.kv_heads as u32, 1], kernel.max_shared, &args)
    }
}

impl Layer {
    /// Scores are exponents of two.
    fn factor(&self) -> f32 {
        self.scale * std::f32::consts::LOG2_E
    }

    fn bytes(&self, context: usize, rows: usize) -> u64 {
        let seen = match (rows, self.window) {
            (0, _) => 0,
            (_, 0) => context + rows,
            (_, window) => rows + context.min(window - 1),
        };
        (2 * 2 * self.head_dim * (rows * self.heads + seen * self.kv_heads)) as u64
    }

    fn check(&self, kernel: &str) -> Result<()> {
        let Layer { heads, kv_heads, head_dim, pages, pages_per_sequence, window, .. } = *self;
        let groups = kv_heads > 0 && heads.is_multiple_of(kv_heads) && (1..=8).contains(&(heads / kv_heads));
        if !groups || kv_heads > 65535 || (head_dim != 64 && head_dim != 128) {
            return Err(Error::Internal(format!(
                "kernel {kernel}: {heads} heads of {head_dim} on {kv_heads} key/value heads; possible are heads of 64 \
                 and 128, 1 to 8 of them per key/value head"
            )));
        }
        let most = 1 << 31;
        if pages == 0 || pages_per_sequence == 0 || pages_per_sequence * PAGE > most || window > most {
            return Err(Error::Internal(format!(
                "kernel {kernel}: {pages} pages, {pages_per_sequence} per sequence, a window of {window}; possible \
                 are at least one page and {most} tokens"
            )));
        }
        Ok(())
    }

    fn check_buffers(
        &self,
        kernel: &str,
        sequences: usize,
        rows: usize,
        [out, q]: [&Buffer; 2],
        paged: Paged,
    ) -> Result<()> {
        let (queries, cache) =
            (rows * self.heads * self.head_dim * 2, self.pages * self.kv_heads * PAGE * self.head_dim * 2);
        if rows == 0 || rows * self.heads > u32::MAX as usize {
            return Err(Error::Internal(format!("kernel {kernel}: {rows} rows of {} heads", self.heads)));
        }
        aligned(kernel, "out", out, queries)?;
        aligned(kernel, "q", q, queries)?;
        aligned(kernel, "k", paged.k, cache)?;
        aligned(kernel, "v", paged.v, cache)?;
        at_least(kernel, "the page table", paged.table, sequences * self.pages_per_sequence * 4)?;
        aligned(kernel, "spans", paged.spans, sequences * 8)
    }
}
