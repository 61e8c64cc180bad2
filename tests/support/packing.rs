//! The packed order of weights, written down once more for the tests of linear kernels.

use dflash::kernels::linear::Shape;

/// `w [n][k]` with row `r` at packed row `place(r)`, rows nobody owns zero.
pub fn pack_rows(w: &[u16], shape: Shape, place: impl Fn(usize) -> usize) -> Vec<u16> {
    let Shape { k, .. } = shape;
    let mut packed = vec![0; shape.weight_bytes() / 2];
    for (r, row) in w.chunks(k).enumerate() {
        let p = place(r);
        for (c, &value) in row.iter().enumerate() {
            // W[tile][group of 32][half][block of 8][row in half][column in block]
            let index = [p / 16, c / 32, p / 8 % 2, c / 8 % 4, p % 8, c % 8];
            let sizes = [shape.packed_rows() / 16, k / 32, 2, 4, 8, 8];
            let at = index.iter().zip(sizes).fold(0, |at, (i, size)| at * size + i);
            packed[at] = value;
        }
    }
    packed
}
