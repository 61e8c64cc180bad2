//! `cuda/model/qkv.cu`: query, key and value projections with per-head norms and RoPE. Keys and values are
//! written to the pages.

use super::check::{Check, or_null, u32s};
use super::linear::{Input, Kernels, Launch, PASS, Shape, input_bytes, kernels};
use super::{PAGE, ROW_BYTES};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device};

static KERNELS: Kernels = kernels(
    "qkv",
    ["qkv_8", "qkv_16", "qkv_32", "qkv_64", "qkv_128"],
    Some(["prefill_qkv", "prefill_qkv_wgmma"]),
);

/// Query, key and value heads of `rstd * (in W^T)`. Queries and keys get an RMSNorm, if they have gains, and
/// RoPE.
#[derive(Debug, Clone, Copy)]
pub struct Qkv {
    /// Rows, at least 1.
    pub rows: usize,
    /// Inputs: the hidden size, a multiple of 32.
    pub k: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key heads, and as many value heads; at least 1.
    pub kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
    /// Rows of the query buffer.
    pub query_rows: usize,
    /// Pages in the key buffer and in the value buffer.
    pub pages: usize,
    /// Rows of the page table.
    pub sequences: usize,
    /// Columns of the page table.
    pub sequence_pages: usize,
    /// Rows of the RoPE table, at least 1; later positions use the last row.
    pub positions: usize,
    /// Computes only keys and values; query weights are not read, except in a block of 128 rows shared with
    /// keys.
    pub keys_only: bool,
}

/// The buffers of [`Qkv`] besides its input.
pub struct QkvBuffers<'a> {
    /// `[rows]` `Row`: sequence, position, slot and query row.
    pub rows: &'a Buffer,
    /// Output, `[query_rows][heads][head_dim]` bf16.
    pub queries: &'a Buffer,
    /// Output, `[pages][kv_heads][64][head_dim]` bf16, chunks permuted by `page_offset` of
    /// `cuda/common/rows.cuh`.
    pub keys: &'a Buffer,
    /// Output, as `keys`.
    pub values: &'a Buffer,
    /// The page table, `[sequences][sequence_pages]` u32.
    pub table: &'a Buffer,
    /// `[head_dim]` f32; `None`: queries are not normed.
    pub q_gain: Option<&'a Buffer>,
    /// `[head_dim]` f32; `None`: keys are not normed.
    pub k_gain: Option<&'a Buffer>,
    /// `[positions][head_dim]` f32: a position's cosines, then its sines.
    pub rope: &'a Buffer,
}

impl Qkv {
    /// Shape of the weights: queries, keys, values.
    pub fn shape(&self) -> Shape {
        Shape { n: (self.heads + 2 * self.kv_heads) * self.head_dim, k: self.k }
    }

    fn first_block(&self) -> usize {
        if self.keys_only { self.heads * self.head_dim / 128 } else { 0 }
    }

    /// Bytes a launch must move: weights per pass, inputs, results, and per row a row of the RoPE table.
    pub fn bytes(&self) -> u64 {
        let skipped = self.first_block() * 128;
        let outputs = self.shape().n - if self.keys_only { self.heads * self.head_dim } else { 0 };
        input_bytes(self.shape(), self.rows, true) - (skipped * self.k * 2 * self.rows.div_ceil(PASS)) as u64
            + (self.rows * (outputs * 2 + self.head_dim * 4 + 16)) as u64
    }

    /// The sequence, slot and query of a row and the page numbers may have any value: the kernel skips writes
    /// that are out of range.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, input: &Input, buffers: &QkvBuffers) -> Result<()> {
        let Qkv { rows, heads, kv_heads, head_dim, query_rows, pages, sequences, .. } = *self;
        let Qkv { sequence_pages, positions, .. } = *self;
        let check = Check("qkv");
        check.that(
            head_dim == 64 || head_dim == 128,
            format_args!("a head dimension of {head_dim}"),
            "64 or 128",
        )?;
        check.that(
            heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads),
            format_args!("{heads} query heads and {kv_heads} key heads"),
            "a multiple of the key heads, and at least 1",
        )?;
        let counts = [query_rows, pages, sequences, sequence_pages * PAGE, positions];
        check.that(
            counts.iter().all(|&c| u32::try_from(c).is_ok()) && positions > 0,
            format_args!("query rows, pages, sequences, slots, positions {counts:?}"),
            "less than 2^32 of each and at least one position",
        )?;
        let &QkvBuffers { rows: row_table, queries, keys, values, table, q_gain, k_gain, rope } = buffers;
        check.aligned("rows", row_table, rows * ROW_BYTES)?;
        check.aligned("queries", queries, query_rows * heads * head_dim * 2)?;
        check.aligned("keys", keys, pages * kv_heads * PAGE * head_dim * 2)?;
        check.aligned("values", values, pages * kv_heads * PAGE * head_dim * 2)?;
        check.aligned("page table", table, sequences * sequence_pages * 4)?;
        check.optional("q_gain", q_gain, head_dim * 4)?;
        check.optional("k_gain", k_gain, head_dim * 4)?;
        check.aligned("rope", rope, positions * head_dim * 4)?;
        let mut args = [row_table, queries, keys, values, table].map(Arg::from).to_vec();
        args.extend([or_null(q_gain), or_null(k_gain), rope.into()]);
        args.extend(u32s([heads, kv_heads, head_dim, query_rows]));
        args.extend(u32s([pages, sequences, sequence_pages, positions]));
        let launch = Launch::new(&KERNELS, self.shape(), rows, input);
        Launch { first_block: self.first_block(), ..launch }.run(device, &args)
    }
}
