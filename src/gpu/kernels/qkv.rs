//! `cuda/model/qkv.cu`: query, key and value projections with head norms, RoPE and the write to the pages.

use super::PAGE;
use super::linear::{Input, Launch, Needs, Shape, input_bytes, kernels, or_null, prefill};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static KERNELS: [Kernel; 5] = kernels("qkv", ["qkv_8", "qkv_16", "qkv_32", "qkv_64", "qkv_128"]);
static PREFILL: [Kernel; 2] = prefill(["prefill_qkv", "prefill_qkv_wgmma"]);

/// Query, key and value heads of `rstd * (in W^T)`; queries and keys normed (where they have gains) and turned.
#[derive(Debug, Clone, Copy)]
pub struct Qkv {
    pub rows: usize,
    /// Inputs, a multiple of 32.
    pub k: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
    /// Rows of the query buffer.
    pub query_rows: usize,
    /// Pages there are.
    pub pages: usize,
    /// Rows of the page table and page numbers in each.
    pub sequences: usize,
    pub sequence_pages: usize,
    /// Rows of the RoPE table; positions beyond are taken for the last.
    pub positions: usize,
    /// Keys and values only: the weights of the queries are not read.
    pub keys_only: bool,
}

/// What [`Qkv`] reads and writes besides its input.
pub struct Places<'a> {
    /// `[rows]` of `Row` in `rows.cuh`: sequence, position, slot, query, each u32.
    pub rows: &'a Buffer,
    /// `[query_rows][heads][head_dim]` bf16.
    pub queries: &'a Buffer,
    /// `[pages][kv_heads][64][head_dim]` bf16, chunks permuted as `page_offset` in `rows.cuh`.
    pub keys: &'a Buffer,
    /// As `keys`.
    pub values: &'a Buffer,
    /// `[sequences][sequence_pages]` u32.
    pub table: &'a Buffer,
    /// `[head_dim]` f32, or no norm.
    pub q_gain: Option<&'a Buffer>,
    /// `[head_dim]` f32, or no norm.
    pub k_gain: Option<&'a Buffer>,
    /// `[positions][head_dim]` f32: a row's cosines, then its sines.
    pub rope: &'a Buffer,
}

impl Qkv {
    pub fn shape(&self) -> Shape {
        Shape { n: (self.heads + 2 * self.kv_heads) * self.head_dim, k: self.k }
    }

    fn first_block(&self) -> usize {
        if self.keys_only { self.heads * self.head_dim / 128 } else { 0 }
    }

    /// Bytes a launch must move: weights per pass, inputs, results, a row of the RoPE table per row.
    pub fn bytes(&self) -> u64 {
        let skipped = self.first_block() * 128;
        let outputs = self.shape().n - if self.keys_only { self.heads * self.head_dim } else { 0 };
        input_bytes(self.shape(), self.rows, true) - (skipped * self.k * 2 * self.rows.div_ceil(128)) as u64
            + (self.rows * (outputs * 2 + self.head_dim * 4 + 16)) as u64
    }

    /// A row's sequence, slot, query and the page numbers may be anything: what does not exist is not written.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a shape is not as stated; else what the device says.
    pub fn launch(&self, device: &dyn Device, input: &Input, to: &Places) -> Result<()> {
        let Qkv {
            rows,
            heads,
            kv_heads,
            head_dim,
            query_rows,
            pages,
            sequences,
            sequence_pages,
            positions,
            ..
        } = *self;
        let needs = Needs("qkv");
        needs.that(
            head_dim == 64 || head_dim == 128,
            "64 or 128",
            &format!("a head dimension of {head_dim}"),
        )?;
        needs.that(
            heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "a multiple of the key heads, none of them 0",
            &format!("{heads} query heads and {kv_heads} key heads"),
        )?;
        let counts = [query_rows, pages, sequences, sequence_pages * PAGE, positions];
        needs.that(
            counts.iter().all(|&c| u32::try_from(c).is_ok()) && positions > 0,
            "less than 2^32 of each and a position",
            &format!("query rows, pages, sequences, slots, positions {counts:?}"),
        )?;
        needs.buffer("rows", to.rows, rows * 16)?;
        needs.buffer("queries", to.queries, query_rows * heads * head_dim * 2)?;
        needs.buffer("keys", to.keys, pages * kv_heads * PAGE * head_dim * 2)?;
        needs.buffer("values", to.values, pages * kv_heads * PAGE * head_dim * 2)?;
        needs.buffer("page table", to.table, sequences * sequence_pages * 4)?;
        needs.optional("q_gain", to.q_gain, head_dim * 4)?;
        needs.optional("k_gain", to.k_gain, head_dim * 4)?;
        needs.buffer("rope", to.rope, positions * head_dim * 4)?;
        let args = [
            to.rows.into(),
            to.queries.into(),
            to.keys.into(),
            to.values.into(),
            to.table.into(),
            or_null(to.q_gain),
            or_null(to.k_gain),
            to.rope.into(),
            (heads as u32).into(),
            (kv_heads as u32).into(),
            (head_dim as u32).into(),
            (query_rows as u32).into(),
            (pages as u32).into(),
            (sequences as u32).into(),
            (sequence_pages as u32).into(),
            (positions as u32).into(),
        ];
        let first_block = self.first_block();
        let launch = Launch {
            kernels: &KERNELS,
            prefill: Some(&PREFILL),
            shape: self.shape(),
            rows,
            input,
            gather: None,
            first_block,
        };
        launch.run(device, &args)
    }
}
