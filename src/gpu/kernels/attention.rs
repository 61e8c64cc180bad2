//! `cuda/model/attention.cu` and `cuda/model/drafter_attention.cu`: attention over paged keys and values.
//!
//! The keys and values of a layer are two buffers `[pages][kv_heads][64][head_dim]` bf16, with 16-byte chunks
//! permuted by `page_offset` of `cuda/common/rows.cuh`. A row of the page table lists the pages of a
//! sequence. Queries and outputs are `[rows][heads][head_dim]` bf16. Query head `h` reads KV head
//! `h / (heads / kv_heads)`.
//!
//! A *packed row* is one query head of one row. A CUDA block of [`Attention`] computes up to 64 packed rows (32 with
//! heads of 256) that share a KV head, over one *split*, an interval of the keys.

use super::check::{Check, or_null, u32s};
use super::{MAX_SHARED, PAGE, SPAN_BYTES};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

/// The kernels of a kind of mask, by head dimension (64, 128, 256).
struct Kernels {
    /// By packed rows per CUDA block: 16, 32 and, except for 256 dimensions, 64.
    of: [[Option<Kernel>; 3]; 3],
    /// They merge the splits.
    merge: [Option<Kernel>; 3],
}

/// The kernels with these names, of head dimensions 64, 128, 256.
const fn kernels(
    file: &'static str,
    names: [[Option<&'static str>; 3]; 3],
    merge: [Option<&'static str>; 3],
    tree: bool,
) -> Kernels {
    let mut all = Kernels { of: [const { [const { None }; 3] }; 3], merge: [const { None }; 3] };
    let mut i = 0;
    while i < 9 {
        let (dim, rows) = (64 << (i / 3), 16 << (i % 3));
        if let Some(name) = names[i / 3][i % 3] {
            let max_shared = shared_bytes(dim, rows) + if tree { tree_bytes(dim, rows) } else { 0 };
            assert!(max_shared <= if dim == 256 { MAX_SHARED_OF_256 } else { MAX_SHARED });
            all.of[i / 3][i % 3] = Some(Kernel { file, name, threads: 128, max_shared });
        }
        i += 1;
    }
    let mut i = 0;
    while i < 3 {
        if let Some(name) = merge[i] {
            all.merge[i] = Some(Kernel { file, name, threads: 128, max_shared: 0 });
        }
        i += 1;
    }
    all
}

static CHAIN: Kernels = kernels(
    "attention",
    [
        [Some("attention_64x16"), Some("attention_64x32"), Some("attention_64x64")],
        [Some("attention_128x16"), Some("attention_128x32"), Some("attention_128x64")],
        [Some("attention_256x16"), Some("attention_256x32"), None],
    ],
    [Some("attention_merge_64"), Some("attention_merge_128"), Some("attention_merge_256")],
    false,
);
static TREE: Kernels = kernels(
    "attention",
    [
        [Some("attention_tree_64x16"), Some("attention_tree_64x32"), Some("attention_tree_64x64")],
        [Some("attention_tree_128x16"), Some("attention_tree_128x32"), Some("attention_tree_128x64")],
        [Some("attention_tree_256x16"), Some("attention_tree_256x32"), None],
    ],
    [Some("attention_tree_merge_64"), Some("attention_tree_merge_128"), Some("attention_tree_merge_256")],
    true,
);
static DRAFTER: Kernels = kernels(
    "drafter_attention",
    [
        [Some("drafter_attention_64x16"), Some("drafter_attention_64x32"), Some("drafter_attention_64x64")],
        [
            Some("drafter_attention_128x16"),
            Some("drafter_attention_128x32"),
            Some("drafter_attention_128x64"),
        ],
        [None, None, None],
    ],
    [Some("drafter_attention_merge_64"), Some("drafter_attention_merge_128"), None],
    false,
);

/// By head dimension.
static PREFILL: [Kernel; 3] = [
    prefill("attention_prefill_64", 64),
    prefill("attention_prefill_128", 128),
    prefill("attention_prefill_256", 256),
];

const fn prefill(name: &'static str, head_dim: usize) -> Kernel {
    let max_shared = shared_bytes(head_dim, most_rows(head_dim));
    Kernel { file: "attention", name, threads: 128, max_shared }
}

/// The most packed rows of a CUDA block.
const fn most_rows(head_dim: usize) -> usize {
    if head_dim == 256 { 32 } else { 64 }
}

/// The most shared memory of a CUDA block with heads of 256, whose keys and values take 128 KiB: that of an A100.
const MAX_SHARED_OF_256: u32 = 163 << 10;

/// Maximum splits of a sequence, a dimension of the grid and of the partial results.
const MAX_SPLITS: usize = 500;
/// Maximum query heads per key/value head. The tiles of a sequence's rows are a dimension of the grid, which has
/// at most 65535 blocks: 1024 sequences of 64 rows and 32 heads.
pub const MAX_GROUP: usize = 32;
/// Maximum cache slots of a sequence.
pub const MAX_SLOTS: usize = split_start(MAX_SPLITS);

/// Bytes of shared memory of a CUDA block, laid out by `Attention` in `cuda/model/attention.cuh`.
const fn shared_bytes(head_dim: usize, rows: usize) -> u32 {
    let queries = rows * head_dim * 2;
    let keys_and_values = 4 * PAGE * head_dim * 2;
    // With fewer than 64 rows, 64 / rows warps share a row. They exchange probabilities and maxima.
    let exchanged = if rows < 64 { rows * PAGE * 2 + 64 / rows * rows * 4 } else { 0 };
    let views = rows * 16;
    let nonfinite = PAGE * head_dim / 8;
    (queries + keys_and_values + exchanged + views + nonfinite) as u32
}

/// Bytes of additional shared memory for trees: the nonfinite flags of a second tile, and the paths of the
/// rows.
const fn tree_bytes(head_dim: usize, rows: usize) -> u32 {
    (PAGE * head_dim / 8 + rows * 64) as u32
}

/// First slot of a split, as `split_start` in `cuda/model/attention.cuh`. Splits have 128 slots below slot
/// 1024, 256 slots below slot 4096, 512 slots below slot 32768, 2048 slots from there on. Short splits fill the
/// card where the context is short; long ones keep the partial results and the empty blocks few.
pub const fn split_start(split: usize) -> usize {
    match split {
        0..=8 => split * 128,
        9..=20 => 1024 + (split - 8) * 256,
        21..=76 => 4096 + (split - 20) * 512,
        _ => 32768 + (split - 76) * 2048,
    }
}

/// The split that contains a slot.
pub fn split_of(slot: usize) -> usize {
    match slot {
        0..1024 => slot / 128,
        1024..4096 => 8 + (slot - 1024) / 256,
        4096..32768 => 20 + (slot - 4096) / 512,
        _ => 76 + (slot - 32768) / 2048,
    }
}

/// Heads, cache and window of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Layer {
    /// Query heads, 1 to [`MAX_GROUP`] per key/value head.
    pub heads: usize,
    /// Key/value heads, 1 to 65535.
    pub kv_heads: usize,
    /// 64 or 128; 256 except for blocks of a drafter.
    pub head_dim: usize,
    /// Pages in the key buffer and in the value buffer, at least 1.
    pub pages: usize,
    /// Columns of the page table, at least 1.
    pub pages_per_sequence: usize,
    /// Positions that a row attends to, its own included; 0: all.
    pub window: usize,
    /// Factor of the scores, positive, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// The KV cache of one layer, and the spans of a pass's sequences.
#[derive(Debug, Clone, Copy)]
pub struct Paged<'a> {
    /// Keys, `[pages][kv_heads][64][head_dim]` bf16, including those of this pass's rows.
    pub k: &'a Buffer,
    /// Values, as `k`.
    pub v: &'a Buffer,
    /// The page table, `[sequences][pages_per_sequence]` u32.
    pub table: &'a Buffer,
    /// `[sequences]` `Span`: the rows of this pass are in slots `context..context + rows`.
    pub spans: &'a Buffer,
    /// As the queries, bf16: the output is multiplied by their sigmoid. A drafter's block has none.
    pub gates: Option<&'a Buffer>,
}

/// The rows of the same pass that a row attends to. Every row also attends to the context, within its window.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// The earlier rows and itself.
    Chain,
    /// `[sequences][block]` u64: bit i is set if row i is the row itself or an ancestor. The row's position
    /// is `context + number of set bits - 1`. Parents come before their children. The output has the same
    /// bits as in a chain of just these rows.
    Tree(&'a Buffer),
    /// All rows, as in the drafter's block. A window extends in both directions.
    Block,
}

/// Attention for single tokens, chains, trees and drafter blocks. The bits of a row depend only on its query
/// and on the keys and values that it attends to, in order of their positions.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// The layer.
    pub layer: Layer,
    /// Sequences, at least 1.
    pub sequences: usize,
    /// Rows per sequence in `q` and `out`, 1 to 64; a sequence's span may have fewer.
    pub block: usize,
    /// Slots of each sequence that a launch can read, context plus rows, at most [`MAX_SLOTS`]. Later slots
    /// are ignored.
    pub capacity: usize,
}

impl Attention {
    fn group(&self) -> usize {
        self.layer.heads / self.layer.kv_heads
    }

    /// Index of the kernel by packed rows per CUDA block, and this number.
    fn variant(&self) -> (usize, usize) {
        match (self.block * self.group()).min(most_rows(self.layer.head_dim)) {
            0..=16 => (0, 16),
            17..=32 => (1, 32),
            _ => (2, 64),
        }
    }

    /// Key/value heads, row tiles of all sequences, and the splits of each, including those that are empty
    /// until the sequence is long enough.
    fn grid(&self) -> [usize; 3] {
        let tiles = (self.block * self.group()).div_ceil(self.variant().1);
        [self.layer.kv_heads, self.sequences * tiles, split_of(self.capacity - 1) + 1]
    }

    /// Bytes of the partial results of splits until they are merged, scratch memory of a launch. All layers and
    /// graphs of a shape share it.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the kernels do not support the shape.
    pub fn partial_bytes(&self) -> Result<usize> {
        self.check()?;
        let [heads, tiles, splits] = self.grid();
        Ok(splits * heads * tiles * self.variant().1 * (self.layer.head_dim + 2) * 4)
    }

    /// Bytes a launch must move for sequences with these (context, rows): queries, outputs, and the keys and
    /// values that at least one row attends to.
    pub fn bytes(&self, spans: &[(usize, usize)]) -> u64 {
        spans.iter().map(|&(context, rows)| self.layer.bytes(context, rows)).sum()
    }

    fn check(&self) -> Result<()> {
        let check = Check("attention");
        self.layer.check(&check)?;
        let Attention { sequences, block, capacity, .. } = *self;
        let (rows, slots) = (1..=64, 1..=self.layer.pages_per_sequence * PAGE);
        check.that(
            rows.contains(&block) && sequences > 0 && slots.contains(&capacity),
            format_args!("{sequences} sequences of {block} rows, {capacity} slots"),
            format_args!("1 to 64 rows and 1 to {} slots", slots.end()),
        )?;
        let fits = self.grid()[2] <= MAX_SPLITS;
        check.that(fits, format_args!("{capacity} slots"), format_args!("at most {MAX_SLOTS}"))
    }

    /// `out`, `q` `[sequences * block][heads][head_dim]` bf16; `partials` at least [`Attention::partial_bytes`].
    /// Rows beyond those of a span are not written. Launches a kernel for the splits and, if the capacity has
    /// several, one that merges them.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        out: &Buffer,
        q: &Buffer,
        paged: Paged,
        mask: Mask,
        partials: &Buffer,
    ) -> Result<()> {
        let (rows, layer) = (self.sequences * self.block, &self.layer);
        let check = Check("attention");
        let partial_bytes = self.partial_bytes()?;
        layer.check_buffers(&check, self.sequences, rows, [out, q], paged)?;
        check.aligned("partials", partials, partial_bytes)?;
        let (kernels, masks) = match mask {
            Mask::Block => (&DRAFTER, None),
            Mask::Chain => (&CHAIN, None),
            Mask::Tree(masks) => {
                check.aligned("masks", masks, rows * 8)?;
                (&TREE, Some(masks))
            }
        };
        let (variant, size) = self.variant();
        let dim = layer.head_dim / 128;
        let (Some(kernel), Some(merge)) = (&kernels.of[dim][variant], &kernels.merge[dim]) else {
            return Err(crate::Error::Internal(
                "kernel attention: a drafter's block with heads of 256".into(),
            ));
        };
        let gates = (!matches!(mask, Mask::Block)).then_some(paged.gates);
        let [heads, tiles, splits] = self.grid();
        let mut args: Vec<Arg> = [out, partials, q, paged.k, paged.v].map(Arg::from).to_vec();
        args.extend([paged.table, paged.spans].map(Arg::from));
        args.extend(gates.map(or_null).into_iter().chain(masks.map(Arg::from)));
        args.extend(u32s([self.block, layer.heads, layer.kv_heads, layer.pages]));
        args.extend(u32s([layer.pages_per_sequence, self.capacity, layer.window]));
        args.push(layer.factor().into());
        device.launch(kernel, [heads, tiles, splits].map(|n| n as u32), kernel.max_shared, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let mut args: Vec<Arg> = [out, partials, paged.spans].map(Arg::from).to_vec();
        args.extend(gates.map(or_null).into_iter().chain(masks.map(Arg::from)));
        args.extend(u32s([self.block, layer.heads, layer.kv_heads]));
        args.extend(u32s([self.capacity, layer.window, size, splits]));
        // Each warp merges a packed row.
        let blocks = size.min(self.block * self.group()).div_ceil(4);
        let grid = [heads, tiles, blocks].map(|n| n as u32);
        device.launch(merge, grid, 0, &args)
    }
}

/// Causal attention for a prompt chunk of one sequence. The bits do not depend on how a prompt is divided
/// into chunks. They differ from those of [`Attention`] if a row attends to more than one split.
#[derive(Debug, Clone, Copy)]
pub struct Prefill {
    /// The layer.
    pub layer: Layer,
    /// Rows in `q` and `out`, at least 1; the span may have fewer.
    pub rows: usize,
}

impl Prefill {
    /// Bytes a launch must move for a chunk of `rows` rows after `context` positions, counted as in
    /// [`Attention::bytes`].
    pub fn bytes(&self, context: usize, rows: usize) -> u64 {
        self.layer.bytes(context, rows)
    }

    /// `out`, `q` `[rows][heads][head_dim]` bf16; `paged` has one sequence. Rows beyond those of its span are
    /// not written.
    ///
    /// # Errors
    /// As [`Attention::launch`].
    pub fn launch(&self, device: &dyn Device, out: &Buffer, q: &Buffer, paged: Paged) -> Result<()> {
        let (rows, layer) = (self.rows, &self.layer);
        let check = Check("attention_prefill");
        layer.check(&check)?;
        layer.check_buffers(&check, 1, rows, [out, q], paged)?;
        let mut args: Vec<Arg> = [out, q, paged.k, paged.v, paged.table, paged.spans].map(Arg::from).to_vec();
        args.push(or_null(paged.gates));
        args.extend(u32s([rows, layer.heads, layer.kv_heads, layer.pages]));
        args.extend(u32s([layer.pages_per_sequence, layer.window]));
        args.push(layer.factor().into());
        let tiles = (rows * (layer.heads / layer.kv_heads)).div_ceil(most_rows(layer.head_dim));
        let kernel = &PREFILL[layer.head_dim / 128];
        device.launch(kernel, [tiles as u32, layer.kv_heads as u32, 1], kernel.max_shared, &args)
    }
}

impl Layer {
    /// Factor that turns scores into exponents of two.
    fn factor(&self) -> f32 {
        self.scale * std::f32::consts::LOG2_E
    }

    fn bytes(&self, context: usize, rows: usize) -> u64 {
        let slots = match (rows, self.window) {
            (0, _) => 0,
            (_, 0) => context + rows,
            (_, window) => rows + context.min(window - 1),
        };
        (2 * 2 * self.head_dim * (rows * self.heads + slots * self.kv_heads)) as u64
    }

    fn check(&self, check: &Check) -> Result<()> {
        let Layer { heads, kv_heads, head_dim, pages, pages_per_sequence, window, scale } = *self;
        let groups =
            kv_heads > 0 && heads.is_multiple_of(kv_heads) && (1..=MAX_GROUP).contains(&(heads / kv_heads));
        check.that(
            groups && kv_heads <= 65535 && [64, 128, 256].contains(&head_dim),
            format_args!("{heads} heads of {head_dim} on {kv_heads} key/value heads"),
            format_args!("heads of 64, 128 or 256, 1 to {MAX_GROUP} of them per key/value head"),
        )?;
        // The maximum of scaled scores is the scaled maximum.
        check.that(
            scale > 0.0 && scale.is_finite(),
            format_args!("a scale of {scale}"),
            "a positive, finite number",
        )?;
        let max = 1 << 31;
        check.that(
            pages > 0 && pages_per_sequence > 0 && pages_per_sequence * PAGE <= max && window <= max,
            format_args!("{pages} pages, {pages_per_sequence} per sequence, a window of {window}"),
            format_args!("at least one page and at most {max} tokens"),
        )
    }

    fn check_buffers(
        &self,
        check: &Check,
        sequences: usize,
        rows: usize,
        [out, q]: [&Buffer; 2],
        paged: Paged,
    ) -> Result<()> {
        let queries = rows * self.heads * self.head_dim * 2;
        let cache = self.pages * self.kv_heads * PAGE * self.head_dim * 2;
        check.that(
            rows > 0 && rows * self.heads <= u32::MAX as usize,
            format_args!("{rows} rows of {} heads", self.heads),
            "at least one row and less than 2^32 heads of all rows",
        )?;
        check.aligned("out", out, queries)?;
        check.aligned("q", q, queries)?;
        check.optional("gates", paged.gates, queries)?;
        check.aligned("k", paged.k, cache)?;
        check.aligned("v", paged.v, cache)?;
        check.at_least("the page table", paged.table, sequences * self.pages_per_sequence * 4)?;
        check.aligned("spans", paged.spans, sequences * SPAN_BYTES)
    }
}
