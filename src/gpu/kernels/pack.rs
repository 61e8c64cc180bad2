//! `cuda/model/pack.cu`: puts weights into the order in which the linear kernels read them.

use super::check::{Check, or_null, u32s};
use super::linear::Shape;
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static PACK: Kernel = Kernel { file: "pack", name: "pack", threads: 256, max_shared: 0 };

/// Packs the rows of a matrix. A layer of several matrices needs one launch for each.
///
/// Packed weights are `[ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8]` bf16: tiles of 16 rows and 32
/// columns.
#[derive(Debug, Clone, Copy)]
pub struct Pack {
    /// Rows of this matrix, 1 to 2^30 - 1.
    pub rows: usize,
    /// The shape of the whole layer, `k` a multiple of 32. Each launch clears the rows of the last tile from
    /// `n` on.
    pub layer: Shape,
}

/// The packed row of each row of the matrix.
pub enum RowMap<'a> {
    /// Row `r` goes to packed row `first + r`.
    From(usize),
    /// Row `r` goes to packed row `map[r]`, u32; rows whose entry is not below `n` are skipped.
    At(&'a Buffer),
}

impl Pack {
    /// Bytes a launch must move: each row read and written once.
    pub fn bytes(&self) -> u64 {
        (self.rows * self.layer.k * 4) as u64
    }

    /// Packs `matrix` `[rows][k]` bf16 into its rows of `out`, the packed weights of the layer.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, out: &Buffer, matrix: &Buffer, map: &RowMap) -> Result<()> {
        let Pack { rows, layer } = *self;
        let check = Check("pack");
        let (first, map) = match map {
            RowMap::From(first) => (*first, None),
            RowMap::At(map) => (0, Some(*map)),
        };
        check.that(
            (1..1 << 30).contains(&rows)
                && layer.n < 1 << 30
                && (map.is_some() || (rows <= layer.n && first <= layer.n - rows)),
            format_args!("{rows} rows from {first} on of {}", layer.n),
            "rows of the layer",
        )?;
        check.that(
            layer.k > 0 && layer.k.is_multiple_of(32),
            format_args!("{} columns", layer.k),
            "a multiple of 32",
        )?;
        check.aligned("out", out, layer.weight_bytes())?;
        check.aligned("matrix", matrix, rows * layer.k * 2)?;
        check.optional("map", map, rows * 4)?;
        let mut args = vec![out.into(), matrix.into(), or_null(map)];
        args.extend(u32s([rows, layer.n, layer.k, first]));
        let padding = layer.packed_rows() - layer.n;
        device.launch(&PACK, [(rows + padding) as u32, 1, 1], 0, &args)
    }
}
