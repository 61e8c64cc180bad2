//! `cuda/model/heads.cu`: norms, partial RoPE and stores of the heads of gated attention, after [`super::plain`].

use super::check::{Check, u32s};
use super::{PAGE, ROW_BYTES};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

static SPLIT: Kernel = Kernel { file: "heads", name: "split_heads", threads: 256, max_shared: 0 };

/// Query heads, key heads, value heads and the output gates of the query heads. Queries and keys get an RMSNorm and
/// RoPE in their first dimensions.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Rows, 1 to 65535 x 65535.
    pub rows: usize,
    /// Columns of the input, a multiple of 4.
    pub pitch: usize,
    /// Query heads, and as many gates.
    pub heads: usize,
    /// Key heads, and as many value heads; at least 1.
    pub kv_heads: usize,
    /// A multiple of 8 up to 256.
    pub head_dim: usize,
    /// Dimensions that RoPE rotates: a multiple of 16 up to `head_dim`.
    pub rotary_dims: usize,
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
    /// Of the norms.
    pub eps: f32,
}

/// The buffers of [`Heads`].
pub struct HeadsBuffers<'a> {
    /// Input, `[rows][pitch]` f32: query heads, key heads, value heads, gates.
    pub input: &'a Buffer,
    /// `[rows]` `Row`: sequence, position, slot and query row.
    pub rows: &'a Buffer,
    /// Output, `[query_rows][heads][head_dim]` bf16.
    pub queries: &'a Buffer,
    /// Output, as `queries`.
    pub gates: &'a Buffer,
    /// Output, `[pages][kv_heads][64][head_dim]` bf16, chunks permuted by `page_offset` of `cuda/common/rows.cuh`.
    pub keys: &'a Buffer,
    /// Output, as `keys`.
    pub values: &'a Buffer,
    /// The page table, `[sequences][sequence_pages]` u32.
    pub table: &'a Buffer,
    /// `[head_dim]` f32 each, of queries and of keys.
    pub gains: [&'a Buffer; 2],
    /// `[positions][rotary_dims]` f32: a position's cosines, then its sines.
    pub rope: &'a Buffer,
}

impl Heads {
    /// Bytes a launch must move: the input, half as many of outputs, and a row of the RoPE table per row.
    pub fn bytes(&self) -> u64 {
        let columns = 2 * (self.heads + self.kv_heads) * self.head_dim;
        (self.rows * (columns * 6 + self.rotary_dims * 4 + ROW_BYTES)) as u64
    }

    /// Rows and page numbers may have any value: the kernel skips writes that are out of range.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, buffers: &HeadsBuffers) -> Result<()> {
        let Heads { rows, pitch, heads, kv_heads, head_dim, rotary_dims, query_rows, pages, .. } = *self;
        let Heads { sequences, sequence_pages, positions, eps, .. } = *self;
        let check = Check("split_heads");
        let columns = 2 * (heads + kv_heads) * head_dim;
        check.that(
            head_dim.is_multiple_of(8) && head_dim <= 256 && rotary_dims.is_multiple_of(16),
            format_args!("heads of {head_dim}, {rotary_dims} of them rotated"),
            "a multiple of 8 up to 256, and a multiple of 16",
        )?;
        check.that(
            heads > 0
                && kv_heads > 0
                && rotary_dims <= head_dim
                && pitch >= columns
                && pitch.is_multiple_of(4),
            format_args!("{heads} and {kv_heads} heads in rows of {pitch}"),
            format_args!("at least one head, and {columns} columns"),
        )?;
        let counts = [rows * pitch, query_rows, pages, sequences, sequence_pages * PAGE, positions];
        check.that(
            counts.iter().all(|&c| u32::try_from(c).is_ok()) && rows > 0 && positions > 0,
            format_args!("inputs, query rows, pages, sequences, slots, positions {counts:?}"),
            "less than 2^32 of each, and at least one row and position",
        )?;
        let &HeadsBuffers { input, rows: table_of_rows, queries, gates, keys, values, table, gains, rope } =
            buffers;
        check.aligned("the input", input, rows * pitch * 4)?;
        check.aligned("rows", table_of_rows, rows * ROW_BYTES)?;
        check.aligned("queries", queries, query_rows * heads * head_dim * 2)?;
        check.aligned("gates", gates, query_rows * heads * head_dim * 2)?;
        check.aligned("keys", keys, pages * kv_heads * PAGE * head_dim * 2)?;
        check.aligned("values", values, pages * kv_heads * PAGE * head_dim * 2)?;
        check.at_least("the page table", table, sequences * sequence_pages * 4)?;
        gains.iter().try_for_each(|gain| check.aligned("a gain", gain, head_dim * 4))?;
        check.aligned("rope", rope, positions * rotary_dims * 4)?;
        let mut args = [queries, gates, keys, values, input, table_of_rows, table].map(Arg::from).to_vec();
        args.extend([gains[0], gains[1], rope].map(Arg::from));
        args.extend(u32s([pitch, heads, kv_heads, head_dim, rotary_dims, query_rows]));
        args.extend(u32s([pages, sequences, sequence_pages, positions]));
        args.push(eps.into());
        let blocks = (2 * (heads + kv_heads)).div_ceil(8);
        device.launch(&SPLIT, [rows as u32, blocks as u32, 1], 0, &args)
    }
}
