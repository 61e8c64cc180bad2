//! `cuda/model/pack.cu`: weights into the order the linear kernels read.

use super::linear::{Needs, Shape, or_null};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static PACK: Kernel = Kernel { file: "pack", name: "pack", threads: 256, max_shared: 0 };

/// Packs rows of a matrix; a layer made of several matrices takes one launch for each.
///
/// Packed weights are `[ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8]` bf16: tiles of 16 rows and 32 columns.
#[derive(Debug, Clone, Copy)]
pub struct Pack {
    /// Rows of this matrix.
    pub rows: usize,
    /// The whole layer; each launch clears what its last tile has beyond `n`.
    pub layer: Shape,
}

/// To which packed row a row of the matrix goes.
pub enum Place<'a> {
    /// Row `r` to packed row `first + r`.
    From(usize),
    /// Row `r` to packed row `place[r]`, u32; one that is not below `n` is left out.
    At(&'a Buffer),
}

impl Pack {
    /// Bytes a launch must move: each row read and written once.
    pub fn bytes(&self) -> u64 {
        (self.rows * self.layer.k * 4) as u64
    }

    /// `out` the packed weights of the layer, `matrix` `[rows][k]` bf16.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] where a buffer is too small or a shape is not as stated; else what the device says.
    pub fn launch(&self, device: &dyn Device, out: &Buffer, matrix: &Buffer, place: &Place) -> Result<()> {
        let Pack { rows, layer } = *self;
        let needs = Needs("pack");
        let (first, places) = match place {
            Place::From(first) => (*first, None),
            Place::At(places) => (0, Some(*places)),
        };
        needs.that(
            (1..1 << 30).contains(&rows)
                && layer.n < 1 << 30
                && (places.is_some() || (rows <= layer.n && first <= layer.n - rows)),
            "that its rows are some of the layer's",
            &format!("{rows} rows from {first} on of {}", layer.n),
        )?;
        needs.that(
            layer.k > 0 && layer.k.is_multiple_of(32),
            "a multiple of 32",
            &format!("{} columns", layer.k),
        )?;
        needs.buffer("out", out, layer.weight_bytes())?;
        needs.buffer("matrix", matrix, rows * layer.k * 2)?;
        needs.optional("place", places, rows * 4)?;
        let args = [
            out.into(),
            matrix.into(),
            or_null(places),
            (rows as u32).into(),
            (layer.n as u32).into(),
            (layer.k as u32).into(),
            (first as u32).into(),
        ];
        let padding = layer.packed_rows() - layer.n;
        device.launch(&PACK, [(rows + padding) as u32, 1, 1], 0, &args)
    }
}
